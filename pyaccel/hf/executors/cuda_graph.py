"""CUDA graphs of an encoder's layers, for small batches in evaluation: one launch instead of a hundred.

A few sequences keep a GPU busy for less time than Python takes to launch the kernels. A graph is captured once and then
launched as a whole (https://developer.nvidia.com/blog/cuda-graphs). It is of one shape, so a batch is put into the next
larger one of a few (:func:`bucket`), what is added is masked, and what comes out is cut to the batch again.

A graph holds the addresses of weights, not their values: what is changed in place is used, and where one was
reallocated all graphs are captured again. What is no tensor (a LayerNorm's eps, say) is in the modules' fingerprint.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel import dispatch
from pyaccel.hf.device import is_capturing, on_gpu, stream_of
from pyaccel.hf.eligibility import Call
from pyaccel.hf.executors.packed import Dropouts
from pyaccel.hf.executors.padded import run_layer
from pyaccel.hf.families import Family
from pyaccel.hf.fingerprint import storage
from pyaccel.hf.report import Report

# Positions of a batch, padding too, up to which it counts as small. BERT-base takes 0.7 TFLOP for so many, a
# millisecond or two of a large GPU, about what launching its kernels one by one takes. Not measured on a card yet.
MOST_TOKENS = 4096
# Graphs of one encoder; the one that was used longest ago makes room.
MOST_GRAPHS = 64
_LEAST_SEQ = 16

# Captures and the three steps of a replay: copy in, launch, copy out. All of it is asynchronous, so nobody waits long.
_lock = threading.Lock()


@functools.lru_cache(maxsize=4096)
def bucket(size: int, least: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that is neither below ``size`` nor ``least``."""
    power = 1 << (max(size, least) - 1).bit_length()
    return power * 3 // 4 if max(size, least) <= power * 3 // 4 else power


@functools.lru_cache(maxsize=4096)
def graphable(batch: int, seq: int) -> bool:
    """Whether a batch of that size counts as small, as the one of its bucket."""
    return bucket(batch) * bucket(seq, _LEAST_SEQ) <= MOST_TOKENS


@dataclass(eq=False)
class Graph:
    """One captured graph, with the buffers that it reads and the one that it writes."""

    hidden: Tensor
    mask: Tensor
    out: Tensor
    replay: Callable[[], object]

    def __call__(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        batch, seq = hidden.shape[:2]
        self.hidden[:batch, :seq].copy_(hidden)  # what is beside it is masked, and may be anything
        if self.mask.shape != hidden.shape[:2]:
            self.mask.zero_()
        here = self.mask[:batch, :seq]
        if mask is None:
            here.fill_(True)
        else:
            here.copy_(mask)
        self.replay()
        return self.out[:batch, :seq].clone()


class CudaGraph:
    """All layers on the padded batch in one launch; zeros in the padding where packing would leave them.

    Args:
        modules: all inside of the encoder, whose parameters and buffers the graphs read.
        clears: whether to write those zeros.
        is_asked_for: graphs were asked for, not chosen: a size is captured when it comes up first, not when it comes up
            again, and a capture that fails is an error, not a warning.
        ineligible: why these modules can't be captured; None if they can.
        report: counts the captures.
    """

    name = "cuda_graph"

    def __init__(
        self,
        family: Family,
        layers: list[Any],
        modules: list[nn.Module],
        clears: bool,
        is_asked_for: bool,
        ineligible: str | None,
        report: Report,
    ) -> None:
        self.layers = len(layers)
        self._family = family
        self._modules = layers
        self._clears = clears
        self._is_asked_for = is_asked_for
        self._ineligible = ineligible
        self._report = report
        self._dropouts = Dropouts(family, layers)
        tensors = [t for module in modules for t in (*module._parameters.values(), *module._buffers.values())]
        self._tensors = [t for t in tensors if t is not None]
        self._addresses: list[int] = []
        # By what they depend on, the last one used last.
        self._captured: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        self._met: set[tuple[Any, ...]] = set()
        # Memory that graphs of one stream share: they never run at the same time.
        self._pools: dict[int, Any] = {}

    def why_not(self, call: Call) -> str | None:
        hidden = call.hidden
        if reason := _why_not(hidden) or call.keeps_padding:
            return reason
        if call.is_packed:
            return "input packed by the caller"
        if self._dropouts.act():
            return "dropout"
        if self._ineligible is not None:
            return self._ineligible
        key = call.graph = self._key(hidden)
        if self._is_asked_for or key in self._captured or key in self._met:
            return None
        self._met.add(key)
        return "the first batch of its size: a graph is captured when the size comes up again"

    def run(self, module: Any, call: Call) -> Tensor:
        hidden = call.hidden
        if self._family.enter is not None:
            hidden = self._family.enter(module, hidden)
        try:
            return self._launch(hidden, call.mask, call.graph)
        except CaptureError as error:
            if self._is_asked_for:
                raise
            self._ineligible = str(error)
            warnings.warn(f"{error}. This model runs without CUDA graphs", stacklevel=2)
            return self._run(hidden, call.mask)

    def _run(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self._modules:
            hidden = run_layer(self._family, layer, hidden, mask)
        if self._clears and mask is not None:
            read = mask.clone()
            read[:, 0] = True
            hidden = hidden.masked_fill(~read.unsqueeze(-1), 0.0)
        return hidden

    def _launch(self, hidden: Tensor, mask: Tensor | None, key: tuple[Any, ...]) -> Tensor:
        """By a graph, which is captured where there is none.

        Raises:
            CaptureError: something in the layers can't be captured.
        """
        with _lock, torch.no_grad():
            addresses = storage(self._tensors)
            if addresses != self._addresses:
                self._captured.clear()
                self._addresses = addresses
            graph = self._captured.get(key)
            if graph is None:
                graph = self._captured[key] = self._capture(key[:2], hidden, key[3])
                self._report.captured += 1
                if len(self._captured) > MOST_GRAPHS:
                    self._captured.popitem(last=False)
            self._captured.move_to_end(key)
            return graph(hidden, mask)

    @staticmethod
    def _key(hidden: Tensor) -> tuple[Any, ...]:
        """The shape of the graph that serves such a batch, and all else that a graph depends on."""
        batch, seq = hidden.shape[:2]
        return bucket(batch), bucket(seq, _LEAST_SEQ), hidden.dtype, stream_of(hidden.device), *_settings()

    def _capture(self, shape: tuple[int, int], like: Tensor, stream: int) -> Graph:
        # Not of inference mode, in which the first call may be: others couldn't write to the buffers.
        with torch.inference_mode(False), torch.no_grad():
            hidden = torch.zeros(*shape, like.shape[2], dtype=like.dtype, device=like.device)
            mask = torch.ones(shape, dtype=torch.bool, device=like.device)
            if stream not in self._pools:
                self._pools[stream] = new_pool()
            try:
                out, replay = capture(lambda: self._run(hidden, mask), self._pools[stream], like.device)
            except Exception as error:
                raise CaptureError(
                    f"pyaccel: a CUDA graph of {shape[0]} x {shape[1]} positions could not be captured: {error}\n"
                    f"Something in the layers waits for the device or is not allowed in a capture; accelerate with "
                    f"cuda_graphs=False"
                ) from error
        return Graph(hidden, mask, out, replay)


class CaptureError(RuntimeError):
    """A CUDA graph could not be captured; the message says of which size and why."""


def _why_not(hidden: Tensor) -> str | None:
    """Why this call can't be served by a graph, whatever the modules are; None if it can."""
    if not on_gpu(hidden):
        return f"on the {'CPU' if hidden.is_cpu else hidden.device.type}"
    batch, seq = hidden.shape[:2]
    if not batch * seq:
        return "an empty batch"
    if not graphable(batch, seq):
        return f"more than {MOST_TOKENS} positions"
    if torch.is_grad_enabled():
        return "gradients may be recorded: call under torch.inference_mode() or torch.no_grad()"
    if torch.is_autocast_enabled(hidden.device.type):
        return "autocast: cast the model instead"
    if dispatch.is_recording():
        return "the choices of backends are recorded"
    if is_capturing():
        return "the caller captures a graph"
    return None


def _settings() -> tuple[Any, ...]:
    """What decides which kernels run, and can be changed between two calls."""
    return (
        dispatch.overrides(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    )


# ---- the device ----


def new_pool() -> Any:
    return torch.cuda.graph_pool_handle()


def capture(
    run: Callable[[], Tensor], pool: Any, device: torch.device
) -> tuple[Tensor, Callable[[], object]]:
    """What ``run`` gives, and how to have it computed again in the same place."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and libraries set up before the capture
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # On a stream of this device: torch's own is one of the device that captured first. Other threads (a
        # DataLoader's, say) may go on allocating meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            out = run()
    return out, graph.replay
