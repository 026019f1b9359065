"""The machine code of every CUDA kernel for every architecture, without a GPU: registers and spills as reported."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = runpy.run_path(str(ROOT / "csrc" / "flags.py"))
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
ARCHITECTURES = FLAGS["CUDA_ARCHITECTURES"]
PROBES = sorted((ROOT / "benchmarks" / "probes").glob("*.cu"))
PROBED = ("80", "90a")  # one without warpgroup MMA and the one with it
TIMED_PRODUCTS = {"shifted_windows": 5, "transposed_windows": 4}  # warpgroup MMAs of a round of what a probe times
FORWARD, GRAD_WEIGHT = (ROOT / "csrc" / "cuda" / "windows" / f"{name}.cu" for name in ("forward", "grad_weight"))
MULTIPLIED_TYPES = {FORWARD: {"f16", "bf16", "tf32"}, GRAD_WEIGHT: {"f16", "bf16"}}
REGISTERS = 65536  # of a multiprocessor, on every architecture here
STATIC_SHARED = 0  # bytes: every kernel takes what shared memory it needs at launch, from a plan that knows the GPU

# Kernel -> most registers a thread may have: what lets the blocks named in docs/cuda.md run at once. A fast block of
# 512 threads leaves 128; one of 256 leaves 255; two simple blocks of 128 leave 255, the most there are; four leave 128.
BUDGET = {
    "branches_kernel": 128,
    "adjoint_kernel": 128,
    "grad_weight_kernel": 255,
    "grad_weight_tf32_kernel": 255,
    "pack_kernel": 64,
    "simple_blend": 255,
    "simple_branches": 255,
    "simple_grad_attention_shared": 255,
    "simple_grad_attention_scaled": 128,
    "simple_weight_partial": 128,
    "weight_sum": 64,
    "scale_sum": 128,
    "branch_sums": 128,
    "branch_totals": 64,
    "branch_combination": 128,
    "branch_grad_attention": 128,
    "branch_gradient": 128,
}
# Instances of each kernel: element types times the few values of its template parameters. More cost build time.
INSTANCES = {
    "branches_kernel": 23,
    "adjoint_kernel": 12,
    "grad_weight_kernel": 2,
    "grad_weight_tf32_kernel": 1,
    "pack_kernel": 3,
    "simple_blend": 8,
    "simple_branches": 4,
    "simple_grad_attention_shared": 4,
    "simple_grad_attention_scaled": 4,
    "simple_weight_partial": 4,
    "weight_sum": 4,
    "scale_sum": 4,
    "branch_sums": 4,
    "branch_totals": 2,
    "branch_combination": 4,
    "branch_grad_attention": 4,
    "branch_gradient": 4,
}

# Compiling all of them takes many minutes: `make compat` does, `make test` those for Hopper and, of the files whose
# code differs by architecture, one for Ampere.
AT_EACH_TEST = {*((source, "90a") for source in SOURCES), (GRAD_WEIGHT, "80")}


def of_a_release(seldom, *values):
    return pytest.param(*values, marks=[pytest.mark.release] if seldom else [])


EACH_PAIR = [
    of_a_release((source, architecture) not in AT_EACH_TEST, source, architecture)
    for source in SOURCES
    for architecture in ARCHITECTURES
]
EACH_ARCHITECTURE = [of_a_release(architecture != "90a", architecture) for architecture in ARCHITECTURES]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def disassembler():
    """Triton brings one along, which nvcc does not; None if it is not there."""
    triton = importlib.util.find_spec("triton")
    found = None if triton is None else Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found if found is not None and found.exists() else None


class Kernel(NamedTuple):
    name: str
    symbol: str
    registers: int
    spills: int  # bytes stored and loaded
    stack: int  # bytes; arrays that did not become registers
    shared: int  # bytes, static


def parse(report: str) -> list[Kernel]:
    """The kernels of a report of ``ptxas -v``."""
    kernels = []
    for block in re.split(r"Compiling entry function ", report)[1:]:
        symbol = re.match(r"'(\w+)'", block)[1]
        numbers = [
            re.search(rf"(\d+) {words}", block)
            for words in ("registers", "bytes spill stores", "bytes spill loads", "bytes stack frame", "bytes smem")
        ]
        registers, stores, loads, stack, shared = (int(number[1]) if number else 0 for number in numbers)
        # The source name of a mangled one: the last length-prefixed identifier of its nested name.
        names = []
        rest = symbol.removeprefix("_ZN").removeprefix("_Z")
        while match := re.match(r"\d+", rest):
            end = match.end() + int(match[0])
            names.append(rest[match.end() : end])
            rest = rest[end:]
        kernels.append(Kernel(names[-1], symbol, registers, stores + loads, stack, shared))
    return kernels


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """(source, architecture) -> a future of (exit code, report, PTX), of all that the chosen tests ask for."""
    folder = tmp_path_factory.mktemp("cuda_compile")
    options = [*FLAGS["NVCC"], "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin"]

    def run(source, architecture):
        kept = folder / f"{source.parent.name}_{source.stem}_{architecture}"  # what nvcc makes on the way
        kept.mkdir()
        target = ["-keep", "-keep-dir", kept, f"-arch=sm_{architecture}", "-o", kept / "kernels.cubin"]
        result = subprocess.run(
            ["nvcc", *options, *target, source], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return result.returncode, result.stdout, kept / f"{source.stem}.ptx"

    here = [item for item in request.session.items if item.getparent(pytest.Module) is request.node]
    parameters = [item.callspec.params for item in here if "compiled" in item.fixturenames]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {}
        for each in parameters:
            for source in [each["source"]] if "source" in each else SOURCES:
                pair = source, each["architecture"]
                if pair not in futures:
                    futures[pair] = pool.submit(run, *pair)
        yield futures


def is_never_planned(kernel, architecture):
    """64 output channels at once, which plan.cu gives to warpgroup MMA only; elsewhere such a forward spills."""
    return kernel.name == "branches_kernel" and "Li8E" in kernel.symbol and architecture != "90a"


@needs_nvcc
@pytest.mark.parametrize("source, architecture", EACH_PAIR, ids=lambda value: getattr(value, "stem", value))
def test_machine_code(compiled, source, architecture):
    code, report, _ = compiled[source, architecture].result()
    assert code == 0, report
    wrong = [
        kernel
        for kernel in parse(report)
        if ((kernel.spills or kernel.stack) and not is_never_planned(kernel, architecture))
        or kernel.shared > STATIC_SHARED
        or not 0 < kernel.registers <= BUDGET[kernel.name]
    ]
    assert not wrong, wrong  # a file may have no kernel: test_instances counts them all
    assert "serialized" not in report, report  # warpgroup MMA that waits for itself
    assert "injected" not in report, report  # groups of it that ptxas had to begin or close with a product of nothing


@needs_nvcc
@pytest.mark.parametrize("architecture", PROBED)
@pytest.mark.parametrize("source", PROBES, ids=lambda source: source.stem)
def test_machine_code_of_probes(compiled, source, architecture):
    code, report, _ = compiled[source, architecture].result()
    assert code == 0, report
    kernels = parse(report)
    assert kernels and not any(kernel.spills or kernel.stack for kernel in kernels), kernels
    assert "serialized" not in report, report


@needs_nvcc
@pytest.mark.parametrize("architecture", ["90a"])
@pytest.mark.parametrize("source", [p for p in PROBES if p.stem in TIMED_PRODUCTS], ids=lambda source: source.stem)
def test_probes_time_all_their_products(compiled, source, architecture):
    """Of several rounds in the body of an unrolled loop ptxas leaves only the last, whose sums are read."""
    code, report, ptx = compiled[source, architecture].result()
    assert code == 0, report
    entries = re.split(r"\.entry ", ptx.read_text())[1:]
    assert {entry.count("wgmma.mma_async") for entry in entries} == {TIMED_PRODUCTS[source.stem]}


@needs_nvcc
@pytest.mark.skipif(disassembler() is None, reason="no disassembler")
@pytest.mark.parametrize("architecture", ["90a"])
@pytest.mark.parametrize(
    "source", [*SOURCES, *(probe for probe in PROBES if probe.stem in TIMED_PRODUCTS)], ids=lambda source: source.stem
)
def test_machine_code_has_every_product(compiled, source, architecture):
    """ptxas leaves out products whose sums nobody reads, and closes groups that this empties with one of nothing."""
    code, report, ptx = compiled[source, architecture].result()
    assert code == 0, report
    command = [disassembler(), "-sass", ptx.parent / "kernels.cubin"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {
        name: body.count("HGMMA.") for name, body in re.findall(r"Function : (\w+)(.*?)\.{10}", listing, re.DOTALL)
    }
    entries = re.split(r"\.entry ", ptx.read_text())[1:]
    wanted = {re.match(r"\w+", entry)[0]: entry.count("wgmma.mma_async") for entry in entries}
    assert found == wanted and "gdesc[URZ]" not in listing


@needs_nvcc
@pytest.mark.parametrize(
    "source, architecture",
    [
        of_a_release((source, architecture) not in AT_EACH_TEST, source, architecture)
        for source in MULTIPLIED_TYPES
        for architecture in ARCHITECTURES
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_each_generation_gets_its_instructions(compiled, source, architecture):
    """In PTX, what each compiler is given; a name misspelt in device.h would send Hopper the slow way in silence."""
    code, report, ptx = compiled[source, architecture].result()
    assert code == 0, report
    instructions = ptx.read_text()
    types = MULTIPLIED_TYPES[source]
    of_warpgroups = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+\.f32\.(\w+)", instructions))
    of_warps = set(re.findall(r"mma\.sync\.aligned\.m16n8k\d+\.row\.col\.f32\.(\w+)", instructions))
    assert (of_warpgroups, of_warps) == ((types, set()) if architecture == "90a" else (set(), types))
    has_engine = architecture != "80"
    assert ("cp.async.bulk.tensor." in instructions) == has_engine != ("cp.async.cg." in instructions)


@needs_nvcc
@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
def test_instances(compiled, architecture):
    reports = [compiled[source, architecture].result()[1] for source in SOURCES]
    counted = Counter(kernel.name for report in reports for kernel in parse(report))
    assert counted == INSTANCES and INSTANCES.keys() == BUDGET.keys()


def test_gpus_that_are_too_old_are_not_compiled_for():
    """As in the list of an image that serves many GPUs; ptxas would refuse the kernels for them."""
    assert FLAGS["narrowed"]("7.5 8.0 8.6 9.0 10.0 12.0+PTX") == "8.0;8.6;9.0;10.0;12.0+PTX"
    assert FLAGS["narrowed"]("7.0;9.0a; Hopper") == "9.0a;Hopper"
    assert FLAGS["narrowed"]("native") == "native"
    assert FLAGS["narrowed"]("6.1;7.5+PTX") == ""


def test_budget_fits_the_blocks():
    """The launch bounds that the budget answers to."""
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*") if path.is_file())
    constant = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", text)}
    for kernel in ("branches_kernel", "adjoint_kernel"):
        assert constant["kMaxThreads"] * BUDGET[kernel] <= REGISTERS
    assert constant["kGradWeightGroups"] * constant["kGroupThreads"] * BUDGET["grad_weight_kernel"] <= REGISTERS
    assert constant["kSimpleThreads"] * constant["kSimpleBlocks"] * BUDGET["simple_blend"] <= REGISTERS
    for kernel in ("branch_sums", "branch_combination", "branch_grad_attention", "branch_gradient"):
        assert constant["kSimpleThreads"] * constant["kNormBlocks"] * BUDGET[kernel] <= REGISTERS


def test_report_with_spills_is_understood():
    (kernel,) = parse("""
ptxas info    : Compiling entry function '_ZN9autofocus4cuda10fast_blendIfEEvi' for 'sm_90'
ptxas info    : Function properties for _ZN9autofocus4cuda10fast_blendIfEEvi
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 16 bytes cumulative stack size, 64 bytes smem
""")
    assert kernel == Kernel("fast_blend", "_ZN9autofocus4cuda10fast_blendIfEEvi", 96, 44, 16, 64)
