"""`accelerate`, `restore` and quantization, interrupted at every step: all or nothing, or done by a second call."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM, BertModel

import pyaccel
from pyaccel import quantization
from pyaccel.nn import Int8Linear, ObservedLinear
from pyaccel.quantization.changes import Changes
from tests.hf.models import batch_of, tiny


def state_of(model: Any) -> dict[str, Any]:
    """All that acceleration and quantization change: which objects, of which classes, with which attributes."""
    parts = dict(model.named_modules())
    return {
        "modules": {name: (id(part), type(part), list(part._modules)) for name, part in parts.items()},
        "attributes": {
            name: {key: id(value) for key, value in part.__dict__.items() if not key.startswith("_forward")}
            for name, part in parts.items()
        },
        "hooks": {
            name: [len(part.__dict__[key]) for key in part.__dict__ if key.startswith("_forward")]
            for name, part in parts.items()
        },
        "tensors": {name: (id(x), x.dtype) for name, x in model.named_parameters()},
        "modes": [part.training for part in parts.values()],
        "config": {key: value for key, value in model.config.__dict__.items()},
    }


def interruptions(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], error: type[BaseException]
) -> Iterator[int]:
    """Act, with the n-th change interrupted before it is made and then after it, for each n until nothing is."""
    make = Changes.make
    for count in itertools.count():
        for is_made in (False, True):
            calls = 0

            def interrupted(
                self: Changes,
                change: Callable[[], object],
                undo: Any,
                is_made: bool = is_made,
                at: int = count,
            ) -> None:
                nonlocal calls
                calls += 1
                if calls != at + 1:
                    return make(self, change, undo)
                self._undo.append(undo)
                if is_made:
                    change()
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(Changes, "make", interrupted)
                if count < _changes_of(act, patch, make):
                    with pytest.raises(error):
                        act()
                    yield count
                else:
                    return


def _changes_of(act: Callable[[], object], patch: pytest.MonkeyPatch, make: Any) -> int:
    known: int | None = getattr(act, "changes", None)
    assert known is not None
    return known


def counted(
    act: Callable[[Any], object], model: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], object]:
    """``act`` on the model, which knows how many changes it makes of such a model."""
    calls, make = [], Changes.make
    with monkeypatch.context() as patch:
        patch.setattr(
            Changes, "make", lambda self, change, undo: (calls.append(1), make(self, change, undo))[1]
        )
        act(copy.deepcopy(model))

    def on_the_model() -> object:
        return act(model)

    on_the_model.changes = len(calls)  # type: ignore[attr-defined]
    return on_the_model


ACTS: dict[str, Callable[[Any], object]] = {
    "accelerate": pyaccel.accelerate,
    "skip_logits": lambda m: pyaccel.accelerate(m, skip_logits=True),
    "int8": lambda m: pyaccel.accelerate(m, int8="dynamic"),
    "weight_only": lambda m: pyaccel.accelerate(m, int8="weight_only", packing=False),
    "quantize": lambda m: quantization.quantize(m, progress=False),
    "static": lambda m: quantization.quantize(
        m, "static", calibration=[batch_of("right")], smooth=True, progress=False
    ),
    "prepare_qat": quantization.prepare_qat,
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", ACTS)
def test_interrupted_at_every_change(
    name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(BertForMaskedLM, num_hidden_layers=1)
    act = counted(ACTS[name], model, monkeypatch)
    before, weights = state_of(model), {key: x.clone() for key, x in model.state_dict().items()}
    tried = 0
    for _ in interruptions(monkeypatch, act, error):
        tried += 1
        assert state_of(model) == before
    assert tried == 2 * act.changes > 5  # type: ignore[attr-defined]
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())
    act()
    assert state_of(model) != before


@pytest.mark.parametrize("where", ["from_linear", "freeze"])
@pytest.mark.parametrize("at", range(6))
def test_interrupted_at_any_layer(where: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(BertModel, num_hidden_layers=1)
    before, real, calls = state_of(model), getattr(Int8Linear, where), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Int8Linear, where, staticmethod(interrupted) if where == "from_linear" else interrupted)
        with pytest.raises(KeyboardInterrupt):
            pyaccel.accelerate(model, int8="dynamic")
    assert state_of(model) == before
    with pytest.raises(ValueError, match="nothing in this BertModel is accelerated"):
        pyaccel.restore(model)


@pytest.mark.parametrize("act", [quantization.freeze, quantization.dequantize])
def test_interrupted_on_the_way_to_codes_and_back(
    act: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(BertForMaskedLM, num_hidden_layers=1)
    quantization.prepare_qat(model)
    interrupted = counted(act, model, monkeypatch)
    layer = model.bert.encoder.layer[0].output.dense
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    for _ in interruptions(monkeypatch, interrupted, KeyboardInterrupt):
        found = model.state_dict()
        assert found.keys() == weights.keys()
        assert all(torch.equal(x, weights[key]) for key, x in found.items())
        assert model.bert.encoder.layer[0].output.dense is layer
    interrupted()


def test_a_second_call_that_fails_leaves_what_the_first_did(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(BertModel)
    pyaccel.accelerate(model)
    model.encoder.layer[1] = type(model.encoder.layer[1]).__mro__[1](model.config).eval()  # a stock layer
    before = state_of(model)
    swapped = dict(pyaccel.explain(model).report.swapped)
    act = counted(pyaccel.accelerate, model, monkeypatch)
    for _ in interruptions(monkeypatch, act, KeyboardInterrupt):
        assert state_of(model) == before
        assert pyaccel.explain(model).report.swapped == swapped


class _Interrupted:
    """Raises when the n-th attribute of any module is set or deleted."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def method(module: nn.Module, *args: Any) -> Any:
            self.at -= 1
            if self.at == -1:
                raise KeyboardInterrupt
            return real(module, *args)

        return method


@pytest.mark.parametrize("options", [{}, {"int8": "dynamic"}, {"skip_logits": True}], ids=str)
def test_a_restore_that_was_interrupted_can_be_called_again(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = tiny(BertForMaskedLM, num_hidden_layers=1)
    batch, tried = batch_of("right"), 0
    with torch.no_grad():
        expected = stock(**batch).logits
    for at in itertools.count():
        model = copy.deepcopy(stock)
        before = state_of(model)
        pyaccel.accelerate(model, packing=False, **options)
        with monkeypatch.context() as patch:
            step = _Interrupted(at)
            patch.setattr(nn.Module, "__setattr__", step(nn.Module.__setattr__))
            patch.setattr(nn.Module, "__delattr__", step(nn.Module.__delattr__))
            try:
                pyaccel.restore(model)
                break
            except KeyboardInterrupt:
                tried += 1
        with torch.no_grad():
            if not options.get("int8"):
                torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        pyaccel.restore(model)
        after = state_of(model)
        for what in ("modules", "hooks", "tensors", "modes", "config"):
            assert after[what] == before[what], what
        assert all("_pyaccel" not in names for names in after["attributes"].values())
    assert tried > 3


def test_watching_that_is_interrupted_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(BertModel, num_hidden_layers=1).train()
    before, watch, calls = state_of(model), ObservedLinear.watch, []

    def interrupted(*args: Any) -> None:
        watch(*args)
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ObservedLinear, "watch", staticmethod(interrupted))
        with pytest.raises(KeyboardInterrupt):
            quantization.calibrate(model, [batch_of("right")], progress=False)
    assert state_of(model) == before


def test_ctrl_c_while_changes_are_undone_waits() -> None:
    done: list[int] = []
    presses = iter([1, 2])

    def undo(number: int) -> None:
        if number == 1 and next(presses, None):
            raise KeyboardInterrupt
        done.append(number)

    def broken() -> None:
        with Changes() as changes:
            for number in range(3):
                changes.make(lambda: None, lambda number=number: undo(number))
            raise RuntimeError("broken")

    # A Ctrl-C that comes out fails this test, and doesn't end all tests.
    with pytest.raises((RuntimeError, KeyboardInterrupt), match="broken"):
        broken()
    assert done == [2, 1, 0]


def test_a_change_that_fails_halfway_is_undone() -> None:
    items: dict[str, int] = {}

    def halfway() -> None:
        items["a"] = 1
        raise KeyboardInterrupt

    def broken() -> None:
        with Changes() as changes:
            changes.make(halfway, items.clear)

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert not items


def test_items_come_back_in_their_order() -> None:
    items = {"a": 1, "b": 2, "c": 3}

    def broken() -> None:
        with Changes() as changes:
            changes.item(items, "a", Changes.DELETED)
            changes.item(items, "b", 5)
            changes.item(items, "d", 4)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert list(items.items()) == [("a", 1), ("b", 2), ("c", 3)]
