"""Cross entropy of rows of logits: each row's loss, and its gradient in the logits' place.

Method: an online log-sum-exp (M. Milakov and N. Gimelshein, arXiv:1805.02867), each lane with a maximum and a sum of
its own until the row ends; gradients over the logits as in Liger-Kernel (arXiv:2410.10989).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyaccel.kernels.common.configs import RowConfig
from pyaccel.kernels.common.device import device_guard

# Below every logit and finite: its difference from -inf or from itself is a number.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _load_tile(logits_ptr, bias_ptr, o_col, width, n_cols):
    """A tile of a row, bias added [BLOCK_N], in fp32; -inf beyond the row's end."""
    # The padding is read too: its width is a multiple of 16, which n_cols needn't be, and so accesses stay wide.
    m_width = o_col < width
    x = tl.load(logits_ptr + o_col, mask=m_width, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + o_col, mask=m_width, other=0.0).to(tl.float32)
    return tl.where(o_col < n_cols, x, float("-inf"))


@triton.jit
def rows_kernel(
    loss_ptr, logits_ptr, bias_ptr, label_ptr, scale_ptr,
    width, n_cols,
    BLOCK_N: tl.constexpr, WANT_GRAD: tl.constexpr,
):  # fmt: skip
    """One row a program. Rows start ``width`` elements apart and bias is as wide; ``n_cols`` of them count."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * width
    label = tl.load(label_ptr + row)
    # Read before the reductions below, whose barriers keep it from the gradients that other threads write.
    target = tl.load(logits_ptr + label).to(tl.float32)
    if bias_ptr is not None:
        target += tl.load(bias_ptr + label).to(tl.float32)

    b_max = tl.full((BLOCK_N,), LOWEST, dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)  # [BLOCK_N], of exp(x - b_max)
    for first in range(0, n_cols, BLOCK_N):
        x = _load_tile(logits_ptr, bias_ptr, first + tl.arange(0, BLOCK_N), width, n_cols)
        # One exponential for both cases: of the new element beside the maximum, or of the old maximum beside it.
        decay = tl.exp(-tl.abs(x - b_max))
        b_sum = tl.where(x > b_max, b_sum * decay + 1.0, b_sum + decay)
        b_max = tl.maximum(b_max, x)
    row_max = tl.max(b_max, axis=0)
    total = tl.sum(b_sum * tl.exp(b_max - row_max), axis=0)
    # The maximum is taken off before the logarithm is added: large logits cost no digits.
    tl.store(loss_ptr + row, tl.log(total) + (row_max - target))

    if WANT_GRAD:
        scale = 1.0 / total
        one = 1.0
        if scale_ptr is not None:
            one = tl.load(scale_ptr + row)
            scale *= one
        for first in range(0, n_cols, BLOCK_N):
            o_col = first + tl.arange(0, BLOCK_N)
            x = _load_tile(logits_ptr, bias_ptr, o_col, width, n_cols)
            grad = tl.exp(x - row_max) * scale
            grad = tl.where(o_col == label, grad - one, grad)
            tl.store(logits_ptr + o_col, grad.to(logits_ptr.dtype.element_ty), mask=o_col < width)


def rows(
    loss: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor | None,
    n_cols: int,
    want_grad: bool,
    config: RowConfig,
) -> None:
    """Launch the kernel; it writes ``loss`` and, where ``want_grad``, the gradients over the logits.

    Shapes: logits ``[rows, width]`` contiguous, of which the first ``n_cols`` columns count and the rest holds
    anything (its gradient is 0); bias ``[width]``; labels ``[rows]`` int64, 0 to n_cols - 1; loss ``[rows]`` fp32;
    scale ``[rows]`` fp32 multiplies each row's gradient.
    """
    n_rows, width = logits.shape
    if n_rows == 0:
        return
    with device_guard(logits):
        rows_kernel[(n_rows,)](
            loss, logits, bias, labels, scale,
            width, n_cols,
            BLOCK_N=config.block_n, WANT_GRAD=want_grad, num_warps=config.num_warps,
        )  # fmt: skip
