"""Where a value may be read: not in a graph, a trace, a transform or a mode that has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pyaccel.ops.common import on_host


def exported(ask: Callable[[Tensor], Tensor]) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ask(x)

    torch.export.export(Module(), (torch.ones(2),), strict=False)


def under_a_fake_mode(ask: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode():
        ask(torch.ones(2))


def of_a_fake_tensor(ask: Callable[[Tensor], Tensor]) -> None:
    ask(FakeTensorMode().from_tensor(torch.ones(2)))


RECORDERS: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "export": exported,
    "jit.trace": lambda ask: torch.jit.trace(ask, (torch.ones(2),), check_trace=False),
    "make_fx": lambda ask: make_fx(ask)(torch.ones(2)),
    "func.vmap": lambda ask: torch.func.vmap(ask)(torch.ones(2, 2)),
    "func.grad": lambda ask: torch.func.grad(lambda x: ask(x).sum())(torch.ones(2)),
    "fake mode": under_a_fake_mode,
    "fake tensor": of_a_fake_tensor,
    "meta": lambda ask: ask(torch.ones(2, device="meta")),
}


@pytest.mark.parametrize("recorder", RECORDERS)
def test_no_value_is_read_where_a_call_is_recorded_or_transformed(recorder: str) -> None:
    found: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        found.append(on_host(x))
        return x * 2.0

    RECORDERS[recorder](ask)
    assert found == [False]


def test_a_compiled_graph_reads_no_value() -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda x: x + 2.0 if on_host(x) else x * 3.0, backend="eager", fullgraph=True)
    assert run(torch.ones(2)).tolist() == [3.0, 3.0]
    assert run(torch.full((2,), 2.0)).tolist() == [6.0, 6.0]


@pytest.mark.parametrize("x", [torch.ones(2), torch.nn.Parameter(torch.ones(2))], ids=["tensor", "parameter"])
def test_a_value_is_read_in_eager_mode(x: Tensor) -> None:
    assert on_host(x)
    with torch.no_grad():
        assert on_host(x)
