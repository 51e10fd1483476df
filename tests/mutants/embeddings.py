"""Bugs that fused embeddings might have, in the lookup, the LayerNorm and the sums of the tables' gradients."""

from __future__ import annotations

from tests.mutants import Mutant

TESTS = ("tests/kernels/test_embeddings.py", "tests/ops/test_bert_embeddings.py")

FORWARD = "kernels/embeddings/forward.py"
BACKWARD = "kernels/embeddings/backward.py"
SEGMENTS = "kernels/common/segment_sum.py"
TRITON = "pyaccel/ops/embeddings/triton.py"
OP = "pyaccel/ops/embeddings/api.py"

MUTANTS = [
    Mutant("embeddings: ids are not clamped from below", FORWARD, "tl.minimum(tl.maximum(given, 0), size - 1)", "tl.minimum(tl.maximum(given, 1), size - 1)"),
    Mutant("embeddings: positions go on over the end of a sequence", FORWARD, "return clamp_ids(o_row % period, size)", "return clamp_ids(o_row, size)"),
    Mutant("embeddings: packed positions one off", FORWARD, "tl.where(inside, o_row - first, 0)", "tl.where(inside, o_row - first + 1, 0)"),
    Mutant("embeddings: a repeated offset counts once", FORWARD, "at_or_before = offset <= o_row", "at_or_before = offset < o_row"),
    Mutant("embeddings: stride of the words' table ignored", FORWARD, "o_word = word[:, None] * stride_word_row", "o_word = word[:, None] * stride_position_row"),
    Mutant("embeddings: the word table's columns are contiguous", FORWARD, "stride_word_row + col * stride_word_col", "stride_word_row + col"),
    Mutant("embeddings: unbiased variance", FORWARD, "tl.sum(centred * centred, axis=1) / n_cols + eps", "tl.sum(centred * centred, axis=1) / tl.maximum(n_cols - 1, 1) + eps"),
    Mutant("embeddings: the columns beyond the row count", FORWARD, "tl.where(mask, z - mean[:, None], 0.0)", "z - mean[:, None]"),
    Mutant("embeddings: dropout before the LayerNorm's bias", FORWARD, "    if bias_ptr is not None:\n        out +=", "    if bias_ptr is not None and key_ptr is None:\n        out +="),
    Mutant("embeddings: active dropout in evaluation", OP, "dropout_p=dropout_p if training else 0.0", "dropout_p=dropout_p + 0.0"),
    Mutant("embeddings: no gradient through the mean", BACKWARD, "            mean_wdy = tl.sum(wdy, axis=1) / n_cols  # [BLOCK_ROWS]\n", "            mean_wdy = tl.sum(wdy, axis=1) * 0.0\n"),
    Mutant("embeddings: stride of dy ignored", BACKWARD, "o_row[:, None] * stride_dy_row + o_col.to(tl.int64)[None, :] * stride_dy_col", "o_row[:, None] * stride_dy_row + o_col.to(tl.int64)[None, :]"),
    Mutant("embeddings: the padding row has a gradient", SEGMENTS, "mask = m_col & (id != skip)", "mask = m_col & (id != skip - 1)"),
    Mutant("embeddings: a run that crosses a border loses its head", SEGMENTS, "out = head + tl.sum(total, axis=0)", "out = 0.0 * head + tl.sum(total, axis=0)"),
    Mutant("embeddings: sums go on into the next run", SEGMENTS, "acc = tl.where(goes_on, acc, 0.0)", "acc = acc * 1.0"),
    Mutant("embeddings: only the first block of border sums counts", SEGMENTS, "going = tl.sum(m_chunk.to(tl.int32)) == BLOCK_P", "going = tl.sum(m_chunk.to(tl.int32)) > BLOCK_P"),
    Mutant("embeddings: rows are summed in the order of memory", SEGMENTS, "            row = tl.load(order_ptr + i).to(tl.int64)", "            row = i + 0 * tl.load(order_ptr + i).to(tl.int64)"),
    Mutant("embeddings: equal ids in any order", TRITON, "return torch.sort(ids, stable=True)", "return torch.sort(ids.flip(0), stable=True)"),
]  # fmt: skip
