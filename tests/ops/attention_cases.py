"""Inputs for the tests of attention: values that matter, in every layout, under every kind of mask.

A case is a dict of the names in :data:`PADDED` or :data:`PACKED`; :func:`padded_call` and :func:`packed_call`
make a :class:`Call` of it, and :func:`check` judges that call by the numerics policy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyaccel import dispatch, triton_support
from pyaccel.ops.attention.api import scaled_dot_product_attention
from pyaccel.ops.attention.packed import varlen_attention
from pyaccel.ops.dropout import dropout_key
from pyaccel.reference import attention as reference
from tests.assertions import assert_close_to_truth, assert_statistic

BACKEND = "triton"

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"fp32": F32, "fp16": F16, "bf16": BF16}
NAN = float("nan")

Case = dict[str, Any]
Options = dict[str, Any]


@dataclass
class Call:
    """One call of attention: what is given, and the gradients that come back.

    Attributes:
        qkv: query, key and value; what is tested sees them with these strides.
        args, options: the rest of the arguments.
        mask_needs_grad: whether ``options["attn_mask"]`` is differentiated too.
        gradient: makes the output's gradient from the output.
        lse_gradient: the same for the LSE, or None where the LSE isn't differentiated.
    """

    function: Callable[..., Any]
    truth: Callable[..., Any]
    qkv: list[Tensor]
    args: tuple[Any, ...] = ()
    options: Options = field(default_factory=dict)
    mask_needs_grad: bool = False
    gradient: Callable[[Tensor], Tensor] = lambda out: random_gradient(out)
    lse_gradient: Callable[[Tensor], Tensor] | None = None


# --- values -------------------------------------------------------------------------------------------------


def values(*shape: int, device: torch.device) -> Tensor:
    """fp32 ``[batch, heads, seq, dim]``: means away from zero, another magnitude in every batch and head.

    Not so large that the LSE is: weights rebuilt from it have its rounding, which plain PyTorch's don't.
    """
    batch, heads = shape[:2]
    magnitude = torch.linspace(0.5, 1.0, batch, device=device)[:, None] * torch.linspace(
        1.1, 0.8, heads, device=device
    )
    return (torch.randn(shape, device=device) + 0.2) * magnitude[..., None, None]


def enlarge_a_query(query: Tensor) -> Tensor:
    """One query of several with scores of other magnitude, of whose keys few count."""
    if query.shape[-2] > 1:
        query[..., query.shape[-2] // 2, :] *= 2.0
    return query


def random_gradient(out: Tensor) -> Tensor:
    """Neither ones, nor of mean zero, nor alike in all rows."""
    return (torch.randn(out.shape, device=out.device) + 0.25).to(out.dtype)


# Each makes a gradient of out's shape and dtype, with the strides that autograd may hand over.
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": random_gradient,
    "sum": lambda out: out.new_tensor(0.75).expand(out.shape),
    "mean over rows": lambda out: random_gradient(out[..., :1, :]).expand(out.shape),
    "transposed": lambda out: random_gradient(out.mT).mT,
    "heads last": lambda out: random_gradient(out.transpose(-3, -2)).transpose(-3, -2),
    "sliced": lambda out: random_gradient(torch.cat([out, out, out], -1))[..., 1 : out.shape[-1] + 1],
}


# --- layouts ------------------------------------------------------------------------------------------------


def in_order(x: Tensor, *order: int) -> Tensor:
    """The same values with memory laid out in another order of the dimensions."""
    inverse = [order.index(i) for i in range(len(order))]
    return x.permute(order).contiguous().permute(inverse)


def spread(x: Tensor) -> Tensor:
    """The same values at every second element of wider rows, one element off alignment."""
    buffer = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), NAN, dtype=x.dtype, device=x.device)
    buffer[..., 1::2] = x
    return buffer[..., 1::2]


def off_alignment(x: Tensor) -> Tensor:
    """The same values, contiguous, but for an offset of one element."""
    buffer = torch.full((x.numel() + 1,), NAN, dtype=x.dtype, device=x.device)
    buffer[1:] = x.reshape(-1)
    return buffer[1:].view(x.shape)


def in_one_buffer(*tensors: Tensor) -> list[Tensor]:
    """``[batch, heads, seq, dim]`` tensors of one seq as views of ``[batch, seq, all their heads and dims]``."""
    rows = [t.transpose(1, 2).flatten(2) for t in tensors]
    parts = torch.cat(rows, -1).split([r.shape[-1] for r in rows], -1)
    return [p.unflatten(-1, (t.shape[1], -1)).transpose(1, 2) for p, t in zip(parts, tensors, strict=True)]


def packed_projection(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Views of one ``[batch, seq, 3, heads, dim]`` buffer, or of two where queries and keys differ in number."""
    return in_one_buffer(q, k, v) if q.shape[2] == k.shape[2] else [*in_one_buffer(q), *in_one_buffer(k, v)]


# Each takes contiguous [batch, heads, seq, dim]; the values stay, but for the expanded ones.
LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], list[Tensor]]] = {
    "contiguous": lambda q, k, v: [q, k, v],
    "heads last": lambda q, k, v: [in_order(t, 0, 2, 1, 3) for t in (q, k, v)],
    "packed projection": packed_projection,
    "dims strided": lambda q, k, v: [in_order(q, 0, 1, 3, 2), spread(k), in_order(v, 3, 1, 2, 0)],
    "all different": lambda q, k, v: [in_order(q, 2, 0, 1, 3), in_order(k, 1, 2, 0, 3), spread(v)],
    "expanded": lambda q, k, v: [q, k[:1].expand_as(k), v[:, :1].expand_as(v)],
    "unaligned": lambda q, k, v: [off_alignment(t) for t in (q, k, v)],
}

MASK_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda m: m,
    "transposed": lambda m: in_order(m, *range(m.dim() - 2), m.dim() - 1, m.dim() - 2) if m.dim() > 1 else m,
    "sliced": lambda m: torch.stack([m, m, m], -1)[..., 1],
    "expanded": lambda m: m,  # to [batch, heads, seq_q, seq_k], by padded_call
}


# --- masks --------------------------------------------------------------------------------------------------

Shape = tuple[int, int, int, int]  # batch, heads, seq_q, seq_k


def right_padding(shape: Shape, device: torch.device) -> Tensor:
    """bool ``[batch, seq_k]``: sequence 0 is whole, the next ones get shorter."""
    batch, _, _, seq_k = shape
    lens = torch.tensor([max(1, seq_k * (batch - i) // batch) for i in range(batch)], device=device)
    return torch.arange(seq_k, device=device) < lens[:, None]


def padding_with_holes(shape: Shape, device: torch.device) -> Tensor:
    """Half of the keys, anywhere, and at least one."""
    keys = torch.rand(shape[0], shape[3], device=device) < 0.5
    keys[:, shape[3] // 2] = True
    return keys


def padding_and_nothing(shape: Shape, device: torch.device) -> Tensor:
    """The last sequence of the batch has no key."""
    keys = right_padding(shape, device)
    keys[-1] = False
    return keys


def random_bool(*shape: int, device: torch.device) -> Tensor:
    """About half True; the last and a middle query see nothing, nor does the whole last batch's last head."""
    mask = torch.rand(shape, device=device) < 0.5
    mask[..., [shape[-2] // 2, -1], :] = False
    if mask.dim() == 4 and shape[1] > 1:
        mask[-1, -1] = False
    return mask


def documents(shape: Shape, device: torch.device) -> Tensor:
    """bool ``[seq_q, seq_k]``: three documents in a row, each sees itself; whole blocks are masked."""
    _, _, seq_q, seq_k = shape
    rows, columns = (3 * torch.arange(n, device=device) // n for n in (seq_q, seq_k))
    return rows[:, None] == columns


def random_float(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device) - 0.3


def with_minus_inf(mask: Tensor) -> Tensor:
    """A third of it -inf; every key of the last query, if it has queries."""
    mask = mask.masked_fill(torch.rand(mask.shape, device=mask.device) < 0.3, -math.inf)
    if mask.shape[-2] > 1:
        mask[..., -1, :] = -math.inf
    return mask


def lowest_as_padding(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Hugging Face's additive mask of a bool one of keys: the lowest finite number on padding."""
    mask = torch.zeros(keys.shape, device=keys.device, dtype=dtype)
    return mask.masked_fill(~keys, torch.finfo(dtype).min)[:, None, None]


Mask = Callable[[Shape, torch.dtype, torch.device], Options]


def padding(make: Callable[[Shape, torch.device], Tensor]) -> Mask:
    return lambda shape, dtype, device: {"key_padding_mask": make(shape, device)}


def boolean(make: Callable[[Shape, torch.device], Tensor]) -> Mask:
    return lambda shape, dtype, device: {"attn_mask": make(shape, device)}


def additive(make: Callable[[Shape, torch.device], Tensor], *, needs_grad: bool = False) -> Mask:
    return lambda shape, dtype, device: {
        "attn_mask": make(shape, device).to(dtype).requires_grad_(needs_grad)
    }


def bias(pattern: str) -> Mask:
    """A float mask that requires a gradient, of the dimensions named in `pattern`; the others are 1."""

    def make(shape: Shape, device: torch.device) -> Tensor:
        sizes = [n if name in pattern else 1 for name, n in zip("bhqk", shape, strict=True)]
        return random_float(*sizes, device=device)

    return additive(make, needs_grad=True)


# name: its options from (batch, heads, seq_q, seq_k), the dtype of a float mask, and the device
MASKS: dict[str, Mask] = {
    "none": lambda shape, dtype, device: {},
    "padding right": padding(right_padding),
    "padding left": padding(lambda s, d: right_padding(s, d).flip(1)),
    "padding holes": padding(padding_with_holes),
    "padding all": padding(padding_and_nothing),
    "bool qk": boolean(lambda s, d: random_bool(*s[2:], device=d)),
    "bool documents": boolean(documents),
    "bool b11k": boolean(lambda s, d: padding_and_nothing(s, d)[:, None, None]),
    "bool 1h1k": boolean(lambda s, d: torch.rand(s[1], 1, s[3], device=d) < 0.6),
    "bool b1q1": boolean(lambda s, d: torch.rand(s[0], 1, s[2], 1, device=d) < 0.6),
    "bool bhqk": boolean(lambda s, d: random_bool(*s, device=d)),
    "float qk": additive(lambda s, d: random_float(*s[2:], device=d)),
    "float b11k": additive(lambda s, d: with_minus_inf(random_float(s[0], 1, 1, s[3], device=d))),
    "float bhqk": additive(lambda s, d: with_minus_inf(random_float(*s, device=d))),
    "float lowest": lambda shape, dtype, device: {
        "attn_mask": lowest_as_padding(padding_and_nothing(shape, device), dtype)
    },
    "bias bhqk": additive(lambda s, d: with_minus_inf(random_float(*s, device=d)), needs_grad=True),
    "bias qk": additive(lambda s, d: with_minus_inf(random_float(*s[2:], device=d)), needs_grad=True),
    "bias hqk": bias("hqk"),
    "bias bqk": bias("bqk"),
    "bias bk": bias("bk"),
    "bias hk": bias("hk"),
    "bias and padding": lambda shape, dtype, device: {
        **bias("hqk")(shape, dtype, device),
        **padding(padding_and_nothing)(shape, dtype, device),
    },
}


# --- the matrix ---------------------------------------------------------------------------------------------

# Of queries and keys: one tile, several, aligned with tiles and not, and more than kernels for short sequences take.
# Tiles are of 32 under the interpreter, which is slow, and of up to 128 on a GPU.
LENGTHS = [(1, 37), (16, 16), (17, 33), (33, 17), (64, 64)]
LENGTHS += (
    [(40, 97), (96, 96), (97, 40)]
    if triton_support.interpreting()
    else [(65, 130), (128, 128), (130, 65), (70, 300)]
)
PACKED_LENGTHS = [
    ([16, 16, 16], [16, 16, 16]),
    ([17, 0, 33, 1], [17, 0, 33, 1]),
    ([5, 12, 0, 40], [33, 30, 6, 0]),
    ([2, 1, 20], [2, 1, 20]),
]
if triton_support.interpreting():
    PACKED_LENGTHS += [([96], [96]), ([40, 70], [40, 70]), ([65, 2, 9], [97, 20, 12]), ([0, 40], [3, 130])]
else:
    PACKED_LENGTHS += [
        ([128], [128]),
        ([64, 257], [64, 257]),
        ([65, 2, 9], [300, 20, 12]),
        ([0, 140], [3, 200]),
    ]
# batch, heads, kv_heads: groups of 1, 2, 3 and 4 queries a key head, odd numbers of everything
HEADS = [(2, 2, 2), (3, 1, 1), (1, 3, 3), (1, 3, 1), (1, 4, 2), (2, 2, 1), (1, 4, 1)]
HEAD_DIMS = [16, 40, 64, 80, 128, 256, (32, 64), (96, 72)]  # of queries and of values, where they differ
# Repeated values meet every other value that much more often: BERT has neither a causal mask nor a window.
COMMON: dict[str, list[Any]] = {
    "dtype": list(DTYPES),
    "head_dim": HEAD_DIMS,
    "causal": [False, False, True],
    "window": [None, None, None, (5, 3), (20, 0), (-1, 0), (3, 40)],
    "dropout": [0.0, 0.0, 0.0, 0.15, 0.5],
    "scale": [None, None, 0.6, -0.6, 0.0],  # None, or in units of the usual one
    "queries": ["usual", "usual", "one large"],
    "lse": ["not returned", "returned", "differentiated"],
    "layout": list(LAYOUTS),
    "gradient": list(GRADIENTS),
}
PADDED: dict[str, list[Any]] = {
    "lengths": LENGTHS,
    "heads": HEADS,
    "mask": list(MASKS),
    "mask_dtype": ["fp32", "own"],
    "mask_layout": list(MASK_LAYOUTS),
    **COMMON,
}
PACKED: dict[str, list[Any]] = {
    "lengths": PACKED_LENGTHS,
    "heads": [(2, 2), (1, 1), (3, 1), (4, 2), (4, 1)],  # heads, kv_heads
    "max_seqlen": ["exact", "more"],
    **COMMON,
}


def may_be(case: Case) -> bool:
    """Not a softmax over one key: no score changes it, and the policy would judge rounding by an exact 0."""
    return not (case.get("lengths", (0, 0))[0] == 1 and case.get("causal", False))


USUAL = {"causal": False, "window": None, "dropout": 0.0, "scale": None, "queries": "usual", "mask": "none"}


def case_name(case: Case) -> str:
    """What a test is called: those values that aren't the usual ones."""
    words = {
        "causal": "causal",
        "dropout": "p{}",
        "head_dim": "dim {}",
        "scale": "scale {}",
        "window": "window {}",
    }
    shown = [
        words.get(name, "{}").format(value) for name, value in case.items() if value != USUAL.get(name, "")
    ]
    return ", ".join(shown).replace("[", "(").replace("]", ")")


def dims_of(case: Case) -> tuple[int, int]:
    """Head dimensions of queries and of values."""
    return case["head_dim"] if isinstance(case["head_dim"], tuple) else (case["head_dim"],) * 2


def options_of(case: Case) -> Options:
    return {
        "is_causal": case["causal"],
        "window_size": case["window"],
        "dropout_p": case["dropout"],
        "scale": None if case["scale"] is None else case["scale"] * dims_of(case)[0] ** -0.5,
        "return_lse": case["lse"] != "not returned",
    }


def lse_gradient_of(case: Case) -> Callable[[Tensor], Tensor] | None:
    if case["lse"] != "differentiated":
        return None
    return GRADIENTS["sum"] if case["gradient"] == "sum" else random_gradient


def tensors_of(
    case: Case, batch: int, heads: int, kv_heads: int, seq_q: int, seq_k: int, device: torch.device
) -> list[Tensor]:
    """Contiguous query, key and value."""
    dims = dims_of(case)
    query = values(batch, heads, seq_q, dims[0], device=device)
    if case["queries"] == "one large":
        query = enlarge_a_query(query)
    key, value = (values(batch, kv_heads, seq_k, dim, device=device) for dim in dims)
    return [t.to(DTYPES[case["dtype"]]) for t in (query, key, value)]


def padded_call(case: Case, device: torch.device) -> Call:
    """A call of a case from :data:`PADDED`."""
    (batch, heads, kv_heads), (seq_q, seq_k) = case["heads"], case["lengths"]
    query, key, value = tensors_of(case, batch, heads, kv_heads, seq_q, seq_k, device)
    dtype = F32 if case["mask_dtype"] == "fp32" else query.dtype
    options = MASKS[case["mask"]]((batch, heads, seq_q, seq_k), dtype, device)
    mask = options.get("attn_mask")
    mask_needs_grad = mask is not None and mask.requires_grad
    if mask is not None:
        mask = MASK_LAYOUTS[case["mask_layout"]](mask.detach())
        options["attn_mask"] = (
            mask.expand(batch, heads, seq_q, seq_k) if case["mask_layout"] == "expanded" else mask
        )
    return Call(
        scaled_dot_product_attention,
        reference.scaled_dot_product_attention,
        LAYOUTS[case["layout"]](query, key, value),
        options={**options, **options_of(case), "enable_gqa": heads != kv_heads},
        mask_needs_grad=mask_needs_grad,
        gradient=GRADIENTS[case["gradient"]],
        lse_gradient=lse_gradient_of(case),
    )


def packed_call(case: Case, device: torch.device) -> Call:
    """A call of a case from :data:`PACKED`; three rows beyond the last offset hold NaN."""
    (heads, kv_heads), (lens_q, lens_k) = case["heads"], case["lengths"]
    query, key, value = tensors_of(case, 1, heads, kv_heads, sum(lens_q) + 3, sum(lens_k) + 3, device)
    for t in (query, key, value):
        t[..., -3:, :] = NAN
    more = 3 if case["max_seqlen"] == "more" else 0
    return Call(
        varlen_attention,
        reference.varlen_attention,
        [t.squeeze(0).transpose(0, 1) for t in LAYOUTS[case["layout"]](query, key, value)],
        (offsets(lens_q, device), offsets(lens_k, device), max(lens_q) + more, max(lens_k) + more),
        options_of(case),
        gradient=GRADIENTS[case["gradient"]],
        lse_gradient=lse_gradient_of(case),
    )


def offsets(lens: list[int], device: torch.device) -> Tensor:
    """cu_seqlens of some lengths."""
    return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=device)


# --- judging ------------------------------------------------------------------------------------------------


def leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A leaf of the autograd graph, with the strides of `x` unless its dtype changes."""
    return x.detach().to(dtype or x.dtype).requires_grad_()


def run(
    call: Call, upcast: bool | None = None, dy: Tensor | None = None, dlse: Tensor | None = None
) -> dict[str, Any]:
    """What `call` gives, by name: out, lse, gradients, and the gradients dy and dlse that went in.

    Args:
        upcast: None calls what is tested, on :data:`BACKEND`; else the reference, with the same dropout mask.
    """
    dtype = torch.float64 if upcast else None
    leaves = {name: leaf(t, dtype) for name, t in zip("qkv", call.qkv, strict=True)}
    given, options = list(leaves.values()), dict(call.options)
    if call.mask_needs_grad:
        leaves["mask"] = options["attn_mask"] = leaf(options["attn_mask"], dtype)
    torch.manual_seed(5)
    if upcast is None:
        with dispatch.use_backend(BACKEND):
            result = call.function(*given, *call.args, **options)
    else:
        if options["dropout_p"]:
            options["dropout_key"] = dropout_key(given[0].device)
        result = call.truth(*given, *call.args, **options, upcast=upcast)
    out, lse = result if options["return_lse"] else (result, None)
    found = {"out": out, "lse": lse}
    found["dy"] = call.gradient(out) if dy is None else dy.to(out.dtype)
    outputs, gradients = [out], [found["dy"]]
    if call.lse_gradient is not None:
        found["dlse"] = call.lse_gradient(lse) if dlse is None else dlse.to(lse.dtype)
        outputs.append(lse)
        gradients.append(found["dlse"])
    grads = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def score_magnitude(call: Call) -> Tensor:
    """How large the terms of a query's scores are: what an LSE may be wrong by, in fp32 eps. ``[.., heads, seq]``"""
    query, key, _ = (t.detach().double().abs().nan_to_num(0.0) for t in call.qkv)
    if query.dim() == 3:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = call.options["scale"]
    return (query @ key.mT).amax(-1) * (query.shape[-1] ** -0.5 if scale is None else abs(scale)) + 1.0


def check(call: Call) -> None:
    """Output and every gradient by the policy, the LSE as an fp32 statistic; all three runs drop the same weights."""
    ours = run(call)
    given = {"dy": ours["dy"], "dlse": ours.get("dlse")}
    truth, naive = (run(call, upcast, **given) for upcast in (True, False))
    if ours["lse"] is not None:
        assert_statistic(ours["lse"], truth["lse"], scale=score_magnitude(call), name="lse")
    assert (ours["lse"] is None) == (truth["lse"] is None)
    for name in ("out", "dq", "dk", "dv"):
        assert_close_to_truth(ours[name], truth[name], naive[name], name=name)
    if call.mask_needs_grad:  # of 16-bit products: a 16-bit number, be it stored in fp32
        dtype = call.qkv[0].dtype
        assert_close_to_truth(ours["dmask"].to(dtype), truth["dmask"], naive["dmask"].to(dtype), name="dmask")


# --- calls for tests of one thing ---------------------------------------------------------------------------

SMALL: Case = {
    "dtype": "fp32", "head_dim": 16, "causal": False, "window": None, "dropout": 0.0, "scale": None,
    "queries": "usual", "lse": "differentiated", "layout": "contiguous", "gradient": "dense",
}  # fmt: skip


def padded(device: torch.device, **changes: Any) -> Call:
    """A small padded call, but for the changes to its case."""
    case = {
        "lengths": (17, 33),
        "heads": (2, 2, 2),
        "mask": "none",
        "mask_dtype": "own",
        "mask_layout": "dense",
    }
    return padded_call({**SMALL, **case, **changes}, device)


def packed(device: torch.device, **changes: Any) -> Call:
    """A small packed call, but for the changes to its case."""
    case = {"lengths": ([17, 0, 33, 1], [17, 4, 20, 1]), "heads": (2, 2), "max_seqlen": "exact"}
    return packed_call({**SMALL, **case, **changes}, device)
