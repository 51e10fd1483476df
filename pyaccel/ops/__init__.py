"""The public functions: each validates, chooses a backend, and says why it can't where it can't."""

from pyaccel.ops.attention import attention_probs, scaled_dot_product_attention, varlen_attention
from pyaccel.ops.bert_embeddings import bert_embeddings
from pyaccel.ops.bias_gelu import bias_gelu
from pyaccel.ops.feed_forward import feed_forward
from pyaccel.ops.int8_linear import int8_linear
from pyaccel.ops.int8_matmul import int8_matmul
from pyaccel.ops.int8_weight_only_matmul import int8_weight_only_matmul
from pyaccel.ops.linear import linear_activation, linear_residual_layernorm
from pyaccel.ops.masked_lm_cross_entropy import masked_lm_cross_entropy
from pyaccel.ops.quantize import (
    quantize_per_channel,
    quantize_per_tensor,
    quantize_per_token,
    quantize_per_token_with_offset,
)
from pyaccel.ops.residual_layernorm import residual_layernorm

__all__ = [
    "attention_probs",
    "bert_embeddings",
    "bias_gelu",
    "feed_forward",
    "int8_linear",
    "int8_matmul",
    "int8_weight_only_matmul",
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
