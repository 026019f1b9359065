"""Build flags of the compiled libraries, for setup.py and for tests that call a compiler."""

import hashlib
import os
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Torch's stable ABI as of 2.10: a library built with a newer torch still loads with an older one.
MINIMUM_TORCH = (2, 10)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"

# No -march=native: the instruction set is chosen at run time. No -ffast-math: NaN and Inf must
# travel; the parts of it that help vectorising and change no value are named instead. -g0: many a
# Python asks for debug information, which makes the library seven times as large. Errors of
# the binding name their line, in a file of this folder and not of where it was built.
CXX = [
    *("-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", STABLE_ABI),
    f"-fmacro-prefix-map={ROOT}/=",
]

# USE_CUDA uncovers the CUDA part of the stable ABI (the current stream).
CXX_CUDA = [*CXX, "-DUSE_CUDA"]
NVCC = ["-std=c++17", "-O3", STABLE_ABI, "-DUSE_CUDA"]

# Machine code for each that nvcc knows; PTX of the newest lets later GPUs compile for themselves. Only sm_90a has
# warpgroup MMA: code for sm_90 runs on Hopper too, without it.
CUDA_ARCHITECTURES = ("80", "90a", "100", "120")


def compiler():
    """The C++ compiler's words: those of CXX, which may be several ("ccache c++") or none."""
    return shlex.split(os.environ.get("CXX") or "c++")


def generation(architecture):
    """Without the letter: what ``nvcc --list-gpu-code`` knows it by."""
    return int(architecture.rstrip("a"))


def gencode(architectures=CUDA_ARCHITECTURES):
    """The nvcc options for ``architectures``."""
    newest = max(map(generation, architectures))
    machine_code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    return [*machine_code, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def narrowed(arch_list):
    """What TORCH_CUDA_ARCH_LIST names, without GPUs older than the kernels are for: images often name those too."""
    oldest = min(map(generation, CUDA_ARCHITECTURES)) // 10
    numbers = [(re.match(r"\d+", name), name) for name in re.split("[ ;]+", arch_list) if name]
    return ";".join(name for number, name in numbers if number is None or int(number[0]) >= oldest)


def source_digest(*folders):
    """A digest of all that is compiled in ``folders``, and of how: these flags lie in one of them."""
    digest = hashlib.sha1()
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in sorted(files):
        if path.suffix in (".cu", ".cpp", ".h", ".py"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
