"""The CUDA C++ kernels of csrc/cuda.

Two tiers: a simple one that takes every geometry and dtype, and a fast one for 16-bit tensors, float32 where torch
allows TF32, and kernels of 1 or 3 taps. The library picks one for every pass (docs/cuda.md);
AUTOFOCUS_CUDA_TIER=simple keeps it to the first.
"""

from __future__ import annotations

import torch

from ..call import Call, allows_tf32
from .compiled import CompiledBackend
from .interface import MINIMUM_CAPABILITY

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

    def tf32(self, call: Call) -> bool:
        return allows_tf32(call.weight.dtype)

    def fast_refusal(self, pass_name: str, call: Call) -> str | None:
        """Why the fast tier does not take a pass of a call that the backend takes; None if it does.

        Args:
            pass_name: one of :data:`PASSES`; that of the weight serves the branch scale too.
        """
        call = call.as_3d()
        geometry = call.geometry
        return (
            self.operators.fast_refusal(
                pass_name, call.input, call.weight, list(geometry.output_size), *geometry.integers, self.tf32(call)
            )
            or None
        )

    def is_fast(self, function: str, call: Call, arguments: tuple) -> bool:
        """Whether the fast tier has every pass of ``function(call, *arguments)`` of a call that the backend takes.

        What branch norm does position by position (statistics, the gradients of branches) exists in one tier and does
        not count. A function that does only that is not fast.
        """
        passes = _passes(function, arguments)
        return bool(passes) and all(self.fast_refusal(name, call) is None for name in passes)


def _passes(function: str, arguments: tuple) -> list[str]:
    if function in ("forward", "branch_statistics"):
        return ["forward"]
    if function == "backward":
        gradients = arguments[1]
        wanted = {
            "grad_input": gradients.input is not None,
            "grad_attention": gradients.attention is not None,
            "grad_weight": gradients.weight is not None or gradients.branch_scale is not None,
        }
    elif function == "branch_norm_backward":
        *_, grad_input, grad_weight = arguments
        wanted = {"grad_input": grad_input is not None, "grad_weight": grad_weight is not None}
    else:
        wanted = {}
    return [name for name, is_wanted in wanted.items() if is_wanted]


backend = CudaBackend("cuda", "cuda", 2**31 - 1)
