"""A backend that was built must run: a skipped backend fixture elsewhere is only honest because of this file."""

import os
import shutil
from pathlib import Path

import pytest
from helpers.cuda_emulation import COMPILER

import autofocus_kernels
from autofocus_kernels.dispatch import backend_named

LIBRARIES = sorted(Path(autofocus_kernels.__file__).parent.glob("_cpu*.so"))


def test_cpu_library_that_was_built_loads():
    if LIBRARIES:
        assert backend_named("cpu").unavailable() is None, f"{LIBRARIES} exists but does not load"


def test_cpu_library_was_built_where_a_compiler_is():
    asked = os.environ.get("AUTOFOCUS_BUILD", "auto")
    if asked not in ("auto", "cpu"):
        pytest.skip(f"AUTOFOCUS_BUILD={asked} asks for no CPU library")
    if not any(map(shutil.which, (COMPILER[0], "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    assert LIBRARIES, "there is a C++ compiler but no autofocus_kernels/_cpu*.so: build the package first"


def test_reference_is_always_available():
    assert backend_named("reference").unavailable() is None
