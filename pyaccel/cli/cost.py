"""``pyaccel cost``: launches, bytes and the least time of a BERT layer, transformers' beside ours, on any machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from pyaccel.cli.console import LARGEST, output
from pyaccel.errors import UserInputError

COLUMNS = ("launches", "backward", "moved MB", "of stock", "saved MB", "of stock", "least µs")


def cost(
    batch: Annotated[int, typer.Option(max=LARGEST, help="Sequences.")] = 16,
    seq_len: Annotated[int, typer.Option(max=LARGEST, help="Tokens a sequence; none is padding.")] = 128,
    hidden_size: Annotated[int, typer.Option(max=LARGEST, help="As in config.json.")] = 768,
    num_attention_heads: Annotated[int, typer.Option(max=LARGEST, help="As in config.json.")] = 12,
    intermediate_size: Annotated[int, typer.Option(max=LARGEST, help="As in config.json.")] = 3072,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    card: Annotated[str, typer.Option(help="For the least time: A100, H100 or H200.")] = "H200",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Count what one BERT layer launches, moves and saves for backward, stock and accelerated, without a GPU.

    Needs triton and transformers. Exits with 2 for bad options or where these are missing.
    """
    from pyaccel.cost import layer as lane
    from pyaccel.cost.roofline import CARDS
    from pyaccel.dtypes import DTYPES

    for name, value, known in (("--dtype", dtype, DTYPES), ("--card", card, CARDS)):
        if value not in known:
            raise UserInputError(f"{name} {value}: expected one of {', '.join(known)}")
    try:
        size = lane.LayerSize(
            batch, seq_len, hidden_size, num_attention_heads, intermediate_size, DTYPES[dtype]
        )
        costs = lane.layer_costs(size)
    except (ValueError, RuntimeError, ImportError) as error:
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
            "least_seconds": one.seconds(CARDS[card]),
        }
        for mode in lane.MODES
        for name, one in ((name, by_mode[mode]) for name, by_mode in costs.items())
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    title = f"one layer, {batch} x {seq_len} tokens, hidden size {hidden_size}, {dtype}"
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
    output(width=140).print(table)
