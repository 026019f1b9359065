"""Every backend against float64 truth, forward and each gradient."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autofocus_kernels import autofocus_conv, reference, testing
from autofocus_kernels.backends.interface import Gradients
from autofocus_kernels.dispatch import backend_named
from autofocus_kernels.testing import Case

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_truth(backend, case, dtype):
    testing.check(backend, case, dtype)


# Where loops go round once more than in testing.CASES: past the branches or channels that are taken at a time, the
# parts of a row, the partial sums that there are.
BEYOND = (
    Case("9_branches", (24, 22), dilations=tuple(range(1, 10))),
    Case("9_branches_branch", (24, 22), dilations=tuple(range(1, 10)), mode="branch"),
    Case("32_branches", (7, 6), dilations=tuple(range(1, 33))),
    Case("channels_15", (7, 8), 15, 15, layout="channels_last"),
    Case("channels_15_on_2_lattices", (17, 3, 4), 15, dilations=((2, 1, 1), (4, 2, 2)), layout="channels_last"),
    Case("channels_200", (5, 6), 200),
    Case("channels_60_and_7_taps", (20,), 60, kernel_size=7),
    Case("channels_260_to_300", (4, 3), 260, 300, batch=14, mode="branch"),
    Case("long_row", (300,)),
    Case("long_row_branch", (300,), mode="branch"),
    Case("many_lattices", (16, 16), dilations=(2, 4), batch=40),
    Case("many_lattices_branch", (16, 16), dilations=(2, 4), batch=40, mode="branch"),
    # Slabs of several groups of channels, and of several lattices, along the axis with a common factor.
    Case("slabs_of_channel_groups", (64, 33), 40, dilations=(1, 2)),
    Case("slabs_of_2_lattices", (24, 9, 10), 16, dilations=((2, 1, 1), (4, 3, 2)) * 4, padding=(3, 1, 1)),
    Case("slabs_of_2_lattices_branch", (24, 7, 5), dilations=((2, 1, 1), (4, 3, 2)), padding=(3, 1, 1), mode="branch"),
    Case("slabs_of_3_lattices", (27, 64), 16, dilations=((3, 1), (6, 2)) * 4, padding=(4, 1)),
    Case("slabs_of_3_lattices_branch", (27, 8), dilations=((3, 1), (6, 2)), padding=(4, 1), mode="branch"),
)


@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_truth_beyond_the_usual_sizes(backend, case):
    testing.check(backend, case)


# ------------------------------------------------------------------ drawn geometry


@st.composite
def cases(draw):
    dims = draw(st.integers(1, 3))
    largest = (60, 24, 12)[dims - 1]
    kernel_size = tuple(draw(st.sampled_from((1, 3, 3, 5))) for _ in range(dims))
    # A common factor cuts the problem into sub-lattices.
    factors = tuple(draw(st.sampled_from((1, 1, 2, 3))) for _ in range(dims))
    dilations = tuple(
        tuple(factor * draw(st.integers(1, 5)) for factor in factors) for _ in range(draw(st.integers(1, 5)))
    )
    reach = [min(axis) * (size - 1) // 2 for axis, size in zip(zip(*dilations), kernel_size)]
    padding = tuple(draw(st.integers(-3, r + 2)) for r in reach)
    # At least one output voxel on every axis.
    size = tuple(draw(st.integers(max(1, 2 * (r - p) + 1), largest + 2 * r)) for r, p in zip(reach, padding))
    return Case(
        "drawn",
        size,
        channels=draw(st.sampled_from((1, 2, 3, 7, 8, 16, 17, 33))),
        out_channels=draw(st.sampled_from((1, 2, 5, 8, 16, 20, 33))),
        batch=draw(st.integers(1, 3)),
        kernel_size=kernel_size,
        dilations=dilations,
        stride=tuple(draw(st.sampled_from((1, 1, 2, 3))) for _ in range(dims)),
        padding=padding,
        mode=draw(st.sampled_from(testing.MODES)),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(testing.LAYOUTS)),
    )


@settings(max_examples=120)
@given(case=cases(), dtype=st.sampled_from((torch.float32, torch.float64)))
def check_drawn(backend, case, dtype):
    testing.check(backend, case, dtype)


def test_truth_on_drawn_geometry(backend):
    check_drawn(backend)


# ------------------------------------------------------------------ what the layer means


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_one_hot_attention_is_a_plain_dilated_convolution(backend, dims, chosen):
    dilations = (1, 3, 4)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        3, 4, 3, padding="same", dilation=dilations[chosen], dtype=torch.float64
    )
    input = torch.randn(2, 3, *(9, 6, 7)[:dims], dtype=torch.float64, generator=generator())
    attention = torch.zeros(2, 3, *input.shape[2:], dtype=torch.float64)
    attention[:, chosen] = 1
    output = autofocus_conv(input, conv.weight, attention, conv.bias, dilations=dilations, backend=backend)
    torch.testing.assert_close(output, conv(input), rtol=0, atol=1e-14)


def test_an_impulse_shows_the_taps(backend):
    """One voxel of ones answers at its dilated neighbours with the mirrored weight times the gate there."""
    dilations = (2, 3)
    input = torch.zeros(1, 1, 11, 13)
    input[0, 0, 5, 6] = 1
    weight = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    attention = torch.tensor([1.0, 100.0]).view(1, 2, 1, 1).expand(1, 2, 11, 13)
    output = autofocus_conv(input, weight, attention, dilations=dilations, backend=backend)
    expected = torch.zeros(11, 13)
    for gate, r in zip((1, 100), dilations):
        for i, j in itertools.product((-1, 0, 1), repeat=2):
            expected[5 - r * i, 6 - r * j] += gate * weight[0, 0, i + 1, j + 1]
    assert torch.equal(output[0, 0], expected)


def test_bias_counts_once_for_every_branch_by_its_gate(backend):
    attention = torch.tensor([0.5, 2.0, -1.0]).view(1, 3, 1).expand(1, 3, 4)
    output = autofocus_conv(
        torch.zeros(1, 2, 4),
        torch.ones(2, 2, 3),
        attention,
        torch.tensor([2.0, 4.0]),
        dilations=(1, 2, 3),
        backend=backend,
    )
    assert torch.equal(output, torch.tensor([3.0, 6.0]).view(1, 2, 1).expand(1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_gradients_of_bias_and_shift_are_summed_in_float32(dtype, layout, mode):
    """Of samples that nearly cancel: a sum rounded to 16 bits on the way would be wrong by many times the result."""
    case = Case("cancel", (150, 140), channels=1, out_channels=1, batch=2, layout=layout, mode=mode)
    tensors = testing.make_tensors(case, dtype, requires_grad=True)
    attention, grad_output = tensors.attention.detach(), tensors.grad_output.abs()
    attention[1], grad_output[1] = attention[0], -grad_output[0]
    grad_output[1, :, :20] *= 1.01
    arguments = {**tensors.arguments(), "attention": attention}
    autofocus_conv(**arguments, **case.options).backward(grad_output)

    sums = torch.einsum("nkhw,nohw->ko", attention.double(), grad_output.double())
    gradient, truth = (tensors.bias, sums.sum(0)) if mode == "plain" else (tensors.branch_shift, sums)
    size_of_parts = torch.einsum("nkhw,nohw->ko", attention.double(), grad_output.double().abs()).sum()
    rounding = torch.finfo(dtype).eps * truth.abs() + torch.finfo(torch.float32).eps * size_of_parts
    assert (gradient.grad.double() - truth).abs().le(rounding).all()


def test_one_channel_stays_contiguous(backend):
    """A volume of one channel is in every memory format at once; plain means plain."""
    input, weight, attention = torch.ones(1, 1, 4, 5), torch.ones(3, 1, 3, 3), torch.ones(1, 2, 4, 5)
    assert autofocus_conv(input, weight, attention, dilations=(1, 2), backend=backend).is_contiguous()


def test_unbatched_input_is_a_batch_of_one(backend):
    tensors = testing.make_tensors(Case("unbatched", (5, 6), dilations=(1, 2)))
    options = {"dilations": (1, 2), "backend": backend}
    input, weight, attention, bias, *_ = tensors
    output = autofocus_conv(input[0], weight, attention[0], bias, **options)
    assert torch.equal(output, autofocus_conv(input, weight, attention, bias, **options)[0])


@pytest.mark.parametrize("stride, dilation, kernel_size", [(2, 20, 3), (3, 17, 3), (2, 10, 5)])
def test_conv1d_weight_gradient_in_float32(backend, stride, dilation, kernel_size):
    """torch 2.13 gets float32 weight gradients of strided, dilated conv1d on the CPU wrong by about their norm."""
    case = Case(
        "conv1d",
        (128,),
        batch=3,
        kernel_size=kernel_size,
        stride=stride,
        dilations=(dilation, dilation + 3),
        padding=dilation,
    )
    testing.check(backend, case)


# ------------------------------------------------------------------ nothing there


EMPTY = (
    Case("batch_0", (5, 6), batch=0),
    Case("batch_0_branch", (5, 6), batch=0, mode="branch"),
    Case("axis_0", (5, 0, 4), batch=2),
    Case("axis_0_shift", (0,), mode="shift"),
    Case("all_axes_0", (0, 0, 0)),
)


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_problem_has_an_empty_output_and_zero_gradients(backend, case):
    tensors = testing.make_tensors(case)
    with testing.poisoned_memory():
        results = testing.evaluate(partial(autofocus_conv, backend=backend), case, tensors)
    assert results.pop("output").shape == (case.batch, case.out_channels, *case.size)
    for name, argument in tensors.arguments().items():
        assert torch.equal(results[name], torch.zeros_like(argument)), name


@pytest.mark.parametrize("mode", ["plain", "branch", "scale"])
def test_padding_around_an_empty_axis_gives_the_constant_term(backend, mode):
    """A zero-size axis with padding has output voxels: each is sum_k a_k h_k."""
    case = Case("padded", (0, 4), padding=(3, 1), dilations=(1, 2), mode=mode)
    tensors = testing.make_tensors(case, torch.float64)
    assert 0 not in tensors.grad_output.shape
    with testing.poisoned_memory():
        results = testing.evaluate(partial(autofocus_conv, backend=backend), case, tensors)
    testing.judge(results, case, tensors)


# ------------------------------------------------------------------ repeatable, on any number of threads


def results_of(backend, case, dtype):
    tensors = testing.make_tensors(case, dtype)
    return testing.evaluate(partial(autofocus_conv, backend=backend), case, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["plain", "branch"])
@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_bit_for_bit(backend, mode, dtype, threads):
    torch.set_num_threads(threads)
    case = Case("repeated", (17, 9, 10), 16, 20, batch=2, dilations=(2, 6, 10, 14), mode=mode)
    first, second = (results_of(backend, case, dtype) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


THREADED = (
    Case("threaded", (9, 15, 16), 16, 20, batch=2, dilations=(2, 6, 10)),
    Case("threaded_branch", (9, 15, 16), 16, 20, batch=2, dilations=(2, 6, 10), mode="branch"),
    Case("slabs", (29, 12, 13), 5, 20, dilations=(1, 2, 3)),
    Case("slabs_branch", (29, 12, 13), 5, 20, dilations=(1, 2, 3), mode="branch"),
    Case("slabs_of_two_samples", (13, 60), 5, 33, batch=2, dilations=(1, 2, 3), mode="branch"),
    Case("tiny_samples", (3, 2, 2), 5, 20, batch=37, dilations=(1, 2)),
    # A problem with less to share out than there are threads.
    Case("one_row", (1, 1, 70), 40, 33, dilations=(1, 2)),
    Case("one_voxel", (1, 1), 3, 70, dilations=(1, 2), mode="branch"),
)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_right_on_any_number_of_threads(backend, case, threads):
    torch.set_num_threads(threads)
    testing.check(backend, case)


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_threads_1_and_2_agree(backend, case):
    """Output and the gradients of volumes have one owner each; sums over voxels may be split otherwise."""
    results = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results[threads] = results_of(backend, case, torch.float64)
    for name, expected in results[1].items():
        assert testing.relative_error(results[2][name], expected) < 1e-13, name


# ------------------------------------------------------------------ only the gradients that are wanted


NAMES = ("input", "weight", "attention", "bias", "branch_scale", "branch_shift")


@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_each_subset_of_gradients_equals_the_full_ones(backend, mode):
    case = Case("subsets", (6, 7), mode=mode, dilations=(1, 2))
    tensors = testing.make_tensors(case, torch.float64)
    full = results_of(backend, case, torch.float64)
    names = tuple(tensors.arguments())
    for count in range(1, len(names)):
        for subset in itertools.combinations(names, count):
            arguments = {
                name: tensor.detach().requires_grad_(name in subset) for name, tensor in tensors.arguments().items()
            }
            output = autofocus_conv(**arguments, **case.options, backend=backend)
            output.backward(tensors.grad_output)
            for name, argument in arguments.items():
                if name in subset:
                    assert testing.relative_error(argument.grad, full[name]) < 1e-14, (subset, name)
                else:
                    assert argument.grad is None, (subset, name)


@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_the_kernel_is_asked_for_wanted_gradients_only(backend, mode, monkeypatch):
    case = Case("asked", (6, 7), mode=mode, dilations=(1, 2))
    tensors = testing.make_tensors(case)
    spied, asked = backend_named(backend), []
    kernel = spied.backward

    def spy(call, grad_output, gradients):
        asked.append([gradient is not None for gradient in gradients])
        kernel(call, grad_output, gradients)

    monkeypatch.setattr(spied, "backward", spy)
    of_kernel = Gradients._fields
    for wanted in tensors.arguments():
        asked.clear()
        arguments = {
            name: tensor.detach().requires_grad_(name == wanted) for name, tensor in tensors.arguments().items()
        }
        autofocus_conv(**arguments, **case.options, backend=backend).sum().backward()
        # Bias and shift gradients need no kernel at all.
        assert asked == ([[name == wanted for name in of_kernel]] if wanted in of_kernel else [])


# ------------------------------------------------------------------ NaN and Inf travel as in the reference


def kinds(tensor):
    """0 finite, 1 infinite, 2 NaN."""
    return tensor.isinf().int() + 2 * tensor.isnan().int()


SPREAD = {
    mode: Case("spread", (9, 10, 7), channels=5, out_channels=6, batch=2, dilations=(1, 2, 5), mode=mode)
    for mode in ("plain", "branch")
}
# Voxel (4, 5, 3) of the second sample, and the centre tap, which no output voxel reads from the padding.
PLACES = {
    "input": (1, 2, 4, 5, 3),
    "attention": (1, 1, 4, 5, 3),
    "weight": (3, 2, 1, 1, 1),
    "bias": (3,),
    "branch_scale": (1, 3),
    "branch_shift": (1, 3),
}
INFECTED = [("plain", name) for name in ("input", "attention", "weight", "bias")]
INFECTED += [("branch", name) for name in ("input", "attention", "weight", "branch_scale", "branch_shift")]
each_value = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
# bfloat16 has products of its own on some CPUs.
each_product = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def in_float32(tensors):
    """oneDNN's convolutions in bfloat16 have NaN of their own (torch 2.13), so they say nothing of ours."""
    return type(tensors)(*(None if tensor is None else tensor.float() for tensor in tensors))


@each_value
@each_product
@pytest.mark.parametrize("mode, name", INFECTED)
def test_nan_and_inf_reach_what_they_reach_in_the_reference(backend, mode, name, dtype, value):
    case = SPREAD[mode]
    tensors = testing.make_tensors(case, dtype)
    tensors.arguments()[name][PLACES[name]] = value
    results = testing.evaluate(partial(autofocus_conv, backend=backend), case, tensors)
    expected = testing.evaluate(reference.autofocus_conv, case, in_float32(tensors))
    assert not expected["output"].isfinite().all()
    for quantity in expected:
        assert torch.equal(results[quantity].isfinite(), expected[quantity].isfinite()), quantity


@each_value
@each_product
@pytest.mark.parametrize("mode, name", [pair for pair in INFECTED if pair[1] != "attention"])
def test_inf_stays_inf_in_the_output(backend, mode, name, dtype, value):
    """Not for attention: a blend sums +Inf and -Inf over channels before the weight can part them, so NaN for Inf."""
    tensors = testing.make_tensors(SPREAD[mode], dtype)
    tensors.arguments()[name][PLACES[name]] = value
    output = autofocus_conv(**tensors.arguments(), **SPREAD[mode].options, backend=backend)
    expected = reference.autofocus_conv(**in_float32(tensors).arguments(), **SPREAD[mode].options)
    assert torch.equal(kinds(output), kinds(expected))


@each_product
@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_nan_weight_away_from_the_centre(backend, mode, dtype):
    """NaN wherever a branch reads the tap inside the input, and in that output channel only.

    Where every branch reads it in the padding PyTorch itself disagrees: 0 * NaN in float64, skipped in float32.
    """
    case = SPREAD[mode]
    tensors = testing.make_tensors(case, dtype)
    reads = torch.zeros_like(tensors.weight)
    tensors.weight[3, 2, 0, 1, 2], reads[3, 2, 0, 1, 2] = torch.nan, 1
    ones = torch.ones_like
    inside = reference.autofocus_conv(ones(tensors.input), reads, ones(tensors.attention), **case.options) > 0
    output = autofocus_conv(**tensors.arguments(), **case.options, backend=backend)
    assert inside[:, 3].any() and not inside[:, 3].all()
    assert output[inside].isnan().all()
    assert output[:, [0, 1, 2, 4, 5]].isfinite().all()


@each_product
@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_nan_in_a_gradient_stays_in_its_neighbourhood(backend, mode, dtype):
    case = SPREAD[mode]
    tensors = testing.make_tensors(case, dtype)
    tensors.grad_output[1, 3, 4, 5, 3] = torch.nan
    results = testing.evaluate(partial(autofocus_conv, backend=backend), case, tensors)
    expected = testing.evaluate(reference.autofocus_conv, case, in_float32(tensors))
    for quantity in expected.keys() - {"output"}:
        assert torch.equal(results[quantity].isnan(), expected[quantity].isnan()), quantity


@each_product
@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_nan_reaches_no_gradient_through_a_tap_that_no_output_reads(mode, dtype):
    def random(*shape):
        return torch.randn(shape, generator=generator()).to(dtype)

    def gradients(backend, dtype, input, weight, dilations, stride):
        reach = [min(dilations) * (size - 1) for size in weight.shape[2:]]
        size = [(whole - r - 1) // step + 1 for whole, r, step in zip(input.shape[2:], reach, stride)]
        attention = torch.ones(1, len(dilations), *size, dtype=dtype)
        scale = torch.ones(len(dilations), len(weight), dtype=dtype) if mode == "branch" else None
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (input, weight)]
        output = autofocus_conv(
            *leaves, attention, dilations=dilations, stride=stride, padding="valid", branch_scale=scale, backend=backend
        )
        output.sum().backward()
        return [leaf.grad.float() for leaf in leaves]

    # Of the first and of the last group of output channels.
    first, last = random(17, 2, 3), random(17, 2, 3)
    first[0, 0, 0] = last[16, 0, 0] = torch.nan
    # A stride of two passes over the last voxel, and reads every other row through the last row of taps.
    input, row = random(1, 2, 8), random(3, 2, 3, 3)
    input[..., 7] = row[0, 0, 2, 1] = torch.nan
    for arguments in [
        (random(1, 2, 33), first, (2, 6), (1,)),
        (random(1, 2, 33), last, (2, 6), (1,)),
        (input, random(3, 2, 1), (1, 2), (2,)),
        (random(1, 2, 11, 5), row, (1, 3), (2, 1)),
    ]:
        results, expected = gradients("cpu", dtype, *arguments), gradients("reference", torch.float32, *arguments)
        for result, truth in zip(results, expected):
            torch.testing.assert_close(result, truth, rtol=0.02, atol=0.2, equal_nan=True)


def test_zero_attention_does_not_hide_a_nan(backend):
    """0 * NaN is NaN, as in the reference: a one-hot gate is no mask."""
    input = torch.zeros(1, 1, 9)
    input[0, 0, 0] = torch.nan
    attention = torch.zeros(1, 2, 9)
    attention[:, 0] = 1
    output = autofocus_conv(input, torch.ones(1, 1, 3), attention, dilations=(1, 4), backend=backend)
    assert output[0, 0].isnan().nonzero().flatten().tolist() == [0, 1, 4]


def generator():
    return torch.Generator().manual_seed(0)
