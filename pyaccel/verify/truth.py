"""What the stock model gives, in the dtype under test and in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyaccel.dtypes import DTYPES
from pyaccel.verify.trace import Trace, trace_stock

# Gradients are linear in the loss: each factor gives the plain gradients with other roundings.
LOSS_FACTORS = (1.0, 1.3, 0.7)


class Trained(NamedTuple):
    """The loss of a training step, None without labels, and parameter -> its gradient."""

    loss: Tensor | None
    gradients: dict[str, Tensor | None]


class Truth:
    """The stock model in one dtype, and what it gives in that dtype and in fp64."""

    def __init__(self, model: nn.Module, batch: dict[str, Any], mask: Tensor, dtype: str) -> None:
        self.dtype, self.batch, self.mask = dtype, batch, mask
        self.stock = copy.deepcopy(model).to(DTYPES[dtype]).requires_grad_(True)
        exact = copy.deepcopy(self.stock).double()
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.outputs, self.trace = self._evaluate(exact)
        self.naive_outputs, self.naive_trace = self._evaluate(self.stock)
        self.trained = self.train(exact)
        self.naive_trained = [self.train(self.stock, factor=factor) for factor in LOSS_FACTORS]
        self.together = _judged_together(self.stock)

    def _evaluate(self, model: nn.Module) -> tuple[dict[str, Tensor], Trace]:
        with trace_stock(views_of(model), self.mask) as trace:
            return self.evaluate(model), trace

    def inputs(self, model: nn.Module, rows: int | None = None, copies: int = 1) -> dict[str, Any]:
        """The batch in the dtype of ``model``, or its first rows, so many times."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        count = next(value for value in self.batch.values() if isinstance(value, Tensor)).shape[0]
        given = {}
        for name, value in self.batch.items():
            if isinstance(value, Tensor) and value.is_floating_point() and name != "labels":
                value = value.to(dtype)
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == count:
                value = value[:rows].repeat(copies, *[1] * (value.dim() - 1)) if copies > 1 else value[:rows]
            given[name] = value
        return given

    def evaluate(self, model: nn.Module, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """Name -> values of real tokens, of each floating output in evaluation."""
        model.eval()
        with torch.no_grad():
            return self._named((model if call is None else call)(**self.inputs(model)))

    def train(
        self, model: nn.Module, call: Callable[..., Any] | None = None, *, factor: float = 1.0
    ) -> Trained:
        """Training with no dropout; gradients are of ``factor`` times the loss, and divided by it again."""
        with without_dropout(model):
            out = (model if call is None else call)(**self.inputs(model))
            loss = out.get("loss")
            objective = loss
            if objective is None:
                objective = sum((_weights_like(x) * x).sum() for x in self._named(out).values())
            model.zero_grad(set_to_none=True)
            (objective if factor == 1.0 else factor * objective).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if n in self.trainable}
        if factor != 1.0:
            gradients = {
                n: None if g is None else (g.double() / factor).to(g.dtype) for n, g in gradients.items()
            }
        model.zero_grad(set_to_none=True)
        return Trained(None if loss is None else loss.detach(), gradients)

    def _named(self, out: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in out.items():
            values = value if isinstance(value, (tuple, list)) else (value,)
            for i, x in enumerate(values):
                if not isinstance(x, Tensor) or not x.is_floating_point():
                    continue
                real = x[self.mask] if x.shape[:2] == self.mask.shape else x
                found[name if len(values) == 1 else f"{name}[{i}]"] = real
        # The error of a single number is luck: it is judged beside the values that it is made of.
        others = [name for name in found if name != "loss"]
        if "loss" in found and others:
            beside = found[others[0]].flatten()
            found["loss"] = joined(found["loss"], beside)
        return found


def views_of(model: nn.Module) -> list[Any]:
    """The layers of the families that pyaccel knows, under BERT's names."""
    from pyaccel.hf.families import family_of, is_encoder

    return [
        family.view(layer)
        for module in model.modules()
        if (family := family_of(module)) is not None and is_encoder(module)
        for layer in family.layers(module)
    ]


def _judged_together(model: nn.Module) -> dict[str, list[str]]:
    """Parameters whose gradients are judged as one: the biases of q, k and v, since that of keys is rounding alone.

    (Softmax doesn't change where the same is added to all scores of a row: the truth of that gradient is 0.)
    """
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {name: [name] for name in names.values()}
    for view in views_of(model):
        heads = view.attention.self
        biases = [names[id(x.bias)] for x in (heads.query, heads.key, heads.value) if x.bias is not None]
        if len(biases) == 3 and biases[1] in groups:
            groups[f"{biases[0]}, key and value"] = biases
            for name in biases:
                groups.pop(name, None)
    return groups


class without_dropout:
    """Training mode, in which nothing is dropped but by the modules in ``but``."""

    def __init__(self, model: nn.Module, but: Iterable[nn.Module] = ()) -> None:
        self.model = model
        kept = {id(module) for module in but}
        self.dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and id(m) not in kept]
        self.before = [module.p for module in self.dropouts]

    def __enter__(self) -> None:
        self.model.train()
        for module in self.dropouts:
            module.p = 0.0

    def __exit__(self, *exc_info: object) -> None:
        for module, p in zip(self.dropouts, self.before, strict=True):
            module.p = p
        self.model.eval()


def _weights_like(x: Tensor) -> Tensor:
    """Fixed weights from -1 to 1 that favor nothing, the same in every dtype up to its rounding."""
    n = torch.arange(x.numel(), dtype=torch.float64, device=x.device)
    return torch.sin(n * 12.9898).view(x.shape).to(torch.bfloat16).to(x.dtype)


def joined(loss: Tensor, beside: Tensor) -> Tensor:
    return torch.cat([loss.reshape(1).to(beside.dtype), beside])
