"""The versions that a lane of `make` installs, as a pip constraints file: ``python tests/lane_constraints.py LANE``.

``oldest``: the least that pyproject.toml declares (``torch>=2.11`` becomes ``torch==2.11``). ``newest``:
constraints-newest.txt. Other packages stay as in constraints.txt. With ``--python``, checks that this interpreter fits
the lane. Needs nothing but the standard library of Python 3.10, because it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# transformers 5.17 and 5.23 accept no huggingface-hub in common, so pip chooses one.
UNPINNED = frozenset({"huggingface-hub"})
DECLARED = re.compile(r"""["']([A-Za-z0-9._-]+)>=([0-9.]+)\s*[;"']""")
PIN = re.compile(r"([A-Za-z0-9._-]+)==([^;\s]+)")


def oldest(pyproject: str) -> dict[str, str]:
    """The least version of each package that pyproject.toml's text declares one for."""
    least: dict[str, str] = {}
    for line in pyproject.splitlines():
        for name, version in DECLARED.findall(line.partition("#")[0]):
            if least.setdefault(name, version) != version:
                raise SystemExit(
                    f"pyproject.toml says both {name}>={least[name]} and {name}>={version}: make them equal"
                )
    return least


def oldest_python(pyproject: str) -> tuple[int, int]:
    """What pyproject.toml's text requires of Python."""
    found = re.search(r'^requires-python = ">=(\d+)\.(\d+)"$', pyproject, re.MULTILINE)
    if found is None:
        raise SystemExit('pyproject.toml: expected a line like requires-python = ">=3.10"')
    return int(found[1]), int(found[2])


def pins(constraints: str) -> dict[str, str]:
    """The packages that a constraints file's text pins, whatever their markers."""
    return {found[1]: found[2] for line in constraints.splitlines() if (found := PIN.match(line))}


def constraints(lane: str) -> str:
    """The lane's constraints file."""
    if lane == "oldest":
        versions = oldest((ROOT / "pyproject.toml").read_text())
    else:
        versions = pins((ROOT / "constraints-newest.txt").read_text())
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in tested if not pins(line).keys() & (versions.keys() | UNPINNED)]
    return "\n".join([*kept, *(f"{name}=={version}" for name, version in versions.items())])


def wrong_python(lane: str, version: tuple[int, int]) -> str | None:
    """Why Python of this version does not fit the lane; None if it does."""
    least = oldest_python((ROOT / "pyproject.toml").read_text())
    if lane == "oldest" and version != least:
        return f"the oldest lane needs Python {least[0]}.{least[1]}, and this is {version[0]}.{version[1]}"
    if lane == "newest" and version < (3, 12):  # numpy 2.5
        return f"the newest lane needs Python 3.12 or later, and this is {version[0]}.{version[1]}"
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("lane", choices=("oldest", "newest"))
    parser.add_argument("--python", action="store_true", help="check the interpreter, print nothing")
    options = parser.parse_args()
    if not options.python:
        print(constraints(options.lane))
    elif problem := wrong_python(options.lane, sys.version_info[:2]):
        raise SystemExit(problem)
