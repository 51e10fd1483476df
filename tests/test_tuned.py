"""Measured tables: what is nearest, what dispatch makes of it, and the program that writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pyaccel
from pyaccel import dispatch, ops, quantization, tuned
from pyaccel.benchmarks import int8_table
from tests.hf.models import tiny

CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    rows = [
        {"size": [1, 32, 72], "int8": {"torch": 20.0}, "floating": 10.0},
        {"size": [64, 32, 72], "int8": {"torch": 20.0, "triton": 30.0}, "floating": 50.0},
    ]
    (tmp_path / "int8_linear.json").write_text(
        json.dumps({"tables": [{"machine": tuned.machine(CPU), "dtype": "float32", "rows": rows}]})
    )
    monkeypatch.setattr(tuned, "read_int8_tables", lambda: real(tmp_path / "int8_linear.json"))
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    real = int8_table.read_int8_tables
    for cached in (tuned._tables, tuned.int8_timing):
        cached.cache_clear()
    yield tmp_path / "int8_linear.json"
    for cached in (tuned._tables, tuned.int8_timing):
        cached.cache_clear()


def test_the_nearest_size_in_proportion(table: Path) -> None:
    def near(rows: int, n_in: int = 32, n_out: int = 72, dtype: torch.dtype = torch.float32) -> int | None:
        found = tuned.int8_timing(CPU, dtype, rows, n_in, n_out)
        return None if found is None else found.rows

    assert [near(n) for n in (1, 7, 9, 100)] == [1, 1, 64, 64]
    assert near(64, 64, 144) == 64
    assert near(64, 32 * 5, 72 * 5) is None  # too far
    assert near(64, dtype=torch.bfloat16) is None
    assert near(0) is None
    few, many = tuned.int8_timings(CPU, torch.float32)
    assert (few.fastest, few.speedup, many.fastest, many.speedup) == ("torch", 0.5, "torch", 2.5)


def test_dispatch_gives_the_row_that_decided(table: Path) -> None:
    codes, scale = ops.quantize_per_token(torch.randn(50, 32))
    weight, w_scale = ops.quantize_per_channel(torch.randn(72, 32))
    with dispatch.record() as choices:
        ops.int8_matmul(codes, weight, scale, w_scale)
    assert choices == [
        dispatch.Choice(
            "int8_matmul", "torch", "measured at 64 x 32 to 72: 2.50 times as fast as the floating layer"
        )
    ]


def test_explain_shows_when_int8_is_not_faster(table: Path) -> None:
    model = tiny()
    quantization.quantize(model)
    with pyaccel.use_backend("torch"):
        pyaccel.accelerate(model)
        found = pyaccel.explain(model)
    assert found.int8["32 to 72"] == {1: 0.5, 64: 2.5}
    assert found.as_dict()["int8"]["32 to 72"] == {1: 0.5, 64: 2.5}
    assert "int8, 32 to 72: times as fast as floating point, by rows: 0.50 at 1, 2.50 at 64" in str(found)
    assert "not faster at 1 rows" in str(found)
    floating = tiny()
    pyaccel.accelerate(floating)
    assert pyaccel.explain(floating).int8 == {}


def test_the_table_is_written_and_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "tuned" / "int8_linear.json"
    file.parent.mkdir()
    file.write_text('{"tables": [{"machine": "another", "dtype": "float32", "rows": []}]}')
    for _ in range(2):
        options = ["--quick", "--rounds", "1", "--dtype", "float32", "--device", "cpu", "--file", str(file)]
        assert int8_table.main(options) == 0
    other, mine = tuned.read_int8_tables(file)
    assert other["machine"] == "another"
    assert (mine["machine"], mine["dtype"], mine["torch"]) == (
        tuned.machine(CPU),
        "float32",
        torch.__version__,
    )
    (row,) = mine["rows"]
    assert row["size"] == [19, 24, 40]
    assert row["int8"].keys() == {"torch"}
    assert row["floating"] > 0


def test_what_ships_can_be_read() -> None:
    for shipped in tuned.read_int8_tables():
        assert {"machine", "dtype", "device", "torch", "commit", "date", "rows"} <= shipped.keys()
        for row in shipped["rows"]:
            assert tuned.Int8Timing(*row["size"], row["int8"], row["floating"]).speedup > 0
