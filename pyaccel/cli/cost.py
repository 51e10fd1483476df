"""``pyaccel cost``: launches, bytes and the least time of a BERT or one of its layers, stock beside accelerated.

Everything is counted on tensors without data, on any machine; only a model's host time and this CPU's rates
are measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from pyaccel.cli.console import LARGEST, check_writable, output
from pyaccel.errors import NotSupportedError, UserInputError

if TYPE_CHECKING:
    from pyaccel.cost.host import HostCost
    from pyaccel.cost.layer import LayerSize
    from pyaccel.cost.model import Segment
    from pyaccel.cost.roofline import DeviceSpec

COLUMNS = ("launches", "backward", "moved MB", "of stock", "saved MB", "of stock", "least µs")
CPU = "this CPU"
BAR = 40  # characters


def cost(
    model: Annotated[
        str | None,
        typer.Option(help="minilm, bert-base, bert-large, or a BERT's folder. Default: one layer alone."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=LARGEST, help="Sequences.")] = 16,
    seq_len: Annotated[
        int, typer.Option(min=1, max=LARGEST, help="Tokens a sequence, or what they are padded to.")
    ] = 128,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    lengths: Annotated[
        str | None,
        typer.Option(help="Of a model: full; squad (46 % full on average); or sentences (20 %)."),
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="Of a model: forward with dropout, and backward.")
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(help="Of the accelerated model: auto, triton, torch (no kernels) or reference."),
    ] = None,
    by_op: Annotated[bool, typer.Option("--by-op", help="Of a model: also a table of operators.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a model's least times into this .svg, .png or .pdf.")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(max=LARGEST, help="Of a layer, as in config.json; 768.")
    ] = None,
    num_attention_heads: Annotated[int | None, typer.Option(max=LARGEST, help="The same; 12.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(max=LARGEST, help="The same; 3072.")] = None,
    card: Annotated[
        str | None, typer.Option(help="For a layer's least time: A100, H100, H200, L4 or MI300X; H200.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Count what a BERT, or one layer of it, launches, moves and saves for backward, stock and accelerated.

    With --model also FLOPs, the least time on several cards, and what a layer takes of the host: function calls and
    microseconds. Needs transformers and, for the kernels' side, triton; no GPU. Exits with 2 for bad options or where
    these are missing.
    """
    from pyaccel.cost.layer import LayerSize
    from pyaccel.dtypes import DTYPES

    if dtype not in DTYPES:
        raise UserInputError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    of_layer = {
        "--hidden-size": hidden_size,
        "--num-attention-heads": num_attention_heads,
        "--intermediate-size": intermediate_size,
        "--card": card,
    }
    of_model = {
        "--lengths": lengths,
        "--training": training or None,
        "--backend": backend,
        "--by-op": by_op or None,
        "--plot": plot,
    }
    wrong = [name for name, value in (of_model if model is None else of_layer).items() if value is not None]
    if wrong:
        which = "a whole model: give --model" if model is None else "one layer: leave --model out"
        raise UserInputError(f"{', '.join(wrong)}: only for {which}")
    try:
        if model is None:
            sizes = {"hidden": hidden_size, "heads": num_attention_heads, "intermediate": intermediate_size}
            given = {name: value for name, value in sizes.items() if value is not None}
            _layer(
                LayerSize(batch, seq_len, dtype=DTYPES[dtype], **given),
                "H200" if card is None else card,
                dtype,
                as_json,
            )
        else:
            check_writable(plot, "--plot")
            _model(
                model,
                batch,
                seq_len,
                "full" if lengths is None else lengths,
                dtype,
                training=training,
                backend="auto" if backend is None else backend,
                by_op=by_op,
                plot=plot,
                as_json=as_json,
            )
    except (ValueError, NotSupportedError, ImportError) as error:
        raise UserInputError(str(error)) from error


def _layer(size: LayerSize, card: str, dtype: str, as_json: bool) -> None:
    from pyaccel.cost import layer as lane
    from pyaccel.cost.roofline import DEVICE_SPECS

    if card not in DEVICE_SPECS:
        raise UserInputError(f"--card {card}: expected one of {', '.join(DEVICE_SPECS)}")
    try:
        costs = lane.layer_costs(size)
    except RuntimeError as error:  # no triton, or sizes that torch can't count
        raise UserInputError(str(error)) from error
    rows: list[dict[str, Any]] = [
        {
            "mode": mode,
            "layer": name,
            "forward_launches": one.forward_launches,
            "backward_launches": one.backward_launches,
            "activation_bytes": one.activation_bytes,
            "activation_bytes_of_stock": one.activation_bytes / costs[lane.STOCK][mode].activation_bytes,
            "saved_bytes": one.saved_bytes,
            "saved_bytes_of_stock": one.saved_bytes / max(costs[lane.STOCK][mode].saved_bytes, 1),
            "least_seconds": one.seconds(DEVICE_SPECS[card]),
        }
        for mode in lane.MODES
        for name, one in ((name, by_mode[mode]) for name, by_mode in costs.items())
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    title = f"one layer, {size.batch} x {size.seq} tokens, hidden size {size.hidden}, {dtype}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("mode")
    table.add_column("layer")
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        training = row["mode"] == "training"
        table.add_row(
            str(row["mode"]),
            str(row["layer"]),
            str(row["forward_launches"]),
            str(row["backward_launches"]) if training else "",
            f"{row['activation_bytes'] / 1e6:.1f}",
            f"{row['activation_bytes_of_stock']:.1%}",
            f"{row['saved_bytes'] / 1e6:.1f}" if training else "",
            f"{row['saved_bytes_of_stock']:.1%}" if training else "",
            f"{row['least_seconds'] * 1e6:.1f}",
        )
    table.caption = (
        "moved: activations read and written; saved: for backward; of stock: of the layer of transformers in eager "
        f"mode with SDPA; least: bytes and FLOPs at the datasheet rates of one {card}, without launches. "
        "Fused product: bias and GELU in the matrix product, which is on request until it has been measured."
    )
    output().print(table)


def _model(
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
    from pyaccel.cost import host, roofline
    from pyaccel.cost import model as model_cost
    from pyaccel.dtypes import DTYPES
    from pyaccel.machine import resolve_device

    config = model_cost.bert_config(model)
    mix = model_cost.length_mix(lengths, batch, seq_len)
    if seq_len > config.max_position_embeddings:
        raise ValueError(f"--seq-len {seq_len}: the model has {config.max_position_embeddings} positions")
    costs = model_cost.model_costs(config, mix, DTYPES[dtype], training=training, backend=backend)
    device = resolve_device("auto")
    hosts = host.encoder_host_costs(config.num_hidden_layers, device)
    cards = {**roofline.DEVICE_SPECS, CPU: roofline.measured_card(DTYPES[dtype])}
    mode = "training" if training else "evaluation"
    title = f"{model}, {batch} x {seq_len} ({lengths}: {sum(mix)} tokens), {dtype}, {mode}"
    if as_json:
        told = {
            side: {**_as_dict(parts, cards), "host": asdict(hosts[side])} for side, parts in costs.items()
        }
        typer.echo(json.dumps(told, indent=1))
    else:
        console = output()
        console.print(_parts_table(title, costs, backend))
        if by_op:
            console.print(_ops_table(costs))
        console.print(_cards_table(costs, cards))
        console.print(_host_table(hosts, device.type))
    if plot is not None:
        draw(title, costs, cards, plot)


def draw(title: str, costs: dict[str, list[Segment]], cards: dict[str, DeviceSpec], file: Path) -> None:
    """Each card's least time, stock beside accelerated, as bars; the format is that of the file's name."""
    from pyaccel.benchmarks.report import OUR_COLOR, matplotlib_figure
    from pyaccel.cost.model import least_seconds

    try:
        figure_class, _ = matplotlib_figure()
        figure = figure_class(figsize=(8, 1.5 + 0.6 * len(cards)))
        axes = figure.subplots()
        for shift, (side, parts) in zip((-0.2, 0.2), costs.items(), strict=True):
            times = [least_seconds(parts, card) * 1e3 for card in cards.values()]
            places = [i + shift for i in range(len(cards))]
            color = OUR_COLOR if side == "accelerated" else "#6b7280"
            axes.barh(places, times, height=0.38, label=side, color=color)
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


def _as_dict(parts: list[Segment], cards: dict[str, DeviceSpec]) -> dict[str, Any]:
    from pyaccel.cost import model as model_cost

    return {
        **model_cost.figures(parts),
        "layers": [part.as_dict() for part in parts],
        "ops": model_cost.by_op(parts),
        "least_seconds": {name: model_cost.least_seconds(parts, card) for name, card in cards.items()},
    }


def _parts_table(title: str, costs: dict[str, list[Segment]], backend: str) -> Table:
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


def _grouped(parts: list[Segment]) -> dict[str, Segment]:
    """Name -> part, where layers that cost the same are one row."""
    from pyaccel.cost.model import figures

    layers = [part for part in parts if part.name.startswith("layer ")]
    if len({tuple(figures([part]).values()) for part in layers}) > 1:
        return {part.name: part for part in parts}
    found = {part.name: part for part in parts if part not in layers[1:]}
    return {
        (f"each of {len(layers)} layers" if part is layers[0] else name): part for name, part in found.items()
    }


def _ops_table(costs: dict[str, list[Segment]]) -> Table:
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


def _cards_table(costs: dict[str, list[Segment]], cards: dict[str, DeviceSpec]) -> Table:
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


def _host_table(hosts: dict[str, HostCost], device: str) -> Table:
    table = Table(title="host, a layer", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for heading in ("function calls", "of them pyaccel's", "least µs"):
        table.add_column(heading, justify="right")
    for side, one in hosts.items():
        table.add_row(side, f"{one.calls:,.0f}", f"{one.project_calls:,.0f}", f"{one.microseconds:,.1f}")
    table.caption = (
        f"one forward in evaluation on {device}, over its layers: Python and C function calls, and the least time "
        "until it returns, of a model with 64 features and 2 x 16 tokens, whose products take next to no time"
    )
    return table
