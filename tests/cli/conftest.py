"""A tiny BERT with a tokenizer, on disk as Hugging Face saves it, and the command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import pyaccel.cli


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """What was said on stderr, if that is one line and the exit code is 2."""
        assert self.code == 2, self
        assert self.err.startswith("pyaccel: "), self
        assert self.err.count("\n") == 1, self
        return self.err


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["pyaccel", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            pyaccel.cli.main()
        said = capsys.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 1, said.out, said.err)

    return call


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "a",
        "value",
        "of",
        "is",
        "##s",
        "object",
        ".",
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    file = tmp_path / "passages.txt"
    file.write_text("\n".join("the value of a object is . " * n for n in (1, 2, 1, 4, 30)) + "\n\n")
    return file
