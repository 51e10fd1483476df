"""What texts of other lengths in a batch change: nothing."""

from __future__ import annotations

import torch

from pyaccel.encode.batching import mean_pool, padded


def test_the_mask_has_each_texts_tokens() -> None:
    ids, mask = padded([[5, 6, 7], [8], []], 3)
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3], [3, 3, 3]]
    assert mask.tolist() == [[True, True, True], [True, False, False], [False, False, False]]
    assert padded([[]], 0)[0].shape == (1, 1)  # a model takes no empty batch


def test_the_mean_is_that_of_the_tokens_alone() -> None:
    states = torch.arange(24, dtype=torch.float64).view(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    expected = torch.stack([states[0, :2].mean(0), torch.zeros(4, dtype=torch.float64)])
    for given in (mask, mask.bool()):
        assert torch.equal(mean_pool(states, given), expected)
    assert mean_pool(states.bfloat16(), mask).dtype == torch.bfloat16
