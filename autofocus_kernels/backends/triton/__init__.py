"""The Triton kernels as a backend (docs/triton.md). Triton is imported by the first call, not by the import."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from typing import Optional

import torch

from .configs import NoConfigurationFits as NoConfigurationFits

name = "triton"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Coordinates are 32-bit in the kernels, and a read this far out marks one that is switched off (kernels.OUTSIDE).
COORDINATE_LIMIT = 1 << 30


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors; must not change once Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=None)
def unavailable() -> Optional[str]:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if not interpreted() and not torch.cuda.is_available():
        return "there is no GPU that torch can use (and TRITON_INTERPRET is not 1)"
    return None


def can_use(geometry, input, weight, branch_mode: bool) -> Optional[str]:
    reason = unavailable()
    if reason is not None:
        return reason
    device = "cpu" if interpreted() else "cuda"
    if input.device.type != device:
        return f"tensors are on {input.device}, the kernels run on {device}"
    if input.dtype not in DTYPES:
        return f"dtype {input.dtype} is none of float16, bfloat16, float32"
    if device == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(input.device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    for axis, size in enumerate(geometry.input_size):
        reach = max(dilation[axis] for dilation in geometry.dilations) * (geometry.kernel_size[axis] // 2)
        if abs(geometry.origin[axis]) + reach + max(size, geometry.stride[axis] * geometry.output_size[axis]) >= COORDINATE_LIMIT:
            return f"axis {axis} reads coordinates of {COORDINATE_LIMIT} and more"
    return None


def forward(geometry, input, weight, attention, bias, branch_scale, branch_shift, output) -> None:
    from . import launch

    launch.forward(geometry, input, weight, attention, bias, branch_scale, branch_shift, output)


def backward(
    geometry, grad_output, input, weight, attention, bias, branch_scale, branch_shift,
    grad_input, grad_weight, grad_attention, grad_branch_scale,
) -> None:
    from . import launch

    launch.backward(
        geometry, grad_output, input, weight, attention, bias, branch_scale, branch_shift,
        grad_input, grad_weight, grad_attention, grad_branch_scale,
    )


def branch_statistics(geometry, input, weight, branches, mean, var) -> None:
    from . import norm

    norm.branch_statistics(geometry, input, weight, branches, mean, var)


def branch_combine(branches, attention, scale, shift, output) -> None:
    from . import norm

    norm.branch_combine(branches, attention, scale, shift, output)


def branch_reduce(
    grad_output, branches, attention, mean, scale, shift, grad_attention, grad_scale, grad_shift
) -> None:
    from . import norm

    norm.branch_reduce(grad_output, branches, attention, mean, scale, shift, grad_attention, grad_scale, grad_shift)


def branch_norm_backward(
    geometry, grad_output, input, weight, attention, branches, a_coef, b_coef, c_coef,
    grad_branches, grad_input, grad_weight,
) -> None:
    from . import norm

    norm.branch_norm_backward(
        geometry, grad_output, input, weight, attention, branches, a_coef, b_coef, c_coef,
        grad_branches, grad_input, grad_weight,
    )
