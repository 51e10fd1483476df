"""Launches that are recorded instead of being run."""

from __future__ import annotations

from typing import Any

import pytest

from pyaccel.kernels.common.reduce import column_sum_kernel


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Each kernel that was launched, and its arguments and options by name."""
    recorded: list[tuple[Any, dict[str, Any]]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [name for name in self.arg_names if name not in kwargs]
        recorded.append((self, {**dict(zip(names, args, strict=False)), **kwargs}))

    monkeypatch.setattr(type(column_sum_kernel), "run", run)
    return recorded
