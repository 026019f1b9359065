"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache

from . import self_check
from .backends.interface import Backend, CannotRun
from .call import Call

logger = logging.getLogger("autofocus_kernels")

ENVIRONMENT_VARIABLE = "AUTOFOCUS_BACKEND"
BACKENDS = ("reference", "cpu", "triton", "cuda")
# Tried in this order; the reference takes every call and so ends every list.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


@cache
def backend_named(name: str) -> Backend:
    """The backend ``name``, one of :data:`BACKENDS`, imported when it is first asked for."""
    return importlib.import_module(f"autofocus_kernels.backends.{name}").backend


def check_backend_name(name: str | None, source: str = "backend") -> None:
    """Raises ValueError, naming ``source``, unless ``name`` is None or one of :data:`BACKENDS`."""
    if name is not None and not (isinstance(name, str) and name in BACKENDS):
        raise ValueError(f"{source} must be None or one of {', '.join(BACKENDS)}, got {name!r}")


def run(function: str, call: Call, *arguments) -> None:
    """Calls ``function(call, *arguments)`` of the backend for this call (backends/interface.py).

    ``call.backend``, or else the environment variable AUTOFOCUS_BACKEND, forces a backend; otherwise it is the first
    of the device's preference list that takes the call, passes its self-check (self_check.py) and does not find, while
    it runs, that it cannot.

    Raises:
        RuntimeError: a forced backend cannot run this call, or fails its self-check; the message gives the reason.
    """
    forced = call.backend or os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or None
    if forced is None:
        names = PREFERENCE.get(call.input.device.type, ("reference",))
    else:
        check_backend_name(forced, "backend" if call.backend else ENVIRONMENT_VARIABLE)
        names = (forced,)
    for name in names:
        backend = backend_named(name)
        reason = backend.refusal(call)
        if reason is None and backend.checked:
            reason = self_check.refusal(name, backend, function, call, arguments)
        if reason is None:
            try:
                return getattr(backend, function)(call, *arguments)
            except CannotRun as error:
                reason = str(error)
        if forced is not None:
            raise RuntimeError(f"backend {forced!r} cannot run this call: {reason}")
        log_refusal(name, reason)
    raise AssertionError("the reference backend takes every call")


@cache
def log_refusal(name: str, reason: str) -> None:
    """One log line per backend and reason, so that a slow fallback never passes unnoticed."""
    logger.warning("backend %r is not used: %s", name, reason)


def available_backends() -> dict[str, str | None]:
    """Backend name -> None if it can run in this process, else the reason it cannot."""
    return {name: backend_named(name).unavailable() for name in BACKENDS}
