"""Bias + dropout + residual + LayerNorm: the public function against the fp64 truth, on every backend."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyaccel import dispatch, ops, reference
from pyaccel.errors import NotSupportedError
from pyaccel.ops import residual_layernorm as public
from pyaccel.ops.dropout import dropout_key
from pyaccel.ops.layernorm.triton import forward_op
from pyaccel.reference.philox import keep_mask
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_statistic

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("x", "residual", "weight", "bias", "x_bias")


@dataclass(frozen=True)
class Case:
    """Shapes, dtypes and options of one call."""

    rows: int
    cols: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32)  # x, residual, parameters
    dropout_p: float = 0.0
    absent: tuple[str, ...] = ()
    eps: float = 1e-12
    rms_norm: bool = False

    def __str__(self) -> str:
        kinds = "/".join(str(d).removeprefix("torch.") for d in dict.fromkeys(self.dtypes))
        no = "".join(f"-no_{n}" for n in self.absent)
        rms = "-rms" * self.rms_norm
        return f"{self.rows}x{self.cols}-{kinds}-p{self.dropout_p}{no}-eps{self.eps}{rms}"


AUTOCAST = (BF16, F32, F32)
CASES = [
    Case(7, 384),
    Case(7, 384, dropout_p=0.1),
    Case(9, 768, (BF16, BF16, BF16), dropout_p=0.1),
    Case(9, 768, (F16, F16, F16)),
    Case(5, 768, AUTOCAST, dropout_p=0.1),
    Case(5, 384, (F16, F32, F32)),
    Case(5, 384, (BF16, BF16, F32), dropout_p=0.5),
    Case(1, 1),
    Case(3, 2, eps=1e-3),
    Case(5, 17, eps=1e-3),
    Case(5, 17, dropout_p=0.3, absent=("residual",)),
    Case(6, 100, (BF16, BF16, BF16), absent=("x_bias",)),
    Case(6, 100, absent=("bias",), dropout_p=0.9),
    Case(6, 100, absent=("weight", "bias", "x_bias")),
    Case(2, 1000, absent=("x_bias", "residual")),
    Case(2, 4096, (BF16, BF16, BF16), dropout_p=0.1),
    Case(13, 4100, dropout_p=0.1),
    Case(5, 5000, AUTOCAST, absent=("weight",)),
    Case(3, 16384, (F16, F16, F16)),
    Case(7, 384, (BF16, BF16, BF16), dropout_p=0.1, rms_norm=True),
    Case(7, 100, absent=("bias", "x_bias"), rms_norm=True),
    Case(5, 768, AUTOCAST, rms_norm=True),
    Case(1, 1, rms_norm=True),
    Case(5, 5000, dropout_p=0.1, absent=("bias",), eps=1e-5, rms_norm=True),
]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor | None]:
    """Inputs that matter: means away from zero, a large-mean row, a tiny-variance row, parameters not 1 and 0."""
    x_dtype, residual_dtype, parameter_dtype = case.dtypes
    x = (
        torch.randn(case.rows, case.cols, device=device)
        + torch.linspace(-2, 3, case.rows, device=device)[:, None]
    )
    residual = torch.randn(case.rows, case.cols, device=device) * 2 - 1
    if case.rows > 2:
        x[1] += 60.0
        x[2] *= 1e-3
        residual[2] *= 1e-3
    weight = torch.randn(case.cols, device=device) + 0.5
    bias = torch.randn(case.cols, device=device) * 2
    x_bias = torch.randn(case.cols, device=device)
    given = {
        "x": x.to(x_dtype),
        "residual": residual.to(residual_dtype),
        "weight": weight.to(parameter_dtype),
        "bias": bias.to(parameter_dtype),
        "x_bias": x_bias.to(x_dtype if parameter_dtype != F32 else parameter_dtype),
    }
    return {name: None if name in case.absent else tensor for name, tensor in given.items()}


def leaves(inputs: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    return {
        name: None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for name, t in inputs.items()
    }


def gradients(
    out: Tensor, total: Tensor, inputs: dict[str, Tensor | None], dy: Tensor, dsum: Tensor
) -> dict[str, Tensor]:
    names = [name for name, t in inputs.items() if t is not None]
    grads = torch.autograd.grad(
        (out, total), [inputs[n] for n in names], (dy.to(out.dtype), dsum.to(total.dtype))
    )
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("backend", ["triton", "reference", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_sum_and_gradients_are_as_right_as_plain_torch(
    case: Case, backend: str, device: torch.device, poison: None, seed: int
) -> None:
    if backend == "torch" and case.dropout_p > 0:
        case = dataclasses.replace(case, dropout_p=0.0)  # F.dropout draws its own mask
    inputs = make_inputs(case, device)
    dy = torch.randn(case.rows, case.cols, device=device) + 0.3
    dsum = torch.randn(case.rows, case.cols, device=device) - 0.2

    ours = leaves(inputs)
    torch.manual_seed(seed)
    with dispatch.use_backend(backend):
        out, total = ops.residual_layernorm(
            ours["x"],
            ours["residual"],
            ours["weight"],
            ours["bias"],
            eps=case.eps,
            dropout_p=case.dropout_p,
            training=True,
            x_bias=ours["x_bias"],
            rms_norm=case.rms_norm,
            return_sum=True,
        )
    torch.manual_seed(seed)
    key = dropout_key(device) if case.dropout_p else None
    dy, dsum = dy.to(out.dtype).float(), dsum.to(total.dtype).float()
    results = {"ours": (out, total, gradients(out, total, ours, dy, dsum))}
    for name, upcast in (("truth", True), ("naive", False)):
        given = leaves(inputs, torch.float64 if upcast else None)
        result = reference.residual_layernorm(
            given["x"],
            given["residual"],
            given["weight"],
            given["bias"],
            eps=case.eps,
            dropout_p=case.dropout_p,
            x_bias=given["x_bias"],
            dropout_key=key,
            rms_norm=case.rms_norm,
            upcast=upcast,
        )
        results[name] = (result.output, result.sum, gradients(result.output, result.sum, given, dy, dsum))

    for index, name in enumerate(("out", "sum")):
        assert_close_to_truth(*(results[k][index] for k in ("ours", "truth", "naive")), name=name)
    for name, grad in results["ours"][2].items():
        assert_close_to_truth(grad, results["truth"][2][name], results["naive"][2][name], name=f"d{name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_statistics_are_fp32_numbers(case: Case, device: torch.device, poison: None) -> None:
    inputs = make_inputs(case, device)
    key = dropout_key(device) if case.dropout_p else None
    out_dtype = F32 if inputs["residual"] is None else torch.promote_types(case.dtypes[0], case.dtypes[1])
    args = [inputs[n] for n in NAMES]
    _, total, *_, mean, rstd = forward_op(
        *args, key, case.eps, case.dropout_p, out_dtype, case.rms_norm, True, True, False, True
    )
    # Of the sum that is saved beside them, whatever the dtype it was rounded to.
    truth = reference.residual_layernorm(total, None, None, None, eps=case.eps, rms_norm=case.rms_norm)
    if case.rms_norm:
        assert mean.numel() == 0
    else:
        assert_statistic(mean, truth.mean, scale=truth.sum.abs().mean(-1), name="mean")
    # A row of one element has variance 0 exactly; elsewhere the sum cancels by at most its mean over its deviation.
    scale = truth.rstd * truth.rstd.clamp(max=1e3) * truth.mean.abs()
    assert_statistic(rstd, truth.rstd, scale=scale, name="rstd")


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("case", [c for c in CASES if c.cols <= 5000], ids=str)
def test_int8_output_is_that_of_the_fp32_result(
    case: Case, backend: str, device: torch.device, poison: None, seed: int
) -> None:
    """Bit for bit, whatever else is returned, and whatever the output's own dtype."""
    given = make_inputs(case, device)
    options = {
        "eps": case.eps, "dropout_p": case.dropout_p, "training": True, "x_bias": given["x_bias"],
        "rms_norm": case.rms_norm, "quantize_output": True,
    }  # fmt: skip
    args = [given[n] for n in NAMES[:4]]
    found = []
    for autocast, more in (
        (False, {"return_sum": True}),
        (False, {"return_output": False}),
        (True, {}),  # the output in fp32
    ):
        torch.manual_seed(seed)
        with dispatch.use_backend(backend), torch.autocast(device.type, BF16, enabled=autocast):
            found.append(ops.residual_layernorm(*args, **options, **more))
    out, total, codes, scale = found[0]
    plain = {name: value for name, value in options.items() if name != "quantize_output"}
    torch.manual_seed(seed)
    with dispatch.use_backend(backend):
        expected = ops.residual_layernorm(*args, **plain, return_sum=True)
    if backend == "triton":
        assert_bits_equal(out, expected[0], name="output")
    assert_bits_equal(total, expected[1], name="sum")
    wide, *_ = found[2]
    assert wide.dtype == F32
    expected_codes, expected_scale = reference.quantize_per_token(wide)
    assert codes.dtype == torch.int8
    for others in ((codes, scale), found[1], found[2][1:]):
        assert_bits_equal(others[0], expected_codes, name="codes")
        assert_bits_equal(others[1], expected_scale, name="scale")


def test_int8_output_of_rows_that_are_not_numbers_or_nothing(device: torch.device) -> None:
    x = torch.randn(4, 3, 40, device=device)
    x[0, 1, 7], x[1, 2, 3] = float("nan"), float("inf")
    weight = torch.zeros(40, device=device)
    halves = torch.arange(-20.0, 20.0, device=device) + 0.5  # rounded half to even where the scale is 1
    halves[0] = 127.0
    for parameters in ((None, None), (weight, None), (weight, halves)):
        _, codes, scale = call(x, None, *parameters, quantize_output=True)
        out = call(x, None, *parameters)
        expected_codes, expected_scale = reference.quantize_per_token(out)
        assert_bits_equal(codes, expected_codes)
        assert torch.equal(scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))
    codes, scale = call(x[:0], None, weight, None, quantize_output=True, return_output=False)
    assert (codes.shape, scale.shape) == ((0, 3, 40), (0, 3))


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_int8_output_carries_no_gradient(backend: str, device: torch.device) -> None:
    x, weight = torch.randn(6, 32, device=device, requires_grad=True), torch.randn(32, device=device)
    with dispatch.use_backend(backend):
        out, codes, scale = ops.residual_layernorm(x, None, weight, None, quantize_output=True)
        alone = ops.residual_layernorm(x, None, weight, None, quantize_output=True, return_output=False)
        plain = ops.residual_layernorm(x, None, weight, None)
    assert not any(t.requires_grad for t in (codes, scale, *alone))
    grad = torch.randn(6, 32, device=device)
    assert_bits_equal(*(torch.autograd.grad(y, x, grad)[0] for y in (out, plain)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("cols", [3, 64, 384, 4100])
def test_dropout_mask_is_the_references_bit_for_bit(
    p: float, cols: int, device: torch.device, seed: int
) -> None:
    rows = 11 if cols < 4000 else 5
    x = torch.randn(rows, cols, device=device).add_(3.0).requires_grad_()
    weight = torch.randn(cols, device=device)
    torch.manual_seed(seed)
    with dispatch.use_backend("triton"):
        _, total = ops.residual_layernorm(x, None, weight, None, dropout_p=p, training=True, return_sum=True)
    torch.manual_seed(seed)
    key = dropout_key(device)
    keep = keep_mask(key, torch.arange(rows, device=device)[:, None], torch.arange(cols, device=device), p)
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    assert_bits_equal(total, torch.where(keep, x * scale, 0.0), name="sum")
    if p < 1.0:
        assert abs(keep.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5
    (dx,) = torch.autograd.grad(total, x, torch.full_like(total, 2.0))
    assert_bits_equal(dx, torch.where(keep, torch.tensor(2.0, device=device) * scale, 0.0), name="dx")


def test_dropout_counts_only_in_training(device: torch.device) -> None:
    x, weight = torch.randn(4, 32, device=device), torch.randn(32, device=device)
    for backend in dispatch.BACKENDS:
        with dispatch.use_backend(backend):
            a = ops.residual_layernorm(x, x, weight, weight, dropout_p=0.9, training=False)
            b = ops.residual_layernorm(x, x, weight, weight)
        assert_bits_equal(a, b, name=backend)


def call(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, **options: object) -> Tensor:
    with dispatch.use_backend("triton"):
        return ops.residual_layernorm(x, residual, weight, bias, **options)


@pytest.mark.parametrize("view", ["transposed", "sliced", "every_second", "expanded", "3d", "offset"])
def test_strided_inputs_and_gradients(view: str, device: torch.device) -> None:
    weight, bias = torch.randn(40, device=device), torch.randn(40, device=device)
    base = torch.randn(160, 160, device=device)
    strided = {
        "transposed": lambda t: t[:40, :6].t(),
        "sliced": lambda t: t[:6, 3:43],
        "every_second": lambda t: t[:12:2, :80:2],
        "expanded": lambda t: t[:1, :40].expand(6, 40),
        "3d": lambda t: t[:6, :40].view(2, 3, 40).transpose(0, 1) if t.shape[1] == 40 else t[:6, :40],
        "offset": lambda t: t[5:11, 1:41],
    }[view]
    x, residual, grad = (strided(t) for t in (base, base + 1, base * 2 - 1))
    assert view == "3d" or not x.is_contiguous()
    results = []
    for copy in (False, True):
        a, r = ((t.contiguous() if copy else t).detach().requires_grad_() for t in (x, residual))
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        out = call(a, r, w, b)
        results.append((out, *torch.autograd.grad(out, (a, r, w, b), grad.contiguous() if copy else grad)))
    for a, b in zip(*results, strict=True):
        assert_bits_equal(a, b)


def test_a_gradient_of_stride_zero_and_a_cat_after_the_op(device: torch.device) -> None:
    inputs = [torch.randn(6, 24, device=device), torch.randn(6, 24, device=device)]
    inputs += [torch.randn(24, device=device), torch.randn(24, device=device)]
    results = []
    for dtype in (F32, torch.float64):
        given = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = call(*given) if dtype == F32 else reference.residual_layernorm(*given).output
        loss = torch.cat([out, out[:2]]).sum() + out.sum()
        results.append(torch.autograd.grad(loss, given))
    naive = [t.detach().requires_grad_() for t in inputs]
    out = reference.residual_layernorm(*naive, upcast=False).output
    plain = torch.autograd.grad(torch.cat([out, out[:2]]).sum() + out.sum(), naive)
    for name, a, b, c in zip(NAMES, *results, plain, strict=False):
        assert_close_to_truth(a, b, c, name=name)


def test_leading_dimensions_are_rows(device: torch.device) -> None:
    x, residual = torch.randn(2, 3, 5, 48, device=device), torch.randn(2, 3, 5, 48, device=device)
    weight, bias = torch.randn(48, device=device), torch.randn(48, device=device)
    flat = call(x.view(-1, 48), residual.view(-1, 48), weight, bias)
    assert_bits_equal(call(x, residual, weight, bias), flat.view(x.shape))
    assert_bits_equal(call(x[0, 0, 0, :], residual[0, 0, 0, :], weight, bias), flat[0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_rows(dropout_p: float, device: torch.device, poison: None) -> None:
    x = torch.empty(0, 32, device=device, requires_grad=True)
    weight = torch.randn(32, device=device, requires_grad=True)
    bias = torch.randn(32, device=device, requires_grad=True)
    out = call(x, x, weight, bias, x_bias=bias, dropout_p=dropout_p, training=True)
    assert out.shape == (0, 32)
    out.sum().backward()
    assert x.grad.shape == (0, 32)
    assert_bits_equal(weight.grad, torch.zeros_like(weight))
    assert_bits_equal(bias.grad, torch.zeros_like(bias))


def test_two_runs_give_the_same_bits_and_a_row_does_not_depend_on_its_batch(
    device: torch.device, seed: int
) -> None:
    inputs = [torch.randn(40, 96, device=device), torch.randn(40, 96, device=device)]
    inputs += [torch.randn(96, device=device), torch.randn(96, device=device)]
    runs = []
    for _ in range(2):
        torch.manual_seed(seed)
        given = [t.clone().requires_grad_() for t in inputs]
        out = call(*given, dropout_p=0.2, training=True)
        runs.append((out, *torch.autograd.grad(out, given, inputs[1])))
    for a, b in zip(*runs, strict=True):
        assert_bits_equal(a, b)
    whole = call(*inputs)
    for row in (0, 17, 39):
        assert_bits_equal(
            call(inputs[0][row : row + 1], inputs[1][row : row + 1], *inputs[2:]), whole[row : row + 1]
        )


def test_only_what_is_needed_gets_a_gradient(device: torch.device) -> None:
    x, residual = torch.randn(5, 32, device=device), torch.randn(5, 32, device=device)
    weight, bias = torch.randn(32, device=device), torch.randn(32, device=device)
    x.requires_grad_()
    out = call(x, residual, weight, bias)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    assert residual.grad is weight.grad is bias.grad is None
    bias.requires_grad_()
    (dbias,) = torch.autograd.grad(
        call(x.detach(), residual, weight, bias), bias, torch.ones(5, 32, device=device)
    )
    assert_bits_equal(dbias, torch.full_like(bias, 5.0))


def test_the_gradient_of_the_sum_alone(device: torch.device) -> None:
    x = torch.randn(5, 32, device=device, requires_grad=True)
    residual = torch.randn(5, 32, device=device, requires_grad=True)
    weight = torch.randn(32, device=device, requires_grad=True)
    _, total = call(x, residual, weight, None, return_sum=True)
    grad = torch.randn(5, 32, device=device)
    dx, dresidual, dweight = torch.autograd.grad(total, (x, residual, weight), grad)
    assert_bits_equal(dx, grad)
    assert_bits_equal(dresidual, grad)
    assert_bits_equal(dweight, torch.zeros_like(weight))


def test_gradients_of_a_shared_input_add_up(device: torch.device) -> None:
    x = torch.randn(4, 32, device=device, requires_grad=True)
    weight = torch.randn(32, device=device)
    grad = torch.randn(4, 32, device=device)
    (both,) = torch.autograd.grad(call(x, x, weight, None), x, grad)
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    da, db = torch.autograd.grad(call(a, b, weight, None), (a, b), grad)
    assert_bits_equal(both, da + db)


def test_gradient_checkpointing_draws_the_same_mask(device: torch.device, seed: int) -> None:
    inputs = [torch.randn(6, 64, device=device), torch.randn(6, 64, device=device)]
    inputs += [torch.randn(64, device=device), torch.randn(64, device=device)]
    results = []
    for checkpointed in (False, True):
        given = [t.clone().requires_grad_() for t in inputs]
        torch.manual_seed(seed)

        def run(*tensors: Tensor) -> Tensor:
            return call(*tensors, dropout_p=0.4, training=True)

        out = checkpoint(run, *given, use_reentrant=False) if checkpointed else run(*given)
        results.append((out, *torch.autograd.grad(out, given, inputs[0])))
    for a, b in zip(*results, strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype", "autocast", "expected"),
    [
        (BF16, BF16, False, (BF16, BF16)),
        (BF16, F32, False, (F32, F32)),
        (F16, None, False, (F16, F16)),
        (BF16, F32, True, (F32, F32)),
        (BF16, BF16, True, (F32, BF16)),
    ],
)
def test_output_dtypes(
    backend: str,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    autocast: bool,
    expected: tuple[torch.dtype, torch.dtype],
    device: torch.device,
) -> None:
    x = torch.randn(3, 32, device=device).to(x_dtype)
    residual = None if residual_dtype is None else torch.randn(3, 32, device=device).to(residual_dtype)
    weight = torch.randn(32, device=device)
    with dispatch.use_backend(backend), torch.autocast(device.type, BF16, enabled=autocast):
        out, total = ops.residual_layernorm(x, residual, weight, weight, return_sum=True)
    assert (out.dtype, total.dtype) == expected


def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    """Rows 2**30 elements apart: the last begins at element 3 * 2**30. Memory that isn't touched isn't taken."""
    big = torch.empty(3 * 2**30 + 16, dtype=F16, device=device)
    far = big.as_strided((4, 16), (2**30, 1))
    near = torch.randn(4, 16, device=device).to(F16)
    far.copy_(near)
    weight = torch.randn(16, device=device)
    out_far, out_near = call(far, None, weight, weight), call(near, None, weight, weight)
    assert_bits_equal(out_far, out_near)
    assert_bits_equal(call(near, far, weight, weight), call(near, near, weight, weight))
    results = []
    for grad in (far, near):
        x = near.clone().requires_grad_()
        results.append(torch.autograd.grad(call(x, None, weight, weight), x, grad)[0])
    assert_bits_equal(*results)


def test_nan_and_inf_stay_in_their_row(device: torch.device) -> None:
    x = torch.randn(8, 32, device=device)
    weight, bias = torch.randn(32, device=device), torch.randn(32, device=device)
    clean = call(x, x, weight, bias)
    x[3, 5] = float("nan")
    x[6, 1] = float("inf")
    out = call(x, x, weight, bias)
    assert out[3].isnan().all()
    assert out[6].isnan().any()
    others = [0, 1, 2, 4, 5, 7]
    assert_bits_equal(out[others], clean[others])


def test_every_bad_argument_is_named_in_one_error(device: torch.device) -> None:
    x = torch.randn(4, 32, device=device)
    with pytest.raises(
        ValueError, match=r"residual must have x's shape.*weight must be \[32\].*bias must be \[32\]"
    ) as info:
        ops.residual_layernorm(x, x[:2], x, x[0, :3], dropout_p=1.5, eps=-1.0)
    assert "dropout_p must be between 0 and 1" in str(info.value)
    assert "eps must be at least 0" in str(info.value)
    with pytest.raises(ValueError, match="nothing is to be returned"):
        ops.residual_layernorm(x, None, None, None, return_output=False)
    with pytest.raises(ValueError, match="floating dtype"):
        ops.residual_layernorm(x.int(), None, None, None)
    with pytest.raises(ValueError, match="hidden at least 1"):
        ops.residual_layernorm(x[:, :0], None, None, None)


def test_a_backend_asked_for_is_honored_or_says_why_not(device: torch.device) -> None:
    x = torch.randn(4, 32, device=device, dtype=torch.float64)
    with dispatch.use_backend("triton"), pytest.raises(NotSupportedError, match="not float64"):
        ops.residual_layernorm(x, x, None, None)
    wide = torch.randn(1, 16385, device=device)
    with dispatch.use_backend("triton"), pytest.raises(NotSupportedError, match="up to 16384"):
        ops.residual_layernorm(wide, None, None, None)
    with dispatch.use_backend("triton"), pytest.raises(NotSupportedError, match="up to 8192"):
        ops.residual_layernorm(wide[:, :8193], None, None, None, quantize_output=True)
    ops.residual_layernorm(wide, None, None, None, quantize_output=True)
    with dispatch.record() as choices:
        ops.residual_layernorm(x, x, None, None)
    assert [c.backend for c in choices] == ["torch"]


def test_the_function_is_exported() -> None:
    assert ops.residual_layernorm is public


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_a_row_alone_and_its_bias_do_not_share_a_gradient(backend: str, device: torch.device) -> None:
    x, x_bias = (torch.randn(8, device=device, requires_grad=True) for _ in range(2))
    with dispatch.use_backend(backend):
        out = ops.residual_layernorm(x, None, None, None, x_bias=x_bias)
    assert out.shape == (8,)
    dx, dx_bias = torch.autograd.grad(out, (x, x_bias), torch.randn(8, device=device))
    assert torch.equal(dx, dx_bias)
    assert dx.untyped_storage().data_ptr() != dx_bias.untyped_storage().data_ptr()
