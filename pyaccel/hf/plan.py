"""How the calls of an encoder or a layer are served, decided once for its modules and kept while they are the same.

A :class:`pyaccel.hf.state.Plan` is made of modules that :mod:`pyaccel.hf.eligibility` found nothing wrong with, and
holds as long as their fingerprint matches. Its executors are asked in order; each says why it can't serve a call, and
the first that can does. Where none can, the stock forward runs, and the report has every reason.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyaccel import dispatch
from pyaccel.hf.eligibility import Call, call_reason, ineligible_reason, not_packable
from pyaccel.hf.executors.base import Executor
from pyaccel.hf.executors.cuda_graph import CudaGraph
from pyaccel.hf.executors.eager import EagerLayers
from pyaccel.hf.executors.onednn import OneDnn, Prepacked
from pyaccel.hf.executors.packed import Packed
from pyaccel.hf.executors.padded import Padded
from pyaccel.hf.executors.triton import Triton
from pyaccel.hf.families import Stock, has_opaque, is_sharded, layers_of
from pyaccel.hf.fingerprint import ModuleFingerprint, have_own_parameters
from pyaccel.hf.state import Acceleration, AccelerationState, Plan
from pyaccel.ops.linear.onednn import can_prepack

_AUTO = nullcontext()


def scope(acceleration: Acceleration) -> AbstractContextManager[object]:
    """A block in which the ops use the backend that was asked for."""
    return _AUTO if acceleration.backend == "auto" else dispatch.use_backend(acceleration.backend)


def serve(
    stock: Stock,
    module: Any,
    hidden: Tensor,
    mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The hidden states of a call of an accelerated module; None where the stock forward is to run.

    The report counts who served the call, and who could not for which reason. In a graph that is compiled or exported
    nothing is kept or counted, and each layer is served apart.
    """
    state: AccelerationState = module._pyaccel
    is_compiling, is_encoder = torch.compiler.is_compiling(), isinstance(module, stock.encoder)
    if not state.executors or (is_compiling and is_encoder):
        return None
    call = Call(hidden, mask, args, kwargs)
    plan: Plan | str | None = call_reason(state.config, call)
    if is_compiling:
        if plan or ineligible_reason(stock, [module], module):
            return None
        padded = Padded(stock.family)
        return None if padded.why_not(call) else padded.run(module, call)
    report = state.acceleration.report
    if is_encoder:
        call.keeps_padding = not_packable(call)
    plan = plan or plan_of(stock, module)
    if isinstance(plan, str):
        for name in state.executors:
            report.refused[name][plan] += 1
        return None
    for executor in plan.executors:
        reason = executor.why_not(call)
        if reason is None:
            report.served[executor.name] += executor.layers
            return executor.run(module, call)
        report.refused[executor.name][reason] += 1
    return None


def plan_of(stock: Stock, module: Any) -> Plan | str:
    """The plan of modules as they are now, or why they are not eligible; cheap if nothing has changed."""
    state: AccelerationState = module._pyaccel
    plan = state.plan
    if plan is not None and plan.fingerprint.matches(module):
        return plan
    layers = layers_of(stock.family, module)
    if reason := ineligible_reason(stock, layers, module):
        return reason
    is_kept = have_own_parameters(layers)  # else parameters are lent for this call
    plan = Plan(ModuleFingerprint(stock, module, layers), [])
    plan.executors = _executors(stock, module, layers, plan.fingerprint, is_kept)
    if is_kept:
        state.plan = plan
    return plan


def _executors(
    stock: Stock, module: Any, layers: list[Any], fingerprint: ModuleFingerprint, is_kept: bool
) -> list[Executor]:
    state: AccelerationState = module._pyaccel
    acceleration, family = state.acceleration, stock.family
    if not isinstance(module, stock.encoder):
        return [Padded(family)]
    executors: list[Executor] = []
    is_sharded_ = any(map(is_sharded, layers))
    on_gpu = fingerprint.device is not None and next(layers[0].parameters()).is_cuda
    if "cuda_graph" in state.executors and (on_gpu or acceleration.cuda_graphs is True):
        why_not = None
        if is_sharded_ or not is_kept or any(map(has_opaque, layers)):
            why_not = "modules in the layers are called and not looked into, watched, sharded or lent"
        clears = acceleration.packing and state.keeps_padding is None
        executors.append(
            CudaGraph(
                family,
                layers,
                fingerprint.modules,
                clears=clears,
                is_asked_for=acceleration.cuda_graphs is True,
                ineligible=why_not,
                report=acceleration.report,
            )
        )
    if not acceleration.packing:
        return executors
    eager = None
    if not is_sharded_ and is_kept:
        kinds: list[type[Triton] | type[OneDnn]] = [Triton] if on_gpu else [OneDnn]
        if acceleration.prepack and can_prepack() and not on_gpu:
            kinds = [Prepacked, OneDnn]
        made = [kind.of(family, layers, state.keeps_padding) for kind in kinds]
        executors += [executor for executor in made if executor is not None]
        eager = EagerLayers.of(family, layers)
    return [*executors, Packed(family, layers, state.keeps_padding, eager)]
