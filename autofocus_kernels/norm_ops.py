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
from functools import partial
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, ops, reference
from .dispatch import backend_module
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


def apply(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: list[float],
    save_branches: bool,
    group: Optional[str],
    backend: Optional[str],
) -> tuple[Tensor, Statistics]:
    """``sum_k a_k BN_k(y_k)`` ``[N, O, *S_out]`` by batch statistics, and these (not differentiable).

    Takes validated arguments; ``norm_weight`` and ``norm_bias`` are ``[K, O]`` in the dtype of vectors. ``bias`` is
    there for its gradient, which is zero: normalisation removes a constant. ``group`` names the process group
    that shares statistics.

    Raises:
        RuntimeError: functorch transforms, forward-mode AD or double backward with a ``group``.
    """
    if not torch.compiler.is_compiling() and ops._transforms_active():
        if group is not None:
            raise RuntimeError(
                "branch_norm that shares statistics between processes supports reverse mode only, not functorch "
                "transforms or forward-mode AD"
            )
        return plain(geometry, input, weight, attention, bias, norm_weight, norm_bias, eps)
    output, mean, var, count, _ = torch.ops.autofocus.branch_norm(
        input, weight, attention, bias, norm_weight, norm_bias, eps, save_branches, group,
        [r for dilation in geometry.dilations for r in dilation],
        list(geometry.stride), list(geometry.origin), backend,
    )
    return output, Statistics(mean.detach(), var.detach(), count.detach())


def plain(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: list[float],
) -> tuple[Tensor, Statistics]:
    """The definition in plain PyTorch: differentiable any number of times, every branch saved twice."""
    output = None if bias is None else 0 * bias.view(-1, *(1,) * geometry.spatial_dims)
    means, variances = [], []
    over = (0, *range(2, input.dim()))
    for k, branch in enumerate(reference.branches(geometry, input, weight)):
        normed = F.batch_norm(branch, None, None, norm_weight[k], norm_bias[k], True, eps=eps[k])
        term = attention[:, k : k + 1] * normed
        output = term if output is None else output + term
        var, mean = torch.var_mean(branch.detach().to(norm_weight.dtype), over, correction=0)
        means.append(mean)
        variances.append(var)
    count = norm_weight.new_full((), _values_per_channel(attention))
    return output, Statistics(torch.stack(means), torch.stack(variances), count)


# ------------------------------------------------------------------ the operators: allocate, choose, run


def _values_per_channel(attention: Tensor) -> int:
    return attention[:, 0].numel()


def _allocate_branches(input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    N, K, *size = attention.shape
    branches = torch.empty(
        (K * N, weight.shape[0], *size), dtype=input.dtype, device=input.device,
        memory_format=ops._memory_format(input),
    )
    return branches.unflatten(0, (K, N))


def _backend_function(
    name: str, settings: NormSettings, geometry: Geometry, input: Tensor, weight: Tensor
) -> Callable[..., None]:
    """The function ``name`` of the backend for this call, or the reference's where that has none."""
    if input.numel() == 0:
        return getattr(backend_module("reference"), name)
    return partial(dispatch.run, name, settings.backend, geometry, input, weight, True)


def fold(norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor, eps: list[float]):
    """``inv``, ``scale`` and ``shift``, ``[K, O]``: BN_k(y) is ``norm_weight (y - mean) inv + norm_bias``."""
    # Not a tensor of eps: copying one to a GPU would wait for it, and a CUDA graph cannot record that.
    inv = torch.stack([branch + value for branch, value in zip(var, eps)]).rsqrt()
    scale = norm_weight * inv
    return inv, scale, norm_bias - mean * scale


@torch.library.impl("autofocus::branch_norm", "CompositeExplicitAutograd")
def _branch_norm(input, weight, attention, bias, norm_weight, norm_bias, *integers):
    settings = NormSettings(*integers)
    geometry = settings.geometry(input, weight, attention)
    output = ops._allocate_output(input, weight, attention)
    branches = _allocate_branches(input, weight, attention)
    mean, var = torch.zeros_like(norm_weight), torch.zeros_like(norm_weight)
    if output.numel() > 0:
        fill = _backend_function("branch_statistics", settings, geometry, input, weight)
        fill(geometry, input, weight, branches, mean, var)
    statistics = Statistics(mean, var, mean.new_full((), _values_per_channel(attention)))
    if settings.group is not None:
        statistics = _across_processes(statistics, settings.group)
    if output.numel() > 0:
        _, scale, shift = fold(norm_weight, norm_bias, statistics.mean, statistics.var, settings.eps)
        combine = _backend_function("branch_combine", settings, geometry, input, weight)
        combine(branches, attention, scale, shift, output)
    return output, *statistics, branches if settings.save_branches else input.new_empty(0)


@torch.library.register_fake("autofocus::branch_norm")
def _branch_norm_fake(input, weight, attention, bias, norm_weight, norm_bias, *integers):
    save_branches = NormSettings(*integers).save_branches
    return (
        ops._allocate_output(input, weight, attention),
        torch.empty_like(norm_weight),
        torch.empty_like(norm_weight),
        norm_weight.new_empty(()),
        _allocate_branches(input, weight, attention) if save_branches else input.new_empty(0),
    )


def _across_processes(local: Statistics, group: str) -> Statistics:
    """The statistics over the batches of all processes, merged from the mean and variance of each."""
    packed = torch.cat([local.mean.flatten(), local.var.flatten(), local.count.view(1)])
    process_group = dist.distributed_c10d._resolve_process_group(group)
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, packed, group=process_group)
    values = torch.stack(gathered)
    means, variances = values[:, :-1].unflatten(1, (2, *local.mean.shape)).unbind(1)
    count = values[:, -1].sum()
    share = (values[:, -1] / count).view(-1, 1, 1)
    mean = (share * means).sum(0)
    return Statistics(mean, (share * (variances + (means - mean).square())).sum(0), count)


@torch.library.impl("autofocus::branch_norm_backward", "CompositeExplicitAutograd")
def _branch_norm_backward(
    grad_output, input, weight, attention, norm_weight, norm_bias, mean, var, count, branches, *integers
):
    *integers, output_mask = integers
    settings = NormSettings(*integers)
    geometry = settings.geometry(input, weight, attention)
    primals = (input, weight, attention, norm_weight, norm_bias)
    gradients = _allocate_gradients(primals, output_mask)
    grad_input, grad_weight, grad_attention, *_ = (
        gradient if wanted else None for gradient, wanted in zip(gradients, output_mask)
    )
    empty = grad_output.numel() == 0

    inv, scale, shift = fold(norm_weight, norm_bias, mean, var, settings.eps)
    # Of a_k G with y_k - mean_k and with one; [2, K, O] so that processes exchange them in one message.
    sums = norm_weight.new_zeros(2, *norm_weight.shape)
    if not empty:
        if not settings.save_branches:
            branches = _allocate_branches(input, weight, attention)
            fill = _backend_function("branch_statistics", settings, geometry, input, weight)
            fill(geometry, input, weight, branches, None, None)
        reduce = _backend_function("branch_reduce", settings, geometry, input, weight)
        reduce(grad_output, branches, attention, mean, scale, shift, grad_attention, *sums)
    # A process gives the parameters its own share, like nn.SyncBatchNorm: data parallelism sums the shares.
    gradients[3] = sums[0] * inv
    gradients[4] = sums[1].clone()

    if grad_input is not None or grad_weight is not None:
        if settings.group is not None:
            dist.all_reduce(sums, group=dist.distributed_c10d._resolve_process_group(settings.group))
        if empty or input.numel() == 0:
            for gradient in (grad_input, grad_weight):
                if gradient is not None:
                    gradient.zero_()
        else:
            b_coef = -scale * inv.square() * sums[0] / count
            c_coef = -scale * sums[1] / count - b_coef * mean
            grad_branches = torch.empty_like(branches) if settings.save_branches else branches
            run = _backend_function("branch_norm_backward", settings, geometry, input, weight)
            run(
                geometry, grad_output, input, weight, attention, branches, scale, b_coef, c_coef,
                grad_branches, grad_input, grad_weight,
            )
    return tuple(gradients)


def _allocate_gradients(primals, output_mask) -> list[Tensor]:
    """As in ops.py, but those of the two vectors are always there: they cost nothing."""
    return ops._allocate_gradients(primals, (*output_mask[:3], True, True))


@torch.library.register_fake("autofocus::branch_norm_backward")
def _branch_norm_backward_fake(
    grad_output, input, weight, attention, norm_weight, norm_bias, mean, var, count, branches, *integers
):
    return tuple(_allocate_gradients((input, weight, attention, norm_weight, norm_bias), integers[-1]))


# ------------------------------------------------------------------ autograd


def _save(ctx, inputs, output) -> None:
    input, weight, attention, bias, norm_weight, norm_bias, *integers = inputs
    ctx.save_for_backward(input, weight, attention, norm_weight, norm_bias, *output[1:], bias)
    ctx.settings = NormSettings(*integers)
    # A gradient for the saved branches would be a tensor of zeros of their size.
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_output, *_):
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    *saved, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad)
    mask = [*needs[:3], *needs[4:6]]
    gradients = torch.ops.autofocus.branch_norm_backward(grad_output, *saved, *ctx.settings, mask)
    wanted = [g if want else None for g, want in zip(gradients, mask)]
    grad_bias = torch.zeros_like(bias) if needs[3] else None
    return *wanted[:3], grad_bias, *wanted[3:], *(None,) * len(ctx.settings)


torch.library.register_autograd("autofocus::branch_norm", _gradients, setup_context=_save)


def _save_for_double_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    *integers, ctx.output_mask = inputs[10:]
    ctx.settings = NormSettings(*integers)
    ctx.geometry = ctx.settings.geometry(*inputs[1:4])
    ctx.set_materialize_grads(False)


def _double_gradients(ctx, *grad_gradients):
    """Differentiates the plain definition twice."""
    if ctx.settings.group is not None:
        raise RuntimeError(
            "branch_norm that shares statistics between processes cannot be differentiated twice"
        )
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, because the saved tensors may depend on each other and only the direct paths count here.
        aliases = [
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors
        ]
        grad_output, *primals = aliases
        input, weight, attention, norm_weight, norm_bias = primals
        output, _ = plain(
            ctx.geometry, input, weight, attention, None, norm_weight, norm_bias, ctx.settings.eps
        )
        gradients = torch.autograd.grad(output, primals, grad_output, create_graph=True)
        pairs = [
            (gradient, grad)
            for gradient, grad, wanted in zip(gradients, grad_gradients, ctx.output_mask)
            if wanted and grad is not None
        ]
        if not pairs:
            return (None,) * len(ctx.needs_input_grad)
        results = torch.autograd.grad(
            [gradient for gradient, _ in pairs], aliases, [grad for _, grad in pairs],
            allow_unused=True, create_graph=create_graph,
        )
    return *results, *(None,) * (len(ctx.needs_input_grad) - len(results))


torch.library.register_autograd(
    "autofocus::branch_norm_backward", _double_gradients, setup_context=_save_for_double_backward
)
