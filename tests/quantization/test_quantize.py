"""Quantization of a real encoder: how right it is, what it changes, and the way back."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pyaccel
from pyaccel.models.bert import BertConfig, BertModel
from pyaccel.nn import Int8Linear, ObservedLinear
from pyaccel.quantization import calibrate, dequantize, freeze, prepare_qat, quantize, sensitivity
from tests.assertions import assert_bits_equal
from tests.hf.models import tiny
from tests.quantization.conftest import Real


def test_dynamic_int8_is_as_right_as_promised(real: Real) -> None:
    model = real.model()
    accelerated = pyaccel.accelerate(model)
    report = quantize(model)
    assert len(report.quantized) == 36
    assert set(report.skipped.values()) == {"not in an encoder layer"}
    assert report.bytes_after < 0.26 * report.bytes_before
    cosines = real.cosines(model)
    assert cosines.mean() >= 0.998
    assert cosines.min() >= 0.995
    assert accelerated.served == Counter(packed=6 * len(real.batches))  # by this project's own layers
    assert not accelerated.refused["padded"]
    plain = quantized(real.model())
    # Not the same bits: where the last bit of a LayerNorm differs, a code may.
    assert torch.cosine_similarity(real.embeddings(plain), real.embeddings(model)).min() > 0.995


def quantized(model: Any, *args: Any, **kwargs: Any) -> Any:
    quantize(model, *args, **kwargs)
    return model


def test_smoothing_makes_it_better_and_static_scales_worse(real: Real) -> None:
    model = real.model()
    pyaccel.accelerate(model)
    seen = calibrate(model, real.batches[:3], progress=False)
    assert seen.batches == 3
    assert not any(isinstance(module, ObservedLinear) for module in model.modules())
    tokens = sum(int(batch["attention_mask"].sum()) for batch in real.batches[:3])
    assert {statistics.tokens for statistics in seen.inputs.values()} == {tokens}  # no padding
    cosines = {
        "dynamic": real.cosines(quantized(copy.deepcopy(model))),
        "smooth": real.cosines(quantized(copy.deepcopy(model), smooth=True, calibration=seen)),
        "static": real.cosines(quantized(copy.deepcopy(model), "static", calibration=seen)),
        "clamped": real.cosines(
            quantized(copy.deepcopy(model), "static", calibration=seen, observer="percentile")
        ),
    }
    means = {name: values.mean().item() for name, values in cosines.items()}
    assert sorted(means, key=means.__getitem__) == ["clamped", "static", "dynamic", "smooth"]
    assert cosines["smooth"].min() > cosines["dynamic"].min() >= 0.995
    assert means["static"] > 0.97


def test_weight_only_is_the_most_accurate(real: Real) -> None:
    model = real.model()
    accelerated = pyaccel.accelerate(model)
    assert quantize(model, "weight_only").bytes_after < 0.26 * quantize(real.model()).bytes_before
    cosines = real.cosines(model)
    assert cosines.min() >= 0.999  # the smoothed dynamic layers' is 0.9977
    assert accelerated.served == Counter(packed=6 * len(real.batches))
    assert not accelerated.refused["padded"]
    with pytest.raises(ValueError, match="leaves them as they are"):
        quantize(real.model(), "weight_only", smooth=True, calibration=real.batches[:1])
    with pytest.raises(ValueError, match="'dynamic' or 'weight_only'"):
        prepare_qat(real.model(), "static")  # type: ignore[arg-type]


def test_the_costliest_layers_are_named(real: Real) -> None:
    model = real.model()
    found = sensitivity(model, real.batches[:2], progress=False)
    assert len(found.sqnr_db) == 36
    assert all(25 < decibels < 60 for decibels in found.sqnr_db.values())
    worst = found.leave(count=6)
    assert worst == found.costliest()[:6]
    assert all(found.sqnr_db[name] < found.sqnr_db[worst[-1]] + 1e-9 for name in worst)
    assert found.leave(below_db=found.sqnr_db[worst[2]]) == worst[:2]
    assert worst[0] in str(found).splitlines()[1]
    one = found.saved_bytes[worst[0]]
    assert (
        one
        == real.stock.get_submodule(worst[0]).weight.numel() * 3
        - 4 * real.stock.get_submodule(worst[0]).out_features
    )
    assert found.leave(max_bytes=one) == worst[:1]
    assert found.leave(max_bytes=0) == []
    within = found.leave(max_bytes=3 * one + 1)
    assert sum(found.saved_bytes[name] for name in within) <= 3 * one + 1
    assert within == [name for name in found.costliest() if name in within]
    with pytest.raises(ValueError, match="one of count, below_db and max_bytes"):
        found.leave()
    report = quantize(model, skip=worst)
    assert [name for name, why in report.skipped.items() if why == "skip"] == [
        name for name, _ in model.named_modules() if name in worst
    ]
    cosines = real.cosines(model)
    assert cosines.mean() > real.cosines(quantized(real.model())).mean()
    pyaccel.accelerate(model)  # layers that are int8 in part take the fast path too
    assert (real.cosines(model) - cosines).abs().max() < 1e-3


def test_back_to_floating_point_and_onto_bfloat16(real: Real) -> None:
    model = real.model()
    pyaccel.accelerate(model)
    quantize(model)
    assert pyaccel.explain(model).backends["int8_matmul"] == "torch"
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert real.cosines(half).mean() > 0.998
    dequantize(model)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
    assert real.cosines(model).min() > 0.999
    pyaccel.restore(model)
    assert real.cosines(model).min() > 0.999


def test_what_cannot_be_done_is_said() -> None:
    model = tiny()
    for call, message in (
        (lambda: quantize(model, "fp8"), "unknown method 'fp8'"),
        (lambda: quantize(model, "static"), "method 'static' needs calibration="),
        (lambda: quantize(model, smooth=True), "smooth=True needs calibration="),
        (lambda: quantize(model, "static", calibration=[]), "no batches to calibrate with"),
        (lambda: quantize(model, skip=["*.nowhere"]), r"fits '\*\.nowhere'"),
        (lambda: quantize(model, skip="query"), "skip must be a list"),
        (lambda: quantize(model, observer="mean"), "unknown observer 'mean'"),
        (lambda: quantize(nn.Linear(3, 3)), "nothing to quantize"),
        (lambda: dequantize(model), "no Int8Linear"),
        (lambda: freeze(model), "no Int8Linear"),
        (lambda: sensitivity(nn.Linear(3, 3), [torch.ones(3)]), "no floating linear layer"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not any(isinstance(module, (Int8Linear, ObservedLinear)) for module in model.modules())
    quantize(model)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model)


def test_calibration_takes_batches_as_they_come() -> None:
    model = tiny()
    ids = torch.randint(0, 97, (2, 6))
    seen = calibrate(model, [ids, (ids,), {"input_ids": ids}], progress=False)
    assert seen.batches == 3
    assert not model.training
    one = seen.inputs["encoder.layer.0.attention.self.query"]
    assert one.tokens == 36
    assert int(one.histogram.sum()) == 36 * 32
    assert one.percentile(100) == one.amax
    x = torch.randn(200, 32).abs()
    seen.add("x", x)
    for percent in (50, 90, 99):
        assert 0.99 < seen.inputs["x"].percentile(percent) / x.quantile(percent / 100) < 1.04
    with torch.no_grad():
        model.embeddings.LayerNorm.bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"query has NaN or inf"):
        calibrate(model, [ids], progress=False)


def small_model(**changes: Any) -> BertModel:
    config = BertConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        **changes,
    )
    return BertModel(config).eval()


@pytest.mark.parametrize("method", ["dynamic", "static", "smooth", "weight_only"])
def test_files(method: str, tmp_path: Path) -> None:
    model = small_model()
    ids = torch.randint(0, 97, (3, 7))
    floating = model(ids).last_hidden_state.detach()
    model.save_pretrained(tmp_path / "float")
    options: dict[str, Any] = {"smooth": True} if method == "smooth" else {"method": method}
    if method in ("static", "smooth"):
        options["calibration"] = [ids]
    quantize(model, **options)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    assert 0 < (expected - floating).abs().max() < 0.2
    model.save_pretrained(tmp_path / "int8")
    weights = load_file(tmp_path / "int8" / "model.safetensors")
    name = "encoder.layer.1.intermediate.dense"
    assert weights[f"{name}.weight"].dtype == torch.int8
    assert weights[f"{name}.weight_scale"].dtype == torch.float32
    loaded = BertModel.from_pretrained(tmp_path / "int8")
    with torch.no_grad():
        assert_bits_equal(loaded(ids).last_hidden_state, expected)
    half = BertModel.from_pretrained(tmp_path / "int8", dtype=torch.bfloat16)
    assert half.state_dict()[f"{name}.weight_scale"].dtype == torch.float32
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "int8" / "config.json").read_text()


def test_the_encoders_file_is_under_30_percent(real: Real, tmp_path: Path) -> None:
    real.stock.save_pretrained(tmp_path / "float")
    model = BertModel.from_pretrained(tmp_path / "float")
    quantize(model)
    model.save_pretrained(tmp_path / "int8")
    size = {}
    for folder in ("float", "int8"):
        weights = load_file(tmp_path / folder / "model.safetensors")
        size[folder] = sum(
            t.nbytes for name, t in weights.items() if "encoder." in name
        )  # embeddings stay fp32
    assert size["int8"] < 0.3 * size["float"]
    assert real.cosines(BertModel.from_pretrained(tmp_path / "int8")).min() >= 0.995


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model = small_model()
    quantize(model)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    query = '"encoder.layer.0.attention.self.query"'
    for old, new, message in (
        ("pyaccel_int8", "gptq", "a quantized checkpoint, by 'gptq'"),
        (query, '"encoder.layer.0.nowhere"', "which is no linear layer"),
        (f'{query}: "dynamic"', f'{query}: "fp8"', "unknown method 'fp8'"),
        (f'{query}: "dynamic"', f'{query}: "static"', r"missing .*query\.input_scale"),
    ):
        assert old in config
        (tmp_path / "config.json").write_text(config.replace(old, new))
        with pytest.raises(ValueError, match=message):
            BertModel.from_pretrained(tmp_path)
    trainable = small_model()
    pyaccel.quantization.prepare_qat(trainable)
    with pytest.raises(ValueError, match="still trains"):
        trainable.save_pretrained(tmp_path)


def test_gradients_flow_through_a_quantized_encoder() -> None:
    """A frozen int8 encoder under a head that trains, and its own biases and LayerNorms."""
    model = small_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    quantize(model)
    out = model(torch.randint(0, 97, (2, 5))).last_hidden_state
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "pooler" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or "key.bias" in name, name
