"""Why Triton can't run here, or on these tensors."""

from __future__ import annotations

import pytest
import torch

from pyaccel import triton_support


def test_unsupported_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_support.unsupported_reasons(x, None) == []
    assert "not float64" in triton_support.unsupported_reasons(x.double())[0]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert triton_support.unsupported_reasons(x) == ["the tensors are on the CPU"]
    assert "on cpu, meta" in triton_support.unsupported_reasons(x, x.to("meta"))[0]
    assert triton_support.unsupported_reasons(x.to("meta")) == []  # stands for a GPU's tensor
    monkeypatch.setattr(triton_support, "has_triton", lambda: False)
    assert "pip install" in triton_support.unsupported_reasons(x)[0]
