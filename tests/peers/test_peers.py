"""The script that runs peers' suites: its counting, and a suite of one file that both runs go through."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers import __main__ as peers

TESTS = """
import torch
from transformers import BertConfig, BertModel

def test_same():
    assert True

def test_class_of_the_encoder():
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    assert "pyaccel" not in type(model.encoder).__module__

def test_attention_outputs():
    test_class_of_the_encoder()

def test_fails():
    assert False
"""


def test_a_suite_stock_beside_accelerated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_one.py").write_text(TESTS)
    arguments = [
        "--no-opinfo",
        "--transformers",
        str(tmp_path),
        "--only",
        "test_one.py",
        "--peft",
        str(tmp_path / "no"),
    ]
    assert peers.main(arguments) == 1
    out = capsys.readouterr().out
    assert "stock       3 passed, 1 failed" in out
    assert "accelerated 1 passed, 3 failed" in out
    assert "stock alone: test_one::test_class_of_the_encoder\n" in out
    assert "stock alone: test_one::test_attention_outputs (by design)" in out
    assert "peft: not run: no folder" in out
    assert "accelerate: not run: no checkout was given" in out
    assert out.endswith("1 tests pass with stock models alone\n")
