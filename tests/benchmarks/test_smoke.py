"""Every benchmark case on tiny shapes: it runs, checks its answers, and says what is missing."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pyaccel.benchmarks import attention, registry
from pyaccel.benchmarks.__main__ import bad, main
from pyaccel.benchmarks.attention_shapes import Shape, sentences, squad
from pyaccel.benchmarks.method import measure, time_in_turn
from tests.assertions import assert_equivalent

CPU = torch.device("cpu")
SDPA_BACKENDS = {"SDPA flash", "SDPA cuDNN", "SDPA efficient"}


def test_each_case_runs_and_writes_its_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "rows.csv"
    options = ["--quick", "--rounds", "2", "--device", "cpu", "--out", str(file)]
    assert main(options) == 0
    printed = capsys.readouterr().out
    again = ["residual_layernorm", "--variants", "^eager$", *options]
    assert main(again) == 0
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    expected = sum(len(case.variants) * len(case.quick) for case in registry.cases())
    assert len(rows) == expected + 1
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert {row["note"].split(":")[0] for row in rows} == {"", "missing"}
    for case, timed, missing in (
        (
            "residual_layernorm",
            {"pyaccel torch", "eager", "torch.compile"},
            {"pyaccel triton"},
        ),
        (
            "bias_gelu",
            {"pyaccel torch", "eager", "torch.compile"},
            {"pyaccel triton"},
        ),
        (
            "linear_activation",
            {"pyaccel torch", "eager", "torch.compile"},
            {"pyaccel triton"},
        ),
        (
            "bert_embeddings",
            {"pyaccel torch", "eager", "torch.compile"},
            {"pyaccel triton"},
        ),
        (
            "masked_lm_cross_entropy",
            {"pyaccel torch", "eager", "eager, masked tokens", "torch.compile"},
            {"pyaccel triton"},
        ),
        (
            "int8_linear",
            {
                "pyaccel torch",
                "pyaccel torch, weight only",
                "floating",
                "floating, torch.compile",
                "torch._int_mm",
                "torch._int_mm, torch.compile",
            },
            {"pyaccel triton", "pyaccel triton, weight only", "torchao, torch.compile"},
        ),
        ("encoder", {"pyaccel", "pyaccel, padded", "stock", "torch.compile"}, set()),
        (
            "attention",
            {"pyaccel torch", "eager", "torch.compile", "SDPA", "FlexAttention"},
            {"pyaccel triton", "FlexAttention", *SDPA_BACKENDS},
        ),
        (
            "varlen_attention",
            {"pyaccel torch", "SDPA nested", "SDPA, padded", "FlexAttention"},
            {
                "pyaccel triton",
                "pyaccel triton, padded",
                "varlen_attn",
                "FlexAttention",
                *(f"{name}, padded" for name in SDPA_BACKENDS),
            },
        ),
    ):
        of_case = [row for row in rows if row["case"] == case]
        assert {row["variant"] for row in of_case if row["microseconds"]} == timed
        assert {row["variant"] for row in of_case if row["note"]} == missing
        assert all(bool(row["microseconds"]) == bool(row["max_error"]) for row in of_case)
    flex = [row for row in rows if row["variant"] == "FlexAttention"]
    assert {row["size"].split()[-1] for row in flex if row["note"]} == {"forward+backward"}
    assert "missing: Triton's kernels need a GPU" in printed


def test_a_training_step_of_an_encoder() -> None:
    (case,) = registry.cases(["encoder"])
    uncompiled = tuple(v for v in case.variants if v.name != "torch.compile")
    size = {"training": next(iter(case.quick.values()))._replace(training=True)}
    case = dataclasses.replace(case, variants=uncompiled, quick=size)
    rows = list(measure(case, torch.float32, CPU, quick=True, rounds=1))
    assert [row.note for row in rows] == ["", "", ""]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["attention", "varlen_attention"])
def test_answers_are_right_in_16_bits(name: str, dtype: torch.dtype) -> None:
    (case,) = registry.cases([name])
    uncompiled = tuple(v for v in case.variants if v.name not in ("torch.compile", "FlexAttention"))
    rows = list(measure(dataclasses.replace(case, variants=uncompiled), dtype, CPU, quick=True, rounds=1))
    assert {row.note.split(":")[0] for row in rows} == {"", "missing"}


def test_a_wrong_answer_is_not_timed() -> None:
    (case,) = registry.cases(["residual_layernorm"])
    wrong = registry.Variant("wrong", lambda p: lambda: tuple(t * 1.01 for t in case.naive(p)))
    case = dataclasses.replace(case, variants=(wrong, case.variants[2]))
    rows = list(measure(case, torch.float32, CPU, quick=True, rounds=1))
    assert rows[0].note.startswith("wrong")
    assert rows[0].microseconds is None
    assert rows[1].microseconds is not None
    assert [bad(row) for row in rows] == [True, False]


@pytest.mark.parametrize("output", range(4))
@pytest.mark.parametrize("name", ["attention", "varlen_attention"])
def test_a_wrong_output_or_gradient_is_found(name: str, output: int) -> None:
    (case,) = registry.cases([name])

    def prepare(p: Any) -> Any:
        return lambda: tuple(t * 1.01 if i == output else t for i, t in enumerate(case.naive(p)))

    last = dict([list(case.quick.items())[-1]])
    case = dataclasses.replace(case, quick=last, variants=(registry.Variant("wrong", prepare),))
    (row,) = measure(case, torch.float32, CPU, quick=True, rounds=1)
    assert row.note.startswith("wrong")


def test_an_error_is_shown_and_the_others_go_on() -> None:
    (case,) = registry.cases(["attention"])
    calls = 0

    def fails(*_: Any) -> Any:
        raise RuntimeError("no kernel\nfor this")

    def fails_later(p: Any) -> Any:
        def call() -> Any:
            nonlocal calls
            calls += 1
            return fails() if calls == 3 else case.naive(p)

        return call

    variants = (
        registry.Variant("fails to prepare", fails),
        registry.Variant("pyaccel fails", lambda p: fails),
        registry.Variant("fails later", fails_later),
        registry.Variant("wrong count", lambda p: lambda: ()),
        case.variants[2],
    )
    first = dict([next(iter(case.quick.items()))])
    rows = list(
        measure(
            dataclasses.replace(case, quick=first, variants=variants),
            torch.float32,
            CPU,
            quick=True,
            rounds=4,
        )
    )
    assert [row.note for row in rows[:3]] == ["error: RuntimeError: no kernel for this"] * 3
    assert rows[3].note.startswith("error: ValueError")
    assert [row.microseconds is None for row in rows] == [True] * 4 + [False]
    assert [bad(row) for row in rows] == [False, True, False, False, False]


def test_the_floor_is_what_the_machine_was_measured_to_need() -> None:
    (case,) = registry.cases(["attention"])
    case = dataclasses.replace(case, variants=(case.variants[2],))
    rows = {
        bound: next(measure(dataclasses.replace(case, flops=flops), torch.float32, CPU, quick=True, rounds=3))
        for bound, flops in (("bytes", lambda p: 1), ("flops", lambda p: 10**12), ("neither", None))
    }
    assert rows["bytes"].floor_of == "bytes"
    assert rows["flops"].floor_of == "flops"
    assert rows["flops"].floor_microseconds == pytest.approx(1e6 / rows["flops"].matmul_teraflops_per_second)
    for row in rows.values():
        assert row.of_floor == pytest.approx(row.floor_microseconds / row.microseconds)
    assert rows["neither"].teraflops_per_second is None
    assert rows["neither"].matmul_teraflops_per_second is None


def test_one_that_fails_takes_no_further_turn() -> None:
    taken, failed = time_in_turn({"fine": lambda: None, "fails": lambda: 1 / 0}, 3, CPU)
    assert [len(times) for times in taken.values()] == [3]
    assert isinstance(failed["fails"], ZeroDivisionError)


def test_shapes_count_the_work_of_real_tokens() -> None:
    shape = Shape(heads=2, head_dim=8, seq=5, lengths=(3, 5), backward=False)
    assert shape.flops(5 * shape.tokens) == 4 * 2 * 8 * (5 * 3 + 5 * 5)
    assert dataclasses.replace(shape, backward=True).flops(2) == 4 * 2 * 8 * 2 * 3.5
    p = attention.problem(shape, torch.float16, CPU)
    slots, real = 2 * 5 * 16, 8 * 16
    assert attention.bytes_moved(p) == 2 * (slots + 2 * real + slots)


def test_length_mixes_are_as_their_names_say() -> None:
    for mix, mean, longest in ((squad, 177, 384), (sentences, 25, 128)):
        for count in (42, 655):
            lengths = mix(count)
            assert (len(lengths), max(lengths), min(lengths) > 0) == (count, longest, True)
            assert sum(lengths) / count == pytest.approx(mean, rel=0.1)
        assert mix(42) == mix(42)


def test_truth_in_parts_is_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(heads=3, head_dim=8, seq=6, lengths=(6, 2, 4), backward=True)
    p = attention.problem(shape, torch.float32, CPU)
    whole = attention.by_reference(p, upcast=True)
    for pairs in (1, 2, 3, 6, 7):
        monkeypatch.setattr(attention, "PART", pairs * shape.seq**2)
        for part, expected in zip(attention.by_reference(p, upcast=True), whole, strict=True):
            assert not torch.equal(expected, torch.zeros_like(expected))
            assert_equivalent(part, expected)


def test_an_unknown_case_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of residual_layernorm"):
        registry.cases(["softmax"])


def test_expressions_choose_sizes_and_variants(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["attention", "--quick", "--device", "cpu", "--rounds", "1"]
    assert main([*options, "--sizes", "masked forward$", "--variants", "^eager$"]) == 0
    assert capsys.readouterr().out.count("eager") == 1
    assert main([*options, "--list"]) == 0
    assert "SDPA cuDNN" in capsys.readouterr().out
    for expression in ("nothing has this label", "("):
        with pytest.raises(SystemExit, match="2"):
            main([*options, "--sizes", expression])
