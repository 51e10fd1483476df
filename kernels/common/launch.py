"""Launches by plans: what Triton finds out about a launch is kept for the next launches of its kind.

``kernel[grid](...)`` binds and specializes every argument, formats all options into a key and asks several hooks before
it calls the launcher of a compiled kernel, which takes a fraction of that time. A plan is that launcher. Its key holds
all that Triton's own holds, by Triton's own function: dtypes, alignment and None-ness of pointers, range, divisibility
and equality to 1 of integers, constants and options. So a plan never runs a binary that Triton would not have run.

The launch is ``kernel[grid](...)`` wherever Triton isn't as assumed here or has more to do: in the interpreter, under
hooks and debugging, for kernels that allocate memory.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver, jit

from pyaccel.kernels.common.device import device_guard

# How Triton 3.6 and 3.7 launch what they have compiled. Where that reads otherwise, no plan is made.
_LAUNCH = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)


@functools.cache
def can_plan() -> bool:
    """Whether this Triton's launches are as this module assumes."""
    runtime = knobs.runtime
    return (
        hasattr(jit, "native_specialize_impl")
        and _LAUNCH in " ".join(inspect.getsource(jit.JITFunction.run).split())
        and all(hasattr(hook, "calls") for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))
        and all(hasattr(runtime, name) for name in ("debug", "add_stages_inspection_hook"))
    )


class _Plan(NamedTuple):
    """The launcher of a compiled kernel, what it takes of that, and where the device's current stream is asked."""

    run: Any
    function: Any
    metadata: Any
    stream: Any


class Launcher:
    """Launches one kernel, a ``@triton.jit`` function whose constants come after all other arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        parameters = inspect.signature(kernel.fn).parameters
        constants = ["constexpr" in str(each.annotation) for each in parameters.values()]
        assert constants == sorted(constants), f"{kernel.__name__}: constants come last"
        self._names = tuple(parameters)
        self._first_constant = constants.count(False)
        self._compiled = isinstance(kernel, jit.JITFunction)  # not interpreted
        self._plans: dict[Any, _Plan | None] = {}  # None: Triton launches

    def named(self, x: Tensor, programs: int, arguments: dict[str, Any], options: dict[str, int]) -> None:
        """As a call, with the kernel's arguments by name."""
        values = tuple(map(arguments.__getitem__, self._names))
        first = self._first_constant
        self(x, programs, values[:first], values[first:], **options)

    def __call__(
        self,
        x: Tensor,
        programs: int,
        args: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        num_stages: int | None = None,
    ) -> None:
        """Launch that many programs on the device of ``x``, on its current stream.

        Args:
            args: what the kernel takes before its constants, in its order; constants: those, in its order.
        """
        index, key = x.get_device(), None
        if index >= 0 and self._compiled and can_plan() and self._is_undisturbed():
            specialization = jit.native_specialize_impl(_backend(index), args, False, True, True)
            key = (index, specialization, constants, num_warps, num_stages)
            plan = self._plans.get(key)
            if plan is not None and torch._C._cuda_getDevice() == index:
                plan.run(
                    programs, 1, 1, plan.stream(index), plan.function, plan.metadata, None, None, None,
                    *args, *constants,
                )  # fmt: skip
                return
        options = {} if num_stages is None else {"num_stages": num_stages}
        with device_guard(x):
            compiled = self.kernel[(programs,)](*args, *constants, num_warps=num_warps, **options)
        if key is not None and key not in self._plans:
            self._plans[key] = _plan(compiled)

    def _is_undisturbed(self) -> bool:
        """Whether a launch is all that Triton would do."""
        runtime = knobs.runtime
        return (
            not runtime.launch_enter_hook.calls
            and not runtime.launch_exit_hook.calls
            and not self.kernel.pre_run_hooks
            and not runtime.debug
            and runtime.add_stages_inspection_hook is None
            and "instrumentation_mode" not in knobs.compilation.__dict__
        )


@functools.cache
def _backend(index: int) -> Any:
    """Of a device, for what it specializes beside alignment and divisibility."""
    from triton.compiler.compiler import make_backend

    with torch.cuda.device(index):
        return make_backend(driver.active.get_current_target())


def _plan(compiled: Any) -> _Plan | None:
    """None for a kernel that a hook kept from being compiled, and for one that wants memory for each launch."""
    metadata = getattr(compiled, "metadata", None)
    sizes = [getattr(metadata, name, 1) for name in ("global_scratch_size", "profile_scratch_size")]
    if any(sizes) or getattr(metadata, "tensordesc_meta", None):
        return None
    return _Plan(compiled.run, compiled.function, compiled.packed_metadata, driver.active.get_current_stream)
