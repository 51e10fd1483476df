"""`pyaccel bench`: what it leaves, what it says no to, and how two runs compare; on the smallest sizes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pyaccel.benchmarks import readme, registry, report, run, table
from pyaccel.benchmarks.case import Case, Variant
from pyaccel.benchmarks.method import Row
from pyaccel.cli import app
from pyaccel.errors import UserInputError

CPU = torch.device("cpu")
CASE = ["residual_layernorm", "--against", "^eager$", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture
def smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "sweep", lambda self, device, kind="full": self.smoke)
    monkeypatch.setitem(run.EFFORT, "full", (3, 1.0))


def bench(*options: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, options)])


def row(variant: str, milliseconds: float | None, **changes: Any) -> Row:
    us = None if milliseconds is None else milliseconds * 1e3
    values = {
        "group": "ops", "case": "gelu", "size": "8x8", "dtype": "float32", "variant": variant, "note": "", "rounds": 5,
        "microseconds": us, "low": us, "high": us, "host_microseconds": None, "gigabytes_per_second": None,
        "teraflops_per_second": None, "copy_gigabytes_per_second": 1.0, "matmul_teraflops_per_second": None,
        "floor_microseconds": 1.0, "floor_of": "bytes", "of_floor": None if us is None else 1 / us, "max_error": None,
        "peak_megabytes": None, "device": "a cpu", "torch": "2.13", "triton": "3.7", "python": "3.11", "commit": "abc",
        "date": "2026-01-01",
    }  # fmt: skip
    return Row(**{**values, **changes})


# ---- the command ----


def test_it_leaves_a_table_plots_and_a_page(smallest: None, tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench"
    done = bench(*CASE, "--out", out)
    assert done.exit_code == 0, done.output
    assert "times as long as ours" in done.output
    assert "pyaccel triton: missing: Triton's kernels need a GPU (9x64)" in done.output
    assert "times as fast as the fastest baseline" in done.output
    names = {"results.csv", "report.html", "residual_layernorm-float32.svg", "residual_layernorm-float32.png"}
    assert {file.name for file in out.iterdir()} == names
    rows = table.read(out / "results.csv")
    assert [(r.variant, r.timed, r.rounds) for r in rows] == [
        ("pyaccel triton", False, 0), ("pyaccel torch", True, 3), ("eager", True, 3)
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    for part in (
        "<svg",
        "residual_layernorm",
        "eager",
        "9x64",
        torch.__version__,
        "need a GPU",
        "How to read this",
    ):
        assert part in page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained; those are SVG's names
    assert bench(*CASE, "--out", out).exit_code == 0  # appended to, and the last of each counts
    assert len(table.read(out / "results.csv")) == 3
    assert len((out / "results.csv").read_text().splitlines()) == 7


def test_a_wrong_answer_of_ours_fails_and_a_rival_s_is_shown(
    smallest: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = registry.cases(["residual_layernorm"])

    def wrong(p: Any) -> Any:
        return lambda: tuple(t * 1.01 for t in case.naive(p))

    def with_wrong(name: str) -> None:
        variants = (*case.variants, Variant(name, wrong))
        monkeypatch.setattr(run, "cases", lambda _: [dataclasses.replace(case, variants=variants)])

    with_wrong("pyaccel new")
    done = bench("--dtype", "fp32", "--device", "cpu", "--against", "eager", "--out", tmp_path)
    assert done.exit_code == 1
    assert "9x64, pyaccel new: wrong: outside the numerics policy, not timed" in done.stderr
    with_wrong("eager, careless")
    done = bench("--dtype", "fp32", "--device", "cpu", "--against", "eager", "--out", tmp_path)
    assert done.exit_code == 0
    assert "eager, careless: wrong: outside the numerics policy, not timed (9x64)" in done.output
    assert "outside the numerics policy" in (tmp_path / "report.html").read_text()


def test_it_fails_where_ours_is_slower(smallest: None, tmp_path: Path) -> None:
    assert bench(*CASE, "--out", tmp_path, "--fail-if-slower", "0").exit_code == 0
    done = bench(*CASE, "--out", tmp_path, "--fail-if-slower", "1e6")
    assert done.exit_code == 1
    assert "residual_layernorm, 9x64, float32: " in done.stderr
    assert "times as fast as eager" in done.stderr


def test_a_list_measures_nothing(tmp_path: Path) -> None:
    done = bench("models", "ops", "--quick", "--device", "cpu", "--list", "--out", tmp_path / "none")
    assert done.exit_code == 0
    for part in (
        "bert (models): A whole Hugging Face BERT",
        "minilm, 8x128 sentences",
        "OpenVINO",
        "SDPA cuDNN",
    ):
        assert part in done.output
    assert "bert_training" not in done.output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["softmax"], "there is no case softmax"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--sizes", "("], "'(' is not a regular expression"),
        (["--sizes", "nothing has this label"], "no size is left"),
        (["--device", "toaster"], "unknown device 'toaster'"),
        (["--compare", "nowhere.csv", "nowhere.csv"], "nowhere.csv could not be read"),
    ],
)
def test_bad_command_lines(options: list[str], message: str) -> None:
    done = bench(*options)
    assert isinstance(done.exception, UserInputError), done.output
    assert message in str(done.exception)


def test_without_matplotlib_it_says_so_before_it_measures(
    smallest: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = bench(*CASE, "--out", tmp_path / "none")
    assert isinstance(done.exception, UserInputError)
    assert "pip install 'pyaccel-bert[bench]'" in str(done.exception)
    assert not (tmp_path / "none").exists()


# ---- two runs ----


def test_what_the_machine_did_is_not_ours(tmp_path: Path) -> None:
    """Everything takes twice as long, ours three times."""
    before, after = tmp_path / "before.csv", tmp_path / "after.csv"
    table.append([row("pyaccel", 2.0), row("eager", 5.0), row("gone", 1.0)], before)
    table.append([row("pyaccel", 6.0), row("eager", 10.0), row("new", 1.0)], after)
    (change,) = table.changes(table.read(before), table.read(after))
    assert (change.speedup, change.of_machine, change.own) == pytest.approx((1 / 3, 0.5, 2 / 3))
    done = bench("--compare", before, after)
    assert done.exit_code == 0
    assert "0.67" in done.output
    done = bench("--compare", before, after, "--fail-if-slower", "0.95")
    assert done.exit_code == 1
    assert "gelu, 8x8, float32, pyaccel: 0.67 times as fast as before" in done.stderr
    assert bench("--compare", before, after, "--fail-if-slower", "0.6").exit_code == 0


def test_tables_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    before, after = tmp_path / "before.csv", tmp_path / "after.csv"
    table.append([row("pyaccel", 2.0)], before)
    table.append([row("pyaccel", 2.0, size="9x9")], after)
    done = bench("--compare", before, after)
    assert isinstance(done.exception, UserInputError)
    assert "no size and variant of ours in common" in str(done.exception)
    after.write_text("case,size\ngelu,8x8\n")
    done = bench("--compare", before, after)
    assert "is no table of benchmarks: it has no column commit" in str(done.exception)


# ---- what rows say ----


def test_ours_is_what_a_user_gets_and_the_rival_the_fastest() -> None:
    rows = [row("pyaccel, padded", 1.0), row("pyaccel", 2.0), row("slow", 9.0), row("fast", 3.0)]
    rows.append(row("wrong", None, note="wrong: outside the numerics policy, not timed"))
    (cell,) = table.cells(rows)
    assert cell.ours is not None
    assert (cell.ours.variant, [baseline.variant for baseline in cell.baselines]) == (
        "pyaccel",
        ["fast", "slow"],
    )
    assert (cell.speedup(), cell.speedup("slow"), cell.speedup("wrong")) == (1.5, 4.5, None)
    assert table.slower(rows, 1.5) == []
    assert table.slower(rows, 1.6) == ["gelu, 8x8, float32: 1.50 times as fast as fast"]
    assert table.slower([row("pyaccel", None, note="error: x"), row("fast", 3.0)], 0.5) == [
        "gelu, 8x8, float32: no time of ours, fast has one"
    ]
    assert "Fastest at 1 of 1 sizes; 1.50 times" in table.verdict(rows)
    assert table.verdict(rows[2:]) == "Nothing of ours was timed beside a baseline."


def test_backends_of_an_op_are_judged_by_the_fastest() -> None:
    (cell,) = table.cells([row("pyaccel triton", 3.0), row("pyaccel torch", 2.0), row("eager", 3.0)])
    assert cell.speedup() == 1.5


def test_a_page_of_rows_that_only_failed(tmp_path: Path) -> None:
    page = report.write([row("pyaccel", None, note="error: <b>"), row("eager", 1.0)], tmp_path).read_text()
    assert "error: &lt;b&gt;" in page


# ---- the README ----


def test_the_readme_s_figures_are_those_measured() -> None:
    """`python -m pyaccel.benchmarks.readme` changes nothing."""
    made: list[str] = []
    assert readme.main([], write=made.append) == 0
    assert made == [readme.README.read_text(encoding="utf-8")]
    names = set(readme.MARKED.findall(made[0]))
    assert {name for _, name, _ in names} == {
        "models", "prepacked", "training", "machine", "demo", "encode", "int8", "int8-speed", "cost"
    }  # fmt: skip


def test_a_missing_rival_is_shown_in_the_readme() -> None:
    rows = [
        row("pyaccel", 2.0, case="bert"),
        row("stock, SDPA", 3.0, case="bert"),
        row("torch.compile", 2.5, case="bert"),
        row("torch.compile, frozen", 2.2, case="bert"),
        row("OpenVINO", None, case="bert", note="missing: openvino not installed"),
    ]
    head, _, line = readme.models(rows).splitlines()
    assert head == "| batch | fp32 ms | fp32 SDPA | fp32 compile | fp32 ONNX Runtime | fp32 OpenVINO |"
    assert line == "| 8x8 | 2 | 1.50 | 1.10 | not measured | missing |"
    with pytest.raises(ValueError, match="'nothing'"):
        readme.with_tables("<!-- figures: nothing -->\n<!-- end of figures -->", {})
