"""Why one call can't take the fast path, or not with its padding dropped; how the modules are is asked in
:mod:`pyaccel.hf.guard`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from pyaccel.hf import attention, graphs
from pyaccel.hf.guard import global_hooks_matter
from pyaccel.hf.surroundings import inside


def call_reason(
    module: Any,
    hidden: Tensor,
    mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    packed: bool = False,
) -> str | None:
    """Why this call can't take the fast path, apart from how the modules are; None if it can.

    ``args`` are what BERT's layers and encoders take after the mask: encoder_hidden_states, its mask, past_key_values.
    """
    if not torch.compiler.is_compiling():
        if reason := inside():
            return reason
        if type(hidden) not in (Tensor, nn.Parameter):
            return f"hidden states are a {type(hidden).__name__}"
    config = module._pyaccel.config
    given = {
        **dict(
            zip(("encoder_hidden_states", "encoder_attention_mask", "past_key_values"), args, strict=False)
        ),
        **kwargs,
    }
    if config._attn_implementation not in attention.NAMES:
        return f"the attention implementation is now {config._attn_implementation!r}"
    if config._attn_implementation == attention.EAGER and torch.is_grad_enabled():
        return "the model was made with eager attention, whose gradients can be differentiated again"
    if given.get("output_attentions", config.output_attentions):
        return "output_attentions"
    if any(given.get(name) is not None for name in ("past_key_values", "cache")):  # before and since 5.24
        return "a key/value cache"
    if given.get("encoder_hidden_states") is not None:
        return "cross attention"
    if given.get("cu_seq_lens_q") is not None and not packed:
        return "input packed by the caller"
    if given.get("is_causal"):
        return "is_causal"
    if mask is not None and (mask.dtype != torch.bool or mask.shape != hidden.shape[:2]):
        return f"an attention mask other than bool [batch, seq]: {mask.dtype} with {mask.dim()} dimensions"
    if global_hooks_matter():
        return "hooks on all modules"
    return None


def not_packable(hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
    """Why this call must keep its padding: the packed layout depends on the mask's values, sizes included."""
    if graphs.on_gpu(hidden) and graphs.is_capturing():
        return "a CUDA graph is captured, in which nothing may wait for the device"
    if output_capturing._active_collector.get():
        return "hidden states or attentions are captured"
    if hidden.is_meta:
        return "hidden states are on the meta device"
    if kwargs.get("cu_seq_lens_q") is None:
        return None
    if hidden.shape[0] != 1 or mask is not None or kwargs.get("max_length_q") is None:
        return "input packed by the caller, other than one row with max_length_q and no mask"
    return None


def drops(layer: Any) -> bool:
    heads = layer.attention.self
    dropouts = (layer.attention.output.dropout, layer.output.dropout)
    return (heads.training and heads.dropout.p > 0.0) or any(d.training and d.p > 0.0 for d in dropouts)
