"""``python -m tests.peers``: peers' own tests on accelerated models, stock beside accelerated.

    python -m tests.peers --transformers CHECKOUT --accelerate CHECKOUT --peft CHECKOUT \
        --sentence-transformers CHECKOUT --pytorch CHECKOUT

Each suite runs twice, as it is and with a plugin: tests/hf/accelerate_everything.py, and for PyTorch's attention
tests/peers/replace_sdpa.py. A suite without a checkout is named and left out. PyTorch's OpInfo samples need none.
Checkouts should be of the versions that are installed. The exit code is 1 if a test passes with the stock models alone,
other than those of :data:`BY_DESIGN`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = (
    "albert", "bert", "bert_generation", "camembert", "data2vec", "distilbert", "electra", "ernie", "roberta",
    "roc_bert", "xlm_roberta",
)  # fmt: skip
# CONTRIBUTING.md says why.
BY_DESIGN = (
    "test_attention_outputs", "test_can_set_attention_dynamically", "test_sdpa_can_dispatch_non_composite_models",
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """A peer's tests: what pytest is given in the checkout, and the plugin of the second run."""

    tests: tuple[str, ...]
    plugin: str = "accelerate_everything"


SUITES = {
    "transformers": Suite(tuple(f"tests/models/{name}/test_modeling_{name}*.py" for name in FAMILIES)),
    "sentence-transformers": Suite(("tests",)),
    "accelerate": Suite(
        ("tests/test_accelerator.py", "tests/test_modeling_utils.py", "tests/test_hooks.py",
         "tests/test_big_modeling.py",
         "tests/test_state_checkpointing.py", "tests/test_utils.py", "tests/test_offload.py", "tests/test_optimizer.py",
         "tests/test_scheduler.py", "tests/test_grad_sync.py"),
    ),
    "peft": Suite(
        ("tests/test_custom_models.py", "tests/test_feature_extraction_models.py", "tests/test_tuners_utils.py"),
    ),
    "pytorch": Suite(
        ("test/test_transformers.py", "-k", "scaled_dot_product or sdp or attention"), "tests.peers.replace_sdpa"
    ),
}  # fmt: skip


def outcomes(
    checkout: Path, suite: Suite, chosen: Sequence[str], accelerated: bool, seconds: float
) -> dict[str, str]:
    """Each test's outcome, by its name; a run that is over ``seconds`` counts as far as it came."""
    tests = []
    for test in chosen or suite.tests:
        found = sorted(checkout.glob(test)) if "*" in test else []
        tests += [str(path.relative_to(checkout)) for path in found] or ([] if "*" in test else [test])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            "-o",
            "addopts=",
            f"--junitxml={report}",
        ]
        command += ["-p", suite.plugin] * accelerated + tests
        paths = [str(ROOT), str(ROOT / "tests" / "hf"), str(checkout), str(checkout / "src")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
            "TRITON_INTERPRET": "0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        }
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=log)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(2)  # pytest writes its report when it is interrupted
                process.wait()
                print(f"  ended after {seconds:.0f} s", flush=True)
            if not report.exists():
                log.seek(0)
                raise SystemExit(f"pytest wrote no report:\n{log.read()[-2000:]}")
        return read(report)


def read(report: Path) -> dict[str, str]:
    """Outcomes of a JUnit file: passed, failed, error or skipped, by class and name."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = {"failure": "failed"}.get(kinds[0], kinds[0]) if kinds else "passed"
    return found


def say(title: str, counts: Counter[str]) -> None:
    kinds = ("passed", "failed", "error", "skipped")
    print(
        f"  {title:<12}"
        + ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind] or kind == "passed"),
        flush=True,
    )


def compare(name: str, checkout: Path, chosen: Sequence[str], seconds: float) -> list[str]:
    """Run a suite twice and print both; the tests that pass with stock models alone."""
    print(f"{name} ({checkout})", flush=True)
    stock, ours = (outcomes(checkout, SUITES[name], chosen, on, seconds) for on in (False, True))
    say("stock", Counter(stock.values()))
    say("accelerated", Counter(ours.values()))
    both = stock.keys() & ours.keys()
    lost = sorted(test for test in both if stock[test] == "passed" and ours[test] in ("failed", "error"))
    won = sorted(test for test in both if stock[test] in ("failed", "error") and ours[test] == "passed")
    for test in lost:
        print(f"  stock alone: {test}" + (" (by design)" if by_design(test) else ""))
    for test in won:
        print(f"  accelerated alone: {test}")
    if missing := sorted(stock.keys() ^ ours.keys()):
        print(f"  in one run alone: {len(missing)}, such as {missing[:3]}")
    return [f"{name}: {test}" for test in lost if not by_design(test)]


def by_design(test: str) -> bool:
    return test.partition("::")[2].partition("[")[0] in BY_DESIGN


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name in SUITES:
        parser.add_argument(f"--{name}", type=Path, metavar="CHECKOUT", help=f"of {name}")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEST", help="what pytest is given, repeatable"
    )
    parser.add_argument("--seconds", type=float, default=7200.0, help="for one run of a suite")
    parser.add_argument("--no-opinfo", action="store_true", help="leave PyTorch's OpInfo samples out")
    options = parser.parse_args(arguments)
    lost = []
    if not options.no_opinfo:
        print("PyTorch's OpInfo samples", flush=True)
        try:
            from tests.peers import opinfo

            counts, wrong = opinfo.run()
        except ModuleNotFoundError as error:
            print(f"  not run: {error.name} is not installed (pip install {error.name})")
        else:
            for op, count in counts.items():
                say(op.rpartition(".")[2][:11], count)
            for line in wrong:
                print(f"  wrong: {line}")
            lost += wrong
    for name in SUITES:
        checkout = getattr(options, name.replace("-", "_"))
        if checkout is None or not checkout.is_dir():
            print(
                f"{name}: not run: "
                + ("no checkout was given" if checkout is None else f"no folder {checkout}")
            )
            continue
        lost += compare(name, checkout.resolve(), options.only, options.seconds)
    print(f"{len(lost)} tests pass with stock models alone" if lost else "accelerated as stock")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
