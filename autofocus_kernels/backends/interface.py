"""What a backend is, and what it may expect of the tensors that it is handed."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..call import Call

# What the kernels for NVIDIA GPUs, of either backend, need at least.
MINIMUM_CAPABILITY = (8, 0)


class CannotRun(RuntimeError):
    """A backend found only while it ran a call that it cannot run it on this device; the message is the reason."""


def compute(backend: Backend, function: str, call: Call, arguments: tuple) -> None:
    """``backend.function(call, *arguments)``, which raises torch.OutOfMemoryError whoever ran out of memory.

    A compiled library itself can only raise RuntimeError: torch's stable ABI hands on no other.
    """
    try:
        getattr(backend, function)(call, *arguments)
    except RuntimeError as error:
        if type(error) is RuntimeError and "out of memory" in str(error):
            # If an earlier kernel broke the GPU, asking for memory may be what fails first: then this raises its error.
            if call.input.is_cuda and not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize(call.input.device)
            raise torch.OutOfMemoryError(str(error)) from error
        raise


class Gradients(NamedTuple):
    """Where a backward writes; None where no gradient is wanted."""

    input: Tensor | None  # [N, C, *S]
    weight: Tensor | None  # [O, C, *kernel_size]
    attention: Tensor | None  # [N, K, *S_out]
    branch_scale: Tensor | None  # [K, O]


class Backend(Protocol):
    """Kernels for the calls of some devices and dtypes; the object ``backend`` of its module.

    A call is validated: its tensors have one dtype and device and any strides, and no axis is empty. What a function
    is to fill arrives allocated and uninitialised. A function that finds only when it runs that it cannot raises
    :class:`CannotRun`, and another backend takes the call.

    The last four functions serve batch-normalised branches (ops/branch_norm.py), whose calls have no bias, scale and
    shift of their own. ``branches`` are the y_k ``[K, N, O, *S_out]``, each dense in the memory format of the call's
    input and of its dtype. The vectors beside them, ``[K, O]`` and contiguous, are float64 for float64 tensors and
    float32 for all others.

    Attributes:
        checked: whether self_check.py tries each kind of call before the first one runs: for backends whose code meets
            hardware and compilers that it was never tried with.
        tiles_by_volume: whether the size of a volume chooses among compiled kernels, so that each size is a kind of its
            own. Such a backend takes the size from ``Geometry.tiled``. A checked one shares a problem with
            ``Geometry.few_blocks`` among few thread blocks; nothing but how sums are ordered and rounded may depend on
            that.
    """

    checked: bool
    tiles_by_volume: bool

    def unavailable(self) -> str | None:
        """Why the backend cannot run in this process; None if it can."""

    def refusal(self, call: Call) -> str | None:
        """Why the backend does not take this call; None if it does. Cheap: asked at every call."""

    def forward(self, call: Call, output: Tensor) -> None:
        """Fills ``output`` ``[N, O, *S_out]``."""

    def backward(self, call: Call, grad_output: Tensor, gradients: Gradients) -> None:
        """Fills the wanted gradients, given that of the output ``[N, O, *S_out]``, and does no work for the others.

        That of the attention includes the terms of bias and shift, whose own gradients ops/conv.py computes.
        """

    def branch_statistics(self, call: Call, branches: Tensor, mean: Tensor | None, var: Tensor | None) -> None:
        """Fills ``branches`` and, unless both are None, ``mean`` and ``var`` (biased) over batch and space.

        The variance must not be a difference of large sums: two passes, shifted sums or Welford.
        """

    def branch_combine(self, call: Call, branches: Tensor, scale: Tensor, shift: Tensor, output: Tensor) -> None:
        """Fills ``output = sum_k a_k (scale_k y_k + shift_k)`` ``[N, O, *S_out]``."""

    def branch_reduce(
        self,
        call: Call,
        grad_output: Tensor,  # G, [N, O, *S_out]
        branches: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        grad_attention: Tensor | None,  # [N, K, *S_out]
        grad_scale: Tensor,
        grad_shift: Tensor,
    ) -> None:
        """Fills ``grad_shift = sum_p a_k G``, ``grad_scale = sum_p a_k G (y_k - mean_k)`` and, unless it is None,
        ``grad_attention = sum_o G (scale_k y_k + shift_k)``."""

    def branch_norm_backward(
        self,
        call: Call,
        grad_output: Tensor,  # G, [N, O, *S_out]
        branches: Tensor,
        a_coef: Tensor,
        b_coef: Tensor,
        c_coef: Tensor,
        grad_branches: Tensor,
        grad_input: Tensor | None,  # [N, C, *S]
        grad_weight: Tensor | None,  # [O, C, *kernel_size]
    ) -> None:
        """Fills the wanted gradients, where that of branch k is ``dy_k = a_coef_k a_k G + b_coef_k y_k + c_coef_k``.

        ``grad_branches`` is memory for dy_k: like ``branches``, or ``branches`` itself where that may be overwritten.
        """
