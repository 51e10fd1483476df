"""What is compiled of attention: every launch configuration that ships, for calls that ask much of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyaccel.inspect.spec import KernelSpec, archs_by_config, kernel_spec, launched
from pyaccel.kernels.attention import config as attention_config
from pyaccel.kernels.attention.config import AttentionConfig

if TYPE_CHECKING:
    from pyaccel.kernels.attention.params import AttentionCall

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (32, 64, 128, 256)
MAX_FP32_DIM = 64  # above it dispatch leaves fp32 to PyTorch: pyaccel.ops.attention.triton.slow_reason
BATCH, HEADS = 3, 12
# What a call may have. The configurations know two kinds of call; the last of each takes most registers.
PLAIN = ("packed", "key mask, causal")
EXTRAS = ("packed, dropout, causal", "attn_mask, key mask, causal")

Arguments = Callable[["AttentionCall", AttentionConfig], dict[str, Any]]


@dataclass(frozen=True)
class Kernel:
    """One kernel: its label, function, configuration, sequence length, kinds of call, and what it is launched with."""

    label: str
    fn: str
    config: str
    seq: int
    calls: tuple[str, ...]
    arguments: Arguments


def attention() -> list[KernelSpec]:
    """The family's kernels, each for the architectures whose configuration it is."""
    return [
        spec
        for kernel in _kernels()
        for dtype in DTYPES
        for dim in HEAD_DIMS
        if not (dtype == "fp32" and dim > MAX_FP32_DIM)
        for has in kernel.calls
        for spec in _specs(kernel, dtype, dim, has)
    ]


def _kernels() -> list[Kernel]:
    from pyaccel.kernels.attention import dkv as attention_dkey_dvalue
    from pyaccel.kernels.attention import dq as attention_dquery
    from pyaccel.kernels.attention import forward as attention
    from pyaccel.kernels.attention import scores as attention_scores
    from pyaccel.kernels.attention import short as attention_short

    def forward(call: AttentionCall, config: AttentionConfig) -> dict[str, Any]:
        return attention.forward_arguments(_like(call.query), _lse(call), _error(call), call, config)

    def forward_short(call: AttentionCall, config: AttentionConfig) -> dict[str, Any]:
        return attention_short.forward_short_arguments(
            _like(call.query), _lse(call), _error(call), call, config
        )

    def backward_short(call: AttentionCall, config: AttentionConfig) -> dict[str, Any]:
        dq, dk = _like(call.query), _like(call.key)
        return attention_short.backward_short_arguments(
            dq, dk, dk, dq, dq, _lse(call), _error(call), None, call, config
        )

    def dquery(call: AttentionCall, config: AttentionConfig) -> dict[str, Any]:
        dq, lse = _like(call.query), _lse(call)
        return attention_dquery.dquery_arguments(dq, lse, dq, dq, lse, _error(call), None, call, config)

    def dkey_dvalue(want_dk: bool, want_dv: bool) -> Arguments:
        def arguments(call: AttentionCall, config: AttentionConfig) -> dict[str, Any]:
            dk, do, lse = _like(call.key), _like(call.query), _lse(call)
            return attention_dkey_dvalue.dkey_dvalue_arguments(
                dk if want_dk else None, dk if want_dv else None, do, lse, _error(call), lse, call, config
            )

        return arguments

    def weights(call: AttentionCall, config: AttentionConfig) -> dict[str, Any]:
        probs = call.query.new_empty(BATCH, HEADS, call.seq_q, call.seq_k)
        return attention_scores.probs_arguments(probs, _lse(call), call, config)

    def dmask(call: AttentionCall, config: AttentionConfig) -> dict[str, Any]:
        mask, lse = call.query.new_empty(BATCH, 1, call.seq_q, call.seq_k), _lse(call)
        return attention_scores.dmask_arguments(mask, _like(call.query), lse, _error(call), lse, call, config)

    short, both = "short:{}_short_kernel", PLAIN + EXTRAS
    halves = "dkv:dkey_dvalue_kernel"
    return [
        Kernel("forward", short.format("forward"), "forward_short", 64, both, forward_short),
        Kernel("forward", short.format("forward"), "forward_short", 128, both, forward_short),
        Kernel("forward", "forward:forward_kernel", "forward", 512, both, forward),
        Kernel("backward", short.format("backward"), "backward_short", 64, both, backward_short),
        Kernel("backward", short.format("backward"), "backward_short", 128, both, backward_short),
        Kernel("dquery", "dq:dquery_kernel", "dquery", 512, both, dquery),
        Kernel("dkey, dvalue", halves, "dkey_dvalue", 512, both, dkey_dvalue(True, True)),
        Kernel("dkey", halves, "dkey_dvalue", 512, both, dkey_dvalue(True, False)),
        Kernel("dvalue", halves, "dkey_dvalue", 512, both, dkey_dvalue(False, True)),
        Kernel("weights", "scores:probs_kernel", "scores", 512, EXTRAS[1:], weights),
        Kernel("dmask", "scores:dmask_kernel", "scores", 512, EXTRAS[1:], dmask),
    ]


def make_call(dtype: torch.dtype, dim: int, seq: int, has: str) -> AttentionCall:
    """A call on tensors without memory, views of one for query, key and value; ``has`` is of PLAIN or EXTRAS."""
    from pyaccel.kernels.attention.params import AttentionCall

    packed, meta = has.startswith("packed"), torch.device("meta")
    shape = (1, BATCH * seq) if packed else (BATCH, seq)
    qkv = torch.empty(*shape, 3, HEADS, dim, dtype=dtype, device=meta)
    query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))
    offsets = torch.empty(BATCH + 1, dtype=torch.int32, device=meta) if packed else None
    keys = torch.empty(BATCH, 1, seq, dtype=torch.bool, device=meta)
    mask = torch.empty(BATCH, 1, seq, seq, dtype=dtype, device=meta)
    return AttentionCall(
        query,
        key,
        value,
        offsets,
        offsets,
        seq,
        seq,
        keys.expand(BATCH, HEADS, seq) if "key mask" in has else None,
        mask.expand(BATCH, HEADS, seq, seq) if "attn_mask" in has else None,
        is_causal="causal" in has,
        window_size=(-1, -1),
        scale=dim**-0.5,
        dropout_key=torch.empty(2, dtype=torch.int64, device=meta) if "dropout" in has else None,
        dropout_p=0.1 if "dropout" in has else 0.0,
        allow_tf32=False,
    )


def _like(x: Tensor) -> Tensor:
    batch, heads, seq, dim = x.shape
    return x.new_empty(batch, seq, heads, dim).transpose(1, 2)


def _lse(call: AttentionCall) -> Tensor:
    return call.query.new_empty(call.query.shape[:3], dtype=torch.float32)


def _error(call: AttentionCall) -> Tensor | None:
    return None if call.attn_mask is None else _lse(call)


def _specs(kernel: Kernel, dtype: str, dim: int, has: str) -> Iterator[KernelSpec]:
    call = make_call(DTYPES[dtype], dim, kernel.seq, has)
    choose = attention_config.attention_short if "short" in kernel.config else attention_config.attention

    def of_arch(arch: str) -> Iterator[AttentionConfig]:
        config = choose(kernel.config, call.shape_on(arch))
        if config is not None and config.split == (kernel.label in ("dkey", "dvalue")):
            yield config

    for config, archs in archs_by_config(of_arch).items():
        length = f"up to {kernel.seq}, " if kernel.seq < 512 else ""
        yield kernel_spec(
            "attention",
            f"{kernel.label}, {length}head dim {dim}, {has}",
            f"pyaccel.kernels.attention.{kernel.fn}",
            kernel.arguments(call, config),
            dtype=dtype,
            **launched(config),
            do_not_specialize=["threshold"],
            archs=archs,
        )
