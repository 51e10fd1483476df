"""Every benchmark case on tiny shapes: it runs, checks its answers, and says what is missing."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import registry
from benchmarks.__main__ import main
from benchmarks.method import measure


def test_each_case_runs_and_writes_its_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "rows.csv"
    for _ in range(2):
        assert main(["--quick", "--rounds", "2", "--device", "cpu", "--out", str(file)]) == 0
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    expected = sum(len(case.variants) * len(case.quick) for case in registry.cases())
    assert len(rows) == 2 * expected
    assert {row["torch"] for row in rows} == {torch.__version__}
    timed = [row for row in rows if row["microseconds"]]
    assert {"pyaccel torch", "eager", "torch.compile"} <= {row["variant"] for row in timed}
    missing = [row for row in rows if row["note"].startswith("missing")]
    assert {row["variant"] for row in missing} == {"pyaccel triton"}
    assert "missing: Triton's kernels need a GPU" in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed() -> None:
    (case,) = registry.cases(["residual_layernorm"])
    wrong = registry.Variant("wrong", lambda p: lambda: tuple(t * 1.01 for t in case.naive(p)))
    case = dataclasses.replace(case, variants=(wrong, case.variants[2]))
    rows = list(measure(case, torch.float32, torch.device("cpu"), quick=True, rounds=1))
    assert rows[0].note.startswith("wrong")
    assert rows[0].microseconds is None
    assert rows[1].microseconds is not None


def test_an_unknown_case_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of residual_layernorm"):
        registry.cases(["softmax"])
