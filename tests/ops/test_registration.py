"""The registered ops: torch.library.opcheck, and compiled graphs without breaks, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyaccel import dispatch, ops
from pyaccel.ops.attention import custom_ops as attention
from pyaccel.ops.bias_act.triton import backward_op as bias_gelu_backward
from pyaccel.ops.bias_act.triton import forward_op as bias_gelu_forward
from pyaccel.ops.bias_act.triton import quantize_op as bias_gelu_quantize
from pyaccel.ops.dropout import dropout_key
from pyaccel.ops.embeddings import triton as embeddings
from pyaccel.ops.int8 import triton as int8
from pyaccel.ops.layernorm.triton import backward_op, forward_op
from pyaccel.ops.linear import triton as linear_activation
from pyaccel.ops.mlm_loss import chunked as mlm_loss
from tests.assertions import assert_bits_equal, assert_equivalent
from tests.ops import attention_cases as cases

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck_residual_layernorm(dtype: torch.dtype, full: bool, device: torch.device) -> None:
    rows, cols = 5, 48
    x, residual, dy, dsum = (torch.randn(4, rows, cols, device=device).to(dtype)).unbind()
    weight, bias, x_bias = torch.randn(3, cols, device=device).unbind()
    key = dropout_key(device)
    if full:
        forward = (x, residual, weight, bias, x_bias, key, 1e-12, 0.2, dtype, False, True, True, True, True)
    else:
        forward = (x, None, None, None, None, None, 1e-5, 0.0, F32, True, False, True, False, True)
    torch.library.opcheck(forward_op.registered, forward)
    torch.library.opcheck(forward_op.registered, (*forward[:-1], False))
    _, total, _, _, mean, rstd = forward_op(*forward)
    grads = (
        (dy, dsum, total, mean, rstd, weight, key, 0.2)
        if full
        else (dy, None, total, mean, rstd, None, None, 0.0)
    )
    dtypes = (dtype, F32, F32, F32, F32) if full else (None, dtype, None, None, None)
    torch.library.opcheck(backward_op.registered, (*grads, *dtypes))


def layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    out, total = ops.residual_layernorm(
        x * 2.0, residual, weight, bias, x_bias=x_bias, dropout_p=0.0, training=True, return_sum=True
    )
    return torch.cat([out.sin(), total], dim=-1)


def inputs(rows: int, device: torch.device) -> list[Tensor]:
    given = [*torch.randn(2, rows, 48, device=device).unbind(), *torch.randn(3, 48, device=device).unbind()]
    return [t.requires_grad_() for t in given]


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_compiles_to_one_graph_forward_and_backward(backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    given = inputs(6, device)
    grad = torch.randn(6, 96, device=device)
    with dispatch.use_backend(backend):
        eager = layer(*given)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*given)
        pairs = zip(
            (eager, *torch.autograd.grad(eager, given, grad)),
            (compiled, *torch.autograd.grad(compiled, given, grad)),
            strict=True,
        )
        for a, b in pairs:
            assert_bits_equal(a, b)


def test_dynamic_shapes_do_not_recompile(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with dispatch.use_backend("triton"), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9, 2, 31):
            given = inputs(rows, device)
            out, expected = compiled(*given), layer(*given)
            assert_bits_equal(out, expected)
            grad = torch.randn_like(out)
            for a, b in zip(
                torch.autograd.grad(out, given, grad), torch.autograd.grad(expected, given, grad), strict=True
            ):
                assert_bits_equal(a, b)


def test_dropout_in_a_compiled_graph_is_right(device: torch.device, seed: int) -> None:
    """Compiled and eager draw the same key from the same generator state, and a second call draws another."""
    torch._dynamo.reset()
    x = torch.ones(16, 64, device=device, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return ops.residual_layernorm(x, None, None, None, dropout_p=0.5, training=True, return_sum=True)[1]

    with dispatch.use_backend("triton"):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.manual_seed(seed)
        expected = run(x), run(x)
        torch.manual_seed(seed)
        out = compiled(x), compiled(x)
    for a, b in zip(out, expected, strict=True):
        assert_bits_equal(a, b)
        (grad,) = torch.autograd.grad(a, x, torch.ones_like(a))
        assert_bits_equal(grad, a.detach())
    assert not torch.equal(*out)


# --- attention ----------------------------------------------------------------------------------------------

# What an op is given of a call: masks (or None), offsets, dropout, and then the numbers.
ATTENTION: dict[str, Callable[[torch.device], tuple[torch.dtype, int, dict[str, Any]]]] = {
    "plain": lambda d: (F32, 4, {}),
    "grouped, causal": lambda d: (BF16, 2, {"is_causal": True, "scale": -0.3}),
    "padding": lambda d: (F32, 4, {"key_mask": (torch.rand(2, 9, device=d) < 0.7)[:, None]}),
    "mask": lambda d: (BF16, 4, {"attn_mask": torch.rand(2, 1, 5, 9, device=d) < 0.7, "window_left": 3}),
    "bias, dropout": lambda d: (
        F32, 2,
        {
            "attn_mask": torch.randn(1, 4, 1, 9, device=d), "key_mask": torch.rand(1, 1, 9, device=d) < 0.7,
            "dropout_key": dropout_key(d), "dropout_p": 0.3,
        },
    ),
    "packed": lambda d: (
        F32, 2, {"cu_seqlens_q": cases.offsets([3, 0, 2], d), "cu_seqlens_k": cases.offsets([4, 1, 2], d)},
    ),
}  # fmt: skip
USUAL = {
    "attn_mask": None, "key_mask": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "dropout_key": None, "seq_q": 5,
    "seq_k": 9, "scale": 0.25, "dropout_p": 0.0, "is_causal": False, "window_left": -1, "window_right": -1,
}  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION)
def test_opcheck_attention(case: str, device: torch.device) -> None:
    dtype, kv_heads, options = ATTENTION[case](device)
    batch = 1 if "cu_seqlens_q" in options else 2
    query, key, value = (
        torch.randn(batch, seq, heads, 16, device=device).to(dtype).transpose(1, 2)
        for seq, heads in ((5, 4), (9, kv_heads), (9, kv_heads))
    )
    given = (query, key, value, *{**USUAL, **options}.values())
    for want_lse in (True, False):
        torch.library.opcheck(attention.forward_op.registered, (*given, want_lse))
    out, lse, error = attention.forward_op(*given, True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    mask = options.get("attn_mask")
    want_dmask = mask is not None and mask.is_floating_point()
    torch.library.opcheck(attention.backward_op.registered, (dout, dlse, out, lse, error, *given, want_dmask))
    if case == "plain":
        torch.library.opcheck(attention.backward_op.registered, (dout, None, out, lse, error, *given, False))
    if batch == 2:
        masks = (mask, options.get("key_mask"))
        numbers = [
            {**USUAL, **options}[name] for name in ("scale", "is_causal", "window_left", "window_right")
        ]
        torch.library.opcheck(attention.probs_op.registered, (query, key, lse, *masks, *numbers))


def padded_layer(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Attention between other ops, on views of what they give."""
    given = ((t * 2.0).transpose(1, 2) for t in (query, key, value))
    out, lse = ops.scaled_dot_product_attention(
        *given, key_padding_mask=keys, dropout_p=dropout_p, is_causal=True, return_lse=True
    )
    return torch.cat([out.transpose(1, 2).flatten(2).sin(), lse.mT], -1)


def packed_layer(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0
) -> Tensor:
    qkv = torch.stack([query, key, value], 1) * 2.0
    out, lse = ops.varlen_attention(
        *qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p=dropout_p, return_lse=True
    )
    return torch.cat([out.flatten(1).sin(), lse.T], -1)


def attention_inputs(kind: str, lens: list[int], device: torch.device) -> tuple[list[Tensor], list[Any]]:
    """Leaves, and the arguments that follow them."""
    if kind == "padded":
        keys = torch.arange(max(lens), device=device) < torch.tensor(lens, device=device)[:, None]
        shape, rest = (len(lens), max(lens), 2, 16), [keys]
    else:
        shape, rest = (sum(lens) + 2, 2, 16), [cases.offsets(lens, device), max(lens)]
    return [torch.randn(shape, device=device).requires_grad_() for _ in range(3)], rest


def assert_compiled_is_eager(
    compiled: Callable[..., Tensor], layer: Callable[..., Tensor], leaves: list[Tensor], rest: list[Any]
) -> None:
    results, grad = [], None
    for function in (compiled, layer):
        torch.manual_seed(3)
        out = function(*leaves, *rest)
        if grad is None:
            grad = torch.randn_like(out).masked_fill(out == -torch.inf, 0.0)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_bits_equal(a, b, name=name)


ATTENTION_LAYERS = {"padded": padded_layer, "packed": packed_layer}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ATTENTION_LAYERS)
def test_attention_compiles_to_one_graph_forward_and_backward(
    kind: str, dropout_p: float, device: torch.device
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ATTENTION_LAYERS[kind], fullgraph=True, backend="aot_eager")
    leaves, rest = attention_inputs(kind, [5, 3, 9], device)
    with dispatch.use_backend("triton"):
        assert_compiled_is_eager(compiled, ATTENTION_LAYERS[kind], leaves, [*rest, dropout_p])


@pytest.mark.parametrize("kind", ATTENTION_LAYERS)
def test_attention_of_other_lengths_does_not_recompile(kind: str, device: torch.device) -> None:
    """Nor of other numbers of sequences, where no one kernel serves all the lengths."""
    torch._dynamo.reset()
    compiled = torch.compile(ATTENTION_LAYERS[kind], fullgraph=True, backend="aot_eager", dynamic=True)
    with dispatch.use_backend("triton"), torch._dynamo.config.patch(error_on_recompile=True):
        for lens in ([5, 3, 9], [7, 2], [66, 3], [4, 4, 2, 3]):
            leaves, rest = attention_inputs(kind, lens, device)
            assert_compiled_is_eager(compiled, ATTENTION_LAYERS[kind], leaves, [*rest, 0.3])


def test_attention_dropout_in_a_compiled_graph_is_right(device: torch.device, seed: int) -> None:
    """Compiled and eager draw the same key from the same generator state, and a second call draws another."""
    torch._dynamo.reset()
    query = torch.zeros(2, 2, 40, 16, device=device)
    value = torch.eye(40, device=device).expand(2, 2, 40, 40)

    def run(query: Tensor, value: Tensor) -> Tensor:
        return ops.scaled_dot_product_attention(query, query, value, dropout_p=0.5)

    with dispatch.use_backend("triton"):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.manual_seed(seed)
        expected = run(query, value), run(query, value)
        torch.manual_seed(seed)
        found = compiled(query, value), compiled(query, value)
    for a, b in zip(found, expected, strict=True):
        assert_bits_equal(a, b)
    assert not torch.equal(*found)


def test_attention_probs_compile(device: torch.device) -> None:
    torch._dynamo.reset()
    query, key = torch.randn(2, 2, 2, 9, 16, device=device).unbind()
    keys = torch.arange(9, device=device) < torch.tensor([[9], [4]], device=device)

    def run(query: Tensor, key: Tensor) -> Tensor:
        _, lse = ops.scaled_dot_product_attention(query, key, key, key_padding_mask=keys, return_lse=True)
        return ops.attention_probs(query, key, lse, key_padding_mask=keys)

    with dispatch.use_backend("triton"):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
        assert_bits_equal(compiled(query, key), run(query, key))


# --- bias + activation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_opcheck_bias_gelu(dtype: torch.dtype, has_bias: bool, device: torch.device) -> None:
    x, dy = torch.randn(2, 5, 48, device=device).to(dtype).unbind()
    bias = torch.randn(48, device=device) if has_bias else None
    torch.library.opcheck(bias_gelu_forward.registered, (x, bias, "gelu"))
    torch.library.opcheck(bias_gelu_quantize.registered, (x, bias, "silu"))
    for want_dbias in {has_bias, False}:
        torch.library.opcheck(bias_gelu_backward.registered, (dy, x, bias, "gelu_tanh", True, want_dbias))
    torch.library.opcheck(bias_gelu_backward.registered, (dy.T[:5, :5], x[:, :5], None, "relu", False, False))


def feed_forward(x: Tensor, bias: Tensor) -> Tensor:
    """Bias and activation between other ops, a view before them."""
    out = ops.bias_gelu((x * 2.0).view(1, *x.shape), bias)
    with torch.no_grad():
        codes, scale = ops.bias_gelu(x, bias, "relu", quantize_output=True)
    return out[0].sin() + codes * scale[:, None]


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_bias_gelu_compiles_to_one_graph_and_other_sizes_do_not_recompile(
    backend: str, device: torch.device
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager", dynamic=True)
    bias = torch.randn(48, device=device).requires_grad_()
    with dispatch.use_backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9, 2, 70):
            x, dy = torch.randn(2, rows, 48, device=device).unbind()
            x.requires_grad_()
            results = []
            for function in (compiled, feed_forward):
                out = function(x, bias)
                results.append((out, *torch.autograd.grad(out, (x, bias), dy)))
            for a, b in zip(*results, strict=True):
                assert_bits_equal(a, b)


# --- linear + activation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["gelu", None])
def test_opcheck_linear_activation(dtype: torch.dtype, activation: str | None, device: torch.device) -> None:
    x, weight = torch.randn(5, 24, device=device).to(dtype), torch.randn(40, 24, device=device).to(dtype)
    bias = torch.randn(40, device=device)
    for want_pre in (True, False):
        torch.library.opcheck(
            linear_activation.forward_op.registered, (x, weight, bias, activation, want_pre)
        )
    torch.library.opcheck(
        linear_activation.forward_op.registered,
        (x.T[:, :3], weight[:, :3].T[:, :5].T, None, activation, True),
    )
    pre, dout = torch.randn(2, 5, 40, device=device).to(dtype).unbind()
    for want_dpre, bias_dtype in ((True, F32), (True, None), (False, dtype)):
        torch.library.opcheck(
            linear_activation.backward_op.registered, (dout, pre, "silu", want_dpre, bias_dtype)
        )
    torch.library.opcheck(linear_activation.backward_op.registered, (dout.T, pre.T, "relu", True, None))


def two_linears(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """With an activation and without, in training and in evaluation, views before them."""
    out = ops.linear_activation((x * 2.0).view(1, *x.shape), weight, bias, "gelu")
    out = ops.linear_activation(out.sin(), weight.T.contiguous(), None)
    with torch.no_grad():
        detached = ops.linear_activation(x, weight, bias, "relu")
    return torch.cat([out[0], detached], dim=-1)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_linear_activation_compiles_to_one_graph_and_other_sizes_do_not_recompile(
    backend: str, device: torch.device
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(two_linears, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = torch.randn(40, 24, device=device).requires_grad_()
    bias = torch.randn(40, device=device).requires_grad_()
    with dispatch.use_backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9, 2, 70):
            x = torch.randn(rows, 24, device=device).requires_grad_()
            grad = torch.randn(rows, 64, device=device)
            results = []
            for function in (compiled, two_linears):
                out = function(x, weight, bias)
                results.append((out, *torch.autograd.grad(out, (x, weight, bias), grad)))
            for a, b in zip(*results, strict=True):
                # oneDNN's fused product isn't used in a graph.
                (assert_equivalent if backend == "torch" else assert_bits_equal)(a, b)


# --- BERT's embeddings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck_bert_embeddings(dtype: torch.dtype, full: bool, device: torch.device) -> None:
    word, position, kind = (torch.randn(rows, 24, device=device).to(dtype) for rows in (11, 9, 2))
    weight, bias = torch.randn(2, 24, device=device).unbind()
    ids, types = torch.randint(11, (7,), device=device), torch.randint(2, (7,), device=device)
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    if full:
        tables, key = (word, position, kind), dropout_key(device)
        forward = (ids, None, types, offsets, *tables, weight, bias, key, 7, 1e-12, 0.2, dtype)
    else:
        tables, key = (word, None, None), None
        forward = (ids, None, None, None, *tables, None, None, None, 7, 1e-5, 0.0, F32)
    torch.library.opcheck(embeddings.forward_op.registered, forward)
    out, mean, rstd, positions, _ = embeddings.forward_op(*forward)
    looked_up = (ids, positions if full else None, types if full else None, *tables, forward[7])
    numbers = (7, forward[12], 3 if full else -1)
    want = (True, True, True, F32, F32) if full else (True, False, False, None, None)
    torch.library.opcheck(
        embeddings.backward_op.registered,
        (torch.randn_like(out), *looked_up, mean, rstd, key, *numbers, *want),
    )


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_bert_embeddings_compiles_to_one_graph_and_other_sizes_do_not_recompile(
    backend: str, device: torch.device
) -> None:
    torch._dynamo.reset()
    given = [torch.randn(rows, 24, device=device).requires_grad_() for rows in (40, 80, 3)]
    given += [t.clone().requires_grad_() for t in torch.randn(2, 24, device=device).unbind()]

    def look_up(ids: Tensor, types: Tensor, *tables: Tensor) -> Tensor:
        return ops.bert_embeddings(ids, *tables, token_type_ids=types, padding_idx=0).sin()

    compiled = torch.compile(look_up, fullgraph=True, backend="aot_eager", dynamic=True)
    with dispatch.use_backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        # Tables' sizes are constants of the graph: no batch of the first call's is the size of one, or it is too.
        for batch, seq in ((5, 7), (4, 9), (2, 17)):
            ids, types = (torch.randint(n, (batch, seq), device=device) for n in (40, 3))
            dy, results = torch.randn(batch, seq, 24, device=device), []
            for function in (compiled, look_up):
                out = function(ids, types, *given)
                results.append((out, *torch.autograd.grad(out, given, dy)))
            for a, b in zip(*results, strict=True):
                assert_bits_equal(a, b)


# --- masked-language-model loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_opcheck_masked_lm_cross_entropy(dtype: torch.dtype, use_triton: bool, device: torch.device) -> None:
    hidden, weight = torch.randn(9, 8, device=device).to(dtype), torch.randn(40, 8, device=device).to(dtype)
    bias, scale = torch.randn(40, device=device).to(dtype), torch.randn(9, device=device)
    labels = torch.tensor([3, -100, 39, 0, -100, -100, 7, 7, 1], device=device)
    options = (-100, 4, use_triton)
    for given, wanted in (
        ((hidden, weight, bias, labels, None), (True, True, True)),
        ((hidden, weight, bias, labels, scale), (False, True, False)),
        ((hidden.T[:8, :8], weight.flip(0), None, labels[:8], None), (False, False, False)),
        ((hidden, weight, None, torch.full_like(labels, -100), None), (True, True, False)),
    ):
        torch.library.opcheck(mlm_loss.forward_op.registered, (*given, *options, *wanted))
    _, *grads = mlm_loss.forward_op(hidden, weight, bias, labels, None, *options, True, True, True)
    for dtypes in ((dtype, dtype, dtype), (F32, None, BF16), (None, None, None)):
        torch.library.opcheck(mlm_loss.backward_op.registered, (scale[0], *grads, *dtypes))


def mlm_head(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """The loss between other ops: each reduction, and a count of labels that comes from the graph."""
    hidden = (hidden * 2.0).view(1, *hidden.shape)
    labels = labels[None]
    mean = ops.masked_lm_cross_entropy(hidden, weight, bias, labels, num_items=(labels >= 0).sum() + 1)
    each = ops.masked_lm_cross_entropy(hidden.sin(), weight, None, labels, reduction="none", chunk_size=3)
    return torch.cat([mean[None], each[0]])


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_masked_lm_cross_entropy_compiles_to_one_graph_and_other_sizes_do_not_recompile(
    backend: str, device: torch.device
) -> None:
    """Nor do other numbers of masked tokens, among them none."""
    torch._dynamo.reset()
    compiled = torch.compile(mlm_head, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = torch.randn(40, 8, device=device).requires_grad_()
    bias = torch.randn(40, device=device).requires_grad_()
    with dispatch.use_backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens, masked in ((5, 2), (9, 9), (4, 0), (30, 7)):
            hidden = torch.randn(tokens, 8, device=device).requires_grad_()
            labels = torch.full((tokens,), -100, device=device)
            labels[:masked] = torch.arange(masked, device=device) * 4
            grad = torch.randn(tokens + 1, device=device)
            results = []
            for function in (compiled, mlm_head):
                out = function(hidden, weight, bias, labels)
                results.append((out, *torch.autograd.grad(out, (hidden, weight, bias), grad)))
            for a, b in zip(*results, strict=True):
                assert_bits_equal(a, b)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_opcheck_int8(dtype: torch.dtype, device: torch.device) -> None:
    x, factor = torch.randn(5, 48, device=device).to(dtype), torch.rand(48, device=device)
    torch.library.opcheck(int8.quantize_rows_op.registered, (x, factor, True))
    torch.library.opcheck(int8.quantize_rows_op.registered, (x.T, None, False))
    torch.library.opcheck(int8.quantize_tensor_op.registered, (x, factor, torch.tensor(0.1, device=device)))
    codes, scale, offset = int8.quantize_rows_op(x, None, True)
    weight, weight_scale, _ = int8.quantize_rows_op(torch.randn(40, 48, device=device), None, False)
    bias, residual = torch.randn(40, device=device), torch.randn(5, 40, device=device).to(dtype)
    for terms in ((offset, bias, residual, "gelu", dtype), (None, None, None, None, None)):
        torch.library.opcheck(int8.matmul_op.registered, (codes, weight, scale, weight_scale, *terms))
    # Sizes that aren't multiples of 16 are copied on the way in: an output must not alias that either.
    odd = (codes[:, :33], weight[:, :33], scale, weight_scale, offset, bias, None, None, F32)
    torch.library.opcheck(int8.matmul_op.registered, odd)
    if dtype != F32:
        torch.library.opcheck(int8.weight_only_op.registered, (x, weight, weight_scale, bias, "gelu"))
        torch.library.opcheck(
            int8.weight_only_op.registered, (x[:, :33], weight[:, :33], weight_scale, None, None)
        )
