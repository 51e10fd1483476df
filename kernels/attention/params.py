"""What every attention kernel is given of a call: tensors, masks, dropout and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyaccel.kernels.attention.config import AttentionShape
from pyaccel.kernels.common.device import device_info
from pyaccel.kernels.common.philox import keep_scale, threshold_bits

FAR = 1 << 29  # FAR of tile.py: a window that wide is open


@dataclass(frozen=True)
class AttentionCall:
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
        sequences = self.query.shape[0] if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1
        return sequences * self.query.shape[1]

    @property
    def tail_programs(self) -> int:
        """Programs that clear what a packed batch has beyond its last offset: mostly nothing, so few."""
        return 8 if self.packed else 0

    def shape_on(self, arch: str) -> AttentionShape:
        """What launch configurations depend on, on a device of that architecture."""
        return AttentionShape(
            seq_q=self.seq_q,
            seq_k=self.seq_k,
            head_dim=max(self.query.shape[3], self.value.shape[3]),
            itemsize=self.query.element_size(),
            arch=arch,
            group=self.group,
            has_mask=self.attn_mask is not None,
            has_dropout=self.dropout_key is not None,
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
        left, right = self.window_size
        return {
            "q_ptr": self.query,
            "k_ptr": self.key,
            "v_ptr": self.value,
            "key_mask_ptr": None if self.key_mask is None else self.key_mask.view(torch.uint8),
            "mask_ptr": mask,
            "key_ptr": self.dropout_key,
            **{
                f"stride_{name}": self.strides(t)
                for name, t in zip("qkv", (self.query, self.key, self.value), strict=True)
            },
            "stride_key_mask": (0, 0, 0) if self.key_mask is None else self.key_mask.stride(),
            "stride_mask": (0, 0, 0, 0) if mask is None else mask.stride(),
            "n_streams": self.n_streams,
            "n_heads": self.query.shape[1],
            "group": self.group,
            "seq_q": self.seq_q,
            "seq_k": self.seq_k,
            "scale": self.scale,
            "window_left": min(left, FAR),
            "window_right": min(right, FAR),
            "keep_scale": keep_scale(self.dropout_p),
            "threshold": threshold_bits(self.dropout_p),
            "HEAD_DIM": self.query.shape[3],
            "VALUE_DIM": self.value.shape[3],
            "IS_CAUSAL": self.is_causal,
            "HAS_WINDOW": left >= 0 or right >= 0,
            "MASK_ROWS": mask is not None and mask.stride(2) != 0 and self.seq_q > 1,
            "PRECISION": "tf32" if self.allow_tf32 else "ieee",
            "BLOCK_D": block_dim(self.query.shape[3]),
            "BLOCK_V": block_dim(self.value.shape[3]),
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
        return self.scale > 0.0 and comes_last and self.query.element_size() == 2

    def offsets(self) -> dict[str, Any]:
        """Those of a packed batch, for the kernels that take one."""
        return {"cu_q_ptr": self.cu_seqlens_q, "cu_k_ptr": self.cu_seqlens_k}

    def strides(self, x: Tensor) -> tuple[int, ...]:
        """Those of a tensor laid out as query is; sequences of a packed one aren't a stride apart."""
        return (0, *x.stride()[1:]) if self.packed else x.stride()


def block_dim(dim: int) -> int:
    """What a head dimension of 1 to 256 is padded to in registers."""
    return max(16, 1 << (dim - 1).bit_length())
