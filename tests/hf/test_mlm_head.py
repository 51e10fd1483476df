"""Masked-language-model heads: stock logits by default, and with `skip_logits` the loss of masked tokens alone."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from transformers import BertForMaskedLM, BertForPreTraining, BertModel

import pyaccel
from pyaccel import ops
from pyaccel.hf import mlm_head
from tests.assertions import assert_close_to_truth, assert_equivalent
from tests.hf.models import VOCAB, batch_of, randomize, tiny

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def labeled(kind: str = "right") -> dict[str, Tensor]:
    batch = batch_of(kind)
    labels = torch.randint(0, VOCAB, batch["input_ids"].shape)
    batch["labels"] = labels.masked_fill(
        (torch.rand(labels.shape) > 0.3) | (batch["attention_mask"] == 0), -100
    )
    return batch


def accelerated(stock: Any, **options: Any) -> Any:
    ours = copy.deepcopy(stock)
    pyaccel.accelerate(
        ours, packing=False, **{"skip_logits": True, **options}
    )  # padding is the stock model's too
    return ours


def pair(kind: type[nn.Module] = BertForMaskedLM, **changes: Any) -> tuple[Any, Any]:
    stock = tiny(kind, **{**NO_DROPOUT, **changes}).train()
    return accelerated(stock), stock


def report_of(model: Any) -> Any:
    return pyaccel.explain(model).report


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours: Any, stock: Any, batch: dict[str, Any], *, skipped: bool = True) -> Any:
    """Loss and gradients are the stock model's; the logits are, or None where they were to be skipped."""
    found, expected = (m(**batch) for m in (ours, stock))
    for m, out in ((ours, found), (stock, expected)):
        m.zero_grad()
        out.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    mine, theirs = gradients(ours), gradients(stock)
    assert mine.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():  # that of a key's bias is 0 but for rounding
        torch.testing.assert_close(
            mine[name], gradient, rtol=1e-4, atol=1e-6 * max(largest, 1.0), msg=lambda m, n=name: f"{n}: {m}"
        )
    key = "prediction_logits" if "prediction_logits" in expected else "logits"
    if skipped:
        assert getattr(found, key) is None
    else:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
    return found


# ---- by default ----


def test_by_default_the_head_is_not_touched() -> None:
    stock = tiny(BertForMaskedLM, **NO_DROPOUT).train()
    ours = accelerated(stock, skip_logits=False)
    decoder = ours.cls.predictions.decoder
    assert type(decoder) is nn.Linear
    assert "_pyaccel" not in decoder.__dict__
    assert not ours._forward_hooks
    assert not ours._forward_pre_hooks
    out = assert_same_step(ours, stock, labeled(), skipped=False)
    assert type(out.logits) is Tensor
    assert report_of(ours).served["masked_lm_loss"] == 0


# ---- the same loss and gradients ----


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_and_gradients_without_the_logits(dtype: torch.dtype, autocast: bool) -> None:
    ours, stock = (m.to(dtype) for m in pair())
    truth, batch = copy.deepcopy(stock).double(), labeled()
    losses, grads = [], []
    for m in (ours, truth, stock):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and m is not truth):
            out = m(**batch)
        assert (out.logits is None) == (m is ours)
        losses.append(out.loss)
        out.loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
    assert losses[0].dtype == losses[2].dtype
    assert_close_to_truth(*grads)
    computed_in = torch.bfloat16 if autocast else dtype
    assert_equivalent(losses[0].to(computed_in), losses[2].detach().to(computed_in))


def of_head(name: str) -> Any:
    """A small model with that head, in training and without dropout."""
    kind = getattr(transformers, name)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 1, **NO_DROPOUT,
    }  # fmt: skip
    if name.startswith("DistilBert"):
        sizes = {
            "vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0,
            "attention_dropout": 0.0,
        }  # fmt: skip
    if name.startswith(("Albert", "Electra")):
        sizes |= {"embedding_size": 16, "classifier_dropout_prob": 0.0}
    if name.startswith("RoCBert"):
        sizes |= {"enable_pronunciation": False, "enable_shape": False}
    torch.manual_seed(3)
    return randomize(kind(kind.config_class(**sizes))).train()


MLM = [
    f"{family}ForMaskedLM"
    for family in (
        "Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "Ernie", "RoCBert", "Data2VecText", "DistilBert",
        "Albert",
    )
]  # fmt: skip
SECOND = {
    "BertForPreTraining": "next_sentence_label",
    "ErnieForPreTraining": "next_sentence_label",
    "AlbertForPreTraining": "sentence_order_label",
}


def labeled_for(name: str) -> dict[str, Tensor]:
    batch = labeled()
    if name.startswith("DistilBert"):
        del batch["token_type_ids"]
    elif not name.startswith(("Bert", "Electra", "Ernie", "RoCBert", "Albert")):
        batch["token_type_ids"] = torch.zeros_like(batch["token_type_ids"])
    if name in SECOND:
        batch[SECOND[name]] = torch.arange(len(batch["labels"])) % 2
    return batch


@pytest.mark.parametrize("name", [*MLM, *SECOND])
def test_every_head(name: str) -> None:
    stock = of_head(name)
    ours, batch = accelerated(stock), labeled_for(name)
    out = assert_same_step(ours, stock, batch)
    assert report_of(ours).served["masked_lm_loss"] == 1
    assert not report_of(ours).refused["masked_lm_loss"]
    expected = stock(**batch)
    if name in SECOND:
        key = "sop_logits" if name.startswith("Albert") else "seq_relationship_logits"
        torch.testing.assert_close(out[key], expected[key], rtol=1e-4, atol=1e-5)
    for model in (ours, stock):
        model.eval()
    torch.testing.assert_close(ours(**batch)[1], stock(**batch)[1], rtol=1e-4, atol=1e-5)
    pyaccel.restore(ours)
    assert {type(part) for part in ours.modules()} == {type(part) for part in stock.modules()}


@pytest.mark.parametrize("name", SECOND)
def test_a_head_of_two_losses_with_one_label_has_none(name: str) -> None:
    stock = of_head(name)
    ours, batch = accelerated(stock), labeled_for(name)
    del batch[SECOND[name]]
    out = ours(**batch)
    assert out.loss is None
    torch.testing.assert_close(out.prediction_logits, stock(**batch).prediction_logits, rtol=1e-4, atol=1e-5)
    (reason,) = report_of(ours).refused["masked_lm_loss"]
    assert SECOND[name] in reason


def test_rocbert_s_pre_training_is_left_alone() -> None:
    stock = of_head("RoCBertForPreTraining")
    with pytest.raises(ValueError, match=r"skip_logits=True has no effect.*no masked-language-model head"):
        accelerated(stock)


def test_a_step_makes_no_logits_but_those_of_masked_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    rows = []
    cross_entropy = ops.masked_lm_cross_entropy

    def spy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options: Any) -> Tensor:
        rows.append((hidden.shape[:-1].numel(), int((labels != -100).sum())))
        return cross_entropy(hidden, weight, bias, labels, **options)

    monkeypatch.setattr(ops, "masked_lm_cross_entropy", spy)
    batch = labeled()
    ours(**batch).loss.backward()
    assert rows == [(60, int((batch["labels"] != -100).sum()))]


def test_a_batch_in_which_nothing_is_masked() -> None:
    """Stock's mean over nothing is NaN and so are its gradients; here both are 0."""
    ours, _ = pair()
    batch = labeled()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = ours(**batch).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in ours.parameters() if p.grad is not None)


# ---- calls ----


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForPreTraining])
@pytest.mark.parametrize("hidden", [False, True])
def test_tuples(kind: type[nn.Module], hidden: bool) -> None:
    ours, stock = pair(kind)
    batch: dict[str, Any] = {**labeled(), "output_hidden_states": hidden}
    if kind is BertForPreTraining:
        batch["next_sentence_label"] = torch.arange(5) % 2
    expected, found = stock(**batch, return_dict=False), ours(**batch, return_dict=False)
    assert type(found) is tuple
    torch.testing.assert_close(found[0], expected[0])
    expected = (expected[0], *expected[2:])  # no logits
    assert len(found) == len(expected)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-4, atol=1e-5)
    as_dict = ours(**batch)
    torch.testing.assert_close(as_dict.to_tuple(), found)
    assert next(iter(as_dict)) == "loss"


def test_labels_by_position_and_embeddings_for_ids() -> None:
    ours, stock = pair()
    batch = labeled()
    place = list(inspect.signature(BertForMaskedLM.forward).parameters).index("labels") - 1
    embeds = stock.get_input_embeddings()(batch["input_ids"]).detach()
    args = [None, batch["attention_mask"], batch["token_type_ids"], None, embeds, *[None] * (place - 5)]
    found, expected = (m(*args, batch["labels"]) for m in (ours, stock))
    assert found.logits is None
    torch.testing.assert_close(found.loss, expected.loss)


def test_evaluation_and_calls_without_labels_or_gradients() -> None:
    ours, stock = pair()
    batch = labeled()
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, stock(**batch).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.eval()(**batch).logits, stock.eval()(**batch).logits, rtol=1e-4, atol=1e-5
    )
    assert not report_of(ours).refused["masked_lm_loss"], "evaluation isn't counted"
    labels = batch.pop("labels")
    ours.train(), stock.train()
    grads = []
    for m in (ours, stock):
        m.zero_grad()
        F.cross_entropy(m(**batch).logits.view(-1, VOCAB), labels.view(-1)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert report_of(ours).refused["masked_lm_loss"] == {"no labels were given": 1}
    assert "not by masked_lm_loss: 1: no labels were given" in str(report_of(ours))
    assert report_of(ours).as_dict()["refused"]["masked_lm_loss"] == {"no labels were given": 1}
    report_of(ours).reset()
    assert not report_of(ours).refused["masked_lm_loss"]


def test_what_is_not_understood_fails_as_the_stock_model_does() -> None:
    ours, stock = pair()
    batch = labeled()
    errors = []
    for m in (ours, stock):
        with pytest.raises((RuntimeError, ValueError)) as info:
            m(**{**batch, "labels": batch["labels"][:, :3]})
        errors.append(str(info.value))
    assert errors[0] == errors[1]
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        ours(**{**batch, "labels": torch.full_like(batch["labels"], VOCAB)})
    # An error inside leaves nothing behind for the next call.
    assert_same_step(ours, stock, batch)
    hidden = torch.randn(5, 12, 32)
    torch.testing.assert_close(ours.cls(hidden), stock.cls(hidden))


def test_an_error_inside_a_call_leaves_the_head_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = pair()
    with monkeypatch.context() as patch:
        patch.setattr(BertModel, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            ours(**labeled())
    hidden = torch.randn(5, 12, 32)
    torch.testing.assert_close(ours.cls(hidden), stock.cls(hidden))


def test_labels_of_another_shape_with_as_many_elements() -> None:
    ours, stock = pair()
    batch = labeled()
    batch["labels"] = batch["labels"].flatten()
    assert_same_step(ours, stock, batch, skipped=False)


@pytest.mark.parametrize("extra", [{"num_items_in_batch": torch.tensor(7)}, {"num_items_in_batch": 50}])
def test_arguments_of_the_loss_count_as_in_the_stock_forward(extra: dict[str, Any]) -> None:
    ours, stock = pair()
    assert_same_step(ours, stock, {**labeled(), **extra})


def test_a_forward_that_hands_arguments_to_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.bert.modeling_bert as file

    code = """
def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
    loss_kwargs = {k: kwargs.pop(k) for k in ("num_items_in_batch", "ignore_index") if k in kwargs}
    outputs = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, **kwargs)
    logits, loss = self.cls(outputs[0]), None
    if labels is not None:
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
    return MaskedLMOutput(loss=loss, logits=logits)
"""
    made: dict[str, Any] = {}
    exec(code, file.__dict__, made)  # its globals are that file's, as a release's would be
    monkeypatch.setattr(BertForMaskedLM, "forward", made["forward"])
    for cached in (mlm_head._loss_of, mlm_head._parameters):
        cached.cache_clear()
    try:
        ours, stock = pair()
        batch = labeled()
        for extra in (
            {},
            {"num_items_in_batch": torch.tensor(7)},
            {"num_items_in_batch": 50},
            {"ignore_index": 3},
        ):
            if "ignore_index" in extra:
                batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, 3)
            assert_same_step(ours, stock, {**batch, **extra})
        ours.bfloat16(), stock.bfloat16()
        assert ours(**labeled()).loss.dtype == stock(**labeled()).loss.dtype == torch.float32
        for m in (ours, stock):
            m.loss_function = lambda logits, labels, **_: logits.sum() + labels.sum()
        ours.float(), stock.float()
        assert_same_step(ours, stock, labeled(), skipped=False)
        assert "model.loss_function was replaced" in report_of(ours).refused["masked_lm_loss"]
    finally:
        for cached in (mlm_head._loss_of, mlm_head._parameters):
            cached.cache_clear()


# ---- what sends a call to the stock forward ----


def _own_forward(part: nn.Module) -> None:
    before = part.forward
    part.forward = lambda *args, **kwargs: before(*args, **kwargs)  # type: ignore[method-assign]


def _wrapped_forward(model: Any) -> None:
    before = model.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["labels"] is not None
        return before(*args, **kwargs)

    model.forward = forward


def _identity(model: Any) -> None:
    parametrize.register_parametrization(model.cls.predictions.decoder, "weight", nn.Identity())


def _replaced(model: Any) -> None:
    old = model.cls.predictions.decoder
    new = nn.Linear(old.in_features, old.out_features)
    new.weight, new.bias = old.weight, old.bias
    model.set_output_embeddings(new)


class _Mine(nn.Linear):
    pass


def _other_kind(model: Any) -> None:
    model.cls.predictions.decoder.__class__ = _Mine


WATCHED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a forward of the model's own": (_own_forward, "forward is not transformers' own"),
    "a forward that wraps the model's": (_wrapped_forward, "forward is not transformers' own"),
    "a forward of the head's own": (lambda m: _own_forward(m.cls), "cls has a forward of its own"),
    "a forward of the decoder's own": (
        lambda m: _own_forward(m.cls.predictions.decoder),
        "decoder has a forward of its own",
    ),
    "a hook on the decoder": (
        lambda m: m.cls.predictions.decoder.register_forward_hook(lambda *_: None),
        "decoder has hooks",
    ),
    "a pre-forward hook on the head": (
        lambda m: m.cls.register_forward_pre_hook(lambda *_: None),
        "cls has hooks",
    ),
    "a backward hook on the head": (
        lambda m: m.cls.predictions.register_full_backward_hook(lambda *_: None),
        "predictions has hooks",
    ),
    "a later pre-forward hook on the model": (
        lambda m: m.register_forward_pre_hook(
            lambda module, args, kwargs: assert_labels(kwargs), with_kwargs=True
        ),
        "pre-forward hook after",
    ),
    "a forward hook before ours": (
        lambda m: m.register_forward_hook(lambda module, args, out: assert_loss(out), prepend=True),
        "forward hook before",
    ),
    "a backward hook on the model": (
        lambda m: m.register_full_backward_hook(lambda *_: None),
        "backward hooks",
    ),
    "a parametrized decoder": (_identity, "its decoder is a "),
    "a replaced decoder": (_replaced, "its decoder was replaced"),
    "a decoder of another kind": (_other_kind, "its decoder is a "),
    "another vocabulary in the config": (lambda m: setattr(m.config, "vocab_size", VOCAB), ""),
}


def assert_labels(kwargs: dict[str, Any]) -> None:
    assert kwargs["labels"] is not None


def assert_loss(output: Any) -> None:
    assert output.loss is not None


@pytest.mark.parametrize("what", WATCHED)
def test_who_would_notice_gets_all_logits(what: str) -> None:
    change, expected = WATCHED[what]
    ours, stock = pair()
    change(ours)
    assert_same_step_by_values(ours, stock, skipped=not expected)
    assert report_of(ours).served["masked_lm_loss"] == (0 if expected else 1)
    if expected:
        (reason,) = report_of(ours).refused["masked_lm_loss"]
        assert expected in reason


def assert_same_step_by_values(ours: Any, stock: Any, *, skipped: bool) -> None:
    """As above, where a change has given the parameters other names."""
    batch = labeled()
    found, expected = ours(**batch), stock(**batch)
    torch.testing.assert_close(found.loss, expected.loss)
    assert (found.logits is None) == skipped
    found.loss.backward(), expected.loss.backward()
    grads = [m.bert.embeddings.word_embeddings.weight.grad for m in (ours, stock)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_a_patched_forward_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = pair()
    forward = BertForMaskedLM.forward

    @functools.wraps(forward)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert kwargs["labels"] is not None
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertForMaskedLM, "forward", patched)
    assert_same_step(ours, stock, labeled(), skipped=False)


class Doubled(BertForMaskedLM):
    """A subclass whose loss is another."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.loss = 2 * out.loss
        return out


class Quiet(BertForMaskedLM):
    """A subclass that changes nothing of the forward."""

    def extra(self) -> int:
        return 1


def test_subclasses() -> None:
    ours, stock = pair(Quiet)
    assert_same_step(ours, stock, labeled())
    stock = tiny(Doubled, **NO_DROPOUT).train()
    with pytest.raises(ValueError, match=r"has no effect on this Doubled.*forward is not transformers' own"):
        accelerated(stock)
    ours = accelerated(stock, strict=False)
    assert_same_step(ours, stock, labeled(), skipped=False)
    assert "skip_logits: " in "".join(report_of(ours).not_swapped.values())


def test_a_replaced_loss_of_distilbert() -> None:
    stock = of_head("DistilBertForMaskedLM")
    stock.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.1)
    ours = accelerated(stock)
    assert_same_step(ours, stock, labeled_for("DistilBert"), skipped=False)
    assert report_of(ours).refused["masked_lm_loss"] == {"model.mlm_loss_fct was replaced": 1}


def test_models_without_a_head() -> None:
    with pytest.raises(ValueError, match=r"skip_logits=True has no effect.*no masked-language-model head"):
        pyaccel.accelerate(tiny(BertModel), skip_logits=True)
    report = pyaccel.accelerate(tiny(BertModel), skip_logits=True, strict=False)
    assert report.skip_logits
    assert report.swapped


def test_a_vocabulary_that_grows() -> None:
    ours, stock = pair()
    for m in (ours, stock):
        torch.manual_seed(5)
        m.resize_token_embeddings(VOCAB + 20, mean_resizing=False)
    assert_same_step(ours, stock, labeled())
    _replaced(ours)
    _replaced(stock)
    assert_same_step(ours, stock, labeled(), skipped=False)
    assert any("decoder was replaced" in reason for reason in report_of(ours).refused["masked_lm_loss"])
    pyaccel.accelerate(ours, packing=False, skip_logits=True)
    assert_same_step(ours, stock, labeled())
    pyaccel.restore(ours)
    assert type(ours.cls.predictions.decoder) is nn.Linear


@pytest.mark.parametrize("target", ["query", "decoder"])
@pytest.mark.parametrize("first", ["peft", "pyaccel"])
def test_lora(target: str, first: str) -> None:
    peft = pytest.importorskip("peft")
    stock = tiny(BertForMaskedLM, **NO_DROPOUT).train()
    config = peft.LoraConfig(target_modules=[target], init_lora_weights=False)
    both = []
    for ours in (True, False):
        model: Any = copy.deepcopy(stock)
        if ours and first == "pyaccel":
            pyaccel.accelerate(model, packing=False, skip_logits=True)
        torch.manual_seed(4)
        model = peft.get_peft_model(model, config).train()
        if ours and first == "peft":
            pyaccel.accelerate(model, packing=False, skip_logits=True, strict=False)
        both.append(model)
    batch = labeled()
    for m in both:
        m(**batch).loss.backward()
    mine, theirs = map(gradients, both)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6)
    assert (both[0](**batch).logits is None) == (target == "query")
    torch.testing.assert_close(both[0](**batch).loss, both[1](**batch).loss)


# ---- around a model ----


def test_restoring_copying_and_pickling() -> None:
    ours, stock = pair(BertForPreTraining)
    batch = {**labeled(), "next_sentence_label": torch.arange(5) % 2}
    twin, copied = pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)
    for each in (twin, copied, ours):
        assert_same_step(each, stock, batch)
        assert report_of(each).served["masked_lm_loss"] == 1
    pyaccel.restore(ours)
    assert type(ours.cls.predictions.decoder) is nn.Linear
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight
    assert not any(
        (ours._forward_hooks, ours._forward_pre_hooks, ours._forward_hooks_with_kwargs,
         ours._forward_pre_hooks_with_kwargs, ours._forward_hooks_always_called)
    )  # fmt: skip
    assert_same_step(ours, stock, batch, skipped=False)
    assert_same_step(copied, stock, batch)


def test_hooks_of_the_user_outlive_ours() -> None:
    seen: list[str] = []
    stock = tiny(BertForMaskedLM, **NO_DROPOUT).train()
    ours = copy.deepcopy(stock)
    ours.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append("labels" if kwargs["labels"] is not None else "none"),
        with_kwargs=True,
    )
    ours.register_forward_hook(lambda m, args, out: seen.append("none" if out.loss is None else "loss"))
    pyaccel.accelerate(ours, packing=False, skip_logits=True)
    assert_same_step(ours, stock, labeled())
    assert seen == ["labels", "loss"]
    pyaccel.restore(ours)
    assert_same_step(ours, stock, labeled(), skipped=False)
    assert seen == ["labels", "loss"] * 2


def test_a_second_call_adds_nothing() -> None:
    ours, stock = pair()
    pyaccel.accelerate(ours, packing=False, skip_logits=True)
    assert len(ours._forward_hooks) == len(ours._forward_pre_hooks) == 1
    with pytest.raises(RuntimeError, match="skip_logits=True"):
        pyaccel.accelerate(ours, packing=False)
    assert_same_step(ours, stock, labeled())


def test_the_signature_and_the_files_are_the_stock_model_s(tmp_path: Any) -> None:
    ours, stock = pair()
    assert inspect.signature(ours.forward) == inspect.signature(stock.forward)
    ours(**labeled())
    ours.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["BertForMaskedLM"]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in stock.state_dict().items())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    ours, stock = pair()
    batch = labeled()
    found = torch.compile(ours, backend=backend, fullgraph=True)(**batch)
    expected = stock(**batch)
    assert_equivalent(found.loss.detach(), expected.loss.detach())
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_function_transforms_get_all_logits() -> None:
    ours, stock = pair()
    batch = labeled()
    assert_same_step(ours, stock, batch)
    ids, rest = batch.pop("input_ids"), batch
    embeds = stock.get_input_embeddings()(ids).detach()
    grads = [
        torch.func.grad(lambda x, m=m: m(inputs_embeds=x, **rest).loss)(embeds) for m in (ours.train(), stock)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert report_of(ours).served["masked_lm_loss"] == 1
    assert any("torch.func transform" in reason for reason in report_of(ours).refused["masked_lm_loss"])


def test_forward_mode_derivatives_get_all_logits() -> None:
    stock = tiny(BertForMaskedLM, attn_implementation="eager", **NO_DROPOUT).train()
    ours = accelerated(stock)
    batch = labeled()
    embeds = stock.get_input_embeddings()(batch.pop("input_ids")).detach()
    tangents = []
    for m in (ours, stock):
        with forward_ad.dual_level():
            loss = m(inputs_embeds=forward_ad.make_dual(embeds, -embeds), **batch).loss
            tangents.append(forward_ad.unpack_dual(loss).tangent.detach())
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-6)
    assert any("forward-mode" in reason for reason in report_of(ours).refused["masked_lm_loss"])


def test_checkpointed_layers_and_a_checkpointed_model() -> None:
    ours, stock = pair()
    for m in (ours, stock):
        m.gradient_checkpointing_enable()
    assert_same_step(ours, stock, labeled())
    batch = labeled()
    for m in (ours, stock):
        m.gradient_checkpointing_disable()
        m.zero_grad()
        torch.utils.checkpoint.checkpoint(lambda m=m: m(**batch).loss, use_reentrant=False).backward()
    for name, gradient in gradients(stock).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, rtol=1e-4, atol=1e-6)


def test_mixed_precision_of_hugging_face_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    ours, stock = pair()
    batch = labeled()
    prepared = [
        accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(m) for m in (ours, stock)
    ]
    found, expected = (m(**batch) for m in prepared)
    assert found.logits is None
    assert found.loss.dtype == expected.loss.dtype == torch.float32
    assert_equivalent(found.loss.detach().bfloat16(), expected.loss.detach().bfloat16())


def test_threads_train_copies_of_their_own() -> None:
    ours, stock = pair()
    batches = [labeled() for _ in range(4)]
    expected = [stock(**batch).loss.item() for batch in batches]
    found: dict[int, float] = {}
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(3):
            found[number] = ours(**batches[number]).loss.item()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(4)] == pytest.approx(expected)


def test_a_backend_that_was_asked_for_serves_the_loss() -> None:
    stock = tiny(BertForMaskedLM, **NO_DROPOUT).train()
    ours = accelerated(stock, backend="reference")
    with pyaccel.dispatch.record() as choices:
        assert_same_step(ours, stock, labeled())
    assert {c.backend for c in choices if c.op == "masked_lm_cross_entropy"} == {"reference"}
