"""pyaccel's attention for every transformers model that looks its attention up by name.

An attention function and a mask function are registered together, both under the name ``"pyaccel"``: with
the first alone, transformers would hand over no mask at all, and padding would be attended to without a
word.

    pyaccel.hf.register()
    model = AutoModel.from_pretrained(folder, attn_implementation="pyaccel")

The mask function gives the plain `[batch, keys]` padding mask wherever the mask is padding and nothing
else, so that no `[batch, 1, queries, keys]` mask is built and nothing waits for the device to look at the
mask. Every other pattern (causal, sliding window, packed, the user's own) gets the 4-D mask that
transformers makes for SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
from transformers.models.bert.modeling_bert import eager_attention_forward

from pyaccel import ops
from pyaccel.hf.eligibility import inside
from pyaccel.hf.families import EAGER, NAME

# What some models pass and this attention doesn't compute; ignoring one would give wrong numbers.
_REFUSED = ("softcap", "position_bias", "s_aux", "cache", "block_table")


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for :func:`attention_forward`: bool `[batch, keys]` (True = attend), a 4-D mask, or None.

    Called by transformers with keyword arguments. None means that every query attends to every key (or
    causally, where the module says so).
    """
    padding_alone = mask_function is bidirectional_mask_function and allow_is_bidirectional_skip
    if padding_alone and (attention_mask is None or attention_mask.shape[-1] == kv_length):
        # transformers takes a mask of other dimensions only where it hides nothing, and drops it.
        if attention_mask is not None and attention_mask.dim() != 2 and _hides_nothing(attention_mask):
            return None
        return attention_mask
    if mask_function is not None:
        kwargs["mask_function"] = mask_function
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **kwargs,
    )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    is_eager: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention, as transformers' models call it by name.

    query: `[batch, heads, queries, head_dim]`; key, value: `[batch, kv_heads, keys, head_dim]`, where heads
    is a multiple of kv_heads. attention_mask: None, bool `[batch, keys]` (True = attend), or a bool or
    additive mask broadcastable to `[batch, heads, queries, keys]`. is_eager: see
    :func:`attention_forward_of_eager`.

    Returns the context `[batch, queries, heads, head_dim]`, and the weights where `output_attentions` asks
    for them (computed as transformers' eager attention does), else None.

    In training it is transformers' own SDPA attention, so that dropout draws the numbers that it draws in
    the stock model; inside a function transform, a trace or another's mode too (see
    :mod:`pyaccel.hf.eligibility`), which must find what the stock model does.

    Raises ValueError for what it doesn't compute, such as softcapping, and for masks of other shapes: nothing is
    ignored.
    """
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused:
        raise ValueError(
            f"the 'pyaccel' attention does not compute {', '.join(refused)}, which {type(module).__name__} "
            f"asks for; use another one, e.g. model.set_attn_implementation('eager')"
        )
    if attention_mask is not None and attention_mask.dim() != 4:
        expected = (query.shape[0], key.shape[2])
        if attention_mask.shape != expected:
            raise ValueError(
                f"the 'pyaccel' attention got a mask of shape {tuple(attention_mask.shape)}: expected "
                f"[batch, keys] = {list(expected)}, or four dimensions that broadcast to [batch, heads, queries, "
                f"keys]; e.g. mask[:, None] for a mask [batch, queries, keys]"
            )
    groups = query.shape[1] // key.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1

    if kwargs.get("cu_seq_lens_q") is not None:
        return _packed_attention(query, key, value, attention_mask, dropout, scaling, causal, kwargs), None
    if causal and key.shape[2] > query.shape[2]:
        # A static cache whose end is still empty: as in transformers' SDPA attention, queries sit at its
        # beginning.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]

    config = getattr(module, "config", None)
    is_traced = torch.compiler.is_compiling()
    is_stock = module.training or (not is_traced and inside() is not None)
    weights = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    if weights or (is_eager and (is_stock or torch.is_grad_enabled())):
        mask = _four_dimensional(attention_mask)
        # transformers drops a mask that hides nothing, which decides the dtype under autocast.
        if mask is not None and mask is not attention_mask and torch.is_autocast_enabled(query.device.type):
            mask = None if _hides_nothing(mask) else mask
        mask = _additive(module, mask, query, key, causal)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        result: tuple[Tensor, Tensor | None] = eager_attention_forward(
            module, query, key, value, mask, scaling=scaling, dropout=dropout
        )
        return result
    if is_stock:
        mask = _four_dimensional(attention_mask)
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal, **kwargs)

    padding_alone = attention_mask is not None and attention_mask.dim() == 2
    context = ops.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if padding_alone else attention_mask,
        key_padding_mask=attention_mask if padding_alone else None,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=groups > 1,
    )
    return context.transpose(1, 2).contiguous(), None


def attention_forward_of_eager(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """As :func:`attention_forward`, with transformers' eager attention where that takes its SDPA attention, and
    wherever gradients are recorded."""
    return attention_forward(*args, is_eager=True, **kwargs)


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention over a batch of 1 in which the caller packed sequences, one behind the other."""
    missing = [name for name in ("cu_seq_lens_k", "max_length_q", "max_length_k") if kwargs.get(name) is None]
    reasons = [f"{name} is missing" for name in missing]
    if query.shape[0] != 1:
        reasons.append(f"the batch size is {query.shape[0]}, not 1")
    if attention_mask is not None:
        reasons.append("an attention_mask came with it")
    if kwargs.get("output_attentions"):
        reasons.append("output_attentions has no packed form")
    if reasons:
        raise ValueError(
            f"packed input (cu_seq_lens_q was passed) can't be served: {'; '.join(reasons)}. Expected one "
            f"row of packed tokens with cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, no mask"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, head_dim]
    context = ops.varlen_attention(
        q,
        k,
        v,
        kwargs["cu_seq_lens_q"].to(torch.int32),
        kwargs["cu_seq_lens_k"].to(torch.int32),
        int(kwargs["max_length_q"]),
        int(kwargs["max_length_k"]),
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
    )
    return context.unsqueeze(0)


def _hides_nothing(mask: Tensor) -> bool:
    """Whether it is known to let every query attend to every key; its values are read."""
    if torch.compiler.is_compiling() or inside() is not None or mask.is_meta:
        return False
    return bool(mask.all())


def _four_dimensional(mask: Tensor | None) -> Tensor | None:
    return mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask


def _additive(
    module: nn.Module, mask: Tensor | None, query: Tensor, key: Tensor, causal: bool
) -> Tensor | None:
    """The mask as transformers' eager attention takes it: 0 to attend, the dtype's minimum not to.

    In the dtype of the model, as theirs is: under autocast the scores are of fewer bits, and the sum is of its.
    """
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), query.dtype)
    return torch.where(mask, query.new_zeros((), dtype=dtype), torch.finfo(dtype).min)


def register() -> None:
    """Register attention and mask function under ``"pyaccel"`` and ``"pyaccel_eager"``. Again changes nothing."""
    for name, function in ((NAME, attention_forward), (EAGER, attention_forward_of_eager)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, attention_mask)
