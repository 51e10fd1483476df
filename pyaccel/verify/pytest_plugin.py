"""A pytest plugin, on wherever pyaccel is installed: the fixture ``pyaccel_verify``.

    def test_our_model_is_right_on_the_fast_path(pyaccel_verify):
        pyaccel_verify(model, batch, dtypes=["fp32"])

Importing this imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pyaccel.verify.report import VerifyReport


@pytest.fixture
def pyaccel_verify() -> Callable[..., VerifyReport]:
    """:func:`pyaccel.verify.verify`, which fails the test where the report isn't right, and returns it where it is."""

    def check(model: Any, batch: dict[str, Any], **options: Any) -> VerifyReport:
        __tracebackhide__ = True
        from pyaccel.verify import verify

        report = verify(model, batch, **options)
        if not report.passed:
            pytest.fail(str(report), pytrace=False)
        return report

    return check
