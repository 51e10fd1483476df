"""Which backend serves a call: asked for and honoured, or refused with every reason; never silently another."""

from __future__ import annotations

import pytest
import torch

import pyaccel
from pyaccel import dispatch

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
    with pytest.raises(dispatch.NotSupportedError, match="no backend can serve"):
        dispatch.choose("residual_layernorm", {"torch": ["broken"], "reference": []})


def test_a_request_is_honoured_or_raises() -> None:
    with pyaccel.use_backend("reference"):
        assert dispatch.choose("residual_layernorm", ALL, "torch", "measured").backend == "reference"
        with pyaccel.use_backend("torch", ops=["residual_layernorm"]):
            assert dispatch.choose("residual_layernorm", ALL).backend == "torch"
            assert dispatch.choose("int8_matmul", ALL).backend == "reference"
        assert dispatch.requested("residual_layernorm") == "reference"
    assert dispatch.requested("residual_layernorm") == "auto"
    with pyaccel.use_backend("triton"):
        with pytest.raises(dispatch.NotSupportedError, match="a; b"):
            dispatch.choose("residual_layernorm", {**ALL, "triton": ["a", "b"]})
        with pytest.raises(dispatch.NotSupportedError, match="no triton implementation"):
            dispatch.choose("int8_matmul", {"torch": []})


def test_a_request_without_with_stays() -> None:
    request = pyaccel.use_backend("reference")
    assert dispatch.requested("varlen_attention") == "reference"
    pyaccel.use_backend("auto")
    assert dispatch.requested("varlen_attention") == "auto"
    request.__exit__(None, None, None)
    assert dispatch.requested("varlen_attention") == "auto"


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


def test_a_summary_loses_nothing() -> None:
    a, b = dispatch.Choice("int8_matmul", "torch", "x"), dispatch.Choice("int8_matmul", "triton", "y")
    other = dispatch.Choice("residual_layernorm", "torch", "z")
    summary = dispatch.summary([a, other, b, a])
    assert summary["residual_layernorm"] == other
    assert summary["int8_matmul"] == dispatch.Choice("int8_matmul", "torch, triton", "x; or y")


def test_triton_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.triton_reasons(x, None) == []
    assert "not float64" in dispatch.triton_reasons(x.double())[0]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert dispatch.triton_reasons(x) == ["the tensors are on the CPU"]
    assert "on cpu, meta" in dispatch.triton_reasons(x, x.to("meta"))[0]
    assert dispatch.triton_reasons(x.to("meta")) == []  # stands for a GPU's tensor
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert "pip install" in dispatch.triton_reasons(x)[0]


def test_bad_arguments_are_one_error_of_ours_and_of_pytorchs() -> None:
    dispatch.invalid("varlen_attention", [])
    for base in (dispatch.InvalidArgumentError, ValueError, RuntimeError):
        with pytest.raises(base, match="varlen_attention: a; b"):
            dispatch.invalid("varlen_attention", ["a", "b"])
    assert not issubclass(dispatch.InvalidArgumentError, dispatch.NotSupportedError)
    assert not issubclass(dispatch.NotSupportedError, ValueError)


def test_every_op_that_dispatches_is_public() -> None:
    for name in dispatch.op_names():
        assert callable(getattr(pyaccel.ops, name))
