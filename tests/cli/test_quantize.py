"""A folder in, its int8 folder out; bad input is one line with exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyaccel
from pyaccel.checkpoints import demo_checkpoint
from pyaccel.models.bert import BertModel
from pyaccel.nn import Int8Linear
from tests.cli.conftest import Run


def run_apart(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pyaccel", "quantize", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_the_real_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    pyaccel.hf.register()
    out = tmp_path / "int8"
    done = run_apart(demo_checkpoint(), "--out", out, "--smooth", "--sensitivity", "--leave", 2)
    assert done.returncode == 0, done.stderr
    for words in (
        "int8, dynamic: 34 linear layers",
        "left: 2 (skip)",
        "dB  encoder.layer.",
        "hasn't seen: mean 0.999",
    ):
        assert words in done.stdout
    model = AutoModel.from_pretrained(out)
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 34
    ids = AutoTokenizer.from_pretrained(out)("The quick brown fox.", return_tensors="pt")
    stock = AutoModel.from_pretrained(demo_checkpoint())
    with torch.no_grad(), pyaccel.use_backend("torch"):
        cosine = torch.cosine_similarity(model(**ids)[0].mean(1), stock(**ids)[0].mean(1))
        assert cosine.item() > 0.998
        assert BertModel.from_pretrained(out)(ids["input_ids"]).last_hidden_state.isfinite().all()


def test_methods_and_a_text_of_ones_own(tiny_bert: Path, passages: Path, tmp_path: Path, run: Run) -> None:
    for method in ("static", "weight_only"):
        out = tmp_path / method
        with pyaccel.use_backend("torch"):  # as in a process without the interpreter
            done = run(
                "quantize",
                tiny_bert,
                "--out",
                out,
                "--method",
                method,
                "--text",
                passages,
                "--skip",
                "*.value",
            )
        assert done.code == 0, done.err
        modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
        assert set(modules.values()) == {method}
        assert len(modules) == 10
        assert (out / "tokenizer.json").read_bytes() == (tiny_bert / "tokenizer.json").read_bytes()
    again = run("quantize", tmp_path / "static", "--out", tmp_path / "again")
    assert "quantized already" in again.line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "fp8"], "unknown method 'fp8'"),
        (["--method", "weight_only", "--smooth"], "leaves them as they are"),
        (["--skip", "*.nowhere"], "fits '*.nowhere'"),
        (["--leave", 1, "--leave-mb", 1], "either --leave or --leave-mb"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[object], message: str, tiny_bert: Path, tmp_path: Path, run: Run
) -> None:
    assert message in run("quantize", tiny_bert, "--out", tmp_path / "out", *arguments).line
    assert not (tmp_path / "out").exists()


def test_folders(tiny_bert: Path, tmp_path: Path, run: Run) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    for folder, out, message in (
        (odd, tmp_path / "out", "is not a JSON object"),
        (tmp_path / "empty", tmp_path / "out", "has no config.json"),
        (tiny_bert, tmp_path, "exists already"),
    ):
        assert message in run("quantize", folder, "--out", out).line
