"""What other libraries put around or into a model: adapters, trainers, processes; and int8 by one word."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel, Trainer, TrainingArguments

import pyaccel
from pyaccel.checkpoints import demo_checkpoint
from pyaccel.nn import Int8Linear
from tests.assertions import assert_bits_equal, assert_close_to_truth, assert_equivalent, assert_same_curve
from tests.hf.models import batch_of, tiny

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


# --- LoRA ---


def with_lora(model: nn.Module, dropout: float = 0.0, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        target_modules=["query", "value", "dense"],
        lora_dropout=dropout,
        init_lora_weights=False,
        **options,
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("first", ["lora", "pyaccel"])
@pytest.mark.parametrize("packing", [True, False])
def test_lora_is_on_the_fast_path(packing: bool, first: str) -> None:
    model, batch = tiny(**NO_DROPOUT), batch_of("left")
    torch.manual_seed(0)
    stock = with_lora(copy.deepcopy(model))
    torch.manual_seed(0)
    if first == "lora":
        ours = with_lora(model)
        report = pyaccel.accelerate(ours, packing=packing)
    else:
        report = pyaccel.accelerate(model, packing=packing)
        ours = with_lora(model)
    ours.load_state_dict(stock.state_dict())
    truth = copy.deepcopy(stock).double()
    outputs, grads = [], []
    for m in (ours, truth, stock):
        m.train()
        outputs.append(m(**batch).pooler_output)
        (outputs[-1] * torch.linspace(-1, 1, 32)).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
    assert_close_to_truth(*outputs)
    assert_close_to_truth(*grads)
    assert report.served == {"packed" if packing else "padded": 3}
    assert not report.refused["padded"]
    merged = ours.merge_and_unload().eval()
    both = (m.merge_and_unload().eval()(**batch).pooler_output for m in (truth, stock))
    assert_close_to_truth(merged(**batch).pooler_output, *both)
    assert not report.refused["padded"]


def test_adapters_by_row_go_to_the_stock_layers() -> None:
    """A batch that mixes adapters tells its rows apart, which packed tokens no longer show."""
    ours = with_lora(tiny(**NO_DROPOUT))
    batch = batch_of("left")
    ours.add_adapter("other", ours.peft_config["default"])
    ours.eval()
    stock = copy.deepcopy(ours)
    report = pyaccel.accelerate(ours)
    names = ["default", "other", "__base__", "other", "default"]
    outputs = [m(**batch, adapter_names=names).pooler_output for m in (ours, stock)]
    assert_equivalent(*outputs)
    (reason,) = report.refused["padded"]
    assert reason.endswith("has hooks")


# --- Trainer ---


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.batch = batch_of("right") | {"labels": torch.arange(5) % 3}

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index % 5] for name, value in self.batch.items()}


def test_trainer(tmp_path: Path) -> None:
    """Losses follow stock's; what it saves is stock's, and it resumes from it."""
    pytest.importorskip("accelerate")
    losses, finals = [], []
    for accelerated in (True, False):
        torch.manual_seed(3)
        model = tiny(BertForSequenceClassification, **NO_DROPOUT)
        if accelerated:
            report = pyaccel.accelerate(model)
        folder = tmp_path / str(accelerated)
        options = {
            "output_dir": str(folder), "per_device_train_batch_size": 5, "num_train_epochs": 3, "logging_steps": 1,
            "save_steps": 4, "report_to": "none", "use_cpu": True, "gradient_accumulation_steps": 2,
            "disable_tqdm": True, "seed": 1, "weight_decay": 0.1,
        }  # fmt: skip
        trainer = Trainer(
            model=model, args=TrainingArguments(**options), train_dataset=Rows(), eval_dataset=Rows()
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        finals.append(trainer.evaluate()["eval_loss"])
    assert report.served["packed"] > 0
    assert not report.refused["padded"]
    assert_same_curve(*losses)
    assert_same_curve(finals[:1], finals[1:])
    saved = tmp_path / "True" / "checkpoint-4"
    loaded = BertForSequenceClassification.from_pretrained(saved)
    assert type(loaded.bert.encoder).__module__.startswith("transformers.")
    torch.manual_seed(3)
    model = tiny(BertForSequenceClassification, **NO_DROPOUT)
    pyaccel.accelerate(model)
    options["output_dir"] = str(tmp_path / "True")
    again = Trainer(model=model, args=TrainingArguments(**options), train_dataset=Rows())
    again.train(resume_from_checkpoint=str(saved))
    assert_same_curve([again.state.log_history[-2]["loss"]], losses[0][-1:])


# --- several processes ---

WORKER = """
import copy, os, sys, torch
import torch.distributed as dist
import pyaccel
from tests.hf.models import batch_of, tiny
from transformers import BertForSequenceClassification

dist.init_process_group("gloo")
rank = dist.get_rank()


def train(how, packing):
    torch.manual_seed(0)
    model = tiny(BertForSequenceClassification, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    stock = copy.deepcopy(model)
    batch = batch_of("right") | {"labels": torch.arange(5) % 3}
    report = pyaccel.accelerate(model, packing=packing)
    if how == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard
        if how == "fsdp2, checkpointed":
            model.gradient_checkpointing_enable()
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        wrapped = model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    rows = slice(0, 3) if rank == 0 else slice(2, 5)
    mine = {name: value[rows] for name, value in batch.items()}
    theirs = torch.optim.SGD(stock.parameters(), lr=0.05)
    for step in range(3):
        loss = wrapped(**mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        both = sum(stock(**{n: v[r] for n, v in batch.items()}).loss for r in (slice(0, 3), slice(2, 5))) / 2
        both.backward()
        theirs.step()
        theirs.zero_grad()
    for (name, p), q in zip(model.named_parameters(), stock.parameters()):
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(p.detach(), q.detach(), msg=name)
    assert not report.refused["padded"], report
    assert not report.refused["packed"], report
    assert report.served.keys() == {"packed" if packing else "padded"}, report
    dist.barrier()
    print(f"{how} {packing}: the same", flush=True)


for how, packing in zip(sys.argv[1::2], sys.argv[2::2]):
    train(how, packing == "True")
# Not by the interpreter's end, where a thread of gloo's may outlive what it works on: that aborts, now and then.
os._exit(0)
"""


HOW = [("ddp", True), ("fsdp2", True), ("fsdp2", False), ("fsdp2, checkpointed", True)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Two processes that train in each way in turn: they take longer to start than to train."""
    script = tmp_path_factory.mktemp("worker") / "worker.py"
    script.write_text(WORKER)
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
         "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(script),
         *(str(word) for way in HOW for word in way)],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
             "GLOO_SOCKET_IFNAME": "lo"},  # a machine's own name may not be known to it
    )  # fmt: skip


@pytest.mark.parametrize(("how", "packing"), HOW)
def test_two_processes_train_as_one(
    how: str, packing: bool, trained: subprocess.CompletedProcess[str]
) -> None:
    assert trained.stdout.count(f"{how} {packing}: the same") == 2, trained.stderr[-3000:]
    assert trained.returncode == 0, trained.stderr[-3000:]


# --- int8 by one word ---


@pytest.mark.parametrize("method", ["dynamic", "weight_only"])
def test_int8_and_back(method: str) -> None:
    model = BertModel.from_pretrained(demo_checkpoint()).eval()
    batch = {
        "input_ids": torch.randint(1000, 20000, (2, 9)),
        "attention_mask": torch.ones(2, 9, dtype=torch.long),
    }
    batch["attention_mask"][1, 5:] = 0
    before = dict(model.named_modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    with torch.no_grad():
        expected = model(**batch).pooler_output
        report = pyaccel.accelerate(model, int8=method)
        assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 36
        assert torch.cosine_similarity(model(**batch).pooler_output, expected).min() > 0.99
        assert report.served == {"packed": 6}
        assert pyaccel.accelerate(model, int8=method) is report
        with pytest.raises(RuntimeError, match=f"int8='{method}'"):
            pyaccel.accelerate(model)
        pyaccel.restore(model)
        assert_bits_equal(model(**batch).pooler_output, expected)
    assert dict(model.named_modules()) == before
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert_bits_equal(tensor, state[name], name=name)


def test_int8_that_was_cast_since_comes_back_as_it_is_now() -> None:
    model = tiny()
    pyaccel.accelerate(model, int8="dynamic")
    model.to(torch.bfloat16)
    pyaccel.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_unknown_int8() -> None:
    with pytest.raises(ValueError, match="unknown int8 'static': expected None, 'dynamic' or 'weight_only'"):
        pyaccel.accelerate(tiny(), int8="static")
