"""What `verify` found: every check with its errors and what the policy allows, as a table, JSON and JUnit XML."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torch import Tensor

from pyaccel.verify.policy import judge_by_several

PASSED, FAILED, ERROR = "passed", "failed", "error"


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        kind: what was compared: "op", "layer", "output", "gradient", "dropout", "bits" or "packing".
        where: the op and its input; the layer and the part of it; or the name of an output or parameter.
        op: the op of :mod:`pyaccel.ops` that computed it, where there is one.
        dtype, backend, mode: how it was computed; mode is "packed", "padded" or "compiled", "" for an op alone.
        status: "passed", "failed", or "error" where it could not be computed.
        error, allowed: of whichever is nearer to its limit (maximum or root mean square) by the policy.
        detail: both errors in words, or what went wrong.
    """

    kind: str
    where: str
    op: str
    dtype: str
    backend: str
    mode: str
    status: str
    error: float = 0.0
    allowed: float = 0.0
    detail: str = ""

    @property
    def key(self) -> str:
        """Names this check among all of a report, the same on every run."""
        return " | ".join((self.dtype, self.backend, self.mode, self.kind, self.where))

    @property
    def share(self) -> float:
        """How much of what is allowed was used: 1 is the limit."""
        return self.error / self.allowed if self.allowed else (0.0 if self.error == 0.0 else float("inf"))

    def __str__(self) -> str:
        how = ", ".join(part for part in (self.dtype, self.backend, self.mode) if part)
        by = f" ({self.op})" if self.op and self.op not in self.where else ""
        return f"{self.kind} {self.where}{by} [{how}]: {self.detail or self.status}"


def compare(out: Tensor, truth: Tensor, *naives: Tensor, **names: Any) -> Check:
    """The check of a result by the policy (:func:`pyaccel.verify.policy.judge_by_several`); another shape is wrong."""
    if out.shape != truth.shape:
        detail = f"its shape is {tuple(out.shape)}, not {tuple(truth.shape)}"
        return Check(**names, status=FAILED, detail=detail)
    verdict = judge_by_several(out, truth.double(), [naive.to(out.dtype) for naive in naives])
    pairs = [(verdict.max_error, verdict.max_allowed), (verdict.rms_error, verdict.rms_allowed)]
    error, allowed = max(pairs, key=lambda pair: pair[0] / pair[1] if pair[1] else pair[0])
    return Check(
        **names,
        status=PASSED if verdict.passed else FAILED,
        error=error,
        allowed=allowed,
        detail="" if verdict.passed else str(verdict),
    )


@dataclass
class VerifyReport:
    """Every :class:`Check` in the order in which results come about: the first that failed is where to look.

    Attributes:
        model: what was verified.
        machine: device, and versions of torch, triton and transformers.
        checks: in order.
        notes: what was not looked at and why.
    """

    model: str
    machine: dict[str, str]
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == FAILED]

    @property
    def errors(self) -> list[Check]:
        return [check for check in self.checks if check.status == ERROR]

    @property
    def passed(self) -> bool:
        """Whether everything that was to be checked was, and passed."""
        return bool(self.checks) and not self.failed and not self.errors

    @property
    def firsts(self) -> list[Check]:
        """The first failed check of each kind: op and layer where there is a bug, and what it does to the outputs."""
        found: dict[str, Check] = {}
        for check in self.failed:
            found.setdefault(check.kind, check)
        return list(found.values())

    @property
    def first_wrong(self) -> Check | None:
        """The first layer and op, or the first output, that leaves the policy; None where nothing does."""
        return next(iter(self.firsts), None)

    @property
    def exit_code(self) -> int:
        """0: all passed. 1: something failed. 2: nothing did, but something could not be run."""
        return 1 if self.failed else 0 if self.passed else 2

    def over_budget(self, budget: dict[str, float]) -> list[Check]:
        """Checks whose error is above the one recorded under their key."""
        return [check for check in self.checks if check.error > budget.get(check.key, float("inf"))]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; ``checks`` have their ``key`` and ``share`` too."""
        first = self.first_wrong
        return {
            "model": self.model,
            "machine": self.machine,
            "passed": self.passed,
            "first_wrong": None if first is None else asdict(first),
            "first_wrong_of_each_kind": [asdict(check) for check in self.firsts],
            "notes": self.notes,
            "checks": [{**asdict(check), "key": check.key, "share": check.share} for check in self.checks],
        }

    def write_json(self, file: Path) -> None:
        file.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    def write_junit(self, file: Path) -> None:
        """JUnit XML, a test case a check, which CI systems show."""
        suite = ElementTree.Element(
            "testsuite",
            name="pyaccel verify",
            tests=str(len(self.checks)),
            failures=str(len(self.failed)),
            errors=str(len(self.errors)),
        )
        for check in self.checks:
            group = ".".join(part for part in (check.dtype, check.backend, check.mode) if part)
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"pyaccel.{group}", name=f"{check.kind} {check.where}"
            )
            if check.status != PASSED:
                tag = "failure" if check.status == FAILED else "error"
                ElementTree.SubElement(case, tag, message=check.detail).text = str(check)
        ElementTree.ElementTree(suite).write(file, encoding="utf-8", xml_declaration=True)

    def groups(self) -> list[tuple[tuple[str, str, str, str], list[Check]]]:
        """Checks by dtype, backend, mode and kind."""
        found: dict[tuple[str, str, str, str], list[Check]] = {}
        for check in self.checks:
            found.setdefault((check.dtype, check.backend, check.mode, check.kind), []).append(check)
        return list(found.items())

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.checks)} checks, {len(self.failed)} failed, {len(self.errors)} not run"
        ]
        for names, checks in self.groups():
            worst = max(checks, key=lambda check: check.share)
            how = " ".join(name for name in names if name)
            lines.append(f"  {how}: {len(checks)} checks, the worst at {worst.share:.0%} of what is allowed")
        lines += [f"  failed: {check}" for check in self.failed]
        lines += [f"  not run: {check}" for check in self.errors]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def read_budget(file: Path) -> dict[str, float]:
    """Key of a check -> the largest error it may have, from a report that :meth:`VerifyReport.write_json` wrote.

    Raises ValueError for a file of another kind.
    """
    try:
        checks: Iterable[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["checks"]
        return {check["key"]: float(check["error"]) for check in checks}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a report of pyaccel verify --json: {error}") from None
