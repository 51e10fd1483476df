"""Models whose layers aren't known: they get pyaccel's attention, at the stock model's answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import pyaccel
from tests.assertions import assert_close_to_truth
from tests.hf.models import mask_of, randomize

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 40}),
    "ModernBERT": (
        "ModernBertForMaskedLM",
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
         "vocab_size": 97, "local_attention": 8, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "BERT decoder": (
        "BertLMHeadModel",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "vocab_size": 97, "is_decoder": True},
    ),
}  # fmt: skip


def make(name: str) -> Any:
    kind, sizes = MODELS[name]
    config = getattr(transformers, kind.removesuffix("LMHeadModel").removesuffix("ForMaskedLM") + "Config")(
        **sizes
    )
    return randomize(getattr(transformers, kind)(config)).eval()


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("kind", ["none", "right", "left"])
def test_as_stock(name: str, kind: str) -> None:
    model = make(name)
    mask = mask_of(kind)
    batch = {"input_ids": torch.randint(1, 97, mask.shape), "attention_mask": mask}
    naive, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    report = pyaccel.accelerate(model)
    assert list(report.attention.values())
    assert model.config._attn_implementation == "pyaccel"
    with torch.no_grad():
        outputs = [m(**batch).logits[mask.bool()] for m in (model, truth, naive)]
    assert_close_to_truth(*outputs)
    assert "scaled_dot_product_attention" in pyaccel.explain(model).backends
    assert "attention alone" in str(report)
    pyaccel.restore(model)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, naive(**batch).logits)


@pytest.mark.parametrize("name", ["GPT-2", "BERT decoder"])
def test_generation_with_a_cache(name: str) -> None:
    model = make(name)
    prompt = torch.randint(1, 97, (2, 5))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    pyaccel.accelerate(model)
    assert torch.equal(model.generate(prompt, **options), expected)


def test_a_decoder_with_cross_attention() -> None:
    sizes = {**MODELS["BERT decoder"][1], "add_cross_attention": True}
    model = randomize(transformers.BertLMHeadModel(transformers.BertConfig(**sizes))).eval()
    states, keep = torch.randn(2, 6, 32), torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    ids = torch.randint(1, 97, (2, 5))
    naive, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    pyaccel.accelerate(model)
    with torch.no_grad():
        outputs = [
            m(ids, encoder_hidden_states=states.to(m.dtype), encoder_attention_mask=keep).logits
            for m in (model, truth, naive)
        ]
    assert_close_to_truth(*outputs)


def test_a_backend_or_int8_needs_layers() -> None:
    for options in ({"backend": "torch"}, {"int8": "dynamic"}):
        with pytest.raises(ValueError, match="nothing in this GPT2LMHeadModel can be accelerated"):
            pyaccel.accelerate(make("GPT-2"), **options)
    with pytest.raises(ValueError, match="nothing in this Linear"):
        pyaccel.accelerate(nn.Linear(2, 2))
