"""``python -m tests.mutants``: plant each known bug in a copy of the tree and see whether the tests notice.

Only a failing test kills. A mutant that cannot be planted, or that merely breaks an import, is an error: it
would prove nothing.

The test that killed a mutant last time (``killers.json``, which ``--remember`` writes) is run first and alone; where it
doesn't kill, all of the family's tests are run, so that what is remembered saves time and decides nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests import mutants
from tests.mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
TREE = ("kernels", "pyaccel", "benchmarks", "tests", "pyproject.toml", "README.md")
WORKERS = 2
KILLERS = Path(__file__).with_name("killers.json")

# What pytest's -rfE prints for a failure; what cannot be collected has no "::test".
FAILED = re.compile(r"^(FAILED|ERROR) (.+?)(?: - (.*))?$", re.MULTILINE)
BROKEN = re.compile(r"\b(SyntaxError|IndentationError|ImportError|ModuleNotFoundError|NameError)\b")


@dataclass(frozen=True)
class Outcome:
    """What became of a tree.

    Attributes:
        verdict: "killed", "survived" or "error".
        by: the first test that failed, by pytest's name for it, or what is wrong.
        seconds: how long the tests ran.
    """

    verdict: str
    by: str
    seconds: float


def families() -> dict[str, list[Mutant]]:
    """Each family's mutants, from the MUTANTS of every module beside this one."""
    found = {}
    for module in pkgutil.iter_modules(mutants.__path__):
        if module.name != "__main__":
            found[module.name] = list(importlib.import_module(f"tests.mutants.{module.name}").MUTANTS)
    names = [mutant.name for family in found.values() for mutant in family]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise SystemExit(f"mutants of the same name: {', '.join(repeated)}")
    return found


def planted(mutant: Mutant, tree: Path) -> str:
    """The text of `mutant`'s file in `tree` with the bug; raises ValueError or SyntaxError where it doesn't fit."""
    mutated = mutant.apply((tree / mutant.file).read_text())
    if mutant.file.endswith(".py"):
        compile(mutated, mutant.file, "exec")
    return mutated


def fast_tests(family: str) -> list[str]:
    """What pytest is given to notice a family's bugs: its list's TESTS.

    Tests of launchers come first there: they have guard bands, so that a stray store fails a test before it corrupts
    the process elsewhere.
    """
    return list(importlib.import_module(f"tests.mutants.{family}").TESTS)


def copy_tree(destination: Path) -> None:
    """Copy what the tests need; pyaccel/kernels stays a link to kernels."""
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, destination / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, destination / name)


class Worker:
    """A process of tests/fork_server.py: pytest runs in forks of it, one at a time."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "",  # each writes into its own tree; see compiled()
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # torch may look for a GPU without making forks useless for it
            "COLUMNS": "500",  # pytest cuts what it says of a failure to the terminal's width
        }
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fork_server.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run_tests(self, tree: Path, tests: Sequence[str], timeout: float) -> Outcome:
        """Run `tests` in `tree` until the first failure."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        output = tree / "pytest.log"
        request = {"tree": str(tree), "tests": list(tests), "timeout": timeout, "output": str(output)}
        start = time.perf_counter()
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        seconds = time.perf_counter() - start
        if not answer:
            raise RuntimeError("tests/fork_server.py has ended; what it wrote above says why")
        returncode = json.loads(answer)["returncode"]
        if returncode is None:
            # A loop that no longer ends is noticed too.
            return Outcome("killed", f"no end within {timeout:.0f} s", seconds)
        return judge(returncode, output.read_text(errors="replace"), seconds)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def judge(returncode: int, output: str, seconds: float) -> Outcome:
    """Read pytest's verdict: a failing test kills, and so does memory so corrupted that the tests' process dies.

    Tests that can't be imported or run prove nothing. A test's own ERROR is a fixture that found something, such
    as a guard band that was written to.
    """
    if returncode == 0:
        return Outcome("survived", "", seconds)
    if returncode < 0:
        return Outcome("killed", f"a crash: {signal.Signals(-returncode).name}", seconds)
    failures = FAILED.findall(output)
    if not failures:
        return Outcome("error", f"pytest exited with {returncode}: {_last_line(output)}", seconds)
    _, where, message = failures[0]
    if returncode != 1 or "::" not in where or BROKEN.search(message):
        return Outcome("error", f"{where}: {message or 'not collected'}", seconds)
    return Outcome("killed", where, seconds)


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1] if lines else "no output"


def compiled(worker: Worker, tree: Path, tests: Sequence[str]) -> Outcome:
    """Collect `tests` in `tree`, so that its copies find bytecode; a planted file's time and size forbid its old one."""
    return worker.run_tests(tree, ["--collect-only", *tests], timeout=900.0)


def try_mutant(
    workers: SimpleQueue[Worker],
    base: Path,
    mutant: Mutant | None,
    tests: Sequence[str],
    timeout: float,
    killer: str | None = None,
) -> Outcome:
    """Have a free worker run `tests` in a copy of `base` with `mutant` planted; with None in a plain copy.

    `killer` is a test to run before them, which may be enough.
    """
    with tempfile.TemporaryDirectory(prefix="pyaccel-mutant-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(base, tree, symlinks=True)
        if mutant is not None:
            try:
                mutated = planted(mutant, tree)
            except (OSError, ValueError, SyntaxError) as error:
                return Outcome("error", f"can't be planted: {error}", 0.0)
            (tree / mutant.file).write_text(mutated)
        worker = workers.get()
        try:
            if killer is not None:
                outcome = worker.run_tests(tree, [killer], timeout)
                if outcome.verdict == "killed":
                    return outcome
            return worker.run_tests(tree, tests, timeout)
        finally:
            workers.put(worker)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if every mutant was killed, 1 if one survived or could not be planted."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the mutants and run nothing")
    parser.add_argument("--only", action="append", metavar="NAME", help="run this mutant alone; repeatable")
    parser.add_argument("--family", action="append", help="run this family's mutants alone; repeatable")
    parser.add_argument(
        "--tests-pass",
        action="store_true",
        help="believe that the tests pass on the tree as it is, as where they have just been run",
    )
    parser.add_argument("--remember", action="store_true", help=f"write {KILLERS.name} for the next run")
    parser.add_argument(
        "--timeout",
        type=float,
        help="seconds for one run; default: 60 and 5 times what the unmutated tree takes, 900 if that isn't known",
    )
    options = parser.parse_args(arguments)
    chosen = [(family, mutant) for family, listed in families().items() for mutant in listed]
    if options.family:
        chosen = [(family, mutant) for family, mutant in chosen if family in options.family]
    if options.only:
        unknown = sorted(set(options.only) - {mutant.name for _, mutant in chosen})
        if unknown:
            parser.error(f"no mutant is called {', '.join(unknown)}; --list names them")
        chosen = [(family, mutant) for family, mutant in chosen if mutant.name in options.only]
    console = Console()
    if not console.is_terminal:
        console.width = 180  # a log has no width to fit
    if not chosen:
        parser.error("there are no mutants to run")
    if options.list:
        for family, mutant in chosen:
            print(f"{family}: {mutant.name} ({mutant.file})")
        return 0

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    outcomes: dict[str, Outcome] = {}
    killers: dict[str, str] = json.loads(KILLERS.read_text()) if KILLERS.exists() else {}
    workers: SimpleQueue[Worker] = SimpleQueue()
    with (
        ExitStack() as stack,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        for _ in range(WORKERS):
            workers.put(worker := Worker())
            stack.callback(worker.close)
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyaccel-mutants-")))
        copy_tree(base)
        files = {
            killers.get(mutant.name, fast_tests(family)[0]).partition("::")[0] for family, mutant in chosen
        }
        collected = compiled(worker, base, sorted(files))
        if collected.verdict != "survived":
            console.print(f"The tests can't be collected without any mutant: {collected.by}", markup=False)
            return 1
        named = list(dict.fromkeys(family for family, _ in chosen))
        task = progress.add_task("the tree as it is", total=len(named))
        patience = options.timeout or 900.0
        healthy = {
            family: pool.submit(try_mutant, workers, base, None, fast_tests(family), patience)
            for family in named
            if not options.tests_pass
        }
        seconds: dict[str, float] = {}
        for family, future in healthy.items():
            outcome = future.result()
            if outcome.verdict != "survived":
                pool.shutdown(wait=False, cancel_futures=True)
                console.print(f"The tests of {family} fail without any mutant: {outcome.by}", markup=False)
                return 1
            seconds[family] = outcome.seconds
            progress.advance(task)
        progress.update(task, description="mutants", total=len(chosen), completed=0)
        # The longest first, so that no worker is left with a long one at the end.
        running = {
            pool.submit(
                try_mutant,
                workers,
                base,
                mutant,
                fast_tests(family),
                options.timeout or (60.0 + 5.0 * seconds[family] if seconds else patience),
                killers.get(mutant.name),
            ): mutant.name
            for family, mutant in sorted(chosen, key=lambda pair: -seconds.get(pair[0], 0.0))
        }
        for done in as_completed(running):
            outcomes[running[done]] = done.result()
            progress.advance(task)

    if options.remember:
        names = {mutant.name for listed in families().values() for mutant in listed}
        killers |= {n: o.by for n, o in outcomes.items() if o.verdict == "killed" and "::" in o.by}
        kept = {name: killers[name] for name in sorted(killers) if name in names}
        KILLERS.write_text(json.dumps(kept, indent=1) + "\n")
    console.print(_table(chosen, outcomes))
    alive = [name for name, outcome in outcomes.items() if outcome.verdict != "killed"]
    console.print(f"{len(outcomes) - len(alive)} of {len(outcomes)} mutants killed")
    return 1 if alive else 0


def _table(chosen: list[tuple[str, Mutant]], outcomes: dict[str, Outcome]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("family", "mutant", "verdict", "by"):
        table.add_column(heading, overflow="fold")
    table.add_column("seconds", justify="right")
    for family, mutant in chosen:
        outcome = outcomes[mutant.name]
        color = "green" if outcome.verdict == "killed" else "red"
        verdict = f"[{color}]{outcome.verdict}[/{color}]"
        _, _, test = outcome.by.partition("::")
        # Brackets of a parametrized test's name are no markup.
        by = (test or outcome.by).replace("[", r"\[")
        table.add_row(family, mutant.name, verdict, by, f"{outcome.seconds:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
