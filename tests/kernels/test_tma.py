"""Launches whose kernels allocate: they get memory, and the caller's allocator stays what it was."""

from __future__ import annotations

import contextvars
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from pyaccel.kernels.common import tma  # noqa: E402


def _current() -> Any:
    from triton.runtime import _allocation

    return _allocation._allocator.get()


def test_the_caller_s_allocator_stays() -> None:
    def own(size: int, alignment: int, stream: int | None) -> Any:
        raise AssertionError("of the caller")

    def call() -> None:
        triton.set_allocator(own)
        seen: list[Any] = []
        tma.launch(lambda: seen.append(_current()), allocates=True)
        tma.launch(lambda: seen.append(_current()), allocates=False)
        assert seen == [tma._allocate, own]
        assert _current() is own
        with pytest.raises(RuntimeError, match="no launch"):
            tma.launch(lambda: (_ for _ in ()).throw(RuntimeError("no launch")), allocates=True)
        assert _current() is own

    contextvars.copy_context().run(call)  # and this test leaves none behind
