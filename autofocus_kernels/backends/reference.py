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


def branch_statistics(geometry, input, weight, branches, mean, var) -> None:
    for k, branch in enumerate(reference.branches(geometry, input, weight)):
        branches[k].copy_(branch)
        if mean is not None:
            # What nn.BatchNorm computes: a mean, then the mean square distance from it.
            mean[k], var[k] = torch.batch_norm_update_stats(branch.to(mean.dtype), None, None, 0.0)


def branch_combine(branches, attention, scale, shift, output) -> None:
    total = None
    for k, branch in enumerate(branches):
        normed = torch.addcmul(_per_channel(shift[k], branch), branch, _per_channel(scale[k], branch))
        term = normed.mul_(attention[:, k : k + 1])
        total = term if total is None else total.add_(term)
    output.copy_(total)


def branch_reduce(
    grad_output, branches, attention, mean, scale, shift, grad_attention, grad_scale, grad_shift
) -> None:
    over = (0, *range(2, grad_output.dim()))
    grad_output = grad_output.to(mean.dtype)
    for k, branch in enumerate(branches):
        gated = grad_output * attention[:, k : k + 1]
        grad_shift[k] = gated.sum(over)
        grad_scale[k] = gated.mul_(branch - _per_channel(mean[k], branch)).sum(over)
        if grad_attention is not None:
            normed = torch.addcmul(_per_channel(shift[k], branch), branch, _per_channel(scale[k], branch))
            grad_attention[:, k] = normed.mul_(grad_output).sum(1)


def branch_norm_backward(
    geometry, grad_output, input, weight, attention, branches, a_coef, b_coef, c_coef,
    grad_branches, grad_input, grad_weight,
) -> None:
    for gradient in (grad_input, grad_weight):
        if gradient is not None:
            gradient.zero_()
    for k, branch in enumerate(branches):
        a, b, c = (_per_channel(coef[k], branch) for coef in (a_coef, b_coef, c_coef))
        grad_branches[k] = torch.addcmul(c, branch, b).addcmul_(grad_output * a, attention[:, k : k + 1])
        of_input, of_weight = reference.branch_gradients(
            geometry, k, grad_branches[k], input, weight, grad_input is not None, grad_weight is not None
        )
        if grad_input is not None:
            grad_input += of_input
        if grad_weight is not None:
            grad_weight += of_weight


def _per_channel(vector, branch):
    return vector.view(-1, *(1,) * (branch.dim() - 2))
