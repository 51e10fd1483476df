"""PyTorch's own samples of its ops, through pyaccel's functions: judged by the numerics policy, gradients too.

The samples are in torch itself; they need ``expecttest``. No checkout is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import ops
from pyaccel.verify.policy import judge_by_several

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Function = Callable[..., Any]


class NotOurs(Exception):
    """A sample that asks for what our function doesn't claim to do."""


def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    if len(shape) != 1:
        raise NotOurs("a norm over more than the last dimension")
    return ops.residual_layernorm(x, None, weight, bias, eps=eps)


def gelu(x: Tensor, approximate: str = "none") -> Any:
    if x.dim() == 0 or not x.shape[-1]:
        raise NotOurs("no features")
    return ops.bias_gelu(x, None, "gelu" if approximate == "none" else "gelu_tanh")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.dim() != 2:
        raise NotOurs("a weight that is a vector")
    return ops.linear_activation(x, weight, bias)


def cross_entropy(x: Tensor, target: Tensor, **options: Any) -> Any:
    """Logits are the hidden states, multiplied by the identity."""
    reduction, ignored = options.pop("reduction", "mean"), options.pop("ignore_index", -100)
    odd = any(isinstance(v, Tensor) or v not in (None, 0.0) for v in options.values())
    if x.dim() != 2 or target.is_floating_point() or odd:
        raise NotOurs("class weights, smoothing, probabilities or more dimensions")
    if reduction == "mean" and not (target != ignored).any():
        raise NotOurs("a mean of nothing: 0 by our definition")
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    loss = ops.masked_lm_cross_entropy(x, eye, None, target, reduction=reduction, ignore_index=ignored)
    return loss.to(x.dtype)  # ours is fp32


def embedding(weight: Tensor, ids: Tensor, **options: Any) -> Any:
    padding = options.pop("padding_idx", None)
    ids = ids if ids.dim() == 2 else ids.reshape(1, -1)
    if not weight.is_floating_point() or not ids.numel() or any(options.values()):
        raise NotOurs("max_norm, scaled or sparse gradients, or no ids")
    return ops.bert_embeddings(ids, weight, None, None, None, None, eps=1e-5, padding_idx=padding)


def stock_embedding(weight: Tensor, ids: Tensor, **options: Any) -> Any:
    ids = ids if ids.dim() == 2 else ids.reshape(1, -1)
    return F.layer_norm(F.embedding(ids, weight, **options), weight.shape[-1:], eps=1e-5)


def attention(*args: Any, **options: Any) -> Any:
    if options.get("dropout_p"):
        raise NotOurs("dropout, which is random")
    return ops.scaled_dot_product_attention(*args, **options)


def stock_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """In the four dimensions that PyTorch's CPU kernel serves: it does other sums for three."""
    rank = max(t.dim() for t in (query, key, value))
    four = (t[(None,) * (4 - t.dim())] for t in (query, key, value))
    return F.scaled_dot_product_attention(*four, *args, **options)[(0,) * (4 - rank)]


PAIRS: dict[str, tuple[Function, Function]] = {
    "nn.functional.scaled_dot_product_attention": (attention, stock_attention),
    "nn.functional.layer_norm": (layer_norm, F.layer_norm),
    "nn.functional.gelu": (gelu, F.gelu),
    "nn.functional.cross_entropy": (cross_entropy, F.cross_entropy),
    "nn.functional.linear": (linear, F.linear),
    "nn.functional.embedding": (embedding, stock_embedding),
}


def results(function: Function, sample: Any, dtype: torch.dtype, factor: float = 1.0) -> list[Tensor]:
    """The output and the gradients of all that has one, with operands multiplied by ``factor`` and cast."""
    leaves = []

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value
        scaled = value.detach() if factor == 1.0 else (value.detach() * factor).to(value.dtype)
        leaf = scaled.to(dtype).requires_grad_(value.requires_grad)
        leaves.append(leaf)
        return leaf

    args = [cast(a) for a in (sample.input, *sample.args)]
    out = function(*args, **{n: cast(v) for n, v in sample.kwargs.items()})
    wanted = [t for t in leaves if t.requires_grad]
    if not (wanted and out.requires_grad):
        return [out]
    dout = torch.linspace(-1.0, 2.0, out.numel(), dtype=torch.float64).view(out.shape)
    grads = torch.autograd.grad(out, wanted, dout.to(out.dtype), allow_unused=True)
    return [out, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True))]


def samples(name: str, dtype: torch.dtype) -> Iterator[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == name and not op.variant_test_name)
    yield from info.sample_inputs(torch.device("cpu"), dtype, requires_grad=True)


def right(found: list[Tensor], stock: Function, sample: Any, dtype: torch.dtype) -> bool:
    """Whether results are within the policy; of small tensors, whose errors are few draws, by several of stock's."""
    truth, naive = (results(stock, sample, d) for d in (torch.float64, dtype))
    others = [
        [
            a.double() - b
            for a, b in zip(*(results(stock, sample, d, f) for d in (dtype, torch.float64)), strict=True)
        ]
        for f in (0.97, 0.93, 0.89, 0.81, 0.77)
    ]
    if len(found) != len(truth):
        return False
    for i, (out, true, plain) in enumerate(zip(found, truth, naive, strict=True)):
        if (
            out.dtype != plain.dtype
            or out.shape != plain.shape
            or not torch.equal(out.isnan(), plain.isnan())
        ):
            return False
        nan = true.isnan() | plain.isnan()
        naives = [plain, *((true + other[i].nan_to_num()).to(plain.dtype) for other in others)]
        out, true, *naives = (t.detach().masked_fill(nan, 0.0) for t in (out, true, *naives))
        if out.numel() and not judge_by_several(out, true, naives).passed:
            return False
    return True


def run() -> tuple[dict[str, Counter[str]], list[str]]:
    """Counts of each op's samples, and what is wrong: one line a sample."""
    counts: dict[str, Counter[str]] = {}
    wrong = []
    for name, (ours, stock) in PAIRS.items():
        count = counts[name] = Counter()
        for dtype in DTYPES:
            for index, sample in enumerate(samples(name, dtype)):
                which = f"{name} {dtype} sample {index}"
                try:
                    found = results(ours, sample, dtype)
                except NotOurs:
                    count["skipped"] += 1
                    continue
                except Exception as error:  # to be counted, whatever it is
                    count["failed"] += 1
                    wrong.append(f"{which}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
                    continue
                passed = right(found, stock, sample, dtype)
                count["passed" if passed else "failed"] += 1
                if not passed:
                    wrong.append(f"{which}: outside the numerics policy")
    return counts, wrong
