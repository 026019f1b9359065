"""The backends of the compiled libraries: the same operators in both, behind ``torch.ops.autofocus_<name>``.

They know three spatial axes and contiguous vectors only (csrc/binding/operators.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call, as_3d
from . import native
from .interface import Gradients

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_BRANCHES = 32  # kMaxBranches of csrc/geometry.h


class CompiledBackend:
    """The kernels of library ``name``.

    Args:
        device_type: of the tensors that they read.
        largest: the largest integer of a geometry that fits their arithmetic.
    """

    checked = tiles_by_volume = False

    def __init__(self, name: str, device_type: str, largest: int) -> None:
        self.name = name
        self.device_type = device_type
        self.largest = largest
        self.operators = getattr(torch.ops, f"autofocus_{name}")

    def unavailable(self) -> str | None:
        return native.unavailable(self.name)

    def refusal(self, call: Call) -> str | None:
        device, dtype, geometry = call.input.device, call.input.dtype, call.geometry
        if device.type != self.device_type:
            return f"tensors are on {device}, the {self.name} backend reads memory of the device {self.device_type}"
        reason = self.unavailable()
        if reason is not None:
            return reason
        if dtype not in DTYPES:
            return f"dtype {dtype} is none of float32, float64, bfloat16, float16"
        if geometry.num_branches > MAX_BRANCHES:
            return f"{geometry.num_branches} branches, the kernels take at most {MAX_BRANCHES}"
        if geometry.largest > self.largest:
            return (
                f"dilations, stride, padding or output size come to {geometry.largest}, the kernels take at most "
                f"{self.largest}"
            )
        return None

    def tf32(self, call: Call) -> bool:
        """Whether the kernels may multiply the call's tensors as TF32."""
        return False

    def choices(self, call: Call) -> tuple[bool, bool]:
        """The last arguments of the operators (csrc/call.h)."""
        return self.tf32(call), call.geometry.few_blocks

    def forward(self, call: Call, output: Tensor) -> None:
        call = call.as_3d()
        self.operators.forward(
            *call[:3], *_contiguous(*call[3:6]), as_3d(output), *call.geometry.integers, *self.choices(call)
        )

    def backward(self, call: Call, grad_output: Tensor, gradients: Gradients) -> None:
        call = call.as_3d()
        *volumes, grad_branch_scale = gradients
        self.operators.backward(
            as_3d(grad_output),
            *call[:3],
            *_contiguous(*call[3:6]),
            *map(as_3d, volumes),
            grad_branch_scale,
            *call.geometry.integers,
            *self.choices(call),
        )

    def branch_statistics(self, call: Call, branches: Tensor, mean: Tensor | None, var: Tensor | None) -> None:
        call = call.as_3d()
        self.operators.branch_statistics(
            call.input, call.weight, as_3d(branches, 3), mean, var, *call.geometry.integers, *self.choices(call)
        )

    def branch_combine(self, call: Call, branches: Tensor, scale: Tensor, shift: Tensor, output: Tensor) -> None:
        self.operators.branch_combine(
            as_3d(branches, 3), as_3d(call.attention), *_contiguous(scale, shift), as_3d(output)
        )

    def branch_reduce(
        self,
        call: Call,
        grad_output: Tensor,
        branches: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        grad_attention: Tensor | None,
        grad_scale: Tensor,
        grad_shift: Tensor,
    ) -> None:
        self.operators.branch_reduce(
            as_3d(grad_output),
            as_3d(branches, 3),
            as_3d(call.attention),
            *_contiguous(mean, scale, shift),
            as_3d(grad_attention),
            grad_scale,
            grad_shift,
        )

    def branch_norm_backward(
        self,
        call: Call,
        grad_output: Tensor,
        branches: Tensor,
        a_coef: Tensor,
        b_coef: Tensor,
        c_coef: Tensor,
        grad_branches: Tensor,
        grad_input: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        call = call.as_3d()
        self.operators.branch_norm_backward(
            as_3d(grad_output),
            *call[:3],
            as_3d(branches, 3),
            *_contiguous(a_coef, b_coef, c_coef),
            as_3d(grad_branches, 3),
            as_3d(grad_input),
            as_3d(grad_weight),
            *call.geometry.integers,
            *self.choices(call),
        )


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    return [vector if vector is None else vector.contiguous() for vector in vectors]
