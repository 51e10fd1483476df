"""The public functions: each validates, chooses a backend, and says why it can't where it can't."""

from pyaccel import dispatch
from pyaccel.ops.attention.api import attention_probs, scaled_dot_product_attention
from pyaccel.ops.attention.packed import varlen_attention
from pyaccel.ops.bias_act.api import bias_gelu
from pyaccel.ops.embeddings.api import bert_embeddings
from pyaccel.ops.int8.linear import int8_linear
from pyaccel.ops.int8.matmul import int8_matmul
from pyaccel.ops.int8.quantize import (
    quantize_per_channel,
    quantize_per_tensor,
    quantize_per_token,
    quantize_per_token_with_offset,
)
from pyaccel.ops.int8.weight_only import int8_weight_only_matmul
from pyaccel.ops.layernorm.api import residual_layernorm
from pyaccel.ops.linear.api import linear_activation, linear_residual_layernorm
from pyaccel.ops.linear.mlp import layernorm_mlp
from pyaccel.ops.mlm_loss.api import masked_lm_cross_entropy

__all__ = [
    "attention_probs",
    "bert_embeddings",
    "bias_gelu",
    "int8_linear",
    "int8_matmul",
    "int8_weight_only_matmul",
    "layernorm_mlp",
    "linear_activation",
    "linear_residual_layernorm",
    "masked_lm_cross_entropy",
    "quantize_per_channel",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantize_per_token_with_offset",
    "residual_layernorm",
    "scaled_dot_product_attention",
    "varlen_attention",
]

# Here and not where they are defined: an op that calls another one is told of as one.
for _name in __all__:
    globals()[_name] = dispatch.observable(globals()[_name])
    globals()[_name].__module__ = __name__
