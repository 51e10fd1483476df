"""Whether modules are what the fast path takes them for: a change anywhere in them sends a call to the stock forward.

:func:`unfit` looks at everything and says why not; :class:`Structure` notices in microseconds that nothing has changed
since it looked. What is particular to one call is asked in :mod:`pyaccel.hf.eligibility`.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import output_capturing

from pyaccel.hf.families import Family, Stock
from pyaccel.hf.surroundings import is_patched
from pyaccel.nn import Int8Linear, ObservedLinear
from pyaccel.nn.encoder_layer import activation_name


def unfit(stock: Stock, layers: list[Any], around: nn.Module, *, loaded: bool = True) -> str | None:
    """Why these layers can't take the fast path, whatever the call; None if they can.

    ``loaded=False`` is for a model whose weights may still be on the meta device, and come later.

    ``around`` is the module whose forward replaces theirs: its own hooks run as ever. Layers that an encoder calls run
    theirs too, but on packed hidden states, which is nothing for a hook that doesn't know.
    """
    family, expected = stock.family, stock.parts
    for index, layer in enumerate(dict.fromkeys(layers)):
        where = "" if layer is around else f"layer.{index}: "
        if not is_layer(family, layer):
            return f"{where}it is a {type(layer).__name__}, not a {family.layer}"
        if patched := next((kind for kind in _kinds(stock, layer) if is_patched(kind)), None):
            return f"{where}the forward of {patched.__name__} was patched"
        modules, parameters = _inside(layer)
        found = {path: _kind(part) for path, part in modules.items() if path not in ("", family.activation)}
        if found != expected:
            path = min(p for p in found.keys() | expected.keys() if found.get(p) is not expected.get(p))
            return f"{where}{path} is {_title(found.get(path), expected.get(path))}"
        for path, part in modules.items():
            if part is not around and (reason := _changed(part)):
                return f"{where}{path or 'the layer'} {reason}"
        if layer is around or not is_sharded(layer):
            needed = {path for path in stock.parameters if not _is_opaque(modules[path.rpartition(".")[0]])}
            if missing := needed - parameters.keys():
                return f"{where}{min(missing)} is not a parameter"
            for path, parameter in parameters.items():
                if reason := _special(parameter, loaded):
                    return f"{where}{path} is {reason}"
            if len({p.dtype for p in parameters.values() if p.is_floating_point()}) > 1:
                return f"{where}its parameters are of several dtypes"
        seen = family.view(layer)
        heads = seen.attention.self
        if seen.is_decoder or heads.is_causal:
            return f"{where}it is a decoder layer"
        if heads.scaling != heads.attention_head_size**-0.5:
            return f"{where}its attention is scaled by {heads.scaling}"
    inside = {id(part) for layer in layers for part in layer.modules()}
    for path, part in around.named_modules():  # what an encoder has besides its layers
        if part is not around and id(part) not in inside and (reason := _changed(part)):
            return f"{path} {reason}"
    return None


def _kinds(stock: Stock, layer: nn.Module) -> list[type[nn.Module]]:
    """The classes whose forwards the fast path stands in for; an activation that it doesn't know is called."""
    activation = attrgetter(stock.family.activation)(layer)  # a module or a function
    fused = [type(activation)] if activation_name(activation) else []
    return [*dict.fromkeys((stock.encoder, stock.layer, *stock.parts.values(), *fused))]


def _inside(layer: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """A layer's modules and parameters by their paths, without what is inside of those that are called as they are."""
    modules = dict(layer.named_modules(remove_duplicate=False))
    opaque = tuple(f"{path}." for path, part in modules.items() if _is_opaque(part))
    parameters = layer.named_parameters(remove_duplicate=False)
    return (
        {path: part for path, part in modules.items() if not path.startswith(opaque)},
        {path: parameter for path, parameter in parameters if not path.startswith(opaque)},
    )


# Called in the place of an nn.Linear, whose rows they treat one by one: a LoRA adapter and the layer it is around.
_OPAQUE = ("peft.tuners.lora.layer.Linear",)


def _is_opaque(module: nn.Module) -> bool:
    return f"{type(module).__module__}.{type(module).__qualname__}" in _OPAQUE


def has_opaque(layer: nn.Module) -> bool:
    """Whether something in it is called as it is, or does more than compute."""
    return any(_is_opaque(part) or type(part) is ObservedLinear for part in layer.modules())


def is_layer(family: Family, layer: nn.Module) -> bool:
    """Whether it is the family's own layer, stock or ours, or ours as FSDP2 makes it one of its own."""
    if is_sharded(layer):  # called with packed hidden states, which a stock layer doesn't know
        return getattr(type(layer).__mro__[2], "_pyaccel_family", None) is family
    kind = type(layer)
    return kind.__name__ == family.layer and (
        kind.__module__ == family.file or getattr(kind, "_pyaccel_family", None) is family
    )


def is_sharded(layer: nn.Module) -> bool:
    """Whether FSDP2 keeps its parameters: it puts them in their places before each call, by hooks of its own."""
    return f"{type(layer).__mro__[1].__module__}.{type(layer).__mro__[1].__name__}" in _FSDP_MODULES


_FSDP_MODULES = ("torch.distributed.fsdp.FSDPModule",)


def _kind(module: nn.Module) -> type[nn.Module]:
    """Its class, where what `encoder_layer` runs in the place of an nn.Linear counts as one."""
    return nn.Linear if type(module) in (Int8Linear, ObservedLinear) or _is_opaque(module) else type(module)


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
# torch's FlopCounterMode only looks where it is; FSDP2's look after parameters, whatever the shape of the input.
_HARMLESS = (output_capturing.__name__, "torch.utils.module_tracker", "torch.distributed.fsdp")


def _may_matter(hook: Any) -> bool:
    return not (getattr(hook, "__module__", None) or "").startswith(_HARMLESS)


def global_hooks_matter() -> bool:
    """Whether there are hooks on all modules that can tell whether a submodule was called."""
    kinds = (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    )
    return nn_module._has_any_global_hook() and any(_may_matter(h) for hooks in kinds for h in hooks.values())


def _special(parameter: Tensor, loaded: bool) -> str | None:
    if torch.compiler.is_compiling():  # export puts fake tensors in the place of parameters
        return "a tensor subclass" if is_traceable_wrapper_subclass(parameter) else None
    if type(parameter) not in (nn.Parameter, Tensor):
        return f"a {type(parameter).__name__}"
    return "on the meta device" if loaded and parameter.is_meta else None


def _title(kind: type | None, expected: type | None) -> str:
    names = ["nothing" if each is None else f"a {each.__name__}" for each in (kind, expected)]
    if kind is not None and names[0] == names[1]:
        names[0] = f"a {kind.__module__}.{kind.__qualname__}"
    return f"{names[0]}, not {names[1]}"


class Structure:
    """What the modules inside `around` were when `unfit` found nothing: a change is noticed in microseconds.

    It covers all that `unfit` looks at and that other code changes in place: layers, children, classes and their
    forwards, attributes of instances, hooks, parameters, dtypes. The modules' own dicts are compared with copies of
    them, by identity of the items and in C. It holds no reference to `around`, which holds it: that cycle
    would keep a deleted model alive until the garbage collector comes by.
    """

    def __init__(self, stock: Stock, around: nn.Module, layers: list[Any]) -> None:
        # For the fast path: made when this is, and good as long.
        self.straight: list[Any] = []
        self.by_triton: list[Any] = []
        self.graphs: Any = None
        self.layers = [layer for layer in layers if layer is not around]
        self.kinds = list(dict.fromkeys(kind for layer in layers for kind in _kinds(stock, layer)))
        self.forwards = [kind.forward for kind in self.kinds]
        self.modules = [part for part in around.modules() if part is not around]
        self.classes = list(map(type, self.modules))
        self.attributes = [part.__dict__ for part in self.modules]
        self.counts = list(map(len, self.attributes))
        self.options = [
            (part.__dict__, name)
            for part in self.modules
            if not isinstance(part, nn.Dropout)  # whose rate is read at every call
            for name in part.__dict__.keys() - _STATE
        ]
        self.options_before = [attributes[name] for attributes, name in self.options]
        self.own_options = [(name, around.__dict__[name]) for name in around.__dict__.keys() - _STATE]
        self.children = [part._modules for part in around.modules() if part._modules]
        self.children_before = [dict(children) for children in self.children]
        self.parameters = [part._parameters for part in self.modules if part._parameters]
        self.parameters_before = [dict(parameters) for parameters in self.parameters]
        hooks = [kind for part in self.modules for kind in _hooks(part)]
        self.without_hooks = [kind for kind in hooks if not kind]
        self.with_hooks = [kind for kind in hooks if kind]  # transformers' own
        self.hook_counts = list(map(len, self.with_hooks))
        # Casting in place leaves the parameters the same objects. It is done to whole models or to the
        # LayerNorms.
        cast = (nn.LayerNorm, stock.attention)
        self.weights = [
            next(p for p in part.parameters() if p.is_floating_point())
            for part in self.modules
            if isinstance(part, cast)
        ]

    def unchanged(self, around: nn.Module, layers: list[Any]) -> bool:
        """Whether all is as it was, the layers that run too; False also where that can't be told."""
        own = around.__dict__
        try:
            return (
                not any(self.without_hooks)
                and list(map(len, self.with_hooks)) == self.hook_counts
                and list(map(type, self.modules)) == self.classes
                and list(map(len, self.attributes)) == self.counts
                and [attributes[name] for attributes, name in self.options] == self.options_before
                and [(name, own[name]) for name, _ in self.own_options] == self.own_options
                and [kind.forward for kind in self.kinds] == self.forwards
                and (not self.layers or self.layers == layers)
                and self.children == self.children_before
                and self.parameters == self.parameters_before
                and len(set(map(_DTYPE, self.weights))) == 1
            )
        # An attribute is gone, or two tensors or arrays were compared, which gives no bool.
        except (KeyError, RuntimeError, ValueError):
            return False


_DTYPE = attrgetter("dtype")
# Attributes that every module has, and those that are this package's: compared in other ways, or free to change.
_STATE = {*nn.Module().__dict__, "_pyaccel"}


def are_its_own(layers: list[Any]) -> bool:
    """Whether a layer's parameters are those it keeps, not tensors that stand in for one call (functional_call)."""
    return all(
        type(p) is nn.Parameter for layer in layers if not is_sharded(layer) for p in layer.parameters()
    )
