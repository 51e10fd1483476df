"""Attention's Triton kernels: the matrix of everything they take, and what holds to the last bit."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyaccel import dispatch
from pyaccel.ops.attention.api import attention_probs, scaled_dot_product_attention
from pyaccel.ops.attention.packed import varlen_attention
from pyaccel.ops.dropout import dropout_key
from pyaccel.reference import attention as reference
from pyaccel.reference.philox import keep_mask
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_statistic
from tests.ops import attention_cases as cases
from tests.ops.attention_cases import NAN, Call, Case
from tests.pairwise import pairwise, thinned

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
RESULTS = ("out", "lse", "dq", "dk", "dv", "dmask")


def attend(*args: Any, **options: Any) -> Any:
    with dispatch.use_backend(cases.BACKEND):
        return scaled_dot_product_attention(*args, **options)


def attend_packed(*args: Any, **options: Any) -> Any:
    with dispatch.use_backend(cases.BACKEND):
        return varlen_attention(*args, **options)


def results(call: Call, **gradients: Tensor) -> dict[str, Tensor]:
    """What the call gives, and the gradients it gives back."""
    found = cases.run(call, **gradients)
    return {name: found[name] for name in RESULTS if found.get(name) is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], *, zeros: bool = False) -> None:
    """The same bits; with `zeros`, -0 is 0."""
    assert a.keys() == b.keys()
    for name in a:
        x, y = (t[name].detach() + 0.0 if zeros else t[name] for t in (a, b))
        assert_bits_equal(x, y, name=name)


# --- the matrix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", thinned(pairwise(cases.PADDED, cases.may_be)), ids=cases.case_name)
def test_padded_is_as_right_as_plain_torch(case: Case, device: torch.device, poison: None) -> None:
    cases.check(cases.padded_call(case, device))


@pytest.mark.parametrize("case", thinned(pairwise(cases.PACKED, cases.may_be)), ids=cases.case_name)
def test_packed_is_as_right_as_plain_torch(case: Case, device: torch.device, poison: None) -> None:
    cases.check(cases.packed_call(case, device))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("lengths", [(1, 600), (500, 9), (20, 500)], ids=str)
def test_long_sequences(lengths: tuple[int, int], dtype: str, device: torch.device, poison: None) -> None:
    """Beyond what any kernel keeps on chip at once."""
    cases.check(cases.padded(device, lengths=lengths, dtype=dtype, heads=(1, 2, 1), mask="padding holes"))


@pytest.mark.parametrize("heads", [(1, 1, 1), (7, 1, 1), (1, 9, 9), (1, 9, 3), (17, 1, 1)], ids=str)
def test_any_number_of_tiny_heads(heads: tuple[int, int, int], device: torch.device, poison: None) -> None:
    """Programs that serve several heads or sequences at once have a last one that isn't full."""
    cases.check(
        cases.padded(device, lengths=(5, 6), heads=heads, dtype="bf16", mask="padding right", dropout=0.3)
    )


def test_a_window_may_be_wider_than_any_sequence(device: torch.device) -> None:
    call = cases.padded(device)
    plain = cases.run(call)
    for window in ((2**31, 2**40), (10**6, -1), (-1, 2**31 - 1)):
        wide = dataclasses.replace(call, options={**call.options, "window_size": window})
        found = cases.run(wide, dy=plain["dy"], dlse=plain["dlse"])
        assert_same(
            {n: plain[n] for n in RESULTS if n in plain}, {n: found[n] for n in RESULTS if n in found}
        )


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_one_key(dtype: str, device: torch.device, poison: None) -> None:
    """A softmax over one key is 1, not nearly but to the bit, and so the key's value and its gradient pass through."""
    call = cases.padded(device, lengths=(1, 1), heads=(2, 3, 3), dtype=dtype, lse="returned")
    found = cases.run(call)
    query, key, value = call.qkv
    assert_bits_equal(found["out"], value)
    assert_bits_equal(found["dv"], found["dy"])
    assert found["dq"].isfinite().all()
    assert found["dk"].isfinite().all()
    _, truth = reference.scaled_dot_product_attention(query, key, value, return_lse=True)
    assert_statistic(found["lse"], truth, scale=cases.score_magnitude(call), name="lse")


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("lengths", [(17, 33), (40, 97)], ids=str)
@pytest.mark.parametrize("mask", ["none", "float qk"])
def test_scores_beyond_the_range_of_an_exponential(
    mask: str, lengths: tuple[int, int], dtype: str, device: torch.device
) -> None:
    """Scores of a few hundred, of either sign: only differences may be exponentiated."""
    call = cases.padded(
        device, lengths=lengths, dtype=dtype, mask=mask, scale=200.0, heads=(1, 2, 2), lse="returned"
    )
    found = cases.run(call)
    assert found["lse"].max() > 100.0
    truth, naive = (cases.run(call, upcast, found["dy"]) for upcast in (True, False))
    assert_close_to_truth(found["out"], truth["out"], naive["out"])
    assert_statistic(found["lse"], truth["lse"], scale=cases.score_magnitude(call), name="lse")
    for name in ("dq", "dk", "dv"):
        assert found[name].isfinite().all(), name


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("lengths", [(17, 33), (70, 97)], ids=str)
def test_a_row_of_the_lowest_number_is_uniform(
    lengths: tuple[int, int], dtype: str, device: torch.device
) -> None:
    """It masks nothing: -inf does. Scores vanish beside it, and all weights are the same, as PyTorch has it."""
    call = cases.padded(device, lengths=lengths, dtype=dtype, lse="differentiated")
    low = torch.finfo(cases.DTYPES[dtype]).min
    call.options["attn_mask"] = torch.full((lengths[0], 1), low, device=device, dtype=cases.DTYPES[dtype])
    call.mask_needs_grad = True
    cases.check(call)


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_lse_alone_may_have_a_gradient(kind: str, dtype: str, device: torch.device) -> None:
    call = getattr(cases, kind)(device, dtype=dtype, causal=True)
    grads, dlse = {}, None
    for upcast in (None, True, False):
        leaves = [cases.leaf(t, torch.float64 if upcast else None) for t in call.qkv]
        with dispatch.use_backend(cases.BACKEND):
            if upcast is None:
                _, lse = call.function(*leaves, *call.args, **call.options)
            else:
                _, lse = call.truth(*leaves, *call.args, **call.options, upcast=upcast)
        dlse = cases.random_gradient(lse) if dlse is None else dlse.to(lse.dtype)
        grads[upcast] = torch.autograd.grad(lse, leaves, dlse, allow_unused=True)
    for i, name in enumerate(("dq", "dk")):
        assert_close_to_truth(*(grads[upcast][i] for upcast in (None, True, False)), name=name)
    assert grads[None][2] is None or not grads[None][2].any()


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_only_what_needs_a_gradient_gets_one(kind: str, device: torch.device) -> None:
    """The bits of a gradient don't depend on what else has one, nor those of the output on whether anything has."""
    changes = {"mask": "bias hqk", "heads": (2, 4, 2)} if kind == "padded" else {"heads": (4, 2)}
    call = getattr(cases, kind)(device, dropout=0.2, **changes)
    whole = cases.run(call)
    given = dict(zip("qkv", call.qkv, strict=True))
    if call.mask_needs_grad:
        given["mask"] = call.options["attn_mask"]
    for wanted in (*given, "nothing"):
        tensors = {name: cases.leaf(t) if name == wanted else t for name, t in given.items()}
        options = {**call.options, **({"attn_mask": tensors["mask"]} if "mask" in tensors else {})}
        torch.manual_seed(5)
        with dispatch.use_backend(cases.BACKEND):
            out, lse = call.function(*(tensors[name] for name in "qkv"), *call.args, **options)
        assert_bits_equal(out, whole["out"], name=f"out, {wanted}")
        assert_bits_equal(lse, whole["lse"], name=f"lse, {wanted}")
        if wanted == "nothing":
            assert not out.requires_grad
            assert not lse.requires_grad
        else:
            (grad,) = torch.autograd.grad([out, lse], tensors[wanted], [whole["dy"], whole["dlse"]])
            assert_bits_equal(grad, whole[f"d{wanted}"], name=wanted)


def test_the_gradient_of_a_broadcast_mask_is_a_sum(device: torch.device, poison: None) -> None:
    """Over all uses of an element, whichever dimensions are 1; also where that sum is 0 but for rounding."""
    shape = (2, 2, 33, 40)
    call = cases.padded(device, heads=(2, 2, 2), lengths=(33, 40), dtype="bf16")
    call.mask_needs_grad = True
    call.options["attn_mask"] = torch.zeros(shape, device=device)
    whole = cases.run(call)
    for pattern in itertools.product((False, True), repeat=4):
        call.options["attn_mask"] = torch.zeros(
            [n if p else 1 for n, p in zip(shape, pattern, strict=True)], device=device
        )
        found = cases.run(call, dy=whole["dy"], dlse=whole["dlse"])["dmask"]
        terms, dims = whole["dmask"].double(), [i for i, p in enumerate(pattern) if not p]
        if dims:
            truth, scale = terms.sum(dims, keepdim=True), terms.abs().sum(dims, keepdim=True)
        else:
            truth, scale = terms, terms.abs()
        assert_statistic(found, truth, scale=scale, name=f"{pattern}")


# --- dropout ------------------------------------------------------------------------------------------------


def kept(key: Tensor, streams: Tensor, seq_q: int, seq_k: int, p: float) -> Tensor:
    """The reference's mask: bool ``[*streams, seq_q, seq_k]``."""
    rows = torch.arange(seq_q, device=key.device)[:, None]
    return keep_mask(key, rows, torch.arange(seq_k, device=key.device), p, streams[..., None, None])


def one_hot_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(rows, columns, dtype=dtype, device=device)


DROPOUT_CASES = [
    ("fp32", (1, 4, 2), (40, 97), 0.15, "none"),
    ("bf16", (1, 2, 1), (97, 40), 0.5, "none"),
    ("fp16", (2, 3, 3), (5, 9), 0.9, "none"),
    ("fp32", (3, 2, 2), (33, 17), 0.15, "padding left"),
    ("bf16", (2, 1, 1), (64, 96), 0.5, "causal"),
    ("fp32", (1, 1, 1), (1, 250), 0.5, "none"),
]


@pytest.mark.parametrize(("dtype_name", "heads", "lengths", "p", "mask"), DROPOUT_CASES)
def test_forward_and_both_backward_passes_drop_what_the_reference_drops(
    dtype_name: str, heads: tuple[int, int, int], lengths: tuple[int, int], p: float, mask: str,
    device: torch.device, seed: int,
) -> None:  # fmt: skip
    """With queries of 0 all weights are alike, and one-hot rows elsewhere read them off the result.

    ``out = W @ V`` shows the weights W where V is the identity, ``dv = W^T @ dout`` where dout is, dq and dk show
    the sign of the scores' gradient where K and Q are.
    """
    dtype, (batch, n_heads, kv_heads), (seq_q, seq_k) = cases.DTYPES[dtype_name], heads, lengths
    dim, group = max(seq_q, seq_k), n_heads // kv_heads
    allowed = torch.ones(batch, 1, seq_q, seq_k, dtype=torch.bool, device=device)
    options: dict[str, Any] = {"dropout_p": p, "enable_gqa": True}
    if mask == "padding left":
        options["key_padding_mask"] = keys = cases.right_padding((batch, n_heads, seq_q, seq_k), device).flip(
            1
        )
        allowed = allowed & keys[:, None, None]
    elif mask == "causal":
        options["is_causal"] = True
        allowed = allowed.tril()
    torch.manual_seed(seed)
    key = dropout_key(device)
    streams = torch.arange(batch * n_heads, device=device).view(batch, n_heads)
    keep = kept(key, streams, seq_q, seq_k, p)  # [batch, heads, seq_q, seq_k]
    weight = (1.0 - p) * allowed.sum(-1, keepdim=True)  # one over a weight that is kept

    def zeros(count: int, seq: int) -> Tensor:
        return torch.zeros(batch, count, seq, dim, dtype=dtype, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = [cases.leaf(t) for t in (q, k, v)]
        torch.manual_seed(seed)
        out = attend(*leaves, **options)
        return [out, *torch.autograd.grad(out, leaves, dy)]

    # Heads of a group share a value head: each counts with another power of two.
    head_weight = (2.0 ** torch.arange(n_heads, device=device).remainder(group))[:, None, None]
    identity = one_hot_rows(dim, dim, dtype, device)
    out, _, _, dv = run(
        zeros(n_heads, seq_q), zeros(kv_heads, seq_k), zeros(kv_heads, seq_k) + identity[:seq_k],
        zeros(n_heads, seq_q) + (identity[:seq_q] * head_weight).to(dtype) / 1.0,
    )  # fmt: skip
    assert torch.equal((out[..., :seq_k] * weight).round() == 1.0, keep & allowed)
    assert torch.equal(out[..., :seq_k] != 0.0, keep & allowed)
    if mask != "causal":
        expected = (
            ((keep & allowed) * head_weight).unflatten(1, (kv_heads, group)).sum(2).mT
        )  # [.., seq_k, seq_q]
        assert torch.equal((dv[..., :seq_q].float() * weight.mT).round(), expected.float())
    else:
        assert torch.equal(dv[..., :seq_q] != 0.0, (keep & allowed).mT)

    # dout @ V^T is 1 everywhere: the scores' gradient is above 0 where a weight is kept, in rows that drop some.
    first = F.one_hot(torch.tensor(0), dim).to(dtype).to(device)
    some = (keep & allowed).any(-1, keepdim=True) & (~keep & allowed).any(-1, keepdim=True) & allowed
    _, dq, _, _ = run(
        zeros(n_heads, seq_q), zeros(kv_heads, seq_k) + identity[:seq_k], zeros(kv_heads, seq_k) + first,
        zeros(n_heads, seq_q) + first,
    )  # fmt: skip
    assert torch.equal((dq[..., :seq_k] > 0.0) & some, keep & some)
    assert torch.equal((dq[..., :seq_k] < 0.0) & some, ~keep & some)
    if group == 1:
        _, _, dk, _ = run(
            zeros(n_heads, seq_q) + identity[:seq_q], zeros(kv_heads, seq_k), zeros(kv_heads, seq_k) + first,
            zeros(n_heads, seq_q) + first,
        )  # fmt: skip
        assert torch.equal((dk[..., :seq_q].mT > 0.0) & some, keep & some)
        assert torch.equal((dk[..., :seq_q].mT < 0.0) & some, ~keep & some)


@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)], ids=str)
def test_packed_and_padded_drop_the_same(
    heads: tuple[int, int], dtype_name: str, device: torch.device, seed: int
) -> None:
    """A sequence's positions count, not the rows it has in the packed batch, nor the length it is padded to."""
    dtype, p, (n_heads, kv_heads) = cases.DTYPES[dtype_name], 0.3, heads
    lens_q, lens_k = [9, 0, 70, 5], [97, 4, 33, 1]
    q = torch.zeros(sum(lens_q) + 2, n_heads, 16, dtype=dtype, device=device)
    k = torch.zeros(sum(lens_k) + 2, kv_heads, 16, dtype=dtype, device=device)
    v = torch.zeros(sum(lens_k) + 2, kv_heads, max(lens_k), dtype=dtype, device=device)
    cu_q, cu_k = cases.offsets(lens_q, device), cases.offsets(lens_k, device)
    for start, n in zip(cu_k.tolist(), lens_k, strict=False):
        v[start : start + n] = one_hot_rows(n, max(lens_k), dtype, device)[:, None]
    torch.manual_seed(seed)
    key = dropout_key(device)
    torch.manual_seed(seed)
    out = attend_packed(q, k, v, cu_q, cu_k, 70, 97, dropout_p=p)
    padded_options = {"dropout_p": p, "enable_gqa": True}
    padded_k = torch.zeros(4, kv_heads, 99, 16, dtype=dtype, device=device)
    padded_v = torch.eye(99, dtype=dtype, device=device).expand(4, kv_heads, 99, 99)
    keys = torch.arange(99, device=device) < torch.tensor(lens_k, device=device)[:, None]
    torch.manual_seed(seed)
    padded_out = attend(
        torch.zeros(4, n_heads, 71, 16, dtype=dtype, device=device), padded_k, padded_v, key_padding_mask=keys,
        **padded_options,
    )  # fmt: skip
    for i, (start, len_q, len_k) in enumerate(zip(cu_q.tolist(), lens_q, lens_k, strict=False)):
        keep = kept(key, i * n_heads + torch.arange(n_heads, device=device), len_q, len_k, p)
        assert torch.equal((out[start : start + len_q, :, :len_k] != 0.0).transpose(0, 1), keep), (
            f"packed {i}"
        )
        assert torch.equal(padded_out[i, :, :len_q, :len_k] != 0.0, keep), f"padded {i}"


def test_everything_may_be_dropped(device: torch.device) -> None:
    """p = 1: outputs and gradients are 0; the LSE is what it is without dropout, and so are its gradients."""
    call = cases.padded(device, dropout=1.0)
    found = cases.run(call)
    assert not found["out"].any()
    assert not found["dv"].any()
    cases.check(call)


def test_no_dropout_draws_no_key(device: torch.device) -> None:
    call = cases.padded(device)
    torch.manual_seed(1)
    before = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    attend(*call.qkv)
    after = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(before, after)


# --- bits ---------------------------------------------------------------------------------------------------

PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "short": ("padded", {"lengths": (17, 33), "dropout": 0.15, "mask": "padding right"}),
    "long": ("padded", {"lengths": (70, 97), "head_dim": 64, "heads": (1, 2, 2)}),
    "very long": ("padded", {"lengths": (20, 500), "heads": (1, 1, 1)}),
    "causal": ("padded", {"lengths": (97, 97), "causal": True, "dtype": "bf16", "heads": (1, 2, 2)}),
    "grouped": ("padded", {"lengths": (33, 65), "heads": (1, 4, 2), "dropout": 0.15}),
    "bias": ("padded", {"lengths": (33, 40), "heads": (2, 2, 2), "mask": "bias hqk"}),
    "bias of keys": ("padded", {"lengths": (33, 40), "heads": (2, 2, 2), "mask": "bias bk", "dtype": "bf16"}),
    "packed": ("packed", {"dropout": 0.15}),
    "packed, long": ("packed", {"lengths": ([97, 70], [70, 97]), "heads": (2, 1), "window": (20, 0)}),
}


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_give_the_same_bits(path: str, device: torch.device) -> None:
    kind, changes = PATHS[path]
    call = getattr(cases, kind)(device, **changes)
    first = cases.run(call)
    second = results(call, dy=first["dy"], dlse=first["dlse"])
    assert_same({name: first[name] for name in second}, second)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(17, 33), (70, 97)], ids=str)
def test_a_sequence_does_not_depend_on_its_batch(
    lengths: tuple[int, int], dtype: str, device: torch.device
) -> None:
    """Alone, in other company, beside NaN: the same bits."""
    call = cases.padded(device, lengths=lengths, heads=(3, 2, 1), mask="padding left", dtype=dtype)
    whole = cases.run(call)
    for i in range(3):
        options = {**call.options, "key_padding_mask": call.options["key_padding_mask"][i : i + 1]}
        alone = dataclasses.replace(call, qkv=[t[i : i + 1] for t in call.qkv], options=options)
        found = results(alone, dy=whole["dy"][i : i + 1], dlse=whole["dlse"][i : i + 1])
        assert_same({name: whole[name][i : i + 1] for name in found}, found)
    others = [t.clone() for t in call.qkv]
    dy = whole["dy"].clone()
    for t in (*others, dy):
        t[1] = NAN
    found = results(dataclasses.replace(call, qkv=others), dy=dy, dlse=whole["dlse"])
    keep = [0, 2]
    assert_same({name: whole[name][keep] for name in found}, {name: t[keep] for name, t in found.items()})
    assert found["out"][1].isnan().all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_packed_sequence_does_not_depend_on_its_neighbors(dtype: str, device: torch.device) -> None:
    """Alone, in other company, beside NaN, at another row: the same bits."""
    lens_q, lens_k = [17, 0, 65, 1], [20, 4, 70, 9]
    call = cases.packed(device, lengths=(lens_q, lens_k), heads=(4, 2), dtype=dtype, causal=True)
    call.options["is_causal"] = False
    whole = cases.run(call)
    cu_q, cu_k = (t.tolist() for t in call.args[:2])
    dims = {"lse": 1, "out": 0, "dq": 0, "dk": 0, "dv": 0}

    def part(found: dict[str, Any], rows: slice, keys: slice) -> dict[str, Tensor]:
        return {
            name: found[name].narrow(dim, s.start, s.stop - s.start)
            for name, dim in dims.items()
            for s in [keys if name in ("dk", "dv") else rows]
        }

    for i, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        args = (cases.offsets([len_q], device), cases.offsets([len_k], device), *call.args[2:])
        alone = dataclasses.replace(
            call, qkv=[t[s] for t, s in zip(call.qkv, (rows, keys, keys), strict=True)], args=args
        )
        found = cases.run(alone, dy=whole["dy"][rows], dlse=whole["dlse"][:, rows])
        assert_same(part(found, slice(0, len_q), slice(0, len_k)), part(whole, rows, keys))
    poisoned = [t.clone() for t in call.qkv]
    dy = whole["dy"].clone()
    rows, keys = slice(cu_q[2], cu_q[3]), slice(cu_k[2], cu_k[3])
    for t, s in zip((*poisoned, dy), (rows, keys, keys, rows), strict=True):
        t[s] = NAN
    found = cases.run(dataclasses.replace(call, qkv=poisoned), dy=dy, dlse=whole["dlse"])
    assert found["out"][rows].isnan().all()
    for before_and_after in (
        (slice(0, rows.start), slice(0, keys.start)),
        (slice(rows.stop, None), slice(keys.stop, None)),
    ):
        r, k = (
            slice(s.start, t.shape[0] if s.stop is None else s.stop)
            for s, t in zip(before_and_after, call.qkv[:2], strict=True)
        )
        assert_same(part(found, r, k), part(whole, r, k))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_packed_and_padded_give_the_same_bits(dtype: str, device: torch.device) -> None:
    lens = [33, 7, 20]
    call = cases.packed(device, lengths=(lens, lens), heads=(2, 2), dtype=dtype, dropout=0.2)
    packed = cases.run(call)
    cu = call.args[0]
    rows = cu[:-1, None] + torch.arange(33, device=device)  # [batch, 33]
    keys = rows < cu[1:, None]
    rows = rows.where(keys, 0).long()

    def pad(t: Tensor) -> Tensor:
        return t[rows].masked_fill(~keys[..., None, None], 0.5).transpose(1, 2).contiguous()

    padded = Call(
        scaled_dot_product_attention, reference.scaled_dot_product_attention, [pad(t) for t in call.qkv],
        options={**call.options, "key_padding_mask": keys, "enable_gqa": False},
        lse_gradient=cases.random_gradient,
    )  # fmt: skip
    real = keys[:, None, :, None]
    dy = pad(packed["dy"]) * real
    dlse = pad(packed["dlse"].T[..., None])[..., 0] * real[..., 0]
    found = cases.run(padded, dy=dy, dlse=dlse)
    for name in ("out", "dq", "dk", "dv"):
        assert_bits_equal(found[name].transpose(1, 2)[keys] + 0.0, packed[name][: sum(lens)] + 0.0, name=name)
    assert_bits_equal(found["lse"].transpose(1, 2)[keys].T, packed["lse"][:, : sum(lens)], name="lse")


# --- poison -------------------------------------------------------------------------------------------------

POISONED: dict[str, list[Any]] = {
    "mask": [
        "none", "padding right", "padding left", "padding holes", "padding all", "bool qk", "bool b1q1", "bool bhqk",
        "bool 1h1k", "float bhqk", "float b11k", "bias bhqk", "bias and padding",
    ],
    "dtype": list(cases.DTYPES),
    "lengths": [(17, 33), (33, 17), (40, 70), (9, 70), (70, 20)],
    "heads": [(2, 2, 2), (1, 4, 2), (3, 1, 1)],
    "causal": [False, True],
    "window": [None, (5, 3), (0, 4)],
    "dropout": [0.0, 0.15],
    "bad": [NAN, math.inf, -math.inf],
}  # fmt: skip


@pytest.mark.parametrize("case", pairwise(POISONED), ids=cases.case_name)
def test_what_no_one_reads_may_hold_anything(case: Case, device: torch.device, poison: None) -> None:
    """Keys without a query, queries without a key and their gradients: the same bits as with numbers there."""
    bad = case["bad"]
    call = cases.padded(device, **{name: value for name, value in case.items() if name != "bad"})
    (query, key, value), options = call.qkv, call.options
    batch, heads, seq_q, seq_k = *query.shape[:3], key.shape[2]
    allowed, _ = reference.combine_masks(
        query, key, options.get("attn_mask"), options.get("key_padding_mask"), options["is_causal"],
        options["window_size"],
    )  # fmt: skip
    if allowed is None:
        allowed = torch.ones((), dtype=torch.bool, device=device)
    allowed = allowed.expand(batch, heads, seq_q, seq_k)
    idle_rows = ~allowed.any(-1)  # [batch, heads, seq_q]
    # A key is one for a whole group of heads.
    idle_keys = ~allowed.any(-2).unflatten(1, (key.shape[1], -1)).any(2)  # [batch, kv_heads, seq_k]
    clean = cases.run(call)
    dirty = dataclasses.replace(
        call,
        qkv=[
            query.masked_fill(idle_rows[..., None], bad),
            key.masked_fill(idle_keys[..., None], bad),
            value.masked_fill(idle_keys[..., None], -bad),
        ],
    )
    if case["mask"] == "bias and padding":  # a mask's own numbers count no more than the keys they are for
        unread = ~options["key_padding_mask"].any(0)
        dirty.options = {**options, "attn_mask": options["attn_mask"].masked_fill(unread, bad)}
    found = cases.run(
        dirty,
        dy=clean["dy"].masked_fill(idle_rows[..., None], bad),
        dlse=clean["dlse"].masked_fill(idle_rows, bad),
    )
    names = [name for name in RESULTS if name in found]
    assert_same({n: clean[n] for n in names}, {n: found[n] for n in names}, zeros=True)
    assert not found["out"][idle_rows].any()
    assert (found["lse"][idle_rows] == -math.inf).all()
    assert found["lse"][~idle_rows].isfinite().all()
    assert not found["dq"][idle_rows].any()
    for name in ("dk", "dv"):
        assert not found[name][idle_keys].any()
    if "dmask" in found and found["dmask"].shape == allowed.shape:
        assert not found["dmask"][~allowed].any()


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_rows_of_no_sequence_may_hold_anything(
    causal: bool, dtype: str, heads: tuple[int, int], device: torch.device, poison: None
) -> None:
    """Nor are queries without keys and keys without queries read, nor the gradients of either."""
    call = cases.packed(
        device, lengths=([17, 0, 33, 6], [20, 4, 5, 0]), heads=heads, dtype=dtype, causal=causal
    )
    for t in call.qkv:
        t[-3:] = 0.0
    clean = cases.run(call)
    query, key, value = (t.clone() for t in call.qkv)
    dy, dlse = clean["dy"].clone(), clean["dlse"].clone()
    for t in (query, dy, dlse.T):
        t[50:] = NAN  # the sequence without keys, and the rows beyond the last offset
    for t, bad in ((key, NAN), (value, math.inf)):
        t[20:24] = bad  # the sequence without queries
        t[29:] = bad
        if causal:
            t[17:20] = bad  # beyond the reach of the last query
    found = cases.run(dataclasses.replace(call, qkv=[query, key, value]), dy=dy, dlse=dlse)
    names = ("out", "lse", "dq", "dk", "dv")
    assert_same({n: clean[n] for n in names}, {n: found[n] for n in names}, zeros=True)
    assert not found["out"][50:].any()
    assert not found["dq"][50:].any()
    assert (found["lse"][:, 50:] == -math.inf).all()
    for name in ("dk", "dv"):
        assert not found[name][20:24].any()
        assert not found[name][29:].any()


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_nothing_to_attend_to_at_all(dtype: str, device: torch.device, poison: None) -> None:
    for options in (
        {"attn_mask": torch.zeros(17, 33, dtype=torch.bool, device=device)},
        {"attn_mask": torch.full((2, 1, 1, 33), -math.inf, device=device).requires_grad_()},
        {"key_padding_mask": torch.zeros(2, 33, dtype=torch.bool, device=device)},
        {"attn_mask": torch.tensor(False, device=device), "dropout_p": 0.2},
    ):
        call = cases.padded(device, dtype=dtype)
        mask = options.get("attn_mask")
        call.mask_needs_grad = mask is not None and mask.requires_grad
        call.options |= options
        found = cases.run(call)
        assert (found["lse"] == -math.inf).all()
        for name in ("out", "dq", "dk", "dv", *(["dmask"] if call.mask_needs_grad else [])):
            assert not found[name].any(), name


# --- weights rebuilt from the LSE ---------------------------------------------------------------------------

PROBS: dict[str, list[Any]] = {
    "dtype": list(cases.DTYPES),
    "mask": [
        "none",
        "padding right",
        "padding all",
        "bool qk",
        "bool bhqk",
        "bool 1h1k",
        "float bhqk",
        "float b11k",
    ],
    "lengths": [(1, 37), (17, 33), (33, 17), (40, 97), (97, 40)],
    "heads": [(2, 2, 2), (1, 4, 2), (3, 1, 1)],
    "head_dim": [16, 40, 64],
    "causal": [False, True],
    "window": [None, (5, 3)],
    "scale": [0.4, -0.6],  # a weight has the error of its LSE, in fp32 eps: not to be large here
    "layout": ["contiguous", "packed projection", "dims strided"],
}


@pytest.mark.parametrize("case", pairwise(PROBS), ids=cases.case_name)
def test_weights_rebuilt_from_the_lse(case: Case, device: torch.device, poison: None) -> None:
    call = cases.padded(device, **case, lse="returned")
    (query, key, value), options = call.qkv, call.options
    _, lse = attend(query, key, value, **options)
    given = {name: option for name, option in options.items() if name not in ("dropout_p", "return_lse")}
    with dispatch.use_backend(cases.BACKEND):
        probs = attention_probs(query, key, lse, **given)
    truth, naive = (
        reference.scaled_dot_product_attention(
            query, key, value, **options, return_probs=True, upcast=upcast
        )[-1]
        for upcast in (True, False)
    )
    assert_close_to_truth(probs, truth, naive)
    assert torch.equal(probs[truth == 0.0], torch.zeros_like(probs[truth == 0.0]))
    if probs.dtype == F32:  # in every row they add up to 1, or to 0 where there is no key
        assert_statistic(probs.sum(-1), truth.sum(-1), name="sums")
    idle = lse == -math.inf
    assert not probs[idle].any()


# --- autograd's ways ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_autocast(kind: str, device: torch.device) -> None:
    """fp32 leaves, 16-bit kernels, fp32 gradients: the bits of casts by hand, in the backward pass too."""
    call = getattr(cases, kind)(device, dropout=0.2)
    results = []
    for by_hand in (False, True):
        leaves = [cases.leaf(t) for t in call.qkv]
        given = [t.bfloat16() for t in leaves] if by_hand else [leaves[0], leaves[1].bfloat16(), leaves[2]]
        torch.manual_seed(5)
        with dispatch.use_backend(cases.BACKEND), torch.autocast(device.type, BF16, enabled=not by_hand):
            out, lse = call.function(*given, *call.args, **call.options)
        assert out.dtype == BF16
        assert lse.dtype == F32
        results.append(
            [out, lse, *torch.autograd.grad(out.float().square().sum() + lse[lse > -9].sum(), leaves)]
        )
    assert all(t.dtype == F32 for t in results[0][1:])
    for a, b in zip(*results, strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_activation_checkpointing_drops_the_same(kind: str, reentrant: bool, device: torch.device) -> None:
    call = getattr(cases, kind)(device, dropout=0.4, lse="not returned")

    def run(*tensors: Tensor) -> Tensor:
        return call.function(*tensors, *call.args, **call.options)

    results = []
    with dispatch.use_backend(cases.BACKEND):
        for checkpointed in (False, True):
            leaves = [cases.leaf(t) for t in call.qkv]
            torch.manual_seed(5)
            out = checkpoint(run, *leaves, use_reentrant=reentrant) if checkpointed else run(*leaves)
            loss = out.square().sum()
            torch.rand(3, device=device)  # moves the generator on between the passes
            loss.backward()  # what reentrant checkpointing takes, and no other
            results.append([out, *(t.grad for t in leaves)])
    for a, b in zip(*results, strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_inference_mode(kind: str, device: torch.device) -> None:
    call = getattr(cases, kind)(device, dropout=0.2)
    expected = cases.run(call)
    torch.manual_seed(5)
    with torch.inference_mode(), dispatch.use_backend(cases.BACKEND):
        out, lse = call.function(*(t.clone() for t in call.qkv), *call.args, **call.options)
        assert out.is_inference()
    assert_bits_equal(out.clone(), expected["out"])
    assert_bits_equal(lse.clone(), expected["lse"])


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_a_double_backward_says_that_there_is_none(kind: str, device: torch.device) -> None:
    call = getattr(cases, kind)(device, lse="not returned")
    leaves = [cases.leaf(t) for t in call.qkv]
    with dispatch.use_backend(cases.BACKEND):
        out = call.function(*leaves, *call.args, **call.options)
    with pytest.raises(RuntimeError, match=r"double backward.*use_backend"):
        torch.autograd.grad(
            torch.autograd.grad(out.square().sum(), leaves, create_graph=True)[0].sum(), leaves
        )


def test_gradients_of_a_shared_input_add_up(device: torch.device) -> None:
    x = cases.padded(device, lengths=(17, 17)).qkv[0]
    dy = cases.random_gradient(x)
    found = []
    for dtype, options in ((F32, None), (torch.float64, {"upcast": True}), (F32, {"upcast": False})):
        shared = cases.leaf(x, dtype)
        function = attend if options is None else reference.scaled_dot_product_attention
        out = function(shared, shared, shared, **(options or {}))
        found += torch.autograd.grad(out, shared, dy.to(dtype))
    assert_close_to_truth(*found)


# --- PyTorch's meaning --------------------------------------------------------------------------------------


def against_torch(qkv: list[Tensor], attn_mask: Tensor | None = None, **options: Any) -> None:
    """Output and gradients against F.scaled_dot_product_attention, in fp64 (the truth) and in the dtype."""
    found: list[list[Tensor]] = []
    dy = None
    for function, dtype in ((attend, None), (torch_sdpa, torch.float64), (torch_sdpa, None)):
        leaves = [cases.leaf(t, dtype) for t in qkv]
        out = function(*leaves, attn_mask, **options)
        dy = cases.random_gradient(out) if dy is None else dy
        found.append([out, *torch.autograd.grad(out, leaves, dy.to(out.dtype))])
    for name, *three in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        assert_close_to_truth(*three, name=name)


def torch_sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, **options: Any) -> Tensor:
    """PyTorch's, which wants a mask of two dimensions or more, and a float one in the dtype of the rest."""
    if attn_mask is not None:
        dtype = query.dtype if attn_mask.is_floating_point() else torch.bool
        attn_mask = attn_mask.to(dtype)[(None,) * (2 - attn_mask.dim())]
    return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)


def qkv(*shapes: tuple[int, ...], dtype: torch.dtype = F32, device: torch.device) -> list[Tensor]:
    shapes = shapes * 3 if len(shapes) == 1 else shapes
    return [cases.values(*shape, device=device).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(9, 9), (9, 33), (33, 9), (1, 17), (70, 65)])
def test_causal_is_aligned_as_pytorchs(
    seq_q: int, seq_k: int, dtype: torch.dtype, device: torch.device
) -> None:
    given = qkv((2, 2, seq_q, 24), (2, 2, seq_k, 24), (2, 2, seq_k, 24), dtype=dtype, device=device)
    if seq_q == 1:
        given = [t.requires_grad_(False) for t in given]
        assert_bits_equal(attend(*given, is_causal=True), given[2][:, :, :1])  # only the first key is seen
        return
    against_torch(given, is_causal=True)


def test_a_bool_mask_is_a_float_mask_of_minus_inf(device: torch.device) -> None:
    given = qkv((2, 2, 17, 16), (2, 2, 33, 16), (2, 2, 33, 16), device=device)
    mask = torch.rand(2, 1, 17, 33, device=device) < 0.5
    additive = torch.zeros(mask.shape, device=device).masked_fill(~mask, -math.inf)
    against_torch(given, mask)
    against_torch(given, additive)
    dy = torch.randn(2, 2, 17, 16, device=device)
    results = []
    for m in (mask, additive):
        leaves = [cases.leaf(t) for t in given]
        out = attend(*leaves, m)
        results.append([out, *torch.autograd.grad(out, leaves, dy)])
    truth = [cases.leaf(t, torch.float64) for t in given]
    exact = F.scaled_dot_product_attention(*truth, mask)
    exact = [exact, *torch.autograd.grad(exact, truth, dy.double())]
    for a, b, c in zip(*results, exact, strict=True):
        assert_close_to_truth(a, c, b)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_fully_masked_rows_as_pytorchs(dtype: torch.dtype, device: torch.device) -> None:
    given = qkv((2, 3, 8, 16), dtype=dtype, device=device)
    mask = torch.ones(2, 3, 8, 8, dtype=torch.bool, device=device).tril()
    mask[0, :, 3] = False
    mask[1] = False
    against_torch(given, mask)
    out = attend(*given, mask)
    assert not out[1].any()
    assert not out[0, :, 3].any()


@pytest.mark.parametrize("head_dim", [1, 3, 7, 8, 15, 17, 33, 65, 100, 255])
def test_odd_head_dims(head_dim: int, device: torch.device) -> None:
    against_torch(qkv((2, 2, 9, head_dim), (2, 2, 13, head_dim), (2, 2, 13, head_dim), device=device))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_tensors_off_alignment(dtype: torch.dtype, device: torch.device) -> None:
    """One element into their storage, and rows of 33: no vector load is aligned."""
    given = [cases.off_alignment(t) for t in qkv((2, 2, 20, 33), dtype=dtype, device=device)]
    mask = cases.off_alignment(torch.randn(2, 2, 20, 20, device=device).to(dtype))
    assert all(t.storage_offset() == 1 for t in (*given, mask))
    against_torch(given, mask)


MASK_VIEWS = {
    "transposed": lambda m: m.mT,
    "every second": lambda m: m.repeat_interleave(2, -1)[..., ::2],
    "expanded over rows": lambda m: m[..., :1, :].expand(m.shape),
    "expanded over batch and heads": lambda m: m[:1, :1].expand(m.shape),
    "expanded over keys": lambda m: m[..., :1].expand(m.shape),
    "heads first": lambda m: cases.in_order(m, 1, 0, 2, 3),
    "3-D": lambda m: m[0],
    "2-D": lambda m: m[0, 0],
    "1-D": lambda m: m[0, 0, 0],
    "scalar": lambda m: m[0, 0, 0, 0],
}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("view", MASK_VIEWS)
def test_masks_of_any_strides_and_shape(view: str, kind: str, device: torch.device) -> None:
    given = qkv((2, 2, 20, 16), device=device)
    mask = torch.randn(2, 2, 20, 20, device=device)
    mask[..., 0, :] = 0.5  # True, for the views that keep one
    mask[..., 0] = 0.5
    against_torch(given, MASK_VIEWS[view](mask if kind == "float" else mask > 0.0))


def test_no_batch_or_no_queries(device: torch.device, poison: None) -> None:
    call = cases.padded(device, mask="bias qk")
    query, key, value = call.qkv
    for given in ([query[:0], key[:0], value[:0]], [query[:, :, :0], key, value]):
        options = {**call.options, "attn_mask": call.options["attn_mask"][: given[0].shape[2]]}
        found = cases.run(dataclasses.replace(call, qkv=given, options=options))
        assert found["out"].shape == given[0].shape
        for name, t in zip(("dq", "dk", "dv", "dmask"), (*given, options["attn_mask"]), strict=True):
            assert_bits_equal(found[name], torch.zeros_like(t), name=name)


def test_no_keys(device: torch.device, poison: None) -> None:
    call = cases.padded(device)
    found = cases.run(dataclasses.replace(call, qkv=[call.qkv[0], *(t[:, :, :0] for t in call.qkv[1:])]))
    assert not found["out"].any()
    assert not found["dq"].any()
    assert (found["lse"] == -math.inf).all()
