"""The reference as a backend: takes every call, differentiates with autograd."""

from __future__ import annotations

from typing import Optional

import torch

from .. import reference


def unavailable() -> Optional[str]:
    return None


def can_use(geometry, input, weight, branch_mode) -> Optional[str]:
    return None


def forward(geometry, input, weight, attention, bias, branch_scale, branch_shift, output) -> None:
    output.copy_(
        reference.weighted_sum(geometry, input, weight, attention, bias, branch_scale, branch_shift)
    )


def backward(
    geometry, grad_output, input, weight, attention, bias, branch_scale, branch_shift,
    grad_input, grad_weight, grad_attention, grad_branch_scale,
) -> None:
    """Branch by branch, as autograd would, but with each branch recomputed instead of saved."""
    for gradient in (grad_input, grad_weight):
        if gradient is not None:
            gradient.zero_()
    needs_branch = grad_attention is not None or grad_branch_scale is not None
    branches = reference.branches(geometry, input, weight) if needs_branch else None
    for k in range(geometry.num_branches):
        if needs_branch:
            # <G, y_k> per voxel and channel; the sums over channels and over voxels are the two gradients.
            product = grad_output * next(branches)
            if grad_branch_scale is not None:
                gated = product * attention[:, k : k + 1]
                grad_branch_scale[k] = gated.transpose(0, 1).flatten(1).sum(1)
            if grad_attention is not None:
                if branch_scale is not None:
                    product = product * reference.per_channel(branch_scale[k], geometry)
                grad_attention[:, k] = product.sum(1)
        if grad_input is not None or grad_weight is not None:
            grad_branch = grad_output * attention[:, k : k + 1]
            if branch_scale is not None:
                grad_branch = grad_branch * reference.per_channel(branch_scale[k], geometry)
            of_input, of_weight = reference.branch_gradients(
                geometry, k, grad_branch, input, weight, grad_input is not None, grad_weight is not None
            )
            if grad_input is not None:
                grad_input += of_input
            if grad_weight is not None:
                grad_weight += of_weight
    if grad_attention is not None:
        shift = bias.expand(geometry.num_branches, -1) if bias is not None else branch_shift
        if shift is not None:
            grad_attention += torch.einsum("no...,ko->nk...", grad_output, shift)
