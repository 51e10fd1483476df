"""What the tests of attention, padded and packed, share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyaccel.ops.dropout import dropout_key
from tests.assertions import MEANS_DIFFER, assert_close_to_truth

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAN = float("nan")
B, H, L, D = 3, 4, 19, 16
BACKENDS = ["triton", "torch", "reference"]
Options = dict[str, Any]


def lengths_mask(lens: list[int], seq: int, device: torch.device) -> Tensor:
    return torch.arange(seq, device=device) < torch.tensor(lens, device=device)[:, None]


def random_mask(*shape: int, device: torch.device) -> Tensor:
    """Bool, about half of it True, with a query (and a whole batch of them) that sees nothing."""
    mask = torch.rand(shape, device=device) < 0.5
    mask[..., -1, :] = False
    return mask


def float_mask(*shape: int, device: torch.device) -> Tensor:
    """Float, a third of it -inf, the last query's all of it."""
    mask = torch.randn(shape, device=device) * 2
    return mask.masked_fill(torch.rand(shape, device=device) < 0.3, -math.inf).index_fill(
        -2, torch.tensor([shape[-2] - 1], device=device), -math.inf
    )


# name: (shape of q, k, v where it isn't the usual one; options from a device)
SHAPES: dict[str, tuple[int, ...]] = {
    # batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim
    "longer keys": (2, 4, 4, 13, 21, 16, 16),
    "longer queries": (2, 4, 4, 21, 13, 16, 16),
    "grouped": (2, 8, 2, 7, 11, 16, 16),
    "one query": (2, 3, 3, 1, 6, 16, 16),
    "odd": (1, 3, 3, 13, 29, 17, 17),
    "wide": (1, 2, 2, 33, 18, 256, 256),
    "value_dim": (2, 4, 4, 7, 11, 16, 24),
}
CASES: dict[str, tuple[str, Callable[[torch.device], Options]]] = {
    "plain": ("", lambda d: {}),
    "scale": ("", lambda d: {"scale": 0.1}),
    "one query": ("one query", lambda d: {}),
    "odd sizes": ("odd", lambda d: {}),
    "head_dim 256": ("wide", lambda d: {}),
    "value_dim": ("value_dim", lambda d: {}),
    "key padding": ("", lambda d: {"key_padding_mask": lengths_mask([19, 7, 0], L, d)}),
    "no padding": ("", lambda d: {"key_padding_mask": lengths_mask([19, 19, 19], L, d)}),
    "bool mask": ("", lambda d: {"attn_mask": random_mask(B, 1, L, L, device=d)}),
    "bool mask by head": ("", lambda d: {"attn_mask": random_mask(H, L, L, device=d)}),
    "bool mask of queries": ("", lambda d: {"attn_mask": lengths_mask([19, 7, 0], L, d)[:, None, :, None]}),
    "float mask": ("", lambda d: {"attn_mask": float_mask(B, 1, L, L, device=d)}),
    "mask with a gradient": ("", lambda d: {"attn_mask": torch.randn(H, 1, L, device=d).requires_grad_()}),
    "mask with a gradient and -inf": (
        "",
        lambda d: {"attn_mask": float_mask(1, 1, L, L, device=d).requires_grad_()},
    ),
    "causal": ("", lambda d: {"is_causal": True}),
    "causal, longer keys": ("longer keys", lambda d: {"is_causal": True}),
    "causal, longer queries": ("longer queries", lambda d: {"is_causal": True}),
    "causal and padding": (
        "",
        lambda d: {"is_causal": True, "key_padding_mask": lengths_mask([19, 7, 0], L, d).flip(1)},
    ),
    "window": ("", lambda d: {"window_size": (3, 2)}),
    "window, longer queries": ("longer queries", lambda d: {"window_size": (2, 0)}),
    "window, causal, mask": (
        "longer keys",
        lambda d: {"window_size": (6, -1), "is_causal": True, "attn_mask": float_mask(13, 21, device=d)},
    ),
    "grouped": ("grouped", lambda d: {"enable_gqa": True}),
    "grouped, mask by head": (
        "grouped",
        lambda d: {"enable_gqa": True, "attn_mask": random_mask(8, 7, 11, device=d)},
    ),
    "grouped, padding": (
        "grouped",
        lambda d: {"enable_gqa": True, "key_padding_mask": lengths_mask([11, 4], 11, d)},
    ),
    "dropout": ("", lambda d: {"dropout_p": 0.3, "key_padding_mask": lengths_mask([19, 7, 0], L, d)}),
    "grouped, causal, dropout": (
        "grouped",
        lambda d: {"enable_gqa": True, "is_causal": True, "dropout_p": 0.15},
    ),
}


def padded_inputs(shape: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v ``[batch, heads, seq, head_dim]`` by strides; a mean, and another magnitude in every batch."""
    batch, heads, kv_heads, seq_q, seq_k, dim, value_dim = SHAPES.get(shape, (B, H, H, L, L, D, D))
    scale = torch.linspace(0.7, 2.0, batch, device=device)[:, None, None, None]
    sizes = [(batch, seq_q, heads, dim), (batch, seq_k, kv_heads, dim), (batch, seq_k, kv_heads, value_dim)]
    return [(torch.randn(s, device=device) * scale + 0.3).to(dtype).transpose(1, 2) for s in sizes]


def leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.detach().to(dtype or x.dtype).requires_grad_()


def under_its_mask(
    function: Callable[..., Any],
    truth: Callable[..., Any],
    dtype: torch.dtype,
    *args: Any,
    dropout_p: float,
    **options: Any,
) -> Callable[..., Tensor]:
    """``truth`` under the dropout mask that ``function`` draws for that dtype, where it isn't that of the reference.

    With one-hot values attention gives back its weights: where they are 0 and are not without dropout, it dropped.
    """

    def one_hot(key: Tensor) -> Tensor:
        if not args:
            return torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
        rows = torch.cat([torch.eye(args[3], dtype=key.dtype)[:n] for n in args[1].diff().tolist()])
        rows = torch.cat([rows, rows.new_zeros(key.shape[0] - len(rows), args[3])])
        return rows[:, None].expand(-1, key.shape[1], -1)

    def call(q: Tensor, k: Tensor, v: Tensor, *_: Any, upcast: bool, **given: Any) -> Tensor:
        def weights(attend: Callable[..., Tensor], q: Tensor, k: Tensor, **more: Any) -> Tensor:
            return attend(q, k, one_hot(k), *args, **{**options, **given, **more})

        with torch.no_grad():
            torch.manual_seed(5)
            # Of that dtype even where the truth is computed in another, which may be served in another way.
            keep = weights(function, q.to(dtype), k.to(dtype), dropout_p=dropout_p) != 0
            # Of the weights that there are about so many stay: a mask that drops all, or none, explains any output.
            kept_of = keep[weights(truth, q, k, upcast=False) != 0].double()
            spread = (dropout_p * (1 - dropout_p) / kept_of.numel()) ** 0.5
            assert abs(kept_of.mean().item() - (1 - dropout_p)) <= MEANS_DIFFER * spread
        kept = weights(truth, q, k, upcast=upcast).to(q.dtype) * keep / (1 - dropout_p)
        if not args:
            return kept @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        out = [
            torch.einsum("qhk,khd->qhd", kept[q0:q1, :, : k1 - k0], v[k0:k1])
            for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(cu.tolist()) for cu in args[:2]), strict=True)
        ]
        rest = q.shape[0] - int(args[0][-1])
        return torch.cat([*out, out[0].new_zeros(rest, *v.shape[1:])])

    return call


def check(
    function: Callable[..., Any],
    truth: Callable[..., Any],
    inputs: list[Tensor],
    *args: Any,
    own_mask: bool = False,
    **options: Any,
) -> None:
    """Output and gradients of ``function``, judged by the policy; all three under one dropout mask.

    Args:
        own_mask: whether ``function`` draws PyTorch's dropout mask.
    """
    if own_mask and "dropout_p" in options:
        dropped = under_its_mask(function, truth, inputs[0].dtype, *args, **options)
        truth, options_of_truth = dropped, {}
    else:
        options_of_truth = options
    dy = None
    results = []
    mask = options.get("attn_mask")
    differentiable_mask = mask is not None and mask.requires_grad
    for call, dtype in ((function, None), (truth, torch.float64), (truth, None)):
        leaves = [leaf(t, dtype) for t in inputs]
        wrt = list(leaves)
        extra: Options = {}
        if differentiable_mask:
            extra["attn_mask"] = leaf(mask, dtype)
            wrt.append(extra["attn_mask"])
        torch.manual_seed(5)
        if call is truth:
            extra["upcast"] = dtype is not None
            if options_of_truth.get("dropout_p"):
                extra["dropout_key"] = dropout_key(inputs[0].device)
        out = call(*leaves, *args, **{**(options_of_truth if call is truth else options), **extra})
        if dy is None:  # neither ones nor contiguous
            dy = torch.randn(out.mT.shape, device=out.device).to(out.dtype).mT + 0.25
        results.append([out, *torch.autograd.grad(out, wrt, dy.to(out.dtype))])
    for name, ours, right, naive in zip(("out", "dq", "dk", "dv", "dmask"), *results, strict=False):
        if name == "dmask":  # of 16-bit products: a 16-bit number, be it stored in fp32
            ours, naive = ours.to(inputs[0].dtype), naive.to(inputs[0].dtype)
        assert_close_to_truth(ours, right, naive, name=name)
