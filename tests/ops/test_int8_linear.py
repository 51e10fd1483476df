"""int8_linear: the bits of its parts forward, autograd through the definition backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pyaccel import dispatch, reference
from pyaccel.ops import (
    int8_linear,
    int8_matmul,
    quantize_per_channel,
    quantize_per_tensor,
    quantize_per_token,
    quantize_per_token_with_offset,
)
from tests.assertions import assert_bits_equal, assert_close_to_truth

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True, params=["triton", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test by either, but for what its backend leaves to another."""
    with dispatch.use_backend("auto" if request.param == "triton" else request.param):
        yield request.param


def operands(device: torch.device, dtype: torch.dtype = F32, rows: tuple[int, ...] = (3, 5)) -> list[Tensor]:
    x = torch.randn(*rows, 33, device=device) * torch.logspace(-1, 1, 33, device=device) + 0.3
    weight = torch.randn(17, 33, device=device) * torch.logspace(-2, 0, 17, device=device)[:, None]
    bias = torch.randn(17, device=device)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_training_and_deployed_give_the_parts_bits(
    dtype: torch.dtype, activation: str | None, static: bool, device: torch.device
) -> None:
    x, weight, bias = operands(device, dtype)
    input_scale = torch.tensor(0.05, device=device) if static else None
    trained = int8_linear(x, weight, bias, activation, input_scale=input_scale)
    assert trained.dtype == dtype
    assert trained.requires_grad
    codes, scale = quantize_per_channel(weight)
    deployed = int8_linear(x, codes, bias, activation, weight_scale=scale, input_scale=input_scale)
    assert_bits_equal(trained, deployed)
    if input_scale is None:
        a, a_scale, offset = quantize_per_token_with_offset(x)
    else:
        (a, a_scale), offset = quantize_per_tensor(x, input_scale), None
    by_parts = int8_matmul(
        a, codes, a_scale, scale, bias.detach(), activation, out_dtype=dtype, a_offset=offset
    )
    assert_bits_equal(trained, by_parts)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "deployed", "smooth", "weight only"])
def test_gradients_are_autograds_through_the_definition(
    kind: str, activation: str | None, dtype: torch.dtype, device: torch.device
) -> None:
    options: dict[str, Any] = {}
    if kind == "static":
        options["input_scale"] = torch.tensor(0.05, device=device)
    if kind == "smooth":
        options["smooth_scale"] = torch.rand(33, device=device) + 0.5
    if kind == "weight only":
        options["weight_only"] = True
    x, weight, bias = operands(device, dtype)
    given = [x, weight, bias]
    if kind == "deployed":
        given[1], options["weight_scale"] = quantize_per_channel(weight)
    grad = (torch.randn(3, 17, 5, device=device) + 0.2).to(dtype).mT  # strided

    def gradients(function: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        out = function(*tensors, activation, **options)
        return torch.autograd.grad(out, [t for t in tensors if t.requires_grad], grad.to(out.dtype))

    found = gradients(int8_linear, given)
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in given]
    truth = gradients(reference.int8_linear, wide)
    naive = gradients(naive_linear, given)
    names = ["x", "weight", "bias"] if len(found) == 3 else ["x", "bias"]
    for name, a, b, c in zip(names, found, truth, naive, strict=True):
        assert a.dtype == dtype
        assert_close_to_truth(a, b, c, name=f"{kind} {name}")


def naive_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, **options: Any) -> Tensor:
    """The definition as plain PyTorch has it in x's dtype: dequantized operands of that dtype, F.linear, activation."""
    dtype = x.dtype
    if "smooth_scale" in options:
        x = (x * options["smooth_scale"]).to(dtype)
    if "weight_only" in options:
        rounded = x.detach()
    elif "input_scale" in options:
        codes, scale = reference.quantize_per_tensor(x.detach(), options["input_scale"])
        rounded, x = codes * scale, x.masked_fill(codes.abs() == 127, 0.0)
    else:
        codes, scale, offset = reference.quantize_per_token_with_offset(x.detach())
        rounded = codes * scale.unsqueeze(-1) + offset.unsqueeze(-1)
    a = rounded.to(dtype) + (x - x.detach())
    if "weight_scale" in options:
        w = (weight * options["weight_scale"].unsqueeze(-1)).to(dtype)
    else:
        codes, scale = reference.quantize_per_token(weight.detach())
        w = (codes * scale.unsqueeze(-1)).to(dtype) + (weight - weight.detach())
    return reference.activation(torch.nn.functional.linear(a, w, bias), activation)


def test_int8_gradient_of_the_input(device: torch.device) -> None:
    x, weight, bias = operands(device)
    grad = torch.randn(3, 5, 17, device=device)
    exact, expected_weight = torch.autograd.grad(int8_linear(x, weight, bias), (x, weight), grad)
    rough, dweight = torch.autograd.grad(
        int8_linear(x, weight, bias, int8_grad_input=True), (x, weight), grad
    )
    assert_bits_equal(dweight, expected_weight)
    codes, scale = quantize_per_channel(weight)
    back, back_scale = quantize_per_channel((codes * scale[:, None]).mT)
    g, g_scale = quantize_per_token(grad)
    assert_bits_equal(rough, int8_matmul(g, back, g_scale, back_scale))
    assert not torch.equal(rough, exact)
    assert torch.nn.functional.cosine_similarity(rough.flatten(), exact.flatten(), dim=0) > 0.999


def test_only_codes_and_scales_are_saved(device: torch.device) -> None:
    x, weight, bias = operands(device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        int8_linear(x, weight, bias, "gelu")
    count = {dtype: sum(t.numel() for t in saved if t.dtype == dtype) for dtype in (torch.int8, F32)}
    assert count == {torch.int8: x.numel() + weight.numel(), F32: 15 + 15 + 17 + 17}
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        int8_linear(x.detach(), weight, bias)
    assert (
        sum(t.numel() for t in saved) == x.numel() + 15 + 15
    )  # the weight's codes are for x's gradient alone


def test_broadcast_gradients_empty_input_and_nothing_to_do(device: torch.device) -> None:
    x, weight, bias = operands(device)
    int8_linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 15.0))
    empty = torch.zeros(0, 33, device=device, requires_grad=True)
    out = int8_linear(empty, weight, bias, "gelu")
    assert out.shape == (0, 17)
    dweight, dx = torch.autograd.grad(out.sum(), (weight, empty))
    assert not dweight.any()
    assert dx.shape == (0, 33)
    with torch.no_grad():
        assert not int8_linear(x, weight, bias).requires_grad


def test_a_wide_biass_gradient_is_summed_in_its_dtype(device: torch.device) -> None:
    """257 is no number of bf16."""
    x, weight = (torch.ones(shape, dtype=BF16, device=device) for shape in ((257, 33), (17, 33)))
    bias = torch.zeros(17, device=device, requires_grad=True)
    int8_linear(x, weight, bias).sum().backward()
    assert_bits_equal(bias.grad, torch.full_like(bias, 257.0))


@pytest.mark.parametrize("kind", ["dynamic", "static", "weight only"])
@pytest.mark.parametrize(("n_in", "n_out"), [(8, 0), (0, 8), (0, 0)])
def test_gradients_of_a_weight_with_a_size_of_zero(
    n_in: int, n_out: int, kind: str, device: torch.device, backend: str
) -> None:
    x, weight, bias = (
        torch.zeros(shape, device=device, requires_grad=True)
        for shape in ((2, 3, n_in), (n_out, n_in), (n_out,))
    )
    options: dict[str, Any] = {"dynamic": {}, "static": {"input_scale": torch.ones((), device=device)}}.get(
        kind, {"weight_only": True}
    )
    with dispatch.use_backend("torch" if backend == "triton" else backend):  # no kernel takes such a weight
        out = int8_linear(x, weight, bias, "gelu", **options)
        gradients = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
    assert out.shape == (2, 3, n_out)
    assert [g.shape for g in gradients] == [t.shape for t in (x, weight, bias)]
    assert not gradients[0].any()
    assert (gradients[2] == 3.0).all()  # six rows, and half of each: GELU's slope at 0


def test_autocast(device: torch.device) -> None:
    x, weight, bias = operands(device)
    with torch.autocast(device.type, BF16):
        out = int8_linear(x, weight, bias, "gelu")
        plain = int8_linear(x, weight, bias)
    assert out.dtype == plain.dtype == BF16
    assert_bits_equal(plain, int8_linear(x, weight, bias).to(BF16))
    out.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == weight.grad.dtype == F32


def test_checkpointing_and_two_runs_give_the_same_bits(device: torch.device) -> None:
    x, weight, bias = operands(device)

    def gradients(checkpoint: bool) -> tuple[Tensor, ...]:
        arguments = (x, weight, bias, "gelu")
        if checkpoint:
            out = torch.utils.checkpoint.checkpoint(int8_linear, *arguments, use_reentrant=False)
        else:
            out = int8_linear(*arguments)
        return torch.autograd.grad(out.square().sum(), (x, weight, bias))

    first = gradients(False)
    for again in (gradients(False), gradients(True)):
        for a, b in zip(first, again, strict=True):
            assert_bits_equal(a, b)


def test_compiled_in_one_graph_for_changing_sizes(device: torch.device) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(int8_linear, fullgraph=True, dynamic=True, backend=counter)
    for rows in (4, 9, 17):
        x, weight, bias = operands(device, rows=(rows,))
        eager = int8_linear(x, weight, bias, "gelu")
        out = compiled(x, weight, bias, "gelu")
        assert_bits_equal(out, eager)
        grad = torch.randn_like(eager)
        for a, b in zip(
            torch.autograd.grad(out, (x, weight, bias), grad),
            torch.autograd.grad(eager, (x, weight, bias), grad),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_every_reason_is_named_at_once(device: torch.device) -> None:
    x, weight, bias = operands(device)
    with pytest.raises(ValueError, match="int8_linear") as info:
        int8_linear(x.double(), weight, bias[:3], "tanh", weight_scale=bias.double(), input_scale=bias)
    for reason in (
        "x must be float32", "weight_scale goes with an int8 weight", "weight_scale must be float32 (17,)",
        "input_scale must be a float32 scalar", "bias must be floating point (17,)", "unknown activation 'tanh'",
    ):  # fmt: skip
        assert reason in str(info.value)
    with pytest.raises(ValueError, match="needs its weight_scale"):
        int8_linear(x, quantize_per_channel(weight)[0])
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., in_features\]"):
        int8_linear(x, weight[:, :3])
    first = torch.autograd.grad(int8_linear(x, weight, bias).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(first.sum(), weight)
