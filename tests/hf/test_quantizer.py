"""int8 through transformers' own from_pretrained and save_pretrained."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

import pyaccel
from pyaccel import checkpoints
from pyaccel.hf import PyaccelInt8Config
from pyaccel.models import bert as our_bert
from pyaccel.nn import Int8Linear
from pyaccel.quantization import dequantize, freeze, prepare_qat, quantize
from tests.assertions import assert_bits_equal
from tests.hf.models import batch_of, tiny


@torch.no_grad()
def answer(model: Any) -> Tensor:
    torch.manual_seed(7)
    with pyaccel.use_backend("torch"):
        return model(**batch_of())[0]


def int8_layers(model: nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny(BertForSequenceClassification).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.mark.parametrize("method", ["dynamic", "weight_only"])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification], ids=["encoder", "head"])
def test_loaded_in_int8_as_quantized_in_place_and_again(auto: Any, method: str, folder: Path) -> None:
    expected = auto.from_pretrained(folder)
    stock = answer(expected)
    quantize(expected, method)  # type: ignore[arg-type]
    model = auto.from_pretrained(folder, quantization_config=PyaccelInt8Config(method))
    assert len(int8_layers(model)) == 18
    assert all(layer.is_frozen and layer.method == method for layer in int8_layers(model).values())
    assert_bits_equal(answer(model), answer(expected))
    assert 0 < (answer(model) - stock).abs().max() < 0.3

    model.save_pretrained(folder.parent / "int8")
    again = auto.from_pretrained(folder.parent / "int8")
    assert_bits_equal(answer(again), answer(model))
    assert again.state_dict().keys() == model.state_dict().keys()
    weights = load_file(folder.parent / "int8" / "model.safetensors")
    codes = [name for name, tensor in weights.items() if tensor.dtype == torch.int8]
    assert len(codes) == 18
    assert all(weights[f"{name}_scale"].dtype == torch.float32 for name in codes)
    again.save_pretrained(folder.parent / "once more")
    for name in ("config.json", "model.safetensors"):
        assert (folder.parent / "once more" / name).read_bytes() == (
            folder.parent / "int8" / name
        ).read_bytes()


@pytest.mark.parametrize("kind", ["static", "smooth"])
def test_what_needs_data_is_quantized_in_place_and_loads(kind: str, tmp_path: Path) -> None:
    model = tiny(BertForMaskedLM)
    batch = batch_of()
    options: dict[str, Any] = {"method": "static"} if kind == "static" else {"smooth": True}
    quantize(model, calibration=[batch], skip=["*.2.output.dense"], **options)
    model.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    assert_bits_equal(answer(loaded), answer(model))
    assert type(loaded.bert.encoder.layer[2].output.dense) is nn.Linear
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    for name, layer in int8_layers(loaded).items():
        assert (layer.input_scale is not None, layer.smooth_scale is not None) == (
            kind == "static",
            kind == "smooth" and model.get_submodule(name).smooth_scale is not None,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized", [False, True], ids=["on the fly", "int8 folder"])
def test_scales_stay_fp32_in_16_bits(dtype: torch.dtype, quantized: bool, folder: Path) -> None:
    options: dict[str, Any] = {"quantization_config": PyaccelInt8Config()}
    if quantized:
        AutoModel.from_pretrained(folder, **options).save_pretrained(folder.parent / "int8")
        folder, options = folder.parent / "int8", {}
    model = AutoModel.from_pretrained(folder, dtype=dtype, **options)
    for layer in int8_layers(model).values():
        assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)  # type: ignore[union-attr]
        assert layer.bias is not None
        assert layer.bias.dtype == dtype
    assert answer(model).dtype == dtype
    assert answer(model).isfinite().all()


def test_our_bert_and_transformers_load_each_others_folders(folder: Path) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=PyaccelInt8Config()
    )
    theirs.save_pretrained(folder.parent / "theirs")
    ours = our_bert.BertModel.from_pretrained(folder.parent / "theirs")
    assert len(int8_layers(ours)) == 18
    ours.save_pretrained(folder.parent / "ours")
    back = BertModel.from_pretrained(folder.parent / "ours")
    batch = batch_of()
    with torch.no_grad(), pyaccel.use_backend("torch"):
        hidden = ours(
            batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids")
        ).last_hidden_state
        expected = theirs.bert(**batch).last_hidden_state
        assert_bits_equal(back(**batch).last_hidden_state, expected)
    read = batch["attention_mask"].bool()
    torch.testing.assert_close(
        hidden[read], expected[read], atol=0.05, rtol=0.05
    )  # other rounding before a code


def test_accelerated_saved_and_restored(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=PyaccelInt8Config()
    )
    plain = answer(model)
    report = pyaccel.accelerate(model)
    model.save_pretrained(folder.parent / "int8")
    torch.testing.assert_close(answer(model), plain, atol=0.05, rtol=0.05)
    assert report.served.total() > 0
    assert not report.refused["padded"]
    pyaccel.restore(model)
    assert_bits_equal(answer(model), plain)
    assert_bits_equal(
        answer(AutoModelForSequenceClassification.from_pretrained(folder.parent / "int8")), plain
    )


@pytest.mark.parametrize("how", ["theirs", "ours"])
def test_back_to_floating_point(how: str, folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=PyaccelInt8Config()
    )
    model = model.dequantize() if how == "theirs" else dequantize(model)
    assert not int8_layers(model)
    assert not hasattr(model, "hf_quantizer")
    model.save_pretrained(folder.parent / "again")
    assert "quantization_config" not in json.loads((folder.parent / "again" / "config.json").read_text())
    stock = AutoModelForSequenceClassification.from_pretrained(folder.parent / "again")
    assert_bits_equal(answer(stock), answer(model))
    assert model.half().classifier.weight.dtype == torch.float16


def test_training_with_int8_in_the_loop_saves_a_stock_checkpoint_until_it_is_frozen(tmp_path: Path) -> None:
    model = tiny(BertForSequenceClassification)
    prepare_qat(model)
    model.save_pretrained(tmp_path / "training")
    assert "quantization_config" not in json.loads((tmp_path / "training" / "config.json").read_text())
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "training")
    assert not int8_layers(stock)
    freeze(model)
    model.save_pretrained(tmp_path / "int8")
    assert_bits_equal(answer(BertForSequenceClassification.from_pretrained(tmp_path / "int8")), answer(model))


def test_another_family(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=72)
    model = DistilBertModel(config).eval()
    ids = torch.randint(0, 97, (2, 7))
    quantize(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad(), pyaccel.use_backend("torch"):
        assert_bits_equal(loaded(ids)[0], model(ids)[0])


def test_the_real_checkpoint(tmp_path: Path) -> None:
    stock, _, _ = checkpoints.load(None, attn_implementation="sdpa", dtype=torch.float32)
    stock.save_pretrained(tmp_path / "float")
    model = AutoModel.from_pretrained(tmp_path / "float", quantization_config=PyaccelInt8Config())
    model.save_pretrained(tmp_path / "int8")
    loaded = AutoModel.from_pretrained(tmp_path / "int8")
    ids = torch.arange(2000, 2020)[None]
    with torch.no_grad(), pyaccel.use_backend("torch"):
        assert_bits_equal(loaded(ids)[0], model(ids)[0])
        cosine = torch.cosine_similarity(loaded(ids)[0].mean(1), stock(ids)[0].mean(1))
    assert cosine.item() > 0.995


def test_deepcopy(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder, quantization_config=PyaccelInt8Config())
    assert_bits_equal(answer(copy.deepcopy(model)), answer(model))


def test_a_new_process_needs_register(folder: Path) -> None:
    AutoModel.from_pretrained(folder, quantization_config=PyaccelInt8Config()).save_pretrained(
        folder / "int8"
    )
    code = (
        "import sys, pyaccel.hf; pyaccel.hf.register(); from transformers import AutoModel; "
        "model = AutoModel.from_pretrained(sys.argv[1]); print(type(model.encoder.layer[0].output.dense).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "int8")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "Int8Linear"


def test_errors(folder: Path) -> None:
    for arguments, message in (
        ({"method": "static"}, "static scales need data"),
        ({"method": "fp8"}, "'dynamic' or 'weight_only', got 'fp8'"),
        ({"skip": "*.dense"}, r"write skip=\['\*.dense'\]"),
        ({"bits": 4}, "unknown arguments bits"),
        ({"quant_method": "gptq"}, "got 'gptq'"),
    ):
        with pytest.raises(ValueError, match=message):
            PyaccelInt8Config(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no linear layer of the encoder fits '\*.nowhere'"):
        AutoModel.from_pretrained(folder, quantization_config=PyaccelInt8Config(skip=["*.nowhere"]))
    AutoModel.from_pretrained(folder, quantization_config=PyaccelInt8Config()).save_pretrained(
        folder / "int8"
    )
    path = folder / "int8" / "config.json"
    path.write_text(path.read_text().replace("encoder.layer.1.output.dense", "encoder.layer.1.elsewhere"))
    with pytest.raises(ValueError, match=r"names 'encoder.layer.1.elsewhere', which is no linear layer"):
        AutoModel.from_pretrained(folder / "int8")
