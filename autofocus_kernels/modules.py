"""Drop-in layers: ``AutofocusConvNd`` in place of ``nn.ConvNd``, and the gate of the paper, ``ScaleAttention``."""

# Not `from __future__ import annotations`: torch.fx pickles the annotations of forward, and no strings.

from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .arguments import check_input, check_input_shape
from .branch_norm import BATCH_NORM, normed_autofocus_conv
from .dispatch import check_backend_name
from .functional import autocasts, autofocus_conv
from .geometry import (
    IntOrTuple,
    Padding,
    per_axis,
    require_count,
    require_odd,
    resolve,
    resolve_dilations,
    resolve_padding,
    smallest_dilation,
)

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# torch.fx.symbolic_trace calls forward without values: what looks at them is wrapped, to be a node of the graph.
torch.fx.wrap("resolve")


def require_spatial_dims(value: int) -> int:
    """Raises TypeError or ValueError unless ``value`` is 1, 2 or 3."""
    if require_count("spatial_dims", value) not in CONV:
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {value!r}")
    return int(value)


@torch.fx.wrap
def check_layer_input(input: Tensor, weight: Tensor) -> None:
    """:func:`check_input` for an input with or without a batch axis, of another dtype only under autocast."""
    mixed = autocasts(input)
    if isinstance(input, Tensor) and input.dtype != weight.dtype and not mixed:
        raise TypeError(f"input must have the dtype of the layer's weight, {weight.dtype}, got {input.dtype}")
    check_input(_batched(input, weight.dim()), weight, mixed=mixed)


@torch.fx.wrap
def _check_gate_input(input: Tensor, weight_shape: tuple[int, ...]) -> None:
    check_input_shape(_batched(input, len(weight_shape)), weight_shape)
    size = tuple(input.shape[2 - len(weight_shape) :])
    if 0 in size:  # the operator gives an empty output for it, the gate's convolutions an error that names no argument
        raise ValueError(f"input must have at least one voxel on every spatial axis, got spatial size {size}")


def _batched(input: Tensor, dims: int) -> Tensor:
    return input.unsqueeze(0) if isinstance(input, Tensor) and input.dim() == dims - 1 else input


@torch.fx.wrap
def _result(output: Tensor, attention: Tensor, return_attention: bool):
    return (output, attention) if return_attention else output


class ScaleAttention(nn.Module):
    """The paper's gate: conv -> ReLU -> conv 1 -> softmax over branches.

    Source: Qin et al., MICCAI 2018, section 2.2. The first convolution has dilation 1. It is centred on the voxels
    that a layer with the same ``stride``, ``padding`` and smallest ``dilation`` computes, so its output always has
    the layer's size. Outside the input it reads zeros.

    Args:
        in_channels: C, channels of the input.
        num_branches: K, number of weights per voxel.
        kernel_size: odd, int or one int per axis.
        spatial_dims: 1, 2 or 3.
        hidden_channels: channels between the convolutions; None is the paper's ``in_channels // 2``.
        stride, padding, dilation: those of the layer; ``dilation`` is its smallest.

    Shape:
        ``[N, C, *S]`` -> ``[N, K, *S_out]`` (or both without N), weights that sum to one over K.

    Raises:
        TypeError, ValueError: an argument of the wrong form; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        num_branches: int,
        kernel_size: IntOrTuple = 3,
        *,
        spatial_dims: int = 3,
        hidden_channels: int | None = None,
        stride: IntOrTuple = 1,
        padding: Padding = "same",
        dilation: IntOrTuple = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        spatial_dims = require_spatial_dims(spatial_dims)
        in_channels = require_count("in_channels", in_channels)
        num_branches = require_count("num_branches", num_branches)
        if hidden_channels is None:
            hidden_channels = max(in_channels // 2, 1)
        hidden_channels = require_count("hidden_channels", hidden_channels)
        self.kernel_size = per_axis("kernel_size", kernel_size, spatial_dims, minimum=1)
        require_odd("kernel_size", self.kernel_size)
        self.stride = per_axis("stride", stride, spatial_dims, minimum=1)
        self.dilation = per_axis("dilation", dilation, spatial_dims, minimum=1)
        self.padding = padding
        halves = [size // 2 for size in self.kernel_size]
        reach = tuple(r * half for r, half in zip(self.dilation, halves))
        pads = resolve_padding(padding, self.stride, reach)
        # The layer's padding, less what its smallest dilation reaches beyond this convolution. Where that is below
        # zero the input is cropped: by a view, so that autograd keeps no copy.
        margins = [pad - r + half for pad, r, half in zip(pads, reach, halves)]
        self.crop = tuple(max(-margin, 0) for margin in margins)
        conv = CONV[spatial_dims]
        options = {"device": device, "dtype": dtype}
        self.conv1 = conv(
            in_channels,
            hidden_channels,
            self.kernel_size,
            self.stride,
            padding=tuple(max(margin, 0) for margin in margins),
            **options,
        )
        self.conv2 = conv(hidden_channels, num_branches, 1, **options)
        self.weight_shape = (hidden_channels, in_channels, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        # Not by conv1.weight: with FSDP, offloading or quantisation it is itself only inside conv1's forward.
        _check_gate_input(input, self.weight_shape)
        spatial_dims = len(self.kernel_size)
        size = input.shape[-spatial_dims:]
        resolve(size, self.kernel_size, (self.dilation,), self.stride, self.padding)  # raises if it is too small
        for axis, crop in enumerate(self.crop):
            input = input.narrow(axis - spatial_dims, crop, size[axis] - 2 * crop)
        return self.conv2(F.relu(self.conv1(input))).softmax(dim=-1 - spatial_dims)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}"


class AutofocusConvNd(_ConvNd):
    """What the three layers share; mixed in front of ``nn.Conv1d/2d/3d``, whose constructor it calls."""

    spatial_dims: int
    attention: nn.Module
    branch_norm: nn.ModuleList | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTuple = 3,
        stride: IntOrTuple = 1,
        padding: Padding = "same",
        dilation: IntOrTuple = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        dilations=(2, 6, 10, 14),
        branch_norm: bool = False,
        save_branches: bool = False,
        attention: nn.Module | None = None,
        detach_attention: bool = True,
        backend: str | None = None,
    ) -> None:
        if groups != 1:
            raise ValueError(f"groups must be 1 (grouped weights are not supported), got {groups!r}")
        _require_zeros(padding_mode)
        check_backend_name(backend)
        if attention is not None and (not callable(attention) or isinstance(attention, type)):
            raise TypeError(f"attention must be None or a module, got {_kind(attention)}")
        in_channels = require_count("in_channels", in_channels)
        out_channels = require_count("out_channels", out_channels)
        kernel_size = per_axis("kernel_size", kernel_size, self.spatial_dims, minimum=1)
        require_odd("kernel_size", kernel_size)
        stride = per_axis("stride", stride, self.spatial_dims, minimum=1)
        resolve_padding(padding, stride, (0,) * self.spatial_dims)  # raises now what forward would
        dilation = per_axis("dilation", dilation, self.spatial_dims, minimum=1)
        branches = resolve_dilations(dilations, self.spatial_dims)
        of_conv: Any = super()  # nn.ConvNd; _ConvNd alone has another constructor
        of_conv.__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.dilations = tuple(tuple(r * factor for r, factor in zip(branch, dilation)) for branch in branches)
        self.branch_norm = None
        if branch_norm:
            norm = BATCH_NORM[self.spatial_dims]
            self.branch_norm = nn.ModuleList(norm(out_channels, device=device, dtype=dtype) for _ in branches)
        self.save_branches = bool(save_branches)
        self.detach_attention = detach_attention
        self.backend = backend
        if attention is None:
            attention = ScaleAttention(
                in_channels,
                len(branches),
                kernel_size,
                spatial_dims=self.spatial_dims,
                stride=stride,
                padding=padding,
                dilation=smallest_dilation(self.dilations),
                device=device,
                dtype=dtype,
            )
        self.attention = attention

    def forward(self, input: Tensor, return_attention: bool = False):
        # Before the gate, whose convolutions would complain first and without naming an argument of the layer.
        weight = self.weight  # once: a parametrization computes it at every look, and spectral_norm takes a step
        check_layer_input(input, weight)
        _require_zeros(self.padding_mode)  # nn.ConvNd, too, takes a change after the constructor
        # By the function: torch.compile goes wrong in MetaTensor.__torch_function__ (MONAI) behind the method.
        attention = self.attention(torch.detach(input) if self.detach_attention else input)
        output = self.blend(input, weight, attention, self.padding)
        return _result(output, attention, return_attention)

    def blend(self, input: Tensor, weight: Tensor, attention: Tensor, padding: Padding) -> Tensor:
        """The layer's output for its weight, the gate's attention and the padding that the caller chooses."""
        if not isinstance(attention, (Tensor, torch.fx.Proxy)):
            raise TypeError(f"attention must return a tensor [N, K, *S_out], got {_kind(attention)}")
        tensors = (input, weight, attention.to(input.dtype), self.bias)
        options: dict[str, Any] = {
            "dilations": self.dilations,
            "stride": self.stride,
            "padding": padding,
            "backend": self.backend,
        }
        if self.branch_norm is None:
            return autofocus_conv(*tensors, **options)
        return normed_autofocus_conv(*tensors, self.branch_norm, save_branches=self.save_branches, **options)

    def __prepare_scriptable__(self):
        """torch.jit.script calls this; it would fail later, at an annotation, without naming the layer or a way out."""
        raise RuntimeError(
            f"torch.jit.script cannot read {type(self).__name__}: use torch.jit.trace, torch.export or torch.compile"
        )

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"dilations={_short(self.dilations)}"]
        if self.save_branches:
            parts.append("save_branches=True")
        if not self.detach_attention:
            parts.append("detach_attention=False")
        if self.backend is not None:
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


def _require_zeros(padding_mode: str) -> None:
    if padding_mode != "zeros":
        raise ValueError(f'padding_mode must be "zeros", got {padding_mode!r}')


def _kind(value) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _short(dilations) -> tuple:
    """Dilations as they were most likely written: an int where all axes agree."""
    return tuple(branch[0] if len(set(branch)) == 1 else branch for branch in dilations)


_DOC = """``nn.Conv{n}d`` whose receptive field is chosen voxel by voxel among K dilations of one shared weight.

Source: Qin et al., "Autofocus Layer for Semantic Segmentation", MICCAI 2018, section 2.

Args:
    in_channels, out_channels, kernel_size, stride, padding, bias, device, dtype: as in ``nn.Conv{n}d``;
        kernel sizes must be odd, and ``padding`` refers to the smallest dilation of each axis.
    dilation: multiplies every entry of ``dilations``.
    groups, padding_mode: only 1 and "zeros".
    dilations: one int, or one int per axis, per branch.
    branch_norm: normalise every branch by its own batch norm before the sum, as the paper does.
        ``layer.branch_norm`` is then a ``ModuleList`` of K ``nn.BatchNorm{n}d``. Their own mode, momentum, running
        statistics and parameters are used, and ``nn.SyncBatchNorm`` may replace them. Their forward is not called,
        nor are their forward hooks. The bias is added to the first branch only, as in the paper's code. Batch norm
        makes any bias redundant, so new networks do better with ``bias=False``.
    save_branches: with ``branch_norm``, keep the K branches for backward instead of computing them again.
    attention: a module from ``[N, C, *S]`` to weights ``[N, K, *S_out]``; None makes a :class:`ScaleAttention`.
    detach_attention: True, as in the paper, lets no gradient reach the input through the gate (whose own parameters
        do train). False lets it through.
    backend: None chooses; see :func:`autofocus_kernels.autofocus_conv`.

Shape:
    ``[N, C, *S]`` -> ``[N, O, *S_out]``, or both without N; {n} spatial axes.
    ``forward(x, return_attention=True)`` returns ``(output, attention [N, K, *S_out])``.

Raises:
    TypeError, ValueError: an argument of the wrong form; the message names it.
"""


class AutofocusConv1d(AutofocusConvNd, nn.Conv1d):
    __doc__ = _DOC.format(n=1)
    spatial_dims = 1


class AutofocusConv2d(AutofocusConvNd, nn.Conv2d):
    __doc__ = _DOC.format(n=2)
    spatial_dims = 2


class AutofocusConv3d(AutofocusConvNd, nn.Conv3d):
    __doc__ = _DOC.format(n=3)
    spatial_dims = 3


AUTOFOCUS: dict[int, Any] = {1: AutofocusConv1d, 2: AutofocusConv2d, 3: AutofocusConv3d}
