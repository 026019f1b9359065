"""What the CUDA backend and each of its tiers refuse, and what its operators say to wrong arguments."""

from dataclasses import replace

import pytest
import torch
from helpers.cuda_emulation import A100, H100, KILOBYTE, RTX_5090, refusals

from autofocus_kernels import autofocus_conv, dispatch, testing
from autofocus_kernels.backends.cuda import PASSES
from autofocus_kernels.backends.cuda import backend as cuda
from autofocus_kernels.backends.interface import Gradients
from autofocus_kernels.call import Call
from autofocus_kernels.geometry import Geometry
from autofocus_kernels.testing import CASES, Case, call_of, evaluate, make_tensors


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
    device((227 * KILOBYTE, 75))
    assert "older" in refusals(Case("taken", size))["forward"]


def call_of_numbers(
    N=1, C=1, O=1, size=(8, 8, 8), output=None, origin=(0, 0, 0), dilations=((1, 1, 1), (1, 1, 1)), kernel=(3, 3, 3)
):
    """Tensors of any size, in the memory of one element."""
    point = torch.empty(1, 1, 1, 1, 1, dtype=torch.float16)
    geometry = Geometry(kernel, dilations, (1, 1, 1), origin, size, output or size)
    return Call(point.expand(N, C, *size), point.expand(O, C, *kernel), point, None, None, None, geometry, None)


FAR = 2**28  # positions
# What is too large, the same just not, and the reason.
TOO_LARGE = {
    "input channels": ({"C": 262141}, {"C": 262140}, "too many channels"),
    "output channels": ({"O": 262141}, {"O": 262140}, "too many channels"),
    "samples": ({"N": 2**30}, {"N": 2**30 - 1}, "too many samples"),
    "chunks of input": ({"N": 2**26, "C": 128}, {"N": 2**26 - 1, "C": 128}, "too many samples"),
    "chunks of output": ({"N": 2**26, "O": 128}, {"N": 2**26 - 1, "O": 128}, "too many samples"),
    "classes": (
        {"N": 2**28, "dilations": ((2, 2, 2),)},
        {"N": 2**28 - 1, "dilations": ((2, 2, 2),)},
        "too many samples",
    ),
    "input": ({"size": (FAR, 1, 1), "output": (1, 1, 1)}, {"size": (FAR - 1, 1, 1), "output": (1, 1, 1)}, "an axis"),
    "output": ({"size": (1, 1, 1), "output": (1, 1, FAR)}, {"size": (1, 1, 1), "output": (1, 1, FAR - 1)}, "an axis"),
    "origin": ({"origin": (0, FAR, 0)}, {"origin": (0, FAR - 1, 0)}, "its padding"),
    "origin before": ({"origin": (0, -FAR, 0)}, {"origin": (0, 1 - FAR, 0)}, "its padding"),
    "dilation": ({"dilations": ((FAR, 1, 1), (1, 1, 1))}, None, "a dilation is too large"),
    "input points": (
        {"size": (2**11, 2**10, 2**10), "output": (1, 1, 1)},
        {"size": (2**11 - 1, 2**10, 2**10)},
        "points",
    ),
    "output points": ({"size": (1, 1, 1), "output": (2**11, 2**10, 2**10)}, None, "points"),
    "planes": ({"dilations": ((FAR // 2, 1, 1), (1, 1, 1))}, None, "shared memory"),  # their bytes overflow to few
    "rows": (
        {"dilations": ((1, 125, 1), (1, 1, 1)), "kernel": (1, 3, 3)},
        {"dilations": ((1, 124, 1), (1, 1, 1)), "kernel": (1, 3, 3)},
        "further than 124",
    ),
}


@pytest.mark.parametrize("large, taken, words", TOO_LARGE.values(), ids=TOO_LARGE)
def test_fast_tier_says_what_is_too_large(device, large, taken, words):
    for name in PASSES:
        assert words in cuda.fast_refusal(name, call_of_numbers(**large))
        assert taken is None or cuda.fast_refusal(name, call_of_numbers(**taken)) is None


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
