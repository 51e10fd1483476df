"""What every attention kernel is given of a call: tensors, masks, dropout and sizes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyaccel.kernels.attention.config import AttentionShape
from pyaccel.kernels.common.device import device_info
from pyaccel.kernels.common.philox import dropout_scalars

FAR = 1 << 29  # FAR of tile.py: a window that wide is open


class AttentionCall(NamedTuple):
    """One call, padded or packed, by strides and without copies.

    Attributes:
        query: ``[batch, heads, seq_q, head_dim]``; packed ``[1, heads, total_q, head_dim]``.
        key, value: ``[batch, kv_heads, seq_k, ...]``, packed ``[1, kv_heads, total_k, ...]``; ``heads`` is a
            multiple of ``kv_heads``.
        cu_seqlens_q, cu_seqlens_k: int32 ``[sequences + 1]`` of a packed batch, or None.
        seq_q, seq_k: the lengths; packed: of the longest sequence.
        key_mask: bool ``[batch, heads, seq_k]`` of any strides, True = attend, or None.
        attn_mask: bool or float ``[batch, heads, seq_q, seq_k]`` of any strides (0 where it is broadcast).
        is_causal, window_size: as in the public functions.
        scale: of the scores.
        dropout_key, dropout_p: int64 ``[2]`` or None; probability.
        allow_tf32: whether fp32 products may be rounded to TF32.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seq_q: int
    seq_k: int
    key_mask: Tensor | None
    attn_mask: Tensor | None
    is_causal: bool
    window_size: tuple[int, int]
    scale: float
    dropout_key: Tensor | None
    dropout_p: float
    allow_tf32: bool

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def n_streams(self) -> int:
        """Sequences times heads: what dropout calls streams."""
        sequences = self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1
        return sequences * self.query.shape[1]

    @property
    def tail_programs(self) -> int:
        """Programs that clear what a packed batch has beyond its last offset: mostly nothing, so few."""
        return 8 if self.packed else 0

    def shape_on(self, arch: str) -> AttentionShape:
        """What launch configurations depend on, on a device of that architecture."""
        return _shape(
            self.seq_q,
            self.seq_k,
            self.query.shape[3],
            self.value.shape[3],
            self.query.itemsize,
            arch,
            self.group,
            self.attn_mask is not None,
            self.dropout_key is not None,
        )

    @property
    def shape(self) -> AttentionShape:
        """What launch configurations depend on."""
        return self.shape_on(device_info(self.query.device).arch)

    def arguments(self) -> dict[str, Any]:
        """The kernels' arguments, by name."""
        mask = self.attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        sizes = _sizes(
            self.query.shape[3], self.value.shape[3], self.is_causal, self.window_size, self.allow_tf32
        )
        keep_scale, threshold = dropout_scalars(self.dropout_p)
        return {
            "q_ptr": self.query,
            "k_ptr": self.key,
            "v_ptr": self.value,
            "key_mask_ptr": None if self.key_mask is None else self.key_mask.view(torch.uint8),
            "mask_ptr": mask,
            "key_ptr": self.dropout_key,
            **self.strides(q=self.query, k=self.key, v=self.value),
            "stride_key_mask": (0, 0, 0) if self.key_mask is None else self.key_mask.stride(),
            "stride_mask": (0, 0, 0, 0) if mask is None else mask.stride(),
            "n_streams": self.n_streams,
            "n_heads": self.query.shape[1],
            "group": self.group,
            "seq_q": self.seq_q,
            "seq_k": self.seq_k,
            "scale": self.scale,
            "keep_scale": keep_scale,
            "threshold": threshold,
            "MASK_ROWS": mask is not None and mask.stride(2) != 0 and self.seq_q > 1,
            **sizes,
        }

    def tma_can_read(self, *tensors: Tensor) -> bool:
        """Whether Hopper's copy engine can load tiles of keys: it wants rows of 16-byte multiples, and it reads every
        key up to the last that counts, which must hold numbers: no mask may have holes."""
        open_left = self.window_size[0] < 0
        return (
            self.key_mask is None
            and self.attn_mask is None
            and open_left
            and all(
                t.stride(3) == 1
                and t.data_ptr() % 16 == 0
                and all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:3])
                for t in tensors
            )
        )

    @property
    def fold_scale(self) -> bool:
        """Whether the scale may be folded into the exponential: it must keep the order of scores and come last. In fp32
        it isn't: both sides of the difference would be rounded before it is taken, which large scores show."""
        comes_last = self.attn_mask is None or self.attn_mask.dtype == torch.bool
        return self.scale > 0.0 and comes_last and self.query.itemsize == 2

    def offsets(self) -> dict[str, Any]:
        """Those of a packed batch, for the kernels that take one."""
        return {"cu_q_ptr": self.cu_seqlens_q, "cu_k_ptr": self.cu_seqlens_k}

    def strides(self, **tensors: Tensor) -> dict[str, tuple[int, ...]]:
        """The arguments ``stride_NAME`` of tensors laid out as query is, which sequences of a packed one don't have."""
        if self.cu_seqlens_q is None:
            return {f"stride_{name}": x.stride() for name, x in tensors.items()}
        return {f"stride_{name}": (0, *x.stride()[1:]) for name, x in tensors.items()}


@functools.lru_cache(maxsize=4096)
def _shape(
    seq_q: int, seq_k: int, head_dim: int, value_dim: int, itemsize: int, arch: str, group: int, *has: bool
) -> AttentionShape:
    return AttentionShape(seq_q, seq_k, max(head_dim, value_dim), itemsize, arch, group, *has)


@functools.lru_cache(maxsize=4096)
def _sizes(
    head_dim: int, value_dim: int, is_causal: bool, window_size: tuple[int, int], allow_tf32: bool
) -> dict[str, Any]:
    """The arguments that are a model's, the same in every call."""
    left, right = window_size
    return {
        "window_left": min(left, FAR),
        "window_right": min(right, FAR),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "IS_CAUSAL": is_causal,
        "HAS_WINDOW": left >= 0 or right >= 0,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        "BLOCK_D": block_dim(head_dim),
        "BLOCK_V": block_dim(value_dim),
    }


def block_dim(dim: int) -> int:
    """What a head dimension of 1 to 256 is padded to in registers."""
    return max(16, 1 << (dim - 1).bit_length())
