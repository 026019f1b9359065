"""Geometry against the rule of nn.ConvNd, and its own properties."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from autofocus_kernels.geometry import resolve

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def problems(draw):
    """Arguments of resolve; some leave no output."""
    dims = draw(st.integers(1, 3))

    def per_axis(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    return {
        "input_size": per_axis(1, 12),
        "kernel_size": tuple(2 * half + 1 for half in per_axis(0, 3)),
        "dilations": tuple(per_axis(1, 5) for _ in range(draw(st.integers(1, 4)))),
        "stride": per_axis(1, 4),
        "padding": per_axis(0, 6),
    }


def conv_size(problem):
    """The output size of nn.ConvNd at the smallest dilation of each axis, or None where it refuses."""
    smallest = tuple(min(axis) for axis in zip(*problem["dilations"]))
    conv = CONV[len(smallest)](1, 1, problem["kernel_size"], problem["stride"], problem["padding"], smallest)
    try:  # not on the meta device, where torch 2.11 refuses nothing
        return tuple(conv(torch.zeros(1, 1, *problem["input_size"])).shape[2:])
    except RuntimeError:
        return None


@settings(max_examples=200)
@given(problem=problems())
def test_output_size_is_that_of_conv_at_the_smallest_dilation(problem):
    expected = conv_size(problem)
    assume(expected is not None)
    assert resolve(**problem).output_size == expected


@settings(max_examples=200)
@given(problem=problems())
def test_a_size_that_conv_refuses_is_refused(problem):
    assume(conv_size(problem) is None)
    with pytest.raises(ValueError, match="input is too small"):
        resolve(**problem)


@settings(max_examples=100)
@given(problem=problems())
def test_same_keeps_the_size(problem):
    geometry = resolve(problem["input_size"], problem["kernel_size"], problem["dilations"], 1, "same")
    assert geometry.output_size == geometry.input_size
    assert set(geometry.origin) == {0}


def test_valid_is_padding_zero():
    arguments = ((9, 11), (3, 5), (2, 3))
    assert resolve(*arguments, padding="valid") == resolve(*arguments, padding=0)


def test_branches_are_centred_on_one_voxel():
    geometry = resolve((20,), (5,), (1, 3), stride=2, padding=1)
    # Padding 1 of the smallest dilation 1 puts the centre of the first kernel at -1 + 2.
    assert geometry.origin == (1,)
    assert geometry.output_size == ((20 + 2 - 4 - 1) // 2 + 1,)


def test_an_int_means_every_axis():
    assert resolve((9, 9), (3, 3), (2,), 2, 1) == resolve((9, 9), (3, 3), ((2, 2),), (2, 2), (1, 1))


def test_counts():
    geometry = resolve((9, 9), (3, 5), (2, 4, 6))
    assert (geometry.spatial_dims, geometry.num_branches, geometry.num_taps) == (2, 3, 15)


def test_as_3d_adds_leading_axes_of_size_one():
    geometry = resolve((9,), (3,), (2, 4), stride=2, padding=1).as_3d
    assert geometry.kernel_size == (1, 1, 3)
    assert geometry.dilations == ((1, 1, 2), (1, 1, 4))
    assert geometry.stride == (1, 1, 2)
    assert geometry.origin == (0, 0, 1)
    assert geometry.input_size == (1, 1, 9)
    assert geometry.output_size == (1, 1, 4)


def test_as_3d_of_3d_is_itself():
    geometry = resolve((5, 6, 7), (1, 3, 5), ((1, 2, 3),))
    assert geometry.as_3d == geometry


def test_an_empty_axis_is_no_error():
    assert resolve((0, 5), (3, 3), (2,)).output_size == (0, 5)


@settings(max_examples=100)
@given(problem=problems())
def test_nothing_is_read_farther_than_the_farthest(problem):
    assume(conv_size(problem) is not None)
    geometry = resolve(**problem)
    for axis, origin in enumerate(geometry.origin):
        reach = max(dilation[axis] for dilation in geometry.dilations) * (geometry.kernel_size[axis] // 2)
        last = origin + geometry.stride[axis] * (geometry.output_size[axis] - 1)
        assert max(-(origin - reach), last + reach, geometry.input_size[axis] - 1) <= geometry.farthest


def test_tiles_are_those_of_the_problem_that_it_stands_for():
    geometry = dataclasses.replace(resolve((9,), (3,), (2,), stride=2, padding=1), tile_sizes=((90,), (45,)))
    assert geometry.as_3d.tile_sizes == ((1, 1, 90), (1, 1, 45))
    tiled = geometry.tiled
    assert (tiled.input_size, tiled.output_size, tiled.tile_sizes) == ((90,), (45,), None)
    assert tiled.tiled is tiled


def test_lists_are_as_good_as_tuples():
    assert resolve([9, 8], [3, 5], [1, [2, 3]], [1, 2], [1, 2]) == resolve((9, 8), (3, 5), (1, (2, 3)), (1, 2), (1, 2))


@pytest.mark.parametrize("stride", [True, 1.0])
def test_what_is_equal_to_an_int_is_not_taken_for_one_that_came_before(stride):
    resolve((9,), (3,), (1,), 1, 0)
    with pytest.raises(TypeError, match="stride must "):
        resolve((9,), (3,), (1,), stride, 0)
