"""The paper's nine networks, by name."""

# Not `from __future__ import annotations`: torch.fx pickles the annotations of forward, and no strings.
from collections.abc import Sequence

import torch.fx
from torch import Tensor, nn

from ..geometry import IntOrTuple, require_count, resolve_dilations
from ..modules import require_spatial_dims
from .blocks import Block, ConcatHead, Options, SumHead

# Which of the two layers of each of the three blocks are autofocus layers.
_B, _S, _A = (False, False), (False, True), (True, True)
_BLOCKS = {
    "Basic": (_B, _B, _B),
    "ASPP-c": (_B, _B, _B),
    "ASPP-s": (_B, _B, _B),
    "AFN-1": (_B, _B, _S),
    "AFN-2": (_B, _B, _A),
    "AFN-3": (_B, _S, _A),
    "AFN-4": (_B, _A, _A),
    "AFN-5": (_S, _A, _A),
    "AFN-6": (_A, _A, _A),
}
_HEADS = {"ASPP-c": ConcatHead, "ASPP-s": SumHead}
_WIDTHS = {"ASPP-c": (30, 40, 40, 50, 30), "ASPP-s": (30, 40, 40, 50, 120)}

NAMES = tuple(_BLOCKS)


def build(
    name: str,
    in_channels: int = 4,
    num_classes: int = 5,
    spatial_dims: int = 3,
    *,
    widths: Sequence[int] | None = None,
    dilations: Sequence[IntOrTuple] = (2, 6, 10, 14),
    padding: str = "valid",
    save_branches: bool | None = None,
    backend: str | None = None,
    device=None,
    dtype=None,
) -> "SegmentationNetwork":
    """A network of the paper with its initial weights.

    Source: Qin et al., MICCAI 2018, section 3.

    Args:
        name: one of :data:`NAMES`.
        in_channels: channels of the images.
        num_classes: channels of the logits.
        spatial_dims: 1, 2 or 3.
        widths: channels of the stem and of the three blocks and, for ASPP-c and ASPP-s, of each parallel
            convolution. None takes the paper's: (30, 40, 40, 50), and then 30 or 120.
        dilations: rates of the autofocus or ASPP branches, each an int or one int per axis. The plain convolutions
            in the blocks use the smallest.
        padding: "valid" as published (a 75^3 input gives 47^3 logits) or "same" (logits of the input's size).
        save_branches: which autofocus layers keep their branches for backward: True all, False none, None (the
            default) the second of each block, for most of the speed at less than half of the memory
            (docs/branch_norm.md, section 3). Results are the same.
        backend: see :class:`autofocus_kernels.AutofocusConv3d`.
        device, dtype: of the parameters.

    Returns:
        a network from images ``[N, in_channels, *S]`` to logits ``[N, num_classes, *S_out]``, ``S_out`` as ``padding``
        says.

    Raises:
        ValueError, TypeError: an argument of the wrong form; the message names it.
    """
    factory = {"device": device, "dtype": dtype}
    return SegmentationNetwork(
        *resolve_arguments(
            name,
            in_channels,
            num_classes,
            spatial_dims,
            widths,
            dilations,
            padding,
            save_branches,
            backend,
            factory=factory,
        )
    )


def resolve_arguments(
    name, in_channels, num_classes, spatial_dims, widths, dilations, padding, save_branches, backend, **options
) -> tuple[str, Options, int, int, tuple[int, ...]]:
    """The arguments of :class:`SegmentationNetwork` from those of :func:`build`; ``options`` go to its layers.

    Raises:
        ValueError, TypeError: an argument of the wrong form; the message names it.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    spatial_dims = require_spatial_dims(spatial_dims)
    if padding not in ("valid", "same"):
        raise ValueError(f'padding must be "valid" or "same", got {padding!r}')
    if widths is None:
        widths = _WIDTHS.get(name, (30, 40, 40, 50))
    expected = 4 + (name in _HEADS)
    if isinstance(widths, (str, bytes)) or not isinstance(widths, Sequence):
        raise TypeError(f"widths must be a sequence of {expected} channel counts for {name}, got {widths!r}")
    if len(widths) != expected:
        raise ValueError(f"widths must hold {expected} channel counts for {name}, got {widths!r}")
    widths = tuple(require_count(f"widths[{i}]", width) for i, width in enumerate(widths))
    in_channels = require_count("in_channels", in_channels)
    num_classes = require_count("num_classes", num_classes)
    dilations = resolve_dilations(dilations, spatial_dims)
    settings = Options(spatial_dims, dilations, padding, save_branches, backend, **options)
    return name, settings, in_channels, num_classes, widths


class SegmentationNetwork(nn.Module):
    """Stem of two 3^3 convolutions, three residual blocks and a head; made by :func:`build`.

    Shape:
        ``[N, in_channels, *S]`` -> logits ``[N, num_classes, *S]``. With ``padding="valid"`` the logits are shorter by
        ``crop`` on each axis, and the input must be longer than that.
    """

    def __init__(
        self, name: str, options: Options, in_channels: int, num_classes: int, widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.name = name
        self.in_channels = in_channels
        self.crop = tuple(
            4 + 12 * dilation if options.padding == "valid" else 0 for dilation in options.smallest_dilation
        )
        self.stem = nn.ModuleList(options.conv_norm(channels, widths[0]) for channels in (in_channels, widths[0]))
        self.acts = nn.ModuleList(options.act() for _ in self.stem)
        self.blocks = nn.ModuleList(
            Block(options, widths[i], widths[i + 1], autofocus) for i, autofocus in enumerate(_BLOCKS[name])
        )
        if name in _HEADS:
            self.head = _HEADS[name](options, widths[3], widths[4], num_classes)
        else:
            self.head = options.conv(widths[3], num_classes, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                nn.init.normal_(module.weight, std=0.01)

    def forward(self, input: Tensor) -> Tensor:
        _check_input(input, self.in_channels, self.crop, self.name)
        for layer, act in zip(self.stem, self.acts):
            input = act(layer(input))
        for block in self.blocks:
            input = block(input)
        return self.head(input)

    def extra_repr(self) -> str:
        return f"name={self.name!r}"


@torch.fx.wrap
def _check_input(input: Tensor, in_channels: int, crop: tuple[int, ...], name: str) -> None:
    dims = len(crop)
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
    if input.dim() != dims + 2 or input.shape[1] != in_channels:
        raise ValueError(f"input must be [N, {in_channels}, *S] with {dims} spatial axes, got {list(input.shape)}")
    if any(size <= less < size + less for size, less in zip(input.shape[2:], crop)):
        raise ValueError(
            f"input must be at least {[less + 1 for less in crop]} voxels, since the unpadded convolutions of "
            f'{name} remove {list(crop)} (padding="same" keeps the size), got {list(input.shape[2:])}'
        )
