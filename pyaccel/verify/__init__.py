"""Proofs that users can run on their own machine: answers (`verify`), machine code (`inspect`), costs (`cost`).

``verify(model, batch)`` compares an accelerated copy of a model with the stock one, both against the fp64 truth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyaccel.verify.model import verify
    from pyaccel.verify.report import Check, VerifyReport

__all__ = ["Check", "VerifyReport", "verify"]


def __getattr__(name: str) -> Any:
    if name == "verify":
        from pyaccel.verify.model import verify

        return verify
    if name in ("Check", "VerifyReport"):
        from pyaccel.verify import report

        return getattr(report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
