"""Tile shapes: which lattice, which box of it, which blocks of channels. Plain Python.

Axes: C input channels, O output channels, K branches, T kernel taps, P rows (positions) of a tile. docs/triton.md has
the reasons.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from ...geometry import Geometry

Triple = tuple[int, int, int]


class Tiling(NamedTuple):
    """How one kernel walks one problem: a constant of the compiled kernel. All triples are (d, h, w).

    Attributes:
        transposed: positions are those of the input and read the outputs that read them (addressing.corner_on_axis).
        step: positions of one lattice are this far apart.
        move: coordinates read move this far per lattice point.
        tile: lattice points of one program; a power of two each.
    """

    branches: int
    kernel: Triple
    dilations: tuple[Triple, ...]
    stride: Triple
    transposed: bool
    step: Triple
    move: Triple
    tile: Triple

    @property
    def rows(self) -> int:
        return math.prod(self.tile)


class Config(NamedTuple):
    """One way to run a kernel: rows of a tile, channels of a block, warps, and the most registers of a thread.

    With 128 registers two programs of eight warps share an SM, and one loads while the other computes; 255 is for
    accumulators that would not fit. (Left alone, ptxas at times spills rather than take what is free.)
    """

    rows: int
    block_c: int
    block_o: int
    num_warps: int
    registers: int


# A point fetched from L2 costs about as much as this many points read from L1 (5.5 TB/s for all of an H200's SMs,
# against 128 bytes a clock for each).
L2_COST = 5


class _Axis(NamedTuple):
    """One way to walk one axis.

    Attributes:
        waste: rows of all tiles over positions of the axis.
        read: distinct coordinates that all branches and taps of a tile read.
        read_by_tap: the same for each tap alone, summed over the taps.
    """

    step: int
    move: int
    tile: int
    waste: float
    read: int
    read_by_tap: int


@lru_cache(maxsize=1024)
def choose_tiling(problem: Geometry, rows: int, transposed: bool = False) -> Tiling:
    """The lattice and the box of ``rows`` points that read least, for a problem with three spatial axes.

    Boxes of powers of two are compared on lattices of step one and of the common factor of the dilations. A useful
    position costs K T reads from L1, and its share of what the tile fetches from L2: per tap of the outermost axis,
    each distinct point once.
    """
    d_ways, h_ways, w_ways = (_ways(problem, axis, rows, transposed) for axis in range(3))
    reads = problem.num_branches * problem.num_taps

    def cost(way: tuple[_Axis, _Axis, _Axis]) -> float:
        d, h, w = way
        fetched = d.read_by_tap * h.read * w.read / rows
        return d.waste * h.waste * w.waste * (reads + L2_COST * fetched)

    best = min(
        ((d, h, w) for d, h, w in itertools.product(d_ways, h_ways, w_ways) if d.tile * h.tile * w.tile == rows),
        key=cost,
    )
    return Tiling(
        branches=problem.num_branches,
        kernel=problem.kernel_size,
        dilations=problem.dilations,
        stride=problem.stride,
        transposed=transposed,
        step=tuple(axis.step for axis in best),
        move=tuple(axis.move for axis in best),
        tile=tuple(axis.tile for axis in best),
    )


def _ways(problem: Geometry, axis: int, rows: int, transposed: bool) -> list[_Axis]:
    stride = problem.stride[axis]
    dilations = [dilation[axis] for dilation in problem.dilations]
    half = problem.kernel_size[axis] // 2
    sizes = (problem.output_size[axis], problem.input_size[axis])
    size, read_size = sizes[::-1] if transposed else sizes
    common = math.gcd(*dilations)
    # Positions a step apart read from one lattice of the other side: stride * step there is a multiple of the common
    # factor; transposed, the step itself is one, and of the stride too.
    if transposed:
        steps = {stride, math.lcm(stride, common)}
    else:
        steps = {1, common // math.gcd(common, stride)}
    ways = []
    for step in sorted(steps):
        move = step // stride if transposed else step * stride
        points = -(-size // step)
        classes = min(step, size)
        for exponent in range(rows.bit_length()):
            tile = 2**exponent
            by_tap = [
                {move * i + (r * tap // stride if transposed else r * tap) for i in range(tile) for r in dilations}
                for tap in range(-half, half + 1)
            ]
            ways.append(
                _Axis(
                    step=step,
                    move=move,
                    tile=tile,
                    waste=classes * -(-points // tile) * tile / size,
                    read=min(len(set().union(*by_tap)), read_size),
                    read_by_tap=sum(min(len(reads), read_size) for reads in by_tap),
                )
            )
    return ways


def configurations(kernel: str, itemsize: int, precision: str, capability: int, C: int, O: int) -> tuple[Config, ...]:
    """What ``kernel`` may run with: the best first, the last the least demanding.

    ``capability`` is the major compute capability of an NVIDIA device; AMD counts as 8: it too has all operands of its
    matrix instructions in registers.
    """

    def block(channels: int, most: int) -> int:
        return min(most, max(16, 1 << (channels - 1).bit_length()))

    makes_grad_weight, scaled = kernel.startswith("grad_input_weight"), kernel == "grad_input_weight_scaled"
    if itemsize == 4 and precision == "ieee":
        # Products without tensor cores hold their operands in registers.
        if makes_grad_weight:
            return (Config(32, 16, 16, 8 if scaled else 4, 255),)
        return Config(64, 16, 16, 4, 255), Config(32, 16, 16, 4, 255)
    if makes_grad_weight:
        return _grad_input_weight(scaled, itemsize, capability, block, C, O)
    if itemsize == 4:
        return Config(128, 16, block(O, 64), 8, 255), Config(64, 16, block(O, 32), 4, 255)
    # Every block of O blends anew in the forward; 128 channels cover the usual layers at once.
    least = Config(64, block(C, 32), block(O, 32), 4, 255)
    if kernel == "grad_scaled" and O > 64:
        return Config(64, block(C, 32), block(O, 128), 8, 255), least
    # Masks of a last block that is not full take registers, most where operands of products take them too.
    masked = capability < 9 and O % 16 > 0
    if O <= 32 or (O <= 64 and kernel != "grad_scaled" and not masked):
        large, small = (Config(rows, block(C, 32), block(O, 64), rows // 16, 128) for rows in (256, 128))
        # Blackwell's tensor cores take no product over 256 rows, and others have no registers for it.
        return (large, small, least) if capability == 9 else (small, large, least)
    return Config(128, block(C, 32), block(O, 128), 8, 255), least


def _grad_input_weight(
    scaled: bool, itemsize: int, capability: int, block: Callable[[int, int], int], C: int, O: int
) -> tuple[Config, ...]:
    """Every block of C gathers anew, so it is wide; blocks of O cost nothing but their loop."""
    least = Config(64, block(C, 32), 16, 4, 255)
    if itemsize == 4:
        return Config(128, block(C, 32), block(O, 32), 8, 255), least
    if capability < 9:
        # Operands of the older tensor cores are all in registers.
        most_o = 32 if C <= 32 and not scaled else 16
        return Config(128 if C <= 64 else 64, block(C, 128), block(O, most_o), 8, 255), least
    small = max(C, O) <= 32 and not scaled
    # A scale and a wide x each take registers from the rest.
    most_o = 64 // (2 if C > 64 else 1) // (2 if scaled else 1)
    # With 128 registers two programs share an SM: the gathers of one wait while the other's are multiplied.
    narrow = Config(128, block(C, 128), block(O, most_o), 8, 128 if small else 255)
    wide = Config(256, block(C, 64), block(O, 32 if max(C, O) <= 32 else 16), 8, 255)
    return narrow, wide, least
