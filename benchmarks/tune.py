"""What `pyaccel tune` measures: each way to serve an op that dispatch may choose from, at the sizes of real models.

The ways are timed as variants of a case, answers checked first, in turn. What comes of it is a table that
:mod:`pyaccel.tuned` reads: microseconds by way and size, of this machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyaccel.benchmarks import (
    attention,
    bert_embeddings,
    bias_gelu,
    int8_linear,
    linear_activation,
    masked_lm_cross_entropy,
    residual_layernorm,
    varlen_attention,
)
from pyaccel.benchmarks.attention_shapes import Shape
from pyaccel.benchmarks.method import Row, measure, provenance
from pyaccel.benchmarks.registry import Case, Variant
from pyaccel.benchmarks.table import bad
from pyaccel.ops import _attention_torch as attention_on_host
from pyaccel.tuned import NOISE, asked, ignored, machine, trying

BACKENDS = {"triton": ("pyaccel triton",), "torch": ("pyaccel torch",)}
ROWS = (1, 16, 128, 1024, 4096)
LAYERS = ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768))


@dataclass(frozen=True)
class Tunable:
    """One op that dispatch chooses ways for.

    Attributes:
        op: as :mod:`pyaccel.tuned` names it.
        case: whose variants the ways are.
        ways: way -> variants, of which the fastest counts.
        size: a size of the case -> that of the table.
        sizes: label -> sizes of the case; the case's own sweep by default.
    """

    op: str
    case: Case
    ways: Mapping[str, tuple[str, ...]]
    size: Callable[[Any], tuple[int, ...]]
    sizes: dict[str, Any] | None = None


class WrongAnswerError(RuntimeError):
    """A way of ours gave a wrong answer, or raised: nothing can be said about its speed."""


def tunables(device: torch.device, ops: Iterable[str] | None = None, *, quick: bool = False) -> list[Tunable]:
    """What there is to measure on that kind of device, or of it the ops named.

    Raises:
        ValueError: an op that nothing is to be measured for.
    """
    known = _on_gpu() if device.type == "cuda" else _on_cpu()
    if quick:
        known = [_first(one, device) for one in known]
    if ops is None:
        return known
    wanted, names = set(ops), [one.op for one in known]
    if unknown := wanted - set(names):
        raise ValueError(
            f"nothing is to be chosen for {', '.join(sorted(unknown))} on {device.type}: expected some of "
            f"{', '.join(names)}"
        )
    return [one for one in known if one.op in wanted]


def _first(one: Tunable, device: torch.device) -> Tunable:
    sizes = one.sizes or one.case.sweep(device)
    return dataclasses.replace(one, sizes=dict(list(sizes.items())[:2]))


def _on_cpu() -> list[Tunable]:
    return [
        Tunable(
            "linear_activation",
            linear_activation.CASE,
            {"onednn": ("pyaccel torch",), "plain": ("eager",)},
            lambda size: size[:3],
            {
                f"{rows}x{n_in} to {n_out}": (rows, n_in, n_out, "forward")
                for n_in, n_out in LAYERS
                for rows in ROWS
            },
        ),
        Tunable(
            "varlen_attention",
            ONE_SEQUENCE,
            {"matmul": ("pyaccel matmul",), "sdpa": ("pyaccel SDPA",)},
            lambda shape: (shape.seq, shape.heads, shape.head_dim),
        ),
        Tunable(
            "int8_matmul",
            int8_linear.CASE,
            {**BACKENDS, "floating": ("floating", "floating, torch.compile")},
            lambda size: size,
        ),
    ]


def _on_gpu() -> list[Tunable]:
    def forward(case: Case, is_forward: Callable[[Any], bool]) -> dict[str, Any]:
        return {label: size for label, size in case.sizes.items() if is_forward(size)}

    def of_shape(shape: Shape) -> tuple[int, ...]:
        return shape.seq, shape.heads, shape.head_dim

    return [
        *(
            Tunable(op, case, BACKENDS, of_shape, forward(case, lambda shape: not shape.backward))
            for op, case in (
                ("scaled_dot_product_attention", attention.CASE),
                ("varlen_attention", varlen_attention.CASE),
            )
        ),
        Tunable("residual_layernorm", residual_layernorm.CASE, BACKENDS, lambda size: size),
        Tunable(
            "bias_gelu", bias_gelu.CASE, BACKENDS, lambda size: size[:2],
            forward(bias_gelu.CASE, lambda size: size[2] == "forward+backward"),
        ),
        Tunable(
            "bert_embeddings", bert_embeddings.CASE, BACKENDS, lambda size: (size[0] * size[1], size[2]),
            forward(bert_embeddings.CASE, lambda size: not size[4]),
        ),
        Tunable(
            "linear_activation", linear_activation.CASE, BACKENDS, lambda size: size[:3],
            forward(linear_activation.CASE, lambda size: size[3] == "forward"),
        ),
        Tunable(
            "masked_lm_cross_entropy", masked_lm_cross_entropy.CASE, BACKENDS, lambda size: size[:3],
            forward(masked_lm_cross_entropy.CASE, lambda size: size[3] == "forward"),
        ),
        Tunable(
            "int8_matmul", int8_linear.CASE,
            {**BACKENDS, "floating": ("floating", "floating, torch.compile")}, lambda size: size,
        ),
    ]  # fmt: skip


# ---- attention of one sequence on a CPU, the two ways the torch backend has ----


def _by_matmul(p: varlen_attention.Problem) -> Callable[[], varlen_attention.Outputs]:
    query, key, value = p.tensors
    scratch = query.new_empty(2, query.shape[1] * p.shape.seq**2)
    return torch.no_grad()(lambda: (attention_on_host.matmul_attention(query, key, value, None, scratch),))


def _by_sdpa(p: varlen_attention.Problem) -> Callable[[], varlen_attention.Outputs]:
    query, key, value = (t.transpose(0, 1)[None] for t in p.tensors)
    return torch.no_grad()(
        lambda: (attention_on_host.sdpa(query, key, value, None, None, None).transpose(1, 2).flatten(0, 1),)
    )


def _sequence(heads: int, head_dim: int, seq: int) -> Shape:
    return Shape(heads, head_dim, seq, (seq,), backward=False)


ONE_SEQUENCE = dataclasses.replace(
    varlen_attention.CASE,
    name="one_sequence",
    cpu_sizes={
        f"{heads}x{head_dim} {seq}": _sequence(heads, head_dim, seq)
        for heads, head_dim in ((12, 32), (12, 64))
        for seq in (16, 32, 64, 96, 128, 192, 256, 384, 512)
    },
    smoke={"2x8 9": _sequence(2, 8, 9)},
    variants=(Variant("pyaccel matmul", _by_matmul), Variant("pyaccel SDPA", _by_sdpa)),
)


# ---- tables ----


def tune(
    one: Tunable,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rounds: int,
    smoke: bool = False,
    done: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure, and return the table for :func:`pyaccel.tuned.write`: machine, dtype, provenance, rows.

    Raises:
        WrongAnswerError: a way of ours is wrong, and nothing may be written.
    """
    sizes = one.case.smoke if smoke else one.sizes or one.case.sweep(device)
    variants = {name for names in one.ways.values() for name in names}
    case = dataclasses.replace(one.case, variants=tuple(v for v in one.case.variants if v.name in variants))
    rows = []
    with ignored():  # what was measured before must not decide what is measured now
        for row in measure(case, dtype, device, rounds=rounds, seconds=10.0, smoke=smoke, sizes=sizes):
            if bad(row):
                raise WrongAnswerError(f"{one.op}, {row.variant} at {row.size}: {row.note}")
            done(row)
            rows.append(row)
    return _as_table(dtype, device, list(_rows(one, sizes, rows)))


def _as_table(dtype: torch.dtype, device: torch.device, rows: list[dict[str, Any]]) -> dict[str, Any]:
    where = provenance(device)
    return {
        "machine": machine(device),
        "dtype": str(dtype).removeprefix("torch."),
        **{name: where[name] for name in ("device", "torch", "triton", "commit", "date")},
        "rows": rows,
    }


def _rows(one: Tunable, sizes: dict[str, Any], rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for label, size in sizes.items():
        times = {row.variant: row.ms for row in rows if row.size == label and row.timed}
        us = {}
        for way, names in one.ways.items():
            taken = [round(1e3 * times[name], 1) for name in names if name in times]
            if taken:
                us[way] = min(taken)
        if us:
            yield {"size": list(one.size(size)), "us": us}


# ---- launch configurations, on a GPU ----


@dataclass(frozen=True)
class Launch:
    """A kernel whose launch is tuned: at these sizes of a case, whose Triton variant calls it."""

    kernel: str
    case: Case
    sizes: dict[str, Any]


def launches() -> list[Launch]:
    """The kernels whose configurations are looked for."""
    backward = {label: s for label, s in attention.CASE.sizes.items() if s.backward and s.seq >= 512}
    forward = {label: s for label, s in attention.CASE.sizes.items() if not s.backward and s.seq >= 512}
    rows = {label: s for label, s in residual_layernorm.CASE.sizes.items() if s[0] == 16384}
    products = {
        label: s for label, s in linear_activation.CASE.sizes.items() if s[0] >= 2048 and s[3] == "forward"
    }
    codes = {label: s for label, s in int8_linear.CASE.sizes.items() if s[0] >= 2048}
    return [
        Launch("residual_layernorm_forward", residual_layernorm.CASE, rows),
        Launch("residual_layernorm_backward", residual_layernorm.CASE, rows),
        Launch("attention_forward", attention.CASE, forward),
        Launch("attention_dquery", attention.CASE, backward),
        Launch("attention_dkey_dvalue", attention.CASE, backward),
        Launch("linear_activation", linear_activation.CASE, products),
        Launch("int8_matmul", int8_linear.CASE, codes),
    ]


def candidates(default: Any) -> list[Any]:
    """Configurations one step away: half or twice of one field. What a launch can't do, or does wrong, is out later."""
    found = []
    for name, least, most in (
        ("block_rows", 1, 64), ("block_m", 16, 256), ("block_n", 16, 256), ("block_k", 32, 256),
        ("num_warps", 1, 16), ("num_stages", 1, 6), ("programs_per_sm", 1, 16),
    ):  # fmt: skip
        value = getattr(default, name, 0)
        if not value or (name == "block_n" and hasattr(default, "block_rows")):
            continue  # there is none; or a row's width, which is what it is
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        found += [dataclasses.replace(default, **{name: step}) for step in steps if least <= step <= most]
    return found


def tune_launch(
    one: Launch,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rounds: int,
    smoke: bool = False,
    done: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Time a kernel's default configuration beside its neighbours; the table for :func:`pyaccel.tuned.write`."""
    (triton,) = (variant for variant in one.case.variants if variant.name == "pyaccel triton")
    rows, seen = [], set()
    for label, size in (one.case.smoke if smoke else one.sizes).items():
        problem = one.case.problem(size, dtype, device)
        with ignored():
            asked_for = asked(one.kernel, triton.prepare(problem))
            if asked_for is None or asked_for[0] in seen:
                continue  # another kernel serves this size; or it was measured at another one
            key, default = asked_for
            seen.add(key)
            configs = {config.label: config for config in [default, *candidates(default)]}
            case = dataclasses.replace(
                one.case, variants=tuple(_launched(one.kernel, triton, c) for c in configs.values())
            )
            times = {}
            for row in measure(case, dtype, device, rounds=rounds, seconds=20.0, sizes={label: size}):
                done(row)
                if row.timed:
                    times[row.variant] = row.ms * 1e3
        if default.label not in times:
            raise WrongAnswerError(f"{one.kernel}, {default.label} at {label} was not timed")
        best = min(times, key=times.__getitem__)
        fields = dataclasses.asdict(configs[best])
        changed = {n: v for n, v in fields.items() if v != getattr(default, n)}
        if times[best] * NOISE > times[default.label]:
            best, changed = default.label, {}
        us = {"default": round(times[default.label], 1), "best": round(times[best], 1)}
        rows.append({"size": list(key), "us": us, "config": changed})
    return _as_table(torch.int8 if one.kernel == "int8_matmul" else dtype, device, rows)


def _launched(kernel: str, variant: Variant, config: Any) -> Variant:
    def prepare(p: Any) -> Callable[[], tuple[torch.Tensor, ...]]:
        call = variant.prepare(p)

        def launched() -> tuple[torch.Tensor, ...]:
            with trying(kernel, config):
                return call()

        return launched

    return dataclasses.replace(variant, name=config.label, prepare=prepare, missing=lambda p: None)
