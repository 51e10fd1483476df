"""Where an op runs without PyTorch's dispatcher, and where it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._vmap_internals import _vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pyaccel.ops.bias_act.triton import forward_op
from pyaccel.ops.common import Op, apply, runs_directly


class _Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def test_plain_calls_run_directly() -> None:
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            x = torch.ones(3)
            assert runs_directly(x, None, torch.nn.Parameter(x), 1, 0.5, True, "gelu", torch.float32)
            with torch.autocast("cpu"):
                assert runs_directly(x)


@pytest.mark.parametrize(
    "context", [_Passing(), FlopCounterMode(display=False), FakeTensorMode(), torch.enable_grad()]
)
def test_calls_that_something_intercepts_do_not(context: Any) -> None:
    x = torch.ones(3)
    with torch.no_grad(), context:
        assert not runs_directly(x)
    with torch.no_grad():
        assert runs_directly(x)


def test_profiled_and_traced_calls_do_not() -> None:
    x = torch.ones(3)
    asked: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        asked.append(runs_directly(x))
        return x * 1

    with torch.no_grad():
        with torch.profiler.profile():
            ask(x)
        torch.vmap(ask)(x)
        make_fx(ask)(x)
        torch.jit.trace(ask, x, check_trace=False)
        _vmap(ask)(x)  # PyTorch's older one
        assert not any(asked)
        assert len(asked) == 5
        ask(x)
        assert asked[-1]


def test_tensors_of_another_kind_do_not() -> None:
    with torch.no_grad():
        assert not runs_directly(torch.ones(3, device="meta"))
        assert not runs_directly(torch.ones(3), torch.ones(3).as_subclass(_Subclass))


def test_an_op_is_registered_and_runs_its_function(device: torch.device) -> None:
    x = torch.randn(2, 8, device=device)
    ran: list[str] = []

    def function(*args: Any) -> Tensor:
        ran.append("function")
        out: Tensor = forward_op.function(*args)
        return out

    op = Op(function, forward_op.registered)
    with torch.no_grad():
        assert torch.equal(op(x, None, "relu"), x.relu())
        assert ran == ["function"]
        with _Passing():
            assert torch.equal(op(x, None, "relu"), x.relu())
    assert ran == ["function"]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        op(x.requires_grad_(), None, "relu").sum().backward()


class _Double(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_functions_are_applied_with_and_without_transforms() -> None:
    x = torch.ones(3, requires_grad=True)
    apply(_Double, x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    found = torch.vmap(torch.func.grad(lambda x: apply(_Double, x)))(torch.ones(3))
    assert torch.equal(found, torch.full((3,), 2.0))
