"""int8 quantization and products on a CPU, in stock PyTorch: the torch backend's loops over blocks of rows.

The product itself (``torch._int_mm``, oneDNN's) is several times as fast as one in fp32 where the CPU has VNNI (and
wrong where it has not: :func:`product`), so that what follows it would take most of the time: a block is small enough
for its fp32 values to stay in the L2 cache from the accumulator to the last rounding, and nothing is done to them
twice.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyaccel.activations import ACTIVATIONS
from pyaccel.ops.common import rows
from pyaccel.reference import int8 as reference

# Measured with 2 cores of 1 MiB L2 each: blocks of half this size and of twice this size are up to 20 % slower.
BLOCK_BYTES = 3 * 2**19
# As many products of int8 sum up to 2**24 at most.
EXACT_TERMS = 1024
# Below it amax / 127 is rounded too coarsely to say that no code exceeds 127.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def blocks(n_rows: int, n_cols: int) -> Iterator[slice]:
    """Slices of rows whose fp32 values, ``n_cols`` each, take about BLOCK_BYTES."""
    size = max(32, BLOCK_BYTES // (4 * max(n_cols, 1)))
    return (slice(start, start + size) for start in range(0, n_rows, size))


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`pyaccel.reference.quantize_per_token`, bit for bit."""
    x_rows = rows(x)
    codes = torch.empty(x_rows.shape, dtype=torch.int8, device=x.device)
    scale = torch.ones(len(x_rows), device=x.device)
    for block in blocks(*x_rows.shape) if x.numel() else ():
        part = x_rows[block].float()
        quantize_block(part, codes[block], scale[block], scratch=part if part.dtype != x.dtype else None)
    return codes.view(x.shape), scale.view(x.shape[:-1])


def quantize_per_token_with_offset(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`pyaccel.reference.quantize_per_token_with_offset`, bit for bit."""
    if not x.numel():
        return reference.quantize_per_token_with_offset(x)
    x_rows = rows(x)
    codes = torch.empty(x_rows.shape, dtype=torch.int8, device=x.device)
    scale, offset = (torch.empty(len(x_rows), device=x.device) for _ in range(2))
    for block in blocks(*x_rows.shape):
        part = reference.scaled(x_rows[block], factor)
        high, low, middle = part.amax(-1), part.amin(-1), offset[block]
        torch.add(high * 0.5, low * 0.5, out=middle).add_(0.0)
        centred = part - middle.unsqueeze(-1)
        # The subtraction is monotonic: the largest |centred| is at one end of the range.
        largest = torch.maximum(high - middle, middle - low)
        _encode_block(centred, largest, codes[block], scale[block], scratch=centred)
    return codes.view(x.shape), scale.view(x.shape[:-1]), offset.view(x.shape[:-1])


def quantize_block(x: Tensor, codes: Tensor, scale: Tensor, scratch: Tensor | None) -> None:
    """Write the codes and scales of fp32 rows; ``scratch`` may be x itself, if nobody needs it any more."""
    _encode_block(x, x.abs().amax(-1), codes, scale, scratch)


def _encode_block(x: Tensor, amax: Tensor, codes: Tensor, scale: Tensor, scratch: Tensor | None) -> None:
    torch.div(amax, reference.INT8_MAX, out=scale)
    scale.masked_fill_(scale == 0, 1.0)
    low, high = scale.aminmax()
    if low >= SMALLEST_SCALE and high < float("inf"):  # neither holds for NaN
        # No value is beyond 127 or NaN: the division and its rounding are all there is to do.
        codes.copy_(torch.div(x, scale.unsqueeze(-1), out=scratch).round_())
    else:
        codes.copy_(reference.encode(x, scale.unsqueeze(-1)))


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    quantize_output: bool,
    a_offset: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`pyaccel.ops.int8_matmul`. Steps and their order are the reference's, so the bits are too."""
    leading, n_out = a.shape[:-1], b.shape[0]
    a = rows(a)
    bias = None if bias is None else bias.float()
    by_row = a_scale.reshape(-1, 1) if a_scale.dim() else None
    residual = None if residual is None else residual.reshape(len(a), n_out)
    times_b = product(b)
    if a_offset is not None:
        a_offset = a_offset.reshape(-1, 1)
        b_sum = times_b(a.new_ones(1, a.shape[1])).float()  # [1, out_features], exact below 2**24
    out = torch.empty(len(a), n_out, dtype=torch.int8 if quantize_output else out_dtype, device=a.device)
    scale = torch.ones(len(a), device=a.device) if quantize_output else None
    for block in blocks(*out.shape) if out.numel() else ():
        sums = times_b(a[block])
        x = out[block].copy_(sums) if out.dtype == torch.float32 else sums.float()
        x.mul_(a_scale if by_row is None else by_row[block])
        if a_offset is not None:
            x.add_(a_offset[block] * b_sum)
        x.mul_(b_scale)
        if bias is not None:
            x.add_(bias)  # not addcmul: it may round once where the reference rounds twice
        x = _activate(x, activation)
        if residual is not None:
            x.add_(residual[block])
        if scale is not None:
            quantize_block(x, out[block], scale[block], scratch=x)
        elif x.data_ptr() != out[block].data_ptr():
            out[block].copy_(x)
    out = out.view(*leading, n_out)
    return out if scale is None else (out, scale.view(leading))


def product(b: Tensor) -> Callable[[Tensor], Tensor]:
    """``a -> a @ b^T`` in int32, exact: ``b`` int8 ``[out_features, in_features]``, ``a`` ``[rows, in_features]``."""
    if int_mm_is_exact():
        b = b.t()
        return lambda a: torch._int_mm(a, b)
    # fp32 (and a bf16 that it may be lowered to) holds codes exactly, and their sums up to 2**24.
    parts = [part.t().float() for part in b.split(EXACT_TERMS, dim=1)]

    def in_parts(a: Tensor) -> Tensor:
        columns = a.float().split(EXACT_TERMS, dim=1)
        sums = [(x @ w).to(torch.int32) for x, w in zip(columns, parts, strict=True)]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0, dtype=torch.int32)

    return in_parts


def int_mm_is_exact() -> bool:
    """Whether ``torch._int_mm`` is what it says on this CPU.

    Without VNNI oneDNN adds two products of 8 bits in 16, and cuts off what doesn't fit: sums of large codes are wrong
    without a word. Shown by a product of the largest ones; the flags are asked too, as kernels differ between sizes.
    """
    return _int_mm_is_exact()


# What torch.compiler.assume_constant_result does, which would import torch._dynamo, and triton, with pyaccel.ops.
int_mm_is_exact._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _int_mm_is_exact() -> bool:
    if platform.machine() in ("x86_64", "AMD64"):
        # torch 2.11 has none: the product decides
        has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        if has and not any(has.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
            return False
    largest = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    lowest = -largest - 1
    pairs = ((largest, largest), (largest, lowest), (lowest, largest), (lowest, lowest))
    return all(torch.equal(torch._int_mm(a, b.t()), a.int() @ b.int().t()) for a, b in pairs)


def _activate(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else ACTIVATIONS[activation].in_place(x)
