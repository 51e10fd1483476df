"""Every benchmark case on tiny shapes: it runs, checks its answers, and says what is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from pyaccel.benchmarks import registry, run, table
from pyaccel.benchmarks.case import GROUPS, Case, Variant
from pyaccel.benchmarks.cases import attention, bert
from pyaccel.benchmarks.cases.attention_shapes import Shape, sentences, squad
from pyaccel.benchmarks.method import measure
from tests.assertions import assert_equivalent

CPU = torch.device("cpu")
STOCK = {"stock, SDPA", "stock, eager", "torch.compile"}
ENGINES = {"ONNX Runtime", "OpenVINO"}
NEEDS = {
    "ONNX Runtime": ("onnxruntime", "onnx", "onnxscript"),
    "OpenVINO": ("openvino",),
    "torchao, torch.compile": ("torchao",),
}
ABSENT = {name for name, needs in NEEDS.items() if any(importlib.util.find_spec(n) is None for n in needs)}
SDPA_BACKENDS = {"SDPA flash", "SDPA cuDNN", "SDPA efficient"}


def test_each_case_runs_and_writes_its_csv(tmp_path: Path) -> None:
    """A case that is renamed or gone, or a variant, is missed here."""
    file = tmp_path / "results" / "rows.csv"
    jobs = run.plan(None, [torch.float32], CPU, sweep="smoke")
    written = list(run.run(jobs, CPU, sweep="smoke", file=file))
    again = run.plan(["residual_layernorm"], [torch.float32], CPU, sweep="smoke", against="^eager$")
    assert [v.name for v in again[0].case.variants] == ["pyaccel triton", "pyaccel torch", "eager"]
    list(run.run(again, CPU, sweep="smoke", file=file))
    rows = table.read(file)  # of the same thing the last one
    assert len(rows) == len(written) == sum(job.count for job in jobs)
    assert [row.variant for row in rows] == [row.variant for row in written]
    assert [row for row in rows if row.case != "residual_layernorm"] == [
        row for row in written if row.case != "residual_layernorm"
    ]
    assert {row.torch for row in rows} == {torch.__version__}
    assert {row.note.split(":")[0] for row in rows} == {"", "missing"}
    assert not any(table.bad(row) for row in rows)
    for case, timed, missing in (
        (
            "residual_layernorm",
            {"pyaccel torch", "eager", "torch.compile"},
            {"pyaccel triton", "Liger-Kernel"},
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
            {"pyaccel triton", "Liger-Kernel"},
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
                *{"torchao, torch.compile"} - ABSENT,
            },
            {"pyaccel triton", "pyaccel triton, weight only", *{"torchao, torch.compile"} & ABSENT},
        ),
        *(
            (
                name,
                {
                    "pyaccel",
                    "pyaccel, prepacked",
                    "pyaccel, padded",
                    *STOCK,
                    "torch.compile, frozen",
                    "torch.compile, max-autotune",
                    *ENGINES - ABSENT,
                },
                {"pyaccel, CUDA graphs", "pyaccel, padded, CUDA graph", *ENGINES & ABSENT},
            )
            for name in ("bert_layer", "bert")
        ),
        ("bert_training", {"pyaccel", *STOCK}, {"torch.compile, max-autotune"}),
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
        of_case = [row for row in rows if row.case == case]
        assert {row.variant for row in of_case if row.timed} == timed, case
        assert {row.variant for row in of_case if row.note} == missing, case
        assert all(row.timed == (row.max_error is not None) for row in of_case)
    assert {row.case for row in rows} == {case.name for case in registry.cases()}
    flex = [row for row in rows if row.variant == "FlexAttention"]
    assert {row.size.split()[-1] for row in flex if row.note} == {"forward+backward"}
    assert "missing: Triton's kernels need a GPU" in {row.note for row in rows}


@pytest.mark.parametrize("case", registry.cases(), ids=lambda case: case.name)
def test_each_case_has_its_sweeps(case: Case) -> None:
    assert case.group in GROUPS
    assert case.about
    for device in (CPU, torch.device("cuda")):
        full = case.sweep(device)
        assert full
        if device.type == "cpu":
            quick = case.sweep(device, "quick")
            assert quick.items() <= full.items()
            assert 0 < len(quick) <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["attention", "varlen_attention"])
def test_answers_are_right_in_16_bits(name: str, dtype: torch.dtype) -> None:
    (case,) = registry.cases([name])
    uncompiled = tuple(v for v in case.variants if v.name not in ("torch.compile", "FlexAttention"))
    rows = list(measure(dataclasses.replace(case, variants=uncompiled), dtype, CPU, smoke=True, rounds=1))
    assert {row.note.split(":")[0] for row in rows} == {"", "missing"}


def test_a_wrong_answer_is_not_timed() -> None:
    (case,) = registry.cases(["residual_layernorm"])
    wrong = Variant("pyaccel wrong", lambda p: lambda: tuple(t * 1.01 for t in case.naive(p)))
    case = dataclasses.replace(case, variants=(wrong, case.variants[2]))
    rows = list(measure(case, torch.float32, CPU, smoke=True, rounds=1))
    assert rows[0].note.startswith("wrong")
    assert rows[0].microseconds is None
    assert rows[1].microseconds is not None
    assert [table.bad(row) for row in rows] == [True, False]
    assert not table.bad(dataclasses.replace(rows[0], variant="a baseline"))  # shown, and no fault of ours


@pytest.mark.parametrize("output", range(4))
@pytest.mark.parametrize("name", ["attention", "varlen_attention"])
def test_a_wrong_output_or_gradient_is_found(name: str, output: int) -> None:
    (case,) = registry.cases([name])

    def prepare(p: Any) -> Any:
        return lambda: tuple(t * 1.01 if i == output else t for i, t in enumerate(case.naive(p)))

    last = dict([list(case.smoke.items())[-1]])
    case = dataclasses.replace(case, smoke=last, variants=(Variant("wrong", prepare),))
    (row,) = measure(case, torch.float32, CPU, smoke=True, rounds=1)
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
        Variant("fails to prepare", fails),
        Variant("pyaccel fails", lambda p: fails),
        Variant("fails later", fails_later),
        Variant("wrong count", lambda p: lambda: ()),
        case.variants[2],
    )
    first = dict([next(iter(case.smoke.items()))])
    rows = list(
        measure(
            dataclasses.replace(case, smoke=first, variants=variants),
            torch.float32,
            CPU,
            smoke=True,
            rounds=4,
        )
    )
    assert [row.note for row in rows[:3]] == ["error: RuntimeError: no kernel for this"] * 3
    assert rows[3].note.startswith("error: ValueError")
    assert [row.microseconds is None for row in rows] == [True] * 4 + [False]
    assert [table.bad(row) for row in rows] == [False, True, False, False, False]


def test_the_floor_is_what_the_machine_was_measured_to_need() -> None:
    (case,) = registry.cases(["attention"])
    case = dataclasses.replace(case, variants=(case.variants[2],))
    rows = {
        bound: next(measure(dataclasses.replace(case, flops=flops), torch.float32, CPU, smoke=True, rounds=3))
        for bound, flops in (("bytes", lambda p: 1), ("flops", lambda p: 10**12), ("neither", None))
    }
    assert rows["bytes"].floor_of == "bytes"
    assert rows["flops"].floor_of == "flops"
    assert rows["flops"].floor_microseconds == pytest.approx(1e6 / rows["flops"].matmul_teraflops_per_second)
    for row in rows.values():
        assert row.of_floor == pytest.approx(row.floor_microseconds / row.microseconds)
    assert rows["neither"].teraflops_per_second is None
    assert rows["neither"].matmul_teraflops_per_second is None


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
    with pytest.raises(
        ValueError, match="there is no case softmax: expected some of ops, layers, models, train"
    ):
        registry.cases(["softmax"])
    assert [case.name for case in registry.cases(["layers", "train"])] == ["bert_layer", "bert_training"]


def test_mixed_batches_of_a_bert_are_padded_as_they_say() -> None:
    def masks(batch: int, mix: str) -> torch.Tensor:
        size = bert.Size("minilm", batch, mix, layers=1, vocab_size=50)
        return bert.problem(size, torch.float32, CPU).batch["attention_mask"]

    for mix, mean, seq in (("sentences", 25, 128), ("squad", 177, 384)):
        one, many = masks(1, mix), masks(32, mix)
        assert one.shape == (1, seq)
        assert many.shape == (32, seq)
        assert one.sum() == pytest.approx(mean, rel=0.2)
        assert many.sum() / 32 == pytest.approx(mean, rel=0.05)
    assert masks(8, "full").all()
    longest = masks(32, "sentences, longest")
    assert longest.shape[1] == longest.sum(1).max() < 128
