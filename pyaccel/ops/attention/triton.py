"""The Triton backend of attention: the autograd Function of its registered ops, and what calls them.

Arguments are checked by :mod:`pyaccel.ops.attention.api`, which calls this; the ops are in
:mod:`pyaccel.ops.attention.custom_ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyaccel import triton_support
from pyaccel.kernels.common.limits import MAX_HEAD_DIM
from pyaccel.ops.attention.custom_ops import backward_op, forward_op, probs_op
from pyaccel.ops.attention.params import AttentionParams
from pyaccel.ops.attention.sdpa import forward_mode
from pyaccel.ops.common import apply, differentiable_once

MAX_FP32_HEAD_DIM = 64


def not_supported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Why the kernels can't serve a call with these tensors; empty if they can."""
    reasons = triton_support.unsupported_reasons(query, key, value)
    dims = sorted({t.shape[-1] for t in (query, value) if t.dim() and t.shape[-1] > MAX_HEAD_DIM})
    if dims:
        reasons.append(f"the kernels take head dimensions of up to {MAX_HEAD_DIM}, not {dims[-1]}")
    return reasons


def slow_reason(query: Tensor, value: Tensor) -> str | None:
    """Why PyTorch is to be preferred although the kernels can serve; None where it isn't."""
    dim = max(query.shape[-1], value.shape[-1])
    if query.dtype == torch.float32 and dim > MAX_FP32_HEAD_DIM and not torch.backends.cuda.matmul.allow_tf32:
        return (
            f"fp32 products have no matrix instructions, and at a head dimension of {dim} the kernels spill "
            f"registers (above {MAX_FP32_HEAD_DIM})"
        )
    return None


# --- autograd -------------------------------------------------------------------------------------------------


class AttentionFunction(torch.autograd.Function):
    """Saves query, key, value, output, LSE, and masks and dropout key as they came: nothing of a score's size."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What :func:`forward_op` gives; the arguments are its."""
        return forward_op(query, key, value, attn_mask, *rest, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        if output[2] is not None:
            ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*output, *inputs[:8])
        ctx.options = inputs[8:]

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, dlse_error: None
    ) -> tuple[Tensor | None, ...]:
        out, lse, lse_error, *inputs = ctx.saved_tensors
        if dout is None:
            dout = out.new_zeros(()).expand_as(out)
        if dlse is not None:
            dlse = dlse.contiguous()
        needed = ctx.needs_input_grad[:4]
        grads = backward_once(dout, dlse, out, lse, lse_error, *inputs, *ctx.options, needed[3])
        return *[g if n else None for g, n in zip(grads, needed, strict=True)], *(None,) * (
            4 + len(ctx.options)
        )


backward_once = differentiable_once(
    backward_op,
    "scaled_dot_product_attention",
    "pyaccel.use_backend('torch', ops=['scaled_dot_product_attention', 'varlen_attention'])",
)


def _in_turn(op: Any) -> None:
    """Let torch.func.vmap run ``op`` for one after the other of what it maps over."""

    def run(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            op.registered(
                *(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    op.registered.register_vmap(run)


for _op in (forward_op, backward_op, probs_op):
    _in_turn(_op)


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise where a derivative is taken forward: a registered op would drop it without a word."""
    if forward_mode() and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(
            "pyaccel.ops: a forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad) of attention was asked "
            "for, and the Triton backend has none. Use another backend for this call: pyaccel.use_backend('torch', "
            "ops=['scaled_dot_product_attention', 'varlen_attention', 'attention_probs'])."
        )


def _attend(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> tuple[Tensor, Tensor]:
    arguments = (query, key, value, *params.flat(query, key))
    _refuse_forward_mode(*arguments[:4])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:4]):
        if torch.compiler.is_compiling():
            arguments = _distinct(arguments)
        out, lse, _ = apply(AttentionFunction, *arguments)
    else:
        out, lse, _ = forward_op(*arguments, params.return_lse)
    return out, lse


def _distinct(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, with views in place of tensors that come again: a compiled autograd Function takes none twice."""
    distinct: list[Any] = []
    for argument in arguments:
        again = isinstance(argument, Tensor) and any(argument is earlier for earlier in distinct)
        distinct.append(argument.view_as(argument) if again else argument)
    return tuple(distinct)


# --- calls ----------------------------------------------------------------------------------------------------


def padded(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`pyaccel.ops.scaled_dot_product_attention` of valid 4-D arguments."""
    out, lse = _attend(query, key, value, params)
    return (out, lse) if params.return_lse else out


def packed(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`pyaccel.ops.varlen_attention` of valid arguments."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    out, lse = _attend(q, k, v, params)
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if params.return_lse else out


def probs(query: Tensor, key: Tensor, lse: Tensor, params: AttentionParams) -> Tensor:
    """:func:`pyaccel.ops.attention_probs` of valid 4-D arguments."""
    _refuse_forward_mode(query, key, lse, params.attn_mask)
    attn_mask, key_mask, *_, scale, _, is_causal, left, right = params.flat(query, key)
    return probs_op(query, key, lse.contiguous(), attn_mask, key_mask, scale, is_causal, left, right)
