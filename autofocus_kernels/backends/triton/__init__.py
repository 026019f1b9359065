"""The Triton kernels as a backend (docs/triton.md). Triton is imported by the first call, not by the import."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import cast

import torch

from ...call import Call
from ..interface import MINIMUM_CAPABILITY, Backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Coordinates are 32-bit in the kernels, and a read this far out marks one that is switched off (addressing.OUTSIDE).
COORDINATE_LIMIT = 1 << 30
# Of a kernel's sizes: a bit each in a word (addressing.word_of).
TAPS_LIMIT = 63
_NORM = ("branch_statistics", "branch_combine", "branch_reduce", "branch_norm_backward")
_MODULES = {"forward": "launch", "backward": "launch", **dict.fromkeys(_NORM, "norm")}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors; must not change once Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if not interpreted() and not torch.cuda.is_available():
        return "there is no GPU that torch can use (and TRITON_INTERPRET is not 1)"
    return None


class TritonBackend:
    """Refuses or takes a call without Triton; what computes is in launch.py and norm.py, which import it."""

    checked = tiles_by_volume = True

    def unavailable(self) -> str | None:
        return _unavailable()

    def refusal(self, call: Call) -> str | None:
        reason = _unavailable()
        if reason is not None:
            return reason
        device_type, dtype = ("cpu" if interpreted() else "cuda"), call.input.dtype
        device = call.input.device
        if device.type != device_type:
            return f"tensors are on {device}, the kernels run on {device_type}"
        if dtype not in DTYPES:
            return f"dtype {dtype} is none of float16, bfloat16, float32"
        if device_type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < MINIMUM_CAPABILITY:
                return f"compute capability {capability} is below {MINIMUM_CAPABILITY}"
        if call.geometry.farthest >= COORDINATE_LIMIT:
            return f"coordinates of {COORDINATE_LIMIT} and more are read"
        if sum(call.geometry.as_3d.kernel_size) > TAPS_LIMIT:
            return f"the kernel's sizes add up to more than {TAPS_LIMIT}"
        return None

    def __getattr__(self, name: str):
        """The functions that compute, at their first use."""
        if name not in _MODULES:
            raise AttributeError(f"the triton backend has no {name}")
        function = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        setattr(self, name, function)
        return function


backend = cast(Backend, TritonBackend())
