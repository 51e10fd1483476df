"""The fast path: the same-named subclasses of transformers' encoders and layers that `accelerate` sets on instances.

A call takes the fast path, whose math is :mod:`pyaccel.nn.encoder_layer`, only if that gives what the stock modules
would give. `call_reason` asks about the call and :mod:`pyaccel.hf.guard` about the modules; whatever they
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

from pyaccel import dispatch, ops
from pyaccel.hf import attention, graphs
from pyaccel.hf.eligibility import call_reason, drops, not_packable
from pyaccel.hf.families import BY_FILE, FAMILIES, Family, Stock, stock
from pyaccel.hf.guard import Structure, are_its_own, has_opaque, is_sharded, unfit
from pyaccel.hf.report import Report
from pyaccel.models import evaluation
from pyaccel.nn import triton_layer
from pyaccel.nn.encoder_layer import encoder_layer, packed_attention
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
    skip_logits: bool = False

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
        "__module__": "pyaccel.hf",  # what pickles say: a name that stays wherever this file goes
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
    family = known.family
    output = getattr(modeling_outputs, family.output)

    @functools.wraps(known.encoder.forward)
    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        stock_forward = known.encoder.forward  # which may have been patched since
        attached: Attached | None = getattr(self, "_pyaccel", None)
        if attached is None:  # restored, while another object holds this method
            return stock_forward(self, hidden_states, attention_mask, *args, **kwargs)
        acceleration = attached.acceleration
        with acceleration.use_backend():
            if torch.compiler.is_compiling():
                return stock_forward(self, hidden_states, attention_mask, *args, **kwargs)
            plan: Structure | str | None
            if acceleration.cuda_graphs:
                plan = _graphed(known, self, hidden_states, attention_mask, args, kwargs)
                if not isinstance(plan, str):
                    hidden = _by_graph(self, family, plan, hidden_states, attention_mask)
                    return output(last_hidden_state=hidden)
                acceleration.report.not_graphed[plan] += 1
            if not acceleration.packing:
                return stock_forward(self, hidden_states, attention_mask, *args, **kwargs)
            plan = (
                attached.keeps_padding
                or call_reason(self, hidden_states, attention_mask, args, kwargs, packed=True)
                or not_packable(hidden_states, attention_mask, kwargs)
                or _structure(known, self, list(family.layers(self)))
            )
            if isinstance(plan, str):
                acceleration.report.not_packed[plan] += 1
                return stock_forward(self, hidden_states, attention_mask, *args, **kwargs)
            assert plan is not None  # it is None in a graph alone
            hidden = family.enter(self, hidden_states)
            if kwargs.get("cu_seq_lens_q") is not None:
                tokens = layout_from_cu_seqlens(
                    kwargs["cu_seq_lens_q"], int(kwargs["max_length_q"]), hidden.shape[1]
                )
                hidden = _run_layers(self, family, plan, hidden[0], tokens)[None]
            else:
                if attention_mask is None:
                    attention_mask = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
                # Position 0 is kept where it is padding too: poolers and heads read it whatever it is.
                tokens = layout(attention_mask, sort_by_length=True, keep_first=True)
                hidden = unpack(_run_layers(self, family, plan, pack(hidden, tokens), tokens), tokens)
            return output(last_hidden_state=hidden)

    return forward


def _run_layers(
    encoder: Any, family: Family, plan: Structure, hidden: Tensor, tokens: PackedLayout
) -> Tensor:
    straight, report = plan.straight, encoder._pyaccel.acceleration.report
    if not hidden.is_cpu:
        evaluation.forget(straight)
    if straight and evaluation.serves(straight, hidden, tokens):
        for layer in straight:
            hidden = layer(hidden, tokens.lengths)
        report.fast["packed"] += len(straight)
        report.prepacked += sum(layer.reordered is not None for layer in straight)
        return hidden
    if plan.by_triton and triton_layer.serves(plan.by_triton, hidden, tokens) and not _checkpoints(encoder):
        for each in plan.by_triton:
            hidden = each(hidden, tokens)
        report.fast["packed"] += len(plan.by_triton)
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
    report.fast["packed"] += count
    return hidden


def _checkpoints(encoder: Any) -> bool:
    """Whether a layer's call keeps no activations for the backward, but makes them again."""
    return encoder.training and any(
        getattr(layer, "gradient_checkpointing", False) for layer in encoder._pyaccel_family.layers(encoder)
    )


def _by_graph(encoder: Any, family: Family, plan: Structure, hidden: Tensor, mask: Tensor | None) -> Tensor:
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

    out, is_new = plan.graphs(family.enter(encoder, hidden), mask, run)
    report = attached.acceleration.report
    report.fast["by a graph"] += len(layers)
    report.captured += is_new
    return out


def _layer_forward(known: Stock) -> Callable[..., Any]:
    family = known.family

    @functools.wraps(known.layer.forward)
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | PackedLayout | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        stock_forward = known.layer.forward  # which may have been patched since
        attached: Attached | None = getattr(self, "_pyaccel", None)
        if attached is None:  # restored, while another object holds this method
            return stock_forward(self, hidden_states, attention_mask, *args, **kwargs)
        acceleration = attached.acceleration
        with acceleration.use_backend():
            if isinstance(attention_mask, PackedLayout):  # from our encoder, which has asked
                return run_layer(family, self, hidden_states, attention_mask)
            plan = call_reason(self, hidden_states, attention_mask, args, kwargs) or _structure(
                known, self, [self]
            )
            if not torch.compiler.is_compiling():  # counting would be a side effect in the graph
                if isinstance(plan, str):
                    acceleration.report.fallbacks[plan] += 1
                else:
                    acceleration.report.fast["padded"] += 1
            if isinstance(plan, str):
                return stock_forward(self, hidden_states, attention_mask, *args, **kwargs)
            return run_layer(family, self, hidden_states, attention_mask)

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


def _graphed(
    known: Stock,
    encoder: Any,
    hidden: Tensor,
    mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Structure | str:
    """The structure whose CUDA graphs serve this call, or why none can."""
    layers = list(known.family.layers(encoder))
    plan = (
        graphs.why_not(hidden)
        or call_reason(encoder, hidden, mask, args, kwargs)
        or not_packable(hidden, mask, kwargs)
        or _structure(known, encoder, layers)
    )
    assert plan is not None  # it is None in a graph alone
    if isinstance(plan, str):
        return plan
    if any(drops(known.family.view(layer)) for layer in layers):
        return "dropout"
    if plan.graphs is None:
        return "parts of the layers are called as they are, or watched, or sharded"
    return plan


def _structure(known: Stock, module: Any, layers: list[Any]) -> Structure | str | None:
    """What the modules are now, or why they can't take the fast path; cheap if nothing has changed.

    None in a graph that is compiled or exported, and fit: nothing is kept of what is in a graph.
    """
    attached = module._pyaccel
    if torch.compiler.is_compiling():
        return unfit(known, layers, around=module)
    present: Structure | None = attached.structure
    if present is not None and present.unchanged(module, layers):
        return present
    if reason := unfit(known, layers, around=module):
        return reason
    made = Structure(known, module, layers)
    if not are_its_own(layers):  # parameters that are lent for this call
        return made
    made.straight = _straight(
        known, layers, partial(evaluation.StraightLayer.of, prepack=attached.acceleration.prepack)
    )
    made.by_triton = _straight(known, layers, triton_layer.TritonLayer.of)
    if attached.acceleration.cuda_graphs and not any(is_sharded(x) or has_opaque(x) for x in layers):
        made.graphs = graphs.Graphs(made.modules)
    attached.structure = made
    return made


def _straight(known: Stock, layers: list[Any], make: Callable[[Any, nn.Module], Any]) -> list[Any]:
    """The layers as `make` makes them, past the hooks that `unfit` let be; none where one of them can't be run so."""
    straight = []
    for layer in layers:
        seen = known.family.view(layer)
        if is_sharded(layer) or seen.chunk_size_feed_forward:
            return []
        attention = next(part for part in layer.modules() if isinstance(part, known.attention))
        one = make(seen, attention)
        if one is None:
            return []
        straight.append(one)
    return straight


def layers_of(family: Family, module: Any) -> list[Any]:
    """The layers of an encoder, or the layer that ``module`` is."""
    return list(family.layers(module)) if is_encoder(module) else [module]
