"""The lane of models: random configs, batches and options of every family, stock beside accelerated."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import pyaccel
from pyaccel.verify.policy import judge_by_several, same_bits
from tests.assertions import EQUIVALENT_EPS
from tests.fuzz import Tried
from tests.fuzz.draw import Draw
from tests.hf.models import randomize

VOCAB, POSITIONS = 61, 26
FAMILIES = {
    "Bert": "bert", "Roberta": "bert", "XLMRoberta": "bert", "Camembert": "bert", "Electra": "bert", "Ernie": "bert",
    "RoCBert": "bert", "Data2VecText": "bert", "BertGeneration": "bert", "DistilBert": "distilbert", "Albert": "albert",
}  # fmt: skip
HEADS = (
    "Model", "ForPreTraining", "ForMaskedLM", "ForNextSentencePrediction", "ForSequenceClassification",
    "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering", "Encoder",
)  # fmt: skip
ACTIVATIONS = ("gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh", "gelu_fast")
PADDING = ("none", "right", "right", "left", "middle", "holes", "one token")
# Keys' biases cancel in the softmax, and a choice's in the one over choices: their gradients are rounding alone.
NOTHING = re.compile(r"(key|k_lin)\.bias$")
OF_A_CHOICE = re.compile(r"classifier\.bias$")
Batch = dict[str, Any]


@dataclass
class Case:
    """A model and what is done with it."""

    family: str
    head: str
    changes: dict[str, Any]
    options: dict[str, Any]
    dtype: torch.dtype
    autocast: bool
    implementation: str
    padding: str
    rows: int
    seq: int
    action: str
    calls: dict[str, Any] = field(default_factory=dict)
    training: bool = False
    grad: bool = True

    def __str__(self) -> str:
        usual = {
            "vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "packing": True, "backend": "auto",
            "implementation": "sdpa", "dtype": torch.float32, "autocast": False, "action": "", "grad": True,
        }  # fmt: skip
        said = vars(self) | self.changes | self.options | self.calls
        skipped = ("family", "head", "changes", "options", "calls")
        named = [
            f"{n}={v}"
            for n, v in said.items()
            if n not in skipped and "dropout" not in n and usual.get(n, self) != v
        ]
        return f"{self.family}{self.head}({', '.join(named)})"


def draw_case(draw: Draw) -> Case:
    family = draw.pick(*FAMILIES)
    head = draw.pick(*(h for h in HEADS if hasattr(transformers, f"{family}{h}")))
    heads, dim = draw.pick(1, 2, 3, 4), draw.pick(2, 4, 5, 8, 16)
    sizes = {
        "hidden_size": heads * dim,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.pick(1, 1, 2, 3),
        "intermediate_size": draw.pick(1, 7, 24, 40),
        "hidden_act": draw.pick(*ACTIVATIONS),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    changes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": draw.pick(0, 1),
        "num_labels": 2 if head == "ForQuestionAnswering" or (family, head) == ("Albert", "ForPreTraining")
        else draw.pick(1, 2, 5),
    }  # fmt: skip
    if FAMILIES[family] == "distilbert":
        changes |= {
            "dim": sizes["hidden_size"], "n_heads": heads, "n_layers": sizes["num_hidden_layers"],
            "hidden_dim": sizes["intermediate_size"], "activation": sizes["hidden_act"], "dropout": 0.0,
            "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0,
            "sinusoidal_pos_embds": draw.chance(0.2),
        }  # fmt: skip
    else:
        changes |= sizes | {"layer_norm_eps": draw.pick(1e-12, 1e-5)}
        if draw.chance(0.2):
            changes["chunk_size_feed_forward"] = 1
    if family == "Electra":
        changes |= {"embedding_size": draw.pick(6, heads * dim), "summary_last_dropout": 0.0}
    if family == "RoCBert":
        changes |= {"pronunciation_vocab_size": 11, "shape_vocab_size": 12}
    if family == "Albert":
        changes |= {
            "embedding_size": draw.pick(6, heads * dim), "num_hidden_groups": 1, "inner_group_num": draw.pick(1, 2),
            "classifier_dropout_prob": 0.0,
        }  # fmt: skip
    options: dict[str, Any] = {"packing": draw.chance(0.75)}
    if options["packing"] and draw.chance(0.2):
        options["prepack"] = True
    backend = draw.pick("auto", "auto", "auto", "torch", "torch", "reference")
    options["backend"] = "triton" if draw.chance(0.08) else backend
    case = Case(
        family, head, changes, options,
        dtype=torch.bfloat16 if draw.chance(0.2) else torch.float32,
        autocast=draw.chance(0.12),
        implementation="eager" if draw.chance(0.15) else "sdpa",
        padding=draw.pick(*PADDING),
        rows=draw.pick(1, 1, 2, 3, 5),
        seq=draw.pick(1, 2, 5, 8, 11, 16, 22),
        action=draw.pick("", "", "", *(a for a in ACTIONS if (family, a) != ("Albert", "checkpointing"))),
        training=draw.chance(0.4),
        grad=draw.chance(0.7),
    )  # fmt: skip
    if case.autocast:
        case.dtype = torch.float32
    if options["backend"] == "triton":
        case.rows, case.seq = min(case.rows, 2), min(case.seq, 5)
    for name, value, p in (
        ("output_hidden_states", True, 0.15),
        ("output_attentions", True, 0.08),
        ("return_dict", False, 0.1),
    ):
        if draw.chance(p):
            case.calls[name] = value
    if "output_attentions" in case.calls:  # a stock model returns them from eager attention alone
        case.implementation = "eager"
    return case


def make(case: Case, draw: Draw) -> Any:
    torch.manual_seed(draw.random.getrandbits(40))
    config = getattr(transformers, f"{case.family}Config")(**case.changes)
    config._attn_implementation = case.implementation
    model = randomize(getattr(transformers, f"{case.family}{case.head}")(config)).to(case.dtype)
    return model.train(case.training)


def mask_of(case: Case, draw: Draw) -> Tensor:
    """int64 ``[rows, seq]``; at least one token of each row is real."""
    rows, seq = case.rows, case.seq
    mask = torch.ones(rows, seq, dtype=torch.int64)
    columns = torch.arange(seq).expand(rows, seq)
    lengths = draw.integers(1, seq + 1, (rows, 1))
    if case.padding == "right":
        mask = (columns < lengths).long()
    elif case.padding == "left":
        mask = (columns >= seq - lengths).long()
    elif case.padding == "middle":
        mask = ((columns < lengths) | (columns >= seq - 1)).long()
    elif case.padding == "holes":
        mask = draw.booleans((rows, seq), 0.6).long()
        mask[torch.arange(rows), draw.integers(0, seq, (rows,))] = 1
    elif case.padding == "one token":
        mask = (columns == draw.integers(0, seq, (rows, 1))).long()
    return mask


def batch_for(case: Case, draw: Draw, model: Any) -> tuple[Batch, Tensor]:
    """The arguments of one call, and the mask of what is real in it."""
    mask = mask_of(case, draw)
    shape = tuple(mask.shape)
    ids = draw.integers(2, VOCAB, shape)
    batch: Batch = {"input_ids": ids, "attention_mask": mask}
    if case.padding != "none":
        ids.masked_fill_(mask == 0, case.changes["pad_token_id"])
    elif draw.chance(0.5):
        del batch["attention_mask"]
    how = draw.random.random()
    if "attention_mask" in batch and case.head != "ForMultipleChoice":
        rows, seq = shape
        if how < 0.07:
            wide = mask[:, None, None, :].expand(rows, 1, seq, seq).clone()
            wide[..., torch.arange(seq), torch.arange(seq)] = 1
            additive = (1.0 - wide.to(case.dtype)) * torch.finfo(case.dtype).min
            # The stock eager attention adds a bool mask to the scores: 1 where it says to attend.
            batch["attention_mask"] = (
                additive if case.implementation == "eager" else draw.pick(wide.bool(), additive)
            )
        elif how < 0.11:
            batch["attention_mask"] = mask[:, None, :].expand(rows, seq, seq).clone()
        elif how < 0.2:
            batch["attention_mask"] = mask.bool() if how < 0.16 else mask.to(case.dtype)
    typed = FAMILIES[case.family] != "distilbert" and case.family not in ("BertGeneration",)
    kinds = getattr(model.config, "type_vocab_size", 0)
    if typed and kinds and draw.chance(0.5):
        batch["token_type_ids"] = draw.integers(0, kinds, shape)
    if draw.chance(0.2) and (case.family, case.head) != (
        "DistilBert",
        "ForMultipleChoice",
    ):  # doesn't flatten them
        limit = model.config.max_position_embeddings
        batch["position_ids"] = draw.integers(2, limit, shape)
    if draw.chance(0.15) and case.head != "ForMultipleChoice" and case.family != "RoCBert":
        table = model.get_input_embeddings().weight
        batch["inputs_embeds"] = table.detach()[batch.pop("input_ids")].clone()
    if case.head == "ForMultipleChoice":
        batch = {n: v.unsqueeze(0).repeat(2, *(1,) * v.dim()) for n, v in batch.items()}
    if draw.chance(0.6):
        batch |= labels_for(case, draw, mask, model)
    return batch | case.calls, mask


def labels_for(case: Case, draw: Draw, mask: Tensor, model: Any) -> Batch:
    rows, seq = mask.shape
    real = mask.bool()
    n = model.config.num_labels

    def per_token(high: int, p: float) -> Tensor:
        labels = draw.integers(0, high, (rows, seq))
        return labels.masked_fill(~real | ~draw.booleans((rows, seq), p), -100)

    words, pairs = per_token(VOCAB, 0.4), draw.integers(0, 2, (rows,))
    if case.head == "ForMaskedLM":
        return {"labels": words}
    if case.head == "ForNextSentencePrediction":
        return {"labels": pairs}
    if case.head == "ForSequenceClassification":
        return {"labels": draw.normal((rows,)).to(case.dtype) if n == 1 else draw.integers(0, n, (rows,))}
    if case.head == "ForMultipleChoice":
        return {"labels": draw.integers(0, rows, (2,))}
    if case.head == "ForTokenClassification":
        return {"labels": per_token(n, 0.9)}
    if case.head == "ForQuestionAnswering":
        return {name: draw.integers(0, seq, (rows,)) for name in ("start_positions", "end_positions")}
    if case.head == "ForPreTraining":
        if case.family == "Albert":
            return {"labels": words, "sentence_order_label": pairs}
        if case.family == "Electra":
            return {"labels": draw.integers(0, 2, (rows, seq))}
        if case.family != "RoCBert":
            return {"labels": words, "next_sentence_label": pairs}
    return {}


def flat(name: str, value: Any) -> dict[str, Tensor]:
    """Every tensor in an output, by its path."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        return {k: t for n, v in value.items() for k, t in flat(f"{name}.{n}".lstrip("."), v).items()}
    if isinstance(value, (tuple, list)):
        return {k: t for i, v in enumerate(value) for k, t in flat(f"{name}[{i}]", v).items()}
    return {}


@dataclass
class Ran:
    outputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None


def run(model: Any, batch: Batch, case: Case, weights: dict[str, Tensor], where: Tensor) -> Ran:
    """One call of a model, and its gradients: of the loss, or of its outputs where they are read."""
    given = {
        n: v.double()
        if model.dtype == torch.float64 and isinstance(v, Tensor) and v.is_floating_point()
        else v
        for n, v in batch.items()
    }
    for parameter in model.parameters():
        parameter.grad = None
    autocast = case.autocast and model.dtype != torch.float64
    try:
        with torch.set_grad_enabled(case.grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = flat("", model(**given))
        if not case.grad:
            return Ran(outputs)
        loss = outputs.get("loss")
        if loss is None and "labels" in given and case.calls.get("return_dict") is False:
            loss = outputs.get("[0]")
        if loss is None or loss.dim():
            total = []
            for name, x in outputs.items():
                if x.requires_grad and x.numel():
                    if name not in weights:
                        weights[name] = torch.randn(
                            x.shape, generator=torch.Generator().manual_seed(len(weights))
                        )
                    w = read(weights[name], where).to(x.dtype)
                    total.append((read(x, where) * w).sum())
            loss = torch.stack([t.double() for t in total]).sum()
        loss.backward()
    except Exception as error:  # what it is, is compared with the stock model's
        return Ran(error=error)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Ran(outputs, found)


def read(x: Tensor, where: Tensor) -> Tensor:
    """What is read of an output: the positions ``where`` is True of what has a value a token, else all of it."""
    if x.dim() >= 2 and x.shape[:2] == where.shape:
        return x[where]
    if x.dim() == 4 and x.shape[0] == where.shape[0] and x.shape[2:] == (where.shape[1],) * 2:  # attentions
        return x.transpose(1, 2)[where]
    return x


def resize(model: Any) -> Any:
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    return model


def through_pickle(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def reload(model: Any) -> Any:
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


def scale_weights(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    return model


def freeze(model: Any) -> Any:
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return model


def hook(model: Any) -> Any:
    """A forward hook that changes what a module returns, on the first LayerNorm."""
    norm = next(m for m in model.modules() if isinstance(m, nn.LayerNorm))
    norm.register_forward_hook(halved)
    return model


def halved(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output * 0.5


def hook_on_linear(model: Any) -> Any:
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    linear[len(linear) // 2].register_forward_hook(halved)
    return model


def train_and_back(model: Any) -> Any:
    return model.train(not model.training).train(not model.training)


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def called(model: Any) -> Any:
    """A first call of another size, in evaluation."""
    training = model.training
    ids = torch.randint(2, VOCAB, (2, 1, 6) if "MultipleChoice" in type(model).__name__ else (2, 6))
    with torch.no_grad():
        model.eval()(input_ids=ids)
    return model.train(training)


# What is done to both models after one of them was accelerated.
ACTIONS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "load_state_dict": reload,
    "weights in place": scale_weights,
    "freeze": freeze,
    "hook": hook,
    "hook on a Linear": hook_on_linear,
    "resize": resize,
    "train and back": train_and_back,
    "checkpointing": checkpointed,
    "called": called,
}


def shared(named: dict[str, Tensor]) -> set[frozenset[str]]:
    """Pairs of names whose tensors lie in one storage."""
    by_address: dict[int, list[str]] = {}
    for name, tensor in named.items():
        if tensor.numel():
            by_address.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return {
        frozenset((a, b)) for same in by_address.values() for i, a in enumerate(same) for b in same[i + 1 :]
    }


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def look_of(model: nn.Module) -> dict[str, Any]:
    """What must be as before after :func:`pyaccel.restore`."""
    return {
        name: (type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
        for name, m in model.named_modules()
    }


def try_case(seed: int, number: int) -> Tried:
    draw = Draw("models", seed, number)
    case = draw_case(draw)
    tried = Tried(str(case))
    with contextlib.redirect_stdout(io.StringIO()):
        transformers.logging.set_verbosity_error()
        tried.wrong += ModelCase(draw, case, tried).wrong()
    return tried


class ModelCase:
    """One case, and everything that must hold of it."""

    def __init__(self, draw: Draw, case: Case, tried: Tried) -> None:
        self.draw, self.case, self.tried = draw, case, tried
        self.model = make(case, draw)
        self.naive = copy.deepcopy(self.model)
        self.batch, self.mask = batch_for(case, draw, self.model)
        everything = not case.options["packing"]
        self.where = torch.ones_like(self.mask).bool() if everything else self.mask.bool()
        given = self.batch.get("attention_mask")
        if given is None or given.dim() > 2:
            self.where = torch.ones_like(self.where)
        if case.head == "ForMultipleChoice":
            self.where = self.where.repeat(2, 1)

    def wrong(self) -> list[str]:
        model, case = self.model, self.case
        state, params = copy.deepcopy(model.state_dict()), shared(parameters_of(model))
        try:
            pyaccel.accelerate(model, **case.options)
        except pyaccel.errors.NotSupportedError as error:
            return [] if case.options["backend"] == "triton" else [f"accelerate: {error}"]
        found = [f"after accelerate {what}" for what in state_wrong(state, model.state_dict())]
        if case.action:
            torch.manual_seed(1)
            try:
                self.model = ACTIONS[case.action](model)
            except Exception as error:
                return [f"{case.action} of the accelerated model: {describe(error)}"]
            torch.manual_seed(1)
            self.naive = ACTIONS[case.action](self.naive)
        model = self.model
        truth = copy.deepcopy(self.naive).double()
        weights: dict[str, Tensor] = {}
        naive = run(self.naive, self.batch, case, weights, self.where)
        ours = run(model, self.batch, case, weights, self.where)
        self.tried.calls += 1
        found += self.errors_wrong(ours, naive)
        if ours.error is None and naive.error is None:
            right = run(truth, self.batch, case, weights, self.where)
            if right.error is not None:
                return [*found, f"the stock model in fp64: {describe(right.error)}"]
            found += self.results_wrong(ours, right, naive, weights)
            found += self.memory_wrong(ours, naive)
            again = run(model, self.batch, case, weights, self.where)
            for name, t in ours.outputs.items():
                if again.error is None and not same_bits(
                    read(t, self.where), read(again.outputs[name], self.where)
                ):
                    found.append(f"{name} differs in a second call")
        if more := shared(parameters_of(model)) - params:
            found.append(f"parameters that share a storage: {sorted(map(sorted, more))[:3]}")
        if not case.action:
            found += [f"after calls {what}" for what in state_wrong(state, model.state_dict())]
        return found + self.restored_wrong(naive, weights)

    def restored_wrong(self, naive: Ran, weights: dict[str, Tensor]) -> list[str]:
        try:
            pyaccel.restore(self.model)
        except Exception as error:
            return [f"restore: {describe(error)}"]
        found = []
        expected = look_of(self.naive)
        after = look_of(self.model)
        if after != expected:
            name = next((n for n in expected if after.get(n) != expected[n]), "")
            found.append(f"after restore {name!r} is {after.get(name)}, not {expected.get(name)}")
        if self.model.config._attn_implementation != self.naive.config._attn_implementation:
            found.append(f"after restore attention is {self.model.config._attn_implementation}")
        if naive.error is None:
            again = run(self.model, self.batch, self.case, weights, self.where)
            if again.error is not None:
                found.append(f"after restore: {describe(again.error)}")
            elif not all(same_bits(t, again.outputs[n]) for n, t in naive.outputs.items()):
                found.append("after restore the outputs don't have the stock model's bits")
        return found

    def errors_wrong(self, ours: Ran, naive: Ran) -> list[str]:
        if (ours.error is None) == (naive.error is None):
            return []
        if ours.error is not None:
            return [f"{describe(ours.error)}, and the stock model takes it"]
        return [f"is taken, and the stock model says {describe(naive.error)}"]

    def results_wrong(self, ours: Ran, right: Ran, naive: Ran, weights: dict[str, Tensor]) -> list[str]:
        if list(ours.outputs) != list(naive.outputs):
            return [f"outputs {list(ours.outputs)}, the stock model's are {list(naive.outputs)}"]
        found = []
        others: list[Ran] = []

        def several(name: str) -> list[Ran]:
            if not others:
                others.extend(self.other_naives(weights))
            return [o for o in others if name in o.outputs or name in o.gradients or name == "gradients"]

        for name, out in ours.outputs.items():
            plain, true = naive.outputs[name], right.outputs[name]
            if self.case.autocast and (out.dtype, plain.dtype) == (torch.float32, torch.bfloat16):
                out = out.to(
                    plain.dtype
                )  # our LayerNorm's output is float32 under autocast, as it is on a GPU
            if out.dtype != plain.dtype or out.shape != plain.shape:
                found.append(
                    f"{name} is {out.dtype} {tuple(out.shape)}, not {plain.dtype} {tuple(plain.shape)}"
                )
                continue
            if not out.is_floating_point():
                continue
            what = judged(*(read(t.detach(), self.where) for t in (out, true, plain)))
            if what is not None:
                naives = [read(o.outputs[name].detach(), self.where) for o in several(name)]
                what = judged(*(read(t.detach(), self.where) for t in (out, true, plain)), *naives)
            if what is not None:
                found.append(f"{name}: {what}")
        if ours.gradients.keys() != naive.gradients.keys():
            missing = sorted(set(naive.gradients) ^ set(ours.gradients))
            return [*found, f"gradients of {missing[:4]} of one of them alone"]
        left = [n for n in naive.gradients if not NOTHING.search(n)]
        if self.case.head == "ForMultipleChoice":
            left = [n for n in left if not OF_A_CHOICE.search(n)]
        if left:
            together = [in_one(r.gradients, right.gradients, left) for r in (ours, right, naive)]
            what = judged(*together)
            if what is not None:
                naives = [in_one(o.gradients, right.gradients, left) for o in several("gradients")]
                what = judged(*together, *naives)
            if what is not None:
                found.append(f"gradients: {what}")
        return found

    def other_naives(self, weights: dict[str, Tensor]) -> list[Ran]:
        """The stock model's results with roundings of other places: eager attention, rows in reverse, other threads."""
        runs = []
        model = copy.deepcopy(self.naive)
        other = "sdpa" if self.case.implementation == "eager" else "eager"
        model.set_attn_implementation(other)
        runs.append(run(model, self.batch, self.case, weights, self.where))
        # The same numbers in another order of hidden units would be best; scaled weights of the embeddings' LayerNorm
        # round elsewhere too, and are what can be had of any family.
        for factor in (1.0 + 2**-9, 1.0 - 2**-9, 1.0 + 2**-8):
            runs.append(self.perturbed(factor, weights))
        return [r for r in runs if r.error is None]

    def perturbed(self, factor: float, weights: dict[str, Tensor]) -> Ran:
        """Errors of the stock model with embeddings scaled by ``factor``, put on the truth of the unscaled one."""
        plain, wide = copy.deepcopy(self.naive), copy.deepcopy(self.naive).double()
        with torch.no_grad():
            plain.get_input_embeddings().weight.mul_(factor)
            wide.get_input_embeddings().weight.copy_(plain.get_input_embeddings().weight)
        true = copy.deepcopy(self.naive).double()
        a, b, c = (run(m, self.batch, self.case, weights, self.where) for m in (plain, wide, true))
        if a.error or b.error or c.error:
            return Ran(error=a.error or b.error or c.error)

        def onto(x: dict[str, Tensor], y: dict[str, Tensor], z: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                n: (z[n] + (x[n].double() - y[n])).to(x[n].dtype) if x[n].is_floating_point() else x[n]
                for n in x
            }

        return Ran(onto(a.outputs, b.outputs, c.outputs), onto(a.gradients, b.gradients, c.gradients))

    def memory_wrong(self, ours: Ran, naive: Ran) -> list[str]:
        """Results share no memory where the stock model's don't: with each other, with parameters, with inputs."""

        def everything(model: nn.Module, ran: Ran) -> dict[str, Tensor]:
            given = {f"input {n}": v for n, v in self.batch.items() if isinstance(v, Tensor)}
            gradients = {f"gradient of {n}": t for n, t in ran.gradients.items()}
            return {**parameters_of(model), **ran.outputs, **gradients, **given}

        more = shared(everything(self.model, ours)) - shared(everything(self.naive, naive))
        # A hidden state may lie in one storage with the next one's: what is read of them is another matter.
        return [f"share memory: {sorted(map(sorted, more))[:3]}"] if more else []


def in_one(found: dict[str, Tensor], truth: dict[str, Tensor], names: list[str]) -> Tensor:
    """Gradients in one vector, each over the largest element that it should have.

    Where that is below a ten-thousandth of the largest of all, it is what cancels, such as of queries with one key, and
    its rounding that of the largest: over which it is taken.
    """
    largest = {n: truth[n].abs().max() for n in names}
    most = max(largest.values()).clamp(min=1e-30)
    over = {n: own if own > 1e-4 * most else most for n, own in largest.items()}
    return torch.cat([(found[n].double() / over[n]).flatten() for n in names]).to(found[names[0]].dtype)


def judged(out: Tensor, truth: Tensor, *naives: Tensor) -> str | None:
    if out.numel() == 0:
        return None
    finite = truth.isfinite()
    plain = naives[0]
    if not torch.equal(out.isfinite() | ~plain.isfinite(), finite | ~plain.isfinite()):
        return "isn't finite where the stock model's is"
    out, truth, *rest = (
        t.double().masked_fill(~finite | ~plain.isfinite(), 0.0).to(t.dtype) for t in (out, truth, *naives)
    )
    if out.numel() == 1:  # one number, in which errors of the stock model may cancel by chance
        error = min((out.double() - t.double()).abs().item() for t in (truth, rest[0]))
        if error <= EQUIVALENT_EPS * torch.finfo(out.dtype).eps * max(truth.abs().item(), 1.0):
            return None
    verdict = judge_by_several(out, truth.double(), rest)
    return None if verdict.passed else str(verdict)


def state_wrong(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    if list(before) != list(after):
        return [f"state_dict() has other keys: {sorted(set(before) ^ set(after))[:4]}"]
    return [f"{n} of state_dict() is another" for n in before if not same_bits(before[n], after[n])]


def describe(error: Exception | None) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:250]}"
