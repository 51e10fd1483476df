"""Bugs of CUDA graphs: what a replay reads and gives, and when a graph may serve."""

from __future__ import annotations

from tests.mutants import Mutant

GRAPHS = "pyaccel/hf/graphs.py"
PATH = "pyaccel/hf/fast_path.py"
TESTS = ["tests/hf/test_graphs.py"]

MUTANTS = [
    Mutant("graphs: weights that moved are read where they were", GRAPHS, "if addresses != self._addresses:", "if not self._addresses:"),
    Mutant("graphs: parameters aren't looked after", GRAPHS, "for d in (part._parameters, part._buffers) if d", "for d in (part._buffers,) if d"),
    Mutant("graphs: buffers aren't looked after", GRAPHS, "for d in (part._parameters, part._buffers) if d", "for d in (part._parameters,) if d"),
    Mutant("graphs: the last batch's mask beside this one's", GRAPHS, "            self.mask.zero_()\n", "            pass\n"),
    Mutant("graphs: the last mask where there is none", GRAPHS, "            here.fill_(True)\n", "            pass\n"),
    Mutant("graphs: the mask of the capture", GRAPHS, "            here.copy_(mask)\n", "            pass\n"),
    Mutant("graphs: all results are one buffer", GRAPHS, "self.out[:batch, :seq].clone()", "self.out[:batch, :seq]"),
    Mutant("graphs: one for every size", GRAPHS, "(bucket(hidden.shape[0]), bucket(hidden.shape[1], _LEAST_SEQ))", "tuple(hidden.shape[:2])"),
    Mutant("graphs: another backend's", GRAPHS, "        dispatch.requests(),\n", ""),
    Mutant("graphs: another precision's", GRAPHS, "        torch.get_float32_matmul_precision(),\n", ""),
    Mutant("graphs: those captured first make room", GRAPHS, "            self._captured.move_to_end(key)\n", ""),
    Mutant("graphs: kept without end", GRAPHS, "if len(self._captured) > MOST_GRAPHS:", "if False:"),
    Mutant("graphs: large batches too", GRAPHS, "<= MOST_TOKENS", "<= 10 * MOST_TOKENS"),
    Mutant("graphs: threads don't wait for each other", GRAPHS, "with _lock, torch.no_grad():", "with torch.no_grad():"),
    Mutant("graphs: of all streams", GRAPHS, "hidden.dtype, stream, *_settings())", "hidden.dtype, *_settings())"),
    Mutant("graphs: all streams share memory", GRAPHS, "if stream not in self._pools:", "stream = 0\n            if stream not in self._pools:"),
    Mutant("graphs: what is in the padding is left there", PATH, "        if clears:\n", "        if False:\n"),
    Mutant("graphs: padding that a head reads is cleared", PATH, "clears = attached.acceleration.packing and attached.keeps_padding is None", "clears = attached.acceleration.packing"),
    Mutant("graphs: padding is cleared though it wasn't to be dropped", PATH, "clears = attached.acceleration.packing and", "clears ="),
    Mutant("graphs: first positions are cleared", PATH, "            read[:, 0] = True\n", ""),
    Mutant("graphs: without dropout in training", PATH, "    if any(drops(known.family.view(layer)) for layer in layers):\n        return \"dropout\"\n", ""),
    Mutant("graphs: a watched layer is called once", PATH, "any(is_sharded(x) or has_opaque(x) for x in layers)", "any(is_sharded(x) for x in layers)"),
    Mutant("packing waits for the device in a capture", "pyaccel/hf/eligibility.py", "if graphs.on_gpu(hidden) and graphs.is_capturing():", "if False:"),
]  # fmt: skip
