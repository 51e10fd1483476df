"""Which backend serves a call: asked for and honored, or refused with every reason; never silently another."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo.testing

import pyaccel
from pyaccel import dispatch
from pyaccel.errors import InvalidArgumentError, NotSupportedError

ALL = {"triton": [], "torch": [], "reference": []}


def test_own_choice() -> None:
    assert dispatch.choose("residual_layernorm", ALL).backend == "triton"
    choice = dispatch.choose("residual_layernorm", {**ALL, "triton": ["too wide", "too deep"]})
    assert choice.backend == "torch"
    assert "too wide; too deep" in choice.reason
    assert "no implementation" in dispatch.choose("residual_layernorm", {"torch": []}).reason
    assert dispatch.choose("residual_layernorm", ALL, "torch", "measured").reason == "measured"
    assert (
        dispatch.choose("residual_layernorm", {**ALL, "torch": ["no"]}, "torch", "measured").backend
        == "triton"
    )
    with pytest.raises(NotSupportedError, match="no backend can serve"):
        dispatch.choose("residual_layernorm", {"torch": ["broken"], "reference": []})


def test_a_request_is_honored_or_raises() -> None:
    with pyaccel.use_backend("reference"):
        assert dispatch.choose("residual_layernorm", ALL, "torch", "measured").backend == "reference"
        with pyaccel.use_backend("torch", ops=["residual_layernorm"]):
            assert dispatch.choose("residual_layernorm", ALL).backend == "torch"
            assert dispatch.choose("int8_matmul", ALL).backend == "reference"
        assert dispatch.requested("residual_layernorm") == "reference"
    assert dispatch.requested("residual_layernorm") == "auto"
    with pyaccel.use_backend("triton"):
        with pytest.raises(NotSupportedError, match="a; b"):
            dispatch.choose("residual_layernorm", {**ALL, "triton": ["a", "b"]})
        with pytest.raises(NotSupportedError, match="no triton implementation"):
            dispatch.choose("int8_matmul", {"torch": []})


@pytest.fixture
def process() -> Iterator[None]:
    """What is asked for process-wide is put back."""
    yield
    pyaccel.set_backend("auto")
    assert dispatch.overrides() == ()


def test_a_process_wide_request_stays_until_the_next_and_blocks_override_it(process: None) -> None:
    pyaccel.set_backend("reference")
    assert dispatch.requested("varlen_attention") == "reference"
    pyaccel.set_backend("torch", ops=["int8_matmul"])
    assert dispatch.overrides() == (("", "reference"), ("int8_matmul", "torch"))
    with pyaccel.use_backend("triton", ops=["varlen_attention"]):
        assert dispatch.requested("varlen_attention") == "triton"
        assert dispatch.requested("int8_matmul") == "torch"
        assert dispatch.requested("bias_gelu") == "reference"
    with pyaccel.use_backend("auto"):
        assert dispatch.requested("varlen_attention") == "auto"
        assert dispatch.requested("int8_matmul") == "auto", (
            "a block for every op overrides requests for single ones"
        )
        assert dispatch.overrides() == ()
    pyaccel.set_backend("torch")
    assert dispatch.overrides() == (("", "torch"),), "a request for every op replaces those for single ops"
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        pyaccel.set_backend("cuda")
    with pytest.raises(TypeError, match="list of op names"):
        pyaccel.set_backend("torch", ops="int8_matmul")
    assert dispatch.overrides() == (("", "torch"),)


def test_a_process_wide_request_is_every_thread_s(process: None) -> None:
    pyaccel.set_backend("reference")
    assert in_a_thread(lambda: dispatch.requested("varlen_attention")) == "reference"


def test_without_a_with_statement_nothing_changes_and_a_warning_says_so() -> None:
    with pytest.warns(UserWarning, match="never entered and had no effect"):
        pyaccel.use_backend("reference")
    assert dispatch.overrides() == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        request = pyaccel.use_backend("reference")
        for _ in range(2):
            with request:
                assert dispatch.requested("varlen_attention") == "reference"
            assert dispatch.overrides() == ()
        del request


def in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_block_is_for_its_own_thread() -> None:
    with pyaccel.use_backend("reference"), dispatch.record() as choices:
        assert in_a_thread(dispatch.overrides) == ()
        in_a_thread(lambda: dispatch.choose("int8_matmul", ALL))
        assert in_a_thread(dispatch.is_recording) is False
        asked = dispatch.overrides()

        def elsewhere() -> str:
            with dispatch.use_overrides(asked):
                return dispatch.requested("int8_matmul")

        assert in_a_thread(elsewhere) == "reference"
    assert choices == []


def test_requests_taken_elsewhere_ask_for_nothing_else() -> None:
    taken = dispatch.overrides()
    with pyaccel.use_backend("reference"), dispatch.use_overrides(taken):
        assert dispatch.overrides() == ()
        with pyaccel.use_backend("torch", ops=["int8_matmul"]):
            taken = dispatch.overrides()
    with dispatch.use_overrides(taken):
        assert dispatch.overrides() == (("int8_matmul", "torch"),)


def test_threads_with_blocks_of_their_own_do_not_meet() -> None:
    barrier, wrong = threading.Barrier(6), []

    def work(number: int) -> None:
        name = ("torch", "reference", "triton")[number % 3]
        barrier.wait()
        for _ in range(300):
            with pyaccel.use_backend(name), dispatch.record() as choices:
                found = dispatch.choose("int8_matmul", ALL).backend
                if found != name or [choice.backend for choice in choices] != [name]:
                    wrong.append((found, name))
            if dispatch.overrides():
                wrong.append(dispatch.overrides())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert dispatch.overrides() == ()


def test_asyncio_tasks_do_not_meet() -> None:
    async def work(name: str) -> list[str]:
        found = []
        for _ in range(5):
            with pyaccel.use_backend(name), dispatch.record() as choices:
                await asyncio.sleep(0)
                found.append(dispatch.choose("int8_matmul", ALL).backend)
                await asyncio.sleep(0)
                assert len(choices) == 1
            await asyncio.sleep(0)
            found.append(dispatch.requested("int8_matmul"))
        return found

    async def all_at_a_time() -> list[list[str]]:
        return await asyncio.gather(*(work(name) for name in ("torch", "reference", "triton")))

    assert asyncio.run(all_at_a_time()) == [[name, "auto"] * 5 for name in ("torch", "reference", "triton")]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_blocks_end_in_any_order(order: tuple[int, ...]) -> None:
    names = ["torch", "reference", "triton"]
    blocks = [pyaccel.use_backend(name).__enter__() for name in names]
    still = list(range(3))
    for number in order:
        blocks[number].__exit__(None, None, None)
        still.remove(number)
        assert dispatch.requested("int8_matmul") == (names[still[-1]] if still else "auto")
    blocks[0].__exit__(None, None, None)  # once more than it was entered
    assert dispatch.overrides() == ()


def test_a_block_that_ends_in_another_thread_is_harmless() -> None:
    with pyaccel.use_backend("torch") as block:
        in_a_thread(lambda: block.__exit__(None, None, None))
        assert dispatch.requested("int8_matmul") == "torch"
    assert dispatch.overrides() == ()


def test_recorders_end_in_any_order() -> None:
    first, second = dispatch.record(), dispatch.record()
    outer, inner = first.__enter__(), second.__enter__()
    dispatch.choose("int8_matmul", ALL)
    first.__exit__(None, None, None)
    dispatch.choose("bias_gelu", ALL)
    second.__exit__(None, None, None)
    dispatch.choose("varlen_attention", ALL)
    assert [c.op for c in outer] == ["int8_matmul"]
    assert [c.op for c in inner] == ["int8_matmul", "bias_gelu"]
    assert not dispatch.is_recording()


def _served(x: torch.Tensor) -> torch.Tensor:
    """Another number for each backend, so that a stale one shows."""
    backend = dispatch.choose("int8_matmul", ALL, "torch", "measured").backend
    return x + 1.0 + ["triton", "torch", "reference"].index(backend)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_functions_follow_what_is_asked_for(fullgraph: bool, process: None) -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(_served, backend=count, fullgraph=fullgraph)
    x = torch.zeros(1)

    def asked(name: str) -> float:
        with pyaccel.use_backend(name):
            return compiled(x).item()

    for _ in range(2):
        assert compiled(x).item() == 2.0
        assert asked("reference") == 3.0
        assert asked("triton") == 1.0
        assert in_a_thread(lambda: compiled(x)).item() == 2.0
        pyaccel.set_backend("reference")
        assert compiled(x).item() == 3.0
        assert asked("triton") == 1.0
        assert asked("auto") == 2.0
        pyaccel.set_backend("auto")
    assert count.frame_count == 3, "compiled once for each backend"


@pytest.mark.parametrize("fullgraph", [True, False])
def test_blocks_inside_a_compiled_function(fullgraph: bool) -> None:
    torch._dynamo.reset()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before = _served(x)
        with pyaccel.use_backend("reference"):
            outer = _served(x)
            with (
                pyaccel.use_backend("triton", ops=["int8_matmul"]),
                dispatch.use_overrides(dispatch.overrides()),
            ):
                inner = _served(x)
        return before, outer, inner, _served(x)

    compiled = torch.compile(function, backend="eager", fullgraph=fullgraph)
    for name, number in (("auto", 2.0), ("triton", 1.0), ("auto", 2.0)):
        with pyaccel.use_backend(name):
            assert [y.item() for y in compiled(torch.zeros(1))] == [number, 3.0, 1.0, number]
    assert dispatch.overrides() == ()
    assert dispatch._traced == ()


def test_an_error_while_a_function_is_traced_leaves_no_block_behind() -> None:
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def broken(x: torch.Tensor) -> torch.Tensor:
        with pyaccel.use_backend("reference"):
            return x @ torch.zeros(7, 7)

    with pytest.raises(RuntimeError):
        broken(torch.zeros(1, 2))
    assert dispatch.overrides() == ()
    assert dispatch._traced == ()


def test_an_export_that_runs_python_serves_what_is_asked_for() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with pyaccel.use_backend("reference"):
                return _served(x)

    for strict in (False, True):
        program = torch.export.export(Module(), (torch.zeros(1),), strict=strict)
        assert program.module()(torch.zeros(1)).item() == 3.0
    assert dispatch.overrides() == ()


def test_what_is_put_back_after_an_error() -> None:
    def fail() -> None:
        with pyaccel.use_backend("reference"):
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert dispatch.requested("residual_layernorm") == "auto"


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        pyaccel.use_backend("cuda")
    with pytest.raises(ValueError, match="unknown ops"):
        pyaccel.use_backend("torch", ops=["layernorm"])
    with pytest.raises(TypeError, match="list of op names"):
        pyaccel.use_backend("torch", ops="residual_layernorm")
    assert dispatch.requested("residual_layernorm") == "auto"


def test_recording_nests() -> None:
    with dispatch.record() as outer:
        dispatch.choose("residual_layernorm", ALL)
        with dispatch.record() as inner:
            dispatch.choose("int8_matmul", ALL)
        assert [c.op for c in inner] == ["int8_matmul"]
    assert [c.op for c in outer] == ["residual_layernorm", "int8_matmul"]


def products() -> dict[str, torch.Tensor]:
    """Arguments of a feed-forward block of 4 features."""
    square = torch.eye(4)
    return {"x": torch.ones(2, 4), "residual": torch.zeros(2, 4), "ln_weight": torch.ones(4), "ln_bias": torch.ones(4),
            "weight1": square, "weight2": square}  # fmt: skip


def test_what_ops_give_is_told_once_and_in_order() -> None:
    told: list[tuple[str, Any]] = []
    given = products()
    with pyaccel.use_backend("reference"), dispatch.observe(lambda name, out: told.append((name, out))):
        assert dispatch.is_recording()
        first = pyaccel.ops.linear_activation(given["x"], given["weight1"])
        # Made of a LayerNorm and two products, and one op to whoever calls it.
        second = pyaccel.ops.layernorm_mlp(**given, bias1=None, activation="relu")
        with pytest.raises(InvalidArgumentError):
            pyaccel.ops.linear_activation(given["x"], given["x"].T[:3])
    pyaccel.ops.linear_activation(given["x"], given["weight1"])
    assert [name for name, _ in told] == ["linear_activation", "layernorm_mlp"]
    assert told[0][1] is first
    assert told[1][1] is second
    assert not dispatch.is_recording()


def test_observers_nest_and_belong_to_a_thread() -> None:
    told: list[str] = []

    def observer(name: str, out: object) -> None:
        told.append(name)

    with dispatch.observe(observer):
        with dispatch.observe(observer):
            dispatch.tell("layout", None)
        dispatch.tell("one", None)
        in_a_thread(lambda: dispatch.tell("another's", None))
        assert in_a_thread(dispatch.is_recording) is False
    dispatch.tell("too late", None)
    assert told == ["layout", "layout", "one"]


def test_a_compiled_op_is_the_same_beside_an_observer() -> None:
    told: list[str] = []
    given = products()
    run = torch.compile(
        lambda x: pyaccel.ops.linear_activation(x, given["weight1"]), backend="eager", fullgraph=True
    )
    expected = run(given["x"])
    with dispatch.observe(lambda name, out: told.append(name)):
        assert torch.equal(run(given["x"]), expected)
    assert told == []


def test_ops_are_pickled_by_their_public_names() -> None:
    for name in pyaccel.ops.__all__:
        op = getattr(pyaccel.ops, name)
        assert pickle.loads(pickle.dumps(op)) is op
        assert list(inspect.signature(op).parameters) == list(inspect.signature(op.__wrapped__).parameters)


def test_a_summary_loses_nothing() -> None:
    a, b = dispatch.Choice("int8_matmul", "torch", "x"), dispatch.Choice("int8_matmul", "triton", "y")
    other = dispatch.Choice("residual_layernorm", "torch", "z")
    summary = dispatch.summary([a, other, b, a])
    assert summary["residual_layernorm"] == other
    assert summary["int8_matmul"] == dispatch.Choice("int8_matmul", "torch, triton", "x; or y")


def test_bad_arguments_are_one_error_of_ours_and_of_pytorchs() -> None:
    dispatch.invalid("varlen_attention", [])
    for base in (InvalidArgumentError, ValueError, RuntimeError):
        with pytest.raises(base, match="varlen_attention: a; b"):
            dispatch.invalid("varlen_attention", ["a", "b"])
    assert not issubclass(InvalidArgumentError, NotSupportedError)
    assert not issubclass(NotSupportedError, ValueError)


def test_every_op_that_dispatches_is_public() -> None:
    for name in dispatch.op_names():
        assert callable(getattr(pyaccel.ops, name))
