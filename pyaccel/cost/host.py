"""What a call costs the host: Python and C function calls, and the least time, with kernels as small as can be."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import nn

from pyaccel import dispatch, triton_support

_PROJECT = str(Path(__file__).resolve().parents[1])


@dataclass(frozen=True)
class HostCost:
    """Of one call: all function calls in Python and C, those of pyaccel's own functions, and the least time."""

    calls: float
    project_calls: float
    microseconds: float

    def per(self, count: int) -> HostCost:
        """The share of one of ``count`` equal layers."""
        return HostCost(self.calls / count, self.project_calls / count, self.microseconds / count)


def host_calls(call: Callable[[], object], *, repeats: int = 30) -> HostCost:
    """Count the function calls that this thread makes in one ``call()``, and take the least time of ``repeats`` calls.

    The first two calls are neither counted nor timed. On a GPU the time is that until the call returns, from an empty
    queue. Functions that torch compiled are none of Python's and not counted.
    """
    for _ in range(2):
        call()
    calls = project = 0

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal calls, project
        if event == "call":
            calls += 1
            project += frame.f_code.co_filename.startswith(_PROJECT)
        elif event == "c_call" and arg is not sys.setprofile:
            calls += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    least = float("inf")
    for _ in range(repeats):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return HostCost(calls, project, least * 1e6)


def encoder_host_costs(layers: int, device: torch.device, *, repeats: int = 30) -> dict[str, HostCost]:
    """``"stock"`` (eager mode, SDPA) and ``"accelerated"``: a layer's share of a BERT's forward in evaluation.

    The BERT has ``layers`` layers of 64 features, whose products take next to no time, and runs on 2 x 16 tokens with
    padding, by one thread and the backends that dispatch chooses on ``device``.
    """
    from transformers import BertConfig, BertModel

    from pyaccel.hf import accelerate

    config = BertConfig(
        vocab_size=64, num_hidden_layers=layers, hidden_size=64, num_attention_heads=2, intermediate_size=128,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    batch = {
        "input_ids": torch.arange(32, device=device).view(2, 16),
        "attention_mask": (
            torch.arange(16, device=device) < torch.tensor([[16], [11]], device=device)
        ).long(),
    }
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # In Triton's interpreter a kernel is thousands of calls.
    asked = dispatch.use_backend("torch") if triton_support.interpreting() else nullcontext()
    try:
        with torch.no_grad(), asked:
            for side in ("stock", "accelerated"):
                model = cast(nn.Module, BertModel(config)).to(device).eval()
                if side == "accelerated":
                    accelerate(model)
                found[side] = host_calls(partial(model, **batch), repeats=repeats).per(layers)
    finally:
        torch.set_num_threads(threads)
    return found
