"""One validated call of the layer's convolution: what the operators hand to the backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import Geometry, from_integers


class Call(NamedTuple):
    """Tensors of one dtype and device, of any strides, and the integers and choices that come with them.

    The six tensors stand in the order of the operators' schemas. A call of batch-normalised branches
    (ops/branch_norm.py) has the first three only.
    """

    input: Tensor  # [N, C, *S]
    weight: Tensor  # [O, C, *kernel_size]
    attention: Tensor  # [N, K, *S_out]
    bias: Tensor | None  # [O]
    branch_scale: Tensor | None  # [K, O]
    branch_shift: Tensor | None  # [K, O]
    geometry: Geometry
    backend: str | None  # the one that the caller forces

    def as_3d(self) -> Call:
        """The same call with leading spatial axes of size one, the only form that most kernels know."""
        if self.input.dim() == 5:
            return self
        volumes = map(as_3d, self[:3])
        return Call(*volumes, *self[3:6], self.geometry.as_3d, self.backend)


def as_3d(tensor: Tensor | None, first_axis: int = 2) -> Tensor | None:
    """A view with spatial axes of size one before the others, which begin at ``first_axis``."""
    if tensor is not None:
        for _ in range(first_axis + 3 - tensor.dim()):
            tensor = tensor.unsqueeze(first_axis)
    return tensor


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether torch's convolutions would now multiply tensors of ``dtype`` as TF32 on an NVIDIA GPU."""
    return dtype is torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" and torch.version.hip is None


# Functions, not properties: torch.compile before 2.11 finds no properties of a NamedTuple.
def operator_arguments(call: Call) -> tuple:
    """The six tensors and :func:`operator_settings`, as the schemas of the operators name them."""
    return (*call[:6], *operator_settings(call))


def operator_settings(call: Call) -> tuple[list[int], list[int], list[int], str | None]:
    """The arguments of an operator that are no tensors: dilations, stride, origin, backend."""
    return (*call.geometry.integers, call.backend)


def from_operator(
    input, weight, attention, bias, branch_scale, branch_shift, dilations, stride, origin, backend
) -> Call:
    """The call that reached an operator: the inverse of :func:`operator_arguments`."""
    geometry = from_integers(
        tuple(dilations),
        tuple(stride),
        tuple(origin),
        weight.shape[2:],
        input.shape[2:],
        attention.shape[2:],
    )
    return Call(input, weight, attention, bias, branch_scale, branch_shift, geometry, backend)
