"""What is compiled of int8: every launch configuration of products, with epilogue or without, and of quantization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyaccel.inspect.spec import KernelSpec, archs_by_config, kernel_spec, launched
from pyaccel.kernels.common import limits
from pyaccel.kernels.common.device import generation
from pyaccel.kernels.int8 import config as int8_config
from pyaccel.kernels.int8.config import (
    CONFIGS,
    TMA_CONFIGS,
    WEIGHT_ONLY_CONFIGS,
    Int8MatmulConfig,
    int8_finish,
)

# dtype label -> (output and residual, bias) as Triton names them.
DTYPES = {"bf16": ("*bf16", "*bf16"), "fp16": ("*fp16", "*fp16"), "fp32": ("*fp32", "*fp32")}
# The erf GELU, BERT's, takes most registers: it is compiled in every dtype, the others in bf16.
ACTIVATIONS = {"gelu": tuple(DTYPES), "gelu_tanh": ("bf16",), "relu": ("bf16",), "silu": ("bf16",)}
# The first product of a feed-forward layer. Packed batches have any number of rows, not a multiple of 16.
N_ROWS, N_OUT, N_IN = 4099, 3072, 768
# An inner dimension that no block divides.
UNEVEN_IN = 784
# Rows of each configuration that quantizes them again.
WIDTHS = (512, 1024, 2048, 4096, limits.MAX_QUANTIZED_ROW)
# Those of each configuration that quantizes them first, and that quantizes tiles by a given scale.
QUANTIZED_WIDTHS = (512, 1024, 2048, 4096, 8192, limits.MAX_ROW)
TILED_WIDTHS = (256, 3072)


def int8_matmul() -> list[KernelSpec]:
    """Products, and what finishes split ones."""
    products = archs_by_config(
        lambda arch: (*CONFIGS[generation(arch)], *TMA_CONFIGS.get(generation(arch), ()))
    )
    return [
        *(
            _matmul(variant, activation, dtype, config, archs)
            for config, archs in products.items()
            for activation, dtypes in ACTIVATIONS.items()
            for dtype in dtypes
            for variant in ("everything", "dynamic", "everything, uneven")
        ),
        *(_sums(config, archs) for config, archs in products.items()),
        *_finish(),
        *_weight_only(),
    ]


def _epilogue(dtype: str, *, residual: bool) -> dict[str, Any]:
    """What a dynamic layer's epilogue is given, and on request a residual beside."""
    out, bias = DTYPES[dtype]
    return {
        "a_scale_ptr": "*fp32",
        "a_offset_ptr": "*fp32",
        "b_scale_ptr": "*fp32",
        "b_sum_ptr": "*i32",
        "bias_ptr": bias,
        "residual_ptr": out if residual else None,
        "stride_a_scale": 1,
        "stride_b_scale": 1,
        "stride_residual_row": N_OUT if residual else 0,
        "stride_residual_col": 1 if residual else 0,
    }


_NO_EPILOGUE: dict[str, Any] = {
    name: 0 if name.startswith("stride") else None for name in _epilogue("bf16", residual=False)
}


def _product(
    name: str,
    out: str,
    epilogue: dict[str, Any],
    activation: str | None,
    n_in: int,
    dtype: str,
    config: Int8MatmulConfig,
    archs: frozenset[str],
) -> KernelSpec:
    return kernel_spec(
        "int8_matmul",
        name,
        "pyaccel.kernels.int8.matmul:matmul_kernel",
        {
            "out_ptr": out,
            "a_ptr": "*i8",
            "b_ptr": "*i8",
            **epilogue,
            "stride_a": n_in,
            "stride_b": n_in,
            "n_rows": N_ROWS,
            "n_out": N_OUT,
            "n_in": n_in,
            "ACTIVATION": activation,
            "EPILOGUE": epilogue is not _NO_EPILOGUE,
            "EVEN_K": n_in % config.block_k == 0,
            "TMA": config.tma,
            **config.blocks,
        },
        dtype=dtype,
        **{**launched(config), "programs_per_sm": int(config.tma)},
        archs=archs,
        fp_fusion=False,
    )


def _matmul(
    variant: str, activation: str, dtype: str, config: Int8MatmulConfig, archs: frozenset[str]
) -> KernelSpec:
    return _product(
        f"{variant}, {activation}",
        DTYPES[dtype][0],
        _epilogue(dtype, residual=variant.startswith("everything")),
        activation,
        UNEVEN_IN if variant.endswith("uneven") else N_IN,
        dtype,
        config,
        archs,
    )


def _sums(config: Int8MatmulConfig, archs: frozenset[str]) -> KernelSpec:
    return _product("sums", "*i32", _NO_EPILOGUE, None, N_IN, "int8", config, archs)


def _finish() -> Iterator[KernelSpec]:
    """Whole rows of every width, and tiles."""
    for dtype, (out, _) in DTYPES.items():
        for n_out in (*WIDTHS, N_OUT):
            quantize = n_out in WIDTHS
            config = int8_finish(n_out, quantize=quantize)
            epilogue = _epilogue(dtype, residual=True)
            epilogue["stride_residual_row"] = n_out
            yield kernel_spec(
                "int8_matmul",
                "finish, int8" if quantize else "finish",
                "pyaccel.kernels.int8.epilogue:finish_kernel",
                {
                    "out_ptr": "*i8" if quantize else out,
                    "out_scale_ptr": "*fp32" if quantize else None,
                    "sums_ptr": "*i32",
                    **epilogue,
                    "n_rows": N_ROWS,
                    "n_out": n_out,
                    "n_splits": 1 if quantize else 3,
                    "ACTIVATION": "gelu",
                    **config.blocks,
                },
                dtype=dtype,
                **launched(config),
                fp_fusion=False,
            )


def _weight_only() -> Iterator[KernelSpec]:
    for dtype in ("bf16", "fp16"):
        x, bias = DTYPES[dtype]
        for config in WEIGHT_ONLY_CONFIGS["cards"]:
            for variant, n_in in (("weight only", N_IN), ("weight only, uneven", UNEVEN_IN)):
                yield kernel_spec(
                    "int8_matmul",
                    variant,
                    "pyaccel.kernels.int8.weight_only:weight_only_kernel",
                    {
                        "out_ptr": x,
                        "x_ptr": x,
                        "weight_ptr": "*i8",
                        "weight_scale_ptr": "*fp32",
                        "bias_ptr": bias,
                        "stride_x": n_in,
                        "stride_weight": n_in,
                        "n_rows": 7,
                        "n_out": N_OUT,
                        "n_in": n_in,
                        "ACTIVATION": "gelu",
                        "EVEN_K": n_in % config.block_k == 0,
                        **config.blocks,
                    },
                    dtype=dtype,
                    **launched(config),
                )


def quantize() -> list[KernelSpec]:
    """Each kernel in every dtype, lean and with all it can be given."""
    specs = [_row_sum()]
    for dtype, (x, _) in DTYPES.items():
        for n_cols in QUANTIZED_WIDTHS:
            specs += [_rows(dtype, x, n_cols, full=full) for full in (False, True)]
        specs += [_tensor(dtype, x, n_cols) for n_cols in TILED_WIDTHS]
    return specs


def _rows(dtype: str, x: str, n_cols: int, *, full: bool) -> KernelSpec:
    row_config = int8_config.quantize(n_cols)
    return kernel_spec(
        "quantize",
        "rows, offset and factor" if full else "rows",
        "pyaccel.kernels.int8.quantize:rows_kernel",
        {
            "codes_ptr": "*i8",
            "scale_ptr": "*fp32",
            "offset_ptr": "*fp32" if full else None,
            "x_ptr": x,
            "factor_ptr": "*fp32" if full else None,
            "stride_x_row": n_cols,
            "stride_x_col": 1,
            "n_rows": N_ROWS,
            "n_cols": n_cols,
            **row_config.blocks,
        },
        dtype=dtype,
        **launched(row_config),
        fp_fusion=False,
    )


def _tensor(dtype: str, x: str, n_cols: int) -> KernelSpec:
    row_config = int8_config.quantize_by_given_scale(n_cols)
    return kernel_spec(
        "quantize",
        "tensor",
        "pyaccel.kernels.int8.quantize:tensor_kernel",
        {
            "codes_ptr": "*i8",
            "x_ptr": x,
            "factor_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "stride_x_row": n_cols,
            "stride_x_col": 1,
            "n_rows": N_ROWS,
            "n_cols": n_cols,
            **row_config.blocks,
        },
        dtype=dtype,
        **launched(row_config),
        fp_fusion=False,
    )


def _row_sum() -> KernelSpec:
    row_config = int8_config.int8_row_sum()
    return kernel_spec(
        "quantize",
        "row sum",
        "pyaccel.kernels.int8.quantize:row_sum_kernel",
        {
            "out_ptr": "*i32",
            "codes_ptr": "*i8",
            "stride_row": 768,
            "n_rows": 3072,
            "n_cols": 768,
            **row_config.blocks,
        },
        dtype="int8",
        **launched(row_config),
    )
