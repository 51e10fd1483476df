"""The timer: contenders take turns in rounds, in a changing order, so that a slow moment of the machine hits all."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch

LEAST_ROUNDS = 5
LONG = 0.2  # seconds of a call

_Name = TypeVar("_Name", bound=Hashable)


class Taken(NamedTuple):
    """Seconds that a call took, and for how many of them it kept the host (None where that is the same)."""

    seconds: float
    host: float | None


def time_in_turn(
    contenders: Mapping[_Name, Callable[[], object]],
    rounds: int,
    device: torch.device,
    seconds: float = math.inf,
    done: Callable[[], object] | None = None,
) -> tuple[dict[_Name, list[Taken]], dict[_Name, Exception]]:
    """Times of each contender in each round; they take turns, so that a slow moment of the machine hits all.

    A turn is two calls of which the second is timed, unless they are so long that the first can't matter: by then the
    threads of the one before, which wait awake for a while, have gone to sleep, and the caches hold what a contender
    called again and again finds there. One that raises is out, and its error comes second. After ``seconds`` no further
    round begins, until there were :data:`LEAST_ROUNDS`. ``done`` is called after each round, the one that warms up
    among them.
    """
    taken: dict[_Name, list[Taken]] = {name: [] for name in contenders}
    failed: dict[_Name, Exception] = {}
    order, last, start = random.Random(0), dict[_Name, float](), time.perf_counter()
    for i in range(-1, rounds):  # the first one, which isn't counted, warms up
        if i >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        # Who comes after whom changes, so that none is always the one that finds another's traces.
        for name in order.sample(sorted(contenders), len(contenders)):  # type: ignore[type-var]
            if name in failed:
                continue
            try:
                if i >= 0 and last[name] < LONG:
                    contenders[name]()
                time_of_call = _time(contenders[name], device)
            except Exception as error:
                failed[name] = error.with_traceback(None)  # whose frames hold on to tensors
                del taken[name]
                continue
            last[name] = time_of_call.seconds
            if i >= 0:
                taken[name].append(time_of_call)
        if done is not None:
            done()
    return taken, failed


def _time(call: Callable[[], object], device: torch.device) -> Taken:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return Taken(time.perf_counter() - start, None)
    # Inputs of a round must come from memory: the cache is overwritten before each call.
    torch.empty(256 * 2**20, dtype=torch.int8, device=device).zero_()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    end_event.record()
    torch.cuda.synchronize(device)
    return Taken(start_event.elapsed_time(end_event) / 1e3, host)


def interval(times: list[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median, by order statistics: no distribution is assumed.

    With fewer than 6 values it is their range, which holds the median with a probability of 1 - 2^(1 - n).
    """
    n = len(times)
    below, outside = 0, 0.5**n  # how many are cut at either end, and how likely the median lies beyond
    while outside + math.comb(n, below + 1) * 0.5**n <= 0.025:
        below += 1
        outside += math.comb(n, below) * 0.5**n
    ordered = sorted(times)
    return ordered[below], ordered[n - 1 - below]
