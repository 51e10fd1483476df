"""What runs on the stub card (card.py): every public op, forward and backward, and whole models. No result is checked,
since kernels do nothing; launches are. Run by __main__.py in a process of its own.

Sizes are small and of few kinds: each new kernel, dtype, option or divisibility is compiled, which is what takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyaccel import dispatch, ops
from pyaccel.cost import recorder
from pyaccel.kernels.bias_act import kernels as bias_gelu_kernels
from pyaccel.kernels.layernorm import forward as layernorm_kernels
from tests.gpu_stub import card, host
from tests.gpu_stub.card import Launch

BF16 = torch.bfloat16
HIDDEN, HEADS = 64, 2

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


class Counted(TorchDispatchMode):
    """Compares the launches of each of our ops with what :mod:`pyaccel.cost.recorder` says of it."""

    # Of the others only the layers' costs are known, in which they don't occur.
    known = frozenset(
        f"pyaccel::{name}"
        for name in (
            "attention_forward",
            "attention_backward",
            "attention_probs",
            "bias_gelu_forward",
            "bias_gelu_quantize",
            "bias_gelu_backward",
            "int8_matmul",
            "int8_weight_only_matmul",
            "linear_activation_forward",
            "linear_activation_backward",
            "quantize_rows",
            "residual_layernorm_forward",
            "residual_layernorm_backward",
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += card.take_launches()
        out = func(*args, **(kwargs or {}))
        launched = card.take_launches()
        self.launches += launched
        name = func.name().split(".")[0]
        if name.startswith("pyaccel::"):
            arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (
                kwargs or {}
            )
            if name in self.known:
                expected = recorder._launches(name, arguments)
                assert len(launched) == expected, (
                    f"{name}: {expected} launches by cost/recorder.py, {launched}"
                )
            elif name != "pyaccel::masked_lm_cross_entropy_backward":  # PyTorch's products alone
                assert launched, f"{name} launched nothing"
        return out


def leaf(*shape: int, dtype: torch.dtype = BF16, device: str = "cuda") -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


def run(call: Callable[[], Any], leaves: Iterable[Tensor] = (), *, device: int = 0) -> list[Launch]:
    """The launches of a call and of the backward of its floating outputs, by the Triton kernels: counted twice, once by
    operators, once as users call it."""
    leaves = list(leaves)

    def both() -> None:
        out = call()
        outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
        if leaves:
            grads = torch.autograd.grad(outs, leaves, [torch.randn_like(t) for t in outs])
            assert all(g.device == leaf.device for g, leaf in zip(grads, leaves, strict=True))

    card.take_launches()
    with dispatch.use_backend("triton"):
        with Counted() as counted:
            both()
        counted.launches += card.take_launches()
        both()
    launched = card.take_launches()
    names = [launch.kernel for launch in launched]
    assert names, "nothing was launched"
    assert names == [launch.kernel for launch in counted.launches], "a second call launches other kernels"
    assert {launch.device for launch in launched} == {device}
    assert {launch.stream for launch in launched} == {0}
    return launched


# ---- LayerNorm, embeddings ----


@check
def residual_layernorm() -> None:
    x, residual = leaf(5, HIDDEN), leaf(5, HIDDEN)
    weight, bias, x_bias = leaf(HIDDEN), leaf(HIDDEN), leaf(HIDDEN)
    run(lambda: ops.residual_layernorm(x.detach(), residual.detach(), weight.detach(), bias.detach()))
    run(lambda: ops.residual_layernorm(x, residual, weight, bias), (x, residual, weight, bias))
    run(
        lambda: ops.residual_layernorm(
            x, residual, weight, bias, x_bias=x_bias, dropout_p=0.1, training=True, return_sum=True
        ),
        (x, residual, weight, bias, x_bias),
    )
    run(lambda: ops.residual_layernorm(x, None, weight, None, rms_norm=True), (x, weight))
    run(lambda: ops.residual_layernorm(x.detach(), None, weight.detach(), None, quantize_output=True))


@check
def long_rows_are_tiled_in_layernorm_backward() -> None:
    x, weight, bias = leaf(3, 5000), leaf(5000), leaf(5000)
    names = [
        each.kernel
        for each in run(
            lambda: ops.residual_layernorm(x, None, weight, bias, dropout_p=0.1, training=True),
            (x, weight, bias),
        )
    ]
    assert "backward_tiled_kernel" in names


@check
def bert_embeddings() -> None:
    ids = torch.randint(0, 30, (2, 6), device="cuda")
    word, position, types = leaf(30, HIDDEN), leaf(16, HIDDEN), leaf(2, HIDDEN)
    weight, bias = leaf(HIDDEN), leaf(HIDDEN)
    leaves = (word, position, types, weight, bias)
    for dropout_p in (0.0, 0.1):
        run(
            lambda dropout_p=dropout_p: ops.bert_embeddings(
                ids, word, position, types, weight, bias, dropout_p=dropout_p, training=True
            ),
            leaves,
        )


# ---- attention ----


def heads(batch: int, seq: int, *, kv_heads: int = HEADS, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Laid out as a projection gives them: [batch, seq, heads, dim], seen as [batch, heads, seq, dim]."""
    q, k, v = (leaf(batch, seq, n, dim) for n in (HEADS, kv_heads, kv_heads))
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return ops.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)


@check
def short_attention() -> None:
    q, k, v = heads(2, 24)
    keys = torch.ones(2, 24, dtype=torch.bool, device="cuda")
    run(lambda: attend(q.detach(), k.detach(), v.detach()))
    run(lambda: attend(q, k, v, key_padding_mask=keys), (q, k, v))
    run(lambda: attend(q, k, v, is_causal=True, dropout_p=0.1, return_lse=True), (q, k, v))
    bias = leaf(1, HEADS, 24, 24)
    run(lambda: attend(q, k, v, attn_mask=bias), (q, k, v, bias))
    run(lambda: attend(q, k, v, attn_mask=torch.ones(24, 24, dtype=torch.bool, device="cuda")), (q, k, v))


@check
def long_attention() -> None:
    q, k, v = heads(1, 160)
    run(lambda: attend(q.detach(), k.detach(), v.detach()))
    run(lambda: attend(q, k, v, dropout_p=0.1, return_lse=True), (q, k, v))
    bias = leaf(1, 1, 160, 160)
    run(lambda: attend(q, k, v, attn_mask=bias), (q, k, v, bias))
    q, k, v = heads(1, 160, kv_heads=1)
    run(lambda: attend(q, k, v, enable_gqa=True, window_size=(8, 8)), (q, k, v))


@check
def packed_attention() -> None:
    q, k, v = (leaf(30, HEADS, 32) for _ in range(3))
    offsets = torch.tensor([0, 20, 30], dtype=torch.int32, device="cuda")
    for dropout_p in (0.0, 0.1):
        run(
            lambda dropout_p=dropout_p: ops.varlen_attention(
                q, k, v, offsets, offsets, 20, 20, dropout_p=dropout_p, return_lse=True
            ),
            (q, k, v),
        )


@check
def attention_probs() -> None:
    q, k, v = (t.detach().transpose(1, 2) for t in heads(2, 24))
    with dispatch.use_backend("triton"):
        _, lse = ops.scaled_dot_product_attention(q, k, v, return_lse=True)
    run(lambda: ops.attention_probs(q, k, lse))


# ---- products ----


@check
def bias_gelu() -> None:
    x, bias = leaf(5, HIDDEN), leaf(HIDDEN)
    for activation in ("gelu", "silu"):
        run(lambda activation=activation: ops.bias_gelu(x, bias, activation), (x, bias))
    run(lambda: ops.bias_gelu(x.detach(), bias.detach(), quantize_output=True))


@check
def linear_activation() -> None:
    x, weight, bias = leaf(32, HIDDEN), leaf(128, HIDDEN), leaf(128)
    run(lambda: ops.linear_activation(x.detach(), weight.detach(), bias.detach(), "gelu"))
    run(lambda: ops.linear_activation(x, weight, bias, "gelu"), (x, weight, bias))


@check
def layernorm_behind_products() -> None:
    x, weight, bias, residual = leaf(32, HIDDEN), leaf(HIDDEN, HIDDEN), leaf(HIDDEN), leaf(32, HIDDEN)
    ln_weight, ln_bias = leaf(HIDDEN), leaf(HIDDEN)
    run(
        lambda: ops.linear_residual_layernorm(
            x, weight, bias, residual, ln_weight, ln_bias, dropout_p=0.1, training=True
        ),
        (x, weight, bias, residual, ln_weight, ln_bias),
    )
    weight1, bias1, weight2 = leaf(128, HIDDEN), leaf(128), leaf(HIDDEN, 128)
    run(
        lambda: ops.layernorm_mlp(x, residual, ln_weight, ln_bias, weight1, bias1, weight2, x_bias=bias),
        (x, residual, ln_weight, ln_bias, weight1, bias1, weight2, bias),
    )


@check
def masked_lm_cross_entropy() -> None:
    hidden, weight, bias = leaf(8, HIDDEN), leaf(48, HIDDEN), leaf(48)
    labels = torch.tensor([1, 2, -100, 3, -100, 4, 5, 6], device="cuda")
    run(lambda: ops.masked_lm_cross_entropy(hidden, weight, bias, labels), (hidden, weight, bias))


# ---- int8 ----


@check
def int8() -> None:
    x, weight, bias = leaf(32, HIDDEN), leaf(128, HIDDEN), leaf(128)
    factor = torch.ones(HIDDEN, device="cuda")
    with torch.no_grad():
        run(lambda: ops.quantize_per_token(x))
        run(lambda: ops.quantize_per_token_with_offset(x, factor=factor))
        run(lambda: ops.quantize_per_tensor(x, factor[0]))
        run(lambda: ops.quantize_per_channel(weight))
        with dispatch.use_backend("triton"):
            a, a_scale, a_offset = ops.quantize_per_token_with_offset(x)
            b, b_scale = ops.quantize_per_channel(weight)
        run(
            lambda: ops.int8_matmul(
                a, b, a_scale, b_scale, bias.float(), "gelu", out_dtype=BF16, a_offset=a_offset
            )
        )
        run(lambda: ops.int8_matmul(a, b, a_scale, b_scale, quantize_output=True))
        run(lambda: ops.int8_weight_only_matmul(x, b, b_scale, bias.float(), "gelu"))
    run(lambda: ops.int8_linear(x, weight, bias, "gelu"), (x, weight, bias))


# ---- devices, streams, memory ----


@check
def launches_go_to_the_device_of_the_tensors() -> None:
    """Not to the current one, and in backward neither, which runs in threads of the engine."""
    assert torch.cuda.current_device() == 0
    x, weight = leaf(5, HIDDEN, device="cuda:1"), leaf(HIDDEN, device="cuda:1")
    run(
        lambda: ops.residual_layernorm(x, None, weight, None, dropout_p=0.1, training=True),
        (x, weight),
        device=1,
    )
    run(lambda: ops.bias_gelu(x, weight), (x, weight), device=1)
    q, k, v = (leaf(2, 24, HEADS, 32, device="cuda:1") for _ in range(3))
    run(lambda: attend(q, k, v), (q, k, v), device=1)
    assert torch.cuda.current_device() == 0


@check
def launches_go_to_the_current_stream() -> None:
    x, weight = leaf(5, HIDDEN), leaf(HIDDEN)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    streams = [first, second, torch.cuda.current_stream()]
    with dispatch.use_backend("triton"):  # the first launch compiles, and the others are by its plan
        for stream in streams:
            with torch.cuda.stream(stream):
                ops.residual_layernorm(x, None, weight, None)
    launched = card.take_launches()
    assert [(each.device, each.stream) for each in launched] == [(0, each.cuda_stream) for each in streams]


@check
# ---- whole models ----


def small_bert(name: str = "BertForMaskedLM") -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    return getattr(transformers, name)(config).to(BF16).to("cuda")


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 48, (2, 24), device="cuda")
    mask = torch.ones(2, 24, dtype=torch.long, device="cuda")
    mask[1, 20:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def kernels(launched: list[Launch]) -> list[str]:
    return sorted({each.kernel for each in launched})


@check
def accelerate_and_restore() -> None:
    import pyaccel

    model = small_bert("BertModel").eval()
    for packing in (True, False):
        report = pyaccel.accelerate(model, packing=packing)
        card.take_launches()
        with torch.inference_mode():
            model(**batch())
        launched = card.take_launches()
        assert not report.refused["padded"], report.refused["padded"]
        names = [each.kernel for each in launched]
        # Two layers, each with attention, two LayerNorms and a GELU.
        assert names.count("forward_short_kernel") == 2, names
        assert len(names) >= 8, names
        pyaccel.restore(model)
        with torch.inference_mode():
            model(**batch())
        assert card.take_launches() == [], "the restored model launches kernels of ours"


@check
def accelerated_training_step() -> None:
    import pyaccel

    model = small_bert().train()
    pyaccel.accelerate(model)
    given = batch()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for _ in range(2):
        card.take_launches()
        model(**given, labels=given["input_ids"]).loss.backward()
        names = [each.kernel for each in card.take_launches()]
        assert names.count("forward_short_kernel") == 2, names
        assert names.count("backward_short_kernel") == 2, names
        assert all(p.grad is not None and p.grad.device == p.device for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()


@check
def gradient_checkpointing_is_kept() -> None:
    import pyaccel

    model = small_bert("BertModel").train()
    pyaccel.accelerate(model)
    for runs in (1, 2):  # of each layer's forward
        card.take_launches()
        model(**batch()).last_hidden_state.float().sum().backward()
        names = [each.kernel for each in card.take_launches()]
        assert names.count("forward_short_kernel") == 2 * runs, names
        model.gradient_checkpointing_enable()


@check
def accelerated_by_a_cuda_graph() -> None:
    import pyaccel

    model = small_bert("BertModel").eval()
    pyaccel.accelerate(model, cuda_graphs=True)
    given = batch()
    with torch.inference_mode():
        before = len(card.Graph.captured)
        model(**given)
        (graph,) = card.Graph.captured[before:]
        names = [each.kernel for each in graph.launches]
        assert names.count("forward_short_kernel") == 2, names
        (stream,) = {each.stream for each in graph.launches}
        assert stream != 0
        replays = graph.replays
        card.take_launches()
        model(**given)
        assert (graph.replays, len(card.Graph.captured)) == (replays + 1, before + 1)
        # The layers are in the graph; the embeddings before it are not.
        assert "forward_short_kernel" not in kernels(card.take_launches())


@check
def our_bert() -> None:
    from pyaccel.models.bert import BertConfig, BertModel

    config = BertConfig(
        vocab_size=48, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config).to(BF16).to("cuda")
    given = batch()
    card.take_launches()
    model.train()(**given).last_hidden_state.float().sum().backward()
    names = [each.kernel for each in card.take_launches()]
    assert names.count("forward_short_kernel") == 2 == names.count("backward_short_kernel"), names
    with torch.inference_mode():
        model.eval()(**given)
    assert card.take_launches()


# ---- host time ----


@check
def fewer_calls_than_stock() -> None:
    """Of Python and C functions, in one call of a 12-layer BERT. PyTorch's own backward calls none, ours some."""
    found = host.counted()
    forward, step = found["forward"], found["training step"]
    assert forward["accelerated"] < 0.65 * forward["stock"], forward
    assert forward["accelerated"] < 2120, forward
    assert step["accelerated"] < 5370, step
    assert host.counted_by_graph() <= 500


@check
def plans_are_as_exact_as_triton() -> None:
    """Arguments that Triton compiles for apart never share a plan, and a plan launches what Triton would launch."""
    from pyaccel.kernels.common.launch import Launcher, can_plan

    assert can_plan()
    kernel = bias_gelu_kernels.forward_kernel
    base = torch.zeros(64 * 80 + 16, dtype=BF16, device="cuda")
    aligned, unaligned = base[: 64 * 64].view(64, 64), base[1 : 64 * 64 + 1].view(64, 64)
    out, bias = torch.empty_like(aligned), torch.zeros(64, dtype=BF16, device="cuda")
    wide = base[: 64 * 80].view(64, 80)[:, :64]  # rows a multiple of 16 apart; the next ones aren't
    odd = base[: 64 * 65].view(64, 65)[:, :64]
    single = base[:64].view(64, 1)
    launcher = Launcher(kernel)
    cases = [
        (x, b, rows, warps)
        for x in (aligned, unaligned, wide, odd, single, aligned.float())
        for b in (bias, None, base[1:65], bias.float())
        for rows in (1, 16, 17, 2**31)
        for warps in (1, 4)
    ]
    compiled: dict[int, set[int]] = {}
    for x, b, rows, warps in cases:
        args, constants = (out, x, b, *x.stride(), rows, 64), ("relu", 1, 64)
        before = set(launcher._plans)
        launcher(x, 1, args, constants, warps)  # makes a plan, or takes one
        chosen = kernel[(1,)](*args, *constants, num_warps=warps)
        card.take_launches()
        launcher(x, 1, args, constants, warps)
        (launch,) = card.take_launches()
        assert launch.threads == 32 * warps
        (key,) = set(launcher._plans) - before or {None}
        plans = [plan for plan in launcher._plans.values() if plan.head[0] == chosen.function]
        assert plans, "no plan launches what Triton launches"
        if key is not None:
            assert launcher._plans[key].head[0] == chosen.function
        compiled.setdefault(id(chosen), set()).add(chosen.function)
    assert len(launcher._plans) == len(compiled)


@check
def hooks_see_every_launch() -> None:
    from triton import knobs

    x, weight = leaf(5, HIDDEN).detach(), leaf(HIDDEN).detach()

    def call() -> None:
        with dispatch.use_backend("triton"):
            ops.residual_layernorm(x, None, weight, None)

    call()
    entered: list[Any] = []
    hook = entered.append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        call()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(entered) == 1
    call()
    assert len(entered) == 1
    kernel = layernorm_kernels.forward_kernel
    kernel.add_pre_run_hook(lambda *args, **options: entered.append(args))
    try:
        call()
    finally:
        kernel.pre_run_hooks.clear()
    assert len(entered) == 2
