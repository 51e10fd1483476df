"""CUDA graphs of small batches: what they give, when they serve, and that they can't go stale.

On a GPU these are CUDA graphs. Without one they are graphs of ATen's ops on the memory that was there at the capture
(make_fx), which are as blind to Python and to values as CUDA's are.
"""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import BertForQuestionAnswering, BertModel

import pyaccel
from pyaccel import dispatch
from pyaccel.errors import NotSupportedError
from pyaccel.hf import eligibility
from pyaccel.hf.executors import cuda_graph as graphs
from pyaccel.ops import common
from tests.assertions import assert_bits_equal, assert_equivalent
from tests.conftest import COMPILED
from tests.hf.models import DTYPES, MASKS, VOCAB, Truth, batch_of, of_family, read, tiny

LAYERS = 3


def traced(run: Callable[[], Tensor], pool: Any, device: torch.device) -> tuple[Tensor, Callable[[], object]]:
    on_host = common.on_host
    common.on_host = lambda x: False  # as on a GPU; make_fx refuses whatever looks at values all the same
    try:
        graph = make_fx(run)()
    finally:
        common.on_host = on_host
    out = run()
    return out, lambda: out.copy_(graph())


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if not COMPILED:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(graphs, "on_gpu", lambda x: True)
        monkeypatch.setattr(graphs, "stream_of", lambda device: 0)
        monkeypatch.setattr(graphs, "is_capturing", lambda: False)
        monkeypatch.setattr(graphs, "new_pool", lambda: None)
        monkeypatch.setattr(graphs, "capture", traced)


def accelerated(model: nn.Module, device: torch.device, **options: Any) -> tuple[Any, pyaccel.hf.Report]:
    model = copy.deepcopy(model).to(device)
    return model, pyaccel.accelerate(model, cuda_graphs=True, **options)


@torch.inference_mode()
def states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**{name: x.to(model.device) for name, x in batch.items()}).last_hidden_state


class OnCpu(nn.Module):
    """A model on a device whose inputs and outputs are on the CPU, where truth is."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": states(self.model, batch).cpu()}


def judge(stock: nn.Module, model: Any, batch: dict[str, Tensor], where: Tensor | None = None) -> None:
    where = read(batch["attention_mask"]) if where is None else where
    Truth(stock).check(OnCpu(model), batch, ["last_hidden_state"], where)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_and_zeros_in_the_padding(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    stock, batch = tiny(dtype=dtype), batch_of(kind)
    model, report = accelerated(stock, device)
    for _ in range(2):
        judge(stock, model, batch)
    assert (states(model, batch).cpu()[~read(batch["attention_mask"])] == 0).all()
    assert report.served == {"cuda_graph": 3 * LAYERS}
    assert report.captured == 1
    assert not report.refused["cuda_graph"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_by_our_kernels(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    stock, batch = tiny(dtype=dtype), batch_of(kind)
    with dispatch.use_backend("auto"):
        model, report = accelerated(stock, device)
        judge(stock, model, batch)
        judge(stock, model, batch)
    assert report.captured == 1


def test_without_packing_padding_is_the_stock_model_s(device: torch.device) -> None:
    stock, batch = tiny(), batch_of("right")
    model, report = accelerated(stock, device, packing=False)
    judge(stock, model, batch, torch.ones(5, 12, dtype=torch.bool))
    assert report.served == {"cuda_graph": LAYERS}


def test_a_head_that_reads_the_padding_gets_it(device: torch.device) -> None:
    stock, batch = tiny(BertForQuestionAnswering, num_labels=2), batch_of("right")
    model, report = accelerated(stock, device)
    judge(stock.bert, model.bert, batch, torch.ones(5, 12, dtype=torch.bool))
    assert report.served == {"cuda_graph": LAYERS}


@pytest.mark.parametrize("family", ["distilbert", "albert"])
def test_other_families(family: str, device: torch.device) -> None:
    stock = of_family(family)
    model, report = accelerated(stock, device)
    batch = batch_of("left")
    del batch["token_type_ids"]
    judge(stock, model, batch)
    assert report.served == {"cuda_graph": LAYERS}


def test_int8_layers_and_scales_elsewhere(device: torch.device) -> None:
    stock, batch = tiny(), batch_of("right")
    backend = "auto" if COMPILED else "reference"  # the one for CPUs looks at values
    model, report = accelerated(stock, device, int8="dynamic", backend=backend)
    eager = copy.deepcopy(stock).to(device)
    pyaccel.accelerate(eager, int8="dynamic", backend=backend)
    where = read(batch["attention_mask"])
    for captured in (1, 2):
        assert_equivalent(states(model, batch).cpu()[where], states(eager, batch).cpu()[where])
        assert report.captured == captured
        for each in (model, eager):
            linear = each.encoder.layer[0].output.dense
            linear.weight_scale = linear.weight_scale * 2


# ---- sizes ----


def test_buckets() -> None:
    sizes = {graphs.bucket(n): n for n in range(1, 26)}  # and the largest of each
    assert sizes == {1: 1, 2: 2, 3: 3, 4: 4, 6: 6, 8: 8, 12: 12, 16: 16, 24: 24, 32: 25}
    assert [graphs.bucket(n, 16) for n in (1, 16, 17, 128, 129, 384, 385)] == [16, 16, 24, 128, 192, 384, 512]


def test_batches_share_the_graphs_of_their_bucket(device: torch.device) -> None:
    stock = tiny()
    model, report = accelerated(stock, device)
    for rows, seq in ((5, 12), (6, 3), (5, 16), (4, 16), (6, 24), (5, 12)):
        mask = torch.ones(rows, seq, dtype=torch.int64)
        mask[1, 2:] = 0
        judge(stock, model, {"input_ids": torch.randint(1, VOCAB, (rows, seq)), "attention_mask": mask})
    assert report.captured == 3


def test_nothing_of_a_batch_is_left_for_the_next(device: torch.device) -> None:
    stock = tiny()
    model, _ = accelerated(stock, device)
    embeddings = model.embeddings.word_embeddings.weight
    full = {"input_ids": torch.randint(1, VOCAB, (6, 16))}
    with torch.no_grad():
        before = embeddings.clone()
        embeddings.fill_(float("nan"))
        assert states(model, full).isnan().all()
        embeddings.copy_(before)
    judge(stock, model, batch_of("right"))


def test_no_mask_is_all_tokens(device: torch.device) -> None:
    stock, batch = tiny(), batch_of("none")
    model, _ = accelerated(stock, device)
    judge(stock, model, batch_of("right"))
    where = batch.pop("attention_mask").bool()
    judge(stock, model, batch, where)


def test_the_graph_used_longest_ago_makes_room(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    model, report = accelerated(tiny(), device)
    for rows in (1, 2, 1, 3, 1, 2):
        states(model, {"input_ids": torch.ones(rows, 4, dtype=torch.int64)})
    assert report.captured == 4


def test_each_result_is_its_own(device: torch.device) -> None:
    model, _ = accelerated(tiny(), device)
    first = states(model, batch_of("right"))
    before = first.clone()
    second = states(model, batch_of("right"))
    assert first.data_ptr() != second.data_ptr()
    assert_bits_equal(first, before)


# ---- they can't go stale ----


def test_weights_changed_in_place_are_used(device: torch.device) -> None:
    stock, batch = tiny(), batch_of("right")
    model, report = accelerated(stock, device)
    states(model, batch)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.mul_(1.1)
            model.get_parameter(name).mul_(1.1)
    judge(stock, model, batch)
    assert report.captured == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.detach() * 2)),
        lambda linear: setattr(linear.weight, "data", linear.weight.detach() * 2),
        lambda linear: setattr(linear.bias, "data", linear.bias.detach() + 1),
    ],
    ids=["another parameter", "other memory", "another bias's memory"],
)
@pytest.mark.parametrize("path", ["attention.self.key", "intermediate.dense", "output.LayerNorm"])
def test_weights_elsewhere_are_used(path: str, change: Callable[[Any], None], device: torch.device) -> None:
    stock, batch = tiny(), batch_of("right")
    model, report = accelerated(stock, device)
    states(model, batch)
    change(stock.encoder.layer[1].get_submodule(path))
    change(model.encoder.layer[1].get_submodule(path))
    judge(stock, model, batch)
    assert report.captured == 2


def test_a_cast_model(device: torch.device) -> None:
    stock, batch = tiny(), batch_of("right")
    model, report = accelerated(stock, device)
    states(model, batch)
    judge(stock.bfloat16(), model.bfloat16(), batch)
    assert report.captured == 2


def test_what_decides_on_kernels_is_part_of_the_key(device: torch.device) -> None:
    model, report = accelerated(tiny(), device)
    batch = batch_of("right")
    states(model, batch)
    with dispatch.use_backend("reference"):
        states(model, batch)
    assert report.captured == 2
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        states(model, batch)
    finally:
        torch.set_float32_matmul_precision(before)
    assert report.captured == 3
    states(model, batch)
    assert report.captured == 3


def test_copies_pickles_and_restore(device: torch.device) -> None:
    stock, batch = tiny(), batch_of("right")
    model, report = accelerated(stock, device)
    states(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        judge(stock, other, batch)
    assert report.captured == 1  # each copy has its own
    pyaccel.restore(model)
    judge(stock, model, batch)
    assert type(model.encoder) is type(stock.encoder)


def test_threads_wait_for_each_other(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between copying in and copying out another thread of the same stream would put its own batch in."""
    launch = graphs.capture

    def slow(*args: Any) -> tuple[Tensor, Callable[[], object]]:
        out, replay = launch(*args)
        return out, lambda: (time.sleep(0.01), replay(), time.sleep(0.01))

    monkeypatch.setattr(graphs, "capture", slow)
    model, _ = accelerated(tiny(), device)
    batches = [batch_of(kind) for kind in ("right", "left", "holes", "right")]
    expected = [states(model, batch) for batch in batches]
    wrong = []

    def serve(index: int) -> None:
        for _ in range(5):
            if not torch.equal(states(model, batches[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_each_stream_has_graphs_of_its_own(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = []
    launch = graphs.capture

    def noting(run: Any, pool: Any, device: torch.device) -> Any:
        pools.append(pool)
        return launch(run, pool, device)

    monkeypatch.setattr(graphs, "new_pool", object if not COMPILED else graphs.new_pool)
    monkeypatch.setattr(graphs, "capture", noting)
    stock, batch = tiny(), batch_of("right")
    model, report = accelerated(stock, device)
    for stream in (1, 2, 1):
        with torch.cuda.stream(torch.cuda.Stream()) if COMPILED else nullcontext():
            if not COMPILED:
                monkeypatch.setattr(graphs, "stream_of", lambda device, stream=stream: stream)
            judge(stock, model, batch)
    assert report.captured == len(pools) == len(set(pools)) == (3 if COMPILED else 2)


# ---- what they don't serve ----


def ran(model: Any, report: Any, batch: dict[str, Tensor], **options: Any) -> dict[str, int]:
    report.reset()
    model(**{name: x.to(model.device) for name, x in batch.items()}, **options)
    assert report.captured == 0
    assert report.served["cuda_graph"] == 0
    return dict(report.refused["cuda_graph"])


def test_what_goes_its_usual_way(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, report = accelerated(tiny(), device)
    batch = batch_of("right")
    (reason,) = ran(model, report, batch)
    assert "inference_mode" in reason
    assert report.served == {"packed": LAYERS}
    with torch.inference_mode():
        assert ran(model.train(), report, batch) == {"dropout": 1}
        model.eval()
        assert "captured" in next(iter(ran(model, report, batch, output_hidden_states=True)))
        with torch.autocast(device.type, torch.bfloat16):
            assert "autocast" in next(iter(ran(model, report, batch)))
        with dispatch.record():
            assert "recorded" in next(iter(ran(model, report, batch)))
        long = {"input_ids": torch.ones(9, 512, dtype=torch.int64)}
        assert ran(model, report, long) == {"more than 4096 positions": 1}
        assert ran(model, report, {"input_ids": torch.ones(0, 4, dtype=torch.int64)}) == {"an empty batch": 1}
        monkeypatch.setattr(graphs, "is_capturing", lambda: True)
        assert "captures" in next(iter(ran(model, report, batch)))
        if COMPILED:  # packing would wait for the device, which a capture forbids
            assert report.served == {"padded": LAYERS}
            assert "nothing may wait" in next(iter(report.refused["packed"]))
    text = str(report)
    assert "not by cuda_graph: 1: the caller captures" in text
    assert "CUDA graphs captured" not in text
    assert report.as_dict()["refused"]["cuda_graph"] == dict(report.refused["cuda_graph"])


def test_packing_would_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a capture forbids."""
    call: Any = SimpleNamespace(
        hidden=SimpleNamespace(is_cuda=True, is_meta=False), is_packed=False, kwargs={}, mask=None
    )
    for captures in (False, True):
        monkeypatch.setattr(eligibility, "is_capturing", lambda captures=captures: captures)
        reason = eligibility.not_packable(call)
        assert (reason is not None and "nothing may wait" in reason) if captures else reason is None


def test_watched_layers_are_not_graphed(device: torch.device) -> None:
    model, report = accelerated(tiny(), device)
    from pyaccel.nn import ObservedLinear

    seen: list[Tensor] = []
    ObservedLinear.watch(model.encoder.layer[0].intermediate.dense, lambda x, out: seen.append(x))
    with torch.inference_mode():
        assert "watched" in next(iter(ran(model, report, batch_of("right"))))
    assert len(seen) == 1


def test_a_stock_part_in_a_layer_is_not_graphed(device: torch.device) -> None:
    model, report = accelerated(tiny(), device)
    model.encoder.layer[1].output.register_forward_hook(lambda *_: None)
    with torch.inference_mode():
        assert ran(model, report, batch_of("right")) == {"layer.1: output has hooks": 1}


class Looks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


def test_what_cannot_be_captured_is_said(device: torch.device) -> None:
    model, _ = accelerated(tiny(), device)
    model.encoder.layer[0].intermediate.intermediate_act_fn = Looks()
    with pytest.raises(RuntimeError, match="accelerate with cuda_graphs=False"):
        states(model, batch_of("right"))


def test_without_a_gpu_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model: Any = tiny()
    with pytest.raises(NotSupportedError, match="needs a CUDA or ROCm device"):
        pyaccel.accelerate(model, cuda_graphs=True)
    assert type(model.encoder) is type(BertModel(model.config).encoder)


def test_a_model_left_on_the_cpu_runs_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "on_gpu", lambda x: False)
    model = tiny()
    report = pyaccel.accelerate(model, cuda_graphs=True)
    with torch.inference_mode():
        assert ran(model, report, batch_of("right")) == {"on the CPU": 1}
    assert report.served == {"packed": LAYERS}
