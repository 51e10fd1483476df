"""`pyaccel cost --model`: both sides counted, hand counts met, and figures that move with the backend."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pyaccel import triton_support
from pyaccel.cli import app
from pyaccel.cost import host, roofline
from pyaccel.cost.model import MIXES, bert_config, figures, length_mix, model_costs
from pyaccel.errors import UserInputError
from tests.hf.models import tiny

MINILM = ("--model", "minilm")

measured_once = functools.cache(roofline.measured_card)
_host = host.encoder_host_costs
host_once = functools.cache(lambda *_: _host(2, torch.device("cpu"), repeats=3))


@pytest.fixture(autouse=True)
def this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once, not again by each test."""
    monkeypatch.setattr(roofline, "measured_card", measured_once)
    monkeypatch.setattr(host, "encoder_host_costs", host_once)


def run(*options: str) -> Any:
    done = CliRunner().invoke(app, ["cost", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout) if "--json" in options else done.stdout


def test_bert_base_by_hand_and_without_kernels() -> None:
    batch, seq, hidden, layers = 32, 512, 768, 12
    options = ("--model", "bert-base", "--batch", str(batch), "--seq-len", str(seq), "--json")
    fast, plain = run(*options), run(*options, "--backend", "torch")
    products = 2 * batch * seq * 12 * hidden**2 + 4 * batch * seq**2 * hidden
    by_hand = layers * products + 2 * batch * hidden**2  # and the pooler's
    assert fast["stock"]["flops"] == fast["accelerated"]["flops"] == by_hand
    assert fast["stock"] == plain["stock"]
    assert len(fast["stock"]["layers"]) == layers + 2
    for figure in ("launches", "bytes_moved"):
        assert fast["accelerated"][figure] < fast["stock"][figure]
        assert fast["accelerated"][figure] < plain["accelerated"][figure]
    for side in fast.values():
        for figure in ("launches", "flops", "bytes_moved", "bytes_saved"):
            assert side[figure] == sum(part[figure] for part in side["layers"])
        for figure in ("launches", "flops", "bytes_moved"):
            assert side[figure] == sum(op[figure] for op in side["ops"].values())
        assert side["bytes_saved"] == 0
        assert all(seconds > 0 for seconds in side["least_seconds"].values())
        assert all(side["host"][name] > 0 for name in ("calls", "microseconds"))


def test_training_saves_less_for_backward() -> None:
    sides = run("--model", "minilm", "--batch", "4", "--seq-len", "128", "--training", "--json")
    assert 0 < sides["accelerated"]["bytes_saved"] < 0.7 * sides["stock"]["bytes_saved"]
    assert sides["accelerated"]["flops"] == sides["stock"]["flops"]


@pytest.mark.parametrize("training", [False, True])
def test_padding_costs_the_stock_model_alone(training: bool) -> None:
    config, lengths = bert_config("minilm"), [16, 64, 128]
    costs = model_costs(config, lengths, torch.bfloat16, training=training)
    full = model_costs(config, [128] * 3, torch.bfloat16, training=training)
    assert figures(costs["stock"])["flops"] == figures(full["stock"])["flops"]
    hidden, layers, times = config.hidden_size, config.num_hidden_layers, 3 if training else 1
    dense = 2 * sum(lengths) * 12 * hidden**2
    # Backward makes the scores again: five products for two.
    attention = sum(n**2 for n in lengths) * hidden * (4 + (10 if training else 0))
    pooler = 2 * len(lengths) * hidden**2 * times
    assert figures(costs["accelerated"])["flops"] == layers * (dense * times + attention) + pooler
    names = [part.name for part in costs["accelerated"]]
    assert (names[1], names[-2]) == ("packing", "unpacking")


def test_length_mixes_are_as_their_names_say() -> None:
    for mix, mean, seq in (("squad", 177, 384), ("sentences", 25, 128), ("full", 512, 512)):
        lengths = length_mix(mix, 64, seq)
        assert sum(lengths) / 64 == pytest.approx(mean, rel=0.05)
        assert 0 < min(lengths) <= max(lengths) <= seq
        assert lengths == length_mix(mix, 64, seq)
    assert set(MIXES) == {"full", "squad", "sentences"}


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    sides = run("--model", str(tmp_path), "--batch", "2", "--seq-len", "8", "--json")
    assert len(sides["stock"]["layers"]) == 3 + 2


def test_tables() -> None:
    printed = run("--model", "minilm", "--batch", "4", "--seq-len", "64", "--lengths", "sentences", "--by-op")
    for word in (
        "each of 6 layers",
        "packing",
        "attention_forward",
        "H200",
        "this CPU",
        "accelerated",
        "█",
        "function calls",
    ):
        assert word in printed, printed


@pytest.mark.parametrize("form", ["svg", "png"])
def test_the_roofline_is_drawn(form: str, tmp_path: Path) -> None:
    file = tmp_path / f"cost.{form}"
    run("--model", "minilm", "--batch", "2", "--seq-len", "16", "--plot", str(file))
    drawn = file.read_bytes()
    assert drawn.startswith(b"<?xml" if form == "svg" else b"\x89PNG")
    if form == "svg":
        assert all(word in drawn.decode() for word in ("H200", "MI300X", "this CPU", "stock", "accelerated"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training", "--by-op"], "--training, --by-op: only for a whole model"),
        ([*MINILM, "--card", "H100", "--hidden-size", "0"], "--hidden-size, --card: only for one layer"),
        (["--hidden-size", "0"], "at least 1"),
        ([*MINILM, "--plot", "nowhere/plot.svg"], "--plot nowhere/plot.svg"),
        ([*MINILM, "--plot", "plot.word"], "--plot plot.word"),
        ([*MINILM, "--dtype", "fp8"], "--dtype"),
        ([*MINILM, "--lengths", "short"], "unknown lengths"),
        (["--model", "nowhere/at all"], "there is no"),
        ([*MINILM, "--seq-len", "513"], "512 positions"),
        ([*MINILM, "--backend", "cuda"], "unknown backend"),
        ([*MINILM, "--lengths", "squad", "--backend", "reference"], "full lengths"),
    ],
)
def test_bad_command_lines(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["cost", *options])
    assert isinstance(done.exception, UserInputError), done.output
    assert message in str(done.exception)


def test_other_configs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2'"):
        bert_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a JSON object"):
        bert_config(str(tmp_path))


def test_without_triton_the_kernels_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="triton isn't installed"):
        model_costs(bert_config("minilm"), [8, 8], torch.float32)
    costs = model_costs(bert_config("minilm"), [8, 8], torch.float32, backend="torch")
    assert figures(costs["accelerated"])["launches"] > 0
