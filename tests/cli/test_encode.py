"""Texts in, embeddings out: right, in order, and whole whenever it is killed."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pyaccel import dispatch, triton_support
from pyaccel.checkpoints import demo_checkpoint
from pyaccel.cli import app
from pyaccel.encode import job as encode_job
from pyaccel.encode.batching import batches
from pyaccel.encode.encoder import TextEncoder, max_tokens
from pyaccel.encode.identity import Identity, Shard
from pyaccel.encode.job import Job
from pyaccel.encode.texts import read_texts, real_passages
from pyaccel.errors import UserInputError

TEXTS = [
    "the value of a object .",
    "",
    "a",
    "the value is the value of the value .",
    'values of "a", the object',
]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pyaccel", "encode", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TRITON_INTERPRET": "0", **more}


def run(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(**more), timeout=300
    )


def in_this_process(*arguments: object) -> None:
    """As :func:`run`, where it doesn't matter that it ends: a process takes longer to import than to encode."""
    with dispatch.use_backend("torch") if triton_support.interpreting() else nullcontext():
        done = CliRunner().invoke(app, ["encode", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS * 20) + "\n")
    return file


# --- what it computes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_real_embeddings_are_the_stock_models(dtype: torch.dtype) -> None:
    """all-MiniLM-L6-v2: mean pooling, normalized, 256 tokens, as its sentence-transformers files say."""
    from transformers import AutoModel, AutoTokenizer

    folder = demo_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    passages = real_passages(lambda t: [len(i) for i in tokenizer(t, verbose=False)["input_ids"]], count=24)
    passages += ["", passages[0] * 12]
    encoder = TextEncoder.from_pretrained(folder, dtype=dtype, batch_tokens=700)
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("mean", True, 256)
    found = encoder.encode(passages)
    assert found.dtype == torch.float32
    stock = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    for text, embedding in zip(passages, found, strict=True):
        batch = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            expected = torch.nn.functional.normalize(
                stock(**batch).last_hidden_state.float().mean(1), dim=-1
            )[0]
        assert torch.dot(embedding, expected) > (1 - 1e-6 if dtype == torch.float32 else 1 - 1e-3)
    assert encoder.truncated == 1
    assert encoder.texts == 26
    assert torch.equal(
        found, TextEncoder.from_pretrained(folder, dtype=dtype, batch_tokens=700).encode(passages)
    )


def test_cls_pooling_and_no_normalization(tiny_bert: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    encoder = TextEncoder.from_pretrained(tiny_bert, pooling="cls", normalize=False)
    found = encoder.encode(TEXTS)
    batch = AutoTokenizer.from_pretrained(tiny_bert)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tiny_bert).eval()(**batch).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected)
    assert encoder.encode([]).shape == (0, found.shape[1])


def test_positions_that_are_paddings_are_no_room_for_tokens() -> None:
    import transformers

    sizes = {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    for name, room in (("Bert", 20), ("Roberta", 18), ("MPNet", 18), ("Electra", 20)):
        config = getattr(transformers, f"{name}Config")(**sizes, max_position_embeddings=20, pad_token_id=1)
        model = getattr(transformers, f"{name}Model")(config).eval()
        assert max_tokens(model) == room, name
        model(torch.full((1, room), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, room + 1), 5))


def test_batches_hold_every_text_once() -> None:
    lengths = [3, 9, 1, 400, 7, 7, 2, 0]
    found = list(batches(lengths, 12))
    assert sorted(i for batch in found for i in batch) == list(range(8))
    assert found[0] == [3]  # alone, though it is longer than a batch
    assert all(sum(lengths[i] for i in batch) <= 12 for batch in found[1:])
    assert not list(batches([], 12))


def test_a_folder_with_more_than_this_computes_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "2_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="Dense"):
        TextEncoder.from_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "1_Pooling"}]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="pooling_mode_max_tokens"):
        TextEncoder.from_pretrained(folder)
    with pytest.raises(ValueError, match="more than the"):
        TextEncoder.from_pretrained(tiny_bert, max_length=10**6)


# --- files ---


def test_every_kind_of_file(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    lines = TEXTS * 20
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in lines))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("n", "body"), *enumerate(lines)])
    parquet.write_table(pyarrow.table({"body": lines}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert list(read_texts(tmp_path / name, "body")) == lines, name
    done = run(texts, "--model", tiny_bert, "--out", tmp_path / "out.npy", "--window", 7)
    assert done.returncode == 0, done.stderr
    assert "100 texts" in done.stderr
    expected = np.load(tmp_path / "out.npy")
    assert expected.shape[0] == 100
    assert not list(tmp_path.glob("*.parts*"))
    in_this_process(
        tmp_path / "a.parquet", "--column", "body", "--model", tiny_bert, "--out", tmp_path / "out.parquet",
        "--keep-text", "--window", 7,
    )  # fmt: skip
    table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert table["row"] == list(range(100))
    assert table["text"] == lines
    assert np.array_equal(np.array(table["embedding"], np.float32), expected)


def test_bad_input(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"texts": "a"}\n')
    (tmp_path / "there.npy").write_text("")
    out = tmp_path / "out.npy"
    model = ("--model", tiny_bert)
    for arguments, words in (
        ((tmp_path / "none.txt", *model, "--out", out), "there is no file"),
        ((tmp_path / "empty.txt", *model, "--out", out), "is empty"),
        ((tmp_path / "bad.jsonl", *model, "--out", out), "line 2: not a JSON object with 'text'"),
        ((texts, *model, "--out", tmp_path / "out.csv"), "the output is a .npy or .parquet file"),
        ((texts, *model, "--out", tmp_path / "there.npy"), "exists already"),
        ((texts, *model, "--out", tmp_path / "none" / "out.npy"), "there is no folder"),
        ((texts, *model, "--out", out, "--keep-text"), "--keep-text needs a .parquet file"),
        ((texts, *model, "--out", out, "--pooling", "max"), "unknown pooling 'max'"),
        ((texts, "--model", tmp_path, "--out", out), "has no config.json"),
    ):
        with pytest.raises(UserInputError, match=re.escape(words)):
            CliRunner().invoke(app, ["encode", *map(str, arguments)], catch_exceptions=False)
    assert not out.exists()
    done = run(tmp_path / "none.txt", *model, "--out", out)
    assert done.returncode == 2
    assert done.stderr.startswith("pyaccel: there is no file")


# --- killed ---


def test_killed_and_started_again(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    texts.write_text("\n".join(TEXTS * 400) + "\n")
    out, whole = tmp_path / "out.npy", tmp_path / "whole.npy"
    job = (texts, "--model", tiny_bert, "--window", 8)
    in_this_process(*job, "--out", whole)
    process = subprocess.Popen(
        command(*job, "--out", out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parts = tmp_path / "out.npy.parts"
    while len(list(parts.glob("*.npy"))) < 20:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(parts.glob("*.npy")))
    assert 20 <= kept < 250
    assert not out.exists()
    with pytest.raises(UserInputError) as other:
        in_this_process(*job, "--out", out, "--pooling", "cls")
    assert "parts made from other settings (pooling mean, now cls): use the same ones" in str(other.value)
    done = run(*job, "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"{2000 - 8 * kept} texts (of 2000" in done.stderr
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_stopped_before_or_after_any_step(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends at each rename, removal and write in turn, and one after it that doesn't: the same file."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    lines = [f"text {i}" for i in range(23)]
    embedded: list[str] = []

    def encode(out: Path, overwrite: bool = False) -> bool:
        job = Job(
            out, len(lines), Identity("texts", "text", "model", {}, window=4), Shard(), overwrite=overwrite
        )
        for index, window in job.todo(iter(lines)):
            embedded.extend(window)
            job.save(index, np.array([[float(t.split()[1]), len(t)] for t in window], np.float32))
        job.finish(iter(lines) if suffix == ".parquet" else None)
        return job.finished_before

    whole = tmp_path / f"whole{suffix}"
    encode(whole)
    assert embedded == lines
    steps = [(encode_job.os, "replace"), (encode_job.shutil, "rmtree"), (encode_job.os, "fsync")]
    originals = {(module, name): getattr(module, name) for module, name in steps}
    stops = 0
    for when in ("before", "after"):
        for stop in range(100):
            out = tmp_path / f"{when}-{stop}{suffix}"
            calls = iter(range(1000))

            def stopping(
                original: Any, calls: Iterator[int] = calls, stop: int = stop, when: str = when
            ) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    mine = next(calls) == stop
                    if mine and when == "before":
                        raise KeyboardInterrupt
                    result = original(*args, **kwargs)
                    if mine:
                        raise KeyboardInterrupt
                    return result

                return call

            for (module, name), original in originals.items():
                monkeypatch.setattr(module, name, stopping(original))
            embedded.clear()
            try:
                encode(out)
                stopped = False
            except KeyboardInterrupt:
                stopped = True
            monkeypatch.undo()
            if not stopped:
                break
            stops += 1
            done = out.exists() and not out.with_name(f"{out.name}.parts").exists()
            assert encode(out) is done
            assert out.read_bytes() == whole.read_bytes(), (when, stop)
            assert len(embedded) <= len(lines) + 4  # a window at most twice
            assert not out.with_name(f"{out.name}.parts").exists()
    assert stops > 30


def test_several_processes_share_the_work(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    out, alone = tmp_path / "out.npy", tmp_path / "alone.npy"
    job = (texts, "--model", tiny_bert, "--window", 8)
    in_this_process(*job, "--out", alone)
    processes = [
        subprocess.Popen(
            command(*job, "--out", out),
            env=environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert out.read_bytes() == alone.read_bytes()
    assert "52 texts (of 100" in said[0]
    assert "48 texts (of 100" in said[1]


def test_a_process_that_comes_when_all_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    identity = Identity("texts", "text", "model", {}, window=4)
    first = Job(out, 3, identity, Shard(0, 2))
    for index, window in first.todo(iter("abc")):
        first.save(index, np.zeros((len(window), 2), np.float32))
    first.finish()
    late = Job(out, 3, identity, Shard(1, 2))
    assert not late.texts_todo()
    assert not list(late.todo(iter("abc")))
    late.finish()
    assert np.load(out).shape == (3, 2)
    with pytest.raises(UserInputError, match="for one process"):
        Job(out, 3, identity, Shard(0, 2), overwrite=True)
    again = Job(out, 3, identity, Shard(), overwrite=True)
    assert again.texts_todo() == 3
