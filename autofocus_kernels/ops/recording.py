"""How an operator is called: who watches, and what autograd has to record."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function


def traced() -> bool:
    """Whether a tracer looks at operators, not at Python: torch.compile, torch.export, torch.jit.trace, make_fx."""
    # The last is that of make_fx(pre_dispatch=True), whose modes are on a stack of their own.
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    )


class Derivative(torch.autograd.function._SingleLevelFunction):
    """An ``autograd.Function``, written like one with ``setup_context``, for operators that :func:`register` it.

    Under functorch a Function asks for all levels of transforms at once; this is the form without that, which
    functorch itself makes of one for each level. Its ``apply`` also takes less of the host.
    """

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def register(name: str, derivative: type[Derivative]) -> None:
    """Makes ``derivative`` that of an operator wherever one is dispatched: traced, in a graph, transformed.

    torch.library.register_autograd would do for reverse mode alone: it is silently zero in forward mode and fails under
    functorch. As the operator's own kernel for autograd a derivative meets functorch level by level, as those of
    torch's operators do, so transforms nest. Without a jvp it refuses forward mode.
    """

    # torch.compile would look for frames to compile in here where it could not compile the call itself, as behind a
    # __torch_function__ that it does not understand.
    @torch._disable_dynamo
    def kernel(*arguments):
        with enable_single_level_autograd_function():
            return derivative.apply(*arguments)

    torch.library.impl(name, "Autograd")(kernel)


def recorded(op, derivative: type[Derivative], implementation, arguments: tuple):
    """``op(*arguments)``, differentiated by ``derivative``, which is registered for it."""
    if traced() or torch._C._are_functorch_transforms_active():
        return op(*arguments)
    if torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return derivative.apply(*arguments)  # without the dispatcher, a fifth of the time of a small call
    return unrecorded(op, implementation, arguments)


@contextlib.contextmanager
def primals_of(saved):
    """For a jvp: the saved tensors without the tangents of its own level; those of other levels count."""
    forward_ad = torch.autograd.forward_ad
    with forward_ad._set_fwd_grad_enabled(True):  # torch has switched it off, for all levels
        yield [None if tensor is None else forward_ad.unpack_dual(tensor, level=0).primal for tensor in saved]


def unrecorded(op, implementation, arguments: tuple):
    """``op(*arguments)``, with nothing for autograd to record.

    Where nobody watches operators that is ``implementation``, called directly: the dispatcher's way there and back is
    a fifth of the time of a small call.
    """
    if (
        _PLAIN.issuperset(map(type, arguments))
        and not torch.autograd.profiler._is_profiler_enabled  # it shows operators by name
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        # autograd.grad(is_grads_batched=True) has a vmap of its own.
        and not any(_is_batched(argument) for argument in arguments if isinstance(argument, Tensor))
    ):
        return implementation(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return op(*arguments)
        # A derivative's forward runs without those of its own level; the levels below are not meant.
        with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
            return op(*arguments)


_is_batched = torch._C._functorch.is_legacy_batchedtensor
# Types of an operator's arguments: no subclass of Tensor, which may have operators of its own.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), list, tuple, str})


def transforms_active() -> bool:
    """Whether functorch or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
