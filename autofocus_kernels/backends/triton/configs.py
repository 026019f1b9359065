"""Tile shapes: which lattice, which box of it, which blocks of channels. Plain Python, shared with the traffic model.

Axes: C input channels, O output channels, K branches, T kernel taps, P rows (positions) of a tile. docs/triton.md has
the reasons, benchmarks/traffic_model.py the figures behind the defaults.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

from ...geometry import Geometry

Triple = tuple[int, int, int]


class Tiling(NamedTuple):
    """How one kernel walks one problem: a constant of the compiled kernel. All triples are (d, h, w).

    Attributes:
        transposed: positions are those of the input and read the outputs that read them (kernels.base_on_axis).
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
    """One way to run a kernel."""

    rows: int
    block_c: int
    block_o: int
    num_warps: int


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
        (
            (d, h, w)
            for d, h, w in itertools.product(d_ways, h_ways, w_ways)
            if d.tile * h.tile * w.tile == rows
        ),
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
        cosets = min(step, size)
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
                    waste=cosets * -(-points // tile) * tile / size,
                    read=min(len(set().union(*by_tap)), read_size),
                    read_by_tap=sum(min(len(reads), read_size) for reads in by_tap),
                )
            )
    return ways


def configurations(kernel: str, itemsize: int, precision: str, C: int, O: int) -> tuple[Config, ...]:
    return (Config(rows=256, block_c=16, block_o=min(64, max(16, 1 << (O - 1).bit_length())), num_warps=8),)


class NoConfigurationFits(RuntimeError):
    """Every configuration of a kernel needs more shared memory or registers than the device has."""
