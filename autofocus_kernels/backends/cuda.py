"""The CUDA C++ kernels of csrc/cuda, through the compiled library.

Two tiers: a simple one that takes every geometry and dtype, and a fast one for 16-bit tensors and 3x3x3 kernels; the
library picks one for every pass (docs/cuda.md). :func:`fast_refusal` says why a pass goes to the simple tier.
"""

from __future__ import annotations

from typing import Optional

import torch

from . import native

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_BRANCHES = 32  # kMaxBranches of csrc/geometry.h
MINIMUM_CAPABILITY = (8, 0)
PASSES = ("forward", "grad_input", "grad_attention", "grad_weight", "branch_grad_input")


def unavailable() -> Optional[str]:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return native.unavailable("cuda")


def can_use(geometry, input, weight, branch_mode) -> Optional[str]:
    if input.device.type != "cuda":
        return f"tensors are on {input.device}, the cuda backend reads GPU memory"
    reason = unavailable()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(input.device)
    if capability < MINIMUM_CAPABILITY:
        return f"{input.device} has compute capability {capability}, the library is built for {MINIMUM_CAPABILITY} on"
    if input.dtype not in DTYPES:
        return f"dtype {input.dtype} is none of float64, float32, float16, bfloat16"
    if geometry.num_branches > MAX_BRANCHES:
        return f"{geometry.num_branches} branches, the kernels take at most {MAX_BRANCHES}"
    return None


def fast_refusal(pass_name: str, geometry, input, weight) -> Optional[str]:
    """Why the fast tier does not take a pass of a call that :func:`can_use` takes; None if it does.

    Args:
        pass_name: one of :data:`PASSES`; that of the weight serves the branch scale too, and the last is the
            gradient of the input in :func:`branch_norm_backward`.
    """
    problem = geometry.as_3d()
    return torch.ops.autofocus_cuda.fast_refusal(
        pass_name, *_as_3d(input, weight), list(problem.output_size), *_integers(geometry)
    ) or None


def forward(
    geometry, input, weight, attention, bias, branch_scale, branch_shift, output, *, fast=True
) -> None:
    torch.ops.autofocus_cuda.forward(
        *_as_3d(input, weight, attention), bias, branch_scale, branch_shift, *_as_3d(output),
        *_integers(geometry), fast,
    )


def backward(
    geometry, grad_output, input, weight, attention, bias, branch_scale, branch_shift,
    grad_input, grad_weight, grad_attention, grad_branch_scale, *, fast=True,
) -> None:
    torch.ops.autofocus_cuda.backward(
        *_as_3d(grad_output, input, weight, attention), bias, branch_scale, branch_shift,
        *_as_3d(grad_input, grad_weight, grad_attention), grad_branch_scale,
        *_integers(geometry), fast,
    )


def branch_statistics(geometry, input, weight, branches, mean, var, *, fast=True) -> None:
    ones = input.new_ones(()).expand(input.shape[0], geometry.num_branches, *geometry.output_size)
    torch.ops.autofocus_cuda.branches(
        *_as_3d(input, weight, ones), _branches_as_3d(branches), *_integers(geometry), fast
    )
    if mean is not None:
        torch.ops.autofocus_cuda.branch_moments(_branches_as_3d(branches), mean, var)


def branch_combine(branches, attention, scale, shift, output) -> None:
    torch.ops.autofocus_cuda.branch_combine(
        _branches_as_3d(branches), *_as_3d(attention), scale, shift, *_as_3d(output)
    )


def branch_reduce(
    grad_output, branches, attention, mean, scale, shift, grad_attention, grad_scale, grad_shift
) -> None:
    torch.ops.autofocus_cuda.branch_reduce(
        *_as_3d(grad_output), _branches_as_3d(branches), *_as_3d(attention), mean, scale, shift,
        *_as_3d(grad_attention), grad_scale, grad_shift,
    )


def branch_norm_backward(
    geometry, grad_output, input, weight, attention, branches, a_coef, b_coef, c_coef,
    grad_branches, grad_input, grad_weight, *, fast=True,
) -> None:
    torch.ops.autofocus_cuda.branch_gradients(
        *_as_3d(grad_output), _branches_as_3d(branches), *_as_3d(attention), a_coef, b_coef, c_coef,
        _branches_as_3d(grad_branches),
    )
    torch.ops.autofocus_cuda.branch_backward(
        _branches_as_3d(grad_branches), *_as_3d(input, weight, input.new_ones(()).expand_as(attention)),
        *_as_3d(grad_input, grad_weight), *_integers(geometry), fast,
    )


def _as_3d(*tensors):
    """Views with leading spatial axes of size one."""
    return tuple(
        tensor if tensor is None or tensor.dim() == 5
        else tensor[(slice(None), slice(None)) + (None,) * (5 - tensor.dim())]
        for tensor in tensors
    )


def _branches_as_3d(branches):
    """``[K, N, O, *S]`` with leading spatial axes of size one."""
    return branches[(slice(None),) * 3 + (None,) * (6 - branches.dim())]


def _integers(geometry):
    problem = geometry.as_3d()
    dilations = [r for dilation in problem.dilations for r in dilation]
    return dilations, list(problem.stride), list(problem.origin)
