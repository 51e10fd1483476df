"""The one loader: quiet while it loads and not after, and whatever is wrong is one error with one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers.utils import logging

from pyaccel import checkpoints
from pyaccel.errors import UserInputError


def test_transformers_says_afterwards_what_it_said_before(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        with pytest.raises(checkpoints.CheckpointError, match="could not be loaded"):
            checkpoints.load_config(tmp_path)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)


def test_without_transformers_the_error_says_which_extra_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserInputError, match=r"transformers is not installed: pip install 'pyaccel-bert\[hf\]'"
    ):
        checkpoints.load_config(tmp_path)
