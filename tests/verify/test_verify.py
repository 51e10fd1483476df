"""`verify`: right where the fast path is right, and at bugs planted in it, wrong with the layer and the op named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import pyaccel
from pyaccel import dispatch, ops, triton_support
from pyaccel.checkpoints import demo_checkpoint
from pyaccel.cli import app
from pyaccel.cli.verify import example_labels
from pyaccel.errors import UserInputError
from pyaccel.hf import plan
from pyaccel.hf.executors import packed, padded
from pyaccel.nn import encoder_layer
from pyaccel.packing import layout
from pyaccel.verify import VerifyReport, verify
from pyaccel.verify.op_cases import cases
from pyaccel.verify.op_checks import check_op, check_ops
from pyaccel.verify.policy import RunningMoments, judge_random
from pyaccel.verify.report import Check, read_budget
from pyaccel.verify.trace import layout_reason
from tests.hf.models import MASKS, batch_of, mask_of, randomize, tiny
from tests.hf.test_families import TINY

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"compiled": False, "ops": False, "backends": ["torch"]}
QUICK_COMMAND = [
    "verify",
    "--no-compile",
    "--no-ops",
    "--backend",
    "torch",
    "--batch-size",
    "2",
    "--max-length",
    "16",
]
MARK = 2e-12  # the eps of the layer in which a bug is planted


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return batch_of("right")


def marked(layer: int) -> Any:
    torch.manual_seed(1)
    model = tiny()
    for each in (model.encoder.layer[layer].attention.output, model.encoder.layer[layer].output):
        each.LayerNorm.eps = MARK
    return model


# --- right where it is right ----------------------------------------------------------------------------------------


# By the reference too where padding is as usual, and without any: it packs no other way.
@pytest.mark.parametrize(
    ("kind", "dtype", "backends"),
    [
        pytest.param("right", "fp32", ["torch", "reference"], id="right-fp32"),
        pytest.param("left", "bf16", ["torch"], id="left-bf16"),
        pytest.param("holes", "fp32", ["torch"], id="holes-fp32"),
        pytest.param("none", "bf16", ["torch", "reference"], id="none-bf16"),
    ],
)
def test_an_unharmed_model_is_right(kind: str, dtype: str, backends: list[str]) -> None:
    torch.manual_seed(0)
    wanted = None if "reference" in backends else backends
    report = verify(tiny(), batch_of(kind), dtypes=[dtype], compiled=False, ops=False, backends=wanted)
    assert report.passed, str(report)
    assert {check.backend for check in report.checks} == set(backends)
    kinds = {check.kind for check in report.checks}
    assert kinds == {"packing", "layer", "output", "gradient", "dropout", "bits"}
    layers = [
        check
        for check in report.checks
        if (check.kind, check.mode, check.backend) == ("layer", "packed", "torch")
    ]
    assert len(layers) == 3 * 5
    assert not any("part by part" in note for note in report.notes)


def test_without_triton(batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "_HAS_TRITON", False)
    torch.manual_seed(0)
    report = verify(tiny(num_hidden_layers=1), batch, compiled=False)
    assert report.passed, str(report)
    assert {check.backend for check in report.checks} == {"torch", "reference"}
    assert "the Triton kernels were not run: triton isn't installed" in report.notes


def test_the_model_is_left_as_it_is(batch: dict[str, Tensor]) -> None:
    model = tiny()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    verify(model, batch, **QUICK)
    assert type(model.encoder) is transformers.models.bert.modeling_bert.BertEncoder
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_what_the_fast_path_does_not_serve_is_said(
    batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = verify(tiny(num_hidden_layers=1), {**batch, "output_hidden_states": True}, **QUICK)
    assert report.passed, str(report)
    assert any("padding was kept: hidden states or attentions are captured" in note for note in report.notes)
    assert any(check.where == "hidden_states[1]" for check in report.checks)
    monkeypatch.setattr(plan, "call_reason", lambda *args, **options: "it is Friday")
    report = verify(tiny(num_hidden_layers=1), batch, **QUICK)
    assert report.passed, str(report)
    assert not any(check.kind == "layer" for check in report.checks)
    for mode in ("packed", "padded"):
        assert any(
            f"{mode}: " in note and "ran the stock layer: it is Friday" in note for note in report.notes
        )


@pytest.mark.parametrize("family", ["RoBERTa", "ELECTRA", "DistilBERT", "ALBERT"])
def test_other_families_are_compared_part_by_part(family: str, batch: dict[str, Tensor]) -> None:
    prefix, sizes = TINY[family]
    torch.manual_seed(0)
    kind = getattr(transformers, f"{prefix}Model")
    model = randomize(kind(kind.config_class(vocab_size=97, **sizes))).eval()
    if family == "DistilBERT":
        batch.pop("token_type_ids")
    report = verify(model, batch, **QUICK)
    assert report.passed, str(report)
    assert sum(check.kind == "layer" for check in report.checks) == 2 * 5 * (4 if family == "ALBERT" else 3)


@pytest.mark.parametrize(
    "head", ["MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "QuestionAnswering"]
)
def test_heads_have_a_loss(head: str, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = tiny(
        getattr(transformers, f"BertFor{head}"),
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    report = verify(model, {**batch, **example_labels(model, batch)}, **QUICK)
    assert report.passed, str(report)
    assert {check.where for check in report.checks if "loss" in check.where} == {"loss", "loss in training"}


def test_compiled(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    report = verify(tiny(num_hidden_layers=1), batch, ops=False, backends=["torch"])
    assert report.passed, str(report)
    assert {check.kind for check in report.checks if check.mode == "compiled"} == {"output", "gradient"}


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_op_on_every_backend(backend: str, dtype: torch.dtype) -> None:
    refused = set()
    for case in cases():
        if backend == "triton" and dtype != torch.float32 and "gradient" in case.kind:
            continue  # minutes of the interpreter; the ops' own tests do these
        try:
            check = check_op(case, dtype, backend, CPU, str(dtype))
        except pyaccel.errors.NotSupportedError:
            refused.add(case.op)
            continue
        assert check.status == "passed", str(check)
    assert not refused


def test_what_a_backend_cannot_serve_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "_HAS_TRITON", False)
    notes: list[str] = []
    assert list(check_ops(torch.float32, "triton", CPU, "fp32", notes)) == []
    assert len(notes) == len(cases())
    assert all("triton is not installed" in note for note in notes)


# --- wrong where it is wrong ----------------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def swapped_gamma_and_beta(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoder_layer.linear_residual_layernorm

    def planted(module: Any, x: Tensor, residual: Tensor) -> Tensor:
        norm = module.LayerNorm
        if norm.eps != MARK or "SelfOutput" not in type(module).__name__:
            return whole(module, x, residual)
        swapped = SimpleNamespace(weight=norm.bias, bias=norm.weight, eps=norm.eps)
        return whole(
            SimpleNamespace(dense=module.dense, dropout=module.dropout, LayerNorm=swapped), x, residual
        )

    monkeypatch.setattr(encoder_layer, "linear_residual_layernorm", planted)


def mask_shifted_in_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "layout", lambda mask, **options: layout(mask.roll(1, 1), **options))


def mask_shifted_in_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = padded._padded_attention
    monkeypatch.setattr(
        padded,
        "_padded_attention",
        lambda mask, *rest: whole(None if mask is None else mask.roll(1, 1), *rest),
    )


def dropout_without_rescaling(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ops.varlen_attention.__wrapped__  # the op, past its observers

    def varlen_attention(*args: Any, dropout_p: float = 0.0, **options: Any) -> Tensor:
        return whole(*args, dropout_p=dropout_p, **options) * (1.0 - dropout_p)

    monkeypatch.setattr(ops, "varlen_attention", dispatch.observable(varlen_attention))


def hidden_dropout_without_rescaling(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ops.linear_residual_layernorm

    def planted(
        x: Tensor, weight: Tensor, bias: Tensor, *rest: Any, dropout_p: float, **options: Any
    ) -> Tensor:
        kept = 1.0 - dropout_p if options["training"] else 1.0
        return whole(x, weight * kept, bias * kept, *rest, dropout_p=dropout_p, **options)

    monkeypatch.setattr(ops, "linear_residual_layernorm", planted)


def attention_never_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ops.varlen_attention
    monkeypatch.setattr(
        ops, "varlen_attention", lambda *args, **options: whole(*args, **{**options, "dropout_p": 0.0})
    )


def gelu_tanh_for_erf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_layer, "activation_name", lambda function: "gelu_tanh")


@pytest.mark.parametrize(
    ("plant", "kind", "where", "op"),
    [
        (swapped_gamma_and_beta, "layer", "1: attention.output", "residual_layernorm"),
        (mask_shifted_in_the_layout, "packing", "the packed layout", "packing"),
        (mask_shifted_in_attention, "layer", "0: attention", "scaled_dot_product_attention"),
        (attention_never_drops, "dropout", "0: attention, under dropout of attention", "varlen_attention"),
        (
            dropout_without_rescaling,
            "dropout",
            "0: attention, under dropout of attention",
            "varlen_attention",
        ),
        (
            hidden_dropout_without_rescaling,
            "dropout",
            "0: attention.output, under dropout of attention.output",
            "residual_layernorm",
        ),
        (gelu_tanh_for_erf, "layer", "0: intermediate", "linear_activation"),
    ],
)
def test_a_planted_bug_is_found_and_named(
    plant: Plant, kind: str, where: str, op: str, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = marked(1)
    plant(monkeypatch)
    if (
        kind != "dropout" and where != "0: attention"
    ):  # that one shows in the padded model, after packed dropout
        monkeypatch.setattr("pyaccel.verify.model.DROPOUT_RUNS", 2)  # this bug shows without
    report = verify(model, batch, **QUICK)
    first = report.first_wrong
    assert report.exit_code == 1
    assert first is not None
    assert (first.kind, first.where) == (kind, where), str(report)
    assert op in first.op


def test_a_bug_of_an_op_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ops.residual_layernorm

    def planted(*args: Any, **options: Any) -> Any:
        return whole(*args, **{**options, "eps": 1e-3})

    monkeypatch.setattr(ops, "residual_layernorm", planted)
    found = [check_op(case, torch.float32, "torch", CPU, "fp32") for case in cases()]
    wrong = {check.where for check in found if check.status != "passed"}
    assert "residual_layernorm: tiny variances" in wrong
    assert {where.split(":")[0] for where in wrong} == {"residual_layernorm"}


def test_an_op_that_changes_from_run_to_run_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = ops.bias_gelu, iter(range(10**6))
    monkeypatch.setattr(ops, "bias_gelu", lambda *args: whole(*args) * (1.0 + 1e-7 * (next(calls) % 2)))
    case = next(case for case in cases() if case.op == "bias_gelu")
    assert "differ in their bits" in check_op(case, torch.float32, "torch", CPU, "fp32").detail


def test_what_raises_is_not_run_rather_than_right(
    monkeypatch: pytest.MonkeyPatch, batch: dict[str, Tensor]
) -> None:
    monkeypatch.setattr(ops, "bias_gelu", lambda *args: 1 / 0)
    case = next(case for case in cases() if case.op == "bias_gelu")
    check = check_op(case, torch.float32, "torch", CPU, "fp32")
    assert (check.status, check.detail) == ("error", "ZeroDivisionError: division by zero")
    monkeypatch.setattr(torch, "compile", lambda *args, **options: 1 / 0)
    report = verify(tiny(num_hidden_layers=1), batch, ops=False, backends=["torch"])
    assert (report.exit_code, [check.where for check in report.errors]) == (2, ["torch.compile"])


# --- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
def test_layouts_are_right(kind: str) -> None:
    mask = mask_of(kind).bool()
    for options in ({}, {"sort_by_length": True, "keep_first": True}):
        assert layout_reason(layout(mask, **options), mask) is None
        if not mask.all():
            assert layout_reason(layout(mask.roll(1, 1), **options), mask) is not None


def test_results_of_the_same_distribution_are_alike_and_others_are_not() -> None:
    def moments(p: float, factor: float = 1.0) -> RunningMoments:
        found = RunningMoments()
        for _ in range(64):
            found.add(factor * torch.nn.functional.dropout(torch.ones(50, 40), p))
        return found

    torch.manual_seed(0)
    ours = moments(0.1)
    assert ours.variance.mean().item() == pytest.approx(0.1 / 0.9, rel=0.1)
    ratio, allowed = judge_random(ours, moments(0.1))
    assert ratio == pytest.approx(1.0, abs=0.2)
    assert ratio < allowed
    for other in (
        moments(0.1, 0.9),
        moments(0.2),
        moments(0.0),
    ):  # not rescaled, too often, never: right means
        assert judge_random(ours, other)[0] > allowed
        assert judge_random(other, ours)[0] > allowed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ["fp8"]}, "unknown dtypes"),
        ({"dtypes": []}, "unknown dtypes"),
        ({"backends": ["cuda"]}, "unknown backends"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        verify(tiny(), batch, **options)


def test_bad_input(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="must have input_ids"):
        verify(tiny(), {})
    with pytest.raises(ValueError, match="no token"):
        verify(tiny(), {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])})
    with pytest.raises(ValueError, match="attention_mask must be"):
        verify(tiny(), {**batch, "attention_mask": torch.ones(5, 3)})
    model = tiny()
    pyaccel.accelerate(model)
    with pytest.raises(ValueError, match="give the stock one"):
        verify(model, batch)


# --- report, command line, plugin -----------------------------------------------------------------------------------


def report_of(*statuses: str) -> VerifyReport:
    checks = [
        Check(
            "layer",
            f"{i}: output",
            "residual_layernorm",
            "fp32",
            "torch",
            "packed",
            status,
            0.5 + i,
            1.0,
            "<far>",
        )
        for i, status in enumerate(statuses)
    ]
    return VerifyReport("a model", {"torch": "2"}, checks)


def test_exit_codes() -> None:
    assert report_of("passed", "passed").exit_code == 0
    assert report_of("passed", "failed", "error").exit_code == 1
    assert report_of("passed", "error").exit_code == 2
    assert report_of().exit_code == 2


def test_json_budget_and_junit(tmp_path: Path) -> None:
    report = report_of("passed", "failed", "error")
    report.write_json(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["first_wrong"]["where"] == "1: output"
    budget = read_budget(tmp_path / "report.json")
    assert report.over_budget(budget) == []
    assert report.over_budget({**budget, report.checks[0].key: 0.4}) == report.checks[:1]
    report.write_junit(tmp_path / "report.xml")
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert [[child.tag for child in case] for case in suite] == [[], ["failure"], ["error"]]
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="not a report"):
        read_budget(tmp_path / "other.json")


VOCABULARY = 4000  # of a BERT's 30522 words the most frequent ones, special tokens and letters come first


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One layer of the demo's checkpoint, without its rare words, and a text: as the command takes them.

    ``make nightly`` takes all of it.
    """
    folder = tmp_path_factory.mktemp("minilm")
    model = transformers.AutoModel.from_pretrained(demo_checkpoint(), num_hidden_layers=1)
    model.resize_token_embeddings(VOCABULARY)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(demo_checkpoint()).save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text(
        "The value of this name is the same as before.\nThere is another way to say what it is.\n"
    )
    return [str(folder), "--text", str(text)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_minilm_is_right_and_a_budget_holds_errors_down(
    tmp_path: Path, dtype: str, minilm: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == "bf16":  # slow on a CPU without it; fp32 shows what dropout does
        monkeypatch.setattr("pyaccel.verify.model._DROPOUTS", {})
    files = ["--json", str(tmp_path / "r.json"), "--junit", str(tmp_path / "r.xml")]
    key = f"{dtype} | torch | packed | output | last_hidden_state"
    recorded = 1.0 if dtype == "fp32" else 0.0  # no error at all is not to be had
    (tmp_path / "budget.json").write_text(json.dumps({"checks": [{"key": key, "error": recorded}]}))
    budget = ["--budget", str(tmp_path / "budget.json")]
    done = CliRunner().invoke(app, [*QUICK_COMMAND, *minilm, "--dtype", dtype, *files, *budget])
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["passed"], done.output
    assert ElementTree.parse(tmp_path / "r.xml").getroot().get("failures") == "0"
    if dtype == "fp32":
        assert done.exit_code == 0, done.output
        assert f"passed: {len(saved['checks'])} checks" in done.stdout
    else:
        assert done.exit_code == 1
        assert "above budget: output last_hidden_state [bf16, torch, packed]" in done.stdout
        assert "passed, but 1 errors are above the budget" in done.stdout


def test_the_command_names_layer_and_op(monkeypatch: pytest.MonkeyPatch, minilm: list[str]) -> None:
    gelu_tanh_for_erf(monkeypatch)
    monkeypatch.setattr("pyaccel.verify.model.DROPOUT_RUNS", 2)  # this bug shows without
    done = CliRunner().invoke(app, [*QUICK_COMMAND, *minilm, "--dtype", "fp32"])
    assert done.exit_code == 1
    assert "FAILED, first layer: 0: intermediate, computed by linear_activation" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere/at/all"], "there is no folder nowhere/at/all"),
        (["--budget", "nowhere.json"], "--budget"),
        (["--json", "nowhere/r.json"], "there is no folder"),
        (["--dtype", "fp8"], "unknown dtypes"),
        (["--backend", "triton", "--no-ops"], "triton"),
    ],
)
def test_bad_command_lines(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = CliRunner().invoke(
        app, ["verify", "--no-compile", "--batch-size", "2", "--max-length", "8", *options]
    )
    assert isinstance(done.exception, UserInputError), done.output
    assert message in str(done.exception)


def test_the_plugin_fails_a_test_with_the_report(
    pyaccel_verify: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pyaccel_verify(tiny(num_hidden_layers=1), batch, **QUICK).passed
    gelu_tanh_for_erf(monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="0: intermediate"):
        pyaccel_verify(tiny(num_hidden_layers=1), batch, **QUICK)
