"""Parameters, gradients and outputs have storages of their own, and savers find what a stock model shows them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel

import pyaccel
from pyaccel import triton_support
from tests.assertions import assert_bits_equal
from tests.hf.models import batch_of, of_family, tiny


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose kernels are not interpreted."""
    monkeypatch.setattr(triton_support, "interpreting", lambda: False)


def storages(tensors: Iterable[Tensor | None]) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tensors if t is not None]


def in_use(model: Any, *, train: bool = False, **options: Any) -> Any:
    pyaccel.accelerate(model, **options)
    model.train(train)
    batch = batch_of("right")
    if not isinstance(model, BertModel | BertForSequenceClassification):
        batch.pop("token_type_ids")
    with torch.no_grad():
        model(**batch)
    if train:
        model(**batch)[0].square().sum().backward()
    return model


@pytest.mark.parametrize("options", [{}, {"prepack": True}, {"packing": False}, {"int8": "dynamic"}], ids=str)
@pytest.mark.parametrize("family", ["gelu", "distilbert", "albert"])
def test_nothing_of_a_model_is_moved(family: str, options: dict[str, Any]) -> None:
    model = of_family(family)
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())
    in_use(model, **options)
    tensors = (*model.parameters(), *model.buffers())
    assert len(set(storages(tensors))) == len(tensors)
    pyaccel.restore(model)
    after = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    assert after.keys() == before.keys()
    for name, (p, address) in before.items():
        assert after[name][0] is p
        assert after[name][1] == address
        assert_bits_equal(p.detach(), values[name], name=name)


@pytest.mark.parametrize("family", ["gelu", "distilbert", "albert"])
def test_no_gradient_shares_memory_with_another(family: str) -> None:
    model = in_use(of_family(family), train=True)
    found = storages([*model.parameters(), *(p.grad for p in model.parameters())])
    assert len(set(found)) == len(found)


def test_accumulated_gradients_are_twice_those_of_one_step() -> None:
    model = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    in_use(model, train=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    batch = batch_of("right")
    model.zero_grad()
    for _ in range(2):
        model(**batch)[0].square().sum().backward()
    twice = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**batch)[0].square().sum().backward()
    assert once.keys() == twice.keys()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(twice[name], 2 * p.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_outputs_are_not_written_by_the_next_call() -> None:
    model = in_use(tiny(), prepack=True)
    with torch.inference_mode():
        first = model(**batch_of("none")).last_hidden_state
        kept = first.clone()
        second = model(**batch_of("right")).last_hidden_state
    assert_bits_equal(first, kept)
    assert len(set(storages([first, second, *model.parameters()]))) == 2 + len(list(model.parameters()))


@pytest.mark.parametrize("options", [{}, {"prepack": True}], ids=str)
def test_safetensors_saves_and_loads_a_model_in_use(tmp_path: Path, options: dict[str, Any]) -> None:
    stock = tiny(BertForSequenceClassification)
    model, other = (in_use(copy.deepcopy(stock), **options) for _ in range(2))
    save_model(model, str(tmp_path / "model.safetensors"))
    assert load_file(tmp_path / "model.safetensors").keys() == stock.state_dict().keys()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    missing, unexpected = load_model(other, str(tmp_path / "model.safetensors"))
    assert not missing
    assert not unexpected
    batch = batch_of("left")
    with torch.no_grad():
        assert_bits_equal(other(**batch).logits, model(**batch).logits)
    for name, value in stock.state_dict().items():
        assert_bits_equal(other.state_dict()[name], value, name=name)


def test_hugging_face_savers(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    hub = pytest.importorskip("huggingface_hub")
    stock = tiny(BertForSequenceClassification)
    names = stock.state_dict().keys()
    model = in_use(copy.deepcopy(stock))
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "accelerate")
    assert load_file(tmp_path / "accelerate" / "model.safetensors").keys() == names
    (tmp_path / "hub").mkdir()
    hub.save_torch_model(model, tmp_path / "hub")
    assert load_file(tmp_path / "hub" / "model.safetensors").keys() == names

    class Hubbed(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self) -> None:
            super().__init__()
            self.inner = in_use(copy.deepcopy(stock))

    Hubbed().save_pretrained(tmp_path / "mixin")
    assert len(load_file(tmp_path / "mixin" / "model.safetensors")) == len(names)


def test_a_run_of_accelerate_resumes(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    runs = []
    for _ in range(2):
        model = in_use(tiny(BertForSequenceClassification))
        accelerator = accelerate.Accelerator(cpu=True)
        runs.append((accelerator, model, accelerator.prepare(model)))
    runs[0][0].save_state(tmp_path)
    runs[1][0].load_state(tmp_path)
    for name, value in runs[0][1].state_dict().items():
        assert_bits_equal(runs[1][1].state_dict()[name], value, name=name)


def test_one_projection_is_saved_alone(tmp_path: Path) -> None:
    sizes = []
    for model in (tiny(), in_use(tiny())):
        torch.save(model.encoder.layer[0].attention.self.query.state_dict(), tmp_path / "query.pt")
        sizes.append((tmp_path / "query.pt").stat().st_size)
    assert sizes[0] == sizes[1]


def test_shared_with_other_processes_and_copied() -> None:
    model = in_use(tiny(), prepack=True)
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters())
    batch = batch_of("left")
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not set(storages(other.parameters())) & set(storages(model.parameters()))
            assert_bits_equal(other(**batch).last_hidden_state, expected)
