"""Every case that is measured, by its name or its group."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace

from pyaccel.benchmarks.case import GROUPS, Case

MODULES = (
    "layernorm",
    "attention",
    "varlen_attention",
    "bias_act",
    "linear",
    "embeddings",
    "mlm_loss",
    "int8",
    "bert",
)  # of pyaccel.benchmarks.cases, each with CASES: a new case needs no other line


def cases(names: Iterable[str] | None = None) -> list[Case]:
    """The registered cases, or those of the named groups or cases.

    Raises:
        ValueError: a name of neither.
    """
    known: list[Case] = []
    for name in MODULES:
        module = importlib.import_module(f"pyaccel.benchmarks.cases.{name}")
        about = (module.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        known += [case if case.about else replace(case, about=about) for case in module.CASES]
    if names is None:
        return known
    wanted = set(names)
    unknown = sorted(wanted - set(GROUPS) - {case.name for case in known})
    if unknown:
        raise ValueError(
            f"there is no case {', '.join(unknown)}: expected some of {', '.join(GROUPS)}, or of "
            f"{', '.join(case.name for case in known)}"
        )
    return [case for case in known if wanted & {case.name, case.group}]
