"""Calls of every public op by chance, and what each one's definition says that it gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyaccel import ops, reference
from tests.fuzz.draw import KINDS, Draw

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")
Arguments = dict[str, Any]
# Named outputs. Of a definition "codes" are the values to be quantized; "exact" outputs are compared by bits.
Outputs = dict[str, Tensor]


@dataclass
class Call:
    """One call of an op.

    Attributes:
        op: name in :mod:`pyaccel.ops`.
        arguments: by name; what is a tensor may be of any strides.
        wants: the names of the tensors whose gradients are asked for.
        dropout: whether a mask is drawn.
    """

    op: str
    arguments: Arguments
    wants: list[str] = field(default_factory=list)
    dropout: bool = False

    def __str__(self) -> str:
        def say(value: Any) -> str:
            if not isinstance(value, Tensor):
                return repr(value)
            strides = "" if value.is_contiguous() else f" by {tuple(value.stride())}"
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strides}"

        given = ", ".join(f"{name}={say(value)}" for name, value in self.arguments.items())
        return f"{self.op}({given})" + (f", gradients of {', '.join(self.wants)}" if self.wants else "")


def floating(draw: Draw, wide: bool = True) -> torch.dtype:
    return draw.pick(F32, F32, F16, BF16, BF16, *([F64] if wide and draw.chance(0.2) else []))


def kind(draw: Draw, *, likely: float = 0.25) -> str:
    return draw.pick(*KINDS) if draw.chance(likely) else ""


def leading(draw: Draw) -> tuple[int, ...]:
    """A leading shape; few rows, since the interpreter takes its time for each."""
    rank = draw.pick(0, 1, 1, 2, 2, 3)
    shape = [
        draw.size() if rank == 1 else draw.pick(0, 1, 2, 3, 5) if draw.chance(0.2) else 2 for _ in range(rank)
    ]
    return tuple(shape)


def maybe(draw: Draw, p: float, make: Callable[[], Any]) -> Any:
    return make() if draw.chance(p) else None


def spoil_some(draw: Draw, arguments: Arguments, names: tuple[str, ...], p: float = 0.08) -> None:
    """NaN or infinities in one of the tensors of those names, now and then.

    Of queries and keys NaN alone: an infinite one makes scores of -inf, which PyTorch's kernels and ours take for
    masked.
    """
    if draw.chance(p):
        name = draw.pick(*names)
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            spoiled = draw.spoiled(value.clone())
            if name in ("query", "key"):
                spoiled = spoiled.masked_fill(spoiled.isinf(), math.nan)
            arguments[name] = draw.place(name, spoiled)


def wanted(draw: Draw, arguments: Arguments, names: tuple[str, ...], p: float = 0.6) -> list[str]:
    if not draw.chance(p):
        return []
    return [
        n
        for n in names
        if isinstance(arguments.get(n), Tensor)
        and arguments[n].is_floating_point()
        and (n == names[0] or draw.chance(0.75))
    ]


def dropout_of(given: Arguments) -> float:
    """Take the options of dropout out of ``given``; what p comes to."""
    p, training = given.pop("dropout_p", 0.0), given.pop("training", False)
    return float(p) if training else 0.0


# --- residual_layernorm ----------------------------------------------------------------------------------------


def draw_residual_layernorm(draw: Draw) -> Call:
    dtype, hidden = floating(draw), max(draw.size(), 1)
    shape = (*leading(draw), hidden)
    other = dtype if draw.chance(0.6) else draw.pick(F32, BF16, F16)
    vectors = dtype if draw.chance(0.6) else draw.pick(F32, BF16, F16)
    given: Arguments = {
        "x": draw.tensor("x", shape, dtype, kind=kind(draw)),
        "residual": maybe(draw, 0.7, lambda: draw.tensor("residual", shape, other, kind=kind(draw, likely=0.1))),
        "weight": maybe(draw, 0.8, lambda: draw.tensor("weight", (hidden,), vectors)),
        "bias": maybe(draw, 0.8, lambda: draw.tensor("bias", (hidden,), vectors)),
        "eps": draw.pick(1e-12, 1e-5, 1e-6, 0.1),
    }  # fmt: skip
    if draw.chance(0.4):
        given["x_bias"] = draw.tensor("x_bias", (hidden,), vectors)
    if draw.chance(0.3):
        given |= {"dropout_p": draw.pick(0.1, 0.5, 0.9, 1.0), "training": draw.chance(0.8)}
    if draw.chance(0.2):
        given["rms_norm"] = True
    if draw.chance(0.3):
        given["return_sum"] = True
    if draw.chance(0.2):
        given["quantize_output"] = True
        given["return_output"] = draw.chance(0.5)
    elif given.get("return_sum") and draw.chance(0.3):
        given["return_output"] = False
    spoil_some(draw, given, ("x", "residual", "weight", "bias"))
    wants = wanted(draw, given, ("x", "residual", "weight", "bias", "x_bias"))
    if wants and given.get("quantize_output") and not given.get("return_sum") and not given["return_output"]:
        wants = []
    active = given.get("training", False) and given.get("dropout_p", 0.0) > 0.0
    return Call("residual_layernorm", given, wants, active)


def define_residual_layernorm(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    given = dict(given)
    wants = [("output", given.pop("return_output", True)), ("sum", given.pop("return_sum", False))]
    quantize = given.pop("quantize_output", False)
    p = dropout_of(given)
    made = reference.residual_layernorm(**given, dropout_p=p, dropout_key=key, upcast=upcast)
    outputs = {name: getattr(made, name) for name, want in wants if want}
    if quantize:
        wide = made.output
        if not upcast:
            wide = reference.residual_layernorm(
                **given, dropout_p=p, dropout_key=key, upcast=False, out_dtype=F32
            ).output
        outputs |= quantized(wide.detach())
    return outputs


def quantized(x: Tensor) -> Outputs:
    """What codes stand for, and their scales."""
    amax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    return {"codes": x, "scales": torch.where(amax / 127 == 0, 1.0, amax / 127)}


def name_residual_layernorm(given: Arguments, result: Any) -> Outputs:
    names = ["output"] if given.get("return_output", True) else []
    names += ["sum"] if given.get("return_sum") else []
    names += ["codes", "scales"] if given.get("quantize_output") else []
    return dict(zip(names, result if isinstance(result, tuple) else (result,), strict=True))


# --- attention -------------------------------------------------------------------------------------------------


def draw_attention_inputs(draw: Draw) -> tuple[Arguments, tuple[int, int, int, int]]:
    dtype = floating(draw)
    batch, heads = draw.pick(1, 1, 2, 3), draw.pick(1, 2, 3, 4)
    if draw.chance(0.02):
        batch = 0
    seq_q, seq_k = draw.size(), draw.size()
    if draw.chance(0.6):
        seq_k = seq_q
    dim = draw.pick(1, 3, 8, 16, 17, 32)
    value_dim = dim if draw.chance(0.8) else draw.pick(1, 8, 24)
    given: Arguments = {}
    kv_heads = heads
    if draw.chance(0.2):
        kv_heads = draw.pick(*(n for n in (1, 2, heads) if heads % n == 0))
        if kv_heads not in (1, heads) or draw.chance(0.5):
            given["enable_gqa"] = True
    rank = 4 if draw.chance(0.85) else draw.pick(2, 3)
    if rank < 4:
        batch, heads, kv_heads = 1, heads if rank == 3 else 1, kv_heads if rank == 3 else 1
        given.pop("enable_gqa", None) if rank == 2 else None
    sizes = {
        "query": (batch, heads, seq_q, dim),
        "key": (batch, kv_heads, seq_k, dim),
        "value": (batch, kv_heads, seq_k, value_dim),
    }
    if rank == 4 and batch > 1 and draw.chance(0.08):
        odd = draw.pick(*sizes)
        sizes[odd] = (1, *sizes[odd][1:])
    given |= {n: draw.tensor(n, s[4 - rank :], dtype, kind=kind(draw, likely=0.08)) for n, s in sizes.items()}
    return given, (batch, heads, seq_q, seq_k)


def draw_masks(draw: Draw, given: Arguments, sizes: tuple[int, int, int, int]) -> None:
    batch, _, _, seq_k = sizes
    dtype, rank = given["query"].dtype, max(given[n].dim() for n in ("query", "key"))
    if draw.chance(0.45):
        full = sizes[4 - rank :] if rank < 4 else sizes[draw.pick(0, 0, 1, 2, 3) :]
        shape = tuple(n if draw.chance(0.75) else 1 for n in full)
        allowed = draw.booleans(shape, draw.pick(0.2, 0.5, 0.9, 1.0))
        pattern = draw.pick("", "a full row", "nothing at all", "one key", "a block")
        if pattern == "a full row" and len(shape) > 1 and allowed.shape[-2]:
            allowed[..., -1, :] = False
        elif pattern == "nothing at all":
            allowed[:] = False
        elif pattern == "one key" and allowed.shape[-1]:
            allowed[:] = False
            allowed[..., -1] = True
        elif pattern == "a block":
            allowed[..., : seq_k // 2] = False
        if draw.chance(0.5):
            given["attn_mask"] = draw.place("attn_mask", allowed)
        else:
            wide = F32 if dtype == F64 and draw.chance(0.3) else draw.pick(F32, dtype)
            bias = draw.values(shape, wide, scale=draw.pick(0.5, 3.0))
            how = draw.pick(-math.inf, -math.inf, torch.finfo(wide).min, -1e4)
            given["attn_mask"] = draw.place("attn_mask", bias.masked_fill(~allowed, how))
    if draw.chance(0.35):
        lengths = draw.integers(0, seq_k + 1, (batch, 1))
        columns = torch.arange(seq_k).expand(batch, seq_k)
        side = draw.pick("right", "left", "holes", "none", "all")
        real = {
            "right": columns < lengths,
            "left": columns >= seq_k - lengths,
            "holes": draw.booleans((batch, seq_k), 0.6),
            "none": torch.ones(batch, seq_k, dtype=torch.bool),
            "all": torch.zeros(batch, seq_k, dtype=torch.bool),
        }[side]
        given["key_padding_mask"] = draw.place("key_padding_mask", real)
    draw_band(draw, given)


def draw_band(draw: Draw, given: Arguments) -> None:
    if draw.chance(0.2):
        given["is_causal"] = True
    if draw.chance(0.15):
        given["window_size"] = draw.pick((0, 0), (-1, 0), (1, 2), (3, -1), (0, 5), (-1, -1))
    if draw.chance(0.2):
        given["scale"] = draw.pick(1.0, 0.1, 0.0, -0.3, 2)


def draw_scaled_dot_product_attention(draw: Draw) -> Call:
    given, sizes = draw_attention_inputs(draw)
    draw_masks(draw, given, sizes)
    if draw.chance(0.2):
        given["dropout_p"] = draw.pick(0.1, 0.5, 1.0)
    if draw.chance(0.3):
        given["return_lse"] = True
    spoil_some(draw, given, ("query", "key", "value"))
    wants = wanted(draw, given, ("query", "key", "value", "attn_mask"))
    return Call("scaled_dot_product_attention", given, wants, given.get("dropout_p", 0.0) > 0.0)


def four(given: Arguments, heads_too: bool = True) -> Arguments:
    """Attention's arguments as 4-D tensors of one batch and, for the definition, of one count of heads."""
    given = dict(given)
    names = [n for n in ("query", "key", "value") if n in given]
    for name in names:
        given[name] = given[name][(None,) * (4 - given[name].dim())]
    batches = [given[n].shape[0] for n in names]
    batch = 0 if 0 in batches else max(batches)
    heads = max(given[n].shape[1] for n in names)
    for name in names:
        t = given[name].expand(batch, -1, -1, -1)
        given[name] = t.repeat_interleave(heads // t.shape[1], 1) if t.shape[1] != heads else t
    given.pop("enable_gqa", None)
    return given


def define_scaled_dot_product_attention(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    rank = max(given[n].dim() for n in ("query", "key", "value"))
    lse = given.get("return_lse", False)
    made = reference.scaled_dot_product_attention(**four(given), dropout_key=key, upcast=upcast)
    tensors = made if isinstance(made, tuple) else (made,)
    return dict(
        zip(["output", "lse"] if lse else ["output"], [t[(0,) * (4 - rank)] for t in tensors], strict=True)
    )


def name_attention(given: Arguments, result: Any) -> Outputs:
    return dict(zip(("output", "lse"), result if isinstance(result, tuple) else (result,), strict=False))


def draw_attention_probs(draw: Draw) -> Call:
    given, sizes = draw_attention_inputs(draw)
    value = given.pop("value")
    draw_masks(draw, given, sizes)
    if "attn_mask" in given and given["attn_mask"].is_floating_point():
        mask = given[
            "attn_mask"
        ]  # a weight is as exact as the LSE: beside the lowest finite number that says nothing
        given["attn_mask"] = draw.place("attn_mask", mask.masked_fill(mask < -1e3, -math.inf))
    _, lse = reference.scaled_dot_product_attention(**four(given | {"value": value}), return_lse=True)
    rank = max(given["query"].dim(), given["key"].dim())
    wide = torch.promote_types(given["query"].dtype, F32)
    # value may be the only one of a batch: the LSE has the shape that query and key say
    lse = lse[(0,) * (4 - rank)]
    batch = max(given["query"].shape[0], given["key"].shape[0]) if rank == 4 else None
    if batch is not None and lse.shape[0] != batch:
        lse = lse[:batch]
    given["lse"] = draw.place("lse", lse.to(wide))
    return Call("attention_probs", given, wanted(draw, given, ("query", "key", "lse", "attn_mask")))


def define_attention_probs(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    rank = max(given["query"].dim(), given["key"].dim())
    lse = given["lse"][(None,) * (4 - rank)]
    made = reference.attention_probs(**four(given) | {"lse": lse}, upcast=upcast)
    return {"output": made[(0,) * (4 - rank)]}


def draw_varlen_attention(draw: Draw) -> Call:
    dtype, heads = floating(draw), draw.pick(1, 2, 4)
    kv_heads = heads if draw.chance(0.8) else 1
    batch = draw.pick(0, 1, 2, 3, 5) if draw.chance(0.9) else 8
    lengths_q = draw.integers(0, draw.pick(2, 9, 20), (batch,))
    lengths_k = lengths_q if draw.chance(0.7) else draw.integers(0, 12, (batch,))
    dim = draw.pick(1, 8, 16, 17, 32)
    value_dim = dim if draw.chance(0.85) else draw.pick(8, 24)
    rest_q, rest_k = (draw.pick(0, 0, 0, 1, 5) for _ in range(2))

    def offsets(lengths: Tensor) -> Tensor:
        return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    total_q, total_k = int(cu_q[-1]) + rest_q, int(cu_k[-1]) + rest_k
    longest = [int(n.max()) if batch else 0 for n in (lengths_q, lengths_k)]
    given: Arguments = {
        "query": draw.tensor("query", (total_q, heads, dim), dtype),
        "key": draw.tensor("key", (total_k, kv_heads, dim), dtype),
        "value": draw.tensor("value", (total_k, kv_heads, value_dim), dtype),
        "cu_seqlens_q": draw.place("cu_seqlens_q", cu_q)
        if draw.chance(0.3) and not (cu_q == cu_q[0]).all()
        else cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": longest[0] + draw.pick(0, 0, 3),
        "max_seqlen_k": longest[1] + draw.pick(0, 0, 3),
    }
    if not torch.equal(given["cu_seqlens_q"], cu_q):  # an expanded copy holds one number
        given["cu_seqlens_q"] = cu_q
    draw_band(draw, given)
    if draw.chance(0.2):
        given["dropout_p"] = draw.pick(0.1, 0.5, 1.0)
    if draw.chance(0.3):
        given["return_lse"] = True
    spoil_some(draw, given, ("query", "key", "value"))
    wants = wanted(draw, given, ("query", "key", "value"))
    return Call("varlen_attention", given, wants, given.get("dropout_p", 0.0) > 0.0)


def define_varlen_attention(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    return name_attention(given, reference.varlen_attention(**given, dropout_key=key, upcast=upcast))


# --- bert_embeddings -------------------------------------------------------------------------------------------


def draw_bert_embeddings(draw: Draw) -> Call:
    dtype, hidden = floating(draw), max(draw.size(), 1)
    vocab, positions, types = draw.pick(1, 5, 17), draw.pick(3, 16, 40), draw.pick(1, 2, 3)
    vectors = dtype if draw.chance(0.6) else draw.pick(F32, BF16, F16)
    integer = draw.pick(torch.int64, torch.int64, torch.int32)
    given: Arguments = {
        "word_weight": draw.tensor("word_weight", (vocab, hidden), dtype, kind=kind(draw, likely=0.15)),
        "position_weight": maybe(draw, 0.8, lambda: draw.tensor("position_weight", (positions, hidden), dtype)),
        "token_type_weight": maybe(draw, 0.7, lambda: draw.tensor("token_type_weight", (types, hidden), dtype)),
        "weight": maybe(draw, 0.8, lambda: draw.tensor("weight", (hidden,), vectors)),
        "bias": maybe(draw, 0.8, lambda: draw.tensor("bias", (hidden,), vectors)),
    }  # fmt: skip
    packed = draw.chance(0.35)
    if packed:
        lengths = draw.integers(0, min(positions, 12) + 1, (draw.pick(0, 1, 3),))
        cu = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        shape: tuple[int, ...] = (int(cu[-1]) + draw.pick(0, 0, 2),)
        if given["position_weight"] is None or draw.chance(0.8):
            given["cu_seqlens"] = cu
    else:
        shape = (draw.size(), min(draw.size(), positions))
    given["input_ids"] = draw.place("input_ids", draw.integers(0, vocab, shape, integer))
    if given["position_weight"] is not None and (draw.chance(0.3) or (packed and "cu_seqlens" not in given)):
        of = draw.pick((shape[-1],), (1, shape[-1]), shape) if not packed else shape
        given["position_ids"] = draw.place("position_ids", draw.integers(0, positions, of, integer))
    if given["token_type_weight"] is not None and draw.chance(0.6):
        given["token_type_ids"] = draw.place("token_type_ids", draw.integers(0, types, shape, integer))
    given["eps"] = draw.pick(1e-12, 1e-5)
    if draw.chance(0.25):
        given |= {"dropout_p": draw.pick(0.1, 0.5, 1.0), "training": draw.chance(0.8)}
    if draw.chance(0.3):
        given["padding_idx"] = draw.pick(0, vocab - 1, -1)
    wants = wanted(draw, given, ("word_weight", "position_weight", "token_type_weight", "weight", "bias"))
    active = given.get("training", False) and given.get("dropout_p", 0.0) > 0.0
    return Call("bert_embeddings", given, wants, active)


def define_bert_embeddings(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    given = dict(given)
    p = dropout_of(given)
    return {"output": reference.bert_embeddings(**given, dropout_p=p, dropout_key=key, upcast=upcast).output}


# --- products and activations ----------------------------------------------------------------------------------


def draw_bias_gelu(draw: Draw) -> Call:
    dtype, features = floating(draw), max(draw.size(), 1)
    shape = (*leading(draw), features)
    given: Arguments = {"x": draw.tensor("x", shape, dtype, kind=kind(draw))}
    if draw.chance(0.75):
        other = dtype if draw.chance(0.6) else draw.pick(F32, BF16, F16)
        given["bias"] = draw.tensor("bias", (features,), other)
    given["activation"] = draw.pick(*ACTIVATIONS[1:])
    if draw.chance(0.2):
        given["quantize_output"] = True
    spoil_some(draw, given, ("x", "bias"))
    wants = [] if given.get("quantize_output") else wanted(draw, given, ("x", "bias"))
    return Call("bias_gelu", given, wants)


def define_bias_gelu(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    given = dict(given)
    if not given.pop("quantize_output", False):
        return {"output": reference.bias_gelu(**given, upcast=upcast)}
    if not upcast:
        given["x"] = given["x"].to(torch.promote_types(given["x"].dtype, F32))
    return quantized(reference.bias_gelu(**given, upcast=upcast))


def name_codes(given: Arguments, result: Any) -> Outputs:
    if given.get("quantize_output"):
        return dict(zip(("codes", "scales"), result, strict=True))
    return {"output": result}


def draw_linear_activation(draw: Draw) -> Call:
    dtype = floating(draw)
    n_in, n_out = draw.size(), draw.size()
    given: Arguments = {
        "x": draw.tensor("x", (*leading(draw), n_in), dtype, kind=kind(draw, likely=0.1)),
        "weight": draw.tensor("weight", (n_out, n_in), dtype),
    }
    if draw.chance(0.75):
        other = dtype if draw.chance(0.75) else draw.pick(F32, BF16, F16)
        given["bias"] = draw.tensor("bias", (n_out,), other)
    given["activation"] = draw.pick(*ACTIVATIONS)
    spoil_some(draw, given, ("x", "weight", "bias"))
    return Call("linear_activation", given, wanted(draw, given, ("x", "weight", "bias")))


def define_linear(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    x, weight, bias = given["x"], given["weight"], given.get("bias")
    if upcast:
        x, weight, bias = x.double(), weight.double(), None if bias is None else bias.double()
    elif bias is not None:
        bias = bias.to(x.dtype)
    return {"output": reference.activation(F.linear(x, weight, bias), given["activation"])}


def draw_linear_residual_layernorm(draw: Draw) -> Call:
    dtype = floating(draw)
    n_in, hidden = draw.size(), max(draw.size(), 1)
    rows = leading(draw)
    vectors = dtype if draw.chance(0.7) else draw.pick(F32, BF16)
    given: Arguments = {
        "x": draw.tensor("x", (*rows, n_in), dtype),
        "weight": draw.tensor("weight", (hidden, n_in), dtype),
        "bias": maybe(draw, 0.8, lambda: draw.tensor("bias", (hidden,), dtype)),
        "residual": draw.tensor("residual", (*rows, hidden), dtype if draw.chance(0.7) else F32),
        "ln_weight": maybe(draw, 0.8, lambda: draw.tensor("ln_weight", (hidden,), vectors)),
        "ln_bias": maybe(draw, 0.8, lambda: draw.tensor("ln_bias", (hidden,), vectors)),
        "eps": draw.pick(1e-12, 1e-5),
    }
    if draw.chance(0.2):
        given |= {"dropout_p": draw.pick(0.1, 1.0), "training": True}
    names = ("x", "weight", "bias", "residual", "ln_weight", "ln_bias")
    return Call("linear_residual_layernorm", given, wanted(draw, given, names), given.get("training", False))


def define_linear_residual_layernorm(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    x, weight = given["x"], given["weight"]
    if upcast:
        x, weight = x.double(), weight.double()
    p = given.get("dropout_p", 0.0) if given.get("training") else 0.0
    made = reference.residual_layernorm(
        F.linear(x, weight), given["residual"], given["ln_weight"], given["ln_bias"], eps=given["eps"],
        x_bias=given["bias"], dropout_p=p, dropout_key=key, upcast=upcast,
    )  # fmt: skip
    return {"output": made.output}


def draw_feed_forward(draw: Draw) -> Call:
    dtype = floating(draw)
    hidden, inner, n_out = max(draw.size(), 1), max(draw.size(), 1), max(draw.size(), 1)
    shape = (*leading(draw), hidden)
    given: Arguments = {
        "x": draw.tensor("x", shape, dtype),
        "residual": draw.tensor("residual", shape, dtype),
        "ln_weight": maybe(draw, 0.9, lambda: draw.tensor("ln_weight", (hidden,), dtype)),
        "ln_bias": maybe(draw, 0.9, lambda: draw.tensor("ln_bias", (hidden,), dtype)),
        "weight1": draw.tensor("weight1", (inner, hidden), dtype),
        "bias1": maybe(draw, 0.8, lambda: draw.tensor("bias1", (inner,), dtype)),
        "weight2": draw.tensor("weight2", (n_out, inner), dtype),
        "activation": draw.pick(*ACTIVATIONS[1:]),
        "eps": draw.pick(1e-12, 1e-5),
    }
    if draw.chance(0.5):
        given["x_bias"] = draw.tensor("x_bias", (hidden,), dtype)
    if draw.chance(0.2):
        given |= {"dropout_p": draw.pick(0.1, 1.0), "training": True}
    names = ("x", "residual", "ln_weight", "ln_bias", "weight1", "bias1", "weight2", "x_bias")
    return Call("layernorm_mlp", given, wanted(draw, given, names), given.get("training", False))


def define_feed_forward(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    given = {n: t.double() if upcast and isinstance(t, Tensor) else t for n, t in given.items()}
    p = given.get("dropout_p", 0.0) if given.get("training") else 0.0
    h = reference.residual_layernorm(
        given["x"], given["residual"], given["ln_weight"], given["ln_bias"], eps=given["eps"],
        x_bias=given.get("x_bias"), dropout_p=p, dropout_key=key, upcast=upcast,
    ).output  # fmt: skip
    inner = reference.activation(F.linear(h, given["weight1"], given["bias1"]), given["activation"])
    return {"h": h, "output": F.linear(inner, given["weight2"])}


def name_feed_forward(given: Arguments, result: Any) -> Outputs:
    return dict(zip(("h", "output"), result, strict=True))


def draw_masked_lm_cross_entropy(draw: Draw) -> Call:
    dtype, hidden, vocab = floating(draw), max(draw.size(), 1), max(draw.size(), 1)
    rows = leading(draw)
    labels = draw.integers(0, vocab, rows)
    ignore = -100 if draw.chance(0.8) else draw.pick(-1, 0)
    labels = torch.where(draw.booleans(rows, draw.pick(0.0, 0.3, 0.8, 1.0)), ignore, labels)
    given: Arguments = {
        "hidden": draw.tensor("hidden", (*rows, hidden), dtype),
        "weight": draw.tensor("weight", (vocab, hidden), dtype),
        "bias": maybe(draw, 0.7, lambda: draw.tensor("bias", (vocab,), dtype)),
        "labels": draw.place("labels", labels),
        "reduction": draw.pick("mean", "mean", "sum", "none"),
    }
    if ignore != -100:
        given["ignore_index"] = ignore
    if given["reduction"] == "mean" and draw.chance(0.3):
        given["num_items"] = draw.pick(0, 1, 7, 2.5, torch.tensor(3), torch.tensor(4.0))
    if draw.chance(0.4):
        given["chunk_size"] = draw.pick(1, 2, 3, 1000)
    wants = wanted(draw, given, ("hidden", "weight", "bias"))
    return Call("masked_lm_cross_entropy", given, wants)


def define_masked_lm_cross_entropy(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    given = {n: v for n, v in given.items() if n != "chunk_size"}
    return {"output": reference.masked_lm_cross_entropy(**given, upcast=upcast)}


# --- int8 ------------------------------------------------------------------------------------------------------


def draw_quantize(op: str, draw: Draw) -> Call:
    name = "weight" if op == "quantize_per_channel" else "x"
    features = draw.size(0.04)
    shape = (draw.size(0.04), features) if name == "weight" else (*leading(draw), features)
    given: Arguments = {name: draw.tensor(name, shape, floating(draw), kind=kind(draw, likely=0.5))}
    spoil_some(draw, given, (name,), 0.2)
    if op == "quantize_per_tensor" and draw.chance(0.4):
        given["scale"] = draw.place("scale", torch.tensor(draw.pick(0.05, 1.0, 1e-3)))
    if op in ("quantize_per_tensor", "quantize_per_token_with_offset") and draw.chance(0.4):
        given["factor"] = draw.tensor("factor", (features,), F32)
    return Call(op, given)


def define_quantize(op: str, given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    return name_quantize(given, getattr(reference, op)(**given))


def name_quantize(given: Arguments, result: Any) -> Outputs:
    return dict(zip(("exact codes", "exact scales", "exact offsets"), result, strict=False))


def codes(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
    low, high = draw.pick((-127, 128), (-128, 128), (-3, 4), (127, 128))
    return draw.place(name, draw.integers(low, high, shape, torch.int8))


def draw_int8_matmul(draw: Draw) -> Call:
    n_in, n_out, rows = draw.size(), draw.size(), leading(draw)
    given: Arguments = {
        "a": codes(draw, "a", (*rows, n_in)),
        "b": codes(draw, "b", (n_out, n_in)),
        "a_scale": draw.tensor("a_scale", () if draw.chance(0.2) else rows, F32, scale=0.02),
        "b_scale": draw.tensor("b_scale", () if draw.chance(0.2) else (n_out,), F32, scale=0.02),
        "out_dtype": draw.pick(F32, BF16, F16),
        "activation": draw.pick(*ACTIVATIONS),
    }
    if draw.chance(0.6):
        given["bias"] = draw.tensor("bias", (n_out,), draw.pick(F32, BF16, F16))
    if draw.chance(0.4):
        given["residual"] = draw.tensor("residual", (*rows, n_out), draw.pick(F32, BF16, F16))
    if draw.chance(0.4):
        given["a_offset"] = draw.tensor("a_offset", rows, F32)
    if draw.chance(0.2):
        given["quantize_output"] = True
    return Call("int8_matmul", given)


def define_int8_matmul(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    given = dict(given)
    if not given.pop("quantize_output", False):
        return {"output": reference.int8_matmul(**given, upcast=upcast)}
    return quantized(reference.int8_matmul(**given | {"out_dtype": F32}, upcast=upcast))


def draw_int8_weight_only_matmul(draw: Draw) -> Call:
    n_in, n_out = draw.size(), draw.size()
    given: Arguments = {
        "x": draw.tensor("x", (*leading(draw), n_in), floating(draw, wide=False)),
        "b": codes(draw, "b", (n_out, n_in)),
        "b_scale": draw.tensor("b_scale", (n_out,), F32, scale=0.02),
        "activation": draw.pick(*ACTIVATIONS),
    }
    if draw.chance(0.6):
        given["bias"] = draw.tensor("bias", (n_out,), draw.pick(F32, BF16, F16))
    return Call("int8_weight_only_matmul", given)


def define_int8_weight_only_matmul(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    if upcast:
        return {"output": reference.int8_weight_only_matmul(**given)}
    x, dtype = given["x"], given["x"].dtype
    out = F.linear(x, given["b"].to(dtype)).float() * given["b_scale"]
    if not out.isfinite().all():  # codes times activations leave fp16 before the scale brings them back
        return {"output": reference.int8_weight_only_matmul(**given, upcast=False)}
    out = out if given.get("bias") is None else out + given["bias"].float()
    return {"output": reference.activation(out, given["activation"]).to(dtype)}


def draw_int8_linear(draw: Draw) -> Call:
    dtype = floating(draw, wide=False)
    n_in, n_out = max(draw.size(), 1), draw.size()
    given: Arguments = {"x": draw.tensor("x", (*leading(draw), n_in), dtype)}
    if draw.chance(0.5):
        given["weight"] = draw.tensor("weight", (n_out, n_in), dtype if draw.chance(0.8) else F32)
    else:
        given["weight"] = codes(draw, "weight", (n_out, n_in))
        given["weight_scale"] = draw.tensor("weight_scale", (n_out,), F32, scale=0.02)
    if draw.chance(0.7):
        given["bias"] = draw.tensor("bias", (n_out,), dtype if draw.chance(0.8) else F32)
    given["activation"] = draw.pick(*ACTIVATIONS)
    if draw.chance(0.2):
        given["weight_only"] = True
    else:
        if draw.chance(0.25):
            given["input_scale"] = torch.tensor(draw.pick(0.01, 0.05))
        if draw.chance(0.3):
            given["smooth_scale"] = draw.place("smooth_scale", draw.normal((n_in,)).abs() + 0.5)
    return Call("int8_linear", given, wanted(draw, given, ("x", "weight", "bias")))


def define_int8_linear(given: Arguments, upcast: bool, key: Tensor | None) -> Outputs:
    if upcast:
        wide = {n: v.double() if isinstance(v, Tensor) and v.requires_grad else v for n, v in given.items()}
        return {"output": reference.int8_linear(**wide)}
    dtype, x, weight = given["x"].dtype, given["x"], given["weight"]
    if given.get("smooth_scale") is not None:
        x = x.float() * given["smooth_scale"]
    if given.get("weight_only"):
        rounded = x.detach()
    elif given.get("input_scale") is not None:
        q, scale = reference.quantize_per_tensor(x.detach(), given["input_scale"])
        rounded, x = q * scale, x.masked_fill(q.abs() == 127, 0.0)
    else:
        q, scale, offset = reference.quantize_per_token_with_offset(x.detach())
        rounded = q * scale.unsqueeze(-1) + offset.unsqueeze(-1)
    a = rounded.to(dtype) + (x - x.detach()).to(dtype)
    if given.get("weight_scale") is not None:
        w = (weight * given["weight_scale"].unsqueeze(-1)).to(dtype)
    else:
        q, scale = reference.quantize_per_token(weight.detach())
        w = (q * scale.unsqueeze(-1)).to(dtype) + (weight - weight.detach()).to(dtype)
    bias = given.get("bias")
    out = F.linear(a, w, None if bias is None else bias.to(dtype))
    return {"output": reference.activation(out, given["activation"])}


def name_output(given: Arguments, result: Any) -> Outputs:
    return {"output": result}


Define = Callable[[Arguments, bool, Tensor | None], Outputs]
Name = Callable[[Arguments, Any], Outputs]


def _quantize(op: str) -> tuple[Callable[[Draw], Call], Define, Name]:
    return (
        lambda draw: draw_quantize(op, draw),
        lambda given, upcast, key: define_quantize(op, given, upcast, key),
        name_quantize,
    )


OPS: dict[str, tuple[Callable[[Draw], Call], Define, Name]] = {
    "residual_layernorm": (draw_residual_layernorm, define_residual_layernorm, name_residual_layernorm),
    "scaled_dot_product_attention": (
        draw_scaled_dot_product_attention, define_scaled_dot_product_attention, name_attention,
    ),
    "attention_probs": (draw_attention_probs, define_attention_probs, name_output),
    "varlen_attention": (draw_varlen_attention, define_varlen_attention, name_attention),
    "bert_embeddings": (draw_bert_embeddings, define_bert_embeddings, name_output),
    "bias_gelu": (draw_bias_gelu, define_bias_gelu, name_codes),
    "linear_activation": (draw_linear_activation, define_linear, name_output),
    "linear_residual_layernorm": (
        draw_linear_residual_layernorm, define_linear_residual_layernorm, name_output,
    ),
    "layernorm_mlp": (draw_feed_forward, define_feed_forward, name_feed_forward),
    "masked_lm_cross_entropy": (draw_masked_lm_cross_entropy, define_masked_lm_cross_entropy, name_output),
    "int8_matmul": (draw_int8_matmul, define_int8_matmul, name_codes),
    "int8_weight_only_matmul": (draw_int8_weight_only_matmul, define_int8_weight_only_matmul, name_output),
    "int8_linear": (draw_int8_linear, define_int8_linear, name_output),
    **{name: _quantize(name) for name in ops.__all__ if name.startswith("quantize_")},
}  # fmt: skip
assert set(OPS) == set(ops.__all__), "an op that isn't tried"
