"""The definition of every op in plain torch: what the kernels are judged against. Imports torch alone."""

from pyaccel.reference.activation import activation
from pyaccel.reference.attention import attention_probs, scaled_dot_product_attention, varlen_attention
from pyaccel.reference.bert_embeddings import BertEmbeddingsOutput, bert_embeddings
from pyaccel.reference.bias_gelu import bias_gelu
from pyaccel.reference.int8_linear import int8_linear
from pyaccel.reference.int8_matmul import int8_matmul, int8_weight_only_matmul
from pyaccel.reference.masked_lm_cross_entropy import masked_lm_cross_entropy
from pyaccel.reference.quantize import (
    quantize_per_channel,
    quantize_per_tensor,
    quantize_per_token,
    quantize_per_token_with_offset,
)
from pyaccel.reference.residual_layernorm import ResidualLayerNormOutput, residual_layernorm

__all__ = [
    "BertEmbeddingsOutput",
    "ResidualLayerNormOutput",
    "activation",
    "attention_probs",
    "bert_embeddings",
    "bias_gelu",
    "int8_linear",
    "int8_matmul",
    "int8_weight_only_matmul",
    "masked_lm_cross_entropy",
    "quantize_per_channel",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantize_per_token_with_offset",
    "residual_layernorm",
    "scaled_dot_product_attention",
    "varlen_attention",
]
