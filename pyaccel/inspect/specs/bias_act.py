"""What is compiled of bias + activation: every launch configuration that ships, and every activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyaccel.inspect.spec import KernelSpec, kernel_spec, launched
from pyaccel.kernels.bias_act import config
from pyaccel.kernels.common import limits
from pyaccel.kernels.common.configs import RowConfig

# dtype label -> (x and what has its dtype, bias) as Triton names them.
DTYPES = {
    "bf16": ("*bf16", "*bf16"),
    "fp16": ("*fp16", "*fp16"),
    "fp32": ("*fp32", "*fp32"),
    # As autocast gives them.
    "bf16 + fp32": ("*bf16", "*fp32"),
}
# The erf GELU, BERT's, takes most registers: it is compiled in every dtype, the others in bf16.
ACTIVATIONS = {"gelu": tuple(DTYPES), "gelu_tanh": ("bf16",), "relu": ("bf16",), "silu": ("bf16",)}
# Not a multiple of 16: packed batches have any number of rows.
N_ROWS = 4099
# A width of each configuration of the tiles; rows of int8 codes are held whole.
WIDTHS = {
    "forward": (256, 3072),
    "backward": (256, 3072),
    "int8": (512, 1024, 2048, 4096, 8192, limits.MAX_ROW),
}
HEURISTICS: dict[str, Callable[[int], RowConfig]] = {
    "forward": config.bias_gelu_forward,
    "backward": config.bias_gelu_backward,
    "int8": config.bias_gelu_quantize,
}
KERNELS = {"forward": "forward_kernel", "backward": "backward_kernel", "int8": "quantize_kernel"}


def arguments(kind: str, x: str, bias: str, n_cols: int) -> dict[str, Any]:
    """What the kernel is launched with, all of its optional inputs and outputs there."""
    outputs: dict[str, dict[str, Any]] = {
        "forward": {"out_ptr": x},
        "backward": {"dx_ptr": x, "dbias_ptr": "*fp32", "dy_ptr": x},
        "int8": {"codes_ptr": "*i8", "scale_ptr": "*fp32"},
    }
    strides: dict[str, Any] = {"stride_x_row": n_cols, "stride_x_col": 1}
    if kind == "backward":
        strides |= {"stride_dy_row": n_cols, "stride_dy_col": 1}
    return {**outputs[kind], "x_ptr": x, "bias_ptr": bias, **strides, "n_rows": N_ROWS, "n_cols": n_cols}


def bias_gelu() -> list[KernelSpec]:
    """The family's kernels. Sums of columns are compiled as residual_layernorm's."""
    return [
        kernel_spec(
            "bias_gelu",
            f"{kind}, {activation}",
            f"pyaccel.kernels.bias_act.kernels:{KERNELS[kind]}",
            {**arguments(kind, *DTYPES[dtype], n_cols), "ACTIVATION": activation, **row_config.blocks},
            dtype=dtype,
            **launched(row_config),
        )
        for activation, dtypes in ACTIVATIONS.items()
        for dtype in dtypes
        for kind, widths in WIDTHS.items()
        for n_cols, row_config in ((n, HEURISTICS[kind](n)) for n in widths)
    ]
