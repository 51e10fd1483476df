"""transformers works from the repository root with Hugging Face's `kernels` distribution installed.

transformers imports that distribution by its name, `kernels`, which is also the name of our folder; with a
kernels/__init__.py here, `from transformers import BertModel` fails from the root (the control below). But
transformers looks at the distribution only if its version lies in the range it asks for, and the newest
release may lie outside: hence a copy of the installed one that says it is in range, first on the path.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parents[1]

RUN_BERT = """
import sys
import torch
from transformers import BertConfig, BertModel
from transformers.utils.import_utils import is_kernels_available

assert is_kernels_available(), "transformers does not see the kernels distribution: this proves nothing"
import kernels
assert {hf_kernels!r} in kernels.__file__, kernels.__file__
import pyaccel.kernels.layernorm.forward as ours
assert ours.__name__ == "pyaccel.kernels.layernorm.forward"

torch.manual_seed(0)
config = BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
out = BertModel(config).eval()(torch.arange(6)[None]).last_hidden_state
assert out.shape == (1, 6, 16) and out.isfinite().all()
print("BERT ran")
"""


@pytest.fixture(scope="module")
def hf_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed `kernels` distribution, its version one that transformers wants."""
    folder = tmp_path_factory.mktemp("hf_kernels")
    installed = importlib.metadata.distribution("kernels")
    wanted = import_utils.KERNELS_MIN_VERSION
    shutil.copytree(str(installed.locate_file("kernels")), folder / "kernels")
    info = folder / f"kernels-{wanted}.dist-info"
    info.mkdir()
    metadata = installed.read_text("METADATA")
    assert metadata is not None
    before, after = f"\nVersion: {installed.version}\n", f"\nVersion: {wanted}\n"
    assert before in metadata
    (info / "METADATA").write_text(metadata.replace(before, after, 1))
    return folder


def run(*command: str | Path, hf_kernels: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(hf_kernels), "HF_HUB_OFFLINE": "1"}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True
    )


def test_python_c_from_the_root(hf_kernels: Path):
    result = run("-c", RUN_BERT.format(hf_kernels=str(hf_kernels)), hf_kernels=hf_kernels, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "BERT ran\n"


def test_python_m_pytest_from_the_root(hf_kernels: Path, tmp_path: Path):
    # With our pyproject.toml (its pythonpath puts the root first) and -m (which does so too).
    body = RUN_BERT.format(hf_kernels=str(hf_kernels)).replace("\n", "\n    ")
    (tmp_path / "test_bert.py").write_text(f"def test_bert():{body}\n")
    result = run(
        "-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", tmp_path / "test_bert.py",
        hf_kernels=hf_kernels, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout


def test_control_with_an_init_file_transformers_does_not_import(hf_kernels: Path, tmp_path: Path):
    """The same check in the same layout, only with kernels/__init__.py, fails as it should."""
    skip = shutil.ignore_patterns("__pycache__")
    for folder in ("kernels", "pyaccel"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=skip)
    (tmp_path / "kernels" / "__init__.py").touch()
    result = run("-c", RUN_BERT.format(hf_kernels=str(hf_kernels)), hf_kernels=hf_kernels, cwd=tmp_path)
    assert result.returncode != 0
    assert "cannot import name 'CUDAProperties' from 'kernels'" in result.stderr
