"""Numbers at the edges of their range, on every backend: long sums, single elements, constant rows, fp16's limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyaccel import dispatch, ops, reference
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_summed_in_fp32

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
every_backend = pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
sixteen_bits = pytest.mark.parametrize("dtype", [F16, BF16], ids=["float16", "bfloat16"])


@every_backend
@sixteen_bits
@pytest.mark.parametrize("rms_norm", [False, True], ids=["layernorm", "rmsnorm"])
def test_layernorm_parameters_are_summed_in_fp32(
    rms_norm: bool, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    rows, cols = (70 if backend == "triton" and device.type == "cpu" else 700), 32
    x, dout = (torch.randn(rows, cols, device=device).to(dtype), torch.randn(rows, cols, device=device) + 0.5)
    dout = dout.to(dtype)
    given = [x, *(torch.randn(3, cols, device=device) + 1).to(dtype).unbind()]
    grads = []
    for wide in (None, torch.float64):
        leaves = [t.to(wide or dtype).detach().requires_grad_() for t in given]
        x_, weight, bias, x_bias = leaves
        with dispatch.use_backend(backend):
            out = (
                ops.residual_layernorm(x_, None, weight, bias, x_bias=x_bias, eps=1e-5, rms_norm=rms_norm)
                if wide is None
                # Of the sum as it is rounded to the dtype.
                else reference.residual_layernorm(
                    x_ + x_bias + ((given[0] + given[3]).double() - x_ - x_bias).detach(),
                    None, weight, bias, eps=1e-5, rms_norm=rms_norm,
                ).output
            )  # fmt: skip
        grads.append(torch.autograd.grad(out, leaves, dout.to(out.dtype))[1:3])
    for ours, truth, name in zip(*grads, ("weight", "bias"), strict=True):
        assert_summed_in_fp32(ours, truth, name=name)


@every_backend
@sixteen_bits
def test_embeddings_are_summed_in_fp32(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """One token hundreds of times: added one by one in bf16, its gradient stops growing at 256."""
    length = (
        20 if backend == "triton" and device.type == "cpu" else 350
    )  # Triton's interpreter takes its time
    ids = torch.zeros(2, length, dtype=torch.int64, device=device)
    ids[:, ::7] = 3
    ids[:, 2::7] = 1  # the padding's, which has no gradient
    tables = [torch.randn(n, 16, device=device).to(dtype) for n in (5, length, 2)]
    types = torch.zeros_like(ids)
    types[1] = 1
    weight, bias = (torch.randn(2, 16, device=device) + 1).to(dtype).unbind()
    dout = (torch.randn(2, length, 16, device=device) + 0.5).to(dtype)
    leaves = [t.detach().requires_grad_() for t in (*tables, weight, bias)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    with dispatch.use_backend(backend):
        out = ops.bert_embeddings(ids, *leaves, token_type_ids=types, eps=1e-5, padding_idx=1)
    truth = reference.bert_embeddings(ids, *wide, token_type_ids=types, eps=1e-5, padding_idx=1).output
    ours, right = (torch.autograd.grad(o, t, dout.to(o.dtype)) for o, t in ((out, leaves), (truth, wide)))
    for grad, expected in zip(ours, right, strict=True):
        # The sum that is normalized is rounded to its dtype by PyTorch, and so is its gradient before it is added up.
        assert_close_to_truth(grad, expected, expected.to(dtype) * (1 + torch.finfo(dtype).eps * 0.5))


@every_backend
@sixteen_bits
def test_bias_gelu_bias_is_summed_in_fp32(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x, dout = torch.randn(500, 16, device=device).abs() + 1, torch.randn(500, 16, device=device) + 0.5
    bias = torch.zeros(16, device=device, dtype=dtype, requires_grad=True)
    dout = dout.to(dtype)
    with dispatch.use_backend(backend):
        out = ops.bias_gelu(x.to(dtype), bias, "relu")
        (grad,) = torch.autograd.grad(out, bias, dout)
    assert_summed_in_fp32(grad, dout.double().sum(0))


@every_backend
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])
def test_a_row_of_one_element_has_no_gradient(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Its statistics are those of the sum that backward reads: otherwise a rounding is divided by sqrt(1e-12)."""
    x, residual, x_bias = (torch.randn(n, 1, device=device).to(dtype) for n in (64, 64, 1))
    x, residual = x.requires_grad_(), residual.requires_grad_()
    with dispatch.use_backend(backend):
        out = ops.residual_layernorm(x, residual, None, None, x_bias=x_bias[0])
        grads = torch.autograd.grad(out, (x, residual), torch.randn(64, 1, device=device).to(dtype))
    assert not out.any()
    for grad in grads:
        assert not grad.any()


@every_backend
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", [1, 3, 100, 768])
def test_constant_rows_are_normalized_to_zero(
    width: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    values = torch.tensor([100.3, 0.1, -3.3333, 1234.5, 1e-4], device=device).to(dtype)
    rows = values[:, None].expand(-1, width)
    bias = torch.randn(width, device=device).to(dtype)
    ids = torch.arange(5, device=device)[None]
    with dispatch.use_backend(backend):
        out = ops.residual_layernorm(rows, None, None, bias)
        words = ops.bert_embeddings(ids, rows, rows.flip(0), None, None, None)
        _, scale = ops.residual_layernorm(rows, None, None, None, return_output=False, quantize_output=True)
    assert_bits_equal(out, bias.expand_as(out).contiguous())
    assert not words.any()
    assert_bits_equal(scale, torch.ones(5, device=device))


@every_backend
def test_fp16_sums_of_codes_do_not_overflow(backend: str, device: torch.device) -> None:
    """Codes of up to 127 times x are far beyond 65504 where the result isn't."""
    x = torch.full((200, 768), 40.0, dtype=F16, device=device)
    codes, scale = ops.quantize_per_channel(torch.full((8, 768), 0.01, device=device))
    bias = torch.full((8,), 1.0, device=device)
    truth = reference.int8_weight_only_matmul(x, codes, scale, bias)
    with dispatch.use_backend(backend):
        out = ops.int8_weight_only_matmul(x, codes, scale, bias)
    assert_close_to_truth(out, truth, reference.int8_weight_only_matmul(x, codes, scale, bias, upcast=False))


@pytest.mark.parametrize("size", [1e-7, 1e-2, 1.0, 2000.0])
@pytest.mark.parametrize("how", ["dynamic", "static", "weight_only"])
def test_fp16_gradients_of_int8_linear(how: str, size: float, device: torch.device) -> None:
    """Neither do small gradients vanish in a product with a scale, nor large ones overflow in one with codes."""
    torch.manual_seed(0)
    x = torch.randn(20, 32, device=device).to(F16)
    weight = (torch.randn(24, 32, device=device) * 0.02).to(F16)
    options = {"dynamic": {}, "static": {"input_scale": torch.tensor(0.03, device=device)}}.get(
        how, {"weight_only": True}
    )
    grad = (torch.randn(20, 24, device=device) * size).to(F16)
    ours = [t.detach().requires_grad_() for t in (x, weight)]
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    with dispatch.use_backend("torch"):
        found = torch.autograd.grad(ops.int8_linear(*ours, **options), ours, grad)
    truth = torch.autograd.grad(reference.int8_linear(*wide, **options), wide, grad.double())
    plain = [t.detach().requires_grad_() for t in (x, weight)]
    naive = torch.autograd.grad(F.linear(*plain), plain, grad)
    stock = torch.autograd.grad(F.linear(*(t.double() for t in plain)), plain, grad.double())
    for name, mine, right, product, exact in zip(("x", "weight"), found, truth, naive, stock, strict=True):
        # As right as the same product of fp16 operands is.
        error = product.double() - exact.double()
        assert_close_to_truth(mine, right, (right + error).to(F16), name=name)
