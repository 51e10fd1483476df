"""What every command shares with its terminal: consoles, output files, and which errors are one line."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from rich.console import Console

from pyaccel.errors import UserInputError, file_error

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

# Larger numbers overflow in torch or in the system, with errors that don't name the option.
LARGEST = 2**31 - 1
WIDTH = 200  # of the widest table


class _Console(Console):
    def on_broken_pipe(self) -> None:  # rich's own ends the process, with no word
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def output() -> Console:
    """The console for results, at least :data:`WIDTH` wide where nothing says how wide it is.

    Text is printed literally: a path may hold brackets or colons that look like markup or emoji.
    """
    console = _Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    return console


def progress_output() -> Console:
    """The console for progress bars and notes: stderr, so that results can be piped."""
    return _Console(stderr=True, markup=False, highlight=False, emoji=False)


def one_line(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """A command whose errors of a known kind (files, memory) are a :class:`UserInputError`.

    What is not known stays what it was: a bug must show.
    """

    @functools.wraps(function)
    def command(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            said = _in_words(error)
            if said is None:
                raise
            raise UserInputError(said) from error

    return command


def _in_words(error: Exception) -> str | None:
    if isinstance(error, BrokenPipeError):
        return "the output was closed before all of it was written"
    if isinstance(error, OSError):
        return file_error(error)
    out_of_memory = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("can't allocate memory", "CUDA out of memory"))
    )
    if out_of_memory:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"not enough memory: give smaller sizes ({lines[0]})"
    return None


def check_writable(file: Path | None, option: str) -> None:
    """Find out before a long computation, not after it, that a file can't be written.

    Raises UserInputError if so. A file that is there is not changed, one that isn't is not left behind.
    """
    if file is None:
        return
    folder = file.absolute().parent
    try:
        if not folder.is_dir():
            raise UserInputError(f"{option} {file}: there is no folder {folder}")
        if file.is_dir():
            raise UserInputError(f"{option} {file}: this is a folder, give a file")
        if file.is_file():
            with file.open("ab"):
                pass
        elif not file.exists():  # opening a pipe would wait for its reader
            with file.open("xb"):
                pass
            file.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        said = file_error(error) if isinstance(error, OSError) else str(error)
        raise UserInputError(f"{option} {file} can't be written: {said}") from None


def check_folder_writable(folder: Path, option: str) -> None:
    """The same for a folder that a command makes, or writes files into."""
    there = folder.absolute()
    missing: list[str] = []
    try:
        while not _is_there(there):
            missing.append(there.name)
            there = there.parent
        if not there.is_dir():
            raise UserInputError(
                f"{option} {folder}: {there} is a file, not a folder"
                if missing
                else f"{option} {folder}: this is a file, give a folder"
            )
        # In a folder of this process alone: another one may be making the same folder.
        probe = there / f".pyaccel-{os.getpid()}"
        try:
            probe.joinpath(*reversed(missing)).mkdir(parents=True)
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    except OSError as error:
        raise UserInputError(f"{option} {folder} can't be written: {file_error(error)}") from None


def _is_there(path: Path) -> bool:
    """Path.exists, but what can't be a path is an error on every Python, not something that isn't there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def make_printable() -> None:
    """Let a terminal without UTF-8 show what it can't write as an escape, not raise."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def forget_output() -> None:
    """Nothing more can be written to stdout: what is still buffered must not raise while Python ends."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
