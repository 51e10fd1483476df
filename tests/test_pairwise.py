"""The generator of pairwise covering cases."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pairwise import Case, pairwise, thinned

PARAMETERS = {"a": list("xyz"), "b": [0, 1, 2, 3, 4], "c": [False, True], "d": [None, 0.5, 7], "e": ["only"]}
FILTERS: dict[str, Callable[[Case], bool]] = {
    "no filter": lambda case: True,
    "a pair": lambda case: not (case.get("a") == "x" and case.get("b") == 2),
    # Rules out more pairs than it names: with d None, a can only be x, and then c only False.
    "a chain": lambda case: (
        not (case.get("d", 7) is None and case.get("a", "x") != "x")
        and not (case.get("a") == "x" and case.get("c") is True)
    ),
    "a value": lambda case: case.get("b") != 4,
    "everything": lambda case: False,
}


def pairs(cases: list[Case]) -> set[tuple[object, ...]]:
    return {pair for case in cases for pair in itertools.combinations(case.items(), 2)}


@pytest.mark.parametrize("name", FILTERS)
def test_every_allowed_pair_is_covered_by_allowed_cases(name: str) -> None:
    allowed = FILTERS[name]
    product = [
        dict(zip(PARAMETERS, values, strict=True)) for values in itertools.product(*PARAMETERS.values())
    ]
    possible = [case for case in product if allowed(case)]
    cases = pairwise(PARAMETERS, allowed)
    assert all(case in possible for case in cases)
    assert pairs(cases) == pairs(possible)


def test_there_are_few_cases() -> None:
    """No set of cases is smaller than the product of the two largest parameters; 3 x 5 is 15, the product 90."""
    assert 15 <= len(pairwise(PARAMETERS)) <= 18
    assert len(pairwise({str(i): [0, 1, 2] for i in range(13)})) <= 25  # of 1 594 323
    assert pairwise({"a": [1, 2], "b": []}) == []


def test_thinned_cases_hold_every_value(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = pairwise(PARAMETERS)
    monkeypatch.delenv("PYACCEL_EVERY_PAIR", raising=False)
    kept = thinned([{"first": 1}] * 6 + cases + [{"late": 1}, {"late": 1}])
    assert len(kept) < 6 + len(cases)
    for name, values in PARAMETERS.items():
        assert {case[name] for case in kept if name in case} == set(values)
    assert [case for case in kept if "late" in case] == [{"late": 1}]
    monkeypatch.setenv("PYACCEL_EVERY_PAIR", "1")
    assert thinned(cases) == cases


def test_every_process_makes_the_same_cases() -> None:
    """Workers of one test run must collect the same tests, whatever their hashes."""
    code = f"from tests.pairwise import pairwise; print(pairwise({PARAMETERS!r}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True,
        ).stdout
        for seed in ("0", "1", "2")
    }  # fmt: skip
    assert found == {f"{pairwise(PARAMETERS)}\n"}
