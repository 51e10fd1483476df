"""What a BERT layer costs, without a clock or a GPU: launches, bytes moved, bytes saved for backward, FLOPs.

The layers run on meta tensors, which have shapes and no data, and every operator they call is written down: ours and
those of transformers' layer in eager mode with SDPA, as a GPU would be asked for them (F.dropout and SDPA call other
operators there than on a CPU; here they call the GPU's). Views cost nothing, an operator reads its inputs and writes
its outputs once, and parameters (and what is made of parameters alone) are counted apart from activations.

The bound of Williams et al. (roofline; doi:10.1145/1498765.1498785) gives the least time for a card: for each operator
the greater of bytes over bandwidth and FLOPs over the rate of its matrix units. No card reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pyaccel import dispatch, ops
from pyaccel.models.bert import BertConfig, BertLayer
from pyaccel.nn import Int8Linear
from pyaccel.nn.encoder_layer import encoder_layer

STOCK, OURS, FUSED = "transformers, SDPA", "pyaccel", "pyaccel, fused product"
INT8 = "pyaccel, int8"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = ("evaluation", "training")


@dataclass(frozen=True)
class Card:
    """Datasheet rates: bytes a second of memory, dense 16-bit FLOPs a second of the matrix units."""

    bandwidth: float
    flops: float


CARDS = {
    "A100": Card(2.039e12, 312e12),
    "H100": Card(3.35e12, 989e12),
    "H200": Card(4.8e12, 989e12),
    "L4": Card(0.3e12, 121e12),
    "MI300X": Card(5.3e12, 1307e12),
}


@dataclass(frozen=True)
class LayerSize:
    """A layer and its input: batch and sequence without padding, hidden sizes, 16-bit or other floating dtype."""

    batch: int = 16
    seq: int = 128
    hidden: int = 768
    heads: int = 12
    intermediate: int = 3072
    dtype: torch.dtype = torch.bfloat16
    dropout_p: float = 0.1  # in training

    def __post_init__(self) -> None:
        if min(self.batch, self.seq, self.hidden, self.heads, self.intermediate) < 1:
            raise ValueError(f"every size must be at least 1, got {self}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden size {self.hidden} is not a multiple of {self.heads} heads")


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

    def seconds(self, card: Card) -> float:
        """The least time on ``card``, without launches and their gaps."""
        return sum(
            max((step.activation_bytes + step.parameter_bytes) / card.bandwidth, step.flops / card.flops)
            for step in (*self.forward, *self.backward)
        )


# --- launches and FLOPs of an operator ----------------------------------------------------------------------------
# One launch where nothing is said. A test counts those of our own ops as they run.

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
    from pyaccel.kernels import attention_config

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
    return 2 + split + arguments["want_dmask"]


def _int8_matmul_launches(arguments: dict[str, Any]) -> int:
    """The product, the weight's row sums where there are offsets, and what finishes split or requantised sums."""
    from pyaccel.kernels import int8_matmul_config

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
        return 1 + arguments["want_dbias"]
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
    return t.untyped_storage()._cdata


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


class AsOnCuda(TorchFunctionMode):
    """F.dropout and SDPA call the operators that they call for CUDA tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return _cuda_dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _cuda_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cuda_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0.0 else input


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        raise NotImplementedError("the cost of SDPA is known here without grouped heads only")
    if attn_mask is not None:  # flash attention takes none: the memory-efficient one does, as a bias
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
        bias = attn_mask.expand(*query.shape[:3], key.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        needs_lse = torch.is_grad_enabled() and query.requires_grad
        return efficient(query, key, value, bias, needs_lse, dropout_p, is_causal, scale=scale)[0]
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]


# --- layers -------------------------------------------------------------------------------------------------------


def _our_layer(size: LayerSize) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    config = BertConfig(
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        hidden_dropout_prob=size.dropout_p,
        attention_probs_dropout_prob=size.dropout_p,
    )
    layer = BertLayer(config)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout_p = size.dropout_p if layer.training else 0.0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        context = ops.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return context.transpose(1, 2).flatten(-2)

    return layer, lambda hidden: encoder_layer(layer, hidden, attend)


def _int8_layer(size: LayerSize, *, training: bool) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    """Deployed, with int8 weights; in training, with weights that each forward quantises."""
    layer, run = _our_layer(size)
    for name, module in list(layer.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, last = name.rpartition(".")
            int8 = Int8Linear.from_linear(module.to(size.dtype))
            setattr(layer.get_submodule(parent), last, int8 if training else int8.freeze())
    return layer, run


def _stock_layer(size: LayerSize) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    from transformers.models.bert import modeling_bert

    config = modeling_bert.BertConfig(
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        hidden_dropout_prob=size.dropout_p,
        attention_probs_dropout_prob=size.dropout_p,
    )
    config._attn_implementation = "sdpa"
    layer = modeling_bert.BertLayer(config)

    def run(hidden: Tensor) -> Tensor:
        with AsOnCuda():
            out = layer(hidden)
        return out[0] if isinstance(out, tuple) else out

    return layer, run


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


def layer_costs(size: LayerSize) -> dict[str, dict[str, Cost]]:
    """One BERT layer: by who computes it (:data:`STOCK`, :data:`OURS`, :data:`FUSED`, :data:`INT8`), then by mode.

    :data:`FUSED` takes the bias and GELU into the product, which isn't what dispatch chooses until it is measured.
    :data:`INT8` is dynamic, for 16-bit and fp32 activations.

    Raises:
        RuntimeError: triton isn't installed, and without it there are no kernels to count.
    """
    if not dispatch.has_triton():
        raise RuntimeError("triton isn't installed: pip install triton (Linux only; no GPU is needed)")
    costs: dict[str, dict[str, Cost]] = {}
    for name in (STOCK, OURS, FUSED, INT8):
        backend = "triton" if name == FUSED else "torch"
        with dispatch.use_backend("auto"), dispatch.use_backend(backend, ops=["linear_activation"]):
            costs[name] = {mode: _layer_cost(name, size, training=mode == "training") for mode in MODES}
    return costs


def _layer_cost(name: str, size: LayerSize, *, training: bool) -> Cost:
    with torch.device("meta"):
        if name == STOCK:
            layer, run = _stock_layer(size)
        elif name == INT8:
            layer, run = _int8_layer(size, training=training)
        else:
            layer, run = _our_layer(size)
        layer.to(size.dtype)
        hidden = torch.empty(size.batch, size.seq, size.hidden, dtype=size.dtype)
    return measure(layer, run, hidden, training=training)
