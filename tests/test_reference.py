"""The reference against the nested-loop oracle and against plain PyTorch convolutions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from autofocus_kernels import reference, testing
from autofocus_kernels.testing import Case

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def agree_with_oracle(case):
    tensors = testing.make_tensors(case, torch.float64)
    geometry = case.geometry
    smallest = tuple(min(axis) for axis in zip(*geometry.dilations))
    padding = {"same": tuple(r * (k - 1) // 2 for r, k in zip(smallest, case.kernel)), "valid": 0}.get(
        case.padding, case.padding
    )
    if isinstance(padding, int):
        padding = (padding,) * case.spatial_dims
    expected = oracle.autofocus_conv(
        **{name: tensor.numpy() for name, tensor in tensors.arguments().items()},
        dilations=geometry.dilations,
        stride=geometry.stride,
        padding=padding,
    )
    result = reference.autofocus_conv(**tensors.arguments(), **case.options).numpy()
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-13 * max(1, abs(expected).max()))


@pytest.mark.parametrize(
    "case",
    [
        Case("3d", (3, 4, 5), channels=2, out_channels=3, dilations=(1, 2)),
        Case("2d", (5, 4), channels=2, out_channels=3, dilations=(2, 3, 1)),
        Case("1d", (9,), channels=3, out_channels=2, batch=2, dilations=(1, 4)),
        Case("branch", (5, 6), channels=2, out_channels=3, mode="branch", gate="normal"),
        Case("scale", (5, 6), channels=2, out_channels=3, mode="scale"),
        Case("shift", (5, 6), channels=2, out_channels=3, mode="shift"),
        Case("no bias", (5, 6), channels=2, out_channels=3, bias=False),
        Case("valid", (8, 7), channels=2, out_channels=3, padding="valid", dilations=(2, 3)),
        Case("padding", (8, 7), channels=2, out_channels=3, padding=(3, 1), dilations=(2, 3)),
        Case("stride", (8, 9), channels=2, out_channels=3, padding=(0, 2), stride=(3, 2)),
        Case("dilation per axis", (7, 6), channels=2, out_channels=3, dilations=((1, 3), (2, 1)), padding=1),
        Case("kernel per axis", (3, 4, 6), channels=1, out_channels=2, kernel_size=(1, 3, 5), dilations=(1, 2)),
        Case("kernel 1", (3, 4), channels=2, out_channels=3, kernel_size=1),
        Case("dilation beyond", (2, 3), channels=2, out_channels=3, dilations=(1, 5)),
        Case("one voxel", (1, 1, 1), channels=2, out_channels=3),
        Case("sliced", (4, 5), channels=2, out_channels=3, layout="sliced"),
        Case("channels last", (4, 5), channels=2, out_channels=3, layout="channels_last"),
    ],
    ids=str,
)
def test_oracle(case):
    agree_with_oracle(case)


@st.composite
def tiny_cases(draw):
    dims = draw(st.integers(1, 2))
    size = tuple(draw(st.integers(3, 6)) for _ in range(dims))
    return Case(
        "drawn",
        size,
        channels=draw(st.integers(1, 3)),
        out_channels=draw(st.integers(1, 3)),
        batch=draw(st.integers(1, 2)),
        kernel_size=tuple(draw(st.sampled_from((1, 3, 5))) for _ in range(dims)),
        dilations=tuple(tuple(draw(st.integers(1, 4)) for _ in range(dims)) for _ in range(draw(st.integers(1, 3)))),
        stride=tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        # Enough that no drawn kernel is too large: kernel 5, dilation 4 reaches 8.
        padding=tuple(draw(st.integers(7, 9)) for _ in range(dims)),
        mode=draw(st.sampled_from(testing.MODES)),
        gate=draw(st.sampled_from(("softmax", "normal"))),
    )


@settings(max_examples=25)
@given(case=tiny_cases())
def test_oracle_on_drawn_geometry(case):
    agree_with_oracle(case)


@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_gradients_are_those_of_separate_convolutions(case):
    """Truth's gradients without the package: K calls of F.convNd, padded by hand."""
    tensors = testing.make_tensors(case, torch.float64)

    def separate(input, weight, attention, bias=None, branch_scale=None, branch_shift=None, **_):
        geometry = case.geometry
        total = 0
        for k, dilation in enumerate(geometry.dilations):
            pads = [r * (size - 1) // 2 - o for r, size, o in zip(dilation, geometry.kernel_size, geometry.origin)]
            padded = F.pad(input, [p for pad in reversed(pads) for p in (pad, pad)])
            conv = CONV[case.spatial_dims](padded, weight, bias, geometry.stride, 0, dilation)
            ones = (-1, *(1,) * case.spatial_dims)
            if branch_scale is not None:
                conv = conv * branch_scale[k].view(ones)
            if branch_shift is not None:
                conv = conv + branch_shift[k].view(ones)
            total = total + attention[:, k, None] * conv
        return total

    expected = testing.evaluate(separate, case, tensors)
    results = testing.evaluate(reference.autofocus_conv, case, tensors)
    for name, result in results.items():
        assert testing.relative_error(result, expected[name]) < 1e-13, name


@pytest.mark.parametrize("stride, dilation, kernel_size", [(2, 20, 3), (3, 17, 3), (2, 10, 5)])
def test_conv1d_weight_gradient_in_float32(stride, dilation, kernel_size):
    """torch 2.13 gets float32 weight gradients of strided, dilated conv1d on the CPU wrong by about their norm."""
    case = Case(
        "conv1d",
        (128,),
        channels=4,
        out_channels=5,
        batch=3,
        kernel_size=kernel_size,
        stride=stride,
        dilations=(dilation, dilation + 3),
        padding=dilation,
    )
    tensors = testing.make_tensors(case, torch.float32)
    testing.judge(testing.evaluate(reference.autofocus_conv, case, tensors), case, tensors)


def test_takes_batched_inputs_only():
    with pytest.raises(ValueError, match=r"input must be \[N, C, \*S\]"):
        reference.autofocus_conv(torch.ones(2, 5), torch.ones(3, 2, 3), torch.ones(1, 5), dilations=(1,))
