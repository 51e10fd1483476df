"""Calls inside transforms, traces and modes, patched forwards, and options that change after acceleration."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers.activations
import transformers.models.bert.modeling_bert as stock_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForQuestionAnswering, BertForSequenceClassification

import pyaccel
from pyaccel import triton_support
from pyaccel.hf.attention import attention_forward
from pyaccel.hf.eligibility import inside, is_patched
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_equivalent
from tests.hf.models import Truth, batch_of, of_family, read, tiny

EMBEDS = torch.randn(5, 12, 32, generator=torch.Generator().manual_seed(2))
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose kernels are not interpreted."""
    monkeypatch.setattr(triton_support, "interpreting", lambda: False)


def pooled(model: Any, embeds: Tensor, mask: Tensor) -> Tensor:
    return model(inputs_embeds=embeds, attention_mask=mask).pooler_output.sum(-1)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(EMBEDS),
    "vjp": lambda f: torch.func.vjp(f, EMBEDS)[1](torch.ones(5))[0],
    "jacrev": lambda f: torch.func.jacrev(f)(EMBEDS),
    "vmap": lambda f: torch.func.vmap(f)(torch.stack([EMBEDS, -EMBEDS])),
    "per-sample": lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x[None])[0]), in_dims=0)(EMBEDS),
}


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("options", [{}, {"prepack": True}], ids=str)
@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_a_function_transform(transform: str, options: dict[str, Any], called_before: bool) -> None:
    stock, batch = tiny(), batch_of("left")
    model = copy.deepcopy(stock)
    report = pyaccel.accelerate(model, **options)
    mask = batch["attention_mask"]
    if called_before:
        model(**batch)
    before = model.encoder._pyaccel.plan
    each = mask[:1] if transform == "per-sample" else mask
    run = TRANSFORMS[transform]
    assert_equivalent(run(lambda x: pooled(model, x, each)), run(lambda x: pooled(stock, x, each)))
    assert model.encoder._pyaccel.plan is before, "a plan was made inside a transform"
    assert report.refused["padded"]["inside a torch.func transform"] >= 3
    Truth(stock).check(model, batch, ["pooler_output"])
    assert report.served["packed"] == 3 + 3 * called_before


def test_other_parameters_are_used_and_not_kept() -> None:
    stock, batch = tiny(), batch_of("left")
    model = copy.deepcopy(stock)
    pyaccel.accelerate(model, prepack=True)
    others = {name: (1.3 * p).detach() for name, p in stock.named_parameters()}
    for called_before in (False, True):
        before = model.encoder._pyaccel.plan
        assert (before is not None) == called_before
        with torch.no_grad():
            found = torch.func.functional_call(model, others, kwargs=batch).pooler_output
            naive = torch.func.functional_call(stock, others, kwargs=batch).pooler_output
            exact = copy.deepcopy(stock)
            exact.load_state_dict(others, strict=False)
            assert_close_to_truth(found, exact.double()(**batch).pooler_output, naive)
        assert model.encoder._pyaccel.plan is before
        Truth(stock).check(model, batch, ["pooler_output"])


def test_an_ensemble_of_models() -> None:
    models, batch = [tiny() for _ in range(3)], batch_of("left")
    base = copy.deepcopy(models[0])
    pyaccel.accelerate(base)
    parameters, buffers = torch.func.stack_module_state(models)

    def one(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), kwargs=batch).pooler_output

    with torch.no_grad():
        found = torch.func.vmap(one)(parameters, buffers)
        for each, model in zip(found, models, strict=True):
            truth = copy.deepcopy(model).double()(**batch).pooler_output
            assert_close_to_truth(each, truth, model(**batch).pooler_output)


@pytest.mark.parametrize("recorded", [True, False])
def test_forward_mode_derivatives(recorded: bool) -> None:
    stock, batch = tiny(attn_implementation="eager"), batch_of("left")
    model = copy.deepcopy(stock)
    pyaccel.accelerate(model)

    def derivative(each: Any) -> Tensor:
        with torch.set_grad_enabled(recorded), forward_ad.dual_level():
            out = pooled(each, forward_ad.make_dual(EMBEDS, -EMBEDS), batch["attention_mask"])
            return forward_ad.unpack_dual(out).tangent

    assert_equivalent(derivative(model), derivative(stock))
    assert model.encoder._pyaccel.plan is None
    Truth(stock).check(model, batch, ["pooler_output"])


def replica_of(network: Any, factor: float) -> Any:
    """As DataParallel makes them: copies that share the state, with other tensors in the places of parameters."""
    replicas = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter.detach() * factor)
    return replicas[network]


@pytest.mark.parametrize("packing", [True, False])
def test_a_replica_computes_with_its_own_weights(packing: bool) -> None:
    stock, batch = tiny(), batch_of("left")
    model = copy.deepcopy(stock)
    pyaccel.accelerate(model, packing=packing)
    with torch.no_grad():
        model(**batch)
        found = replica_of(model, 1.5)(**batch).pooler_output
        assert_equivalent(found, replica_of(stock, 1.5)(**batch).pooler_output)
    Truth(stock).check(model, batch, ["pooler_output"])


class Watching(TorchDispatchMode):
    """Another's mode, which every op passes through."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Doubling(TorchFunctionMode):
    """Another's mode, which changes what a function gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is nn.functional.linear else out


@pytest.mark.parametrize("mode", [Watching, Doubling])
@pytest.mark.parametrize("packing", [True, False])
def test_inside_another_s_mode_the_stock_modules_run(mode: type[Any], packing: bool) -> None:
    stock, batch = tiny(), batch_of("none")
    model = copy.deepcopy(stock)
    report = pyaccel.accelerate(model, packing=packing)
    with torch.no_grad(), mode():
        found, expected = model(**batch).pooler_output, stock(**batch).pooler_output
    assert_equivalent(found, expected)
    assert report.refused["padded"] == {f"inside a {mode.__name__}": 3}
    assert model.encoder._pyaccel.plan is None
    Truth(stock).check(model, batch, ["pooler_output"])
    assert report.served.total() == 3


def test_fake_tensors_leave_a_model_as_it_was() -> None:
    stock, batch = tiny(), batch_of("left")
    model = copy.deepcopy(stock)
    pyaccel.accelerate(model, prepack=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        out = model(**{name: mode.from_tensor(x) for name, x in batch.items()}).last_hidden_state
    assert out.shape == (5, 12, 32)
    assert model.encoder._pyaccel.plan is None
    Truth(stock).check(model, batch, ["pooler_output"])


@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("options", [{}, {"prepack": True}, {"packing": False}], ids=str)
def test_another_default_device(kind: str, options: dict[str, Any]) -> None:
    model, batch = tiny(), batch_of(kind)
    report = pyaccel.accelerate(model, **options)
    with torch.no_grad(), torch.device("meta"):
        first = model(**batch).last_hidden_state
    with torch.no_grad():
        assert_bits_equal(model(**batch).last_hidden_state, first)
    assert report.served.total() == 6


def harmless() -> list[AbstractContextManager[object]]:
    return [torch.inference_mode(), torch.device("cpu"), FlopCounterMode(display=False)]


def test_only_another_s_modes_count() -> None:
    assert inside() is None
    for mode in harmless():
        with mode:
            assert inside() is None
    with Watching():
        assert inside() == "inside a Watching"
    with Doubling():
        assert inside() == "inside a Doubling"
    with FakeTensorMode():
        assert inside() == "inside a FakeTensorMode"


def test_made_in_inference_mode_and_then_trained() -> None:
    stock, batch = tiny(**PLAIN), batch_of("right")
    model = copy.deepcopy(stock)
    pyaccel.accelerate(model, prepack=True)
    with torch.inference_mode():
        model(**batch)
    exact = copy.deepcopy(stock).double()
    for each in (model, stock, exact):
        each(**batch).pooler_output.sum().backward()
    everything = zip(model.named_parameters(), exact.parameters(), stock.parameters(), strict=True)
    for (name, p), truth, naive in everything:
        assert (p.grad is None) == (naive.grad is None), name
        if p.grad is not None and "key.bias" not in name:  # whose gradient is 0 but for rounding
            assert_close_to_truth(p.grad, truth.grad, naive.grad, name=name)
    Truth(stock).check(model, batch, ["pooler_output"])


# ---- patched forwards ----

PATCHED = [
    (stock_file, "BertEncoder"),
    (stock_file, "BertLayer"),
    (stock_file, "BertAttention"),
    (stock_file, "BertSelfAttention"),
    (stock_file, "BertSelfOutput"),
    (stock_file, "BertIntermediate"),
    (stock_file, "BertOutput"),
    (nn, "Linear"),
    (nn, "LayerNorm"),
    (nn, "Dropout"),
    (transformers.activations, "GELUActivation"),
]


@pytest.mark.parametrize(
    ("when", "wraps"), [("before acceleration", False), ("before the first call", True), ("later", False)]
)
@pytest.mark.parametrize(("file", "name"), PATCHED, ids=[name for _, name in PATCHED])
def test_a_patched_forward_is_not_passed_by(
    file: Any, name: str, wraps: bool, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, batch = tiny(), batch_of("none")
    model = copy.deepcopy(stock)
    kind = getattr(file, name)
    forward = kind.forward

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        if isinstance(out, tuple):
            return (out[0] * 1.5, *out[1:])
        if isinstance(out, Tensor):
            return out * 1.5
        out.last_hidden_state = out.last_hidden_state * 1.5
        return out

    if wraps:
        patched = functools.wraps(forward)(patched)
    assert not is_patched(kind)
    with torch.no_grad():
        plain = stock(**batch).pooler_output
        with monkeypatch.context() as patch:
            if when == "before acceleration":
                patch.setattr(kind, "forward", patched)
            report = pyaccel.accelerate(model, strict=False)
            if when == "later":
                model(**batch)
            patch.setattr(kind, "forward", patched)
            assert is_patched(kind)
            expected = stock(**batch).pooler_output
            assert not torch.allclose(expected, plain)
            assert_equivalent(model(**batch).pooler_output, expected)
        if report.swapped:
            report.reset()
            assert_equivalent(model(**batch).pooler_output, plain)
            assert report.served == {"onednn": 3}


@pytest.mark.parametrize("of_class", [True, False])
@pytest.mark.parametrize(
    ("family", "path", "method"),
    [
        ("gelu", "encoder.layer.1", "feed_forward_chunk"),
        ("distilbert", "transformer.layer.1.ffn", "ff_chunk"),
        ("albert", "encoder.albert_layer_groups.0.albert_layers.0", "ff_chunk"),
    ],
)
@pytest.mark.parametrize("packing", [True, False])
def test_a_patched_feed_forward_is_not_passed_by(
    family: str, path: str, method: str, packing: bool, of_class: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, batch = of_family(family), batch_of("none")
    model = copy.deepcopy(stock)
    pyaccel.accelerate(model, packing=packing)
    with torch.no_grad():
        plain = model(**batch).last_hidden_state
        with monkeypatch.context() as patch:
            parts = [each.get_submodule(path) for each in (stock, model)]
            if of_class:
                kind = type(parts[0])
                patch.setattr(kind, method, lambda self, x: 2 * x)
                assert is_patched(kind, method)
            else:
                for part in parts:
                    patch.setitem(part.__dict__, method, lambda x: 2 * x)
            expected = stock(**batch).last_hidden_state
            assert not torch.allclose(expected, plain)
            assert_equivalent(model(**batch).last_hidden_state, expected)
        assert_bits_equal(model(**batch).last_hidden_state, plain)


def test_a_decorator_of_transformers_from_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout beside an installed package is imported from both."""
    decorator: Any = stock_file.BertLayer.forward
    code = decorator.__code__.replace(co_filename="/checkout/src/transformers/modeling_layers.py")
    assert decorator.__wrapped__
    assert decorator.__code__.co_filename != code.co_filename
    monkeypatch.setattr(decorator, "__code__", code)
    assert not is_patched(stock_file.BertLayer)


def emptied(layer: Any) -> None:
    layer._forward_hooks.clear()


def other_dict(layer: Any) -> None:
    layer._forward_hooks = OrderedDict()


@pytest.mark.parametrize("remove", [emptied, other_dict])
@pytest.mark.parametrize("had_hooks", [True, False])
def test_hooks_in_the_place_of_others(remove: Callable[[Any], None], had_hooks: bool) -> None:
    stock, batch = tiny(), batch_of("none")
    model = copy.deepcopy(stock)
    pyaccel.accelerate(model)
    with torch.no_grad():
        model(**batch, output_hidden_states=had_hooks)  # transformers leaves hooks behind
        assert all(bool(layer._forward_hooks) == had_hooks for layer in model.encoder.layer)
        plain = model(**batch).pooler_output
        for each in (model, stock):
            for layer in each.encoder.layer:
                remove(layer)
        if not had_hooks:
            assert_bits_equal(model(**batch).pooler_output, plain)
        for each in (model, stock):
            for layer in each.encoder.layer:
                layer.register_forward_hook(lambda module, args, out: 2 * out)
        expected = stock(**batch).pooler_output
        assert not torch.allclose(expected, plain)
        assert_equivalent(model(**batch).pooler_output, expected)


# ---- options ----


def scaled(model: Any) -> None:
    model.encoder.layer[1].attention.self.scaling = 0.7


def more_heads(model: Any) -> None:
    attention = model.encoder.layer[1].attention.self
    attention.num_attention_heads, attention.attention_head_size = 2, 16


def causal(model: Any) -> None:
    model.encoder.layer[1].attention.self.is_causal = True


def chunked(model: Any) -> None:
    model.encoder.layer[1].chunk_size_feed_forward = 3


def other_epsilon(model: Any) -> None:
    model.encoder.layer[1].output.LayerNorm.eps = 0.5


def reordered(model: Any) -> None:
    layers = list(model.encoder.layer)
    model.encoder.layer = nn.ModuleList([layers[2], layers[0], layers[0]])


def reordered_in_place(model: Any) -> None:
    layers = model.encoder.layer
    layers[0], layers[2] = layers[2], layers[0]


def appended(model: Any) -> None:
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[-1]))


def removed(model: Any) -> None:
    del model.encoder.layer[1]


@pytest.mark.parametrize("options", [{}, {"prepack": True}, {"packing": False}], ids=str)
@pytest.mark.parametrize(
    "change",
    [scaled, more_heads, causal, chunked, other_epsilon, reordered, reordered_in_place, appended, removed],
)
def test_options_changed_in_use(change: Callable[[Any], None], options: dict[str, Any]) -> None:
    stock, batch = tiny(), batch_of("none")  # causal attention needs a call without a mask
    batch.pop("attention_mask")
    model = copy.deepcopy(stock)
    pyaccel.accelerate(model, **options)
    with torch.no_grad():
        before = model(**batch).last_hidden_state
    change(model), change(stock)
    Truth(stock).check(model, batch, ["last_hidden_state", "pooler_output"])
    with torch.no_grad():
        differs = not torch.allclose(model(**batch).last_hidden_state, before, atol=1e-3)
    assert differs or change in (chunked,)
    pyaccel.explain(model)
    pyaccel.restore(model)
    Truth(stock).check(model, batch, ["pooler_output"])
    assert not any("_pyaccel" in part.__dict__ for part in model.modules())


def test_fewer_layers_by_the_config_alone() -> None:
    stock, batch = of_family("albert"), batch_of("right")
    model = copy.deepcopy(stock)
    report = pyaccel.accelerate(model)
    for count in (3, 2, 4):
        report.reset()
        model.config.num_hidden_layers = stock.config.num_hidden_layers = count
        Truth(stock).check(model, batch, ["last_hidden_state"], read(batch["attention_mask"]))
        assert report.served == {"onednn": count}


def test_a_forward_that_is_wrapped_survives_restore() -> None:
    stock, batch = tiny(), batch_of("left")
    model = copy.deepcopy(stock)
    pyaccel.accelerate(model)
    for part in (model.encoder, model.encoder.layer[1]):
        part.forward = functools.partial(
            lambda before, *args, **kwargs: before(*args, **kwargs), part.forward
        )
    for _ in range(2):
        Truth(stock).check(model, batch, ["pooler_output"])
        if "_pyaccel" in model.encoder.__dict__:
            pyaccel.restore(model)


# ---- masks ----


@pytest.mark.parametrize("shape", [(5, 12, 12), (12, 12), (5, 1), (12,), ()], ids=str)
def test_masks_that_are_neither_of_keys_nor_of_four_dimensions(shape: tuple[int, ...]) -> None:
    q = torch.randn(5, 5, 12, 8)
    module = nn.Module().eval()
    module.is_causal = False
    with pytest.raises(ValueError, match=r"expected \[batch, keys\] = \[5, 12\], or four dimensions"):
        attention_forward(module, q, q, q, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("training", [False, True])
def test_a_mask_of_three_dimensions_is_refused_by_the_model(training: bool) -> None:
    model = tiny(num_attention_heads=4).train(training)
    pyaccel.accelerate(model)
    ids = batch_of("none")["input_ids"][:4]
    with pytest.raises(ValueError, match="expected"):
        model(ids, torch.ones(4, 12, 12, dtype=torch.bool).tril())


# ---- what reads the padding ----


class Answering(BertForQuestionAnswering):
    """A user's own question answering by another name."""


class Spans(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny()
        self.qa_outputs = nn.Linear(32, 2)


class OwnForQuestionAnswering(nn.Module):
    """One that is known by its name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny()


class Renamed(OwnForQuestionAnswering):
    """And one by its base's."""


def test_heads_that_read_the_padding_keep_it() -> None:
    for model in (tiny(Answering), Spans(), OwnForQuestionAnswering(), Renamed()):
        report = pyaccel.accelerate(model)
        bert = model.bert if isinstance(model, Answering) else model.encoder
        stock = copy.deepcopy(bert)
        pyaccel.restore(stock)
        Truth(stock).check(bert, batch_of("left"), ["last_hidden_state"])
        assert set(report.refused["packed"]) == {f"{type(model).__name__} reads every position, padding too"}


# ---- eager attention ----


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_a_model_made_with_eager_attention_have_gradients(training: bool, packing: bool) -> None:
    stock = tiny(BertForSequenceClassification, attn_implementation="eager", **PLAIN).train(training)
    model, batch = copy.deepcopy(stock), batch_of("right")
    report = pyaccel.accelerate(model, packing=packing)
    for each in (stock, model):
        embeds = EMBEDS.clone().requires_grad_()
        logits = each(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        (gradient,) = torch.autograd.grad(logits.sum(), embeds, create_graph=True)
        gradient.pow(2).sum().backward()
    for (name, p), other in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        assert (p.grad is None) == (other[1].grad is None), name
        if p.grad is not None and "key.bias" not in name:
            assert_equivalent(p.grad, other[1].grad, name=name)
    assert list(report.refused["padded"]) == [
        "the model was made with eager attention, whose gradients can be differentiated again"
    ]
    with torch.no_grad():
        model.eval()(**batch)
    assert report.served.total() == 3
    assert model.config._attn_implementation == "pyaccel_eager"
    pyaccel.restore(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_mask_of_three_dimensions_that_hides_nothing(rows: int, implementation: str) -> None:
    """transformers drops it, and refuses any other."""
    stock = tiny(attn_implementation=implementation)
    model, ids = copy.deepcopy(stock), torch.randint(1, 90, (rows, 7))
    pyaccel.accelerate(model)
    mask = torch.ones(rows, 7, 7, dtype=torch.int64)
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids, attention_mask=mask).last_hidden_state for each in (model, stock))
        assert_equivalent(ours, theirs)
        mask[:, :, 5:] = 0
        with pytest.raises(ValueError, match="got a mask of shape"):
            model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["left", "none"])
def test_attentions_under_autocast_are_of_the_stock_models_dtype(kind: str, training: bool) -> None:
    """There the scores are bf16 and the mask is of the model's dtype, and so is their sum."""
    stock = tiny(attn_implementation="eager", **PLAIN).train(training)
    model, batch = copy.deepcopy(stock), batch_of(kind)
    pyaccel.accelerate(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (each(**batch, output_attentions=True).attentions for each in (model, stock))
    assert [a.dtype for a in ours] == [a.dtype for a in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert_equivalent(mine.float(), other.float())


def test_a_mixed_layer_is_explained_and_runs_as_stock() -> None:
    model, batch = tiny(), batch_of("right")
    pyaccel.accelerate(model)
    model.encoder.layer[0].output.dense.double()
    found = pyaccel.explain(model)
    assert "several dtypes" in str(found)
    with pytest.raises(RuntimeError, match="dtype"):  # as the stock model
        model(**batch)
    model.encoder.layer[0].output.dense.float()
    positions = read(batch["attention_mask"])
    assert torch.isfinite(model(**batch).last_hidden_state[positions]).all()
