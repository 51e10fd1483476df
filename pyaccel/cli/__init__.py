"""The command line: ``pyaccel`` or ``python -m pyaccel``."""

from __future__ import annotations

import sys

import typer

from pyaccel.cli.bench import bench
from pyaccel.cli.cost import cost
from pyaccel.cli.demo import demo
from pyaccel.cli.encode import encode
from pyaccel.cli.errors import BadInputError
from pyaccel.cli.inspect import inspect
from pyaccel.cli.quantize import quantize
from pyaccel.cli.tune import tune
from pyaccel.cli.verify import verify

app = typer.Typer(
    help="Fused, verified Transformer kernels for BERT-family models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(inspect)
app.command()(cost)
app.command()(quantize)
app.command()(encode)
app.command()(verify)
app.command()(bench)
app.command()(tune)


def main() -> None:
    """Run the command line. Bad input is one line on stderr and exit code 2."""
    try:
        app(prog_name="pyaccel")
    except BadInputError as error:
        typer.echo(f"pyaccel: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("pyaccel: interrupted", err=True)
        sys.exit(130)
