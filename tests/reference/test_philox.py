"""Philox in torch: against the published known answers, and as the source of dropout masks."""

from __future__ import annotations

import pytest
import torch

from pyaccel.reference.philox import dropout, keep_mask, philox

# D. E. Shaw Research's Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    seed = key[0] | key[1] << 32
    seed = seed - 2**64 if seed >= 2**63 else seed
    words = philox(torch.tensor(seed), *(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == expected


def test_an_element_depends_on_its_position_alone() -> None:
    key = torch.tensor([123456789012345678, -42])
    rows, cols = torch.arange(20)[:, None], torch.arange(30)
    mask = keep_mask(key, rows, cols, 0.3, stream=5)
    assert torch.equal(keep_mask(key, rows[7:9], cols[11:13], 0.3, stream=5), mask[7:9, 11:13])
    streams = torch.arange(3)[:, None, None]
    assert torch.equal(keep_mask(key, rows, cols, 0.3, stream=streams + 4)[1], mask)
    for other in (
        keep_mask(key, rows, cols, 0.3, stream=6),
        keep_mask(key + torch.tensor([1, 0]), rows, cols, 0.3, stream=5),
        keep_mask(key + torch.tensor([0, 1]), rows, cols, 0.3, stream=5),
        keep_mask(key, rows + 1, cols, 0.3, stream=5),
        keep_mask(key, rows, cols + 1, 0.3, stream=5),
    ):
        assert not torch.equal(other, mask)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_dropped_elements_and_the_scale(p: float) -> None:
    key = torch.tensor([7, 9])
    n = 100_000
    mask = keep_mask(key, torch.arange(100)[:, None], torch.arange(n // 100), p)
    deviation = max((p * (1 - p) / n) ** 0.5, 1e-12)
    assert abs(mask.double().mean().item() - (1 - p)) <= 5 * deviation
    out = dropout(torch.full((100, n // 100), 3.0), key, p)
    kept = torch.tensor(3.0) * (1 / (1 - p) if p < 1 else 0.0)
    assert torch.equal(out, torch.where(mask, kept, 0.0))
