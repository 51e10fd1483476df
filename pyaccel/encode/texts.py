"""The texts of a file, as ``pyaccel encode`` reads them: twice, and the same both times.

=============================  =======================================================================================
``.csv``, ``.tsv``             one text a row, in ``column`` of the header; quotes as in RFC 4180
``.jsonl``, ``.ndjson``        one text a line, in field ``column`` of its object
``.json``                      an array of strings or of such objects; lines of objects too
``.parquet``                   one text a row, in a ``column`` of strings
any other file                 one text a line
=============================  =======================================================================================

Endings count in any case. Files are UTF-8, with or without a byte-order mark. Lines end with ``\\n`` or ``\\r\\n`` and
with nothing else, the last one with or without; an empty line is a text. What is no text is an error with its line.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pydoc_data.topics
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pyaccel.errors import UserInputError

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")
STRINGS = ("is_string", "is_large_string", "is_string_view")  # pyarrow's tests of a column's type
HELD = "\ud800"
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


def read_texts(file: Path, column: str) -> Iterator[str]:
    """The texts of a file, one by one.

    Raises UserInputError for a file that can't be read, or at a text that is none.
    """
    _check_file(file)
    kind = file.suffix.lower()
    if kind == ".parquet":
        return _of_parquet(file, column)
    if kind in (".csv", ".tsv"):
        return _of_csv(file, "\t" if kind == ".tsv" else ",", column)
    if kind == ".json" and _begins_with_bracket(file):
        return _of_array(file, column)
    if kind in (".jsonl", ".ndjson", ".json"):
        return (_of_json(line, f"{file}, line {n}", column) for n, line in enumerate(_lines(file), 1))
    return read_lines(file)


def read_lines(file: Path) -> Iterator[str]:
    """The lines of any UTF-8 file, without their ends."""
    _check_file(file)
    return (_without_end(line) for line in _lines(file))


def _check_file(file: Path) -> None:
    if not file.is_file():
        if file.exists():
            raise UserInputError(f"{file} is not a regular file: give a file of texts, which is read twice")
        raise UserInputError(f"there is no file {file}: give texts as .txt, .jsonl, .csv, .tsv or .parquet")
    if file.suffix.lower() in PACKED:
        raise UserInputError(f"{file} is compressed: unpack it first")


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line


def _lines(file: Path) -> Iterator[str]:
    """Lines with their ends."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                if line.startswith(UTF16_MARKS):
                    raise UserInputError(
                        f"{file} is UTF-16, not UTF-8 text: iconv -f UTF-16 -t UTF-8 converts it"
                    )
                line = line.removeprefix(UTF8_MARK)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{error.reason} at byte {error.start} of the line"
                raise UserInputError(f"{file}, line {number}: not UTF-8 text ({where})") from None
            if "\0" in text:
                raise UserInputError(f"{file}, line {number}: a NUL byte, so this is no UTF-8 text")
            yield text


# --- JSON ---


def _of_json(line: str, where: str, column: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    return _field(value, where, column)


def _field(value: Any, where: str, column: str) -> str:
    if not isinstance(value, dict) or column not in value:
        raise UserInputError(f"{where}: not a JSON object with {column!r} in it: see --column")
    return _checked(value[column], where, column)


def _checked(text: Any, where: str, column: str) -> str:
    if not isinstance(text, str):
        raise UserInputError(f"{where}: {column!r} is a {type(text).__name__}, not a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserInputError(
            f"{where}: {column!r} holds half of a surrogate pair, which is no character"
        ) from None
    return text


def _begins_with_bracket(file: Path) -> bool:
    with file.open("rb") as source:
        return source.read(4096).removeprefix(UTF8_MARK).lstrip().startswith(b"[")


def _of_array(file: Path, column: str) -> Iterator[str]:
    try:
        values = json.loads("".join(_lines(file)))
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{file} is not valid JSON: {error}") from None
    for number, value in enumerate(values, 1):
        where = f"{file}, item {number}"
        yield _checked(value, where, column) if isinstance(value, str) else _field(value, where, column)


# --- tables ---


def _of_csv(file: Path, delimiter: str, column: str) -> Iterator[str]:
    with _long_fields():
        # strict: a quote that is never closed is an error; otherwise it would swallow the rows after it.
        rows = csv.reader(map(_held, _lines(file)), delimiter=delimiter, strict=True)
        ended = 0  # the line in which the last row did
        try:
            names = [name.replace(HELD, "\r") for name in next(rows, [])]
            index = _place(names, column, file)
            ended = rows.line_num
            for row in rows:
                line, ended = ended + 1, rows.line_num
                row = row or ([""] if len(names) == 1 else [])
                if len(row) != len(names):
                    raise UserInputError(
                        f"{file}, line {line}: {len(row)} fields, but the header has {len(names)}: quote fields that "
                        "hold the delimiter, a quotation mark or a line's end"
                    )
                yield row[index].replace(HELD, "\r")
        except csv.Error as error:
            raise UserInputError(
                f"{file}: the row that begins in line {ended + 1} can't be read ({error}): a field that begins with a "
                "quotation mark must end with one, and quotation marks inside are doubled"
            ) from None


def _held(line: str) -> str:
    """csv takes a lone carriage return for a row's end: what stands for it is in no UTF-8 file."""
    if "\r" not in line:
        return line
    text = _without_end(line)
    return text.replace("\r", HELD) + line[len(text) :]


def _place(names: list[str], column: str, file: Path) -> int:
    if names.count(column) != 1:
        found = ", ".join(names) or "none"
        what = "no column" if column not in names else "more than one column"
        raise UserInputError(f"{file} has {what} {column!r} but {found}: see --column")
    return names.index(column)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Without csv's limit of 131072 characters, which is the process's."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def pyarrow(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserInputError("parquet needs pyarrow: pip install pyarrow, or write a .npy file") from None


def _of_parquet(file: Path, column: str) -> Iterator[str]:
    arrow, parquet = pyarrow("pyarrow"), pyarrow("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(file) as source:
            schema = source.schema_arrow
            _place(schema.names, column, file)
            kind = schema.field(column).type
            values = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if not any(getattr(arrow.types, name)(values) for name in STRINGS):
                raise UserInputError(f"{file}: {column!r} is a column of {kind}, not of strings")
            for batch in source.iter_batches(columns=[column]):
                found = batch.schema.get_field_index(column)
                for text in batch.column(found).to_pylist():
                    number += 1
                    if text is None:
                        raise UserInputError(f"{file}, row {number}: {column!r} is null, not a text")
                    yield text
    except (OSError, ValueError, arrow.ArrowException) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserInputError(f"{file} can't be read as parquet: {lines[0]}") from None


# --- passages ---


def read_passages(file: Path) -> list[str]:
    """The lines of a UTF-8 text file that aren't blank, without the blanks around them."""
    passages = [line for line in map(str.strip, read_lines(file)) if line]
    if not passages:
        raise UserInputError(f"{file} is empty: give a text file with one passage a line")
    return passages


def real_passages(
    count_tokens: Callable[[list[str]], list[int]], count: int = 256, low: int = 5, high: int = 256
) -> list[str]:
    """``count`` paragraphs of ``low`` to ``high`` tokens from Python's language reference, spread evenly over it.

    The text is ``pydoc_data.topics`` in the standard library: real English, as it comes, on any machine.
    """
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = list(dict.fromkeys(" ".join(p.split()) for p in re.split(r"\n\s*\n", text)))
    lengths = count_tokens(paragraphs)
    fitting = [p for p, n in zip(paragraphs, lengths, strict=True) if low <= n <= high]
    return [fitting[i * len(fitting) // count] for i in range(count)]


# --- twice ---


class Stamp(NamedTuple):
    """What tells that a file was changed or replaced."""

    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path) -> Stamp:
        try:
            found = os.stat(file)
        except OSError as error:
            raise UserInputError(f"{file} is gone: {error.strerror}") from None
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


class Texts:
    """The texts of a file that has been read once, and of which each later reading must give the same.

    Attributes:
        count: how many there are.
        digest: of all of them in their order, whatever file they are in.
    """

    def __init__(self, file: Path, column: str, window: int) -> None:
        """Read all of them. Windows of ``window`` texts are what is compared later on, before they are used."""
        self.file, self.column, self.window = file, column, window
        self._digests: list[bytes] = []
        self.count = 0
        _check_file(file)
        self._stamp = Stamp.of(file)
        whole = hashlib.blake2b(digest_size=16)
        for digest, texts in self._windows():
            self._digests.append(digest)
            self.count += len(texts)
            whole.update(digest)
        self.digest = whole.hexdigest()
        self.check()

    def _windows(self) -> Iterator[tuple[bytes, list[str]]]:
        texts: list[str] = []
        for text in read_texts(self.file, self.column):
            texts.append(text)
            if len(texts) == self.window:
                yield _digest(texts), texts
                texts = []
        if texts:
            yield _digest(texts), texts

    def check(self) -> None:
        """Raises UserInputError if the file was changed, replaced or removed since it was first read."""
        if Stamp.of(self.file) != self._stamp:
            raise self._changed()

    def _changed(self) -> UserInputError:
        return UserInputError(
            f"{self.file} was changed while it was read: start again when it is complete (nothing was written of what "
            "it holds now)"
        )

    def __iter__(self) -> Iterator[str]:
        """Each text, once its window is the one that was read first."""
        number = -1
        for number, (digest, texts) in enumerate(self._windows()):
            self.check()
            if number >= len(self._digests) or digest != self._digests[number]:
                raise self._changed()
            yield from texts
        if number + 1 != len(self._digests):
            raise self._changed()


def _digest(texts: list[str]) -> bytes:
    encoded = [text.encode("utf-8") for text in texts]
    state = hashlib.blake2b(b" ".join(str(len(each)).encode() for each in encoded), digest_size=16)
    state.update(b"".join(encoded))
    return state.digest()
