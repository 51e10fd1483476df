"""A whole Hugging Face BERT, and one layer of it: stock, compiled, accelerated and in other engines.

Batches are full, or of lengths as sentences (mean 25 of 128) or SQuAD's contexts (mean 177 of 384) have them, padded to
128 or 384 as ``padding="max_length"`` pads, which is what static shapes want; "sentences, longest" are padded to the
longest of the batch. Weights are random: what they are doesn't change the time.

A training step is forward and backward of a loss over the pooled output, without dropout, so that gradients can be
compared; its outputs are all of them.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyaccel import hf
from pyaccel.benchmarks.case import Case, Variant, graphed
from pyaccel.cost.model import bert_config, length_mix
from pyaccel.hf.executors.cuda_graph import graphable

Outputs = tuple[Tensor, ...]
SEQ = {"full": 128, "sentences": 128, "sentences, longest": 128, "squad": 384}


class Size(NamedTuple):
    """A named model (layers: other than its own), and the batch."""

    model: str
    batch: int
    mix: str
    training: bool = False
    layers: int | None = None
    vocab_size: int = 30522
    seq: int | None = None


@dataclass(frozen=True)
class Problem:
    """A stock model and a batch ``[batch, seq]``; ``training``: with gradients."""

    model: Any
    batch: dict[str, Tensor]
    training: bool

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.batch["input_ids"].device


def problem(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    import transformers

    torch.manual_seed(0)
    config = bert_config(size.model)
    config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    config.update(
        {"vocab_size": size.vocab_size, "num_hidden_layers": size.layers or config.num_hidden_layers}
    )
    model: torch.nn.Module = transformers.BertModel(config)
    model = model.to(device=device, dtype=dtype).train(size.training)
    mix, _, longest = size.mix.partition(", ")
    seq = size.seq or SEQ[size.mix]
    lengths = torch.tensor(length_mix(mix, size.batch, seq))
    if longest:
        seq = int(lengths.max())
    batch = {
        "input_ids": torch.randint(1, size.vocab_size, (size.batch, seq)),
        "attention_mask": (torch.arange(seq) < lengths.unsqueeze(1)).long(),
    }
    return Problem(model, {name: x.to(device) for name, x in batch.items()}, size.training)


def call(model: Any, p: Problem) -> Outputs:
    """The states of real tokens; in training every gradient, over the largest element that it has."""
    if not p.training:
        with torch.no_grad():
            return (model(**p.batch).last_hidden_state,)
    parameters = [x for x in model.parameters() if x.requires_grad]
    pooled = model(**p.batch).pooler_output
    weights = torch.linspace(-1, 1, pooled.shape[1], device=pooled.device, dtype=pooled.dtype)
    return torch.autograd.grad((pooled * weights).sum(), parameters)


def compared(p: Problem, given: Outputs) -> Outputs:
    """Padding positions are ignored; gradients are judged together, but for keys' biases', which are rounding alone."""
    if not p.training:
        return (given[0][p.batch["attention_mask"].bool()],)
    names = [name for name, x in p.model.named_parameters() if x.requires_grad]
    return (torch.cat([g.flatten() for name, g in zip(names, given, strict=True) if "key.bias" not in name]),)


def truth(p: Problem) -> Outputs:
    return compared(p, call(copy.deepcopy(p.model).double(), p))


def naive(p: Problem) -> Outputs:
    return compared(p, call(p.model, p))


def n_tokens(p: Problem) -> int:
    return int(p.batch["attention_mask"].sum())


def bytes_moved(p: Problem) -> int:
    """Each weight of a layer read once, and its gradient written; hidden states of the first and of the last layer."""
    weights: int = sum(x.numel() * x.element_size() for x in p.model.encoder.parameters())
    states: int = 2 * n_tokens(p) * p.model.config.hidden_size * next(p.model.parameters()).element_size()
    return weights * (2 if p.training else 1) + states


def flops(p: Problem) -> int:
    """The products of real tokens, those of attention among them."""
    lengths = p.batch["attention_mask"].sum(1)
    attention: int = (
        4 * int((lengths**2).sum()) * p.model.config.hidden_size * p.model.config.num_hidden_layers
    )
    products: int = 2 * n_tokens(p) * sum(x.numel() for x in p.model.encoder.parameters() if x.dim() == 2)
    return (products + attention) * (3 if p.training else 1)


# ---- contenders ----


def contender(
    name: str, change: Callable[[Any], Any], missing: Callable[[Any], str | None] | None = None
) -> Variant:
    """What ``change`` makes of a copy of the stock model."""

    def prepare(p: Problem) -> Callable[[], Outputs]:
        model = change(copy.deepcopy(p.model))
        return lambda: call(model, p)

    return Variant(name, prepare, missing or (lambda p: None), compared)


def accelerated(**options: Any) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        hf.accelerate(model, **options)
        return model

    return change


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


def compiled(**options: Any) -> Callable[[Any], Any]:
    return lambda model: torch.compile(model, dynamic=False, **options)


def autotuned(model: Any) -> Any:
    """The mode of that name; on a CPU that mode alone tunes nothing: Inductor does for frozen weights."""
    if model.device.type == "cpu":
        return torch.compile(model, dynamic=False, options={"freezing": True, "max_autotune": True})
    return torch.compile(model, dynamic=False, mode="max-autotune")


def only_on_cpu(p: Problem) -> str | None:
    return None if p.device.type == "cpu" else "an engine, or a way to compile, for CPUs"


def not_graphed(p: Problem) -> str | None:
    if p.device.type != "cuda":
        return "CUDA graphs need a GPU"
    batch, seq = p.batch["input_ids"].shape
    return None if graphable(batch, seq) else "its batches are small ones"


def no_engine(module: str, *others: str) -> Callable[[Problem], str | None]:
    def missing(p: Problem) -> str | None:
        absent = [name for name in (module, *others) if importlib.util.find_spec(name) is None]
        if absent:
            return f"{' and '.join(absent)} not installed"
        return only_on_cpu(p)

    return missing


class Exported(torch.nn.Module):
    """Token ids and mask in, hidden states out, for engines that want tensors alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``[batch, seq]`` twice -> ``[batch, seq, hidden]``."""
        out: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return out


def prepare_openvino(p: Problem) -> Callable[[], Outputs]:
    """Static shapes, as many threads as torch has, arithmetic in the dtype of the model."""
    import openvino

    example = tuple(p.batch.values())
    dtype = next(p.model.parameters()).dtype
    model = Exported(copy.deepcopy(p.model).float())
    with torch.no_grad():
        converted = openvino.convert_model(model, example_input=example)
    converted.reshape({i: list(x.shape) for i, x in enumerate(example)})
    compiled = openvino.Core().compile_model(
        converted,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        },
    )
    arrays = [x.numpy() for x in example]
    return lambda: (torch.from_numpy(compiled(arrays)[0]).to(dtype),)


def prepare_onnxruntime(p: Problem) -> Callable[[], Outputs]:
    """Exported, fused by ONNX Runtime's own optimizer for BERT, on as many threads as torch has."""
    import onnxruntime
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    config = p.model.config
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            Exported(eager(copy.deepcopy(p.model))).eval(),
            tuple(p.batch.values()),
            str(file),
            input_names=list(p.batch),
            output_names=["last_hidden_state"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        fused = optimizer.optimize_model(
            str(file),
            "bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            optimization_options=FusionOptions("bert"),
        )
        fused.save_model_to_file(str(file))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    arrays = {name: x.numpy() for name, x in p.batch.items()}
    return lambda: (torch.from_numpy(session.run(None, arrays)[0]),)


def no_onnxruntime(p: Problem) -> str | None:
    if next(p.model.parameters()).dtype != torch.float32:
        return "ONNX Runtime's kernels for CPUs take float32"
    return no_engine("onnxruntime", "onnx", "onnxscript")(p)


def no_openvino(p: Problem) -> str | None:
    if next(p.model.parameters()).dtype == torch.float16:
        return "OpenVINO's kernels for CPUs take float32 and bfloat16"
    return no_engine("openvino")(p)


OURS = contender("pyaccel", accelerated())
STOCK = (
    contender("stock, SDPA", lambda model: model),
    contender("stock, eager", eager),
    contender("torch.compile", compiled()),
)
INFERENCE = (
    OURS,
    contender("pyaccel, prepacked", accelerated(prepack=True), only_on_cpu),
    contender("pyaccel, CUDA graphs", accelerated(cuda_graphs=True), not_graphed),
    contender("pyaccel, padded", accelerated(packing=False)),
    graphed(contender("pyaccel, padded", accelerated(packing=False))),
    *STOCK,
    contender("torch.compile, frozen", compiled(options={"freezing": True}), only_on_cpu),
    contender("torch.compile, max-autotune", autotuned),
    Variant("ONNX Runtime", prepare_onnxruntime, no_onnxruntime, compared),
    Variant("OpenVINO", prepare_openvino, no_openvino, compared),
)
TRAINING = (OURS, *STOCK, contender("torch.compile, max-autotune", compiled(mode="max-autotune"), lambda p: (
    "on a CPU this mode tunes nothing" if p.device.type == "cpu" else None
)))  # fmt: skip


# ---- sizes ----


def labeled(sizes: Iterator[Size]) -> dict[str, Size]:
    return {
        f"{size.model}, {size.batch}x{SEQ[size.mix]}{'' if size.mix == 'full' else ' ' + size.mix}": size
        for size in sizes
    }


def on_cpu() -> Iterator[Size]:
    for model in ("minilm", "bert-base"):
        for batch in (1, 8, 32):
            for mix in ("full", "sentences", "squad"):
                # Twenty seconds a call, and nothing that 8 of them don't show.
                if (model, batch, mix) != ("bert-base", 32, "squad"):
                    yield Size(model, batch, mix)
        yield Size(model, 32, "sentences, longest")


def on_gpu() -> Iterator[Size]:
    for model in ("minilm", "bert-base", "bert-large"):
        for batch in (1, 8, 32, 256):
            for mix in SEQ:
                yield Size(model, batch, mix)


def case(
    name: str,
    group: str,
    *,
    about: str,
    cpu_sizes: Iterator[Size],
    quick: str,
    training: bool = False,
    layers: int | None = None,
) -> Case:
    def changed(sizes: Iterator[Size]) -> dict[str, Size]:
        return labeled(size._replace(training=training, layers=layers) for size in sizes)

    return Case(
        name=name,
        group=group,
        sizes=changed(on_gpu()),
        smoke={"1 layer, 3x7": Size("minilm", 3, "sentences", training, 1, vocab_size=100, seq=7)},
        problem=problem,
        truth=truth,
        naive=naive,
        bytes_moved=bytes_moved,
        flops=flops,
        variants=TRAINING if training else INFERENCE,
        cpu_sizes=changed(cpu_sizes),
        quick=quick,
        about=about,
    )


CASES = (
    case(
        "bert_layer",
        "layers",
        about="One layer of a Hugging Face BERT, with its embeddings and its pooler, without gradients.",
        layers=1,
        cpu_sizes=(Size(model, 8, mix) for model in ("minilm", "bert-base") for mix in ("full", "squad")),
        quick="^minilm, 8x384 squad$",
    ),
    case(
        "bert",
        "models",
        about="A whole Hugging Face BERT without gradients. Mixed batches are padded to 128 (sentences, mean 25 "
        "tokens) or 384 (SQuAD's contexts, mean 177), or to the longest of the batch.",
        cpu_sizes=on_cpu(),
        quick="^minilm, (1x128|8x128|8x128 sentences)$",
    ),
    case(
        "bert_training",
        "train",
        about="Forward and backward of a whole Hugging Face BERT without dropout, to all gradients.",
        training=True,
        cpu_sizes=(
            Size(model, batch, mix)
            for model, batch in (("minilm", 16), ("bert-base", 8))
            for mix in ("full", "sentences")
        ),
        quick="^minilm, 16x128 sentences$",
    ),
)
