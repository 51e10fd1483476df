"""Whatever a command is given, and wherever it prints: one line and exit code 2, or the right result."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyaccel.cli import console
from pyaccel.errors import UserInputError
from tests.cli.conftest import Run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("the value\nof a object\n\nis .\n")
    return file


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


# --- encode ---


def test_encode_says_that_it_is_done_already(run: Run, tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.npy"
    job = ("encode", texts, "--model", tiny_bert, "--out", out, "--window", 3)
    assert run(*job).code == 0
    before = out.read_bytes()
    assert np.load(out).shape == (4, 32)
    done = run(*job)
    assert done.code == 0
    assert "finished before from the same texts, model and settings: there is nothing to do" in done.err
    assert out.read_bytes() == before
    assert "other settings (pooling mean, now cls)" in run(*job, "--pooling", "cls").line
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        line = run(*job).line
        assert "other settings (device " in line
        assert f", {threads} threads, now " in line
        assert f", {threads + 1} threads)" in line
    finally:
        torch.set_num_threads(threads)
    texts.write_text("the value\nof a object\n\nis .\nmore\n")
    assert "made from other texts" in run(*job).line
    assert out.read_bytes() == before


@pytest.mark.parametrize("when", ["loads", "runs"])
def test_encode_notices_that_the_texts_change(
    when: str, run: Run, tiny_bert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = sys.modules["pyaccel.cli.encode"]
    load = module._load

    def changing(*args: Any, **options: Any) -> Any:
        encoder = load(*args, **options)
        if when == "loads":
            texts.write_text("the value\n")
            return encoder
        encode = encoder.encode

        def encode_and_change(*args: Any, **options: Any) -> Any:
            found = encode(*args, **options)
            texts.write_text("the value\nof the objects\n\nis .\n")
            return found

        encoder.encode = encode_and_change
        return encoder

    monkeypatch.setattr(module, "_load", changing)
    done = run("encode", texts, "--model", tiny_bert, "--out", tmp_path / "o.npy", "--window", 2)
    assert done.code == 2
    assert "texts.txt was changed while it was read" in done.err
    assert not list(tmp_path.glob("o.npy"))
    assert not list(tmp_path.glob("o.npy.parts/*.npy"))


def test_encode_does_not_write_over_its_texts(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.npy"
    file.write_text("the value\n")
    for out in (file, tmp_path / "link.npy"):
        if out != file:
            out.symlink_to(file)
        job = ("encode", file, "--model", tiny_bert, "--out", out, "--overwrite")
        assert "is the file that the texts are in" in run(*job).line
    assert file.read_text() == "the value\n"


@pytest.mark.parametrize(
    "option",
    [
        ("--window", 0), ("--window", 10**20), ("--batch-tokens", -1), ("--batch-tokens", 10**30), ("--max-length", 2),
        ("--max-length", 10**6), ("--dtype", "int3"), ("--device", "tpu"), ("--pooling", "[red]"), ("--window", "x"),
        ("--nothing", 1),
    ],
)  # fmt: skip
def test_options_of_encode(
    option: tuple[object, ...], run: Run, tiny_bert: Path, texts: Path, tmp_path: Path
) -> None:
    assert run("encode", texts, "--model", tiny_bert, "--out", tmp_path / "o.npy", *option).line
    assert not (tmp_path / "o.npy").exists()
    assert not (tmp_path / "o.npy.parts").exists()


def test_paths_are_printed_literally(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    place = tmp_path / "[red]a[/red] :cat: \\[b"
    place.mkdir(parents=True)
    (place / "t.txt").write_text("the value\n")
    done = run("encode", place / "t.txt", "--model", tiny_bert, "--out", place / "o.npy")
    assert done.code == 0
    assert str(place / "o.npy") in done.err
    assert (
        str(place / "none")
        in run("encode", place / "none", "--model", tiny_bert, "--out", place / "o.npy").line
    )


# --- outputs are tried before anything is computed ---

OUTPUTS = {
    "demo": ("demo", "--rounds", 1, "--json"),
    "verify json": ("verify", "--json"),
    "verify junit": ("verify", "--junit"),
    "encode": ("encode", "texts.txt", "--model", "model", "--out"),
    "cost": ("cost", "--model", "minilm", "--plot"),
}


@pytest.mark.parametrize("command", OUTPUTS.values(), ids=OUTPUTS)
def test_a_file_that_can_not_be_written(
    command: tuple[object, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("something is computed before the output is tried")

    monkeypatch.setattr("pyaccel.checkpoints.load", never)
    monkeypatch.setattr("pyaccel.cost.model.bert_config", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("a\n")
    (tmp_path / "folder.npy").mkdir()
    assert "there is no folder" in run(*command, tmp_path / "none" / "o.npy").line
    assert "this is a folder" in run(*command, tmp_path / "folder.npy").line
    assert "there is no folder" in run(*command, tmp_path / "texts.txt" / "o.npy").line
    assert "File name too long" in run(*command, tmp_path / ("x" * 300 + ".npy")).line
    assert "can't be written" in run(*command, "/proc/o.npy").line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.npy", "texts.txt"]


@pytest.mark.parametrize("command", [("quantize", "model", "--out"), ("bench", "--out"), ("tune", "--out")])
def test_a_folder_that_can_not_be_written(
    command: tuple[str, ...],
    run: Run,
    tmp_path: Path,
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("something is computed before the output is tried")

    for compute in ("quantization.quantize", "benchmarks.run.run"):
        monkeypatch.setattr(f"pyaccel.{compute}", never)
    (tmp_path / "file").write_text("")
    arguments = [tiny_bert if word == "model" else word for word in command]
    names = ("file/deep", "file", "x" * 300, "none/" + "x" * 300)
    for out in (*(tmp_path / name for name in names), Path("/proc/deep/er")):
        assert str(out) in run(*arguments, out).line
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_figures_are_printed_before_they_are_written(
    run: Run, tiny_bert: Path, passages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    done = run("demo", "--model", tiny_bert, "--text", passages, "--rounds", 1, "--json", tmp_path / "f.json")
    assert "No space left on device" in done.line
    assert "within the numerics policy" in done.out


# --- models ---


@pytest.mark.parametrize("command", ["demo", "encode", "quantize", "verify", "cost"])
def test_a_model_that_can_not_be_loaded(
    command: str, run: Run, folder: Path, texts: Path, tmp_path: Path
) -> None:
    given = {
        "demo": ("--model", folder),
        "encode": (texts, "--model", folder, "--out", tmp_path / "o.npy"),
        "quantize": (folder, "--out", tmp_path / "int8"),
        "verify": (folder, "--no-compile"),
        "cost": ("--model", folder),
    }[command]
    config = (folder / "config.json").read_bytes()
    for content in (
        b"",
        b"{",
        b"[1]",
        b"\xff",
        b'{"model_type": "nothing"}',
        b'{"model_type": "bert", "hidden_size": "x"}',
    ):
        (folder / "config.json").write_bytes(content)
        assert str(folder) in run(command, *given).line
    (folder / "config.json").unlink()
    assert "config.json" in run(command, *given).line
    if command != "cost":
        (folder / "config.json").write_bytes(config)
        weights = (folder / "model.safetensors").read_bytes()
        for damaged in (b"", weights[: len(weights) // 2], b"\xff" * 64):
            (folder / "model.safetensors").write_bytes(damaged)
            assert str(folder) in run(command, *given).line
    assert not (tmp_path / "int8").exists()
    assert not (tmp_path / "o.npy").exists()


def test_quantize_writes_the_whole_folder_or_none(
    run: Run, folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(folder)
    for out in (
        folder / "int8",
        folder / "a" / "b",
        tmp_path / "link" / "int8",
        folder / ".." / "model" / "int8",
    ):
        assert "is inside" in run("quantize", folder, "--out", out).line
    assert "is inside" in run("quantize", tmp_path / "link", "--out", folder / "int8").line
    for out in (folder, tmp_path, tmp_path / "link"):
        assert "exists already" in run("quantize", folder, "--out", out).line
    (folder / "around").symlink_to(tmp_path)  # leads to where the copy is made
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:

        def full(*args: object, **options: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        assert (
            "No space left on device"
            in run("quantize", folder, "--out", tmp_path / "int8", "--text", texts).err
        )
    assert sorted(tmp_path.iterdir()) == before
    assert run("quantize", folder, "--out", tmp_path / "int8", "--text", texts).code == 0
    assert (tmp_path / "int8" / "tokenizer.json").is_file()
    assert not (tmp_path / "int8" / "around").exists()


# --- the terminal ---


def test_known_errors_are_lines_and_others_are_not() -> None:
    def raising(error: Exception) -> Callable[[], None]:
        def command() -> None:
            raise error

        return console.one_line(command)

    for error, words in (
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "closed before all of it was written"),
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes\nmore"),
            "not enough memory",
        ),
    ):
        with pytest.raises(UserInputError, match=words):
            raising(error)()
    for bug in (
        RuntimeError("shapes"),
        KeyError("a"),
        AssertionError(),
        ValueError("b"),
        ZeroDivisionError(),
    ):
        with pytest.raises(type(bug)):
            raising(bug)()


def test_an_interrupt_is_one_line_and_130(run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyaccel.checkpoints.load", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        done = run("demo")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (done.code, done.err) == (130, "pyaccel: interrupted\n")


class Closed(io.StringIO):
    """A pipe whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_closed_output_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for options in ((), ("--json",)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Closed())
            assert "closed" in run("cost", "--batch", 1, "--seq-len", 16, *options).err


@pytest.mark.parametrize(
    "options", [("--batch", 0), ("--batch", 10**25), ("--card", "[red]"), ("--dtype", "int1")]
)
def test_options_of_cost(options: tuple[object, ...], run: Run) -> None:
    pytest.importorskip("triton")
    assert run("cost", *options).line


def test_a_terminal_without_utf8(tmp_path: Path) -> None:
    """A process of its own: what can't be shown is escaped, help, errors and tables alike."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C", "NO_COLOR": "1", "PYTHONUTF8": "0"}
    environment.pop("HOME", None)
    code = (
        "import sys, pyaccel.cli as c\n"
        "def run(*a):\n"
        "    sys.argv = ['pyaccel', *a]\n"
        "    try: c.main()\n"
        "    except SystemExit as e: print(e.code)\n"
        "run('--help'); run('encode', '--help'); run('encode', 'naïve…', '--model', '─', '--out', 'o.npy')\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code],
        env=environment,
        capture_output=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.decode("ascii").splitlines() if line.isdigit()] == ["0", "0", "2"]
    assert done.stderr.decode("ascii").count("\n") == 1
    assert b"Traceback" not in done.stderr


def test_the_loader_runs_no_code_and_reads_no_pickle(
    run: Run, folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nclass Any: ...\nConfig = Model = Tokenizer = Any\n"
    for name in ("evil.py", "modeling.py", "tokenization.py", "__init__.py"):
        (folder / name).write_text(code)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    config = json.loads((folder / "config.json").read_text())
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    maps = {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
    }
    out = tmp_path / "o.npy"
    job = ("encode", texts, "--model", folder, "--out", out)
    for changed, words in (
        ({**config, "model_type": "evil", "auto_map": maps}, "code of its own"),
        ({**config, "attn_implementation": "evil/kernels"}, "code of the hub"),
    ):
        (folder / "config.json").write_text(json.dumps(changed))
        assert words in run(*job).line
        assert run("verify", folder, "--no-compile").line
        assert run("quantize", folder, "--out", tmp_path / "int8").line
    # A class that transformers has is loaded, and the folder's own is left alone.
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": maps, "architectures": ["Evil"]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "auto_map": maps}))
    (folder / "modules.json").write_text(json.dumps([{"type": "evil.Model", "path": ""}]))
    assert "its module Model in '' is not computed here" in run(*job).line
    (folder / "modules.json").write_text(json.dumps([{"type": "evil.Transformer", "path": ""}]))
    assert run(*job).code == 0
    assert not ran.exists()


@pytest.mark.parametrize("revision", ["--", "", "no-such-revision", "--output=x", "HEAD:README.md"])
def test_inspect_refuses_what_is_no_revision_before_it_compiles(run: Run, revision: str) -> None:
    assert f"{revision}^{{commit}}" in run("inspect", f"--diff={revision}").line
