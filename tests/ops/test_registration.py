"""The registered ops: torch.library.opcheck, and compiled graphs without breaks, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyaccel import dispatch, ops
from pyaccel.ops._dropout import dropout_key
from pyaccel.ops.residual_layernorm import backward_op, forward_op
from tests.assertions import assert_bits_equal

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck_residual_layernorm(dtype: torch.dtype, full: bool, device: torch.device) -> None:
    rows, cols = 5, 48
    x, residual, dy, dsum = (torch.randn(4, rows, cols, device=device).to(dtype)).unbind()
    weight, bias, x_bias = torch.randn(3, cols, device=device).unbind()
    key = dropout_key(device)
    if full:
        forward = (x, residual, weight, bias, x_bias, key, 1e-12, 0.2, dtype, True)
    else:
        forward = (x, None, None, None, None, None, 1e-5, 0.0, F32, False)
    torch.library.opcheck(forward_op, forward)
    _, total, mean, rstd = forward_op(*forward[:-1], True)
    grads = (
        (dy, dsum, total, mean, rstd, weight, key, 0.2)
        if full
        else (dy, None, total, mean, rstd, None, None, 0.0)
    )
    dtypes = (dtype, F32, F32, F32, F32) if full else (None, dtype, None, None, None)
    torch.library.opcheck(backward_op, (*grads, *dtypes))


def layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    out, total = ops.residual_layernorm(
        x * 2.0, residual, weight, bias, x_bias=x_bias, dropout_p=0.0, training=True, return_sum=True
    )
    return torch.cat([out.sin(), total], dim=-1)


def inputs(rows: int, device: torch.device) -> list[Tensor]:
    given = [*torch.randn(2, rows, 48, device=device).unbind(), *torch.randn(3, 48, device=device).unbind()]
    return [t.requires_grad_() for t in given]


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_compiles_to_one_graph_forward_and_backward(backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    given = inputs(6, device)
    grad = torch.randn(6, 96, device=device)
    with dispatch.use_backend(backend):
        eager = layer(*given)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*given)
        pairs = zip(
            (eager, *torch.autograd.grad(eager, given, grad)),
            (compiled, *torch.autograd.grad(compiled, given, grad)),
            strict=True,
        )
        for a, b in pairs:
            assert_bits_equal(a, b)


def test_dynamic_shapes_do_not_recompile(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with dispatch.use_backend("triton"), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9, 2, 31):
            given = inputs(rows, device)
            out, expected = compiled(*given), layer(*given)
            assert_bits_equal(out, expected)
            grad = torch.randn_like(out)
            for a, b in zip(
                torch.autograd.grad(out, given, grad), torch.autograd.grad(expected, given, grad), strict=True
            ):
                assert_bits_equal(a, b)


def test_dropout_in_a_compiled_graph_is_right(device: torch.device, seed: int) -> None:
    """Compiled and eager draw the same key from the same generator state, and a second call draws another."""
    torch._dynamo.reset()
    x = torch.ones(16, 64, device=device, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return ops.residual_layernorm(x, None, None, None, dropout_p=0.5, training=True, return_sum=True)[1]

    with dispatch.use_backend("triton"):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.manual_seed(seed)
        expected = run(x), run(x)
        torch.manual_seed(seed)
        out = compiled(x), compiled(x)
    for a, b in zip(out, expected, strict=True):
        assert_bits_equal(a, b)
        (grad,) = torch.autograd.grad(a, x, torch.ones_like(a))
        assert_bits_equal(grad, a.detach())
    assert not torch.equal(*out)
