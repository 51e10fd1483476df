"""What a model computes inside of its layers, stock and accelerated, at the same places: the sites.

The stock model is hooked at its submodules; hooks on an accelerated one would send it to its stock modules, so there
the public ops are observed (:func:`pyaccel.dispatch.observe`). Both give, for each layer that runs, site -> values of
real tokens, in the order in which they come about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel import dispatch
from pyaccel.packing import PackedLayout, unpack

QKV, CONTEXT, ATTENTION_OUTPUT, INTERMEDIATE, OUTPUT = (
    "query, key, value",
    "attention",
    "attention.output",
    "intermediate",
    "output",
)
SITES = (QKV, CONTEXT, ATTENTION_OUTPUT, INTERMEDIATE, OUTPUT)


@dataclass
class Trace:
    """What was computed.

    Attributes:
        layers: of each layer in the order of running: site -> ``[real tokens, features]``.
        ops: of each layer: site -> the op that computed it; empty for a stock model.
        layouts: the packed layouts that were made.
    """

    layers: list[dict[str, Tensor]] = field(default_factory=list)
    ops: list[dict[str, str]] = field(default_factory=list)
    layouts: list[PackedLayout] = field(default_factory=list)


@contextmanager
def trace_stock(views: list[Any], mask: Tensor) -> Iterator[Trace]:
    """Record a stock model's layers, given under BERT's names (:attr:`pyaccel.hf.families.Family.view`).

    ``mask``: bool ``[batch, seq]``, True for real tokens.
    """
    trace = Trace()
    parts: list[Tensor] = []

    def keep(site: str, value: Tensor) -> None:
        if trace.layers:
            trace.layers[-1].setdefault(site, value.detach()[mask])

    def of_input(site: str) -> Callable[..., None]:
        return lambda module, args: keep(site, args[0])

    def of_output(site: str) -> Callable[..., None]:
        return lambda module, args, out: keep(site, out)

    def projection(which: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            if which == 0:
                trace.layers.append({})
                parts.clear()
            parts.append(out.detach()[mask])
            if which == 2:
                trace.layers[-1][QKV] = torch.cat(parts, -1)

        return hook

    handles, seen = [], set()
    for view in views:
        heads = view.attention.self
        if id(heads.query) in seen:  # shared by several layers
            continue
        seen.add(id(heads.query))
        handles += [
            module.register_forward_hook(projection(i))
            for i, module in enumerate((heads.query, heads.key, heads.value))
        ]
        handles += [
            view.attention.output.dense.register_forward_pre_hook(of_input(CONTEXT)),
            view.attention.output.LayerNorm.register_forward_hook(of_output(ATTENTION_OUTPUT)),
            view.output.dense.register_forward_pre_hook(of_input(INTERMEDIATE)),
            view.output.LayerNorm.register_forward_hook(of_output(OUTPUT)),
        ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def trace_accelerated(mask: Tensor) -> Iterator[Trace]:
    """Record the layers of whatever accelerated model this thread runs inside, in eager mode."""
    trace = Trace()
    with dispatch.observe(_Recorder(trace, mask).heard):
        yield trace


class _Recorder:
    """Tells by the order of the ops where in which layer one was called."""

    def __init__(self, trace: Trace, mask: Tensor) -> None:
        self.trace, self.mask = trace, mask
        self.parts: list[Tensor] = []

    def heard(self, name: str, out: Any) -> None:
        layers = self.trace.layers
        if name == "layout":
            self.trace.layouts.append(out)
            return
        if name == "linear_activation" and (not layers or OUTPUT in layers[-1]):
            layers.append({})
            self.trace.ops.append({})
            self.parts = []
        if not layers:
            return
        done = layers[-1]
        if name == "linear_activation" and CONTEXT not in done:
            self.parts.append(out)
            # One product for the three, or three of them: the last one completes it.
            self._keep(QKV, name, torch.cat(self.parts, -1))
        elif name == "linear_activation":
            self._keep(INTERMEDIATE, name, out)
        elif name == "varlen_attention":
            self._keep(CONTEXT, name, out.flatten(-2))
        elif name == "scaled_dot_product_attention":
            self._keep(CONTEXT, name, out.transpose(1, 2).flatten(-2))
        elif name == "layernorm_mlp":  # its second output is a sum that the stock layer doesn't have
            self._keep(ATTENTION_OUTPUT, name, out[0])
        elif name in ("residual_layernorm", "linear_residual_layernorm"):
            self._keep(OUTPUT if ATTENTION_OUTPUT in done else ATTENTION_OUTPUT, name, out)

    def _keep(self, site: str, op: str, value: Tensor) -> None:
        value = value.detach()
        if value.dim() == 2:  # packed
            if not self.trace.layouts:
                return
            value = unpack(value, self.trace.layouts[-1])
        self.trace.layers[-1][site] = value[self.mask]
        self.trace.ops[-1][site] = op


def layout_reason(tokens: PackedLayout, mask: Tensor) -> str | None:
    """What is wrong with the packed layout of a bool ``[batch, seq]`` mask; None where every token is in its place."""
    batch, seq = mask.shape
    indices, mask = tokens.indices.cpu(), mask.cpu()
    keys = indices if tokens.key_indices is None else indices[tokens.key_indices.cpu()]
    bounds, key_bounds = tokens.cu_seqlens.tolist(), tokens.cu_seqlens_k.tolist()
    if len(bounds) != batch + 1 or bounds[-1] != len(indices) or key_bounds[-1] != len(keys):
        return (
            f"its offsets end at {bounds[-1]} of {len(indices)} tokens, for {len(bounds) - 1} of {batch} rows"
        )
    rows = set()
    for i in range(batch):
        own, seen = indices[bounds[i] : bounds[i + 1]], keys[key_bounds[i] : key_bounds[i + 1]]
        if not len(own):
            continue
        row = int(own[0]) // seq
        rows.add(row)
        expected = mask[row].nonzero().flatten() + row * seq
        if not torch.equal(seen, expected):
            return f"row {row} attends to columns {_few(seen, row * seq)}, not to {_few(expected, row * seq)}"
        if not set(expected.tolist()) <= set(own.tolist()):
            return f"row {row} has not all of its tokens"
    if missing := set(mask.any(1).nonzero().flatten().tolist()) - rows:
        return f"rows {sorted(missing)} are not in it"
    return None


def _few(positions: Tensor, start: int) -> str:
    columns = [int(p) - start for p in positions]
    if columns and columns == list(range(columns[0], columns[-1] + 1)):
        return f"{columns[0]} to {columns[-1]}"
    return str(columns[:8])
