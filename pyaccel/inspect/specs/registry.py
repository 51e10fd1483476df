"""Every family's kernels, by the name of its op."""

from __future__ import annotations

from collections.abc import Callable

from pyaccel.inspect.spec import KernelSpec
from pyaccel.inspect.specs.layernorm import residual_layernorm


def attention() -> list[KernelSpec]:
    """The family's kernels; this list needs triton to be installed."""
    from pyaccel.inspect.specs import attention as attention_specs

    return attention_specs.attention()


def bert_embeddings() -> list[KernelSpec]:
    """The family's kernels; this list needs triton to be installed."""
    from pyaccel.inspect.specs import embeddings as bert_embeddings_specs

    return bert_embeddings_specs.bert_embeddings()


def bias_gelu() -> list[KernelSpec]:
    """The family's kernels: forward, forward into int8, and backward, by every activation."""
    from pyaccel.inspect.specs import bias_act as bias_gelu_specs

    return bias_gelu_specs.bias_gelu()


def linear_activation() -> list[KernelSpec]:
    """The family's kernel, by every activation."""
    from pyaccel.inspect.specs import linear as linear_activation_specs

    return linear_activation_specs.linear_activation()


def masked_lm_cross_entropy() -> list[KernelSpec]:
    """The masked-language-model loss's kernel: see :mod:`pyaccel.inspect.specs.mlm_loss`."""
    from pyaccel.inspect.specs import mlm_loss as masked_lm_cross_entropy_specs

    return masked_lm_cross_entropy_specs.masked_lm_cross_entropy()


def quantize() -> list[KernelSpec]:
    """The kernels that make int8 codes."""
    from pyaccel.inspect.specs import quantize as quantize_specs

    return quantize_specs.quantize()


def int8_matmul() -> list[KernelSpec]:
    """The int8 product, its epilogue by whole rows, and the weight-only product."""
    from pyaccel.inspect.specs import int8 as int8_matmul_specs

    return int8_matmul_specs.int8_matmul()


BUILDERS: dict[str, Callable[[], list[KernelSpec]]] = {
    "residual_layernorm": residual_layernorm,
    "attention": attention,
    "bert_embeddings": bert_embeddings,
    "bias_gelu": bias_gelu,
    "linear_activation": linear_activation,
    "masked_lm_cross_entropy": masked_lm_cross_entropy,
    "quantize": quantize,
    "int8_matmul": int8_matmul,
}


def specs(op: str | None = None) -> list[KernelSpec]:
    """What ships: all kernels of ``op``, or of every op, with every configuration and dtype."""
    if op is not None and op not in BUILDERS:
        raise ValueError(f"no kernels are known for op {op!r}: expected one of {', '.join(BUILDERS)}")
    return [spec for name, builder in BUILDERS.items() if op in (None, name) for spec in builder()]
