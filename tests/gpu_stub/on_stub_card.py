"""The path to the card with no card here: checks.py, each a test, in a process of its own.

Not named test_*.py: it runs where it is asked for. A user's machine may have no compiler, or a CUDA build of torch,
beside which the stub can't be; asked for there, it fails and says what is missing.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_stub.build import missing

FOLDER = Path(__file__).parent
# Not imported: torch, which this process has, can't take a card any more.
CHECKS = [
    node.name
    for node in ast.parse((FOLDER / "checks.py").read_text()).body
    if isinstance(node, ast.FunctionDef)
    and any(isinstance(d, ast.Name) and d.id == "check" for d in node.decorator_list)
]

pytestmark = pytest.mark.interpreter  # where there is a card, the same paths run on it


def run(folder: Path, *checks: str, cache: Path) -> dict[str, str]:
    """What each check said on the stub card: nothing, or its traceback."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_stub", str(folder), *checks],
        cwd=FOLDER.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.fixture(scope="session")
def said(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, str]:
    if reason := missing():
        pytest.fail(reason)
    kept = getattr(pytestconfig, "cache", None)  # not there under -p no:cacheprovider
    cache = kept.mkdir("gpu_stub_triton") if kept else tmp_path_factory.mktemp("cache")
    # One process for all the checks that this run has selected: importing takes longer than most of them.
    names = [item.name for item in request.session.items if item.path == Path(__file__)]
    wanted = [check for check in CHECKS if f"{test_on_a_card_that_is_not_there.__name__}[{check}]" in names]
    return run(tmp_path_factory.mktemp("libcuda"), *wanted, cache=cache)


@pytest.mark.parametrize("check", CHECKS)
def test_on_a_card_that_is_not_there(check: str, said: dict[str, str]) -> None:
    assert said[check] == ""


def test_the_checks_are_there() -> None:
    assert len(CHECKS) > 15
