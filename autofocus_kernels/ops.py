"""The autofocus convolution as torch.library operators, with everything PyTorch needs to see through them.

``torch.ops.autofocus.forward`` and ``torch.ops.autofocus.backward`` carry fakes (for torch.compile and
torch.export), vmap rules and autograd. The operator is linear in each of input, weight, attention and
branch_scale, so one derivation serves double backward and forward mode: replace one argument by its tangent,
sum over the arguments (docs/math.md, section 4). Only the arguments are saved for backward, never a branch.

The operators take validated arguments; call :func:`autofocus_kernels.autofocus_conv`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .backends.interface import Gradients
from .call import Call, from_operator, operator_arguments

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


def apply(call: Call) -> Tensor:
    """One differentiable call."""
    arguments = operator_arguments(call)
    if traced():
        if torch.onnx.is_in_onnx_export():  # ONNX has no such operator, but convolutions
            return reference.weighted_sum(call)
        return torch.ops.autofocus.forward(*arguments)
    return _recorded(torch.ops.autofocus.forward, _Autofocus, _forward, arguments)


def traced() -> bool:
    """Whether a tracer looks at operators, and so at their own autograd, not at Python.

    That own autograd is what torch.compile, torch.export and torch.jit.trace see through. It fails under functorch,
    gives silent zero tangents in forward mode and takes the host seven times as long as a Function.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _recorded(op, function: type[torch.autograd.Function], implementation, arguments: tuple):
    """``op(*arguments)``, differentiated by ``function``."""
    if transforms_active():
        return function.apply(*arguments)
    if torch.is_grad_enabled():
        # Past Function.apply, whose binding of arguments to a signature is most of its time.
        return super(torch.autograd.Function, function).apply(*arguments)
    return _unrecorded(op, implementation, arguments)


def _unrecorded(op, implementation, arguments: tuple):
    """``op(*arguments)``, with nothing for autograd to record.

    Where nobody watches operators that is ``implementation``, called directly: the dispatcher's way there and back is
    a fifth of the time of a small call.
    """
    if (
        _PLAIN.issuperset(map(type, arguments))
        and not torch.autograd.profiler._is_profiler_enabled  # it shows operators by name
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        # autograd.grad(is_grads_batched=True) has a vmap of its own, for the gradient that comes first.
        and not torch._C._functorch.is_legacy_batchedtensor(arguments[0])
    ):
        return implementation(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


# Types of an operator's arguments: no subclass of Tensor, which may have operators of its own.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), list, tuple, str})


def transforms_active() -> bool:
    """Whether functorch or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


# ------------------------------------------------------------------ the operators: allocate, choose, run


def allocate_output(input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    shape = (input.shape[0], weight.shape[0], *attention.shape[2:])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def memory_format_of(input: Tensor) -> torch.memory_format:
    if not input.is_contiguous():
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
        if channels_last is not None and input.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format


def _forward(*arguments):
    call = from_operator(*arguments)
    output = allocate_output(call.input, call.weight, call.attention)
    if output.numel() == 0:
        return output
    if call.input.numel() == 0:
        return output.copy_(_constant_term(call.attention, call.bias, call.branch_shift, output))
    dispatch.run("forward", call, output)
    return output


torch.library.impl("autofocus::forward", "CompositeExplicitAutograd")(_forward)


@torch.library.register_fake("autofocus::forward")
def _forward_fake(input, weight, attention, *_):
    return allocate_output(input, weight, attention)


def allocate_gradients(primals, output_mask) -> list[Tensor]:
    """One tensor like each wanted primal; an empty one, never read, where no gradient is wanted.

    Volumes and weight keep their layout; the vectors become contiguous, so that no kernel needs strides for them.
    """
    formats = [torch.preserve_format] * 3 + [torch.contiguous_format] * 3
    return [
        torch.empty_like(primal, memory_format=layout) if wanted else primals[INPUT].new_empty(0)
        for primal, wanted, layout in zip(primals, output_mask, formats)
    ]


def _backward(grad_output, *arguments):
    *arguments, output_mask = arguments
    call = from_operator(*arguments)
    gradients = allocate_gradients(call[:6], output_mask)
    if output_mask[BIAS] or output_mask[SHIFT]:
        sums = _attention_weighted_sums(call.attention, grad_output)
        if output_mask[BIAS]:
            _sum_into(gradients[BIAS], sums, (0, 1))
        if output_mask[SHIFT]:
            _sum_into(gradients[SHIFT], sums, 0)

    of_backend = Gradients(*(gradients[i] if output_mask[i] else None for i in (INPUT, WEIGHT, ATTENTION, SCALE)))
    if all(gradient is None for gradient in of_backend):
        pass
    elif call.input.numel() == 0 or grad_output.numel() == 0:
        for gradient in of_backend:
            if gradient is not None:
                gradient.zero_()
        if output_mask[ATTENTION] and (call.bias is not None or call.branch_shift is not None):
            gradients[ATTENTION].copy_(_constant_term_grad(grad_output, call.attention, call.bias, call.branch_shift))
    else:
        dispatch.run("backward", call, grad_output, of_backend)
    return tuple(gradients)


torch.library.impl("autofocus::backward", "CompositeExplicitAutograd")(_backward)


@torch.library.register_fake("autofocus::backward")
def _backward_fake(grad_output, *arguments):
    return tuple(allocate_gradients(arguments[:6], arguments[-1]))


# ------------------------------------------------------------------ terms that hold no convolution


def _constant_term(attention, bias, branch_shift, like: Tensor) -> Tensor:
    """``sum_k a_k h_k`` with ``h_k`` the bias or the branch shift; zeros if there is neither."""
    if branch_shift is not None:
        return torch.einsum("nk...,ko->no...", attention, branch_shift)
    if bias is not None:
        return torch.einsum("n...,o->no...", attention.sum(1), bias)
    return torch.zeros_like(like)


def _constant_term_grad(grad_output, attention, bias, branch_shift) -> Tensor:
    """The gradient of :func:`_constant_term` for attention: ``<h_k, G(p)>``."""
    if branch_shift is not None:
        return torch.einsum("no...,ko->nk...", grad_output, branch_shift)
    return torch.einsum("no...,o->n...", grad_output, bias).unsqueeze(1).expand_as(attention)


def _attention_weighted_sums(attention: Tensor, grad_output: Tensor) -> Tensor:
    """Parts, along the first axis, of ``sum_p a_k(p) G(p)`` ``[K, O]``: matrix products of grad_output as it lies.

    They are float32 for 16-bit tensors, where parts of either sign may be much larger than their sum.
    """
    if memory_format_of(grad_output) is torch.contiguous_format:
        # With K columns and not K rows: on a CPU a third of the time.
        product = _product(torch.bmm, grad_output.flatten(2), attention.flatten(2).transpose(1, 2))
        return product.transpose(1, 2)
    rows_a, rows_g = (tensor.movedim(1, -1).flatten(0, -2) for tensor in (attention, grad_output))
    return _product(torch.mm, rows_a.t(), rows_g)[None]


def _product(multiply, a: Tensor, b: Tensor) -> Tensor:
    """``multiply(a, b)``, torch.mm or torch.bmm; in float32 for 16-bit tensors."""
    if a.element_size() > 2:
        return multiply(a, b)
    if a.is_cuda and torch.version.hip is None:  # ROCm refuses it
        return multiply(a, b, out_dtype=torch.float32)
    # In pieces of the long axis, whose float32 copies stay in cache.
    pieces = zip(a.split(_PIECE, -1), b.split(_PIECE, -2))
    return sum(multiply(piece_a.float(), piece_b.float()) for piece_a, piece_b in pieces)


_PIECE = 2**14


def _sum_into(gradient: Tensor, parts: Tensor, axes) -> None:
    if gradient.dtype == parts.dtype:
        torch.sum(parts, axes, out=gradient)
    else:  # `out` of another dtype would round the parts
        gradient.copy_(parts.sum(axes))


# ------------------------------------------------------------------ autograd


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _gradients(ctx, grad_output):
    mask = list(ctx.needs_input_grad[:6])
    gradients = torch.ops.autofocus.backward(grad_output, *ctx.saved_tensors, *ctx.settings, mask)
    return *(g if wanted else None for g, wanted in zip(gradients, mask)), None, None, None, None


torch.library.register_autograd("autofocus::forward", _gradients, setup_context=_save)


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
    terms = [torch.ops.autofocus.forward(*term, *settings) for _, term in _tangent_terms(primals, tangents)]
    if tangents[BIAS] is not None or tangents[SHIFT] is not None:
        terms.append(_constant_term(primals[ATTENTION], tangents[BIAS], tangents[SHIFT], None))
    return sum(terms[1:], terms[0]) if terms else None


def _save_for_double_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:11]
    ctx.output_mask = inputs[11]
    ctx.set_materialize_grads(False)


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
            gradients = torch.ops.autofocus.backward(grad_output, *term, *settings, term_mask)
            for i in range(6):
                if term_mask[i]:
                    accumulate(i, gradients[i])
    if mask[ATTENTION] and (tangents[BIAS] is not None or tangents[SHIFT] is not None):
        accumulate(
            ATTENTION,
            _constant_term_grad(grad_output, primals[ATTENTION], tangents[BIAS], tangents[SHIFT]),
        )
    return results


def _double_gradients(ctx, *grad_gradients):
    """With ``t_i`` the gradients of the wanted gradients, the loss is ``<G, tangent(t)>``: differentiate that."""
    grad_output, *primals = ctx.saved_tensors
    tangents = [grad if wanted else None for grad, wanted in zip(grad_gradients, ctx.output_mask)]
    needs_grad_output, *needs = ctx.needs_input_grad[:7]
    results = _gradients_tangent(grad_output, primals, tangents, ctx.settings, needs)
    grad_grad_output = _tangent(primals, tangents, ctx.settings) if needs_grad_output else None
    return grad_grad_output, *results, None, None, None, None, None


torch.library.register_autograd("autofocus::backward", _double_gradients, setup_context=_save_for_double_backward)


class _Autofocus(torch.autograd.Function):
    """The forward operator where nothing is compiled (:func:`_recorded`)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return _unrecorded(torch.ops.autofocus.forward, _forward, inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:6])

    @staticmethod
    def backward(ctx, grad_output):
        mask = list(ctx.needs_input_grad[:6])
        arguments = (grad_output, *ctx.saved_tensors, *ctx.settings, mask)
        op = torch.ops.autofocus.backward
        gradients = op(*arguments) if traced() else _recorded(op, _AutofocusBackward, _backward, arguments)
        return *(g if wanted else None for g, wanted in zip(gradients, mask)), None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        return _tangent(ctx.saved_tensors, tangents[:6], ctx.settings)


class _AutofocusBackward(torch.autograd.Function):
    """The backward operator likewise: the backward of :class:`_Autofocus`, itself differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return _unrecorded(torch.ops.autofocus.backward, _backward, inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save_for_double_backward(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:7])

    @staticmethod
    def backward(ctx, *grad_gradients):
        return _double_gradients(ctx, *grad_gradients)

    @staticmethod
    def jvp(ctx, grad_output_tangent, *tangents):
        grad_output, *primals = ctx.saved_tensors
        mask = ctx.output_mask
        results = _gradients_tangent(grad_output, primals, tangents[:6], ctx.settings, mask)
        if grad_output_tangent is not None:
            along = torch.ops.autofocus.backward(grad_output_tangent, *primals, *ctx.settings, mask)
            results = [r if l is None else l if r is None else r + l for r, l in zip(results, along)]
        return tuple(
            primals[INPUT].new_zeros(0) if not wanted else torch.zeros_like(primal) if result is None else result
            for wanted, primal, result in zip(mask, primals, results)
        )


# ------------------------------------------------------------------ vmap


def _vmap(op, per_sample: tuple[int, ...], foldable: bool, batch_size: int, in_dims, tensors, settings):
    """The results of ``op`` with the vmapped axis in front.

    Where only ``per_sample`` tensors are batched (slots whose first axis is N) the vmapped axis folds into N and
    one call serves all; otherwise there is one call per vmapped sample.
    """
    dims = in_dims[: len(tensors)]
    tensors = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims)]
    batched = [slot for slot, dim in enumerate(dims) if dim is not None]
    if foldable and set(batched) <= set(per_sample):
        for slot in per_sample:
            if slot not in batched:
                tensors[slot] = tensors[slot].expand(batch_size, *tensors[slot].shape)
            tensors[slot] = tensors[slot].flatten(0, 1)
        return [result.unflatten(0, (batch_size, -1)) for result in _as_list(op(*tensors, *settings))]
    samples = [
        _as_list(op(*(t[i] if slot in batched else t for slot, t in enumerate(tensors)), *settings))
        for i in range(batch_size)
    ]
    return [torch.stack(column) for column in zip(*samples)]


def _as_list(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@torch.library.register_vmap("autofocus::forward")
def _forward_vmap(info, in_dims, *arguments):
    tensors, settings = arguments[:6], arguments[6:]
    op = torch.ops.autofocus.forward
    (output,) = _vmap(op, (INPUT, ATTENTION), True, info.batch_size, in_dims, tensors, settings)
    return output, 0


@torch.library.register_vmap("autofocus::backward")
def _backward_vmap(info, in_dims, *arguments):
    tensors, settings = arguments[:7], arguments[7:]
    mask = settings[-1]
    # A parameter's gradient is wanted per vmapped sample, and one folded call would sum over them.
    foldable = not (mask[WEIGHT] or mask[BIAS] or mask[SCALE] or mask[SHIFT])
    slots = (0, 1 + INPUT, 1 + ATTENTION)
    op = torch.ops.autofocus.backward
    results = _vmap(op, slots, foldable, info.batch_size, in_dims, tensors, settings)
    return tuple(results), (0,) * 6
