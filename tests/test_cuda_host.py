"""The CUDA kernels, executed on the CPU.

csrc/cuda and csrc/binding/cuda.cpp are compiled for the host against tests/cuda_host, which runs the threads of a block
as fibers and emulates barriers, asynchronous copies and the tensor cores' instructions. So the operators
``torch.ops.autofocus_cuda`` here take CPU tensors, and every line of index arithmetic, packing, staging and summation
is the one a GPU gets. Not tested: what the emulation replaces (csrc/cuda/device.h), speed, and real memory ordering.

Here are the passes of both tiers. How calls are cut, batch-normalised branches, refusals, lattices and the emulation
itself have files of their own, tests/test_cuda_*.py.
"""

import itertools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.cuda_emulation import A100, H100, HALVES, KILOBYTE, ROOT, RTX_5090, judge_tf32, refusals

from autofocus_kernels import autofocus_conv, reference, testing
from autofocus_kernels.backends.cuda import PASSES
from autofocus_kernels.backends.cuda import backend as cuda
from autofocus_kernels.backends.interface import Gradients
from autofocus_kernels.testing import CASES, Case, call_of, evaluate, make_tensors

SLOW = ("channels_130_to_65", "channels_16_to_140", "channels_32_to_32", "many_rows")  # float64 is enough
ROUNDED = (torch.float32, *HALVES)  # in turn: a kernel is one template


@pytest.mark.parametrize("case", CASES, ids=str)
def test_simple_tier(simple_tier, case):
    others = () if case.name in SLOW else (ROUNDED[CASES.index(case) % len(ROUNDED)],)
    for dtype in (torch.float64, *others):
        testing.check("cuda", case, dtype)


@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_positions_of_the_simple_tier_split_among_blocks(simple_tier, device, mode):
    """1045 positions are two blocks', which none of the cases above has with three multiprocessors: of 522 and 523."""
    device(multiprocessors=200)
    case = Case("splits", (5, 11, 19), channels=3, out_channels=2, kernel_size=(1, 1, 3), dilations=(1, 2), mode=mode)
    testing.check("cuda", case, torch.float64)


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


def among_others(tensor):
    """One like it in memory that is NaN: channels lie side by side, and behind them those of somebody else."""
    N, C, *size = tensor.shape
    return tensor.new_full((N + 1, *size, 16), torch.nan).movedim(-1, 1)[:N, :C]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "tf32"])
def test_channels_of_others_are_neither_read_nor_written(tf32, tier, dtype):
    """Positions are 16 bytes apart or more, so what is loaded or stored at once could reach beyond the last channel."""
    case = Case("among_others", (3, 5, 9), channels=9, out_channels=11, batch=2, dilations=(1, 2, 3))
    tensors = make_tensors(case, dtype)
    held = [*tensors[:3], tensors.grad_output]  # input, weight, attention

    def compute(like):
        *read, grad_output = [like(tensor).copy_(tensor) for tensor in held]
        *gradients, output = written = [like(tensor) for tensor in held]
        call = call_of(case, tensors._replace(**dict(zip(tensors._fields, read))))
        cuda.forward(call, output)
        cuda.backward(call, grad_output, Gradients(*gradients, None))
        return written

    for result, expected in zip(compute(among_others), compute(torch.empty_like)):
        assert torch.equal(result, expected)
        assert result._base.isnan().sum() == result._base.numel() - result.numel()


def test_samples_that_begin_at_any_element(device):
    """Only the positions of a sample lie at multiples of 16 bytes: the second sample's points are not loaded whole."""
    case = Case("samples", (3, 4, 5), channels=8, out_channels=8, batch=2, dilations=(1, 2), layout="channels_last")
    tensors = make_tensors(case, torch.bfloat16)
    memory = torch.full((2, 3 * 4 * 5 * 8 + 1), torch.nan, dtype=torch.bfloat16)
    apart = memory[:, :-1].unflatten(1, (3, 4, 5, 8)).movedim(-1, 1).copy_(tensors.input)
    outputs = [torch.empty_like(tensors.grad_output) for _ in range(2)]
    for input, output in zip((tensors.input, apart), outputs):
        cuda.forward(call_of(case, tensors)._replace(input=input), output)
    assert torch.equal(*outputs)


# Every tensor ends at the end of a page, if its bytes are a multiple of 64.
IN_GUARDED_MEMORY = """
import os, sys
import torch
from autofocus_kernels import testing
from autofocus_kernels.backends.cuda import backend as cuda
from autofocus_kernels.backends.interface import Gradients
torch.ops.load_library(sys.argv[1])
cuda.device_type, cuda.unavailable, cuda.checked = "cpu", lambda: None, False
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.backends.cudnn.conv.fp32_precision = "tf32"
assert torch.empty(16).isnan().all(), "memory is not guarded"
case = testing.Case("pages", (2, 4, 8), 12, 20, dilations=(1, 2, 1, 2), mode="branch")
tensors = testing.make_tensors(case)
assert all(tensor.nbytes % 64 == 0 for tensor in tensors if tensor is not None)
call = testing.call_of(case, tensors)
vectors = [tensors.branch_scale] * 3
for tier in ("simple", "fast"):
    os.environ["AUTOFOCUS_CUDA_TIER"] = tier
    for own in (call, call._replace(branch_scale=None)):
        output = torch.empty_like(tensors.grad_output)
        cuda.forward(own, output)
        gradients = [None if tensor is None else torch.empty_like(tensor) for tensor in (*own[:3], own.branch_scale)]
        cuda.backward(own, tensors.grad_output, Gradients(*gradients))
    own = own._replace(branch_shift=None)
    branches = torch.empty(4, *tensors.grad_output.shape)
    cuda.branch_statistics(own, branches, *map(torch.empty_like, vectors[:2]))
    cuda.branch_reduce(own, tensors.grad_output, branches, *vectors, gradients[2], *map(torch.empty_like, vectors[:2]))
    cuda.branch_combine(own, branches, *vectors[:2], output)
    cuda.branch_norm_backward(own, tensors.grad_output, branches, *vectors, branches, *gradients[:2])
"""


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="guarded_memory.c replaces the allocator of Linux, and must be compiled",
)
def test_no_pass_goes_past_the_end_of_a_tensor(library, tmp_path):
    """Not even to read what it then drops; other tests compare the results."""
    guard = tmp_path / "guarded_memory.so"
    source = ROOT / "tests" / "helpers" / "guarded_memory.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", guard, source], check=True)
    command = [sys.executable, "-c", IN_GUARDED_MEMORY, library._name]
    result = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(guard)}, capture_output=True, text=True)
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr}"


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
