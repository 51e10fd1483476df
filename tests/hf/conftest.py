from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyaccel import dispatch


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    """These tests are about the swap: without a GPU they don't wait for interpreted kernels."""
    with dispatch.use_backend("torch"):
        yield
