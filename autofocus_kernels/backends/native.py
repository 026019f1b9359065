"""Finds and loads the compiled libraries, or says why it cannot. Importing this loads nothing."""

from __future__ import annotations

import json
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
        return f"not built: {built.get('skipped', 'the package was never installed')}; {how}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        # torch raises an error of its own from the one that names the missing symbol or file.
        return (
            f"{library.name} was built for torch {built.get('torch')}, you have "
            f"{torch.__version__}, and it does not load: {error.__cause__ or error}; {how}"
        )
    return None


def build_record() -> dict:
    """What setup.py noted of the build.

    Returns:
        library name -> ``{"torch": version, "flags": {compiler: options}}`` if it was built,
        ``{"skipped": reason}`` if not; empty if there was no build.
    """
    record = PACKAGE / "_build.json"
    return json.loads(record.read_text()) if record.exists() else {}


def _find(name: str) -> Path | None:
    candidates = (PACKAGE / f"_{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)
