"""What `accelerate` did to a model, how its calls went, and what `explain` found. Needs no transformers."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from typing import Any


def _by_reason() -> dict[str, Counter[str]]:
    return defaultdict(Counter)


@dataclass
class Report:
    """What was swapped in a model and what not, and which executors served its calls since.

    Executors are "packed" (all layers without padding), "onednn" (those on a CPU without gradient; with `prepack`
    "onednn, prepacked"), "cuda_graph", "padded" (one layer) and "masked_lm_loss" (a head, where `skip_logits` asks for
    it).

    Attributes:
        swapped: name of each swapped module -> its class.
        not_swapped: name of each module that was left alone -> why.
        attention: name of each model that got pyaccel's attention alone -> its class.
        packing, backend, prepack, cuda_graphs, skip_logits: as given to `accelerate`.
        served: calls that did not run the stock modules, by executor, counted per layer: one forward pass of a 6-layer
            model is 6 calls.
        refused: executor -> reason -> how many calls it could not serve: passes of an encoder, or calls of a layer.
        captured: CUDA graphs that were captured.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    not_swapped: dict[str, str] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)
    packing: bool = True
    backend: str = "auto"
    prepack: bool = False
    cuda_graphs: bool | str = "auto"
    skip_logits: bool = False
    served: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Counter[str]] = field(default_factory=_by_reason)
    captured: int = 0

    def reset(self) -> None:
        """Set all counts to 0."""
        self.served.clear()
        self.refused.clear()
        self.captured = 0

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, strings and numbers, for JSON."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["refused"] = {name: dict(reasons) for name, reasons in self.refused.items() if reasons}
        return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}

    def __str__(self) -> str:
        classes = Counter(self.swapped.values())
        what = ", ".join(f"{count} {name}" for name, count in classes.items()) or "nothing"
        how = "padding dropped once" if self.packing else "padded"
        lines = [f"accelerated: {what} ({how}; backend {self.backend})"]
        lines += [f"  attention alone: {name or kind} ({kind})" for name, kind in self.attention.items()]
        lines += [f"  left alone: {name}: {reason}" for name, reason in self.not_swapped.items()]
        served = ", ".join(f"{count} {name}" for name, count in self.served.items()) or "0"
        lines.append(f"layer calls served by: {served}")
        if self.captured:
            lines.append(f"  {self.captured} CUDA graphs captured")
        lines += [
            f"  not by {name}: {count}: {reason}"
            for name, reasons in self.refused.items()
            for reason, count in reasons.most_common()
        ]
        return "\n".join(lines)


@dataclass
class Explanation:
    """Which backend serves each op of an accelerated model and why, beside its :class:`Report`.

    Attributes:
        dtype, device: the model's.
        backends: op -> backend, for the ops of one layer.
        reasons: op -> why that backend and no other.
        report: the model's report.
        int8: size of an int8 layer -> rows -> how many times as fast as in floating point it was measured to be on
            this kind of machine.
    """

    dtype: str
    device: str
    backends: dict[str, str]
    reasons: dict[str, str]
    report: Report
    int8: dict[str, dict[int, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, strings and numbers, for JSON."""
        return {
            "dtype": self.dtype,
            "device": self.device,
            "backends": dict(self.backends),
            "reasons": dict(self.reasons),
            "report": self.report.as_dict(),
            "int8": {size: dict(rows) for size, rows in self.int8.items()},
        }

    def __str__(self) -> str:
        width = max(map(len, self.backends), default=0)
        lines = [f"{self.dtype} on {self.device}:"]
        lines += [f"  {op:{width}}  {name:9}  {self.reasons[op]}" for op, name in self.backends.items()]
        for size, rows in self.int8.items():
            times = ", ".join(f"{speedup:.2f} at {n}" for n, speedup in rows.items())
            lines.append(f"  int8, {size}: times as fast as floating point, by rows: {times}")
            slower = [n for n, speedup in rows.items() if speedup < 1]
            if slower:
                few = ", ".join(map(str, slower))
                lines.append(
                    f"    not faster at {few} rows: quantize(..., skip=[...]) leaves layers floating"
                )
        return "\n".join([*lines, str(self.report)])
