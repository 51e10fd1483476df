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


# How the launchers of NVIDIA's driver call the compiled one in Triton 3.6, and from 3.7 on. They do no more than that
# for a kernel without memory of its own, which is called here then.
_CALLS = {
    "self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, self.launch_pdl, "
    "global_scratch, profile_scratch, *args)": False,
    "self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, self.launch_pdl, "
    "kernel_metadata, launch_metadata, launch_enter_hook, launch_exit_hook, global_scratch, profile_scratch, "
    "self.arg_annotations, self.kernel_signature, args)": True,
}


class _Plan(NamedTuple):
    """``launch(programs, 1, 1, stream, *head, *args)``, with the kernel's arguments as one if they are ``packed``."""

    launch: Any
    head: tuple[Any, ...]
    packed: bool
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
        index, key, runtime = x.get_device(), None, knobs.runtime
        if (
            index >= 0
            and self._compiled
            and can_plan()
            # Nothing but the launch is to be done.
            and not runtime.launch_enter_hook.calls
            and not runtime.launch_exit_hook.calls
            and not self.kernel.pre_run_hooks
            and not runtime.debug
            and runtime.add_stages_inspection_hook is None
            and "instrumentation_mode" not in knobs.compilation.__dict__
        ):
            specialization = jit.native_specialize_impl(_backend(index), args, False, True, True)
            key = (index, specialization, constants, num_warps, num_stages)
            plan = self._plans.get(key)
            if plan is not None and torch._C._cuda_getDevice() == index:
                launch, head, packed, stream = plan
                if packed:
                    launch(programs, 1, 1, stream(index), *head, (*args, *constants))
                else:
                    launch(programs, 1, 1, stream(index), *head, *args, *constants)
                return
        options = {} if num_stages is None else {"num_stages": num_stages}
        with device_guard(x):
            compiled = self.kernel[(programs,)](*args, *constants, num_warps=num_warps, **options)
        if key is not None and key not in self._plans:
            self._plans[key] = _plan(compiled)


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
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream = driver.active.get_current_stream
    kind: Any = type(run)
    packed = _calls_packed(kind)
    if packed is None:
        return _Plan(run, (function, metadata, None, None, None), False, stream)
    options = (function, run.launch_cooperative_grid, run.launch_pdl)
    if packed:
        hooks_and_memory = (None,) * 5
        return _Plan(
            run.launch,
            (*options, metadata, *hooks_and_memory, run.arg_annotations, run.kernel_signature),
            True,
            stream,
        )
    return _Plan(run.launch, (*options, None, None, metadata, None, None, None), False, stream)


@functools.cache
def _calls_packed(launcher: Any) -> bool | None:
    """How a class of launchers calls the compiled one: as :data:`_CALLS` has it, or None if it's in another way."""
    source = " ".join(inspect.getsource(launcher.__call__).split())
    return next((packed for call, packed in _CALLS.items() if call in source), None)
