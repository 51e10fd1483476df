"""The launchers: they write what they should, all of it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyaccel import reference
from pyaccel.kernels.common import configs
from pyaccel.kernels.common import reduce as column_sum_module
from pyaccel.kernels.layernorm import backward as residual_layernorm_backward
from pyaccel.kernels.layernorm import config
from pyaccel.kernels.layernorm import forward as residual_layernorm
from pyaccel.ops.dropout import dropout_key
from tests.assertions import assert_bits_equal, assert_close_to_truth

Alloc = Callable[..., Tensor]


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 63), (9, 384), (2, 1025), (3, 4099)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward_and_backward_write_all_of_their_outputs_and_nothing_else(
    rows: int, cols: int, dtype: torch.dtype, device: torch.device, guarded_empty: Alloc
) -> None:
    x, residual = torch.randn(2, rows, cols, device=device).to(dtype).unbind()
    weight, bias, x_bias = torch.randn(3, cols, device=device).to(dtype).unbind()
    key = dropout_key(device)
    out, total, dx, dresidual = (guarded_empty((rows, cols), dtype=dtype, device=device) for _ in range(4))
    codes = guarded_empty((rows, cols), dtype=torch.int8, device=device)
    codes_scale, mean, rstd = (guarded_empty((rows,), device=device) for _ in range(3))
    residual_layernorm.forward(
        out, total, codes, codes_scale, mean, rstd, x, residual, weight, bias, x_bias, key, 1e-12, 0.25,
        False, config.residual_layernorm_forward(cols),
    )  # fmt: skip
    for t in (out, total, codes_scale, mean, rstd):
        assert not t.isnan().any()

    row_config = config.residual_layernorm_backward(cols)
    n_programs = configs.persistent_programs(row_config, rows, 2)
    partials = tuple(guarded_empty((n_programs, cols), device=device) for _ in range(3))
    dy, dsum = torch.randn(2, rows, cols, device=device).to(dtype).unbind()
    residual_layernorm_backward.backward(
        dx, dresidual, *partials, dy, dsum, total, mean, rstd, weight, key, 0.25, n_programs, row_config
    )
    for t in (dx, dresidual, *partials):
        assert not t.isnan().any()

    outs = tuple(guarded_empty((cols,), dtype=dtype, device=device) for _ in range(3))
    column_sum_module.column_sum(outs, partials, configs.column_sum())
    truth = [p.double().sum(0) for p in partials]
    for got, exact, partial in zip(outs, truth, partials, strict=True):
        assert_close_to_truth(got, exact, partial.sum(0).to(dtype))
    expected = reference.residual_layernorm(
        x, residual, weight, bias, dropout_p=0.25, x_bias=x_bias, dropout_key=key
    )
    naive = reference.residual_layernorm(
        x, residual, weight, bias, dropout_p=0.25, x_bias=x_bias, dropout_key=key, upcast=False
    )
    assert_close_to_truth(out, expected.output, naive.output)
    # Codes are of the output in fp32, which is that of the sum as it was rounded.
    of_sum = reference.residual_layernorm(total, None, weight, bias).output
    error = (codes.double() * codes_scale.double()[:, None] - of_sum).abs()
    assert (error <= 0.51 * codes_scale[:, None] + 0.02 * of_sum.abs()).all()


@pytest.mark.parametrize(("rows", "cols"), [(37, 100), (41, 4200)])
def test_any_number_of_programs_gives_the_same_row_gradients(
    rows: int, cols: int, device: torch.device
) -> None:
    """Rows beyond a program's first block: the persistent loop takes several turns, or many programs take one."""
    total, dy, dsum = torch.randn(3, rows, cols, device=device).unbind()
    mean, rstd = total.mean(-1), total.var(-1, correction=0).rsqrt()
    weight = torch.randn(cols, device=device)
    row_config = config.residual_layernorm_backward(cols)
    results = []
    for n_programs in (1, 3, -(-rows // row_config.block_rows)):
        dx = torch.full((rows, cols), float("nan"), device=device)
        partials = torch.full((3, n_programs, cols), float("nan"), device=device)
        residual_layernorm_backward.backward(
            dx,
            None,
            *partials.unbind(),
            dy,
            dsum,
            total,
            mean,
            rstd,
            weight,
            None,
            0.0,
            n_programs,
            row_config,
        )
        results.append((dx, partials.sum(1)))
    truth = torch.stack(
        [(dy.double() * (total.double() - mean[:, None]) * rstd[:, None]).sum(0), dy.double().sum(0)]
    )
    naive = torch.stack([(dy * (total - mean[:, None]) * rstd[:, None]).sum(0), dy.sum(0)])
    for dx, sums in results:
        assert_bits_equal(dx, results[0][0])
        assert_close_to_truth(sums[:2], truth, naive)
        assert_close_to_truth(sums[2], dx.double().sum(0), dx.sum(0))


@pytest.mark.parametrize("n_partials", [0, 1, 63, 64, 65, 200])
def test_column_sum(n_partials: int, device: torch.device, guarded_empty: Alloc) -> None:
    partial = torch.randn(n_partials, 70, device=device) + 0.5
    out = guarded_empty((70,), device=device)
    column_sum_module.column_sum((None, out, None), (None, partial, None), configs.column_sum())
    assert_close_to_truth(out, partial.double().sum(0), partial.sum(0))


def test_configs_are_values_and_rows_have_a_limit() -> None:
    assert config.residual_layernorm_forward(768) == config.residual_layernorm_forward(1024)
    assert hash(config.residual_layernorm_backward(384)) == hash(config.residual_layernorm_backward(500))
    for cols in (1, 63, 64, 65, 768, 4096, 4097, 16384):
        forward, backward = config.residual_layernorm_forward(cols), config.residual_layernorm_backward(cols)
        assert forward.block_n >= cols
        assert backward.tiled or backward.block_n >= cols
    with pytest.raises(ValueError, match="1 to 16384"):
        config.residual_layernorm_forward(16385)
    with pytest.raises(ValueError, match="1 to 16384"):
        config.residual_layernorm_backward(0)
