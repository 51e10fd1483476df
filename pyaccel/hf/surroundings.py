"""What is around a call: transforms, traces and modes, and forwards of stock classes that were patched.

Inside a transform, a trace or another's mode nothing of a model may be built or changed: tensors there are stand-ins
that are gone when it ends, and what they record must be what the stock model does. Such a call runs the stock modules.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# Modes that count, cache or say where tensors are made, and act on every op alike: those of torch (FlopCounterMode,
# selective checkpointing, set_default_device and `with torch.device(...)`) and this package's own.
_HARMLESS = ("torch.utils.flop_counter", "torch.utils.checkpoint", "torch.utils._device", "pyaccel.")


def inside() -> str | None:
    """The transform, trace or mode that this call is inside of, in words; None for an ordinary call.

    ``torch.compile`` and ``torch.export`` are asked about first, by ``torch.compiler.is_compiling()``: the fast path's
    ops can be traced.
    """
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    modes: list[Any] = []
    if torch._C._len_torch_dispatch_stack():
        modes += _get_current_dispatch_mode_stack()
    if torch._C._len_torch_function_stack():
        modes += _get_current_function_mode_stack()
    for mode in modes:
        if not type(mode).__module__.startswith(_HARMLESS):
            return f"inside a {type(mode).__name__}"
    return None


@torch.compiler.assume_constant_result
def is_patched(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class of torch or transformers was replaced by one that was written elsewhere."""
    owner = next(each for each in kind.__mro__ if "forward" in each.__dict__)
    home = _place(getattr(sys.modules.get(owner.__module__), "__file__", None))
    function: Any = owner.__dict__["forward"]
    while True:
        code = getattr(function, "__code__", None)
        if code is None:
            return True
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None:
            return _place(code.co_filename) != home
        # transformers' own decorators are below its folder, such as that of gradient checkpointing.
        if not code.co_filename.startswith(_TRANSFORMERS):
            return True
        function = wrapped


_TRANSFORMERS = os.path.dirname(transformers.__file__) + os.sep


def _place(file: str | None) -> tuple[str, ...]:
    """Folder and name of a source file, wherever it was compiled and whatever its suffix."""
    return tuple(os.path.splitext(file)[0].split(os.sep)[-2:]) if file else ()
