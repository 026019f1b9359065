"""The autofocus convolution as torch.library operators: schemas, implementations, fakes.

``torch.ops.autofocus.forward`` and ``torch.ops.autofocus.backward`` take validated arguments; call
:func:`autofocus_kernels.autofocus_conv`. An implementation allocates, chooses a backend and runs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..backends.interface import Gradients
from ..call import Call, from_operator
from .allocation import allocate_gradients, allocate_output
from .terms import attention_weighted_sums, constant_term, constant_term_grad, sum_into

# The six tensor arguments, in the order of the operator's schema, of a Call and of the gradients.
INPUT, WEIGHT, ATTENTION, BIAS, SCALE, SHIFT = range(6)

_TENSORS = "Tensor input, Tensor weight, Tensor attention, Tensor? bias, Tensor? branch_scale, Tensor? branch_shift"
# call.operator_settings, to which `settings` refers below.
_SETTINGS = "int[] dilations, int[] stride, int[] origin, str? backend"
torch.library.define("autofocus::forward", f"({_TENSORS}, {_SETTINGS}) -> Tensor")
torch.library.define(
    "autofocus::backward",
    f"(Tensor grad_output, {_TENSORS}, {_SETTINGS}, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def forward(*arguments):
    call = from_operator(*arguments)
    output = allocate_output(call.input, call.weight, call.attention)
    if output.numel() == 0:
        return output
    if call.input.numel() == 0:
        if call.bias is None and call.branch_shift is None:
            return output.zero_()
        return output.copy_(constant_term(call.attention, call.bias, call.branch_shift))
    dispatch.run("forward", call, output)
    return output


torch.library.impl("autofocus::forward", "CompositeExplicitAutograd")(forward)


@torch.library.register_fake("autofocus::forward")
def _forward_fake(input, weight, attention, *_):
    return allocate_output(input, weight, attention)


def backward(grad_output, *arguments):
    *arguments, output_mask = arguments
    call = from_operator(*arguments)
    gradients = allocate_gradients(call[:6], output_mask)
    if output_mask[BIAS] or output_mask[SHIFT]:
        sums = attention_weighted_sums(call.attention, grad_output)
        if output_mask[BIAS]:
            sum_into(gradients[BIAS], sums, (0, 1))
        if output_mask[SHIFT]:
            sum_into(gradients[SHIFT], sums, 0)

    of_backend = Gradients(*(gradients[i] if output_mask[i] else None for i in (INPUT, WEIGHT, ATTENTION, SCALE)))
    if call.input.numel() == 0 or grad_output.numel() == 0:
        _backward_of_nothing(call, grad_output, of_backend)
    elif any(gradient is not None for gradient in of_backend):
        dispatch.run("backward", call, grad_output, of_backend)
    return tuple(gradients)


def _backward_of_nothing(call: Call, grad_output: Tensor, gradients: Gradients) -> None:
    """Where input or output has no voxels, which no backend takes: only the terms of bias and shift are left."""
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()
    if gradients.attention is not None and (call.bias is not None or call.branch_shift is not None):
        gradients.attention.copy_(constant_term_grad(grad_output, call.attention, call.bias, call.branch_shift))


torch.library.impl("autofocus::backward", "CompositeExplicitAutograd")(backward)


@torch.library.register_fake("autofocus::backward")
def _backward_fake(grad_output, *arguments):
    return tuple(allocate_gradients(arguments[:6], arguments[-1]))
