"""A fork runs its tree's own modules, and whatever becomes of it, the next request is answered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.mutants.__main__ import ROOT

TESTS = """
import os, signal, sys, threading, time
import pyaccel

def test_own_modules(): assert pyaccel.WHERE == os.getcwd() and "triton" in sys.modules and "torch" in sys.modules
def test_fails(): assert pyaccel.WHERE == "elsewhere"
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def test_hangs(): time.sleep(600)
"""


def test_every_end_of_a_fork_is_an_answer(tmp_path: Path) -> None:
    plugin = tmp_path / "pyaccel" / "verify" / "pytest_plugin.py"  # pytest loads it by its entry point
    plugin.parent.mkdir(parents=True)
    plugin.touch()
    where = "import os\nWHERE = os.path.dirname(os.path.dirname(__file__))\n"
    (tmp_path / "pyaccel" / "__init__.py").write_text(where)
    (tmp_path / "test_it.py").write_text(TESTS)
    ends = {"test_own_modules": 0, "test_fails": 1, "test_crashes": -11, "test_hangs": None}

    def request(test: str) -> dict[str, Any]:
        # The one that hangs is ended soon; the others have as long as a busy machine takes.
        timeout = 5 if test == "test_hangs" else 300
        output = str(tmp_path / f"{test}.log")
        return {"tree": str(tmp_path), "tests": [f"test_it.py::{test}"], "timeout": timeout, "output": output}

    order = ["test_fails", "test_crashes", "test_hangs", "test_own_modules"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fork_server.py")],
        input="".join(json.dumps(request(test)) + "\n" for test in order),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line)["returncode"] for line in done.stdout.splitlines()]
    assert answers == [ends[test] for test in order], done.stderr
    assert "FAILED test_it.py::test_fails" in (tmp_path / "test_fails.log").read_text()


def test_a_tree_without_the_package_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_nothing(): pass\n")
    request = {
        "tree": str(tmp_path),
        "tests": ["test_it.py"],
        "timeout": 300,
        "output": str(tmp_path / "log"),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fork_server.py")],
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"returncode": 3}
    assert "would be imported from" in (tmp_path / "log").read_text()
