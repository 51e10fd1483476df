"""BERT's embeddings: the public function against the fp64 truth, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyaccel import dispatch, ops, reference
from pyaccel.errors import NotSupportedError
from pyaccel.ops import bert_embeddings as public
from pyaccel.ops.dropout import dropout_key
from pyaccel.ops.embeddings.triton import forward_op
from pyaccel.reference.embeddings import packed_positions
from pyaccel.reference.philox import keep_mask
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_statistic
from tests.pairwise import pairwise

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("word", "position", "type", "weight", "bias")
VOCAB, POSITIONS, TYPES = 40, 16, 3

DTYPES = {
    "fp32": (F32, F32), "bf16": (BF16, BF16), "fp16": (F16, F16), "bf16 tables": (BF16, F32), "fp32 tables": (F32, F16),
}  # fmt: skip
# kind of ids -> shape, lengths of packed sequences
IDS: dict[str, tuple[tuple[int, ...], list[int]]] = {
    "one": ((1, 1), []),
    "padded": ((3, 7), []),
    "positions [seq]": ((3, 7), []),
    "positions [1, seq]": ((3, 7), []),
    "positions [batch, seq]": ((3, 7), []),
    "packed": ((39,), [7, 0, 12, 1, 16]),
    "packed, positions": ((5,), []),
}
CASES = pairwise(
    {
        "ids": list(IDS),
        "hidden": [1, 17, 768, 2050],
        "dtypes": list(DTYPES),
        "dropout_p": [0.0, 0.3],
        "absent": [(), ("position",), ("type",), ("bias",), ("weight", "bias")],
        "types": [True, False],
        "id_dtype": [torch.int64, torch.int32],
        "padding_idx": [None, 2, -1],
    },
    # Long rows take the interpreter long; tests/kernels has more of them.
    lambda case: case.get("hidden") != 2050 or case.get("ids", "one") in ("one", "packed, positions"),
)


def make(case: dict[str, Any], device: torch.device) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Tables and parameters that matter (a large row, a tiny one, parameters not 1 and 0), and ids with repetitions."""
    shape, lengths = IDS[case["ids"]]
    hidden, (table_dtype, parameter_dtype) = case["hidden"], DTYPES[case["dtypes"]]
    tables = {
        "word": torch.randn(VOCAB, hidden, device=device)
        + torch.linspace(-2, 3, VOCAB, device=device)[:, None],
        "position": torch.randn(POSITIONS, hidden, device=device) * 0.5 - 1,
        "type": torch.randn(TYPES, hidden, device=device) + 0.3,
    }
    tables["word"][1] += 20.0
    parameters = {
        "weight": torch.randn(hidden, device=device) + 0.5,
        "bias": torch.randn(hidden, device=device) * 2,
    }
    given = {n: t.to(table_dtype) for n, t in tables.items()}
    given.update({n: t.to(parameter_dtype) for n, t in parameters.items()})
    tensors = {n: None if n in case["absent"] else given[n] for n in NAMES}
    options: dict[str, Any] = {"input_ids": torch.randint(VOCAB, shape, device=device)}
    options["input_ids"].view(-1)[::3] = VOCAB - 1
    if case["types"] and tensors["type"] is not None:
        options["token_type_ids"] = torch.randint(TYPES - 1, shape, device=device)
    if tensors["position"] is not None and "positions" in case["ids"]:
        seq = shape[-1]
        of = {"positions [seq]": (seq,), "positions [1, seq]": (1, seq)}.get(case["ids"], shape)
        options["position_ids"] = torch.randint(POSITIONS, of, device=device)
    options = {n: t.to(case["id_dtype"]) for n, t in options.items()}
    if lengths:
        offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
        options["cu_seqlens"] = offsets.to(torch.int32)
    return tensors, options


def leaves(tensors: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    return {
        n: None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for n, t in tensors.items()
    }


def with_gradients(out: Tensor, tensors: dict[str, Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    given = {n: t for n, t in tensors.items() if t is not None}
    grads = torch.autograd.grad(out, list(given.values()), dy.to(out.dtype))
    return {"out": out.detach(), **{f"d{n}": g for n, g in zip(given, grads, strict=True)}}


def run(backend: str, tensors: dict[str, Tensor | None], options: dict[str, Any], **more: Any) -> Tensor:
    options = {**options, **more}
    ids = options.pop("input_ids")
    with dispatch.use_backend(backend):
        return ops.bert_embeddings(ids, *(tensors[n] for n in NAMES), **options)


@pytest.mark.parametrize("backend", ["triton", "reference", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_output_and_gradients_are_as_right_as_plain_torch(
    case: dict[str, Any], backend: str, device: torch.device, poison: None, seed: int
) -> None:
    p = 0.0 if backend == "torch" else case["dropout_p"]  # F.dropout draws its own mask
    eps = 1e-3 if case["hidden"] < 20 else 1e-12
    tensors, options = make(case, device)
    dy = torch.randn(*options["input_ids"].shape, case["hidden"], device=device) + 0.3
    padding_idx = case["padding_idx"]
    ours = leaves(tensors)
    torch.manual_seed(seed)
    out = run(backend, ours, options, eps=eps, dropout_p=p, training=True, padding_idx=padding_idx)
    assert out.dtype == DTYPES[case["dtypes"]][0]
    dy = dy.to(out.dtype).float()
    got = with_gradients(out, ours, dy)
    torch.manual_seed(seed)
    key = dropout_key(device) if p else None
    expected = []
    for upcast in (True, False):
        given = leaves(tensors, torch.float64 if upcast else None)
        rest = {n: t for n, t in options.items() if n != "input_ids"}
        result = reference.bert_embeddings(
            options["input_ids"], *(given[n] for n in NAMES), **rest, eps=eps, dropout_p=p, dropout_key=key,
            padding_idx=padding_idx, upcast=upcast,
        )  # fmt: skip
        expected.append(with_gradients(result.output, given, dy))
    for name, t in got.items():
        assert_close_to_truth(t, expected[0][name], expected[1][name], name=name)
    # Rows that no token names, and the padding's, have no gradient at all.
    named = torch.zeros(VOCAB, dtype=torch.bool, device=device)
    named[options["input_ids"].flatten().long()] = True
    if padding_idx is not None:
        named[padding_idx] = False
    assert not got["dword"][~named].any()


@pytest.mark.parametrize("ids", ["padded", "packed", "positions [batch, seq]"])
def test_saved_statistics_are_fp32_numbers(ids: str, device: torch.device, poison: None) -> None:
    case = {"ids": ids, "hidden": 100, "dtypes": "bf16", "absent": (), "types": True, "id_dtype": torch.int64}
    tensors, options = make(case, device)
    flat = {n: t.reshape(-1) for n, t in options.items()}
    period = 7 if ids == "padded" else flat["input_ids"].numel()
    given = [flat.get(n) for n in ("input_ids", "position_ids", "token_type_ids", "cu_seqlens")]
    _, mean, rstd, positions, in_range = forward_op(*given, *tensors.values(), None, period, 1e-12, 0.0, BF16)
    input_ids = options.pop("input_ids")
    truth = reference.bert_embeddings(input_ids, *tensors.values(), **options)
    assert_statistic(mean, truth.mean.reshape(-1), scale=truth.sum.abs().mean(-1).reshape(-1), name="mean")
    assert_statistic(rstd, truth.rstd.reshape(-1), scale=truth.rstd.reshape(-1), name="rstd")
    assert in_range.all()
    if ids == "packed":
        assert_bits_equal(positions, packed_positions(options["cu_seqlens"], 39).int())


@pytest.mark.parametrize("p", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("hidden", [3, 2100])
def test_dropout_mask_is_the_references_bit_for_bit(
    p: float, hidden: int, device: torch.device, seed: int
) -> None:
    """With weight 0 the output is the bias where it is kept, and the bias gradient counts what is kept."""
    tokens = 9
    word = torch.randn(5, hidden, device=device)
    weight = torch.zeros(hidden, device=device)
    bias = (torch.rand(hidden, device=device) + 1.0).requires_grad_()
    ids = torch.randint(5, (tokens,), device=device)
    torch.manual_seed(seed)
    with dispatch.use_backend("triton"):
        out = ops.bert_embeddings(ids, word, None, None, weight, bias, dropout_p=p, training=True)
    torch.manual_seed(seed)
    cols = torch.arange(hidden, device=device)
    keep = keep_mask(dropout_key(device), torch.arange(tokens, device=device)[:, None], cols, p)
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    assert_bits_equal(out, torch.where(keep, bias * scale, 0.0), name="out")
    (dbias,) = torch.autograd.grad(out, bias, torch.ones_like(out))
    exact = keep.double().sum(0) * scale
    assert_close_to_truth(dbias, exact, exact.float(), name="dbias")


def test_dropout_counts_only_in_training(device: torch.device) -> None:
    word, ids = torch.randn(9, 32, device=device), torch.randint(9, (2, 3), device=device)
    for backend in dispatch.BACKENDS:
        with dispatch.use_backend(backend):
            a = ops.bert_embeddings(ids, word, word, None, None, None, dropout_p=0.9)
            b = ops.bert_embeddings(ids, word, word, None, None, None)
        assert_bits_equal(a, b, name=backend)


def small(device: torch.device, hidden: int = 24) -> dict[str, Tensor | None]:
    rows = {"word": VOCAB, "position": POSITIONS, "type": TYPES}
    tensors = {n: torch.randn(r, hidden, device=device) for n, r in rows.items()}
    return {**tensors, **{n: torch.randn(hidden, device=device) for n in ("weight", "bias")}}


@pytest.mark.parametrize("view", ["transposed", "sliced", "every second", "expanded", "offset"])
def test_strided_ids_tables_and_gradients(view: str, device: torch.device) -> None:
    strided = {
        "transposed": lambda t, rows, cols: t[:cols, :rows].t(),
        "sliced": lambda t, rows, cols: t[:rows, 3 : 3 + cols],
        "every second": lambda t, rows, cols: t[: 2 * rows : 2, : 2 * cols : 2],
        "expanded": lambda t, rows, cols: t[:1, :cols].expand(rows, cols),
        "offset": lambda t, rows, cols: t[5 : 5 + rows, 1 : 1 + cols],
    }[view]
    base = torch.randn(100, 100, device=device)
    tensors = small(device)
    for shift, (name, rows) in enumerate((("word", VOCAB), ("position", POSITIONS), ("type", TYPES))):
        tensors[name] = strided(base + shift, rows, 24)
    numbers = torch.randint(TYPES, (100, 100), device=device)
    given = {
        n: strided(numbers + i, 4, 6) % (TYPES + i) for i, n in enumerate(("token_type_ids", "input_ids"))
    }
    given["position_ids"] = strided(numbers, 4, 6)
    dy = strided(base * 2 - 1, 24, 24).as_strided((4, 6, 24), (*strided(base, 24, 24).stride()[:1] * 2, 1))
    results = []
    for copy in (False, True):
        chosen = {n: (t.contiguous() if copy else t).detach().requires_grad_() for n, t in tensors.items()}
        out = run("triton", chosen, {n: t.contiguous() if copy else t for n, t in given.items()})
        results.append(with_gradients(out, chosen, dy.contiguous() if copy else dy))
    for name, t in results[0].items():
        assert_bits_equal(t, results[1][name], name=name)


def test_a_gradient_whose_columns_lie_apart(device: torch.device) -> None:
    tensors, options = small(device), {"input_ids": torch.randint(VOCAB, (7,), device=device)}
    dy = torch.randn(tensors["weight"].shape[0], 7, device=device).t()
    options["position_ids"] = torch.arange(7, device=device) % POSITIONS
    results = []
    for grad in (dy, dy.contiguous()):
        given = leaves(tensors)
        results.append(with_gradients(run("triton", given, options), given, grad))
    for name, t in results[0].items():
        assert_bits_equal(t, results[1][name], name=name)


def test_a_gradient_of_stride_zero_and_a_cat_after_the_op(device: torch.device) -> None:
    tensors, ids = small(device), torch.randint(VOCAB, (2, 5), device=device)
    results = []
    for upcast, dtype in ((None, F32), (True, torch.float64), (False, F32)):
        given = leaves(tensors, dtype)
        if upcast is None:
            out = run("triton", given, {"input_ids": ids})
        else:
            out = reference.bert_embeddings(ids, *given.values(), upcast=upcast).output
        loss = torch.cat([out, out[:1]]).sum() + out.sum()
        results.append(torch.autograd.grad(loss, list(given.values())))
    for name, *three in zip(NAMES, *results, strict=True):
        assert_close_to_truth(*three, name=name)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_no_tokens(backend: str, shape: tuple[int, ...], device: torch.device, poison: None) -> None:
    tensors = leaves(small(device))
    options: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.int64, device=device)}
    if len(shape) == 1:
        options["cu_seqlens"] = torch.zeros(1, dtype=torch.int32, device=device)
    out = run(backend, tensors, options, dropout_p=0.5, training=True)
    assert out.shape == (*shape, 24)
    out.sum().backward()
    for t in tensors.values():
        assert_bits_equal(t.grad, torch.zeros_like(t))


def test_two_runs_give_the_same_bits_and_a_token_does_not_depend_on_its_batch(
    device: torch.device, seed: int
) -> None:
    tensors = small(device)
    ids = torch.randint(VOCAB, (5, 9), device=device)
    types = torch.randint(TYPES, (5, 9), device=device)
    dy, runs = torch.randn(5, 9, 24, device=device), []
    for _ in range(2):
        torch.manual_seed(seed)
        given = leaves(tensors)
        out = run("triton", given, {"input_ids": ids, "token_type_ids": types}, dropout_p=0.2, training=True)
        runs.append(with_gradients(out, given, dy))
    for name, t in runs[0].items():
        assert_bits_equal(t, runs[1][name], name=name)
    whole = run("triton", tensors, {"input_ids": ids, "token_type_ids": types})
    for row in (0, 3):
        one = {"input_ids": ids[row : row + 1], "token_type_ids": types[row : row + 1]}
        assert_bits_equal(run("triton", tensors, one), whole[row : row + 1])


def test_packed_is_padded_without_the_padding(device: torch.device) -> None:
    """Output and gradients: what is padded gets a gradient of 0. Tokens beyond the last offset are at position 0."""
    lengths, tensors = [5, 0, 9, 2], small(device)
    ids = torch.randint(VOCAB, (4, 9), device=device)
    real = torch.arange(9, device=device) < torch.tensor(lengths, device=device)[:, None]
    padded, packed = leaves(tensors), leaves(tensors)
    whole = run("triton", padded, {"input_ids": ids})
    offsets = torch.tensor([0, 5, 5, 14, 16], dtype=torch.int32, device=device)
    tail = torch.cat([ids[real], ids[0, :2]])
    out = run("triton", packed, {"input_ids": tail, "cu_seqlens": offsets})
    assert_bits_equal(out[:16], whole[real])
    at_zero = {"input_ids": ids[0, :2], "position_ids": torch.zeros(2, dtype=torch.int64, device=device)}
    assert_bits_equal(out[16:], run("triton", tensors, at_zero))
    dy = torch.randn(4, 9, 24, device=device) * real[:, :, None]
    a = with_gradients(whole, padded, dy)
    b = with_gradients(out, packed, torch.cat([dy[real], dy.new_zeros(2, 24)]))
    for name in ("dword", "dposition", "dtype"):
        assert_close_to_truth(b[name], a[name].double(), a[name], name=name)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_needed_gets_a_gradient(name: str, device: torch.device) -> None:
    tensors, ids = small(device), {"input_ids": torch.randint(VOCAB, (2, 5), device=device)}
    every = leaves(tensors)
    dy = torch.randn(2, 5, 24, device=device)
    expected = with_gradients(run("triton", every, ids), every, dy)[f"d{name}"]
    tensors[name].requires_grad_()
    run("triton", tensors, ids).backward(dy)
    assert_bits_equal(tensors[name].grad, expected)
    assert all(t.grad is None for n, t in tensors.items() if n != name)


def test_a_table_that_serves_twice_gets_both_gradients(device: torch.device) -> None:
    both = torch.randn(9, 24, device=device, requires_grad=True)
    ids, dy = torch.randint(9, (2, 5), device=device), torch.randn(2, 5, 24, device=device)
    with dispatch.use_backend("triton"):
        (found,) = torch.autograd.grad(ops.bert_embeddings(ids, both, both, None, None, None), both, dy)
        a, b = (both.detach().clone().requires_grad_() for _ in range(2))
        grads = torch.autograd.grad(ops.bert_embeddings(ids, a, b, None, None, None), (a, b), dy)
    assert_bits_equal(found, grads[0] + grads[1])


def test_gradient_checkpointing_draws_the_same_mask(device: torch.device, seed: int) -> None:
    tensors, ids = small(device), torch.randint(VOCAB, (2, 5), device=device)
    dy, results = torch.randn(2, 5, 24, device=device), []
    for checkpointed in (False, True):
        given = leaves(tensors)
        torch.manual_seed(seed)

        def call(*tensors: Tensor) -> Tensor:
            named = dict(zip(NAMES, tensors, strict=True))
            return run("triton", named, {"input_ids": ids}, dropout_p=0.4, training=True)

        out = (
            checkpoint(call, *given.values(), use_reentrant=False) if checkpointed else call(*given.values())
        )
        results.append(with_gradients(out, given, dy))
    for name, t in results[0].items():
        assert_bits_equal(t, results[1][name], name=name)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("table", "parameter"), [(BF16, BF16), (F16, F32), (F32, BF16)])
def test_output_dtypes(
    backend: str, table: torch.dtype, parameter: torch.dtype, autocast: bool, device: torch.device
) -> None:
    tensors = {n: t.to(parameter if n in NAMES[3:] else table) for n, t in small(device).items()}
    ids = {"input_ids": torch.randint(VOCAB, (2, 5), device=device)}
    given = leaves(tensors)
    with torch.autocast(device.type, BF16, enabled=autocast):
        out = run(backend, given, ids)
    assert out.dtype == (F32 if autocast else table)
    grads = with_gradients(out, given, torch.randn(2, 5, 24, device=device))
    assert [grads[f"d{n}"].dtype for n in NAMES] == [table] * 3 + [parameter] * 2


def test_nan_stays_with_its_token(device: torch.device) -> None:
    tensors, ids = leaves(small(device)), torch.arange(12, device=device).view(2, 6)
    clean = run("triton", tensors, {"input_ids": ids})
    dy = torch.randn(2, 6, 24, device=device)
    expected = with_gradients(clean, tensors, dy)
    dirty = leaves(tensors)
    with torch.no_grad():
        dirty["word"][4, 3] = float("nan")
    dy[1, 2, 5] = float("inf")  # token 8
    out = run("triton", dirty, {"input_ids": ids}, padding_idx=8)
    assert out[0, 4].isnan().all()
    found = with_gradients(out, dirty, dy)
    others = [i for i in range(VOCAB) if i not in (4, 8)]
    assert found["dword"][4].isnan().all()
    assert not found["dword"][8].any()  # padding's NaN doesn't leak
    assert_bits_equal(found["dword"][others], expected["dword"][others])


OUT_OF_RANGE = [
    ("input_ids", -1, r"input_ids must be in \[0, 40\), the rows of word_weight, got -1"),
    ("input_ids", 40, r"input_ids must be in \[0, 40\).*got 40"),
    ("position_ids", 16, r"position_ids must be in \[0, 16\), the rows of position_weight, got 16"),
    ("position_ids", -7, "position_ids must be in .*got -7"),
    ("token_type_ids", 3, r"token_type_ids must be in \[0, 3\), the rows of token_type_weight, got 3"),
    ("token_type_ids", -(2**31), "token_type_ids must be in .*got -2147483648"),
]


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize(("name", "value", "message"), OUT_OF_RANGE)
def test_ids_out_of_range_raise(backend: str, name: str, value: int, message: str) -> None:
    tensors = small(torch.device("cpu"))
    ids = {n: torch.zeros(2, 5, dtype=torch.int64) for n in ("input_ids", "position_ids", "token_type_ids")}
    ids[name][1, 3] = value
    with pytest.raises(IndexError, match=message):
        run(backend, tensors, ids)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_sequences_longer_than_the_table_raise(backend: str) -> None:
    tensors, cpu = small(torch.device("cpu")), torch.device("cpu")
    packed = {"input_ids": torch.zeros(17, dtype=torch.int64, device=cpu)}
    packed["cu_seqlens"] = torch.tensor([0, 17], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"the positions that cu_seqlens gives must be in \[0, 16\).*got 16"):
        run(backend, tensors, packed)
    with pytest.raises(ValueError, match="input_ids are 17 long and position_weight has 16 rows"):
        run(backend, tensors, {"input_ids": packed["input_ids"].view(1, 17)})


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize(("name", "value", "message"), OUT_OF_RANGE[::2])
def test_ids_out_of_range_in_a_compiled_graph_are_an_assertion(
    backend: str, name: str, value: int, message: str
) -> None:
    torch._dynamo.reset()
    tensors = small(torch.device("cpu"))
    ids = {n: torch.zeros(2, 5, dtype=torch.int64) for n in ("input_ids", "position_ids", "token_type_ids")}
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(backend, tensors, ids)
    ids[name][1, 3] = value
    with pytest.raises(RuntimeError, match=message.partition(r"\)")[0]):
        compiled(backend, tensors, ids)


def test_every_bad_argument_is_named_in_one_error(device: torch.device) -> None:
    t, ids = small(device), torch.zeros(2, 5, dtype=torch.int64, device=device)
    with pytest.raises(
        ValueError, match=r"position_weight must be \[rows, 24\].*weight must be \[24\]"
    ) as info:
        ops.bert_embeddings(
            ids.float(), t["word"], t["word"][:, :3], t["type"].half(), t["word"], t["bias"].int(),
            position_ids=ids[:, :2], token_type_ids=ids[0], cu_seqlens=ids[0], dropout_p=1.5, eps=-1.0, padding_idx=40,
        )  # fmt: skip
    for reason in (
        "input_ids must be int64 or int32, got torch.float32",
        "token_type_weight must be of word_weight's dtype",
        "bias must be of a floating dtype",
        "position_ids must be [5], [1, 5] or of input_ids' shape (2, 5), got (2, 2)",
        "token_type_ids must have input_ids' shape (2, 5), got (5,)",
        "cu_seqlens must be int32 [batch + 1], got torch.int64 (5,)",
        "cu_seqlens is for packed input_ids",
        "dropout_p must be between 0 and 1",
        "eps must be at least 0",
        "padding_idx must be a row of word_weight, in [-40, 40), got 40",
    ):
        assert reason in str(info.value)
    for args, message in (
        ((ids[0, 0], t["word"], None, None), "padded|packed"),
        ((ids[0], t["word"], t["position"], None), "need cu_seqlens or position_ids"),
        ((ids, t["word"][:0], None, None), "each at least 1"),
        ((ids, t["word"], None, t["type"][:0]), "token_type_weight must be"),
        ((ids, ids, None, None), "word_weight must be of a floating dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.bert_embeddings(*args, None, None)
    with pytest.raises(ValueError, match=r"without a token_type_weight.*without a position_weight"):
        ops.bert_embeddings(ids, t["word"], None, None, None, None, position_ids=ids, token_type_ids=ids)


def test_a_backend_asked_for_is_honored_or_says_why_not(device: torch.device) -> None:
    ids, word = torch.zeros(2, 3, dtype=torch.int64, device=device), torch.randn(4, 32, device=device)
    with dispatch.use_backend("triton"), pytest.raises(NotSupportedError, match="not float64"):
        ops.bert_embeddings(ids, word.double(), None, None, None, None)
    wide = torch.randn(1, 16385, device=device)
    with dispatch.use_backend("triton"), pytest.raises(NotSupportedError, match="up to 16384"):
        ops.bert_embeddings(ids, wide, None, None, None, None)
    with dispatch.record() as choices:
        ops.bert_embeddings(ids, word.double(), None, None, None, None)
    assert [c.backend for c in choices] == ["torch"]


def test_a_double_backward_says_that_there_is_none(device: torch.device) -> None:
    tensors, ids = leaves(small(device)), {"input_ids": torch.zeros(1, 2, dtype=torch.int64, device=device)}
    out = run("triton", tensors, ids)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_the_function_is_exported() -> None:
    assert ops.bert_embeddings is public
