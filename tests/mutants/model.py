"""Bugs of the model level: packing, a BERT layer's composition, the fast path of transformers' models."""

from __future__ import annotations

from tests.mutants import Mutant

PACKING = "pyaccel/packing.py"
LAYER = "pyaccel/nn/encoder_layer.py"
FAST_PATH = "pyaccel/hf/fast_path.py"
ELIGIBILITY = "pyaccel/hf/eligibility.py"
GUARD = "pyaccel/hf/guard.py"
EVALUATION = "pyaccel/models/evaluation.py"
TESTS = [
    "tests/test_packing.py",
    "tests/hf/test_evaluation.py",
    "tests/verify/test_verify.py::test_an_unharmed_model_is_right",
    "tests/hf/test_accelerate.py",
    "tests/hf/test_guard.py",
    "tests/hf/test_families.py",
]

MUTANTS = [
    Mutant("model: the mask shifted by one in the packed layout", PACKING, "keys = _tokens(attention_mask)\n", "keys = _tokens(attention_mask).roll(1, 1)\n"),
    Mutant("model: rows sorted, their tokens not", PACKING, "indices = order[row] * seq_len + column", "indices = row * seq_len + column"),
    Mutant("model: a kept padding slot is a key too", PACKING, "key_indices=keys.flatten()[indices].nonzero().flatten() if only_queries else None", "key_indices=None"),
    Mutant("model: gamma and beta swapped", LAYER, "        residual,\n        norm.weight,\n        norm.bias,\n        eps=norm.eps,\n        dropout_p=dropout.p,\n        training=dropout.training,\n    )\n\n\ndef packed_attention", "        residual,\n        norm.bias,\n        norm.weight,\n        eps=norm.eps,\n        dropout_p=dropout.p,\n        training=dropout.training,\n    )\n\n\ndef packed_attention"),
    Mutant("model: tanh GELU for erf's", "pyaccel/activations.py", "_CLASSES = {name: activation for", '_CLASSES = {name: "gelu_tanh" for'),
    Mutant("model: the bias of the last product is lost in training", LAYER, "        x_bias=last.dense.bias,\n", ""),
    Mutant("model: the residual of the feed-forward network is that of attention", LAYER, "    return ops.residual_layernorm(\n        out,\n        hidden,\n", "    return ops.residual_layernorm(\n        out,\n        residual,\n"),
    Mutant("model: key and value swapped", LAYER, "projections = (attention_self.query, attention_self.key, attention_self.value)\n    scales", "projections = (attention_self.query, attention_self.value, attention_self.key)\n    scales"),
    Mutant("model: attention drops in evaluation", FAST_PATH, "dropout_p = heads.dropout.p if heads.training else 0.0", "dropout_p = heads.dropout.p"),
    Mutant("model: attention never drops", FAST_PATH, "dropout_p = heads.dropout.p if heads.training else 0.0", "dropout_p = 0.0"),
    Mutant("model: the padding mask is dropped", FAST_PATH, "partial(padded_attention, mask, dropout_p)", "partial(padded_attention, None, dropout_p)"),
    Mutant("model: output_attentions is ignored", ELIGIBILITY, 'if given.get("output_attentions", config.output_attentions):', "if False:"),
    Mutant("model: hooks of submodules are ignored", GUARD, 'return "has hooks"', "return None"),
    Mutant("model: the straight line swaps key and value", EVALUATION, "for x in linears[:3])", "for x in (linears[0], linears[2], linears[1]))"),
    Mutant("model: the straight line drops nothing in training", EVALUATION, "if any(dropout.training and dropout.p > 0.0 for dropout in others):", "if False:"),
    Mutant("model: the straight line takes kept padding for keys", EVALUATION, "and tokens.key_indices is None", "and True"),
    Mutant("model: the straight line keeps an epsilon", EVALUATION, "norm.bias, norm.eps)", "norm.bias, 1e-12)"),
    Mutant("model: tokens sorted on the host, rows not", PACKING, "indices = by_length[row] * seq_len + column", "indices = row * seq_len + column"),
    Mutant("model: the straight line asks attention's dropout, not attention, whether to drop", EVALUATION, "if self.attention.training and first.p > 0.0:", "if first.training and first.p > 0.0:"),
    Mutant("model: prepacked weights don't follow changes in place", EVALUATION, "(p.data_ptr(), p._version) for p", "(p.data_ptr(), 0) for p"),
    Mutant("model: prepacked weights don't follow other memory", EVALUATION, "(p.data_ptr(), p._version) for p", "(0, p._version) for p"),
    Mutant("model: memory of prepacked weights is given back", EVALUATION, "held=[p.detach() for p in self.parameters]", "held=[]"),
    Mutant("model: prepacked weights are made each time", EVALUATION, "if copies is None or state != copies.state:", "if True:"),
]  # fmt: skip
