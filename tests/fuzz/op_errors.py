"""One argument of a valid call made wrong."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.draw import Draw
from tests.fuzz.op_cases import Call

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.int8, torch.int32)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "eps": (-1e-5, math.nan),
    "dropout_p": (-0.1, 1.5, math.nan),
    "activation": ("tanh", "GELU", 3),
    "scale": ("1",),
    "window_size": ((-2, 0), (1,), 3, (1, 2, 3)),
    "max_seqlen_q": (-1, 2.5),
    "max_seqlen_k": (-1, None),
    "reduction": ("avg", None),
    "num_items": (-1, math.inf, math.nan),
    "chunk_size": (0, -3),
    "padding_idx": (99, -99),
    "out_dtype": (torch.int8, torch.float64),
}


def spoil(draw: Draw, call: Call) -> str:
    """Change ``call`` and say how."""
    call.wants = []
    options = [n for n in OPTIONS if n in call.arguments and not isinstance(call.arguments[n], Tensor)]
    if options and draw.chance(0.3):
        name = draw.pick(*options)
        call.arguments[name] = draw.pick(*OPTIONS[name])
        return f"{name} = {call.arguments[name]!r}"
    name = draw.pick(*(n for n, v in call.arguments.items() if isinstance(v, Tensor)))
    call.arguments[name], what = spoil_tensor(draw, call.arguments[name])
    return f"{name}: {what}"


def spoil_tensor(draw: Draw, x: Tensor) -> tuple[Any, str]:
    how = draw.pick("dtype", "one more", "one less", "a dimension more", "a dimension less", "another device")
    if how == "dtype":
        dtype = draw.pick(*(d for d in DTYPES if d != x.dtype))
        return x.to(dtype), str(dtype)
    if how == "another device":
        return x.to("meta"), how
    if how == "a dimension more":
        return x.unsqueeze(draw.pick(0, -1)), how
    if x.dim() == 0:
        return x.expand(2), how
    if how == "a dimension less":
        return (x.flatten() if x.dim() != 1 else x.sum()), how
    dim = draw.random.randrange(x.dim())
    if how == "one less" and x.shape[dim]:
        return x.narrow(dim, 0, x.shape[dim] - 1), f"{how} in dimension {dim}"
    more = torch.cat([x, x.new_zeros(*(1 if d == dim else n for d, n in enumerate(x.shape)))], dim)
    return more, f"one more in dimension {dim}"
