"""An accelerated model gives what the stock one gives, and can be undone."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.models.bert import modeling_bert

import pyaccel
from pyaccel import dispatch
from pyaccel.errors import NotSupportedError
from pyaccel.hf.modules import bert_BertEncoder as BertEncoder
from pyaccel.hf.modules import bert_BertLayer as BertLayer
from tests.assertions import assert_bits_equal, assert_close_to_truth
from tests.hf.models import DTYPES, MASKS, Truth, batch_of, checkpoint, mask_of, read, tiny, tiny_config

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = ["last_hidden_state", "pooler_output"]


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# ---- equal to stock ----


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_stock(dtype: torch.dtype, kind: str) -> None:
    model, batch = tiny(dtype=dtype), batch_of(kind)
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    computed = read(batch["attention_mask"])
    out = stock.check(model, batch, ["last_hidden_state"], where=computed)
    stock.check(model, batch, ["pooler_output"])
    assert not out.last_hidden_state[~computed].any(), "padding must be zero, not something that may be NaN"
    assert report.served == {"packed": 6}
    assert not report.refused["padded"]
    assert not report.refused["packed"]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_equals_stock_in_the_padding_too(dtype: torch.dtype, kind: str) -> None:
    model, batch = tiny(dtype=dtype), batch_of(kind)
    stock = Truth(model)
    report = pyaccel.accelerate(model, packing=False)
    stock.check(model, batch, OUTPUTS)
    assert report.served == {"padded": 3}
    assert not report.refused["padded"]


def test_without_a_mask() -> None:
    model, batch = tiny(), batch_of("none")
    del batch["attention_mask"]
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    stock.check(model, batch, OUTPUTS)
    assert report.served == {"packed": 3}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_backends(backend: str) -> None:
    model, batch = tiny(), batch_of("left")
    stock = Truth(model)
    pyaccel.accelerate(model, backend=backend)
    stock.check(model, batch, ["last_hidden_state"], where=read(batch["attention_mask"]))
    stock.check(model, batch, ["pooler_output"])
    assert dispatch.requested("varlen_attention") == "torch", "what this test's fixture asked for is back"


def test_double_precision() -> None:
    model, batch = tiny(), batch_of("left")
    stock = Truth(model)
    model.double()
    pyaccel.accelerate(model)
    out = model(**batch).pooler_output
    assert out.dtype == torch.float64
    truth, naive = stock.truth(**batch).pooler_output, stock.naive(**batch).pooler_output
    assert_close_to_truth(out.float(), truth, naive)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu", "gelu_10"])
def test_activations(activation: str) -> None:
    model, batch = tiny(hidden_act=activation), batch_of("right")
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    stock.check(model, batch, ["pooler_output"])
    assert report.served == {"packed": 3}


def test_an_activation_that_is_a_function() -> None:
    model, batch = tiny(), batch_of("right")
    for layer in model.encoder.layer:
        del layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = torch.tanh
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    stock.check(model, batch, ["pooler_output"])
    assert report.served == {"packed": 3}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_checkpoint(dtype: torch.dtype, packing: bool) -> None:
    texts = ["A short one.", "A sentence that is a good deal longer than the one before it.", "Tokens", ""]
    batch = dict(AutoTokenizer.from_pretrained(checkpoint())(texts, padding=True, return_tensors="pt"))
    model = BertModel.from_pretrained(checkpoint(), dtype=dtype).eval()
    stock = Truth(model)
    report = pyaccel.accelerate(model, packing=packing)
    where = read(batch["attention_mask"]) if packing else None
    stock.check(model, batch, ["last_hidden_state"], where=where)
    stock.check(model, batch, ["pooler_output"])
    assert len(report.swapped) == 7
    assert not report.refused["padded"]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (BertForSequenceClassification, ["logits"]),
        (BertForMaskedLM, ["logits"]),
        (BertForTokenClassification, ["logits"]),
        (BertForQuestionAnswering, ["start_logits", "end_logits"]),
    ],
)
def test_heads(kind: type[nn.Module], keys: list[str], packing: bool) -> None:
    model, batch = tiny(kind, num_labels=2), batch_of("left")
    stock = Truth(model)
    names = classes(model)
    pyaccel.accelerate(model, packing=packing)
    per_token = kind is not BertForSequenceClassification and packing
    stock.check(model, batch, keys, where=read(batch["attention_mask"]) if per_token else None)
    assert type(model) is kind
    assert [t.__name__ for t in classes(model)] == [t.__name__ for t in names]


def test_inside_a_wrapper() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = tiny()

        def forward(self, attention_mask: torch.Tensor, **features: torch.Tensor) -> torch.Tensor:
            hidden = self.auto_model(attention_mask=attention_mask, **features).last_hidden_state
            weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return (hidden * weight).sum(1) / weight.sum(1)

    model, batch = nn.Sequential(Pooled()), batch_of("holes")
    truth, naive = copy.deepcopy(model[0]).double()(**batch), model[0](**batch)
    report = pyaccel.accelerate(model)
    assert "0.auto_model.encoder.layer.2" in report.swapped
    assert_close_to_truth(model[0](**batch), truth, naive)


def test_a_nan_in_the_padding_does_not_leak() -> None:
    model, batch = tiny(), batch_of("right")
    embeds = model.embeddings.word_embeddings(batch.pop("input_ids")).detach()
    stock = Truth(model)
    pyaccel.accelerate(model)
    clean = model(inputs_embeds=embeds, **batch).last_hidden_state
    embeds[batch["attention_mask"] == 0] = float("nan")
    out = model(inputs_embeds=embeds, **batch).last_hidden_state
    assert_bits_equal(out, clean)
    assert stock.naive(inputs_embeds=embeds, **batch).last_hidden_state.isnan().any(), "stock does leak"


def test_the_same_bits_twice() -> None:
    model, batch = tiny(), batch_of("holes")
    pyaccel.accelerate(model)
    assert_bits_equal(model(**batch).last_hidden_state, model(**batch).last_hidden_state)


# ---- what is captured ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_states(dtype: torch.dtype) -> None:
    model, batch = tiny(dtype=dtype), batch_of("left")
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    out = stock.check(model, {**batch, "output_hidden_states": True}, ["hidden_states", "last_hidden_state"])
    assert len(out.hidden_states) == 4
    assert report.served == {"padded": 3}
    assert report.refused["packed"] == {"hidden states or attentions are captured": 1}
    # The hooks that transformers leaves behind don't turn the fast path off.
    stock.check(model, batch, ["pooler_output"])
    assert report.served["packed"] == 6 - 3
    # Single ones, which transformers 5.23 takes; before, they are all of them.
    some = model(**batch, output_hidden_states=[1, -1]).hidden_states
    expected = stock.naive(**batch, output_hidden_states=[1, -1]).hidden_states
    assert [h is None for h in some] == [h is None for h in expected]


def test_hidden_states_hooks_from_before() -> None:
    model, batch = tiny(), batch_of("right")
    model(**batch, output_hidden_states=True, output_attentions=True)
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    stock.check(model, batch, ["pooler_output"])
    assert report.served == {"packed": 3}
    stock.check(model, {**batch, "output_hidden_states": True}, ["hidden_states"])
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 4


@pytest.mark.parametrize("kind", ["none", "left"])
def test_attentions(kind: str) -> None:
    model, batch = tiny(attn_implementation="eager"), batch_of(kind)
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    both = {**batch, "output_attentions": True, "output_hidden_states": True}
    out = stock.check(model, both, ["attentions", "hidden_states", "last_hidden_state"])
    assert [tuple(a.shape) for a in out.attentions] == [(5, 4, 12, 12)] * 3
    assert report.refused["padded"] == {"output_attentions": 3}


def test_config_that_asks_for_attentions_is_left_alone() -> None:
    model, batch = tiny(attn_implementation="eager"), batch_of()
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        pyaccel.accelerate(model)
    report = pyaccel.accelerate(model, strict=False)
    assert not report.swapped
    assert len(model(**batch).attentions) == 3


# ---- gradients, training, weights that change ----


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["left", "a padded row"])
def test_gradients_in_evaluation(kind: str, packing: bool) -> None:
    model, batch = tiny(), batch_of(kind)
    mask = batch["attention_mask"]
    weight = torch.randn(*mask.shape, 32) * mask.unsqueeze(-1)
    # attention leaves the key's bias without an effect: its gradient is a rounding error in every model
    skipped = {"embeddings.word_embeddings.weight"} | {
        f"encoder.layer.{i}.attention.self.key.bias" for i in range(3)
    }

    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        dtype = model.dtype
        ids = batch["input_ids"]
        embeds = model.embeddings.word_embeddings.weight.detach()[ids].requires_grad_()
        others = {k: v for k, v in batch.items() if k != "input_ids"}
        out = model(inputs_embeds=embeds, **others)
        ((out.last_hidden_state * weight.to(dtype)).sum() + out.pooler_output.square().sum()).backward()
        named = {n: p.grad for n, p in model.named_parameters() if n not in skipped}
        return {"inputs_embeds": embeds.grad, **named}

    stock = Truth(model)
    report = pyaccel.accelerate(model, packing=packing)
    ours, truth, naive = gradients(model), gradients(stock.truth), gradients(stock.naive)
    assert report.served.total() == 3
    for name in naive:
        assert ours[name] is not None, name
        assert ours[name].any(), name
        assert_close_to_truth(ours[name], truth[name], naive[name], name=name)


@pytest.mark.parametrize("packing", [True, False])
def test_gradient_checkpointing_changes_no_bit(packing: bool) -> None:
    """The layers run a second time in the backward, with the same dropout."""
    grads = []
    model, batch = tiny(BertForSequenceClassification), batch_of("right")
    batch["labels"] = torch.arange(5) % 3
    for checkpointing in (False, True):
        ours = copy.deepcopy(model).train()
        report = pyaccel.accelerate(ours, packing=packing)
        calls = []
        ours.bert.encoder.layer[1].output.dense.weight.register_hook(calls.append)
        if checkpointing:
            ours.gradient_checkpointing_enable()
            before = ours.bert.encoder.layer[0]._gradient_checkpointing_func
            for layer in ours.bert.encoder.layer:
                layer._gradient_checkpointing_func = counted(before, calls)
        torch.manual_seed(5)
        ours(**batch).loss.backward()
        assert len(calls) == (1 + 3 if checkpointing else 1)
        assert not report.refused["padded"]
        grads.append([p.grad for p in ours.parameters()])
    for first, second in zip(*grads, strict=True):
        assert_bits_equal(first, second)


def counted(function: Any, calls: list[Any]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    return call


def test_weights_that_change_are_seen_at_once() -> None:
    model, batch = tiny(), batch_of("right")
    pyaccel.accelerate(model)
    computed = read(batch["attention_mask"])

    def check(model: nn.Module) -> None:
        stock = tiny(dtype=model.dtype)
        stock.load_state_dict(model.state_dict())
        Truth(stock).check(model, batch, ["last_hidden_state"], where=computed)

    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    check(model)
    model.encoder.layer[0].attention.self.key.weight.data += 0.1
    model.encoder.layer[1].attention.self.value.bias.data = torch.randn(32)  # its own storage again
    check(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch).pooler_output.square().sum().backward()
    optimizer.step()
    check(model)
    model.load_state_dict(tiny().state_dict())
    check(model)
    model.encoder.layer[0].output.dense = nn.Linear(72, 32)
    check(model)
    model.encoder.layer[2].intermediate.dense.weight = nn.Parameter(torch.randn(72, 32))
    check(model)
    model.to(torch.bfloat16)
    check(model)
    assert model._modules["encoder"]._pyaccel.acceleration.report.refused["padded"] == {}


# ---- in place, and undone ----


def test_restore_gives_back_the_very_same() -> None:
    model, batch = tiny(attn_implementation="eager"), batch_of("left")
    model(**batch, output_hidden_states=True)  # hooks
    modules, kinds = list(model.modules()), classes(model)
    parameters = list(model.parameters())
    attributes = [set(vars(m)) for m in modules]
    hooks = [dict(m._forward_hooks) for m in modules]
    expected = model(**batch).last_hidden_state

    pyaccel.accelerate(model)
    assert type(model.encoder) is BertEncoder
    assert all(type(layer) is BertLayer for layer in model.encoder.layer)
    assert model.config._attn_implementation == "pyaccel_eager"  # it was eager
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    model(**batch)

    assert pyaccel.restore(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert classes(model) == kinds
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [set(vars(m)) for m in modules] == attributes
    assert [dict(m._forward_hooks) for m in modules] == hooks
    assert model.config._attn_implementation == "eager"
    storages = [p.untyped_storage().data_ptr() for p in parameters]
    assert len(set(storages)) == len(storages), "query, key and value have their own storage again"
    assert_bits_equal(model(**batch).last_hidden_state, expected)
    with pytest.raises(ValueError, match="nothing in this BertModel is accelerated"):
        pyaccel.restore(model)
    assert len(pyaccel.accelerate(model).swapped) == 4


def test_a_deleted_model_is_freed_at_once() -> None:
    """The swap makes no reference cycle that would keep the weights until the garbage collector comes by."""
    model = tiny()
    pyaccel.accelerate(model)
    model(**batch_of("right"))
    model(**batch_of("right"), output_hidden_states=True)
    kept = [weakref.ref(p) for p in model.parameters()]
    gc.disable()
    try:
        del model
        assert not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


def test_an_attention_implementation_set_since_is_kept() -> None:
    model = tiny()
    pyaccel.accelerate(model)
    model.set_attn_implementation("eager")
    pyaccel.restore(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_saved_files_and_state_dict_are_stock(kind: type[nn.Module], tmp_path: Path) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path / "before")
    keys = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    tied = [name for name, p in model.named_parameters(remove_duplicate=False)]
    pyaccel.accelerate(model)
    model.save_pretrained(tmp_path / "during")
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == keys
    assert [name for name, p in model.named_parameters(remove_duplicate=False)] == tied
    before, during = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("before", "during"))
    assert during == before
    before, during = (load_file(tmp_path / f / "model.safetensors") for f in ("before", "during"))
    assert before.keys() == during.keys()
    for name, tensor in before.items():
        assert_bits_equal(during[name], tensor, name=name)
    loaded = kind.from_pretrained(tmp_path / "during")
    assert type(loaded.base_model.encoder) is modeling_bert.BertEncoder


def test_a_deepcopy_stays_accelerated() -> None:
    model, batch = tiny(), batch_of("left")
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    model(**batch)
    twin = copy.deepcopy(model)
    assert type(twin.encoder) is BertEncoder
    assert twin.config is not model.config
    stock.check(twin, batch, ["pooler_output"])
    assert report.served == {"packed": 3}, "a copy counts for itself"
    assert pyaccel.explain(twin).report.served == {"packed": 6}
    twin.encoder.layer[0].output.dense.weight.data.zero_()
    stock.check(model, batch, ["pooler_output"])
    pyaccel.restore(twin)
    assert type(twin.encoder) is modeling_bert.BertEncoder
    assert twin.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "pyaccel"
    assert type(model.encoder) is BertEncoder


def test_pickle_and_torch_save() -> None:
    model, batch = tiny(), batch_of("left")
    stock = Truth(model)
    pyaccel.accelerate(model)
    model(**batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(twin.encoder) is BertEncoder
        stock.check(twin, batch, ["pooler_output"])
        pyaccel.restore(twin)
        stock.check(twin, batch, ["pooler_output"])


def test_pickle_into_a_new_process(tmp_path: Path) -> None:
    model, batch = tiny(), batch_of("right")
    pyaccel.accelerate(model)
    torch.save((model, batch, model(**batch).pooler_output), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, batch, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "assert model.encoder.__class__.__module__ == 'pyaccel.hf'\n"
        "from tests.assertions import assert_equivalent\n"
        "assert_equivalent(model(**batch).pooler_output, expected)\n"
        "assert model.encoder._pyaccel.acceleration.report.served['packed'] == 6\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, cwd=ROOT)


def test_a_teacher_stays_untouched() -> None:
    student = tiny()
    teacher = copy.deepcopy(student)
    kinds = classes(teacher)
    pyaccel.accelerate(student)
    assert classes(teacher) == kinds
    assert teacher.config._attn_implementation == "sdpa"
    assert classes(tiny()) == kinds


def test_models_that_share_a_config_stay_right() -> None:
    student, batch = tiny(), batch_of("left")
    teacher = BertModel(student.config).eval()
    stock = Truth(teacher)
    stock.naive.set_attn_implementation("sdpa")
    pyaccel.accelerate(student)
    stock.check(teacher, batch, OUTPUTS)
    pyaccel.restore(student)
    assert teacher.config._attn_implementation == "sdpa"


def test_optimizer_from_before() -> None:
    model, batch = tiny(), batch_of("right")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    pyaccel.accelerate(model)
    before = model(**batch).pooler_output
    before.square().sum().backward()
    optimizer.step()
    stock = tiny()
    stock.load_state_dict(model.state_dict())
    Truth(stock).check(model, batch, ["pooler_output"])
    assert not torch.equal(model(**batch).pooler_output, before)


# ---- the report, and errors ----


def test_report() -> None:
    model, batch = tiny(), batch_of("right")
    report = pyaccel.accelerate(model)
    assert report.swapped == {
        "encoder": "BertEncoder",
        **{f"encoder.layer.{i}": "BertLayer" for i in range(3)},
    }
    model(**batch)
    model.train()
    model(**batch)
    model(**batch, output_attentions=True)
    text = str(report)
    assert "1 BertEncoder, 3 BertLayer" in text
    assert "layer calls served by: 6 packed" in text
    assert "not by padded: 3: output_attentions" in text
    assert json.loads(json.dumps(report.as_dict()))["refused"]["padded"] == {"output_attentions": 3}
    report.reset()
    assert report.served.total() == report.refused["padded"].total() == report.refused["packed"].total() == 0


def test_parts_that_cannot_be_swapped_are_reported() -> None:
    class Other(nn.Linear):
        pass

    model, batch = tiny(), batch_of("left")
    other = Other(32, 32)
    model.encoder.layer[1].attention.self.query = other
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    assert sorted(report.swapped) == ["encoder.layer.0", "encoder.layer.2"]
    assert report.not_swapped == {
        "encoder": "layer.1: attention.self.query is a Other, not a Linear",
        "encoder.layer.1": "attention.self.query is a Other, not a Linear",
    }
    assert "left alone: encoder.layer.1: attention.self.query" in str(report)
    stock.check(model, batch, OUTPUTS)
    plain = nn.Linear(32, 32)
    plain.load_state_dict(other.state_dict())
    model.encoder.layer[1].attention.self.query = plain
    assert pyaccel.accelerate(model) is report, "a second call swaps the rest"
    assert len(report.swapped) == 4
    assert not report.not_swapped
    stock.check(model, batch, ["pooler_output"])
    assert report.served == {"padded": 2, "packed": 3}


def test_twice() -> None:
    model = tiny()
    report = pyaccel.accelerate(model)
    kinds = classes(model)
    assert pyaccel.accelerate(model) is report
    assert classes(model) == kinds
    with pytest.raises(
        RuntimeError,
        match=r"accelerated already \(packing=True, int8=None, backend='auto', prepack=False, "
        r"cuda_graphs='auto', skip_logits=False\).*restore",
    ):
        pyaccel.accelerate(model, packing=False)


def test_nothing_to_swap_is_an_error() -> None:
    other = nn.TransformerEncoderLayer(32, 2, 32)
    with pytest.raises(ValueError, match="no encoder or layer of a known family"):
        pyaccel.accelerate(other)
    assert not pyaccel.accelerate(other, strict=False).swapped
    decoder = tiny(is_decoder=True)
    report = pyaccel.accelerate(decoder)
    assert classes(decoder) == classes(tiny(is_decoder=True))
    assert report.not_swapped["encoder.layer.0"] == "it is a decoder layer"
    assert report.attention == {"": "BertModel"}


def test_a_subclass_is_not_a_known_class() -> None:
    class Mine(modeling_bert.BertLayer):
        pass

    model = tiny()
    model.encoder.layer[0].__class__ = Mine
    report = pyaccel.accelerate(model)
    assert "only transformers' own class is known" in report.not_swapped["encoder.layer.0"]
    assert report.not_swapped["encoder"] == "layer.0: it is a Mine, not a BertLayer"


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        pyaccel.accelerate("bert-base-uncased")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        pyaccel.accelerate(tiny(), backend="cuda")
    with pytest.raises(ValueError, match="nothing in this BertModel is accelerated"):
        pyaccel.explain(tiny())


def test_a_backend_that_cannot_serve_raises_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model = tiny()
    kinds = classes(model)
    with pytest.raises(NotSupportedError, match="'triton' was asked for"):
        pyaccel.accelerate(model, backend="triton")
    assert classes(model) == kinds
    assert model.config._attn_implementation == "sdpa"


def test_explain() -> None:
    model, batch = tiny(), batch_of("right")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model.train()
    pyaccel.accelerate(model)
    model.eval()
    model(**batch)
    explanation = pyaccel.explain(model)
    assert explanation.backends["varlen_attention"] == "torch"
    assert set(explanation.backends) == set(explanation.reasons)
    assert {"linear_activation", "residual_layernorm"} <= set(explanation.backends)
    assert (explanation.dtype, explanation.device) == ("float32", "cpu")
    assert explanation.report.served == {"packed": 3}, "the dry run doesn't count"
    assert "float32 on cpu" in str(explanation)
    assert "varlen_attention" in str(explanation)
    json.dumps(explanation.as_dict())
    assert_bits_equal(torch.rand(3), expected, name="the dry run draws no random numbers")


def test_without_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import pyaccel, pyaccel.hf\n"
        "pyaccel.hf.Report()\n"
        "try:\n    pyaccel.accelerate(None)\n"
        "except ImportError as error:\n    assert 'pip install pyaccel-bert[hf]' in str(error), error\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_does_not_import_transformers() -> None:
    code = "import sys, pyaccel, pyaccel.hf, pyaccel.hf.report; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mask_kinds_are_what_they_say() -> None:
    assert mask_of("left")[1].tolist() == [0] * 5 + [1] * 7
    assert mask_of("a padded row").sum(1).tolist() == [12, 0, 12, 6, 12]
    assert tiny_config().num_labels == 3
