"""``python -m pyaccel.benchmarks.figures``: the README's figures that are no table of `pyaccel bench`, measured anew.

Whole commands, as a user runs them, each in a process of its own: the demo, `pyaccel encode` beside
sentence-transformers' own `encode`, int8's accuracy, `pyaccel cost`. What they give goes to
``benchmarks/results/figures.json``, from which :mod:`pyaccel.benchmarks.readme` makes the README's tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import pydoc_data.topics
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyaccel.benchmarks.method import ROOT
from pyaccel.machine import provenance

FILE = ROOT / "benchmarks" / "results" / "figures.json"
Figures = dict[str, Any]


def pyaccel(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line; what it says goes through.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run([sys.executable, "-m", "pyaccel", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"pyaccel {' '.join(arguments)} failed with {done.returncode}:\n{done.stdout}")
    return done


def demo() -> Figures:
    """Speed and errors of `pyaccel demo`, by what it is asked for; torch.compile in the dtypes that it has."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demo.json"
        for name, options in {
            "fp32": ["--against-compile"],
            "bf16": ["--dtype", "bf16", "--against-compile"],
            "fp32, int8 encoder": ["--int8"],
        }.items():
            pyaccel("demo", "--json", str(file), *options)
            told = json.loads(file.read_text())
            stock = told["stock"]["ms_per_batch"]
            found[name] = {
                "speedup": told["speedup"],
                "compile": stock / told["compiled"]["ms_per_batch"] if "compiled" in told else None,
                "max_abs_error": told["max_abs_error"],
                "min_cosine": told["min_cosine"],
                "mean_cosine": told["mean_cosine"],
            }
    return found


def texts(count: int) -> list[str]:
    """Passages of 4 to 180 words, as sentences and paragraphs come: runs of Python's language reference."""
    topics = pydoc_data.topics.topics
    words = " ".join(topics[name] for name in sorted(topics)).split()
    draw = random.Random(0)
    found = []
    for _ in range(count):
        length = min(180, max(4, round(draw.lognormvariate(4.2, 0.6))))
        start = draw.randrange(len(words) - length)
        found.append(" ".join(itertools.islice(words, start, start + length)))
    return found


# Run in a process of its own: what the user of that library runs.
SENTENCE_TRANSFORMERS = """
import sys, time
import numpy
from sentence_transformers import SentenceTransformer
model, texts, out = sys.argv[1:]
model = SentenceTransformer(model, device="cpu")
passages = open(texts, encoding="utf-8").read().splitlines()
start = time.perf_counter()
numpy.save(out, model.encode(passages, batch_size=32, convert_to_numpy=True))
print(time.perf_counter() - start)
"""


def encode(passages: int) -> Figures:
    """Seconds for so many passages: sentence-transformers' `encode` without its start, ours with it; cosines."""
    import numpy

    from pyaccel.checkpoints import demo_checkpoint

    model = str(demo_checkpoint())
    found: Figures = {"passages": passages}
    with tempfile.TemporaryDirectory() as folder:
        file, expected = Path(folder) / "texts.txt", None
        file.write_text("\n".join(texts(passages)) + "\n", encoding="utf-8")
        if importlib.util.find_spec("sentence_transformers") is None:
            found["sentence-transformers"] = None
        else:
            out = Path(folder) / "expected.npy"
            command = [sys.executable, "-c", SENTENCE_TRANSFORMERS, model, str(file), str(out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found["sentence-transformers"] = float(done.stdout.split()[-1])
            expected = torch.from_numpy(numpy.load(out))
        for dtype in ("fp32", "bf16"):
            out = Path(folder) / f"{dtype}.npy"
            start = time.perf_counter()
            pyaccel("encode", str(file), "--model", model, "--out", str(out), "--dtype", dtype)
            found[dtype] = time.perf_counter() - start
            if expected is not None:
                given = torch.from_numpy(numpy.load(out))
                found[f"{dtype}_min_cosine"] = torch.cosine_similarity(given, expected).min().item()
    return found


def int8() -> Figures:
    """The cosine of sentence embeddings to fp32's, mean and smallest, by how the encoder was quantized."""
    from pyaccel.checkpoints import demo_checkpoint
    from pyaccel.encode.encoder import TextEncoder
    from pyaccel.encode.texts import real_passages
    from pyaccel.quantization import quantize

    def encoder() -> TextEncoder:
        return TextEncoder.from_pretrained(demo_checkpoint())

    stock = encoder()
    # One in five is for calibration alone.
    passages = real_passages(lambda lines: [len(ids) for ids in stock.tokenizer(lines)["input_ids"]], 320)
    sample = [passage for i, passage in enumerate(passages) if i % 5]
    seen = passages[::5]
    expected = stock.encode(sample)
    batches = [
        dict(stock.tokenizer(seen[i : i + 16], return_tensors="pt", padding=True, truncation=True))
        for i in range(0, len(seen), 16)
    ]
    found = {}
    variants: dict[str, dict[str, Any]] = {
        "weight only": {"method": "weight_only"},
        "dynamic": {},
        "dynamic, SmoothQuant (alpha 0.5, 64 passages)": {"smooth": True, "calibration": batches},
        "static, amax of 64 passages": {"method": "static", "calibration": batches},
        "static, percentile 99.99": {
            "method": "static",
            "calibration": batches,
            "observer": "percentile",
        },
    }
    for name, options in variants.items():
        one = encoder()
        quantize(one.model, progress=False, **options)
        cosines = torch.cosine_similarity(one.encode(sample), expected)
        found[name] = {"mean": cosines.mean().item(), "min": cosines.min().item()}
    return found


def cost() -> Figures:
    """What `pyaccel cost` counts for BERT-base, 32 x 512 in bf16: accelerated over stock."""
    found = {}
    size = ("--model", "bert-base", "--batch", "32", "--seq-len", "512")
    for name, options in {"full": [], "squad": ["--lengths", "squad"], "training": ["--training"]}.items():
        told = json.loads(pyaccel("cost", *size, "--json", *options).stdout)
        sides = ("stock", "accelerated")
        found[name] = {
            figure: [told[side][figure] for side in sides]
            for figure in ("launches", "flops", "bytes_moved", "bytes_saved")
        }
    return found


SECTIONS = ("demo", "encode", "int8", "cost")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser("pyaccel.benchmarks.figures", description=__doc__)
    parser.add_argument("part", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--passages", type=int, default=20_000, help="that are encoded")
    parser.add_argument("--file", type=Path, default=FILE)
    given = parser.parse_args(arguments)
    if unknown := set(given.part) - set(SECTIONS):
        parser.error(f"there is no {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    figures = json.loads(given.file.read_text(encoding="utf-8")) if given.file.exists() else {}
    where = {name: provenance(torch.device("cpu"))[name] for name in ("device", "torch", "commit", "date")}
    measured: dict[str, Callable[[], Figures]] = {
        "demo": demo,
        "encode": partial(encode, given.passages),
        "int8": int8,
        "cost": cost,
    }
    for name in given.part or SECTIONS:
        print(f"{name} ...", file=sys.stderr)
        figures[name] = {**where, "figures": measured[name]()}
        given.file.parent.mkdir(parents=True, exist_ok=True)
        given.file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
