"""One self-contained HTML page of what was measured, for a reader who knows nothing of it; and its plots as files."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyaccel.benchmarks.case import OURS
from pyaccel.benchmarks.method import Row
from pyaccel.benchmarks.registry import cases
from pyaccel.benchmarks.table import Cell, by_case, notes, timed_variants, verdict

OUR_COLOR = "#c2410c"
# Distinct in print and to the color-blind (Okabe and Ito), without the one that resembles ours.
COLORS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#6b7280", "#4b0082", "#8b4513", "#2f4f4f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

STYLE = """
:root { color-scheme: light; --ours: #c2410c; --line: #d6d3d1; --quiet: #57534e; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1917; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.5rem; border-top: 1px solid var(--line);
padding-top: 1rem; } .quiet { color: var(--quiet); } .verdict { font-size: 1.1rem; font-weight: 600; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
th { vertical-align: bottom; font-weight: 600; }
.ours { color: var(--ours); } .best { font-weight: 700; } .wide { overflow-x: auto; }
svg { max-width: 100%; height: auto; }
dt { font-weight: 600; } li { margin: .2rem 0; }
"""


def write(rows: Sequence[Row], folder: Path) -> Path:
    """Write ``report.html`` and, for each case and dtype, its plot as SVG and PNG.

    Raises:
        ImportError: matplotlib is missing; the message says what to install.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts, about = [], {case.name: case.about for case in cases()}
    for (case, dtype, _), cells in by_case(rows).items():
        figure = plot(cells)
        name = f"{case}-{dtype}"
        svg = io.StringIO()
        for target, form in ((svg, "svg"), (folder / f"{name}.svg", "svg"), (folder / f"{name}.png", "png")):
            # Without a date in it the same rows give the same file.
            metadata = {"Date": None} if form == "svg" else None
            figure.savefig(target, format=form, dpi=150, metadata=metadata, bbox_inches="tight")
        parts.append(_section(case, dtype, about.get(case, ""), cells, svg.getvalue()))
    page = folder / "report.html"
    page.write_text(_page(rows, parts), encoding="utf-8")
    return page


def plot(cells: Sequence[Cell]) -> Any:
    """A dot for each variant at each size: how many times as long as ours it takes, on a logarithmic scale."""
    figure_class, ticker = matplotlib_figure()
    shown = [(cell, cell.ours) for cell in cells if cell.ours is not None]
    figure = figure_class(figsize=(9, 1.6 + 0.42 * max(len(shown), 1)))
    axes = figure.subplots()
    names = timed_variants(cell for cell, _ in shown)
    baselines = [name for name in names if not name.startswith(OURS)]
    for name in names:
        points = [
            (row.ms / ours.ms, y)
            for y, (cell, ours) in enumerate(shown)
            if (row := cell.row(name)) is not None
        ]
        at = baselines.index(name) if name in baselines else 0
        own = name.startswith(OURS)
        axes.scatter(
            *zip(*points, strict=True),
            s=70 if own else 45,
            label=name,
            zorder=3,
            color=OUR_COLOR if own else COLORS[at % len(COLORS)],
            marker=("*" if name == OURS else "p") if own else MARKERS[at % len(MARKERS)],
            alpha=1.0 if own else 0.85,
        )
    axes.axvline(1.0, color=OUR_COLOR, linewidth=1, zorder=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_locator(ticker.LogLocator(10, subs=(1.0, 2.0, 5.0)))
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.75), max(high, 2.2))
    axes.set_yticks(range(len(shown)), [cell.first.size for cell, _ in shown])
    axes.invert_yaxis()
    axes.grid(axis="both", color="#e7e5e4", zorder=0)
    axes.set_xlabel("times as long as pyaccel (right of the line: slower than pyaccel)")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if axes.collections:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    return figure


def matplotlib_figure() -> tuple[Any, Any]:
    """Its Figure, without the state of pyplot, and its tickers; ImportError says what to install."""
    try:
        from matplotlib import rcParams, ticker
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pyaccel-bert[bench]'") from error
    # Ids made of the content: the same rows give the same file. Text stays text.
    rcParams.update({"svg.hashsalt": "pyaccel", "svg.fonttype": "none"})
    return Figure, ticker


def _page(rows: Sequence[Row], parts: Sequence[str]) -> str:
    first = rows[0]
    where = {
        "Machine": ", ".join(dict.fromkeys(row.device for row in rows)),
        "Versions": f"torch {first.torch}, triton {first.triton}, Python {first.python}",
        "Commit and date": ", ".join(dict.fromkeys(f"{row.commit} of {row.date}" for row in rows)),
    }
    missing = "".join(
        f"<li>{html.escape(variant)} <span class=quiet>({html.escape(case)}, {_sizes(sizes)})</span>: "
        f"{html.escape(note)}</li>"
        for (case, variant, note), sizes in notes(rows).items()
    )
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>pyaccel beside its baselines</title><style>{STYLE}</style>
<h1>pyaccel beside its baselines</h1>
<p class=verdict>{html.escape(verdict(rows))}</p>
<dl>{"".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in where.items())}</dl>
<h2>How to read this</h2>
<p>Each contender's answer was checked against an fp64 truth by one numerics policy before it was timed; a wrong one is
listed at the end and has no time. They took turns, in an order that changes from round to round, so that a slow moment
of the machine hits all. A time is the median over the rounds, with a 95&nbsp;% confidence interval. The floor is the
time that a copy of the bytes or a large matrix product with the FLOPs that can't be avoided takes on this machine,
measured in the same rounds. In plots and tables a number above 1 says how many times as long as
<span class=ours>pyaccel</span> somebody takes; the fastest of a row is bold.</p>
{"".join(parts)}
<h2>Not timed</h2>
<ul>{missing or "<li>Nobody: every contender ran and was right.</li>"}</ul>
</html>
"""


def _section(case: str, dtype: str, about: str, cells: Sequence[Cell], svg: str) -> str:
    names = timed_variants(cells)
    head = "".join(f"<th{_ours(name)}>{html.escape(name)}</th>" for name in names)
    lines = []
    for cell in cells:
        ours = cell.ours
        own = "<td></td><td></td>"
        if ours is not None:
            own = (
                f"<td>{ours.ms:.3g} <span class=quiet>({ours.spread})</span></td>"
                f"<td>{ours.of_floor:.0%} <span class=quiet>{ours.floor_of}</span></td>"
            )
        others = "".join(
            f'<td class="{"ours " * name.startswith(OURS)}{"best" * cell.is_fastest(name)}">{cell.relative(name)}</td>'
            for name in names
        )
        lines.append(f"<tr><td>{html.escape(cell.first.size)}</td>{own}{others}</tr>")
    # Neither an XML prolog nor metadata, which name other people's pages, have a place inside of this one.
    picture = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return (
        f"<h2>{html.escape(case)}, {html.escape(dtype)}</h2><p class=quiet>{html.escape(about)}</p>"
        f"<div class=wide>{picture}</div><div class=wide><table><tr><th>size</th><th>pyaccel, ms</th><th>of floor</th>"
        f"{head}</tr>{''.join(lines)}</table></div>"
    )


def _ours(name: str) -> str:
    return " class=ours" if name.startswith(OURS) else ""


def _sizes(sizes: Sequence[str]) -> str:
    few = "; ".join(sizes[:3])
    return html.escape(few if len(sizes) <= 3 else f"{few} and {len(sizes) - 3} more sizes")
