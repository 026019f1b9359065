"""That the emulation of tests/cuda_host shows what would go wrong on a GPU, and agrees with the probes about one."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from helpers.cuda_emulation import COMPILER, EMULATION, HALVES, ROOT, probe


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
        ("write_behind_scratch", "wrote behind the call's scratch memory"),
        ("misaligned_access", "an access that is not aligned, at"),
        ("misaligned_copy", "an asynchronous copy is not aligned"),
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
