"""The real checkpoint and real text."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pyaccel import checkpoints, dispatch
from pyaccel.encode.texts import real_passages

Batch = dict[str, Tensor]


class Real:
    """all-MiniLM-L6-v2, stock in fp32, and sentences of Python's language reference in batches of mixed length.

    Each Python has its own reference, and rows of numbers, which some have, are what int8 serves worst.
    """

    def __init__(self) -> None:
        self.stock, self.tokenizer, _ = checkpoints.load(
            None, attn_implementation="sdpa", dtype=torch.float32
        )

        def count(texts: list[str]) -> list[int]:
            return [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

        passages = real_passages(count, count=512, high=128)
        passages = [text for text in passages if re.fullmatch(r"[A-Z].*\.", text)][:128]
        self.batches = [self.batch(passages[i : i + 16]) for i in range(0, len(passages), 16)]
        self.expected = self.embeddings(self.stock)

    def batch(self, texts: list[str], max_length: int = 128) -> Batch:
        return dict(
            self.tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        )

    def model(self) -> Any:
        return copy.deepcopy(self.stock)

    @torch.no_grad()
    def embeddings(self, model: Any) -> Tensor:
        """Mean-pooled sentence embeddings, fp64."""
        pooled = []
        for batch in self.batches:
            states = model(**batch)[0].double()
            weights = batch["attention_mask"].unsqueeze(-1).double()
            pooled.append((states * weights).sum(1) / weights.sum(1))
        return torch.cat(pooled)

    def cosines(self, model: Any) -> Tensor:
        return torch.cosine_similarity(self.embeddings(model), self.expected)


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    """A real checkpoint takes too long under the interpreter; backends' bits are compared in tests/ops."""
    with dispatch.use_backend("torch"):
        yield


@pytest.fixture(scope="session")
def real() -> Iterator[Real]:
    threads = torch.get_num_threads()
    yield Real()
    torch.set_num_threads(threads)
