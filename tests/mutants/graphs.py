"""Bugs of CUDA graphs: what a replay reads and gives, and when a graph may serve."""

from __future__ import annotations

from tests.mutants import Mutant

GRAPHS = "pyaccel/hf/executors/cuda_graph.py"
PLAN = "pyaccel/hf/plan.py"
TESTS = ["tests/hf/test_cuda_graph.py", "tests/hf/test_plan.py"]

MUTANTS = [
    Mutant("graphs: weights that moved are read where they were", GRAPHS, "if addresses != self._addresses:", "if not self._addresses:"),
    Mutant("graphs: parameters aren't looked after", GRAPHS, "for t in (*module._parameters.values(), *module._buffers.values())", "for t in module._buffers.values()"),
    Mutant("graphs: buffers aren't looked after", "pyaccel/hf/fingerprint.py", "(module._parameters, module._buffers)", "(module._parameters, {})"),
    Mutant("graphs: the last batch's mask beside this one's", GRAPHS, "            self.mask.zero_()\n", "            pass\n"),
    Mutant("graphs: the last mask where there is none", GRAPHS, "            here.fill_(True)\n", "            pass\n"),
    Mutant("graphs: the mask of the capture", GRAPHS, "            here.copy_(mask)\n", "            pass\n"),
    Mutant("graphs: all results are one buffer", GRAPHS, "self.out[:batch, :seq].clone()", "self.out[:batch, :seq]"),
    Mutant("graphs: one for every size", GRAPHS, "return bucket(batch), bucket(seq, _LEAST_SEQ), ", "return batch, seq, "),
    Mutant("graphs: another backend's", GRAPHS, "        dispatch.overrides(),\n", ""),
    Mutant("graphs: another precision's", GRAPHS, "        torch.get_float32_matmul_precision(),\n", ""),
    Mutant("graphs: those captured first make room", GRAPHS, "            self._captured.move_to_end(key)\n", ""),
    Mutant("graphs: kept without end", GRAPHS, "if len(self._captured) > MOST_GRAPHS:", "if False:"),
    Mutant("graphs: large batches too", GRAPHS, "<= MOST_TOKENS", "<= 10 * MOST_TOKENS"),
    Mutant("graphs: threads don't wait for each other", GRAPHS, "with _lock, torch.no_grad():", "with torch.no_grad():"),
    Mutant("graphs: of all streams", GRAPHS, "hidden.dtype, stream_of(hidden.device), *_settings()", "hidden.dtype, 0, *_settings()"),
    Mutant("graphs: all streams share memory", GRAPHS, "if stream not in self._pools:", "stream = 0\n            if stream not in self._pools:"),
    Mutant("graphs: what is in the padding is left there", GRAPHS, "        if self._clears and mask is not None:\n", "        if False:\n"),
    Mutant("graphs: padding that a head reads is cleared", PLAN, "clears = acceleration.packing and state.keeps_padding is None", "clears = acceleration.packing"),
    Mutant("graphs: padding is cleared though it wasn't to be dropped", PLAN, "clears = acceleration.packing and", "clears ="),
    Mutant("graphs: first positions are cleared", GRAPHS, "            read[:, 0] = True\n", ""),
    Mutant("graphs: without dropout in training", GRAPHS, "            return \"dropout\"\n", "            pass\n"),
    Mutant("graphs: a watched layer is called once", PLAN, "not is_kept or any(map(has_opaque, layers))", "not is_kept"),
    Mutant("graphs: chosen ones are captured at the first batch", GRAPHS, "if self._is_asked_for or key in self._captured or key in self._met:", "if True:"),
    Mutant("graphs: chosen ones raise where they can't be captured", GRAPHS, "            if self._is_asked_for:\n                raise\n", "            raise\n"),
    Mutant("graphs: chosen ones are tried again where they couldn't be captured", GRAPHS, "            self._ineligible = str(error)\n", ""),
    Mutant("packing waits for the device in a capture", "pyaccel/hf/eligibility.py", "if hidden.is_cuda and is_capturing():", "if False:"),
]  # fmt: skip
