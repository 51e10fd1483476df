"""The definition of every op in plain torch: what the kernels are judged against. Imports torch alone."""

from pyaccel.reference.activation import activation
from pyaccel.reference.attention import attention_probs, scaled_dot_product_attention, varlen_attention
from pyaccel.reference.bias_act import bias_gelu
from pyaccel.reference.embeddings import BertEmbeddingsOutput, bert_embeddings
from pyaccel.reference.int8 import (
    int8_linear,
    int8_matmul,
    int8_weight_only_matmul,
    quantize_per_channel,
    quantize_per_tensor,
    quantize_per_token,
    quantize_per_token_with_offset,
)
from pyaccel.reference.layernorm import ResidualLayerNormOutput, residual_layernorm
from pyaccel.reference.mlm_loss import masked_lm_cross_entropy

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
