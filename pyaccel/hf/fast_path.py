"""The fast path: the same-named subclasses of transformers' encoders and layers that `accelerate` sets on instances.

A call takes the fast path, whose math is :func:`pyaccel.models.bert.encoder_layer`, only if that gives what the stock
modules would give. `_call_reason` asks about the call and :mod:`pyaccel.hf.guard` about the modules; whatever they
refuse goes to the stock forward and is counted, with the reason.

An encoder drops the padding before its first layer and puts it back after the last one. In between it calls its layers
as ever, so gradient checkpointing and FSDP2 act on them as ever, with packed hidden states and, in the mask's place,
the :class:`PackedLayout`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_outputs
from transformers.utils import output_capturing

from pyaccel import dispatch, ops
from pyaccel.hf import attention, graphs
from pyaccel.hf.families import BY_FILE, FAMILIES, Family, Stock, stock
from pyaccel.hf.guard import Structure, global_hooks_matter, has_opaque, is_sharded, unfit
from pyaccel.hf.report import Report
from pyaccel.models import evaluation
from pyaccel.models.bert import encoder_layer, packed_attention, share_qkv_storage
from pyaccel.packing import PackedLayout, layout, layout_from_cu_seqlens, pack, unpack

# An accelerated model's config says attn_implementation="pyaccel". Unpickled in a new process, such a
# model brings in this module and nothing else, so the registration belongs here.
attention.register()


@dataclass
class Acceleration:
    """What one call of `accelerate` set up; all modules that it swapped hold the same one."""

    packing: bool
    backend: str
    report: Report
    # A config, and its attention implementation before.
    configs: list[tuple[Any, str]] = field(default_factory=list)
    # Where `int8` was asked for: a module, the name of a layer in it, and that layer in floating point.
    floating: list[tuple[nn.Module, str, nn.Linear]] = field(default_factory=list)
    int8: str | None = None
    prepack: bool = False
    cuda_graphs: bool = False

    def use_backend(self) -> AbstractContextManager[object]:
        return nullcontext() if self.backend == "auto" else dispatch.use_backend(self.backend)


class Attached:
    """What a swapped module carries as `module._pyaccel`: copied and pickled with it, gone when restored.

    Attributes:
        keeps_padding: why this encoder must not drop its padding, whatever the call; None if it may.
        structure: what its modules were when they were last found fit.
    """

    def __init__(self, acceleration: Acceleration, config: Any, keeps_padding: str | None = None) -> None:
        self.acceleration = acceleration
        self.config = config
        self.keeps_padding = keeps_padding
        self.structure: Structure | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The structure is about these very modules. A copy starts without, and looks at its own.
        return Attached, (self.acceleration, self.config, self.keeps_padding)


# ---- the classes ----


@functools.cache
def subclasses(family: Family) -> tuple[type[nn.Module], type[nn.Module]]:
    """Our encoder and layer, in the place of a family's own."""
    known = stock(family)
    return (
        _subclass(family, known.encoder, _encoder_forward(known)),
        _subclass(family, known.layer, _layer_forward(known)),
    )


def subclass_for(family: Family, module: nn.Module) -> type[nn.Module] | None:
    """Ours, for a module of exactly a stock class."""
    known = stock(family)
    return dict(zip((known.encoder, known.layer), subclasses(family), strict=True)).get(type(module))


def family_of(module: nn.Module) -> Family | None:
    """The family whose encoder or layer this is, by a stock class, one of ours or one derived from either."""
    for kind in type(module).__mro__:
        family = BY_FILE.get(kind.__module__)
        if family is not None and kind.__name__ in (family.encoder, family.layer):
            return family
    return None


def is_encoder(module: Any) -> bool:
    family = family_of(module)
    return family is not None and isinstance(module, stock(family).encoder)


def _subclass(family: Family, base: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """A class of the same name. Two families have a `BertEncoder`, so pickle knows it by another one."""
    names = {
        "forward": forward,
        "_pyaccel_family": family,
        "__module__": __name__,
        "__qualname__": _qualified(family, base.__name__),
        "__doc__": f"transformers' {base.__name__} with a fast path.",
    }
    return type(base.__name__, (base,), names)


def _qualified(family: Family, name: str) -> str:
    return f"{family.module.split('.')[0]}_{name}"


def __getattr__(name: str) -> type[nn.Module]:
    """The classes by their qualified names, made when they are asked for: by pickle, that is."""
    for family in FAMILIES:
        if name == _qualified(family, family.encoder):
            return subclasses(family)[0]
        if name == _qualified(family, family.layer):
            return subclasses(family)[1]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- their forwards ----


def _encoder_forward(known: Stock) -> Callable[..., Any]:
    family, stock_forward = known.family, known.encoder.forward
    output = getattr(modeling_outputs, family.output)

    @functools.wraps(stock_forward)
    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        acceleration = self._pyaccel.acceleration
        with acceleration.use_backend():
            if torch.compiler.is_compiling():
                return stock_forward(self, hidden_states, attention_mask, *args, **kwargs)
            if acceleration.cuda_graphs:
                reason = _not_graphed(known, self, hidden_states, attention_mask, args, kwargs)
                if reason is None:
                    return output(last_hidden_state=_by_graph(self, family, hidden_states, attention_mask))
                acceleration.report.not_graphed[reason] += 1
            if not acceleration.packing:
                return stock_forward(self, hidden_states, attention_mask, *args, **kwargs)
            reason = (
                self._pyaccel.keeps_padding
                or _not_packable(hidden_states, attention_mask, kwargs)
                or _call_reason(self, hidden_states, attention_mask, args, kwargs, packed=True)
                or _structure_reason(known, self, list(family.layers(self)))
            )
            if reason is not None:
                acceleration.report.not_packed[reason] += 1
                return stock_forward(self, hidden_states, attention_mask, *args, **kwargs)
            hidden = family.enter(self, hidden_states)
            if kwargs.get("cu_seq_lens_q") is not None:
                tokens = layout_from_cu_seqlens(
                    kwargs["cu_seq_lens_q"], int(kwargs["max_length_q"]), hidden.shape[1]
                )
                hidden = _run_layers(self, family, hidden[0], tokens)[None]
            else:
                if attention_mask is None:
                    attention_mask = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
                # Position 0 is kept where it is padding too: poolers and heads read it whatever it is.
                tokens = layout(attention_mask, sort_by_length=True, keep_first=True)
                hidden = unpack(_run_layers(self, family, pack(hidden, tokens), tokens), tokens)
            return output(last_hidden_state=hidden)

    return forward


def _run_layers(encoder: Any, family: Family, hidden: Tensor, tokens: PackedLayout) -> Tensor:
    straight = encoder._pyaccel.structure.straight
    if not hidden.is_cpu:
        evaluation.forget(straight)
    if straight and evaluation.serves(straight, hidden, tokens):
        for layer in straight:
            hidden = layer(hidden, tokens.lengths)
        report = encoder._pyaccel.acceleration.report
        report.fast["packed"] += len(straight)
        report.prepacked += sum(layer.packed is not None for layer in straight)
        return hidden
    count = 0
    for layer in family.layers(encoder):
        # Called by its own forward where it is not a layer that was swapped: it has seen neither padding nor a mask.
        hidden = (
            layer(hidden, tokens)
            if "_pyaccel" in layer.__dict__
            else run_layer(family, layer, hidden, tokens)
        )
        count += 1
    encoder._pyaccel.acceleration.report.fast["packed"] += count
    return hidden


def _by_graph(encoder: Any, family: Family, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """All layers on the padded batch, in one CUDA graph; zeros in the padding where packing would leave them."""
    attached = encoder._pyaccel
    layers = list(family.layers(encoder))
    clears = attached.acceleration.packing and attached.keeps_padding is None

    def run(hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in layers:
            hidden = run_layer(family, layer, hidden, mask)
        if clears:
            read = mask.clone()
            read[:, 0] = True
            hidden = hidden.masked_fill(~read.unsqueeze(-1), 0.0)
        return hidden

    out, is_new = attached.structure.graphs(family.enter(encoder, hidden), mask, run)
    report = attached.acceleration.report
    report.fast["by a graph"] += len(layers)
    report.captured += is_new
    return out


def _layer_forward(known: Stock) -> Callable[..., Any]:
    family, stock_forward = known.family, known.layer.forward

    @functools.wraps(stock_forward)
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | PackedLayout | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        acceleration = self._pyaccel.acceleration
        with acceleration.use_backend():
            if isinstance(attention_mask, PackedLayout):  # from our encoder, which has asked
                return run_layer(family, self, hidden_states, attention_mask)
            reason = _call_reason(self, hidden_states, attention_mask, args, kwargs) or _structure_reason(
                known, self, [self]
            )
            if not torch.compiler.is_compiling():  # counting would be a side effect in the graph
                if reason is None:
                    acceleration.report.fast["padded"] += 1
                else:
                    acceleration.report.fallbacks[reason] += 1
            if reason is None:
                return run_layer(family, self, hidden_states, attention_mask)
            return stock_forward(self, hidden_states, attention_mask, *args, **kwargs)

    return forward


def run_layer(family: Family, layer: Any, hidden: Tensor, mask: Tensor | PackedLayout | None) -> Tensor:
    """The math of one layer, on packed or on padded hidden states."""
    seen = family.view(layer)
    heads = seen.attention.self
    dropout_p = heads.dropout.p if heads.training else 0.0
    chunk_size = seen.chunk_size_feed_forward  # positions of all rows
    if isinstance(mask, PackedLayout):
        attend = partial(packed_attention, tokens=mask, dropout_p=dropout_p)
        return encoder_layer(seen, hidden, attend, chunk_size=chunk_size * mask.batch_size)
    return encoder_layer(seen, hidden, partial(padded_attention, mask, dropout_p), chunk_size=chunk_size)


def padded_attention(mask: Tensor | None, dropout_p: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[batch, seq, heads, head_dim]` -> `[batch, seq, hidden_size]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    context = ops.scaled_dot_product_attention(q, k, v, key_padding_mask=mask, dropout_p=dropout_p)
    return context.transpose(1, 2).flatten(-2)


# ---- the guard: what it lets through gives what the stock modules give ----


def _call_reason(
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
    config = module._pyaccel.config
    given = {
        **dict(
            zip(("encoder_hidden_states", "encoder_attention_mask", "past_key_values"), args, strict=False)
        ),
        **kwargs,
    }
    if config._attn_implementation != attention.NAME:
        return f"the attention implementation is now {config._attn_implementation!r}"
    if given.get("output_attentions", config.output_attentions):
        return "output_attentions"
    if given.get("past_key_values") is not None:
        return "a key/value cache"
    if given.get("encoder_hidden_states") is not None:
        return "cross attention"
    if given.get("cu_seq_lens_q") is not None and not packed:
        return "input packed by the caller"
    if given.get("is_causal"):
        return "is_causal"
    if mask is not None and (mask.dtype != torch.bool or mask.shape != hidden.shape[:2]):
        return f"an attention mask other than bool [batch, seq]: {mask.dtype} with {mask.dim()} dimensions"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if global_hooks_matter():
        return "hooks on all modules"
    return None


def _not_packable(hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
    """Why this call must keep its padding: the packed layout depends on the mask's values, sizes included."""
    if graphs.on_gpu(hidden) and graphs.is_capturing():
        return "a CUDA graph is captured, in which nothing may wait for the device"
    if output_capturing._active_collector.get():
        return "hidden states or attentions are captured"
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if type(hidden) not in (Tensor, nn.Parameter) or hidden.is_meta:
        return f"hidden states are a {type(hidden).__name__} on {hidden.device.type}"
    if kwargs.get("cu_seq_lens_q") is None:
        return None
    if hidden.shape[0] != 1 or mask is not None or kwargs.get("max_length_q") is None:
        return "input packed by the caller, other than one row with max_length_q and no mask"
    return None


def _not_graphed(
    known: Stock,
    encoder: Any,
    hidden: Tensor,
    mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str | None:
    """Why this call can't be served by a CUDA graph; None if it can."""
    layers = list(known.family.layers(encoder))
    reason = (
        graphs.why_not(hidden)
        or _not_packable(hidden, mask, kwargs)
        or _call_reason(encoder, hidden, mask, args, kwargs)
        or _structure_reason(known, encoder, layers)
    )
    if reason is not None:
        return reason
    if any(_drops(known.family.view(layer)) for layer in layers):
        return "dropout"
    if encoder._pyaccel.structure.graphs is None:
        return "parts of the layers are called as they are, or watched, or sharded"
    return None


def _drops(layer: Any) -> bool:
    heads = layer.attention.self
    dropouts = (layer.attention.output.dropout, layer.output.dropout)
    return (heads.training and heads.dropout.p > 0.0) or any(d.training and d.p > 0.0 for d in dropouts)


def _structure_reason(known: Stock, module: Any, layers: list[Any]) -> str | None:
    """Why the modules as they are now can't take the fast path; None if they can, cheap if they could."""
    attached = module._pyaccel
    if torch.compiler.is_compiling():
        return unfit(known, layers, around=module)
    if attached.structure is None or not attached.structure.unchanged():
        attached.structure = None
        if reason := unfit(known, layers, around=module):
            return reason
        for layer in layers:
            _share_storage(known.family, layer)
        attached.structure = Structure(known, module)
        attached.structure.straight = _straight(known, layers, attached.acceleration.prepack)
        if attached.acceleration.cuda_graphs and not any(is_sharded(x) or has_opaque(x) for x in layers):
            attached.structure.graphs = graphs.Graphs(attached.structure.modules)
    return None


def _straight(known: Stock, layers: list[Any], prepack: bool) -> list[evaluation.StraightLayer]:
    """The layers in a straight line, past the hooks that `unfit` let be; none where one of them can't be run so."""
    straight = []
    for layer in layers:
        seen = known.family.view(layer)
        if is_sharded(layer) or seen.chunk_size_feed_forward:
            return []
        attention = next(part for part in layer.modules() if isinstance(part, known.attention))
        one = evaluation.StraightLayer.of(seen, attention, prepack=prepack)
        if one is None:
            return []
        straight.append(one)
    return straight


def _share_storage(family: Family, layer: Any) -> None:
    """Put the weights of query, key and value into one buffer, so that one product serves them without a copy.

    Not where others count on the storage that a weight has: FSDP, other processes, flat buffers of parameters.
    """
    heads = family.view(layer).attention.self
    linears = (heads.query, heads.key, heads.value)
    if is_sharded(layer) or any(type(linear) is not nn.Linear for linear in linears):
        return
    if all(_owns_its_storage(p) for linear in linears for p in linear.parameters()):
        with torch.inference_mode(False):
            share_qkv_storage(heads)


def _owns_its_storage(parameter: Tensor) -> bool:
    storage = parameter.untyped_storage()
    alone = storage.nbytes() == parameter.numel() * parameter.element_size()
    return alone and not (parameter.is_cpu and storage.is_shared())


def layers_of(family: Family, module: Any) -> list[Any]:
    """The layers of an encoder, or the layer that ``module`` is."""
    return list(family.layers(module)) if is_encoder(module) else [module]
