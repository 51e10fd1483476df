"""Bugs of where a launch goes and of what it is told of the device; some only a card can have: the stub's."""

from __future__ import annotations

from tests.mutants import Mutant

TESTS = [
    "tests/kernels/test_device.py",
    "tests/gpu_stub/test_gpu_stub.py::test_on_a_card_that_is_not_there[launches_go_to_the_device_of_the_tensors]",
]

MUTANTS = [
    Mutant(
        "launches: on the current device",
        "kernels/common/device.py",
        "return torch.cuda.device(tensor.device)",
        "return contextlib.nullcontext()",
    ),
    Mutant(
        "launches: on the first device",
        "kernels/common/device.py",
        "return torch.cuda.device(tensor.device)",
        "return torch.cuda.device(0)",
    ),
    Mutant(
        "launches: fp32 by the tables of 16 bits",
        "kernels/common/device.py",
        "if itemsize == 4:",
        "if itemsize == 8:",
    ),
    Mutant(
        "launches: the caller's allocator is replaced",
        "kernels/common/tma.py",
        "contextvars.copy_context().run(with_allocator)",
        "with_allocator()",
    ),
]
