"""What an installation builds, skips and says, with and without torch, a compiler and CUDA.

Each test builds a copy of the source tree in a process of its own, through the hooks that pip
calls. Where the compiled code itself does not matter, csrc/ is replaced by one tiny source.
"""

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers.cuda_emulation import COMPILER

ROOT = Path(__file__).resolve().parents[1]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt")
CANNOT = "the cpu library cannot be built"
TINY = "int autofocus_probe() { return 1; }\n"
BROKEN = "this is no C++\n"
UNDEFINED = "int autofocus_missing(); int autofocus_probe() { return autofocus_missing(); }\n"

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")


@pytest.fixture
def tree(tmp_path):
    """A copy of what a checkout holds, without anything built."""
    copy = tmp_path / "tree"
    unbuilt = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    copy.mkdir()
    for name in ("autofocus_kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=unbuilt)
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    return copy


def only_source(tree, text):
    """Makes ``text`` the whole of the CPU library."""
    for folder in ("cpu", "cuda"):
        shutil.rmtree(tree / "csrc" / folder, ignore_errors=True)
    (tree / "csrc" / "binding" / "cpu.cpp").write_text(text)


def run(tree, *command, **environment):
    """Runs Python in ``tree`` with the variables given and no other that steers a build."""
    clean = {k: v for k, v in os.environ.items() if k not in ("AUTOFOCUS_BUILD", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**clean, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def build(tree, hook="build_wheel", **environment):
    """(the archive that ``hook`` makes or None if it fails, what was printed)."""
    out = tree.parent / "out"
    out.mkdir(exist_ok=True)
    command = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    result = run(tree, "-c", command, **environment)
    archives = [path for path in out.iterdir() if path.suffix in (".whl", ".gz")]
    assert (result.returncode == 0) == bool(archives), result.stdout
    return (archives[0] if archives else None), result.stdout


def contents(wheel):
    """(file names, build record) of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist(), json.loads(archive.read("autofocus_kernels/_build.json"))


def assert_pure(wheel):
    names, record = contents(wheel)
    assert not [name for name in names if name.endswith(".so")]
    assert "autofocus_kernels/py.typed" in names
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert all("skipped" in entry for entry in record.values())
    return record


def test_sdist_holds_every_source(tree):
    archive, _ = build(tree, "build_sdist")
    with tarfile.open(archive) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {str(path.relative_to(tree)) for path in tree.glob("csrc/**/*") if path.is_file()}
    assert wanted | {"setup.py", "constraints.txt", "Makefile", "tests/test_packaging.py"} <= held


def test_every_source_is_where_setup_looks():
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in (".cpp", ".cu")}
    compiled = re.compile(r"csrc/(binding/(cpu|cuda)\.cpp|cpu/[^/]+\.cpp|cuda/([^/]+/)*[^/]+\.cu)")
    assert [source for source in sources if not compiled.fullmatch(source)] == []


def test_constraints_pin_what_the_extras_name():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(name for extra in extras for name in extra)]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}
    lines = (ROOT / "constraints.txt").read_text().lower().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    # The package itself, and triton, whose version the build of torch decides (Makefile).
    assert names - pinned == {"autofocus-kernels", "triton"}


def test_pure_wheel_installs_and_imports(tree, tmp_path):
    wheel, _ = build(tree, AUTOFOCUS_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    record = assert_pure(wheel)
    assert record == {name: {"skipped": "AUTOFOCUS_BUILD=none"} for name in ("cpu", "cuda")}

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import autofocus_kernels as ak; from autofocus_kernels.backends import native;"
        "print(ak.__file__); print(native.unavailable('cpu'))"
    )
    result = run(tmp_path, "-c", code, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stdout
    location, reason = result.stdout.splitlines()
    assert Path(location).parent == site / "autofocus_kernels"
    assert reason.startswith("not built: AUTOFOCUS_BUILD=none; reinstall")


@pytest.mark.parametrize(
    "compiler, reason",
    [("/bin/false", "the C++ compiler does not work"), ("/no/such/c++", "no C++ compiler")],
)
def test_without_a_compiler(tree, compiler, reason):
    wheel, said = build(tree, AUTOFOCUS_BUILD="", CXX=compiler)  # an empty variable is none: the default, auto
    assert f"cpu library: skipped: {reason}" in said
    assert assert_pure(wheel)["cpu"]["skipped"].startswith(reason)
    assert wheel.name.endswith("-py3-none-any.whl")


def test_asked_for_without_a_compiler(tree):
    wheel, said = build(tree, AUTOFOCUS_BUILD="cpu", CXX="/no/such/c++")
    assert wheel is None and f"AUTOFOCUS_BUILD=cpu: {CANNOT}: no C++ compiler" in said


def test_without_torch(tree, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "torch.py").write_text("raise ImportError('hidden')\n")
    hidden = str(tmp_path / "hidden")
    wheel, said = build(tree, PYTHONPATH=hidden)
    assert "cpu library: skipped: torch cannot be imported at build time" in said
    assert_pure(wheel)

    wheel.unlink()
    wheel, said = build(tree, AUTOFOCUS_BUILD="cpu", PYTHONPATH=hidden)
    assert wheel is None and f"AUTOFOCUS_BUILD=cpu: {CANNOT}: torch cannot be imported" in said


def test_explicit_cuda_without_cuda_fails(tree):
    # A machine may have a CUDA build of torch or not: without nvcc the request fails on both.
    wheel, said = build(tree, AUTOFOCUS_BUILD="cuda", CUDA_HOME="/no/such/cuda")
    assert wheel is None
    assert re.search(r"=cuda: the cuda library cannot be built: .*(without CUDA|no CUDA compiler)", said)


def test_old_setuptools(tree):
    command = "import runpy, setuptools; setuptools.__version__ = '76.1.0'; runpy.run_path('setup.py')"
    result = run(tree, "-c", command)
    assert result.returncode != 0
    assert result.stdout.startswith("setuptools >= 77 is needed to build, 76.1.0 is installed")


def test_unknown_choice_fails(tree):
    wheel, said = build(tree, AUTOFOCUS_BUILD="gpu")
    assert wheel is None
    assert "AUTOFOCUS_BUILD must be one of auto, cpu, cuda, none, got 'gpu'" in said


@needs_compiler
@pytest.mark.parametrize("compiler", ["", f"env {shlex.join(COMPILER)}"])
def test_compiler_of_no_word_and_of_two(tree, compiler):
    only_source(tree, TINY)
    wheel, said = build(tree, AUTOFOCUS_BUILD="cpu", CXX=compiler)
    assert wheel is not None, said


@needs_compiler
def test_compile_error(tree):
    only_source(tree, BROKEN)
    wheel, said = build(tree, CUDA_HOME="/no/such/cuda")
    assert "cpu library: skipped: its compilation failed" in said
    assert_pure(wheel)

    wheel.unlink()
    wheel, _ = build(tree, AUTOFOCUS_BUILD="cpu")
    assert wheel is None


@needs_compiler
@pytest.mark.parametrize("reached", ["installed", "pth"])
def test_library_is_built_in_isolation_and_serves_every_python(tree, tmp_path, reached):
    only_source(tree, TINY)
    # As pip's build isolation does: the site-packages taken away, and setuptools elsewhere.
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    hide = "import site, sys\nsys.path[:] = [path for path in sys.path if path not in site.getsitepackages()]\n"
    if reached == "pth":  # torch is in a folder that a file in the site-packages names
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "torch.pth").write_text("\n".join(site.getsitepackages()))
        hide += f"site.getsitepackages = lambda: [{str(tmp_path / 'site')!r}]\n"
    (isolated / "sitecustomize.py").write_text(hide)
    import setuptools

    (isolated / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    result = run(tree, "-c", "import torch", PYTHONPATH=str(isolated))
    assert "No module named 'torch'" in result.stdout

    wheel, said = build(tree, AUTOFOCUS_BUILD="cpu", PYTHONPATH=str(isolated))
    assert wheel is not None, said
    assert "-cp310-abi3-" in wheel.name
    names, record = contents(wheel)
    assert [name for name in names if name.endswith(".so")] == ["autofocus_kernels/_cpu.abi3.so"]
    flags = record["cpu"]["flags"]["cxx"]
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in flags
    assert not {"-march=native", "-ffast-math", "-Ofast"} & set(flags)
    assert record["cuda"] == {"skipped": "AUTOFOCUS_BUILD=cpu"}


@needs_compiler
def test_free_threaded_python_gets_a_wheel_of_its_own(tree, tmp_path):
    only_source(tree, TINY)
    # What such a Python says of itself. It knows no suffix of the stable ABI.
    soabi = sysconfig.get_config_var("SOABI")
    if sys.version_info >= (3, 13):  # of which there are such Pythons, and setuptools knows their tag
        soabi = re.sub(r"(\d)-", r"\1t-", soabi, count=1)
    answers = {"Py_GIL_DISABLED": 1, "SOABI": soabi}
    (tmp_path / "sitecustomize.py").write_text(
        "import sysconfig\n"
        "from importlib import machinery\n"
        "says = sysconfig.get_config_var\n"
        f"sysconfig.get_config_var = lambda name: {answers}.get(name) or says(name)\n"
        "machinery.EXTENSION_SUFFIXES[:] = [end for end in machinery.EXTENSION_SUFFIXES if 'abi3' not in end]\n"
    )
    wheel, said = build(tree, AUTOFOCUS_BUILD="cpu", PYTHONPATH=str(tmp_path))
    assert wheel is not None, said
    assert "abi3" not in wheel.name and "-none-" not in wheel.name
    (library,) = [name for name in contents(wheel)[0] if name.endswith(".so")]
    assert library == f"autofocus_kernels/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


@needs_compiler
def test_build_in_place_replaces_an_earlier_one(tree):
    only_source(tree, UNDEFINED)
    library = tree / "autofocus_kernels" / "_cpu.abi3.so"
    in_place = ("setup.py", "build_ext", "--inplace")
    ask = ("-c", "from autofocus_kernels.backends import native; print(native.unavailable('cpu'))")

    result = run(tree, *in_place, AUTOFOCUS_BUILD="cpu")
    assert library.exists(), result.stdout
    reason = run(tree, *ask, PYTHONPATH=str(tree)).stdout
    assert re.search(r"built for torch \S+, you have \S+, .* load: .*autofocus_missing", reason)

    only_source(tree, TINY)
    run(tree, *in_place, AUTOFOCUS_BUILD="cpu")
    assert run(tree, *ask, PYTHONPATH=str(tree)).stdout.startswith("_cpu.abi3.so has no operators")

    run(tree, *in_place, AUTOFOCUS_BUILD="none")
    assert not library.exists()
    reason = run(tree, *ask, PYTHONPATH=str(tree)).stdout
    assert reason.startswith("not built: AUTOFOCUS_BUILD=none")
