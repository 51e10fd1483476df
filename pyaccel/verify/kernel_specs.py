"""What is compiled: every kernel with every launch configuration that ships, and a real call's arguments.

A family adds one builder to :data:`BUILDERS`. Importing this needs no triton.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyaccel.kernels import config as kernel_config

# A kernel's argument as a launch has it: "*bf16" for a pointer to bfloat16, a number, None, or a tuple of integers.
Argument = str | int | float | None | tuple[int, ...]

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950")

Name = str | tuple[str, int]  # of an argument, or of an element of one that is a tuple

# dtype label -> (x, residual and sum, parameters, output) as Triton names them.
ROW_DTYPES = {
    "bf16": ("bf16", "bf16", "bf16", "bf16"),
    "fp16": ("fp16", "fp16", "fp16", "fp16"),
    "fp32": ("fp32", "fp32", "fp32", "fp32"),
    # As autocast gives them: a 16-bit branch, everything else in fp32.
    "bf16 + fp32": ("bf16", "fp32", "fp32", "fp32"),
}


@dataclass(frozen=True)
class KernelSpec:
    """One kernel with one launch configuration and one set of argument types.

    Attributes:
        op: the op of :mod:`pyaccel.ops` that it serves.
        name: the kernel, and which of its optional inputs it has.
        fn: where the kernel is, ``"module:function"``.
        signature: Triton's type of each run-time argument, such as ``"*bf16"`` or ``"i32"``; of a tuple, a tuple.
        constexprs: the values of all other arguments; ``(name, i)`` is an element of a tuple.
        divisible: the arguments known to be divisible by 16 (pointers: aligned to 16 bytes).
        num_warps, num_stages: launch options; None for Triton's default.
        programs_per_sm: programs that a persistent grid has for each SM; 0 for other grids.
        dtype: a label for the argument types.
        config: a label for the launch configuration.
        archs: the architectures that have this configuration; None for all.
        fp_fusion: whether products may be fused with the sums that follow, as Triton does where it isn't told.
    """

    op: str
    name: str
    fn: str
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[Name, Any]
    divisible: frozenset[Name]
    num_warps: int | None
    num_stages: int | None
    dtype: str
    config: str
    programs_per_sm: int = 0
    archs: frozenset[str] | None = None
    fp_fusion: bool = True

    def __str__(self) -> str:
        return f"{self.op} {self.name} [{self.config}] {self.dtype}"


def kernel_spec(
    op: str,
    name: str,
    fn: str,
    arguments: Mapping[str, Argument],
    constexprs: Mapping[str, Any],
    *,
    dtype: str,
    config: str,
    num_warps: int | None = None,
    num_stages: int | None = None,
    programs_per_sm: int = 0,
    do_not_specialize: Collection[str] = (),
    archs: frozenset[str] | None = None,
    fp_fusion: bool = True,
) -> KernelSpec:
    """A :class:`KernelSpec` with the arguments specialised as Triton's JIT does it on a launch.

    None and the integer 1 become constants, integers divisible by 16 and all pointers are marked as such, and
    the arguments in ``do_not_specialize`` keep their type alone.
    """
    signature: dict[str, str | tuple[str, ...]] = {}
    constants: dict[Name, Any] = {name: value for name, value in constexprs.items()}
    divisible: set[Name] = set()

    def integer(name: Name, value: int) -> str:
        if value == 1 and name not in do_not_specialize:
            constants[name] = 1
            return "constexpr"
        if value % 16 == 0 and name not in do_not_specialize:
            divisible.add(name)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for arg, value in arguments.items():
        if value is None:
            constants[arg] = None
        elif isinstance(value, str):
            signature[arg] = value
            divisible.add(arg)
        elif isinstance(value, float):
            signature[arg] = "fp32"
        elif isinstance(value, tuple):
            signature[arg] = tuple(integer((arg, i), v) for i, v in enumerate(value))
        else:
            kind = integer(arg, value)
            if kind != "constexpr":
                signature[arg] = kind
    return KernelSpec(
        op=op,
        name=name,
        fn=fn,
        signature=signature,
        constexprs=constants,
        divisible=frozenset(divisible),
        num_warps=num_warps,
        num_stages=num_stages,
        dtype=dtype,
        config=config,
        programs_per_sm=programs_per_sm,
        archs=archs,
        fp_fusion=fp_fusion,
    )


def _row_configs(heuristic: Callable[[int], Any]) -> dict[Any, int]:
    """Every configuration that a row heuristic returns, with the longest row that has it."""
    # The longest is a power of two: rows whose start is aligned, which is what wide accesses need.
    return {heuristic(n_cols): n_cols for n_cols in range(1, kernel_config.MAX_ROW + 1)}


def residual_layernorm(dtypes: Iterable[str] = ROW_DTYPES) -> list[KernelSpec]:
    """The family's kernels: forward and backward, lean (inference) and with every option; int8 as inference has it."""
    # Not a multiple of 16: packed batches have any number of rows.
    n_rows = 4099
    threshold = {"threshold": 429496730}
    specs = []
    for dtype in dtypes:
        x, stream, parameter, out = (f"*{name}" for name in ROW_DTYPES[dtype])
        for row_config, n_cols in _row_configs(kernel_config.residual_layernorm_forward).items():
            for variant in ("", ", dropout", ", int8"):
                dropout, int8 = variant == ", dropout", variant == ", int8"
                if int8 and n_cols > 8192:  # pyaccel.ops.residual_layernorm.MAX_CODES_ROW
                    continue
                specs.append(
                    kernel_spec(
                        "residual_layernorm",
                        "forward" + variant,
                        "pyaccel.kernels.residual_layernorm:forward_kernel",
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
                        },
                        {
                            "RMS_NORM": False,
                            "BLOCK_ROWS": row_config.block_rows,
                            "BLOCK_N": row_config.block_n,
                        },
                        dtype=dtype,
                        config=row_config.label,
                        num_warps=row_config.num_warps,
                        do_not_specialize=threshold,
                    )
                )
        for row_config, n_cols in _row_configs(kernel_config.residual_layernorm_backward).items():
            kernel = "backward_tiled_kernel" if row_config.tiled else "backward_kernel"
            for full in (False, True):
                specs.append(
                    kernel_spec(
                        "residual_layernorm",
                        "backward, dropout" if full else "backward",
                        f"pyaccel.kernels.residual_layernorm_backward:{kernel}",
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
                        },
                        {"BLOCK_ROWS": row_config.block_rows, "BLOCK_N": row_config.block_n},
                        dtype=dtype,
                        config=row_config.label,
                        num_warps=row_config.num_warps,
                        programs_per_sm=row_config.programs_per_sm,
                        do_not_specialize=threshold,
                    )
                )
        sum_config = kernel_config.column_sum()
        specs.append(
            kernel_spec(
                "residual_layernorm",
                "column sum",
                "pyaccel.kernels.column_sum:column_sum_kernel",
                {
                    **{f"out{i}_ptr": parameter for i in range(3)},
                    **{f"partial{i}_ptr": "*fp32" for i in range(3)},
                    "n_partials": 264,
                    "n_cols": 768,
                },
                {"BLOCK_P": sum_config.block_p, "BLOCK_N": sum_config.block_n},
                dtype=dtype,
                config=sum_config.label,
                num_warps=sum_config.num_warps,
            )
        )
    return specs


def attention() -> list[KernelSpec]:
    """The family's kernels; this list needs triton to be installed."""
    from pyaccel.verify import attention_specs

    return attention_specs.attention()


def bert_embeddings() -> list[KernelSpec]:
    """The family's kernels; this list needs triton to be installed."""
    from pyaccel.verify import bert_embeddings_specs

    return bert_embeddings_specs.bert_embeddings()


def bias_gelu() -> list[KernelSpec]:
    """The family's kernels: forward, forward into int8, and backward, by every activation."""
    from pyaccel.verify import bias_gelu_specs

    return bias_gelu_specs.bias_gelu()


def linear_activation() -> list[KernelSpec]:
    """The family's kernel, by every activation."""
    from pyaccel.verify import linear_activation_specs

    return linear_activation_specs.linear_activation()


def masked_lm_cross_entropy() -> list[KernelSpec]:
    """The masked-language-model loss's kernel: see :mod:`pyaccel.verify.masked_lm_cross_entropy_specs`."""
    from pyaccel.verify import masked_lm_cross_entropy_specs

    return masked_lm_cross_entropy_specs.masked_lm_cross_entropy()


def quantize() -> list[KernelSpec]:
    """The kernels that make int8 codes."""
    from pyaccel.verify import quantize_specs

    return quantize_specs.quantize()


def int8_matmul() -> list[KernelSpec]:
    """The int8 product, its epilogue by whole rows, and the weight-only product."""
    from pyaccel.verify import int8_matmul_specs

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
