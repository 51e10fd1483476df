"""int8 quantization and matrix product: the public functions against the reference and the fp64 truth."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import dispatch
from pyaccel.errors import NotSupportedError
from pyaccel.ops.int8 import cpu as on_cpu
from pyaccel.ops.int8.matmul import _accumulate, _pad_for_cublas, int8_matmul
from pyaccel.ops.int8.quantize import (
    quantize_per_channel,
    quantize_per_tensor,
    quantize_per_token,
    quantize_per_token_with_offset,
)
from pyaccel.ops.int8.weight_only import int8_weight_only_matmul
from pyaccel.reference import int8 as reference_quantize
from pyaccel.reference.int8 import int8_matmul as reference_int8_matmul
from pyaccel.reference.int8 import int8_weight_only_matmul as reference_int8_weight_only_matmul
from tests.assertions import assert_bits_equal, assert_close_to_truth

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BACKENDS = ["triton", "torch", "reference"]
SIZES = [(1, 64, 32), (7, 33, 17), (16, 40, 9), (17, 384, 31), (16, 8, 8), (33, 1, 1)]


def operands(rows: int, n_in: int, n_out: int, device: torch.device) -> list[Tensor]:
    """Codes and scales of rows and channels of different magnitudes; where several, a row of zeros."""
    x = torch.randn(rows, n_in, device=device) * torch.logspace(-1, 1, rows, device=device)[:, None] + 0.2
    if rows > 2:
        x[1] = 0
    weight = torch.randn(n_out, n_in, device=device) * torch.logspace(-2, 0, n_out, device=device)[:, None]
    (a, a_scale), (b, b_scale) = quantize_per_token(x), quantize_per_channel(weight)
    return [a, b, a_scale, b_scale]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_are_the_references_bit_for_bit(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    x = ((torch.randn(6, 4, 33, device=device) + 0.3) * 3).to(dtype).transpose(0, 1)
    x[1, 2] = 0
    with dispatch.use_backend(backend):
        results = [(quantize_per_token(x), reference_quantize.quantize_per_token(x))]
        results.append((quantize_per_channel(x[0]), reference_quantize.quantize_per_channel(x[0])))
        scale = torch.tensor(0.01, device=device)
        results.append((quantize_per_tensor(x, scale), reference_quantize.quantize_per_tensor(x, scale)))
    for found, expected in results:
        for a, b in zip(found, expected, strict=True):
            assert_bits_equal(a, b)
    codes, scales = results[0][0]
    assert codes.shape == x.shape
    assert scales.shape == x.shape[:-1]
    assert not codes[1, 2].any()
    assert scales[1, 2] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_between_two_codes_are_divided_not_multiplied(backend: str, device: torch.device) -> None:
    scale = torch.rand(64, 1, device=device) + 0.01
    halves = torch.arange(126, device=device) + 0.5
    x = torch.cat([127 * scale, halves * scale], dim=1)  # where a reciprocal's rounding moves a code
    with dispatch.use_backend(backend):
        codes, found = quantize_per_token(x)
    expected = torch.round(x.cpu() / found.cpu()[:, None]).to(torch.int8)
    assert_bits_equal(codes.cpu(), expected)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_around_an_offset(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    x = (torch.randn(6, 4, 33, device=device) + 2) * torch.linspace(0.1, 9, 6, device=device)[:, None, None]
    x = x.to(dtype).transpose(0, 1)
    x[1, 2], x[2, 1] = 0, -3.5
    with dispatch.use_backend(backend):
        found = quantize_per_token_with_offset(x)
    for a, b in zip(found, reference_quantize.quantize_per_token_with_offset(x), strict=True):
        assert_bits_equal(a, b)
    codes, scale, offset = found
    half = (x.float().amax(-1) - x.float().amin(-1)) / 2
    error = (codes * scale[..., None] + offset[..., None] - x.float()).abs().amax(-1)
    assert (error <= half / 127 * 0.501 + 1e-6).all()
    assert (offset[1, 2].item(), offset[2, 1].item()) == (0.0, -3.5)
    assert not codes[1, 2].any()
    assert not codes[2, 1].any()
    empty = quantize_per_token_with_offset(torch.zeros(3, 0, device=device))
    assert [t.shape for t in empty] == [(3, 0), (3,), (3,)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("backend", "block_bytes"),
    [("torch", 1), ("torch", 2**20), ("triton", 2**20)],
    ids=["blocks", "one", "triton"],
)
def test_rows_that_have_no_ordinary_scale(
    backend: str, block_bytes: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_cpu, "BLOCK_BYTES", block_bytes)
    x = torch.randn(70, 9, device=device)
    x[3, 4] = float("nan")
    x[4, 1] = float("inf")
    x[5, 2] = -float("inf")
    x[40] = 0
    x[41] *= 1e-38
    x[42] = torch.linspace(-190, 190, 9) * 2.0**-149
    x[50, 0] = 1e30
    x = x.to(dtype)
    with dispatch.use_backend(backend):
        for op, definition in (
            (quantize_per_token, reference_quantize.quantize_per_token),
            (quantize_per_token_with_offset, reference_quantize.quantize_per_token_with_offset),
        ):
            for a, b in zip(op(x), definition(x), strict=True):
                assert_bits_equal(
                    a.nan_to_num(7) if a.is_floating_point() else a,
                    b.nan_to_num(7) if b.is_floating_point() else b,
                )
        codes, scale = quantize_per_token(x)
        weight, w_scale = quantize_per_channel(torch.randn(5, 9, device=device))
        out = int8_matmul(codes, weight, scale, w_scale)
        bad = torch.tensor([3, 4, 5], device=device)
        assert not out[bad].isfinite().any()  # it shows, and stays in its row
        assert out[:3].isfinite().all()
        assert out[6:].isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_nothing_to_quantize(backend: str, device: torch.device) -> None:
    for shape in ((0, 5), (3, 0)):
        with dispatch.use_backend(backend):
            codes, scale = quantize_per_token(torch.zeros(shape, device=device))
        assert codes.shape == shape
        assert scale.tolist() == [1.0] * shape[0]


@pytest.mark.parametrize("quantize_output", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (2, 3, 5, 0), (2, 0, 5, 4), (2, 0, 0, 0)], ids=str)
def test_products_of_sizes_with_a_zero(
    shape: tuple[int, ...],
    with_offset: bool,
    activation: str | None,
    quantize_output: bool,
    device: torch.device,
) -> None:
    """``[*leading, in_features, out_features]``, on the meta device too."""
    *leading, n_in, n_out = shape
    a, b = torch.ones(*leading, n_in, dtype=torch.int8), torch.ones(n_out, n_in, dtype=torch.int8)
    scales = torch.full(leading, 0.5), torch.full((n_out,), 2.0)
    bias, offset = torch.full((n_out,), 3.0), torch.full(leading, 0.25) if with_offset else None
    found = []
    for backend, place in (("auto", device), ("torch", device), ("reference", device), ("auto", "meta")):
        arguments = [t if t is None else t.to(place) for t in (a, b, *scales, bias)]
        with dispatch.use_backend(backend):
            out = int8_matmul(
                *arguments, activation, quantize_output=quantize_output,
                a_offset=None if offset is None else offset.to(place),
            )  # fmt: skip
        found.append(out if quantize_output else (out,))
    expected = found[2]
    for each in found[:2]:
        for mine, other in zip(each, expected, strict=True):
            assert_bits_equal(mine, other)
    assert [(t.shape, t.dtype) for t in found[3]] == [(t.shape, t.dtype) for t in expected]
    assert expected[0].shape == (*leading, n_out)


@pytest.mark.parametrize(("rows", "n_in", "n_out"), [*SIZES, (0, 8, 8), (4, 0, 4), (3, 2000, 5)])
def test_accumulation_is_exact(rows: int, n_in: int, n_out: int, device: torch.device) -> None:
    a = torch.randint(-128, 128, (rows, n_in), dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (n_out, n_in), dtype=torch.int8, device=device)
    a[:1], b[:1] = -128, -128
    exact = (a.cpu().int() @ b.cpu().int().T).to(device)
    assert_bits_equal(_accumulate(a, b), exact)
    padded_a, padded_b = _pad_for_cublas(a, b)
    assert padded_a.shape[0] > 16
    assert {*padded_a.shape[1:], *padded_b.shape} <= {8 * n for n in range(1, 1000)}
    assert_bits_equal(torch._int_mm(padded_a, padded_b.T)[:rows, :n_out], exact)


@pytest.mark.parametrize("n_in", [17, 1024, 1025, 3001])
def test_products_are_exact_where_pytorchs_is_not(n_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without VNNI: the largest codes, whose products don't fit 16 bits in pairs, nor their sums fp32."""
    monkeypatch.setattr(on_cpu, "int_mm_is_exact", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", lambda *_: pytest.fail("it isn't exact"))
    a = torch.randint(-128, 128, (5, n_in), dtype=torch.int8)
    b = torch.randint(-128, 128, (7, n_in), dtype=torch.int8)
    a[0], b[0], b[1] = -128, -128, 127
    a[1], b[2] = 127, 127
    exact = a.int() @ b.int().T
    assert_bits_equal(_accumulate(a, b), exact)
    one = torch.ones(())
    with dispatch.use_backend("torch"):
        for options in ({}, {"a_offset": torch.randn(5)}):
            out = int8_matmul(a, b, one, torch.ones(7), **options)
            assert_bits_equal(out, reference_int8_matmul(a, b, one, torch.ones(7), **options, upcast=False))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's switch names x86 instructions")
def test_a_cpu_without_vnni_is_found_out() -> None:
    code = (
        "import torch\n"
        "from pyaccel import ops\n"
        "from pyaccel.ops.int8.cpu import int_mm_is_exact\n"
        "a, one = torch.full((40, 80), 127, dtype=torch.int8), torch.ones(())\n"
        "call = lambda: ops.int8_matmul(a, a, one, torch.ones(40))\n"
        "compiled = torch.compile(call, backend='aot_eager', fullgraph=True)\n"
        "print(compiled().unique().tolist(), call().unique().tolist(), int_mm_is_exact())\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[{80 * 127**2}.0] [{80 * 127**2}.0] False"


EPILOGUES: dict[str, dict[str, Any]] = {
    "none": {},
    "bias, gelu": {"bias": F32, "activation": "gelu"},
    "bias, gelu_tanh, bf16": {"bias": BF16, "activation": "gelu_tanh", "out_dtype": BF16},
    "relu, residual": {"activation": "relu", "residual": F32},
    "bias, residual, fp16": {"bias": F32, "residual": F16, "out_dtype": F16},
    "offset": {"a_offset": F32},
    "everything": {"bias": F32, "activation": "gelu", "residual": BF16, "out_dtype": BF16, "a_offset": F32},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_product_is_as_right_as_plain_torch(
    sizes: tuple[int, int, int], epilogue: str, backend: str, device: torch.device, poison: None
) -> None:
    rows, _, n_out = sizes
    options = dict(EPILOGUES[epilogue])
    for name, shape in (("bias", (n_out,)), ("residual", (n_out, rows))):
        if name in options:
            term = (torch.randn(shape, device=device) * 2 + 0.5).to(options[name])
            options[name] = term.T if term.dim() == 2 else term
    if "a_offset" in options:
        options["a_offset"] = torch.randn(rows, device=device)
    inputs = operands(*sizes, device)
    with dispatch.use_backend(backend):
        out = int8_matmul(*inputs, **options)
        wide = int8_matmul(*inputs, **{**options, "out_dtype": F32})
        codes, scale = int8_matmul(*inputs, **options, quantize_output=True)
    truth = reference_int8_matmul(*inputs, **options)
    naive = reference_int8_matmul(*inputs, **options, upcast=False)
    assert_close_to_truth(out, truth, naive)
    # Codes are those of the backend's own fp32 result: what is between two codes may be on either side of another's.
    for found, expected in zip((codes, scale), reference_quantize.quantize_per_token(wide), strict=True):
        assert_bits_equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_static_scales_and_strides(backend: str, device: torch.device) -> None:
    a, b, a_scale, b_scale = operands(12, 20, 6, device)
    flat = int8_matmul(a, b, a_scale, b_scale)
    with dispatch.use_backend(backend):
        nested = int8_matmul(a.view(3, 4, 20), b, a_scale.view(3, 4), b_scale)
        strided = int8_matmul(a.T.contiguous().T, b.T.contiguous().T, a_scale, b_scale)
        static = int8_matmul(a, b, torch.tensor(0.5, device=device), torch.tensor(0.25, device=device))
        one = int8_matmul(a[3], b, a_scale[3], b_scale)
    torch.testing.assert_close(nested, flat.view(3, 4, 6))
    torch.testing.assert_close(strided, flat)
    torch.testing.assert_close(one, flat[3])
    assert torch.equal(static, (a.cpu().int() @ b.cpu().int().T).to(device) * 0.125)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(1, 64, 32), (7, 33, 17), (16, 40, 9), (17, 96, 31)])
def test_weight_only_product(
    rows: int, n_in: int, n_out: int, backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = (torch.randn(n_in, rows, device=device) + 0.2).to(dtype).T
    weight = torch.randn(n_out, n_in, device=device) * torch.logspace(-2, 0, n_out, device=device)[:, None]
    b, b_scale = quantize_per_channel(weight)
    bias = torch.randn(n_out, device=device)
    if backend == "triton" and dtype == F32:
        with dispatch.use_backend(backend), pytest.raises(NotSupportedError, match="16-bit"):
            int8_weight_only_matmul(x, b, b_scale, bias)
        return
    with dispatch.use_backend(backend):
        out = int8_weight_only_matmul(x, b, b_scale, bias, "gelu")
        with torch.autocast(device.type, BF16):
            assert_bits_equal(int8_weight_only_matmul(x, b, b_scale, bias, "gelu"), out)
    truth = reference_int8_weight_only_matmul(x, b, b_scale, bias, "gelu")
    naive = F.gelu(F.linear(x, (b * b_scale[:, None]).to(dtype), bias.to(dtype)))
    assert_close_to_truth(out, truth, naive)


def test_weight_only_leaves_many_rows_to_pytorch(device: torch.device) -> None:
    b, b_scale = quantize_per_channel(torch.randn(8, 16, device=device))
    for rows, served in ((128, "triton"), (129, "torch")):
        with dispatch.record() as choices:
            int8_weight_only_matmul(torch.ones(rows, 16, device=device).bfloat16(), b, b_scale)
        assert [choice.backend for choice in choices] == [served]
    assert "more than 128 rows" in choices[0].reason
    with pytest.raises(ValueError, match=r"b must be int8.*b_scale must be float32 \(8,\)"):
        int8_weight_only_matmul(torch.ones(2, 16, device=device), b.float(), b_scale[:3])
    with pytest.raises(ValueError, match="a gradient is wanted of x"):
        int8_weight_only_matmul(torch.ones(2, 16, device=device, requires_grad=True), b, b_scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_multiplies_in_fp32_before_anything_is_rounded(backend: str, device: torch.device) -> None:
    x = (torch.randn(5, 40, device=device) + 0.3).bfloat16()
    factor = torch.rand(80, device=device)[::2] + 0.1
    scale = torch.tensor(0.01, device=device)
    scaled = x.float() * factor
    with dispatch.use_backend(backend):
        found = (
            *quantize_per_token_with_offset(x, factor=factor),
            *quantize_per_tensor(x, scale, factor=factor),
            *quantize_per_tensor(x, factor=factor),
        )
    expected = (
        *reference_quantize.quantize_per_token_with_offset(scaled),
        *reference_quantize.quantize_per_tensor(scaled, scale),
        *reference_quantize.quantize_per_tensor(scaled),
    )
    for a, b in zip(found, expected, strict=True):
        assert_bits_equal(a, b)
    with pytest.raises(ValueError, match=r"factor must be float32 \(40,\)"):
        quantize_per_token_with_offset(x, factor=factor[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_left_alone(backend: str, device: torch.device) -> None:
    inputs = operands(5, 16, 8, device)
    terms = {"bias": torch.randn(8, device=device), "residual": torch.randn(5, 8, device=device)}
    before = [t.clone() for t in (*inputs, *terms.values())]
    with dispatch.use_backend(backend):
        int8_matmul(*inputs, **terms, activation="relu")
    for a, b in zip((*inputs, *terms.values()), before, strict=True):
        assert_bits_equal(a, b)


def test_triton_says_what_it_does_not_take(device: torch.device) -> None:
    inputs = operands(5, 16, 8, device)
    wide = torch.ones(2, 16385, device=device)
    long, one = torch.ones(8193, 16, dtype=torch.int8, device=device), torch.ones((), device=device)
    with dispatch.use_backend("triton"):
        with pytest.raises(NotSupportedError, match="float64"):
            int8_matmul(*inputs, bias=torch.ones(8, dtype=torch.float64, device=device))
        with pytest.raises(NotSupportedError, match="a dimension of the weight is 0"):
            int8_matmul(inputs[0], inputs[1][:0], inputs[2], inputs[3][:0])
        with pytest.raises(NotSupportedError, match="more than 8192 elements"):
            int8_matmul(inputs[0], long, inputs[2], one, quantize_output=True)
        with pytest.raises(NotSupportedError, match="1 to 16384 elements, not 16385"):
            quantize_per_token(wide)
    with dispatch.record() as choices:
        quantize_per_token(wide)
    assert [choice.backend for choice in choices] == ["torch"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_compile_change_nothing(backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    inputs = operands(7, 33, 17, device)

    def quantized_linear(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        x = int8_matmul(a, b, a_scale, b_scale, activation="gelu")
        codes, scale = quantize_per_token(x)
        return int8_matmul(codes, codes, scale, scale)

    with dispatch.use_backend(backend):
        expected = quantized_linear(*inputs)
        with torch.autocast(device.type, BF16):
            assert_bits_equal(quantized_linear(*inputs), expected)
        compiled = torch.compile(quantized_linear, fullgraph=True, backend="aot_eager")
        assert_bits_equal(compiled(*inputs), expected)


def test_every_reason_is_named_at_once(device: torch.device) -> None:
    a, b, a_scale, b_scale = operands(5, 16, 8, device)
    bias = torch.randn(8, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="int8_matmul") as info:
        int8_matmul(a.float(), b, a_scale[:2], b_scale.double(), bias, "tanh", a, torch.int8)
    for reason in (
        "a must be int8", "a_scale must be float32", "b_scale must be float32", "unknown activation 'tanh'",
        "residual must be floating point (5, 8)", "out_dtype must be", "a gradient is wanted of bias",
    ):  # fmt: skip
        assert reason in str(info.value)
    with pytest.raises(ValueError, match=r"a must be \[\.\.\., in_features\]"):
        int8_matmul(a, b[:, :3], a_scale, b_scale)
    long = torch.zeros(1, 2**17, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match="could overflow"):
        int8_matmul(long, long, a_scale[:1], b_scale[:1])
    with torch.no_grad():
        int8_matmul(a, b, a_scale, b_scale, bias)


def test_quantize_errors(device: torch.device) -> None:
    x = torch.ones(3, 4, device=device)
    for call, message in (
        (lambda: quantize_per_token(x.int()), "must be floating point"),
        (lambda: quantize_per_token(x[0, 0]), r"must be \[\.\.\., features\]"),
        (lambda: quantize_per_channel(x[0]), "of 2 dimensions"),
        (lambda: quantize_per_tensor(x, x[0]), "fp32 scalar"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
