"""The paper's batch normalisation of every branch: ``out = sum_k a_k BN_k(y_k)``, with real ``nn.BatchNormNd``.

The modules hold parameters, running statistics and mode; their own forward is never called. By running statistics
each is a scale and a shift, so the layer is one call in branch mode; by batch statistics it is the operator of
ops/branch_norm.py (docs/branch_norm.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function

from .call import Call
from .functional import is_overridden, prepare
from .ops import branch_norm as ops
from .ops import derivatives

# A sequence or ModuleList of _BatchNorm. Any, since their statistics and parameters are Optional by type alone here.
Norms = Any
BATCH_NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_OF_SOME_DIMENSION = tuple(BATCH_NORM.values())  # nn.SyncBatchNorm is of any


def normed_autofocus_conv(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    norms: Norms,
    *,
    dilations,
    stride=1,
    padding="same",
    save_branches: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``sum_k a_k norms[k](y_k)``, with running statistics updated as ``norms[k](y_k)`` would update them.

    Source: Qin et al., MICCAI 2018, section 2; docs/branch_norm.md.

    Args:
        bias: ``[O]`` or None, added to the first branch only, before its norm, as in the paper's code. Normalising
            by batch statistics removes it (its gradient is zero); the first running mean includes it.
        norms: K ``nn.BatchNormNd`` or ``nn.SyncBatchNorm``; the latter share statistics between processes.
        save_branches: keep the branches for backward instead of computing them again; for batch statistics only,
            as no branch is ever kept with running ones.
        The others are those of :func:`autofocus_kernels.autofocus_conv`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`autofocus_kernels.autofocus_conv`; also for ``norms`` that do
            not fit or are not all in one mode, and for a single value per channel to normalise by itself.
    """
    tensors = (input, weight, attention, bias)
    if is_overridden(tensors):
        return handle_torch_function(
            normed_autofocus_conv,
            tensors,
            *tensors,
            norms,
            dilations=dilations,
            stride=stride,
            padding=padding,
            save_branches=save_branches,
            backend=backend,
        )
    call, unbatched = prepare(*tensors, None, None, dilations, stride, padding, backend)
    call = call._replace(bias=None)  # the norms add it, in their own dtype
    _check_norms(norms, call.geometry.num_branches, call.weight)
    if uses_batch_statistics(norms):
        output = _by_batch_statistics(call, bias, norms, save_branches)
    else:
        output = _by_running_statistics(call, bias, norms)
    return output.squeeze(0) if unbatched else output


def _check_norms(norms: Norms, K: int, weight: Tensor) -> None:
    if len(norms) != K:
        raise ValueError(f"branch_norm must hold one norm for each of the {K} dilations, got {len(norms)}")
    fitting = BATCH_NORM[weight.dim() - 2]
    for k, norm in enumerate(norms):
        if not isinstance(norm, _BatchNorm):
            raise TypeError(
                f"branch_norm[{k}] must be a batch norm, got {type(norm).__name__} (wrap the layer, not its norms)"
            )
        if isinstance(norm, _OF_SOME_DIMENSION) and not isinstance(norm, fitting):
            raise TypeError(
                f"branch_norm[{k}] must be of the layer's dimension, {fitting.__name__}, got {type(norm).__name__}"
            )
        if norm.num_features != weight.shape[0]:
            raise ValueError(f"branch_norm[{k}] must have num_features = {weight.shape[0]}, got {norm.num_features}")
        if norm.weight is not None and hasattr(norm.weight, "full_tensor") and not hasattr(weight, "full_tensor"):
            # FSDP makes it whole only in the norm's own forward, which is not called.
            raise RuntimeError(f"branch_norm[{k}] must not be sharded without its layer: fully_shard the layer alone")
        tensor = norm.running_mean if norm.weight is None else norm.weight
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"branch_norm[{k}] must be on the device of input, {weight.device}, got {tensor.device}")


def uses_batch_statistics(norms: Norms) -> bool:
    modes = [norm.training or norm.running_mean is None for norm in norms]
    if any(modes) and not all(modes):
        raise RuntimeError(
            "the norms of branch_norm must use either all batch or all running statistics, got "
            + ", ".join("batch" if mode else "running" for mode in modes)
        )
    return modes[0]


def _by_running_statistics(call: Call, bias: Tensor | None, norms: Norms) -> Tensor:
    norm_weight, norm_bias = _affine(norms, call.input)
    mean = torch.stack([norm.running_mean for norm in norms]).to(norm_weight.dtype)
    var = torch.stack([norm.running_var for norm in norms]).to(norm_weight.dtype)
    _, scale, shift = ops.fold(norm_weight, norm_bias, mean, var, [norm.eps for norm in norms])
    if bias is not None:
        shift = torch.cat([shift[:1] + scale[:1] * bias, shift[1:]])
    dtype = call.input.dtype
    return derivatives.apply(call._replace(branch_scale=scale.to(dtype), branch_shift=shift.to(dtype)))


def _by_batch_statistics(call: Call, bias: Tensor | None, norms: Norms, save_branches: bool) -> Tensor:
    group = _process_group(norms)
    attention = call.attention
    if group is None and attention[:, 0].numel() == 1:
        raise ValueError(
            "branch_norm needs more than one value per channel to normalise by batch statistics, "
            f"got an output of shape {[attention.shape[0], call.weight.shape[0], *attention.shape[2:]]}"
        )
    output, statistics = ops.apply(
        call,
        bias,
        *_affine(norms, call.input),
        eps=[norm.eps for norm in norms],
        save_branches=save_branches,
        group=group,
    )
    empty = group is None and attention.numel() == 0
    _update_running_statistics(norms, None if empty else statistics, bias, shared=group is not None)
    return output


def _affine(norms: Norms, input: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and biases of the norms, ``[K, O]``, in the precision of statistics."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    O = norms[0].num_features
    weights = [input.new_ones((O,), dtype=dtype) if norm.weight is None else norm.weight for norm in norms]
    biases = [input.new_zeros((O,), dtype=dtype) if norm.bias is None else norm.bias for norm in norms]
    return torch.stack([w.to(dtype) for w in weights]), torch.stack([b.to(dtype) for b in biases])


def _process_group(norms: Norms) -> str | None:
    """The name of the group that ``nn.SyncBatchNorm`` would share statistics in; None if nothing is shared."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    names = set()
    for norm in norms:
        group = None
        if isinstance(norm, nn.SyncBatchNorm) and norm.training:
            group = norm.process_group or dist.group.WORLD
        names.add(group.group_name if group is not None and dist.get_world_size(group) > 1 else None)
    if len(names) > 1:
        raise RuntimeError(f"the norms of branch_norm must share one process group, got {sorted(map(str, names))}")
    return names.pop()


def _update_running_statistics(
    norms: Norms, statistics: ops.Statistics | None, bias: Tensor | None, shared: bool
) -> None:
    """As ``nn.BatchNormNd`` does; an empty batch (None) is counted and changes nothing else.

    Where processes share statistics, only these tell whether the batches of all are empty: their count, on the device.

    Nothing here needs a gradient, so it needs no torch.no_grad either, which torch.export would keep as a region of its
    own that mutates buffers: a program that can neither be loaded nor unflattened.
    """
    is_batched = torch._C._functorch.is_batchedtensor
    for k, norm in enumerate(norms):
        if not (norm.training and norm.track_running_stats):
            continue
        if statistics is not None and norm.running_mean is not None and not torch.compiler.is_compiling():
            if is_batched(statistics.mean) and not is_batched(norm.running_mean):
                raise RuntimeError(
                    f"branch_norm[{k}] cannot update its running statistics by those of every sample of torch.vmap: "
                    "call torch.func.replace_all_batch_norm_modules_(model) first, or model.eval()"
                )
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        if statistics is None or norm.running_mean is None:
            continue
        momentum = norm.momentum
        if momentum is None:
            momentum = 0.0 if norm.num_batches_tracked is None else 1 / float(norm.num_batches_tracked)
        mean = statistics.mean[k] if k > 0 or bias is None else statistics.mean[k] + bias.detach()
        unbiased = statistics.var[k] * (statistics.count / (statistics.count - 1))
        if shared:
            taken = momentum * statistics.count.clamp(max=1)
            norm.running_mean.mul_(1 - taken).add_(taken * mean)
            norm.running_var.mul_(1 - taken).add_(taken * unbiased)
        else:
            norm.running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            norm.running_var.mul_(1 - momentum).add_(unbiased, alpha=momentum)
