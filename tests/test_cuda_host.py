"""The CUDA kernels, executed on the CPU.

csrc/cuda and csrc/binding/cuda.cpp are compiled for the host against tests/cuda_host, which runs the threads of a block
as fibers and emulates barriers, asynchronous copies and the tensor cores' instructions. So the operators
``torch.ops.autofocus_cuda`` here take CPU tensors, and every line of index arithmetic, packing, staging and
summation is the one a GPU gets. Not tested here: what the emulation replaces (csrc/cuda/device.h),
speed, and real memory ordering;
tests/test_cuda_compile.py sees to the machine code.
"""

import ctypes
import itertools
import random
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from helpers import plain_norms as layers
from helpers import ptx
from helpers.cuda_emulation import A100, COMPILER, EMULATION, H100, KILOBYTE, ROOT, RTX_5090, judge_tf32

from autofocus_kernels import autofocus_conv, dispatch, reference, self_check, testing, tolerance
from autofocus_kernels.backends.cuda import PASSES
from autofocus_kernels.backends.cuda import backend as cuda
from autofocus_kernels.backends.interface import Gradients
from autofocus_kernels.backends.reference import backend as definition
from autofocus_kernels.call import Call
from autofocus_kernels.testing import CASES, Case, call_of, evaluate, make_tensors

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def simple_tier(device, monkeypatch):
    monkeypatch.setenv("AUTOFOCUS_CUDA_TIER", "simple")


@pytest.fixture(params=["simple", "fast"])
def tier(device, request, monkeypatch):
    monkeypatch.setenv("AUTOFOCUS_CUDA_TIER", request.param)


def refusals(case, dtype=torch.float16):
    """Pass -> why the fast tier does not take it."""
    call = call_of(case, make_tensors(case, dtype))
    return {name: cuda.fast_refusal(name, call) for name in PASSES}


# ------------------------------------------------------------------ the emulation itself


def probe(function, *arguments):
    message = ctypes.create_string_buffer(400)
    function.restype = ctypes.c_bool
    right = function(*arguments, message, len(message))
    return right, message.value.decode()


def run_fault(library, name):
    result = (ctypes.c_float * 4)()
    right, message = probe(library.autofocus_probe_fault, name.encode(), result)
    return right, message, list(result)


def test_emulation_shows_an_unfinished_copy(library, device):
    device(late_copies=False)
    assert run_fault(library, "unfinished_copy") == (True, "", [1.0, 2.0, 3.0, 4.0])
    device(late_copies=True)
    *_, result = run_fault(library, "unfinished_copy")
    assert all(value != value for value in result)


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_emulation_shows_an_unfinished_bulk_copy(library, device, late):
    device(late_copies=late)
    assert run_fault(library, "bulk_copy") == (True, "", [1.0, 2.0, 3.0, 4.0])
    right, _, result = run_fault(library, "unfinished_bulk_copy")
    assert right and all((value != value) == late for value in result)


def test_emulation_shows_a_missing_barrier(library, device):
    results = []
    for order in (0, 1):
        device(order=order)
        results.append(run_fault(library, "missing_barrier")[2])
    assert results[0] != results[1] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "name, error",
    [
        ("split_barrier", "some threads wait where others never come"),
        ("write_behind", "wrote behind the block's shared memory"),
        ("misaligned_copy", "not aligned"),
        ("unfenced_copy", "without fence_proxies"),
        ("operand_behind", "lies behind the block's shared memory"),
        ("uncommitted_product", "that was not committed"),
        ("lanes_disagree", "different operands"),
        ("unfenced_barrier", "not fenced"),
        ("unfenced_read", "read without fence_proxies"),
        ("misaligned_plane", "no multiple of 128 bytes"),
        ("misaligned_bulk_copy", "multiples of 16 bytes"),
        ("bytes_that_never_come", "some threads wait where others never come"),
        ("arrival_that_never_comes", "some threads wait where others never come"),
        ("second_arrival", "more than one arrival"),
        ("left_under_way", "while bulk copies are under way"),
        ("unrounded_operand", "not rounded to TF32"),
    ],
)
def test_emulation_reports(library, device, name, error):
    right, message, _ = run_fault(library, name)
    assert not right and error in message


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_numbers_round_as_in_torch(library, dtype):
    half = dtype == torch.float16
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    values = torch.empty(65536)
    library.autofocus_probe_decode(
        ctypes.c_bool(half),
        ctypes.c_void_p(patterns.data_ptr()),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_int64(65536),
    )
    torch.testing.assert_close(values, patterns.view(dtype).float(), rtol=0, atol=0, equal_nan=True)

    generator = torch.Generator().manual_seed(0)
    random_bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    finite = values[values.isfinite()].sort().values
    halfway = (finite[1:].double() + finite[:-1].double()).div(2).float()
    numbers = torch.cat(
        [random_bits[~random_bits.isnan()], halfway, torch.tensor([torch.inf, -torch.inf])]
    ).contiguous()
    rounded = torch.empty(len(numbers), dtype=torch.int16)
    library.autofocus_probe_encode(
        ctypes.c_bool(half),
        ctypes.c_void_p(numbers.data_ptr()),
        ctypes.c_void_p(rounded.data_ptr()),
        ctypes.c_int64(len(numbers)),
    )
    assert torch.equal(rounded, numbers.to(dtype).view(torch.int16))


# ------------------------------------------------------------------ lattices


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


# ------------------------------------------------------------------ results


SLOW = (
    "channels_130_to_65",
    "channels_16_to_140",
    "channels_32_to_32",
    "many_rows",
)  # float64 is enough
ROUNDED = (torch.float32, *HALVES)  # in turn: a kernel is one template


@pytest.mark.parametrize("case", CASES, ids=str)
def test_simple_tier(simple_tier, case):
    others = () if case.name in SLOW else (ROUNDED[CASES.index(case) % len(ROUNDED)],)
    for dtype in (torch.float64, *others):
        testing.check("cuda", case, dtype)


# The paper's rates on two lattices instead of eight: halved where that changes no tile.
HALVED = tuple((r // 2, r // 2, r) for r in (2, 6, 10, 14))
FAST_CASES = tuple(
    case
    for case in CASES
    if case.name
    in (
        "3d",
        "no_bias",
        "normal_gate",
        "branch",
        "scale_only",
        "shift_only",
        "valid",
        "padding_per_axis",
        "dilation_per_axis",
        "one_branch",
        "equal_dilations",
        "one_voxel",
        "flat_axes",
        "one_channel",
        "channels_3_to_7",
        "channels_30_to_50",
        "channels_16_to_140",
        "channels_last",
        "channels_last_branch",
        "transposed",
        "sliced",
        "expanded",
        "2d",
        "1d",
        "branch_2d",
        "branch_1d",
        "channels_last_2d",
        "kernel_1",
    )
) + (
    Case("one_tap_in_y", (7, 8, 12), kernel_size=(3, 1, 3), dilations=((1, 40, 2), (2, 1, 3))),
    Case("halved_rates", (8, 8, 17), channels=9, out_channels=17, dilations=HALVED),
    Case("channels_70_to_66", (3, 4, 5), channels=70, out_channels=66, dilations=(1, 2)),
    Case("three_tiles_in_x", (9, 10, 18), channels=4, out_channels=3, dilations=(1, 2)),
    Case("papers_rates_branch", (2, 3, 17), channels=9, out_channels=5, dilations=(2, 6, 10, 14), mode="branch"),
    Case("rates_apart", (10, 9, 24), dilations=((1, 2, 6), (3, 4, 21))),
    Case("rates_in_any_order", (9, 5, 6), channels=9, dilations=(2, 3, 1)),
    # Points that lie in memory whole, and in words; pairs of channels stored, and added to.
    Case("whole_points", (5, 4, 9), channels=16, out_channels=10, dilations=(1, 2), layout="channels_last"),
    Case("pairs", (3, 4, 5), 10, 12, dilations=(1, 2, 3, 4, 2), mode="branch", layout="channels_last"),
    # Slices of four branches, each on lattices of its own.
    Case("five_branches", (5, 6, 9), channels=3, out_channels=9, dilations=(2, 4, 6, 8, 3)),
    Case("six_branches", (6, 5), channels=9, dilations=(1, 2, 3, 4, 5, 5), mode="branch", layout="channels_last"),
    Case("nine_branches", (19,), batch=2, dilations=(1, 2, 3, 4, 5, 6, 7, 7, 14), layout="sliced"),
)


@pytest.mark.parametrize("case, dtype", list(zip(FAST_CASES, itertools.cycle(HALVES))), ids=str)
def test_fast_tier(device, case, dtype):
    assert refusals(case) == dict.fromkeys(PASSES)
    testing.check("cuda", case, dtype)


# Without warpgroup MMA, the A100 without a copy engine too, and with less shared memory: rings, small tiles, narrow
# blocks of channels.
ON_OTHER_GPUS = {
    A100: (
        "3d",
        "branch",
        "valid",
        "dilation_per_axis",
        "flat_axes",
        "one_voxel",
        "1d",
        "branch_2d",
        "channels_30_to_50",
        "halved_rates",
        "papers_rates_branch",
        "rates_apart",
    ),
    RTX_5090: ("branch", "one_channel", "channels_16_to_140", "one_tap_in_y", "halved_rates"),
}


@pytest.mark.parametrize(
    "gpu, case",
    [
        *((gpu, case) for gpu, names in ON_OTHER_GPUS.items() for case in FAST_CASES if case.name in names),
        (A100, Case("channels_90_to_45", (3, 4, 5), channels=90, out_channels=45, dilations=(1, 2))),
    ],
    ids=str,
)
def test_fast_tier_on_other_gpus(device, gpu, case):
    device(gpu)
    assert refusals(case) == dict.fromkeys(PASSES)
    testing.check("cuda", case, torch.bfloat16)


TF32_CASES = {
    H100: (
        "3d",
        "branch",
        "valid",
        "dilation_per_axis",
        "one_channel",
        "channels_30_to_50",
        "2d",
        "1d",
        "transposed",
        "sliced",
        "expanded",
        "papers_rates_branch",
        "whole_points",
        "pairs",
        "six_branches",
    ),
    A100: ("channels_3_to_7", "branch_2d", "one_tap_in_y"),
    RTX_5090: ("channels_16_to_140", "papers_rates_branch"),
}


@pytest.mark.parametrize(
    "gpu, case",
    [
        *((gpu, case) for gpu, names in TF32_CASES.items() for case in FAST_CASES if case.name in names),
        (A100, Case("channels_45_to_50", (3, 4, 5), 45, 50, dilations=(1, 2))),
    ],
    ids=str,
)
def test_fast_tier_in_tf32(tf32, gpu, case):
    tf32(gpu)
    assert refusals(case, torch.float32) == dict.fromkeys(PASSES)
    tensors = make_tensors(case)
    with testing.poisoned_memory():
        results = evaluate(lambda **call: autofocus_conv(**call, backend="cuda"), case, tensors)
    judge_tf32(results, case, tensors)


def test_a_long_sum_of_the_weights_gradient_loses_little(tf32):
    """Tensor cores cut sums off, so one over 8192 products, of numbers of one sign, would lose 3e-4."""
    tf32(multiprocessors=1)
    case = Case("one_sign", (64, 64, 64), 1, 1, dilations=(1, 2), bias=False)
    tensors = make_tensors(case)
    for tensor in (tensors.input, tensors.grad_output):
        tensor.fill_(1355 / 2048)  # TF32 has eleven bits
    tensors.attention.fill_(0.5)
    gradients = Gradients(None, torch.empty_like(tensors.weight), None, None)
    cuda.backward(call_of(case, tensors), tensors.grad_output, gradients)
    expected = testing.truth(case, tensors)["weight"]
    assert testing.relative_error(gradients.weight, expected) < 1e-4


def test_float32_is_exact_where_tf32_is_not_allowed(device):
    case = CASES[0]
    assert set(refusals(case, torch.float32).values()) == {"the dtype is float32 and TF32 is not allowed"}
    testing.check("cuda", case)


# (late_copies, order): threads forwards, backwards and shuffled, with copies that land early and late.
SCHEDULES = ((True, 0), (False, 0), (True, 1), (False, 1), (True, 2))


FEW_SLOTS = (50 * KILOBYTE, 90)  # in the forward 12, for the 14 planes of rates up to 3


@pytest.mark.parametrize(
    "gpu, case",
    [
        # A slot for every plane and more; two tiles and two chunks a block; then fewer slots, with tiles of eight and
        # four planes.
        (H100, Case("near", (9, 5, 4), channels=9, out_channels=3, batch=2, dilations=(1, 2))),
        (H100, Case("near_branch", (9, 5, 4), channels=9, out_channels=3, dilations=(1, 2), mode="branch")),
        (FEW_SLOTS, Case("wide", (9, 3, 4), channels=9, out_channels=3, dilations=(3, 1, 2))),
        (A100, Case("wide", (2, 3, 18), channels=3, out_channels=35, dilations=HALVED)),
        (RTX_5090, Case("wide", (5, 4, 4), channels=9, out_channels=3, dilations=HALVED)),
    ],
    ids=["H100", "H100 branch", "few slots", "A100", "RTX 5090"],
)
def test_schedule_changes_no_bit(device, gpu, case):
    """Whatever runs first, and whenever copies land, every pass gives the same bits; and the right ones."""
    tensors = make_tensors(case, torch.bfloat16)
    first = None
    for late, order in SCHEDULES:
        device(gpu, late, order)
        results = evaluate(lambda **call: autofocus_conv(**call, backend="cuda"), case, tensors)
        first = first or results
        assert all(torch.equal(results[name], first[name]) for name in first), (late, order)
    testing.judge(first, case, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "tf32"])
@pytest.mark.parametrize("gpu", [H100, A100, RTX_5090], ids=["H100", "A100", "RTX 5090"])
def test_a_thread_far_ahead_of_the_others_changes_no_bit(request, gpu, dtype):
    """One block goes through all tiles, and whatever is written for the next one is so as early as it can be."""
    configure = request.getfixturevalue("tf32" if dtype is torch.float32 else "device")
    case = Case("near", (9, 5, 4), channels=3, out_channels=3, batch=2, dilations=(1, 2))
    tensors = make_tensors(case, dtype)
    results = []
    for late, order in ((True, 0), (False, 10), (False, 11), (True, 10)):
        configure(gpu, late, order, multiprocessors=1)
        results.append(evaluate(lambda **call: autofocus_conv(**call, backend="cuda"), case, tensors))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.parametrize("gpu", [H100, RTX_5090], ids=["H100", "RTX 5090"])
def test_schedule_changes_no_bit_in_tf32(tf32, gpu):
    case = Case("near", (9, 5, 4), channels=5, out_channels=35, dilations=(1, 2), mode="branch")
    tensors = make_tensors(case)
    results = []
    for late, order in ((True, 0), (False, 1), (True, 2)):
        tf32(gpu, late, order)
        results.append(evaluate(lambda **call: autofocus_conv(**call, backend="cuda"), case, tensors))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)
    judge_tf32(results[0], case, tensors)


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


def test_slabs_change_no_bit(library, device):
    """No class nor sample to be cut by: one block at a time takes four tiles as four slabs, many take them at once."""
    case = Case("slabs", (32, 3, 4), channels=9, out_channels=8, dilations=(1, 2, 3, 4), padding=(3, 3, 4))
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
    planes = [taken[0] - weight, taken[1] - weight]
    assert planes[0] <= planes[1] * (8 + 1 + 2 * 4) / 30 + 256  # a slab and its halo, of the output's planes


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
    "48^3": (Case("peak", (48,) * 3, 64, 64, dilations=(2, 6, 10, 14)), 0.58),
    "96^3": (Case("peak", (96,) * 3, 64, 64, dilations=(2, 6, 10, 14)), 0.44),
    "2 x 71^3": (Case("peak", (71,) * 3, 30, 30, batch=2, dilations=(2, 6, 10, 14)), 0.38),
    "2D": (Case("peak", (128,) * 2, 64, 64, batch=4, dilations=(2, 6, 10, 14)), 0.58),
    "no common factor": (Case("peak", (64,) * 3, 32, 32, dilations=(1, 2, 3, 4)), 0.63),
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


def test_nan_stays_where_it_is_read(device):
    case = Case("nan", (9, 10, 11), dilations=(2, 4), gate="normal")
    tensors = make_tensors(case, torch.float16)
    tensors.input[0, 1, 4, 5, 6] = torch.nan
    arguments = tensors.arguments()
    expected = reference.autofocus_conv(**arguments, **case.options).isnan()
    output = autofocus_conv(**arguments, **case.options, backend="cuda")
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(output.isnan(), expected)


def test_offsets_beyond_32_bits(tier):
    """Two samples more than 2^31 elements apart, in memory of which only the pages in use exist."""
    case = Case("far_apart", (4, 5, 6), channels=3, out_channels=2, batch=2, dilations=(1, 2))
    tensors = make_tensors(case, torch.float16)
    far = 2**31 + 64

    def stretch(tensor):
        strides = torch.empty(tensor.shape[1:]).stride()
        stretched = torch.empty(far + tensor[0].numel(), dtype=tensor.dtype).as_strided(tensor.shape, (far, *strides))
        return stretched.copy_(tensor)

    output, expected = stretch(tensors.grad_output), torch.empty_like(tensors.grad_output)
    call = call_of(case, tensors)
    cuda.forward(call._replace(input=stretch(tensors.input)), output)
    cuda.forward(call, expected)
    assert torch.equal(output, expected)


# ------------------------------------------------------------------ batch-normalised branches


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
    grad_branches = branches.clone() if in_place else torch.full_like(branches, torch.nan)
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
    """A mean 1000 times the deviation; then also a border, or a beginning, that is elsewhere; then no deviation."""
    generator = torch.Generator().manual_seed(0)
    around = (1000 + torch.randn(1, 2, 11, 3, 19, 13, generator=generator, dtype=torch.float64)).to(dtype)
    with_border = around.clone()
    with_border[..., 0, :] -= 300
    with_border[..., 0] -= 300
    with_beginning = (1000 + torch.randn(1, 1, 1, 1, 1, 1_200_000, generator=generator, dtype=torch.float64)).to(dtype)
    with_beginning[..., :1300] -= 900
    constant = torch.linspace(1000, 1001, 11, dtype=dtype).view(11, 1, 1, 1).expand_as(around)
    for values in (around, with_border, with_beginning, constant):
        mean, var = moments(values)
        around_1000 = values.double() - 1000
        offset = around_1000.mean((1, 3, 4, 5), keepdim=True)  # torch.var_mean would be off by 200 roundings
        expected = (around_1000 - offset).square().mean((1, 3, 4, 5))
        eps = torch.finfo(dtype).eps
        assert testing.relative_error(mean, offset.view_as(mean) + 1000) < eps
        assert ((var - expected).abs() <= 5 * eps * expected + eps**2 * 1e6).all() and var.min() >= 0


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


@pytest.mark.parametrize(
    "change, words",
    [
        ({"branches": torch.zeros(2, 1, 3, 4, 5)}, "branches must have six axes, got 5"),
        ({"branches": torch.zeros(2, 1, 3, 4, 5, 0)}, "branches must not be empty"),
        ({"attention": torch.zeros(1, 3, 4, 5, 6)}, "attention must have size 2 on axis 1, got 3"),
        ({"output": torch.zeros(1, 3, 4, 5, 6, dtype=torch.float16)}, "output must have the dtype of input"),
        ({"scale": torch.zeros(2, 3, dtype=torch.float64)}, "scale must be float32"),
        ({"scale": torch.zeros(3, 2)}, "scale must have size 2 on axis 0, got 3"),
        ({"shift": torch.zeros(3, 2).t()}, "shift must be contiguous"),
    ],
)
def test_wrong_direct_calls_on_branches_are_errors(device, change, words):
    arguments = {
        "branches": torch.zeros(2, 1, 3, 4, 5, 6),
        "attention": torch.zeros(1, 2, 4, 5, 6),
        "scale": torch.zeros(2, 3),
        "shift": torch.zeros(2, 3),
        "output": torch.zeros(1, 3, 4, 5, 6),
    }
    with pytest.raises(RuntimeError, match=words):
        torch.ops.autofocus_cuda.branch_combine(**{**arguments, **change})
    torch.ops.autofocus_cuda.branch_combine(**arguments)


# ------------------------------------------------------------------ what each tier refuses


def test_fast_tier_says_why_not(device):
    size = (8, 8, 8)
    for change, dtype, words in [
        ({}, torch.float64, "dtype"),
        ({}, torch.float32, "TF32 is not allowed"),
        ({"kernel_size": (3, 3, 5)}, torch.float16, "kernel"),
        ({"stride": 2, "padding": 1}, torch.float16, "stride"),
        ({"dilations": (1, 2, 3, 4, 8, 1)}, torch.float16, "further than 7 lattice points"),  # the second slice
        ({"dilations": (1, 8)}, torch.float16, "further than 7 lattice points"),
        ({"dilations": (9, 18)}, torch.float16, "larger than the volume"),
        ({"dilations": ((1, 1, 1), (60, 60, 1))}, torch.float16, "shared memory"),
        ({"dilations": ((1, 1, 1), (1, 125, 1))}, torch.float16, "further than 124 lattice points"),
    ]:
        reasons = refusals(replace(Case("refused", size), **change), dtype)
        assert all(reason and words in reason for reason in reasons.values()), (words, reasons)
    many = refusals(Case("many_channels", (1,), channels=262141, kernel_size=1, dilations=(1,)))
    assert all("too many channels" in reason for reason in many.values())
    many = Case("many_samples", (2, 1, 1), channels=1, kernel_size=1, dilations=(1, 1))
    sample = call_of(many, make_tensors(many, torch.float16))
    samples = sample._replace(input=sample.input.expand(2**30, -1, -1, -1, -1))
    assert "too many samples" in cuda.fast_refusal("forward", samples)
    device((227 * KILOBYTE, 75))
    assert "older" in refusals(Case("taken", size))["forward"]


def test_a_tier_that_is_asked_for_is_a_reason(simple_tier):
    assert set(refusals(CASES[0]).values()) == {"AUTOFOCUS_CUDA_TIER is simple"}


def test_whether_calls_are_fast(device):
    """What dispatch.py asks."""
    case = Case("papers_rates", (17, 18, 19), dilations=(2, 6, 10, 14))
    call = call_of(case, make_tensors(case, torch.float16))
    backward = (call.attention, Gradients(call.input, call.weight, call.attention, None))
    assert cuda.is_fast("forward", call, (call.attention,)) and cuda.is_fast("backward", call, backward)
    device((86 * KILOBYTE, 89))  # too little shared memory for the forward alone
    assert not cuda.is_fast("forward", call, (call.attention,)) and cuda.is_fast("backward", call, backward)


def test_shared_memory_decides_pass_by_pass(device):
    case = Case("papers_rates", (17, 18, 19), dilations=(2, 6, 10, 14))
    for gpu, refused in [(H100, set()), (A100, set()), (RTX_5090, set()), ((86 * KILOBYTE, 89), {"forward"})]:
        device(gpu)
        assert {name for name, reason in refusals(case).items() if reason} == refused


def test_unknown_pass(device):
    call = call_of(CASES[0], make_tensors(CASES[0], torch.float16))
    with pytest.raises(RuntimeError, match="the pass must be forward"):
        cuda.fast_refusal("sideways", call)


def direct_call(**change):
    """torch.ops.autofocus_cuda.forward with some arguments replaced."""
    arguments = {
        "input": torch.zeros(2, 3, 5, 6, 7),
        "weight": torch.zeros(4, 3, 3, 3, 3),
        "attention": torch.zeros(2, 2, 5, 6, 7),
        "bias": None,
        "branch_scale": None,
        "branch_shift": None,
        "output": torch.zeros(2, 4, 5, 6, 7),
        "dilations": [1, 1, 1, 2, 2, 2],
        "stride": [1, 1, 1],
        "origin": [0, 0, 0],
    }
    torch.ops.autofocus_cuda.forward(**{**arguments, **change})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"input": torch.zeros(2, 3, 5, 6)}, "must have five axes"),
        ({"attention": torch.zeros(2, 2, 5, 6)}, "must have five axes"),
        ({"input": torch.zeros(2, 3, 5, 6, 0)}, "must not be empty"),
        ({"input": torch.zeros(2, 2, 5, 6, 7)}, "weight must have size 2 on axis 1, got 3"),
        ({"input": torch.zeros(2, 3, 5, 6, 7, dtype=torch.int32)}, "dtype of input"),
        ({"weight": torch.zeros(4, 3, 3, 3, 2)}, "odd kernel sizes"),
        ({"weight": torch.zeros(4, 3, 3, 3, 3, dtype=torch.float64)}, "weight must have the dtype of input"),
        ({"attention": torch.zeros(1, 2, 5, 6, 7)}, "attention must have size 2 on axis 0, got 1"),
        ({"attention": torch.zeros(2, 3, 5, 6, 7)}, "attention must have size 2 on axis 1, got 3"),
        ({"bias": torch.zeros(5)}, "bias must have size 4 on axis 0, got 5"),
        ({"branch_scale": torch.zeros(4)}, "branch_scale must have 2 axes, got 1"),
        ({"branch_shift": torch.zeros(2, 3)}, "branch_shift must have size 4 on axis 1, got 3"),
        ({"bias": torch.zeros(4), "branch_shift": torch.zeros(2, 4)}, "bias excludes"),
        ({"output": torch.zeros(2, 4, 5, 6, 8)}, "output must have size 7 on axis 4, got 8"),
        ({"dilations": [1, 1, 1, 2, 2]}, "dilations must hold three ints"),
        ({"dilations": [1] * 99}, "dilations must hold three ints for each of 1 to 32 branches, got 99"),
        ({"dilations": [1, 1, 1, 2, 2, 0]}, "dilations must be at least 1"),
        ({"stride": [1, 0, 1]}, "stride must be at least 1"),
        ({"stride": [1, 1]}, "stride must have three ints, got 2"),
        ({"origin": [0, 0, 2**40]}, "origin must be"),
    ],
)
def test_wrong_direct_calls_are_errors(device, change, words):
    with pytest.raises(RuntimeError, match=words):
        direct_call(**change)
    direct_call()


def test_wrong_gradients_are_errors(device):
    tensors = make_tensors(CASES[0], torch.float32)
    gradients = [torch.empty_like(tensors.input), torch.empty_like(tensors.weight), torch.empty_like(tensors.attention)]
    call = (call_of(CASES[0], tensors), tensors.grad_output)
    gradients = Gradients(*gradients, None)
    cuda.backward(*call, gradients)
    for name in ("input", "weight", "attention"):
        wrong = gradients._replace(**{name: getattr(gradients, name)[:, :, :-1]})
        with pytest.raises(RuntimeError, match=f"grad_{name} must have size"):
            cuda.backward(*call, wrong)
    with pytest.raises(RuntimeError, match="grad_branch_scale needs branch_scale"):
        cuda.backward(*call, gradients._replace(branch_scale=torch.empty(3, 5)))


def test_unwanted_gradients_are_left_alone(device):
    """Each gradient alone equals the one computed with the others."""
    for case in (Case("plain", (6, 7, 8)), Case("branch", (6, 7, 8), mode="branch")):
        for dtype in (torch.float64, torch.float16):
            tensors = make_tensors(case, dtype)
            call = (call_of(case, tensors), tensors.grad_output)
            like = [tensors.input, tensors.weight, tensors.attention, tensors.branch_scale]
            together = [None if tensor is None else torch.empty_like(tensor) for tensor in like]
            cuda.backward(*call, Gradients(*together))
            for i, gradient in enumerate(together):
                alone = [torch.empty_like(gradient) if j == i and gradient is not None else None for j in range(4)]
                cuda.backward(*call, Gradients(*alone))
                assert gradient is None or torch.equal(alone[i], gradient)


# ------------------------------------------------------------------ the probes


PROBE_FLAGS = ["-std=c++17", "-O1", "-w", "-fno-strict-aliasing", f"-I{EMULATION}", "-include", "runtime.h"]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """The emulation alone, which every probe is linked with."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("probes") / "cuda_emulation.o"
    subprocess.run([*COMPILER, *PROBE_FLAGS, "-c", EMULATION / "cuda_emulation.cpp", "-o", target], check=True)
    return target


@pytest.mark.parametrize("name", ["shifted_windows", "transposed_windows", "unaligned_ldmatrix", "plane_copies"])
def test_probes_expect_what_the_emulation_does(runtime, tmp_path, name):
    """So that on a GPU a probe that fails is about the GPU."""
    probe = tmp_path / name
    source = ROOT / "benchmarks" / "probes" / f"{name}.cu"
    subprocess.run([*COMPILER, *PROBE_FLAGS, "-x", "c++", source, "-x", "none", runtime, "-o", probe], check=True)
    result = subprocess.run([probe], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines and all(line.startswith("PASS ") for line in lines), result.stdout


# ------------------------------------------------------------------ the backend module


def test_backend_is_unavailable_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cuda.unavailable() == "torch sees no CUDA device"


def test_backend_refuses_cpu_tensors():
    reason = cuda.refusal(call_of(CASES[0], make_tensors(CASES[0])))
    assert reason == "tensors are on cpu, the cuda backend reads memory of the device cuda"


LIMITS = [
    Case("branches", (5,), dilations=(1,) * 33),
    Case("dilation", (1, 3, 1), dilations=((1, 1, 1), (2**31, 1, 1))),
    Case("dilation_of_an_axis_that_is_there", (4, 3), dilations=(1, 2**31)),
    Case("stride", (2, 3, 4), stride=(1, 1, 2**31), padding=1),
    Case("origin", (2, 3, 4), padding=(2**31 + 1, 1, 1), stride=(2**30, 1, 1)),
]


@pytest.mark.parametrize("case", LIMITS, ids=str)
def test_a_call_beyond_the_limits_is_refused_and_not_begun(device, monkeypatch, case):
    """Python refuses what the library would; so another backend takes the call, and its gradients."""
    tensors = make_tensors(case)
    call = call_of(case, tensors)
    assert "the kernels take at most" in cuda.refusal(call)
    with pytest.raises(RuntimeError):
        cuda.forward(call, torch.empty_like(tensors.grad_output))
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("cuda", "reference"))
    testing.judge(evaluate(autofocus_conv, case, tensors), case, tensors)


@pytest.mark.parametrize(
    "case",
    [
        Case("branches", (5,), dilations=(1,) * 32),
        Case("dilation", (1, 3, 1), dilations=((1, 1, 1), (2**31 - 1, 1, 1))),
        Case("stride", (2, 3, 4), stride=(1, 1, 2**31 - 1), padding=1),
        Case("origin", (2, 3, 4), padding=(2**31, 1, 1), stride=(2**30, 1, 1)),
    ],
    ids=str,
)
def test_a_call_at_the_limits_is_taken_and_right(device, case):
    assert cuda.refusal(call_of(case, make_tensors(case))) is None
    testing.check("cuda", case, torch.float32)
