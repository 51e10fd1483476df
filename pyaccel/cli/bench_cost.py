"""What ``pyaccel bench --cost`` prints: launches, FLOPs and bytes of a whole BERT, stock beside accelerated."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.table import Table

from pyaccel.cli.console import check_writable, output
from pyaccel.errors import UserInputError

if TYPE_CHECKING:
    import torch

    from pyaccel.cost.model import Part
    from pyaccel.cost.roofline import Card

CPU = "this CPU"
BAR = 40  # characters


def show_cost(
    model: str,
    batch: int,
    seq_len: int,
    lengths: str,
    dtype: str,
    *,
    training: bool,
    backend: str,
    by_op: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print what stock and accelerated model cost, as tables or JSON, and draw the roofline's times into ``plot``."""
    from pyaccel.cost import model as model_cost
    from pyaccel.cost.roofline import CARDS
    from pyaccel.dtypes import DTYPES
    from pyaccel.errors import NotSupportedError

    if dtype not in DTYPES:
        raise UserInputError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    check_writable(plot, "--plot")
    try:
        config = model_cost.bert_config(model)
        mix = model_cost.length_mix(lengths, batch, seq_len)
        if seq_len > config.max_position_embeddings:
            raise ValueError(f"--seq-len {seq_len}: the model has {config.max_position_embeddings} positions")
        costs = model_cost.model_costs(config, mix, DTYPES[dtype], training=training, backend=backend)
    except (ValueError, NotSupportedError, ImportError) as error:
        raise UserInputError(str(error)) from error
    cards = {**CARDS, CPU: measured_card(DTYPES[dtype])}
    mode = "training" if training else "evaluation"
    title = f"{model}, {batch} x {seq_len} ({lengths}: {sum(mix)} tokens), {dtype}, {mode}"
    if as_json:
        typer.echo(json.dumps({side: _as_dict(parts, cards) for side, parts in costs.items()}, indent=1))
    else:
        _print(title, costs, cards, backend, by_op)
    if plot is not None:
        draw(title, costs, cards, plot)


def _print(
    title: str, costs: dict[str, list[Part]], cards: dict[str, Card], backend: str, by_op: bool
) -> None:
    console = output(width=140)
    console.print(_parts_table(title, costs, backend))
    if by_op:
        console.print(_ops_table(costs))
    console.print(_cards_table(costs, cards))


def draw(title: str, costs: dict[str, list[Part]], cards: dict[str, Card], file: Path) -> None:
    """Each card's least time, stock beside accelerated, as bars; the format is that of the file's name."""
    from pyaccel.benchmarks.report import OUR_COLOUR, matplotlib_figure
    from pyaccel.cost.model import least_seconds

    try:
        figure_class, _ = matplotlib_figure()
        figure = figure_class(figsize=(8, 1.5 + 0.6 * len(cards)))
        axes = figure.subplots()
        for shift, (side, parts) in zip((-0.2, 0.2), costs.items(), strict=True):
            times = [least_seconds(parts, card) * 1e3 for card in cards.values()]
            places = [i + shift for i in range(len(cards))]
            colour = OUR_COLOUR if side == "accelerated" else "#6b7280"
            axes.barh(places, times, height=0.38, label=side, color=colour)
            for place, time_ms in zip(places, times, strict=True):
                axes.annotate(f" {time_ms:.3g}", (time_ms, place), va="center", fontsize=8)
        axes.set_xscale("log")
        axes.set_yticks(range(len(cards)), list(cards))
        axes.invert_yaxis()
        axes.set_xlabel("least time by the roofline, ms")
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
        figure.savefig(file, dpi=150, bbox_inches="tight")
    except (ImportError, ValueError, OSError) as error:  # no matplotlib, an unknown format, no such folder
        raise UserInputError(f"--plot {file}: {error}") from error


def measured_card(dtype: torch.dtype) -> Card:
    """This CPU's rates: the best of a few copies and of a few large matrix products in ``dtype``."""
    import torch

    from pyaccel.cost.roofline import Card

    source = torch.ones(32 * 2**20)
    target = torch.empty_like(source)
    a = torch.ones(1024, 1024, dtype=dtype)

    def best(call: Any) -> float:
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return min(taken)

    return Card(
        bandwidth=2 * source.nbytes / best(lambda: target.copy_(source)),
        flops=2 * 1024**3 / best(lambda: a @ a),
    )


def _as_dict(parts: list[Part], cards: dict[str, Card]) -> dict[str, Any]:
    from pyaccel.cost import model as model_cost

    return {
        **model_cost.figures(parts),
        "layers": [part.as_dict() for part in parts],
        "ops": model_cost.by_op(parts),
        "least_seconds": {name: model_cost.least_seconds(parts, card) for name, card in cards.items()},
    }


def _parts_table(title: str, costs: dict[str, list[Part]], backend: str) -> Table:
    from pyaccel.cost.model import figures

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("part")
    columns = (
        ("launches", 1, "d"),
        ("flops", 1e9, ",.1f"),
        ("bytes_moved", 1e6, ",.1f"),
        ("bytes_saved", 1e6, ",.1f"),
    )
    for heading in ("launches", "GFLOP", "MB moved", "MB saved"):
        table.add_column(f"{heading}\nstock", justify="right")
        table.add_column("\naccelerated", justify="right")
    rows: dict[str, list[dict[str, int] | None]] = {}
    for side, parts in enumerate(costs.values()):
        for name, part in _grouped(parts).items():
            rows.setdefault(name, [None, None])[side] = figures([part])
    total: list[dict[str, int] | None] = [figures(parts) for parts in costs.values()]
    # Packing and unpacking are on one side only: in the order of the side that has them.
    order = list(_grouped(costs["accelerated"]))
    for name in [*order, *(name for name in rows if name not in order)]:
        table.add_row(name, *_cells(rows[name], columns))
    table.add_section()
    table.add_row("all", *_cells(total, columns))
    table.caption = (
        "moved: read and written by every operator, weights among it; saved: for backward. "
        f"Stock: transformers in eager mode with SDPA; accelerated: backend {backend}."
    )
    return table


def _cells(sides: list[dict[str, int] | None], columns: tuple[tuple[str, float, str], ...]) -> list[str]:
    return [
        "" if side is None else format(side[key] if form == "d" else side[key] / unit, form)
        for key, unit, form in columns
        for side in sides
    ]


def _grouped(parts: list[Part]) -> dict[str, Part]:
    """Name -> part, where layers that cost the same are one row."""
    from pyaccel.cost.model import figures

    layers = [part for part in parts if part.name.startswith("layer ")]
    if len({tuple(figures([part]).values()) for part in layers}) > 1:
        return {part.name: part for part in parts}
    found = {part.name: part for part in parts if part not in layers[1:]}
    return {
        (f"each of {len(layers)} layers" if part is layers[0] else name): part for name, part in found.items()
    }


def _ops_table(costs: dict[str, list[Part]]) -> Table:
    from pyaccel.cost.model import by_op

    table = Table(title="by operator", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", "operator"):
        table.add_column(heading)
    for heading in ("launches", "GFLOP", "MB moved"):
        table.add_column(heading, justify="right")
    for side, parts in costs.items():
        for i, (op, one) in enumerate(by_op(parts).items()):
            figures = (str(one["launches"]), f"{one['flops'] / 1e9:,.1f}", f"{one['bytes_moved'] / 1e6:,.1f}")
            table.add_row("" if i else side, op, *figures)
        table.add_section()
    return table


def _cards_table(costs: dict[str, list[Part]], cards: dict[str, Card]) -> Table:
    from pyaccel.cost.model import least_seconds

    table = Table(title="least time", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("card")
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column("of stock", justify="right")
    table.add_column("")
    for name, card in cards.items():
        seconds = {side: least_seconds(parts, card) for side, parts in costs.items()}
        longest = max(seconds.values())
        for i, (side, taken) in enumerate(seconds.items()):
            bar = "█" * max(1, round(BAR * taken / longest))
            share = f"{taken / seconds['stock']:.0%}" if i else ""
            table.add_row(
                "" if i else name, side, f"{taken * 1e3:,.3g}", share, bar, style="green" if i else None
            )
    table.caption = (
        "each operator's bytes or FLOPs, whichever takes longer, at datasheet rates of 16-bit matrix units (this CPU: "
        "measured now), without "
        "launches and the gaps between them: no card reaches it"
    )
    return table
