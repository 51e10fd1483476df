"""Bugs of what the products share: loading, batches and pooling, the timer's rounds, the host's calls, activations."""

from __future__ import annotations

from tests.mutants import Mutant

BATCHING = "pyaccel/encode/batching.py"
CHECKPOINTS = "pyaccel/checkpoints.py"
HOST = "pyaccel/cost/host.py"
ACTIVATIONS = "pyaccel/activations.py"
TESTS = [
    "tests/encode/test_batching.py",
    "tests/test_checkpoints.py",
    "tests/cost/test_host.py",
    "tests/test_activations.py",
    "tests/test_timing.py",
]

MUTANTS = [
    Mutant("encode: padding is averaged", BATCHING, "(states * mask.unsqueeze(-1)).sum(1)", "states.sum(1)"),
    Mutant("encode: a text without tokens is NaN", BATCHING, ".clamp(min=1)", ""),
    Mutant("encode: padding is a token", BATCHING, "< lengths.unsqueeze(1)", "<= lengths.unsqueeze(1)"),
    Mutant("checkpoints: transformers stays silent", CHECKPOINTS, "        logging.set_verbosity(verbosity)\n", ""),
    Mutant("checkpoints: a bar that was on stays off", CHECKPOINTS, "            logging.enable_progress_bar()\n", "            pass\n"),
    Mutant("host: C functions are not counted", HOST, 'elif event == "c_call" and arg is not sys.setprofile:', "elif False:"),
    Mutant("host: the counter counts its own end", HOST, 'elif event == "c_call" and arg is not sys.setprofile:', 'elif event == "c_call":'),
    Mutant("host: everything is pyaccel's", HOST, "frame.f_code.co_filename.startswith(_PROJECT)", "True"),
    Mutant("host: the greatest time", HOST, "least = min(least,", "least = max(0.0 if least == float('inf') else least,"),
    Mutant("host: another profiler is lost", HOST, "sys.setprofile(before)", "sys.setprofile(None)"),
    Mutant("activations: ReLU's gradient of negative inputs", ACTIVATIONS, "threshold_backward(grad, pre, 0)", "threshold_backward(grad, pre, -9)"),
    Mutant("activations: tanh GELU's gradient is erf's", ACTIVATIONS, 'partial(_aten.gelu_backward, approximate="tanh")', "_aten.gelu_backward"),
    Mutant("timing: a round isn't told", "pyaccel/timing.py", "        if done is not None:\n", "        if done is not None and i >= 0:\n"),
]  # fmt: skip
