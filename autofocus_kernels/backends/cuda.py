"""The CUDA C++ kernels of csrc/cuda.

Two tiers: a simple one that takes every geometry and dtype, and a fast one for 16-bit tensors and kernels of 1 or 3
taps; the library picks one for every pass (docs/cuda.md); AUTOFOCUS_CUDA_TIER=simple keeps it to the first.
"""

from __future__ import annotations

import torch

from ..call import Call
from .compiled import CompiledBackend

MINIMUM_CAPABILITY = (8, 0)
PASSES = ("forward", "grad_input", "grad_attention", "grad_weight")


class CudaBackend(CompiledBackend):
    checked = True

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return super().unavailable()

    def refusal(self, call: Call) -> str | None:
        reason = super().refusal(call)
        if reason is not None:
            return reason
        device = call.input.device
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return f"{device} has compute capability {capability}, the library is built for {MINIMUM_CAPABILITY} on"
        return None

    def fast_refusal(self, pass_name: str, call: Call) -> str | None:
        """Why the fast tier does not take a pass of a call that the backend takes; None if it does.

        Args:
            pass_name: one of :data:`PASSES`; that of the weight serves the branch scale too.
        """
        call = call.as_3d()
        geometry = call.geometry
        return (
            self.operators.fast_refusal(
                pass_name, call.input, call.weight, list(geometry.output_size), *geometry.integers
            )
            or None
        )


backend = CudaBackend("cuda", "cuda", 2**31 - 1)
