"""``F.scaled_dot_product_attention``, guarded so that masks mean what they should and NaN shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Bound once: whoever puts our function in the place of torch.nn.functional's must not find it calling itself.
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

from pyaccel.ops import common
from pyaccel.reference import attention as reference

# PyTorch's flash kernel for CPUs takes a row of NaN scores for one without keys wherever the maximum is taken of less
# than a vector of fp32 (pytorch#141128): in shorter sequences, and where a mask leaves the last few keys alone.
FEW_KEYS = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def may_hold(condition: Tensor) -> bool:
    """False only where it is known, at next to no cost, that ``condition`` holds nowhere."""
    return not common.on_host(condition) or bool(condition.any())


def forward_mode() -> bool:
    """Whether derivatives are taken forward (``torch.func.jvp``), which kernels know nothing of."""
    return forward_ad._current_level >= 0 and not torch.compiler.is_compiling()


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """``F.scaled_dot_product_attention``, made safe for what a mask leaves unread.

    Args:
        allowed, bias: from :func:`pyaccel.reference.attention.combine_masks`.
        is_causal: in place of the two.
        dropout_p: by PyTorch's own mask, not by ours.
    """
    # Of no queries, PyTorch's gradients of key and value are one tensor.
    no_queries = type(query.shape[2]) is int and query.shape[2] == 0
    if no_queries or (forward_mode() and dropout_p == 0.0):
        if allowed is None:
            allowed, _ = reference.combine_masks(query, key, None, None, is_causal, None)
        return _defined(query, key, value, allowed, bias, scale)
    if allowed is None and is_causal and isinstance(scale, (int, float)) and scale <= 0.0:
        # PyTorch's flash kernel for CPUs hides keys by -inf before it scales.
        allowed, is_causal = reference.combine_masks(query, key, None, None, True, None)[0], False
    # By a branch: in a graph with dynamic shapes the comparison itself isn't the bool that PyTorch wants.
    gqa = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210
    # With dropout PyTorch's own two products serve, which hide nothing.
    may_hide = query.device.type == "cpu" and dropout_p == 0.0
    if allowed is None:
        if is_causal:  # keys that no query sees may hold anything
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        length = key.shape[2]
        may_hide = may_hide and (type(length) is not int or length < FEW_KEYS)
        reads = may_hide and common.on_host(query)
        if reads and not (_finite(query) and _finite(key)):
            allowed, _ = reference.combine_masks(query, key, None, None, is_causal, None)
            return _defined(query, key, value, allowed, None, scale)
        out = torch_sdpa(query, key, value, None, dropout_p, is_causal=is_causal, scale=scale, enable_gqa=gqa)
        return _showing(out, query) if may_hide and not reads else out
    if gqa and allowed.shape[1] > 1:  # whether a key is read then differs between the heads that share it
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        gqa = False
    # PyTorch multiplies what is masked by 0, which makes NaN of NaN and inf; and what its backends make of a
    # row without keys differs. So unread keys are cleared, and an unread query sees all and is cleared later.
    reads = common.on_host(query)
    idle_rows, idle_keys = reference.unread(allowed)
    has_idle_rows = may_hold(idle_rows)
    # What is finite can't leak anything.
    if not (reads and _finite(query) and _finite(key) and _finite(value)):
        query = query.masked_fill(idle_rows, 0.0)
        key, value = key.masked_fill(idle_keys, 0.0), value.masked_fill(idle_keys, 0.0)
        if may_hide and reads and not (_finite(query) and _finite(key)):
            return _defined(query, key, value, allowed, bias, scale)
    # PyTorch's gradients don't show the NaN that the output does.
    if bias is not None and may_hide and reads:
        is_wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, bias))
        if not _below_infinity(bias) or (is_wanted and _far_from_zero(bias, allowed)):
            return _defined(query, key, value, allowed, bias, scale)
    if bias is None:
        mask = allowed | idle_rows if has_idle_rows else allowed
    else:
        if query.dtype == torch.float64:
            bias = bias.to(query.dtype)  # PyTorch's kernel for CPUs would read memory of fp32 as fp64
        elif query.device.type != "cpu" and bias.dtype != query.dtype:
            # A GPU's kernels want query's dtype. A huge number must not become infinite; what is infinite must.
            finite = torch.finfo(query.dtype)
            bias = bias.clamp(finite.min, finite.max).masked_fill(bias == math.inf, math.inf).to(query.dtype)
        mask = bias.masked_fill(~allowed, -math.inf).masked_fill(idle_rows, 0.0)
    out = torch_sdpa(query, key, value, mask, dropout_p, scale=scale, enable_gqa=gqa)
    if may_hide and not reads:
        out = _showing(out, query)
    return out.masked_fill(idle_rows, 0.0) if has_idle_rows else out


def _far_from_zero(bias: Tensor, allowed: Tensor) -> bool:
    """Whether all that counts of some row of a mask is far from 0; its values are read.

    PyTorch's backward makes the weights again from the LSE. In a row of a mask's lowest number alone, as padding has
    it, adding the logarithm of their sum to that number changes nothing, and each weight would be 1.
    """
    if not (bias.numel() and allowed.numel()):
        return False
    top = bias.detach().masked_fill(~allowed, -math.inf).amax(-1)
    return bool(((top.abs() > _NEAR) & top.isfinite()).any())


_NEAR = 64.0  # an LSE of which fp32 rounds off 4e-6


def _finite(x: Tensor) -> bool:
    """Whether all of ``x`` is known to be finite; its values are read."""
    # A sum is finite only if all of x is; on a CPU it takes a thirtieth (fp32) of the time of masked_fill.
    wide = torch.float32 if x.dtype == torch.float16 else None
    return math.isfinite(x.detach().sum(dtype=wide).item())


def _below_infinity(bias: Tensor) -> bool:
    """Whether a mask without -inf holds neither NaN nor +inf. Not by its sum: padding is the lowest number."""
    return bias.numel() == 0 or math.isfinite(bias.detach().max().item())


def _defined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    """By the definition, which hides no NaN; the heads of key and value repeated where they are fewer."""
    if query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return reference.masked_attention(query, key, value, allowed, bias, scale, upcast=False)[0]


def _showing(out: Tensor, query: Tensor) -> Tensor:
    """``out`` with NaN in the rows of queries that hold one: in a graph, where no value decides what is called."""
    return out.masked_fill(query.isnan().any(-1, keepdim=True), math.nan)
