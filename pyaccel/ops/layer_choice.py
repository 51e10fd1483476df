"""Whether the ops of a whole encoder layer are served by Triton, asked once instead of in every op."""

from __future__ import annotations

import torch
from torch import Tensor

from pyaccel import dispatch, triton_support, tuning
from pyaccel.kernels.common.limits import MAX_HEAD_DIM, MAX_ROW
from pyaccel.ops.attention.sdpa import forward_mode
from pyaccel.ops.attention.triton import MAX_FP32_HEAD_DIM
from pyaccel.ops.common import autocast_dtype, is_undisturbed


def triton_serves(hidden: Tensor, rows: int, longest: int, inner: int, heads: int, head_dim: int) -> bool:
    """Whether plain calls of a post-norm layer's ops would be served by Triton.

    That is attention, LayerNorm and the activation; products by PyTorch. False where a call is not a plain one: traced,
    transformed, intercepted, under autocast or forward-mode AD, with a backend asked for or choices recorded.

    Args:
        hidden: stands for the dtype and device of the hidden states.
        rows: tokens.
        longest: tokens of the longest sequence.
        inner: size between the two products of the feed-forward network.
    """
    size = heads * head_dim
    device, dtype = hidden.device, hidden.dtype
    if not (hidden.is_cuda and rows and dtype in triton_support.DTYPES and triton_support.has_triton()):
        return False
    if size > MAX_ROW or head_dim > MAX_HEAD_DIM or (dtype == torch.float32 and head_dim > MAX_FP32_HEAD_DIM):
        return False
    if not is_undisturbed(hidden) or autocast_dtype(device) is not None or forward_mode():
        return False
    if dispatch.is_recording() or dispatch.overrides():
        return False
    backends = ("triton", "torch")
    measured = [
        tuning.preferred("linear_activation", device, dtype, (rows, size, size), backends)[0] == "triton",
        tuning.preferred("linear_activation", device, dtype, (rows, size, inner), backends)[0] == "triton",
        tuning.preferred("varlen_attention", device, dtype, (longest, heads, head_dim), backends)[0]
        == "torch",
        tuning.preferred("residual_layernorm", device, dtype, (rows, size), backends)[0] == "torch",
        tuning.preferred("bias_gelu", device, dtype, (rows, inner), backends)[0] == "torch",
    ]
    return True not in measured
