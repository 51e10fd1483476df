"""The errors that pyaccel raises for what a caller or a user can change."""

from __future__ import annotations


class NotSupportedError(RuntimeError):
    """A backend that was asked for by name can't serve the call; the message names every reason."""


class InvalidArgumentError(ValueError, RuntimeError):
    """Arguments that no backend can make sense of; the message names every reason.

    A ``ValueError``, and a ``RuntimeError`` too: that is what PyTorch's own functions raise for bad input, and code
    that catches it from them must catch it from what replaces them one for one.
    """


class UserInputError(Exception):
    """Input of a command that can't be used: one line that says what is wrong and what to do.

    The command line prints the line without a traceback and exits with 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def file_error(error: OSError) -> str:
    """What the system said and of which file, without its number."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
