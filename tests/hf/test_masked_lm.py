"""The masked-language-model head: in training the logits of masked tokens alone, and all of them for who looks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForPreTraining

import pyaccel
from pyaccel import ops
from pyaccel.hf.masked_lm import DeferredLogits, _Product
from tests.assertions import assert_close_to_truth, assert_equivalent
from tests.hf.models import VOCAB, batch_of, tiny

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def labelled(kind: str = "right") -> dict[str, Tensor]:
    batch = batch_of(kind)
    labels = torch.randint(0, VOCAB, batch["input_ids"].shape)
    batch["labels"] = labels.masked_fill(
        (torch.rand(labels.shape) > 0.3) | (batch["attention_mask"] == 0), -100
    )
    return batch


def pair(kind: type[nn.Module] = BertForMaskedLM, **changes: Any) -> tuple[Any, Any]:
    stock = tiny(kind, **{**NO_DROPOUT, **changes}).train()
    ours = copy.deepcopy(stock)
    pyaccel.accelerate(ours, packing=False)  # padding's logits are the stock model's too
    return ours, stock


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_and_gradients_without_the_logits(dtype: torch.dtype, autocast: bool) -> None:
    ours, stock = (m.to(dtype) for m in pair())
    truth, batch = copy.deepcopy(stock).double(), labelled()
    losses, grads = [], []
    for m in (ours, truth, stock):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and m is not truth):
            out = m(**batch)
        assert isinstance(out.logits, DeferredLogits) == (m is ours)
        losses.append(out.loss)
        out.loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
    assert losses[0].dtype == losses[2].dtype
    assert_close_to_truth(*grads)
    computed_in = torch.bfloat16 if autocast else dtype
    assert_equivalent(losses[0].to(computed_in), losses[2].detach().to(computed_in))


def test_a_step_makes_no_logits_but_those_of_masked_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    rows = []
    cross_entropy = ops.masked_lm_cross_entropy
    monkeypatch.setattr(_Product, "compute", lambda self: pytest.fail("all logits were made"))

    def spy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options: Any) -> Tensor:
        rows.append((hidden.shape[0], int((labels != -100).sum())))
        return cross_entropy(hidden, weight, bias, labels, **options)

    monkeypatch.setattr(ops, "masked_lm_cross_entropy", spy)
    batch = labelled()
    ours(**batch).loss.backward()
    assert rows == [(60, int((batch["labels"] != -100).sum()))]


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.argmax(-1),
        lambda x: x[0, 1],
        lambda x: x.view(-1, VOCAB).float().softmax(-1),
        lambda x: x.view(5, -1),
        lambda x: torch.cat([x, x]),
        lambda x: x.detach().numpy(),
        lambda x: x.sum().item(),
        lambda x: F.cross_entropy(x.view(-1, VOCAB), torch.zeros(60, dtype=torch.long), label_smoothing=0.1),
        lambda x: F.cross_entropy(x.transpose(1, 2), torch.zeros(5, 12, dtype=torch.long)),
        lambda x: pickle.loads(pickle.dumps(x.detach())),
        lambda x: copy.deepcopy(x.detach()),
        lambda x: x.tolist(),
        lambda x: x.requires_grad,
        lambda x: (x.shape, x.dtype, x.device, x.dim(), len(x)),
        lambda x: list(x.clone().unbind()),
    ],
)
def test_any_other_use_makes_them(look: Any) -> None:
    ours, stock = pair()
    batch = labelled()
    seen, expected = (look(m(**batch).logits) for m in (ours, stock))
    if isinstance(expected, Tensor):
        assert type(seen) is Tensor
        assert_equivalent(seen.float(), expected.float()) if expected.is_floating_point() else None
        assert seen.requires_grad == expected.requires_grad
        assert torch.equal(seen, expected) or expected.is_floating_point()
    elif isinstance(expected, bool | tuple):
        assert seen == expected
    else:
        torch.testing.assert_close(seen, expected)


def test_a_loss_of_ones_own_has_the_stock_gradient() -> None:
    ours, stock = pair()
    truth, batch = copy.deepcopy(stock).double(), labelled()
    batch.pop("labels")
    grads = []
    for m in (ours, truth, stock):
        logits = m(**batch).logits
        (logits * torch.linspace(-1, 1, VOCAB, dtype=logits.dtype)).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
    assert_close_to_truth(*grads)


def test_logits_that_were_not_read_in_time_raise() -> None:
    ours, _ = pair()
    out = ours(**labelled())
    out.loss.backward()
    kept = ours(**labelled())
    assert kept.logits.sum().isfinite()
    with torch.no_grad():
        ours.bert.embeddings.word_embeddings.weight.add_(0.1)
    with pytest.raises(RuntimeError, match=r"read logits before optimizer\.step"):
        out.logits.argmax(-1)
    assert kept.logits.sum().isfinite()  # they were read


def test_a_batch_in_which_nothing_is_masked() -> None:
    """Stock's mean over nothing is NaN and so are its gradients; here both are 0."""
    ours, _ = pair()
    batch = labelled()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = ours(**batch).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in ours.parameters() if p.grad is not None)


def test_evaluation_hooks_and_restoring() -> None:
    ours, _ = pair(BertForPreTraining)
    batch = labelled()
    assert isinstance(ours(**batch).prediction_logits, DeferredLogits)
    with torch.no_grad():
        assert type(ours(**batch).prediction_logits) is Tensor
    seen: list[Tensor] = []
    handle = ours.cls.predictions.decoder.register_forward_hook(lambda m, a, out: seen.append(out))
    ours(**batch)
    assert type(seen[0]) is Tensor
    handle.remove()
    assert type(ours.eval()(**batch).prediction_logits) is Tensor
    twin = pickle.loads(pickle.dumps(ours)).train()
    assert isinstance(twin(**batch).prediction_logits, DeferredLogits)
    pyaccel.restore(ours)
    assert type(ours.cls.predictions.decoder) is nn.Linear
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight
    assert type(ours.train()(**batch).prediction_logits) is Tensor


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    ours, stock = pair()
    batch = labelled()
    losses = [torch.compile(ours, backend=backend, fullgraph=True)(**batch).loss, stock(**batch).loss]
    assert_equivalent(losses[0].detach(), losses[1].detach())
