"""Kernels of residual_layernorm."""

from __future__ import annotations

from collections.abc import Iterable

from pyaccel.inspect.spec import KernelSpec, kernel_spec, launched, rows_by_config
from pyaccel.kernels.common import configs, limits
from pyaccel.kernels.layernorm import config as kernel_config

# dtype label -> (x, residual and sum, parameters, output) as Triton names them.
ROW_DTYPES = {
    "bf16": ("bf16", "bf16", "bf16", "bf16"),
    "fp16": ("fp16", "fp16", "fp16", "fp16"),
    "fp32": ("fp32", "fp32", "fp32", "fp32"),
    # As autocast gives them: a 16-bit branch, everything else in fp32.
    "bf16 + fp32": ("bf16", "fp32", "fp32", "fp32"),
}


def residual_layernorm(dtypes: Iterable[str] = ROW_DTYPES) -> list[KernelSpec]:
    """The family's kernels: forward and backward, lean (inference) and with every option; int8 as inference has it."""
    # Not a multiple of 16: packed batches have any number of rows.
    n_rows = 4099
    threshold = {"threshold": 429496730}
    specs = []
    for dtype in dtypes:
        x, stream, parameter, out = (f"*{name}" for name in ROW_DTYPES[dtype])
        for row_config, n_cols in rows_by_config(kernel_config.residual_layernorm_forward).items():
            for variant in ("", ", dropout", ", int8"):
                dropout, int8 = variant == ", dropout", variant == ", int8"
                if int8 and n_cols > limits.MAX_QUANTIZED_ROW:
                    continue
                specs.append(
                    kernel_spec(
                        "residual_layernorm",
                        "forward" + variant,
                        "pyaccel.kernels.layernorm.forward:forward_kernel",
                        {
                            "out_ptr": out,
                            "sum_ptr": stream if dropout else None,
                            "codes_ptr": "*i8" if int8 else None,
                            "codes_scale_ptr": "*fp32" if int8 else None,
                            "mean_ptr": "*fp32" if dropout else None,
                            "rstd_ptr": "*fp32" if dropout else None,
                            "x_ptr": x,
                            "residual_ptr": stream,
                            "weight_ptr": parameter,
                            "bias_ptr": parameter,
                            "x_bias_ptr": parameter if variant else None,
                            "key_ptr": "*i64" if dropout else None,
                            "stride_x_row": n_cols,
                            "stride_x_col": 1,
                            "stride_residual_row": n_cols,
                            "stride_residual_col": 1,
                            "n_rows": n_rows,
                            "n_cols": n_cols,
                            "eps": 1e-12,
                            "scale": 1.1,
                            **threshold,
                            "RMS_NORM": False,
                            **row_config.blocks,
                        },
                        dtype=dtype,
                        **launched(row_config),
                        do_not_specialize=threshold,
                    )
                )
        for row_config, n_cols in rows_by_config(kernel_config.residual_layernorm_backward).items():
            kernel = "backward_tiled_kernel" if row_config.tiled else "backward_kernel"
            for full in (False, True):
                specs.append(
                    kernel_spec(
                        "residual_layernorm",
                        "backward, dropout" if full else "backward",
                        f"pyaccel.kernels.layernorm.backward:{kernel}",
                        {
                            "dx_ptr": x,
                            "dresidual_ptr": stream if full else None,
                            "dweight_ptr": "*fp32",
                            "dbias_ptr": "*fp32",
                            "dx_bias_ptr": "*fp32" if full else None,
                            "dy_ptr": out,
                            "dsum_ptr": stream if full else None,
                            "sum_ptr": stream,
                            "mean_ptr": "*fp32",
                            "rstd_ptr": "*fp32",
                            "weight_ptr": parameter,
                            "key_ptr": "*i64" if full else None,
                            "stride_dy_row": n_cols,
                            "stride_dy_col": 1,
                            "stride_dsum_row": n_cols if full else 0,
                            "stride_dsum_col": 1 if full else 0,
                            "n_rows": n_rows,
                            "n_cols": n_cols,
                            "scale": 1.1,
                            **threshold,
                            **row_config.blocks,
                        },
                        dtype=dtype,
                        **launched(row_config),
                        do_not_specialize=threshold,
                    )
                )
        sum_config = configs.column_sum()
        specs.append(
            kernel_spec(
                "residual_layernorm",
                "column sum",
                "pyaccel.kernels.common.reduce:column_sum_kernel",
                {
                    **{f"out{i}_ptr": parameter for i in range(3)},
                    **{f"partial{i}_ptr": "*fp32" for i in range(3)},
                    "n_partials": 264,
                    "n_cols": 768,
                    "BLOCK_P": sum_config.block_p,
                    "BLOCK_N": sum_config.block_n,
                },
                dtype=dtype,
                **launched(sum_config),
            )
        )
    return specs
