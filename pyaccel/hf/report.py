"""What `accelerate` did to a model, how its calls went, and what `explain` found. Needs no transformers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class Report:
    """What was swapped in a model and what not, and how often the fast path served since.

    Calls are counted per layer: one forward pass of a 6-layer model is 6 calls.

    Attributes:
        swapped: name of each swapped module -> its class.
        not_swapped: name of each module that was left alone -> why.
        attention: name of each model that got pyaccel's attention alone -> its class.
        packing, backend, prepack, cuda_graphs, skip_logits: as given to `accelerate`.
        fast: calls that the fast path served, by kind: "packed" (no padding), "padded" and "by a graph".
        fallbacks: calls that went to the stock layer, by reason.
        prepacked: of those calls, the ones that ran on weights in oneDNN's order.
        captured: CUDA graphs that were captured.
        not_graphed: forward passes that no CUDA graph could serve, by reason, where they were asked for.
        logits_skipped: training passes whose masked-language-model head computed the loss of masked tokens alone.
        not_skipped: training passes that computed all logits, by reason, where `skip_logits` was asked for.
        not_packed: forward passes that could not drop their padding and ran layer by layer, by reason.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    not_swapped: dict[str, str] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)
    packing: bool = True
    backend: str = "auto"
    prepack: bool = False
    cuda_graphs: bool = False
    skip_logits: bool = False
    fast: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    not_packed: Counter[str] = field(default_factory=Counter)
    not_graphed: Counter[str] = field(default_factory=Counter)
    not_skipped: Counter[str] = field(default_factory=Counter)
    logits_skipped: int = 0
    prepacked: int = 0
    captured: int = 0

    def reset(self) -> None:
        """Set all counts to 0."""
        for counts in (self.fast, self.fallbacks, self.not_packed, self.not_graphed, self.not_skipped):
            counts.clear()
        self.prepacked = self.captured = self.logits_skipped = 0

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, strings and numbers, for JSON."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}

    def __str__(self) -> str:
        classes = Counter(self.swapped.values())
        what = ", ".join(f"{count} {name}" for name, count in classes.items()) or "nothing"
        how = "padding dropped once" if self.packing else "padded"
        lines = [f"accelerated: {what} ({how}; backend {self.backend})"]
        lines += [f"  attention alone: {name or kind} ({kind})" for name, kind in self.attention.items()]
        lines += [f"  left alone: {name}: {reason}" for name, reason in self.not_swapped.items()]
        calls = self.fast.total() + self.fallbacks.total()
        fast = ", ".join(f"{count} {kind}" for kind, count in self.fast.items()) or "0"
        lines.append(f"layer calls: {calls}; on the fast path: {fast}")
        if self.prepack:
            lines.append(f"  {self.prepacked} of them on weights in oneDNN's order")
        if self.cuda_graphs:
            lines.append(f"  {self.captured} CUDA graphs captured")
        if self.skip_logits:
            lines.append(f"  {self.logits_skipped} training passes skipped the logits")
        lines += [
            f"  {count} training passes computed all logits: {reason}"
            for reason, count in self.not_skipped.most_common()
        ]
        lines += [
            f"  {count} ran the stock layer: {reason}" for reason, count in self.fallbacks.most_common()
        ]
        lines += [
            f"  {count} forward passes kept their padding: {reason}"
            for reason, count in self.not_packed.most_common()
        ]
        lines += [
            f"  {count} forward passes by no CUDA graph: {reason}"
            for reason, count in self.not_graphed.most_common()
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
