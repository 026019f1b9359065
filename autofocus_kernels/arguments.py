"""Validation of a call's tensors, written once for the public functions, the reference and every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .geometry import Geometry, once, resolve

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_call(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    branch_scale: Tensor | None,
    branch_shift: Tensor | None,
    dilations,
    stride,
    padding,
    backend: str | None = None,
) -> Call:
    """Checks batched arguments (input ``[N, C, *S]``) and returns the call that they make.

    Raises:
        TypeError: an argument is no tensor, or dtypes are not one of :data:`DTYPES`, the same for all.
        ValueError: shapes, devices, layouts or numbers do not fit; the message names the argument.
    """
    _check_tensor("input", input, input)
    _check_tensor("weight", weight, input)
    _check_tensor("attention", attention, input)
    if bias is not None:
        _check_tensor("bias", bias, input)
    if branch_scale is not None:
        _check_tensor("branch_scale", branch_scale, input)
    if branch_shift is not None:
        _check_tensor("branch_shift", branch_shift, input)
    if type(dilations) is list:
        dilations = tuple(dilations)
    geometry = _check_shapes(
        input.shape,
        weight.shape,
        attention.shape,
        None if bias is None else bias.shape,
        None if branch_scale is None else branch_scale.shape,
        None if branch_shift is None else branch_shift.shape,
        dilations,
        stride,
        padding,
    )
    return Call(input, weight, attention, bias, branch_scale, branch_shift, geometry, backend)


@once
def _check_shapes(
    input: torch.Size,
    weight: torch.Size,
    attention: torch.Size,
    bias: torch.Size | None,
    branch_scale: torch.Size | None,
    branch_shift: torch.Size | None,
    dilations,
    stride,
    padding,
) -> Geometry:
    """The geometry of tensors of these shapes, which fit each other."""
    _check_input_shape(input, weight)
    geometry = resolve(input[2:], weight[2:], dilations, stride, padding)
    num_branches, out_channels = geometry.num_branches, weight[0]
    _check_shape("attention", "[N, K, *S_out]", attention, (input[0], num_branches, *geometry.output_size))
    if bias is not None and (branch_scale is not None or branch_shift is not None):
        raise ValueError("bias must be None when branch_scale or branch_shift is given: fold it into branch_shift")
    _check_shape("bias", "[O]", bias, (out_channels,))
    _check_shape("branch_scale", "[K, O]", branch_scale, (num_branches, out_channels))
    _check_shape("branch_shift", "[K, O]", branch_shift, (num_branches, out_channels))
    return geometry


def check_input(input: Tensor, weight: Tensor, mixed: bool = False) -> None:
    """Checks input ``[N, C, *S]`` against weight; ``mixed`` allows two dtypes, where autocast will unify them.

    Raises: as :func:`check_call`.
    """
    _check_tensor("input", input, input)
    _check_tensor("weight", weight, input, mixed)
    _check_input_shape(input.shape, weight.shape)


def check_input_shape(input: Tensor, weight_shape: tuple[int, ...]) -> None:
    """As :func:`check_input`, where of the weight only the shape is to be looked at."""
    _check_tensor("input", input, input)
    _check_input_shape(input.shape, weight_shape)


def _check_input_shape(input_shape: torch.Size, weight_shape: tuple[int, ...]) -> None:
    spatial_dims = len(weight_shape) - 2
    if not 1 <= spatial_dims <= 3:
        raise ValueError(
            f"weight must be [O, C, *kernel_size] with one to three spatial axes, got shape {_sizes(weight_shape)}"
        )
    if len(input_shape) != len(weight_shape):
        raise ValueError(
            f"input must be [N, C, *S] with {spatial_dims} spatial axes like weight (or [C, *S] without "
            f"a batch axis), got shape {_sizes(input_shape)}"
        )
    if weight_shape[1] != input_shape[1]:
        raise ValueError(
            f"input must have the {weight_shape[1]} channels of weight {_sizes(weight_shape)} on axis 1 (groups are "
            f"not supported), got shape {_sizes(input_shape)}"
        )
    if weight_shape[0] < 1 or weight_shape[1] < 1:
        raise ValueError(f"weight must have at least one output and one input channel, got {_sizes(weight_shape)}")


def _check_tensor(name: str, tensor: Tensor, input: Tensor, mixed: bool = False) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise ValueError(f"{name} must be a dense (strided) tensor, got {kind}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.dtype != input.dtype and not mixed:
        raise TypeError(
            f"{name} must have the dtype of input, {input.dtype}, got {tensor.dtype} "
            "(cast it, or run under torch.autocast)"
        )
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on the device of input, {input.device}, got {tensor.device}")


def _check_shape(name: str, axes: str, shape: torch.Size | None, expected: tuple[int, ...]) -> None:
    if shape is not None and shape != expected:
        raise ValueError(f"{name} must be {axes} = {_sizes(expected)}, got shape {_sizes(shape)}")


def _sizes(sizes) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"
