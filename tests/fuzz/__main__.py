"""``python -m tests.fuzz [ops|models|cli] --seconds N --seed S --count N``: try random cases until time or count is up.

Prints how many were tried and what was wrong, each fault with the command that shows it again. The exit code is 1 if
there was one.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence

if platform.machine() in ("x86_64", "AMD64"):
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")  # as tests/conftest.py: before numpy is imported
os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.fuzz import Fault, Tried

LANES = ("ops", "models", "cli")


def lane(name: str) -> Callable[[int, int], Tried]:
    """The function that tries one case of a lane. Imports what it needs, and corrects the interpreter."""
    if name == "cli":
        from tests.fuzz.cli_fuzz import try_case

        return try_case
    from tests import interpreter

    warnings.filterwarnings("ignore", module="triton.runtime.interpreter")  # numpy's, of NaN and infinities
    interpreter.install()
    if name == "ops":
        from tests.fuzz.op_fuzz import try_case
    else:
        from tests.fuzz.model_fuzz import try_case
    return try_case


def fuzz(
    name: str, seed: int, *, seconds: float, count: int | None, first: int = 0, say: bool = True
) -> tuple[int, int, list[Fault]]:
    """Cases from ``first`` on, for ``seconds`` or ``count``: how many there were, their calls, and the faults."""
    try_case = lane(name)
    end, calls, case, faults = time.monotonic() + seconds, 0, first, []
    while time.monotonic() < end and (count is None or case < first + count):
        try:
            tried = try_case(seed, case)
        except Exception as error:  # of what judges: a fault of the lane, and no reason to stop
            tried = Tried("the lane itself", wrong=[f"{type(error).__name__}: {error}"])
        calls += tried.calls
        for what in tried.wrong:
            fault = Fault(name, seed, case, f"{tried.name}: {what}")
            faults.append(fault)
            if say:
                print(f"FAULT {fault.what}\n  {fault.replay}", flush=True)
        case += 1
    return case - first, calls, faults


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("lanes", nargs="*", metavar="LANE", help=f"of {', '.join(LANES)}; all by default")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each lane; 60 by default")
    parser.add_argument("--seed", type=int, help="of all cases; by the clock by default")
    parser.add_argument("--count", type=int, help="at most that many cases a lane")
    parser.add_argument("--case", type=int, help="this case alone")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.lanes) - set(LANES)):
        parser.error(f"unknown lanes {', '.join(unknown)}: expected some of {', '.join(LANES)}")
    if options.case is not None and (len(options.lanes) != 1 or options.seed is None):
        parser.error("--case needs one lane and its --seed")
    seed = options.seed if options.seed is not None else int(time.time())
    first, count, seconds = options.first, options.count, options.seconds
    if options.case is not None:
        first, count, seconds = options.case, 1, float("inf")
    wrong = 0
    for name in options.lanes or LANES:
        cases, calls, faults = fuzz(name, seed, seconds=seconds, count=count, first=first)
        wrong += len(faults)
        print(f"{name}: {cases} cases, {calls} calls, {len(faults)} faults (seed {seed})", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
