"""transformers' BERT modules with a fast path: the same-named subclasses that `accelerate` sets on instances.

A call takes the fast path, whose math is :func:`pyaccel.models.bert.encoder_layer`, only if that gives
what the stock modules would give. `_call_reason` asks about the call and :class:`Structure` about the
modules; whatever they refuse goes to the stock forward and is counted, with the reason.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert import modeling_bert as stock
from transformers.utils import output_capturing

from pyaccel import dispatch, ops
from pyaccel.hf import attention
from pyaccel.hf.report import Report
from pyaccel.models.bert import encoder_layer, packed_attention
from pyaccel.nn import Int8Linear, ObservedLinear
from pyaccel.packing import layout, pack, unpack

# An accelerated model's config says attn_implementation="pyaccel". Unpickled in a new process, such a
# model brings in this module and nothing else, so the registration belongs here.
attention.register()


@dataclass
class Acceleration:
    """What one call of `accelerate` set up; all modules that it swapped hold the same one."""

    packing: bool
    backend: str
    report: Report
    configs: list[tuple[Any, str]] = field(
        default_factory=list
    )  # config, its attention implementation before

    def use_backend(self) -> AbstractContextManager[object]:
        return nullcontext() if self.backend == "auto" else dispatch.use_backend(self.backend)


class Attached:
    """What a swapped module carries as `module._pyaccel`: copied and pickled with it, gone when restored."""

    def __init__(self, acceleration: Acceleration, config: Any) -> None:
        self.acceleration = acceleration
        self.config = config
        self.structure: Structure | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The structure is about these very modules. A copy starts without, and looks at its own.
        return Attached, (self.acceleration, self.config)


class BertEncoder(stock.BertEncoder):
    """All layers on packed tokens: padding is dropped before the first and put back after the last one."""

    _pyaccel: Attached

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor] | BaseModelOutputWithPastAndCrossAttentions:
        acceleration = self._pyaccel.acceleration
        with acceleration.use_backend():
            if acceleration.packing and not torch.compiler.is_compiling():
                reason = _not_packable(hidden_states) or _call_reason(
                    self, hidden_states, attention_mask, encoder_hidden_states, past_key_values, kwargs
                )
                reason = reason or _structure_reason(self, list(self.layer))
                if reason is None:
                    acceleration.report.fast["packed"] += len(self.layer)
                    return BaseModelOutputWithPastAndCrossAttentions(
                        last_hidden_state=self._packed_forward(hidden_states, attention_mask)
                    )
                acceleration.report.not_packed[reason] += 1
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )

    def _packed_forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        # Position 0 is kept where it is padding too: poolers and heads read it whatever it is.
        tokens = layout(attention_mask, sort_by_length=True, keep_first=True)
        hidden = pack(hidden_states, tokens)
        for layer in self.layer:
            hidden = encoder_layer(layer, hidden, partial(packed_attention, tokens=tokens))
        return unpack(hidden, tokens)


class BertLayer(stock.BertLayer):
    """One layer on padded hidden states, with the padding positions of the stock layer."""

    _pyaccel: Attached

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        acceleration = self._pyaccel.acceleration
        reason = _call_reason(
            self, hidden_states, attention_mask, encoder_hidden_states, past_key_values, kwargs
        ) or _structure_reason(self, [self])
        if not torch.compiler.is_compiling():  # counting would be a side effect in the graph
            if reason is None:
                acceleration.report.fast["padded"] += 1
            else:
                acceleration.report.fallbacks[reason] += 1
        with acceleration.use_backend():
            if reason is None:
                return encoder_layer(self, hidden_states, partial(padded_attention, attention_mask))
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )


SUBCLASSES: dict[type[nn.Module], type[nn.Module]] = {
    stock.BertEncoder: BertEncoder,
    stock.BertLayer: BertLayer,
}


def padded_attention(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[batch, seq, heads, head_dim]` -> `[batch, seq, hidden_size]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ops.scaled_dot_product_attention(q, k, v, key_padding_mask=mask).transpose(1, 2).flatten(-2)


# ---- the guard: what it lets through gives what the stock modules give ----


def _call_reason(
    module: BertEncoder | BertLayer,
    hidden: Tensor,
    mask: Tensor | None,
    encoder_hidden_states: Tensor | None,
    past_key_values: Any,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this call can't take the fast path, apart from how the modules are; None if it can."""
    config = module._pyaccel.config
    if module.training:
        return "training mode"
    if config._attn_implementation != attention.NAME:
        return f"the attention implementation is now {config._attn_implementation!r}"
    if kwargs.get("output_attentions", config.output_attentions):
        return "output_attentions"
    if past_key_values is not None:
        return "a key/value cache"
    if encoder_hidden_states is not None:
        return "cross attention"
    if kwargs.get("cu_seq_lens_q") is not None:
        return "input packed by the caller"
    if kwargs.get("is_causal"):
        return "is_causal"
    if mask is not None and (mask.dtype != torch.bool or mask.shape != hidden.shape[:2]):
        return f"an attention mask other than bool [batch, seq]: {mask.dtype} with {mask.dim()} dimensions"
    if torch.is_autocast_enabled(hidden.device.type):
        return "autocast"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if nn_module._has_any_global_hook() and any(_may_matter(hook) for hook in _global_hooks()):
        return "hooks on all modules"
    return None


def _not_packable(hidden: Tensor) -> str | None:
    """Why this call must keep its padding: the packed layout depends on the mask's values, sizes included."""
    if output_capturing._active_collector.get():
        return "hidden states or attentions are captured"
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if type(hidden) not in (Tensor, nn.Parameter) or hidden.is_meta:
        return f"hidden states are a {type(hidden).__name__} on {hidden.device.type}"
    return None


def _structure_reason(module: BertEncoder | BertLayer, layers: list[BertLayer]) -> str | None:
    """Why the modules as they are now can't take the fast path; None if they can, cheap if they could."""
    attached = module._pyaccel
    if torch.compiler.is_compiling():
        active = any(part.training for part in module.modules())
        return unfit(layers, around=module) or (_DROPOUT if active else None)
    if attached.structure is None or not attached.structure.unchanged():
        attached.structure = None
        if reason := unfit(layers, around=module):
            return reason
        attached.structure = Structure(module)
    return _DROPOUT if attached.structure.drops() else None


_DROPOUT = "dropout set to training mode alone"
_EXPECTED: dict[str, type[nn.Module]] = {
    "attention": stock.BertAttention,
    "attention.self": stock.BertSelfAttention,
    "attention.self.query": nn.Linear,
    "attention.self.key": nn.Linear,
    "attention.self.value": nn.Linear,
    "attention.self.dropout": nn.Dropout,
    "attention.output": stock.BertSelfOutput,
    "attention.output.dense": nn.Linear,
    "attention.output.LayerNorm": nn.LayerNorm,
    "attention.output.dropout": nn.Dropout,
    "intermediate": stock.BertIntermediate,
    "intermediate.dense": nn.Linear,
    "output": stock.BertOutput,
    "output.dense": nn.Linear,
    "output.LayerNorm": nn.LayerNorm,
    "output.dropout": nn.Dropout,
}
_ACTIVATION = "intermediate.intermediate_act_fn"
_PARAMETERS = {
    f"{name}.{parameter}"
    for name, kind in _EXPECTED.items()
    if kind in (nn.Linear, nn.LayerNorm)
    for parameter in ("weight", "bias")
}


def unfit(layers: list[Any], around: nn.Module) -> str | None:
    """Why these layers can't take the fast path, whatever the call; None if they can.

    `around` is the module whose forward replaces theirs: its own hooks run as ever, those inside would not.
    """
    for index, layer in enumerate(layers):
        where = "" if layer is around else f"layer.{index}: "
        if type(layer) not in (stock.BertLayer, BertLayer):
            return f"{where}it is a {type(layer).__name__}, not a BertLayer"
        modules = dict(layer.named_modules(remove_duplicate=False))
        found = {name: _kind(part) for name, part in modules.items() if name not in ("", _ACTIVATION)}
        if found != _EXPECTED:
            name = min(n for n in found.keys() | _EXPECTED.keys() if found.get(n) is not _EXPECTED.get(n))
            return f"{where}{name} is {_title(found.get(name))}, not {_title(_EXPECTED.get(name))}"
        for name, part in modules.items():
            if part is not around and (reason := _changed(part)):
                return f"{where}{name or 'the layer'} {reason}"
        parameters = dict(layer.named_parameters(remove_duplicate=False))
        if missing := _PARAMETERS - parameters.keys():
            return f"{where}{min(missing)} is not a parameter"
        for name, parameter in parameters.items():
            if reason := _special(parameter):
                return f"{where}{name} is {reason}"
        if len({p.dtype for p in parameters.values() if p.is_floating_point()}) > 1:
            return f"{where}its parameters are of several dtypes"
        heads = layer.attention.self
        if layer.is_decoder or heads.is_causal:
            return f"{where}it is a decoder layer"
        if layer.chunk_size_feed_forward:
            return f"{where}it has a chunk_size_feed_forward"
        if heads.scaling != heads.attention_head_size**-0.5:
            return f"{where}its attention is scaled by {heads.scaling}"
    return None


def _kind(module: nn.Module) -> type[nn.Module]:
    """Its class, where what `encoder_layer` runs in the place of an nn.Linear counts as one."""
    return nn.Linear if type(module) in (Int8Linear, ObservedLinear) else type(module)


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def _changed(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if any(_may_matter(hook) for hooks in _hooks(module) for hook in hooks.values()):
        return "has hooks"
    return None


# transformers leaves its capturing hooks in place for good, and they do nothing unless something is captured;
# torch's FlopCounterMode only looks where it is.
_HARMLESS = (output_capturing.__name__, "torch.utils.module_tracker")


def _may_matter(hook: Any) -> bool:
    return getattr(hook, "__module__", None) not in _HARMLESS


def _global_hooks() -> list[Any]:
    kinds = (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    )
    return [hook for hooks in kinds for hook in hooks.values()]


def _special(parameter: Tensor) -> str | None:
    if torch.compiler.is_compiling():  # export puts fake tensors in the place of parameters
        return "a tensor subclass" if is_traceable_wrapper_subclass(parameter) else None
    if type(parameter) not in (nn.Parameter, Tensor):
        return f"a {type(parameter).__name__}"
    return "on the meta device" if parameter.is_meta else None


def _title(kind: type | None) -> str:
    return "nothing" if kind is None else f"a {kind.__name__}"


class Structure:
    """What the modules inside `around` were when `unfit` found nothing: a change is noticed in microseconds.

    It covers all that `unfit` looks at and that other code changes in place: children, classes,
    attributes of instances, hooks, parameters, dtypes. The modules' own dicts are compared with copies of
    them, by identity of the items and in C. It holds no reference to `around`, which holds it: that cycle
    would keep a deleted model alive until the garbage collector comes by.
    """

    def __init__(self, around: nn.Module) -> None:
        self.modules = [part for part in around.modules() if part is not around]
        self.classes = list(map(type, self.modules))
        self.attributes = [part.__dict__ for part in self.modules]
        self.counts = list(map(len, self.attributes))
        self.children = [part._modules for part in around.modules() if part._modules]
        self.children_before = [dict(children) for children in self.children]
        self.parameters = [part._parameters for part in self.modules if part._parameters]
        self.parameters_before = [dict(parameters) for parameters in self.parameters]
        hooks = [kind for part in self.modules for kind in _hooks(part)]
        self.without_hooks = [kind for kind in hooks if not kind]
        self.with_hooks = [kind for kind in hooks if kind]  # transformers' own
        self.hook_counts = list(map(len, self.with_hooks))
        self.may_drop = [
            vars(part) for part in self.modules if isinstance(part, nn.Dropout | stock.BertSelfAttention)
        ]
        # Casting in place leaves the parameters the same objects. It is done to whole models or to the
        # LayerNorms.
        cast = (nn.LayerNorm, stock.BertSelfAttention)
        self.weights = [
            next(p for p in part.parameters() if p.is_floating_point())
            for part in self.modules
            if isinstance(part, cast)
        ]

    def unchanged(self) -> bool:
        """Whether all is as it was; False also where that can't be told."""
        try:
            return (
                not any(self.without_hooks)
                and list(map(len, self.with_hooks)) == self.hook_counts
                and list(map(type, self.modules)) == self.classes
                and list(map(len, self.attributes)) == self.counts
                and self.children == self.children_before
                and self.parameters == self.parameters_before
                and len(set(map(_DTYPE, self.weights))) == 1
            )
        except RuntimeError:  # a parameter was replaced: two tensors were compared, and that gives no bool
            return False

    def drops(self) -> bool:
        """Whether dropout is in training mode inside, which it may be alone (dropout at inference)."""
        return any(map(_TRAINING, self.may_drop))


_TRAINING = itemgetter("training")
_DTYPE = attrgetter("dtype")
