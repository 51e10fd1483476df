"""Pairwise covering cases: few cases in which every two values of any two parameters meet."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def pairwise(
    parameters: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool] = lambda case: True
) -> list[Case]:
    """Cases that together hold every pair of values, of two parameters, that an allowed case can hold.

    Greedy, and without any chance in it: the same parameters give the same cases in every process.

    Args:
        parameters: the values of each.
        allowed: whether a case may be, or what is chosen of it so far: other names may be missing.
    """
    sizes = {name: len(values) for name, values in parameters.items()}
    # What is still to be covered, by index, in the order of the parameters: a dict is an ordered set.
    left = {
        frozenset({(a, i), (b, j)}): {a: i, b: j}
        for a, b in itertools.combinations(sizes, 2)
        for i in range(sizes[a])
        for j in range(sizes[b])
    }
    used = {name: [0] * size for name, size in sizes.items()}

    def complete(chosen: dict[str, int]) -> dict[str, int] | None:
        """Add a value of every other parameter, the one that covers most first; None if none is allowed."""
        if not allowed({name: parameters[name][i] for name, i in chosen.items()}):
            return None
        missing = [name for name in sizes if name not in chosen]
        if not missing:
            return chosen
        name = max(missing, key=sizes.__getitem__)

        def rank(index: int) -> tuple[int, int]:
            covered = sum(frozenset({(name, index), other}) in left for other in chosen.items())
            return -covered, used[name][index]

        options = (complete(chosen | {name: index}) for index in sorted(range(sizes[name]), key=rank))
        return next((case for case in options if case is not None), None)

    cases = []
    while left:
        pair = next(iter(left))
        case = complete(left.pop(pair))
        if case is None:
            continue  # no allowed case holds this pair
        for items in itertools.combinations(case.items(), 2):
            left.pop(frozenset(items), None)
        for name, index in case.items():
            used[name][index] += 1
        cases.append({name: values[case[name]] for name, values in parameters.items()})
    return cases


def thinned(cases: Sequence[Case]) -> Sequence[Case]:
    """The first third of `cases`, where most pairs are, and what holds a value of a parameter that isn't in it.

    All of `cases` under PYACCEL_EVERY_PAIR=1 (``make nightly-pairs``).
    """
    if os.environ.get("PYACCEL_EVERY_PAIR") == "1":
        return cases
    kept, held = [], set()
    for index, case in enumerate(cases):
        values = {(name, repr(value)) for name, value in case.items()}
        if index < len(cases) / 3 or not values <= held:
            kept.append(case)
            held |= values
    return kept
