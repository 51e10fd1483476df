"""TritonLayer beside the layer it stands for: the same bits, forward and backward, on the same dropout masks."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyaccel import dispatch
from pyaccel.models.bert import BertConfig, BertModel
from pyaccel.nn.encoder_layer import encoder_layer, packed_attention
from pyaccel.nn.triton_layer import TritonLayer
from pyaccel.ops.linear import onednn
from pyaccel.packing import PackedLayout, layout

HIDDEN = 32


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's own math as on a GPU: no oneDNN, and bias and activation by their kernel."""
    monkeypatch.setattr(onednn, "on_gpu", lambda x: True)
    monkeypatch.setattr(onednn, "not_supported_reasons", lambda *tensors: ["not on the CPU"])


@pytest.fixture
def layer(device: torch.device) -> Any:
    config = BertConfig(
        vocab_size=8, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2,
    )  # fmt: skip
    made = BertModel(config).encoder.layer[0].to(device, torch.bfloat16)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def packed(device: torch.device, *, first_is_padding: bool = False) -> PackedLayout:
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = mask[2, 2:] = False
    mask[1, 0] = not first_is_padding
    return layout(mask.to(device), sort_by_length=True, keep_first=True)


def both(layer: Any, tokens: PackedLayout, hidden: Tensor) -> list[list[Tensor | None]]:
    """Output and gradients by the layer's own math and by TritonLayer."""
    found = []
    for by_triton in (False, True):
        own = copy.deepcopy(layer)
        x = hidden.detach().clone().requires_grad_(hidden.requires_grad)
        made = TritonLayer.of(own, own.attention.self)
        assert made is not None
        dropout_p = own.attention.self.dropout.p if own.training else 0.0
        attend = partial(packed_attention, tokens=tokens, dropout_p=dropout_p)
        torch.manual_seed(3)
        with dispatch.use_backend("triton", ops=["varlen_attention", "residual_layernorm", "bias_gelu"]):
            given = x * 1 if x.requires_grad else x
            out = made(given, tokens) if by_triton else encoder_layer(own, given, attend)
        gradients: list[Tensor | None] = []
        if out.requires_grad:
            out.backward(
                torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
            )
            gradients = [x.grad, *[p.grad for p in own.parameters()]]
        found.append([out.detach(), *gradients])
    return found


def assert_same(found: list[list[Tensor | None]], *, gradients: int) -> None:
    expected, got = found
    assert sum(t is not None for t in got) == 1 + gradients
    for a, b in zip(expected, got, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("first_is_padding", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_without_gradients(layer: Any, device: torch.device, training: bool, first_is_padding: bool) -> None:
    tokens = packed(device, first_is_padding=first_is_padding)
    hidden = torch.randn(tokens.total_tokens, 2 * HIDDEN, device=device, dtype=torch.bfloat16)[:, ::2]
    with torch.no_grad():
        assert_same(both(layer.train(training), tokens, hidden), gradients=0)


@pytest.mark.parametrize("first_is_padding", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients(layer: Any, device: torch.device, training: bool, first_is_padding: bool) -> None:
    tokens = packed(device, first_is_padding=first_is_padding)
    hidden = torch.randn(tokens.total_tokens, HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    assert_same(both(layer.train(training), tokens, hidden), gradients=17)


@pytest.mark.parametrize("frozen", ["all", "attention", "first", "norms"])
def test_frozen_parameters(layer: Any, device: torch.device, frozen: str) -> None:
    """Also where nothing before the feed-forward network has a gradient."""
    prefixes = {
        "all": "",
        "attention": "attention.self",
        "first": "attention.output.dense",
        "norms": "output.LayerNorm",
    }
    count = 16
    for name, parameter in layer.train().named_parameters():
        if name.startswith(prefixes[frozen]):
            parameter.requires_grad_(False)
            count -= 1
    tokens = packed(device)
    hidden = torch.randn(tokens.total_tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    assert_same(both(layer, tokens, hidden), gradients=count)


def recorded(layer: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input and output of a call whose gradients are recorded."""
    made = TritonLayer.of(layer.eval(), layer.attention.self)
    assert made is not None
    tokens = packed(device)
    torch.manual_seed(4)
    hidden = torch.randn(tokens.total_tokens, HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    return hidden, made(hidden, tokens)


def test_a_double_backward_is_refused(layer: Any, device: torch.device) -> None:
    hidden, out = recorded(layer, device)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), hidden, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(
        RuntimeError, match=r"a double backward .* was asked for, and only other backends have"
    ):
        gradient.sum().backward()


def test_the_backward_under_a_mode_is_by_registered_ops(layer: Any, device: torch.device) -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    found = []
    for mode in (contextlib.nullcontext(), Mode()):
        hidden, out = recorded(layer, device)
        layer.zero_grad()
        with mode:
            out.sum().backward()
        found.append([hidden.grad, *[p.grad for p in layer.parameters()]])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert torch.equal(a, b)
    ours = [name for name in names if name.startswith("pyaccel::")]
    assert len(ours) == 6, ours


def test_batched_gradients(layer: Any, device: torch.device) -> None:
    hidden, out = recorded(layer, device)
    wanted = [hidden, *layer.parameters()]
    gradients = torch.randn(2, *out.shape, device=device).to(out.dtype)
    batched = torch.autograd.grad(out, wanted, gradients, retain_graph=True, is_grads_batched=True)
    for i, gradient in enumerate(gradients):
        alone = torch.autograd.grad(out, wanted, gradient, retain_graph=True)
        for a, b in zip(batched, alone, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("name", ["attention.self.key.weight", "output.LayerNorm.weight"])
def test_a_parameter_changed_between_forward_and_backward(
    layer: Any, device: torch.device, name: str
) -> None:
    _, out = recorded(layer, device)
    with torch.no_grad():
        layer.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_larger_is_saved_than_the_parts_save(layer: Any, device: torch.device) -> None:
    """A token: the input, q, k, v, attention's output, both sums, the pre-activation, and fp32 statistics."""
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        _, out = recorded(layer, device)
    owned = {p.data_ptr() for p in layer.parameters()}
    activations = [x for pointer, x in saved.items() if pointer not in owned and x.is_floating_point()]
    tokens = out.shape[0]
    assert sum(x.numel() * x.itemsize for x in activations) == tokens * (2 * (7 * HIDDEN + 48) + 4 * (2 + 4))


def test_layers_of_another_kind(layer: Any) -> None:
    assert TritonLayer.of(layer, layer.attention.self) is not None
    for change in (
        {"intermediate_act_fn": nn.Tanh()},
        {"dense": nn.Linear(HIDDEN, 48, bias=False)},
        {"dense": nn.Sequential(nn.Linear(HIDDEN, 48))},
    ):
        other = copy.deepcopy(layer)
        for name, module in change.items():
            setattr(other.intermediate, name, module)
        assert TritonLayer.of(other, other.attention.self) is None


def test_parameters_are_looked_up_at_each_call(layer: Any, device: torch.device) -> None:
    tokens = packed(device)
    hidden = torch.randn(tokens.total_tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    made = TritonLayer.of(layer.eval(), layer.attention.self)
    assert made is not None
    with torch.no_grad():
        before = made(hidden, tokens)
        layer.output.dense.weight = nn.Parameter(layer.output.dense.weight * 2)
        assert not torch.equal(made(hidden, tokens), before)


def test_whether_it_serves_is_asked_of_parameters(layer: Any) -> None:
    made = TritonLayer.of(layer, layer.attention.self)
    assert made is not None
    cpu, meta = torch.device("cpu"), torch.device("meta")
    device = layer.output.dense.weight.device
    assert made.is_ready(torch.bfloat16, device)
    assert not made.is_ready(torch.float16, device)
    assert not made.is_ready(torch.bfloat16, meta if device == cpu else cpu)
    layer.output.LayerNorm.bias.data = torch.zeros(HIDDEN, 2, dtype=torch.bfloat16, device=device)[:, 0]
    assert not made.is_ready(torch.bfloat16, device)
