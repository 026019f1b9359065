"""The autofocus convolution in plain PyTorch: definition, truth (in float64), fallback and export path.

One convolution per branch with the shared weight, then the attention-weighted sum, as in Qin et al.,
"Autofocus Layer for Semantic Segmentation" (MICCAI 2018), section 2. Every other backend is tested against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_call
from .call import Call
from .geometry import Geometry


def autofocus_conv(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None = None,
    *,
    dilations,
    stride=1,
    padding="same",
    branch_scale: Tensor | None = None,
    branch_shift: Tensor | None = None,
) -> Tensor:
    """The contract of :func:`autofocus_kernels.autofocus_conv`, computed branch by branch.

    Differentiable any number of times, on every device and floating dtype, under ``torch.compile`` and
    ``torch.export``. Takes batched inputs only.
    """
    return weighted_sum(
        check_call(input, weight, attention, bias, branch_scale, branch_shift, dilations, stride, padding)
    )


def weighted_sum(call: Call) -> Tensor:
    """``sum_k a_k (s_k y_k + h_k)`` ``[N, O, *S_out]``."""
    output: Any = None
    for k, branch in enumerate(branches(call)):
        if call.branch_scale is not None:
            branch = branch * per_channel(call.branch_scale[k], call.geometry)
        if call.branch_shift is not None:
            branch = branch + per_channel(call.branch_shift[k], call.geometry)
        gate = call.attention[:, k : k + 1]
        output = gate * branch if output is None else output.addcmul(gate, branch)
    return output


def branches(call: Call) -> Iterator[Tensor]:
    """The branches ``y_k`` plus bias, each ``[N, O, *S_out]``, one plain dilated convolution after another."""
    input, weight, bias, geometry = call.input, call.weight, call.bias, call.geometry
    if input.numel() == 0:
        # F.conv refuses empty axes. The products keep both arguments in the autograd graph.
        shape = (input.shape[0], weight.shape[0], *geometry.output_size)
        empty = input.new_zeros(shape) + 0 * input.sum() + 0 * weight.sum()
        for _ in geometry.dilations:
            yield empty if bias is None else empty + per_channel(bias, geometry)
        return
    for k in range(geometry.num_branches):
        # As 2D: oneDNN in torch 2.13 returns wrong float32 weight gradients for strided, dilated conv1d.
        stride, padding, crop, dilation = _conv_arguments(geometry, k)
        if geometry.spatial_dims == 1:
            read = _cropped(input.unsqueeze(2), crop)
            yield F.conv2d(read, weight.unsqueeze(2), bias, stride, padding, dilation).squeeze(2)
        else:
            conv = F.conv2d if geometry.spatial_dims == 2 else F.conv3d
            yield conv(_cropped(input, crop), weight, bias, stride, padding, dilation)


def branch_gradients(
    call: Call, k: int, grad_branch: Tensor, needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of branch ``k`` for input and weight, where autograd does not record."""
    input, weight, geometry = call.input, call.weight, call.geometry
    flat = geometry.spatial_dims == 1
    if flat:
        grad_branch, input, weight = (t.unsqueeze(2) for t in (grad_branch, input, weight))
    stride, padding, crop, dilation = _conv_arguments(geometry, k)
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_branch,
        _cropped(input, crop),
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        1,
        [needs_input, needs_weight, False],
    )
    if needs_input and any(crop):
        grad_input = F.pad(grad_input, [cut for cut in reversed(crop) for _ in range(2)])
    if flat:
        grad_input, grad_weight = (g if g is None else g.squeeze(2) for g in (grad_input, grad_weight))
    return grad_input, grad_weight


def _conv_arguments(geometry: Geometry, k: int):
    """Stride, padding, crop and dilation of branch ``k``, with a leading axis of size one for a 1D problem.

    A branch that starts reading inside the input is padded by less than nothing, which convolutions refuse: its input
    is cropped instead.
    """
    dilation = geometry.dilations[k]
    margins = [r * (size - 1) // 2 - o for r, size, o in zip(dilation, geometry.kernel_size, geometry.origin)]
    padding = tuple(max(margin, 0) for margin in margins)
    crop = tuple(max(-margin, 0) for margin in margins)
    if geometry.spatial_dims == 1:
        return (1, *geometry.stride), (0, *padding), (0, *crop), (1, *dilation)
    return geometry.stride, padding, crop, dilation


def _cropped(input: Tensor, crop: tuple[int, ...]) -> Tensor:
    """``input`` without ``crop`` positions on either side of its spatial axes."""
    for axis, cut in enumerate(crop, start=2):
        if cut:
            input = input.narrow(axis, cut, input.shape[axis] - 2 * cut)
    return input


def per_channel(vector: Tensor, geometry: Geometry) -> Tensor:
    """``vector`` ``[O]`` as ``[O, 1, ...]``, to be combined with ``[N, O, *S]``."""
    return vector.view(-1, *(1,) * geometry.spatial_dims)
