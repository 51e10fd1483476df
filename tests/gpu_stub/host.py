"""Host time of a GPU: calls of functions and microseconds of one call of a 12-layer BERT, stock beside accelerated.

``python -m tests.gpu_stub FOLDER host-calls`` and ``host-time`` print them. Kernels cost next to nothing on either
side: what is left is what Python, PyTorch's dispatcher and the launchers take before a GPU has its work. Counts are
exact; times are the least of many calls in turn, and only their ratio means something.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.gpu_stub import card

LAYERS = 12
# Calls that are no part of what is counted: the card's stand-ins for what is C++ on a GPU.
_STAND_INS = card.__file__


class Counter:
    """Counts calls of Python and C functions in the threads that run under it, without those inside of stand-ins."""

    def __init__(self) -> None:
        self.calls = 0
        self._depth = threading.local()

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        depth = getattr(self._depth, "now", 0)
        if event == "call":
            if depth or frame.f_code.co_filename == _STAND_INS:
                self._depth.now = depth + 1
                # What stands in for an operator is called by C++; what stands in for a function, by what is counted.
                self.calls += not depth and frame.f_code.co_name != "_fallback"
            else:
                self.calls += 1
        elif event == "return":
            if depth:
                self._depth.now = depth - 1
        elif event == "c_call" and not depth:
            self.calls += 1


def calls(run: Callable[[Any], None]) -> int:
    """Functions called by ``run``, which makes its argument a hook of the loss: the backward's thread starts there."""
    counter = Counter()
    main = threading.get_ident()

    def in_backward(grad: Any) -> None:
        if threading.get_ident() != main:
            sys.setprofile(counter)

    sys.setprofile(counter)
    try:
        run(in_backward)
    finally:
        sys.setprofile(None)
    return counter.calls


def models(device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Stock and accelerated, with BERT-base's number of layers and tiny ones."""
    import transformers

    import pyaccel

    made: dict[str, nn.Module] = {}
    for name in ("stock", "accelerated"):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=128,
            max_position_embeddings=64,
        )  # fmt: skip
        made[name] = transformers.BertModel(config).to(device, dtype)
    pyaccel.accelerate(made["accelerated"], cuda_graphs=False)
    return made


def batch(device: str) -> dict[str, Any]:
    ids = torch.randint(1, 64, (4, 16), device=device)
    mask = torch.ones(4, 16, dtype=torch.long, device=device)
    mask[1, 10:] = 0
    mask[2, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def forward(model: nn.Module, given: dict[str, Any], hook: Any = None) -> None:
    with torch.inference_mode():
        model(**given)


def step(model: nn.Module, given: dict[str, Any], hook: Any = None) -> None:
    """Forward with dropout, and backward."""
    loss = model(**given).last_hidden_state.float().sum()
    if hook is not None:
        loss.register_hook(hook)
    loss.backward()


RUNS: dict[str, Callable[..., None]] = {"forward": forward, "training step": step}


def counted() -> dict[str, dict[str, int]]:
    """For each run: calls of the stock and of the accelerated model."""
    both, given = models("cuda", torch.bfloat16), batch("cuda")
    found: dict[str, dict[str, int]] = {}
    for name, run in RUNS.items():
        found[name] = {}
        for which, model in both.items():
            model.train(name != "forward")
            for _ in range(2):
                run(model, given)
            model.zero_grad()
            found[name][which] = calls(lambda hook, run=run, model=model: run(model, given, hook))
    return found


def counted_by_graph() -> int:
    """Calls of one forward pass of the accelerated encoder by a CUDA graph, its embeddings and pooler left out."""
    import pyaccel

    model: Any = models("cuda", torch.bfloat16)["accelerated"].eval()
    pyaccel.restore(model)
    report = pyaccel.accelerate(model)
    hidden = torch.zeros(4, 16, 64, dtype=torch.bfloat16, device="cuda")
    mask = torch.ones(4, 16, dtype=torch.bool, device="cuda")

    def run(hook: Any = None) -> None:
        with torch.inference_mode():
            model.encoder(hidden, mask)

    for _ in range(3):
        run()
    found = calls(run)
    assert report.captured == 1, report
    assert report.served["cuda_graph"] == 3 * LAYERS, report
    return found


def timed(rounds: int = 60) -> dict[str, dict[str, float]]:
    """For each run: least microseconds of the stock and of the accelerated model. After :func:`card.pretend`."""
    torch.set_num_threads(1)  # the time of threads that wait for work would count
    # In fp32: a CPU takes long for the smallest products in bf16, which no GPU does.
    both, given = models("cpu", torch.float32), batch("cpu")
    found: dict[str, dict[str, float]] = {}
    for name, run in RUNS.items():
        found[name] = dict.fromkeys(both, float("inf"))
        for model in both.values():
            model.train(name != "forward")
        for turn in range(rounds + 3):
            for which, model in both.items():
                model.zero_grad()
                start = time.process_time()  # of a machine that others use too
                run(model, given)
                taken = 1e6 * (time.process_time() - start)
                card.take_launches()
                if turn >= 3:
                    found[name][which] = min(found[name][which], taken)
    served: Any = both["accelerated"].encoder._pyaccel.acceleration.report.served
    assert set(served) == {"triton"}, served
    return found


def report(numbers: dict[str, dict[str, Any]], unit: str) -> None:
    for name, each in numbers.items():
        stock, ours = each["stock"], each["accelerated"]
        print(
            f"{name:>14}: stock {stock:9,.0f}  accelerated {ours:9,.0f} {unit}  ({ours / stock:.2f} of stock)"
        )
