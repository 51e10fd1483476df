"""layernorm_mlp: against the fp64 truth, and what it saves; its parts are tested one by one elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyaccel import dispatch, ops, reference
from pyaccel.ops.dropout import dropout_key
from pyaccel.ops.linear import onednn
from pyaccel.reference import activation as apply_activation
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_equivalent
from tests.pairwise import pairwise

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("x", "residual", "ln_weight", "ln_bias", "x_bias", "weight1", "bias1", "weight2")

CASES = pairwise(
    {
        "way": ["fused product", "bias_gelu"],
        "activation": ["gelu", "gelu_tanh", "relu", "silu"],
        "dtype": [F32, BF16, F16],
        "size": [(1, 8, 16, 8), (7, 48, 100, 40), (33, 64, 72, 64)],  # rows, hidden, inner, out
        "dropout_p": [0.0, 0.1],
        "absent": [(), ("bias1",), ("x_bias", "ln_bias"), ("ln_weight", "ln_bias")],
    }
)


def label(case: dict[str, Any]) -> str:
    return "-".join(str(value).replace("torch.", "").replace(" ", "") for value in case.values())


def make_inputs(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device, absent: tuple[str, ...] = ()
) -> dict[str, Tensor | None]:
    """Row means away from zero, one large-mean and one tiny-variance row, parameters not 1 and 0."""
    rows, hidden, inner, out = size
    x = torch.randn(rows, hidden, device=device) + torch.linspace(-2, 3, rows, device=device)[:, None]
    residual = torch.randn(rows, hidden, device=device) * 2 - 1
    if rows > 2:
        x[1] += 60.0
        x[2] *= 1e-3
        residual[2] *= 1e-3
    given = {
        "x": x,
        "residual": residual,
        "ln_weight": torch.randn(hidden, device=device) + 0.5,
        "ln_bias": torch.randn(hidden, device=device),
        "x_bias": torch.randn(hidden, device=device),
        "weight1": torch.randn(inner, hidden, device=device) * hidden**-0.5,
        "bias1": torch.randn(inner, device=device),
        "weight2": torch.randn(out, inner, device=device) * inner**-0.5,
    }
    return {name: None if name in absent else t.to(dtype) for name, t in given.items()}


def leaves(given: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    return {
        name: None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for name, t in given.items()
    }


def call(given: dict[str, Tensor | None], **options: Any) -> tuple[Tensor, Tensor]:
    given = dict(given)
    x_bias = given.pop("x_bias")
    return ops.layernorm_mlp(**given, x_bias=x_bias, **options)


def plain(
    given: dict[str, Tensor | None], activation: str, dropout_p: float, key: Tensor | None, *, upcast: bool
) -> tuple[Tensor, Tensor]:
    hidden = reference.residual_layernorm(
        given["x"], given["residual"], given["ln_weight"], given["ln_bias"], eps=1e-12, dropout_p=dropout_p,
        x_bias=given["x_bias"], dropout_key=key, upcast=upcast,
    ).output  # fmt: skip
    inner = apply_activation(F.linear(hidden, given["weight1"], given["bias1"]), activation)
    return hidden, F.linear(inner, given["weight2"])


def with_gradients(
    outputs: tuple[Tensor, Tensor], given: dict[str, Tensor | None], grads: tuple[Tensor, Tensor]
) -> list[Tensor]:
    wanted = [t for t in given.values() if t is not None]
    cast = [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, wanted, cast)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the kernels serve in one of two ways, as they do on a GPU."""

    def use(way: str) -> dispatch.use_backend:
        if way == "fused product":
            return dispatch.use_backend("triton")
        monkeypatch.setattr(onednn, "on_gpu", lambda x: True)
        return dispatch.use_backend("triton", ops=["residual_layernorm", "bias_gelu"])

    return use


@pytest.mark.parametrize("case", CASES, ids=label)
def test_outputs_and_gradients_are_as_right_as_plain_torch(
    case: dict[str, Any], device: torch.device, kernels: Any, poison: None, seed: int
) -> None:
    given = make_inputs(case["size"], case["dtype"], device, case["absent"])
    rows, hidden, _, out_features = case["size"]
    grads = (
        torch.randn(rows, hidden, device=device) + 0.3,
        torch.randn(out_features, rows, device=device).T - 0.2,
    )
    torch.manual_seed(seed)
    key = dropout_key(device) if case["dropout_p"] else None
    ours, truth, naive = leaves(given), leaves(given, torch.float64), leaves(given)
    torch.manual_seed(seed)
    with kernels(case["way"]):
        outputs = call(ours, activation=case["activation"], dropout_p=case["dropout_p"], training=True)
    results = [
        with_gradients(outputs, ours, grads),
        with_gradients(plain(truth, case["activation"], case["dropout_p"], key, upcast=True), truth, grads),
        with_gradients(plain(naive, case["activation"], case["dropout_p"], key, upcast=False), naive, grads),
    ]
    names = ("hidden", "out", *(f"d{name}" for name in NAMES if name not in case["absent"]))
    for name, mine, right, usual in zip(names, *results, strict=True):
        assert mine.dtype == case["dtype"]
        assert_close_to_truth(mine, right, usual, name=name)


@pytest.mark.parametrize("way", ["fused product", "bias_gelu"])
def test_it_saves_the_sum_and_the_pre_activation(way: str, device: torch.device, kernels: Any) -> None:
    rows, hidden, inner = 6, 16, 64
    given = leaves(make_inputs((rows, hidden, inner, hidden), BF16, device))
    parameters = {t.untyped_storage().data_ptr() for t in given.values() if t is not None}
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
    with kernels(way), hooks:
        call(given, dropout_p=0.1, training=True)
    shapes = [tuple(t.shape) for t in saved if t.untyped_storage().data_ptr() not in parameters]
    assert sorted(shapes) == sorted([(rows, hidden), (rows, inner), (rows,), (rows,), (2,)])


@pytest.mark.parametrize("way", ["fused product", "bias_gelu"])
def test_autocast_gives_what_its_parts_give(way: str, device: torch.device, kernels: Any, seed: int) -> None:
    given = make_inputs((9, 32, 64, 32), F32, device)
    grads = (torch.randn(9, 32, device=device), torch.randn(9, 32, device=device))
    results = []
    for whole in (True, False):
        mine = leaves(given)
        torch.manual_seed(seed)
        with torch.autocast(device.type, BF16), kernels(way):
            if whole:
                outputs = call(mine, dropout_p=0.1, training=True)
            else:
                hidden = ops.residual_layernorm(
                    mine["x"], mine["residual"], mine["ln_weight"], mine["ln_bias"], dropout_p=0.1,
                    training=True, x_bias=mine["x_bias"],
                )  # fmt: skip
                inner = ops.linear_activation(hidden, mine["weight1"], mine["bias1"], "gelu")
                outputs = hidden, F.linear(inner, mine["weight2"])
        results.append(with_gradients(outputs, mine, grads))
    for name, a, b in zip(("hidden", "out", *NAMES), *results, strict=True):
        if name in ("weight1", "bias1", "weight2"):  # an order of sums, and a sum rounded once, apart
            assert_equivalent(a.to(BF16), b.to(BF16), name=name)
        elif name == "hidden":
            assert_bits_equal(a, b, name=name)
        else:
            assert_equivalent(a.to(BF16), b.to(BF16), name=name)


def test_dropout_counts_only_in_training(device: torch.device) -> None:
    given = leaves(make_inputs((6, 16, 24, 16), F32, device))
    with dispatch.use_backend("triton"):
        for a, b in zip(call(given, dropout_p=0.5), call(given), strict=True):
            assert_bits_equal(a, b)


def test_two_runs_and_a_checkpointed_one_give_the_same_bits(device: torch.device, seed: int) -> None:
    given = make_inputs((20, 48, 64, 48), BF16, device)
    results = []
    for checkpointed in (False, False, True):
        mine = leaves(given)
        torch.manual_seed(seed)
        with dispatch.use_backend("triton"):
            if checkpointed:
                outputs = checkpoint(call, mine, dropout_p=0.2, training=True, use_reentrant=False)
            else:
                outputs = call(mine, dropout_p=0.2, training=True)
            results.append(with_gradients(outputs, mine, outputs))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bits_equal(a, b)


@pytest.mark.parametrize(
    "frozen", [("weight1",), ("weight2", "bias1"), NAMES[:5], NAMES[5:], NAMES[1:]], ids=str
)
def test_only_the_gradients_asked_for(frozen: tuple[str, ...], device: torch.device) -> None:
    given = make_inputs((5, 16, 24, 16), F32, device)
    everything = leaves(given)
    some = {name: t if name not in frozen else t.detach() for name, t in leaves(given).items()}
    with dispatch.use_backend("triton"):
        for mine in (everything, some):
            torch.stack([out.square().sum() for out in call(mine)]).sum().backward()
    for name in NAMES:
        if name in frozen:
            assert some[name].grad is None
        else:
            assert_equivalent(some[name].grad, everything[name].grad, name=name)


@pytest.mark.parametrize("index", [0, 1])
def test_a_gradient_of_one_output_alone(index: int, device: torch.device) -> None:
    given = make_inputs((5, 16, 24, 16), F32, device)
    results = []
    for backend in ("triton", "reference"):
        mine = leaves(given)
        with dispatch.use_backend(backend):
            call(mine)[index].sum().backward()  # a gradient of strides 0
        results.append([mine[name].grad for name in (NAMES if index else NAMES[:5])])
    for a, b in zip(*results, strict=True):
        assert_equivalent(a, b)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (2, 3, 16), (16,)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], device: torch.device) -> None:
    given = leaves(make_inputs((1, 16, 24, 8), F32, device))
    for name in ("x", "residual"):
        given[name] = torch.randn(shape, device=device, requires_grad=True)
    with dispatch.use_backend("triton"):
        hidden, out = call(given)
    assert hidden.shape == shape
    assert out.shape == (*shape[:-1], 8)
    (hidden.sum() + out.sum()).backward()
    assert given["x"].grad.shape == shape
    assert given["weight1"].grad.shape == (24, 16)


@pytest.mark.parametrize("backend", ["auto", *dispatch.BACKENDS])
def test_without_gradients_its_parts_serve(backend: str, device: torch.device) -> None:
    given = make_inputs((5, 16, 24, 16), F32, device)
    with dispatch.use_backend(backend), torch.no_grad():
        outputs = call(given)
    truth = plain({n: t.double() for n, t in given.items()}, "gelu", 0.0, None, upcast=True)
    naive = plain(given, "gelu", 0.0, None, upcast=False)
    for a, b, c in zip(outputs, truth, naive, strict=True):
        assert_close_to_truth(a, b, c)


def test_compiles_to_one_graph(device: torch.device) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        run = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True) if compiled else call
        with dispatch.use_backend("triton"):
            for rows in (6, 11):
                torch.manual_seed(rows)
                mine = leaves(make_inputs((rows, 16, 24, 16), F32, device))
                outputs = run(mine)
                results.append(with_gradients(outputs, mine, outputs))
    for eager, traced in zip(results[:2], results[2:], strict=True):
        for a, b in zip(eager, traced, strict=True):
            assert_bits_equal(a, b)


def test_a_double_backward_is_refused(device: torch.device) -> None:
    given = leaves(make_inputs((5, 16, 24, 16), F32, device))
    with dispatch.use_backend("triton"):
        _, out = call(given)
        (dx,) = torch.autograd.grad(out.sum(), given["x"], create_graph=True)
        with pytest.raises(RuntimeError):
            dx.sum().backward()


def test_bad_arguments_are_named(device: torch.device) -> None:
    given = make_inputs((5, 16, 24, 16), F32, device)
    with pytest.raises(ValueError, match=r"layernorm_mlp: .*unknown activation 'swish'.*weight2 must be"):
        call({**given, "weight2": given["weight2"].T}, activation="swish")
    with pytest.raises(ValueError, match=r"weight1 is torch\.float32 and weight2 torch\.bfloat16"):
        call({**given, "weight2": given["weight2"].bfloat16()})
    with pytest.raises(ValueError, match="residual must have x's shape"):
        call({**given, "residual": given["residual"][:1]})
    with pytest.raises(ValueError, match="activation must be named"):
        call(given, activation=None)
