"""`explain`: which backend serves each op of an accelerated model, by a dry run of one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pyaccel import dispatch, ops, tuning
from pyaccel.hf import mlm_head
from pyaccel.hf.eligibility import ineligible_reason
from pyaccel.hf.families import family_of, layers_of, stock
from pyaccel.hf.patching import accelerations_of, dry_run, swapped_in
from pyaccel.hf.report import Explanation
from pyaccel.nn import Int8Linear


def explain(model: nn.Module) -> Explanation:
    """See :func:`pyaccel.hf.explain`."""
    accelerations = accelerations_of(model)
    # A layer that was copied, and put beside the one that it is a copy of, brought an acceleration of its own.
    within = {id(inner) for module in swapped_in(model) for inner in module.modules() if inner is not module}
    outermost = [module for module in swapped_in(model) if id(module) not in within]
    accelerations = list({id(m._pyaccel.acceleration): m._pyaccel.acceleration for m in outermost}.values())
    if len(accelerations) > 1:
        raise ValueError(
            f"pyaccel.explain: {len(accelerations)} models accelerated apart are in this; pass one of them"
        )
    first = next(module for module in swapped_in(model) if type(module) is not mlm_head.Linear)
    with dispatch.record() as choices:
        if isinstance(first, PreTrainedModel):
            weight, int8, ineligible = next(first.parameters()), {}, None
            _dry_run_of_attention(first.config, weight)
        else:
            family = family_of(first)
            assert family is not None  # it is swapped
            layer = layers_of(family, first)[0]
            weight = family.view(layer).output.LayerNorm.weight
            int8 = _int8_speedups(layer, weight.dtype)
            ineligible = ineligible_reason(stock(family), [layer], around=layer)
            if ineligible is None:
                dry_run(family, layer, accelerations[0])
    summary = dispatch.summary(choices)
    backends = {op: choice.backend for op, choice in summary.items()}
    reasons = {op: choice.reason for op, choice in summary.items()}
    if ineligible is not None:
        backends, reasons = {"layer": "stock"}, {"layer": ineligible}
    return Explanation(
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
        backends=backends,
        reasons=reasons,
        report=accelerations[0].report,
        int8=int8,
    )


@torch.no_grad()
def _dry_run_of_attention(config: Any, weight: torch.Tensor) -> None:
    heads = config.num_attention_heads
    q = weight.new_zeros(1, heads, 16, getattr(config, "head_dim", None) or config.hidden_size // heads)
    ops.scaled_dot_product_attention(q, q, q)


def _int8_speedups(layer: Any, dtype: torch.dtype) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for module in layer.modules():
        if isinstance(module, Int8Linear) and module.method != "weight_only":
            n_in, n_out, device = module.in_features, module.out_features, module.weight.device
            for rows in sorted({timing.size[0] for timing in tuning.timings("int8_matmul", device, dtype)}):
                near = tuning.nearest("int8_matmul", device, dtype, (rows, n_in, n_out))
                if near is not None and near.size[0] == rows:
                    backend = near.fastest(dispatch.BACKENDS)
                    if backend is not None and "floating" in near.us:
                        speedup = near.us["floating"] / near.us[backend]
                        found.setdefault(f"{n_in} to {n_out}", {})[rows] = speedup
    return found
