"""The lane of the command line: random arguments and damaged files, each run in a fork of this process."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import select
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import Tried
from tests.fuzz.draw import Draw

SECONDS = 90.0
WORDS = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "value", "of", "is", "##s", "object", ".",
)  # fmt: skip
NUMBERS = ("0", "-1", "1", "2", "3", "7", "16", "1.5", "nan", "inf", "1e400", "9" * 30, "x", "", "0x10", "٣")
SMALL = ("1", "2", "3", "7")
NAMES = ("fp32", "bf16", "fp16", "FP32", "float32", "int8", "", "[bold]", "fp32,bf16", "None")
REGEXES = ("", ".*", "(", "[", "nothing matches", "a{2,1}", "\\", "(?P<x>", "*")
# What main() may end with: 1 says that an answer was wrong or a kernel didn't compile, which these commands say.
MAY_FIND = ("demo", "inspect", "verify", "bench", "tune")


@dataclass(frozen=True)
class Ended:
    """What one run of the command line came to: the exit code (None if it had to be killed), and what it wrote."""

    code: int | None
    out: str
    err: str


@functools.cache
def folder() -> Path:
    """A tiny BERT with a tokenizer, and ``passages.txt``, made once a process."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)  # a fork has no threads but its own
    for name in (
        "pyaccel.cli",
        "pyaccel.hf.patching",
        "pyaccel.encode.encoder",
        "pyaccel.benchmarks.run",
        "safetensors.torch",
    ):
        importlib.import_module(name)
    path = Path(tempfile.mkdtemp(prefix="pyaccel-fuzz-"))
    model = path / "model"
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(vocab_file=str(model / "vocab.txt")).save_pretrained(model)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=24,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(model)
    (path / "passages.txt").write_text(
        "\n".join("the value of a object is . " * n for n in (1, 2, 1, 4)) + "\n"
    )
    owner = os.getpid()
    import atexit

    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(path, ignore_errors=True))
    return path


# --- files ---


def damaged(draw: Draw, data: bytes) -> bytes:
    """The same bytes with one piece cut, changed, doubled or put in."""
    at = draw.random.randrange(len(data) + 1)
    noise = draw.random.randbytes(draw.pick(1, 4, 40))
    return draw.pick(
        data[:at], data[:at] + noise + data[at:], data[:at] + noise + data[at + len(noise) :], b"", noise
    )


CONFIGS: tuple[tuple[str, object], ...] = (
    ("hidden_size", -8), ("hidden_size", 0), ("hidden_size", "8"), ("hidden_size", 9), ("num_attention_heads", 3),
    ("num_attention_heads", 0), ("model_type", "nonsense"), ("model_type", None), ("model_type", "gpt2"),
    ("vocab_size", 5), ("vocab_size", -1), ("vocab_size", 10**12), ("num_hidden_layers", 2),
    ("num_hidden_layers", -1), ("hidden_act", "nonsense"), ("hidden_act", None), ("max_position_embeddings", 0),
    ("max_position_embeddings", 3), ("architectures", "BertModel"), ("architectures", [3]), ("layer_norm_eps", "x"),
    ("layer_norm_eps", float("nan")), ("pad_token_id", 999), ("torch_dtype", "float7"), ("dtype", "float7"),
    ("quantization_config", {}), ("quantization_config", {"quant_method": "pyaccel_int8"}),
    ("auto_map", {"AutoModel": "m.M"}),
    ("is_decoder", True), ("type_vocab_size", 0), ("hidden_dropout_prob", 2), ("attn_implementation", "nonsense"),
)  # fmt: skip


def a_model(draw: Draw, work: Path) -> str:
    """A model's folder, more often than not with something wrong."""
    how = draw.pick(
        "good", "good", "missing", "file", "empty", "config", "config", "bytes", "bytes", "lost", "hub", "odd"
    )
    if how == "missing":
        return draw.pick(
            "no-such-folder", "", ".", "/", "a/b/c/d", "[red]x[/red]", "x" * 300, "../..", "~nobody", "\u00e9"
        )
    if how == "hub":
        return draw.pick("nobody/no-such-model", "bert-base-nonsense", "a b", "a/b/c")
    if how == "file":
        return "passages.txt"
    if how == "empty":
        (work / "empty").mkdir()
        return "empty"
    model = work / "model"
    shutil.copytree(folder() / "model", model)
    files = sorted(p for p in model.iterdir() if p.is_file())
    if how == "config":
        name, value = draw.pick(*CONFIGS)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {name: value}))
    elif how == "bytes":
        file = draw.pick(*files)
        file.write_bytes(damaged(draw, file.read_bytes()))
    elif how == "lost":
        draw.pick(*files).unlink()
    elif how == "odd":
        what = draw.pick("sentence-transformers", "pickled", "modules", "1_Pooling")
        if what == "pickled":
            import torch

            state = torch.nn.Linear(2, 2).state_dict()
            torch.save(state, model / "pytorch_model.bin")
            (model / "model.safetensors").unlink()
        else:
            (model / "1_Pooling").mkdir()
            (model / "1_Pooling" / "config.json").write_text(
                draw.pick("{}", "[]", "x", '{"pooling_mode_cls_token": 3}')
            )
            kinds = draw.pick("[]", "{}", '[{"path": "1_Pooling", "type": "x.Pooling"}]', "nonsense")
            (model / "modules.json").write_text(kinds)
    return "model"


def texts(draw: Draw, work: Path) -> str:
    """A file of texts, more often than not an odd one."""
    good = b"the value of a object .\nthe value\n\na\n"
    rows = b'{"text": "the value"}\n{"text": "a object"}\n'
    table = b'text,other\n"the value",1\n"a, object",2\n'
    kinds: dict[str, bytes] = {
        "good.txt": good,
        "empty.txt": b"",
        "newlines.txt": b"\n\n\n",
        "crlf.txt": good.replace(b"\n", b"\r\n"),
        "bom.txt": b"\xef\xbb\xbf" + good,
        "utf16.txt": good.decode().encode("utf-16"),
        "latin.txt": "caf\u00e9\n".encode("latin-1"),
        "nul.txt": b"the \x00 value\n\x00\n",
        "long.txt": b"value " * 5000 + b"\n",
        "random.txt": draw.random.randbytes(200),
        "good.jsonl": rows,
        "empty.jsonl": b"",
        "broken.jsonl": rows + b'{"text": "the',
        "list.jsonl": b"[1, 2]\n3\nnull\n",
        "number.jsonl": b'{"text": 3}\n{"text": null}\n{"text": ["a"]}\n',
        "surrogate.jsonl": b'{"text": "\\ud800"}\n',
        "column.jsonl": b'{"texts": "a"}\n',
        "deep.jsonl": b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}\n",
        "good.csv": table,
        "empty.csv": b"",
        "header.csv": b"text,other\n",
        "quotes.csv": b'text,other\n"the value,1\na,2\n',
        "ragged.csv": b"text,other\na\na,b,c,d\n",
        "nul.csv": b"text\n\x00\n",
        "field.csv": b"text\n" + b"a" * 200_000 + b"\n",
        "good.tsv": table.replace(b",", b"\t"),
        "noise.parquet": draw.random.randbytes(100),
        "empty.parquet": b"",
        "magic.parquet": b"PAR1" + struct.pack("<I", 5) + b"PAR1",
        "UPPER.JSONL": rows,
        "noext": good,
        "file.json": rows,
        "file.npy": b"\x93NUMPY" + bytes(20),
    }
    name = draw.pick(*kinds)
    data = kinds[name]
    if draw.chance(0.15):
        data = damaged(draw, data)
    (work / name).write_bytes(data)
    odd = draw.random.random()
    if odd < 0.05:
        return draw.pick("missing.txt", "", ".", "/dev/null", "model", "[b]x[/b].txt", "x" * 300 + ".txt")
    if odd < 0.08:
        (work / "folder.txt").mkdir()
        return "folder.txt"
    return name


def output(draw: Draw, work: Path, *endings: str) -> str:
    """Where to write to."""
    ending = draw.pick(*endings) if draw.chance(0.85) else draw.pick(".txt", "", ".NPY", ".json")
    how = draw.random.random()
    if how < 0.6:
        return f"out{ending}"
    if how < 0.7:
        (work / f"there{ending}").write_bytes(draw.pick(b"", b"old", b"\x93NUMPY"))
        return f"there{ending}"
    if how < 0.75:
        (work / f"folder{ending}").mkdir(exist_ok=True)
        return f"folder{ending}"
    return draw.pick(
        f"no/such/folder/out{ending}", f"passages.txt/out{ending}", "/dev/full", f"/proc/out{ending}", "",
        f"[red]out[/red]{ending}", "x" * 300 + ending, f"\u00e9\u4e2d{ending}", f"./a/../out{ending}",
        "passages.txt", "model",
    )  # fmt: skip


# --- commands ---


def some(draw: Draw, p: float, *arguments: str) -> list[str]:
    return list(arguments) if draw.chance(p) else []


def number(draw: Draw) -> str:
    return draw.pick(*SMALL) if draw.chance(0.7) else draw.pick(*NUMBERS)


def name_of(draw: Draw, *good: str) -> str:
    return draw.pick(*good) if draw.chance(0.75) else draw.pick(*NAMES)


def device(draw: Draw) -> list[str]:
    return some(
        draw, 0.15, "--device", draw.pick("cpu", "auto", "cuda", "cuda:99", "tpu", "", "cpu:0", "meta", "mps")
    )


def encode(draw: Draw, work: Path) -> list[str]:
    return [
        "encode", texts(draw, work),
        *some(draw, 0.95, "--model", a_model(draw, work)),
        *some(draw, 0.95, "--out", output(draw, work, ".npy", ".parquet")),
        *some(draw, 0.15, "--column", draw.pick("text", "other", "texts", "", "[b]")),
        *some(draw, 0.2, "--pooling", draw.pick("mean", "cls", "max", "")),
        *some(draw, 0.2, draw.pick("--normalize", "--no-normalize")),
        *some(draw, 0.2, "--max-length", number(draw)),
        *some(draw, 0.2, "--batch-tokens", number(draw)),
        *some(draw, 0.2, "--dtype", name_of(draw, "fp32", "bf16")),
        *some(draw, 0.1, "--int8"), *some(draw, 0.15, "--keep-text"),
        *some(draw, 0.3, "--window", number(draw)), *some(draw, 0.2, "--overwrite"), *device(draw),
    ]  # fmt: skip


def quantize(draw: Draw, work: Path) -> list[str]:
    return [
        "quantize", a_model(draw, work),
        *some(draw, 0.95, "--out", output(draw, work, "", "-int8")),
        *some(draw, 0.9, "--text", texts(draw, work) if draw.chance(0.4) else "passages.txt"),
        *some(draw, 0.3, "--method", draw.pick("dynamic", "static", "weight_only", "int4", "")),
        *some(draw, 0.2, "--smooth"), *some(draw, 0.2, "--skip", draw.pick("*", "*.dense", "nothing", "[", "")),
        *some(draw, 0.15, "--leave", number(draw)), *some(draw, 0.15, "--leave-mb", draw.pick("0", "0.001", *NUMBERS)),
        *some(draw, 0.1, "--sensitivity"),
    ]  # fmt: skip


def demo(draw: Draw, work: Path) -> list[str]:
    return [
        "demo", "--model", a_model(draw, work), "--text", texts(draw, work) if draw.chance(0.5) else "passages.txt",
        "--rounds", "1" if draw.chance(0.8) else draw.pick("0", "x", "-3", ""),
        *some(draw, 0.3, "--dtype", name_of(draw, "fp32", "bf16")), *some(draw, 0.15, "--int8"),
        *some(draw, 0.3, "--batch-size", number(draw)), *some(draw, 0.3, "--json", output(draw, work, ".json")),
        *device(draw),
    ]  # fmt: skip


def verify(draw: Draw, work: Path) -> list[str]:
    budget = draw.pick("passages.txt", "missing.json", "", "budget.json")
    (work / "budget.json").write_text(draw.pick("{}", "[]", "[1]", '[{"name": 3}]', "null", '{"checks": 3}'))
    return [
        "verify", a_model(draw, work), "--no-ops", "--no-compile",
        "--backend", name_of(draw, "torch", "torch", "reference"),
        "--dtype", name_of(draw, "fp32"), "--text", texts(draw, work) if draw.chance(0.5) else "passages.txt",
        "--batch-size", draw.pick("1", "2") if draw.chance(0.8) else draw.pick(*NUMBERS),
        *some(draw, 0.2, "--max-length", draw.pick("3", "5", "20", *NUMBERS)),
        *some(draw, 0.2, "--json", output(draw, work, ".json")),
        *some(draw, 0.2, "--junit", output(draw, work, ".xml")),
        *some(draw, 0.2, "--budget", budget), *device(draw),
    ]  # fmt: skip


def inspect(draw: Draw, work: Path) -> list[str]:
    """Never one that compiles: that takes seconds, and other tests compile every kernel."""
    return ["inspect", *draw.pick(
        ["--op", draw.pick("nonsense", "", "[b]")], ["--arch", draw.pick("sm_1", "", "gfx0", "sm_90a")],
        ["--dtype", draw.pick("fp7", "", "[b]")], ["--workers", draw.pick("0", "-1", "x")],
        ["--name", draw.pick("nothing matches this", "(", "*", "[")], ["--diff", draw.pick("no-such-rev", "", "--")],
        ["--sass", "--ptx", "--json", "--name", "nothing matches this"], ["extra"], ["--unknown"],
    )]  # fmt: skip


def cost(draw: Draw, work: Path) -> list[str]:
    if draw.chance(0.5):
        return [
            "cost", "--model", "model" if draw.chance(0.3) else a_model(draw, work),
            *some(draw, 0.5, "--batch", number(draw)), *some(draw, 0.7, "--seq-len", number(draw)),
            *some(draw, 0.3, "--lengths", draw.pick("full", "squad", "sentences", "x", "")),
            *some(draw, 0.2, "--training"), *some(draw, 0.3, "--backend", draw.pick("auto", "torch", "reference", "x")),
            *some(draw, 0.2, "--by-op"), *some(draw, 0.2, "--json"),
            *some(draw, 0.2, "--plot", output(draw, work, ".svg", ".png")),
        ]  # fmt: skip
    return [
        "cost", *some(draw, 0.3, "--batch", number(draw)), *some(draw, 0.3, "--seq-len", number(draw)),
        "--hidden-size", draw.pick("16", "24") if draw.chance(0.7) else draw.pick(*NUMBERS),
        "--num-attention-heads", draw.pick("1", "2") if draw.chance(0.7) else draw.pick(*NUMBERS),
        "--intermediate-size", draw.pick("8", "24") if draw.chance(0.7) else draw.pick(*NUMBERS),
        *some(draw, 0.3, "--dtype", name_of(draw, "fp32", "bf16")),
        *some(draw, 0.2, "--card", draw.pick("A100", "H100", "h200", "B200", "")), *some(draw, 0.3, "--json"),
    ]  # fmt: skip


def bench(draw: Draw, work: Path) -> list[str]:
    how = draw.pick("list", "compare", "nothing", "odd")
    if how == "list":
        return ["bench", "--list", *some(draw, 0.5, draw.pick("ops", "layers", "nonsense", "")),
                *some(draw, 0.3, "--sizes", draw.pick(*REGEXES)),
                *some(draw, 0.3, "--dtype", name_of(draw, "fp32"))]  # fmt: skip
    if how == "compare":
        names = []
        for name in ("before.csv", "after.csv"):
            content = draw.pick(
                b"", b"a,b\n1,2\n", draw.random.randbytes(60), b"case,size\n", b'"', b"\xff\xfe"
            )
            (work / name).write_bytes(content)
            names.append(name if draw.chance(0.8) else draw.pick("missing.csv", "model", ".", ""))
        return ["bench", "--compare", *names, *some(draw, 0.4, "--fail-if-slower", draw.pick(*NUMBERS))]
    if how == "nothing":
        return ["bench", draw.pick("ops", "layers", "models", "train"), "--quick", "--sizes", "nothing matches this",
                "--out", output(draw, work, "")]  # fmt: skip
    return ["bench", *draw.pick(["nonsense"], ["--rounds", "0"], ["--dtype", "fp7"], ["--against", "("],
                                ["--sizes", "["],
                                ["--device", "tpu"], ["--compare", "one.csv"], ["--fail-if-slower", "-1"])]  # fmt: skip


def tune(draw: Draw, work: Path) -> list[str]:
    """Never one that measures: that takes minutes."""
    return ["tune", *draw.pick(
        ["nonsense"], ["launch_nonsense"], [""], ["--dtype", "fp7"], ["--rounds", "0"], ["--device", "tpu"],
        ["--device", "cuda"], ["--rounds", "x"], ["--unknown"],
        ["launch_residual_layernorm_forward", "--device", "cpu"],
    ), *some(draw, 0.5, "--out", output(draw, work, ""))]  # fmt: skip


def nothing(draw: Draw, work: Path) -> list[str]:
    return draw.pick(
        [],
        ["--help"],
        ["nonsense"],
        ["--version"],
        [""],
        ["encode"],
        ["encode", "--help"],
        ["-x"],
    )


COMMANDS: tuple[Callable[[Draw, Path], list[str]], ...] = (
    encode, encode, encode, encode, quantize, quantize, demo, demo, verify, inspect, cost, bench, tune, nothing,
)  # fmt: skip


def try_case(seed: int, number: int) -> Tried:
    draw = Draw("cli", seed, number)
    with tempfile.TemporaryDirectory(prefix="pyaccel-fuzz-") as path:
        work = Path(path) / "work"
        work.mkdir()
        shutil.copy2(folder() / "passages.txt", work)
        arguments = draw.pick(*COMMANDS)(draw, work)
        if draw.chance(0.04):
            arguments.insert(
                draw.random.randrange(len(arguments) + 1), draw.pick("--nonsense", "-q", "\udc80")
            )
        environment = {
            "COLUMNS": draw.pick("80", "200", "40"),
            "NO_COLOR": draw.pick("", "1"),
            "TERM": draw.pick("dumb", "xterm-256color"),
            "TMPDIR": str(Path(path) / "tmp"),
            "HOME": draw.pick(str(Path(path) / "home"), "/nonexistent"),
        }
        (Path(path) / "tmp").mkdir()
        encoding = draw.pick("utf-8", "utf-8", "utf-8", "ascii", "latin-1")
        interrupt = draw.random.uniform(0.0, 1.5) if draw.chance(0.06) else None
        before = contents(work)
        ended = run(arguments, work, environment, encoding, interrupt)
        after = contents(work)
        tried = Tried(f"pyaccel {' '.join(map(repr, arguments))}", 1)
        tried.wrong += ended_wrong(arguments, ended, interrupt)
        tried.wrong += files_wrong(arguments, ended, interrupt, before, after)
        if left := sorted(p.name for p in (Path(path) / "tmp").iterdir()):
            tried.wrong.append(f"left in TMPDIR: {left[:5]}")
    return tried


def contents(work: Path) -> dict[str, str]:
    """Every file's digest, by its path."""
    return {
        str(p.relative_to(work)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(work.rglob("*"))
    }


def run(
    arguments: list[str],
    work: Path,
    environment: dict[str, str],
    encoding: str,
    interrupt: float | None = None,
) -> Ended:
    """``pyaccel.cli.main()`` in a fork of this process, its terminal's text in that encoding."""
    folder()
    logs = [work.parent / "out.log", work.parent / "err.log"]
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            os.chdir(work)
            os.environ.update(environment, HF_HUB_OFFLINE="1", TRITON_INTERPRET="0")
            with open(os.devnull) as empty:
                os.dup2(empty.fileno(), 0)
            for number, log in zip((1, 2), logs, strict=True):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout = open(1, "w", encoding=encoding, errors="strict", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
            tempfile.tempdir = environment["TMPDIR"]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["pyaccel", *arguments]
            from pyaccel.cli import main

            try:
                code = main() or 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    ended = os.pidfd_open(child)
    try:
        if interrupt is not None and not select.select([ended], [], [], interrupt)[0]:
            os.kill(child, signal.SIGINT)
        in_time = bool(select.select([ended], [], [], SECONDS)[0])
    finally:
        os.close(ended)
        os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    out, err = (log.read_bytes().decode("utf-8", "replace") for log in logs)
    return Ended(os.waitstatus_to_exitcode(status) if in_time else None, out, err)


def ended_wrong(arguments: list[str], ended: Ended, interrupt: float | None) -> list[str]:
    """An exit code of 0, 1, 2 or 130, no traceback, and of bad input one line that says what it was."""
    command = arguments[0] if arguments else ""
    if ended.code is None:
        return [f"no end within {SECONDS:.0f} s; it said {ended.err[-200:]!r}"]
    found = []
    if "Traceback (most recent call last)" in ended.err + ended.out:
        found.append(f"a traceback: {ended.err.strip().splitlines()[-1][:250]}")
    elif ended.code not in (0, 1, 2, 130):
        found.append(f"exit code {ended.code}: {ended.err[-250:]!r}")
    elif ended.code == 1 and command not in MAY_FIND:
        found.append(f"exit code 1: {ended.err[-250:]!r}")
    elif ended.code == 130 and interrupt is None:
        found.append("exit code 130, and nothing interrupted it")
    elif ended.code == 2:
        lines = [
            line for line in ended.err.splitlines() if line.startswith(("pyaccel: ", "pyaccel inspect: "))
        ]
        squeezed = "".join((ended.err + ended.out).split())  # a terminal may be one column wide
        usage = "Usage:" in squeezed or "Invalidvalue" in squeezed or "requires" in squeezed
        if len(lines) != 1 and not usage:
            found.append(f"exit code 2 with {len(lines)} lines of error: {ended.err[-300:]!r}")
        elif lines and len(lines[0]) < 25:
            found.append(f"an error that says nothing: {lines[0]!r}")
    return found


def files_wrong(
    arguments: list[str], ended: Ended, interrupt: float | None, before: dict[str, str], after: dict[str, str]
) -> list[str]:
    """Inputs are as they were, and a command that refused its input wrote nothing."""
    written = {
        arguments[i + 1]
        for i, a in enumerate(arguments[:-1])
        if a in ("--out", "--json", "--junit", "--plot")
    }
    changed = [
        p for p in before if after.get(p) != before[p] and not any(Path(p) == Path(w) for w in written if w)
    ]
    found = [f"changed {changed[:3]}"] if changed else []
    new = sorted(set(after) - set(before))
    if ended.code == 2 and new and interrupt is None:
        found.append(f"left behind {new[:4]} with exit code 2: {ended.err.strip()[-150:]!r}")
    return found
