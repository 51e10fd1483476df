"""The layout that lets kernels/ be imported as pyaccel.kernels, beside Hugging Face's `kernels`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def git(*args: str | Path, cwd: Path = ROOT) -> str:
    # GIT_DIR and its like are set while a git hook runs, and would lead to the wrong repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", *map(str, args)], cwd=cwd, env=env, check=True, capture_output=True, text=True
    ).stdout


# --- the link -----------------------------------------------------------------------------------------------


def test_kernels_is_no_package():
    assert not list((ROOT / "kernels").rglob("__init__.py"))


@pytest.mark.parametrize("folder", ["kernels", "benchmarks"])
def test_link(folder: str):
    link = ROOT / "pyaccel" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    assert link.resolve() == ROOT / folder


def test_git_keeps_the_link(tmp_path: Path):
    """Added to a fresh repository and checked out somewhere else, it still is a link to the kernels."""
    # A repository of its own: what is staged in the user's is not looked at, nor changed.
    git("init", "--quiet", tmp_path / "repository")
    repository = ("--git-dir", tmp_path / "repository" / ".git", "--work-tree", ROOT)
    git(*repository, "add", "pyaccel/kernels", "kernels")
    listed = git(*repository, "ls-files", "--stage", "pyaccel/kernels").split()
    assert listed[0] == "120000"
    assert listed[3] == "pyaccel/kernels"
    git(*repository, "checkout-index", "--all", f"--prefix={tmp_path}/copy/")
    assert os.readlink(tmp_path / "copy" / "pyaccel" / "kernels") == "../kernels"
    assert (tmp_path / "copy" / "pyaccel" / "kernels" / "layernorm" / "forward.py").is_file()


def test_nothing_is_imported_as_kernels():
    """Importing every kernel file from the root loads each once, under its one name."""
    names = [
        ".".join(["pyaccel", *path.relative_to(ROOT).with_suffix("").parts])
        for path in sorted((ROOT / "kernels").rglob("*.py"))
    ]
    code = (
        f"import importlib, sys\n"
        f"for name in {names}:\n"
        f"    importlib.import_module(name)\n"
        f"print([name for name in sys.modules if name.split('.')[0] == 'kernels'])\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert loaded == "[]\n"


# --- the tree -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "pyproject.toml",
        "setup.py",
        "constraints.txt",
        "constraints-newest.txt",
        "Makefile",
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "LICENSE",
        ".ci/run",
        ".pre-commit-config.yaml",
        "kernels/common/configs.py",
        "kernels/common/philox.py",
        "kernels/layernorm/forward.py",
        "pyaccel/__init__.py",
        "pyaccel/__main__.py",
        "pyaccel/py.typed",
        "pyaccel/reference/__init__.py",
        "pyaccel/ops/__init__.py",
        "pyaccel/dispatch.py",
        "pyaccel/nn/__init__.py",
        "pyaccel/packing.py",
        "pyaccel/models/bert.py",
        "pyaccel/hf/__init__.py",
        "pyaccel/inspect/compile.py",
        "pyaccel/cli/__init__.py",
        "tests/assertions.py",
    ],
)
def test_tree(path: str):
    assert (ROOT / path).is_file()


def test_ci_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# --- the house rules of .pre-commit-config.yaml -------------------------------------------------------------

HOOKS = {
    hook["id"]: hook
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repo["hooks"]
    if hook["language"] == "pygrep"
}
BROKEN = {
    "no-run-time-tuning": [
        "@triton.autotune(configs=[], key=[])",
        "@triton.heuristics({})",
        "@autotune([])",
        "from triton import Config, autotune",
        "kernel = triton.autotune([], [])(kernel)",
    ],
    "no-block-pointers": ["p = tl.make_block_ptr(x, (M, N), (N, 1), (0, 0), (16, 16), (1, 0))"],
    "import-name-of-kernels": ["import kernels", "    import kernels.philox", "from kernels import philox"],
}


@pytest.mark.parametrize("hook", HOOKS)
def test_house_rule_holds(hook: str):
    files, exclude = HOOKS[hook]["files"], HOOKS[hook].get("exclude", "^$")
    checked = []
    for folder in ("kernels", "pyaccel", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if re.search(files, name) and not re.search(exclude, name):
                checked.append(name)
                found = re.search(HOOKS[hook]["entry"], path.read_text(), re.MULTILINE)
                assert not found, f"{name}: {found[0].strip()!r}: {HOOKS[hook]['name']}"
    assert "kernels/layernorm/forward.py" in checked


@pytest.mark.parametrize(("hook", "line"), [(hook, line) for hook, lines in BROKEN.items() for line in lines])
def test_house_rule_bites(hook: str, line: str):
    assert re.search(HOOKS[hook]["entry"], line)


@pytest.mark.parametrize(
    "line", ["from pyaccel.kernels import philox", "import pyaccel.kernels", "import kernels_x"]
)
def test_house_rule_lets_the_right_name_pass(line: str):
    assert not re.search(HOOKS["import-name-of-kernels"]["entry"], line)


def test_every_house_rule_is_proved():
    assert set(BROKEN) == set(HOOKS)
