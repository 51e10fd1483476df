"""The masked-language-model loss: the public function against the fp64 truth, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyaccel import dispatch, ops, reference, triton_support
from pyaccel.errors import NotSupportedError
from pyaccel.ops.mlm_loss import chunked as registered
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_equivalent
from tests.pairwise import pairwise

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
OUR_BACKENDS = ("triton", "torch")

CASES = pairwise(
    {
        "backend": dispatch.BACKENDS,
        "dtype": [F32, BF16, F16],
        # Tokens, vocabulary, hidden size: one tile, one that is filled, several, rows wider than their vocabulary.
        "size": [(31, 2, 3), (7, 1, 3), (7, 100, 5), (3, 1024, 8), (5, 4500, 8), (90, 70, 16)],
        "reduction": ["mean", "sum", "none"],
        "has_bias": [True, False],
        "num_items": [None, 5, "tensor"],
        "chunk_size": [None, 1, 8],
    },
    lambda case: (
        not (case.get("num_items") is not None and case.get("reduction", "mean") != "mean")
        and not (case.get("chunk_size") == 1 and case.get("size", (0,))[0] == 90)
    ),
)


def label(case: dict[str, Any]) -> str:
    return "-".join(str(value).replace("torch.", "").replace(" ", "") for value in case.values())


def call(*args: Any, backend: str = "triton", **options: Any) -> Tensor:
    with dispatch.use_backend(backend):
        return ops.masked_lm_cross_entropy(*args, **options)


def inputs(
    size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, has_bias: bool = True
) -> tuple[list[Tensor], Tensor]:
    """Hidden, weight, bias; labels of which every third or so is ignored. Some tokens have logits far apart."""
    tokens, vocab, n_hidden = size
    hidden = torch.randn(tokens, n_hidden, device=device) + 0.3
    hidden[::4] *= 8.0
    weight = torch.randn(vocab, n_hidden, device=device) * n_hidden**-0.5 * 2 + 0.1
    bias = [torch.randn(vocab, device=device)] if has_bias else []
    labels = torch.randint(0, vocab, (tokens,), device=device)
    labels[1::3] = -100
    labels[:1] = vocab - 1
    return [t.to(dtype) for t in (hidden, weight, *bias)], labels


def leaves(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]


def both(tensors: list[Tensor]) -> list[Tensor | None]:
    """Hidden, weight and a bias that may be missing."""
    return [*tensors, None][:3]


def run(
    kind: str, tensors: list[Tensor], labels: Tensor, grad: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """The loss and all gradients: of a backend, of the "truth" or "naive"."""
    given = leaves(tensors, F64 if kind == "truth" else None)
    if kind in ("truth", "naive"):
        options.pop("chunk_size", None)
        loss = reference.masked_lm_cross_entropy(*both(given), labels, upcast=kind == "truth", **options)
    else:
        loss = call(*both(given), labels, backend=kind, **options)
    grad = torch.full_like(loss, 0.7) if grad is None else grad
    return [loss, *torch.autograd.grad(loss, given, grad.to(loss.dtype))]


def assert_right(
    ours: list[Tensor],
    kind: str,
    tensors: list[Tensor],
    labels: Tensor,
    grad: Tensor | None = None,
    **options: Any,
) -> None:
    """Gradients are judged by the policy, and so is each token's loss: of one sum, errors may cancel by luck."""
    truth, naive = (run(name, tensors, labels, grad, **options) for name in ("truth", "naive"))
    for name, a, b, c in zip(("dhidden", "dweight", "dbias"), ours[1:], truth[1:], naive[1:], strict=False):
        assert_close_to_truth(a, b, c, name=name)
    each = {**options, "reduction": "none", "num_items": None}
    losses, true_losses, naive_losses = (
        run(name, tensors, labels, **each)[0].detach() for name in (kind, "truth", "naive")
    )
    assert_close_to_truth(losses, true_losses, naive_losses, name="losses")
    if ours[0].ndim == 0:
        total = losses.double().sum()
        if options.get("reduction", "mean") == "mean":
            n_labels = int((labels != options.get("ignore_index", -100)).sum())
            given = options.get("num_items")
            total /= max(n_labels if given is None else int(given), 1)
        losses = total.to(losses.dtype)
    assert_equivalent(ours[0], losses, name="loss")


@pytest.mark.parametrize("case", CASES, ids=label)
def test_loss_and_gradients_are_as_right_as_plain_torch(
    case: dict[str, Any], device: torch.device, poison: None
) -> None:
    tensors, labels = inputs(case["size"], case["dtype"], device, case["has_bias"])
    num_items = torch.tensor(9, device=device) if case["num_items"] == "tensor" else case["num_items"]
    options = {"reduction": case["reduction"], "num_items": num_items, "chunk_size": case["chunk_size"]}
    none = case["reduction"] == "none"
    grad = torch.randn(labels.shape, device=device) + 0.3 if none else None
    ours = run(case["backend"], tensors, labels, grad, **options)
    assert ours[0].shape == (labels.shape if none else ())
    wide = torch.promote_types(case["dtype"], F32)
    assert [t.dtype for t in ours] == [wide, *(t.dtype for t in tensors)]
    assert_right(ours, case["backend"], tensors, labels, grad, **options)


@pytest.mark.parametrize("backend", OUR_BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
def test_a_token_at_a_time(dtype: torch.dtype, backend: str, device: torch.device, poison: None) -> None:
    """Judged together: the error of one number says nothing."""
    tensors, labels = inputs((30, 40, 6), dtype, device)
    tokens = [slice(i, i + 1) for i in range(30)]
    results = [
        [run(kind, [tensors[0][i], *tensors[1:]], labels[i], reduction="sum") for i in tokens]
        for kind in (backend, "truth", "naive")
    ]
    for name, part in (("losses", 0), ("dhidden", 1)):
        assert_close_to_truth(*(torch.stack([r[part] for r in of]) for of in results), name=name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp64_by_finite_differences(reduction: str, device: torch.device) -> None:
    """They need fp64 all the way: at steps of 1e-6 a rounding to fp32 is a tenth of the difference."""
    tensors, labels = inputs((5, 11, 3), F64, device)
    options = {"reduction": reduction, "backend": "torch", "chunk_size": 2}
    assert torch.autograd.gradcheck(lambda *t: call(*t, labels, **options), leaves(tensors))
    truth = reference.masked_lm_cross_entropy(*tensors, labels, reduction=reduction)
    assert_equivalent(call(*tensors, labels, **options), truth)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens_or_none_that_counts(
    reduction: str, backend: str, device: torch.device, poison: None
) -> None:
    """F.cross_entropy's mean is NaN there, and one such micro-batch would poison the whole step."""
    for tokens in (0, 1, 7):
        tensors, labels = inputs((tokens, 20, 6), F32, device)
        results = run(backend, tensors, labels.fill_(3), reduction=reduction, ignore_index=3)
        assert results[0].shape == (labels.shape if reduction == "none" else ())
        for found, like in zip(results[1:], tensors, strict=True):
            assert found.shape == like.shape
        assert not any(t.any() or t.isnan().any() for t in results)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_token_counts_and_any_index_can_be_ignored(
    reduction: str, backend: str, device: torch.device
) -> None:
    tensors, labels = inputs((13, 33, 6), F32, device)
    labels = labels.clamp(min=0)
    labels[5], labels[6] = 7, 0
    for ignore_index in (-100, 0, 7, 32, 1000):
        options = {"reduction": reduction, "ignore_index": ignore_index, "chunk_size": 4}
        ours = run(backend, tensors, labels, **options)
        assert_right(ours, backend, tensors, labels, **options)
        if reduction == "none":
            assert_bits_equal(ours[0] == 0, labels == ignore_index)


@pytest.mark.parametrize("backend", OUR_BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
def test_micro_batches_add_up_to_the_batch(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Divided by the step's count of labels; shares of unlike size, one of which holds no label at all."""
    tensors, labels = inputs((40, 50, 8), dtype, device)
    labels[20:27] = -100
    n_labels = (labels != -100).sum()
    for count in (n_labels, int(n_labels)):
        given = leaves(tensors)
        loss = torch.zeros((), device=device)
        for part in (slice(0, 3), slice(3, 20), slice(20, 27), slice(27, 40)):
            hidden, *parameters = given
            share = call(hidden[part], *parameters, labels[part], num_items=count, backend=backend)
            share.backward()
            loss += share.detach()
        assert_right([loss, *(t.grad for t in given)], backend, tensors, labels, torch.ones_like(loss))


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_micro_batches_add_up_bit_for_bit_where_sums_are_exact(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Each of 16 words has probability 1/16, and the step 8 labels: nothing but a wrong divisor could differ."""
    hidden = torch.randint(-2, 3, (12, 4), device=device).to(dtype)
    weight, bias = torch.zeros(16, 4, device=device, dtype=dtype), torch.ones(16, device=device, dtype=dtype)
    labels = torch.tensor([3, -100, 0, 15, 3, -100, -100, 8, 9, 9, -100, 1], device=device)
    whole = run(backend, [hidden, weight, bias], labels)
    given = leaves([hidden, weight, bias])
    for part in (slice(0, 2), slice(2, 7), slice(7, 12)):
        share = call(given[0][part], *given[1:], labels[part], num_items=8, backend=backend)
        (share * torch.full_like(share, 0.5)).backward()
    halves = run(backend, [hidden, weight, bias], labels, torch.tensor(0.5))
    assert whole[2].any()
    for name, t, expected in zip(("dhidden", "dweight", "dbias"), given, halves[1:], strict=True):
        assert_bits_equal(t.grad, expected, name=name)


@pytest.mark.parametrize("backend", OUR_BACKENDS)
def test_chunks_of_any_size(backend: str, device: torch.device) -> None:
    tensors, labels = inputs((30, 100, 8), F32, device)
    for chunk_size in (1, 3, 19, 20, 21, 10**9):
        ours = run(backend, tensors, labels, chunk_size=chunk_size)
        assert_right(ours, backend, tensors, labels, chunk_size=chunk_size)


@pytest.mark.parametrize("view", ["transposed", "sliced", "every_second", "expanded"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", OUR_BACKENDS)
def test_strided_inputs_and_gradients(backend: str, reduction: str, view: str, device: torch.device) -> None:
    strided = {
        "transposed": lambda t: t[:64, :6].t(),
        "sliced": lambda t: t[:6, 3:67],
        "every_second": lambda t: t[:12:2, :128:2],
        "expanded": lambda t: t[:1, :64].expand(6, 64),
    }[view]
    base = torch.randn(130, 130, device=device)
    hidden = strided(base)
    weight = (strided(base + 1.0).t() @ base[:6, :6])[:, :6] if view == "expanded" else base.t()[2::2, ::2]
    weight = weight[:64, :64] if weight.shape[1] >= 64 else weight
    bias = base[:, 3][:128:2]
    labels = torch.randint(0, 64, (6, 2), device=device)[:, 1]
    labels[2] = -100
    if weight.shape[1] != 64:
        hidden = hidden[:, :6]
    grad = {"mean": base[0, 0], "none": base[:6, 5]}[reduction]
    results = []
    for copy in (False, True):
        given = [t.contiguous() if copy else t for t in (hidden, weight, bias)]
        given = [t.detach().requires_grad_() for t in given]
        loss = call(*given, labels.contiguous() if copy else labels, reduction=reduction, backend=backend)
        results.append([loss, *torch.autograd.grad(loss, given, grad.contiguous() if copy else grad)])
    for name, a, b in zip(("loss", "dhidden", "dweight", "dbias"), *results, strict=True):
        # A matrix product may take another way through a transposed operand.
        assert_equivalent(a, b, name=name)


@pytest.mark.parametrize("backend", OUR_BACKENDS)
def test_a_gradient_of_stride_zero(backend: str, device: torch.device) -> None:
    tensors, labels = inputs((11, 40, 6), F32, device)
    given = leaves(tensors)
    loss = call(*given, labels, reduction="none", backend=backend)
    expanded = torch.autograd.grad(loss.sum(), given)
    one = torch.tensor(1.0, device=device)
    whole = run(backend, tensors, labels, torch.ones_like(loss), reduction="none")[1:]
    of_sum = run(backend, tensors, labels, one, reduction="sum")[1:]
    for a, b, c in zip(expanded, whole, of_sum, strict=True):
        assert_bits_equal(a, b)
        assert_equivalent(a, c)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_leading_dimensions_are_tokens(backend: str, device: torch.device) -> None:
    tensors, labels = inputs((12, 30, 8), F32, device)
    hidden, *parameters = tensors
    flat = call(hidden, *parameters, labels, reduction="none", backend=backend)
    shaped = call(
        hidden.view(3, 2, 2, 8), *parameters, labels.view(3, 2, 2), reduction="none", backend=backend
    )
    assert_bits_equal(shaped, flat.view(3, 2, 2))
    mean = call(hidden.view(3, 4, 8), *parameters, labels.view(3, 4), backend=backend)
    assert_bits_equal(mean, call(hidden, *parameters, labels, backend=backend))
    # A token alone, and a batch whose sequence isn't outermost in memory.
    alone = call(hidden[0], *parameters, labels[0], reduction="none", backend=backend)
    assert alone.shape == ()
    assert_equivalent(alone, flat[0])
    swapped = call(
        hidden.view(3, 4, 8).transpose(0, 1), *parameters, labels.view(3, 4).t(), reduction="none", backend=backend
    )  # fmt: skip
    assert_equivalent(swapped, flat.view(3, 4).t())


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_ignored_does_not_leak(reduction: str, backend: str, device: torch.device) -> None:
    tensors, labels = inputs((10, 40, 6), F32, device)
    ignored = labels == -100
    clean = run(backend, tensors, labels, reduction=reduction)
    dirty = [tensors[0].clone(), *tensors[1:]]
    dirty[0][ignored] = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device).repeat(2)
    found = run(backend, dirty, labels, reduction=reduction)
    for a, b in zip(found, clean, strict=True):
        assert_bits_equal(a, b)
    assert not found[1][ignored].any()


@pytest.mark.parametrize("backend", OUR_BACKENDS)
def test_nan_stays_in_its_token(backend: str, device: torch.device) -> None:
    tensors, labels = inputs((10, 40, 6), F32, device)
    clean = run(backend, tensors, labels, reduction="none")
    tensors[0][3, 2] = float("nan")
    loss, dhidden, dweight, _ = run(backend, tensors, labels, reduction="none")
    others = torch.arange(10, device=device) != 3
    assert loss[3].isnan()
    assert dhidden[3].isnan().all()
    assert dweight.isnan().any()
    assert_bits_equal(loss[others], clean[0][others])
    assert_bits_equal(dhidden[others], clean[1][others])


@pytest.mark.parametrize("backend", OUR_BACKENDS)
def test_two_runs_give_the_same_bits(backend: str, device: torch.device) -> None:
    for dtype in (F32, BF16):
        tensors, labels = inputs((40, 70, 16), dtype, device)
        for reduction in ("mean", "none"):
            runs = [run(backend, tensors, labels, reduction=reduction, chunk_size=8) for _ in range(2)]
            for a, b in zip(*runs, strict=True):
                assert_bits_equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_needed_gets_a_gradient(reduction: str, device: torch.device) -> None:
    tensors, labels = inputs((9, 40, 6), F32, device)
    expected = run("triton", tensors, labels, reduction=reduction)
    for wanted in ((0,), (1,), (2,), (0, 2), ()):
        given = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        loss = call(*given, labels, reduction=reduction)
        assert loss.requires_grad == bool(wanted)
        assert_bits_equal(loss.detach(), expected[0].detach())
        if wanted:
            loss.backward(torch.full_like(loss, 0.7))
        for i, t in enumerate(given):
            assert (t.grad is None) == (i not in wanted)
            if i in wanted:
                assert_bits_equal(t.grad, expected[1 + i])
    with torch.no_grad():
        assert not call(*leaves(tensors), labels, reduction=reduction).requires_grad


def test_in_the_op_what_is_not_wanted_has_no_elements(device: torch.device) -> None:
    tensors, labels = inputs((9, 40, 6), F32, device)
    for wanted in ((True, False, False), (False, True, True), (False, False, False)):
        _, *grads = registered.forward_op(*tensors, labels, None, -100, 4, True, *wanted)
        assert [t.numel() for t in grads] == [w * n for w, n in zip(wanted, (54, 240, 40), strict=True)]


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_nothing_is_rounded_between_chunks_nor_before_it_is_scaled(
    dtype: torch.dtype, use_triton: bool, device: torch.device
) -> None:
    labels = torch.arange(40, device=device) % 7
    hidden, weight = torch.zeros(40, 6, device=device).to(dtype), torch.randn(30, 6, device=device).to(dtype)
    bias = torch.randn(30, device=device).to(dtype)
    parts, whole = (
        registered.forward_op(hidden, weight, bias, labels, None, -100, size, use_triton, True, True, True)[3]
        for size in (3, 40)
    )
    assert parts.dtype == F32
    assert_equivalent(parts, whole)
    grads = [torch.randn(9, 6, device=device).to(dtype), torch.randn(30, 6, device=device), whole]
    dloss = torch.tensor(0.7, device=device)
    for found, grad in zip(registered.backward_op(dloss, *grads, dtype, dtype, F32), grads, strict=True):
        assert_bits_equal(found, (grad.float() * 0.7).to(found.dtype))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", OUR_BACKENDS)
def test_gradient_checkpointing(backend: str, reduction: str, device: torch.device) -> None:
    tensors, labels = inputs((9, 40, 6), F32, device)
    results = []
    for checkpointed in (False, True):
        given = leaves(tensors)
        options = {"reduction": reduction, "backend": backend}
        if checkpointed:
            loss = checkpoint(call, *given, labels, use_reentrant=False, **options)
        else:
            loss = call(*given, labels, **options)
        results.append([loss, *torch.autograd.grad(loss, given, torch.full_like(loss, 0.7))])
    for a, b in zip(*results, strict=True):
        assert_bits_equal(a, b)


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast(device.type, dtype):
        yield


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "dtypes", [(F32, F32, F32), (BF16, F32, F32), (BF16, BF16, F32), (F16, F32, BF16)], ids=str
)
def test_autocast_takes_every_mix_of_dtypes(
    dtypes: tuple[torch.dtype, ...], reduction: str, backend: str, device: torch.device
) -> None:
    tensors, labels = inputs((19, 60, 12), F32, device)
    tensors = [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    results = {}
    for kind in ("ours", "truth", "naive"):
        given = leaves(tensors, F64 if kind == "truth" else None)
        for each in dict.fromkeys(("none", reduction)):
            if kind == "ours":
                with autocast(device, BF16):
                    loss = call(*given, labels, reduction=each, backend=backend)
            else:
                # What plain torch makes of it under autocast: logits in bf16, their loss in fp32.
                cast = given if kind == "truth" else [t.to(BF16) for t in given]
                loss = reference.masked_lm_cross_entropy(
                    *cast, labels, reduction=each, upcast=kind == "truth"
                )
            results[kind, each] = [loss, *torch.autograd.grad(loss, given, torch.full_like(loss, 0.7))]
    ours = results["ours", reduction]
    assert [t.dtype for t in ours] == [F32, *dtypes]
    for i, name in enumerate(("losses", "dhidden", "dweight", "dbias")):
        of = "none" if i == 0 else reduction  # of a mean, errors may cancel by luck
        assert_close_to_truth(*(results[kind, of][i] for kind in ("ours", "truth", "naive")), name=name)
    if reduction == "mean":
        assert_equivalent(ours[0], results["ours", "none"][0].sum() / (labels != -100).sum())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_leaves_fp64_alone(reduction: str, device: torch.device) -> None:
    tensors, labels = inputs((9, 30, 6), F64, device)
    plain = run("torch", tensors, labels, reduction=reduction)
    with autocast(device, BF16):
        for a, b in zip(run("torch", tensors, labels, reduction=reduction), plain, strict=True):
            assert_bits_equal(a, b)


@pytest.mark.parametrize("backend", OUR_BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_scaler_saves_the_small_gradients(
    reduction: str, backend: str, device: torch.device
) -> None:
    """Shares of 1 / 10^6 in fp16 lie below its smallest number unless the scale comes before the rounding."""
    tensors, labels = inputs((9, 40, 6), F16, device)
    given = leaves(tensors)
    loss = call(*given, labels, reduction=reduction, backend=backend)
    grad = torch.full_like(loss, 1e-6 * 65536.0)
    found = [loss, *torch.autograd.grad(loss, given, grad)]
    assert_right(found, backend, tensors, labels, grad, reduction=reduction)
    assert (found[2].abs() > 0).float().mean() > 0.9


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_double_backward_says_what_to_do(reduction: str, device: torch.device) -> None:
    tensors, labels = inputs((5, 30, 6), F32, device)
    given = leaves(tensors)
    loss = call(*given, labels, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, given[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward.*use_backend\('reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", OUR_BACKENDS)
def test_a_label_outside_the_vocabulary_is_an_error_at_once_on_a_cpu(backend: str) -> None:
    tensors, labels = inputs((6, 30, 4), F32, torch.device("cpu"))
    labels = labels.clamp(min=0)
    if not triton_support.interpreting() and backend == "triton":
        backend = "reference"
    for wrong in (30, -1, -101):
        labels[2] = wrong
        with pytest.raises(ValueError, match=rf"between 0 and 29, the last of the vocabulary, got {wrong}$"):
            call(*tensors, labels, backend=backend)
    assert call(*tensors, labels, backend=backend, ignore_index=-101).isfinite()


def test_a_count_without_a_value_is_refused(device: torch.device) -> None:
    tensors, labels = inputs((6, 30, 4), F32, device)
    for backend in ("auto", "torch", "reference"):
        with dispatch.use_backend(backend), pytest.raises(ValueError, match="num_items is on meta"):
            ops.masked_lm_cross_entropy(*tensors, labels, num_items=torch.empty((), device="meta"))


def test_every_bad_argument_is_named_in_one_error(device: torch.device) -> None:
    tensors, labels = inputs((6, 30, 4), F32, device)
    hidden, weight, bias = tensors
    with pytest.raises(
        ValueError,
        match=r"bias must be \[30\].*labels must be \(6,\), the leading.*got \(5,\); labels must be int64.*"
        r"must have one dtype, got bfloat16, float32.*unknown reduction 'average'.*num_items is what a mean.*"
        r"num_items must be a count, at least 0, got -1; chunk_size must be at least 1, got 0",
    ):
        ops.masked_lm_cross_entropy(
            hidden, weight, bias[:3].bfloat16(), labels[:5].int(), reduction="average", num_items=-1, chunk_size=0
        )  # fmt: skip
    for bad in (hidden[:, :3], hidden[:, :0], hidden[0, 0]):
        with pytest.raises(ValueError, match=r"hidden must be \[\.\.\., hidden_size\] and weight"):
            ops.masked_lm_cross_entropy(bad, weight, bias, labels)
    with pytest.raises(ValueError, match="floating dtype, got int64"):
        ops.masked_lm_cross_entropy(hidden.long(), weight.long(), None, labels)
    with pytest.raises(ValueError, match=r"a number or a 0-dim tensor, got \(1,\)"):
        ops.masked_lm_cross_entropy(hidden, weight, bias, labels, num_items=labels[:1])
    with pytest.raises(ValueError, match="at least 0, got nan"):
        ops.masked_lm_cross_entropy(hidden, weight, bias, labels, num_items=float("nan"))
    with pytest.raises(ValueError, match="weight is on meta and hidden on"):
        ops.masked_lm_cross_entropy(hidden, weight.to("meta"), bias, labels)


def test_the_backend_is_torch_on_a_cpu_and_the_one_asked_for_is_used_or_refused(device: torch.device) -> None:
    tensors, labels = inputs((6, 30, 4), F32, torch.device("cpu"))
    with dispatch.record() as choices:
        ops.masked_lm_cross_entropy(*tensors, labels)
        for backend in ("torch", "reference"):
            call(*tensors, labels, backend=backend)
        call(*(t.to(device) for t in tensors), labels.to(device))
    assert [choice.backend for choice in choices] == ["torch", "torch", "reference", "triton"]
    assert choices[0].reason == "on the CPU"
    with pytest.raises(NotSupportedError, match=r"the kernels take float32.*not float64"):
        call(*(t.to(device).double() for t in tensors), labels.to(device))
