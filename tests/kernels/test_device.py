"""What launches need of a device: its table of configurations, and memory that leaves the caller's allocator be."""

from __future__ import annotations

import contextvars
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from pyaccel.kernels.common import tma  # noqa: E402
from pyaccel.kernels.common.device import generation  # noqa: E402


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


@pytest.mark.parametrize(
    ("arch", "itemsize", "row"),
    [
        ("sm_80", 2, "ampere"),
        ("sm_89", 1, "ampere"),
        ("sm_90", 2, "hopper"),
        ("sm_100", 2, "blackwell"),
        ("sm_120", 2, "blackwell"),
        ("gfx942", 2, "amd"),
        ("sm_90", 4, "fp32"),
        ("gfx942", 4, "fp32"),
        ("interpreter", 4, "interpreter"),
    ],
)
def test_each_architecture_has_its_row_of_a_table(arch: str, itemsize: int, row: str) -> None:
    assert generation(arch, itemsize) == row
