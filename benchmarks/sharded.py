"""Memory of a training step of one layer on a volume, whole and sharded over processes.

Each process holds its part of the volume and measures by how much its resident set grows at most in forward and
backward (memory.py), and what autograd keeps between the two. Linux only.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from autofocus_kernels import AutofocusConv3d
from autofocus_kernels.distributed import SpatiallySharded
from autofocus_kernels.testing import saved_bytes

from .arguments import Distinct, at_least
from .memory import SETTINGS, peak_here

MB = 2**20


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=at_least(1), nargs="+", action=Distinct, default=[1, 2])
    parser.add_argument("--size", type=at_least(1), nargs=3, default=(128, 40, 40), help="the first axis is sharded")
    parser.add_argument("--channels", type=at_least(1), default=32)
    options = parser.parse_args(arguments)
    most, planes = max(options.processes), options.size[0]
    if most > planes:
        parser.error(f"argument --processes: must be at most the {planes} planes of --size, got {most}")
    return options


def main() -> None:
    arguments = parse(None)
    os.environ.update(SETTINGS)
    print("| processes | rank | part of the volume | peak of a step, beside it | kept for backward |")
    print("|---:|---:|---:|---:|---:|")
    for processes in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, args=(processes, arguments, folder), nprocs=processes)
            for rank in range(processes):
                part, peak, saved = torch.load(f"{folder}/{rank}.pt")
                print(f"| {processes} | {rank} | {part / MB:.0f} MiB | {peak / MB:.0f} MiB | {saved / MB:.0f} MiB |")


def measure(rank: int, processes: int, arguments: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    torch.manual_seed(0)
    channels = arguments.channels
    layer = AutofocusConv3d(channels, channels, dilations=(2, 6, 10, 14))
    if processes > 1:
        layer = SpatiallySharded(layer, dim=2)
    planes, height, width = arguments.size
    part = len(range(planes)[rank::processes])

    def volume(part: int) -> torch.Tensor:
        return torch.randn(1, channels, part, height, width)

    def step(input: torch.Tensor, grad_output: torch.Tensor) -> None:
        layer(input).backward(grad_output)

    small = volume(max(part // 4, 1))
    step(small.requires_grad_(), torch.randn_like(small))  # what a first call keeps
    layer.zero_grad()
    input, grad_output = volume(part).requires_grad_(), volume(part)
    dist.barrier()
    peak = peak_here(lambda: step(input, grad_output))
    saved = saved_bytes(lambda: layer(input))
    torch.save((input.nbytes, peak, saved), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
