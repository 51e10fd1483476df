"""What the lanes of versions install: tests/lane_constraints.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import lane_constraints

ROOT = Path(__file__).resolve().parents[1]
DECLARED = lane_constraints.oldest((ROOT / "pyproject.toml").read_text())


def test_every_requirement_of_the_base_has_a_least_version():
    assert {"torch", "numpy", "safetensors", "typer", "rich", "triton", "transformers"} <= DECLARED.keys()


def test_the_oldest_lane_runs_what_is_declared():
    pins = lane_constraints.pins(lane_constraints.constraints("oldest"))
    assert {name: pins[name] for name in DECLARED} == DECLARED


def test_the_newest_lane_is_newer_than_what_everything_else_is_tested_with():
    tested = lane_constraints.pins((ROOT / "constraints.txt").read_text())
    newest = lane_constraints.pins((ROOT / "constraints-newest.txt").read_text())
    pins = lane_constraints.pins(lane_constraints.constraints("newest"))
    assert {name: pins[name] for name in newest} == newest
    assert {"torch", "triton", "transformers", "numpy"} <= newest.keys() <= tested.keys()


@pytest.mark.parametrize("lane", ["oldest", "newest"])
def test_a_lane_pins_each_package_once_and_keeps_what_it_does_not_change(lane: str):
    lines = lane_constraints.constraints(lane).splitlines()
    changed = (
        DECLARED if lane == "oldest" else lane_constraints.pins((ROOT / "constraints-newest.txt").read_text())
    )
    for name in changed:
        assert sum(bool(lane_constraints.pins(line).keys() & {name}) for line in lines) == 1
    assert not lane_constraints.pins("\n".join(lines)).keys() & lane_constraints.UNPINNED
    kept = (ROOT / "constraints.txt").read_text().splitlines()
    assert {line for line in kept if line.startswith(("pytest==", "tokenizers==", "peft=="))} <= set(lines)


def test_markers_extras_and_comments_are_read():
    text = (
        '"torch>=2.11",  # not "numpy>=9"\ntriton = [\'triton>=3.6; sys_platform == "linux"\']\n"kernels==1"'
    )
    assert lane_constraints.oldest(text) == {"torch": "2.11", "triton": "3.6"}


def test_two_least_versions_of_one_package_are_refused():
    with pytest.raises(SystemExit, match=r"both torch>=2\.11 and torch>=2\.12"):
        lane_constraints.oldest('"torch>=2.11",\n"torch>=2.12",')


@pytest.mark.parametrize(
    ("lane", "version", "fits"),
    [
        ("oldest", (3, 10), True),
        ("oldest", (3, 11), False),
        ("newest", (3, 11), False),
        ("newest", (3, 12), True),
        ("newest", (3, 14), True),
    ],
)
def test_the_interpreter_of_a_lane(lane: str, version: tuple[int, int], fits: bool):
    assert (lane_constraints.wrong_python(lane, version) is None) == fits


def test_it_is_a_script_of_the_standard_library():
    script = ROOT / "tests" / "lane_constraints.py"
    result = subprocess.run(
        [sys.executable, "-S", "-I", script, "oldest"], capture_output=True, text=True, check=True
    )
    assert f"torch=={DECLARED['torch']}" in result.stdout.splitlines()
    refused = subprocess.run([sys.executable, "-S", "-I", script, "next"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "invalid choice: 'next'" in refused.stderr


def test_python_versions_are_declared_as_the_makefile_accepts_them():
    text = (ROOT / "pyproject.toml").read_text()
    declared = [minor for minor in range(30) if f'"Programming Language :: Python :: 3.{minor}"' in text]
    assert declared == [10, 11, 12, 13, 14]
    least, makefile = lane_constraints.oldest_python(text), (ROOT / "Makefile").read_text()
    assert least == (3, declared[0])
    assert f"(3, {declared[0]}) <= sys.version_info[:2] <= (3, {declared[-1]})" in makefile
    assert f"PYTHONS       ?= python3.{declared[0]} python3.{declared[-1]}\n" in makefile
