"""What is compiled of the masked-language-model loss: every launch configuration, with gradients or without."""

from __future__ import annotations

from pyaccel.inspect.spec import KernelSpec, kernel_spec, launched
from pyaccel.kernels.mlm_loss import config

# Logits and bias have one dtype: autocast converts both.
DTYPES = ("bf16", "fp16", "fp32")
# A vocabulary of each configuration: one tile, and BERT's.
VOCABULARIES = (1000, 30522)
# name -> whether gradients are computed, and each row has a factor.
VARIANTS = {"loss": (False, False), "loss and gradient": (True, False), "gradient, scaled": (True, True)}


def masked_lm_cross_entropy() -> list[KernelSpec]:
    """The family's kernel. Its products are PyTorch's."""
    found = []
    for dtype in DTYPES:
        for vocab in VOCABULARIES:
            row_config = config.cross_entropy(vocab)
            for name, (want_grad, scaled) in VARIANTS.items():
                arguments = {
                    "loss_ptr": "*fp32",
                    "logits_ptr": f"*{dtype}",
                    "bias_ptr": f"*{dtype}",
                    "label_ptr": "*i64",
                    "scale_ptr": "*fp32" if scaled else None,
                    "width": config.cross_entropy_width(vocab),
                    "n_cols": vocab,
                    "BLOCK_N": row_config.block_n,
                    "WANT_GRAD": want_grad,
                }
                found.append(
                    kernel_spec(
                        "masked_lm_cross_entropy",
                        name,
                        "pyaccel.kernels.mlm_loss.cross_entropy:rows_kernel",
                        arguments,
                        dtype=dtype,
                        **launched(row_config),
                    )
                )
    return found
