"""CUDA graphs of an encoder's layers, for small batches in evaluation: one launch instead of a hundred.

A few sequences keep a GPU busy for less time than Python takes to launch the kernels. A graph is captured once and then
launched as a whole (https://developer.nvidia.com/blog/cuda-graphs). It is of one shape, so a batch is put into the next
larger one of a few (:func:`bucket`), what is added is masked, and what comes out is cut to the batch again.

A graph holds the addresses of weights, not their values: what is changed in place is used, and where one lies elsewhere
all graphs are captured anew. What is no tensor (a LayerNorm's eps, say) is as it was at the capture.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyaccel import dispatch

# Positions of a batch, padding too, up to which it counts as small. BERT-base takes 0.7 TFLOP for so many, a
# millisecond or two of a large GPU, about what launching its kernels one by one takes. Not measured on a card yet.
MOST_TOKENS = 4096
# Graphs of one encoder; the one that was used longest ago makes room.
MOST_GRAPHS = 64
_LEAST_SEQ = 16

# Captures and the three steps of a replay: copy in, launch, copy out. All of it is asynchronous, so nobody waits long.
_lock = threading.Lock()


def bucket(size: int, least: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that is neither below ``size`` nor ``least``."""
    power = 1 << (max(size, least) - 1).bit_length()
    return power * 3 // 4 if max(size, least) <= power * 3 // 4 else power


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


class Graphs:
    """The graphs of one encoder, as its modules are now: these, whose parameters and buffers the graphs read."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._tensors = [d for part in modules for d in (part._parameters, part._buffers) if d]
        self._addresses: list[int] = []
        # By what they depend on, the last one used last.
        self._captured: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        # Memory that graphs of one stream share: they never run at the same time.
        self._pools: dict[Any, Any] = {}

    def __call__(
        self, hidden: Tensor, mask: Tensor | None, run: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, bool]:
        """``run(hidden, mask)`` by a graph, and whether that had to be captured.

        Args:
            hidden: ``[batch, seq, hidden_size]`` on a GPU.
            mask: bool ``[batch, seq]``, or None if all are tokens.
            run: from states and mask to states of the same shape; it must not wait for the device.

        Raises:
            RuntimeError: something in ``run`` can't be captured.
        """
        addresses = [t.data_ptr() for tensors in self._tensors for t in tensors.values() if t is not None]
        with _lock, torch.no_grad():
            if addresses != self._addresses:
                self._captured.clear()
                self._addresses = addresses
            stream = stream_of(hidden.device)
            shape = (bucket(hidden.shape[0]), bucket(hidden.shape[1], _LEAST_SEQ))
            key = (*shape, hidden.dtype, stream, *_settings())
            graph = self._captured.get(key)
            is_new = graph is None
            if graph is None:
                graph = self._capture(shape, hidden, stream, run)
                self._captured[key] = graph
                if len(self._captured) > MOST_GRAPHS:
                    self._captured.popitem(last=False)
            self._captured.move_to_end(key)
            return graph(hidden, mask), is_new

    def _capture(
        self, shape: tuple[int, int], like: Tensor, stream: Any, run: Callable[[Tensor, Tensor], Tensor]
    ) -> Graph:
        # Not of inference mode, in which the first call may be: others couldn't write to the buffers.
        with torch.inference_mode(False), torch.no_grad():
            hidden = torch.zeros(*shape, like.shape[2], dtype=like.dtype, device=like.device)
            mask = torch.ones(shape, dtype=torch.bool, device=like.device)
            if stream not in self._pools:
                self._pools[stream] = new_pool()
            try:
                out, replay = capture(lambda: run(hidden, mask), self._pools[stream], like.device)
            except Exception as error:
                raise RuntimeError(
                    f"pyaccel: a CUDA graph of {shape[0]} x {shape[1]} positions could not be captured: {error}\n"
                    f"Something in the layers waits for the device or is not allowed in a capture; accelerate "
                    f"without cuda_graphs=True"
                ) from error
        return Graph(hidden, mask, out, replay)


def why_not(hidden: Tensor) -> str | None:
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
        dispatch.requests(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    )


# ---- the device ----


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def stream_of(device: torch.device) -> Any:
    return torch.cuda.current_stream(device).cuda_stream


def is_capturing() -> bool:
    """Whether what is launched now becomes part of a graph, in which nothing may wait for the device. On a GPU."""
    return torch.cuda.is_current_stream_capturing()


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
