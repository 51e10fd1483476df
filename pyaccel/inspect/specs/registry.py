"""Every family's kernels, by the name of its op."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from pyaccel.inspect.spec import KernelSpec


def _builder(module: str, function: str) -> Callable[[], list[KernelSpec]]:
    """The function of that module beside this one, which is imported at its call: it needs triton to be installed."""

    def build() -> list[KernelSpec]:
        found: list[KernelSpec] = getattr(importlib.import_module(f"{__package__}.{module}"), function)()
        return found

    return build


BUILDERS = {
    op: _builder(module, op)
    for op, module in (
        ("residual_layernorm", "layernorm"),
        ("attention", "attention"),
        ("bert_embeddings", "embeddings"),
        ("bias_gelu", "bias_act"),
        ("linear_activation", "linear"),
        ("masked_lm_cross_entropy", "mlm_loss"),
        ("quantize", "int8"),
        ("int8_matmul", "int8"),
    )
}


def specs(op: str | None = None) -> list[KernelSpec]:
    """What ships: all kernels of ``op``, or of every op, with every configuration and dtype."""
    if op is not None and op not in BUILDERS:
        raise ValueError(f"no kernels are known for op {op!r}: expected one of {', '.join(BUILDERS)}")
    return [spec for name, builder in BUILDERS.items() if op in (None, name) for spec in builder()]
