"""The first cases of each lane, from a seed that is kept: what ``make fuzz`` goes on with from seeds of its own."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import lane

SEED = 20
# Cases of one test: short ones, for workers to share.
SIZES = {"ops": (5, 25), "models": (5, 4), "cli": (2, 5)}
CASES = [(name, first * size, size) for name, (tests, size) in SIZES.items() for first in range(tests)]


@pytest.mark.parametrize(("name", "first", "count"), CASES)
def test_random_cases(name: str, first: int, count: int) -> None:
    try_case = lane(name)
    faults = []
    for case in range(first, first + count):
        tried = try_case(SEED, case)
        faults += [
            f"{tried.name}: {what}\n  python -m tests.fuzz {name} --seed {SEED} --case {case}"
            for what in tried.wrong
        ]
    assert not faults, "\n".join(faults)
