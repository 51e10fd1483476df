"""A pytest plugin for transformers' own tests: every model that they make is accelerated as soon as it is there.

    cd transformers          # a checkout of the version that is installed
    PYTHONPATH=path/to/pyaccel/tests/hf python -m pytest -p accelerate_everything tests/models/bert

The last lines say how many layer calls were served, and what was left alone and why: tests of models that are not
accelerated prove nothing. CONTRIBUTING.md lists the tests that fail by design.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from transformers import PreTrainedModel

import pyaccel

_post_init = PreTrainedModel.post_init
_reports: list[pyaccel.hf.Report] = []


def post_init(self: Any) -> None:
    """transformers calls it at the end of a model's __init__, of the models inside it first."""
    _post_init(self)
    report = pyaccel.accelerate(self, strict=False)
    if not any(report is each for each in _reports[-1:]):  # a head's is that of the model inside it
        _reports.append(report)


def pytest_configure(config: Any) -> None:
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    swapped = sum(bool(report.swapped or report.attention) for report in _reports)
    served = sum((report.served for report in _reports), Counter())
    terminalreporter.write_line(f"pyaccel: {swapped} of {len(_reports)} models; layer calls: {dict(served)}")
    left_alone = Counter(reason for report in _reports for reason in report.not_swapped.values())
    for reason, count in left_alone.most_common():
        terminalreporter.write_line(f"  left alone: {count}: {reason}")
