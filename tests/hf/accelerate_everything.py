"""A pytest plugin for transformers' own tests: every model that they make is accelerated as soon as it is there.

    cd transformers          # a checkout of the version that is installed
    PYTHONPATH=path/to/pyaccel/tests/hf python -m pytest -p accelerate_everything tests/models/bert

CONTRIBUTING.md lists the tests that fail by design.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

import pyaccel

_post_init = PreTrainedModel.post_init


def post_init(self: Any) -> None:
    """transformers calls it at the end of a model's __init__, of the models inside it first."""
    _post_init(self)
    pyaccel.accelerate(self, strict=False)


def pytest_configure(config: Any) -> None:
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
