"""The kernels of csrc/cuda/windows as nvcc compiles them, executed on the CPU instruction by instruction.

tests/test_cuda_host.py runs the same sources through another compiler and without the inline PTX of device.h; this is
about what those leave out, so a few small problems are enough: one for every instance of a kernel on Hopper, a few for
the GPUs without warpgroup MMA or without a copy engine. In turn what is asynchronous happens at once or only when it is
waited for.
"""

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from helpers import ptx
from helpers.cuda_emulation import A100, FLAGS, H100, ROOT, RTX_5090, judge_tf32

from autofocus_kernels import autofocus_conv, testing
from autofocus_kernels.testing import Case, evaluate, make_tensors

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

SOURCES = (*sorted((ROOT / "csrc" / "cuda" / "windows").glob("*.cu")), ROOT / "csrc" / "cuda" / "weight_sum.cu")
ARCHITECTURES = {H100: "90a", A100: "80", RTX_5090: "120"}
KINDS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "tf32"}


class Problem(NamedTuple):
    gpu: tuple
    case: Case
    dtype: torch.dtype
    late: bool

    def __str__(self):
        return f"{self.case}-{KINDS[self.dtype]}-sm_{ARCHITECTURES[self.gpu]}"


# Channels that go 16, 32, 40 and 64 at a time, each an instance of the kernels. Three planes: with two, oneDNN's
# gradient of the weight in bfloat16, which judges ours, is made of memory that it never wrote (torch 2.13).
WIDTHS = ((16, 12), (24, 32), (40, 33), (64, 48))
HOPPER = [
    Problem(H100, Case(f"channels_{c}_to_{o}", (3, 2, 5), c, o, dilations=(1, 2)), dtype, late=(i + j) % 2 == 0)
    for i, dtype in enumerate(KINDS)
    for j, (c, o) in enumerate(WIDTHS)
]
PROBLEMS = [
    *HOPPER,
    # Several tiles a block, more than its ring holds, and all parts of a plane.
    Problem(H100, Case("tiles", (9, 10, 17), 3, 5, dilations=(1, 2)), torch.float16, late=True),
    Problem(H100, Case("tiles", (17, 5, 17), 3, 5, dilations=(1, 2)), torch.float32, late=True),
    # The gradient of the input two branches at a time, the second two added to the first (test_cuda_parts.py).
    Problem(H100, Case("pairs", (3, 9, 25), 3, 16, dilations=(1, 2, 3, 4)), torch.bfloat16, late=True),
    Problem(H100, Case("branch", (4, 5, 9), 9, 8, dilations=(2, 6, 10, 14), mode="branch"), torch.bfloat16, late=True),
    Problem(H100, Case("2d", (5, 9), 3, 8, dilations=(1, 2), layout="channels_last"), torch.float32, late=True),
    *(
        Problem(A100, Case("rates", (3, 2, 9), 3, 20, dilations=(2, 6)), dtype, late)
        for dtype, late in zip(KINDS, (True, False, True))
    ),
    Problem(A100, Case("branch", (3, 9), 9, 8, dilations=(1, 2), mode="branch"), torch.float16, late=True),
]
FOR_RELEASES = [
    Problem(RTX_5090, Case("rates", (3, 2, 9), 9, 5, dilations=(2, 6)), dtype, late)
    for dtype, late in zip(KINDS, (True, False, True))
]


class Executed(NamedTuple):
    """What a problem came to."""

    tensors: testing.Tensors
    results: dict | None
    error: RuntimeError | None


class Compiled(NamedTuple):
    """For a GPU."""

    texts: list[str]
    kernels: dict[str, ptx.Kernel]
    launches: ptx.Launches


@pytest.fixture(scope="module")
def compiled(library, tmp_path_factory):
    """A function that compiles the sources for a GPU."""
    folder = tmp_path_factory.mktemp("ptx")

    @functools.cache
    def compiled_for(gpu):
        def compile_one(source):
            target = folder / f"{source.stem}_{ARCHITECTURES[gpu]}.ptx"
            command = ["nvcc", *FLAGS["NVCC"], "-ptx", f"-arch=sm_{ARCHITECTURES[gpu]}", "-o", target, source]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            return target.read_text()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            texts = list(pool.map(compile_one, SOURCES))
        kernels = functools.reduce(dict.__or__, map(ptx.read, texts))
        return Compiled(texts, kernels, ptx.Launches(library, kernels))

    return compiled_for


@pytest.fixture(scope="module")
def outcomes(compiled):
    """A function that runs a problem forward and backward, once for all tests."""

    @functools.cache
    def outcome(problem):
        tensors = make_tensors(problem.case, problem.dtype)
        launches = compiled(problem.gpu).launches
        launches.late = problem.late
        with launches, testing.poisoned_memory():
            try:
                results = evaluate(functools.partial(autofocus_conv, backend="cuda"), problem.case, tensors)
            except RuntimeError as error:
                return Executed(tensors, None, error)
        return Executed(tensors, results, None)

    return outcome


@pytest.fixture
def executed(tf32, outcomes):
    """Runs a problem on its GPU."""

    def execute(problem):
        tf32(problem.gpu)
        return outcomes(problem)

    return execute


def of_a_release(*values):
    return [pytest.param(value, marks=pytest.mark.release) for value in values]


@pytest.mark.parametrize("problem", [*PROBLEMS, *of_a_release(*FOR_RELEASES)], ids=str)
def test_results(executed, problem):
    tensors, results, error = executed(problem)
    if error is not None:
        raise error
    if problem.dtype == torch.float32:
        judge_tf32(results, problem.case, tensors)
    else:
        testing.judge(results, problem.case, tensors)


def test_every_kernel_of_hopper_is_executed(executed, compiled):
    for problem in HOPPER:
        executed(problem)
    _, kernels, launches = compiled(H100)
    of_windows = {name for name in kernels if "_sumI" not in name}
    assert of_windows and not of_windows - launches.launched, of_windows - launches.launched


@pytest.mark.parametrize("gpu", [H100, A100, *of_a_release(RTX_5090)], ids=ARCHITECTURES.get)
def test_all_inline_ptx_is_executed(executed, compiled, gpu):
    """But what is guarded: the end of a wait that takes too long."""
    for problem in [*PROBLEMS, *FOR_RELEASES]:
        if problem.gpu == gpu:
            executed(problem)
    texts, _, launches = compiled(gpu)
    written = set()
    for inline in re.findall(r"// begin inline asm(.*?)// end inline asm", "".join(texts), re.DOTALL):
        written |= set(re.findall(r"(?:^|[\n{;])\s*([a-z]\w*\.[\w.:]+)", inline))
    assert "cvt.rn.bf16.f32" in written  # they are found
    assert not written - launches.executed, written - launches.executed
