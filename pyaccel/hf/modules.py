"""The same-named subclasses of transformers' encoders and layers that `accelerate` sets on instances.

Their forwards ask :mod:`pyaccel.hf.plan` for an executor, and run the stock forward where there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import modeling_outputs

from pyaccel.hf import attention
from pyaccel.hf.executors.packed import PackedCall, run_packed
from pyaccel.hf.families import FAMILIES, Family, Stock, stock
from pyaccel.hf.plan import scope, serve
from pyaccel.hf.state import AccelerationState

# An accelerated model's config says attn_implementation="pyaccel". Unpickled in a new process, such a
# model brings in this module and nothing else, so the registration belongs here.
attention.register()


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
    output = getattr(modeling_outputs, known.family.output)

    @functools.wraps(known.encoder.forward)
    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        state: AccelerationState | None = getattr(self, "_pyaccel", None)
        if state is not None:  # None: restored, while another object holds this method
            with scope(state.acceleration):
                hidden = serve(known, self, hidden_states, attention_mask, args, kwargs)
                if hidden is not None:
                    return output(last_hidden_state=hidden)
                return known.encoder.forward(self, hidden_states, attention_mask, *args, **kwargs)
        return known.encoder.forward(self, hidden_states, attention_mask, *args, **kwargs)

    return forward


def _layer_forward(known: Stock) -> Callable[..., Any]:
    @functools.wraps(known.layer.forward)
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | PackedCall | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        state: AccelerationState | None = getattr(self, "_pyaccel", None)
        if state is not None:
            with scope(state.acceleration):
                if isinstance(attention_mask, PackedCall):  # from our encoder, which has asked
                    return run_packed(known.family, self, hidden_states, attention_mask)
                hidden = serve(known, self, hidden_states, attention_mask, args, kwargs)
                if hidden is not None:
                    return hidden
                return known.layer.forward(self, hidden_states, attention_mask, *args, **kwargs)
        return known.layer.forward(self, hidden_states, attention_mask, *args, **kwargs)

    return forward
