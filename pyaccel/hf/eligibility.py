"""Why a call, or the modules it is of, can't take the fast path: every such question is here.

A call takes it only if that gives what the stock modules would give. :func:`call_reason` asks about the call,
:func:`ineligible_reason` about the modules; :class:`pyaccel.hf.fingerprint.ModuleFingerprint` notices in microseconds
that nothing has changed since the modules were asked about. What only one executor can't do, that executor says.

Inside a transform, a trace or another's mode nothing of a model may be built or changed: tensors there are stand-ins
that are gone when it ends, and what they record must be what the stock model does. Such a call runs the stock modules.
"""

from __future__ import annotations

import os
import sys
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_traceable_wrapper_subclass
from transformers.utils import output_capturing

from pyaccel.activations import activation_name
from pyaccel.hf.device import is_capturing
from pyaccel.hf.families import EAGER, NAMES, Stock, is_layer, is_opaque, is_sharded, kind_of
from pyaccel.packing import PackedLayout

# What BERT's layers and encoders take after the mask.
_POSITIONAL = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
_PLAIN = (Tensor, nn.Parameter)

# ---- the call ----


class Call:
    """One call of an encoder or a layer.

    Attributes:
        hidden: ``[batch, seq, hidden_size]``.
        mask: bool ``[batch, seq]`` where the call is eligible, or None: all are tokens.
        kwargs: what else was given, by name.
        is_packed: the caller has packed the sequences into one row.
        keeps_padding: why its padding must not be dropped, once it was asked; None: it may.
        tokens: where the tokens are, once it was asked.
        graph: which CUDA graph is of its size, once it was asked.
    """

    def __init__(
        self, hidden: Tensor, mask: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.hidden = hidden
        self.mask = mask
        self.keeps_padding: str | None = None
        self.tokens: PackedLayout | None = None
        self.graph: tuple[Any, ...] = ()
        self.kwargs = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs} if args else kwargs
        self.is_packed = kwargs.get("cu_seq_lens_q") is not None


def call_reason(config: Any, call: Call) -> str | None:
    """Why no executor can serve this call, apart from how the modules are; None if one can.

    ``config`` is that of the module that is called.
    """
    hidden, mask, given = call.hidden, call.mask, call.kwargs
    if not torch.compiler.is_compiling():
        if reason := inside():
            return reason
        if type(hidden) not in _PLAIN:
            return f"hidden states are a {type(hidden).__name__}"
    implementation = config._attn_implementation
    if implementation not in NAMES:
        return f"the attention implementation is now {implementation!r}"
    if implementation == EAGER and torch.is_grad_enabled():
        return "the model was made with eager attention, whose gradients can be differentiated again"
    if given.get("output_attentions", config.output_attentions):
        return "output_attentions"
    # Before transformers 5.24, and since.
    if given.get("past_key_values") is not None or given.get("cache") is not None:
        return "a key/value cache"
    if given.get("encoder_hidden_states") is not None:
        return "cross attention"
    if given.get("is_causal"):
        return "is_causal"
    if mask is not None and (mask.dtype != torch.bool or mask.shape != hidden.shape[:2]):
        return f"an attention mask other than bool [batch, seq]: {mask.dtype} with {mask.dim()} dimensions"
    if nn_module._has_any_global_hook() and has_foreign_global_hooks():
        return "hooks on all modules"
    return None


def not_packable(call: Call) -> str | None:
    """Why this call must keep its padding: the packed layout depends on the mask's values, sizes included."""
    hidden = call.hidden
    if hidden.is_cuda and is_capturing():
        return "a CUDA graph is captured, in which nothing may wait for the device"
    if output_capturing._active_collector.get():
        return "hidden states or attentions are captured"
    if hidden.is_meta:
        return "hidden states are on the meta device"
    if not call.is_packed:
        return None
    if hidden.shape[0] != 1 or call.mask is not None or call.kwargs.get("max_length_q") is None:
        return "input packed by the caller, other than one row with max_length_q and no mask"
    return None


def drops(layer: Any) -> bool:
    """Whether some dropout acts in this layer, given under BERT's names."""
    heads = layer.attention.self
    dropouts = (layer.attention.output.dropout, layer.output.dropout)
    return (heads.training and heads.dropout.p > 0.0) or any(d.training and d.p > 0.0 for d in dropouts)


# ---- what is around a call ----

# Modes that count, cache or say where tensors are made, and act on every op alike: those of torch (FlopCounterMode,
# selective checkpointing, set_default_device and `with torch.device(...)`) and this package's own.
_HARMLESS_MODES = ("torch.utils.flop_counter", "torch.utils.checkpoint", "torch.utils._device", "pyaccel.")


def inside() -> str | None:
    """The transform, trace or mode that this call is inside of, in words; None for an ordinary call.

    ``torch.compile`` and ``torch.export`` are asked about first, by ``torch.compiler.is_compiling()``: the fast path's
    ops can be traced.
    """
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "inside a level of forward-mode differentiation"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    modes: list[Any] = []
    if torch._C._len_torch_dispatch_stack():
        modes += _get_current_dispatch_mode_stack()
    if torch._C._len_torch_function_stack():
        modes += _get_current_function_mode_stack()
    for mode in modes:
        if not type(mode).__module__.startswith(_HARMLESS_MODES):
            return f"inside a {type(mode).__name__}"
    return None


# What the fast path stands in for: a module's forward, and the methods that it calls.
METHODS = ("forward", "feed_forward_chunk", "ff_chunk")


def is_patched(kind: type[nn.Module], method: str = "forward") -> bool:
    """Whether a method of a class of torch or transformers was replaced by one that was written elsewhere."""
    owner = next(each for each in kind.__mro__ if method in each.__dict__)
    home = _place(getattr(sys.modules.get(owner.__module__), "__file__", None))
    function: Any = owner.__dict__[method]
    while True:
        code = getattr(function, "__code__", None)
        if code is None:
            return True
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None:
            return _place(code.co_filename) != home
        # transformers has decorators of its own, such as that of gradient checkpointing.
        if not function.__globals__["__name__"].startswith("transformers."):
            return True
        function = wrapped


torch.compiler.assume_constant_result(is_patched)  # it marks the function


def _place(file: str | None) -> tuple[str, ...]:
    """Folder and name of a source file, wherever it was compiled and whatever its suffix."""
    return tuple(os.path.splitext(file)[0].split(os.sep)[-2:]) if file else ()


# ---- the modules ----


def ineligible_reason(
    stock: Stock, layers: list[Any], around: nn.Module, *, loaded: bool = True
) -> str | None:
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
        for kind, method in fused_methods(stock, layer):
            if is_patched(kind, method):
                return f"{where}the {method} of {kind.__name__} was patched"
        modules, parameters = _inside(layer)
        found = {
            path: kind_of(module) for path, module in modules.items() if path not in ("", family.activation)
        }
        if found != expected:
            path = min(p for p in found.keys() | expected.keys() if found.get(p) is not expected.get(p))
            return f"{where}{path} is {_title(found.get(path), expected.get(path))}"
        for path, module in modules.items():
            if reason := change_of(module, around):
                return f"{where}{path or 'the layer'} {reason}"
        if layer is around or not is_sharded(layer):
            needed = {path for path in stock.parameters if not is_opaque(modules[path.rpartition(".")[0]])}
            if missing := needed - parameters.keys():
                return f"{where}{min(missing)} is not a parameter"
            for path, parameter in parameters.items():
                if reason := special(parameter, loaded):
                    return f"{where}{path} is {reason}"
            if len({p.dtype for p in parameters.values() if p.is_floating_point()}) > 1:
                return f"{where}its parameters are of several dtypes"
        view = family.view(layer)
        heads = view.attention.self
        if view.is_decoder or heads.is_causal:
            return f"{where}it is a decoder layer"
        if heads.scaling != heads.attention_head_size**-0.5:
            return f"{where}its attention is scaled by {heads.scaling}"
    inside_layers = {id(module) for layer in layers for module in layer.modules()}
    for path, module in around.named_modules():  # what an encoder has besides its layers
        if id(module) not in inside_layers and (reason := change_of(module, around)):
            return f"{path} {reason}"
    return None


def fused_methods(stock: Stock, layer: nn.Module) -> list[tuple[type[nn.Module], str]]:
    """The methods of classes that the fast path stands in for; an activation that it doesn't know is called."""
    activation = attrgetter(stock.family.activation)(layer)  # a module or a function
    fused = [type(activation)] if activation_name(activation) else []
    kinds = dict.fromkeys((stock.encoder, stock.layer, *stock.parts.values(), *fused))
    return [(kind, method) for kind in kinds for method in METHODS if hasattr(kind, method)]


def _inside(layer: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """A layer's modules and parameters by their paths, without those inside of opaque modules."""
    modules = dict(layer.named_modules(remove_duplicate=False))
    opaque = tuple(f"{path}." for path, module in modules.items() if is_opaque(module))
    parameters = layer.named_parameters(remove_duplicate=False)
    return (
        {path: module for path, module in modules.items() if not path.startswith(opaque)},
        {path: parameter for path, parameter in parameters if not path.startswith(opaque)},
    )


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def change_of(module: nn.Module, around: nn.Module | None = None) -> str | None:
    """What would notice that a module is not called, or is called otherwise; None if nothing."""
    # That of `around` itself is what is called, and its hooks run as ever.
    methods = METHODS[1:] if module is around else METHODS
    if method := next((each for each in methods if each in module.__dict__), None):
        return f"has a {method} of its own"
    if module is around:
        return None
    if any(is_foreign_hook(hook) for kind in HOOKS for hook in getattr(module, kind).values()):
        return "has hooks"
    return None


# transformers leaves its capturing hooks in place for good, and they do nothing unless something is captured;
# torch's FlopCounterMode only looks where it is; FSDP2's look after parameters, whatever the shape of the input.
_HARMLESS = (output_capturing.__name__, "torch.utils.module_tracker", "torch.distributed.fsdp")


def is_foreign_hook(hook: Any) -> bool:
    return not (getattr(hook, "__module__", None) or "").startswith(_HARMLESS)


def has_foreign_global_hooks() -> bool:
    """Whether there are hooks on all modules that can tell whether a submodule was called."""
    kinds = (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    )
    return nn_module._has_any_global_hook() and any(
        is_foreign_hook(h) for hooks in kinds for h in hooks.values()
    )


def special(parameter: Tensor, loaded: bool = True) -> str | None:
    """What a parameter is that can't be used as a plain one; None if it can."""
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
