"""Files of ``pyaccel encode`` that are there whole or not at all, and those that are made of its parts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyaccel.encode.texts import pyarrow
from pyaccel.errors import UserInputError

if TYPE_CHECKING:
    import numpy as np


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserInputError(f"{file} is damaged: start over with --overwrite")
    return values


def write(file: Path, *data: bytes) -> None:
    """The whole file or none of it, whenever the machine stops."""
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with beside.open("wb") as target:
            for each in data:
                target.write(each)
            target.flush()
            os.fsync(target.fileno())
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync(file: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())


def write_parquet(file: Path, parts: Iterable[np.ndarray], texts: Iterator[str] | None) -> None:
    import numpy as np

    arrow, parquet = pyarrow("pyarrow"), pyarrow("pyarrow.parquet")
    start, writer = 0, None
    try:
        for values in parts:
            width = values.shape[1]
            fields = [("row", arrow.int64()), ("embedding", arrow.list_(arrow.float32(), width))]
            if texts is not None:
                fields.insert(1, ("text", arrow.string()))
            schema = arrow.schema(fields)
            writer = writer or parquet.ParquetWriter(file, schema)
            columns = {
                "row": arrow.array(np.arange(start, start + len(values))),
                "embedding": arrow.FixedSizeListArray.from_arrays(arrow.array(values.ravel()), width),
            }
            if texts is not None:
                columns["text"] = arrow.array(list(islice(texts, len(values))), arrow.string())
            table = arrow.table([columns[name] for name, _ in fields], schema=schema)
            writer.write_table(table, row_group_size=len(values))
            start += len(values)
    finally:
        if writer is not None:
            writer.close()
