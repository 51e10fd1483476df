"""The layers by oneDNN on a CPU in evaluation: their answers, when they serve, and that they can't go stale."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel

import pyaccel
from pyaccel import dispatch, quantization, triton_support, tuning
from pyaccel.hf.executors.onednn import OneDnn, Prepacked
from pyaccel.hf.families import BY_FILE
from pyaccel.ops.linear import onednn
from tests.assertions import assert_bits_equal
from tests.hf.models import MASKS, Truth, batch_of, of_family, read, tiny

DTYPES = [torch.float32, torch.bfloat16]
LAYERS = 3


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many layers oneDNN ran; as on a machine whose kernels are not interpreted."""
    monkeypatch.setattr(triton_support, "interpreting", lambda: False)
    counted: Counter[str] = Counter()
    for kind in (OneDnn, Prepacked):

        def counting(self: Any, hidden: Tensor, tokens: Any, run: Any = kind.run_layers) -> Tensor:
            counted["onednn"] += self.layers
            return run(self, hidden, tokens)

        monkeypatch.setattr(kind, "run_layers", counting)
    return counted


def fuses(dtype: torch.dtype) -> bool:
    """Whether this CPU's oneDNN takes the dtype; bfloat16 needs AVX-512 or newer."""
    return dtype in onednn.supported_dtypes()


def accelerated(model: nn.Module, **options: Any) -> Any:
    model = copy.deepcopy(model)
    pyaccel.accelerate(model, **options)
    return model


@torch.no_grad()
def states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).last_hidden_state


def judge(stock: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> None:
    Truth(stock).check(model, batch, ["last_hidden_state"], read(batch["attention_mask"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask(kind: str, dtype: torch.dtype, calls: Counter[str]) -> None:
    model, batch = tiny(dtype=dtype), batch_of(kind)
    judge(model, accelerated(model), batch)
    first_is_padding = not bool(batch["attention_mask"][:, 0].all())
    assert (calls["onednn"] > 0) == (fuses(dtype) and not first_is_padding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "distilbert", "albert"])
def test_every_kind_of_layer(name: str, dtype: torch.dtype, calls: Counter[str]) -> None:
    model, batch = of_family(name).to(dtype), batch_of("right")
    batch.pop("token_type_ids", None)
    judge(model, accelerated(model), batch)
    assert (calls["onednn"] >= LAYERS) == fuses(dtype)


def test_it_is_what_the_ops_give(calls: Counter[str]) -> None:
    model, batch = accelerated(tiny()), batch_of("right")
    by_onednn = states(model, batch)
    with dispatch.record() as choices:
        assert_bits_equal(states(model, batch), by_onednn)
    assert calls["onednn"] == LAYERS
    assert {choice.op for choice in choices} == {
        "linear_activation", "varlen_attention", "residual_layernorm"
    }  # fmt: skip
    assert pyaccel.explain(model).report.served == {"onednn": LAYERS, "packed": LAYERS}


def in_training(model: Any) -> None:
    model.encoder.layer[1].output.dropout.train()


def attention_in_training(model: Any) -> None:
    """As transformers has it, attention drops by its own module's mode, whatever its dropout's."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def hooked(model: Any) -> None:
    model.encoder.layer[1].register_forward_hook(lambda *_: None)


def asked(model: Any) -> AbstractContextManager[object]:
    return pyaccel.use_backend("reference", ops=["varlen_attention"])


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (in_training, {}),
        (attention_in_training, {}),
        (hooked, {}),
        (lambda model: model.to(torch.float16), {}),
        (asked, {}),
        (lambda model: torch.autocast("cpu", dtype=torch.bfloat16), {}),
        (lambda model: torch.enable_grad(), {}),
        (lambda model: None, {"int8": "dynamic"}),
        (lambda model: None, {"packing": False}),
        (lambda model: None, {"backend": "reference"}),
    ],
    ids=[
        "dropout",
        "attention",
        "hook",
        "fp16",
        "backend",
        "autocast",
        "gradients",
        "int8",
        "padded",
        "accelerate",
    ],
)
def test_what_is_out_of_the_ordinary_goes_the_long_way(
    change: Callable[[Any], Any], options: dict[str, Any], calls: Counter[str]
) -> None:
    model, batch = accelerated(tiny(), **options), batch_of("right")
    if not options:
        states(model, batch)
        assert calls.pop("onednn") == LAYERS
    context = change(model)
    if not hasattr(context, "__enter__"):
        context = nullcontext()
    with torch.no_grad(), context:
        model(**batch)
    assert calls["onednn"] == 0


def test_hooks_that_transformers_leaves_behind_cost_nothing(calls: Counter[str]) -> None:
    model, batch = accelerated(tiny()), batch_of("right")
    with torch.no_grad():
        model(**batch, output_hidden_states=True)
    assert any(layer._forward_hooks for layer in model.encoder.layer)
    assert calls["onednn"] == 0
    states(model, batch)
    assert calls["onednn"] == LAYERS


def test_a_static_int8_layer_or_another_activation_goes_the_long_way(calls: Counter[str]) -> None:
    model = tiny()
    quantization.quantize(model, "weight_only")
    states(accelerated(model), batch_of("right"))
    states(accelerated(tiny(hidden_act="silu")), batch_of("right"))
    assert calls["onednn"] == 0


def in_place(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.attention.self.key.weight.data.mul_(-1)
        layer.output.LayerNorm.bias.data.add_(1)


def other_memory(model: Any) -> None:
    for layer in model.encoder.layer:
        for p in (layer.attention.self.query.weight, layer.attention.self.value.bias):
            p.data = p.data * 2


def other_parameter(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.attention.self.query.weight = nn.Parameter(-layer.attention.self.query.weight)
        layer.intermediate.dense.bias = nn.Parameter(layer.intermediate.dense.bias + 1)


def there_and_back(model: Any) -> None:
    model.double()
    in_place(model)
    model.float()


def loaded(model: Any) -> None:
    model.load_state_dict({name: -0.5 * x for name, x in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [in_place, other_memory, other_parameter, there_and_back, loaded])
def test_changed_weights_are_used(change: Callable[[Any], None], calls: Counter[str]) -> None:
    stock, batch = tiny(), batch_of("right")
    model = accelerated(stock)
    before = states(model, batch)
    change(stock), change(model)
    judge(stock, model, batch)
    assert not torch.equal(states(model, batch), before)
    assert calls["onednn"] >= 3 * LAYERS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gelu", "relu", "distilbert", "albert"])
def test_prepacked_weights_give_the_same_answers(name: str, dtype: torch.dtype, calls: Counter[str]) -> None:
    model, batch = of_family(name).to(dtype), batch_of("right")
    batch.pop("token_type_ids", None)
    fast = accelerated(model, prepack=True)
    judge(model, fast, batch)
    report = pyaccel.explain(fast).report
    assert report.served["onednn, prepacked"] == calls["onednn"]
    assert (report.served["onednn, prepacked"] >= LAYERS) == fuses(dtype)
    assert not fuses(dtype) or f"{report.served['onednn, prepacked']} onednn, prepacked" in str(report)


def counted_changes(model: Any) -> None:
    """Each of a kind that torch counts, or of memory that is another one, in weights of every product and a bias."""
    layer = model.encoder.layer[0]
    with torch.no_grad():
        layer.attention.self.value.weight.mul_(-1)
        layer.attention.self.key.bias.add_(1)
        layer.intermediate.dense.weight.copy_(-layer.intermediate.dense.weight)
        layer.intermediate.dense.bias.add_(1)
    layer.output.dense.weight.data = -layer.output.dense.weight.data


def one_step(model: Any) -> None:
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    for p in model.parameters():
        p.grad = p.detach().sin()
    sgd.step()
    sgd.zero_grad()


def reloaded(model: Any) -> None:
    model.load_state_dict({name: -0.5 * x for name, x in model.state_dict().items()})


@pytest.mark.parametrize(
    "change", [counted_changes, one_step, reloaded, other_memory, other_parameter, there_and_back, loaded]
)
def test_prepacked_weights_follow_their_originals(change: Callable[[Any], None], calls: Counter[str]) -> None:
    stock, batch = tiny(), batch_of("right")
    model = accelerated(stock, prepack=True)
    before = states(model, batch)
    change(stock), change(model)
    judge(stock, model, batch)
    assert not torch.equal(states(model, batch), before)
    assert pyaccel.explain(model).report.served["onednn, prepacked"] == calls["onednn"] >= 3 * LAYERS


def test_memory_that_was_given_back_is_not_taken_for_what_was_in_it(calls: Counter[str]) -> None:
    """New weights lie where the old ones did as soon as nothing keeps that memory, and torch has counted nothing."""
    stock = tiny()
    model = accelerated(stock, prepack=True)
    states(model, batch_of("right"))
    for each in (stock, model):
        weight = each.encoder.layer[0].intermediate.dense.weight
        shape = weight.shape
        for _ in range(3):
            weight.data = torch.empty(0)
            weight.data = torch.full(shape, 0.25)
            if each is model:
                states(model, batch_of("right"))
        weight.data = torch.empty(0)
        weight.data = torch.full(shape, -0.5)
    judge(stock, model, batch_of("right"))


def test_prepacked_weights_are_made_once(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = Counter[str]()
    reorder = onednn.prepacked

    def counting(weight: Tensor) -> Tensor:
        made["weights"] += 1
        return reorder(weight)

    monkeypatch.setattr(onednn, "prepacked", counting)
    model, batch = accelerated(tiny(), prepack=True), batch_of("right")
    for _ in range(3):
        states(model, batch)
        with torch.inference_mode():
            model(**batch)
    assert made["weights"] == 4 * LAYERS
    copied = pickle.loads(pickle.dumps(model))
    assert_bits_equal(states(copied, batch), states(model, batch))
    assert made["weights"] == 8 * LAYERS
    prepacked = weakref.ref(model.encoder._pyaccel.plan.executors[0])
    assert isinstance(prepacked(), Prepacked)
    states(model.to(torch.float64), batch)
    assert prepacked() is None, "copies are let go with the memory that the model has left"


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_a_model_made_in_inference_mode(name: str, prepack: bool, calls: Counter[str]) -> None:
    """torch counts no changes of its weights, so none are kept in another order."""
    stock, batch = tiny(hidden_act=name), batch_of("right")
    with torch.inference_mode():
        model = tiny(hidden_act=name)
        model.load_state_dict(stock.state_dict())
        pyaccel.accelerate(model, prepack=prepack)
        inside = states(model, batch)
    assert_bits_equal(states(model, batch), inside)
    judge(stock, model, batch)
    assert (calls["onednn"] > 0) == (name == "gelu")
    assert pyaccel.explain(model).report.served["onednn, prepacked"] == 0
    pyaccel.restore(model)
    states(model, batch)


@pytest.mark.parametrize("options", [{"int8": "dynamic"}, {"packing": False}])
def test_prepack_with_what_it_does_not_go_with(options: dict[str, Any]) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="prepack=True reorders floating weights"):
        pyaccel.accelerate(model, prepack=True, **options)
    assert "_pyaccel" not in model.encoder.__dict__


def test_a_change_of_the_layers_options_is_seen(calls: Counter[str]) -> None:
    stock, batch = tiny(), batch_of("right")
    model = accelerated(stock)
    states(model, batch)
    for each in (stock, model):
        each.encoder.layer[0].output.LayerNorm.eps = 0.5
    judge(stock, model, batch)
    for each in (stock, model):
        each.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    judge(stock, model, batch)
    assert calls["onednn"] >= 2 * LAYERS


def test_attention_drops_as_the_stock_model_s_does(calls: Counter[str]) -> None:
    """With dropouts in evaluation and attention in training it drops, the other way round it doesn't."""
    model, batch = accelerated(tiny()), batch_of("right")
    still = states(model, batch)
    attention_in_training(model)
    assert not torch.equal(states(model, batch), still)
    model.eval()
    for layer in model.encoder.layer:
        layer.attention.self.dropout.train()
    assert_bits_equal(states(model, batch), still)


def test_an_activation_that_is_changed_in_place_is_seen(calls: Counter[str]) -> None:
    stock, batch = tiny(), batch_of("right")
    for layer in stock.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.GELU()
    model = accelerated(stock)
    states(model, batch)
    for each in (stock, model):
        for layer in each.encoder.layer:
            layer.intermediate.intermediate_act_fn.approximate = "tanh"
    judge(stock, model, batch)
    assert calls["onednn"] >= 2 * LAYERS


def test_a_mode_that_counts_operators_counts_them_all(calls: Counter[str]) -> None:
    model, batch = accelerated(tiny()), batch_of("right")
    states(model, batch)
    calls.clear()
    with FlopCounterMode(display=False) as counter:
        states(model, batch)
    assert not calls
    tokens = int(batch["attention_mask"].sum())
    assert counter.get_total_flops() >= LAYERS * 2 * tokens * 32 * (4 * 32 + 2 * 72)


def test_copies_have_their_own(calls: Counter[str]) -> None:
    model, batch = accelerated(tiny()), batch_of("right")
    before = states(model, batch)
    other = copy.deepcopy(model)
    in_place(other)
    assert not torch.equal(states(other, batch), before)
    assert_bits_equal(states(model, batch), before)


def test_of_a_bert_in_other_words() -> None:
    layers = list(tiny(BertModel).encoder.layer)
    family = BY_FILE["transformers.models.bert.modeling_bert"]
    assert OneDnn.of(family, layers, None) is not None
    layers[1].output.dense = nn.Linear(72, 32, bias=False)
    assert OneDnn.of(family, layers, None) is None


def test_it_takes_the_way_that_was_measured_to_be_faster(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny(), batch_of("right")
    fast = accelerated(model)
    monkeypatch.setattr(
        tuning, "preferred_each", lambda op, device, dtype, sizes, names: ["eager"] * len(sizes)
    )
    products = Counter[str]()
    by_torch = torch.nn.functional.linear

    def counting(*args: Any) -> Tensor:
        products["F.linear"] += 1
        return by_torch(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    states(fast, batch)
    assert calls["onednn"] == LAYERS
    assert products["F.linear"] >= 4 * LAYERS
    judge(model, fast, batch)
