"""Operators recorded as they are called, with their launches, FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pyaccel.cost.roofline import DeviceSpec


@dataclass(frozen=True)
class Step:
    """One call of an operator."""

    op: str
    launches: int
    activation_bytes: int
    parameter_bytes: int
    flops: int


@dataclass(frozen=True)
class Cost:
    """The steps of forward and backward (empty in evaluation), and the bytes of activations saved in between."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    saved_bytes: int

    @property
    def steps(self) -> tuple[Step, ...]:
        """Of forward and backward."""
        return (*self.forward, *self.backward)

    @property
    def forward_launches(self) -> int:
        return sum(step.launches for step in self.forward)

    @property
    def backward_launches(self) -> int:
        return sum(step.launches for step in self.backward)

    @property
    def activation_bytes(self) -> int:
        """What forward and backward read and write, parameters apart."""
        return sum(step.activation_bytes for step in (*self.forward, *self.backward))

    def seconds(self, card: DeviceSpec) -> float:
        """The least time on ``card``, without launches and their gaps."""
        return sum(
            max((step.activation_bytes + step.parameter_bytes) / card.bandwidth, step.flops / card.flops)
            for step in (*self.forward, *self.backward)
        )


_NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
}


def _attention_backward_launches(arguments: dict[str, Any]) -> int:
    from pyaccel.kernels.attention import config as attention_config

    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    shape = attention_config.AttentionShape(
        seq_q=arguments["seq_q"],
        seq_k=arguments["seq_k"],
        head_dim=max(query.shape[3], value.shape[3]),
        itemsize=query.element_size(),
        arch="sm_90",
        group=query.shape[1] // key.shape[1],
        has_mask=arguments["attn_mask"] is not None,
        has_dropout=arguments["dropout_key"] is not None,
    )
    if attention_config.attention_short("backward_short", shape) is not None:
        return 1
    split = attention_config.attention("dkey_dvalue", shape).split
    return 2 + split + bool(arguments["want_dmask"])


def _int8_matmul_launches(arguments: dict[str, Any]) -> int:
    """The product, the weight's row sums where there are offsets, and what finishes split or requantized sums."""
    from pyaccel.kernels.int8 import config as int8_matmul_config

    a, b = arguments["a"], arguments["b"]
    sizes = (a.shape[0], b.shape[0], a.shape[1])
    launch = int8_matmul_config.int8_matmul(*sizes[:2], "sm_90")
    split = int8_matmul_config.splits(*sizes, "sm_90", launch) > 1
    return 1 + (arguments["a_offset"] is not None) + (split or arguments["out_dtype"] is None)


def _launches(name: str, arguments: dict[str, Any]) -> int:
    """Launches of the operator ``name`` with these arguments by name."""
    if name == "pyaccel::attention_backward":
        return _attention_backward_launches(arguments)
    if name == "pyaccel::residual_layernorm_backward":
        columns = ("dweight_dtype", "dbias_dtype", "dx_bias_dtype")
        return 1 + any(arguments[n] is not None for n in columns)
    if name == "pyaccel::bias_gelu_backward":
        return 1 + bool(arguments["want_dbias"])
    if name == "pyaccel::linear_activation_backward":
        return 1 + (arguments["bias_dtype"] is not None)
    if name == "pyaccel::int8_matmul":
        return _int8_matmul_launches(arguments)
    # PyTorch's on CUDA: gradients of the rows, then of weight and bias; FlashAttention's: delta, gradients, dq's cast.
    return {
        "aten::native_layer_norm_backward": 2,
        "aten::_scaled_dot_product_flash_attention_backward": 3,
    }.get(name, 1)


def _flops(
    name: str,
    packet: Any,
    args: Any,
    kwargs: Any,
    arguments: dict[str, Any],
    out: Any,
    lengths: Sequence[int] | None,
) -> int:
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    formula = _our_flops().get(name)
    if formula is None:
        return 0
    function, given = formula
    flops = partial(function, *(arguments[each] for each in given))
    packed = arguments.get("cu_seqlens_q") is not None
    return flops(lengths=lengths) if packed else flops()


@cache
def _our_flops() -> dict[str, tuple[Callable[..., int], tuple[str, ...]]]:
    """Operator -> its formula, which stands beside it, and the names of the arguments that it takes."""
    from pyaccel.ops.attention import custom_ops as attention_ops
    from pyaccel.ops.int8 import triton as int8
    from pyaccel.ops.linear import triton as linear_triton

    attention = ("query", "value", "seq_k")
    return {
        "pyaccel::attention_forward": (attention_ops.forward_flops, attention),
        "pyaccel::attention_backward": (attention_ops.backward_flops, attention),
        "pyaccel::linear_activation_forward": (linear_triton.forward_flops, ("x", "weight")),
        "pyaccel::int8_matmul": (int8.matmul_flops, ("a", "b")),
    }


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


class Recorder(TorchDispatchMode):
    """Writes down every operator called inside.

    Args:
        parameters: their bytes, and those of what is made of them alone, are counted apart.
        lengths: of the sequences of packed input, whose offsets have no values here.
    """

    def __init__(self, parameters: Iterable[Tensor], lengths: Sequence[int] | None = None) -> None:
        super().__init__()
        self.lengths = lengths
        self.steps: list[Step] = []
        self._parameters = {_storage(p) for p in parameters}
        self._alive: list[Tensor] = []  # a storage that is freed could give its place to another one

    def is_parameter(self, t: Tensor) -> bool:
        return _storage(t) in self._parameters

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self._alive += outputs
        name = func.name().split(".")[0]
        given = {_storage(t) for t in inputs}
        is_view = bool(inputs) and not func._schema.is_mutable and {_storage(t) for t in outputs} <= given
        if not outputs or is_view or name.removeprefix("aten::") in _NO_LAUNCH:
            return out
        if inputs and all(self.is_parameter(t) for t in inputs):
            self._parameters |= {_storage(t) for t in outputs}
        arguments = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        tensors = [*inputs, *outputs]
        activations = sum(t.nbytes for t in tensors if not self.is_parameter(t))
        self.steps.append(
            Step(
                name,
                _launches(name, arguments),
                activations,
                sum(t.nbytes for t in tensors) - activations,
                _flops(name, func.overloadpacket, args, kwargs, arguments, out, self.lengths),
            )
        )
        return out


def measure(
    layer: torch.nn.Module,
    run: Callable[[Tensor], Tensor],
    hidden: Tensor,
    *,
    training: bool,
    lengths: Sequence[int] | None = None,
) -> Cost:
    """The cost of ``run(hidden)``, which calls ``layer``, and in training of its backward."""
    parameters = [p for p in layer.parameters() if p.requires_grad]
    layer.train(training)
    saved: dict[int, int] = {}
    recorder = Recorder([*layer.parameters(), *layer.buffers()], lengths)

    def save(t: Tensor) -> Tensor:
        if not recorder.is_parameter(t):
            saved[_storage(t)] = t.untyped_storage().nbytes()  # a view keeps all of it
        return t

    hidden = hidden.detach().requires_grad_(training)
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda t: t)
    with torch.set_grad_enabled(training), recorder, hooks:
        out = run(hidden)
        forward, recorder.steps = tuple(recorder.steps), []
    if training:
        grad = torch.empty_like(out)
        with recorder:
            torch.autograd.grad(out, (hidden, *parameters), grad, allow_unused=True)
    return Cost(forward, tuple(recorder.steps), sum(saved.values()))
