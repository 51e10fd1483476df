"""A long encoding as a row of parts: each is there whole or not at all, so a job that was killed goes on.

Texts are taken in windows of a fixed number. Window ``i`` becomes ``OUT.parts/i.npy``, written beside and renamed;
a second run skips what is there. ``OUT.parts/job.json`` says whose parts they are: a run that would give other
numbers refuses them. When all are there they become OUT, by one rename again.

Several processes (torchrun, ``accelerate launch``) take windows in turn; the first one puts the parts together.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyaccel.cli.errors import BadInputError

if TYPE_CHECKING:
    import numpy as np

WINDOW = 4096
FORMATS = (".npy", ".parquet")


# --- texts ---


def read_texts(file: Path, column: str) -> Iterator[str]:
    """The texts of a file, one by one: lines of any file; ``column`` of .jsonl, .csv, .tsv and .parquet.

    An empty line is a text too: text ``i`` is line ``i``.
    """
    if not file.is_file():
        raise BadInputError(f"there is no file {file}: give texts as .txt, .jsonl, .csv, .tsv or .parquet")
    if file.suffix == ".parquet":
        yield from _of_parquet(file, column)
        return
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            if file.suffix in (".csv", ".tsv"):
                yield from _of_csv(
                    csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ","), file, column
                )
            elif file.suffix == ".jsonl":
                for number, line in enumerate(lines, 1):
                    yield _of_json(line, f"{file}, line {number}", column)
            else:
                yield from (line.rstrip("\r\n") for line in lines)
    except UnicodeDecodeError as error:
        raise BadInputError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _of_json(line: str, where: str, column: str) -> str:
    try:
        value = json.loads(line)
        text = value[column]
    except (ValueError, KeyError, TypeError):
        raise BadInputError(f"{where}: not a JSON object with {column!r} in it: see --column") from None
    if not isinstance(text, str):
        raise BadInputError(f"{where}: {column!r} is a {type(text).__name__}, not a text")
    return text


def _of_csv(rows: Any, file: Path, column: str) -> Iterator[str]:
    if column not in (rows.fieldnames or ()):
        raise BadInputError(
            f"{file} has no column {column!r} but {', '.join(rows.fieldnames or ()) or 'none'}: see --column"
        )
    for row in rows:
        yield row[column] or ""


def _of_parquet(file: Path, column: str) -> Iterator[str]:
    parquet = pyarrow("pyarrow.parquet")
    source = parquet.ParquetFile(file)
    names = source.schema_arrow.names
    if column not in names:
        raise BadInputError(f"{file} has no column {column!r} but {', '.join(names)}: see --column")
    for batch in source.iter_batches(columns=[column]):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str | None):
                raise BadInputError(f"{file}: {column!r} holds a {type(text).__name__}, not texts")
            yield text or ""


def pyarrow(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise BadInputError("parquet needs pyarrow: pip install pyarrow, or write a .npy file") from None


# --- the job ---


@dataclass(frozen=True)
class Share:
    """Which windows this process takes: those with ``index % processes == rank``."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Share:
        """As torchrun and ``accelerate launch`` say; all of them without either."""
        values = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        rank, processes, local = (int(value) if value else None for value in values)
        return cls(rank or 0, processes or 1, local or 0)


@dataclass(frozen=True)
class Identity:
    """All that the numbers depend on: parts with another identity are another job's."""

    texts: str
    column: str
    model: str
    settings: dict[str, Any]
    window: int = WINDOW  # texts a part


def fingerprint(path: Path) -> str:
    """A file's, or a folder's files', sizes and times of change."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return f"{path.resolve()}: " + ", ".join(f"{name} {size} {time}" for name, size, time in stats)


class Job:
    """The parts of one output file, and what is still to do of them."""

    def __init__(
        self, out: Path, count: int, identity: Identity, share: Share, *, overwrite: bool = False
    ) -> None:
        """Take up what is there of the same job, of ``count`` texts.

        Raises BadInputError for an output that is there already, or parts that are another job's.
        """
        if out.suffix not in FORMATS:
            raise BadInputError(f"{out}: the output is a {' or '.join(FORMATS)} file")
        if not out.absolute().parent.is_dir():
            raise BadInputError(f"there is no folder {out.absolute().parent} to write {out.name} to")
        if overwrite and share.processes > 1:  # the others might take up what the first is about to remove
            raise BadInputError(f"--overwrite is for one process: remove {out} and {out.name}.parts yourself")
        self.out, self.share, self.count, self.window = out, share, count, identity.window
        self.folder = out.with_name(f"{out.name}.parts")
        self.finished = out.with_name(f"{out.name}.parts.finished")
        wanted = json.loads(json.dumps(asdict(identity)))
        if share.rank:
            self._wait_for_the_first(wanted)
            return
        shutil.rmtree(self.finished, ignore_errors=True)
        if overwrite:
            shutil.rmtree(self.folder, ignore_errors=True)
            out.unlink(missing_ok=True)
        file = self.folder / "job.json"
        if file.is_file():
            there = json.loads(file.read_text(encoding="utf-8"))
            different = [name for name in wanted if there.get(name) != wanted[name]]
            if different:
                raise BadInputError(
                    f"{self.folder} holds parts made from other {', '.join(different)}: --overwrite starts anew"
                )
        elif out.exists():
            raise BadInputError(f"{out} exists already: give another file, or --overwrite")
        else:
            self.folder.mkdir(exist_ok=True)
            _write(file, json.dumps(wanted, indent=1).encode())

    def _wait_for_the_first(self, wanted: dict[str, Any]) -> None:
        file = self.folder / "job.json"
        while not self._is_finished():
            if file.is_file() and json.loads(file.read_text(encoding="utf-8")) == wanted:
                return
            time.sleep(0.2)

    def _is_finished(self) -> bool:
        """Whether all the work is done, and the first process has put it together and cleared up."""
        return self.out.is_file() and not self.folder.is_dir()

    def _part(self, index: int) -> Path:
        return self.folder / f"{index:08d}.npy"

    def _is_todo(self, index: int) -> bool:
        mine = index % self.share.processes == self.share.rank
        return mine and not self._part(index).is_file() and not self._is_finished()

    @property
    def n_windows(self) -> int:
        return -(-self.count // self.window)

    def texts_todo(self) -> int:
        """How many texts this process has to encode."""
        sizes = (
            min(self.window, self.count - i * self.window) for i in range(self.n_windows) if self._is_todo(i)
        )
        return sum(sizes)

    def todo(self, texts: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
        """Windows that this process has to encode: index and texts."""
        for index in range(self.n_windows):
            window = list(islice(texts, self.window))
            if self._is_todo(index):
                yield index, window

    def save(self, index: int, embeddings: np.ndarray) -> None:
        """Keep a window's embeddings: from here on they are done, whatever happens."""
        import io

        import numpy as np

        buffer = io.BytesIO()
        np.save(buffer, embeddings)
        _write(self._part(index), buffer.getvalue())

    def finish(self, texts: Iterator[str] | None = None) -> None:
        """Put all parts together, once they are there; by the first process alone.

        ``texts`` are written beside the embeddings, into a parquet file.
        """
        if self.share.rank:
            return
        parts = [self._part(index) for index in range(self.n_windows)]
        while not all(part.is_file() for part in parts):
            time.sleep(0.2)
        whole = self.folder / f"whole.{os.getpid()}"
        if self.out.suffix == ".npy":
            _write_npy(whole, parts, self.count)
        else:
            _write_parquet(whole, parts, texts)
        _sync(whole)
        os.replace(whole, self.out)
        os.replace(self.folder, self.finished)  # at once: half of the parts must not look like a job
        shutil.rmtree(self.finished)


def _write(file: Path, data: bytes) -> None:
    """The whole file or none of it, whenever the machine stops."""
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    with beside.open("wb") as target:
        target.write(data)
        target.flush()
        os.fsync(target.fileno())
    os.replace(beside, file)


def _sync(file: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _write_npy(file: Path, parts: list[Path], count: int) -> None:
    import numpy as np

    first = np.load(parts[0], mmap_mode="r")
    out = np.lib.format.open_memmap(file, mode="w+", dtype=first.dtype, shape=(count, first.shape[1]))
    start = 0
    for part in parts:
        values = np.load(part)
        out[start : start + len(values)] = values
        start += len(values)
    out.flush()


def _write_parquet(file: Path, parts: list[Path], texts: Iterator[str] | None) -> None:
    import numpy as np

    arrow, parquet = pyarrow("pyarrow"), pyarrow("pyarrow.parquet")
    width = np.load(parts[0], mmap_mode="r").shape[1]
    fields = [("row", arrow.int64()), ("embedding", arrow.list_(arrow.float32(), width))]
    if texts is not None:
        fields.insert(1, ("text", arrow.string()))
    start = 0
    with parquet.ParquetWriter(file, arrow.schema(fields)) as writer:
        for part in parts:
            values = np.load(part)
            columns = {
                "row": arrow.array(np.arange(start, start + len(values))),
                "embedding": arrow.FixedSizeListArray.from_arrays(arrow.array(values.ravel()), width),
            }
            if texts is not None:
                columns["text"] = arrow.array(list(islice(texts, len(values))), arrow.string())
            table = arrow.table([columns[name] for name, _ in fields], schema=arrow.schema(fields))
            writer.write_table(table, row_group_size=len(values))
            start += len(values)
