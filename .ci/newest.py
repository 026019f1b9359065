"""A part of the tests on the newest torch, with the library that was built for the one in .venv: what CI adds.

    .venv/bin/python .ci/newest.py

The library's file that sees torch must compile against its headers too. Only torch is installed anew, in build/newest/,
and goes before that of .venv. Where pip finds a CUDA build alone, the CUDA libraries that it is linked with, two
gigabytes, are replaced by one of stubs: on a CPU nothing of them is called but to ask whether there is a GPU. `make
compat` has the real ones. A torch that cannot be had is no failure.
"""

import os
import re
import subprocess
import sys

from compat import FLAGS, ROOT, TORCHES

TORCH = TORCHES[-1]
FOLDER = ROOT / "build" / "newest"
STUBS = FOLDER / "stubs"
OF_CUDA = r"lib(cu|nccl|nv)"
SEES_TORCH = "csrc/binding/cpu.cpp"  # of the CPU library's files
TESTS = ("environment", "native", "dispatch", "autograd", "modules", "compile")


def output_of(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def install():
    """Whether torch is there."""
    if (FOLDER / f"torch-{TORCH}.dist-info").exists() or list(FOLDER.glob(f"torch-{TORCH}+*.dist-info")):
        return True
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", FOLDER, f"torch=={TORCH}"]
    return subprocess.run(command).returncode == 0


def make_stubs():
    """An empty library for each of CUDA's that torch asks for; the functions, which answer "no device", apart.

    They are preloaded, since the loader insists that a library that has them itself names their versions.
    """
    libraries = sorted((FOLDER / "torch" / "lib").glob("*.so*"))
    needed = {
        name for library in libraries for name in re.findall(r"NEEDED.*\[(.*)\]", output_of("readelf", "-d", library))
    }
    missing = {name for name in needed if re.match(OF_CUDA, name)} - {library.name for library in libraries}
    symbols = {kind: set() for kind in ("--undefined-only", "--defined-only")}
    for kind, found in symbols.items():
        for library in libraries:
            found.update(re.findall(r" [A-Za-z] ([A-Za-z_]\w*)", output_of("nm", "-D", kind, library)))
    wanted = [
        name for name in symbols["--undefined-only"] - symbols["--defined-only"] if re.match("_*(cu|nccl|nv)", name)
    ]
    STUBS.mkdir(exist_ok=True)
    functions = "".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(wanted))
    for name, text in [("functions.so", functions), *((name, "") for name in missing)]:
        command = [os.environ.get("CC", "cc"), "-w", "-shared", "-fPIC", "-x", "c", "-", "-o", STUBS / name]
        subprocess.run(command, input=text, text=True, check=True)


def compiles():
    """Whether what sees torch compiles against this one's headers. The rest is compiled already, and is the same."""
    options = [*FLAGS["CXX"], "-fsyntax-only", f"-I{ROOT / 'csrc'}", f"-isystem{FOLDER / 'torch' / 'include'}"]
    return subprocess.run([*FLAGS["compiler"](), *options, ROOT / SEES_TORCH]).returncode == 0


def main():
    if not install():
        print(f"torch {TORCH} cannot be installed here: its tests are left out")
        return 0
    if not compiles():
        return 1
    make_stubs()
    path = os.pathsep.join([str(FOLDER), str(ROOT)])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "LD_LIBRARY_PATH": str(STUBS),
        "LD_PRELOAD": str(STUBS / "functions.so"),
    }
    tests = [f"tests/test_{name}.py" for name in TESTS]
    check = f"import torch; assert torch.__version__.startswith('{TORCH}'), torch.__version__"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *tests], cwd=ROOT, env=environment
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
