"""The activations of BERT-family feed-forward layers, and their derivatives, on tiles of fp32.

``ACTIVATION`` is a name that :func:`pyaccel.reference.activation` knows: "gelu" (erf; arXiv:1606.08415), "gelu_tanh",
"relu" or "silu".
"""

from __future__ import annotations

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def activation_tile(x, ACTIVATION: tl.constexpr):
    """The activation of x (fp32)."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(u)) is sigmoid(2 u)
        return x * tl.sigmoid((x + x * x * x * CUBIC) * SQRT_8_OVER_PI)
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)  # NaN stays
    else:
        tl.static_assert(ACTIVATION == "silu")
        return x * tl.sigmoid(x)


@triton.jit
def _sigmoid_and_grad(u):
    """sigmoid(u) and its derivative, by one exponential. As s * (1 - s) the derivative would cancel near s = 1."""
    e = tl.exp(-tl.abs(u))
    r = 1.0 / (1.0 + e)
    return tl.where(u >= 0.0, r, e * r), e * r * r


@triton.jit
def activation_grad_tile(x, ACTIVATION: tl.constexpr):
    """The derivative of the activation at x (fp32)."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * SQRT_HALF))
        return cdf + x * tl.exp(-0.5 * x * x) * INV_SQRT_2PI
    elif ACTIVATION == "gelu_tanh":
        s, ds = _sigmoid_and_grad((x + x * x * x * CUBIC) * SQRT_8_OVER_PI)
        slope = (1.0 + x * x * (3.0 * CUBIC)) * SQRT_8_OVER_PI
        return s + x * ds * slope
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "silu")
        s, ds = _sigmoid_and_grad(x)
        return s + x * ds
