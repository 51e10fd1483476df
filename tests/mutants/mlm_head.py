"""Bugs of the masked-language-model heads that skip logits, and of changes that are undone."""

from __future__ import annotations

from tests.mutants import Mutant

HEAD = "pyaccel/hf/mlm_head.py"
SWAP = "pyaccel/hf/patching.py"
CHANGES = "pyaccel/quantization/changes.py"
CONVERT = "pyaccel/quantization/convert.py"
TESTS = ["tests/hf/test_mlm_head.py", "tests/hf/test_interrupted.py"]

MUTANTS = [
    Mutant("mlm head: skips in evaluation too", HEAD, "if not (head.training and torch.is_grad_enabled()):", "if not torch.is_grad_enabled():"),
    Mutant("mlm head: a loss in fp32 of a 16-bit model", HEAD, "loss if is_fp32 else loss.to(self.weight.dtype)", "loss"),
    Mutant("mlm head: the second loss is left out", HEAD, "if step.second_label is not None:", "if False:"),
    Mutant("mlm head: the fields of an output in another order", HEAD, "type(output)(**{\"loss\": loss, **output})", "(output.__setitem__(\"loss\", loss), output)[1]"),
    Mutant("mlm head: an error leaves the labels to the next call", HEAD, "always_call=True, prepend=True", "prepend=True"),
    Mutant("mlm head: a number of items is ignored", HEAD, 'num_items=loss_kwargs.get("num_items_in_batch"),', "num_items=None,"),
    Mutant("mlm head: hooks on the way to the decoder are passed by", HEAD, "if reason := change_of(part):", 'if (reason := change_of(part)) and reason != "has hooks":'),
    Mutant("mlm head: any forward is transformers' own", HEAD, "    if not _is_stock(head):\n", "    if False:\n"),
    Mutant("mlm head: any loss is the stock loss", HEAD, 'if _loss_of(head.__class__) == "mlm_loss_fct" and not _is_plain(head.mlm_loss_fct):', "if False:"),
    Mutant("mlm head: the backend asked for isn't the loss's", HEAD, "        with scope(step.acceleration):\n", "        if True:\n"),
    Mutant("mlm head: hooks stay behind", SWAP, "    mlm_head.detach(model)\n", ""),
    Mutant("changes: noted after they are made", CHANGES, "        self._undo.append(undo)\n        change()\n", "        change()\n        self._undo.append(undo)\n"),
    Mutant("changes: Ctrl-C while they are undone ends that", CHANGES, "                continue\n", "                raise\n"),
    Mutant("changes: kept after an error", CHANGES, "        if kind is not None:\n", "        if kind is not None and issubclass(kind, Exception):\n"),
    Mutant("changes: items come back in another order", CHANGES, "if list(items) != order:", "if False:"),
    Mutant("changes: codes stay in the place of weights", CONVERT, "changes.make(layer.freeze, partial(_thaw, layer, layer.weight, layer._float))", "layer.freeze()"),
    Mutant("changes: a restore says first that it is done", SWAP, "    for acceleration in accelerations:\n        for parent, name, child", "    for module in swapped:\n        del module._pyaccel\n    swapped = []\n    for acceleration in accelerations:\n        for parent, name, child"),
    Mutant("mlm head: transforms and forward mode are passed by", HEAD, "    if reason := inside():\n        return reason\n", ""),
]  # fmt: skip
