"""Bugs of launches, and of what the host does for one, which only a card can have: the stub's."""

from __future__ import annotations

from tests.mutants import Mutant

TESTS = [
    "tests/kernels/test_device.py",
    "tests/ops/test_direct.py",
    "tests/nn/test_triton_layer.py",
    *(
        f"tests/gpu_stub/on_stub_card.py::test_on_a_card_that_is_not_there[{check}]"
        for check in (
            "launches_go_to_the_device_of_the_tensors",
            "launches_go_to_the_current_stream",
            "plans_are_as_exact_as_triton",
            "hooks_see_every_launch",
            "gradient_checkpointing_is_kept",
            "fewer_calls_than_stock",
        )
    ),
]

PLANS = "kernels/common/launch.py"
COMMON = "pyaccel/ops/common.py"
LAYER = "pyaccel/nn/triton_layer.py"
FUNCTION = "pyaccel/ops/layer_function.py"

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
    Mutant(
        "plans: whatever the arguments", PLANS, "key = (index, specialization,", "key = (index, len(args),"
    ),
    Mutant("plans: whatever the warps", PLANS, "constants, num_warps, num_stages)", "constants, num_stages)"),
    Mutant(
        "plans: on the current device",
        PLANS,
        "if plan is not None and torch._C._cuda_getDevice() == index:",
        "if plan is not None:",
    ),
    Mutant(
        "plans: on the first stream", PLANS, "1, 1, stream(index), *head, (*args", "1, 1, 0, *head, (*args"
    ),
    Mutant("plans: past hooks", PLANS, "            and not runtime.launch_enter_hook.calls\n", ""),
    Mutant("plans: past a kernel's own hooks", PLANS, "            and not self.kernel.pre_run_hooks\n", ""),
    Mutant("plans: none is made", PLANS, "self._plans[key] = _plan(compiled)", "self._plans[key] = None"),
    Mutant(
        "ops: past a torch function mode",
        COMMON,
        "        and not torch._C._len_torch_function_stack()\n",
        "",
    ),
    Mutant("ops: past a profiler", COMMON, "        and not torch.autograd._profiler_enabled()\n", ""),
    Mutant(
        "ops: directly where gradients are recorded",
        COMMON,
        "return not torch.is_grad_enabled() and is_undisturbed(*args)",
        "return is_undisturbed(*args)",
    ),
    Mutant(
        "ops: past transforms, traces and modes",
        COMMON,
        "torch._C._dispatch_tls_local_include_set() in _PLAIN_KEYS",
        "True",
    ),
    Mutant(
        "TritonLayer: one dropout mask for both halves",
        FUNCTION,
        "    key2 = dropout_key(hidden.device) if p2 > 0.0 else None\n",
        "    key2 = key1\n",
    ),
    Mutant(
        "TritonLayer: without gradients where attention has none",
        LAYER,
        "return encoder_layer(self._layer, hidden, lambda q, k, v: context)",
        "pass",
    ),
    Mutant(
        "TritonLayer: keys of padding attend",
        FUNCTION,
        "k, v = k.index_select(0, call.key_indices), v.index_select(0, call.key_indices)",
        "pass",
    ),
    Mutant(
        "TritonLayer: no gradient through the queries",
        FUNCTION,
        "for i in (4, 2, 0):",
        "for i in (4, 2):",
    ),
    Mutant(
        "TritonLayer: gradients of gradients are lost",
        FUNCTION,
        "        if runs_directly(*given):\n",
        "        if True:\n",
    ),
    Mutant(
        "TritonLayer: past gradient checkpointing",
        "pyaccel/hf/executors/triton.py",
        '                return "gradient checkpointing"\n',
        "                pass\n",
    ),
]
