"""Builds the two optional compiled libraries; the rest of the package is in pyproject.toml.

AUTOFOCUS_BUILD says which:
    auto   what this machine can build; the rest is skipped and the reason printed (the default)
    cpu    the CPU library; an error if it cannot be built
    cuda   the CPU and the CUDA library; an error if either cannot be built
    none   neither: a pure Python package
What was built, and why the rest was not, is kept in autofocus_kernels/_build.json, which
backends/native.py reads.
"""

import glob
import json
import os
import re
import runpy
import shlex
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import setuptools
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

WANTED = {"auto": ("cpu", "cuda"), "cpu": ("cpu",), "cuda": ("cpu", "cuda"), "none": ()}
MODE = os.environ.get("AUTOFOCUS_BUILD") or "auto"
CSRC = Path(__file__).resolve().parent / "csrc"
if not os.environ.get("CXX"):
    os.environ.pop("CXX", None)  # an empty one is none, for torch too
FLAGS = runpy.run_path(str(CSRC / "flags.py"))
COMPILER = FLAGS["compiler"]()
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
# These commands only read metadata; probing the machine for them would cost seconds.
READS = {"egg_info", "dist_info", "sdist"}
BUILDS = {"build", "build_ext", "bdist", "bdist_wheel", "install"}
BUILDING = not READS & set(sys.argv) or bool(BUILDS & set(sys.argv))


def check_setuptools():
    """An old setuptools, which pip takes without build isolation, rejects pyproject.toml without naming itself."""
    requires = CSRC.with_name("pyproject.toml").read_text(encoding="utf-8")
    needed = re.search(r"setuptools>=(\d+)", requires)[1]
    installed = re.match(r"[1-9]\d*", setuptools.__version__)  # 0 or "unknown" where its metadata is out of sight
    if installed and int(installed[0]) < int(needed):
        sys.exit(f"setuptools >= {needed} is needed to build, {setuptools.__version__} is installed")


class CannotBuild(Exception):
    """Why a library cannot be built on this machine."""


def find_torch():
    """torch and its build helpers, also from within pip's build isolation."""
    # An isolated build sees only its own packages. The torch that the library will meet at run
    # time is in the site-packages of the interpreter that pip serves, so look there last.
    # Its .pth files count too: a torch that was itself built from source may be reached through one.
    for folder in [*site.getsitepackages(), site.getusersitepackages()]:
        if folder not in sys.path:
            site.addsitedir(folder)
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:
        raise CannotBuild(
            "torch cannot be imported at build time: install it first, and turn the isolation off where it is complete "
            f"(uv, python -m build) ({type(error).__name__}: {error})"
        ) from error
    major, minor = FLAGS["MINIMUM_TORCH"]
    if tuple(map(int, torch.__version__.split(".")[:2])) < (major, minor):
        raise CannotBuild(f"torch >= {major}.{minor} is needed, {torch.__version__} is installed")
    return torch, cpp_extension


def check_compiler():
    with tempfile.TemporaryDirectory() as folder:
        source, library = f"{folder}/probe.cpp", f"{folder}/probe.so"
        Path(source).write_text("#include <vector>\nstd::vector<int> probe() { return {1}; }\n")
        command = [*COMPILER, "-std=c++17", "-shared", "-fPIC", source, "-o", library]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise CannotBuild(f"no C++ compiler: {error}") from error
    if result.returncode:
        error = result.stderr.strip()
        raise CannotBuild(f"the C++ compiler does not work: {shlex.join(command)}: {error}")


def headers():
    return [*glob.glob("csrc/**/*.h", recursive=True), *glob.glob("csrc/**/*.cuh", recursive=True)]


def cpu_library():
    _, cpp_extension = find_torch()
    check_compiler()
    return cpp_extension.CppExtension(
        "autofocus_kernels._cpu",
        sources=["csrc/binding/cpu.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))],
        depends=headers(),
        include_dirs=[str(CSRC)],  # absolute, since ninja runs elsewhere
        extra_compile_args={"cxx": list(FLAGS["CXX"])},
        py_limited_api=True,
    )


def cuda_library():
    torch, cpp_extension = find_torch()
    if torch.version.cuda is None:
        raise CannotBuild(f"torch {torch.__version__} is a build without CUDA")
    nvcc = Path(cpp_extension.CUDA_HOME or "/usr/local/cuda", "bin", "nvcc")
    if not nvcc.exists():
        raise CannotBuild(f"no CUDA compiler: {nvcc} is not there (CUDA_HOME names its folder)")
    check_compiler()
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if named:
        os.environ["TORCH_CUDA_ARCH_LIST"] = FLAGS["narrowed"](named)
        if not os.environ["TORCH_CUDA_ARCH_LIST"]:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST names only GPUs that are too old: {named}")
        architectures = []  # torch reads its own variable and adds the flags
    else:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
        chosen = [a for a in FLAGS["CUDA_ARCHITECTURES"] if f"sm_{FLAGS['generation'](a)}" in known.split()]
        if not chosen:
            raise CannotBuild(f"{nvcc} knows no architecture of {FLAGS['CUDA_ARCHITECTURES']}")
        architectures = FLAGS["gencode"](chosen)
    return cpp_extension.CUDAExtension(
        "autofocus_kernels._cuda",
        sources=["csrc/binding/cuda.cpp", *sorted(glob.glob("csrc/cuda/**/*.cu", recursive=True))],
        depends=headers(),
        include_dirs=[str(CSRC)],  # absolute, since ninja runs elsewhere
        extra_compile_args={"cxx": list(FLAGS["CXX_CUDA"]), "nvcc": FLAGS["NVCC"] + architectures},
        py_limited_api=True,
    )


def plan():
    """The extensions to build, and for each other library a record of why it is skipped."""
    if MODE not in WANTED:
        sys.exit(f"AUTOFOCUS_BUILD must be one of {', '.join(WANTED)}, got {MODE!r}")
    makers = {"cpu": cpu_library, "cuda": cuda_library}
    extensions, record = [], {}
    for name, make in makers.items():
        if name not in WANTED[MODE]:
            record[name] = {"skipped": f"AUTOFOCUS_BUILD={MODE}"}
            continue
        try:
            extensions.append(make())
        except CannotBuild as reason:
            if MODE != "auto":
                sys.exit(f"AUTOFOCUS_BUILD={MODE}: the {name} library cannot be built: {reason}")
            record[name] = {"skipped": str(reason)}
    return extensions, record


check_setuptools()
EXTENSIONS, RECORD = plan() if BUILDING else ([], {})
if EXTENSIONS:
    import torch
    from torch.utils.cpp_extension import BuildExtension

    # From 2.13 on torch quotes CXX for ninja: "ccache c++" would be the name of one program.
    BuildExtension = BuildExtension.with_options(use_ninja=len(COMPILER) == 1)
else:
    BuildExtension = build_ext


class BuildLibraries(BuildExtension):
    """Builds each library on its own: in auto mode one that fails leaves the other."""

    def run(self):
        package = Path(self.get_finalized_command("build_py").get_package_dir("autofocus_kernels"))
        if not self.inplace:
            package = Path(self.build_lib, package.name)
        # A library of an earlier build must not outlive it: it matches the sources or it goes.
        for stale in [*package.glob("_cpu*.so"), *package.glob("_cuda*.so")]:
            stale.unlink()
        super().run()
        for name, entry in RECORD.items():
            outcome = f"skipped: {entry['skipped']}" if "skipped" in entry else "built"
            print(f"autofocus_kernels: {name} library: {outcome}", file=sys.stderr)
        package.mkdir(parents=True, exist_ok=True)
        note, whole = package / "_build.json", package / "_build.json.new"
        whole.write_text(json.dumps(RECORD, indent=1) + "\n")
        whole.replace(note)

    def build_extensions(self):
        wanted, built = self.extensions, []
        for extension in wanted:
            name = extension.name.rpartition("._")[2]
            flags = dict(extension.extra_compile_args)
            began, sources = time.time(), FLAGS["source_digest"]("csrc")
            self.extensions = [extension]
            # Without ninja torch wraps this method at every call; wrapped twice it repeats flags.
            vars(self.compiler).pop("_compile", None)
            try:
                super().build_extensions()
            except Exception as error:
                if MODE != "auto":
                    raise
                RECORD[name] = {"skipped": f"its compilation failed ({error})"}
            else:
                built.append(extension)
                RECORD[name] = {
                    "torch": torch.__version__,
                    "flags": flags,
                    "sources": sources,
                }
            # Edited while it was compiled: newer than its object file again, so that the next build compiles it.
            for path in CSRC.rglob("*"):
                if path.stat().st_mtime >= began:
                    path.touch()
        self.extensions = built


class Build(build):
    # setuptools leaves build_ext out where there is no extension; the record is wanted there too.
    sub_commands = [  # noqa: RUF012, as setuptools has it
        (name, None if name == "build_ext" else predicate) for name, predicate in build.sub_commands
    ]


setuptools.setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build": Build, "build_ext": BuildLibraries},
    # One wheel for every Python: the libraries use torch's stable ABI and nothing of Python's. A free-threaded Python
    # takes no wheel with the tag of Python's stable ABI, and there setuptools refuses to make one.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS and not FREE_THREADED else {},
)
