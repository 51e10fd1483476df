"""The reference itself: against torch.nn.functional, and by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyaccel import reference
from pyaccel.reference.embeddings import packed_positions
from pyaccel.reference.philox import keep_mask

F64 = torch.float64


def tables() -> list[torch.Tensor]:
    return [torch.randn(rows, 12, dtype=F64) for rows in (20, 9, 3)] + list(torch.randn(2, 12, dtype=F64))


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("positions", [None, (5,), (1, 5), (2, 5)], ids=str)
def test_against_torch(positions: tuple[int, ...] | None, upcast: bool) -> None:
    word, position, kind, weight, bias = tables()
    ids, types = torch.randint(20, (2, 5)), torch.randint(3, (2, 5))
    position_ids = None if positions is None else torch.randint(9, positions)
    result = reference.bert_embeddings(
        ids, word, position, kind, weight, bias, position_ids=position_ids, token_type_ids=types, eps=1e-5,
        upcast=upcast,
    )  # fmt: skip
    where = torch.arange(5) if position_ids is None else position_ids
    total = F.embedding(ids, word) + F.embedding(where, position) + F.embedding(types, kind)
    assert torch.equal(result.sum, total)
    assert torch.equal(result.output, F.layer_norm(total, (12,), weight, bias, 1e-5))
    torch.testing.assert_close(result.mean, total.mean(-1), rtol=1e-6, atol=1e-6, check_dtype=False)
    plain = reference.bert_embeddings(ids.int(), word, None, None, None, None, eps=1e-5, upcast=upcast)
    assert torch.equal(plain.output, F.layer_norm(word[ids], (12,), eps=1e-5))
    first = reference.bert_embeddings(ids, word, None, kind, None, None, upcast=upcast)
    assert torch.equal(first.sum, word[ids] + kind[0])


def test_packed_positions_by_hand() -> None:
    def positions(*offsets: int) -> list[int]:
        return packed_positions(torch.tensor(offsets, dtype=torch.int32), 7).tolist()

    assert positions(0, 3, 7) == [0, 1, 2, 0, 1, 2, 3]
    assert positions(0, 3, 3, 5) == [0, 1, 2, 0, 1, 0, 0]  # an empty sequence, and tokens beyond the last
    assert positions(0, 0, 7, 7) == [0, 1, 2, 3, 4, 5, 6]
    assert positions(2, 5) == [0, 0, 0, 1, 2, 0, 0]
    assert positions(0) == [0] * 7


def test_packed_is_padded_without_the_padding() -> None:
    word, position, _, weight, bias = tables()
    ids = torch.randint(20, (7,))
    offsets = torch.tensor([0, 4, 7], dtype=torch.int32)
    packed = reference.bert_embeddings(ids, word, position, None, weight, bias, cu_seqlens=offsets).output
    for first, last in ((0, 4), (4, 7)):
        alone = reference.bert_embeddings(ids[None, first:last], word, position, None, weight, bias).output[0]
        assert torch.equal(packed[first:last], alone)


def test_dropout_is_after_the_normalization() -> None:
    word, position, kind, weight, bias = tables()
    ids, key = torch.randint(20, (2, 5)), torch.tensor([3, 4])
    plain = reference.bert_embeddings(ids, word, position, kind, weight, bias).output
    dropped = reference.bert_embeddings(
        ids, word, position, kind, weight, bias, dropout_p=0.5, dropout_key=key
    )
    keep = keep_mask(key, torch.arange(10)[:, None], torch.arange(12), 0.5).view(2, 5, 12)
    assert torch.equal(dropped.output, torch.where(keep, plain * 2.0, 0.0))
    with pytest.raises(ValueError, match="dropout_key"):
        reference.bert_embeddings(ids, word, position, kind, weight, bias, dropout_p=0.5)


def test_naive_rounds_as_plain_torch_does() -> None:
    word, position, kind, weight, bias = (t.bfloat16() for t in tables())
    ids = torch.randint(20, (2, 5))
    total = word[ids] + position[:5] + kind[0]
    result = reference.bert_embeddings(ids, word, position, kind, weight, bias, upcast=False)
    assert torch.equal(result.output, F.layer_norm(total, (12,), weight, bias, 1e-12))
    wide = (weight.float(), bias.float())
    mixed = reference.bert_embeddings(ids, word, position, kind, *wide, upcast=False)
    assert torch.equal(mixed.output, F.layer_norm(total.float(), (12,), *wide, 1e-12).bfloat16())
    assert mixed.mean.dtype == torch.float32


@pytest.mark.parametrize("padding_idx", [None, 3, -17])
def test_gradients_are_nn_embeddings(padding_idx: int | None) -> None:
    given = [t.requires_grad_() for t in tables()]
    ids, types = torch.tensor([[3, 1, 3], [7, 1, 0]]), torch.tensor([[0, 2, 2], [0, 0, 0]])
    ours = reference.bert_embeddings(ids, *given, token_type_ids=types, padding_idx=padding_idx).output
    total = F.embedding(ids, given[0], padding_idx) + given[1][:3] + F.embedding(types, given[2])
    stock = F.layer_norm(total, (12,), *given[3:], 1e-12)
    dy = torch.randn(2, 3, 12, dtype=F64)
    for a, b in zip(torch.autograd.grad(ours, given, dy), torch.autograd.grad(stock, given, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    given = [t.requires_grad_() for t in tables()]
    ids, key = torch.randint(20, (2, 3)), torch.tensor([1, 2])

    def run(*tensors):  # type: ignore[no-untyped-def]
        return reference.bert_embeddings(ids, *tensors, eps=1e-3, dropout_p=0.3, dropout_key=key).output

    assert torch.autograd.gradcheck(run, given)
