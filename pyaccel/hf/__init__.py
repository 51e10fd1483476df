"""Acceleration of Hugging Face transformers models, in place and reversible.

``accelerate(model)``, ``restore(model)`` and ``explain(model)`` are the whole of it; ``register()`` makes
``attn_implementation="pyaccel"`` and int8 folders known to transformers without accelerating anything.
``PyaccelInt8Config`` is its quantization_config.

transformers is imported by the first call, or by asking for that class, not by importing this package.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from pyaccel.hf.quantizer import PyaccelInt8Config
    from pyaccel.hf.report import Explanation, Report

__all__ = ["Explanation", "PyaccelInt8Config", "Report", "accelerate", "explain", "register", "restore"]


def accelerate(
    model: nn.Module,
    *,
    packing: bool = True,
    int8: str | None = None,
    backend: str = "auto",
    strict: bool = True,
    prepack: bool = False,
    cuda_graphs: bool | str = "auto",
    skip_logits: bool = False,
) -> Report:
    """Make a Hugging Face model of the BERT family faster, in place, at the same answers; :func:`restore` undoes it.

    Acts on every encoder and layer of BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, ERNIE, RoCBert, Data2VecText,
    BertGeneration, DistilBERT and ALBERT found in ``model``, which may be the model itself, one with a head, or
    anything that holds one. Only the class of these modules changes (to a subclass of the same name) and the attention
    implementation of their config (to ``"pyaccel"``): parameters, names, hooks, buffers, tied weights and optimizers
    stay what they were. No weight is moved or copied, except where ``prepack`` asks for copies, so later updates take
    effect immediately. Other models whose attention goes through transformers' interface (decoders, GPT-2,
    ModernBERT ...) get that alone.

    A call inside a ``torch.func`` transform, ``torch.jit.trace`` or another's dispatch or function mode runs the stock
    modules and changes nothing of the model; ``torch.compile`` and ``torch.export`` trace the fast path. A patched
    ``forward`` of a stock class is noticed at the next call. A model made with eager attention keeps it wherever
    gradients are recorded, because that attention can be differentiated twice.

    The fast path serves evaluation and training, in any dtype and under autocast, with gradient checkpointing and LoRA
    adapters. Dropout acts as in the stock model, by other random numbers. A cache, ``output_attentions``, 4-D masks,
    replaced or hooked submodules ... go to the stock modules; ``Report.refused`` counts how often and why.

    Models that share one config object share its attention implementation: the other model stays right,
    and runs its stock modules with pyaccel's attention. ``copy.deepcopy`` a teacher, or give it its own
    config, to leave it alone.

    Args:
        packing: drop the padding once after the embeddings, run all layers on real tokens, and put it
            back once. Padding positions of ``last_hidden_state`` are then 0, where the stock model
            computes values that nothing should read: a loss over them (labels other than -100 in the padding)
            differs. Position 0 of every row is always computed, because poolers read it; under a question-answering
            head (a subclass of one of transformers', or any module with ``qa_outputs``), whose loss is over all
            positions, padding is kept. Pass ``packing=False`` for a head of your own that reads padding.
            With False all layers run padded and padding positions are the stock model's.
        int8: ``"dynamic"`` or ``"weight_only"``: also quantize the layers' linear modules, as
            :func:`pyaccel.quantization.quantize` does. The floating ones are kept in memory for :func:`restore`.
        backend: ``"auto"``, or ``"triton"``, ``"torch"`` or ``"reference"`` for every op while this model
            runs.
        strict: whether having nothing to swap is an error.
        prepack: on a CPU, in evaluation in fp32 or bf16, keep the weights a second time, in the order in which oneDNN
            multiplies: for models that serve. A layer takes two thirds to four fifths of the time for 25 tokens, a
            few percent less for thousands. The copies are rebuilt when a weight is reallocated or modified in place
            (an optimizer's step, ``load_state_dict``). Torch doesn't count what is written through ``weight.data``, so
            such a change is missed: don't use both. The report counts the calls that ran on the copies. Not with
            ``int8`` or ``packing=False``.
        cuda_graphs: on a GPU, in evaluation without gradient (``torch.inference_mode()``), run all layers of a small
            batch (up to 4096 positions, padding too) in one launch. Sizes are rounded up to 1, 2, 3, 4, 6, 8, 12 ...,
            and up to 64 graphs are kept for each encoder. The padding is not dropped in them, only cleared at the end.
            Weights may be changed in place; graphs are captured again where one is reallocated. Larger batches,
            autocast and training use the other executors, and ``Report.refused`` counts them. ``"auto"`` captures a
            size when it comes up for the second time, because a capture takes about a second, and after a warning
            does without graphs where one can't be captured. True captures a size at its first batch, and a capture
            that fails is an error.
        skip_logits: for pre-training with ``...ForMaskedLM`` and BERT's, ERNIE's and ALBERT's ``...ForPreTraining``: a
            training call that is given labels computes the loss over the masked tokens alone
            (:func:`pyaccel.ops.masked_lm_cross_entropy`), and the output's ``logits`` (``prediction_logits``) are None.
            Loss and gradients are the stock model's, but where no label counts: then the loss is 0 and not NaN.
            Evaluation, and calls without labels, give logits as ever. So do calls that can't do without: a changed
            forward or loss, hooks on the head, a decoder that isn't a plain Linear, ``torch.compile``, ``export``,
            function transforms, and ``forward`` called directly, past the model's hooks.
            ``Report.served`` and ``Report.refused`` count them as ``"masked_lm_loss"``.

    An error, or Ctrl-C, leaves the model as it was.

    Returns:
        what was swapped and what not, with reasons; it goes on counting calls. A second call with the same
        arguments swaps what has become possible since and returns the same report.

    Raises:
        ImportError: transformers is not installed.
        ValueError: nothing could be swapped (and ``strict``), or unknown arguments.
        RuntimeError: the model is accelerated with other arguments; restore it first.
        pyaccel.errors.NotSupportedError: ``backend`` can't serve this model here; it names every reason. Or
            ``cuda_graphs`` without a GPU.
    """
    _need_transformers()
    from pyaccel.hf import patching

    return patching.accelerate(
        model,
        packing=packing,
        int8=int8,
        backend=backend,
        strict=strict,
        prepack=prepack,
        cuda_graphs=cuda_graphs,
        skip_logits=skip_logits,
    )


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate` and return `model`: the same modules, classes and attention implementation.

    Raises ValueError when nothing in ``model`` is accelerated.
    """
    _need_transformers()
    from pyaccel.hf import patching

    return patching.restore(model)


def explain(model: nn.Module) -> Explanation:
    """Which backend serves each op of an accelerated ``model``, why, and how its calls went so far.

    The backends are those of a dry run of one layer on 16 tokens in the model's own dtype, on its own device.

    Raises ValueError when nothing in ``model`` is accelerated.
    """
    _need_transformers()
    from pyaccel.hf import explanation

    return explanation.explain(model)


def register() -> None:
    """Make known to transformers ``attn_implementation="pyaccel"`` and, as "pyaccel_int8", our int8 folders.

    Attention and mask function are registered together. Without this, or ``accelerate``, transformers loads the codes
    of an int8 folder as if they were weights, with a warning.
    """
    _need_transformers()
    from pyaccel.hf import attention

    attention.register()


def _need_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("pyaccel.hf needs Hugging Face transformers: pip install pyaccel-bert[hf]")
    importlib.import_module("pyaccel.hf.quantizer")  # which registers int8 folders


def __getattr__(name: str) -> Any:
    if name in ("Report", "Explanation"):
        from pyaccel.hf import report

        return getattr(report, name)
    if name == "PyaccelInt8Config":
        _need_transformers()
        from pyaccel.hf import quantizer

        return quantizer.PyaccelInt8Config
    if name.rpartition("_")[2][:1].isupper():  # a class that a pickle names, such as bert_BertLayer
        _need_transformers()
        from pyaccel.hf import mlm_head, modules, state

        for module in (state, mlm_head):
            if name in module.PICKLED:
                return module.PICKLED[name]
        return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
