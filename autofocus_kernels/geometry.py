"""The integers of one autofocus problem, resolved and checked once for every backend.

Axes: N batch, C input channels, O output channels, K branches, T kernel taps, and one to three spatial axes.
Branch ``k`` reads, for output position ``p`` and tap index ``j`` in ``0 .. kernel_size - 1``, the input position::

    origin + stride * p + dilations[k] * (j - (kernel_size - 1) / 2)        zero outside the input

on every axis, so all branches are centred on the same voxel (docs/math.md, section 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, wraps
from numbers import Integral
from typing import Any

import torch

IntOrTuple = int | Sequence[int]
Padding = int | Sequence[int] | str
# The largest stride, dilation or padding, and the farthest that a kernel may reach from its centre: no sum or product
# of them that a kernel computes overflows 64 bits.
LARGEST = 2**48


@dataclass(frozen=True)
class Geometry:
    """Spatial integers of one call; every tuple holds one entry per spatial axis.

    Attributes:
        tile_sizes: input and output size of the larger problem that this one stands for (self_check.py), else None.
        few_blocks: whether few thread blocks of a GPU shall share the work, so that each goes from tile to tile, as in
            a larger problem.
    """

    kernel_size: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]
    stride: tuple[int, ...]
    origin: tuple[int, ...]
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    tile_sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    few_blocks: bool = False

    @property
    def spatial_dims(self) -> int:
        return len(self.kernel_size)

    @property
    def num_branches(self) -> int:
        return len(self.dilations)

    @property
    def num_taps(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def integers(self) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
        """Dilations (flat, branch by branch), stride and origin: with the tensors' sizes, the whole geometry."""
        return [r for dilation in self.dilations for r in dilation], self.stride, self.origin

    @cached_property
    def largest(self) -> int:
        """The largest of the integers that a kernel adds and multiplies, without its sign."""
        return max(map(abs, (*self.integers[0], *self.stride, *self.origin, *self.output_size)))

    @cached_property
    def farthest(self) -> int:
        """No position, and nothing that is read, lies farther from 0 than this on any axis."""
        axes = zip(self.kernel_size, zip(*self.dilations), self.stride, self.origin, self.input_size, self.output_size)
        return max(
            abs(origin) + max(dilations) * (kernel // 2) + max(size, stride * output)
            for kernel, dilations, stride, origin, size, output in axes
        )

    @cached_property
    def tiled(self) -> Geometry:
        """The problem that tiles are chosen for."""
        if self.tile_sizes is None:
            return self
        input_size, output_size = self.tile_sizes
        return replace(self, input_size=input_size, output_size=output_size, tile_sizes=None, few_blocks=False)

    @cached_property
    def as_3d(self) -> Geometry:
        """The same problem with leading axes of size one, the only form the compiled kernels know."""
        missing = 3 - self.spatial_dims
        if missing == 0:
            return self
        ones, zeros = (1,) * missing, (0,) * missing
        return Geometry(
            kernel_size=ones + self.kernel_size,
            dilations=tuple(ones + dilation for dilation in self.dilations),
            stride=ones + self.stride,
            origin=zeros + self.origin,
            input_size=ones + self.input_size,
            output_size=ones + self.output_size,
            tile_sizes=self.tile_sizes and (ones + self.tile_sizes[0], ones + self.tile_sizes[1]),
            few_blocks=self.few_blocks,
        )


def once(function):
    """``function`` with its results kept: on small problems the checks of a call would otherwise take most of its time.

    For functions of shapes and settings that return something immutable. An error is raised anew each time.
    """
    cached = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def looked_up(*arguments, **options):
        if options or torch.compiler.is_compiling() or not all(map(_is_plain, arguments)):
            return function(*arguments, **options)
        return cached(*arguments)

    return looked_up


def _is_plain(value) -> bool:
    """Whether ``value`` can be looked up: None, ints, strings and tuples of these.

    Lists and symbolic sizes have no hash. True and 1.0 have that of 1 and would be looked up as 1, unchecked.
    """
    kind = type(value)
    if kind is tuple or kind is torch.Size:
        for entry in value:
            if type(entry) is not int and not _is_plain(entry):
                return False
        return True
    return value is None or kind is int or kind is str


def per_axis(name: str, value: IntOrTuple, spatial_dims: int, minimum: int) -> tuple[int, ...]:
    """``value`` as one integer per axis.

    Raises:
        TypeError: ``value`` is neither an int nor a sequence of ints.
        ValueError: the wrong number of entries, or an entry below ``minimum`` or above :data:`LARGEST`.
    """
    entries: Any = (value,) * spatial_dims if isinstance(value, Integral) else value
    if isinstance(entries, (str, bytes)) or not isinstance(entries, Sequence):
        raise TypeError(f"{name} must be an int or a sequence of {spatial_dims} ints, got {value!r}")
    if any(isinstance(entry, bool) or not isinstance(entry, Integral) for entry in entries):
        raise TypeError(f"{name} must hold ints, got {value!r}")
    if len(entries) != spatial_dims:
        raise ValueError(f"{name} must be an int or {spatial_dims} ints, one per spatial axis, got {value!r}")
    if min(entries) < minimum:
        raise ValueError(f"{name} must be at least {minimum} on every axis, got {value!r}")
    if max(entries) > LARGEST:
        raise ValueError(f"{name} must be at most 2**48 on every axis, got {value!r}")
    # numpy's integers become Python's; a symbolic int of torch.compile stays as it is.
    return tuple(entry if isinstance(entry, int) else int(entry) for entry in entries)


def require_count(name: str, value: int) -> int:
    """``value``, a number of channels or branches, as a Python int.

    Raises:
        TypeError: ``value`` is no int.
        ValueError: it is below one.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return int(value)


def require_odd(name: str, sizes: tuple[int, ...]) -> None:
    if any(size % 2 == 0 for size in sizes):
        raise ValueError(f"{name} must be odd on every axis (branches share a centre), got {sizes}")


def resolve_padding(
    padding: Padding, stride: tuple[int, ...], reach: tuple[int, ...], minimum: int = 0
) -> tuple[int, ...]:
    """Zeros per side and axis around the input, for a kernel that reaches ``reach`` voxels from its centre.

    Raises:
        TypeError, ValueError: ``padding`` of the wrong form or below ``minimum``, or "same" with a stride.
    """
    if not isinstance(padding, str):
        return per_axis("padding", padding, len(stride), minimum)
    if padding not in ("same", "valid"):
        raise ValueError(f'padding must be "same", "valid" or ints, got {padding!r}')
    if padding == "same" and max(stride) > 1:
        raise ValueError(f'padding="same" needs stride 1, got stride {stride}; give the padding as ints')
    return reach if padding == "same" else (0,) * len(stride)


def resolve_dilations(dilations: Sequence[IntOrTuple], spatial_dims: int) -> tuple[tuple[int, ...], ...]:
    """One dilation tuple per branch, from ints or per-axis tuples."""
    if isinstance(dilations, (str, bytes)) or not isinstance(dilations, Sequence):
        raise TypeError(f"dilations must be a sequence with one int (or tuple of ints) per branch, got {dilations!r}")
    if not dilations:
        raise ValueError("dilations must name at least one branch, got an empty sequence")
    return tuple(per_axis(f"dilations[{k}]", dilation, spatial_dims, minimum=1) for k, dilation in enumerate(dilations))


def smallest_dilation(branches: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The smallest dilation of each axis, which a layer's padding counts from."""
    return tuple(min(rates) for rates in zip(*branches))


@once
def resolve(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    dilations: Sequence[IntOrTuple],
    stride: IntOrTuple = 1,
    padding: Padding = "same",
) -> Geometry:
    """The geometry of a call. ``padding`` is read, as in ``nn.ConvNd``, for the smallest dilation of each axis.

    A padding below zero crops: the outermost positions are read but not computed, as for a window cut from a larger
    volume.

    Raises:
        TypeError, ValueError: an argument of the wrong form, an even kernel size, a kernel that reaches farther than
            :data:`LARGEST`, ``padding="same"`` with a stride, or an input too small for an unpadded kernel; the
            message names the argument.
    """
    input_size, kernel_size = tuple(input_size), tuple(kernel_size)
    spatial_dims = len(input_size)
    require_odd("the kernel of weight", kernel_size)
    branches = resolve_dilations(dilations, spatial_dims)
    for k, dilation in enumerate(branches):
        if any(r * (size // 2) > LARGEST for r, size in zip(dilation, kernel_size)):
            raise ValueError(
                f"dilations[{k}] must keep kernel {kernel_size} within 2**48 voxels of its centre, got {dilation}"
            )
    stride = per_axis("stride", stride, spatial_dims, minimum=1)
    smallest = smallest_dilation(branches)
    reach = tuple(r * (size - 1) // 2 for r, size in zip(smallest, kernel_size))
    pad = resolve_padding(padding, stride, reach, minimum=-LARGEST)
    origin = tuple(r - p for r, p in zip(reach, pad))
    spans = tuple(size - 2 * o for size, o in zip(input_size, origin))
    if any(span < 0 or (span == 0 and size > 0) for span, size in zip(spans, input_size)):
        raise ValueError(
            f"input is too small: spatial size {input_size} with padding {pad} leaves no output for kernel "
            f"{kernel_size} at the smallest dilation {smallest}"
        )
    # As nn.ConvNd writes it: torch.export with dynamic sizes compares the two, symbol by symbol.
    output_size = tuple((span - 1) // s + 1 for span, s in zip(spans, stride))
    return Geometry(kernel_size, branches, stride, origin, input_size, output_size)


def from_integers(
    dilations: tuple[int, ...],
    stride: tuple[int, ...],
    origin: tuple[int, ...],
    kernel_size: tuple[int, ...],
    input_size: tuple[int, ...],
    output_size: tuple[int, ...],
) -> Geometry:
    """The geometry of an operator's arguments: the inverse of :attr:`Geometry.integers`."""
    integers = (dilations, stride, origin, kernel_size, input_size, output_size)
    try:
        return _from_integers_once(*integers)
    except TypeError:  # symbolic sizes have no hash
        return _from_integers(*integers)


def _from_integers(dilations, stride, origin, kernel_size, input_size, output_size) -> Geometry:
    axes = len(kernel_size)
    for name, values in (("stride", stride), ("origin", origin)):
        if len(values) != axes:
            raise ValueError(f"{name} must have an int for each of the {axes} spatial axes of weight, got {values}")
    if not dilations or len(dilations) % axes:
        raise ValueError(f"dilations must have {axes} ints for each branch, got {dilations}")
    branches = tuple(dilations[first : first + axes] for first in range(0, len(dilations), axes))
    return Geometry(tuple(kernel_size), branches, stride, origin, tuple(input_size), tuple(output_size))


_from_integers_once = lru_cache(maxsize=4096)(_from_integers)
