"""A long encoding as a row of parts: each is there whole or not at all, so a job that was killed can be resumed.

Texts are taken in windows of a fixed number. Window ``i`` becomes ``OUT.parts/i.npy``, written beside and renamed;
a second run skips what is there. ``OUT.parts/job.json`` says whose parts they are: a run that would give other
numbers refuses them. A part ends with a checksum over the job, its index and its bytes; one that doesn't fit is
computed again. When all are there they become OUT, by one rename again, and ``OUT.job.json`` records the job and the
checksum of OUT: the same job, started again, finds that there is nothing to do.

Several processes (torchrun, ``accelerate launch``) take windows in turn; the first one puts the parts together.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pyaccel.encode.files import read_json, sync, write, write_parquet
from pyaccel.encode.identity import Identity, Shard, hash_file
from pyaccel.errors import UserInputError, file_error

try:
    import fcntl
except ImportError:  # not on Windows, where two runs of one job are not told apart
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import numpy as np

# A part's last bytes: a mark, and the checksum in hexadecimal.
MARK, DIGEST_SIZE = b"\npyaccel part ", 16
TRAILER = len(MARK) + 2 * DIGEST_SIZE
# All that a job's folder may hold: another folder is not removed.
OWN_FILES = re.compile(r"(job\.json|record\.json|lock|\d{8}\.npy|whole)(\.\d+)?")
# After so long without a new part, the others are taken to have ended.
PATIENCE_SECONDS = 3600.0


class Job:
    """The parts of one output file, and what is still to do of them.

    Attributes:
        finished_before: the same job was done by an earlier run, and its output is as it left it.
    """

    def __init__(
        self, out: Path, count: int, identity: Identity, shard: Shard, *, overwrite: bool = False
    ) -> None:
        """Take up what is there of the same job, of ``count`` texts.

        Raises UserInputError for an output that is there already, or parts that are another job's.
        """
        if overwrite and shard.world_size > 1:  # the others might take up what the first is about to remove
            raise UserInputError(
                f"--overwrite is for one process: remove {out} and {out.name}.parts yourself"
            )
        self.out, self.shard, self.count, self.window = out, shard, count, identity.window
        self.folder = out.with_name(f"{out.name}.parts")
        self.finished = out.with_name(f"{out.name}.parts.finished")
        self.record = out.with_name(f"{out.name}.job.json")
        self.wanted: dict[str, Any] = json.loads(json.dumps({**asdict(identity), "count": count}))
        self._key = hashlib.blake2b(json.dumps(self.wanted, sort_keys=True).encode(), digest_size=32).digest()
        self._done: set[int] = set()
        self.finished_before = False
        if shard.rank:
            self._wait_for_the_first()
        else:
            self._begin(overwrite)
        if not self._is_finished():
            self._take_up()

    def _begin(self, overwrite: bool) -> None:
        for folder in (self.folder, self.finished):
            self._check_own(folder)
        shutil.rmtree(self.finished, ignore_errors=True)
        if overwrite:
            if self.folder.is_dir():
                self._lock_share()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.record.unlink(missing_ok=True)
        file = self.folder / "job.json"
        if file.is_file():
            self._compare(read_json(file), f"{self.folder} holds parts")
            return
        if self.out.exists() and not overwrite:
            self._compare_output()
            self.finished_before = True
            return
        self.folder.mkdir(exist_ok=True)
        write(file, json.dumps(self.wanted, indent=1).encode())

    def _check_own(self, folder: Path) -> None:
        """A folder of this name that is the user's is not touched."""
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise UserInputError(
                f"{folder} is in the way: parts are kept there; remove it, or give another --out"
            )
        foreign = (
            [each.name for each in folder.iterdir() if not OWN_FILES.fullmatch(each.name)]
            if folder.exists()
            else []
        )
        if foreign:
            raise UserInputError(
                f"{folder} holds {foreign[0]}, which is no part of a job: remove it, or give another --out"
            )

    def _compare(self, there: dict[str, Any], what: str) -> None:
        """Refuse what was made from anything else, naming it with both values."""
        different = []
        for name, value in self.wanted.items():
            before = there.get(name)
            if name == "count":  # depends on the texts
                continue
            if name == "settings" and isinstance(before, dict):
                details = ", ".join(
                    f"{key} {before.get(key)}, now {value.get(key)}"
                    for key in dict.fromkeys([*before, *value])
                    if before.get(key) != value.get(key)
                )
                different += [f"settings ({details})"] if details else []
            elif before != value:
                different.append(f"{name} ({before}, now {value})" if name in ("column", "window") else name)
        if different:
            raise UserInputError(
                f"{what} made from other {', '.join(different)}: use the same ones, or start over with --overwrite"
            )

    def _compare_output(self) -> None:
        """The output must be this job's, unchanged."""
        if not self.record.is_file():
            raise UserInputError(f"{self.out} exists already: give another file, or --overwrite")
        there = read_json(self.record)
        self._compare(there, f"{self.out} exists already,")
        state = hashlib.blake2b(digest_size=DIGEST_SIZE)
        hash_file(self.out, state)
        if there.get("output") != {"bytes": self.out.stat().st_size, "blake2b": state.hexdigest()}:
            raise UserInputError(f"{self.out} was changed after it was finished: start over with --overwrite")

    def _wait_for_the_first(self) -> None:
        file = self.folder / "job.json"
        patience = _Patience(f"the first process (RANK=0) to begin with {self.out}")
        while not self._is_finished():
            with suppress(FileNotFoundError):  # removed by the first, which has finished
                if file.is_file():
                    self._compare(read_json(file), f"process {self.shard.rank} would add to parts that were")
                    return
            patience.wait()

    def _is_finished(self) -> bool:
        """Whether all the work is done, and the first process has put it together and cleared up."""
        if self.finished_before:
            return True
        if not self.out.is_file() or not self.record.is_file() or self.folder.is_dir():
            return False
        there = read_json(self.record)
        return all(there.get(name) == value for name, value in self.wanted.items())

    def _take_up(self) -> None:
        """Clear what a killed run of this share left, and see which parts are right."""
        try:
            self._lock_share()
            for left in list(self.folder.iterdir()):
                index = re.fullmatch(r"(\d{8})\.npy\.\d+", left.name)
                if (index is not None and int(index[1]) % self.shard.world_size == self.shard.rank) or (
                    left.name.startswith("whole.") and not self.shard.rank
                ):
                    left.unlink()
            for i in range(self.shard.rank, self.n_windows, self.shard.world_size):
                if self._read(i) is not None:
                    self._done.add(i)
        except FileNotFoundError:  # the first has cleared up: all parts were there
            if not self._is_finished():
                raise

    def _lock_share(self) -> None:
        """Against a second run of the same shard, until this process ends."""
        self._lock = (self.folder / f"lock.{self.shard.rank}").open("a")
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserInputError(f"another process is working on {self.out} already") from None
        except OSError:  # a file system without locks
            pass

    def _part(self, index: int) -> Path:
        return self.folder / f"{index:08d}.npy"

    def _rows(self, index: int) -> int:
        return min(self.window, self.count - index * self.window)

    def _checksum(self, index: int, data: bytes | memoryview) -> bytes:
        state = hashlib.blake2b(data, key=self._key, salt=index.to_bytes(8, "big"), digest_size=DIGEST_SIZE)
        return MARK + state.hexdigest().encode()

    def _read(self, index: int) -> np.ndarray | None:
        """A part's embeddings; None if it is not this job's, whole and unchanged."""
        import numpy as np

        try:
            data = memoryview(self._part(index).read_bytes())
        except FileNotFoundError:
            return None
        if len(data) < TRAILER or bytes(data[-TRAILER:]) != self._checksum(index, data[:-TRAILER]):
            return None
        values: np.ndarray = np.load(io.BytesIO(data[:-TRAILER]), allow_pickle=False)
        return values if values.ndim == 2 and len(values) == self._rows(index) else None

    def _is_todo(self, index: int) -> bool:
        mine = index % self.shard.world_size == self.shard.rank
        return mine and index not in self._done and not self._is_finished()

    @property
    def n_windows(self) -> int:
        return -(-self.count // self.window)

    def texts_todo(self) -> int:
        """How many texts this process has to encode."""
        return sum(self._rows(index) for index in range(self.n_windows) if self._is_todo(index))

    def todo(self, texts: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
        """Windows that this process has to encode: index and texts.

        Raises UserInputError where there are fewer texts than were counted.
        """
        for index in range(self.n_windows):
            window = list(islice(texts, self.window))
            if len(window) != self._rows(index):
                raise UserInputError(
                    f"there are {index * self.window + len(window)} texts where {self.count} were counted: the file "
                    "was changed while it was read; start again when it is complete"
                )
            if self._is_todo(index):
                yield index, window

    def save(self, index: int, embeddings: np.ndarray) -> None:
        """Keep a window's embeddings: from here on they are done, whatever happens."""
        import numpy as np

        if embeddings.ndim != 2 or len(embeddings) != self._rows(index):
            raise ValueError(f"part {index} must have {self._rows(index)} rows, got {list(embeddings.shape)}")
        buffer = io.BytesIO()
        np.save(buffer, embeddings, allow_pickle=False)
        with self._explained():
            write(self._part(index), buffer.getvalue(), self._checksum(index, buffer.getbuffer()))
        self._done.add(index)

    def finish(self, texts: Iterator[str] | None = None) -> None:
        """Put all parts together, once they are there; by the first process alone.

        ``texts`` are written beside the embeddings, into a parquet file.

        Raises UserInputError where it can't be written, or a part was changed: nothing is left of a failed try.
        """
        if self.shard.rank or self._is_finished():
            return
        self._wait_for_parts()
        parts = _Parts(self)
        whole = self.folder / f"whole.{os.getpid()}"
        with self._explained():
            try:
                if self.out.suffix.lower() == ".npy":
                    _write_npy(whole, parts, self.count)
                else:
                    write_parquet(whole, parts, texts)
                sync(whole)
                state = hashlib.blake2b(digest_size=DIGEST_SIZE)
                hash_file(whole, state)
                output = {"bytes": whole.stat().st_size, "blake2b": state.hexdigest()}
                record = self.folder / "record.json"
                write(record, json.dumps({**self.wanted, "output": output}, indent=1).encode())
                os.replace(whole, self.out)
                os.replace(record, self.record)
            except BaseException:
                whole.unlink(missing_ok=True)
                raise
            os.replace(self.folder, self.finished)  # whole: half of the parts must not look like a job
        shutil.rmtree(self.finished)

    def _wait_for_parts(self) -> None:
        patience = _Patience(f"the other processes' parts of {self.out}")
        todo = [index for index in range(self.n_windows) if index not in self._done]
        while todo:
            left = [index for index in todo if not self._part(index).is_file()]
            if len(left) == len(todo):
                patience.wait()
            else:
                todo, patience = left, _Patience(patience.what)

    def _explained(self) -> _Explained:
        return _Explained(self.out)


class _Parts:
    """The parts of a job in their order, each checked as it is read."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __iter__(self) -> Iterator[np.ndarray]:
        for index in range(self.job.n_windows):
            values = self.job._read(index)
            if values is None:
                part = self.job._part(index)
                part.unlink(missing_ok=True)
                raise UserInputError(
                    f"{part} was damaged, and is removed: start again, it will be computed again"
                )
            yield values


class _Explained:
    """What to do after an error of the disk."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise UserInputError(
                f"{self.out} could not be written ({file_error(error)}): what is done so far is kept; make room, then "
                "start again with the same arguments"
            ) from error


class _Patience:
    """Waiting for another process, but not for one that has ended."""

    def __init__(self, what: str) -> None:
        self.what, self.until = what, time.monotonic() + PATIENCE_SECONDS

    def wait(self) -> None:
        if time.monotonic() > self.until:
            raise UserInputError(
                f"waited {PATIENCE_SECONDS / 60:.0f} minutes for {self.what}: start all of them again"
            )
        time.sleep(0.2)


def _write_npy(file: Path, parts: _Parts, count: int) -> None:
    """Written in a row: a memory map on a full disk would end the process."""
    import numpy as np

    rows = 0
    with file.open("wb") as target:
        for values in parts:
            if not rows:
                _write_header(target, values, count)
            target.write(np.ascontiguousarray(values).data)
            rows += len(values)
    if rows != count:
        raise ValueError(f"{rows} rows were written where there are {count} texts")


def _write_header(target: BinaryIO, values: np.ndarray, count: int) -> None:
    import numpy as np

    described = {"descr": np.lib.format.dtype_to_descr(values.dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(target, {**described, "shape": (count, values.shape[1])})
