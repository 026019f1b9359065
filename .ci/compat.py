"""`make compat`, the step before a release: builds and tests with the oldest and the newest torch that are promised.

Each torch gets a copy of the working tree in build/compat/ that asks for that torch, and `make test` runs there, with
a .venv of its own. Where nvcc is, the CUDA library is compiled and linked against each torch too. At last every library
runs with every torch, since the one wheel of a release meets them all. Nothing here needs a GPU.

    python3 .ci/compat.py [TORCH ...]      # 2.10.0, say; all of them by default

The Python is the python3 that the shell finds: another one before it on PATH is tested too, from 3.11 on, for which
constraints.txt has versions.

Torch is a download of gigabytes where pip finds only its CUDA build. What is installed and compiled is kept.
"""

import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

TORCHES = ("2.10.0", "2.11.0", "2.14.1")  # the oldest, one that once failed, the newest; `make test` has 2.13
ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "compat" / f"python{sys.version_info.major}.{sys.version_info.minor}"
FLAGS = runpy.run_path(str(ROOT / "csrc" / "flags.py"))
NVCC = shutil.which("nvcc")
CPU_LIBRARY = Path("autofocus_kernels", "_cpu.abi3.so")
CUDA_LIBRARY = Path("autofocus_kernels", "_cuda.abi3.so")
RECORD = Path("autofocus_kernels", "_build.json")
KEPT = (".venv", "build")  # of a copy, what the next run uses again
WITHOUT_TORCH = "--ignore=tests/test_cuda_compile.py"  # the kernels' machine code; seen to once for all
OF_A_RELEASE = ("tests/test_cuda_compile.py", "tests/test_triton_aot.py", "tests/test_triton_norm.py")
OF_A_FOREIGN_LIBRARY = ("tests/test_environment.py", "tests/test_native.py", "tests/test_autograd.py")

failures = []


def say(title, outcome):
    print(f"{title:<44}{outcome}", flush=True)


def step(title, log, *commands, cwd=ROOT, **environment):
    """Runs commands until one fails, their output in ``log``; prints one line, and the end of the log if one failed.

    Returns:
        whether all went well.
    """
    # What the caller's make and shell have set would steer the make and the Python of a copy.
    inherited = {k: v for k, v in os.environ.items() if not re.match("MAKE|MFLAGS|PYTHON|AUTOFOCUS_", k)}
    options = {"cwd": cwd, "env": {**inherited, **environment}, "stderr": subprocess.STDOUT}
    start = time.monotonic()
    with open(log, "w") as file:
        good = all(subprocess.run([*map(str, command)], stdout=file, **options).returncode == 0 for command in commands)
    lines = log.read_text(errors="replace").splitlines()
    summary = next((line.strip("= ") for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "")
    say(title, f"{'ok' if good else 'FAILED':<6}{time.monotonic() - start:6.0f} s   {summary}")
    if not good:
        failures.append(title)
        print(*(f"    {line}" for line in lines[-25:]), f"    all of it: {log}", sep="\n", flush=True)
    return good


def copy_tree(tree, version):
    """The working tree as git sees it, new files included; its constraints.txt asks for ``version``."""
    tree.mkdir(parents=True, exist_ok=True)
    for old in tree.iterdir():
        if old.name not in KEPT:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():  # a file deleted since the last commit is not
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)  # with its time, so that only what changed is compiled
    pins, changed = re.subn("(?m)^torch==.*", f"torch=={version}", (ROOT / "constraints.txt").read_text())
    assert changed == 1, "constraints.txt has not one line torch==..."
    (tree / "constraints.txt").write_text(pins)


def compile_kernels():
    """The objects of csrc/cuda, once for all: these sources include nothing of torch."""
    folder = WORK / "cuda"
    folder.mkdir(exist_ok=True)
    sources = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    objects = [folder / f"{source.parent.name}_{source.stem}.o" for source in sources]
    flags = [*FLAGS["NVCC"], "-arch=sm_90a", "-Xcompiler=-fPIC", "-c"]
    commands = [[NVCC, *flags, source, "-o", target] for source, target in zip(sources, objects)]
    return objects if step("CUDA kernels", WORK / "cuda.log", *commands) else []


def build_cuda_library(tree, version, kernels):
    """The binding against the headers of the tree's torch, linked with every symbol defined."""
    title, binding = f"torch {version}: CUDA library", tree / "build" / "binding.o"
    (torch,) = tree.glob(".venv/lib/python3*/site-packages/torch")
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        return say(title, "skipped: a build of torch without CUDA")
    compiler = FLAGS["compiler"]()
    flags = [*FLAGS["CXX_CUDA"], "-Wall", "-Werror", "-fPIC", "-isystem", torch / "include"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda"]
    compile_binding = [*compiler, *flags, "-c", ROOT / "csrc" / "binding" / "cuda.cpp", "-o", binding]
    link = [NVCC, "-shared", "-Xlinker=-z,defs", "-o", tree / CUDA_LIBRARY, binding, *kernels, *libraries]
    step(title, WORK / f"{version}-cuda.log", compile_binding, link)


def run_foreign_library(builder, user):
    """The libraries that torch ``builder`` built, in a copy of the tree of torch ``user``."""
    tree = WORK / "pair"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(WORK / user, tree, ignore=shutil.ignore_patterns(*KEPT, "*.so", "_build.json", "__pycache__"))
    origin = WORK / builder
    record = json.loads((origin / RECORD).read_text())
    shutil.copy(origin / CPU_LIBRARY, tree / CPU_LIBRARY)
    if (origin / CUDA_LIBRARY).exists():
        shutil.copy(origin / CUDA_LIBRARY, tree / CUDA_LIBRARY)
        record["cuda"] = {"torch": builder, "flags": {}, "sources": record["cpu"]["sources"]}
    (tree / RECORD).write_text(json.dumps(record))
    # The tests do not skip a library that the record names and that fails to load.
    command = [WORK / user / ".venv" / "bin" / "python", "-m", "pytest", "-q", *OF_A_FOREIGN_LIBRARY]
    log = WORK / f"{builder}-on-{user}.log"
    step(f"library of torch {builder} on torch {user}", log, command, cwd=tree, PYTHONPATH=str(tree))


def main(versions):
    WORK.mkdir(parents=True, exist_ok=True)
    kernels, built = [], []
    if NVCC:
        kernels = compile_kernels()
    else:
        say("CUDA kernels", "skipped: no nvcc")
    pytest_options = f"{os.environ.get('PYTEST_ADDOPTS', '')} {WITHOUT_TORCH}"
    for version in versions:
        tree, log = WORK / version, WORK / f"{version}-install.log"
        copy_tree(tree, version)
        if not step(f"torch {version}: installation", log, ["make", ".venv/.installed"], cwd=tree):
            continue
        make_test, log = ["make", "test", "AUTOFOCUS_BUILD=cpu"], WORK / f"{version}-tests.log"
        step(f"torch {version}: build and tests", log, make_test, cwd=tree, PYTEST_ADDOPTS=pytest_options)
        if kernels:
            build_cuda_library(tree, version, kernels)
        if (tree / CPU_LIBRARY).exists():
            built.append(version)
    if built:
        python = WORK / built[0] / ".venv" / "bin" / "python"
        command = [python, "-m", "pytest", "-q", "-m", "release", *OF_A_RELEASE]
        step("machine code of every architecture", WORK / "machine-code.log", command)
    for builder, user in itertools.product(built, repeat=2):
        run_foreign_library(builder, user)
    print("Failed: " + "; ".join(failures) if failures else "All went well.")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or TORCHES))
