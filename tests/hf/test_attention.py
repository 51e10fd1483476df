"""attn_implementation="pyaccel": attention and mask function, for any model that looks them up by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AttentionInterface,
    AttentionMaskInterface,
    BertLMHeadModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen2Config,
    Qwen2Model,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    create_bidirectional_mask,
    sdpa_mask,
)

import pyaccel
from pyaccel.hf.attention import NAME, attention_forward, attention_mask
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_equivalent
from tests.hf.models import DTYPES, MASKS, Truth, batch_of, mask_of, tiny

pyaccel.hf.register()


def module(**attributes: Any) -> nn.Module:
    """Stands for a model's attention module."""
    made = nn.Module().eval()
    vars(made).update({"is_causal": False, "config": SimpleNamespace(output_attentions=False), **attributes})
    return made


def qkv(dtype: torch.dtype, heads: int = 4, kv_heads: int = 4, keys: int = 12) -> tuple[Tensor, ...]:
    shapes = [(5, 12, heads, 8), (5, keys, kv_heads, 8), (5, keys, kv_heads, 8)]
    return tuple(torch.randn(s, dtype=dtype).transpose(1, 2) for s in shapes)


def check(given: nn.Module, tensors: tuple[Tensor, ...], mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Against transformers' SDPA attention, in fp64 and in the dtype."""

    def in_double(t: Tensor | None) -> Tensor | None:
        return t.double() if t is not None and t.is_floating_point() else t

    four = mask[:, None, None] if mask is not None and mask.dim() == 2 else mask
    out, weights = attention_forward(given, *tensors, mask, **kwargs)
    naive, _ = sdpa_attention_forward(given, *tensors, four, **kwargs)
    truth, _ = sdpa_attention_forward(given, *(t.double() for t in tensors), in_double(four), **kwargs)
    assert weights is None
    assert out.shape == (5, 12, 4, 8), "[batch, queries, heads, head_dim]"
    assert out.is_contiguous()
    assert_close_to_truth(out, truth, naive)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "left", "holes"])
def test_padding_masks(kind: str, dtype: torch.dtype) -> None:
    check(module(), qkv(dtype), mask_of(kind).bool(), scaling=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_four_dimensions(dtype: torch.dtype) -> None:
    keep = torch.rand(5, 1, 12, 12) > 0.3
    keep[..., 3] = True
    check(module(), qkv(dtype), keep)
    check(
        module(), qkv(dtype), torch.where(keep, torch.randn(5, 1, 12, 12), torch.finfo(dtype).min).to(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal(dtype: torch.dtype) -> None:
    tensors = qkv(dtype)
    causal = check(module(is_causal=True), tensors, None)
    assert_bits_equal(check(module(), tensors, None, is_causal=True), causal)
    assert not torch.equal(check(module(is_causal=True), tensors, None, is_causal=False), causal)
    # with a mask, the mask says it all
    check(module(is_causal=True), tensors, torch.ones(5, 1, 12, 12, dtype=torch.bool))
    # a static cache that is longer than the queries
    check(module(is_causal=True), qkv(dtype, keys=20), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_heads(dtype: torch.dtype) -> None:
    tensors = qkv(dtype, kv_heads=2)
    check(module(num_key_value_groups=2), tensors, mask_of("left").bool())
    check(module(num_key_value_groups=2, is_causal=True), tensors, None)


def test_training_draws_stock_dropout() -> None:
    given, tensors, mask = module().train(), qkv(torch.float32), mask_of("right").bool()
    torch.manual_seed(3)
    out, _ = attention_forward(given, *tensors, mask, dropout=0.4)
    torch.manual_seed(3)
    expected, _ = sdpa_attention_forward(given, *tensors, mask[:, None, None], dropout=0.4)
    assert_bits_equal(out, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_weights(groups: int) -> None:
    tensors = qkv(torch.float32, kv_heads=4 // groups)
    given, mask = module(num_key_value_groups=groups), mask_of("right").bool()
    out, weights = attention_forward(given, *tensors, mask, output_attentions=True)
    assert weights is not None
    assert weights.shape == (5, 4, 12, 12)
    assert_equivalent(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not weights.masked_select(~mask[:, None, None]).any()
    assert_equivalent(out, attention_forward(given, *tensors, mask)[0])
    given.config.output_attentions = True
    out, weights = attention_forward(given, *tensors, None, is_causal=True)
    assert not weights.triu(1).any()
    assert_equivalent(out, attention_forward(module(), *tensors, None, is_causal=True)[0])


def packed(**changes: Any) -> dict[str, Any]:
    offsets = torch.tensor([0, 5, 6, 12])
    return {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": 6,
        "max_length_k": 6,
        **changes,
    }


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_input(causal: bool, kv_heads: int) -> None:
    q, k, v = (t[:1] for t in qkv(torch.float32, kv_heads=kv_heads))
    out, _ = attention_forward(module(), q, k, v, None, is_causal=causal, **packed())
    for start, end in ((0, 5), (5, 6), (6, 12)):
        alone, _ = attention_forward(
            module(), *(t[:, :, start:end] for t in (q, k, v)), None, is_causal=causal
        )
        assert_equivalent(out[:, start:end], alone)


def test_packed_input_that_cannot_be_served() -> None:
    tensors = [t[:1] for t in qkv(torch.float32)]
    with pytest.raises(ValueError, match="max_length_k is missing; an attention_mask came with it"):
        attention_forward(module(), *tensors, mask_of("none")[:1].bool(), **packed(max_length_k=None))
    with pytest.raises(ValueError, match="the batch size is 5, not 1"):
        attention_forward(module(), *qkv(torch.float32), None, **packed())


@pytest.mark.parametrize("name", ["softcap", "position_bias", "s_aux"])
def test_what_is_not_computed_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"does not compute {name}"):
        attention_forward(module(), *qkv(torch.float32), None, **{name: torch.ones(())})


def test_the_mask_stays_two_dimensional_only_where_it_is_padding_alone() -> None:
    mask = mask_of("left").bool()
    sizes = {"batch_size": 5, "q_length": 12, "kv_length": 12}

    def made(**kwargs: Any) -> Tensor | None:
        return attention_mask(**sizes, **{"mask_function": bidirectional_mask_function, **kwargs})

    assert made(attention_mask=mask, allow_is_bidirectional_skip=True) is mask
    assert made(attention_mask=None, allow_is_bidirectional_skip=True) is None
    for kwargs in (
        {"allow_is_bidirectional_skip": False},
        {"mask_function": causal_mask_function, "allow_is_causal_skip": False},
        {"mask_function": lambda b, h, q, k: (q >= k) | (k < 2), "allow_is_bidirectional_skip": True},
    ):
        expected = sdpa_mask(
            **sizes, attention_mask=mask, **{"mask_function": bidirectional_mask_function, **kwargs}
        )
        assert_bits_equal(made(attention_mask=mask, **kwargs), expected)


def test_both_functions_are_registered_under_one_name() -> None:
    assert AttentionInterface()[NAME] is attention_forward
    assert AttentionMaskInterface()[NAME] is attention_mask
    config = tiny().config
    config._attn_implementation = NAME
    mask = mask_of("left")
    made = create_bidirectional_mask(config, torch.zeros(5, 12, 32), mask)
    assert torch.equal(made, mask.bool()), "without a mask function transformers gives None: no padding"


# ---- whole models, by the attention alone ----


@pytest.mark.parametrize("kind", MASKS)
def test_bert_by_the_attention_alone(kind: str) -> None:
    model, batch = tiny(), batch_of(kind)
    stock = Truth(model)
    model.set_attn_implementation(NAME)
    stock.check(model, batch, ["last_hidden_state", "pooler_output"])


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=97, dim=32, n_heads=4, hidden_dim=40, n_layers=2)
    ),
    "albert": lambda: AlbertModel(AlbertConfig(**SIZES, embedding_size=16)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SIZES, local_attention=6, pad_token_id=0)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "bert decoder": lambda: tiny(BertLMHeadModel, is_decoder=True),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["none", "right", "left"])
def test_other_models(name: str, kind: str) -> None:
    batch = {k: v for k, v in batch_of(kind).items() if k != "token_type_ids"}
    model = OTHERS[name]().eval()
    key = "logits" if isinstance(model, BertLMHeadModel) else "last_hidden_state"
    stock = Truth(model)
    model.set_attn_implementation(NAME)
    # Causal models: a query in left padding has no key at all, and what stock makes of it differs by backend.
    stock.check(model, batch, [key], where=batch["attention_mask"].bool())
    if name != "distilbert":
        del batch["attention_mask"]
        stock.check(model, batch, [key])


@pytest.mark.parametrize("how", ["2-D", "bool 4-D", "float 4-D", "no mask, no padding"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_padding_is_never_ignored(how: str, accelerated: bool) -> None:
    """A row gives the same alone and padded, whatever way the mask takes."""
    model = tiny()
    if accelerated:
        pyaccel.accelerate(model)
    else:
        model.set_attn_implementation(NAME)
    ids = torch.randint(1, 97, (1, 6))
    alone = model(ids).last_hidden_state
    long = torch.cat([ids, torch.randint(1, 97, (1, 5))], 1)
    keep = torch.arange(11)[None] < 6
    mask: Tensor | None = keep
    if how == "bool 4-D":
        mask = keep[:, None, None].expand(1, 1, 11, 11)
    elif how == "float 4-D":
        mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min)[:, None, None].expand(1, 1, 11, 11)
    elif how == "no mask, no padding":
        mask, long = None, ids
    padded = model(long, attention_mask=mask).last_hidden_state[:, :6]
    assert_equivalent(padded, alone)
