"""The package without its optional parts: no compiled library, no Triton. Each test is a fresh process."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import autofocus_kernels

PACKAGE = Path(autofocus_kernels.__file__).parent

USE = """
import sys
import torch
import autofocus_kernels as ak
from autofocus_kernels import testing

assert ak.available_backends()["cpu"] is not None, "the library was found"
assert ak.available_backends()["triton"] is not None, "triton was found"
print(ak.available_backends()["triton"])
testing.check(None, testing.Case("plain", (5, 6, 4)))
testing.check(None, testing.Case("branch", (5, 6), mode="branch"))
layer = ak.AutofocusConv3d(3, 4, dilations=(1, 2))
layer(torch.randn(1, 3, 5, 6, 4)).sum().backward()
"""


def run(code, cwd):
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture
def pure(tmp_path):
    """A folder that holds the package's Python files and no library; Python looks there first."""
    shutil.copytree(
        PACKAGE, tmp_path / "autofocus_kernels", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    )
    return tmp_path


def test_everything_works_without_the_library_and_without_triton(pure):
    blocked = "import sys; sys.modules['triton'] = None\n"
    result = run(blocked + USE, pure)
    assert result.returncode == 0, result.stderr
    # The slow fallback is said once.
    assert result.stderr.count("backend 'cpu' is not used: not built") == 1
    assert "triton" in result.stdout


def test_import_is_silent_and_loads_nothing_optional(tmp_path):
    code = """
import sys
import torch
before = set(sys.modules)
import autofocus_kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert "triton" not in new, "importing the package imports triton"
assert "nibabel" not in new and "matplotlib" not in new
assert not torch.ops.loaded_libraries
assert not torch.cuda.is_initialized()
"""
    result = run(code, tmp_path if "site-packages" in str(PACKAGE) else PACKAGE.parent)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", sorted(set(autofocus_kernels.__all__) - {"networks", "reference"}))
def test_a_public_name_is_no_module_too(name):
    """From Python 3.12 on pydoc.locate, by which MONAI finds what a bundle names, would find the module."""
    assert importlib.util.find_spec(f"autofocus_kernels.{name}") is None
