"""Whether a call computes numbers now; private ops and raw memory are not for traces, transforms and modes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def runs_now(*tensors: Tensor | None) -> bool:
    """Whether these tensors hold memory of their own and the call is neither traced nor transformed.

    False in a graph (``torch.compile``, ``torch.export``, ``torch.jit.trace``), under a function transform (``vmap``,
    ``torch.func.grad``), in a dispatch mode (``FakeTensorMode``, ``FlopCounterMode``) and for tensor subclasses.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or type(t) in _PLAIN for t in tensors)
