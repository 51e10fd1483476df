"""Every public op with inputs that have shown bugs: the data of :mod:`pyaccel.verify.op_checks`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import ops, reference
from pyaccel.activations import ACTIVATIONS
from pyaccel.verify.op_case import GRADIENTS, OpCase, Tensors, _sliced, _stride_0


def _rows(kind: str) -> Tensors:
    rows, cols = 7, 48
    x, residual = torch.randn(rows, cols) + 0.7, torch.randn(rows, cols)
    if kind == "large means":
        x[2] += 300.0
        x[4] -= 80.0
    elif kind == "tiny variances":
        x[1], residual[1] = 0.5 + 1e-3 * torch.randn(cols), 0.0
        x[5], residual[5] = 0.25, 0.5  # none at all
    elif kind == "strided inputs":
        x, residual = torch.randn(rows, 2 * cols)[:, ::2], torch.randn(cols, rows).t()
    elif kind == "one row":
        x, residual = x[:1], residual[:1]
    return {
        "x": x,
        "residual": residual,
        "weight": torch.randn(cols) * 0.4 + 1.0,
        "bias": torch.randn(cols),
        "x_bias": torch.randn(cols),
    }


def _layernorm(t: Tensors, rms_norm: bool = False) -> Tensor:
    return ops.residual_layernorm(**t, rms_norm=rms_norm)


def _layernorm_expected(t: Tensors, upcast: bool, rms_norm: bool = False) -> Tensor:
    return reference.residual_layernorm(**t, rms_norm=rms_norm, upcast=upcast).output


def _layernorm_cases() -> Iterator[OpCase]:
    case = partial(OpCase, "residual_layernorm", call=_layernorm, expected=_layernorm_expected)
    for kind in ("plain", "large means", "tiny variances", "strided inputs", "one row"):
        yield case(kind, partial(_rows, kind))
    for name, gradient in list(GRADIENTS.items())[1:]:
        yield case(f"plain{name}", partial(_rows, "plain"), gradient=gradient)
    yield case(
        "RMSNorm",
        partial(_rows, "plain"),
        call=partial(_layernorm, rms_norm=True),
        expected=partial(_layernorm_expected, rms_norm=True),
    )


def _activated(kind: str) -> Tensors:
    x = torch.randn(6, 40) * 2.0
    if kind == "far out":  # where exp and erf end
        x = torch.linspace(-60.0, 60.0, 240).view(6, 40)
    return {"x": x, "bias": torch.randn(40)}


def _linear_inputs() -> Tensors:
    return {
        "x": torch.randn(9, 24) + 0.5,
        "weight": torch.randn(40, 24) * 0.3,
        "bias": torch.randn(40),
    }


def _linear_expected(t: Tensors, upcast: bool, activation: str | None) -> Tensor:
    return reference.activation(F.linear(t["x"], t["weight"], t["bias"]), activation)


def _product_cases() -> Iterator[OpCase]:
    for activation in ACTIVATIONS:
        for kind in ("plain", "far out"):
            yield OpCase(
                "bias_gelu",
                f"{activation}, {kind}",
                partial(_activated, kind),
                lambda t, a=activation: ops.bias_gelu(t["x"], t["bias"], a),
                lambda t, upcast, a=activation: reference.bias_gelu(t["x"], t["bias"], a, upcast=upcast),
            )
    for name, gradient in list(GRADIENTS.items())[1:]:
        yield OpCase(
            "bias_gelu",
            f"gelu{name}",
            partial(_activated, "plain"),
            lambda t: ops.bias_gelu(t["x"], t["bias"]),
            lambda t, upcast: reference.bias_gelu(t["x"], t["bias"], upcast=upcast),
            gradient,
        )
    for fused in (None, *ACTIVATIONS):
        yield OpCase(
            "linear_activation",
            fused or "no activation",
            _linear_inputs,
            lambda t, a=fused: ops.linear_activation(t["x"], t["weight"], t["bias"], a),
            partial(_linear_expected, activation=fused),
            _sliced if fused else _stride_0,
        )


def _layer_end_inputs() -> Tensors:
    return {
        "x": torch.randn(9, 24) + 0.5,
        "weight": torch.randn(40, 24) * 0.3,
        "bias": torch.randn(40),
        "residual": torch.randn(9, 40),
        "ln_weight": torch.randn(40) * 0.4 + 1.0,
        "ln_bias": torch.randn(40),
    }


def _layer_end_expected(t: Tensors, upcast: bool) -> Tensor:
    product = F.linear(t["x"], t["weight"])
    return reference.residual_layernorm(
        product, t["residual"], t["ln_weight"], t["ln_bias"], x_bias=t["bias"], upcast=upcast
    ).output


def _feed_forward_inputs() -> Tensors:
    return {
        "x": torch.randn(6, 32) + 0.5,
        "residual": torch.randn(6, 32),
        "ln_weight": torch.randn(32) * 0.4 + 1.0,
        "ln_bias": torch.randn(32),
        "weight1": torch.randn(48, 32) * 0.2,
        "bias1": torch.randn(48),
        "weight2": torch.randn(32, 48) * 0.2,
    }


def _feed_forward_expected(t: Tensors, upcast: bool) -> Tensor:
    hidden = reference.residual_layernorm(
        t["x"], t["residual"], t["ln_weight"], t["ln_bias"], upcast=upcast
    ).output
    inner = reference.activation(F.linear(hidden, t["weight1"], t["bias1"]), "gelu")
    return torch.cat([hidden, F.linear(inner, t["weight2"])], -1)


def _composed_cases() -> Iterator[OpCase]:
    for name in ("", ", stride-0 gradient"):
        yield OpCase(
            "linear_residual_layernorm",
            f"plain{name}",
            _layer_end_inputs,
            lambda t: ops.linear_residual_layernorm(**t),
            _layer_end_expected,
            GRADIENTS[name],
        )
    yield OpCase(
        "layernorm_mlp",
        "plain",
        _feed_forward_inputs,
        lambda t: torch.cat(ops.layernorm_mlp(**t), -1),
        _feed_forward_expected,
    )


_HEADS, _SEQ, _DIM = 2, 21, 16


def _padding(rows: str, device: torch.device) -> Tensor:
    """bool ``[batch, seq]``, True for keys that count."""
    mask = torch.ones(3, _SEQ, dtype=torch.bool, device=device)
    mask[1, 13:] = False
    mask[2, 1:] = False
    if rows == "fully masked rows":
        mask[2] = False
    elif rows == "holes":
        mask[0, 3:9], mask[1, 0] = False, False
    return mask


def _attention_inputs(kind: str) -> Tensors:
    shape = (3, _HEADS, _SEQ, _DIM)
    query, key, value = (torch.randn(shape) for _ in range(3))
    if kind == "transposed inputs":
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    elif kind == "large scores":
        query, key = 6.0 * query, 6.0 * key + 3.0
    elif kind == "NaN in masked slots":
        masked = ~_padding(kind, key.device)[:, None, :, None]
        key, value = (x.masked_fill(masked, torch.nan) for x in (key, value))
    return {"query": query, "key": key, "value": value}


def _sdpa(t: Tensors, kind: str) -> Tensor:
    mask = _padding(kind, t["key"].device)
    return ops.scaled_dot_product_attention(**t, key_padding_mask=mask, is_causal=kind == "causal")


def _sdpa_expected(t: Tensors, upcast: bool, kind: str) -> Tensor:
    mask = _padding(kind, t["key"].device)
    out = reference.scaled_dot_product_attention(
        **t, key_padding_mask=mask, is_causal=kind == "causal", upcast=upcast
    )
    assert isinstance(out, Tensor)
    return out


_LENGTHS = {"plain": (5, 21, 1, 9), "zero lengths": (0, 5, 0, 0, 21, 10, 0)}


def _packed_inputs(tokens: int) -> Tensors:
    return {name: torch.randn(tokens, _HEADS, _DIM) for name in ("query", "key", "value")}


def _varlen(module: Any, kind: str, t: Tensors, **options: Any) -> Tensor:
    offsets = F.pad(torch.tensor(_LENGTHS[kind], device=t["query"].device).cumsum(0), (1, 0)).int()
    longest = max(_LENGTHS[kind])
    lengths = {
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }
    out: Tensor = module.varlen_attention(**t, **lengths, **options)
    return out


def _attention_cases() -> Iterator[OpCase]:
    kinds = (
        "plain",
        "fully masked rows",
        "holes",
        "NaN in masked slots",
        "transposed inputs",
        "large scores",
        "causal",
    )
    for kind in kinds:
        yield OpCase(
            "scaled_dot_product_attention",
            kind,
            partial(_attention_inputs, kind),
            partial(_sdpa, kind=kind),
            partial(_sdpa_expected, kind=kind),
        )
    for name, gradient in list(GRADIENTS.items())[1:]:
        yield OpCase(
            "scaled_dot_product_attention",
            f"fully masked rows{name}",
            partial(_attention_inputs, "plain"),
            partial(_sdpa, kind="fully masked rows"),
            partial(_sdpa_expected, kind="fully masked rows"),
            gradient,
        )
    for kind, lengths in _LENGTHS.items():
        yield OpCase(
            "varlen_attention",
            kind,
            partial(_packed_inputs, sum(lengths)),
            partial(_varlen, ops, kind),
            lambda t, upcast, kind=kind: _varlen(reference, kind, t, upcast=upcast),
        )


def _embeddings(module: Any, t: Tensors, **options: Any) -> Any:
    return module.bert_embeddings(**t, **_ids(t["bias"].device), **options)


def _embedding_inputs() -> Tensors:
    return {
        "word_weight": torch.randn(31, 32),
        "position_weight": torch.randn(16, 32),
        "token_type_weight": torch.randn(2, 32),
        "weight": torch.randn(32) * 0.4 + 1.0,
        "bias": torch.randn(32),
    }


def _ids(device: torch.device) -> dict[str, Tensor]:
    ids = (torch.arange(3 * 11, device=device).view(3, 11) * 7) % 31
    ids[:, 5:] = 4  # one row of the table gets most of the gradient
    return {"input_ids": ids, "token_type_ids": (ids > 10).long()}


def _loss_inputs(kind: str) -> Tensors:
    # Logits that are large, but not one-hot yet, where a few near ties are all there is to err.
    factor = 8.0 if kind == "large logits" else 1.0
    return {"hidden": factor * torch.randn(60, 24), "weight": torch.randn(53, 24), "bias": torch.randn(53)}


def _labels(kind: str, device: torch.device) -> Tensor:
    labels = (torch.arange(60, device=device) * 13) % 53
    labels[:] = torch.where(torch.arange(60, device=device) % 3 == 0, labels, -100)
    return torch.full_like(labels, -100) if kind == "no labels" else labels


def _token_cases() -> Iterator[OpCase]:
    yield OpCase(
        "bert_embeddings",
        "repeated ids",
        _embedding_inputs,
        partial(_embeddings, ops),
        lambda t, upcast: _embeddings(reference, t, upcast=upcast).output,
    )
    for kind in ("plain", "large logits", "no labels"):
        # A loss for each token: the error of a single number would be luck.
        yield OpCase(
            "masked_lm_cross_entropy",
            kind,
            partial(_loss_inputs, kind),
            lambda t, kind=kind: ops.masked_lm_cross_entropy(
                **t, labels=_labels(kind, t["bias"].device), reduction="none"
            ),
            lambda t, upcast, kind=kind: reference.masked_lm_cross_entropy(
                **t, labels=_labels(kind, t["bias"].device), reduction="none", upcast=upcast
            ),
        )


def _int8_inputs() -> Tensors:
    x = torch.randn(7, 40) + 0.3
    x[2], x[4] = 0.0, x[4] * 1e4
    x[5, 3] = 200.0
    return {"x": x, "weight": torch.randn(24, 40)}


def _int8_product(module: Any, t: Tensors, **options: Any) -> tuple[Tensor, ...]:
    # Codes by the reference on both sides: what is compared is the product.
    a, a_scale, offset = reference.quantize_per_token_with_offset(t["x"])
    b, b_scale = reference.quantize_per_channel(t["weight"])
    out: Tensor = module.int8_matmul(a, b, a_scale, b_scale, a_offset=offset, **options)
    return (out,)


def _int8_cases() -> Iterator[OpCase]:
    for name in ("quantize_per_token", "quantize_per_token_with_offset", "quantize_per_channel"):
        given = "weight" if name.endswith("channel") else "x"
        yield OpCase(
            name,
            "zero, outlier and large rows",
            _int8_inputs,
            lambda t, name=name, given=given: getattr(ops, name)(t[given]),
            lambda t, name=name, given=given: getattr(reference, name)(t[given]),
            bits=True,
        )
    yield OpCase(
        "int8_matmul",
        "zero, outlier and large rows",
        _int8_inputs,
        partial(_int8_product, ops),
        partial(_int8_product, reference, upcast=False),
        bits=True,
    )


def cases() -> list[OpCase]:
    """Every case there is."""
    makers = (_layernorm_cases, _product_cases, _composed_cases, _attention_cases, _token_cases, _int8_cases)
    return [case for maker in makers for case in maker()]
