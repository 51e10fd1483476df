"""Bugs of measurements and of the tables that dispatch reads."""

from __future__ import annotations

from tests.mutants import Mutant

TUNED = "pyaccel/tuning.py"
METHOD = "benchmarks/method.py"
TIMING = "pyaccel/timing.py"
TABLE = "benchmarks/table.py"
TUNE = "benchmarks/tune.py"
SMOKE = "tests/benchmarks/test_smoke.py"
TESTS = [
    "tests/test_tuning.py",
    "tests/test_tuned_launch.py",
    "tests/test_timing.py",
    "tests/cli/test_bench.py",
    *(
        f"{SMOKE}::{name}"
        for name in (
            "test_a_wrong_answer_is_not_timed",
            "test_the_floor_is_what_the_machine_was_measured_to_need",
        )
    ),
]

MUTANTS = [
    Mutant("tuning: the slowest way", TUNED, "best = min(names, key=self.us.__getitem__)", "best = max(names, key=self.us.__getitem__)"),
    Mutant("tuning: noise decides", TUNED, "return names[0] if self.us[names[0]] <= NOISE * self.us[best] else best", "return best"),
    Mutant("tuning: what ships comes before one's own", TUNED, '((lambda: FOLDER, "shipped"), (user_folder, "measured here"))', '((user_folder, "measured here"), (lambda: FOLDER, "shipped"))'),
    Mutant("tuning: a size far away decides", TUNED, "if found is not None and distance(found) <= math.log(MAX_DISTANCE) else None", ""),
    Mutant("tuning: another width's launch", TUNED, "or (exactly and found.size != size)", ""),
    Mutant("tuning: another machine's table is lost", TUNED, "[*kept, *new.values()]", "[*new.values()]"),
    Mutant("tuning: old measurements decide what is measured", TUNE, "with disabled():  # what was", "if True:  # what was"),
    Mutant("benchmarks: a wrong answer is timed", METHOD, "        if not right:\n", "        if right is None:\n"),
    Mutant("timing: always the same order", TIMING, "order.sample(sorted(contenders), len(contenders))", "contenders"),
    Mutant("timing: an interval too narrow", TIMING, "ordered[below], ordered[n - 1 - below]", "ordered[below + 1], ordered[n - 2 - below]"),
    Mutant("benchmarks: the floor is the smaller bound", METHOD, "if flops / matmul_speed > floor:", "if flops / matmul_speed < floor:"),
    Mutant("benchmarks: the slowest baseline counts", TABLE, "not is_ours(row) and row.timed), key=_ms", "not is_ours(row) and row.timed), key=lambda row: -row.ms"),
    Mutant("benchmarks: the machine's change counts as ours", TABLE, "return self.speedup / self.of_machine", "return self.speedup"),
    Mutant(
        "tuning: a launch that the device refuses is an error",
        "pyaccel/tuning.py",
        "    except Exception as error:\n        why =",
        "    except ZeroDivisionError as error:\n        why =",
    ),
    Mutant(
        "tuning: a launch that was refused is tried again",
        "pyaccel/tuning.py",
        "    _refused.add((kernel, config))\n",
        "",
    ),
]  # fmt: skip
