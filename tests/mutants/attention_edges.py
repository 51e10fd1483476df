"""Bugs of attention at the edges of numbers, and under transforms and traces."""

from __future__ import annotations

from tests.mutants import Mutant

SDPA = "pyaccel/ops/attention/sdpa.py"
REFERENCE = "pyaccel/reference/attention.py"
TRITON = "pyaccel/ops/attention/triton.py"
TESTS = [
    "tests/ops/test_attention_edges.py",
    "tests/ops/test_attention_transforms.py",
    "tests/ops/test_on_host.py",
    "tests/ops/test_attention_varlen.py",
]

MUTANTS = [
    Mutant("attn_mask: a column of NaN counts as masked", "kernels/attention/tile.py", "(bias != float(\"-inf\")).to(tl.int32)", "(bias > float(\"-inf\")).to(tl.int32)"),
    Mutant("on the CPU: NaN of a short sequence hides", SDPA, "length < FEW_KEYS)", "length < 0)"),
    Mutant("on the CPU: a mask of fp32 is read as fp64", SDPA, "bias = bias.to(query.dtype)  # PyTorch", "pass  # PyTorch"),
    Mutant("on the CPU: +inf in a mask has no NaN in gradients", SDPA, "if not _below_infinity(bias) or (", "if ("),
    Mutant("on the CPU: weights of a row of padding alone are 1 in gradients", SDPA, "(top.abs() > _NEAR)", "(top.abs() > math.inf)"),
    Mutant("on the CPU: a negative scale shows what a causal mask hides", SDPA, "and scale <= 0.0:", "and scale <= -1e9:"),
    Mutant("on the CPU: gradients of no queries share memory", SDPA, "is int and query.shape[2] == 0\n", "is int and query.shape[2] < 0\n"),
    Mutant("packed: keys that no query reads have no gradient", "pyaccel/ops/attention/varlen.py", "        return _joined_to(joined, key, value)\n", "        return out\n"),
    Mutant("packed: rows behind the only group are left out", "pyaccel/ops/attention/varlen.py", "if len(groups.groups) == 1 and (len(query), len(key)) == (groups.total_q, groups.total_k):", "if len(groups.groups) == 1:"),
    Mutant("packed: NaN of a short sequence hides", "pyaccel/ops/attention/varlen.py", 'by = "torch" if math.isfinite(total.item()) else "sdpa"', 'by = "torch"'),
    Mutant("in a graph: NaN of a query hides", SDPA, "_showing(out, query) if may_hide and not reads else out", "out"),
    Mutant("reference: scores of fp16 overflow", REFERENCE, "narrow = wide if dtype == torch.float16 else dtype", "narrow = dtype"),
    Mutant("products: fp16 is served where it was measured", "pyaccel/ops/attention/matmul.py", "return dtype in _EVALUATION and dropout_p < 1.0", "return dropout_p < 1.0"),
    Mutant("a trace keeps what a mask held", "pyaccel/ops/common.py", "    if torch._C._is_tracing() or torch._C._are", "    if torch._C._are"),
    Mutant("forward mode: the kernels drop the derivative", TRITON, "    _refuse_forward_mode(*arguments[:4])\n", ""),
    Mutant("packing: offsets of a full batch on the default device", "pyaccel/packing.py", "indices = torch.arange(batch_size * seq_len, device=device)", "indices = torch.arange(batch_size * seq_len)"),
]  # fmt: skip
