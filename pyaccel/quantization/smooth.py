"""SmoothQuant's scales (G. Xiao et al., arXiv:2211.10438) for post-norm encoders.

An input channel j of a linear layer is divided by ``s_j = amax(|x_j|)^alpha / amax(|w_j|)^(1 - alpha)`` and the
weight's column multiplied by it: the same product, with a share of the input's outliers moved into the weight.

The paper folds the division into the LayerNorm before. In a post-norm layer, BERT's, that LayerNorm's output is the
residual too, which must keep its size, and in front of the last product stands the activation. So the division stays
where it belongs: ``Int8Linear.smooth_scale`` multiplies the input in the pass that quantizes it.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from pyaccel.quantization.calibrate import Calibration

# Projections of one input share their scales, so that it is quantized in the same way for each of them.
SIBLINGS = ("query", "key", "value", "q_lin", "k_lin", "v_lin")


@torch.no_grad()
def smooth_scales(linears: dict[str, nn.Linear], seen: Calibration, alpha: float) -> dict[str, Tensor]:
    """For each layer's name fp32 ``[in_features]``, by which its input is to be multiplied: ``1 / s``."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in linears:
        parent, _, last = name.rpartition(".")
        groups[parent if last in SIBLINGS else name].append(name)
    scales = {}
    for names in groups.values():
        x = torch.stack([seen.inputs[name].channel_amax for name in names]).amax(0)
        w = torch.stack([linears[name].weight.float().abs().amax(0) for name in names]).amax(0)
        factor = x.pow(alpha) / w.pow(1 - alpha)
        # A channel that was never seen, or that the weight ignores, is left as it is.
        factor = torch.where((x > 0) & (w > 0), factor, 1.0)
        for name in names:
            scales[name] = 1 / factor
    return scales
