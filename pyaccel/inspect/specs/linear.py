"""What is compiled of linear_activation: every launch configuration that ships, for training and for inference."""

from __future__ import annotations

from collections.abc import Iterator

from pyaccel.inspect.spec import KernelSpec, archs_by_config, kernel_spec, launched
from pyaccel.kernels.common.configs import MatmulConfig
from pyaccel.kernels.common.device import generation
from pyaccel.kernels.linear.config import CONFIGS, MAX_UNALIGNED_N

# dtype label -> (matrices, bias) as Triton names them, and bytes of an element.
DTYPES = {
    "bf16": ("*bf16", "*bf16", 2),
    "fp16": ("*fp16", "*fp16", 2),
    "fp32": ("*fp32", "*fp32", 4),
    "bf16 + fp32": ("*bf16", "*fp32", 2),
}
# The erf GELU, BERT's, takes most registers: it is compiled in every dtype, the others in bf16.
ACTIVATIONS = {"gelu": tuple(DTYPES), "gelu_tanh": ("bf16",), "relu": ("bf16",), "silu": ("bf16",)}
# The first product of a feed-forward layer. Rows aren't a multiple of 16: packed batches have any number.
N_ROWS, N_OUT, N_IN = 4099, 3072, 768
# Inner dimensions that the blocks of 16-bit configurations don't divide, of aligned rows and of others.
UNEVEN_IN, UNALIGNED_IN = 784, 776


def linear_activation() -> list[KernelSpec]:
    """The family's kernel. The backward pass is bias_gelu's, and PyTorch's products."""
    return [
        spec
        for activation, dtypes in ACTIVATIONS.items()
        for dtype in dtypes
        for config, archs in _archs_by_config(DTYPES[dtype][2]).items()
        for spec in _specs(activation, dtype, config, archs)
    ]


def _archs_by_config(itemsize: int) -> dict[MatmulConfig, frozenset[str]]:
    return archs_by_config(lambda arch: CONFIGS[generation(arch, itemsize)])


def _specs(activation: str, dtype: str, config: MatmulConfig, archs: frozenset[str]) -> Iterator[KernelSpec]:
    pointer, bias, _ = DTYPES[dtype]
    for variant, n_in in (
        ("training", N_IN),
        ("inference", N_IN),
        ("training, uneven", UNEVEN_IN),
        ("training, unaligned", UNALIGNED_IN),
    ):
        if n_in == UNEVEN_IN and n_in % config.block_k == 0:
            continue  # as training
        if n_in == UNALIGNED_IN and config.block_n > MAX_UNALIGNED_N:
            continue
        training = variant.startswith("training")
        arguments = {
            "out_ptr": pointer,
            "pre_ptr": pointer if training else None,
            "x_ptr": pointer,
            "weight_ptr": pointer,
            "bias_ptr": bias,
            "stride_x_row": n_in,
            "stride_x_col": 1,
            "stride_weight_row": n_in,
            "stride_weight_col": 1,
            "n_rows": N_ROWS,
            "n_out": N_OUT,
            "n_in": n_in,
            "ACTIVATION": activation,
            "PRECISION": "ieee",
            "EVEN_K": n_in % config.block_k == 0,
            **config.blocks,
        }
        yield kernel_spec(
            "linear_activation",
            f"{variant}, {activation}",
            "pyaccel.kernels.linear.kernels:forward_kernel",
            arguments,
            dtype=dtype,
            **launched(config),
            archs=archs,
        )
