"""pyaccel.models.gpt2 against transformers' GPT2Model: hidden states and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pyaccel import dispatch
from pyaccel.models.gpt2 import GPT2Config, GPT2Model
from tests.assertions import assert_close_to_truth
from tests.models.test_bert import randomize

SMALL: dict[str, Any] = {
    "vocab_size": 97, "n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 3,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip


def pair(dtype: torch.dtype) -> tuple[Any, GPT2Model]:
    stock = transformers.GPT2Model(transformers.GPT2Config(**SMALL))
    randomize(stock)
    ours = GPT2Model(GPT2Config(**SMALL))
    ours.load_state_dict(stock.state_dict())
    return stock.to(dtype).eval(), ours.to(dtype).eval()


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_hidden_states_and_gradients(dtype: torch.dtype, backend: str) -> None:
    stock, ours = pair(dtype)
    truth = copy.deepcopy(stock).double()
    ids = torch.randint(0, 97, (4, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1], [4]])).long()
    outputs, grads = [], []
    for m in (ours, truth, stock):
        with dispatch.use_backend(backend if m is ours else "auto"):
            out = m(ids, attention_mask=mask)
            outputs.append((out if isinstance(out, Tensor) else out.last_hidden_state)[mask.bool()])
            (outputs[-1] * torch.linspace(-1, 1, 48)).sum().backward()
        grads.append({name: p.grad for name, p in m.named_parameters()})
    assert_close_to_truth(*outputs)
    flat = [
        torch.cat([(g[name] / grads[1][name].abs().max().to(g[name].dtype)).flatten() for name in grads[1]])
        for g in grads
    ]
    assert_close_to_truth(*flat)


def test_no_token_sees_a_later_one() -> None:
    _, ours = pair(torch.float32)
    ids = torch.randint(0, 97, (1, 8))
    before = ours(ids)
    ids[0, 5] = (ids[0, 5] + 1) % 97
    after = ours(ids)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:])


def test_dropout_in_training_alone() -> None:
    model = GPT2Model(GPT2Config(**{**SMALL, "attn_pdrop": 0.3, "resid_pdrop": 0.3}))
    ids = torch.randint(0, 97, (2, 8))
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="n_embd 48 is not a multiple of n_head 5"):
        GPT2Config(**{**SMALL, "n_head": 5})
    model = GPT2Model(GPT2Config(**SMALL))
    with pytest.raises(ValueError, match="sequences of 41 tokens"):
        model(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must be \[batch, seq\]"):
        model(torch.zeros(4, dtype=torch.long))
