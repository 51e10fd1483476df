"""Packing against indices worked out by hand, and against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyaccel.packing import cu_seqlens, layout, layout_from_cu_seqlens, pack, unpack

# Right padding, left padding, a hole, an empty row, a full row: lengths 3, 2, 2, 0, 4.
MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
OPTIONS = [{}, {"sort_by_length": True}, {"keep_first": True}, {"sort_by_length": True, "keep_first": True}]


def test_cu_seqlens_by_hand():
    offsets = cu_seqlens(MASK)
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [0, 3, 5, 7, 7, 11]


def test_layout_by_hand():
    tokens = layout(MASK)
    assert tokens.indices.dtype == torch.int64
    assert tokens.indices.tolist() == [0, 1, 2, 6, 7, 8, 10, 16, 17, 18, 19]
    assert tokens.positions.tolist() == [0, 1, 2, 2, 3, 0, 2, 0, 1, 2, 3]
    assert tokens.cu_seqlens.dtype == torch.int32
    assert tokens.cu_seqlens.tolist() == [0, 3, 5, 7, 7, 11]
    assert (tokens.max_seqlen, tokens.batch_size, tokens.seq_len, tokens.total_tokens) == (4, 5, 4, 11)
    assert tokens.key_indices is None
    assert tokens.cu_seqlens_k is tokens.cu_seqlens
    assert tokens.max_seqlen_k == 4


def test_sorted_layout_by_hand():
    """Rows in the order 3 (0 tokens), 1 (2), 2 (2), 0 (3), 4 (4)."""
    tokens = layout(MASK, sort_by_length=True)
    assert tokens.indices.tolist() == [6, 7, 8, 10, 0, 1, 2, 16, 17, 18, 19]
    assert tokens.cu_seqlens.tolist() == [0, 0, 2, 4, 7, 11]
    assert tokens.max_seqlen == 4


def test_keep_first_by_hand():
    """Rows 1 and 3 keep position 0 as a query (flat 4 and 12); no query attends to it."""
    tokens = layout(MASK, keep_first=True)
    assert tokens.indices.tolist() == [0, 1, 2, 4, 6, 7, 8, 10, 12, 16, 17, 18, 19]
    assert tokens.cu_seqlens.tolist() == [0, 3, 6, 8, 9, 13]
    assert tokens.key_indices is not None
    assert tokens.key_indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12]
    assert tokens.cu_seqlens_k.dtype == torch.int32
    assert tokens.cu_seqlens_k.tolist() == [0, 3, 5, 7, 7, 11]
    assert (tokens.max_seqlen, tokens.max_seqlen_k) == (4, 4)


def test_what_is_unpacked_without_gradient_can_be_changed_in_place():
    """By something that learns: a view that was made under no_grad would refuse."""
    learned = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        padded = unpack(torch.randn(11, 3), layout(MASK))
    padded.mul_(learned).sum().backward()
    assert learned.grad is not None


@pytest.mark.parametrize("options", OPTIONS)
def test_a_batch_that_is_packed_as_it_lies(options: dict[str, bool]):
    """Said only where packing would copy rows to where they are."""
    masks = [torch.ones(3, 4), torch.ones(3, 0), torch.ones(0, 4), torch.tensor([[1, 1], [0, 1]]), MASK]
    for mask in masks:
        tokens = layout(mask, **options)
        in_place = tokens.indices.tolist() == list(range(mask.numel()))
        # A kept first position that is padding counts as such: sorting by keys may move its row.
        expected = in_place and bool(mask.bool().all())
        assert tokens.is_padded_batch == expected, mask


def test_keep_first_sorted_by_hand():
    """Rows by (keys, queries): 3 (0, 1), 2 (2, 2), 1 (2, 3), 0 (3, 3), 4 (4, 4)."""
    tokens = layout(MASK, sort_by_length=True, keep_first=True)
    assert tokens.indices.tolist() == [12, 8, 10, 4, 6, 7, 0, 1, 2, 16, 17, 18, 19]
    assert tokens.cu_seqlens.tolist() == [0, 1, 3, 6, 9, 13]
    assert tokens.key_indices is not None
    assert tokens.key_indices.tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert tokens.cu_seqlens_k.tolist() == [0, 0, 2, 4, 7, 11]


def test_keep_first_lengths_of_queries_and_keys():
    tokens = layout(torch.tensor([[0, 1, 1], [0, 1, 0]]), keep_first=True)
    assert (tokens.max_seqlen, tokens.max_seqlen_k) == (3, 2)


@pytest.mark.parametrize("sort_by_length", [False, True])
def test_keep_first_costs_nothing_without_left_padding(sort_by_length):
    mask = MASK[[0, 2, 4]]
    kept, plain = (
        layout(mask, sort_by_length=sort_by_length, keep_first=True),
        layout(mask, sort_by_length=sort_by_length),
    )
    assert torch.equal(kept.indices, plain.indices)
    assert kept.key_indices is None
    assert kept.cu_seqlens_k is kept.cu_seqlens


def test_layout_leaves_the_mask_alone():
    mask = MASK.bool()
    layout(mask, keep_first=True, sort_by_length=True)
    assert torch.equal(mask, MASK.bool())


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32]
)
def test_mask_dtypes(dtype):
    assert layout(MASK.to(dtype)).indices.tolist() == layout(MASK).indices.tolist()
    assert cu_seqlens(MASK.to(dtype)).tolist() == [0, 3, 5, 7, 7, 11]


def test_nonzero_is_a_token():
    assert layout(torch.tensor([[2, 0, 3]])).indices.tolist() == [0, 2]


def test_strided_mask():
    assert layout(MASK.t().contiguous().t()).indices.tolist() == layout(MASK).indices.tolist()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("options", OPTIONS)
def test_empty_batches(shape, options):
    tokens = layout(torch.ones(shape), **options)
    assert tokens.cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert tokens.max_seqlen == tokens.max_seqlen_k == tokens.total_tokens == tokens.positions.numel() == 0
    assert pack(torch.ones(*shape, 2), tokens).shape == (0, 2)
    assert unpack(torch.ones(0, 2), tokens).shape == (*shape, 2)


def test_only_padding():
    tokens = layout(torch.zeros(2, 3))
    assert tokens.cu_seqlens.tolist() == [0, 0, 0]
    assert unpack(torch.ones(0, 5), tokens).tolist() == torch.zeros(2, 3, 5).tolist()


def random_mask(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(7, 9, generator=generator) < torch.rand(7, 1, generator=generator)
    mask[3] = False
    return mask


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", OPTIONS)
def test_against_a_loop_over_rows(seed, options):
    mask = random_mask(seed)
    queries = mask.clone()
    queries[:, 0] |= options.get("keep_first", False)
    rows = list(range(len(mask)))
    if options.get("sort_by_length"):
        rows.sort(key=lambda row: (int(mask[row].sum()), int(queries[row].sum())))
    tokens = layout(mask, **options)
    x = torch.randn(7, 9, 3)
    packed = pack(x, tokens)
    is_key = torch.ones(len(packed), dtype=torch.bool)
    if tokens.key_indices is not None:
        is_key = torch.zeros(len(packed), dtype=torch.bool).index_fill(0, tokens.key_indices, True)
    for i, row in enumerate(rows):
        part = slice(*tokens.cu_seqlens[i : i + 2].tolist())
        assert torch.equal(packed[part], x[row][queries[row]])
        keys = packed if tokens.key_indices is None else packed[tokens.key_indices]
        part_k = slice(*tokens.cu_seqlens_k[i : i + 2].tolist())
        assert torch.equal(keys[part_k], x[row][mask[row]])
        assert torch.equal(is_key[part], mask[row][queries[row]])
    assert tokens.max_seqlen == int(queries.sum(1).max())
    assert tokens.max_seqlen_k == int(mask.sum(1).max())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("inner", [(), (3,), (2, 3)])
def test_round_trip(options, inner):
    tokens = layout(MASK, **options)
    x = torch.randn(5, 4, *inner)
    kept = MASK.bool()
    kept[:, 0] |= options.get("keep_first", False)
    expected = torch.where(kept.view(5, 4, *[1] * len(inner)), x, torch.zeros(()))
    assert torch.equal(unpack(pack(x, tokens), tokens), expected)


def test_integers_and_views_are_packed():
    tokens = layout(MASK)
    ids = torch.arange(20).view(5, 4)
    assert pack(ids, tokens).tolist() == tokens.indices.tolist()
    strided = torch.randn(5, 3, 4).transpose(1, 2)
    assert torch.equal(pack(strided, tokens), strided.reshape(20, 3)[tokens.indices])
    expanded = torch.arange(4).expand(5, 4)
    assert pack(expanded, tokens).tolist() == tokens.positions.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_padding_never_leaks(bad):
    """0 * NaN is NaN: neither what was in the padding nor its gradient may reach the output."""
    tokens = layout(MASK)
    x = torch.randn(5, 4, 3)
    x[~MASK.bool()] = bad
    x.requires_grad_()
    out = unpack(pack(x, tokens) * 2, tokens)
    assert bool(out.isfinite().all())
    assert bool((out[~MASK.bool()] == 0).all())
    grad = torch.randn(5, 4, 3)
    grad[~MASK.bool()] = bad
    out.backward(grad)
    assert torch.equal(x.grad, torch.where(MASK.bool()[..., None], 2 * grad, torch.zeros(())))


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients(options):
    tokens = layout(MASK, **options)
    x = torch.randn(5, 4, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(tokens.total_tokens, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: pack(t, tokens), x)
    assert torch.autograd.gradcheck(lambda t: unpack(t, tokens), y)
    assert torch.autograd.gradgradcheck(lambda t: pack(t, tokens).square(), x)
    assert torch.autograd.gradgradcheck(lambda t: unpack(t, tokens).square(), y)


def test_gradient_of_a_sum_has_stride_zero():
    x = torch.randn(5, 4, 3, requires_grad=True)
    pack(x, layout(MASK)).sum().backward()
    assert torch.equal(x.grad, MASK[..., None].expand(5, 4, 3).float())


@pytest.mark.usefixtures("poison")
def test_deterministic_bits():
    """Deterministic mode fills fresh memory with NaN and refuses ops that may differ from run to run."""
    tokens = layout(MASK, sort_by_length=True)
    results = []
    for _ in range(2):
        x = torch.arange(60.0).view(5, 4, 3).requires_grad_()
        out = unpack(pack(x, tokens).sin(), tokens)
        out.backward(torch.arange(60.0).view(5, 4, 3))
        results.append((out.detach(), x.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert bool(first.isfinite().all())


def test_layout_from_cu_seqlens_by_hand():
    tokens = layout_from_cu_seqlens(torch.tensor([0, 2, 2, 5]), max_seqlen=4, total_tokens=5)
    assert tokens.cu_seqlens.dtype == torch.int32
    assert tokens.indices.tolist() == [0, 1, 8, 9, 10]
    assert tokens.positions.tolist() == [0, 1, 0, 1, 2]
    assert (tokens.batch_size, tokens.seq_len, tokens.max_seqlen) == (3, 4, 4)
    assert tokens.key_indices is None


def test_layout_from_cu_seqlens_is_that_of_a_right_padded_mask():
    mask = torch.arange(6) < torch.tensor([[3], [0], [6], [1], [0]])
    by_mask, by_offsets = layout(mask), layout_from_cu_seqlens(cu_seqlens(mask), 6, 10)
    assert torch.equal(by_mask.indices, by_offsets.indices)
    assert torch.equal(by_mask.cu_seqlens, by_offsets.cu_seqlens)


def test_layout_from_cu_seqlens_without_tokens():
    assert layout_from_cu_seqlens(torch.tensor([0]), 0, 0).total_tokens == 0
    assert layout_from_cu_seqlens(torch.tensor([0, 0]), 0, 0).positions.numel() == 0


@pytest.mark.parametrize(
    ("offsets", "max_seqlen"),
    [([1, 2, 5], 3), ([0, 3, 2, 5], 3), ([0, 2, 4], 3), ([0, 1, 5], 3), ([0, 2, 6], 4)],
)
def test_layout_from_wrong_cu_seqlens(offsets, max_seqlen):
    with pytest.raises(ValueError, match=r"must rise from 0 to the number of tokens \(5\)"):
        layout_from_cu_seqlens(torch.tensor(offsets), max_seqlen, total_tokens=5)


@pytest.mark.parametrize(
    "offsets", [torch.zeros(2, 2, dtype=torch.int32), torch.zeros(3), torch.zeros(0).int()]
)
def test_layout_from_cu_seqlens_of_a_wrong_kind(offsets):
    with pytest.raises(ValueError, match=r"must be an integer tensor \[batch \+ 1\]"):
        layout_from_cu_seqlens(offsets, 3, 0)


@pytest.mark.parametrize("function", [layout, cu_seqlens])
@pytest.mark.parametrize("shape", [(4,), (2, 4, 4), (2, 1, 4, 4)])
def test_only_2d_masks(function, shape):
    with pytest.raises(ValueError, match=r"must be \[batch, seq\]") as error:
        function(torch.ones(shape))
    assert str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize("function", [layout, cu_seqlens])
def test_additive_masks_are_refused(function):
    """Taken as a token mask it would mean its opposite."""
    with pytest.raises(ValueError, match="additive"):
        function(torch.tensor([[0.0, 0.0, float("-inf")]]))


def test_sizes_must_fit_the_layout():
    tokens = layout(MASK)
    with pytest.raises(ValueError, match=r"layout is of \[5, 4, \.\.\.\]"):
        pack(torch.ones(4, 5, 3), tokens)
    with pytest.raises(ValueError, match=r"layout is of \[5, 4, \.\.\.\]"):
        pack(torch.ones(20), tokens)
    with pytest.raises(ValueError, match="layout has 11 tokens"):
        unpack(torch.ones(20, 3), tokens)
    with pytest.raises(ValueError, match="layout has 11 tokens"):
        unpack(torch.tensor(1.0), tokens)


def test_layout_made_in_inference_mode_serves_there():
    with torch.inference_mode():
        tokens = layout(MASK, sort_by_length=True, keep_first=True)
        assert torch.equal(pack(unpack(torch.ones(13, 2), tokens), tokens), torch.ones(13, 2))


def test_compiled_pack_and_unpack_equal_eager():
    tokens = layout(MASK, sort_by_length=True)
    x = torch.randn(5, 4, 3, requires_grad=True)
    grad = torch.randn(5, 4, 3)

    def function(t: Tensor) -> Tensor:
        return unpack(pack(t, tokens).sin(), tokens)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for f in (function, compiled):
        out = f(x)
        (gradient,) = torch.autograd.grad(out, x, grad)
        if f is function:
            expected = out, gradient
    assert torch.equal(out, expected[0])
    assert torch.equal(gradient, expected[1])
