"""The timer: who takes turns with whom, how long, and what its intervals are."""

from __future__ import annotations

import time

import torch

from pyaccel.timing import LEAST_ROUNDS, interval, time_in_turn

CPU = torch.device("cpu")


def test_one_that_fails_takes_no_further_turn() -> None:
    taken, failed = time_in_turn({"fine": lambda: None, "fails": lambda: 1 / 0}, 3, CPU)
    assert [len(times) for times in taken.values()] == [3]
    assert isinstance(failed["fails"], ZeroDivisionError)


def test_intervals_are_those_of_order_statistics() -> None:
    """Of 20 values the 6th and the 15th (Hahn and Meeker 1991, table A.15a), of few the range."""
    assert interval([float(i) for i in range(20, 0, -1)]) == (6.0, 15.0)
    assert interval([float(i) for i in range(10)]) == (1.0, 8.0)
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert interval([1.0]) == (1.0, 1.0)


def test_a_time_limit_leaves_enough_rounds() -> None:
    taken, _ = time_in_turn({"fine": lambda: time.sleep(0.01)}, 50, CPU, seconds=0.0)
    assert len(taken["fine"]) == LEAST_ROUNDS


def test_the_order_changes_and_all_take_turns() -> None:
    order: list[str] = []
    contenders = {name: (lambda name=name: order.append(name)) for name in "abc"}
    time_in_turn(contenders, 6, CPU)
    turns = ["".join(order[i : i + 6 : 2]) for i in range(3, len(order), 6)]  # two calls a turn, once warm
    assert len(turns) == 6
    assert {"".join(sorted(turn)) for turn in turns} == {"abc"}
    assert len(set(turns)) > 2


def test_each_round_is_told() -> None:
    told: list[None] = []
    taken, _ = time_in_turn({(0, 1): int, (1, 0): int}, 3, CPU, done=lambda: told.append(None))
    assert {name: len(times) for name, times in taken.items()} == {(0, 1): 3, (1, 0): 3}
    assert len(told) == 4  # the first one warms up
