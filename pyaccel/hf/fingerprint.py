"""What modules were when a plan was made of them: the one answer to "has anything changed since?".

:class:`ModuleFingerprint` covers what decides whether the fast path is right (:mod:`pyaccel.hf.eligibility`), and is
compared at each call. :func:`storage` and :func:`versions` cover values that an executor has kept: addresses of
weights in a CUDA graph, copies of weights in another order.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter, getitem, itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel.hf.eligibility import HOOKS, fused_methods
from pyaccel.hf.families import Stock, is_sharded

# Attributes that every module has, and those that are this package's: compared in other manners, or free to change.
_STATE = {*nn.Module().__dict__, "_pyaccel"}
_DTYPE, _DEVICE, _VERSION = map(attrgetter, ("dtype", "device", "_version"))
_DATA_PTR = methodcaller("data_ptr")
_HOOKS = itemgetter(*HOOKS)


class ModuleFingerprint:
    """The modules inside `around`, found eligible: a change is noticed in microseconds.

    It covers all that `ineligible_reason` looks at and that other code changes in place: layers, children, classes and
    their forwards, attributes of instances, hooks, parameters and buffers, dtypes and devices. The modules' own dicts
    are compared with copies of them, by identity of the items and in C. It holds no reference to `around`, which holds
    it: that cycle would keep a deleted model alive until the garbage collector comes by.

    Attributes:
        modules: those inside `around`.
        dtype, device: of the floating parameters; None where there are several.
    """

    def __init__(self, stock: Stock, around: nn.Module, layers: list[Any]) -> None:
        self.modules = [module for module in around.modules() if module is not around]
        # ALBERT's layers run in an order that its config says.
        config = getattr(around, "config", None)
        self._order = [name for name in ("num_hidden_layers", "num_hidden_groups") if hasattr(config, name)]
        self._order_before = [getattr(config, name) for name in self._order]
        methods = dict.fromkeys(each for layer in layers for each in fused_methods(stock, layer))
        self._methods = [kind for kind, _ in methods], [name for _, name in methods]
        self._methods_before = list(map(getattr, *self._methods))
        self._classes = list(map(type, self.modules))
        self._attributes = [module.__dict__ for module in self.modules]
        self._counts = list(map(len, self._attributes))
        options = [
            (module.__dict__, name)
            for module in self.modules
            if not isinstance(module, nn.Dropout)  # whose rate is read at every call
            for name in module.__dict__.keys() - _STATE
        ]
        self._dicts = [attributes for attributes, _ in options]
        self._names = [name for _, name in options]
        self._options = list(map(getitem, self._dicts, self._names))
        self._own_names = list(around.__dict__.keys() - _STATE)
        self._own_options = list(map(around.__dict__.__getitem__, self._own_names))
        self._own_count = len(around.__dict__)
        self._children = [module._modules for module in around.modules() if module._modules]
        self._children_before = [dict(children) for children in self._children]
        tensors = [(module._parameters, module._buffers) for module in self.modules]
        self._parameters = [dict_ for dicts in tensors for dict_ in dicts if dict_]
        self._parameters_before = [dict(parameters) for parameters in self._parameters]
        self._hooks = list(map(_HOOKS, self._attributes))
        hooks = [kind for kinds in self._hooks for kind in kinds]
        self._without_hooks = [kind for kind in hooks if not kind]
        self._with_hooks = [kind for kind in hooks if kind]  # transformers' own
        self._hooks_before = list(map(dict, self._with_hooks))
        # Moving or casting in place leaves the parameters the same objects. What FSDP2 keeps it moves itself.
        self._weights = list(
            dict.fromkeys(
                p
                for layer in layers
                if not is_sharded(layer)
                for p in layer.parameters()
                if p.is_floating_point()
            )
        )
        self._dtypes = list(map(_DTYPE, self._weights))
        self._devices = list(map(_DEVICE, self._weights))
        self.dtype: torch.dtype | None = self._dtypes[0] if len(set(self._dtypes)) == 1 else None
        self.device: torch.device | None = self._devices[0] if len(set(self._devices)) == 1 else None

    def matches(self, around: Any) -> bool:
        """Whether all is as it was; False also where that can't be told."""
        try:
            return (
                list(map(_HOOKS, self._attributes)) == self._hooks  # other code replaces whole dicts
                and not any(self._without_hooks)
                and self._with_hooks == self._hooks_before
                and list(map(type, self.modules)) == self._classes
                and list(map(len, self._attributes)) == self._counts
                and list(map(getitem, self._dicts, self._names)) == self._options
                # DataParallel's replicas share the state of what they are of, and have attributes more.
                and len(around.__dict__) == self._own_count
                and list(map(around.__dict__.__getitem__, self._own_names)) == self._own_options
                and list(map(getattr, *self._methods)) == self._methods_before
                and (
                    not self._order or [getattr(around.config, x) for x in self._order] == self._order_before
                )
                and self._children == self._children_before
                and self._parameters == self._parameters_before
                and list(map(_DTYPE, self._weights)) == self._dtypes
                and list(map(_DEVICE, self._weights)) == self._devices
            )
        # An attribute is gone, or two tensors or arrays were compared, which gives no bool.
        except (AttributeError, KeyError, RuntimeError, ValueError):
            return False


def storage(tensors: Iterable[Tensor]) -> list[int]:
    """Where tensors lie."""
    return list(map(_DATA_PTR, tensors))


def versions(tensors: list[Tensor]) -> list[int]:
    """Where tensors lie, and how many changes in place torch has counted in each.

    What is written through ``tensor.data`` torch doesn't count.
    """
    return [*map(_DATA_PTR, tensors), *map(_VERSION, tensors)]


def have_own_parameters(layers: list[Any]) -> bool:
    """Whether a layer's parameters are those it keeps, not tensors that stand in for one call (functional_call)."""
    return all(
        type(p) is nn.Parameter for layer in layers if not is_sharded(layer) for p in layer.parameters()
    )
