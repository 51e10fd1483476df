"""What every op's public function and backend share: autocast, rows, modes, gradients with memory of their own."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.library import CustomOpDef

_PLAIN = (Tensor, nn.Parameter)
_NUMBERS = (type(None), bool, int, float, str, torch.dtype)
_ONLY_PLAIN = frozenset((*_PLAIN, *_NUMBERS))
_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)

_Keys, _Key = torch._C.DispatchKeySet, torch._C.DispatchKey
# In eager mode, and in inference mode.
_PLAIN_KEYS = (_Keys(_Key.BackendSelect) | _Keys(_Key.ADInplaceOrView), _Keys(_Key.BackendSelect))


def on_host(x: Tensor) -> bool:
    """Whether a value of ``x`` may be read: it costs no device sync, and nothing records or transforms the call.

    False in a graph (``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``make_fx``), which would keep what the
    value was; under a ``torch.func`` transform, and for fake tensors and other subclasses, which may hold no value.
    """
    return x.is_cpu and not torch.compiler.is_compiling() and type(x) in _PLAIN and not _recorded()


def _recorded() -> bool:
    included = torch._C._dispatch_tls_local_include_set()
    if included in _PLAIN_KEYS:
        return False
    if torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    # Of torch.autograd.grad(is_grads_batched=True), whose tensors say that they are plain.
    if "VmapMode" in repr(included):
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)


def runs_now(*tensors: Tensor | None) -> bool:
    """Whether these tensors hold memory of their own and the call is neither traced nor transformed.

    False in a graph (``torch.compile``, ``torch.export``, ``torch.jit.trace``), under a function transform (``vmap``,
    ``torch.func.grad``), in a dispatch mode (``FakeTensorMode``, ``FlopCounterMode``) and for tensor subclasses.
    """
    return _nothing_traces() and _ONLY_PLAIN.issuperset(map(type, tensors))


def _nothing_traces() -> bool:
    """Whether this thread is in no graph that is made, no function transform and no dispatch mode."""
    # All of them but TorchDynamo say so in what the dispatcher includes.
    return (
        not torch.compiler.is_dynamo_compiling() and torch._C._dispatch_tls_local_include_set() in _PLAIN_KEYS
    )


def is_undisturbed(*args: Any) -> bool:
    """Whether nothing would notice if an op of these arguments ran without PyTorch's dispatcher.

    False where :func:`runs_now` is, under a torch function mode, which may replace operators, under a profiler, which
    shows them, and on meta tensors. The first argument is a tensor.
    """
    return (
        _nothing_traces()
        and _ONLY_PLAIN.issuperset(map(type, args))
        and not torch._C._len_torch_function_stack()
        and not torch.autograd._profiler_enabled()
        and not args[0].is_meta
    )


def runs_directly(*args: Any) -> bool:
    """Whether an op runs without the dispatcher: undisturbed, and where no gradients are recorded.

    Where they are, a registered op says that it has none.
    """
    return not torch.is_grad_enabled() and is_undisturbed(*args)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, without what that does for function transforms where there are none.

    Where a Function has a ``setup_context``, PyTorch binds the arguments to the signature of its ``forward`` in every
    call, which takes longer than a kernel launch.
    """
    if _nothing_traces():
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    return function.apply(*args)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast's products on ``device``; None where autocast is off or, as for meta, there is none.

    torch's own question is an error for a device that it doesn't know.
    """
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block in which ``device`` has no autocast."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


@functools.cache
def kernels(module: str) -> Any:
    """``pyaccel.kernels.MODULE``, imported when it is first asked for, since it imports Triton.

    An import statement in a function takes as long in every call as the allocation of a tensor.
    """
    return importlib.import_module(f"pyaccel.kernels.{module}")


def empty(x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """``x.new_empty(shape, dtype=dtype)``, which takes twice as long where it is told the dtype that x has."""
    return x.new_empty(*shape) if dtype is x.dtype else x.new_empty(shape, dtype=dtype)


def rows(x: Tensor) -> Tensor:
    """``[..., cols]`` as ``[rows, cols]``, without a copy where strides allow it; any size may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class _OwnGradient(torch.autograd.Function):
    """The identity, whose gradient is a copy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """x."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


def own_gradient(x: Tensor, other: Tensor) -> Tensor:
    """x, to be added to ``other``: autograd gives both terms of a sum one gradient, and here x's is a copy.

    Accumulating into the gradient of one leaf in place would change the other's where views hide from autograd that the
    two share memory.
    """
    if torch.is_grad_enabled() and x.requires_grad and other.requires_grad and runs_now(x, other):
        out: Tensor = _OwnGradient.apply(x)
        return out
    return x


def differentiable_once(op: Callable[..., Any], name: str, others: str) -> Callable[..., Any]:
    """``op``, a backward pass, whose own gradient is an error that says which backends have it.

    An autograd Function that ``torch.func`` can transform; ``custom_op.register_autograd`` makes one that it can't.
    """
    function = op.function if isinstance(op, Op) else op
    message = (
        f"pyaccel.ops.{name}: a double backward (the gradient of a gradient) was asked for, and only other backends "
        f"have one: {others}."
    )

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(message)

    def run(*args: Any) -> Any:
        if runs_directly(*args):  # a backward that is not to be differentiated records no gradients
            return function(*args)
        # AOTAutograd refuses a double backward itself, and TorchDynamo passes a ``forward`` of any arguments a context.
        return op(*args) if torch.compiler.is_compiling() else Once.apply(*args)

    return run


class Op:
    """A registered operator, which runs its function without the dispatcher where :func:`runs_directly` allows it.

    That takes no schema, no boxing of arguments and no look for aliases, a third of an op's host time.

    Attributes:
        function: what it runs. Of several results it gives None for those that aren't wanted.
        registered: the operator, which gives tensors of size 0 for them.
    """

    def __init__(self, function: Callable[..., Any], registered: CustomOpDef) -> None:
        self.function = function
        self.registered = registered

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if runs_directly(*args) else self.registered(*args)


def custom_op(name: str, outputs: Callable[..., Any]) -> Callable[[Callable[..., Any]], Op]:
    """Register a function that mutates nothing as an operator, with its fake.

    Args:
        name: ``"pyaccel::..."``.
        outputs: makes the op's empty results of some of its arguments, which it names as the op does; None for those
            that aren't wanted. Its annotation says how many there are.
    """
    wanted = tuple(inspect.signature(outputs).parameters)
    returned = get_type_hints(outputs)["return"]
    several = len(get_args(returned)) if returned is not Tensor else 0

    def register(function: Callable[..., Any]) -> Op:
        signature = inspect.signature(function)
        names = tuple(signature.parameters)
        places = tuple(names.index(each) for each in wanted)

        @functools.wraps(function)
        def complete(*args: Any) -> Any:
            return _completed(function(*args), args)

        # What a schema has room for.
        complete.__signature__ = signature.replace(  # type: ignore[attr-defined]
            return_annotation=tuple.__class_getitem__((Tensor,) * several) if several else Tensor
        )
        registered = torch.library.custom_op(name, complete, mutates_args=())
        registered.register_fake(lambda *args: _completed(outputs(*(args[place] for place in places)), args))
        return Op(function, registered)

    return register


def _completed(results: Any, args: tuple[Any, ...]) -> Any:
    """With a tensor of size 0 for each None."""
    if isinstance(results, Tensor):
        return results
    return tuple(args[0].new_empty(0) if t is None else t for t in results)
