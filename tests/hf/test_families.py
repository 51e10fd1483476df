"""Every family and head: outputs, losses and gradients as the stock model's, in evaluation and in training."""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import pyaccel
from pyaccel import dispatch
from pyaccel.hf.families import FAMILIES, stock
from tests.assertions import (
    assert_bits_equal,
    assert_close_to_truth,
    assert_equivalent,
    assert_same_curve,
    assert_same_distribution,
)
from tests.hf import accelerate_everything
from tests.hf.models import VOCAB, mask_of, randomize, read
from tests.hf.test_attention_alone import MODELS
from tests.pairwise import pairwise

BERT_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# The prefix of a family's classes in transformers, and its tiny config.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", BERT_SIZES),
    "RoBERTa": ("Roberta", BERT_SIZES),
    "XLM-RoBERTa": ("XLMRoberta", BERT_SIZES),
    "CamemBERT": ("Camembert", BERT_SIZES),
    "ELECTRA": ("Electra", {**BERT_SIZES, "embedding_size": 24, "summary_last_dropout": 0.0}),
    "ERNIE": ("Ernie", BERT_SIZES),
    "RoCBert": ("RoCBert", {**BERT_SIZES, "pronunciation_vocab_size": 11, "shape_vocab_size": 12}),
    "Data2VecText": ("Data2VecText", BERT_SIZES),
    "BertGeneration": ("BertGeneration", BERT_SIZES),
    "DistilBERT": (
        "DistilBert",
        {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 72, "dropout": 0.0, "attention_dropout": 0.0,
         "seq_classif_dropout": 0.0, "qa_dropout": 0.0},
    ),
    "ALBERT": ("Albert", {**BERT_SIZES, "embedding_size": 24, "num_hidden_groups": 2, "inner_group_num": 2,
                          "num_hidden_layers": 2, "classifier_dropout_prob": 0.0}),
}  # fmt: skip
LAYERS = {"ALBERT": 4}  # as they run
HEADS = (
    "Model", "ForPreTraining", "ForMaskedLM", "ForNextSentencePrediction", "ForSequenceClassification",
    "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering", "Encoder",
)  # fmt: skip
CASES = [
    (family, head)
    for family, (prefix, _) in TINY.items()
    for head in HEADS
    if hasattr(transformers, f"{prefix}{head}")
]


def test_every_family_is_tested() -> None:
    assert list(TINY) == [family.title for family in FAMILIES]
    assert {("BERT", head) for head in HEADS if head != "Encoder"} < set(CASES)


def make(family: str, head: str = "Model", **changes: Any) -> Any:
    """A tiny stock model in evaluation, whose parameters hide nothing."""
    prefix, sizes = TINY[family]
    if head == "Model" and not hasattr(transformers, f"{prefix}Model"):
        head = "Encoder"
    if head == "ForQuestionAnswering" or (family, head) == ("ALBERT", "ForPreTraining"):
        changes = {"num_labels": 2, **changes}
    config = getattr(transformers, f"{prefix}Config")(
        **{
            "vocab_size": VOCAB,
            "max_position_embeddings": 40,
            "pad_token_id": 1,
            "num_labels": 3,
            **sizes,
            **changes,
        }
    )
    return randomize(getattr(transformers, f"{prefix}{head}")(config)).eval()


def batch_for(model: nn.Module, head: str, kind: str, labels: bool = True) -> dict[str, Tensor]:
    mask = mask_of(kind)
    rows = len(mask)
    batch = {"input_ids": torch.randint(2, VOCAB, mask.shape), "attention_mask": mask}
    if head == "ForMultipleChoice":
        batch = {name: x.unsqueeze(0).repeat(2, 1, 1) for name, x in batch.items()}
    real = batch["attention_mask"].bool()
    classes = torch.arange(rows) % 3
    per_token = (
        torch.randint(0, 3, mask.shape).masked_fill(~real, -100) if head != "ForMultipleChoice" else None
    )
    words = torch.randint(0, VOCAB, mask.shape).masked_fill(
        ~mask.bool() | (torch.rand(mask.shape) > 0.4), -100
    )
    name = type(model).__name__
    given: dict[str, dict[str, Tensor]] = {
        "ForMaskedLM": {"labels": words},
        "ForNextSentencePrediction": {"labels": classes % 2},
        "ForSequenceClassification": {"labels": classes},
        "ForMultipleChoice": {"labels": torch.tensor([1, 0])},
        "ForQuestionAnswering": {"start_positions": classes, "end_positions": classes},
    }
    if head == "ForTokenClassification":
        assert per_token is not None
        given[head] = {"labels": per_token}
    if head == "ForPreTraining":
        given[head] = {"labels": words, "next_sentence_label": classes % 2}
        if name.startswith("Albert"):
            given[head] = {"labels": words, "sentence_order_label": classes % 2}
        if name.startswith("Electra"):
            given[head] = {"labels": torch.randint(0, 2, mask.shape)}
        if name.startswith("RoCBert"):
            given = {}
    return {**batch, **(given.get(head, {}) if labels else {})}


def results(model: Any, batch: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    """Outputs at the positions that are read, the loss, and every parameter's gradient."""
    for p in model.parameters():
        p.grad = None
    out = model(**batch)
    found: dict[str, Tensor] = {}
    loss = out.get("loss")
    seen = read(batch["attention_mask"]) if batch["attention_mask"].dim() == 2 else None
    for name, value in out.items():
        if isinstance(value, Tensor):
            per_token = seen is not None and value.dim() >= 2 and value.shape[:2] == seen.shape
            found[name] = value[seen] if per_token else value
    if loss is None:
        loss = sum((x * torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)).sum() for x in found.values())
    loss.backward()
    # Keys' biases cancel in the softmax over keys, a choice's in the one over choices: gradients of rounding alone.
    zero = r"(key|k_lin)\.bias" + (r"|classifier\.bias" if head == "ForMultipleChoice" else "")
    for name, p in model.named_parameters():
        if p.grad is not None and not re.search(zero, name):
            found[f"gradient of {name}"] = p.grad
    return found


def gradients(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """All of them in one, each over the largest element that it should have."""
    names = [name for name in truth if name.startswith("gradient")]
    return torch.cat(
        [(found[n] / truth[n].abs().max().clamp(min=1e-30).to(found[n].dtype)).flatten() for n in names]
    )


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize(("family", "head"), CASES, ids=lambda x: x)
def test_as_stock(family: str, head: str, kind: str) -> None:
    model = make(family, head)
    batch = batch_for(model, head, kind)
    naive, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    report = pyaccel.accelerate(model)
    for training in (False, True):
        ours, right, plain = (results(m.train(training), batch, head) for m in (model, truth, naive))
        assert ours.keys() == plain.keys() == right.keys()
        for name in ours:
            if name == "loss":  # one number, in which errors of the stock model may cancel by chance
                assert_equivalent(ours[name], plain[name], name=name)
            elif not name.startswith("gradient"):
                assert_close_to_truth(
                    ours[name], right[name], plain[name], name=f"{name}, training={training}"
                )
        assert_close_to_truth(*(gradients(each, right) for each in (ours, right, plain)), name="gradients")
    assert not report.refused["padded"]
    how = "padded" if head == "ForQuestionAnswering" else "packed"  # its loss is over padding too
    assert report.served == {how: 2 * LAYERS.get(family, 3)}
    assert bool(report.refused["packed"]) == (how == "padded")
    pyaccel.restore(model)
    again = results(model, batch, head)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes", "a padded row"])
@pytest.mark.parametrize("family", list(TINY))
def test_padded(family: str, kind: str) -> None:
    """Without packing the padding positions are the stock model's too."""
    model = make(family)
    batch = batch_for(model, "Model", kind)
    if kind == "none":
        del batch["attention_mask"]
    naive, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    report = pyaccel.accelerate(model, packing=False)
    with torch.no_grad():
        outputs = [m(**batch).last_hidden_state for m in (model, truth, naive)]
    assert_close_to_truth(*outputs)
    assert report.served == {"padded": LAYERS.get(family, 3)}
    assert not report.refused["padded"]


@pytest.mark.parametrize(
    ("family", "where", "packing"),
    [
        tuple(case.values())
        for case in pairwise(
            {
                "family": ["BERT", "DistilBERT", "ALBERT"],
                "where": ["attention", "hidden"],
                "packing": [True, False],
            }
        )
    ],
)
def test_dropout_has_the_stock_distribution(family: str, where: str, packing: bool) -> None:
    """In training, of each kind alone: outputs have the means and the spread of the stock model's."""
    _, sizes = TINY[family]
    drops = {
        name: 0.25 for name in sizes if "dropout" in name and ("attention" in name) == (where == "attention")
    }
    model = make(family, num_hidden_layers=2, **drops).train() if family != "DistilBERT" else make(
        family, **{**drops, "n_layers": 1}
    ).train()  # fmt: skip
    batch = batch_for(model, "Model", "right")
    naive = copy.deepcopy(model)
    report = pyaccel.accelerate(model, packing=packing)
    assert_same_distribution(
        *(lambda m=m: m(**batch).last_hidden_state[:, 0] for m in (model, naive)), runs=300
    )
    assert not report.refused["padded"]
    assert not report.refused["packed"]


@pytest.mark.parametrize("family", list(TINY))
def test_ten_steps_follow_the_stock_loss(family: str) -> None:
    model = make(family, "ForMaskedLM" if family != "BertGeneration" else "Encoder").train()
    naive = copy.deepcopy(model)
    pyaccel.accelerate(model)
    head = "ForMaskedLM" if family != "BertGeneration" else "Encoder"
    batches = [batch_for(model, head, kind) for kind in ("right", "left")]
    losses: list[list[float]] = []
    for m in (model, naive):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        losses.append([])
        for step in range(10):
            batch = batches[step % 2]
            out = m(**batch)
            seen = read(batch["attention_mask"])
            loss = out.loss if "loss" in out else out.last_hidden_state[seen].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert_same_curve(*losses)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("family", list(TINY))
def test_saved_copied_and_restored(family: str, tmp_path: Path) -> None:
    model = make(family)
    batch = batch_for(model, "Model", "right")
    before = {name: type(m) for name, m in model.named_modules()}
    pyaccel.accelerate(model)
    assert [type(m).__name__ for m in model.modules()] == [kind.__name__ for kind in before.values()]
    expected = model(**batch).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {name: type(m) for name, m in loaded.named_modules()} == before
    assert loaded.config._attn_implementation == "sdpa"
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (twin, torch.load(tmp_path / "model.pt", weights_only=False)):
        assert {type(m) for m in other.modules()} == {type(m) for m in model.modules()}
        assert_bits_equal(other(**batch).last_hidden_state, expected)
    pyaccel.restore(model)
    assert {name: type(m) for name, m in model.named_modules()} == before


@pytest.mark.parametrize("family", list(TINY))
def test_hidden_states_and_attentions(family: str) -> None:
    model = make(family)
    batch = batch_for(model, "Model", "left")
    naive = copy.deepcopy(model)
    naive.set_attn_implementation("eager")
    pyaccel.accelerate(model)
    ours, theirs = (m(**batch, output_hidden_states=True, output_attentions=True) for m in (model, naive))
    for name in ("hidden_states", "attentions"):
        assert len(ours[name]) == len(theirs[name]) > 0
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert_equivalent(a, b)


def test_parts_are_what_a_layer_is_made_of() -> None:
    """A submodule that a new transformers adds to a layer is noticed here, and refused at run time."""
    for family in FAMILIES:
        known = stock(family)
        layer = next(m for m in make(family.title).modules() if type(m) is known.layer)
        found = {path: type(m) for path, m in layer.named_modules() if path not in ("", family.activation)}
        assert found == known.parts, family.title


def table() -> list[str]:
    """README's table of families, from what a packed and a padded call of each does."""
    lines = [
        "| family | attention | dropout + residual + LayerNorm | feed-forward | no padding |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        model = make(family.title)
        batch = batch_for(model, "Model", "right")
        layers = LAYERS.get(family.title, 3)
        report = pyaccel.accelerate(model)
        with torch.no_grad(), dispatch.record() as choices:
            model(**batch)
        calls = Counter(choice.op for choice in choices)
        done = (
            calls["varlen_attention"] == layers,
            calls["residual_layernorm"] == 2 * layers,
            calls["linear_activation"]
            == 4 * layers,  # query, key, value, and the feed-forward network's first
            report.served == {"packed": layers},
        )
        lines.append(f"| {family.title} | " + " | ".join("fused" if each else "" for each in done[:-1])
                     + (" | yes |" if done[-1] else " | |"))  # fmt: skip
    lines.append(
        f"| {', '.join(MODELS)} and what else uses transformers' attention interface | fused | | | |"
    )
    return lines


def test_readme_says_what_is_fused() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in readme, "README's table should be:\n" + "\n".join(table())


def test_the_plugin_for_transformers_own_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.PreTrainedModel, "post_init", accelerate_everything.post_init)
    model = make("BERT", "ForSequenceClassification")
    assert {type(m).__module__ for m in (model.bert.encoder, *model.bert.encoder.layer)} == {"pyaccel.hf"}
