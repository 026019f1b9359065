"""The index arithmetic of csrc/cuda/windows/lattice.h, point by point against the definition."""

import ctypes
import itertools
import random

import pytest
from helpers.cuda_emulation import probe


def random_problem(rng):
    """Integers for autofocus_probe_lattice: dilations with and without a common factor, any origin and sizes."""
    branches = rng.randint(1, 4)
    factor = [rng.choice((1, 1, 2, 3)) for _ in range(3)]
    dilations = [[f * rng.randint(1, reach) for f, reach in zip(factor, (4, 5, 7))] for _ in range(branches)]
    common = [max(column) for column in zip(*dilations)]  # at least the common factor of each axis
    sizes = [[rng.randint(low, low + 14) for low in common] for _ in range(2)]
    origin = [rng.randint(-8, 8) for _ in range(3)]
    return [rng.randint(1, 2), branches, *sizes[0], *sizes[1], *origin, *itertools.chain(*dilations)]


def check_lattice(library, numbers, adjoint, tile_z, recycle, apart):
    values = (ctypes.c_int64 * len(numbers))(*numbers)
    flags = [ctypes.c_bool(flag) for flag in (adjoint, recycle, apart)]
    return probe(library.autofocus_probe_lattice, values, flags[0], tile_z, *flags[1:])


@pytest.mark.parametrize("recycle", [False, True], ids=["slot_per_plane", "ring"])
@pytest.mark.parametrize("tile_z", [8, 4])
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
def test_every_tap_of_every_point_of_every_tile(library, adjoint, tile_z, recycle):
    rng = random.Random(f"{adjoint}{tile_z}{recycle}")
    for i in range(150):
        numbers = random_problem(rng)
        right, message = check_lattice(library, numbers, adjoint, tile_z, recycle, apart=i % 3 == 0)
        assert right, (message, numbers)


@pytest.mark.parametrize("origin", [-5, -2, 0, 3])
def test_slabs_of_long_volumes(library, origin):
    """The second class of the input reads a plane of its output's class further on, if the origin is odd."""
    rates = [rate for r in (2, 4) for rate in (r, 1, 1)]
    for tile_z, recycle in itertools.product((8, 4), (False, True)):
        numbers = [1, 2, 100, 2, 3, 97, 2, 3, origin, 0, 0, *rates]
        assert check_lattice(library, numbers, True, tile_z, recycle, apart=True) == (True, "")


@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
def test_lattice_of_the_papers_rates(library, adjoint):
    rates = [rate for r in (2, 6, 10, 14) for rate in (r, r, r)]
    numbers = [1, 4, 33, 32, 35, 33, 32, 35, 0, 0, 0, *rates]
    for apart in (False, True):
        assert check_lattice(library, numbers, adjoint, 8, False, apart) == (True, "")


@pytest.mark.parametrize("rates", [(5, 7), (1, 6)], ids=["all", "the_second"])
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
def test_rates_above_the_planes_of_a_tile(library, adjoint, rates):
    """A phase reads more planes than the tile has, or frees some that no branch has read."""
    numbers = [1, 2, 21, 3, 4, 19, 4, 3, 1, 0, 0, *itertools.chain(*((rate, 1, 1) for rate in rates))]
    for recycle in (False, True):
        assert check_lattice(library, numbers, adjoint, 4, recycle, apart=False) == (True, "")
