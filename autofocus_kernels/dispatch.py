"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from typing import Any

import torch

from . import self_check
from .backends.interface import Backend, CannotRun, compute
from .call import Call, allows_tf32

logger = logging.getLogger("autofocus_kernels")

ENVIRONMENT_VARIABLE = "AUTOFOCUS_BACKEND"
BACKENDS = ("reference", "cpu", "triton", "cuda")
# Tried in this order; the reference takes every call and so ends every list.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
# Compute capability -> dtypes of the calls that go to cuda before Triton, if its fast tier has every pass of the call.
CUDA_FIRST = {
    # Predicted, not measured (benchmarks/NOTES.md): 1.3 to 1.8 times as fast as Triton was measured on an H100 in
    # inference, twice in training; and Triton's calls took 0.4 ms more of the host. float32 only where torch allows
    # TF32: the fast tier has no other float32.
    (9, 0): (torch.float16, torch.bfloat16, torch.float32),
}
# For the rest Triton stays first. Other capabilities were never run: without wgmma, by ldmatrix and mma.sync, the
# prediction does not hold. Other dtypes, and passes that the fast tier leaves to the simple one: 2.81 ms on an H100,
# in 2D, where Triton took 0.061. Passes over existing branches were not measured: neighbouring threads of Triton read
# neighbouring channels of channels-last tensors, cuda's read neighbouring positions.


@cache
def backend_named(name: str) -> Backend:
    """The backend ``name``, one of :data:`BACKENDS`, imported when it is first asked for."""
    return importlib.import_module(f"autofocus_kernels.backends.{name}").backend


def check_backend_name(name: str | None, source: str = "backend") -> None:
    """Raises ValueError, naming ``source``, unless ``name`` is None or one of :data:`BACKENDS`."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} must be None or one of {', '.join(BACKENDS)}, got {name!r}")


def forced_backend() -> str | None:
    """The name in the environment variable, unchecked; None if it is not set."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or None


def run(function: str, call: Call, *arguments) -> None:
    """Calls ``function(call, *arguments)`` of the backend for this call (backends/interface.py).

    ``call.backend``, or else the environment variable AUTOFOCUS_BACKEND, forces a backend; otherwise it is the first
    of :func:`preferred` that takes the call, passes its self-check (self_check.py) and does not find, while it runs,
    that it cannot.

    Raises:
        RuntimeError: a forced backend cannot run this call, or fails its self-check; the message gives the reason.
    """
    forced = call.backend or forced_backend()
    if forced is None:
        names = preferred(function, call, arguments)
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
                return compute(backend, function, call, arguments)
            except CannotRun as error:
                reason = str(error)
        if forced is not None:
            raise RuntimeError(f"backend {forced!r} cannot run this call: {reason}")
        log_refusal(name, reason)
    raise AssertionError("the reference backend takes every call")


def preferred(function: str, call: Call, arguments: tuple) -> tuple[str, ...]:
    """The backends to try for ``function(call, *arguments)``, in this order."""
    weight = call.weight
    device, dtype = weight.device, weight.dtype
    names = PREFERENCE.get(device.type, ("reference",))
    if device.type != "cuda" or dtype not in _CUDA_FIRST_DTYPES:
        return names
    # Every call on a GPU passes here, so the choice is kept. Which gradients are wanted decides on the passes.
    wanted = arguments[1] if function == "backward" else arguments
    absent = [tensor is None for tensor in wanted]
    key = (function, device, dtype, allows_tf32(dtype), call.geometry, call.input.shape[0], weight.shape, *absent)
    try:
        return _preferred[key]
    except KeyError:
        pass
    if dtype in CUDA_FIRST.get(torch.cuda.get_device_capability(device), ()):
        cuda: Any = backend_named("cuda")  # the only one with is_fast
        if cuda.refusal(call) is None and cuda.is_fast(function, call, arguments):
            names = ("cuda", *(name for name in names if name != "cuda"))
    if len(_preferred) >= _MOST_PREFERRED:
        _preferred.clear()
    _preferred[key] = names
    return names


_CUDA_FIRST_DTYPES = {dtype for dtypes in CUDA_FIRST.values() for dtype in dtypes}
_preferred: dict[tuple, tuple[str, ...]] = {}
_MOST_PREFERRED = 4096


@cache
def log_refusal(name: str, reason: str) -> None:
    """One log line per backend and reason, so that a slow fallback never passes unnoticed."""
    logger.warning("backend %r is not used: %s", name, reason)


def available_backends() -> dict[str, str | None]:
    """Backend name -> None if it can run in this process, else the reason it cannot."""
    return {name: backend_named(name).unavailable() for name in BACKENDS}
