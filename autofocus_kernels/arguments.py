"""Validation of a call's tensors, written once for the public function, the reference and every backend."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .geometry import Geometry, resolve


def check_arguments(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    branch_scale: Optional[Tensor],
    branch_shift: Optional[Tensor],
    dilations,
    stride,
    padding,
) -> Geometry:
    """Checks batched arguments (input ``[N, C, *S]``) and returns the geometry they describe.

    Raises:
        TypeError: an argument is no tensor, or dtypes are not one shared floating dtype.
        ValueError: shapes, devices, layouts or numbers do not fit; the message names the argument.
    """
    check_input(input, weight)
    optional = {"bias": bias, "branch_scale": branch_scale, "branch_shift": branch_shift}
    _check_tensor("attention", attention, input)
    for name, tensor in optional.items():
        if tensor is not None:
            _check_tensor(name, tensor, input)
    geometry = resolve(input.shape[2:], weight.shape[2:], dilations, stride, padding)
    _check_shape(
        "attention", "[N, K, *S_out]", attention,
        (input.shape[0], geometry.num_branches, *geometry.output_size),
    )
    if bias is not None:
        if branch_scale is not None or branch_shift is not None:
            raise ValueError(
                "bias must be None when branch_scale or branch_shift is given: fold it into branch_shift"
            )
        _check_shape("bias", "[O]", bias, (weight.shape[0],))
    for name, tensor in (("branch_scale", branch_scale), ("branch_shift", branch_shift)):
        if tensor is not None:
            _check_shape(name, "[K, O]", tensor, (geometry.num_branches, weight.shape[0]))
    return geometry


def check_input(input: Tensor, weight: Tensor, mixed: bool = False) -> None:
    """Checks input ``[N, C, *S]`` against weight; ``mixed`` allows two dtypes, where autocast will unify them.

    Raises: as :func:`check_arguments`.
    """
    _check_tensor("input", input, input)
    _check_tensor("weight", weight, input, mixed)
    spatial_dims = weight.dim() - 2
    if spatial_dims not in (1, 2, 3):
        raise ValueError(
            "weight must be [O, C, *kernel_size] with one to three spatial axes, "
            f"got shape {_shape(weight)}"
        )
    if input.dim() != spatial_dims + 2:
        raise ValueError(
            f"input must be [N, C, *S] with {spatial_dims} spatial axes like weight (or [C, *S] without "
            f"a batch axis), got shape {_shape(input)}"
        )
    if weight.shape[1] != input.shape[1]:
        raise ValueError(
            f"input must have the {weight.shape[1]} channels of weight {_shape(weight)} on axis 1 (groups are "
            f"not supported), got shape {_shape(input)}"
        )
    if min(weight.shape[:2]) < 1:
        raise ValueError(
            f"weight must have at least one output and one input channel, got {_shape(weight)}"
        )


def _check_tensor(name: str, tensor: Tensor, input: Tensor, mixed: bool = False) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise ValueError(f"{name} must be a dense (strided) tensor, got {kind}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must have a real floating dtype, got {tensor.dtype}")
    if tensor.dtype != input.dtype and not mixed:
        raise TypeError(
            f"{name} must have the dtype of input, {input.dtype}, got {tensor.dtype} "
            "(cast it, or run under torch.autocast)"
        )
    if tensor.device != input.device:
        raise ValueError(
            f"{name} must be on the device of input, {input.device}, got {tensor.device}"
        )


def _check_shape(name: str, axes: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} must be {axes} = {_sizes(expected)}, got shape {_shape(tensor)}"
        )


def _shape(tensor: Tensor) -> str:
    return _sizes(tensor.shape)


def _sizes(sizes) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"
