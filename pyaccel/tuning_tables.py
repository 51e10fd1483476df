"""The files that measurements are kept in: read, and refused where they are not valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

MOST_BYTES = 16 * 2**20  # of a file: ours have some thousands
FORMAT = 1


def read(file: Path) -> list[dict[str, Any]]:
    """The file's tables: ``machine``, ``dtype``, provenance, and ``rows`` of ``size`` and ``us``; none without a file.

    Raises:
        ValueError: it isn't such a file.
        OSError: it can't be read.
    """
    if not file.exists():
        return []
    why = "it isn't a file" if not file.is_file() else ""
    if not why and file.stat().st_size > MOST_BYTES:
        why = f"it has more than {MOST_BYTES} bytes"
    if not why:
        try:
            content = json.loads(file.read_bytes().decode("utf-8"))
            if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
                why = f"it is of format {content['format']!r}, and this version reads {FORMAT}"
            elif all(_is_table(table) for table in content["tables"]):
                tables: list[dict[str, Any]] = content["tables"]
                return tables
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass
    raise ValueError(
        f"{file} is not a valid tuning table{f' ({why})' if why else ''}: delete it or run `pyaccel tune` again"
    )


def _is_table(table: dict[str, Any]) -> bool:
    return (
        isinstance(table["machine"], str)
        and isinstance(getattr(torch, table["dtype"]), torch.dtype)
        and all(_is_row(row) for row in table["rows"])
        and len({len(row["size"]) for row in table["rows"]}) <= 1
    )


def _is_row(row: dict[str, Any]) -> bool:
    config = row.get("config")
    return (
        isinstance(row["size"], list)
        and len(row["size"]) > 0
        and all(type(n) is int and 0 < n < 2**63 for n in row["size"])
        and len(row["us"]) > 0
        and all(type(us) in (int, float) and 0 < us < 1e18 for us in row["us"].values())  # NaN isn't
        and (config is None or all(type(value) in (int, bool) for value in config.values()))
    )
