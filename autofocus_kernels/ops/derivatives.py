"""Derivatives of the convolution's operators: autograd, double backward, forward mode.

The operator is linear in each of input, weight, attention and branch_scale, so one derivation serves double backward
and forward mode: replace one argument by its tangent, sum over the arguments (docs/math.md, section 4). Only the
arguments are saved for backward, never a branch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..call import Call, operator_arguments
from . import conv
from .conv import ATTENTION, BIAS, INPUT, SCALE, SHIFT, WEIGHT
from .recording import Derivative, primals_of, recorded, register, traced, unrecorded
from .terms import constant_term, constant_term_grad


def apply(call: Call) -> Tensor:
    """One differentiable call."""
    if traced() and torch.onnx.is_in_onnx_export():  # ONNX has no such operator, but convolutions
        return reference.weighted_sum(call)
    return _forward(*operator_arguments(call))


def _forward(*arguments) -> Tensor:
    return recorded(torch.ops.autofocus.forward, _Autofocus, conv.forward, arguments)


def _backward(*arguments) -> tuple[Tensor, ...]:
    return recorded(torch.ops.autofocus.backward, _AutofocusBackward, conv.backward, arguments)


def _tangent_terms(primals, tangents):
    """For each tangent of an argument that meets the weight: its slot and the arguments of the term it gives.

    Bias and shift do not multiply input, weight or scale, so they drop out of those terms.
    """
    for slot in (INPUT, WEIGHT, ATTENTION, SCALE):
        if tangents[slot] is not None:
            term = list(primals)
            term[slot] = tangents[slot]
            if slot != ATTENTION:
                term[BIAS] = term[SHIFT] = None
            yield slot, term


def _tangent(primals, tangents, settings: tuple) -> Tensor | None:
    """The directional derivative of the forward; None if every tangent is None."""
    terms = [_forward(*term, *settings) for _, term in _tangent_terms(primals, tangents)]
    if tangents[BIAS] is not None or tangents[SHIFT] is not None:
        terms.append(constant_term(primals[ATTENTION], tangents[BIAS], tangents[SHIFT]))
    return sum(terms[1:], terms[0]) if terms else None


def _gradients_tangent(grad_output, primals, tangents, settings: tuple, mask):
    """The directional derivative, along ``tangents`` of the primals, of the gradients named by ``mask``.

    It is also, by symmetry, the gradient for the primals of ``<G, tangent(tangents)>``.
    """
    results: list[Tensor | None] = [None] * 6

    def accumulate(slot: int, value: Tensor) -> None:
        results[slot] = value if results[slot] is None else results[slot] + value

    for slot, term in _tangent_terms(primals, tangents):
        term_mask = [
            wanted and i != slot and argument is not None for i, (wanted, argument) in enumerate(zip(mask, term))
        ]
        if any(term_mask):
            gradients = _backward(grad_output, *term, *settings, term_mask)
            for i in range(6):
                if term_mask[i]:
                    accumulate(i, gradients[i])
    if mask[ATTENTION] and (tangents[BIAS] is not None or tangents[SHIFT] is not None):
        accumulate(
            ATTENTION,
            constant_term_grad(grad_output, primals[ATTENTION], tangents[BIAS], tangents[SHIFT]),
        )
    return results


class _Autofocus(Derivative):
    """The forward operator."""

    @staticmethod
    def forward(*inputs):
        return unrecorded(torch.ops.autofocus.forward, conv.forward, inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.save_for_forward(*inputs[:6])
        ctx.settings = inputs[6:]

    @staticmethod
    def backward(ctx, grad_output):
        mask = list(ctx.needs_input_grad[:6])
        gradients = _backward(grad_output, *ctx.saved_tensors, *ctx.settings, mask)
        return *(g if wanted else None for g, wanted in zip(gradients, mask)), None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        with primals_of(ctx.saved_tensors) as primals:
            return _tangent(primals, tangents[:6], ctx.settings)


class _AutofocusBackward(Derivative):
    """The backward operator: the backward of :class:`_Autofocus`, itself differentiable."""

    @staticmethod
    def forward(*inputs):
        return unrecorded(torch.ops.autofocus.backward, conv.backward, inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.save_for_forward(*inputs[:7])
        ctx.settings = inputs[7:11]
        ctx.output_mask = inputs[11]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grad_gradients):
        """With ``t_i`` the gradients of the wanted gradients, the loss is ``<G, tangent(t)>``: differentiate that."""
        grad_output, *primals = ctx.saved_tensors
        tangents = [grad if wanted else None for grad, wanted in zip(grad_gradients, ctx.output_mask)]
        needs_grad_output, *needs = ctx.needs_input_grad[:7]
        results = _gradients_tangent(grad_output, primals, tangents, ctx.settings, needs)
        grad_grad_output = _tangent(primals, tangents, ctx.settings) if needs_grad_output else None
        return grad_grad_output, *results, None, None, None, None, None

    @staticmethod
    def jvp(ctx, grad_output_tangent, *tangents):
        mask = ctx.output_mask
        with primals_of(ctx.saved_tensors) as (grad_output, *primals):
            results = _gradients_tangent(grad_output, primals, tangents[:6], ctx.settings, mask)
            if grad_output_tangent is not None:
                along = _backward(grad_output_tangent, *primals, *ctx.settings, mask)
                results = [r if l is None else l if r is None else r + l for r, l in zip(results, along)]
        return tuple(
            primals[INPUT].new_zeros((0,)) if not wanted else torch.zeros_like(primal) if result is None else result
            for wanted, primal, result in zip(mask, primals, results)
        )


register("autofocus::forward", _Autofocus)
register("autofocus::backward", _AutofocusBackward)
