"""Function calls are counted, each one once, whoever makes them; and a layer's share is told of both models."""

from __future__ import annotations

import math
import sys
import time

import pytest
import torch

from pyaccel import dispatch
from pyaccel.cost.host import HostCost, encoder_host_costs, host_calls


def test_calls_of_python_and_c_are_counted_once() -> None:
    def square(x: float) -> float:
        return x * x

    def call() -> None:
        for i in range(5):
            math.sqrt(square(i))

    cost = host_calls(call)
    assert cost.calls == 1 + 5 * 2
    assert cost.project_calls == 0
    assert 0 < cost.microseconds < 1e6


def test_pyaccels_own_calls_are_told_apart() -> None:
    cost = host_calls(lambda: dispatch.op_names())
    assert (cost.project_calls, cost.calls) == (1, 2)


def test_the_least_time_counts() -> None:
    naps = iter([0.0, 0.0, 0.0, 0.05, 0.002, 0.05])
    cost = host_calls(lambda: time.sleep(next(naps)), repeats=3)
    assert 2e3 <= cost.microseconds < 4e4


def test_another_profiler_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def profiler(*event: object) -> None: ...

    before = sys.getprofile()
    sys.setprofile(profiler)
    try:
        with pytest.raises(ZeroDivisionError):
            host_calls(lambda: 1 / 0)
        host_calls(int)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(before)


def test_a_layers_share_of_both_models() -> None:
    threads = torch.get_num_threads()
    costs = encoder_host_costs(2, torch.device("cpu"), repeats=1)
    assert torch.get_num_threads() == threads
    assert costs["stock"].project_calls == 0
    assert costs["stock"].calls > 100
    assert 0 < costs["accelerated"].project_calls < costs["accelerated"].calls
    assert HostCost(6, 4, 2.0).per(2) == HostCost(3, 2, 1.0)
