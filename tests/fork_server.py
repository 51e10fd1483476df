"""A process that has imported what is slow to import, and forks for every run of the tests.

``python tests/fork_server.py`` (a script, so that nothing of this tree is imported) reads one request a line
from its input, ``{"tree": ..., "tests": [...], "timeout": ..., "output": ...}``, runs pytest in a fork of itself with
its output in a file, and answers ``{"returncode": ...}``: negative for a signal, null where the timeout ended it.

A fork is as good as a fresh process because nothing has happened yet that one could inherit: only third-party modules
are imported, no thread has been started, no device touched.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

# Each takes a while to import, or is imported by one that does when the tests first use it.
PRELOADED = (
    "numpy",
    "pytest",
    "xdist.plugin",
    "torch",
    "torch._dynamo",
    "torch.testing._internal.optests",
    "triton",
    "transformers.models.bert.modeling_bert",
    "transformers.quantizers",
)
# Of the tree under test: a fork has to find its own.
OWN = ("kernels", "pyaccel", "benchmarks", "tests")

PYTEST = ("-x", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider")


def preload() -> None:
    """Import what all runs share. What is read at an import is set here as tests/conftest.py sets it."""
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")
    import torch

    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
    for name in PRELOADED:
        importlib.import_module(name)
    own = [name for name in sys.modules if name.partition(".")[0] in OWN]
    if own:
        raise SystemExit(f"modules of the tree were imported before any fork: {', '.join(own)}")
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise SystemExit(f"{threads - 1} threads were started before any fork, and a fork would lack them")


def run(tree: str, tests: Sequence[str], output: str) -> int:
    """In a fork: pytest in `tree`, whose modules come before any that are installed. Returns its exit code."""
    os.chdir(tree)
    os.environ["PYTHONPATH"] = tree  # of the processes that tests start
    sys.path.insert(0, tree)
    with open(os.devnull) as nothing, open(output, "w") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    spec = importlib.util.find_spec("pyaccel")
    if spec is None or not Path(spec.origin or "").is_relative_to(tree):
        print(f"pyaccel would be imported from {spec and spec.origin}, not from {tree}")
        return 3  # pytest's own code for an internal error
    import pytest

    return int(pytest.main([*PYTEST, *tests]))


def fork(tree: str, tests: Sequence[str], timeout: float, output: str) -> int | None:
    """The return code of a fork that runs `tests`, None if it had to be ended after `timeout` seconds."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.setsid()  # so that what the tests have started can be ended with them
            code = run(tree, tests, output)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # what the server does at its own exit is not for the fork
    ended = os.pidfd_open(child)
    try:
        in_time, _, _ = select.select([ended], [], [], timeout)
    finally:
        os.close(ended)
        os.killpg(child, signal.SIGKILL)  # it is there, if only as a zombie, until it is waited for
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if in_time else None


def main() -> None:
    preload()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps({"returncode": fork(**json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # a script's own folder
    main()
