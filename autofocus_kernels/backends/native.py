"""Finds and loads the compiled libraries, or says why it cannot. Importing this loads nothing."""

from __future__ import annotations

import json
import runpy
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1]


@cache
def unavailable(name: str) -> str | None:
    """Loads library ``name`` ("cpu" or "cuda") at the first call, which registers ``torch.ops.autofocus_<name>``.

    Returns:
        None, or the reason it cannot be used.
    """
    built = build_record().get(name, {})
    how = f"reinstall from source with AUTOFOCUS_BUILD={name} to build it or to see why that fails"
    library = _find(name)
    if library is None:
        tree = _checkout()
        if not built and tree is not None:
            build = f"AUTOFOCUS_BUILD={name} python setup.py build_ext --inplace"
            elsewhere = "outside of that folder Python finds the package that is installed"
            return f"not built in the source tree {tree}: {build} builds it there; {elsewhere}"
        gone = "its library is gone" if "torch" in built else "the package was never installed"
        return f"not built: {built.get('skipped', gone)}; {how}"
    digest = _digest_of_checkout()
    if digest is not None and built.get("sources") not in (None, digest):
        return f"{library.name} was built from other sources than csrc has now; {how}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        # torch raises an error of its own from the one that names the missing symbol or file.
        return (
            f"{library.name} was built for torch {built.get('torch')}, you have "
            f"{torch.__version__}, and it does not load: {error.__cause__ or error}; {how}"
        )
    if not hasattr(getattr(torch.ops, f"autofocus_{name}"), "forward"):
        return f"{library.name} has no operators: it is no library of this package; {how}"
    return None


def build_record() -> dict:
    """What setup.py noted of the build.

    Returns:
        library name -> ``{"torch": version, "flags": {compiler: options}, "sources": digest}`` if it was built,
        ``{"skipped": reason}`` if not; empty if there was no build, or its note is damaged.
    """
    try:
        return json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _checkout() -> Path | None:
    """The folder of the sources, if the package is imported from among them; None if it is installed."""
    root = PACKAGE.parent
    return root if (root / "setup.py").exists() and (root / "csrc" / "flags.py").exists() else None


def _digest_of_checkout() -> str | None:
    """The digest of the sources beside the package, which may be newer than the build; None if it is installed."""
    root = _checkout()
    if root is None:
        return None
    return runpy.run_path(str(root / "csrc" / "flags.py"))["source_digest"]("csrc")


def _find(name: str) -> Path | None:
    # First the stable-ABI library that setup.py builds: one for a single Python may be another's, or old.
    suffixes = sorted(EXTENSION_SUFFIXES, key=lambda suffix: "abi3" not in suffix)
    candidates = (PACKAGE / f"_{name}{suffix}" for suffix in suffixes)
    return next((path for path in candidates if path.exists()), None)
