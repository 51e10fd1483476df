"""What the fuzz lanes must be able to do: find a planted fault, and make a case again from its number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyaccel import ops
from tests.fuzz import op_fuzz
from tests.fuzz.__main__ import main
from tests.fuzz.draw import Draw, same_memory
from tests.fuzz.op_cases import OPS, Call

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("case", range(20))
def test_a_case_is_made_again_from_its_number(case: int) -> None:
    draws = Draw("ops", 7, case), Draw("ops", 7, case)
    calls = [OPS[draw.pick(*OPS)][0](draw) for draw in draws]
    assert str(calls[0]) == str(calls[1])
    for name, value in calls[0].arguments.items():
        if isinstance(value, Tensor):
            assert same_memory(value.contiguous(), calls[1].arguments[name].contiguous())


def test_placed_tensors_show_what_happens_around_them() -> None:
    strides = set()
    for case in range(40):
        draw = Draw("ops", 0, case)
        values = draw.normal((3, 4, 5))
        placed = draw.place("x", values)
        strides.add(placed.stride())
        assert placed.shape == values.shape
        assert placed[0, 0, 0] == values[0, 0, 0]
        assert not draw.modified()
        _, buffer, _ = draw.buffers[0]
        assert buffer.isnan().any()
        buffer[3] = 1.0
        assert draw.modified() == ["x"]
    assert len(strides) > 10
    assert any(0 in s for s in strides)


def wrong_of(monkeypatch: pytest.MonkeyPatch, call: Call, plant: Any) -> list[str]:
    """What is said of `call` where the op is `plant`, which gets the real one first."""
    real = getattr(ops, call.op)
    monkeypatch.setattr(ops, call.op, lambda *args, **given: plant(real, *args, **given))
    tried = op_fuzz.Tried(str(call))
    return op_fuzz.Judged(Draw("ops", 0, 0), call, tried).wrong()


def layernorm_call() -> Call:
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    given = {"x": x, "residual": residual, "weight": torch.rand(8), "bias": torch.randn(8), "eps": 1e-5}
    return Call("residual_layernorm", given, [])


PLANTED = {
    "values": (lambda real, **g: real(**g) * 1.001, "max error"),
    "an infinity": (lambda real, **g: real(**g).index_fill(1, torch.tensor(2), float("inf")), "of their kind"),
    "dtype": (lambda real, **g: real(**g).double(), "expected torch.float32"),
    "shape": (lambda real, **g: real(**g)[None], "expected torch.float32"),
    "shared memory": (lambda real, **g: g["x"].copy_(real(**g)), "shares its memory with x"),
    "expanded": (lambda real, **g: real(**g)[:1].expand(3, 8), "is expanded"),
    "error": (lambda real, **g: real(**g | {"weight": g["weight"][1:]}), "InvalidArgumentError"),
    "randomness": (lambda real, **g: real(**g) + torch.randn(()).sign() * 1e-7, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, message = PLANTED[name]
    call = layernorm_call()
    if name == "randomness":  # the seed is set before each call
        state = iter(range(100))
        plant = lambda real, **g: real(**g) + next(state) * 1e-7  # noqa: E731
        message = "differs in a second run"
    wrong = wrong_of(monkeypatch, call, plant)
    assert any(message in what for what in wrong), wrong


def test_the_tree_without_a_planted_fault_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wrong_of(monkeypatch, layernorm_call(), lambda real, **g: real(**g))


def test_errors_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    call = layernorm_call()
    call.arguments["weight"] = torch.rand(7)
    real = ops.residual_layernorm
    tried = op_fuzz.Tried(str(call))
    assert not op_fuzz.errors_wrong(call, tried)

    def takes_anything(**given: Any) -> Any:
        from pyaccel import dispatch

        if dispatch.requested("residual_layernorm") == "torch":
            return given["x"].clone()
        return real(**given)

    monkeypatch.setattr(ops, "residual_layernorm", takes_anything)
    assert any("don't agree" in what for what in op_fuzz.errors_wrong(call, tried))

    def crashes(**given: Any) -> Any:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(ops, "residual_layernorm", crashes)
    assert any("isn't documented" in what for what in op_fuzz.errors_wrong(call, tried))


def test_faults_are_counted_and_can_be_replayed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        op_fuzz, "try_case", lambda seed, case: op_fuzz.Tried("a case", 2, ["it is wrong"] * (case == 1))
    )
    assert main(["ops", "--seed", "5", "--count", "3"]) == 1
    out = capsys.readouterr().out
    assert "python -m tests.fuzz ops --seed 5 --case 1\n" in out
    assert "ops: 3 cases, 6 calls, 1 faults (seed 5)" in out
    assert main(["ops", "--seed", "5", "--case", "0"]) == 0


def test_an_unknown_lane_is_refused() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "nonsense"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown lanes nonsense" in done.stderr
