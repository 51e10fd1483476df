"""One call of every op but attention, on small inputs: what holds for all of them is tested over this table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyaccel import ops

Inputs = dict[str, Tensor]
ROWS, COLS, INNER, VOCAB = 6, 16, 24, 11


@dataclass(frozen=True)
class OpCall:
    """How to call an op.

    Attributes:
        make: its tensors by name, on the CPU.
        call: what it returns of them, as a tuple.
        differentiable: the names of those that have a gradient.
    """

    make: Callable[[torch.dtype], Inputs]
    call: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
    differentiable: tuple[str, ...] = ()

    def leaves(self, inputs: Inputs) -> list[Tensor]:
        return [inputs[name] for name in self.differentiable]


def _tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _norm(dtype: torch.dtype) -> Inputs:
    return {
        "x": (torch.randn(ROWS, COLS) + 1).to(dtype),
        "residual": torch.randn(ROWS, COLS).to(dtype),
        "weight": torch.randn(COLS).to(dtype),
        "bias": torch.randn(COLS).to(dtype),
        "x_bias": torch.randn(COLS).to(dtype),
    }


def _linear(dtype: torch.dtype) -> Inputs:
    return {
        "x": torch.randn(ROWS, COLS).to(dtype),
        "weight": (torch.randn(INNER, COLS) * 0.3).to(dtype),
        "bias": torch.randn(INNER).to(dtype),
    }


def _linear_norm(dtype: torch.dtype) -> Inputs:
    return {
        **_linear(dtype),
        "residual": torch.randn(ROWS, INNER).to(dtype),
        "ln_weight": torch.randn(INNER).to(dtype),
        "ln_bias": torch.randn(INNER).to(dtype),
    }


def _feed_forward(dtype: torch.dtype) -> Inputs:
    norm = _norm(dtype)
    return {
        "x": norm["x"],
        "residual": norm["residual"],
        "ln_weight": norm["weight"],
        "ln_bias": norm["bias"],
        "x_bias": norm["x_bias"],
        "weight1": (torch.randn(INNER, COLS) * 0.3).to(dtype),
        "bias1": torch.randn(INNER).to(dtype),
        "weight2": (torch.randn(COLS, INNER) * 0.3).to(dtype),
    }


def _embeddings(dtype: torch.dtype) -> Inputs:
    return {
        "input_ids": torch.randint(0, VOCAB, (2, 3)),
        "position_ids": torch.randint(0, 5, (2, 3)),
        "token_type_ids": torch.randint(0, 2, (2, 3)),
        "word_weight": torch.randn(VOCAB, COLS).to(dtype),
        "position_weight": torch.randn(5, COLS).to(dtype),
        "token_type_weight": torch.randn(2, COLS).to(dtype),
        "weight": torch.randn(COLS).to(dtype),
        "bias": torch.randn(COLS).to(dtype),
    }


def _packed_embeddings(dtype: torch.dtype) -> Inputs:
    given = _embeddings(dtype)
    return {
        "input_ids": given["input_ids"].view(-1),
        "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32),
        **{n: given[n] for n in ("word_weight", "position_weight", "weight", "bias")},
    }


def _masked_lm(dtype: torch.dtype) -> Inputs:
    labels = torch.randint(0, VOCAB, (ROWS,))
    labels[1] = -100
    return {
        "hidden": torch.randn(ROWS, COLS).to(dtype),
        "weight": torch.randn(VOCAB, COLS).to(dtype),
        "bias": torch.randn(VOCAB).to(dtype),
        "labels": labels,
    }


def _codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _int8_matmul(dtype: torch.dtype) -> Inputs:
    return {
        "a": _codes(ROWS, COLS),
        "b": _codes(INNER, COLS),
        "a_scale": torch.rand(ROWS) * 0.01,
        "b_scale": torch.rand(INNER) * 0.01,
        "bias": torch.randn(INNER).to(dtype),
        "residual": torch.randn(ROWS, INNER).to(dtype),
        "a_offset": torch.randn(ROWS) * 0.01,
    }


def _weight_only(dtype: torch.dtype) -> Inputs:
    return {
        "x": torch.randn(ROWS, COLS).to(dtype),
        "b": _codes(INNER, COLS),
        "b_scale": torch.rand(INNER) * 0.01,
        "bias": torch.randn(INNER).to(dtype),
    }


def _int8_linear_deployed(dtype: torch.dtype) -> Inputs:
    return {
        "x": torch.randn(ROWS, COLS).to(dtype),
        "weight": _codes(INNER, COLS),
        "weight_scale": torch.rand(INNER) * 0.01,
        "bias": torch.randn(INNER).to(dtype),
        "input_scale": torch.tensor(0.02),
        "smooth_scale": torch.rand(COLS) + 0.5,
    }


NORM = ("x", "residual", "weight", "bias", "x_bias")
TABLES = ("word_weight", "position_weight", "token_type_weight", "weight", "bias")
CALLS = {
    "residual_layernorm": OpCall(
        _norm, lambda t: _tuple(ops.residual_layernorm(**t, eps=1e-5, return_sum=True)), NORM
    ),
    "residual_layernorm-codes": OpCall(
        _norm, lambda t: _tuple(ops.residual_layernorm(**t, eps=1e-5, return_sum=True, quantize_output=True))
    ),
    "residual_layernorm-rms": OpCall(
        _norm, lambda t: _tuple(ops.residual_layernorm(**t, eps=1e-5, return_sum=True, rms_norm=True)), NORM
    ),
    "residual_layernorm-bare": OpCall(
        lambda dtype: {"x": torch.randn(ROWS, COLS).to(dtype)},
        lambda t: _tuple(ops.residual_layernorm(t["x"], None, None, None, eps=1e-5, return_sum=True)),
        ("x",),
    ),
    "bias_gelu": OpCall(
        lambda dtype: {"x": torch.randn(ROWS, COLS).to(dtype), "bias": torch.randn(COLS).to(dtype)},
        lambda t: _tuple(ops.bias_gelu(**t)),
        ("x", "bias"),
    ),
    "bias_gelu-codes": OpCall(
        lambda dtype: {"x": torch.randn(ROWS, COLS).to(dtype), "bias": torch.randn(COLS).to(dtype)},
        lambda t: _tuple(ops.bias_gelu(**t, quantize_output=True)),
    ),
    "linear_activation": OpCall(
        _linear, lambda t: _tuple(ops.linear_activation(**t, activation="gelu")), ("x", "weight", "bias")
    ),
    "linear_activation-relu": OpCall(
        _linear, lambda t: _tuple(ops.linear_activation(**t, activation="relu")), ("x", "weight", "bias")
    ),
    "linear_activation-none": OpCall(
        _linear, lambda t: _tuple(ops.linear_activation(**t)), ("x", "weight", "bias")
    ),
    "linear_residual_layernorm": OpCall(
        _linear_norm,
        lambda t: _tuple(ops.linear_residual_layernorm(**t, eps=1e-5)),
        ("x", "weight", "bias", "residual", "ln_weight", "ln_bias"),
    ),
    "layernorm_mlp": OpCall(
        _feed_forward,
        lambda t: _tuple(ops.layernorm_mlp(**t, eps=1e-5)),
        ("x", "residual", "ln_weight", "ln_bias", "x_bias", "weight1", "bias1", "weight2"),
    ),
    "bert_embeddings": OpCall(_embeddings, lambda t: _tuple(ops.bert_embeddings(**t, eps=1e-5)), TABLES),
    "bert_embeddings-packed": OpCall(
        _packed_embeddings,
        lambda t: _tuple(ops.bert_embeddings(**t, token_type_weight=None, eps=1e-5)),
        ("word_weight", "position_weight", "weight", "bias"),
    ),
    "masked_lm_cross_entropy": OpCall(
        _masked_lm, lambda t: _tuple(ops.masked_lm_cross_entropy(**t)), ("hidden", "weight", "bias")
    ),
    "masked_lm_cross_entropy-none": OpCall(
        _masked_lm,
        lambda t: _tuple(ops.masked_lm_cross_entropy(**t, reduction="none")),
        ("hidden", "weight", "bias"),
    ),
    "quantize_per_token": OpCall(
        lambda dtype: {"x": torch.randn(ROWS, COLS).to(dtype)}, lambda t: ops.quantize_per_token(**t)
    ),
    "quantize_per_token_with_offset": OpCall(
        lambda dtype: {"x": torch.randn(ROWS, COLS).to(dtype), "factor": torch.rand(COLS) + 0.5},
        lambda t: ops.quantize_per_token_with_offset(**t),
    ),
    "quantize_per_channel": OpCall(
        lambda dtype: {"weight": torch.randn(ROWS, COLS).to(dtype)}, lambda t: ops.quantize_per_channel(**t)
    ),
    "quantize_per_tensor": OpCall(
        lambda dtype: {
            "x": torch.randn(ROWS, COLS).to(dtype),
            "scale": torch.tensor(0.02),
            "factor": torch.rand(COLS) + 0.5,
        },
        lambda t: ops.quantize_per_tensor(**t),
    ),
    "int8_matmul": OpCall(_int8_matmul, lambda t: _tuple(ops.int8_matmul(**t, activation="gelu"))),
    "int8_matmul-codes": OpCall(_int8_matmul, lambda t: _tuple(ops.int8_matmul(**t, quantize_output=True))),
    "int8_weight_only_matmul": OpCall(
        _weight_only, lambda t: _tuple(ops.int8_weight_only_matmul(**t, activation="gelu"))
    ),
    "int8_linear": OpCall(
        _linear, lambda t: _tuple(ops.int8_linear(**t, activation="gelu")), ("x", "weight", "bias")
    ),
    "int8_linear-deployed": OpCall(
        _int8_linear_deployed, lambda t: _tuple(ops.int8_linear(**t)), ("x", "bias")
    ),
    "int8_linear-weight_only": OpCall(
        _linear, lambda t: _tuple(ops.int8_linear(**t, weight_only=True)), ("x", "weight", "bias")
    ),
}
DIFFERENTIABLE = tuple(name for name, call in CALLS.items() if call.differentiable)
