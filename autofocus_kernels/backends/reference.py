"""The reference as a backend: takes every call, differentiates with autograd's own convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..call import Call
from .interface import Backend, Gradients


class ReferenceBackend(Backend):
    checked = tiles_by_volume = False

    def unavailable(self) -> str | None:
        return None

    def refusal(self, call: Call) -> str | None:
        return None

    def forward(self, call, output) -> None:
        output.copy_(reference.weighted_sum(call))

    def backward(self, call: Call, grad_output: Tensor, gradients: Gradients) -> None:
        """Branch by branch, as autograd would, but with each branch recomputed instead of saved."""
        attention, branch_scale = call.attention, call.branch_scale
        grad_input, grad_weight, grad_attention, grad_branch_scale = gradients
        _zero(grad_input, grad_weight)
        needs_branch = grad_attention is not None or grad_branch_scale is not None
        branches = reference.branches(call._replace(bias=None)) if needs_branch else None
        for k in range(call.geometry.num_branches):
            if needs_branch:
                # <G, y_k> per voxel and channel; the sums over channels and over voxels are the two gradients.
                product = grad_output * next(branches)
                if grad_branch_scale is not None:
                    gated = product * attention[:, k : k + 1]
                    grad_branch_scale[k] = gated.transpose(0, 1).flatten(1).sum(1)
                if grad_attention is not None:
                    if branch_scale is not None:
                        product = product * reference.per_channel(branch_scale[k], call.geometry)
                    grad_attention[:, k] = product.sum(1)
            if grad_input is not None or grad_weight is not None:
                grad_branch = grad_output * attention[:, k : k + 1]
                if branch_scale is not None:
                    grad_branch = grad_branch * reference.per_channel(branch_scale[k], call.geometry)
                _add_branch_gradients(call, k, grad_branch, grad_input, grad_weight)
        if grad_attention is not None:
            shift = call.branch_shift
            if call.bias is not None:
                shift = call.bias.expand(call.geometry.num_branches, -1)
            if shift is not None:
                grad_attention += torch.einsum("no...,ko->nk...", grad_output, shift)

    def branch_statistics(self, call, branches, mean, var) -> None:
        for k, branch in enumerate(reference.branches(call)):
            branches[k].copy_(branch)
            if mean is not None:
                # What nn.BatchNorm computes: a mean, then the mean square distance from it.
                mean[k], var[k] = torch.batch_norm_update_stats(branch.to(mean.dtype), None, None, 0.0)

    def branch_combine(self, call, branches, scale, shift, output) -> None:
        total = None
        for k, branch in enumerate(branches):
            term = _normed(call, branch, scale[k], shift[k]).mul_(call.attention[:, k : k + 1])
            total = term if total is None else total.add_(term)
        output.copy_(total)

    def branch_reduce(
        self, call, grad_output, branches, mean, scale, shift, grad_attention, grad_scale, grad_shift
    ) -> None:
        grad_output = grad_output.to(mean.dtype)
        for k, branch in enumerate(branches):
            gated = grad_output * call.attention[:, k : k + 1]
            grad_shift[k] = _sum_over_voxels(gated)
            grad_scale[k] = _sum_over_voxels(gated.mul_(branch - reference.per_channel(mean[k], call.geometry)))
            if grad_attention is not None:
                grad_attention[:, k] = _normed(call, branch, scale[k], shift[k]).mul_(grad_output).sum(1)

    def branch_norm_backward(
        self, call, grad_output, branches, a_coef, b_coef, c_coef, grad_branches, grad_input, grad_weight
    ) -> None:
        _zero(grad_input, grad_weight)
        for k, branch in enumerate(branches):
            a, b, c = (reference.per_channel(coef[k], call.geometry) for coef in (a_coef, b_coef, c_coef))
            grad_branches[k] = torch.addcmul(c, branch, b).addcmul_(grad_output * a, call.attention[:, k : k + 1])
            _add_branch_gradients(call, k, grad_branches[k], grad_input, grad_weight)


def _normed(call: Call, branch: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    scale, shift = (reference.per_channel(vector, call.geometry) for vector in (scale, shift))
    return torch.addcmul(shift, branch, scale)


def _sum_over_voxels(volume: Tensor) -> Tensor:
    """``[O]``, of each sample and then of these: torch's sum over both may add the samples' one by one."""
    return volume.flatten(2).sum(2).sum(0)


def _zero(*gradients: Tensor | None) -> None:
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()


def _add_branch_gradients(
    call: Call, k: int, grad_branch: Tensor, grad_input: Tensor | None, grad_weight: Tensor | None
) -> None:
    of_branch = reference.branch_gradients(call, k, grad_branch, grad_input is not None, grad_weight is not None)
    for total, part in zip((grad_input, grad_weight), of_branch):
        if total is not None:
            total += part


backend = ReferenceBackend()
