"""Every kernel with every option compiles with the oldest Triton that pyproject.toml allows.

pip installs that Triton into a folder of pytest's cache, and a process of its own imports it from there. The tests fail
where pip can't get it: no other test would notice what it can't compile. How far each is compiled:
:mod:`tests.machine_code.one_per_option`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyaccel.inspect.specs.registry import BUILDERS, specs
from tests import lane_constraints
from tests.machine_code.one_per_option import one_per_option

ROOT = Path(__file__).resolve().parents[2]
OLDEST = lane_constraints.oldest((ROOT / "pyproject.toml").read_text())["triton"]


@pytest.fixture(scope="session")
def environment(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that import the oldest Triton."""
    kept = getattr(pytestconfig, "cache", None)  # not there under -p no:cacheprovider
    cache = kept.mkdir("triton") if kept else tmp_path_factory.mktemp("triton")
    folder = cache / f"{OLDEST}-{sys.implementation.cache_tag}"
    if not (folder / "triton").exists():
        partial = tmp_path_factory.mktemp("pip")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "--quiet",
            "--no-deps",
        ]
        done = subprocess.run(
            [*command, "--target", str(partial), f"triton=={OLDEST}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"pip can't get triton {OLDEST}, the oldest of pyproject.toml:\n{done.stderr}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(partial, folder)
    return {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "TRITON_CACHE_DIR": str(cache / "compiled"),
    }


@pytest.fixture(scope="session")
def errors(environment: dict[str, str]) -> dict[str, dict[str, str]]:
    """op -> spec -> what the oldest Triton says of it, empty where it compiles."""
    command = [sys.executable, "-m", "tests.machine_code.one_per_option"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert (found["triton"] + ".").startswith(OLDEST + ".")
    return found["errors"]


@pytest.mark.parametrize("op", BUILDERS)
def test_every_kernel_compiles_with_every_option(op: str, errors: dict[str, dict[str, str]]) -> None:
    assert errors[op].keys() == {str(spec) for spec in one_per_option(op)}
    assert {spec: error for spec, error in errors[op].items() if error} == {}


def test_no_kernel_is_left_out() -> None:
    chosen = {spec.fn for op in BUILDERS for spec in one_per_option(op)}
    assert chosen == {spec.fn for spec in specs()}
