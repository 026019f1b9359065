"""The C++ kernels of csrc/cpu, through the compiled library."""

from __future__ import annotations

from typing import Optional

import torch

from . import native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_BRANCHES = 32  # kMaxBranches of csrc/geometry.h


def unavailable() -> Optional[str]:
    return native.unavailable("cpu")


def can_use(geometry, input, weight, branch_mode) -> Optional[str]:
    reason = unavailable()
    if reason is not None:
        return reason
    if input.device.type != "cpu":
        return f"tensors are on {input.device}, the cpu backend reads CPU memory"
    if input.dtype not in DTYPES:
        return f"dtype {input.dtype} is none of float32, float64, bfloat16, float16"
    if geometry.num_branches > MAX_BRANCHES:
        return f"{geometry.num_branches} branches are more than {MAX_BRANCHES}"
    return None


def forward(geometry, input, weight, attention, bias, branch_scale, branch_shift, output) -> None:
    torch.ops.autofocus_cpu.forward(
        *_as_3d(input, weight, attention), *_contiguous(bias, branch_scale, branch_shift), *_as_3d(output),
        *_integers(geometry),
    )


def backward(
    geometry, grad_output, input, weight, attention, bias, branch_scale, branch_shift,
    grad_input, grad_weight, grad_attention, grad_branch_scale,
) -> None:
    torch.ops.autofocus_cpu.backward(
        *_as_3d(grad_output, input, weight, attention), *_contiguous(bias, branch_scale, branch_shift),
        *_as_3d(grad_input, grad_weight, grad_attention), grad_branch_scale,
        *_integers(geometry),
    )


def branch_statistics(geometry, input, weight, branches, mean, var) -> None:
    torch.ops.autofocus_cpu.branch_statistics(
        *_as_3d(input, weight), _branches_as_3d(branches), mean, var, *_integers(geometry)
    )


def branch_combine(branches, attention, scale, shift, output) -> None:
    torch.ops.autofocus_cpu.branch_combine(
        _branches_as_3d(branches), *_as_3d(attention), *_contiguous(scale, shift), *_as_3d(output)
    )


def branch_reduce(
    grad_output, branches, attention, mean, scale, shift, grad_attention, grad_scale, grad_shift
) -> None:
    torch.ops.autofocus_cpu.branch_reduce(
        *_as_3d(grad_output), _branches_as_3d(branches), *_as_3d(attention),
        *_contiguous(mean, scale, shift), *_as_3d(grad_attention), grad_scale, grad_shift,
    )


def branch_norm_backward(
    geometry, grad_output, input, weight, attention, branches, a_coef, b_coef, c_coef,
    grad_branches, grad_input, grad_weight,
) -> None:
    """Needs no ``grad_branches``: dy_k exists one lattice and channel group at a time."""
    torch.ops.autofocus_cpu.branch_norm_backward(
        *_as_3d(grad_output, input, weight, attention), _branches_as_3d(branches),
        *_contiguous(a_coef, b_coef, c_coef), *_as_3d(grad_input, grad_weight), *_integers(geometry),
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


def _contiguous(*vectors):
    return tuple(vector if vector is None else vector.contiguous() for vector in vectors)


def _integers(geometry):
    problem = geometry.as_3d()
    dilations = [r for dilation in problem.dilations for r in dilation]
    return dilations, list(problem.stride), list(problem.origin)
