"""How an operator is called: who watches, and what autograd has to record."""

from __future__ import annotations

import torch
from torch import Tensor


def traced() -> bool:
    """Whether a tracer looks at operators, and so at their own autograd, not at Python.

    That own autograd is what torch.compile, torch.export and torch.jit.trace see through. It fails under functorch,
    gives silent zero tangents in forward mode and takes the host seven times as long as a Function.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def recorded(op, function: type[torch.autograd.Function], implementation, arguments: tuple):
    """``op(*arguments)``, differentiated by ``function``."""
    if transforms_active():
        return function.apply(*arguments)
    if torch.is_grad_enabled():
        # Past Function.apply, whose binding of arguments to a signature is most of its time.
        return super(torch.autograd.Function, function).apply(*arguments)
    return unrecorded(op, implementation, arguments)


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
