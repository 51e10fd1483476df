"""Bugs of `pyaccel verify` that would make it say "right"."""

from __future__ import annotations

from tests.mutants import Mutant

MODEL = "pyaccel/verify/model.py"
TRUTH = "pyaccel/verify/truth.py"
POLICY = "pyaccel/verify/policy.py"
TRACE = "pyaccel/verify/trace.py"
REPORT = "pyaccel/verify/report.py"
OP_CHECKS = "pyaccel/verify/op_checks.py"
TESTS = [
    "tests/test_assertions.py",
    "tests/verify/test_verify.py",
]

MUTANTS = [
    Mutant("verify: what is wrong is right", REPORT, "status=PASSED if verdict.passed else FAILED,", "status=PASSED,"),
    Mutant("verify: nothing checked is right", REPORT, "return bool(self.checks) and not self.failed and not self.errors", "return not self.failed and not self.errors"),
    Mutant("verify: what could not run is right", REPORT, "return bool(self.checks) and not self.failed and not self.errors", "return bool(self.checks) and not self.failed"),
    Mutant("verify: means are never apart", POLICY, "RANDOM_RATIO = 1.5", "RANDOM_RATIO = 1e9"),
    Mutant("verify: a variance over all runs, not all but one", POLICY, "return self._squares / (self.runs - 1)", "return self._squares / self.runs ** 2"),
    Mutant("verify: the packed layout is always right", TRACE, "        if not torch.equal(seen, expected):", "        if False:"),
    Mutant("verify: the accelerated model isn't", MODEL, "return model, accelerate(model, packing", "return model, accelerate(copy.deepcopy(model), packing"),
    Mutant("verify: dropout is off while it is checked", TRUTH, "if isinstance(m, nn.Dropout) and id(m) not in kept]", "if isinstance(m, nn.Dropout)]"),
    Mutant("verify: spread isn't looked at", POLICY, "return max(means, more / less if less else math.inf), RANDOM_RATIO", "return means, RANDOM_RATIO"),
    Mutant("verify: an op is compared with itself", OP_CHECKS, "naive = _run(partial(case.expected, upcast=False), inputs, gradient)", "naive = _run(lambda t: 3 * case.call(t), inputs, gradient)"),
    Mutant("verify: two runs are one", OP_CHECKS, "if not same_bits(out, again[name]):", "if not same_bits(out, out):"),
    Mutant("verify: a loss in training isn't the stock model's", MODEL, "            joined(trained.loss, plain),", "            joined(trained.loss * 1.01, plain),"),
]  # fmt: skip
