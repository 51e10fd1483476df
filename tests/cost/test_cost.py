"""The cost lane: the promises about a BERT layer's launches and bytes, and the counter itself."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from pyaccel import dispatch, ops, triton_support
from pyaccel.cli import app
from pyaccel.cost.layer import FUSED, INT8, OURS, STOCK, LayerSize, layer_costs
from pyaccel.cost.recorder import Cost, Recorder, Step
from pyaccel.cost.roofline import DeviceSpec
from pyaccel.models.bert import BertConfig, BertLayer
from pyaccel.ops.attention import custom_ops as attention_ops
from pyaccel.ops.int8 import triton as int8
from pyaccel.ops.linear import triton as linear_triton
from pyaccel.packing import layout
from pyaccel.quantization import freeze, prepare_qat

SIZES = [
    LayerSize(),
    LayerSize(batch=4, seq=512),
    LayerSize(batch=2, seq=512, hidden=1024, heads=16, intermediate=4096),
    LayerSize(batch=1, seq=32, dtype=torch.float16),
]


@pytest.fixture(scope="module", params=SIZES, ids=str)
def costs(request: pytest.FixtureRequest) -> tuple[LayerSize, dict[str, dict[str, Cost]]]:
    return request.param, layer_costs(request.param)


def token_bytes(size: LayerSize) -> int:
    """Of the hidden states."""
    return size.batch * size.seq * size.hidden * size.dtype.itemsize


def test_evaluation_is_nine_launches_and_seven_tenths_of_stocks_bytes(costs: Any) -> None:
    size, by_name = costs
    stock, ours, fused = (by_name[name]["evaluation"] for name in (STOCK, OURS, FUSED))
    assert stock.forward_launches == 12
    assert ours.forward_launches == 10
    assert fused.forward_launches == 9
    assert 40.0 <= stock.activation_bytes / token_bytes(size) <= 40.1
    assert fused.activation_bytes / token_bytes(size) == 28.0
    assert fused.activation_bytes <= 0.7 * stock.activation_bytes
    for one in (stock, ours, fused):
        assert (one.backward, one.saved_bytes) == ((), 0)


def test_training_saves_two_thirds_of_stocks_bytes(costs: Any) -> None:
    size, by_name = costs
    stock, ours, fused = (by_name[name]["training"] for name in (STOCK, OURS, FUSED))
    assert 17.0 <= stock.saved_bytes / token_bytes(size) <= 17.2
    for one in (ours, fused):
        assert 11.0 <= one.saved_bytes / token_bytes(size) <= 11.2
        assert one.saved_bytes <= 0.65 * stock.saved_bytes
        assert one.backward_launches < stock.backward_launches
        assert one.activation_bytes < stock.activation_bytes


def test_both_multiply_as_much(costs: Any) -> None:
    _, by_name = costs
    flops = {name: sum(step.flops for step in by["evaluation"].forward) for name, by in by_name.items()}
    assert flops[STOCK] == flops[OURS] == flops[FUSED]
    attention = sum(
        s.flops for s in by_name[INT8]["evaluation"].forward if s.op == "pyaccel::attention_forward"
    )
    assert 2 * (flops[INT8] - attention) == flops[OURS] - attention  # int8 is twice as fast


def test_a_recorded_step() -> None:
    weight = torch.empty(8, 16, device="meta")
    x = torch.empty(5, 16, device="meta")
    with Recorder([weight]) as recorder:
        F.gelu(F.linear(x, weight).view(40)[:8])
        torch.cat([weight, weight])
        x.add_(1.0)
    product, gelu, cat, add = recorder.steps
    assert (product.activation_bytes, product.parameter_bytes) == (4 * (80 + 40), 4 * 128)
    assert product.flops == 2 * 5 * 16 * 8
    assert (gelu.op, gelu.activation_bytes, gelu.flops) == ("aten::gelu", 4 * 16, 0)
    assert (cat.activation_bytes, cat.parameter_bytes) == (0, 4 * 4 * 128)  # made of parameters alone
    assert (add.op, add.launches) == ("aten::add_", 1)
    assert sum(step.launches for step in recorder.steps) == 4


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("seq", "kind"),
    # Long sequences have other kernels of attention, which no kind but int8 changes anything around.
    [(7, "fused"), (7, "parts"), (7, "int8"), (7, "int8, deployed"), (131, "fused"), (131, "int8")],
)
def test_our_ops_launch_as_many_kernels_as_is_said(
    seq: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    from pyaccel.ops.linear import onednn

    launched = 0
    call = interpreter.GridExecutor.__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal launched
        launched += 1
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    monkeypatch.setattr(onednn, "on_gpu", lambda x: True)
    layer = BertLayer(BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=48)).train()
    if kind.startswith("int8"):
        encoder = nn.Sequential(OrderedDict(layers=nn.ModuleList([layer])))
        prepare_qat(encoder)
        if kind == "int8, deployed":
            freeze(encoder)
    hidden = torch.randn(seq, 32, requires_grad=True)
    recorder = Recorder(list(layer.parameters()))
    ops = ["residual_layernorm", "bias_gelu", "varlen_attention", "int8_matmul"]
    ops += ["linear_activation"] if kind == "fused" else []
    launched = 0  # of freeze
    with dispatch.use_backend("triton", ops=ops), recorder:
        layer(hidden, layout(torch.ones(1, seq, dtype=torch.bool))).square().sum().backward()
    names = [step.op for step in recorder.steps if step.op.startswith("pyaccel::")]
    assert len(names) >= 9
    assert launched == sum(step.launches for step in recorder.steps if step.op in names)


def test_the_command_prints_the_figures() -> None:
    result = CliRunner().invoke(app, ["cost", "--batch", "2", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)
    assert [row["mode"] for row in rows] == ["evaluation"] * 4 + ["training"] * 4
    assert {row["layer"] for row in rows} == {STOCK, OURS, FUSED, INT8}
    assert rows[3]["layer"] == INT8
    assert rows[3]["least_seconds"] < 0.85 * rows[1]["least_seconds"]
    assert rows[6]["saved_bytes_of_stock"] <= 0.65
    table = CliRunner().invoke(app, ["cost", "--card", "H100"])
    assert table.exit_code == 0, table.output
    assert "64." in table.output
    assert "fused product" in table.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--card", "B3"], "expected one of A100"),
        (["--dtype", "int4"], "expected one of"),
        (["--hidden-size", "70"], "not a multiple of 12 heads"),
    ],
)
def test_bad_options_are_named(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["cost", *arguments])
    assert words in str(result.exception)


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        layer_costs(LayerSize())


def test_least_time_is_the_greater_of_bytes_and_flops() -> None:
    card = DeviceSpec(bandwidth=10.0, flops=100.0)
    steps = (Step("a", 1, 15, 5, 100), Step("b", 1, 10, 0, 500))
    assert Cost(steps, (), 0).seconds(card) == 2.0 + 5.0


def test_formulas_by_hand() -> None:
    query, value = torch.empty(2, 3, 5, 4, device="meta"), torch.empty(2, 3, 7, 6, device="meta")
    # Scores of 5 x 7: 4 products each; then 6 values from 7 products; a multiplication and an addition each.
    assert attention_ops.forward_flops(query, value, 7) == 2 * 3 * (5 * 7 * 4 + 5 * 6 * 7) * 2
    # Scores again, dquery and dkey over 4; dprobs and dvalue over 6.
    assert attention_ops.backward_flops(query, value, 7) == 2 * 3 * (3 * 5 * 7 * 4 + 2 * 5 * 7 * 6) * 2
    packed = torch.empty(1, 3, 9, 4, device="meta")
    assert attention_ops.forward_flops(packed, packed, 5, lengths=[5, 1, 3]) == 3 * (25 + 1 + 9) * (4 + 4) * 2
    x, weight = torch.empty(2, 5, 4, device="meta"), torch.empty(7, 4, device="meta")
    assert linear_triton.forward_flops(x, weight) == 10 * 7 * 4 * 2
    assert int8.matmul_flops(x.flatten(0, 1), weight) == 10 * 7 * 4 * 2 / 2


def test_the_counter_takes_them() -> None:
    q = torch.empty(1, 2, 8, 16, device="meta", dtype=torch.bfloat16)
    for lengths, scores in (([8], 64), ([3, 5], 34)):
        recorder = Recorder([], lengths)
        offsets = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
        with recorder:
            ops.varlen_attention(*[q[0].transpose(0, 1)] * 3, offsets, offsets, max(lengths), max(lengths))
        assert sum(step.flops for step in recorder.steps) == 2 * 2 * scores * (16 + 16)
