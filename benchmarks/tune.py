"""What `pyaccel tune` measures: each way to serve an op that dispatch may choose from, at the sizes of real models.

The implementations are timed as variants of a case, answers checked first, in turn. What comes of it is a table that
:mod:`pyaccel.tuning` reads: microseconds by way and size, of this machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pyaccel.benchmarks.case import Case, Variant
from pyaccel.benchmarks.cases import (
    attention,
    bias_act,
    embeddings,
    int8,
    layernorm,
    linear,
    mlm_loss,
    varlen_attention,
)
from pyaccel.benchmarks.cases.attention_shapes import Shape, results
from pyaccel.benchmarks.cases.common import Outputs, Problem
from pyaccel.benchmarks.method import Row, measure
from pyaccel.benchmarks.table import bad
from pyaccel.machine import kind, provenance
from pyaccel.ops.attention import matmul as products
from pyaccel.ops.attention.sdpa import sdpa
from pyaccel.ops.linear import onednn
from pyaccel.tuning import NOISE, disabled, launches_of, override_config, ranges

BACKENDS = {"triton": ("pyaccel triton",), "torch": ("pyaccel torch",)}
INT8 = {**BACKENDS, "floating": ("floating", "floating, torch.compile")}
ROWS = (1, 16, 128, 1024, 4096)
LAYERS = ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768))


class WrongAnswerError(RuntimeError):
    """A way of ours gave a wrong answer, or raised: nothing can be said about its speed."""


@dataclass(frozen=True)
class Tunable:
    """One op that dispatch chooses implementations for.

    Attributes:
        name: the op's, as :mod:`pyaccel.tuning` has it.
        case: whose variants the implementations are.
        implementations: way -> variants, of which the fastest counts.
        size: a size of the case -> that of the table.
        sizes: label -> sizes of the case.
    """

    name: str
    case: Case
    implementations: Mapping[str, tuple[str, ...]]
    size: Callable[[Any], tuple[int, ...]]
    sizes: Mapping[str, Any]
    once: ClassVar[bool] = False  # whether one dtype says all

    def table(
        self,
        dtype: torch.dtype,
        device: torch.device,
        rounds: int,
        done: Callable[[Row], None] = lambda row: None,
    ) -> dict[str, Any]:
        """Measure, and return the table for :func:`pyaccel.tuning.write`: machine, dtype, provenance, rows.

        Raises:
            WrongAnswerError: a way is wrong, and nothing may be written.
        """
        variants = {name for names in self.implementations.values() for name in names}
        case = dataclasses.replace(
            self.case, variants=tuple(v for v in self.case.variants if v.name in variants)
        )
        rows = []
        with disabled():  # what was measured before must not decide what is measured now
            for row in measure(case, dtype, device, rounds=rounds, seconds=10.0, sizes=dict(self.sizes)):
                if bad(row):
                    raise WrongAnswerError(f"{self.name}, {row.variant} at {row.size}: {row.note}")
                done(row)
                rows.append(row)
        return _as_table(dtype, device, list(self._lines(rows)))

    def _lines(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        for label, size in self.sizes.items():
            times = {row.variant: row.ms for row in rows if row.size == label and row.timed}
            us = {}
            for way, names in self.implementations.items():
                taken = [round(1e3 * times[name], 1) for name in names if name in times]
                if taken:
                    us[way] = min(taken)
            if us:
                yield {"size": list(self.size(size)), "us": us}


@dataclass(frozen=True)
class Launch:
    """A kernel whose launch configuration is looked for, on a GPU.

    Attributes:
        kernel: its name, as the ops give it to :func:`pyaccel.tuning.launch`.
        case: whose Triton variant launches it.
        sizes: label -> sizes of the case.
        own_dtype: of what it reads, where that isn't the case's.
    """

    kernel: str
    case: Case
    sizes: Mapping[str, Any]
    own_dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        """The table's."""
        return f"launch_{self.kernel}"

    @property
    def once(self) -> bool:
        """Whether one dtype says all."""
        return self.own_dtype is not None

    def table(
        self,
        dtype: torch.dtype,
        device: torch.device,
        rounds: int,
        done: Callable[[Row], None] = lambda row: None,
    ) -> dict[str, Any]:
        """Time the default configuration beside its neighbors; as :meth:`Tunable.table`.

        A configuration that fails or is wrong is out; the default may not be.
        """
        (triton,) = (variant for variant in self.case.variants if variant.name == "pyaccel triton")
        lines: dict[tuple[int, ...], dict[str, Any]] = {}
        for label, size in self.sizes.items():
            problem = self.case.problem(size, dtype, device)
            with disabled():
                found = launches_of(self.kernel, triton.prepare(problem))
                if found is None or found[0] in lines:
                    continue  # another kernel serves this size; or it was measured at another one
                key, default = found
                configs = {config.label: config for config in [default, *candidates(default)]}
                variants = tuple(_launched(self.kernel, triton, config) for config in configs.values())
                case = dataclasses.replace(self.case, variants=variants)
                times = {}
                for row in measure(case, dtype, device, rounds=rounds, seconds=20.0, sizes={label: size}):
                    done(row)
                    if row.timed:
                        times[row.variant] = 1e3 * row.ms
            if default.label not in times:
                raise WrongAnswerError(f"{self.kernel}, {default.label} at {label} was not timed")
            best = min(times, key=times.__getitem__)
            if times[best] * NOISE > times[default.label]:
                best = default.label
            chosen = dataclasses.asdict(configs[best])
            lines[key] = {
                "size": list(key),
                "us": {"default": round(times[default.label], 1), "best": round(times[best], 1)},
                "config": {name: value for name, value in chosen.items() if value != getattr(default, name)},
            }
        return _as_table(self.own_dtype or dtype, device, list(lines.values()))


def tunables(
    device: torch.device, names: Iterable[str] | None = None, *, quick: bool = False
) -> list[Tunable | Launch]:
    """What there is to measure on that kind of device, or of it what is named; ``quick``: two sizes of each.

    Raises:
        ValueError: a name that nothing is to be measured for.
    """
    known: list[Tunable | Launch] = [*_on_gpu(), *_launches()] if device.type == "cuda" else [*_on_cpu()]
    if quick:
        known = [dataclasses.replace(one, sizes=dict(list(one.sizes.items())[:2])) for one in known]
    if names is None:
        return known
    wanted, listed = set(names), [one.name for one in known]
    if unknown := wanted - set(listed):
        raise ValueError(
            f"nothing is to be chosen for {', '.join(sorted(unknown))} on {device.type}: expected some of "
            f"{', '.join(listed)}"
        )
    return [one for one in known if one.name in wanted]


def _as_table(dtype: torch.dtype, device: torch.device, rows: list[dict[str, Any]]) -> dict[str, Any]:
    where = provenance(device)
    return {
        "machine": kind(device),
        "dtype": str(dtype).removeprefix("torch."),
        **{name: where[name] for name in ("device", "torch", "triton", "commit", "date")},
        "rows": rows,
    }


# ---- ops ----


def _on_cpu() -> list[Tunable]:
    return [
        Tunable(
            "linear_activation",
            ONE_PRODUCT,
            {"onednn": ("pyaccel oneDNN",), "eager": ("pyaccel F.linear",)},
            lambda size: size[:3],
            ONE_PRODUCT.sizes,
        ),
        Tunable(
            "varlen_attention",
            ONE_SEQUENCE,
            {"matmul": ("pyaccel matmul",), "sdpa": ("pyaccel SDPA",)},
            _of_shape,
            ONE_SEQUENCE.sizes,
        ),
        Tunable(
            "varlen_attention_training",
            TRAINING,
            {"matmul": ("pyaccel matmul",), "sdpa": ("pyaccel SDPA",)},
            _of_shape,
            TRAINING.sizes,
        ),
        Tunable("int8_matmul", int8.CASE, INT8, lambda size: size, int8.CASE.cpu_sizes or {}),
    ]


def _of_shape(shape: Shape) -> tuple[int, ...]:
    return shape.seq, shape.heads, shape.head_dim


def _on_gpu() -> list[Tunable]:
    def of(
        case: Case, size: Callable[[Any], tuple[int, ...]], wanted: Callable[[Any], bool], name: str = ""
    ) -> Tunable:
        return Tunable(name or case.name, case, BACKENDS, size, _sizes(case, wanted))

    return [
        of(attention.CASE, _of_shape, lambda shape: not shape.backward, "scaled_dot_product_attention"),
        of(varlen_attention.CASE, _of_shape, lambda shape: not shape.backward),
        of(layernorm.CASE, lambda size: size, lambda size: True),
        of(bias_act.CASE, lambda size: size[:2], lambda size: size[2] == "forward+backward"),
        of(embeddings.CASE, lambda size: (size[0] * size[1], size[2]), lambda size: not size[4]),
        of(linear.CASE, lambda size: size[:3], lambda size: size[3] == "forward"),
        of(mlm_loss.CASE, lambda size: size[:3], lambda size: size[3] == "forward"),
        Tunable("int8_matmul", int8.CASE, INT8, lambda size: size, int8.CASE.sizes),
    ]


def _sizes(case: Case, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    return {label: size for label, size in case.sizes.items() if wanted(size)}


# ---- what the torch backend chooses between on a CPU: each way by itself, without the questions before it ----


def _product(way: Callable[..., torch.Tensor]) -> Callable[[Problem], Callable[[], Outputs]]:
    return lambda p: torch.no_grad()(lambda: (way(*p.leaves, "gelu"),))


ONE_PRODUCT = dataclasses.replace(
    linear.CASE,
    name="one_product",
    sizes={
        f"{rows}x{n_in} to {n_out}": (rows, n_in, n_out, "forward") for n_in, n_out in LAYERS for rows in ROWS
    },
    cpu_sizes=None,
    variants=(
        Variant("pyaccel oneDNN", _product(onednn.by_onednn)),
        Variant("pyaccel F.linear", _product(onednn.by_torch)),
    ),
)


def _by_matmul(p: varlen_attention.Problem) -> Callable[[], Outputs]:
    query, key, value = p.tensors
    scratch = query.new_empty(2, query.shape[1] * p.shape.seq**2)
    return torch.no_grad()(lambda: (products.evaluate(query, key, value, None, scratch),))


def _by_sdpa(p: varlen_attention.Problem) -> Callable[[], Outputs]:
    query, key, value = (t.transpose(0, 1)[None] for t in p.tensors)
    return torch.no_grad()(lambda: (sdpa(query, key, value, None, None, None).transpose(1, 2).flatten(0, 1),))


def _trains(name: str, way: Callable[..., torch.Tensor]) -> Variant:
    """Forward and backward, query, key and value being views of one product's result, as in a layer."""

    def prepare(p: varlen_attention.Problem) -> Callable[[], Outputs]:
        qkv = torch.stack([t.detach() for t in p.tensors], 1).requires_grad_()
        return lambda: results(lambda x: way(*x.unbind(1), p.shape.batch), (qkv,), p.grad)

    return Variant(name, prepare, outputs=lambda p, given: (given[0], *given[1].unbind(1)))


def _sdpa_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, count: int) -> torch.Tensor:
    q, k, v = (t.view(count, -1, *t.shape[1:]).transpose(1, 2) for t in (query, key, value))
    return sdpa(q, k, v, None, None, None).transpose(1, 2).flatten(0, 1)


def _products_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, count: int) -> torch.Tensor:
    return products.attention(query, key, value, count, None, 0.0)


def _batch(heads: int, head_dim: int, seq: int, count: int) -> Shape:
    return Shape(heads, head_dim, seq, (seq,) * count, backward=True)


def _sequence(heads: int, head_dim: int, seq: int) -> Shape:
    return Shape(heads, head_dim, seq, (seq,), backward=False)


ONE_SEQUENCE = dataclasses.replace(
    varlen_attention.CASE,
    name="one_sequence",
    sizes={
        f"{heads}x{head_dim} {seq}": _sequence(heads, head_dim, seq)
        for heads, head_dim in ((12, 32), (12, 64))
        for seq in (16, 32, 64, 96, 128, 192, 256, 384, 512)
    },
    cpu_sizes=None,
    smoke={"2x8 9": _sequence(2, 8, 9)},
    variants=(Variant("pyaccel matmul", _by_matmul), Variant("pyaccel SDPA", _by_sdpa)),
)

TRAINING = dataclasses.replace(
    ONE_SEQUENCE,
    name="training",
    sizes={
        f"{heads}x{head_dim} {1024 // seq} of {seq}": _batch(heads, head_dim, seq, 1024 // seq)
        for heads, head_dim in ((12, 32), (12, 64))
        for seq in (16, 32, 64, 96, 128, 192, 256, 384, 512)
    },
    smoke={"2x8 3 of 9": _batch(2, 8, 9, 3)},
    variants=(
        _trains("pyaccel matmul", _products_of),
        _trains("pyaccel SDPA", _sdpa_of),
    ),
)


# ---- launch configurations, on a GPU ----


def _launches() -> list[Launch]:
    rows = _sizes(layernorm.CASE, lambda size: size[0] == 16384)
    forward = _sizes(attention.CASE, lambda shape: not shape.backward and shape.seq >= 512)
    backward = _sizes(attention.CASE, lambda shape: shape.backward and shape.seq >= 512)
    products = _sizes(linear.CASE, lambda size: size[0] >= 2048 and size[3] == "forward")
    codes = _sizes(int8.CASE, lambda size: size[0] >= 2048)
    return [
        Launch("residual_layernorm_forward", layernorm.CASE, rows),
        Launch("residual_layernorm_backward", layernorm.CASE, rows),
        Launch("attention_forward", attention.CASE, forward),
        Launch("attention_dquery", attention.CASE, backward),
        Launch("attention_dkey_dvalue", attention.CASE, backward),
        Launch("linear_activation", linear.CASE, products),
        Launch("int8_matmul", int8.CASE, codes, torch.int8),
    ]


def candidates(default: Any) -> list[Any]:
    """Configurations one step away: half or twice of one field. What a launch can't do, or does wrong, is out later."""
    found = []
    for name, (least, most) in ranges(default).items():
        value = getattr(default, name)
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        found += [dataclasses.replace(default, **{name: step}) for step in steps if least <= step <= most]
    return found


def _launched(kernel: str, variant: Variant, config: Any) -> Variant:
    def prepare(p: Any) -> Callable[[], tuple[torch.Tensor, ...]]:
        call = variant.prepare(p)

        def launched() -> tuple[torch.Tensor, ...]:
            with override_config(kernel, config):
                return call()

        return launched

    return dataclasses.replace(variant, name=config.label, prepare=prepare, missing=lambda p: None)
