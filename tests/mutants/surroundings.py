"""Bugs in what the fast path asks about the surroundings of a call, and in what it notices of changed modules."""

from __future__ import annotations

from tests.mutants import Mutant

SURROUNDINGS = "pyaccel/hf/surroundings.py"
GUARD = "pyaccel/hf/guard.py"
FAST_PATH = "pyaccel/hf/fast_path.py"
ELIGIBILITY = "pyaccel/hf/eligibility.py"
ATTENTION = "pyaccel/hf/attention.py"
SWAP = "pyaccel/hf/swap.py"
TESTS = ["tests/hf/test_surroundings.py", "tests/hf/test_storage.py"]

MUTANTS = [
    Mutant("surroundings: function transforms are passed by", SURROUNDINGS, "if torch._C._are_functorch_transforms_active():", "if False:"),
    Mutant("surroundings: modes are passed by", SURROUNDINGS, 'return f"inside a {type(mode).__name__}"', "continue"),
    Mutant("surroundings: function modes are passed by", SURROUNDINGS, "if torch._C._len_torch_function_stack():", "if False:"),
    Mutant("surroundings: every mode counts", SURROUNDINGS, "if not type(mode).__module__.startswith(_HARMLESS):", "if True:"),
    Mutant("surroundings: patched forwards are passed by", SURROUNDINGS, "return _place(code.co_filename) != home", "return False"),
    Mutant("surroundings: patches under functools.wraps are passed by", SURROUNDINGS, "        if not code.co_filename.startswith(_TRANSFORMERS):\n            return True\n", ""),
    Mutant("surroundings: later patches are passed by", GUARD, "                and [kind.forward for kind in self.kinds] == self.forwards\n", ""),
    Mutant("surroundings: changed options are passed by", GUARD, "                and [attributes[name] for attributes, name in self.options] == self.options_before\n", ""),
    Mutant("surroundings: the layers that run are those of before", GUARD, "                and (not self.layers or self.layers == layers)\n", ""),
    Mutant("surroundings: a plan keeps lent parameters", FAST_PATH, "if not are_its_own(layers):", "if False:"),
    Mutant("surroundings: eager models lose their second gradients", ELIGIBILITY, "if config._attn_implementation == attention.EAGER and torch.is_grad_enabled():", "if False:"),
    Mutant("surroundings: masks of three dimensions are taken", ATTENTION, "if attention_mask is not None and attention_mask.dim() != 4:", "if False:"),
    Mutant("surroundings: question answering is known by its last name alone", SWAP, "for kind in type(head).__mro__)", "for kind in type(head).__mro__[:1])"),
    Mutant(
        "eager attention: the mask under autocast is of the scores' dtype",
        "pyaccel/hf/attention.py",
        "dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), query.dtype)",
        "dtype = query.dtype",
    ),
]  # fmt: skip
