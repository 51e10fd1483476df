"""What the masked-language-model loss holds in memory: every tensor that its ops make, and what is saved."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pyaccel import dispatch, ops
from pyaccel.kernels.mlm_loss import config
from pyaccel.ops.mlm_loss import chunked as registered

F32, BF16 = torch.float32, torch.bfloat16
TOKENS, VOCAB, HIDDEN, CHUNK = 200, 1000, 8, 8
LABELS = 100
CHUNK_LOGITS = CHUNK * config.cross_entropy_width(VOCAB)
BACKENDS = ("triton", "torch")


class Recorder(TorchDispatchMode):
    """Notes each tensor that comes into being, inside the registered ops too, and how many bytes live at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.dtype, torch.Size]] = []
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inside = {
            torch.ops.pyaccel.masked_lm_cross_entropy_forward.default: registered.forward_op,
            torch.ops.pyaccel.masked_lm_cross_entropy_backward.default: registered.backward_op,
        }
        kwargs = kwargs or {}
        if func in inside:
            with self:  # what the op's Python does, which happens below the dispatcher
                out = inside[func].registered._init_fn(*args, **kwargs)
            gc.collect()  # Triton's interpreter leaves cycles behind that hold a kernel's arguments
            return out
        given = {id(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and id(t) not in given:
                self.made.append((t.dtype, t.shape))
                storage = t.untyped_storage()
                self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return out

    def largest(self, dtype: torch.dtype) -> int:
        """Elements of the largest tensor of a dtype."""
        return max((size.numel() for kind, size in self.made if kind == dtype), default=0)


def inputs(dtype: torch.dtype, device: torch.device, n_labels: int) -> tuple[list[Tensor], Tensor]:
    shapes = ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    labels = torch.full((TOKENS,), -100, device=device)
    labels[:: TOKENS // n_labels][:n_labels] = 5
    assert int((labels != -100).sum()) == n_labels
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes], labels


def recorded(
    dtype: torch.dtype, backend: str, reduction: str, device: torch.device, n_labels: int = LABELS
) -> Recorder:
    """Forward and backward under the recorder."""
    given, labels = inputs(dtype, device, n_labels)
    with dispatch.use_backend(backend), Recorder() as recorder:
        loss = ops.masked_lm_cross_entropy(*given, labels, reduction=reduction, chunk_size=CHUNK)
        torch.autograd.grad(loss, given, torch.ones_like(loss))
    return recorder


# Every two of dtype, backend and reduction meet.
CASES = pytest.mark.parametrize(
    ("dtype", "backend", "reduction"),
    [
        pytest.param(dtype, backend, reduction, id=f"{name}-{backend}-{reduction}")
        for dtype, name, backend, reduction in (
            (F32, "float32", "triton", "none"),
            (F32, "float32", "torch", "mean"),
            (BF16, "bfloat16", "triton", "mean"),
            (BF16, "bfloat16", "torch", "none"),
        )
    ],
)


@CASES
def test_no_tensor_of_tokens_by_vocabulary_exists(
    dtype: torch.dtype, backend: str, reduction: str, device: torch.device
) -> None:
    recorder = recorded(dtype, backend, reduction, device)
    assert len(recorder.made) > LABELS / CHUNK * 4  # the chunks were seen
    largest = {kind: recorder.largest(kind) for kind in (F32, dtype)}
    assert largest[dtype] == CHUNK_LOGITS
    # In 16 bits the kernel's logits and gradients are so, and of fp32 there is the weight's gradient and less.
    in_fp32 = VOCAB * HIDDEN if (dtype, backend) == (BF16, "triton") else CHUNK * VOCAB
    assert largest[F32] <= max(in_fp32, CHUNK_LOGITS if dtype == F32 else 0)
    assert not any(kind == F32 and size.numel() >= LABELS * VOCAB for kind, size in recorder.made)


@CASES
def test_the_peak_is_gradients_and_a_chunk(
    dtype: torch.dtype, backend: str, reduction: str, device: torch.device
) -> None:
    peaks = {n: recorded(dtype, backend, reduction, device, n).peak for n in (CHUNK, LABELS)}
    of_weight, of_hidden = VOCAB * (HIDDEN + 1), TOKENS * HIDDEN
    # Gradients as they are summed and as they are given, one product before it is added, and of a token 64 bytes at
    # most beside them: its label, whether it counts, its place, its loss.
    gradients = 4 * of_weight + 2 * dtype.itemsize * (of_hidden + of_weight) + 64 * TOKENS
    of_chunk = CHUNK_LOGITS * dtype.itemsize
    if backend == "torch":
        of_chunk += 3 * CHUNK * VOCAB * 4  # logits, with bias, their logarithms
    bound = gradients + of_chunk + CHUNK * HIDDEN * 4
    assert peaks[LABELS] <= bound
    # Far from what plain torch holds, the logits and their gradient or softmax; and no matter how many are masked.
    assert bound < LABELS * VOCAB * (4 + dtype.itemsize) / 2
    assert peaks[LABELS] - peaks[CHUNK] < 64 * LABELS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_what_is_saved(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    given, labels = inputs(dtype, device, LABELS)
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
    with dispatch.use_backend(backend), hooks:
        ops.masked_lm_cross_entropy(*given, labels, reduction="sum", chunk_size=CHUNK)
        # Its gradients, of hidden in its dtype and of the parameters in fp32.
        n_bytes = sum(t.numel() * t.itemsize for t in saved)
        assert n_bytes == TOKENS * HIDDEN * dtype.itemsize + VOCAB * (HIDDEN + 1) * 4
        # Only those that are wanted.
        saved.clear()
        hidden, weight, bias = given
        ops.masked_lm_cross_entropy(hidden, weight.detach(), bias.detach(), labels, reduction="sum")
        assert sum(t.numel() * t.itemsize for t in saved) == TOKENS * HIDDEN * dtype.itemsize
        # A loss a token: the inputs themselves, and nothing of its own.
        saved.clear()
        ops.masked_lm_cross_entropy(*given, labels, reduction="none", chunk_size=CHUNK)
        assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (*given, labels)]
        saved.clear()
        with torch.no_grad():
            ops.masked_lm_cross_entropy(*given, labels)
        assert saved == []


def test_the_recorder_sees_what_plain_torch_makes(device: torch.device) -> None:
    """The same measurement finds the tensors that must not be there, in the reference."""
    recorder = recorded(BF16, "reference", "mean", device)
    assert recorder.largest(F32) == TOKENS * VOCAB
    assert recorder.peak > TOKENS * VOCAB * (2 + 4)
