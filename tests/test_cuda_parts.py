"""How calls of the CUDA backend are cut: parts and slabs, their memory and launches, the self-check's few blocks."""

import ctypes
import itertools
from dataclasses import replace

import pytest
import torch
from helpers import ptx
from helpers.cuda_emulation import H100, KILOBYTE, judge_tf32

from autofocus_kernels import autofocus_conv, self_check, testing
from autofocus_kernels.backends.cuda import backend as cuda
from autofocus_kernels.backends.interface import Gradients
from autofocus_kernels.call import Call
from autofocus_kernels.testing import Case, call_of, evaluate, make_tensors


@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_number_of_multiprocessors_changes_only_how_sums_split(device, mode):
    case = Case("three_tiles", (3, 4, 5), channels=9, out_channels=6, batch=3, dilations=(1, 2), mode=mode)
    tensors = make_tensors(case, torch.float16)
    for multiprocessors, order in ((1, 0), (2, 1), (200, 2)):
        device(multiprocessors=multiprocessors, order=order)
        results = evaluate(lambda **call: autofocus_conv(**call, backend="cuda"), case, tensors)
        testing.judge(results, case, tensors, label=str(multiprocessors))


# Two samples of four classes, four tiles each: one block that runs at a time takes them as eight parts, many as one.
# Origins of -1 and 1: classes of the output read others of the input.
IN_PARTS = Case("in_parts", (4, 5, 26), 9, 3, batch=2, dilations=((2, 2, 1), (4, 4, 2)), padding=(3, 1, 1))
ONE_BLOCK, MANY = ((44 * KILOBYTE, 90), 1), (H100, 200)


@pytest.mark.parametrize(
    "mode, dtype, capability",
    [("branch", torch.bfloat16, 90), ("plain", torch.float32, 90), ("plain", torch.bfloat16, 80)],
    ids=str,
)
def test_parts_change_only_how_sums_split(library, tf32, mode, dtype, capability):
    case = replace(IN_PARTS, mode=mode)
    tensors = make_tensors(case, dtype)
    results, packed = [], []
    for gpu, multiprocessors in (ONE_BLOCK, MANY):
        tf32((gpu[0], capability), multiprocessors=multiprocessors)
        results.append(evaluate(lambda **call: autofocus_conv(**call, backend="cuda"), case, tensors))
        packed.append(library.autofocus_emulation_launches(b"pack"))
    assert packed == [3 * 8, 3]  # forward, the gradient of the input, the other gradients
    for name in ("output", "input", "attention"):
        assert torch.equal(results[0][name], results[1][name]), name
    judge_tf32(results[0], case, tensors) if dtype == torch.float32 else testing.judge(results[0], case, tensors)


def test_a_part_of_a_forward_has_four_rounds(library, device):
    """Of eight classes with two tiles each, one block takes two at a time in a forward, and each by itself backward."""
    gpu, multiprocessors = ONE_BLOCK
    device(gpu, multiprocessors=multiprocessors)
    case = replace(IN_PARTS, size=(4, 5, 10))
    tensors = make_tensors(case, torch.bfloat16)
    call = call_of(case, tensors)
    with ptx.NoLaunches(library):
        cuda.forward(call, torch.empty_like(tensors.grad_output))
        assert library.autofocus_emulation_launches(b"pack") == 4
        cuda.backward(call, tensors.grad_output, Gradients(torch.empty_like(call.input), None, None, None))
        assert library.autofocus_emulation_launches(b"pack") == 4 + 8


def test_parts_of_branches_change_no_bit(library, device):
    tensors = make_tensors(IN_PARTS, torch.bfloat16)
    call = call_of(IN_PARTS, tensors)._replace(bias=None)
    coefficients = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    results = []
    for gpu, multiprocessors in (ONE_BLOCK, MANY):
        device(gpu, multiprocessors=multiprocessors)
        branches = tensors.grad_output.new_full((2, *tensors.grad_output.shape), torch.nan)
        cuda.branch_statistics(call, branches, None, None)
        results.append((branches.clone(), torch.empty_like(tensors.input)))
        cuda.branch_norm_backward(
            call, tensors.grad_output, branches, *coefficients, branches, results[-1][1], torch.empty_like(call.weight)
        )
        assert library.autofocus_emulation_launches(b"pack") == (2 if gpu == H100 else 2 * 8)
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("padding", [3, -12], ids=["padded", "cropped"])
def test_slabs_change_no_bit(library, device, padding):
    """No class nor sample to be cut by: one block at a time takes four tiles as four slabs, many take them at once.

    Nobody reads the first slab of what is cropped.
    """
    case = Case("slabs", (32, 3, 4), channels=9, out_channels=8, dilations=(1, 2, 3, 4), padding=(padding, 3, 4))
    tensors = make_tensors(case, torch.bfloat16)
    allocated = ctypes.c_int64.in_dll(library, "autofocus_emulation_allocated")
    results, launches, taken = [], [], []
    for multiprocessors in (1, 200):
        device(multiprocessors=multiprocessors)
        results.append(torch.full_like(tensors.input, torch.nan))
        before = allocated.value
        cuda.backward(call_of(case, tensors), tensors.grad_output, Gradients(results[-1], None, None, None))
        launches.append(library.autofocus_emulation_launches(b"fast_grad_input"))
        taken.append(allocated.value - before)
    assert launches == [4, 1] and torch.equal(*results)
    weight = 2 * 3 * 10 * 8 * 16  # of two eights of input channels, 3 tz and 10 taps: packed points
    planes = tensors.grad_output.shape[2]
    most = min(8 + 1 + 2 * 4, planes)  # a slab and its halo, of the output's planes
    assert taken[0] - weight <= (taken[1] - weight) * most / planes + 256


def test_a_part_takes_its_share_of_memory(library, device):
    allocated = ctypes.c_int64.in_dll(library, "autofocus_emulation_allocated")
    case = replace(IN_PARTS, channels=32)
    tensors = make_tensors(case, torch.bfloat16)
    call = call_of(case, tensors)
    taken = []
    for gpu, multiprocessors in (ONE_BLOCK, MANY):
        device(gpu, multiprocessors=multiprocessors)
        before = allocated.value
        cuda.forward(call, torch.empty_like(tensors.grad_output))
        taken.append(allocated.value - before)
    weight = 3 * 10 * 16 * 16 * 4  # of 3 tz, 10 taps, 16 output channels: packed points of 4 chunks
    assert taken[0] - weight < (taken[1] - weight) / 7


# Peak of a backward: output, gradients and scratch memory, as a part of 7.2 times the input, which is what the naive
# layer was measured to take (benchmarks/NOTES.md). Channels on either side, size, and the dilations.
PEAKS = {
    "64^3": (Case("peak", (64,) * 3, 32, 32, dilations=(2, 6, 10, 14)), 0.44),
    "128^3": (Case("peak", (128,) * 3, 32, 32, dilations=(2, 6, 10, 14)), 0.44),
    "48^3": (Case("peak", (48,) * 3, 64, 64, dilations=(2, 6, 10, 14)), 0.44),
    "96^3": (Case("peak", (96,) * 3, 64, 64, dilations=(2, 6, 10, 14)), 0.44),
    "2 x 71^3": (Case("peak", (71,) * 3, 30, 30, batch=2, dilations=(2, 6, 10, 14)), 0.38),
    "2D": (Case("peak", (128,) * 2, 64, 64, batch=4, dilations=(2, 6, 10, 14)), 0.44),
    "no common factor": (Case("peak", (64,) * 3, 32, 32, dilations=(1, 2, 3, 4)), 0.60),
}


@pytest.mark.parametrize("case, share", PEAKS.values(), ids=PEAKS.keys())
def test_peak_memory_on_a_large_gpu(library, device, case, share):
    """By the plans of an H100; its kernels do nothing here."""
    device(multiprocessors=132)
    N, C, O, K = case.batch, case.channels, case.out_channels, case.num_branches

    def volume(channels):
        return torch.empty(N, channels, *case.size, dtype=torch.bfloat16)

    input, attention, output = volume(C), volume(K), volume(O)
    call = Call(input, torch.empty(O, C, *case.kernel, dtype=input.dtype), attention, *(None,) * 3, case.geometry, None)
    gradients = [torch.empty_like(tensor) for tensor in call[:3]]
    allocated = ctypes.c_int64.in_dll(library, "autofocus_emulation_allocated")
    before = allocated.value
    with ptx.NoLaunches(library):
        cuda.backward(call, output, Gradients(*gradients, None))
    held = sum(tensor.nbytes for tensor in (output, *gradients))
    assert held + allocated.value - before < share * 7.2 * input.nbytes


# Nine tiles of one class and few planes: nothing to cut a_k G by but its branches.
FLAT = Case("flat", (3, 20, 18), channels=5, out_channels=9, dilations=(1, 2, 3, 4))


@pytest.mark.parametrize(
    "dilations, mode, dtype",
    [
        ((1, 2, 3, 4), "plain", torch.float32),
        ((1, 2, 3, 4), "branch", torch.bfloat16),
        ((3, 2, 1), "plain", torch.bfloat16),
        ((1, 2, 3, 4, 5, 6), "plain", torch.float16),
    ],
    ids=str,
)
def test_branches_of_the_gradient_of_the_input_in_pairs(library, tf32, dilations, mode, dtype):
    case = replace(FLAT, dilations=dilations, mode=mode)
    tensors = make_tensors(case, dtype)
    launches = []
    for multiprocessors in (1, 200):
        tf32(multiprocessors=multiprocessors)
        results = evaluate(lambda **call: autofocus_conv(**call, backend="cuda"), case, tensors)
        launches.append(library.autofocus_emulation_launches(b"fast_grad_input"))
        judge_tf32(results, case, tensors) if dtype == torch.float32 else testing.judge(results, case, tensors)
    assert launches == [(len(dilations) + 1) // 2, (len(dilations) + 3) // 4]


@pytest.mark.parametrize(
    "size, dilations, launches", [((13, 13, 13), (1, 2, 6, 6), 2 * 2), ((7, 20, 20), (1, 2, 3), 2)], ids=str
)
def test_pairs_of_branches_have_the_lattices_of_all(library, device, size, dilations, launches):
    """By themselves two rates of 6 would be 216 classes of at most 27 points, a tile each, and a rate of 3 would be 27.

    Of eight tiles there are two slabs.
    """
    device(multiprocessors=1)
    case = replace(FLAT, size=size, dilations=dilations)
    tensors = make_tensors(case, torch.bfloat16)
    testing.judge(evaluate(lambda **call: autofocus_conv(**call, backend="cuda"), case, tensors), case, tensors)
    assert library.autofocus_emulation_launches(b"fast_grad_input") == launches


def test_pairs_of_branches_take_no_more_memory_than_the_other_passes(library, device):
    case = replace(FLAT, channels=12)
    tensors = make_tensors(case, torch.bfloat16)
    call = call_of(case, tensors)
    device(multiprocessors=1)
    allocated = ctypes.c_int64.in_dll(library, "autofocus_emulation_allocated")

    def taken(*wanted):
        before = allocated.value
        gradients = [torch.empty_like(t) if name in wanted else None for name, t in zip(Gradients._fields, call)]
        cuda.backward(call, tensors.grad_output, Gradients(*gradients))
        return allocated.value - before

    chunk, weight = 16 * 3 * 20 * 18, 2 * 3 * 10 * 16 * 16  # of input and grad_output, two chunks each
    assert taken("input") == taken("attention") == taken("input", "attention") == 4 * chunk + weight


# As many bytes as the gradient of the input: floats of three blocks.
PARTIAL_SUMS = 3 * 4 * 16 * 8 * 27
SUMS_FIT = Case("sums_fit", (9, 16, 18), channels=8, out_channels=8, dilations=(1, 2))


def test_partial_sums_lie_in_the_gradient_of_the_input_where_it_has_no_gaps(library, device):
    """What lies in a gap belongs to others."""
    tensors = make_tensors(SUMS_FIT, torch.bfloat16)
    call = call_of(SUMS_FIT, tensors)
    expected = evaluate(lambda **call: autofocus_conv(**call, backend="cuda"), SUMS_FIT, tensors)
    allocated = ctypes.c_int64.in_dll(library, "autofocus_emulation_allocated")
    taken = []
    for channels, first in ((8, 0), (9, 0), (8, 1)):  # the last is not aligned for floats
        around = torch.full((channels * 9 * 16 * 18 + first,), torch.nan, dtype=torch.bfloat16)
        around = around[first:].view(1, *SUMS_FIT.size, channels).movedim(-1, 1)
        gradients = Gradients(around[:, :8], torch.full_like(call.weight, torch.nan), None, None)
        before = allocated.value
        cuda.backward(call, tensors.grad_output, gradients)
        taken.append(allocated.value - before)
        assert torch.equal(gradients.input, expected["input"]) and torch.equal(gradients.weight, expected["weight"])
        assert around[:, 8:].isnan().all()
    assert taken[1] - taken[0] == taken[2] - taken[0] == PARTIAL_SUMS


def test_partial_sums_of_later_slices_leave_the_gradient_of_the_input(device):
    case = replace(SUMS_FIT, dilations=(1, 2, 1, 2, 3))
    tensors = make_tensors(case, torch.bfloat16)
    testing.judge(evaluate(lambda **call: autofocus_conv(**call, backend="cuda"), case, tensors), case, tensors)


def peak_of(function, *arguments):
    """Of torch's own memory, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*arguments)
    held = itertools.accumulate(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(held)


def test_slices_of_branches_use_the_same_memory(device):
    """One after the other: eight branches are two slices of four."""

    def peaks(dilations):
        case = Case("slices", (4, 9, 9), channels=8, out_channels=8, dilations=dilations)
        tensors = make_tensors(case, torch.bfloat16)
        call = call_of(case, tensors)
        gradients = Gradients(*map(torch.empty_like, call[:3]), None)
        yield peak_of(cuda.forward, call, torch.empty_like(tensors.grad_output))
        yield peak_of(cuda.backward, call, tensors.grad_output, gradients)

    assert list(peaks((1, 2, 3, 4) * 2)) == list(peaks((1, 2, 3, 4)))


@pytest.mark.parametrize("name", ["64^3", "48^3", "2D", "no common factor"])
def test_the_self_check_has_blocks_go_from_tile_to_tile(library, device, name):
    """A large GPU has a block for every tile of so small a problem; asked for few, it launches as a small one would."""
    case, _ = PEAKS[name]
    geometry = self_check._small(case.geometry, case.channels, case.out_channels, tiles_by_volume=False)

    def grids(multiprocessors, few_blocks):
        device(multiprocessors=multiprocessors)
        case_of_check = replace(case, size=geometry.input_size, batch=self_check.BATCH)
        tensors = make_tensors(case_of_check, torch.bfloat16)
        call = call_of(case_of_check, tensors)
        call = call._replace(geometry=replace(call.geometry, few_blocks=few_blocks))
        with ptx.NoLaunches(library) as launches:
            cuda.forward(call, torch.empty_like(tensors.grad_output))
            cuda.backward(call, tensors.grad_output, Gradients(*map(torch.empty_like, call[:3]), None))
        return launches.grids

    assert geometry.few_blocks
    few, many = grids(132, few_blocks=True), grids(132, few_blocks=False)
    assert few == grids(3, few_blocks=False)
    forward = 1  # behind the first packing
    assert few[forward][0] <= 6 and many[forward][0] >= 16 and len(few) > len(many)


@pytest.mark.parametrize(
    "mode, forward, backward",
    [
        ("plain", 2, 6),  # pack and forward; twice pack, three gradients, the weight's partial sums
        ("branch", 2, 9),  # the weight's pass for each of three branches, and the sums of the scale
    ],
)
def test_a_pass_packs_once_into_one_piece_of_memory(library, device, mode, forward, backward):
    case = Case("packing", (5, 4, 9), channels=9, out_channels=3, dilations=(1, 2, 6), mode=mode)
    tensors = make_tensors(case, torch.float16)
    call = call_of(case, tensors)
    allocations = ctypes.c_int.in_dll(library, "autofocus_emulation_allocations")

    def cost(function, *arguments):
        device()  # counts anew
        before = allocations.value
        function(*arguments)
        return library.autofocus_emulation_launches(None), allocations.value - before

    like = [tensors.input, tensors.weight, tensors.attention, tensors.branch_scale]
    gradients = Gradients(*[None if tensor is None else torch.empty_like(tensor) for tensor in like])
    assert cost(cuda.forward, call, torch.empty_like(tensors.grad_output)) == (forward, 1)
    assert cost(cuda.backward, call, tensors.grad_output, gradients) == (backward, 1)
    branches = tensors.grad_output.new_empty((3, *tensors.grad_output.shape))
    alone = call._replace(bias=None, branch_scale=None, branch_shift=None)
    assert cost(cuda.branch_statistics, alone, branches, None, None) == (1 + 3, 1)
