"""Training with int8 in the loop: as accurate as floating point, and what is deployed is what was trained."""

from __future__ import annotations

import copy
import pydoc_data.topics
import random
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyaccel
from pyaccel.quantization import freeze, prepare_qat
from tests.assertions import assert_bits_equal
from tests.quantization.conftest import Batch, Real

# Which of these subjects of the language reference does a sentence come from?
SUBJECTS = (
    ("STRINGMETHODS", "FORMATSTRINGS", "TYPESSEQ"),
    ("TYPES", "SPECIALNAMES", "CUSTOMIZATION"),
    ("IMPORT", "EXECMODEL", "DEBUGGER"),
)


class Classifier(nn.Module):
    """An encoder, mean pooling, a linear head."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(SUBJECTS))

    def forward(self, batch: Batch) -> Tensor:
        states = self.encoder(**batch).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


def sentences() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Real sentences with their subject: for training and for the test, none in both."""
    topics = {name.upper(): text for name, text in pydoc_data.topics.topics.items()}
    rows: dict[str, int] = {}
    for label, names in enumerate(SUBJECTS):
        for name in (n for n in names if n in topics):
            for sentence in re.split(r"(?<=[.:])\s+", topics[name].replace("\n", " ")):
                text = " ".join(sentence.split())
                if 40 <= len(text) <= 160:
                    rows[text] = label
    found = sorted(rows.items())
    random.Random(0).shuffle(found)
    return found[:480], found[480:680]


def train(model: Classifier, data: list[tuple[str, int]], real: Real, steps: int) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
    model.train()
    for step in range(steps):
        rows = [data[(step * 24 + i) % len(data)] for i in range(24)]
        logits = model(real.batch([text for text, _ in rows], max_length=40))
        F.cross_entropy(logits, torch.tensor([label for _, label in rows])).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: Classifier, data: list[tuple[str, int]], real: Real) -> float:
    right = 0
    model.eval()
    for i in range(0, len(data), 40):
        rows = data[i : i + 40]
        logits = model(real.batch([text for text, _ in rows], max_length=40))
        right += int((logits.argmax(-1) == torch.tensor([label for _, label in rows])).sum())
    return right / len(data)


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0


def test_fine_tuning_in_int8_keeps_the_accuracy_and_deploys_the_same_bits(real: Real) -> None:
    training, testing = sentences()
    encoder = real.model()
    encoder.embeddings.requires_grad_(False)
    without_dropout(encoder)
    torch.manual_seed(1)
    floating = Classifier(encoder)
    aware = copy.deepcopy(floating)
    report = prepare_qat(aware.encoder)
    assert len(report.quantized) == 36

    steps = 25
    train(floating, training, real, steps)
    train(aware, training, real, steps)
    of_floating, of_aware = accuracy(floating, testing, real), accuracy(aware, testing, real)
    assert of_floating > 0.6  # a third would be chance
    assert of_aware >= of_floating - 0.01

    batch = real.batch([text for text, _ in testing[:16]], max_length=40)
    aware.train()
    logits = aware(batch)
    assert logits.requires_grad
    freeze(aware.encoder)
    assert_bits_equal(aware(batch), logits)
    aware.eval()
    assert_bits_equal(aware(batch), logits)
    with torch.no_grad():
        deployed = aware(batch)
    assert (
        deployed - logits
    ).abs().max() <= 1e-5 * logits.abs().max()  # the attention's own kernels may differ
    pyaccel.accelerate(aware.encoder)
    assert accuracy(aware, testing, real) >= of_floating - 0.01
