"""GPT-2, to be read from top to bottom: the pre-norm, causal counterpart of `pyaccel.models.bert`, of the same parts.

    model = GPT2Model(GPT2Config(n_layer=12))
    model.load_state_dict(transformers_gpt2.state_dict())    # transformers' names and shapes
    hidden = model(input_ids, attention_mask)

As in BERT the padding is dropped once and everything works on `[total_tokens, n_embd]`. Between two blocks runs a
residual stream that is never normalized; what a half block adds to it, and the LayerNorm with which the next half
begins, are one pass (`residual_layernorm(..., return_sum=True)`). It trains and gives hidden states; there is no cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel import ops
from pyaccel.nn.encoder_layer import packed_attention
from pyaccel.packing import PackedLayout, layout, pack, unpack

__all__ = ["GPT2Block", "GPT2Config", "GPT2Model"]


@dataclass(frozen=True)
class GPT2Config:
    """The fields of a GPT-2 `config.json` that change the computation. Raises ValueError for what can't be."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"GPT2Config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


class Conv1D(nn.Module):
    """A Linear as GPT-2 keeps it: weight `[in_features, out_features]`."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        return ops.linear_activation(x, self.weight.t(), self.bias, activation)

    def without_bias(self, x: Tensor) -> Tensor:
        """For the pass that follows, which adds the bias itself."""
        return x @ self.weight


class GPT2Attention(nn.Module):
    """q, k and v in one product, and causal attention within each packed sequence; its output lacks c_proj's bias."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, tokens: PackedLayout) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_head, -1)) for part in self.c_attn(x).chunk(3, -1))
        dropout_p = self.attn_dropout.p if self.attn_dropout.training else 0.0
        context = packed_attention(q, k, v, tokens, dropout_p=dropout_p, is_causal=True)
        return self.c_proj.without_bias(context)


class GPT2MLP(nn.Module):
    """Two products around a tanh GELU; its output lacks c_proj's bias."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, inner)
        self.c_proj = Conv1D(inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj.without_bias(self.c_fc(x, "gelu_tanh"))


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(
        self, x: Tensor, stream: Tensor, tokens: PackedLayout, next_norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """One block, from its normalized input to the next one's.

        Args:
            x: `ln_1(stream)`, `[total_tokens, n_embd]`.
            stream: the residual stream, the same.
            tokens: where the sequences are.
            next_norm: the LayerNorm that follows: the next block's `ln_1`, or the model's last.

        Returns:
            `next_norm(stream)` and the stream, with what attention and feed-forward network added to it.
        """
        attn, mlp = self.attn, self.mlp
        x, stream = add_and_norm(attn(x, tokens), attn.c_proj, stream, self.ln_2, attn.resid_dropout)
        return add_and_norm(mlp(x), mlp.c_proj, stream, next_norm, mlp.dropout)


def add_and_norm(
    x: Tensor, product: Conv1D, stream: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout
) -> tuple[Tensor, Tensor]:
    """`norm(sum)` and the sum `dropout(x + product.bias) + stream`, in one pass."""
    out: tuple[Tensor, Tensor] = ops.residual_layernorm(
        x,
        stream,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        dropout_p=dropout.p,
        training=dropout.training,
        x_bias=product.bias,
        return_sum=True,
    )
    return out


class GPT2Model(nn.Module):
    """Embeddings, blocks and the last LayerNorm, with the parameter names of transformers' GPT2Model."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                # What adds to the stream begins smaller, the more of it there is (GPT-2, section 2.3).
                scale = (2 * config.n_layer) ** -0.5 if "c_proj" in name else 1.0
                nn.init.normal_(parameter, std=config.initializer_range * scale)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states `[batch, seq, n_embd]` of int `[batch, seq]`; zeros in the padding.

        `attention_mask` `[batch, seq]` is nonzero for tokens; positions are the columns. Raises ValueError for a
        sequence longer than the model has positions.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"GPT2Model: input_ids must be [batch, seq], got {tuple(input_ids.shape)}")
        if input_ids.shape[1] > self.config.n_positions:
            raise ValueError(
                f"GPT2Model: sequences of {input_ids.shape[1]} tokens, but the model has {self.config.n_positions} "
                f"positions; truncate the input"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        tokens = layout(attention_mask, sort_by_length=True)
        stream = self.drop(self.wte(pack(input_ids, tokens)) + self.wpe(tokens.positions))
        norms: list[Any] = [*(block.ln_1 for block in self.h), self.ln_f]
        x = norms[0](stream)
        for block, next_norm in zip(self.h, norms[1:], strict=True):
            x, stream = block(x, stream, tokens, next_norm)
        return unpack(x, tokens)
