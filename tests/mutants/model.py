"""Bugs of the model level: packing, a BERT layer's composition, the fast path of transformers' models."""

from __future__ import annotations

from tests.mutants import Mutant

PACKING = "pyaccel/packing.py"
LAYER = "pyaccel/nn/encoder_layer.py"
PADDED = "pyaccel/hf/executors/padded.py"
ELIGIBILITY = "pyaccel/hf/eligibility.py"
ONEDNN = "pyaccel/hf/executors/onednn.py"
EAGER = "pyaccel/hf/executors/eager.py"
TESTS = [
    "tests/test_packing.py",
    "tests/hf/test_plan.py",
    "tests/hf/test_onednn.py",
    "tests/verify/test_verify.py::test_an_unharmed_model_is_right",
    "tests/hf/test_accelerate.py",
    "tests/hf/test_eligibility.py",
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
    Mutant("model: attention drops in evaluation", PADDED, "dropout_p = heads.dropout.p if heads.training else 0.0", "dropout_p = heads.dropout.p"),
    Mutant("model: attention never drops", PADDED, "dropout_p = heads.dropout.p if heads.training else 0.0", "dropout_p = 0.0"),
    Mutant("model: the padding mask is dropped", PADDED, "partial(_padded_attention, mask, dropout_p)", "partial(_padded_attention, None, dropout_p)"),
    Mutant("model: output_attentions is ignored", ELIGIBILITY, 'if given.get("output_attentions", config.output_attentions):', "if False:"),
    Mutant("model: hooks of submodules are ignored", ELIGIBILITY, 'return "has hooks"', "return None"),
    Mutant("model: oneDNN's layers swap key and value", ONEDNN, "for x in (query, key, value, first, inner, second)", "for x in (query, value, key, first, inner, second)"),
    Mutant("model: oneDNN's layers drop nothing in training", ONEDNN, "            return \"dropout\"\n", "            pass\n"),
    Mutant("model: oneDNN's layers take kept padding for keys", ONEDNN, "if tokens.key_indices is not None:", "if False:"),
    Mutant("model: oneDNN's layers keep an epsilon", ONEDNN, "(norm.weight, norm.bias, norm.eps)", "(norm.weight, norm.bias, 1e-12)"),
    Mutant("model: rows that lie elsewhere are not packed", PACKING, "return self.key_indices is None and self.total_tokens ==", "return self.total_tokens =="),
    Mutant("model: hidden states are a view", "pyaccel/hf/executors/packed.py", ".reshape(hidden.shape).clone()", ".reshape(hidden.shape)"),
    Mutant("model: unpacked hidden states are a view", PACKING, "    if torch.is_grad_enabled():\n", "    if True:\n"),
    Mutant("model: tokens sorted on the host, rows not", PACKING, "indices = by_length[row] * seq_len + column", "indices = row * seq_len + column"),
    Mutant("model: attention's dropout is asked, not attention, whether to drop", ELIGIBILITY, "(heads.training and heads.dropout.p > 0.0)", "(heads.dropout.training and heads.dropout.p > 0.0)"),
    Mutant("model: prepacked weights don't follow changes in place", "pyaccel/hf/fingerprint.py", "[*map(_DATA_PTR, tensors), *map(_VERSION, tensors)]", "[*map(_DATA_PTR, tensors)]"),
    Mutant("model: prepacked weights don't follow other memory", "pyaccel/hf/fingerprint.py", "[*map(_DATA_PTR, tensors), *map(_VERSION, tensors)]", "[*map(_VERSION, tensors)]"),
    Mutant("model: memory of prepacked weights is given back", ONEDNN, "copies, present, [p.detach() for p in self._parameters]", "copies, present, []"),
    Mutant("model: prepacked weights are made each time", ONEDNN, "if kept is not None and kept[1] == present:", "if False:"),
    Mutant("model: layers without checks never drop in attention", EAGER, "dropout_p = view.attention.self.dropout.p if attention.training else 0.0", "dropout_p = 0.0"),
    Mutant("model: layers without checks drop in evaluation", EAGER, "dropout_p = dropout.p if dropout.training else 0.0", "dropout_p = dropout.p"),
    Mutant("model: layers without checks take kept padding for keys", EAGER, "if tokens.key_indices is not None else None", "if False else None"),
    Mutant("model: layers without checks run under autocast", EAGER, 'if torch.is_autocast_enabled("cpu"):', "if False:"),
    Mutant("model: layers without checks add the residual of attention twice", EAGER, "return _end(view.output, activated, hidden)", "return _end(view.output, activated, context)"),
    Mutant("model: oneDNN's layers run where operators are counted", ONEDNN, "if torch._C._len_torch_dispatch_stack():", "if False:"),
    Mutant("model: oneDNN's layers have the first one's heads", ONEDNN, "len(set(map(heads_of, views))) > 1", "False"),
    Mutant("model: layers without checks have the first one's heads", EAGER, "if len(set(map(heads_of, views))) > 1:", "if False:"),
]  # fmt: skip
