"""The embeddings' launchers: they write what they should, all of it, and nothing else, with every configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyaccel import reference
from pyaccel.kernels.common import configs, limits, segment_sum
from pyaccel.kernels.embeddings import backward as bert_embeddings_backward
from pyaccel.kernels.embeddings import config
from pyaccel.kernels.embeddings import forward as bert_embeddings
from pyaccel.kernels.embeddings.forward import Lookup
from pyaccel.ops.dropout import dropout_key
from pyaccel.reference.embeddings import packed_positions
from tests.assertions import assert_bits_equal, assert_close_to_truth

Alloc = Callable[..., Tensor]

# The longest row of each configuration, and BERT's.
FORWARD = (384, 512, 768, 1024, 4096, 16384)
BACKWARD = (384, 512, 768, 1024, 2100)


def make_lookup(
    tokens: int,
    hidden: int,
    device: torch.device,
    period: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Lookup:
    """Three tables with rows beside them that no id may reach: those are NaN."""
    tables = []
    for rows in (11, 9, 2):
        fenced = torch.full((rows + 2, hidden), float("nan"), device=device)
        fenced[1:-1] = torch.randn(rows, hidden, device=device) + 0.5
        tables.append(fenced.to(dtype)[1:-1])
    ids = torch.randint(11, (tokens,), device=device)
    types = torch.randint(2, (tokens,), device=device, dtype=torch.int32)
    return Lookup(ids, None, types, *tables, period or tokens)


def truth_of(lookup: Lookup, weight: Tensor, bias: Tensor, *, upcast: bool) -> list[Tensor]:
    """Output and gradients of ``out.square().sum() / 2``."""
    tables = (lookup.word_weight, lookup.position_weight, lookup.token_type_weight, weight, bias)
    given = [(t.double() if upcast else t).detach().clone().requires_grad_() for t in tables]
    position_ids = torch.arange(len(lookup.input_ids), device=weight.device) % lookup.period
    out = reference.bert_embeddings(
        lookup.input_ids,
        *given,
        position_ids=position_ids,
        token_type_ids=lookup.token_type_ids,
        upcast=upcast,
    ).output
    return [out.detach(), *torch.autograd.grad(out, given, out.detach())]


@pytest.mark.parametrize("hidden", sorted({1, 63, *FORWARD, *BACKWARD}))
def test_forward_and_backward_write_all_of_their_outputs_and_nothing_else(
    hidden: int, device: torch.device, guarded_empty: Alloc
) -> None:
    """Every configuration; tokens enough that a program of the backward takes several turns."""
    forward_config, row_config = (
        config.bert_embeddings_forward(hidden),
        config.bert_embeddings_backward(hidden),
    )
    tokens = 9 if hidden <= 2100 else 2
    lookup = make_lookup(tokens, hidden, device, period=9)
    weight, bias = torch.randn(2, hidden, device=device).unbind()
    out, dz = (guarded_empty((tokens, hidden), device=device) for _ in range(2))
    mean, rstd = (guarded_empty((tokens,), device=device) for _ in range(2))
    in_range = guarded_empty((3, tokens), dtype=torch.uint8, device=device)
    bert_embeddings.forward(
        out, mean, rstd, None, in_range, lookup, None, weight, bias, None, 1e-12, 0.0, forward_config
    )
    assert_bits_equal(in_range, torch.ones_like(in_range))
    truth, naive = (truth_of(lookup, weight, bias, upcast=upcast) for upcast in (True, False))
    if hidden > 1:  # a row of one is its bias: nothing to be judged by
        assert_close_to_truth(out, truth[0], naive[0], name="out")
    if hidden > 2100:
        return
    n_programs = 2 if row_config.block_rows < tokens else 1
    partials = [guarded_empty((n_programs, hidden), device=device) for _ in range(2)]
    dy = truth[0].float()
    bert_embeddings_backward.backward(
        dz, *partials, dy, mean, rstd, lookup, weight, None, 0.0, n_programs, row_config
    )
    names, sums = ("dweight", "dbias"), [p.sum(0) for p in partials]
    for name, got, exact, plain in zip(names, sums, truth[4:], naive[4:], strict=True):
        assert_close_to_truth(got, exact, plain, name=name)
    for index, ids in ((1, lookup.input_ids), (3, lookup.token_type_ids)):
        table = torch.zeros_like(truth[index]).index_add_(0, ids, dz.double())
        if hidden > 1:
            assert_close_to_truth(table.float(), truth[index], naive[index], name=f"table {index}")


@pytest.mark.parametrize("hidden", [200, 2100])
def test_any_number_of_programs_and_any_outputs_wanted_give_the_same_bits(
    hidden: int, device: torch.device
) -> None:
    tokens = 19
    lookup = make_lookup(tokens, hidden, device, period=9)
    weight, dy = torch.randn(hidden, device=device), torch.randn(tokens, hidden, device=device)
    mean, rstd = torch.randn(tokens, device=device), torch.rand(tokens, device=device) + 0.5
    key, row_config = dropout_key(device), config.bert_embeddings_backward(hidden)

    def launch(n_programs: int, dz: Tensor | None, *partials: Tensor | None) -> None:
        bert_embeddings_backward.backward(
            dz, *partials, dy, mean, rstd, lookup, weight, key, 0.3, n_programs, row_config
        )

    first, second = torch.full((2, tokens, hidden), float("nan"), device=device).unbind()
    partials, alone = torch.full((2, 2, 2, hidden), float("nan"), device=device).unbind()
    launch(2, first, *partials)
    launch(1, second, None, None)
    launch(2, None, alone[0], alone[1])
    assert_bits_equal(first, second)
    assert_bits_equal(partials, alone)


@pytest.mark.parametrize(
    "offsets", [(0, 3, 3, 10), (0, 13), (0,), (2, 5, 5, 5, 6, 7, 8, 9, 10), (0, 1, 2, 3)]
)
def test_positions_of_packed_tokens(
    offsets: tuple[int, ...], device: torch.device, guarded_empty: Alloc
) -> None:
    tokens = 13
    lookup = dataclasses.replace(
        make_lookup(tokens, 8, device), position_weight=torch.randn(13, 8, device=device)
    )
    out = guarded_empty((tokens, 8), device=device)
    mean, rstd = (guarded_empty((tokens,), device=device) for _ in range(2))
    positions = guarded_empty((tokens,), dtype=torch.int32, device=device)
    in_range = guarded_empty((3, tokens), dtype=torch.uint8, device=device)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    bert_embeddings.forward(
        out, mean, rstd, positions, in_range, lookup, cu_seqlens, None, None, None, 1e-12, 0.0,
        config.bert_embeddings_forward(8),
    )  # fmt: skip
    expected = packed_positions(cu_seqlens, tokens)
    assert_bits_equal(positions, expected.int())
    given = dataclasses.replace(lookup, position_ids=expected)
    again = torch.empty_like(out)
    bert_embeddings.forward(
        again, mean, rstd, None, in_range, given, None, None, None, None, 1e-12, 0.0,
        config.bert_embeddings_forward(8),
    )  # fmt: skip
    assert_bits_equal(out, again)


def test_ids_out_of_range_are_reported_and_read_nothing_outside(device: torch.device) -> None:
    """The rows around the tables are NaN: neither direction may read them."""
    lookup = make_lookup(6, 40, device)
    wrong = {
        "input_ids": torch.tensor([0, -1, 11, 10, 2**40, 1], device=device),
        "position_ids": torch.tensor([9, 0, 8, -1, 0, 0], dtype=torch.int32, device=device),
        "token_type_ids": torch.tensor([0, 1, 2, -1, 1, 0], device=device),
    }
    lookup = dataclasses.replace(lookup, **wrong)
    out, mean, rstd = (torch.empty(s, device=device) for s in ((6, 40), (6,), (6,)))
    in_range = torch.empty(3, 6, dtype=torch.bool, device=device)
    bert_embeddings.forward(
        out, mean, rstd, None, in_range, lookup, None, None, None, None, 1e-12, 0.0,
        config.bert_embeddings_forward(40),
    )  # fmt: skip
    assert not out.isnan().any()
    expected = [[1, 0, 0, 1, 0, 1], [0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1]]
    assert in_range.int().tolist() == expected
    dz, partials = torch.empty(6, 40, device=device), torch.empty(2, 1, 40, device=device)
    row_config = config.bert_embeddings_backward(40)
    bert_embeddings_backward.backward(dz, *partials, out, mean, rstd, lookup, None, None, 0.0, 1, row_config)
    assert not dz.isnan().any()
    assert not partials.isnan().any()


def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    """Table rows and gradients 2**30 elements apart: the last begins at element 3 * 2**30. Memory that isn't touched
    isn't taken."""
    big = torch.empty(3 * 2**30 + 16, dtype=torch.float16, device=device)
    far, near = big.as_strided((4, 16), (2**30, 1)), torch.randn(4, 16, device=device).half()
    far.copy_(near)
    ids = torch.tensor([3, 0, 2, 1], device=device)
    results = []
    for rows in (far, near):
        lookup = Lookup(ids, None, None, rows, rows, rows, 4)
        out, dz = torch.empty(2, 4, 16, device=device).unbind()
        mean, rstd = torch.empty(2, 4, device=device).unbind()
        in_range = torch.empty(3, 4, dtype=torch.bool, device=device)
        bert_embeddings.forward(
            out, mean, rstd, None, in_range, lookup, None, None, None, None, 1e-12, 0.0,
            config.bert_embeddings_forward(16),
        )  # fmt: skip
        bert_embeddings_backward.backward(
            dz, None, None, rows, mean, rstd, lookup, None, None, 0.0, 1, config.bert_embeddings_backward(16)
        )
        total = torch.zeros(4, 16, device=device)
        segment_sum.segment_sum(total, rows, *torch.sort(ids, stable=True), -1, configs.segment_sum(4))
        results.append((out, dz, total))
    for a, b in zip(*results, strict=True):
        assert_bits_equal(a, b)


# --- segment sum ----------------------------------------------------------------------------------------------

TINY = configs.SegmentSumConfig(4, 32, 1, border_p=2, border_n=16, border_warps=1)
# ids, in chunks of 4: runs inside of chunks, across one border, up to a border, over many chunks, and one alone.
RUNS = {
    "one row": [2],
    "one run": [1] * 23,
    "each its own": list(range(9)),
    "up to borders": [0] * 4 + [1] * 4 + [3] * 8 + [7],
    "across": [0, 0, 0, 2, 2, 2, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6, 6],
    "many chunks": [4] * 3 + [6] * 30 + [8] * 2,
    "unsorted": [3, 1, 3, 3, 0, 8, 3, 1, 3, 3, 3, 3, 3, 8, 3, 3, 3],
    "outside": [-2, -2, -1, 0, 0, 9, 9, 9, 9, 9, 12],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("runs", RUNS)
def test_segment_sum(
    runs: str, dtype: torch.dtype, device: torch.device, poison: None, guarded_empty: Alloc
) -> None:
    ids, n_segments = torch.tensor(RUNS[runs], device=device), 9
    rows = (torch.randn(len(ids), 40, device=device) + 0.5).to(dtype)
    for skip in (-1, 3):
        out = guarded_empty((n_segments, 40), dtype=dtype, device=device).zero_()
        segment_sum.segment_sum(out, rows, *torch.sort(ids, stable=True), skip, TINY)
        counted = (ids >= 0) & (ids < n_segments) & (ids != skip)
        sums = [
            torch.zeros(n_segments, 40, dtype=wide, device=device).index_add_(
                0, ids[counted], rows[counted].to(wide)
            )
            for wide in (torch.float64, torch.float32)
        ]
        # Naive is the fp32 sum, rounded once: bf16 rows don't excuse sums in bf16.
        assert_close_to_truth(out, sums[0], sums[1].to(dtype))


@pytest.mark.parametrize("config_of", [1, 65537], ids=["few rows", "many rows"])
def test_segment_sum_with_every_configuration(
    config_of: int, device: torch.device, guarded_empty: Alloc
) -> None:
    shipped = configs.segment_sum(config_of)
    count = 2 * shipped.chunk + 3
    ids = torch.cat([torch.zeros(5), torch.ones(count - 9), torch.full((4,), 5.0)]).int().to(device)
    rows = torch.randn(300, count, device=device).t()  # columns lie far apart
    out = guarded_empty((6, 300), device=device).zero_()
    segment_sum.segment_sum(out, rows, ids, None, -1, shipped)
    sums = [
        torch.zeros(6, 300, dtype=w, device=device).index_add_(0, ids, rows.to(w))
        for w in (torch.float64, torch.float32)
    ]
    assert_close_to_truth(out, *sums)


def test_segment_sum_of_nothing_and_of_what_is_skipped(device: torch.device, guarded_empty: Alloc) -> None:
    out = guarded_empty((3, 40), device=device).zero_()
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    segment_sum.segment_sum(out, torch.zeros(0, 40, device=device), ids, None, -1, TINY)
    ids = torch.tensor([0, 1, 1, 1, 1, 1, 2], device=device)
    rows = torch.full((7, 40), float("nan"), device=device)
    rows[0], rows[6] = 1.0, 2.0
    segment_sum.segment_sum(out, rows, ids, None, 1, TINY)
    assert_bits_equal(out, torch.tensor([1.0, 0.0, 2.0], device=device)[:, None].expand(3, 40))


def test_configs_are_values_and_rows_have_a_limit() -> None:
    assert {config.bert_embeddings_forward(n) for n in FORWARD} == {
        config.bert_embeddings_forward(n) for n in range(1, limits.MAX_ROW + 1)
    }
    assert {config.bert_embeddings_backward(n) for n in BACKWARD} == {
        config.bert_embeddings_backward(n) for n in range(1, limits.MAX_ROW + 1)
    }
    assert hash(configs.segment_sum(7)) == hash(configs.segment_sum(65536))
    for heuristic in (config.bert_embeddings_forward, config.bert_embeddings_backward):
        for hidden in (0, 16385):
            with pytest.raises(ValueError, match="1 to 16384"):
                heuristic(hidden)
