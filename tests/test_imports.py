"""Who may import whom, read from the source; and what `import pyaccel` needs, does and costs."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.metadata
import itertools
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


# --- the direction of imports, read from the source ---------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What the files of one part may import, besides themselves and the standard library."""

    parts: tuple[str, ...] = ()  # parts of pyaccel
    packages: tuple[str, ...] = ("torch",)  # other people's
    lazily: tuple[str, ...] = ()  # of either kind, by full name, but only inside functions or for types
    modules: tuple[str, ...] = ()  # of a part that isn't named above, by full name, anywhere


# kernels <- ops <- nn <- models <- quantization <- hf <- encode, verify, inspect, cost <- benchmarks <- cli.
# Only kernels import triton at the top of a file, and only hf transformers. A folder of a part may have a rule of its
# own, by its dotted name. Circles are failures whatever the rules say, unless a lazy import in them is listed.
RULES = {
    "kernels": Rule(packages=("torch", "triton")),
    "reference": Rule(),
    "errors": Rule(packages=()),
    "activations": Rule(),
    "triton_support": Rule(),
    "dispatch": Rule(("errors", "triton_support")),
    "packing": Rule(),
    "machine": Rule(("dtypes", "errors")),
    "timing": Rule(),
    "tuning": Rule(("machine", "tuning_tables")),
    "tuning_tables": Rule(),
    "ops": Rule(
        ("errors", "activations", "triton_support", "reference", "dispatch", "tuning"),
        lazily=("pyaccel.kernels",),
        modules=("pyaccel.kernels.common.limits",),  # numbers, which import nothing
    ),
    "nn": Rule(("activations", "reference", "dispatch", "packing", "ops")),
    "models": Rule(
        ("activations", "reference", "dispatch", "packing", "ops", "nn"),
        ("torch", "safetensors"),
        ("huggingface_hub",),
    ),
    "checkpoints": Rule(("errors", "models"), ("torch",), ("transformers", "huggingface_hub")),
    "hf": Rule(
        (
            "errors",
            "activations",
            "reference",
            "dispatch",
            "tuning",
            "packing",
            "ops",
            "nn",
            "models",
            "quantization",
        ),
        ("torch", "transformers", "huggingface_hub"),
    ),
    "quantization": Rule(("reference", "dispatch", "packing", "ops", "nn", "models"), ("torch", "rich")),
    "dtypes": Rule(),
    "verify": Rule(
        (
            "errors",
            "activations",
            "triton_support",
            "machine",
            "checkpoints",
            "dtypes",
            "reference",
            "dispatch",
            "packing",
            "ops",
            "nn",
            "models",
            "hf",
        ),
        packages=("torch", "pytest"),  # pytest: of its plugin
        lazily=("transformers",),
    ),
    "encode": Rule(("errors", "checkpoints", "hf"), ("torch", "numpy")),
    "inspect": Rule(("kernels",), lazily=("triton",)),
    "cost": Rule(
        (
            "errors",
            "triton_support",
            "timing",
            "checkpoints",
            "dispatch",
            "packing",
            "ops",
            "nn",
            "models",
            "hf",
        ),
        lazily=("transformers", "pyaccel.kernels"),
    ),
    "benchmarks": Rule(
        (
            "triton_support",
            "machine",
            "timing",
            "tuning",
            "tuning_tables",
            "ops",
            "verify",
        ),
        packages=("torch", "numpy", "rich", "pytest"),  # pytest: of test_cases.py
        lazily=("matplotlib", "pyaccel.checkpoints", "pyaccel.encode", "pyaccel.quantization"),
    ),
    "benchmarks.cases": Rule(
        ("dispatch", "reference", "ops", "hf", "cost"),
        lazily=("transformers", "torchao", "liger_kernel", "onnxruntime", "openvino"),
    ),
    "cli": Rule(  # the top: all of pyaccel, by its public face too
        packages=("pyaccel", "torch", "numpy", "safetensors", "typer", "rich", "click"),
        lazily=("triton", "transformers", "huggingface_hub", "tokenizers"),
    ),
    "__main__": Rule(("cli",), ()),
    "__init__": Rule(
        packages=(),
        lazily=(
            "pyaccel.dispatch",
            "pyaccel.encode",
            "pyaccel.errors",
            "pyaccel.hf",
            "pyaccel.models",
            "pyaccel.nn",
            "pyaccel.ops",
            "pyaccel.packing",
            "pyaccel.quantization",
            "pyaccel.reference",
            "pyaccel.verify",
        ),
    ),
}


@dataclass(frozen=True)
class Import:
    """One import statement.

    Attributes:
        module: the file, as a dotted name; an ``__init__`` is spelled out.
        place: path and line.
        name: what is imported, absolute and dotted; "*" at its end: any file of that folder.
        lazy: whether it stands inside a function, or is for type checkers.
        rule: of the file.
    """

    module: str
    place: str
    name: str
    lazy: bool
    rule: Rule

    @property
    def is_listed(self) -> bool:
        """Whether it is one of those that the rules allow because they are lazy."""
        parts = self.name.split(".")
        return self.lazy and ".".join(parts[: 2 if parts[0] == "pyaccel" else 1]) in self.rule.lazily


def rule_of(module: str) -> Rule | None:
    """The rule of the file, or of the innermost folder that has one."""
    parts = module.split(".")[1:]
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((RULES[name] for name in names if name in RULES), None)


@functools.cache
def statements_of(source: str, package: str) -> list[tuple[int, str, bool]]:
    return list(statements(ast.parse(source), package.split(".")))


def statements(tree: ast.AST, package: list[str], lazy: bool = False) -> Iterator[tuple[int, str, bool]]:
    """Line, name and laziness, as in Import, of every import in a file of `package`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, lazy
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name]), lazy
        elif isinstance(node, ast.Call) and node.args:
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            name = text_of(node.args[0], ".".join(package))
            if function in ("import_module", "__import__") and name is not None:
                yield node.lineno, name, lazy
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from statements(ast.Module(node.body, []), package, lazy=True)
            node = ast.Module(node.orelse, [])
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from statements(node, package, lazy or inside)


def text_of(argument: ast.expr, package: str) -> str | None:
    """A string, or an f-string of which what is known only at run time comes last and is given as "*"."""
    text = ""
    for part in argument.values if isinstance(argument, ast.JoinedStr) else [argument]:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue) and ast.unparse(part.value) == "__package__":
            text += package
        else:
            return f"{text}*" if text.endswith(".") else None
    return text


def imports(root: Path) -> list[Import]:
    """Every import under root/pyaccel (and so, through the links, root/kernels and root/benchmarks)."""
    return [
        Import(module, f"{path.relative_to(root)}:{line}", name, lazy, rule)
        for module, path in modules(root).items()
        if (rule := rule_of(module)) is not None
        for line, name, lazy in statements_of(path.read_text(), module.rpartition(".")[0])
    ]


def modules(root: Path) -> dict[str, Path]:
    """The files under root/pyaccel by their dotted names."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in python_files(root / "pyaccel")
    }


def violations(root: Path) -> list[str]:
    """Every import under root/pyaccel that RULES does not allow."""
    found = [
        f"{path.relative_to(root)}: a part of pyaccel without a rule in {Path(__file__).name}"
        for module, path in modules(root).items()
        if rule_of(module) is None
    ]
    for each in imports(root):
        rule, name = each.rule, each.name
        part = each.module.split(".")[1]
        top, *rest = name.split(".")
        if top == "pyaccel":
            # A bare `import pyaccel` opens every part, and the version is none of them.
            allowed = bool(rest) and rest[0] in (part, "__version__", *rule.parts)
            allowed = allowed or any(f"{name}.".startswith(f"{module}.") for module in rule.modules)
            allowed = allowed or top in rule.packages
        else:
            allowed = top in sys.stdlib_module_names or top in rule.packages
        if not allowed and not each.is_listed:
            hint = "; its import name is pyaccel.kernels" if top == "kernels" else ""
            hint = " outside functions" if replace(each, lazy=True).is_listed else hint
            found.append(f"{each.place}: {part} must not import {name}{hint}")
    return found


def circles(root: Path) -> list[str]:
    """A circle of imports in each folder under root/pyaccel that has one, between its files and folders.

    A lazy import counts too, unless RULES lists it. A circle of files of several folders is one of what holds them, in
    the innermost folder that has them all.
    """
    files = modules(root)
    graphs: dict[str, dict[str, set[str]]] = {}
    places: dict[tuple[str, str], str] = {}
    for each in imports(root):
        for target in () if each.is_listed else imported_files(each.name, files):
            own, other = each.module.split("."), target.split(".")
            if own != other:
                depth = next(i for i, names in enumerate(zip(own, other, strict=False)) if len({*names}) > 1)
                node, on = (".".join(names[: depth + 1]) for names in (own, other))
                graphs.setdefault(".".join(own[:depth]), {}).setdefault(node, set()).add(on)
                places.setdefault((node, on), each.place)
    found = []
    for graph in graphs.values():
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            circle = error.args[1][::-1]  # each imports the next one
            steps = [places[step] for step in itertools.pairwise(circle)]
            found.append(f"{' -> '.join(circle)} ({', '.join(steps)})")
    return found


def imported_files(name: str, files: dict[str, Path]) -> list[str]:
    """The files that an imported name stands for: one, or all of a folder, or none of pyaccel."""
    if name.endswith(".*"):
        return [file for file in files if file.startswith(name[:-1])]
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        for file in (module, f"{module}.__init__"):
            if file in files:
                return [file]
    return []


def python_files(folder: Path) -> list[Path]:
    # os.walk because Path.rglob follows links in some versions of Python only.
    return sorted(
        Path(base, name)
        for base, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(".py")
    )


def test_imports_go_one_way():
    assert violations(ROOT) == []


def test_imports_go_in_no_circle():
    assert circles(ROOT) == []


def test_every_file_is_read():
    files = modules(ROOT)
    assert {module.split(".")[1] for module in files} == {name.split(".")[0] for name in RULES}
    assert [
        name for name in RULES if not any(f"{file}.".startswith(f"pyaccel.{name}.") for file in files)
    ] == []


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the sources."""
    for path in python_files(ROOT / "pyaccel"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    assert violations(tmp_path) + circles(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("file", "source", "between"),
    [
        ("packing.py", "from pyaccel.nn import int8_linear", {"packing", "nn"}),  # packages
        ("reference/philox.py", "def f():\n    import pyaccel.nn.encoder_layer", {"reference", "nn"}),
        ("hf/state.py", "from pyaccel.hf.plan import serve", {"hf.state", "hf.plan"}),  # files of a package
        ("hf/state.py", "def f():\n    from pyaccel.hf import plan", {"hf.state", "hf.plan"}),
        ("hf/state.py", "if TYPE_CHECKING:\n    from pyaccel.hf.plan import serve", {"hf.state", "hf.plan"}),
        (
            "hf/executors/base.py",
            "from pyaccel.hf.plan import serve",
            {"hf.executors", "hf.state", "hf.plan"},
        ),
        ("nn/int8_linear.py", "from . import Int8Linear", {"nn.__init__", "nn.int8_linear"}),
        (
            "benchmarks/case.py",
            "from pyaccel.benchmarks import method",
            {"benchmarks.case", "benchmarks.method"},
        ),
        (
            "benchmarks/cases/common.py",
            "from pyaccel.benchmarks.registry import cases",  # which imports them by an f-string
            {"benchmarks.cases", "benchmarks.registry"},
        ),
    ],
)
def test_a_planted_circle_is_found(copied: Path, file: str, source: str, between: set[str]):
    path = copied / "pyaccel" / file
    path.write_text(f"{path.read_text()}\n{source}\n")
    (found,) = circles(copied)
    circle, places = found.removesuffix(")").split(" (")
    assert {name.removeprefix("pyaccel.") for name in circle.split(" -> ")} <= between
    assert f"pyaccel/{file}:" in places


@pytest.mark.parametrize(
    ("file", "source", "line"),
    [
        ("ops/f.py", "import pyaccel.nn", 1),
        ("ops/f.py", "from pyaccel import nn", 1),
        ("ops/f.py", "from .. import nn", 1),
        ("ops/f.py", "from ..nn.linear import Linear", 1),
        ("ops/f.py", "import pyaccel", 1),
        ("ops/f.py", "def f():\n    from pyaccel.models import bert", 2),
        ("ops/f.py", "class A:\n    def f(self):\n        if self:\n            import pyaccel.hf", 4),
        ("ops/f.py", "import importlib\nimportlib.import_module('pyaccel.cli')", 2),
        ("ops/f.py", "from pyaccel.kernels.common import philox", 1),
        ("ops/f.py", "from pyaccel.kernels.common.limits_of_cards import MAX_ROW", 1),
        ("ops/f.py", "try:\n    import triton\nexcept ImportError:\n    triton = None", 2),
        ("ops/f.py", "from tests import assertions", 1),
        ("nn/f.py", "def f():\n    import benchmarks.registry", 2),
        ("nn/f.py", "def f():\n    from pyaccel.kernels import philox", 2),
        ("kernels/f.py", "from pyaccel import dispatch", 1),
        ("kernels/f.py", "from kernels import philox", 1),
        ("cli/f.py", "def f():\n    import kernels.philox", 2),
        ("kernels/f.py", "import numpy", 1),
        ("reference/f.py", "from pyaccel.ops import residual_layernorm", 1),
        ("reference/f.py", "import numpy as np", 1),
        ("models/f.py", "from transformers import BertModel", 1),
        ("hf/f.py", "def f():\n    import pyaccel.verify", 2),
        ("packing.py", "from . import dispatch", 1),
        ("benchmarks/f.py", "from pyaccel.cli import console", 1),
        ("benchmarks/f.py", "def f():\n    import pyaccel.cli", 2),
        ("benchmarks/cases/f.py", "from pyaccel import cli", 1),
        ("benchmarks/cases/f.py", "import pyaccel", 1),
        ("benchmarks/cases/f.py", "from pyaccel import tuning", 1),  # which the rest of benchmarks may
        ("benchmarks/f.py", "from pyaccel.quantization import quantize", 1),
        ("__init__.py", "from pyaccel import ops", 1),
        ("newcomer/f.py", "import os", None),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, line: int | None):
    path = tmp_path / "pyaccel" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = violations(tmp_path)
    assert found.startswith(f"pyaccel/{file}:{line}: " if line else f"pyaccel/{file}: ")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/f.py", "import torch\nfrom pyaccel import dispatch, reference\nfrom . import other"),
        ("ops/f.py", "def f():\n    from pyaccel.kernels.common import philox"),
        ("ops/f.py", "from pyaccel.kernels.common.limits import MAX_ROW"),
        (
            "kernels/f.py",
            "import triton.language as tl\nfrom pyaccel.kernels.common.configs import RowConfig",
        ),
        ("cli/f.py", "from pyaccel import __version__, benchmarks\ndef f():\n    import transformers"),
        ("benchmarks/f.py", "from pyaccel import tuning\ndef f():\n    import pyaccel.quantization"),
        ("__init__.py", "if TYPE_CHECKING:\n    from pyaccel import ops"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str):
    path = tmp_path / "pyaccel" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []


# --- import pyaccel -----------------------------------------------------------------------------------------


def python(code: str, *, executable: str | Path = sys.executable, **env: str | None) -> str:
    """What `python -c code` prints, from the repository root; `env` is added, or with None taken away."""
    environment = {**os.environ, **env}
    result = subprocess.run(
        [str(executable), "-c", code],
        cwd=ROOT,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_nothing_heavy_and_touches_no_device():
    python(
        "import sys, pyaccel\n"
        "assert pyaccel.__version__\n"
        "assert not {'triton', 'transformers', 'numpy', 'torch'} & set(sys.modules)\n"
        "import pyaccel.ops, pyaccel.nn, pyaccel.models, pyaccel.packing, pyaccel.reference\n"
        "import pyaccel.dispatch, pyaccel.hf, pyaccel.verify, pyaccel.cli\n"
        "assert not {'triton', 'transformers'} & set(sys.modules)\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )


def test_import_takes_under_half_a_second_beyond_torch():
    code = (
        "import time, torch\n"
        "start = time.perf_counter()\n"
        "import pyaccel\n"
        "print(time.perf_counter() - start)\n"
    )
    # The best of three: other test workers share the cores.
    assert min(float(python(code)) for _ in range(3)) < 0.5


def test_lazy_names():
    python(
        "import pyaccel\n"
        "assert set(pyaccel.__all__) <= set(dir(pyaccel))\n"
        "for name in pyaccel.__all__:\n"
        "    assert getattr(pyaccel, name) is not None, name\n"
        "from pyaccel import *\n"
        "import pyaccel.hf, pyaccel.dispatch\n"
        "assert accelerate is pyaccel.hf.accelerate and use_backend is pyaccel.dispatch.use_backend\n"
        "try:\n"
        "    pyaccel.acelerate\n"
        "except AttributeError as error:\n"
        "    assert str(error) == \"module 'pyaccel' has no attribute 'acelerate'\"\n"
        "else:\n"
        "    raise AssertionError('a misspelt name was found')\n"
    )


def test_kernels_import_without_a_driver():
    """Triton installed, no GPU, no interpreter: every kernel file imports, and no driver is looked for."""
    modules = [
        ".".join(["pyaccel", *path.relative_to(ROOT).with_suffix("").parts])
        for path in sorted((ROOT / "kernels").rglob("*.py"))
    ]
    python(
        f"import importlib\n"
        f"for name in {modules}:\n"
        f"    importlib.import_module(name)\n"
        f"import sys, torch, triton\n"
        f"assert triton.runtime.driver._default is None\n"
        f"assert not torch.cuda.is_initialized()\n"
        f"assert not [name for name in sys.modules if name.split('.')[0] == 'kernels']\n",
        TRITON_INTERPRET=None,
        CUDA_VISIBLE_DEVICES="",
        HIP_VISIBLE_DEVICES="",
    )


# --- without triton and transformers ------------------------------------------------------------------------


def base_distributions() -> dict[str, importlib.metadata.Distribution]:
    """What `pip install pyaccel-bert` brings: the declared dependencies, theirs, and so on; not triton."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(project["dependencies"])
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        # CUDA builds of torch ask for triton themselves.
        if (
            name in found
            or name == "triton"
            or (requirement.marker and not requirement.marker.evaluate({"extra": ""}))
        ):
            continue
        found[name] = importlib.metadata.distribution(name)
        todo += found[name].requires or []
    return found


@pytest.fixture(scope="session")
def base_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a real environment that has the base dependencies and nothing else, as links to ours."""
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder, symlinks=True, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for distribution in base_distributions().values():
        for file in distribution.files or []:
            name = file.parts[0]
            link = site_packages / name
            if name not in ("..", "__pycache__") and not name.endswith(".pth") and not link.is_symlink():
                link.symlink_to(Path(str(distribution.locate_file(name))).resolve())
    return folder / "bin" / "python"


def python_base(base_python: Path, code: str) -> str:
    return python(code, executable=base_python, PYTHONPATH=None, PYTHONHOME=None, TRITON_INTERPRET=None)


def test_base_environment_has_neither_triton_nor_transformers(base_python: Path):
    python_base(
        base_python,
        "import importlib.util, sys, torch\n"
        f"assert sys.prefix == {str(base_python.parents[1])!r}\n"
        "for name in ('triton', 'transformers', 'tokenizers', 'huggingface_hub', 'pytest'):\n"
        "    assert importlib.util.find_spec(name) is None, name\n",
    )


def test_everything_imports_without_triton_and_transformers(base_python: Path):
    python_base(
        base_python,
        "import pyaccel\n"
        "import pyaccel.ops, pyaccel.nn, pyaccel.models, pyaccel.packing, pyaccel.reference\n"
        "import pyaccel.dispatch, pyaccel.hf, pyaccel.verify, pyaccel.cli\n",
    )


def test_ops_run_without_triton(base_python: Path):
    python_base(
        base_python,
        "import torch, pyaccel\n"
        "x, residual = torch.randn(2, 5, 16).unbind()\n"
        "weight, bias = torch.randn(2, 16).unbind()\n"
        "inputs = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]\n"
        "out = pyaccel.ops.residual_layernorm(*inputs)\n"
        "total = inputs[0] + inputs[1]\n"
        "expected = torch.nn.functional.layer_norm(total, (16,), *inputs[2:], 1e-12)\n"
        "torch.testing.assert_close(out, expected)\n"
        "upstream = torch.randn_like(out)\n"
        "for got, want in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (out, expected))):\n"
        "    torch.testing.assert_close(got, want)\n",
    )


def test_accelerate_without_transformers_says_which_extra_is_missing(base_python: Path):
    printed = python_base(
        base_python,
        "import torch, pyaccel\n"
        "try:\n"
        "    pyaccel.accelerate(torch.nn.Linear(2, 2))\n"
        "except ImportError as error:\n"
        "    print(error)\n",
    )
    assert "transformers" in printed
    assert "pyaccel-bert[hf]" in printed


def test_command_line_runs_without_triton_and_transformers(base_python: Path):
    code = "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('pyaccel', run_name='__main__')"
    assert "demo" in python_base(base_python, code)
