"""The plan of an encoder: what a call costs once it stands, and the layers that run without the public ops' checks."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import pickletools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

import pyaccel
from pyaccel import dispatch, triton_support
from pyaccel.hf.executors import cuda_graph, packed
from tests.assertions import assert_bits_equal
from tests.hf.models import MASKS, VOCAB, Truth, batch_of, of_family, read, tiny

PROJECT = str(Path(pyaccel.__file__).parent)


@pytest.fixture
def uninterpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "interpreting", lambda: False)


# ---- what a call costs ----


def calls_of(call: Callable[[], object]) -> list[str]:
    """The file of each call of a function of this project, in order."""
    files: list[str] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PROJECT):
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


def changes(files: list[str]) -> int:
    return sum(one != other for one, other in itertools.pairwise(files))


@pytest.fixture
def model_and_batch() -> tuple[Any, dict[str, Tensor]]:
    config = BertConfig(
        vocab_size=100, hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536
    )
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 10:] = 0
    model = BertModel(config)
    pyaccel.accelerate(model)
    return model, {"input_ids": torch.randint(0, 100, (2, 16)), "attention_mask": mask}


def test_an_evaluation_makes_few_calls(
    model_and_batch: tuple[Any, dict[str, Tensor]], uninterpreted: None
) -> None:
    model, batch = model_and_batch
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            model(**batch)
        files = calls_of(lambda: model(**batch))
    assert model.encoder._pyaccel.acceleration.report.served == {"onednn": 6}
    assert len(files) <= 90, len(files)
    assert changes(files) <= 20, files


def test_a_training_step_makes_few_calls(
    model_and_batch: tuple[Any, dict[str, Tensor]], uninterpreted: None
) -> None:
    model, batch = model_and_batch
    model.train()

    def step() -> None:
        model(**batch).last_hidden_state.sum().backward()

    for _ in range(2):
        step()
    files = calls_of(step)
    assert len(files) <= 329, len(files)
    assert changes(files) <= 86, changes(files)


def test_a_batch_without_padding_is_not_copied_to_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it sorted: in the second one a first position is kept as a query, and that row comes first."""
    model = tiny()
    accelerated = copy.deepcopy(model)
    pyaccel.accelerate(accelerated)
    unpacked: list[Tensor] = []
    unpack = packed.unpack
    monkeypatch.setattr(packed, "unpack", lambda x, tokens: unpacked.append(x) or unpack(x, tokens))
    for is_packed, mask in ((False, torch.ones(2, 3)), (True, torch.tensor([[1, 1, 1], [0, 1, 1]]))):
        batch = {"input_ids": torch.randint(0, VOCAB, mask.shape), "attention_mask": mask.long()}
        Truth(model).check(accelerated, batch, ["last_hidden_state"], read(batch["attention_mask"]))
        assert bool(unpacked) == is_packed


@pytest.mark.parametrize("frozen", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
@pytest.mark.parametrize("kind", ["full", "padded", "first position padding", "packed"])
def test_hidden_states_can_be_changed_in_place(kind: str, frozen: Any) -> None:
    """By something that learns, on a frozen encoder: a view that was made under no_grad would refuse."""
    model = tiny()
    pyaccel.accelerate(model)
    batch: dict[str, Any] = {"attention_mask": torch.ones(2, 3, dtype=torch.bool)}
    hidden = torch.randn(2, 3, 32)
    if kind == "packed":
        offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
        batch = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 3, "max_length_k": 3}
        hidden = hidden.flatten(0, 1)[None]
    elif kind != "full":
        batch["attention_mask"][1, 2 if kind == "padded" else 0] = False
    learned = torch.ones(32, requires_grad=True)
    with frozen():
        hidden = model.encoder(hidden, **batch).last_hidden_state
    assert model.encoder._pyaccel.acceleration.report.served
    if hidden.is_inference():
        hidden = hidden.clone()
    hidden.mul_(learned).sum().backward()
    assert learned.grad is not None
    assert bool(learned.grad.any())


# ---- layers without the public ops' checks ----


def step_of(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Hidden states and gradients of one training step."""
    torch.manual_seed(0)
    model.zero_grad()
    out = model(**batch).last_hidden_state
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return [out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def both(model: Any, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A step with and without the public ops, which a recorder listens to."""
    with dispatch.record() as choices:
        expected = step_of(model, batch)
    assert choices
    return step_of(model, batch), expected


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch, uninterpreted: None) -> list[Any]:
    """The batches that ran without the public ops' checks."""
    from pyaccel.hf.executors.eager import EagerLayers

    batches: list[Any] = []
    bound = EagerLayers.bound

    def noting(self: Any, hidden: Tensor, tokens: Any) -> Any:
        batches.append(tokens)
        return bound(self, hidden, tokens)

    monkeypatch.setattr(EagerLayers, "bound", noting)
    return batches


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
def test_training_gives_what_the_ops_give(
    kind: str, dtype: torch.dtype, p: float, unchecked: list[Any]
) -> None:
    model = tiny(dtype=dtype, hidden_dropout_prob=p, attention_probs_dropout_prob=p).train()
    pyaccel.accelerate(model)
    batch = batch_of(kind)
    ours, expected = both(model, batch)
    for one, other in zip(ours, expected, strict=True):
        assert_bits_equal(one, other)
    assert len(unchecked) == bool(batch["attention_mask"][:, 0].all())


@pytest.mark.parametrize("name", ["gelu_new", "relu", "silu", "distilbert", "albert"])
def test_training_of_every_kind_of_layer(name: str, unchecked: list[Any]) -> None:
    model, batch = of_family(name), batch_of("right")
    batch.pop("token_type_ids", None)
    pyaccel.accelerate(model)
    for mode in (False, True, False):  # the mode is asked at every call
        model.train(mode)
        ours, expected = both(model, batch)
        for one, other in zip(ours, expected, strict=True):
            assert_bits_equal(one, other)
    assert len(unchecked) == 3


@pytest.mark.parametrize("heads", [2, 8])
def test_layers_of_other_numbers_of_heads(heads: int, unchecked: list[Any]) -> None:
    stock, batch = tiny(), batch_of("right")
    model = copy.deepcopy(stock)
    pyaccel.accelerate(model)
    for each in (stock, model):
        attention = each.encoder.layer[1].attention.self
        attention.num_attention_heads, attention.attention_head_size = heads, 32 // heads
        attention.scaling = (32 // heads) ** -0.5
    Truth(stock).check(model, batch, ["pooler_output"])
    ours, expected = both(model, batch)
    for one, other in zip(ours, expected, strict=True):
        assert_bits_equal(one, other)


def test_gradient_checkpointing_gives_the_same(unchecked: list[Any]) -> None:
    model = tiny(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
    pyaccel.accelerate(model)
    batch = batch_of("right")
    expected = step_of(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, other in zip(step_of(model, batch), expected, strict=True):
        assert_bits_equal(one, other)
    assert len(unchecked) == 2


def frozen(model: Any) -> None:
    model.requires_grad_(False)


def in_autocast(model: Any) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("change", [frozen, in_autocast])
def test_what_goes_through_the_public_ops(change: Callable[[Any], Any], unchecked: list[Any]) -> None:
    model = tiny().train()
    pyaccel.accelerate(model)
    context = change(model) or torch.enable_grad()
    with context:
        model(**batch_of("right"))
    assert not unchecked


def test_a_rate_of_dropout_that_makes_no_sense_is_an_error(unchecked: list[Any]) -> None:
    model = tiny().train()
    pyaccel.accelerate(model)
    model.encoder.layer[0].attention.self.dropout.p = 1.5
    with pytest.raises(ValueError, match="dropout_p"):
        model(**batch_of("right"))


# ---- CUDA graphs by default ----


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As on a machine with a GPU, whose captures run eagerly and are noted."""
    captured: list[Any] = []

    def capture(run: Callable[[], Tensor], pool: Any, device: torch.device) -> Any:
        out = run()
        captured.append(out.shape)
        return out, lambda: out.copy_(run())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {
        "on_gpu": lambda x: True,
        "stream_of": lambda device: 0,
        "is_capturing": lambda: False,
        "new_pool": lambda: None,
        "capture": capture,
    }.items():
        monkeypatch.setattr(cuda_graph, name, value)
    return captured


def graphed(model: Any) -> Any:
    """Accelerated by default, with a plan as of a model on a GPU."""
    pyaccel.accelerate(model)
    state = model.encoder._pyaccel
    assert state.executors == ("cuda_graph", "packed")
    state.acceleration.cuda_graphs = True  # the plan of a model that is on no GPU has none otherwise
    with torch.no_grad():
        model(**batch_of("holes"))
    state.acceleration.cuda_graphs = "auto"
    (graph, *_) = state.plan.executors
    graph._is_asked_for = False
    state.acceleration.report.reset()
    return graph


@torch.inference_mode()
def states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).last_hidden_state


def test_by_default_a_size_is_captured_when_it_comes_up_again(card: list[Any]) -> None:
    model = tiny(num_hidden_layers=2)
    graphed(model)
    report = model.encoder._pyaccel.acceleration.report
    model.encoder._pyaccel.plan.executors[0]._captured.clear()
    card.clear()
    batch = batch_of("right")
    first = states(model, batch)
    assert not card
    assert report.served == {"packed": 2}
    assert any("comes up again" in reason for reason in report.refused["cuda_graph"])
    second = states(model, batch)
    assert len(card) == report.captured == 1
    assert report.served == {"packed": 2, "cuda_graph": 2}
    torch.testing.assert_close(second, first)
    states(model, batch)
    assert len(card) == 1


def test_by_default_a_capture_that_fails_is_a_warning(
    card: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(num_hidden_layers=2)
    graphed(model)
    model.encoder._pyaccel.plan.executors[0]._captured.clear()
    tries: list[None] = []

    def refusing(*args: Any) -> Any:
        tries.append(None)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graph, "capture", refusing)
    batch = batch_of("right")
    first = states(model, batch)
    with pytest.warns(UserWarning, match="could not be captured"):
        second = states(model, batch)
    torch.testing.assert_close(second, first)
    states(model, batch)
    assert len(tries) == 1
    report = model.encoder._pyaccel.acceleration.report
    assert any("not permitted" in reason for reason in report.refused["cuda_graph"])


def test_without_a_gpu_nothing_is_said_of_graphs() -> None:
    model = tiny()
    report = pyaccel.accelerate(model)
    with torch.no_grad():
        model(**batch_of("right"))
    assert "cuda_graph" not in report.refused
    with pytest.raises(ValueError, match="expected True, False or 'auto'"):
        pyaccel.accelerate(tiny(), cuda_graphs="always")


# ---- pickles ----


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_pickles_name_what_stays(kind: Any) -> None:
    model = tiny(kind)
    pyaccel.accelerate(model, skip_logits=kind is BertForMaskedLM)
    model(**batch_of("right"))
    strings: list[Any] = []
    for opcode, argument, _ in pickletools.genops(pickle.dumps(model)):
        if opcode.name in ("SHORT_BINUNICODE", "BINUNICODE", "GLOBAL"):
            strings.append(argument)
    modules = {each for each in strings if str(each).startswith("pyaccel.")}
    assert modules == {"pyaccel.hf"}
    other = pickle.loads(pickle.dumps(model))
    batch = batch_of("right")
    assert_bits_equal(other(**batch)[0], copy.deepcopy(model)(**batch)[0])


def test_a_pickle_of_an_older_version_is_refused_in_one_line() -> None:
    old = b"cpyaccel.hf.fast_path\nAttached\n."
    with pytest.raises(ImportError, match="accelerated and pickled by an older version") as error:
        pickle.loads(old)
    assert "\n" not in str(error.value)
