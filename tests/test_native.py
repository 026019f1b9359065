"""Finding and loading the compiled libraries."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from autofocus_kernels.backends import native

BUILT = [name for name, entry in native.build_record().items() if "torch" in entry]


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty folder in the place of the package, and nothing remembered."""
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    native.unavailable.cache_clear()
    yield tmp_path
    native.unavailable.cache_clear()


def test_import_loads_nothing():
    code = "import autofocus_kernels, torch; print(sorted(map(str, torch.ops.loaded_libraries)))"
    assert output(sys.executable, "-c", code).strip() == "[]"


def test_never_installed(package):
    reason = native.unavailable("cpu")
    assert reason.startswith("not built: the package was never installed; reinstall")
    assert "AUTOFOCUS_BUILD=cpu" in reason


def test_a_source_tree_without_a_build(package, monkeypatch):
    """As in a clone whose package was installed: there, the clone's own is imported."""
    monkeypatch.setattr(native, "PACKAGE", package / "autofocus_kernels")
    for file in (package / "setup.py", package / "csrc" / "flags.py"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    reason = native.unavailable("cpu")
    assert reason.startswith(f"not built in the source tree {package}: AUTOFOCUS_BUILD=cpu python setup.py build_ext")
    assert reason.endswith("outside of that folder Python finds the package that is installed")


def test_skipped_when_built(package):
    (package / "_build.json").write_text(json.dumps({"cuda": {"skipped": "no CUDA compiler"}}))
    assert native.unavailable("cuda").startswith("not built: no CUDA compiler; reinstall")


def test_does_not_load(package):
    (package / "_cpu.abi3.so").write_bytes(b"no library")
    (package / "_build.json").write_text(json.dumps({"cpu": {"torch": "9.9.9", "flags": {}}}))
    expected = f"_cpu.abi3.so was built for torch 9.9.9, you have {torch.__version__}, and it does "
    assert native.unavailable("cpu").startswith(expected)


def test_a_library_of_other_sources(package, monkeypatch):
    """As after a pull without a build."""
    (package / "_cpu.abi3.so").write_bytes(b"a library")
    (package / "_build.json").write_text(json.dumps({"cpu": {"torch": torch.__version__, "sources": "old"}}))
    monkeypatch.setattr(native, "_digest_of_checkout", lambda: "new")
    assert native.unavailable("cpu").startswith("_cpu.abi3.so was built from other sources than csrc has now; reinst")
    native.unavailable.cache_clear()
    monkeypatch.setattr(native, "_digest_of_checkout", lambda: None)  # an installed package has none to compare
    assert "does not load" in native.unavailable("cpu")


def test_what_was_built_is_of_these_sources():
    digests = {native.build_record()[name]["sources"] for name in BUILT}
    assert digests <= {native._digest_of_checkout()}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_library_without_operators(package):
    subprocess.run(["cc", "-shared", "-x", "c", "-", "-o", package / "_spare.abi3.so"], input=b"", check=True)
    assert native.unavailable("spare").startswith("_spare.abi3.so has no operators")


def test_a_library_that_is_gone(package):
    (package / "_build.json").write_text(json.dumps({"cpu": {"torch": "2.13.0"}}))
    assert native.unavailable("cpu").startswith("not built: its library is gone; reinstall")


def test_a_damaged_note(package):
    (package / "_build.json").write_text("")
    assert native.unavailable("cpu").startswith("not built: the package was never installed")


def test_the_library_for_every_python_comes_first(package):
    for name in ("_cpu.abi3.so", f"_cpu{native.EXTENSION_SUFFIXES[0]}"):
        (package / name).write_bytes(b"")
    assert native._find("cpu").name == "_cpu.abi3.so"


def test_reason_is_remembered(package):
    before = native.unavailable("cpu")
    (package / "_cpu.abi3.so").write_bytes(b"no library")
    assert native.unavailable("cpu") is before


@pytest.mark.parametrize("name", BUILT)
def test_what_was_built_loads(name):
    assert native.unavailable(name) is None
    assert hasattr(getattr(torch.ops, f"autofocus_{name}"), "forward")


@pytest.mark.skipif(shutil.which("nm") is None, reason="reads symbols with nm, which is not here")
@pytest.mark.parametrize("name", BUILT)
def test_needs_only_the_stable_abi(name):
    """No C++ symbol of torch: those change between releases."""
    library = next(native.PACKAGE.glob(f"_{name}*.so"))
    symbols = [line.split()[-1] for line in output("nm", "-D", "-u", library).splitlines()]
    assert [name for name in symbols if re.match("_ZNK?(2at|3c10|5torch)", name)] == []
