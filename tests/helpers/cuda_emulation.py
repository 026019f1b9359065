"""The CUDA library built over tests/cuda_host, whose operators take CPU tensors, and the GPUs that it emulates."""

import ctypes
import os
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from autofocus_kernels import testing, tolerance
from autofocus_kernels.backends import native
from autofocus_kernels.backends.cuda import PASSES
from autofocus_kernels.backends.cuda import backend as cuda
from autofocus_kernels.testing import call_of, make_tensors

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "cuda_host"
FLAGS = runpy.run_path(str(ROOT / "csrc" / "flags.py"))
COMPILER = FLAGS["compiler"]()
KILOBYTE = 1024
HALVES = (torch.float16, torch.bfloat16)
# Largest dynamic shared memory of a block and compute capability, by GPU (CUDA C++ programming guide).
A100, H100, RTX_5090 = (163 * KILOBYTE, 80), (227 * KILOBYTE, 90), (99 * KILOBYTE, 120)


def compile_emulation(folder: Path) -> Path:
    torch_folder = Path(torch.__file__).parent
    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-fno-strict-aliasing",
        "-fsanitize=alignment",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-clobbered",
        FLAGS["STABLE_ABI"],
        "-DUSE_CUDA",
        "-DAUTOFOCUS_CUDA_DISPATCH_KEY=CPU",
        f"-I{ROOT / 'csrc'}",
        f"-I{EMULATION}",
        f"-isystem{torch_folder / 'include'}",
    ]
    sources = [
        *(ROOT / "csrc" / "cuda").rglob("*.cu"),
        ROOT / "csrc" / "binding" / "cuda.cpp",
        *EMULATION.glob("*.cpp"),
    ]
    objects = [folder / ("_".join(source.relative_to(ROOT).parts) + ".o") for source in sources]

    def run(command):
        result = subprocess.run([*COMPILER, *map(str, command)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]

    def compile_one(pair):
        source, target = pair
        run([*flags, "-x", "c++", "-c", source, "-o", target])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, zip(sources, objects)))
    library = folder / "cuda_emulation.so"
    # Symbolic: the stubs of tests/cuda_host come before torch's own functions of these names.
    run(["-shared", "-Wl,-Bsymbolic", "-o", library, *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"])
    return library


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C++ compiler")
    if native.unavailable("cuda") is None:
        pytest.skip("the real CUDA library is loaded; it defines the same operators")
    path = compile_emulation(tmp_path_factory.mktemp("cuda_host"))
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@pytest.fixture
def exact_float32():
    """The tolerances are those of float32; tests of TF32 allow it."""
    precision = torch.backends.cudnn.conv
    before = precision.fp32_precision
    precision.fp32_precision = "ieee"
    yield
    precision.fp32_precision = before


@pytest.fixture
def device(library, exact_float32, monkeypatch):
    """Configures the emulated GPU; the cuda backend then takes CPU tensors."""
    monkeypatch.setattr(cuda, "device_type", "cpu")
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "checked", False)  # it would emulate everything twice
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def configure(gpu=H100, late_copies=True, order=0, multiprocessors=3):
        library.autofocus_emulation_configure(multiprocessors, *gpu, int(late_copies), order)

    configure()
    yield configure
    configure()


@pytest.fixture
def tf32(device):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    return device


def judge_tf32(results, case, tensors):
    """Operands are rounded to the nearest, each by at most half of TF32's eps: about a third of it in a sum's norm.

    Not for sums of a few terms that cancel.
    """
    for name, expected in testing.truth(case, tensors).items():
        assert testing.relative_error(results[name], expected) < tolerance.TF32_EPS / 2, name


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


def probe(function, *arguments):
    message = ctypes.create_string_buffer(400)
    function.restype = ctypes.c_bool
    right = function(*arguments, message, len(message))
    return right, message.value.decode()
