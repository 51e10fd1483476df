"""Bugs in what the fast path asks about the surroundings of a call, and in what it notices of changed modules."""

from __future__ import annotations

from tests.mutants import Mutant

FINGERPRINT = "pyaccel/hf/fingerprint.py"
PLAN = "pyaccel/hf/plan.py"
ELIGIBILITY = "pyaccel/hf/eligibility.py"
ATTENTION = "pyaccel/hf/attention.py"
PATCHING = "pyaccel/hf/patching.py"
TESTS = ["tests/hf/test_surroundings.py", "tests/hf/test_storage.py"]

MUTANTS = [
    Mutant("surroundings: function transforms are passed by", ELIGIBILITY, "if torch._C._are_functorch_transforms_active():", "if False:"),
    Mutant("surroundings: modes are passed by", ELIGIBILITY, 'return f"inside a {type(mode).__name__}"', "continue"),
    Mutant("surroundings: function modes are passed by", ELIGIBILITY, "if torch._C._len_torch_function_stack():", "if False:"),
    Mutant("surroundings: every mode counts", ELIGIBILITY, "if not type(mode).__module__.startswith(_HARMLESS_MODES):", "if True:"),
    Mutant("surroundings: patched forwards are passed by", ELIGIBILITY, "return _place(code.co_filename) != home", "return False"),
    Mutant("surroundings: patches under functools.wraps are passed by", ELIGIBILITY, "        if not function.__globals__[\"__name__\"].startswith(\"transformers.\"):\n            return True\n", ""),
    Mutant("surroundings: later patches are passed by", FINGERPRINT, "                and list(map(getattr, *self._methods)) == self._methods_before\n", ""),
    Mutant("surroundings: patched feed-forwards are passed by", ELIGIBILITY, 'METHODS = ("forward", "feed_forward_chunk", "ff_chunk")', 'METHODS = ("forward",)'),
    Mutant("surroundings: what a module has since, and a replica has, is passed by", FINGERPRINT, "len(around.__dict__) == self._own_count", "True"),
    Mutant("surroundings: forward-mode derivatives are lost", ELIGIBILITY, "if forward_ad._current_level >= 0:", "if False:"),
    Mutant("surroundings: hooks are counted alone", FINGERPRINT, "and self._with_hooks == self._hooks_before", "and list(map(len, self._with_hooks)) == list(map(len, self._hooks_before))"),
    Mutant("surroundings: hooks in another dict are passed by", FINGERPRINT, "list(map(_HOOKS, self._attributes)) == self._hooks", "True"),
    Mutant("surroundings: changed options are passed by", FINGERPRINT, "                and list(map(getitem, self._dicts, self._names)) == self._options\n", ""),
    Mutant("surroundings: the layers that run are those of before", FINGERPRINT, "not self._order or [getattr(around.config, x) for x in self._order] == self._order_before", "True"),
    Mutant("surroundings: a plan keeps lent parameters", PLAN, "is_kept = have_own_parameters(layers)", "is_kept = True"),
    Mutant("surroundings: eager models lose their second gradients", ELIGIBILITY, "if implementation == EAGER and torch.is_grad_enabled():", "if False:"),
    Mutant("surroundings: masks of three dimensions are taken", ATTENTION, "if attention_mask is not None and attention_mask.dim() != 4:", "if False:"),
    Mutant("surroundings: question answering is known by its last name alone", PATCHING, "for kind in type(head).__mro__)", "for kind in type(head).__mro__[:1])"),
    Mutant(
        "eager attention: the mask under autocast is of the scores' dtype",
        "pyaccel/hf/attention.py",
        "dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), query.dtype)",
        "dtype = query.dtype",
    ),
]  # fmt: skip
