"""What decides about the embeddings of ``pyaccel encode``, and which of its processes computes which."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyaccel.encode.texts import Stamp
from pyaccel.errors import UserInputError

WINDOW = 4096


@dataclass(frozen=True)
class Shard:
    """Which windows this process takes: those with ``index % processes == rank``."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Shard:
        """As torchrun and ``accelerate launch`` say; all of them without either."""
        given = {name: os.environ.get(name) or None for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        try:
            rank, processes, local = (None if value is None else int(value) for value in given.values())
        except ValueError:
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            raise UserInputError(f"{said}: expected whole numbers, as torchrun sets them") from None
        shard = cls(rank or 0, 1 if processes is None else processes, local or 0)
        if not 0 <= shard.rank < shard.world_size or shard.local_rank < 0:
            raise UserInputError(f"RANK={shard.rank} is not one of WORLD_SIZE={shard.world_size} processes")
        return shard


@dataclass(frozen=True)
class Identity:
    """All that the numbers depend on: parts with another identity are another job's."""

    texts: str
    column: str
    model: str
    settings: dict[str, Any]
    window: int = WINDOW  # texts a part


def fingerprint(folder: Path) -> str:
    """What a folder's model and tokenizer are made of: a checksum of the files that are read of it."""
    state = hashlib.blake2b(digest_size=16)
    for file in _model_files(folder):
        state.update(f"\0{file.relative_to(folder)}\0".encode("utf-8", "surrogateescape"))
        hash_file(file, state)
    return state.hexdigest()


def stamps(folder: Path) -> list[tuple[Path, Stamp]]:
    """What tells that one of these files was changed or replaced."""
    return [(file, Stamp.of(file)) for file in _model_files(folder)]


def _model_files(folder: Path) -> list[Path]:
    patterns = ("*.json", "*.safetensors", "*.txt", "*.model", "*/config.json")
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def hash_file(file: Path, state: Any) -> None:
    with file.open("rb") as source:
        while chunk := source.read(1 << 20):
            state.update(chunk)
