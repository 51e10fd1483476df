"""What is compiled of BERT's embeddings: every launch configuration that ships, with every option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyaccel.inspect.spec import KernelSpec, kernel_spec, launched, rows_by_config
from pyaccel.kernels.common import configs
from pyaccel.kernels.embeddings import config

# dtype label -> tables and their gradients, LayerNorm's parameters and the output (under autocast's tables in fp32).
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
}
TOKENS = 4099  # not a multiple of 16: packed batches have any number of tokens


def bert_embeddings() -> list[KernelSpec]:
    """The family's kernels: forward, backward, and the sums of the tables' gradients."""
    return [spec for dtype in DTYPES for spec in (*_row_kernels(dtype), *_segment_sums(dtype))]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _row_kernels(dtype: str) -> Iterator[KernelSpec]:
    from pyaccel.kernels.embeddings import backward, forward

    table_dtype, parameter_dtype = DTYPES[dtype]
    ids, positions = _empty(TOKENS, dtype=torch.int64), _empty(TOKENS, dtype=torch.int32)
    statistic, key, offsets = _empty(TOKENS), _empty(2, dtype=torch.int64), _empty(33, dtype=torch.int32)

    def lookup(hidden: int, position_ids: Tensor | None) -> forward.Lookup:
        word, position, kind = (_empty(rows, hidden, dtype=table_dtype) for rows in (30522, 512, 2))
        return forward.Lookup(ids, position_ids, ids, word, position, kind, TOKENS)

    for row_config, hidden in rows_by_config(config.bert_embeddings_forward).items():
        rows, vector = _empty(TOKENS, hidden, dtype=table_dtype), _empty(hidden, dtype=parameter_dtype)
        in_range = _empty(3, TOKENS, dtype=torch.bool)
        arguments = forward.forward_arguments(
            rows, statistic, statistic, positions, in_range, lookup(hidden, None), offsets, vector, vector, key,
            1e-12, 0.1, row_config,
        )  # fmt: skip
        yield _spec("forward", "embeddings.forward:forward_kernel", arguments, dtype, **launched(row_config))
    for row_config, hidden in rows_by_config(config.bert_embeddings_backward).items():
        rows, vector = _empty(TOKENS, hidden, dtype=table_dtype), _empty(hidden, dtype=parameter_dtype)
        partial = _empty(264, hidden)
        arguments = backward.backward_arguments(
            rows,
            partial,
            partial,
            rows,
            statistic,
            statistic,
            lookup(hidden, positions),
            vector,
            key,
            0.1,
            row_config,
        )
        kernel = "backward_tiled_kernel" if row_config.tiled else "backward_kernel"
        yield _spec("backward", f"embeddings.backward:{kernel}", arguments, dtype, **launched(row_config))


def _segment_sums(dtype: str) -> Iterator[KernelSpec]:
    from pyaccel.kernels.common import segment_sum

    # One for every length: chunks are cut at run time.
    sum_config = configs.segment_sum(TOKENS)
    rows, out = (_empty(n, 768, dtype=DTYPES[dtype][0]) for n in (TOKENS, 30522))
    ids = _empty(TOKENS, dtype=torch.int64)
    partial = _empty(-(-TOKENS // sum_config.chunk), 2, 768)
    chunk = segment_sum.chunk_arguments(out, partial, rows, ids, ids, 0, sum_config)
    yield _spec(
        "table gradient, chunks", "common.segment_sum:chunk_kernel", chunk, dtype, **launched(sum_config)
    )
    border = segment_sum.border_arguments(out, partial, rows, ids, sum_config)
    yield _spec(
        "table gradient, borders",
        "common.segment_sum:border_kernel",
        border,
        dtype,
        **{**launched(sum_config), "num_warps": sum_config.border_warps},
    )


def _spec(name: str, fn: str, arguments: dict[str, Any], dtype: str, **launch: Any) -> KernelSpec:
    return kernel_spec(
        "bert_embeddings",
        name,
        f"pyaccel.kernels.{fn}",
        arguments,
        dtype=dtype,
        do_not_specialize=["threshold", "search_steps"],
        **launch,
    )
