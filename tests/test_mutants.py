"""Every known bug can be planted in the code as it is: a change that leaves one behind is noticed at once."""

from __future__ import annotations

import pytest

from tests.mutants import Mutant
from tests.mutants.__main__ import ROOT, families, fast_tests, planted

FAMILIES = families()


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(mutant, id=mutant.name) for family in FAMILIES.values() for mutant in family],
)
def test_mutant_can_be_planted(mutant: Mutant) -> None:
    assert planted(mutant, ROOT) != (ROOT / mutant.file).read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_there_are_mutants_and_tests_to_kill_them(family: str) -> None:
    assert FAMILIES[family]
    for test in fast_tests(family):
        assert (ROOT / test.partition("::")[0]).exists()
