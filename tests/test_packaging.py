"""What a user gets: wheel and sdist, built offline from a copy of the tree, and the wheel installed."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pyaccel

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "kernels").rglob("*")
    if path.suffix in (".py", ".json")
}
BENCHMARKS = {path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("*.py")}
PYACCEL = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "pyaccel").rglob("*.py")
    if not {"kernels", "benchmarks"} & set(path.relative_to(ROOT).parts)
}
EXPECTED = {f"pyaccel/{name}" for name in KERNELS | BENCHMARKS} | PYACCEL | {"pyaccel/py.typed"}


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git holds of the project, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("kernels", "pyaccel", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """The wheel built straight from the tree."""
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", "wheel", cwd=tree)
    return next((tree / "wheel").glob("*.whl"))


@pytest.fixture(scope="module")
def dist(tree: Path) -> Path:
    """A folder with the sdist, and the wheel built from that sdist."""
    run("-m", "build", "--no-isolation", "--outdir", "dist", cwd=tree)
    return tree / "dist"


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path):
    assert wheel.name == f"pyaccel_bert-{pyaccel.__version__}-py3-none-any.whl"
    assert files_of(wheel) == EXPECTED


def test_wheel_holds_what_is_linked_as_real_files(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        for name in KERNELS | BENCHMARKS:
            assert archive.read(f"pyaccel/{name}") == (ROOT / name).read_bytes()


def test_sdist(dist: Path):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert EXPECTED | {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= set(members)
    assert all(members[name].isfile() for name in EXPECTED)
    assert not [name for name in members if name.startswith(("tests", "benchmarks"))]


def test_wheel_built_from_the_sdist_is_the_same(dist: Path, wheel: Path):
    (from_sdist,) = dist.glob("*.whl")
    assert files_of(from_sdist) == files_of(wheel)


def test_metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        info = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Name"] == "pyaccel-bert"
    assert metadata["Version"] == pyaccel.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    # Neither is needed by the base: they come with the extras.
    base = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in base if line.startswith(("triton", "transformers"))]
    assert entry_points.split() == [
        *("[console_scripts]", "pyaccel", "=", "pyaccel.cli:main"),
        *("[pytest11]", "pyaccel", "=", "pyaccel.verify.pytest_plugin"),
    ]


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_installed_wheel_imports(wheel: Path, tmp_path: Path, interpret: str):
    target = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    modules = [name.removesuffix(".py").replace("/", ".") for name in sorted(KERNELS) if name.endswith(".py")]
    code = (
        f"import importlib, pathlib, pyaccel.ops\n"
        f"for name in {modules}:\n"
        f"    module = importlib.import_module('pyaccel.' + name)\n"
        f"    assert pathlib.Path(module.__file__).is_relative_to({str(target)!r}), module.__file__\n"
        f"assert pathlib.Path(pyaccel.__file__).is_relative_to({str(target)!r})\n"
        f"print(pyaccel.__version__)\n"
    )
    printed = run("-c", code, cwd=tmp_path, PYTHONPATH=str(target), TRITON_INTERPRET=interpret)
    assert printed == f"{pyaccel.__version__}\n"
