"""What the command line says when it can't start, or go on."""

from __future__ import annotations


class BadInputError(Exception):
    """Input that can't be used: one line that says what is wrong and what to do. Exit code 2, no traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
