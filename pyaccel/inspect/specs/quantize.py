"""What is compiled of quantisation: codes of rows, around their middle too, by a given scale, and sums of codes."""

from __future__ import annotations

from pyaccel.inspect.spec import KernelSpec, kernel_spec
from pyaccel.kernels.common import limits
from pyaccel.kernels.int8 import config

DTYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
# Rows of each configuration. Packed batches have any number of them.
WIDTHS = (512, 1024, 2048, 4096, 8192, limits.MAX_ROW)
N_ROWS = 4099
# A width of each configuration of the tiles.
TILED_WIDTHS = (256, 3072)


def quantize() -> list[KernelSpec]:
    """Each kernel in every dtype, lean and with all it can be given."""
    specs = [_row_sum()]
    for dtype, x in DTYPES.items():
        for n_cols in WIDTHS:
            specs += [_rows(dtype, x, n_cols, full=full) for full in (False, True)]
        specs += [_tensor(dtype, x, n_cols) for n_cols in TILED_WIDTHS]
    return specs


def _rows(dtype: str, x: str, n_cols: int, *, full: bool) -> KernelSpec:
    row_config = config.quantize(n_cols)
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
        },
        {"BLOCK_ROWS": row_config.block_rows, "BLOCK_N": row_config.block_n},
        dtype=dtype,
        config=row_config.label,
        num_warps=row_config.num_warps,
        fp_fusion=False,
    )


def _tensor(dtype: str, x: str, n_cols: int) -> KernelSpec:
    row_config = config.quantize_by_given_scale(n_cols)
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
        },
        {"BLOCK_ROWS": row_config.block_rows, "BLOCK_N": row_config.block_n},
        dtype=dtype,
        config=row_config.label,
        num_warps=row_config.num_warps,
        fp_fusion=False,
    )


def _row_sum() -> KernelSpec:
    row_config = config.int8_row_sum()
    return kernel_spec(
        "quantize",
        "row sum",
        "pyaccel.kernels.int8.quantize:row_sum_kernel",
        {"out_ptr": "*i32", "codes_ptr": "*i8", "stride_row": 768, "n_rows": 3072, "n_cols": 768},
        {"BLOCK_ROWS": row_config.block_rows, "BLOCK_N": row_config.block_n},
        dtype="int8",
        config=row_config.label,
        num_warps=row_config.num_warps,
    )
