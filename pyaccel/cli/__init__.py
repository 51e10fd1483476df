"""The command line: ``pyaccel`` or ``python -m pyaccel``."""

from __future__ import annotations

import signal
import sys

try:
    import typer

    from pyaccel.cli.bench import bench
    from pyaccel.cli.console import forget_output, make_printable, one_line
    from pyaccel.cli.cost import cost
    from pyaccel.cli.demo import demo
    from pyaccel.cli.encode import encode
    from pyaccel.cli.inspect import inspect
    from pyaccel.cli.quantize import quantize
    from pyaccel.cli.tune import tune
    from pyaccel.cli.verify import verify
    from pyaccel.errors import UserInputError
except KeyboardInterrupt:  # importing torch takes seconds
    sys.stderr.write("pyaccel: interrupted\n")
    raise SystemExit(130) from None

app = typer.Typer(
    help="Fused, verified Transformer kernels for BERT-family models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (demo, inspect, cost, quantize, encode, verify, bench, tune):
    app.command()(one_line(_command))

# Of the parser, which is a copy of click inside of typer or click itself.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command line. Bad input is one line on stderr and exit code 2, an interrupt one line and 130."""
    make_printable()
    try:
        code = _run(sys.argv[1:] or ["--help"])
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserInputError as error:
        code = _failed(str(error), 2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end this in a traceback
        code = _failed("interrupted", 130)
    except OSError as error:  # of the last flush: the disk is full, or the reader is gone
        forget_output()
        code = _failed(f"the output could not be written: {error.strerror}", 2)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        code = app(arguments, prog_name="pyaccel", standalone_mode=False)
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "pyaccel"
        said = error.format_message()  # type: ignore[attr-defined]
        raise UserInputError(f"{said} (see {command} --help)") from None
    except SystemExit as ended:  # typer's word for a closed pipe
        if ended.code != 1:
            raise
        raise UserInputError("the output was closed before all of it was written") from None
    if code == 130:  # typer's word for an interrupt
        raise KeyboardInterrupt
    return code or 0


def _failed(said: str, code: int) -> int:
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        forget_output()
    print(f"pyaccel: {said}", file=sys.stderr)
    return code
