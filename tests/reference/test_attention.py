"""The attention reference against torch.nn.functional and cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from pyaccel.reference.attention import attention_probs, scaled_dot_product_attention, varlen_attention
from pyaccel.reference.philox import keep_mask

NAN = float("nan")
F64 = torch.float64


def qkv(
    seq_q: int = 5, seq_k: int = 7, heads: int = 4, kv_heads: int = 4, value_dim: int = 8
) -> list[Tensor]:
    shapes = [(2, heads, seq_q, 8), (2, kv_heads, seq_k, 8), (2, kv_heads, seq_k, value_dim)]
    return [torch.randn(shape, dtype=F64) * 1.5 + 0.2 for shape in shapes]


def alive(*shape: int) -> Tensor:
    """A random bool mask whose rows all have a key."""
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


MASKS = {
    "keys": lambda: alive(2, 1, 1, 7),
    "all": lambda: alive(2, 4, 5, 7),
    "queries and keys": lambda: alive(5, 7),
    "heads": lambda: alive(4, 1, 7),
    "float": lambda: torch.randn(2, 1, 5, 7, dtype=F64) * 2,
    "float with -inf": lambda: torch.randn(4, 5, 7, dtype=F64).masked_fill(~alive(4, 5, 7), -math.inf),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_mean_what_they_mean_in_torch(mask: str) -> None:
    q, k, v = qkv()
    attn_mask = MASKS[mask]()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask, scale=0.7)
    assert_close(scaled_dot_product_attention(q, k, v, attn_mask, scale=0.7), expected)


@pytest.mark.parametrize(("seq_q", "seq_k"), [(5, 7), (7, 5), (6, 6), (1, 4), (4, 1)])
def test_causal_is_aligned_as_in_torch(seq_q: int, seq_k: int) -> None:
    q, k, v = qkv(seq_q, seq_k)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(scaled_dot_product_attention(q, k, v, is_causal=True), expected)


def test_grouped_heads_and_another_value_dim() -> None:
    q, k, v = qkv(heads=6, kv_heads=2, value_dim=3)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert_close(scaled_dot_product_attention(q, k, v, enable_gqa=True), expected)


def test_gradients_are_torchs() -> None:
    inputs = [*qkv(), torch.randn(4, 1, 7, dtype=F64)]
    for t in inputs:
        t.requires_grad_()
    dy = torch.randn(2, 4, 5, 8, dtype=F64)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, dy)
    for grad, want in zip(
        torch.autograd.grad(scaled_dot_product_attention(*inputs), inputs, dy), expected, strict=True
    ):
        assert_close(grad, want)


def test_by_hand() -> None:
    # Scores 0 and ln 3: weights 1/4 and 3/4, LSE ln 4.
    q = torch.tensor([[[[1.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3.0)]]]], dtype=F64)
    v = torch.tensor([[[[8.0, 0.0], [4.0, 1.0]]]])
    out, lse, probs = scaled_dot_product_attention(q, k, v, scale=1.0, return_lse=True, return_probs=True)
    assert_close(probs, torch.tensor([[[[0.25, 0.75]]]], dtype=F64))
    assert_close(out, torch.tensor([[[[5.0, 0.75]]]], dtype=F64))
    assert_close(lse, torch.tensor([[[math.log(4.0)]]], dtype=F64))
    # An added mask of ln 2 on the first key makes the weights 2/5 and 3/5.
    bias = torch.tensor([math.log(2.0), 0.0], dtype=F64)
    probs = scaled_dot_product_attention(q, k, v, bias, scale=1.0, return_probs=True)[1]
    assert_close(probs, torch.tensor([[[[0.4, 0.6]]]], dtype=F64))


@pytest.mark.parametrize(
    ("window", "seen"),
    [
        ((1, 0), ["01100", "00110", "00011"]),
        ((-1, 0), ["11100", "11110", "11111"]),  # FlashAttention's causal, aligned at the bottom right
        ((0, 1), ["00110", "00011", "00001"]),
        ((2, -1), ["11111", "01111", "00111"]),
        ((-1, -1), ["11111"] * 3),
    ],
)
def test_windows_by_hand(window: tuple[int, int], seen: list[str]) -> None:
    q, k, v = qkv(3, 5)
    probs = scaled_dot_product_attention(q, k, v, window_size=window, return_probs=True)[1]
    expected = torch.tensor([[c == "1" for c in row] for row in seen])
    assert torch.equal(probs > 0, expected.expand_as(probs))


def test_every_mask_holds_at_once() -> None:
    q, k, v = qkv(3, 5)
    padding = torch.tensor([[True] * 5, [False, True, True, True, False]])
    out, probs = scaled_dot_product_attention(
        q, k, v, torch.tensor([True, True, False, True, True]), is_causal=True, key_padding_mask=padding,
        window_size=(3, 5), return_probs=True,
    )  # fmt: skip
    # Causal: keys 0..i. Window: keys i-1 on. The mask takes key 2, the second sequence's padding keys 0 and 4.
    expected = [["10000", "11000", "01000"], ["00000", "01000", "01000"]]
    for b, rows in enumerate(expected):
        seen = torch.tensor([[c == "1" for c in row] for row in rows])
        assert torch.equal(probs[b] > 0, seen.expand_as(probs[b]))
    assert not out[1, :, 0].any()


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["padding", "bool", "float"])
def test_what_no_one_may_read_is_not_read(how: str, dtype: torch.dtype, upcast: bool) -> None:
    """The second sequence is all padding, the first has two real keys; what lies elsewhere is NaN or inf."""
    clean = [t.to(dtype) for t in qkv(5, 5)]
    keys = torch.tensor([[True, False, True, False, False], [False] * 5])
    dirty = [t.clone() for t in clean]
    dirty[0][1] = NAN
    for t, bad in zip(dirty[1:], (NAN, math.inf), strict=True):
        t.masked_fill_(~keys[:, None, :, None], bad)
    masks = {
        "padding": {"key_padding_mask": keys},
        "bool": {"attn_mask": keys[:, None, None, :]},
        "float": {"attn_mask": torch.zeros(2, 1, 5, 5).masked_fill(~keys[:, None, None, :], -math.inf)},
    }
    results = []
    for inputs in (clean, dirty):
        inputs = [t.requires_grad_() for t in inputs]
        out, lse = scaled_dot_product_attention(*inputs, **masks[how], return_lse=True, upcast=upcast)
        results.append([out, lse, *torch.autograd.grad(out.sum() + lse[0].sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    out, lse, *grads = results[1]
    assert out[0].isfinite().all()
    assert lse[0].isfinite().all()
    assert not out[1].any()
    assert torch.equal(lse[1], torch.full_like(lse[1], -math.inf))
    for grad in grads:
        assert grad.isfinite().all()
        assert grad[0].any()
        assert not grad[1].any()


@pytest.mark.parametrize("mask", MASKS)
def test_probs_are_rebuilt_from_the_lse(mask: str) -> None:
    q, k, v = qkv(heads=6, kv_heads=2)
    options = {"scale": 0.7, "enable_gqa": True, "is_causal": True}
    if mask not in ("all", "heads", "float with -inf"):  # those of 4 heads
        options["attn_mask"] = MASKS[mask]()
    _, lse, probs = scaled_dot_product_attention(q, k, v, **options, return_lse=True, return_probs=True)
    found = attention_probs(q, k, lse, **options)
    assert_close(found, probs)
    assert_close(found.sum(-1), torch.ones_like(lse))


def test_probs_of_masked_queries_and_keys() -> None:
    q, k, v = qkv()
    keys = torch.tensor([[True, False, True, False, False, True, False], [False] * 7])
    for naive in (q, k):
        naive[1] = NAN
    k[0, :, 1] = NAN
    options = {"key_padding_mask": keys, "window_size": (-1, 2)}
    _, lse, probs = scaled_dot_product_attention(q, k, v, **options, return_lse=True, return_probs=True)
    q.requires_grad_()
    k.requires_grad_()
    found = attention_probs(q, k, lse, **options)
    assert_close(found, probs)
    assert not found[1].any()
    for grad in torch.autograd.grad(found.square().sum(), (q, k)):
        assert grad.isfinite().all()
        assert not grad[1].any()
    assert not attention_probs(q[:1], q[:1], torch.full((1, 4, 5), -math.inf)).any()
    narrow = attention_probs(q.float(), k.float(), lse.float(), **options, upcast=False)
    assert narrow.dtype == torch.float32
    assert_close(narrow, probs.float())


def test_the_gradient_of_the_lse_is_that_of_logsumexp() -> None:
    inputs = [*qkv(), torch.randn(4, 1, 7, dtype=F64)]
    for t in inputs:
        t.requires_grad_()
    q, k, v, mask = inputs
    out, lse = scaled_dot_product_attention(*inputs, scale=0.7, return_lse=True)
    scores = q @ k.mT * 0.7 + mask
    expected = torch.logsumexp(scores, -1)
    assert_close(lse, expected)
    d_lse, d_out = torch.randn_like(lse), torch.randn_like(out)
    ours = torch.autograd.grad((lse * d_lse).sum() + (out * d_out).sum(), inputs)
    loss = (expected * d_lse).sum() + (scores.softmax(-1) @ v * d_out).sum()
    for grad, want in zip(ours, torch.autograd.grad(loss, inputs), strict=True):
        assert_close(grad, want)


def test_no_keys_at_all() -> None:
    q, k, v = qkv(3, 0)
    out, lse = scaled_dot_product_attention(q, k, v, return_lse=True)
    assert not out.any()
    assert (lse == -math.inf).all()


def test_naive_path_keeps_the_dtype_and_an_fp32_lse() -> None:
    q, k, v = (t.bfloat16() for t in qkv())
    out, lse, probs = scaled_dot_product_attention(q, k, v, return_lse=True, return_probs=True, upcast=False)
    assert (out.dtype, lse.dtype, probs.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    truth, truth_lse = scaled_dot_product_attention(q, k, v, return_lse=True)
    assert (truth.dtype, truth_lse.dtype) == (F64, F64)
    assert_close(lse, truth_lse.float())


def test_dropout_replays_philox() -> None:
    q, k, _ = qkv(6, 9)
    v = torch.eye(9, dtype=F64).expand(2, 4, 9, 9)  # so that the output is the weights themselves
    key = torch.tensor([-(2**62) + 5, 77])
    out, probs = scaled_dot_product_attention(q, k, v, dropout_p=0.4, dropout_key=key, return_probs=True)
    for batch in range(2):
        for head in range(4):
            keep = keep_mask(
                key, torch.arange(6)[:, None], torch.arange(9)[None], 0.4, stream=batch * 4 + head
            )
            assert_close(out[batch, head], torch.where(keep, probs[batch, head] / 0.6, 0.0))
    assert not scaled_dot_product_attention(q, k, v, dropout_p=1.0, dropout_key=key).any()
    with pytest.raises(ValueError, match="dropout_key"):
        scaled_dot_product_attention(q, k, v, dropout_p=0.1)


LENS_Q, LENS_K = [3, 0, 5, 2, 0], [4, 6, 5, 0, 0]


def packed(kv_heads: int = 4) -> tuple[list[Tensor], Tensor, Tensor]:
    """Empty sequences, one without queries, one without keys, and 2 tokens that belong to none."""
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (LENS_Q, LENS_K))
    rows_q, rows_k = sum(LENS_Q) + 2, sum(LENS_K) + 2
    shapes = [(rows_q, 4, 8), (rows_k, kv_heads, 8), (rows_k, kv_heads, 6)]
    return [torch.randn(shape, dtype=F64) for shape in shapes], cu_q, cu_k


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_apart(is_causal: bool, kv_heads: int) -> None:
    inputs, cu_q, cu_k = packed(kv_heads)
    with torch.no_grad():
        for t, end in zip(inputs, (cu_q[-1], cu_k[-1], cu_k[-1]), strict=True):
            t[end:] = NAN
        inputs[1][4:10] = NAN  # the keys of the sequence without queries
    q, k, v = (t.requires_grad_() for t in inputs)
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, 5, 6, is_causal=is_causal, return_lse=True)
    for i in (0, 2):
        rows, keys = slice(*cu_q[i : i + 2]), slice(*cu_k[i : i + 2])
        one = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys]))
        expected = F.scaled_dot_product_attention(*one, is_causal=is_causal, enable_gqa=True)
        assert_close(out[rows], expected[0].transpose(0, 1))
    assert not out[8:].any()
    assert (lse[:, 8:] == -math.inf).all()
    assert lse[:, :8].isfinite().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad, unread in zip(grads, (slice(8, 12), slice(4, 10), slice(4, 10)), strict=True):
        assert grad.isfinite().all()
        assert grad[:3].any()
        assert not grad[unread].any()
        assert not grad[-2:].any()


def test_packed_equals_padded_dropout_included() -> None:
    lens = [3, 0, 5]
    cu = torch.tensor([0, 3, 3, 8])
    padded = [torch.randn(3, 4, 5, 8, dtype=F64) for _ in range(3)]
    mask = torch.arange(5) < torch.tensor(lens)[:, None]
    key = torch.tensor([123456789012345, -5])
    options = {"dropout_p": 0.3, "dropout_key": key, "return_lse": True}
    expected, expected_lse = scaled_dot_product_attention(*padded, key_padding_mask=mask, **options)
    rows = [t.transpose(1, 2)[mask] for t in padded]
    out, lse = varlen_attention(*rows, cu, cu, 5, 5, **options)
    assert_close(out, expected.transpose(1, 2)[mask])
    assert_close(lse.T, expected_lse.transpose(1, 2)[mask])


@pytest.mark.parametrize(("tokens", "offsets"), [(0, [0]), (0, [0, 0, 0]), (3, [0]), (3, [0, 0])])
def test_packed_and_empty(tokens: int, offsets: list[int]) -> None:
    q = torch.randn(tokens, 2, 8, requires_grad=True)
    cu = torch.tensor(offsets)
    out, lse = varlen_attention(q, q, q, cu, cu, 0, 0, return_lse=True)
    assert out.shape == (tokens, 2, 8)
    assert lse.shape == (2, tokens)
    assert not out.any()
    out.sum().backward()
    assert not q.grad.any()
