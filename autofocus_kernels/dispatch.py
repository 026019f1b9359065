"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import importlib
import logging
import os
import platform
from functools import lru_cache
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

from .backends import CannotRun
from .geometry import Geometry

logger = logging.getLogger("autofocus_kernels")

ENVIRONMENT_VARIABLE = "AUTOFOCUS_BACKEND"
BACKENDS = ("reference", "cpu", "triton", "cuda")
# Tried in this order; the reference takes every call and so ends every list.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


def backend_module(name: str) -> ModuleType:
    return importlib.import_module(f"autofocus_kernels.backends.{name}")


def check_backend_name(name: Optional[str], source: str = "backend") -> None:
    """Raises ValueError, naming ``source``, unless ``name`` is None or one of :data:`BACKENDS`."""
    if name is not None and not (isinstance(name, str) and name in BACKENDS):
        raise ValueError(f"{source} must be None or one of {', '.join(BACKENDS)}, got {name!r}")


def run(
    function: str, requested: Optional[str], geometry: Geometry, input: Tensor, weight: Tensor, branch_mode: bool,
    *arguments,
) -> None:
    """Calls ``function(*arguments)`` of the backend for this call.

    ``requested``, or else the environment variable AUTOFOCUS_BACKEND, forces a backend; otherwise it is the first of
    the device's preference list that takes the call and does not find, while it runs, that it cannot. Of a backend that
    lacks the function, the reference's is called.

    Raises:
        RuntimeError: a forced backend cannot run this call; the message gives its reason.
    """
    forced = requested or os.environ.get(ENVIRONMENT_VARIABLE) or None
    check_backend_name(forced, "backend" if requested else ENVIRONMENT_VARIABLE)
    names = PREFERENCE.get(input.device.type, ("reference",)) if forced is None else (forced,)
    for name in names:
        module = backend_module(name)
        reason = module.can_use(geometry, input, weight, branch_mode)
        if reason is None:
            if not hasattr(module, function):
                log_refusal(name, f"it has no {function}; the reference computes it")
                module = backend_module("reference")
            try:
                return getattr(module, function)(*arguments)
            except CannotRun as error:
                reason = str(error)
        if forced is not None:
            raise RuntimeError(f"backend {forced!r} cannot run this call: {reason}")
        log_refusal(name, reason)
    raise AssertionError("the reference backend takes every call")


@lru_cache(maxsize=None)
def log_refusal(name: str, reason: str) -> None:
    """One log line per backend and reason, so that a slow fallback never passes unnoticed."""
    logger.warning("backend %r is not used: %s", name, reason)


def available_backends() -> dict[str, Optional[str]]:
    """Backend name -> None if it can run in this process, else the reason it cannot."""
    return {name: backend_module(name).unavailable() for name in BACKENDS}


def show_config() -> str:
    """Versions, devices and backends of this process, for bug reports."""
    from . import __version__

    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    lines = [
        f"autofocus_kernels {__version__}",
        f"python            {platform.python_version()} on {platform.platform()}",
        f"torch             {torch.__version__}, {torch.get_num_threads()} CPU threads",
        f"cpu capability    {torch.backends.cpu.get_cpu_capability()}",
    ]
    if torch.cuda.is_available():
        lines += [
            f"cuda device {i}     {torch.cuda.get_device_name(i)}"
            for i in range(torch.cuda.device_count())
        ]
    lines.append(f"{ENVIRONMENT_VARIABLE} {forced if forced else 'not set'}")
    lines += [
        f"backend {name:<9} {'available' if reason is None else 'unavailable: ' + reason}"
        for name, reason in available_backends().items()
    ]
    return "\n".join(lines)
