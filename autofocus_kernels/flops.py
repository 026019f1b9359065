"""Formulas for torch.utils.flop_counter: ``FlopCounterMode`` counts the package's operators like any convolution.

What is counted is what an operator computes by its definition: convolutions of the input with the weight, one per
branch, a multiplication and an addition per voxel of the output, tap, input and output channel. That is what
``FlopCounterMode`` counts for the layer in plain PyTorch, so models can be compared whatever computes their layers. A
backend that blends the inputs first and convolves once gets by with about K times fewer operations. As PyTorch does,
the formulas count padding in and elementwise work (attention, bias, norms) out, and count again what a backward
recomputes: nothing keeps the branches, and the gradients of attention, scales and norms need them.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys

import torch

from . import ops  # noqa: F401  (it defines the operators)


def forward(input, weight, attention, *_, **__) -> int:
    """Operations of one call; where the operator takes tensors, a formula takes their shapes."""
    return _convolutions(weight, attention)


def backward(
    grad_output,
    input,
    weight,
    attention,
    bias,
    branch_scale,
    branch_shift,
    dilations,
    stride,
    origin,
    backend,
    output_mask,
    **_,
) -> int:
    of_input, of_weight, of_attention, _, of_scale, _ = output_mask
    return (of_input + of_weight + (of_attention or of_scale)) * _convolutions(weight, attention)


def branch_norm_backward(
    grad_output,
    input,
    weight,
    attention,
    norm_weight,
    norm_bias,
    mean,
    var,
    count,
    branches,
    eps,
    save_branches,
    group,
    dilations,
    stride,
    origin,
    backend,
    output_mask,
    **_,
) -> int:
    of_input, of_weight, *_ = output_mask
    return (of_input + of_weight + (not save_branches)) * _convolutions(weight, attention)


def _convolutions(weight, attention) -> int:
    """``2 N O C K T P``: one pass over the taps of all branches."""
    return 2 * math.prod(weight) * math.prod(attention)


_FORMULAS = {
    "forward": forward,
    "backward": backward,
    "branch_norm": forward,
    "branch_norm_backward": branch_norm_backward,
}


def _register(flop_counter) -> None:
    for name, formula in _FORMULAS.items():
        flop_counter.register_flop_formula(getattr(torch.ops.autofocus, name))(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas as soon as somebody imports torch.utils.flop_counter.

    Importing that module here would make every program import Triton, which it imports.
    """

    module = "torch.utils.flop_counter"

    def find_spec(self, name, path, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


if _WhenImported.module in sys.modules:
    _register(sys.modules[_WhenImported.module])
else:
    sys.meta_path.insert(0, _WhenImported())
