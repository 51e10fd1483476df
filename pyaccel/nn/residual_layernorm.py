"""LayerNorm with the dropout and the residual addition that precede it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyaccel.ops import residual_layernorm


class ResidualLayerNorm(nn.LayerNorm):
    """``LayerNorm(dropout(x + x_bias) + residual)``, with the state dict of ``nn.LayerNorm``.

    Args:
        normalized_shape: size of the last dimension.
        eps: added to the variance; BERT's 1e-12 by default.
        dropout_p: probability of dropping an element of x, in training only.
        elementwise_affine, bias, device, dtype: as in ``nn.LayerNorm``.
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-12,
        dropout_p: float = 0.0,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(normalized_shape, int):
            raise ValueError(
                f"ResidualLayerNorm normalizes the last dimension: normalized_shape must be an int, "
                f"got {normalized_shape!r}"
            )
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout_p = dropout_p

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        x_bias: Tensor | None = None,
        return_sum: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Shapes, dtypes and errors: see :func:`pyaccel.ops.residual_layernorm`."""
        out: Tensor | tuple[Tensor, Tensor] = residual_layernorm(
            x,
            residual,
            self.weight,
            self.bias,
            eps=self.eps,
            dropout_p=self.dropout_p,
            training=self.training,
            x_bias=x_bias,
            return_sum=return_sum,
        )
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}"
