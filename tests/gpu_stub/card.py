"""Two GPUs that aren't there, under PyTorch and under Triton's own CUDA driver: all but the kernels' work is real.

:func:`insert` changes this process, which must have been started for it and have loaded build.py's ``libcuda.so.1``:

* a CUDA tensor is a plain ``torch.Tensor`` whose device is ``cuda:0`` or ``cuda:1`` and whose memory is the host's.
  PyTorch's own CUDA operators are replaced by a fallback of the dispatcher, which calls the CPU's. So dispatch,
  registered ops, autograd (with its thread for each device), autocast and guards run as on a GPU;
* Triton compiles for sm_90 and launches through its own launcher into the stub, which writes each launch down:
  :func:`take_launches`. Outputs of kernels keep what fresh memory has here: zeros, and True, since the only
  booleans that a kernel writes say that all is well.

Needs a C++ compiler and Python's headers, which Triton needs on every GPU machine too.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

DEVICES = 2
_KDLCPU, _KDLCUDA = 1, 2

_library: Any = None
_kept: list[Any] = []  # registrations last as long as the process
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, where it went, its grid, threads a block and bytes of shared memory."""

    kernel: str
    device: int
    stream: int
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


def insert(library_of_card: ctypes.CDLL) -> None:
    """Put the cards into this process, which loaded the library before torch and has not imported triton yet."""
    global _library
    assert not torch.cuda.is_available(), "there is a real card here"
    _library = library_of_card
    _library.card_stream.restype = ctypes.c_longlong
    _library.card_set_stream.argtypes = [ctypes.c_int, ctypes.c_longlong]
    _library.card_own.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
    _library.card_take_launches.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
    _library.card_take_launches.restype = ctypes.c_longlong
    library = torch.library.Library("_", "IMPL")
    library.fallback(_fallback, "CUDA")
    aten = torch.library.Library("aten", "IMPL")
    for operator in _BEFORE_COMPOSITE:
        aten.impl(operator.name().removeprefix("aten::"), partial(_fallback, operator), "CUDA")
    _kept.extend((library, aten))
    _replace_torch_cuda()


def pretend(library_of_card: ctypes.CDLL) -> None:
    """Let every CPU tensor say that it is on card 0, in this process, which is then good for nothing but measuring.

    PyTorch's operators are the CPU's, in C++ and without :func:`insert`'s detour through Python: on tiny tensors they
    take about the host time that a GPU's do, less the driver's.
    """
    global _library
    _library = library_of_card
    _library.card_read_host(1)
    _library.card_stream.restype = ctypes.c_longlong
    _library.card_take_launches.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
    _library.card_take_launches.restype = ctypes.c_longlong
    _replace_torch_cuda()
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda self: True)
    tensor.is_cpu = property(lambda self: False)
    tensor.get_device = lambda self: 0


def take_launches() -> list[Launch]:
    """What was launched since the last call."""
    buffer = ctypes.create_string_buffer(1 << 22)
    assert _library.card_take_launches(buffer, len(buffer)) >= 0
    found = []
    for line in buffer.value.decode().splitlines():
        kernel, *numbers = line.split()
        device, stream, x, y, z, threads, shared = map(int, numbers)
        found.append(Launch(kernel, device, stream, (x, y, z), threads, shared))
    return found


# ---- tensors ----


def _elsewhere(t: Tensor, kind: int, index: int) -> Tensor:
    """The same memory as a tensor of another device, by DLPack, whose label of the device is changed on the way."""
    capsule = torch._C._to_dlpack(t.detach())
    # DLManagedTensor begins with the data's address, then the device's kind and index.
    device = (ctypes.c_int32 * 2).from_address(
        _pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    )
    device[0], device[1] = kind, index
    there: Tensor = torch._C._from_dlpack(capsule)
    if kind == _KDLCUDA and t.numel():
        extent = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
        _library.card_own(there.data_ptr(), extent * t.element_size(), index)
    return there


_aten = torch.ops.aten
_VIEWS = {_aten.view.default, _aten._reshape_alias.default, _aten.as_strided.default, _aten.unfold.default}
_FRESH = {_aten.empty.memory_format, _aten.empty_strided.default}


def _fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator of CUDA tensors, by the CPU's. What it makes is on the device that the operator says, or on the
    current one, which PyTorch has made the tensors' by then."""
    if func in _VIEWS:  # the same storage under another shape, which is no device's business
        return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
    index: int | None = None

    def down(x: Any) -> Any:
        nonlocal index
        if isinstance(x, Tensor) and x.is_cuda:
            index = x.device.index if index is None else index
            return _elsewhere(x, _KDLCPU, 0)
        if isinstance(x, torch.device) and x.type == "cuda":
            index = torch.cuda.current_device() if x.index is None else x.index
            return torch.device("cpu")
        return x

    given, named = tree_map(down, (args, kwargs))
    arguments = func._schema.arguments
    # A number in a tensor's place comes as a Python number.
    given = tuple(
        torch.tensor(x) if isinstance(x, int | float) and str(a.type) == "Tensor" else x
        for x, a in zip(given, arguments, strict=False)
    )
    if func is _aten.mm.dtype:  # 16-bit products summed and returned in fp32, which the CPU has not
        func, given = _aten.mm.default, tuple(t.float() for t in given[:2])
    out = func(*given, **named)
    if func in _FRESH:
        out.fill_(out.dtype == torch.bool)
    written = [i for i, each in enumerate(arguments) if each.alias_info and each.alias_info.is_write]
    if written:
        back = [args[i] if i < len(args) else kwargs[arguments[i].name] for i in written]
        return (
            None if not func._schema.returns else back[0] if len(func._schema.returns) == 1 else tuple(back)
        )
    assert index is not None, func

    def up(x: Any) -> Any:
        return _elsewhere(x, _KDLCUDA, index) if isinstance(x, Tensor) and not x.is_cuda else x

    return tree_map(up, out)


# Operators whose kernels for all devices look into tables of kernels that have none for CUDA here, or resize memory.
_BEFORE_COMPOSITE = (_aten.copy_.default, _aten.arange.default, _aten.arange.start, _aten.arange.start_step)


# ---- torch.cuda ----


class Stream:
    """A stream is a number; 0 is each device's default."""

    _numbers = iter(range(0x1000, 1 << 30))

    def __init__(self, device: Any = None, *, stream: int | None = None, **_: Any) -> None:
        self.device = torch.device("cuda", _index(device))
        self.cuda_stream = next(Stream._numbers) if stream is None else stream

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def synchronize(self) -> None:
        pass


class Graph:
    """Holds what was launched while it was captured, and launches it in replays: device, stream and order."""

    captured: list[Graph] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


_capturing = threading.local()


@contextmanager
def _graph(graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
    take_launches()
    _capturing.now = True
    try:
        with _stream(stream):
            yield
    finally:
        _capturing.now = False
    graph.launches = take_launches()
    Graph.captured.append(graph)


@contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    index = stream.device.index
    device, before = _library.card_device(), _library.card_stream(index)
    _library.card_set_device(index)
    _library.card_set_stream(index, stream.cuda_stream)
    try:
        yield
    finally:
        _library.card_set_stream(index, before)
        _library.card_set_device(device)


def _index(device: Any) -> int:
    if device is None:
        return int(_library.card_device())
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return int(_library.card_device()) if index is None else int(index)


def _exchange_device(index: int) -> int:
    before = int(_library.card_device())
    if index >= 0:
        _library.card_set_device(index)
    return before


def _current_stream(device: Any = None) -> Stream:
    index = _index(device)
    return Stream(index, stream=_library.card_stream(index))


def _replace_torch_cuda() -> None:
    properties = SimpleNamespace(
        name="stub of an H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=141 << 30,
        warp_size=32,
    )
    replacements = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": lambda: int(_library.card_device()),
        "set_device": lambda device: _library.card_set_device(_index(device)),
        "_exchange_device": _exchange_device,
        "_maybe_exchange_device": _exchange_device,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "current_stream": _current_stream,
        "synchronize": lambda device=None: None,
        "Stream": Stream,
        "stream": _stream,
        "CUDAGraph": Graph,
        "graph": _graph,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: getattr(_capturing, "now", False),
    }
    for name, value in replacements.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, value)
    # What Triton's driver takes where PyTorch was built for CUDA.
    torch._C._cuda_getCurrentRawStream = lambda index: _library.card_stream(index)  # type: ignore[attr-defined]
    torch._C._cuda_getDevice = lambda: int(_library.card_device())  # type: ignore[attr-defined]
