"""Known bugs, planted one at a time into a copy of the tree, to see that the tests catch them.

A family's list is ``MUTANTS`` in a module of this package, and ``TESTS`` there what pytest is given to notice them;
``python -m tests.mutants`` runs them all.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A bug: one piece of text in one file, and what it becomes.

    Attributes:
        name: what is broken, in a few words; unique.
        file: path from the repository root.
        old: text that occurs exactly once in the file.
        new: what replaces it.
    """

    name: str
    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """The file's `text` with the bug. Raises ValueError unless the old text occurs exactly once."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.file} has the text to replace {count} times, not once: {self.old!r}")
        if self.old == self.new:
            raise ValueError("the new text is the old one")
        return text.replace(self.old, self.new)
