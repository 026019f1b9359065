"""Residual blocks and heads of the paper's networks (Qin et al., MICCAI 2018, sections 2 and 3)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..branch_norm import BATCH_NORM
from ..geometry import smallest_dilation
from ..modules import AUTOFOCUS, CONV


@dataclass(frozen=True)
class Options:
    """What all layers of a network share; ``dilations`` holds one tuple of ``spatial_dims`` ints per branch."""

    spatial_dims: int
    dilations: tuple[tuple[int, ...], ...]
    padding: str
    save_branches: bool | None  # None: in the second layer of each block
    backend: str | None
    factory: dict  # device and dtype
    act: Callable[[], nn.Module] = nn.ReLU
    norm_of: Callable[[int], nn.Module] | None = None  # from a number of channels; None is a batch norm

    @property
    def smallest_dilation(self) -> tuple[int, ...]:
        return smallest_dilation(self.dilations)

    def conv(self, in_channels: int, out_channels: int, kernel_size=3, dilation=1, padding=None) -> _ConvNd:
        return CONV[self.spatial_dims](
            in_channels,
            out_channels,
            kernel_size,
            dilation=dilation,
            padding=self.padding if padding is None else padding,
            **self.factory,
        )

    def norm(self, channels: int) -> nn.Module:
        if self.norm_of is not None:
            return self.norm_of(channels)
        return BATCH_NORM[self.spatial_dims](channels, **self.factory)

    def conv_norm(self, *arguments, **keywords) -> nn.Sequential:
        conv = self.conv(*arguments, **keywords)
        return nn.Sequential(OrderedDict(conv=conv, norm=self.norm(conv.out_channels)))

    def autofocus(self, in_channels: int, out_channels: int, save_branches: bool) -> nn.Module:
        norms = [self.norm(out_channels) for _ in self.dilations]
        per_branch = isinstance(norms[0], nn.modules.batchnorm._BatchNorm)
        layer = AUTOFOCUS[self.spatial_dims](
            in_channels,
            out_channels,
            padding=self.padding,
            dilations=self.dilations,
            branch_norm=per_branch,
            save_branches=save_branches,
            backend=self.backend,
            **self.factory,
        )
        if per_branch:
            layer.branch_norm = nn.ModuleList(norms)
            return layer
        # A norm of another kind is no scale and shift of a branch: one follows the sum.
        return nn.Sequential(OrderedDict(conv=layer, norm=norms[0]))


class Block(nn.Module):
    """Two layers and a shortcut; ``autofocus`` says which of the two is an autofocus layer.

    A layer that is not is a convolution of the smallest dilation and a norm. With ``padding="valid"`` the shortcut is
    cropped to the size of the result, before its convolution and norm where the channel count changes.
    """

    def __init__(self, options: Options, in_channels: int, out_channels: int, autofocus: tuple[bool, bool]) -> None:
        super().__init__()

        def layer(index: int, in_channels: int) -> nn.Module:
            if autofocus[index]:
                save_branches = index == 1 if options.save_branches is None else options.save_branches
                return options.autofocus(in_channels, out_channels, save_branches)
            return options.conv_norm(in_channels, out_channels, dilation=options.smallest_dilation)

        self.layer1 = layer(0, in_channels)
        self.layer2 = layer(1, out_channels)
        self.act1, self.act2 = options.act(), options.act()
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = options.conv_norm(in_channels, out_channels, kernel_size=1)

    def forward(self, input: Tensor) -> Tensor:
        output = self.layer2(self.act1(self.layer1(input)))
        return self.act2(output + self.shortcut(centre(input, output.shape[2:])))


@torch.fx.wrap
def centre(input: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of ``input`` ``[N, C, *S]``, ``size`` voxels along each spatial axis."""
    for axis, length in enumerate(size, start=2):
        input = input.narrow(axis, (input.shape[axis] - length) // 2, length)
    return input


class ConcatHead(nn.Module):
    """ASPP-c: a convolution per dilation, concatenated, norm, activation, 1 x 1 x 1 convolution to the classes."""

    def __init__(self, options: Options, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            options.conv(in_channels, channels, dilation=dilation, padding="same") for dilation in options.dilations
        )
        self.norm = options.norm(len(self.branches) * channels)
        self.act = options.act()
        self.classes = options.conv(len(self.branches) * channels, num_classes, kernel_size=1)

    def forward(self, input: Tensor) -> Tensor:
        features = torch.cat([branch(input) for branch in self.branches], dim=1)
        return self.classes(self.act(self.norm(features)))


class SumHead(nn.Module):
    """ASPP-s: per dilation a convolution, norm, activation and 1 x 1 x 1 convolution to the classes, summed."""

    def __init__(self, options: Options, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            options.conv_norm(in_channels, channels, dilation=dilation, padding="same")
            for dilation in options.dilations
        )
        self.classes = nn.ModuleList(options.conv(channels, num_classes, kernel_size=1) for _ in options.dilations)
        self.acts = nn.ModuleList(options.act() for _ in options.dilations)

    def forward(self, input: Tensor) -> Tensor:
        return sum(classes(act(branch(input))) for branch, act, classes in zip(self.branches, self.acts, self.classes))
