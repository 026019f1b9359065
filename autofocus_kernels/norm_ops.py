"""Batch normalisation of every branch in training, as torch.library operators.

``out = sum_k a_k BN_k(y_k)``, with each ``BN_k`` over batch and space by its own statistics (docs/branch_norm.md).
The statistics have to be known before branches can be summed, and the gradient of a branch needs that branch, so
the branches are held in one buffer ``[K, N, O, *S_out]`` while the forward or the backward of a layer runs. Between
the two it is kept (``save_branches``) or freed and computed again.

A backend may give these functions next to those of backends/__init__.py; for one that is absent the reference's is
used, with one log line. Everything said there about tensors holds. ``branches[k]`` is y_k ``[N, O, *S_out]``, dense
in the memory format of ``input`` and of its dtype. The vectors, ``[K, O]`` and contiguous, are float64 for float64
tensors and float32 for all others.

``branch_statistics(geometry, input, weight, branches, mean, var) -> None``
    fills ``branches`` and, unless both are None, ``mean`` and ``var`` (biased) of each branch and channel over batch
    and space. The variance must not be a difference of large sums: two passes, shifted sums or Welford.
``branch_combine(branches, attention, scale, shift, output) -> None``
    fills ``output = sum_k a_k (scale_k y_k + shift_k)``.
``branch_reduce(grad_output, branches, attention, mean, scale, shift, grad_attention, grad_scale, grad_shift) -> None``
    fills ``grad_shift = sum_p a_k G``, ``grad_scale = sum_p a_k G (y_k - mean_k)`` and, unless it is None,
    ``grad_attention = sum_o G (scale_k y_k + shift_k)``.
``branch_norm_backward(geometry, grad_output, input, weight, attention, branches, a_coef, b_coef, c_coef,
grad_branches, grad_input, grad_weight) -> None``
    fills ``grad_input`` and ``grad_weight`` (either may be None), the gradients of input and weight where that of
    branch k is ``dy_k = a_coef_k a_k G + b_coef_k y_k + c_coef_k``. ``grad_branches`` is a buffer to hold dy_k:
    like ``branches``, or ``branches`` itself where that may be overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference
from .dispatch import backend_module, choose, log_refusal
from .geometry import Geometry

_PRIMALS = "Tensor input, Tensor weight, Tensor attention"
_AFFINE = "Tensor norm_weight, Tensor norm_bias"
_SETTINGS = (
    "float[] eps, bool save_branches, str? group, int[] dilations, int[] stride, int[] origin, str? backend"
)
torch.library.define(
    "autofocus::branch_norm",
    f"({_PRIMALS}, Tensor? bias, {_AFFINE}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "autofocus::branch_norm_backward",
    f"(Tensor grad_output, {_PRIMALS}, {_AFFINE}, Tensor mean, Tensor var, Tensor count, Tensor branches, "
    f"{_SETTINGS}, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class NormSettings(NamedTuple):
    """The arguments of the operators that are no tensors; the last four are those of ``ops.Settings``."""

    eps: list[float]
    save_branches: bool
    group: Optional[str]
    dilations: list[int]
    stride: list[int]
    origin: list[int]
    backend: Optional[str]

    def geometry(self, input: Tensor, weight: Tensor, attention: Tensor) -> Geometry:
        return ops.Settings(*self[3:]).geometry(input, weight, attention)


class Statistics(NamedTuple):
    """Mean and biased variance ``[K, O]`` of the branches without bias, over ``count`` (0-dim) values each."""

    mean: Tensor
    var: Tensor
    count: Tensor
