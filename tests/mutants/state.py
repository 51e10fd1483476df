"""Bugs of what a thread asks for, and of measurements that are read as hints."""

from __future__ import annotations

from tests.mutants import Mutant

DISPATCH = "pyaccel/dispatch.py"
TUNED = "pyaccel/tuning.py"
TESTS = ["tests/test_dispatch.py", "tests/test_tuning.py", "tests/test_tuned_launch.py"]

MUTANTS = [
    Mutant("state: a block ends whichever was entered last", DISPATCH, "        if scopes[i] is scope:\n", "        if True:\n"),
    Mutant("state: a compiled function keeps its first backend", DISPATCH, "        scopes, rest = _traced, dict(_this._around_the_trace)\n", "        scopes, rest = _traced, {}\n"),
    Mutant("state: what is asked for elsewhere is added to what is asked for here", DISPATCH, 'self.asked = {"": "auto", **dict(asked)}', "self.asked = dict(asked)"),
    Mutant("state: a process-wide request overrides blocks", DISPATCH, "    for scope in reversed(scopes):\n        found", "    for scope in () if rest else reversed(scopes):\n        found"),
    Mutant("state: a block that was never entered says nothing", DISPATCH, "        self._unused = True\n", ""),
    Mutant("state: one recorder sees a choice", DISPATCH, "for recorder in _recorders.get():", "for recorder in _recorders.get()[-1:]:"),
    Mutant("state: one observer hears an op", DISPATCH, "for observer in _observers.get():", "for observer in _observers.get()[-1:]:"),
    Mutant("state: what is observed goes past the public ops", DISPATCH, " or (_observing and _observers.get()))", ")"),
    Mutant("state: an observer hears the parts of an op", "pyaccel/ops/linear/mlp.py", "F.linear(linear.linear_activation(hidden", "F.linear(__import__('pyaccel').ops.linear_activation(hidden"),
    Mutant("tuning: a time that is no number is one", "pyaccel/tuning_tables.py", "type(us) in (int, float) and 0 < us < 1e18", "not us <= 0"),
    Mutant("tuning: sizes of any length", TUNED, "if any(len(timing.size) != len(size) for timing in measured):", "if False:"),
    Mutant("tuning: the folder may not be refused", TUNED, "        except (OSError, RuntimeError) as error:\n            problems", "        except RuntimeError as error:\n            problems"),
    Mutant("tuning: a warning at each call", TUNED, "        _warned.add(problem)\n", ""),
    Mutant("tuning: a row's width may be measured", TUNED, '        del found["block_n"]  # a row\'s width, which is what it is\n', "        pass\n"),
]  # fmt: skip
