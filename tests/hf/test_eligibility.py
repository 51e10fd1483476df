"""What the fast path can't serve goes to the stock modules: their answer, counted, with the reason."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel, DynamicCache

import pyaccel
from pyaccel import ops
from tests.assertions import (
    assert_bits_equal,
    assert_close_to_truth,
    assert_equivalent,
    assert_same_distribution,
)
from tests.hf.models import Truth, batch_of, read, tiny

LAYERS = 3


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class NoScaleNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class LoudDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Negated(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


class WeightSubclass(Tensor):
    """A tensor whose products are negated: one that the fast path must not read as plain numbers."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return -out.as_subclass(Tensor) if func is nn.functional.linear else out


def replaced(old: nn.Module, kind: type[nn.Module], *args: Any) -> nn.Module:
    new = kind(*args)
    new.load_state_dict(old.state_dict())
    return new.eval()


def subclassed_linear(model: BertModel) -> None:
    old = model.encoder.layer[1].attention.self.value
    model.encoder.layer[1].attention.self.value = replaced(old, ScaledLinear, 32, 32)


def subclassed_norm(model: BertModel) -> None:
    old = model.encoder.layer[2].output.LayerNorm
    model.encoder.layer[2].output.LayerNorm = replaced(old, NoScaleNorm, 32, old.eps)


def subclassed_dropout(model: BertModel) -> None:
    model.encoder.layer[0].output.dropout = LoudDropout().eval()


def class_changed_in_place(model: BertModel) -> None:
    model.encoder.layer[0].intermediate.dense.__class__ = ScaledLinear


def parametrized(model: BertModel) -> None:
    parametrize.register_parametrization(model.encoder.layer[1].output.dense, "weight", Negated())


def forward_hook(model: BertModel) -> None:
    model.encoder.layer[1].attention.output.register_forward_hook(lambda module, args, out: out * 2)


def forward_pre_hook(model: BertModel) -> None:
    model.encoder.layer[1].intermediate.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def own_forward(model: BertModel) -> None:
    dense = model.encoder.layer[0].attention.self.query
    dense.forward = lambda x: nn.functional.linear(x, dense.weight)


def own_feed_forward(model: BertModel) -> None:
    layer: Any = model.encoder.layer[1]
    layer.feed_forward_chunk = lambda x: 2 * x


def weight_subclass(model: BertModel) -> None:
    dense = model.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.detach().as_subclass(WeightSubclass))


def weight_that_is_no_parameter(model: BertModel) -> None:
    dense = model.encoder.layer[0].output.dense
    weight = dense.weight.detach() * 2
    del dense.weight
    dense.weight = weight


def without_bias(model: BertModel) -> None:
    model.encoder.layer[0].attention.self.value.bias = None


def replaced_activation(model: BertModel) -> None:
    act = model.encoder.layer[0].intermediate.intermediate_act_fn
    act.forward = torch.tanh


# What happens to the modules after accelerate, and the layers that it sends to the stock path.
CHANGES: list[tuple[Callable[[BertModel], None], str, int]] = [
    (subclassed_linear, "attention.self.value is a ScaledLinear, not a Linear", 1),
    (subclassed_norm, "output.LayerNorm is a NoScaleNorm, not a LayerNorm", 1),
    (subclassed_dropout, "output.dropout is a LoudDropout, not a Dropout", 1),
    (class_changed_in_place, "intermediate.dense is a ScaledLinear, not a Linear", 1),
    (parametrized, "output.dense is a ParametrizedLinear, not a Linear", 1),
    (forward_hook, "attention.output has hooks", 1),
    (forward_pre_hook, "intermediate has hooks", 1),
    (own_forward, "attention.self.query has a forward of its own", 1),
    (own_feed_forward, "the layer has a feed_forward_chunk of its own", 1),
    (weight_subclass, "output.dense.weight is a WeightSubclass", 1),
    (weight_that_is_no_parameter, "output.dense.weight is not a parameter", 1),
    (without_bias, "attention.self.value.bias is not a parameter", 1),
    (replaced_activation, "intermediate.intermediate_act_fn has a forward of its own", 1),
]


@pytest.mark.parametrize("called_before", [True, False])
@pytest.mark.parametrize(("change", "reason", "count"), CHANGES, ids=[c[0].__name__ for c in CHANGES])
def test_changed_modules(
    change: Callable[[BertModel], None], reason: str, count: int, called_before: bool
) -> None:
    model, batch = tiny(), batch_of("left")
    plain = model(**batch).last_hidden_state
    stock = copy.deepcopy(model)
    change(stock)
    report = pyaccel.accelerate(model)
    if called_before:
        model(**batch)
        report.reset()
    change(model)
    expected = stock(**batch).last_hidden_state
    out = model(**batch).last_hidden_state
    assert (expected - plain)[read(batch["attention_mask"])].abs().max() > 1e-2, "the change must show"
    assert_equivalent(out, expected, name="a guard let something through")
    assert report.refused["padded"] == {reason: count}
    assert [r.split(": ", 1)[1] for r in report.refused["packed"]] == [reason]
    assert report.served == {"padded": LAYERS - count}


def test_a_hook_that_is_removed_gives_the_fast_path_back() -> None:
    model, batch = tiny(), batch_of("right")
    report = pyaccel.accelerate(model)
    handle = model.encoder.layer[0].output.register_forward_hook(lambda *_: None)
    model(**batch)
    assert report.served == {"padded": 2}
    handle.remove()
    model(**batch)
    assert report.served == {"padded": 2, "packed": 3}


def test_hooks_of_the_layers_and_the_encoder_run() -> None:
    model, batch = tiny(), batch_of("left")
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    seen = []
    handle = model.encoder.register_forward_hook(lambda *_: seen.append("encoder"))
    stock.check(model, batch, ["pooler_output"])
    assert seen == ["encoder"]
    assert report.served == {"packed": 3}
    handle.remove()
    model.encoder.layer[1].register_forward_hook(lambda *_: seen.append("layer"))
    stock.check(model, batch, ["pooler_output", "last_hidden_state"])
    assert seen == ["encoder", "layer"]
    assert report.refused["packed"] == {"layer.1: the layer has hooks": 1}
    assert report.served == {"packed": 3, "padded": 3}


def test_hooks_on_all_modules() -> None:
    """Those that are registered for every module there is, but for those of torch's own counter of FLOPs."""
    model, batch = tiny(), batch_of("left")
    stock = copy.deepcopy(model)
    report = pyaccel.accelerate(model)
    with FlopCounterMode(display=False) as flops:
        model(**batch)
    assert flops.get_total_flops() > 0
    assert report.served == {"packed": 3}

    def double(module: nn.Module, args: Any, out: Any) -> Any:
        return out * 2 if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        out, expected = model(**batch), stock(**batch)
    finally:
        handle.remove()
    assert_equivalent(out.last_hidden_state, expected.last_hidden_state)
    assert report.refused["padded"] == {"hooks on all modules": 3}


def test_backward_hooks_run() -> None:
    model, batch = tiny(), batch_of("left")
    report = pyaccel.accelerate(model)
    seen = []
    model.encoder.layer[0].attention.output.register_full_backward_hook(lambda *_: seen.append(1))
    model(**batch).pooler_output.sum().backward()
    assert seen == [1]
    assert report.refused["padded"] == {"attention.output has hooks": 1}


def test_a_layer_with_its_own_forward() -> None:
    model, batch = tiny(), batch_of("left")
    layer = model.encoder.layer[1]
    report = pyaccel.accelerate(model)
    layer.forward = lambda hidden, *args, **kwargs: hidden
    model(**batch)
    assert report.refused["packed"] == {"layer.1: the layer has a forward of its own": 1}
    assert report.served == {"padded": 2}


def test_a_replaced_layer() -> None:
    class Identity(nn.Module):
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden

    model, batch = tiny(), batch_of("left")
    stock = copy.deepcopy(model)
    report = pyaccel.accelerate(model)
    model(**batch)
    for m in (model, stock):
        m.encoder.layer[1] = Identity()
    assert_equivalent(model(**batch).last_hidden_state, stock(**batch).last_hidden_state)
    assert report.refused["packed"] == {"layer.1: it is a Identity, not a BertLayer": 1}
    for m in (model, stock):
        m.encoder.layer = m.encoder.layer[:1]
    Truth(stock).check(model, batch, ["pooler_output"])
    assert report.served == {"packed": 3 + 1, "padded": 2}


def test_dropout_at_inference() -> None:
    """Dropout modules set to training alone (Monte Carlo dropout) drop on the fast path too, and as often."""
    model, batch = tiny(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0), batch_of("right")
    stock = copy.deepcopy(model)
    report = pyaccel.accelerate(model)
    still = model(**batch).last_hidden_state
    for m in (model, stock):
        for part in m.encoder.modules():
            if isinstance(part, nn.Dropout):
                part.train()
    assert_same_distribution(
        *(lambda m=m: m(**batch).last_hidden_state[:, 0] for m in (model, stock)), runs=150
    )
    assert not torch.equal(model(**batch).last_hidden_state, still)
    assert not report.refused["padded"]
    assert not report.refused["packed"]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool, packing: bool) -> None:
    """As far from the truth as the stock model is under autocast, with its dtypes; gradients too."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, batch = tiny(**none).train(training), batch_of("left")
    stock, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    report = pyaccel.accelerate(model, packing=packing)
    results, grads = [], []
    seen = read(batch["attention_mask"]).unsqueeze(-1)
    for m in (model, truth, stock):
        with torch.autocast("cpu", torch.bfloat16, enabled=m is not truth):
            out = m(**batch).last_hidden_state
        results.append(out.masked_fill(~seen, 0.0))
        (results[-1] * torch.linspace(-1, 1, 32)).sum().backward()
        grads.append({name: p.grad for name, p in m.named_parameters() if p.grad is not None})
    assert results[0].dtype == results[2].dtype
    assert_close_to_truth(*results, name="last_hidden_state")
    assert grads[0].keys() == grads[2].keys()
    for name in grads[0]:
        if "key.bias" not in name:  # its gradient is 0 but for rounding
            assert_close_to_truth(*(g[name] for g in grads), name=name)
    assert not report.refused["padded"]
    assert report.served == {"packed" if packing else "padded": 3}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_of_four_dimensions(dtype: torch.dtype) -> None:
    model, batch = tiny(), batch_of("right")
    keep = torch.rand(5, 1, 12, 12) > 0.3
    keep[..., 0] = True
    mask = (
        keep if dtype == torch.bool else torch.where(keep, torch.randn(5, 1, 12, 12), torch.finfo(dtype).min)
    )
    batch["attention_mask"] = mask
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    stock.check(model, batch, ["last_hidden_state", "pooler_output"])
    assert report.refused["padded"] == {
        f"an attention mask other than bool [batch, seq]: {dtype} with 4 dimensions": 3
    }


def test_an_attention_implementation_set_since() -> None:
    model, batch = tiny(), batch_of("left")
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    model.set_attn_implementation("eager")
    stock.naive.set_attn_implementation("eager")
    stock.check(model, batch, ["last_hidden_state"])
    assert report.refused["padded"] == {"the attention implementation is now 'eager'": 3}


@pytest.mark.parametrize("packing", [True, False])
def test_chunked_feed_forward(packing: bool) -> None:
    """The feed-forward network runs on as many positions of all rows at a time as were asked for."""
    model, batch = tiny(chunk_size_feed_forward=3), batch_of("right")
    stock, rows = Truth(model), []
    report = pyaccel.accelerate(model, packing=packing)
    linear_activation = ops.linear_activation
    with pytest.MonkeyPatch.context() as patch:

        def spy(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
            if weight.shape[0] == 72:
                rows.append(x.shape[:-1].numel())
            return linear_activation(x, weight, *args)

        patch.setattr(ops, "linear_activation", spy)
        stock.check(
            model, batch, ["last_hidden_state"], None if not packing else read(batch["attention_mask"])
        )
    assert max(rows) == 3 * 5
    assert len(rows) == (3 * 3 if packing else 3 * 4)
    assert not report.refused["padded"]


def test_a_model_on_the_meta_device() -> None:
    """Swapped before its weights are there, fast once they are."""
    loaded, batch = tiny(), batch_of("right")
    with torch.device("meta"):
        model = tiny()
    report = pyaccel.accelerate(model)
    model.to_empty(device="cpu")
    model.load_state_dict(loaded.state_dict())
    for buffer in ("position_ids", "token_type_ids"):  # not in a state dict
        setattr(model.embeddings, buffer, getattr(loaded.embeddings, buffer))
    Truth(loaded).check(model, batch, ["pooler_output"])
    assert report.served == {"packed": 3}


def test_several_dtypes() -> None:
    model = tiny(dtype=torch.bfloat16)
    report = pyaccel.accelerate(model)
    batch = batch_of("right")
    model(**batch)
    stock = copy.deepcopy(model)
    pyaccel.restore(stock)
    for m in (model, stock):
        m.encoder.layer[1].output.LayerNorm.float()
    assert_equivalent(model(**batch).pooler_output, stock(**batch).pooler_output)
    assert report.refused["padded"] == {"its parameters are of several dtypes": 1}


@pytest.mark.parametrize("masked", [True, False])
def test_a_cache_in_an_encoder(masked: bool) -> None:
    """As in prefix tuning: keys and values come before those of the input. Without a mask, only the cache tells."""
    model, batch = tiny(), batch_of("right")
    stock = copy.deepcopy(model)
    report = pyaccel.accelerate(model)
    prefix = [(torch.randn(5, 4, 2, 8), torch.randn(5, 4, 2, 8)) for _ in range(LAYERS)]
    prefixed = torch.cat([torch.ones(5, 2, dtype=torch.int64), batch.pop("attention_mask")], 1)
    if masked:
        batch["attention_mask"] = prefixed

    def run(model: BertModel) -> Tensor:
        cache = DynamicCache()
        for index, (key, value) in enumerate(prefix):
            cache.update(key, value, index)
        return model(**batch, past_key_values=cache).last_hidden_state

    assert_equivalent(run(model), run(stock))
    assert report.refused["padded"] == {"a key/value cache": 3}


def test_causal_when_asked() -> None:
    model, batch = tiny(), batch_of("none")
    del batch["attention_mask"]
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    stock.check(model, {**batch, "is_causal": True}, ["last_hidden_state"])
    assert report.refused["padded"] == {"is_causal": 3}


def test_input_packed_by_the_caller() -> None:
    """Stock SDPA ignores cu_seq_lens; here every sequence is alone, as with flash attention."""
    model = tiny()
    lengths = (5, 1, 7)
    ids = [torch.randint(1, 97, (1, n)) for n in lengths]
    expected = [model(i).last_hidden_state for i in ids]
    report = pyaccel.accelerate(model)
    offsets = torch.tensor([0, 5, 6, 13], dtype=torch.int32)

    def again(**changes: Any) -> torch.Tensor:
        given = {
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": 7,
            "max_length_k": 7,
        }
        return model(torch.cat(ids, 1), **{**given, **changes}).last_hidden_state

    with pytest.raises(ValueError, match="an attention_mask came with it"):
        again(attention_mask=torch.tensor([[1] * 12 + [0]]))
    with pytest.raises(ValueError, match="max_length_q is missing"):
        again(max_length_q=None)
    assert set(report.refused["packed"]) == {
        "input packed by the caller, other than one row with max_length_q and no mask"
    }
    report.reset()
    out = again()
    assert_equivalent(out, torch.cat(expected, 1))
    assert report.served == {"packed": 3}
    pyaccel.restore(model)
    report = pyaccel.accelerate(model, packing=False)
    assert_equivalent(again(), out)
    assert report.refused["padded"] == {"input packed by the caller": 3}


def test_gradient_checkpointing_does_nothing_in_evaluation() -> None:
    model, batch = tiny(), batch_of("left")
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    model.gradient_checkpointing_enable()
    stock.check(model, batch, ["pooler_output"])
    assert report.served == {"packed": 3}


# ---- other ways to run a model ----


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic: bool) -> None:
    model = tiny(num_hidden_layers=2)
    stock = Truth(model)
    report = pyaccel.accelerate(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for kind in ("left", "a padded row", "none"):
        stock.check(compiled, batch_of(kind), ["last_hidden_state", "pooler_output"])
    batch = batch_of("right")
    out = compiled(**batch).pooler_output
    out.square().sum().backward()
    expected = stock.naive(**batch).pooler_output
    expected.square().sum().backward()
    # All in one: the gradient of a key's bias is 0 but for rounding, and has no scale of its own.
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, stock.naive))
    assert_equivalent(ours, theirs)
    assert not report.refused["padded"]
    model(**batch)
    assert report.served == {"packed": 2}, "what is compiled isn't counted, what is not compiled is"


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool) -> None:
    model, batch = tiny(), batch_of("left")
    stock = Truth(model)
    pyaccel.accelerate(model)
    program = torch.export.export(model, (), batch, strict=strict).module()
    stock.check(program, batch, ["last_hidden_state", "pooler_output"])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["none", "left"])
def test_traced(kind: str) -> None:
    model, batch = tiny(return_dict=False), batch_of(kind)
    stock = copy.deepcopy(model)
    pyaccel.accelerate(model)
    with torch.no_grad():
        traced = torch.jit.trace(
            model, (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        )
        for kind in ("left", "right", "none"):  # other masks than the traced one
            batch = batch_of(kind)
            out = traced(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])[0]
            assert_equivalent(out, stock(**batch)[0])


def test_functional_call_and_vmap() -> None:
    model, batch = tiny(), batch_of("left")
    pyaccel.accelerate(model)
    model(**batch)
    parameters = {name: (p * 1.2).detach() for name, p in model.named_parameters()}
    stock = tiny()
    stock.load_state_dict(parameters, strict=False)
    out = torch.func.functional_call(model, parameters, kwargs=batch).pooler_output
    truth = copy.deepcopy(stock).double()(**batch).pooler_output
    assert_close_to_truth(out, truth, stock(**batch).pooler_output)
    embeds = torch.randn(2, 5, 12, 32)
    out = torch.func.vmap(lambda e: model(inputs_embeds=e).pooler_output)(embeds)
    exact = tiny().double()
    exact.load_state_dict(model.state_dict())
    truth = torch.stack([exact(inputs_embeds=e.double()).pooler_output for e in embeds])
    assert_close_to_truth(out, truth, torch.stack([model(inputs_embeds=e).pooler_output for e in embeds]))


def test_inference_mode() -> None:
    model, batch = tiny(), batch_of("left")
    pyaccel.accelerate(model)
    expected = model(**batch).last_hidden_state
    with torch.inference_mode():
        assert_bits_equal(model(**batch).last_hidden_state, expected)


def test_a_fingerprint_is_cheap() -> None:
    """A call of an unchanged encoder costs a twenty-fifth of a look at all its modules; a tenth is allowed."""
    from pyaccel.hf.eligibility import Call, call_reason, ineligible_reason
    from pyaccel.hf.families import FAMILIES, stock
    from pyaccel.hf.plan import plan_of

    bert = stock(FAMILIES[0])

    model, batch = tiny(num_hidden_layers=6), batch_of("right")
    pyaccel.accelerate(model)
    model(**batch)
    hidden, mask = torch.randn(5, 12, 32), batch["attention_mask"].bool()
    layers = list(model.encoder.layer)

    def guard() -> None:
        assert call_reason(model.config, Call(hidden, mask, (), {})) is None
        assert plan_of(bert, model.encoder) is model.encoder._pyaccel.plan

    def look() -> None:
        assert ineligible_reason(bert, layers, model.encoder) is None

    # One after the other: in turns, each would find the caches full of the other's.
    best, whole = (min(_timed(each) for _ in range(100)) for each in (guard, look))
    assert best < whole / 10, (
        f"the guard takes {best * 1e6:.1f} us where a look at all takes {whole * 1e6:.1f}"
    )


def _timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
