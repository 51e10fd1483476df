"""BERT, to be read from top to bottom.

The modules carry Hugging Face's names, so the state dict has the keys of transformers' BertModel and
checkpoints go both ways. The forward differs in one thing: padding is dropped before the embeddings and put
back after the last layer, so that everything between works on `[total_tokens, hidden_size]`, real tokens only
(pyaccel/packing.py).

    model = BertModel.from_pretrained("path/to/folder")
    hidden, pooled = model(input_ids, attention_mask)

The math of a layer is `encoder_layer`, written for anything that has these attribute names: our BertLayer
below and transformers' own layers, which pyaccel.hf runs through it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from pyaccel import ops, reference
from pyaccel.models import files
from pyaccel.nn import Int8Linear, ResidualLayerNorm
from pyaccel.nn.int8_files import make_int8, quantization_config
from pyaccel.ops.common import autocast_dtype
from pyaccel.packing import PackedLayout, layout, layout_from_cu_seqlens, pack, unpack

__all__ = [
    "BertConfig",
    "BertModel",
    "BertModelOutput",
    "encoder_layer",
    "packed_attention",
]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}


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
        if self.hidden_act not in _ACTIVATIONS:
            reasons.append(f"hidden_act {self.hidden_act!r} is not one of {', '.join(_ACTIVATIONS)}")
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
        return dropout(norm(inputs_embeds + types, self.position_embeddings(position_ids)))


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
    """Parameters of LayerNorm(dropout(dense(x)) + residual), which ends both halves of a layer."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = ResidualLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)


class BertIntermediate(nn.Module):
    """Parameters of act(dense(x))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config)


class BertLayer(nn.Module):
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
        return load(*read(path_or_hub_id), dtype, cls)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, for transformers' BertModel.from_pretrained too.

        int8 layers (pyaccel.quantization) are written as `weight` int8 and `weight_scale` fp32 and named in
        config.json's `quantization_config`; only pyaccel loads those. Raises ValueError where some are int8
        and some still train: freeze them first.
        """
        write(self, folder)


def read(path_or_hub_id: str | Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A folder, the values of its `config.json` and its weights."""
    folder = files.find_folder(path_or_hub_id)
    return folder, files.read_json(folder / "config.json"), plain_names(files.read_safetensors(folder))


def load(
    folder: Path,
    values: dict[str, Any],
    saved: dict[str, Tensor],
    dtype: torch.dtype | None,
    kind: type[BertModel] = BertModel,
) -> BertModel:
    """The encoder in what `read` gave, as a BertModel or a class derived from it."""
    if values.get("model_type", "bert") != "bert":
        raise ValueError(f"{folder}: a {values['model_type']!r} checkpoint, BertModel loads 'bert'")
    try:
        config = BertConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    weights = _bert_weights(saved, folder)

    with torch.device("meta"):
        model = kind(config, add_pooling_layer=any(name.startswith("pooler.") for name in weights))
    if "quantization_config" in values:
        try:
            make_int8(model, values["quantization_config"])
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    files.check_weights(weights, model.state_dict(), folder)
    model.to(dtype or weights[_WORD_EMBEDDINGS].dtype)
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    return model.eval()


def write(model: Any, folder: str | Path, prefix: str = "") -> None:
    """Write `config.json` and `model.safetensors` of a BertModel, or of a head around one that it calls `prefix`."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    values = model.config.to_dict()
    values.pop("torch_dtype", None)  # the old name of dtype
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    dtype = str(weights[f"{prefix}{_WORD_EMBEDDINGS}"].dtype).removeprefix("torch.")
    values.update(model_type="bert", architectures=[type(model).__name__], dtype=dtype)
    values.pop("quantization_config", None)
    if quantization := quantization_config(model, prefix):
        values["quantization_config"] = quantization
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ---- the math of a layer ----


def encoder_layer(
    layer: Any,
    hidden: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    chunk_size: int = 0,
) -> Tensor:
    """One post-norm BERT layer: attention and feed-forward network, each with its residual and LayerNorm.

    Args:
        layer: a module with the attribute names of transformers' BertLayer:
            `attention.self.{query,key,value}`, `attention.output` and `output` (`dense`, `LayerNorm`,
            `dropout`), `intermediate` (`dense`, `intermediate_act_fn`).
        hidden: `[..., hidden_size]`, packed `[tokens, hidden_size]` or padded `[batch, seq, hidden_size]`.
        attend: takes q, k and v `[..., num_heads, head_dim]`, returns the context `[..., hidden_size]`. Attention's
            own dropout is its business.
        chunk_size: run the feed-forward network on so many rows at a time (in the second last dimension), for less
            memory and the same numbers; 0: on all at once.

    Returns:
        `[..., hidden_size]`. Dropout acts where the layer's dropout modules are in training mode.
    """
    attention = layer.attention
    heads = (attention.self.num_attention_heads, attention.self.attention_head_size)
    context = attend(*(x.unflatten(-1, heads) for x in project_qkv(attention.self, hidden)))

    act = layer.intermediate.intermediate_act_fn
    name = activation_name(act)
    dense = (attention.output.dense, layer.intermediate.dense, layer.output.dense)
    if name and not chunk_size and torch.is_grad_enabled() and context.requires_grad and _are_plain(dense):
        return _training_feed_forward(layer, context, hidden, name)
    hidden = linear_residual_layernorm(attention.output, context, hidden)

    def feed_forward(hidden: Tensor) -> Tensor:
        inner = project(layer.intermediate.dense, hidden, name)
        return linear_residual_layernorm(layer.output, inner if name else act(inner), hidden)

    if not chunk_size:
        return feed_forward(hidden)
    return torch.cat([feed_forward(part) for part in hidden.split(chunk_size, -2)], -2)


def project(linear: Any, x: Tensor, activation: str | None = None) -> Tensor:
    """``activation(linear(x))`` of an nn.Linear, fused; of an Int8Linear, fused; or of what else is in its place."""
    if type(linear) is nn.Linear:
        return ops.linear_activation(x, linear.weight, linear.bias, activation)
    if isinstance(linear, Int8Linear):
        return linear.linear_activation(x, activation)
    return reference.activation(linear(x), activation)


def project_qkv(attention_self: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """q, k and v ``[..., hidden_size]`` of the three projections; int8 layers quantize their common input once."""
    projections = (attention_self.query, attention_self.key, attention_self.value)
    scales = _shared_input_scales(projections)
    if scales is None or (torch.is_grad_enabled() and hidden.requires_grad):
        return tuple(project(linear, hidden) for linear in projections)
    codes, scale, offset = ops.quantize_per_token_with_offset(hidden)
    dtype = autocast_dtype(hidden.device) or hidden.dtype
    return tuple(
        ops.int8_matmul(
            codes, linear.weight, scale, weight_scale, linear.bias, out_dtype=dtype, a_offset=offset
        )
        for linear, weight_scale in zip(projections, scales, strict=True)
    )


def _are_plain(linears: tuple[Any, ...]) -> bool:
    return all(type(linear) is nn.Linear for linear in linears)


def _shared_input_scales(linears: tuple[Any, ...]) -> list[Tensor] | None:
    """The weights' scales, if these are int8 layers that quantize their common input in the same way."""
    scales = []
    for linear in linears:
        if (
            not isinstance(linear, Int8Linear)
            or linear.method != "dynamic"
            or linear.smooth_scale is not None
        ):
            return None
        if linear.weight_scale is None or (
            torch.is_grad_enabled() and linear.bias is not None and linear.bias.requires_grad
        ):
            return None
        scales.append(linear.weight_scale)
    return scales


def _training_feed_forward(layer: Any, context: Tensor, residual: Tensor, activation: str) -> Tensor:
    """The same from attention's output on, with hidden states and activation made again in the backward."""
    first, last = layer.attention.output, layer.output
    hidden, out = ops.feed_forward(
        F.linear(context, first.dense.weight),
        residual,
        first.LayerNorm.weight,
        first.LayerNorm.bias,
        layer.intermediate.dense.weight,
        layer.intermediate.dense.bias,
        last.dense.weight,
        activation=activation,
        eps=first.LayerNorm.eps,
        dropout_p=first.dropout.p,
        training=first.dropout.training,
        x_bias=first.dense.bias,
    )
    return ops.residual_layernorm(
        out,
        hidden,
        last.LayerNorm.weight,
        last.LayerNorm.bias,
        eps=last.LayerNorm.eps,
        dropout_p=last.dropout.p,
        training=last.dropout.training,
        x_bias=last.dense.bias,
    )


def linear_residual_layernorm(module: Any, x: Tensor, residual: Tensor) -> Tensor:
    """LayerNorm(dropout(dense(x)) + residual) with the parameters of `module.{dense, LayerNorm, dropout}`."""
    dense, norm, dropout = module.dense, module.LayerNorm, module.dropout
    if type(dense) is not nn.Linear:
        return ops.residual_layernorm(
            project(dense, x),
            residual,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout_p=dropout.p,
            training=dropout.training,
        )
    return ops.linear_residual_layernorm(
        x,
        dense.weight,
        dense.bias,
        residual,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        dropout_p=dropout.p,
        training=dropout.training,
    )


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: PackedLayout,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Each sequence attends to its own tokens: `[tokens, heads, head_dim]` -> `[tokens, hidden_size]`."""
    if tokens.key_indices is not None:
        k, v = k.index_select(0, tokens.key_indices), v.index_select(0, tokens.key_indices)
    context = ops.varlen_attention(
        q,
        k,
        v,
        tokens.cu_seqlens,
        tokens.cu_seqlens_k,
        tokens.max_seqlen,
        tokens.max_seqlen_k,
        dropout_p=dropout_p,
        is_causal=is_causal,
    )
    return context.flatten(-2)


# By name, because this file must not import transformers.
_FUSED_ACTIVATIONS = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}


def activation_name(function: Any) -> str | None:
    """The name under which `ops.linear_activation` fuses an activation module; None: apply it afterwards."""
    if type(function) is nn.GELU:
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    return _FUSED_ACTIVATIONS.get(f"{type(function).__module__}.{type(function).__qualname__}")


# ---- helpers of BertModel ----

_WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"


def _first_tokens(packed: Tensor, tokens: PackedLayout) -> Tensor:
    """[batch, hidden_size]: each packed sequence's first token, zeros for a sequence without tokens."""
    filled = tokens.cu_seqlens.diff().nonzero().flatten()
    first = packed.index_select(0, tokens.cu_seqlens[filled])
    return packed.new_zeros(tokens.batch_size, packed.shape[1]).index_copy_(0, filled, first)


def activation(config: BertConfig) -> nn.Module:
    """The module of `config.hidden_act`."""
    return _ACTIVATIONS[config.hidden_act]()


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Early checkpoints name LayerNorm's parameters as TensorFlow does."""
    return {n.replace(".gamma", ".weight").replace(".beta", ".bias"): t for n, t in weights.items()}


def _bert_weights(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The encoder's weights under BertModel's names, whatever model the checkpoint was saved from."""
    prefixes = [name.removesuffix(_WORD_EMBEDDINGS) for name in weights if name.endswith(_WORD_EMBEDDINGS)]
    if len(prefixes) != 1:
        raise ValueError(
            f"{folder}: not one BERT, {len(prefixes)} tensors end in {_WORD_EMBEDDINGS!r} where 1 should"
        )
    named = {name[len(prefixes[0]) :]: t for name, t in weights.items() if name.startswith(prefixes[0])}
    named.pop("embeddings.position_ids", None)  # a buffer that early checkpoints hold
    return named
