"""How far a result is from what is expected, and how far it may be: for tests, benchmarks and self_check.py alike.

float32, float64: a sum of n terms of random sign, each rounded, is off by about ``eps * sqrt(n) / 4`` when added one
by one and by less when blocked. A factor 4 is left for luck and for sums with cancellation; eps itself is added for
each of the few roundings outside the sum (blend, scale, shift, the final store).
float16, bfloat16: twice the error of the reference in the same dtype, plus one rounding of the result, eps / 2.
TF32: the same, and at least eps. cuDNN chooses by shape whether it uses TF32 at all; where it does not, the reference
says nothing about operands cut to eleven bits. Each is off by up to eps, by 0.4 eps in the mean square, a product by
0.6 eps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .call import Call

LOW_PRECISION = (torch.float16, torch.bfloat16)
TF32_EPS = 2.0**-10


def relative_error(result: Tensor, expected: Tensor) -> float:
    """``||result - expected|| / ||expected||`` in float64; the norm of ``result`` where ``expected`` is zero."""
    expected = expected.double()
    difference = (result.double() - expected).norm().item()
    norm = expected.norm().item()
    return difference / norm if norm > 0 else difference


def worst_error(result: Tensor, expected: Tensor) -> Tensor:
    """The relative error or, if that is larger, the largest error of an element over the largest element; 0-dim.

    A norm forgives one wrong element among a million. Does not wait for the device.
    """
    if expected.numel() == 0:
        return expected.new_zeros((), dtype=torch.float64)
    expected = expected.double()
    difference = result.double() - expected
    over_all = _quotient(difference.norm(), expected.norm())
    return torch.maximum(over_all, _quotient(difference.abs().max(), expected.abs().max()))


def _quotient(difference: Tensor, size: Tensor) -> Tensor:
    return difference / torch.where(size > 0, size, torch.ones_like(size))


def complaints(errors: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """A sentence for each of ``errors`` that is beyond its limit; NaN is beyond every limit."""
    return [
        f"{name} is off by {error:.1e}, allowed {limits[name]:.1e}"
        for name, error in errors.items()
        if not error <= limits[name]
    ]


def of_sum(terms: int, dtype: torch.dtype) -> float:
    """The largest allowed relative error of sums of ``terms`` numbers in float32 or float64."""
    return torch.finfo(dtype).eps * (4 + math.sqrt(terms))


def of_rounding(same_precision: float, eps: float) -> float:
    """The same in a precision ``eps`` below float32, in which the reference is off by ``same_precision``."""
    return 2 * same_precision + eps / 2


def of_tf32(same_precision: float) -> float:
    """As :func:`of_rounding`, for float32 tensors where torch may use TF32."""
    return max(of_rounding(same_precision, TF32_EPS), TF32_EPS)


def terms(call: Call) -> dict[str, int]:
    """How many terms are summed for an element of the output and of the gradient of each argument."""
    K, taps = call.geometry.num_branches, call.geometry.num_taps
    O, C = call.weight.shape[:2]
    voxels = call.attention[:, 0].numel()
    return {
        # every tap of every branch and channel
        "output": K * taps * C,
        # every branch and tap through which a voxel was read, each output channel
        "input": K * taps * O,
        # every voxel, each branch
        "weight": K * voxels,
        # one branch's output <y_k, G>: every tap, input and output channel
        "attention": taps * C * O,
        # every voxel, each branch
        "bias": K * voxels,
        # a_k G y_k over every voxel, and y_k is itself a sum over taps and channels
        "branch_scale": voxels + taps * C,
        # a_k G over every voxel
        "branch_shift": voxels,
    }
