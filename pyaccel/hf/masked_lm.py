"""The masked-language-model head in training: logits of masked tokens alone, unless somebody looks at the others.

transformers' heads multiply every token by the whole vocabulary and hand the logits to ``F.cross_entropy``, which
drops all but the masked ones, an eighth or so. Here the last Linear of a head gives :class:`DeferredLogits` in
training, which know how to be made: cross entropy takes from them what it needs
(:func:`pyaccel.ops.masked_lm_cross_entropy`), and any other use makes all of them, as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyaccel import ops
from pyaccel.ops._autocast import autocast_dtype


class _Product:
    """``F.linear(hidden, weight, bias)``, computed when it is asked for, under the autocast of its making."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.operands = (hidden, weight, bias)
        self.autocast = autocast_dtype(hidden.device)
        self.versions = self._versions()
        self.value: Tensor | None = None

    def _versions(self) -> list[int]:
        return [t._version for t in self.operands if t is not None]

    def compute(self) -> Tensor:
        if self.value is None:
            if self._versions() != self.versions:
                raise RuntimeError(
                    "the logits of this training step were not computed, as its loss needed those of masked tokens "
                    "alone, and the weights have changed since: read logits before optimizer.step()"
                )
            with torch.enable_grad(), self._as_before():
                self.value = F.linear(*self.operands)
        return self.value

    def cross_entropy(self, labels: Tensor, ignore_index: int, reduction: str, dtype: torch.dtype) -> Tensor:
        hidden, weight, bias = self.operands
        with self._as_before():
            loss = ops.masked_lm_cross_entropy(
                hidden.reshape(-1, hidden.shape[-1]),
                weight,
                bias,
                labels,
                ignore_index=ignore_index,
                reduction=reduction,
            )
        return loss if self.autocast is not None else loss.to(dtype)

    def _as_before(self) -> torch.autocast:
        kind = self.operands[0].device.type
        return torch.autocast(kind, self.autocast, enabled=self.autocast is not None)


class DeferredLogits(Tensor):
    """Logits ``[..., vocab]`` that no one has looked at yet. Whatever is done with them makes them first, except

    * ``F.cross_entropy`` with class labels: it makes those of the tokens that count;
    * ``view`` and ``reshape`` to other leading dimensions, ``float`` and ``to`` a dtype: still deferred.

    Raises RuntimeError where they are looked at after the weights have changed.
    """

    _product: _Product

    @staticmethod
    def __new__(cls, product: _Product, shape: torch.Size, dtype: torch.dtype) -> DeferredLogits:
        self: DeferredLogits = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=product.operands[0].device
        )
        self._product = product
        return self

    def made(self) -> Tensor:
        """The logits, as a plain tensor with a gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype = self.shape, self.dtype
        return self._product.compute().view(shape).to(dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _REQUIRES_GRAD:
            return any(t is not None and t.requires_grad for t in args[0]._product.operands)
        shortcut = _SHORTCUTS.get(func)
        if shortcut is not None and (result := shortcut(*args, **kwargs)) is not None:
            return result
        args, kwargs = tree_map(_made, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_made, (args, kwargs or {}))  # from C++, past __torch_function__
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.made().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.made().__deepcopy__(memo)


_REQUIRES_GRAD = vars(torch._C.TensorBase)["requires_grad"].__get__

# What is known of the logits without making them.
_ABOUT = {
    *(
        vars(torch._C.TensorBase)[name].__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse")
    ),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.__len__,
}


def _made(x: Any) -> Any:
    return x.made() if isinstance(x, DeferredLogits) else x


def _reshaped(logits: DeferredLogits, *sizes: Any, **kwargs: Any) -> DeferredLogits | None:
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    if (
        kwargs
        or not sizes
        or not all(isinstance(size, int) for size in sizes)
        or sizes[-1] != logits.shape[-1]
    ):
        return None
    shape = torch.empty(logits.shape, device="meta").view(sizes).shape  # its error where they don't fit
    return DeferredLogits(logits._product, shape, logits.dtype)


def _cast(logits: DeferredLogits, *args: Any, **kwargs: Any) -> DeferredLogits | None:
    dtype = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return None
    return DeferredLogits(logits._product, logits.shape, dtype)


def _float(logits: DeferredLogits, **kwargs: Any) -> DeferredLogits | None:
    return _cast(logits, torch.float32, **kwargs)


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    if not plain or not isinstance(input, DeferredLogits) or type(target) is not Tensor:
        return None
    if input.dim() != 2 or target.shape != input.shape[:1] or target.dtype != torch.int64:
        return None
    return input._product.cross_entropy(target, ignore_index, reduction, input.dtype)


_SHORTCUTS: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.view: _reshaped,
    Tensor.reshape: _reshaped,
    torch.reshape: _reshaped,
    Tensor.to: _cast,
    Tensor.float: _float,
    F.cross_entropy: _cross_entropy,
}


class Linear(nn.Linear):
    """The last layer of a masked-language-model head: in training its output is deferred."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()) or _is_watched(self, input):
            return super().forward(input)
        weight, bias = self.weight, self.bias
        dtype = autocast_dtype(input.device) or weight.dtype
        shape = torch.Size((*input.shape[:-1], weight.shape[0]))
        return DeferredLogits(_Product(input, weight, bias), shape, dtype)


def _is_watched(module: nn.Linear, input: Tensor) -> bool:
    """Whether somebody sees the output that isn't one of transformers' losses: hooks, graphs, function transforms."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or type(input) is not Tensor
        or type(module.weight) is not nn.Parameter
        or (input.dtype != module.weight.dtype and autocast_dtype(input.device) is None)
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
