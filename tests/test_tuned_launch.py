"""Launch configurations that were measured: candidates, tables, and that a kernel is launched with what they say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyaccel import dispatch, ops, tuning
from pyaccel.benchmarks import tune
from pyaccel.machine import kind
from tests.assertions import assert_bits_equal, assert_close_to_truth

CPU = torch.device("cpu")
pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "shipped")
    monkeypatch.setenv("PYACCEL_TUNED", str(tmp_path / "own"))
    tuning.forget()
    yield tmp_path / "own"
    tuning.forget()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations with which LayerNorm's forward kernel is launched."""
    from pyaccel.kernels.layernorm import forward as residual_layernorm

    configs: list[Any] = []
    forward = residual_layernorm.forward

    def spying(*args: Any) -> None:
        configs.append(args[-1])
        forward(*args)

    monkeypatch.setattr(residual_layernorm, "forward", spying)
    return configs


def normalize(cols: int = 64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, residual, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((9, cols), (9, cols), (cols,), (cols,))
    )
    with dispatch.use_backend("triton"):
        out = ops.residual_layernorm(x, residual, weight, bias)

    def plain(*given: torch.Tensor) -> torch.Tensor:
        x, residual, weight, bias = given
        return torch.nn.functional.layer_norm(x + residual, (cols,), weight, bias, 1e-12)

    given = (x, residual, weight, bias)
    return out, plain(*(t.double() for t in given)), plain(*given)


def write(size: list[int], config: dict[str, int]) -> None:
    rows = [{"size": size, "us": {"default": 2.0, "best": 1.0}, "config": config}]
    table = {"machine": kind(CPU), "dtype": "float32", "rows": rows}
    tuning.write(tuning.user_folder() / "launch_residual_layernorm_forward.json", [table])


def test_a_kernel_is_launched_as_it_was_measured_to_be_fastest(launched: list[Any]) -> None:
    normalize()
    default = launched[-1]
    write([64], {"block_rows": default.block_rows // 4, "num_warps": 8})
    assert_close_to_truth(*normalize())
    assert (launched[-1].block_rows, launched[-1].num_warps) == (default.block_rows // 4, 8)
    assert launched[-1].block_n == default.block_n
    assert_bits_equal(normalize()[0], normalize()[0])
    normalize(72)  # of another width the default's
    assert launched[-1].num_warps == default.num_warps


def test_any_size_will_do_where_any_configuration_is_right() -> None:
    write([64], {"num_warps": 8})
    x = torch.empty(1)
    default = tune.candidates(_default())[0]
    for exactly, expected in ((True, default), (False, tune.dataclasses.replace(default, num_warps=8))):
        assert tuning.launch("residual_layernorm_forward", x, (100,), default, exactly=exactly) == expected
    assert tuning.launch("another", x, (64,), default, exactly=False) is default


@pytest.mark.parametrize(
    "config",
    [
        {"num_wraps": 8},
        {"num_warps": 6},
        {"num_warps": 64},
        {"num_warps": 0},
        {"num_warps": -4},
        {"num_warps": True},
        {"block_rows": 2**20},
        {"block_n": 32},  # the row would be cut
        {"tiled": True},
        {"label": 1},
        {"__class__": 1},
    ],
    ids=str,
)
def test_a_configuration_that_no_launch_can_have_is_one_warning_and_the_default(
    config: dict[str, Any],
) -> None:
    write([64], config)

    def launch() -> Any:
        return tuning.launch("residual_layernorm_forward", torch.empty(1), (64,), _default(), exactly=True)

    with pytest.warns(UserWarning, match="residual_layernorm_forward can't be launched with"):
        assert launch() == _default()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch() == _default()


def _default() -> Any:
    from pyaccel.kernels.layernorm import config

    return config.residual_layernorm_forward(64)


def test_candidates_are_a_step_away() -> None:
    from pyaccel.kernels.attention.config import AttentionConfig

    default = _default()
    found = tune.candidates(default)
    assert {(c.block_rows, c.num_warps) for c in found} == {(16, 4), (64, 4), (32, 2), (32, 8)}
    assert {c.block_n for c in found} == {default.block_n}
    found = tune.candidates(AttentionConfig(128, 64, 4, 3))
    changes = {(c.block_m, c.block_n, c.num_warps, c.num_stages) for c in found}
    assert changes == {
        (64, 64, 4, 3), (256, 64, 4, 3), (128, 32, 4, 3), (128, 128, 4, 3),
        (128, 64, 2, 3), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 4),
    }  # fmt: skip


def launches() -> list[tune.Launch]:
    return [one for one in tune.tunables(torch.device("cuda")) if isinstance(one, tune.Launch)]


def of_layernorm() -> tune.Launch:
    one = next(one for one in launches() if one.kernel == "residual_layernorm_forward")
    return tune.dataclasses.replace(one, sizes=one.case.smoke)


def test_the_table_of_a_kernel(launched: list[Any]) -> None:
    table = of_layernorm().table(torch.float32, CPU, 1)
    (row,) = table["rows"]
    assert row["size"] == [64]
    assert row["us"].keys() == {"default", "best"}
    assert row["us"]["best"] <= row["us"]["default"]
    tried = {(c.block_rows, c.num_warps) for c in launched}
    assert tried == {(32, 4), (16, 4), (64, 4), (32, 2), (32, 8)}
    tuning.write(tuning.user_folder() / "launch_residual_layernorm_forward.json", [table])
    normalize()
    expected = tune.dataclasses.replace(_default(), **row["config"])
    assert launched[-1] == expected


class OutOfResources(Exception):
    """What Triton raises before it launches what needs more shared memory than there is."""


def launches_of(kernel: str) -> tuple[Any, str, Any]:
    """The launcher's module and name, and a call of an op that launches it by a measured configuration."""
    from pyaccel.kernels.attention import dkv as attention_dkey_dvalue
    from pyaccel.kernels.attention import dq as attention_dquery
    from pyaccel.kernels.attention import forward as attention
    from pyaccel.kernels.int8 import matmul as int8_matmul
    from pyaccel.kernels.layernorm import backward as residual_layernorm_backward
    from pyaccel.kernels.layernorm import forward as residual_layernorm
    from pyaccel.kernels.linear import kernels as linear_activation

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    x, weight, bias = randn(9, 64), randn(64), randn(64)
    qkv = [randn(1, 2, 96, 32) for _ in range(3)]
    matrix = randn(32, 64)
    a, b = (torch.randint(-9, 9, (n, 64), dtype=torch.int8, generator=generator) for n in (9, 32))
    scales = torch.rand(9, generator=generator), torch.rand(32, generator=generator)
    layernorm = lambda: ops.residual_layernorm(x, None, weight, bias)  # noqa: E731
    attend = lambda: ops.scaled_dot_product_attention(*qkv)  # noqa: E731
    return {
        "residual_layernorm_forward": (residual_layernorm, "forward", layernorm),
        "residual_layernorm_backward": (residual_layernorm_backward, "backward", layernorm),
        "attention_forward": (attention, "forward", attend),
        "attention_dquery": (attention_dquery, "dquery", attend),
        "attention_dkey_dvalue": (attention_dkey_dvalue, "dkey_dvalue", attend),
        "linear_activation": (
            linear_activation,
            "forward",
            lambda: ops.linear_activation(x, matrix, None, "gelu"),
        ),
        "int8_matmul": (int8_matmul, "matmul", lambda: ops.int8_matmul(a, b, *scales)),
    }[kernel]


def results(call: Any) -> list[torch.Tensor]:
    with dispatch.use_backend("triton"):
        out = call()
        leaves = [t for t in call.__closure__ or () for t in _tensors(t.cell_contents) if t.requires_grad]
        gradients = torch.autograd.grad(out.square().sum(), leaves) if out.requires_grad else ()
    return [out.detach(), *gradients]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [
        t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, torch.Tensor)
    ]


@pytest.mark.parametrize(
    "kernel",
    [
        "residual_layernorm_forward",
        "residual_layernorm_backward",
        "attention_forward",
        "attention_dquery",
        "attention_dkey_dvalue",
        "linear_activation",
        "int8_matmul",
    ],
)
def test_a_launch_that_the_device_refuses_is_one_warning_and_the_default(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each field may be in its range, and the whole ask for more than there is."""
    module, name, call = launches_of(kernel)
    found = tuning.launches_of(kernel, lambda: results(call))
    assert found is not None
    expected = results(call)
    size, default = found
    stages = default.num_stages % 6 + 1 if hasattr(default, "num_stages") else None
    changed = {"num_stages": stages} if stages else {"num_warps": 16 if default.num_warps != 16 else 8}
    dtype = torch.int8 if kernel == "int8_matmul" else torch.float32
    rows = [{"size": list(size), "us": {"default": 2.0, "best": 1.0}, "config": changed}]
    table = {"machine": kind(CPU), "dtype": str(dtype).removeprefix("torch."), "rows": rows}
    tuning.write(tuning.user_folder() / f"launch_{kernel}.json", [table])
    launcher, tried = getattr(module, name), []

    def refusing(*args: Any, **kwargs: Any) -> Any:
        config = next(each for each in reversed(args) if type(each) is type(default))
        tried.append(config)
        if config != default:
            raise OutOfResources("out of resource: shared memory, Required: 294912, Hardware limit: 232448")
        return launcher(*args, **kwargs)

    monkeypatch.setattr(module, name, refusing)
    with pytest.warns(
        UserWarning, match=rf"{kernel} couldn't be launched as measured.*OutOfResources: out of"
    ):
        found = results(call)
    assert any(each != default for each in tried)
    for mine, other in zip(found, expected, strict=True):
        assert_bits_equal(mine, other)
    tried.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(call)
    assert tried
    assert all(each == default for each in tried)
    with (
        tuning.override_config(kernel, tune.dataclasses.replace(default, **changed)),
        pytest.raises(OutOfResources),
    ):
        results(call)  # who tries one is told


def test_an_error_of_the_call_itself_is_no_fault_of_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyaccel.kernels.layernorm import forward as residual_layernorm

    def failing(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    write([64], {"num_warps": 8})
    monkeypatch.setattr(residual_layernorm, "forward", failing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="the device is gone"):
            normalize()
    assert not tuning._refused


def test_a_default_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "measure", lambda *_, **__: [])
    with pytest.raises(tune.WrongAnswerError, match="was not timed"):
        of_layernorm().table(torch.float32, CPU, 1)


def test_every_kernel_that_is_tuned_is_one_that_asks() -> None:
    """Each name is one of those that the ops give to `tuning.launch`."""
    source = "".join(file.read_text() for file in (Path(tuning.__file__).parent / "ops").rglob("*.py"))
    for one in launches():
        name = one.kernel.removeprefix("attention_")
        assert f'"{one.kernel}"' in source or f'_launch("{name}"' in source
        assert one.sizes
        assert one.once == (one.kernel == "int8_matmul")  # which reads codes, whatever the layer's dtype
