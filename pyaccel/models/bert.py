"""BERT, to be read from top to bottom.

The modules carry Hugging Face's names, so the state dict has the keys of transformers' BertModel and
checkpoints go both ways. The forward differs in one thing: padding is dropped before the embeddings and put
back after the last layer, so that everything between works on `[total_tokens, hidden_size]`, real tokens only
(pyaccel/packing.py).

    model = BertModel.from_pretrained("path/to/folder")
    hidden, pooled = model(input_ids, attention_mask)

The math of a layer is `encoder_layer` of pyaccel/nn/encoder_layer.py, written for anything that has these
attribute names: our BertLayer below and transformers' own layers, which pyaccel.hf runs through it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyaccel import ops
from pyaccel.activations import HIDDEN_ACTS
from pyaccel.models import checkpoint
from pyaccel.nn import ResidualLayerNorm
from pyaccel.nn.encoder_layer import (
    encoder_layer,
    intermediate,
    linear_residual_layernorm,
    packed_attention,
    project_qkv,
)
from pyaccel.packing import PackedLayout, layout, layout_from_cu_seqlens, pack, unpack

__all__ = [
    "BertConfig",
    "BertModel",
    "BertModelOutput",
]


@dataclass(frozen=True)
class BertConfig:
    """The fields of a BERT `config.json` that change the computation, and all others in `extra`.

    Raises ValueError for what this BERT does not compute: decoders, cross-attention, relative positions,
    another activation.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        reasons = []
        if self.hidden_size % self.num_attention_heads:
            reasons.append(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in HIDDEN_ACTS:
            reasons.append(f"hidden_act {self.hidden_act!r} is not one of {', '.join(HIDDEN_ACTS)}")
        if self.position_embedding_type != "absolute":
            reasons.append(f"position_embedding_type {self.position_embedding_type!r} is not 'absolute'")
        if self.is_decoder or self.add_cross_attention:
            reasons.append("it is a decoder (is_decoder or add_cross_attention); only encoders are supported")
        if reasons:
            raise ValueError("BertConfig: " + "; ".join(reasons))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BertConfig:
        """From the content of a `config.json`. Unknown fields go to `extra`."""
        known = {f.name for f in fields(cls)} - {"extra"}
        return cls(
            **{name: value for name, value in values.items() if name in known},
            extra={name: value for name, value in values.items() if name not in known},
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json`: `extra` and the fields on one level."""
        values = asdict(self)
        return {**values.pop("extra"), **values}


class BertModelOutput(NamedTuple):
    last_hidden_state: Tensor  # [batch, seq, hidden_size], or [total_tokens, hidden_size] for packed input
    pooler_output: Tensor | None  # [batch, hidden_size]; None for a model without a pooler


class BertEmbeddings(nn.Module):
    """Word + token type + position, LayerNorm, dropout: packed ids -> `[total_tokens, hidden_size]`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = ResidualLayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        words, norm, dropout = self.word_embeddings, self.LayerNorm, self.dropout
        if input_ids is not None:
            return ops.bert_embeddings(
                input_ids,
                words.weight,
                self.position_embeddings.weight,
                self.token_type_embeddings.weight,
                norm.weight,
                norm.bias,
                position_ids=position_ids,
                token_type_ids=token_type_ids,
                eps=norm.eps,
                dropout_p=dropout.p,
                training=dropout.training,
                padding_idx=words.padding_idx,
            )
        assert inputs_embeds is not None  # one of the two: BertModel has seen to it
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]
        else:
            types = self.token_type_embeddings(token_type_ids)
        hidden: Tensor = dropout(norm(inputs_embeds + types, self.position_embeddings(position_ids)))
        return hidden


class BertSelfAttention(nn.Module):
    """The three projections, and attention over packed tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: PackedLayout) -> Tensor:
        return packed_attention(q, k, v, tokens, dropout_p=self.dropout.p if self.dropout.training else 0.0)


class BertOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual), which ends both halves of a layer."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = ResidualLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return linear_residual_layernorm(self, x, residual)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def forward(self, hidden: Tensor, tokens: PackedLayout) -> Tensor:
        heads = (self.self.num_attention_heads, self.self.attention_head_size)
        q, k, v = (x.unflatten(-1, heads) for x in project_qkv(self.self, hidden))
        out: Tensor = self.output(self.self(q, k, v, tokens), hidden)
        return out


class BertIntermediate(nn.Module):
    """act(dense(x))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return intermediate(self, hidden)


class BertLayer(nn.Module):
    """Attention and the feed-forward network.

    What its modules give one after the other, `output(intermediate(h), h)` of `h = attention(hidden)`, with less saved
    for the backward.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, tokens: PackedLayout) -> Tensor:
        return encoder_layer(self, hidden, lambda q, k, v: self.attention.self(q, k, v, tokens))


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, tokens: PackedLayout) -> Tensor:
        for layer in self.layer:
            hidden = layer(hidden, tokens)
        return hidden


class BertPooler(nn.Module):
    """tanh(dense(x)) of each sequence's first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))


class BertModel(nn.Module):
    """Embeddings, encoder and pooler, with the parameter names of transformers' BertModel."""

    config_class = BertConfig

    def __init__(self, config: BertConfig, *, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> BertModelOutput:
        """Padded input, or packed input when `cu_seqlens` and `max_seqlen` are given.

        Args:
            input_ids: int `[batch, seq]`, or packed `[total_tokens]`.
            attention_mask: `[batch, seq]`, nonzero for tokens, any pattern of padding; None: no padding.
            token_type_ids, position_ids: shaped like `input_ids` (or broadcastable to it); by default zeros,
                and the column in the padded batch or the position in the packed sequence.
            inputs_embeds: in place of `input_ids`, `[..., hidden_size]`.
            cu_seqlens: int `[batch + 1]`: packed sequence i is `input_ids[cu_seqlens[i]:cu_seqlens[i + 1]]`.
            max_seqlen: the longest packed sequence.

        Returns:
            `last_hidden_state` shaped as the input came: padding slots are zero, except position 0 of a row,
            which is computed even where it is padding because the pooler reads it (as in transformers).
            `pooler_output` `[batch, hidden_size]`; for a packed sequence without tokens it is that of a zero
            state.

        Raises:
            ValueError: for arguments that do not go together.
        """
        source = input_ids if inputs_embeds is None else inputs_embeds
        if source is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("BertModel: pass either input_ids or inputs_embeds")
        is_packed = cu_seqlens is not None or max_seqlen is not None
        dims = 1 if is_packed else 2
        if source.dim() != dims + (inputs_embeds is not None):
            expected = "[total_tokens]" if is_packed else "[batch, seq] (packed input needs cu_seqlens)"
            raise ValueError(
                f"BertModel: input_ids must be {expected}, inputs_embeds one dimension more, "
                f"got {tuple(source.shape)}"
            )
        shape = source.shape[:dims]

        if not is_packed:
            if attention_mask is None:
                attention_mask = torch.ones(shape, dtype=torch.bool, device=source.device)
            tokens = layout(attention_mask, sort_by_length=True, keep_first=True)
        elif cu_seqlens is None or max_seqlen is None or attention_mask is not None:
            raise ValueError("BertModel: packed input takes cu_seqlens and max_seqlen, no attention_mask")
        else:
            tokens = layout_from_cu_seqlens(cu_seqlens, max_seqlen, len(source))
        if position_ids is None and tokens.seq_len > self.config.max_position_embeddings:
            raise ValueError(
                f"BertModel: sequences of {tokens.seq_len} tokens, but the model has "
                f"{self.config.max_position_embeddings} positions; truncate the input"
            )

        def packed(x: Tensor | None) -> Tensor | None:
            return x if x is None or is_packed else pack(x, tokens)

        def like_input(ids: Tensor | None) -> Tensor | None:
            return None if ids is None else ids.expand(shape)

        hidden = self.embeddings(
            packed(input_ids),
            packed(like_input(token_type_ids)),
            tokens.positions if position_ids is None else packed(like_input(position_ids)),
            packed(inputs_embeds),
        )
        hidden = self.encoder(hidden, tokens)

        if not is_packed:
            hidden = unpack(hidden, tokens)
        if self.pooler is None:
            return BertModelOutput(hidden, None)
        first = _first_tokens(hidden, tokens) if is_packed else hidden[:, 0]
        return BertModelOutput(hidden, self.pooler(first))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, *, dtype: torch.dtype | None = None) -> BertModel:
        """Load a Hugging Face BERT from a local folder, or by hub id with huggingface_hub and a network.

        The folder holds `config.json` and `model.safetensors` (or its shards and their index). Weights of a
        task model ("bert.encoder...") load too, without the head. Weights without a pooler give a model
        without one. The model is in evaluation mode, in `dtype` or else in the dtype of the saved word
        embeddings, on the CPU.

        Raises:
            FileNotFoundError: no such folder, or a file is missing.
            ValueError: not a BERT, or the weights do not fit the config; names the keys.
        """
        model: BertModel = checkpoint.load(*checkpoint.read(path_or_hub_id), dtype, cls)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, for transformers' BertModel.from_pretrained too.

        int8 layers (pyaccel.quantization) are written as `weight` int8 and `weight_scale` fp32 and named in
        config.json's `quantization_config`; only pyaccel loads those. Raises ValueError where some are int8
        and some still train: freeze them first.
        """
        checkpoint.write(self, folder)


def _first_tokens(packed: Tensor, tokens: PackedLayout) -> Tensor:
    """[batch, hidden_size]: each packed sequence's first token, zeros for a sequence without tokens."""
    filled = tokens.cu_seqlens.diff().nonzero().flatten()
    first = packed.index_select(0, tokens.cu_seqlens[filled])
    return packed.new_zeros(tokens.batch_size, packed.shape[1]).index_copy_(0, filled, first)


def activation(config: BertConfig) -> nn.Module:
    """The module of `config.hidden_act`."""
    return HIDDEN_ACTS[config.hidden_act].module()
