"""Batch-normalised branches of the CUDA backend, over the emulation of tests/cuda_host."""

import pytest
import torch
from helpers import plain_norms as layers
from helpers import ptx
from helpers.cuda_emulation import A100, H100, HALVES, RTX_5090, refusals

from autofocus_kernels import reference, testing, tolerance
from autofocus_kernels.backends.cuda import backend as cuda
from autofocus_kernels.backends.reference import backend as definition
from autofocus_kernels.call import Call
from autofocus_kernels.testing import Case, call_of, make_tensors


@pytest.fixture
def no_reference(monkeypatch):
    """The reference computes no part of a layer with batch-normalised branches."""
    for name in ("branch_statistics", "branch_combine", "branch_reduce", "branch_norm_backward"):
        monkeypatch.setattr(definition, name, None)


NORM_CASES = tuple(
    case
    for case in layers.CASES
    if case.name
    in (
        "3d",
        "2d",
        "1d",
        "normal_gate",
        "valid",
        "stride",
        "dilation_beyond_volume",
        "one_branch",
        "kernel_1",
        "one_channel",
        "channels_last",
        "channels_last_2d",
        "transposed",
        "sliced",
        "expanded",
    )
)


@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_training_step_with_branch_norm_in_float64(device, no_reference, case):
    """Outputs, all gradients and running statistics of a whole layer."""
    tensors = make_tensors(case, torch.float64)
    for save_branches in (False, True):
        results, expected = layers.run_both(case, tensors, layers.make_norms(case), "cuda", save_branches=save_branches)
        layers.assert_same(results, expected)


# 3x3x3 with several tiles, chunks and blocks of channels. A slot for every plane, and rings.
@pytest.mark.parametrize(
    "gpu, dtype, save_branches, case",
    [
        (H100, torch.float16, False, Case("tiles", (9, 5, 10), channels=3, out_channels=9, dilations=(1, 2))),
        (H100, torch.bfloat16, True, Case("channels", (3, 4, 5), 35, 4, dilations=(1, 2), layout="channels_last")),
        (A100, torch.bfloat16, False, Case("valid", (9, 8, 6), 3, 4, batch=2, padding="valid", dilations=(1, 2, 3))),
        (RTX_5090, torch.float16, True, Case("rates", (4, 3, 6), 3, 9, dilations=(2, 6, 10, 14), layout="sliced")),
        (H100, torch.float16, True, Case("six", (4, 3, 6), 3, 9, dilations=(1, 2, 3, 4, 5, 6))),
    ],
    ids=["tiles", "channels", "valid", "papers_rates", "six_branches"],
)
def test_training_step_with_branch_norm_in_16_bits(library, device, no_reference, gpu, dtype, save_branches, case):
    device(gpu)
    layers.check_rounding(case, "cuda", dtype, save_branches)
    launches = {
        name: library.autofocus_emulation_launches(name.encode())
        for name in (
            "fast_branch",
            "fast_grad_input",
            "fast_weight_partial",
            "simple_forward",
            "simple_grad_input",
            "simple_weight_partial",
        )
    }
    branches = case.num_branches
    assert list(launches.values()) == [branches * (1 if save_branches else 2), -(-branches // 4), branches, 0, 0, 0], (
        launches
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_training_step_with_branch_norm_of_the_simple_tier(simple_tier, no_reference, dtype):
    case = Case("simple", (5, 6, 7), channels=5, out_channels=19, batch=2)
    layers.check_rounding(case, "cuda", dtype, save_branches=False)


def branch_tensors(dtype, K=3, N=2, O=11, size=(3, 19, 13), channels_last=False, seed=0):
    """Values for the functions of existing branches: these, gate and gradient of awkward strides, vectors by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    branches = normal(K * N, O, *size)
    if channels_last:
        branches = branches.to(memory_format=torch.channels_last_3d)
    attention = normal(K, *size, 1).permute(4, 0, 1, 2, 3).expand(N, K, *size)
    grad_output = normal(size[0], O, size[2], N, size[1]).permute(3, 1, 0, 4, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = {name: normal(K, O, dtype=wide) for name in ("mean", "scale", "shift", "b_coef")}
    return branches.unflatten(0, (K, N)), attention, grad_output, vectors


def assert_rounded_once(result, exact):
    """In 16 bits ``result`` is ``exact`` rounded, but for sums in float32 that fell on the other side of a midpoint."""
    assert testing.relative_error(result, exact) < 2 * torch.finfo(result.dtype).eps
    if result.dtype in HALVES:
        assert (result == exact.to(result.dtype)).double().mean() > 0.97


ATTENTION_ONLY = Case("attention_only", (3, 19, 13))


def call_with(attention, case=ATTENTION_ONLY, **tensors):
    """A call of which only the attention (and what is named) is read."""
    return call_of(case, make_tensors(case))._replace(attention=attention, bias=None, **tensors)


def moments(values):
    """Mean and variance of existing branches: those of a kernel of one voxel, whose weight lets channels pass."""
    K, N, O, *size = values.shape
    case = Case("moments", tuple(size), O, O, batch=N, kernel_size=1, dilations=(1,) * K, bias=False)
    weight = torch.eye(O, dtype=values.dtype).view(O, O, 1, 1, 1)
    assert K == 1
    call = Call(values[0], weight, None, None, None, None, case.geometry, None)
    mean, var = (torch.full((K, O), torch.nan, dtype=values.dtype) for _ in range(2))
    branches = torch.full_like(values, torch.nan)
    cuda.branch_statistics(call, branches, mean, var)
    assert torch.equal(branches, values)
    return mean, var


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_functions_of_branches(device, dtype, channels_last):
    """Against the definition in float64 on the same values, block sums split and not."""
    branches, attention, grad_output, vectors = branch_tensors(dtype, channels_last=channels_last)
    exact = [tensor.double() for tensor in (branches, attention, grad_output)]
    wide = {name: vector.double() for name, vector in vectors.items()}
    limit = 1e-13 if dtype == torch.float64 else 2e-6
    call, exact_call = call_with(attention), call_with(exact[1])

    for multiprocessors in (1, 20):
        device(multiprocessors=multiprocessors)
        sums = torch.full((2, *vectors["mean"].shape), torch.nan, dtype=vectors["mean"].dtype)
        grad_attention = torch.full_like(attention.contiguous(), torch.nan)
        given = [vectors["mean"], vectors["scale"], vectors["shift"]]
        cuda.branch_reduce(call, grad_output, branches, *given, grad_attention, *sums)
        expected = torch.empty_like(sums, dtype=torch.float64), torch.empty_like(exact[1].contiguous())
        definition.branch_reduce(
            exact_call, exact[2], exact[0], wide["mean"], wide["scale"], wide["shift"], expected[1], *expected[0]
        )
        assert testing.relative_error(sums, expected[0]) < limit
        alone = torch.full_like(sums, torch.nan)
        cuda.branch_reduce(call, grad_output, branches, *given, None, *alone)
        assert torch.equal(alone, sums)
        assert_rounded_once(grad_attention, expected[1])

    output = torch.full_like(grad_output, torch.nan)
    cuda.branch_combine(call, branches, vectors["scale"], vectors["shift"], output)
    expected = torch.empty_like(exact[2])
    definition.branch_combine(exact_call, exact[0], wide["scale"], wide["shift"], expected)
    assert_rounded_once(output, expected)


@pytest.mark.parametrize("multiprocessors", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_statistics_are_those_of_the_branches(device, dtype, multiprocessors):
    device(multiprocessors=multiprocessors)
    case = Case("statistics", (5, 11, 13), channels=4, out_channels=11, batch=2, dilations=(1, 2, 3))
    tensors = make_tensors(case, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = (torch.full((3, 11), torch.nan, dtype=wide) for _ in range(2))
    branches = tensors.grad_output.new_full((3, *tensors.grad_output.shape), torch.nan)
    cuda.branch_statistics(call_of(case, tensors)._replace(bias=None), branches, mean, var)
    expected = torch.var_mean(branches.double(), (1, 3, 4, 5), correction=0)
    limit = 1e-13 if dtype == torch.float64 else 2e-6
    assert testing.relative_error(var, expected[0]) < limit
    assert testing.relative_error(mean, expected[1]) < limit


@pytest.mark.parametrize("in_place", [False, True], ids=["into_a_buffer", "in_place"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_branches_are_rounded_once(tier, dtype, in_place):
    """Branches are added up in float32: from the buffer's dy_k on, input and weight have one rounding."""
    case = Case("rounding", (5, 6, 9), channels=9, out_channels=11, dilations=(1, 2, 3), batch=2)
    tensors = make_tensors(case, dtype)
    branches, attention, grad_output, vectors = branch_tensors(dtype, size=case.size)
    coefficients = [vectors[name] for name in ("scale", "b_coef", "shift")]
    # A buffer of other strides than the branches have: samples before branches.
    buffer = torch.full_like(branches.transpose(0, 1).contiguous(), torch.nan).transpose(0, 1)
    grad_branches = branches.clone() if in_place else buffer
    grad_input, grad_weight = torch.full_like(tensors.input, torch.nan), torch.full_like(tensors.weight, torch.nan)
    call = call_of(case, tensors)._replace(attention=attention, bias=None)
    held = grad_branches if in_place else branches
    cuda.branch_norm_backward(call, grad_output, held, *coefficients, grad_branches, grad_input, grad_weight)

    a, b, c = (coefficient.double()[:, None, :, None, None, None] for coefficient in coefficients)
    gated = attention.double().transpose(0, 1).unsqueeze(2) * grad_output.double()
    assert_rounded_once(grad_branches, a * gated + b * branches.double() + c)
    expected = [torch.zeros_like(tensors.input).double(), torch.zeros_like(tensors.weight).double()]
    exact = call._replace(input=tensors.input.double(), weight=tensors.weight.double())
    for k, branch in enumerate(grad_branches.double()):
        gradients = reference.branch_gradients(exact, k, branch, True, True)
        expected = [total + gradient for total, gradient in zip(expected, gradients)]
    assert_rounded_once(grad_input, expected[0])
    assert_rounded_once(grad_weight, expected[1])


def test_branches_and_their_gradients_in_tf32(library, tf32):
    case = Case("rounding", (5, 6, 9), channels=5, out_channels=11, dilations=(1, 2, 3), batch=2)
    tensors = make_tensors(case)
    branches, attention, grad_output, vectors = branch_tensors(torch.float32, size=case.size)
    call = call_of(case, tensors)._replace(attention=attention, bias=None)
    exact = call._replace(input=tensors.input.double(), weight=tensors.weight.double())

    def error(result, expected):
        return testing.relative_error(result, expected) / tolerance.TF32_EPS

    tf32(multiprocessors=200)  # all at once, not in parts
    held = torch.full_like(branches, torch.nan)
    cuda.branch_statistics(call, held, None, None)
    assert all(error(*pair) < 0.5 for pair in zip(held, reference.branches(exact)))

    grad_branches = torch.full_like(branches, torch.nan)
    grad_input, grad_weight = torch.full_like(tensors.input, torch.nan), torch.full_like(tensors.weight, torch.nan)
    coefficients = [vectors[name] for name in ("scale", "b_coef", "shift")]
    cuda.branch_norm_backward(call, grad_output, branches, *coefficients, grad_branches, grad_input, grad_weight)
    expected = [0.0, 0.0]
    for k, branch in enumerate(grad_branches.double()):
        gradients = reference.branch_gradients(exact, k, branch, True, True)
        expected = [total + gradient for total, gradient in zip(expected, gradients)]
    assert error(grad_input, expected[0]) < 0.5 and error(grad_weight, expected[1]) < 0.5
    for name, count in (("fast_branch", 3), ("fast_grad_input", 1), ("fast_weight_partial", 3)):
        assert library.autofocus_emulation_launches(name.encode()) == count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_variance_of_branches_far_from_zero(device, dtype):
    """A mean 1000 times the deviation; then also a border, a beginning or a column elsewhere; then no deviation.

    The column is one of 16, where every 16th position would be a sample of about 1024.
    """
    generator = torch.Generator().manual_seed(0)
    around = (1000 + torch.randn(1, 2, 11, 3, 19, 13, generator=generator, dtype=torch.float64)).to(dtype)
    with_border = around.clone()
    with_border[..., 0, :] -= 300
    with_border[..., 0] -= 300
    with_beginning = (1000 + torch.randn(1, 1, 1, 1, 1, 1_200_000, generator=generator, dtype=torch.float64)).to(dtype)
    with_beginning[..., :1300] -= 900
    with_column = (1000 + torch.randn(1, 1, 3, 4, 256, 16, generator=generator, dtype=torch.float64)).to(dtype)
    with_column[..., 0] -= 300
    constant = torch.linspace(1000, 1001, 11, dtype=dtype).view(11, 1, 1, 1).expand_as(around)
    for values in (around, with_border, with_beginning, with_column, constant):
        mean, var = moments(values)
        around_1000 = values.double() - 1000
        offset = around_1000.mean((1, 3, 4, 5), keepdim=True)  # torch.var_mean would be off by 200 roundings
        expected = (around_1000 - offset).square().mean((1, 3, 4, 5))
        eps = torch.finfo(dtype).eps
        assert testing.relative_error(mean, offset.view_as(mean) + 1000) < eps
        assert ((var - expected).abs() <= 5 * eps * expected + eps**2 * 1e6).all() and var.min() >= 0


def test_a_thread_sums_few_positions_in_float32(library, device):
    """However few multiprocessors there are: 2^24 positions are 1024 for each of 128 threads in 128 blocks."""
    device(multiprocessors=1)
    branches = torch.zeros(()).expand(1, 1, 1, 64, 512, 512)
    vector = torch.zeros(1, 1)
    with ptx.NoLaunches(library) as launches:
        cuda.branch_reduce(call_with(branches[0]), branches[0], branches, *[vector] * 3, None, *[vector] * 2)
    assert launches.grids[0] == (128, 1, 1)


@pytest.mark.parametrize("dilations", [(1, 2, 6), (1, 8)], ids=["lattices_of_all", "own_lattices"])
def test_branches_are_rounded_once(device, dilations):
    case = Case("branches", (5, 4, 9), channels=9, out_channels=3, dilations=dilations)
    tensors = make_tensors(case, torch.float16)
    assert (refusals(case)["forward"] is None) == (dilations == (1, 2, 6))
    branches = tensors.grad_output.new_full((len(dilations), *tensors.grad_output.shape), torch.nan)
    call = call_of(case, tensors)._replace(bias=None)
    cuda.branch_statistics(call, branches, None, None)
    exact = call._replace(input=tensors.input.double(), weight=tensors.weight.double())
    for branch, expected in zip(branches, reference.branches(exact)):
        assert_rounded_once(branch, expected)


def test_schedule_changes_no_bit_of_branch_norm(device):
    case = Case("near", (3, 5, 4), channels=3, out_channels=9, batch=2, dilations=(1, 2))
    results = []
    for late, order in ((True, 0), (False, 1)):
        device(H100, late, order)
        results.append(layers.check_rounding(case, "cuda", torch.bfloat16, save_branches=False))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_offsets_beyond_32_bits_between_branches(device):
    branches, attention, grad_output, vectors = branch_tensors(torch.float16, K=2, N=1, O=3, size=(2, 3, 4))
    far = 2**31 + 64
    apart = (
        torch.empty(far + branches[0].numel(), dtype=torch.float16)
        .as_strided(branches.shape, (far, *branches.stride()[1:]))
        .copy_(branches)
    )
    results = []
    for held in (apart, branches):
        sums = torch.empty(2, 2, 3)
        cuda.branch_reduce(call_with(attention), grad_output, held, *[vectors["mean"]] * 3, None, *sums)
        results.append(sums)
    assert torch.equal(*results)


def test_branches_that_begin_at_any_element(device):
    """Only the positions of a branch lie at multiples of 16 bytes: the second branch's points are not loaded whole."""
    case = Case("begin", (3, 4, 5), channels=8, out_channels=8, dilations=(1, 2), layout="channels_last")
    tensors = make_tensors(case, torch.bfloat16)
    branches, _, grad_output, vectors = branch_tensors(torch.bfloat16, K=2, N=1, O=8, size=case.size)
    coefficients = [vectors[name] for name in ("scale", "b_coef", "shift")]
    results = []
    for gap in (0, 1):
        memory = torch.full((2, 3 * 4 * 5 * 8 + gap), torch.nan, dtype=torch.bfloat16)
        grad_branches = memory[:, : 3 * 4 * 5 * 8].unflatten(1, (1, 3, 4, 5, 8)).movedim(-1, 2)
        gradients = [torch.empty_like(tensor) for tensor in (tensors.input, tensors.weight)]
        call = call_of(case, tensors)._replace(bias=None)
        cuda.branch_norm_backward(call, grad_output, branches, *coefficients, grad_branches, *gradients)
        results.append(gradients)
    assert all(map(torch.equal, *results))
