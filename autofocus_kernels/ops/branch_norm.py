"""Batch normalisation of every branch in training, as torch.library operators.

``out = sum_k a_k BN_k(y_k)``, with each ``BN_k`` over batch and space by its own statistics (docs/branch_norm.md).
The statistics have to be known before branches can be summed, and the gradient of a branch needs that branch, so
the branches are held in one buffer ``[K, N, O, *S_out]`` while the forward or the backward of a layer runs. Between
the two it is kept (``save_branches``) or freed and computed again.

The last four functions of backends/interface.py do the work. The vectors of the norms, ``[K, O]``, are float64 for
float64 tensors and float32 for all others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dispatch, reference
from ..call import Call, from_operator, operator_settings
from .allocation import allocate_gradients, allocate_output, memory_format_of
from .recording import Derivative, recorded, register, traced, transforms_active, unrecorded

_PRIMALS = "Tensor input, Tensor weight, Tensor attention"
_AFFINE = "Tensor norm_weight, Tensor norm_bias"
_SETTINGS = "float[] eps, bool save_branches, str? group, int[] dilations, int[] stride, int[] origin, str? backend"
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
    """The arguments of the operators that are no tensors; the last four are ``call.operator_settings``."""

    eps: list[float]
    save_branches: bool
    group: str | None
    dilations: list[int]
    stride: list[int]
    origin: list[int]
    backend: str | None

    def call(self, input: Tensor, weight: Tensor, attention: Tensor) -> Call:
        call = from_operator(input, weight, attention, None, None, None, *self[3:])
        if len(self.eps) != call.geometry.num_branches:
            raise ValueError(f"eps must have a float for each of {call.geometry.num_branches} branches, got {self.eps}")
        return call


class Statistics(NamedTuple):
    """Mean and biased variance ``[K, O]`` of the branches without bias, over ``count`` (0-dim) values each."""

    mean: Tensor
    var: Tensor
    count: Tensor


def apply(
    call: Call,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: list[float],
    save_branches: bool,
    group: str | None,
) -> tuple[Tensor, Statistics]:
    """``sum_k a_k BN_k(y_k)`` ``[N, O, *S_out]`` by batch statistics, and these (not differentiable).

    ``norm_weight`` and ``norm_bias`` are ``[K, O]`` in the dtype of vectors. ``bias`` ``[O]`` is there for its
    gradient, which is zero: normalisation removes a constant. ``group`` names the process group that shares
    statistics.

    Raises:
        RuntimeError: functorch transforms, forward-mode AD, double backward or ONNX with a ``group``.
    """
    if torch.onnx.is_in_onnx_export() if traced() else transforms_active():
        if group is not None:
            raise RuntimeError(
                "branch_norm that shares statistics between processes supports reverse mode only, not functorch "
                "transforms, forward-mode AD or ONNX"
            )
        return plain(call, bias, norm_weight, norm_bias, eps)
    arguments = (*call[:3], bias, norm_weight, norm_bias, eps, save_branches, group, *operator_settings(call))
    output, mean, var, count, _ = recorded(torch.ops.autofocus.branch_norm, _BranchNorm, _branch_norm, arguments)
    return output, Statistics(mean.detach(), var.detach(), count.detach())


def plain(
    call: Call, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: list[float]
) -> tuple[Tensor, Statistics]:
    """The definition in plain PyTorch: differentiable any number of times, every branch saved twice."""
    output = None if bias is None else 0 * reference.per_channel(bias, call.geometry)
    means, variances = [], []
    space = tuple(range(2, call.input.dim()))
    for k, branch in enumerate(reference.branches(call)):
        # Not F.batch_norm: from the third on its derivatives are wrong, and torch 2.14 refuses them.
        wide = branch.to(norm_weight.dtype)
        # Of each sample, then of these: torch's mean over both may add the samples' one by one.
        mean = wide.mean(space).mean(0)
        centred = wide - reference.per_channel(mean, call.geometry)
        var = centred.square().mean(space).mean(0)
        scale = reference.per_channel(norm_weight[k] * (var + eps[k]).rsqrt(), call.geometry)
        normed = (scale * centred + reference.per_channel(norm_bias[k], call.geometry)).to(branch.dtype)
        term = call.attention[:, k : k + 1] * normed
        output = term if output is None else output + term
        means.append(mean.detach())
        variances.append(var.detach())
    count = norm_weight.new_full((), _values_per_channel(call.attention))
    return output, Statistics(torch.stack(means), torch.stack(variances), count)


# ------------------------------------------------------------------ the operators: allocate, choose, run


def _values_per_channel(attention: Tensor) -> int:
    return attention[:, 0].numel()


def allocate_branches(input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    """``[K, N, O, *S_out]``, each branch dense in the memory format of ``input``."""
    N, K, *size = attention.shape
    branches = torch.empty(
        (K * N, weight.shape[0], *size),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format_of(input),
    )
    return branches.unflatten(0, (K, N))


def _run(function: str, call: Call, *arguments) -> None:
    """As ``dispatch.run``; an input without elements goes to the reference, the only backend that takes it."""
    if call.input.numel() == 0:
        call = call._replace(backend="reference")
    dispatch.run(function, call, *arguments)


def fold(norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor, eps: list[float]):
    """``inv``, ``scale`` and ``shift``, ``[K, O]``: BN_k(y) is ``norm_weight (y - mean) inv + norm_bias``."""
    # Not a tensor of eps: copying one to a GPU would wait for it, and a CUDA graph cannot record that.
    inv = torch.stack([branch + value for branch, value in zip(var, eps)]).rsqrt()
    scale = norm_weight * inv
    return inv, scale, norm_bias - mean * scale


@torch.library.impl("autofocus::branch_norm", "CompositeExplicitAutograd")
def _branch_norm(input, weight, attention, bias, norm_weight, norm_bias, *settings):
    settings = NormSettings(*settings)
    call = settings.call(input, weight, attention)
    output = allocate_output(input, weight, attention)
    branches = allocate_branches(input, weight, attention)
    mean, var = torch.zeros_like(norm_weight), torch.zeros_like(norm_weight)
    if output.numel() > 0:
        _run("branch_statistics", call, branches, mean, var)
    statistics = Statistics(mean, var, mean.new_full((), _values_per_channel(attention)))
    if settings.group is not None:
        statistics = _across_processes(statistics, settings.group)
    if output.numel() > 0:
        _, scale, shift = fold(norm_weight, norm_bias, statistics.mean, statistics.var, settings.eps)
        _run("branch_combine", call, branches, scale, shift, output)
    return output, *statistics, branches if settings.save_branches else input.new_empty((0,))


@torch.library.register_fake("autofocus::branch_norm")
def _branch_norm_fake(input, weight, attention, bias, norm_weight, norm_bias, *settings):
    save_branches = NormSettings(*settings).save_branches
    return (
        allocate_output(input, weight, attention),
        torch.empty_like(norm_weight),
        torch.empty_like(norm_weight),
        norm_weight.new_empty(()),
        allocate_branches(input, weight, attention) if save_branches else input.new_empty((0,)),
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
    share = (values[:, -1] / count.clamp(min=1)).view(-1, 1, 1)  # zeros where no process has a value
    mean = (share * means).sum(0)
    return Statistics(mean, (share * (variances + (means - mean).square())).sum(0), count)


@torch.library.impl("autofocus::branch_norm_backward", "CompositeExplicitAutograd")
def _branch_norm_backward(
    grad_output, input, weight, attention, norm_weight, norm_bias, mean, var, count, branches, *settings
):
    *settings, output_mask = settings
    settings = NormSettings(*settings)
    call = settings.call(input, weight, attention)
    primals = (input, weight, attention, norm_weight, norm_bias)
    gradients = _allocate_gradients(primals, output_mask)
    grad_input, grad_weight, grad_attention, *_ = (
        gradient if wanted else None for gradient, wanted in zip(gradients, output_mask)
    )
    empty = grad_output.numel() == 0

    inv, scale, shift = fold(norm_weight, norm_bias, mean, var, settings.eps)
    # The sums over voxels of a_k G (y_k - mean_k) and of a_k G: one tensor, for processes to exchange in one message.
    sums = norm_weight.new_zeros(2, *norm_weight.shape)
    if not empty:
        if not settings.save_branches:
            branches = allocate_branches(input, weight, attention)
            _run("branch_statistics", call, branches, None, None)
        _run("branch_reduce", call, grad_output, branches, mean, scale, shift, grad_attention, *sums)
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
            _run(
                "branch_norm_backward",
                call,
                grad_output,
                branches,
                scale,
                b_coef,
                c_coef,
                grad_branches,
                grad_input,
                grad_weight,
            )
    return tuple(gradients)


def _allocate_gradients(primals, output_mask) -> list[Tensor]:
    """Those of the two vectors are made whether wanted or not: they cost nothing."""
    return allocate_gradients(primals, (*output_mask[:3], *(True for _ in output_mask[3:])))


@torch.library.register_fake("autofocus::branch_norm_backward")
def _branch_norm_backward_fake(
    grad_output, input, weight, attention, norm_weight, norm_bias, mean, var, count, branches, *settings
):
    return tuple(_allocate_gradients((input, weight, attention, norm_weight, norm_bias), settings[-1]))


# ------------------------------------------------------------------ autograd


class _BranchNorm(Derivative):
    @staticmethod
    def forward(*inputs):
        return unrecorded(torch.ops.autofocus.branch_norm, _branch_norm, inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        input, weight, attention, bias, norm_weight, norm_bias, *settings = inputs
        ctx.save_for_backward(input, weight, attention, norm_weight, norm_bias, *output[1:], bias)
        ctx.settings = NormSettings(*settings)
        # A gradient for the saved branches would be a tensor of zeros of their size.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        *saved, bias = ctx.saved_tensors
        needs = list(ctx.needs_input_grad)
        mask = [*needs[:3], *needs[4:6]]
        arguments = (grad_output, *saved, *ctx.settings, mask)
        op = torch.ops.autofocus.branch_norm_backward
        gradients = recorded(op, _BranchNormBackward, _branch_norm_backward, arguments)
        wanted = [g if want else None for g, want in zip(gradients, mask)]
        grad_bias = torch.zeros_like(bias) if needs[3] else None
        return *wanted[:3], grad_bias, *wanted[3:], *(None,) * len(ctx.settings)


class _BranchNormBackward(Derivative):
    @staticmethod
    def forward(*inputs):
        return unrecorded(torch.ops.autofocus.branch_norm_backward, _branch_norm_backward, inputs)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:6])
        *settings, ctx.output_mask = inputs[10:]
        ctx.settings = NormSettings(*settings)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grad_gradients):
        """Differentiates the plain definition twice."""
        if ctx.settings.group is not None:
            raise RuntimeError("branch_norm that shares statistics between processes cannot be differentiated twice")
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, because the saved tensors may depend on each other and only the direct paths count here.
            aliases = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors]
            grad_output, *primals = aliases
            output, _ = plain(ctx.settings.call(*primals[:3]), None, *primals[3:], ctx.settings.eps)
            gradients = torch.autograd.grad(output, primals, grad_output, create_graph=True)
            pairs = [
                (gradient, grad)
                for gradient, grad, wanted in zip(gradients, grad_gradients, ctx.output_mask)
                if wanted and grad is not None
            ]
            if not pairs:
                return (None,) * len(ctx.needs_input_grad)
            results = torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                aliases,
                [grad for _, grad in pairs],
                allow_unused=True,
                create_graph=create_graph,
            )
        return *results, *(None,) * (len(ctx.needs_input_grad) - len(results))


register("autofocus::branch_norm", _BranchNorm)
register("autofocus::branch_norm_backward", _BranchNormBackward)
