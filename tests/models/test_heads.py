"""pyaccel.models.heads against transformers' heads: logits, losses, gradients, and folders in both directions."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pyaccel.models import heads
from pyaccel.models.bert import BertModel
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_equivalent
from tests.models.test_bert import SMALL, randomize

ROWS, LENGTH = 5, 12
LENGTHS = (12, 7, 1, 7, 4)
NAMES = [name for name in heads.__all__ if name.startswith("Bert")]


def labels_for(name: str) -> dict[str, Tensor]:
    words = torch.randint(0, 97, (ROWS, LENGTH)).masked_fill(torch.rand(ROWS, LENGTH) > 0.4, -100)
    padding = torch.arange(LENGTH) >= torch.tensor(LENGTHS).unsqueeze(1)
    classes = torch.arange(ROWS) % 3
    positions = torch.tensor([3, 6, 0, 40, 1])  # one beyond the sequence
    return {
        "BertForMaskedLM": {"labels": words.masked_fill(padding, -100)},
        "BertForPreTraining": {
            "labels": words.masked_fill(padding, -100),
            "next_sentence_label": classes % 2,
        },
        "BertForNextSentencePrediction": {"labels": classes % 2},
        "BertForSequenceClassification": {"labels": classes},
        "BertForMultipleChoice": {"labels": torch.tensor([4, 0])},
        "BertForTokenClassification": {
            "labels": torch.randint(0, 3, (ROWS, LENGTH)).masked_fill(padding, -100)
        },
        "BertForQuestionAnswering": {"start_positions": positions, "end_positions": positions.flip(0)},
    }[name]


def batch_for(name: str) -> dict[str, Tensor]:
    mask = (torch.arange(LENGTH) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    if name == "BertForQuestionAnswering":
        mask[:] = 1  # with padding the losses differ by design
    batch = {"input_ids": torch.randint(0, 97, (ROWS, LENGTH)), "attention_mask": mask}
    if name == "BertForMultipleChoice":
        batch = {key: x.expand(2, -1, -1).contiguous() for key, x in batch.items()}
    return batch


def stock_model(name: str, **changes: Any) -> Any:
    labels = 2 if name == "BertForQuestionAnswering" else 3
    config = transformers.BertConfig(**{**SMALL, "num_labels": labels, **changes})
    model = getattr(transformers, name)(config)
    randomize(model)
    return model.eval()


def ours_from(stock: Any, folder: Path) -> Any:
    stock.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return getattr(heads, type(stock).__name__).from_pretrained(folder)


def tensors(output: Any) -> list[Tensor]:
    found = output.logits if isinstance(output, heads.HeadOutput) else [
        value for key, value in output.items() if key.endswith("logits")
    ]  # fmt: skip
    return list(found) if isinstance(found, tuple | list) else [found]


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_gradients(name: str, tmp_path: Path) -> None:
    stock = stock_model(name)
    ours, truth = ours_from(stock, tmp_path), copy.deepcopy(stock).double()
    batch, labels = batch_for(name), labels_for(name)
    mask = batch["attention_mask"].bool()
    for mine, right, plain in zip(*(tensors(m(**batch)) for m in (ours, truth, stock)), strict=True):
        if mine.shape[:2] == mask.shape and mask.dim() == 2:
            mine, right, plain = mine[mask], right[mask], plain[mask]
        assert_close_to_truth(mine, right, plain)
    losses = [m(**batch, **labels).loss for m in (ours, truth, stock)]
    assert_equivalent(losses[0].detach(), losses[2].detach())
    grads: list[dict[str, Tensor]] = []
    for m, loss in zip((ours, truth, stock), losses, strict=True):
        loss.backward()
        grads.append({key: p.grad for key, p in m.named_parameters() if p.grad is not None})
    zero = "classifier.bias" if name == "BertForMultipleChoice" else "key.bias"
    named = [key for key in grads[0] if "key.bias" not in key and key != zero]
    assert {key for key in grads[2] if "key.bias" not in key and key != zero} == set(named)
    flat = [
        torch.cat([(g[key] / grads[1][key].abs().max().to(g[key].dtype)).flatten() for key in named])
        for g in grads
    ]
    assert_close_to_truth(*flat)


@pytest.mark.parametrize("name", NAMES)
def test_folders_go_both_ways(name: str, tmp_path: Path) -> None:
    stock = stock_model(name)
    ours = ours_from(stock, tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    loaded, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = loaded.state_dict()
    for key, tensor in stock.state_dict().items():
        assert_bits_equal(state[key], tensor, name=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_head_says_so(name: str, tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    kind = getattr(heads, name)
    with pytest.warns(UserWarning, match="newly initialized, train it") as caught:
        model = kind.from_pretrained(tmp_path)
    said = str(caught[0].message)
    assert ("bert.pooler.dense.weight" in said) == kind.needs_pooler
    assert all(key in said for key in model.state_dict() if not key.startswith("bert."))
    assert model.state_dict().keys() == kind(model.config).state_dict().keys()
    assert all(p.isfinite().all() for p in model.parameters())


def test_half_a_head_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    stock_model("BertForTokenClassification").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(classifier.bias\)"):
        heads.BertForTokenClassification.from_pretrained(tmp_path)


def test_an_untied_decoder_is_an_error(tmp_path: Path) -> None:
    stock_model("BertForMaskedLM", tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only tied heads are supported"):
        heads.BertForMaskedLM.from_pretrained(tmp_path)


def test_kinds_of_sequence_labels(tmp_path: Path) -> None:
    for changes, labels in (
        ({"num_labels": 1}, torch.randn(ROWS)),
        ({"num_labels": 3}, torch.rand(ROWS, 3).round()),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.rand(ROWS, 3)),
    ):
        stock = stock_model("BertForSequenceClassification", **changes)
        ours = ours_from(stock, tmp_path / str(labels.dim()))
        batch = batch_for("BertForSequenceClassification")
        assert_equivalent(*(m(**batch, labels=labels).loss.detach() for m in (ours, stock)))


def test_packed_tokens() -> None:
    model = heads.BertForTokenClassification(heads.BertConfig(**SMALL)).eval()
    batch = batch_for("BertForTokenClassification")
    mask = batch["attention_mask"].bool()
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = model(batch["input_ids"][mask], cu_seqlens=offsets, max_seqlen=12).logits
    torch.testing.assert_close(packed, model(**batch).logits[mask])
    with pytest.raises(ValueError, match="packed input has no positions"):
        heads.BertForQuestionAnswering(heads.BertConfig(**SMALL))(
            batch["input_ids"][mask], cu_seqlens=offsets, max_seqlen=12
        )
    with pytest.raises(ValueError, match=r"\[batch, choices, seq\], got \(5, 12\)"):
        heads.BertForMultipleChoice(heads.BertConfig(**SMALL))(batch["input_ids"])


def test_padding_is_no_answer() -> None:
    model = heads.BertForQuestionAnswering(heads.BertConfig(**SMALL)).eval()
    batch = batch_for("BertForTokenClassification")
    start, _ = model(**batch).logits
    assert (start.argmax(-1) < torch.tensor(LENGTHS)).all()
    alone = model(batch["input_ids"][2:3, :1]).logits[0]
    torch.testing.assert_close(start[2, :1], alone[0])
    loss = model(**batch, start_positions=torch.zeros(5).long(), end_positions=torch.zeros(5).long()).loss
    assert loss.isfinite()


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = heads.BertForPreTraining(heads.BertConfig(**SMALL)).train()
    batch, labels = batch_for("BertForPreTraining"), labels_for("BertForPreTraining")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch, **labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert isinstance(model.bert, BertModel)
