"""The activations between a model's layers, in float32.

One name each: ``"none"``, ``"silu"``, ``"gelu"`` (with the normal distribution function Φ),
``"gelu_tanh"`` and ``"relu"``. NaN stays NaN, and no finite number overflows on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl

TANH_SLOPE = tl.constexpr(1.5957691216057308)
"""Twice the root of 2/π: the tanh form is ``x · sigmoid(TANH_SLOPE · (x + TANH_CUBE · x³))``."""

TANH_CUBE = tl.constexpr(0.044715)

SATURATED = tl.constexpr(16.0)
"""Beyond it both forms of gelu are ``x`` or 0 to the last digit of float32."""


def activation_name(activation: str | None) -> str:
    """Return the kernels' name of an activation, which for None is ``"none"``."""
    return activation or "none"


@triton.jit
def logistic(x, magnitude):
    """Return ``1 / (1 + exp(−z))`` for the ``z`` of the sign of ``x`` and the given magnitude.

    Small results keep all their digits.
    """
    power = tl.exp(-magnitude)
    return tl.where(x < 0, power, 1.0) / (1.0 + power)


@triton.jit
def normal_distribution(x, magnitude):
    """Return ``Φ(z)`` for the ``z`` of the sign of ``x`` and the given magnitude, up to 16.

    Small results keep all their digits: ``Φ(−a) = exp(−a²/2) · P(1 / (1 + 0.3 a))``, where ``P``
    has been fitted for ``0 ≤ a ≤ 16`` to a relative error of 6e-8. Written out because the
    library's error function takes so many registers that a tile's sums no longer fit.
    """
    t = 1.0 / (1.0 + 0.3 * magnitude)
    p = 0.03843867477071654 * t - 0.16945912681338973
    p = p * t + 0.22926411940500152
    p = p * t - 0.07719555880470841
    p = p * t + 0.14300998154907435
    p = p * t + 0.09448220201052919
    p = p * t + 0.12197160745495722
    p = p * t + 0.11948054446381334
    p = p * t + 7.585220533133291e-06
    tail = p * tl.exp(-0.5 * magnitude * magnitude)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return the activation of the float32 ``x``."""
    tl.static_assert(x.dtype == tl.float32)
    if ACTIVATION == "silu":
        return x * logistic(x, tl.abs(x))
    elif ACTIVATION == "gelu":
        return x * normal_distribution(x, tl.minimum(tl.abs(x), SATURATED))
    elif ACTIVATION == "gelu_tanh":
        near = tl.minimum(tl.abs(x), SATURATED)
        return x * logistic(x, TANH_SLOPE * near * (1.0 + TANH_CUBE * near * near))
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "none")
        return x
