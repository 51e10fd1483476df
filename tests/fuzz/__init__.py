"""Random cases, judged by what must always hold: ``python -m tests.fuzz [ops|models|cli]``.

A lane makes each case from a seed and the case's number alone, so that any one of them can be run again. What it finds
wrong is a :class:`Fault`; faults are collected, and each is printed with the command that shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: the lane, the seed and case that show it, and what it is."""

    lane: str
    seed: int
    case: int
    what: str

    @property
    def replay(self) -> str:
        """The command that shows it again."""
        return f"python -m tests.fuzz {self.lane} --seed {self.seed} --case {self.case}"


@dataclass
class Tried:
    """What one case came to: its name, how many calls were made, and what is wrong with them."""

    name: str
    calls: int = 0
    wrong: list[str] = field(default_factory=list)
