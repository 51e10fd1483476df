"""The bfloat16 correction of Triton's interpreter, against torch; and the need for it."""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests import interpreter

pytestmark = pytest.mark.interpreter


@triton.jit
def copy_kernel(out_ptr, x_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def arithmetic_kernel(out_ptr, less_ptr, x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, x * y)
    tl.store(out_ptr + BLOCK + offsets, x + y)
    tl.store(out_ptr + 2 * BLOCK + offsets, -x)
    tl.store(out_ptr + 3 * BLOCK + offsets, tl.where(x < y, x, 2.5))
    tl.store(less_ptr + offsets, (x < y).to(tl.int8))


@triton.jit
def max_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.max(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def sum_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def atomic_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + offsets, tl.load(x_ptr + offsets))


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    o_m = tl.arange(0, M)[:, None]
    o_n = tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + o_m * K + tl.arange(0, K)[None, :])  # [M, K]
    b = tl.load(b_ptr + tl.arange(0, K)[:, None] * N + o_n)  # [K, N]
    acc = tl.full([M, N], 1, dtype=ACC)
    tl.store(out_ptr + o_m * N + o_n, tl.dot(a, b, acc, out_dtype=ACC))


@triton.jit
def philox_kernel(out_ptr, counter_ptr, seed, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + 4 * o).to(tl.uint32, bitcast=True)
    c1 = tl.load(counter_ptr + 4 * o + 1).to(tl.uint32, bitcast=True)
    c2 = tl.load(counter_ptr + 4 * o + 2).to(tl.uint32, bitcast=True)
    c3 = tl.load(counter_ptr + 4 * o + 3).to(tl.uint32, bitcast=True)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(out_ptr + 4 * o, r0.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 4 * o + 1, r1.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 4 * o + 2, r2.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 4 * o + 3, r3.to(tl.int32, bitcast=True))


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x loaded by a kernel and stored into memory of another dtype."""
    out = torch.empty_like(x, dtype=dtype)
    copy_kernel[(triton.cdiv(x.numel(), 4096),)](out, x, x.numel(), BLOCK=4096)
    return out


def dot(a: torch.Tensor, b: torch.Tensor, acc: tl.dtype) -> torch.Tensor:
    """a @ b + 1 by a kernel, with the accumulator's dtype."""
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n, dtype=torch.int32 if acc == tl.int32 else torch.float32)
    dot_kernel[(1,)](out, a, b, M=m, N=n, K=k, ACC=acc)
    return out


def assert_same_values(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Bits equal, save that one NaN is as good as another."""
    nan = expected.isnan()
    assert torch.equal(out.isnan(), nan)
    bits = {2: torch.int16, 4: torch.int32}[out.itemsize]
    assert torch.equal(out.view(bits)[~nan], expected.view(bits)[~nan])


def every_bfloat16() -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


# Low halves around each decision: exact, least above, just below a tie, the tie, just above it, greatest.
@pytest.mark.parametrize("low_half", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_float32_to_bfloat16_rounds_to_nearest_even(low_half: int) -> None:
    # Every upper half: zeros, denormals, ties to even and to odd, the carry into infinity, infinities, NaNs.
    bits = (torch.arange(2**16, dtype=torch.int64) << 16) | low_half
    x = bits.to(torch.int32).view(torch.float32)
    assert_same_values(converted(x, torch.bfloat16), x.to(torch.bfloat16))


def test_chosen_roundings() -> None:
    cases = {
        1.00390625: 1.0,  # 1 + 2^-8, a tie: to the even one below
        1.01171875: 1.015625,  # 1 + 3 * 2^-8, a tie: to the even one above
        3.4e38: float("inf"),  # above the largest finite bfloat16 by more than half a unit
        3.3895314e38: 3.3895314e38,  # the largest finite bfloat16
        1e-40: 9.9902e-41,  # a denormal of both formats
        float("-inf"): float("-inf"),
        -0.0: -0.0,
    }
    out = converted(torch.tensor(list(cases)), torch.bfloat16)
    assert_same_values(out, torch.tensor(list(cases.values())).to(torch.bfloat16))
    assert converted(torch.tensor([float("nan")]), torch.bfloat16).isnan().all()
    # A NaN whose payload lies in the low half alone would become an infinity if it were cut off.
    payload_below = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    assert converted(payload_below, torch.bfloat16).isnan().all()


def test_random_float32_to_bfloat16() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (50_000,), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    assert_same_values(converted(x, torch.bfloat16), x.to(torch.bfloat16))


def test_bfloat16_to_float32_is_exact() -> None:
    x = every_bfloat16()
    assert_same_values(converted(x, torch.float32), x.float())


def test_bfloat16_copies_bits() -> None:
    x = every_bfloat16()
    assert torch.equal(converted(x, torch.bfloat16).view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.int64, torch.int8])
def test_other_types_to_bfloat16_and_back(dtype: torch.dtype) -> None:
    x = (torch.randn(4096) * 40).to(dtype)
    rounded = x.to(torch.bfloat16)
    assert_same_values(converted(x, torch.bfloat16), rounded)
    assert torch.equal(converted(rounded, dtype), rounded.to(dtype))


def test_bfloat16_arithmetic_rounds_once() -> None:
    x, y = torch.randn(2, 1024).to(torch.bfloat16)
    out = torch.empty(4, 1024, dtype=torch.bfloat16)
    less = torch.empty(1024, dtype=torch.int8)
    arithmetic_kernel[(1,)](out, less, x, y, BLOCK=1024)
    for got, expected in zip(out, (x * y, x + y, -x, torch.where(x < y, x, 2.5)), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(less.bool(), x < y)


def test_bfloat16_max() -> None:
    x = -torch.rand(256).to(torch.bfloat16) - 1
    out = torch.empty(1, dtype=torch.bfloat16)
    max_kernel[(1,)](out, x, BLOCK=256)
    assert out == x.max()


@pytest.mark.parametrize("kernel", [sum_kernel, atomic_kernel], ids=["sum", "atomic_add"])
def test_bfloat16_accumulation_is_refused(kernel) -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="convert to float32 first"):
        kernel[(1,)](torch.zeros_like(x), x, BLOCK=16)
    kernel[(1,)](torch.zeros(16), x.float(), BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floating_dot(dtype: torch.dtype) -> None:
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    expected = a.double() @ b.double() + 1
    # float32 products and sums: what the truth may lose is 64 roundings of sums no larger than these.
    bound = 64 * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs() + 1)
    assert ((dot(a, b, tl.float32).double() - expected).abs() <= bound).all()


def test_bfloat16_dot_equals_torch_on_widened_operands() -> None:
    # Small integers: every product and sum is exact, so that nothing hides behind a tolerance.
    a, b = (torch.randint(-8, 9, shape).to(torch.bfloat16) for shape in ((16, 32), (32, 16)))
    assert torch.equal(dot(a, b, tl.float32), a.float() @ b.float() + 1)


def test_int8_dot_is_exact() -> None:
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((16, 64), (64, 32)))
    a[0], b[:, 0] = -128, -128
    assert torch.equal(dot(a, b, tl.int32), a.int() @ b.int() + 1)


# These fail once Triton's interpreter is right by itself: then the correction can go.
def test_casts_need_the_correction() -> None:
    x = torch.tensor([1.01171875] * 16)
    with interpreter.uncorrected():
        out = converted(x, torch.bfloat16)
    assert (out == 1.0078125).all(), "Triton's interpreter rounds bfloat16 casts by now"
    assert torch.equal(converted(x, torch.bfloat16), x.to(torch.bfloat16))


def test_dots_need_the_correction() -> None:
    ones = torch.ones(16, 16, dtype=torch.bfloat16)
    with interpreter.uncorrected():
        wrong = dot(ones, ones, tl.float32)
    assert (wrong > 1e6).all(), "Triton's interpreter computes bfloat16 dots by now"
    assert (dot(ones, ones, tl.float32) == 17).all()


def test_arithmetic_needs_the_correction() -> None:
    x = torch.ones(1024, dtype=torch.bfloat16)
    out, less = torch.empty(4, 1024, dtype=torch.bfloat16), torch.empty(1024, dtype=torch.int8)
    with interpreter.uncorrected():
        # It has no bfloat16 constants before triton 3.9, and stops at the one in this kernel.
        with contextlib.suppress(InterpreterError):
            arithmetic_kernel[(1,)](out, less, x, x, BLOCK=1024)
        assert (out[0] != 1).all(), "Triton's interpreter multiplies bfloat16 by now"


@pytest.mark.parametrize("shape", [[8], [4, 1], [2, 16, 32]])
def test_quickened_types_and_values_are_tritons_own(shape: list[int]) -> None:
    def described() -> list[object]:
        kind = tl.block_type(tl.float16, shape)
        pointers = tl.block_type(tl.pointer_type(tl.int8), [tl.constexpr(size) for size in shape])
        values = [tl.tensor(None, kind), tl.tensor(None, tl.int32)]
        described = [[str(t), t.numel, list(t.shape), str(t.element_ty)] for t in (kind, pointers)]
        for value in values:
            described.append([value.numel.value, [size.value for size in value.shape], str(value.dtype)])
        return [*described, kind == tl.block_type(tl.float16, shape), kind == pointers]

    quickened = [described(), described()]  # made, then found
    with interpreter.uncorrected():
        assert quickened == [described()] * 2


def test_moved_internals_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.check_internals()
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    with pytest.raises(RuntimeError, match=r"triton is 4\.0\.0.*Read triton/runtime/interpreter\.py"):
        interpreter.check_internals()
    monkeypatch.undo()
    builder = interpreter.interpreter.InterpreterBuilder
    monkeypatch.setitem(interpreter._originals, (builder, "create_dot"), lambda self, a, b: None)
    with pytest.raises(RuntimeError, match=r"InterpreterBuilder\.create_dot is"):
        interpreter.check_internals()


def philox4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (product1 >> 32) ^ c1 ^ k0, product1 & 0xFFFFFFFF
        c2, c3 = (product0 >> 32) ^ c3 ^ k1, product0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def test_plain_philox_gives_the_published_vectors() -> None:
    # kat_vectors of Random123, the authors' own implementation.
    ones = 0xFFFFFFFF
    assert philox4x32_10([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox4x32_10([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert philox4x32_10(pi[:4], pi[4:]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("seed", [0, 1, 0x299F31D0A4093822, 2**63 - 1, -1, -(2**63)])
def test_philox_in_the_interpreter(seed: int) -> None:
    counters = torch.randint(-(2**31), 2**31, (64, 4), dtype=torch.int64)
    counters[0], counters[1] = 0, -1
    out = torch.empty(64, 4, dtype=torch.int32)
    philox_kernel[(1,)](out, counters.to(torch.int32), seed, BLOCK=64)
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for words, counter in zip(out.tolist(), counters.tolist(), strict=True):
        assert [w & 0xFFFFFFFF for w in words] == philox4x32_10([c & 0xFFFFFFFF for c in counter], key)
