"""torch.ops.autofocus_cpu itself: wrong direct calls raise, each instruction set is right."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from autofocus_kernels import autofocus_conv, reference, testing
from autofocus_kernels.backends import native
from autofocus_kernels.testing import Case

pytestmark = pytest.mark.skipif(
    native.unavailable("cpu") is not None, reason=f"the cpu library is unavailable: {native.unavailable('cpu')}"
)


def forward_arguments(mode="plain"):
    case = Case("direct", (3, 4, 5), channels=2, out_channels=3, dilations=(1, 2), mode=mode)
    tensors = testing.make_tensors(case)
    return {
        **dict(zip(tensors._fields[:6], tensors[:6])),
        "output": torch.empty(1, 3, 3, 4, 5),
        "dilations": [1, 1, 1, 2, 2, 2],
        "stride": [1, 1, 1],
        "origin": [0, 0, 0],
    }


def backward_arguments(mode="plain"):
    arguments = forward_arguments(mode)
    del arguments["output"]
    return {
        "grad_output": torch.ones(1, 3, 3, 4, 5),
        **arguments,
        "grad_input": torch.empty(1, 2, 3, 4, 5),
        "grad_weight": torch.empty(3, 2, 3, 3, 3),
        "grad_attention": torch.empty(1, 2, 3, 4, 5),
        "grad_branch_scale": torch.empty(2, 3) if mode == "branch" else None,
    }


CALLS = {"forward": forward_arguments, "backward": backward_arguments}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_the_schema_says_what_is_written(name, mode):
    getattr(torch.ops.autofocus_cpu, name)(**CALLS[name](mode))
    opcheck(getattr(torch.ops.autofocus_cpu, name).default, (), CALLS[name](mode), test_utils="test_schema")


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


WRONG = [
    # ranks and shapes
    {"input": zeros(2, 3, 4, 5)},
    {"input": zeros(1, 7, 3, 4, 5)},
    {"input": zeros(2, 2, 3, 4, 5)},
    {"weight": zeros(3, 2, 3, 3)},
    {"weight": zeros(3, 2, 2, 3, 3)},
    {"weight": zeros(4, 2, 3, 3, 3)},
    {"attention": zeros(1, 3, 3, 4, 5)},
    {"attention": zeros(1, 2, 3, 4, 9)},
    {"attention": zeros(1, 2, 60)},
    {"bias": zeros(2)},
    {"bias": zeros(3, 1)},
    {"bias": None, "branch_scale": zeros(3, 2)},
    {"bias": None, "branch_shift": zeros(6)},
    # strides, and what excludes each other
    {"bias": zeros(6)[::2]},
    {"bias": None, "branch_scale": zeros(3, 2).t()},
    {"branch_scale": zeros(2, 3)},
    {"branch_shift": zeros(2, 3)},
    # nothing there
    {"input": zeros(0, 2, 3, 4, 5), "attention": zeros(0, 2, 3, 4, 5)},
    {"weight": zeros(3, 0, 3, 3, 3), "input": zeros(1, 0, 3, 4, 5)},
    # dtypes and devices
    {"input": zeros(1, 2, 3, 4, 5, dtype=torch.int32)},
    {"input": zeros(1, 2, 3, 4, 5, dtype=torch.float64)},
    {"weight": zeros(3, 2, 3, 3, 3, dtype=torch.bfloat16)},
    {"attention": zeros(1, 2, 3, 4, 5, dtype=torch.float16)},
    {"bias": zeros(3, dtype=torch.float64)},
    # integers
    {"dilations": [1, 1, 1]},
    {"dilations": [1, 1, 1, 2, 2]},
    {"dilations": []},
    {"dilations": [1] * 99, "attention": zeros(1, 33, 3, 4, 5)},
    {"dilations": [1, 1, 1, 0, 2, 2]},
    {"dilations": [1, 1, 1, -2, 2, 2]},
    {"stride": [1, 1]},
    {"stride": [0, 1, 1]},
    {"stride": [-1, 1, 1]},
    {"stride": []},
    {"stride": [1, 1, 1, 1]},
    {"origin": [0, 0]},
    {"origin": []},
]
WRONG_FORWARD = WRONG + [
    {"output": zeros(1, 3, 3, 4, 4)},
    {"output": zeros(1, 3, 60)},
    {"output": zeros(1, 3, 3, 4, 5, dtype=torch.float64)},
]
WRONG_BACKWARD = WRONG + [
    {"grad_output": zeros(1, 3, 3, 4, 4)},
    {"grad_output": zeros(1, 3, 3, 4, 5, dtype=torch.float64)},
    {"grad_input": zeros(1, 2, 3, 4, 4)},
    {"grad_weight": zeros(3, 2, 3, 3)},
    {"grad_attention": zeros(1, 2, 3, 4, 5, dtype=torch.float64)},
    {"grad_branch_scale": zeros(3, 2)},
]


@pytest.mark.parametrize(
    "name, changes",
    [("forward", changes) for changes in WRONG_FORWARD] + [("backward", changes) for changes in WRONG_BACKWARD],
)
def test_a_wrong_call_raises(name, changes):
    with pytest.raises(RuntimeError):
        getattr(torch.ops.autofocus_cpu, name)(**{**CALLS[name](), **changes})


VECTORS = ("scale", "shift")
WRONG_BRANCHES = [
    {"branches": zeros(2, 1, 3, 4, 5)},
    {"branches": zeros(2, 0, 3, 4, 5, 6), "attention": zeros(0, 2, 4, 5, 6), "output": zeros(0, 3, 4, 5, 6)},
    {"branches": zeros(33, 1, 3, 4, 5, 6), "attention": zeros(1, 33, 4, 5, 6), **dict.fromkeys(VECTORS, zeros(33, 3))},
    {"attention": zeros(1, 2, 4, 5, 7)},
    {"output": zeros(1, 3, 4, 5, 7)},
    {"output": zeros(1, 3, 4, 5, 6, dtype=torch.float64)},
    {"scale": zeros(2, 3, dtype=torch.float64)},
    {"scale": zeros(3, 2)},
    {"shift": zeros(3, 2).t()},
]


@pytest.mark.parametrize("changes", WRONG_BRANCHES)
def test_a_wrong_call_on_branches_raises(changes):
    arguments = {
        "branches": zeros(2, 1, 3, 4, 5, 6),
        "attention": zeros(1, 2, 4, 5, 6),
        **dict.fromkeys(VECTORS, zeros(2, 3)),
        "output": zeros(1, 3, 4, 5, 6),
    }
    torch.ops.autofocus_cpu.branch_combine(**arguments)
    with pytest.raises(RuntimeError):
        torch.ops.autofocus_cpu.branch_combine(**{**arguments, **changes})


TOO_LARGE = [
    (
        "weight must end within 281474976710656 voxels",
        {"weight": zeros(3, 2, 7, 3, 3), "dilations": [1, 1, 1, 2**47, 1, 1]},
    ),
    ("must have at most 281474976710656 elements", {"input": zeros(1).expand(1, 2, 2**24, 2**24, 5)}),
    ("must have at most 281474976710656 elements", {"weight": zeros(1).expand(2**44, 2, 3, 3, 3)}),
    ("dilations must be at least 1 and at most 281474976710656", {"dilations": [1] * 5 + [2**48 + 1]}),
    ("stride must be at least 1 and at most 281474976710656", {"stride": [1, 1, 2**48 + 1]}),
    ("origin must be at least -281474976710656 and at most 281474976710656", {"origin": [0, 0, -(2**48) - 1]}),
]


@pytest.mark.parametrize(("message", "changes"), TOO_LARGE)
def test_what_would_overflow_raises(message, changes):
    with pytest.raises(RuntimeError, match=message) as caught:
        torch.ops.autofocus_cpu.forward(**{**forward_arguments(), **changes})
    assert " csrc/binding/checks.h:" in str(caught.value)  # and not where it was built


def test_memory_that_there_is_not_is_named():
    """Four voxels are read, but a lattice is packed whole: more than a process can address, whoever overcommits."""
    volume = zeros(1).expand(1, 2, 2**46)
    arguments = {"dilations": (1,), "stride": 2**44, "padding": 0, "backend": "cpu"}
    attention = torch.ones(1, 1, 4)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory: \d+ bytes"):
        autofocus_conv(volume, torch.ones(1, 2, 1), attention, **arguments)


def test_memory_that_threads_cannot_have_is_named():
    """As above, of the gradient of the weight: each thread packs the lattices that it computes."""
    volume, weight = zeros(1, 1, 1, 1, 1).expand(1, 1, 1, 1, 2**46), torch.ones(1, 1, 1, 1, 1)
    attention = torch.ones(1, 1, 1, 1, 4)
    call = (volume, weight, attention, None, None, None, [1, 1, 1], [1, 1, 2**44], [0, 0, 0], "cpu")
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory: \d+ bytes"):
        torch.ops.autofocus.backward(attention, *call, [False, True, False, False, False, False])


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_on_another_device_raises(name):
    arguments = CALLS[name]()
    with pytest.raises(RuntimeError):
        getattr(torch.ops.autofocus_cpu, name)(**{**arguments, "weight": arguments["weight"].to("meta")})


@pytest.mark.parametrize("origin", [-(2**31), 2**31 - 1, 2**48, -(2**48)])
@pytest.mark.parametrize("name", CALLS)
def test_an_origin_far_outside_reads_zeros_or_raises(name, origin):
    arguments = {**CALLS[name](), "origin": [origin, 0, 0]}
    try:
        getattr(torch.ops.autofocus_cpu, name)(**arguments)
    except RuntimeError:
        return
    if name == "forward":
        bias = arguments["bias"].view(1, 3, 1, 1, 1)
        torch.testing.assert_close(arguments["output"], bias * arguments["attention"].sum(1, keepdim=True))


@pytest.mark.parametrize("factor", [1.0, 0.7, -3.0, 2.0**-9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype, factor):
    """The product of two of them is exact in float32, so the one rounding of the result is all there is to see."""
    input = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, -1)
    weight, attention = torch.full((1, 1, 1), factor, dtype=dtype), torch.ones_like(input)
    exact = input.float() * weight.float()
    expected = exact.to(dtype)
    output = autofocus_conv(input, weight, attention, dilations=(1,), backend="cpu")
    if dtype == torch.bfloat16:  # AMX and AVX512_BF16 take subnormal numbers for zero, and make none
        smallest = torch.finfo(dtype).smallest_normal
        flushed = ((input.abs() < smallest) | (exact.abs() < smallest)) & (output == 0)
        expected = torch.where(flushed, 0, expected)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


def test_flushing_subnormal_floats_leaves_those_of_float16():
    """As in torch's own conversions: they are normal numbers of float32, in which all is computed."""
    input = torch.arange(2**10).to(torch.int16).view(torch.float16).view(1, 1, -1)
    weight, attention = torch.ones(1, 1, 1, dtype=torch.float16), torch.ones_like(input)
    torch.set_flush_denormal(True)
    try:
        output = autofocus_conv(input, weight, attention, dilations=(1,), backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(output, input, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("branches", [1, 2, 3, 4, 5, 7, 32])
def test_any_number_of_channels(branches, dtype):
    """Small integers, exact in every dtype: none may be lost, swapped or rounded before the output is."""

    generator = torch.Generator().manual_seed(branches)

    def integers(*shape):
        return torch.randint(-3, 4, shape, dtype=dtype, generator=generator)

    for channels in (*range(1, 68), 80, 81, 96, 97, 127, 128, 129, 200):
        input, weight = integers(1, channels, 1, 19), torch.eye(channels, dtype=dtype)
        weight = torch.stack([weight, -weight, 2 * weight], -1)[:, :, None]
        attention = integers(1, branches, 1, 19)
        dilations = tuple((1, k % 18 + 1) for k in range(branches))  # every one reads inside at either end
        output = autofocus_conv(input, weight, attention, dilations=dilations, backend="cpu")
        expected = reference.autofocus_conv(input.double(), weight.double(), attention.double(), dilations=dilations)
        assert torch.equal(output, expected.to(dtype)), channels


@pytest.mark.parametrize("channels", [16, 32, 48])  # half a block, a whole one, both
def test_a_blend_of_bfloat16_is_rounded_to_the_nearest(channels):
    """A product with the identity shows it as it is; cut off instead, it would pass every tolerance."""
    generator = torch.Generator().manual_seed(0)
    input, attention = (torch.randn(1, c, 99, generator=generator).bfloat16() for c in (channels, 1))
    weight = torch.eye(channels, dtype=torch.bfloat16)[:, :, None]
    output = autofocus_conv(input, weight, attention, dilations=(1,), backend="cpu")
    assert torch.equal(output, (input.float() * attention.float()).bfloat16())


def test_what_gives_the_weights_gradient_is_rounded_to_the_nearest():
    """As above: of one voxel, whose gradient is 1, it is the blended input."""
    generator = torch.Generator().manual_seed(0)
    input, attention = (torch.randn(1, c, 1, generator=generator).bfloat16() for c in (99, 1))
    weight = torch.ones(1, 99, 1, dtype=torch.bfloat16, requires_grad=True)
    autofocus_conv(input, weight, attention, dilations=(1,), backend="cpu").sum().backward()
    assert torch.equal(weight.grad, (input.float() * attention.float()).bfloat16())


@pytest.mark.parametrize("dilations", [(1, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("mode", ["plain", "branch"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_over_many_voxels_of_one_sign(layout, mode, dilations):
    """Nothing cancels, and all terms are rounded alike: added one by one in float32, as oneDNN does, 0.2 % is lost."""
    case = Case("one_sign", (512, 512), channels=1, out_channels=2, dilations=dilations, mode=mode, layout=layout)
    tensors = testing.make_tensors(case)
    for tensor in (tensors.input, tensors.attention, tensors.grad_output):
        tensor.fill_(0.1)
    results = testing.evaluate(partial(autofocus_conv, backend="cpu"), case, tensors)
    expected = testing.truth(case, tensors)
    for name in {"weight", "bias", "branch_scale", "branch_shift"} & set(results):
        assert testing.relative_error(results[name], expected[name]) < 3e-5, name


@pytest.mark.parametrize("mode", ["plain", "branch"])
@pytest.mark.parametrize("dilations", [(1, 2), (2, 6)], ids=str)
@pytest.mark.parametrize(("batch", "size"), [(1, 2**20), (2**16, 4)], ids=["long axis", "large batch"])
def test_sums_over_many_tiles_of_one_sign(mode, batch, size, dilations):
    """Tiles, too, may be too many to be added one by one: those of one axis, which no slabs share, or of samples."""
    case = Case("one_sign", (size,), channels=1, out_channels=1, dilations=dilations, mode=mode, batch=batch)
    tensors = testing.make_tensors(case)
    for tensor in (tensors.input, tensors.attention, tensors.grad_output):
        tensor.fill_(0.1)
    results = testing.evaluate(partial(autofocus_conv, backend="cpu"), case, tensors)
    expected = testing.truth(case, tensors)
    for name in {"weight", "branch_scale"} & set(results):
        assert testing.relative_error(results[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("argument", ["input", "attention", "grad_output"])
def test_offsets_are_64_bit(argument):
    """Channels 2^31 elements apart. The pages between them are never touched, so this needs little memory."""
    case = Case("far", (5, 6), channels=2, out_channels=2, dilations=(1, 2))
    tensors = testing.make_tensors(case, torch.float16)
    near = getattr(tensors, argument)
    step = 2**31 + 64
    far = torch.empty(step + 64, dtype=near.dtype).as_strided(near.shape, (2 * step, step, 6, 1)).copy_(near)
    tensors = tensors._replace(**{argument: far})
    testing.judge(testing.evaluate(partial(autofocus_conv, backend="cpu"), case, tensors), case, tensors)


# ------------------------------------------------------------------ instruction sets, memory

EACH_CASE = """
import os
import sys
from functools import partial
import torch
from autofocus_kernels import autofocus_conv, reference, testing
from autofocus_kernels.backends import native

assert native.unavailable("cpu") is None
torch.set_num_threads(1)
if "LD_PRELOAD" in os.environ:
    assert torch.empty(16).isnan().all(), "memory is not guarded"
print(torch.ops.autofocus_cpu.isa(), torch.ops.autofocus_cpu.bfloat16_products())
failures = []
for case in testing.CASES:
    for dtype in (getattr(torch, name) for name in sys.argv[1:]):
        try:
            testing.check("cpu", case, dtype)
        except AssertionError as error:
            failures.append(str(error))
# Channels that are whole vectors, where the last chunk that a product sums over is not; slabs of a last group of few.
testing.check("cpu", testing.Case("chunks", (3, 4), channels=160, layout="channels_last"))
testing.check("cpu", testing.Case("groups", (64, 33), channels=40, dilations=(1, 2)))
# Tiles of 54 voxels, for which AMX reads and writes 64 rows.
testing.check("cpu", testing.Case("tile", (108,), channels=64, out_channels=128), torch.bfloat16)
# Volumes that repeat memory along an axis: each repetition ends where the tensor does, not the last one only.
case = testing.Case("repeated", (4, 4, 4), channels=1, batch=2)
for axis in (0, 2, 3):
    tensors = testing.make_tensors(case)
    once = tensors.input.narrow(axis, 0, 1).clone()
    tensors = tensors._replace(input=once.expand(tensors.input.shape))
    testing.judge(testing.evaluate(partial(autofocus_conv, backend="cpu"), case, tensors), case, tensors)
sys.exit("\\n".join(failures) or 0)
"""


def run_each_case(dtypes=("float32", "float64", "bfloat16", "float16"), **environment):
    """The instruction set that a fresh process checked every case with, and what multiplied bfloat16."""
    result = subprocess.run(
        [sys.executable, "-c", EACH_CASE, *dtypes], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr}"
    return result.stdout.strip()


# What this CPU could use and does not: what it uses, tests/test_backends.py runs with every case.
LESSER = {"generic": (), "avx2": ("generic",), "avx512": ("generic", "avx2")}


@pytest.mark.parametrize("isa", LESSER[torch.ops.autofocus_cpu.isa()] if native.unavailable("cpu") is None else ())
def test_every_case_on_a_lesser_cpu(isa):
    assert run_each_case(AUTOFOCUS_CPU_ISA=isa) == f"{isa} float32"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux says which instructions a CPU has")
def test_bfloat16_is_multiplied_by_what_the_cpu_has():
    """A product that its check at the first use finds wrong is not used: this is where that shows."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    wide = torch.ops.autofocus_cpu.isa() == "avx512" and "avx512_bf16" in flags
    expected = ("AMX" if "amx_bf16" in flags else "AVX512_BF16") if wide else "float32"
    assert torch.ops.autofocus_cpu.bfloat16_products() == expected


def test_an_unknown_instruction_set_is_named():
    result = subprocess.run(
        [sys.executable, "-m", "autofocus_kernels"],
        env={**os.environ, "AUTOFOCUS_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("cpu kernels")]
    assert "every call fails" in line and "AUTOFOCUS_CPU_ISA must be avx512, avx2 or generic, got sse9" in line


needs_preload = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="what is preloaded replaces functions of Linux, and must be compiled",
)


def compiled(library, source):
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


def guarded_memory(tmp_path):
    return compiled(tmp_path / "guarded_memory.so", Path(__file__).parent / "helpers" / "guarded_memory.c")


@needs_preload
def test_every_case_in_guarded_memory(tmp_path):
    """No kernel uses memory it has not written, or reads or writes past the end of scratch or tensors."""
    used = f"{torch.ops.autofocus_cpu.isa()} {torch.ops.autofocus_cpu.bfloat16_products()}"
    assert run_each_case(LD_PRELOAD=guarded_memory(tmp_path)) == used


# As a Linux that knows no AMX: arch_prctl(ARCH_REQ_XCOMP_PERM) fails.
NO_AMX = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/syscall.h>

long syscall(long number, long a, long b, long c, long d, long e, long f) {
  if (number == SYS_arch_prctl && a == 0x1023) {
    errno = EINVAL;
    return -1;
  }
  return ((long (*)(long, ...))dlsym(RTLD_NEXT, "syscall"))(number, a, b, c, d, e, f);
}
"""


@needs_preload
@pytest.mark.skipif(
    native.unavailable("cpu") is not None or torch.ops.autofocus_cpu.bfloat16_products() != "AMX",
    reason="the other products of bfloat16 are those that all tests here use",
)
def test_every_case_without_amx_in_guarded_memory(tmp_path):
    """A CPU that has AMX never takes AVX512_BF16 otherwise, whose tiles are not rounded up to whole ones."""
    source = tmp_path / "no_amx.c"
    source.write_text(NO_AMX)
    preloaded = f"{guarded_memory(tmp_path)}:{compiled(tmp_path / 'no_amx.so', source)}"
    assert run_each_case(["bfloat16"], LD_PRELOAD=preloaded) == "avx512 AVX512_BF16"
