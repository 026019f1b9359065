"""Training in several processes, as ``torchrun`` starts them, on GPUs (nccl) or on CPUs (gloo).

Batch norms share their statistics, so that the processes together train as one process on all their crops would.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


class Place(NamedTuple):
    """Which process this is, of how many, and where it computes."""

    rank: int
    world: int
    device: torch.device


@contextlib.contextmanager
def processes(device: str | None) -> Iterator[Place]:
    """The place of this process; those that ``torchrun`` started (it sets WORLD_SIZE) find each other first.

    Args:
        device: None is a GPU where there is one; in several processes, GPU i for the i-th of a machine.

    Raises:
        ValueError: there is no such device.
    """
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    chosen = find_device(device)
    started = dist.is_initialized()
    # nccl gathers objects by way of the current GPU, which is the first one of the machine in every process.
    with torch.cuda.device(chosen) if chosen.type == "cuda" else contextlib.nullcontext():
        if not started and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        if not dist.is_initialized():
            yield Place(0, 1, chosen)
            return
        try:
            yield Place(dist.get_rank(), dist.get_world_size(), chosen)
        finally:
            if not started:
                dist.destroy_process_group()


def find_device(name: str | None) -> torch.device:
    """The device of this name, after a try whether it works.

    Args:
        name: as PyTorch has it; None is a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # the latter of a PyTorch without CUDA
        raise ValueError(
            f"device must be one that PyTorch has here, got {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return device


def parallel(network: nn.Module, place: Place) -> nn.Module:
    """``network`` as it is called in training: in several processes wrapped, to average gradients over them.

    Its batch norms are then replaced, in place, by ones that share their statistics and have the same parameters.
    """
    if place.world == 1:
        return network
    # Wrapped before its norms are replaced: DDP refuses nn.SyncBatchNorm, and so ours, on a CPU, where ours works.
    devices = [place.device] if place.device.type == "cuda" else None
    wrapped = DistributedDataParallel(network, device_ids=devices)
    _share_statistics(network)
    return wrapped


def _share_statistics(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            shared = SharedBatchNorm(child.num_features, child.eps, child.momentum, device=child.weight.device)
            shared.weight, shared.bias = child.weight, child.bias
            for buffer, value in child.named_buffers():
                setattr(shared, buffer, value)
            setattr(module, name, shared.train(child.training))
        else:
            _share_statistics(child)


class SharedBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` on CPUs too, where torch's cannot run. All ranks must have equally many values."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda or not self.training:
            return super().forward(input)
        dtype, input = input.dtype, input.to(self.weight.dtype)
        axes = [0, *range(2, input.dim())]
        column = (1, -1, *[1] * (input.dim() - 2))
        count = input.numel() // input.shape[1] * dist.get_world_size()
        mean = _Sum.apply(input.sum(axes)) / count
        centred = input - mean.view(column)
        var = _Sum.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(column) + self.bias.view(column)).to(dtype)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; every process's gradient counts the losses of all."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def mean_over_processes(value: float, place: Place) -> float:
    return sum(gather([value], place)) / place.world


def gather(values: list, place: Place) -> list:
    """The lists of all processes, one after the other."""
    if place.world == 1:
        return values
    parts: list = [None] * place.world
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]
