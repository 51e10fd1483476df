"""Bias + activation: the public function against the fp64 truth, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyaccel import dispatch, ops, reference
from pyaccel.errors import NotSupportedError
from pyaccel.kernels.common import reduce as column_sum
from pyaccel.ops import bias_gelu as public
from pyaccel.ops.bias_act.api import ACTIVATIONS
from pyaccel.ops.bias_act.triton import backward_op
from tests.assertions import assert_bits_equal, assert_close_to_truth
from tests.pairwise import pairwise

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

CASES = pairwise(
    {
        "backend": dispatch.BACKENDS,
        "activation": ACTIVATIONS,
        # x and bias; several blocks of rows, several turns of the persistent loop, a width that no tile divides.
        "dtypes": [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16), (BF16, None)],
        "size": [(1, 1), (7, 100), (5, 512), (61, 640), (130, 70), (2, 1537)],
    }
)


def label(case: dict[str, Any]) -> str:
    return "-".join(str(value).replace("torch.", "").replace(" ", "") for value in case.values())


def call(x: Tensor, bias: Tensor | None = None, *rest: Any, backend: str = "triton", **options: Any) -> Any:
    with dispatch.use_backend(backend):
        return ops.bias_gelu(x, bias, *rest, **options)


def with_gradients(out: Tensor, given: list[Tensor], dy: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, given, dy.to(out.dtype))]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_output_and_gradients_are_as_right_as_plain_torch(
    case: dict[str, Any], device: torch.device, poison: None
) -> None:
    (rows, cols), (x_dtype, bias_dtype) = case["size"], case["dtypes"]
    x = torch.randn(rows, cols, device=device) * 2 + torch.linspace(-2, 1, rows, device=device)[:, None]
    if rows > 2:
        x[1] += 60.0
        x[2] *= 1e-3
    x = x.to(x_dtype)
    bias = [] if bias_dtype is None else [torch.randn(cols, device=device).to(bias_dtype)]
    dy = (torch.randn(rows, cols, device=device) + 0.3).to(x_dtype)
    results = []
    for kind in ("ours", "truth", "naive"):
        given = [t.to(torch.float64 if kind == "truth" else t.dtype).requires_grad_() for t in (x, *bias)]
        if kind == "ours":
            out = call(*given, activation=case["activation"], backend=case["backend"])
        else:
            out = reference.bias_gelu(
                given[0], *given[1:] or [None], case["activation"], upcast=kind == "truth"
            )
        results.append(with_gradients(out, [t.requires_grad_() for t in given], dy))
    assert [t.dtype for t in results[0]] == [x_dtype, x_dtype, *(t.dtype for t in bias)]
    for name, ours, truth, naive in zip(("out", "dx", "dbias"), *results, strict=False):
        assert_close_to_truth(ours, truth, naive, name=name)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_argument_from_far_below_to_far_above(
    activation: str, backend: str, device: torch.device
) -> None:
    x = torch.cat(
        [torch.linspace(-12, 12, 4093, device=device), torch.tensor([-1e4, 0.0, 1e4], device=device)]
    )
    results = []
    for kind in ("ours", "truth", "naive"):
        given = x.to(torch.float64 if kind == "truth" else F32).detach().requires_grad_()
        if kind == "ours":
            out = call(given, None, activation, backend=backend)
        else:
            out = reference.bias_gelu(given, None, activation, upcast=kind == "truth")
        results.append(with_gradients(out, [given], torch.ones_like(x)))
    for name, ours, truth, naive in zip(("out", "dx"), *results, strict=True):
        # Apart from the huge ones, whose size would allow any error at all.
        assert_close_to_truth(ours[:-3], truth[:-3], naive[:-3], name=name)
        assert_close_to_truth(ours[-3:], truth[-3:], naive[-3:], name=name)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_output_is_the_fp32_result_quantized(
    activation: str, dtype: torch.dtype, backend: str, device: torch.device, poison: None
) -> None:
    x = (torch.randn(2, 5, 300, device=device) * 3).to(dtype)
    bias = torch.randn(300, device=device)
    x[1, 2] = -1e4  # every activation of it is zero
    for b in (bias, None):
        codes, scale = call(x, b, activation, quantize_output=True, backend=backend)
        expected = reference.quantize_per_token(call(x.float(), b, activation, backend=backend))
        assert_bits_equal(codes, expected[0], name="codes")
        assert_bits_equal(scale, expected[1], name="scale")
    assert (codes.shape, scale.shape) == (x.shape, x.shape[:-1])
    assert (codes.dtype, scale.dtype) == (torch.int8, F32)
    assert not codes[1, 2].any()
    assert scale[1, 2] == 1


def test_int8_output_of_the_longest_row_and_of_none(device: torch.device, poison: None) -> None:
    x = torch.randn(1, 16384, device=device)
    for a, b in zip(call(x, quantize_output=True), reference.quantize_per_token(call(x)), strict=True):
        assert_bits_equal(a, b)
    codes, scale = call(x[:0], quantize_output=True)
    assert (codes.shape, scale.shape) == ((0, 16384), (0,))


def test_int8_output_is_refused_where_a_gradient_is_needed(device: torch.device) -> None:
    x = torch.randn(3, 8, device=device)
    bias = torch.randn(8, device=device, requires_grad=True)
    for backend in dispatch.BACKENDS:
        with pytest.raises(ValueError, match=r"have no gradient.*torch.no_grad\(\)"):
            call(x, bias, quantize_output=True, backend=backend)
        with torch.no_grad():
            codes, scale = call(x, bias, quantize_output=True, backend=backend)
        assert not codes.requires_grad
        assert not scale.requires_grad


@pytest.mark.parametrize("view", ["transposed", "sliced", "every_second", "expanded", "3d", "offset"])
def test_strided_inputs_and_gradients(view: str, device: torch.device) -> None:
    strided = {
        "transposed": lambda t: t[:40, :6].t(),
        "sliced": lambda t: t[:6, 3:43],
        "every_second": lambda t: t[:12:2, :80:2],
        "expanded": lambda t: t[:1, :40].expand(6, 40),
        "3d": lambda t: t[:6, :40].view(2, 3, 40).transpose(0, 1),
        "offset": lambda t: t[5:11, 1:41],
    }[view]
    base = torch.randn(160, 40 if view == "3d" else 160, device=device)
    bias = torch.randn(80, device=device)[::2]
    x, grad = strided(base), strided(base * 2 - 1)
    results = []
    for copy in (False, True):
        a, b = ((t.contiguous() if copy else t).detach().requires_grad_() for t in (x, bias))
        out = call(a, b)
        results.append(with_gradients(out, [a, b], grad.contiguous() if copy else grad))
        results[-1] += call(a.detach(), b.detach(), quantize_output=True)
    for a, b in zip(*results, strict=True):
        assert_bits_equal(a, b)


def test_a_gradient_of_stride_zero_and_a_cat_after_the_op(device: torch.device) -> None:
    results = []
    inputs = [torch.randn(6, 24, device=device), torch.randn(24, device=device)]
    for kind in ("ours", "truth", "naive"):
        given = [t.to(torch.float64 if kind == "truth" else F32).detach().requires_grad_() for t in inputs]
        out = call(*given) if kind == "ours" else reference.bias_gelu(*given, upcast=kind == "truth")
        results.append(torch.autograd.grad(torch.cat([out, out[:2]]).sum() + out.sum(), given))
    for name, ours, truth, naive in zip(("dx", "dbias"), *results, strict=True):
        assert_close_to_truth(ours, truth, naive, name=name)
    # A gradient of stride 0 itself, which no addition has made contiguous.
    x, bias = (t.detach().requires_grad_() for t in inputs)
    expanded, whole = (
        torch.autograd.grad(call(x, bias), (x, bias), dy)
        for dy in (torch.tensor(2.0, device=device).expand(6, 24), torch.full((6, 24), 2.0, device=device))
    )
    for a, b in zip(expanded, whole, strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_an_fp32_bias_has_the_gradient_of_an_fp32_x(dtype: torch.dtype, device: torch.device) -> None:
    """Nothing is rounded on the way: not dx before it is summed, and not the sum."""
    x, dy = (torch.randn(2, 40, 48, device=device) + 0.3).to(dtype).unbind()
    bias = torch.randn(48, device=device, requires_grad=True)
    for activation in ACTIVATIONS:
        narrow, wide = (
            torch.autograd.grad(call(a, bias, activation), bias, b)[0]
            for a, b in ((x, dy), (x.float(), dy.float()))
        )
        assert_bits_equal(narrow, wide, name=activation)


def test_leading_dimensions_are_rows(device: torch.device) -> None:
    x, bias = torch.randn(2, 3, 5, 48, device=device), torch.randn(48, device=device)
    flat = call(x.view(-1, 48), bias)
    assert_bits_equal(call(x, bias), flat.view(x.shape))
    assert_bits_equal(call(x[0, 0, 0], bias), flat[0])
    codes, scale = call(x[0, 0, 0], bias, quantize_output=True)
    assert (codes.shape, scale.shape) == ((48,), ())


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_no_rows(backend: str, device: torch.device, poison: None) -> None:
    x = torch.empty(0, 32, device=device, requires_grad=True)
    bias = torch.randn(32, device=device, requires_grad=True)
    out = call(x, bias, backend=backend)
    assert out.shape == (0, 32)
    out.sum().backward()
    assert x.grad.shape == (0, 32)
    assert_bits_equal(bias.grad, torch.zeros_like(bias))


def test_two_runs_give_the_same_bits_and_a_row_does_not_depend_on_its_batch(device: torch.device) -> None:
    x, dy = torch.randn(2, 70, 96, device=device).unbind()
    bias = torch.randn(96, device=device)
    runs = []
    for _ in range(2):
        given = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        runs.append([*with_gradients(call(*given), given, dy), *call(x, bias, quantize_output=True)])
    for a, b in zip(*runs, strict=True):
        assert_bits_equal(a, b)
    for row in (0, 17, 69):
        part = slice(row, row + 1)
        alone = x[part].clone().requires_grad_()
        results = [*with_gradients(call(alone, bias), [alone], dy[part])]
        results += call(x[part], bias, quantize_output=True)
        whole = [runs[0][i][part] for i in (0, 1, 3, 4)]
        for a, b in zip(results, whole, strict=True):
            assert_bits_equal(a, b)


def test_only_what_is_needed_gets_a_gradient(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias, dy = torch.randn(5, 32, device=device), torch.randn(32, device=device), torch.randn(5, 32)
    dy = dy.to(device)
    both = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    _, dx, dbias = with_gradients(call(*both), both, dy)
    x.requires_grad_()
    with monkeypatch.context() as patch:  # no bias gradient: no partial sums, no second launch
        patch.setattr(column_sum, "column_sum", None)
        assert_bits_equal(with_gradients(call(x, bias), [x], dy)[1], dx)
        call(x, None).backward(dy)
    assert bias.grad is None
    bias.requires_grad_()
    assert_bits_equal(with_gradients(call(x.detach(), bias), [bias], dy)[1], dbias)
    # In the op itself too: what isn't wanted has no elements.
    sizes = [[t.numel() for t in backward_op(dy, x.detach(), bias.detach(), "gelu", *w)] for w in
             ((True, False), (False, True), (False, False))]  # fmt: skip
    assert sizes == [[160, 0], [0, 32], [0, 0]]


def test_it_saves_x_and_bias_and_nothing_else(device: torch.device) -> None:
    x = torch.randn(5, 32, device=device, requires_grad=True)
    bias = torch.randn(32, device=device, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        call(x, bias)
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), bias.data_ptr()]


def test_gradient_checkpointing(device: torch.device) -> None:
    inputs = [torch.randn(6, 64, device=device), torch.randn(64, device=device)]
    results = []
    for checkpointed in (False, True):
        given = [t.clone().requires_grad_() for t in inputs]
        out = checkpoint(call, *given, use_reentrant=False) if checkpointed else call(*given)
        results.append(with_gradients(out, given, inputs[0]))
    for a, b in zip(*results, strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_under_autocast_the_output_keeps_the_dtype_of_x(backend: str, device: torch.device) -> None:
    linear = torch.nn.Linear(16, 32, device=device)
    inputs = torch.randn(3, 16, device=device)
    with torch.autocast(device.type, BF16):
        x = torch.nn.functional.linear(inputs, linear.weight)
        out = call(x, linear.bias, backend=backend)
    assert (x.dtype, linear.bias.dtype, out.dtype) == (BF16, F32, BF16)
    out.float().square().sum().backward()
    assert linear.bias.grad.dtype == linear.weight.grad.dtype == F32
    assert linear.bias.grad.abs().min() > 0


def test_a_double_backward_says_what_to_do(device: torch.device) -> None:
    x = torch.randn(3, 16, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward.*use_backend\('torch'"):
        dx.sum().backward()


def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    """Rows, or columns, 2**30 elements apart: the last begins at 3 * 2**30. Memory not touched isn't taken."""
    big = torch.empty(3 * 2**30 + 16, dtype=F16, device=device)
    near = torch.randn(4, 16, device=device).to(F16)
    for far, like in (
        (big.as_strided((4, 16), (2**30, 1)), near),
        (big.as_strided((16, 4), (1, 2**30)), near.t()),
    ):
        far.copy_(like)
        like = like.contiguous()
        assert_bits_equal(call(far), call(like))
        for a, b in zip(call(far, quantize_output=True), call(like, quantize_output=True), strict=True):
            assert_bits_equal(a, b)
        leaf = like.clone().requires_grad_()
        of_far, of_like = (torch.autograd.grad(call(leaf), leaf, dy)[0] for dy in (far, like))
        assert_bits_equal(of_far, of_like)


def test_nan_and_inf_stay_where_they_are(device: torch.device) -> None:
    x, bias = torch.randn(8, 32, device=device), torch.randn(32, device=device)
    clean, clean_codes = call(x, bias), call(x, bias, quantize_output=True)
    x[3, 5] = float("nan")
    x[6, 1] = float("inf")
    for activation in ACTIVATIONS:
        out = call(x, bias, activation)
        assert out.isnan().nonzero().tolist() == [[3, 5]]
        assert out.isinf().nonzero().tolist() == [[6, 1]]
    changed = torch.zeros_like(x, dtype=torch.bool)
    changed[3, 5] = changed[6, 1] = True
    assert_bits_equal(call(x, bias)[~changed], clean[~changed])
    codes, scale = call(x, bias, quantize_output=True)
    assert scale[3].isnan()
    assert scale[6].isinf()
    others = [0, 1, 2, 4, 5, 7]
    assert_bits_equal(codes[others], clean_codes[0][others])
    assert_bits_equal(scale[others], clean_codes[1][others])


def test_every_bad_argument_is_named_in_one_error(device: torch.device) -> None:
    x = torch.randn(4, 32, device=device)
    with pytest.raises(
        ValueError, match=r"bias must be \[32\].*unknown activation 'tanh': expected one of gelu"
    ) as info:
        ops.bias_gelu(x.requires_grad_(), x[0, :3], "tanh", quantize_output=True)
    assert "leave quantize_output=False" in str(info.value)
    x = x.detach()
    with pytest.raises(
        ValueError, match=r"x must be of a floating dtype, got torch.int32; bias must be of a floating"
    ):
        ops.bias_gelu(x.int(), x[0].int())
    for empty in (x[:, :0], x[0, 0]):
        with pytest.raises(ValueError, match="features at least 1"):
            ops.bias_gelu(empty, None)
    with pytest.raises(ValueError, match="bias is on meta and x on"):
        ops.bias_gelu(x, torch.empty(32, device="meta"))


def test_a_backend_asked_for_is_honored_or_says_why_not(device: torch.device) -> None:
    x = torch.randn(4, 32, device=device, dtype=torch.float64)
    with pytest.raises(NotSupportedError, match="not float64"):
        call(x)
    wide = torch.randn(1, 16385, device=device)
    with pytest.raises(NotSupportedError, match="int8 output takes rows of up to 16384"):
        call(wide, quantize_output=True)
    assert call(wide).shape == wide.shape
    with dispatch.record() as choices:
        ops.bias_gelu(x)
        call(x.float())
    assert [c.backend for c in choices] == ["torch", "triton"]


def test_the_function_is_exported() -> None:
    assert ops.bias_gelu is public


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_a_lone_row_and_its_bias_get_gradients_of_their_own(backend: str, device: torch.device) -> None:
    x, bias = (torch.randn(8, device=device, requires_grad=True) for _ in range(2))
    with dispatch.use_backend(backend):
        dx, dbias = torch.autograd.grad(ops.bias_gelu(x, bias).sum(), (x, bias))
    assert dx.untyped_storage().data_ptr() != dbias.untyped_storage().data_ptr()
