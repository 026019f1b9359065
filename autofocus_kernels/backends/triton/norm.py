"""Batch-normalised branches by Triton: the functions that norm_ops.py asks of a backend (docs/branch_norm.md).

Axes: N batch, C input channels, O output channels, K branches, and the spatial axes, one to three or, flattened, one.
"""

from __future__ import annotations

import dataclasses
from typing import Optional

import torch
import triton
from torch import Tensor

from ... import reference
from ...geometry import Geometry
from . import launch, norm_kernels, tuning
from .launch import Launch, Source, as_3d

# Elements of a tile in the kernels that treat each voxel alone: 16 for each thread of eight warps, which is two loads of
# 16 bytes in 16 bits, so a few programs of an SM keep enough in flight, with registers to spare for two sums.
ELEMENTS = 4096
WARPS = 8
# Channels of a tile at most: the rest of ELEMENTS are then 32 positions, whole sectors of contiguous tensors.
MAX_BLOCK_O = 128
# Tiles of one program where sums leave it: the sum over rows and what is stored come once for all of them, the
# grad_output of four (32 KiB in 16 bits) stays in L1 or L2 from branch to branch, and 32^3 voxels still give 64 programs.
TILES = 4


def branch_statistics(geometry, input, weight, branches, mean, var) -> None:
    """Each branch is a plain forward with one dilation and a gate of ones; one pass over them all gives mean and var."""
    problem = geometry.as_3d()
    with launch._on_device_of(input):
        source = launch.gather_source(as_3d(input))
        gate = input.new_ones(()).expand(input.shape[0], 1, *problem.output_size)
        for k in range(problem.num_branches):
            _fill_branch(geometry, k, input, source, weight, gate, branches[k])
        if mean is not None:
            _fill_statistics(branches, mean, var)


def branch_combine(branches, attention, scale, shift, output) -> None:
    K, N, O = branches.shape[:3]
    y, a, out = branches.flatten(3), attention.flatten(2), output.flatten(2)
    constants = _constants(O, y[0], a, out)
    with launch._on_device_of(output):
        launch.submit(
            Launch(
                norm_kernels.combine_kernel,
                (N * triton.cdiv(y.shape[3], constants["ROWS"]), triton.cdiv(O, constants["BLOCK_O"])),
                (y, a, scale, shift, out, *_strides(y), a.stride(), out.stride(), y.shape[3]),
                {"K": K, **constants},
                lambda: _deliver(out, output),
            )
        )


def branch_reduce(
    grad_output, branches, attention, mean, scale, shift, grad_attention, grad_scale, grad_shift
) -> None:
    K, N, O = branches.shape[:3]
    grad, y, a = grad_output.flatten(2), branches.flatten(3), attention.flatten(2)
    positions = y.shape[3]
    with launch._on_device_of(grad_output):
        parts = None if grad_attention is None else grad_attention.flatten(2).unsqueeze(0)
        constants = _constants(O, grad, y[0], a, *(() if parts is None else parts))
        blocks = triton.cdiv(O, constants["BLOCK_O"])
        if blocks > 1 and parts is not None:
            parts = parts.new_empty((blocks, N, K, positions), dtype=torch.float32)
        tiles = N * triton.cdiv(positions, constants["ROWS"])
        chunks = triton.cdiv(tiles, TILES)
        sums = mean.new_empty((chunks, 2, K, O))

        def finish() -> None:
            if parts is not None:
                _deliver(parts[0] if blocks == 1 else parts.sum(0), grad_attention)
            for gradient, total in zip((grad_scale, grad_shift), sums.sum(0)):
                gradient.copy_(total)

        launch.submit(
            Launch(
                norm_kernels.reduce_kernel,
                (chunks, blocks),
                (
                    grad, y, a, mean, scale, shift, parts, sums,
                    grad.stride(), *_strides(y), a.stride(), *((0, (0,) * 3) if parts is None else _strides(parts)),
                    positions, tiles,
                ),
                {"K": K, **constants, "TILES": TILES, "WANT_ATTENTION": parts is not None},
                finish,
            )
        )


def branch_norm_backward(
    geometry, grad_output, input, weight, attention, branches, a_coef, b_coef, c_coef,
    grad_branches, grad_input, grad_weight,
) -> None:
    """All dy_k, then one kernel that gathers from each and projects their sum once."""
    K, O = branches.shape[0], branches.shape[2]
    problem = geometry.as_3d()
    with launch._on_device_of(input):
        align = min(16 // branches.itemsize, triton.next_power_of_2(O))
        gradients = _gatherable(branches, grad_branches, align)
        _fill_gradients(grad_output, branches, attention, a_coef, b_coef, c_coef, gradients)
        first = as_3d(gradients[0])
        source = Source(first, launch._stride(first, align), align)
        branch_stride = gradients.stride(0) // align

        def make(config) -> Launch:
            return _grad_input_weight(
                config, problem, source, branch_stride,
                *map(as_3d, (input, weight, grad_input, grad_weight)),
            )

        def expected() -> list[Tensor]:
            totals = [0, 0]
            for k in range(K):
                of_branch = reference.branch_gradients(
                    geometry, k, *map(launch._wider, (gradients[k, :, :O], input, weight)), True, True
                )
                totals = [total + gradient for total, gradient in zip(totals, of_branch)]
            return [total for total, wanted in zip(totals, (grad_input, grad_weight)) if wanted is not None]

        O, C = weight.shape[:2]
        precision = launch.dot_precision(weight)
        tuning.run(
            (
                "branches_grad_input_weight", weight.device, weight.dtype, precision, C, O,
                problem.kernel_size, problem.dilations, problem.stride,
            ),
            launch.configurations(
                "grad_input_weight", weight.itemsize, precision, launch.capability(weight.device), C, O
            ),
            lambda config: launch.submit(make(config)),
            [gradient for gradient in (grad_input, grad_weight) if gradient is not None],
            expected,
        )


# ------------------------------------------------------------------ one function per launch


def _fill_branch(
    geometry: Geometry, k: int, input: Tensor, source: Source, weight: Tensor, gate: Tensor, branch: Tensor
) -> None:
    """y_k; ``source`` is what ``input`` is gathered from, made once for all branches."""
    one = dataclasses.replace(geometry, dilations=(geometry.dilations[k],))

    def expected() -> list[Tensor]:
        return list(reference.branches(one, launch._wider(input), launch._wider(weight)))

    tensors = (source, as_3d(weight), gate, None, None, as_3d(branch))
    launch._run("forward", launch._forward, one.as_3d(), tensors, weight, [branch], expected)


def _fill_statistics(branches: Tensor, mean: Tensor, var: Tensor) -> None:
    K, N, O = branches.shape[:3]
    y = branches.flatten(3)
    constants = _constants(O, y[0])
    tiles = N * triton.cdiv(y.shape[3], constants["ROWS"])
    chunks = triton.cdiv(tiles, TILES)
    parts = mean.new_empty((3, chunks, K, O))

    def finish() -> None:
        counts, means, squares = parts.double()
        total = counts.sum(0)
        mean64 = (counts * means).sum(0) / total
        mean.copy_(mean64)
        # Chan, Golub and LeVeque: square distances of the parts, and of their means from the mean of all.
        var.copy_((squares + counts * (means - mean64).square()).sum(0) / total)

    launch.submit(
        Launch(
            norm_kernels.statistics_kernel,
            (chunks, triton.cdiv(O, constants["BLOCK_O"]), K),
            (y, parts, *_strides(y), y.shape[3], tiles),
            {"K": K, **constants, "TILES": TILES},
            finish,
        )
    )


def _gatherable(branches: Tensor, grad_branches: Tensor, align: int) -> Tensor:
    """Memory for the dy_k, ``[K, N, O or more, *S]``, as a kernel can gather them: adjacent channels, aligned rows.

    ``grad_branches`` itself where it is so, or may be filled in another order because nothing else lies there.
    """
    K, N, O, *size = branches.shape
    if launch.alignment(as_3d(grad_branches[0])) >= align and grad_branches.stride(0) % align == 0:
        return grad_branches
    if O % align == 0 and grad_branches.data_ptr() != branches.data_ptr() and grad_branches.is_contiguous():
        return grad_branches.view(K, N, *size, O).movedim(-1, 2)
    return branches.new_empty((K, N, *size, triton.cdiv(O, align) * align)).movedim(-1, 2)


def _fill_gradients(
    grad_output: Tensor, branches: Tensor, attention: Tensor, a_coef: Tensor, b_coef: Tensor, c_coef: Tensor,
    gradients: Tensor,
) -> None:
    K, N, O = branches.shape[:3]
    grad, y, a, out = grad_output.flatten(2), branches.flatten(3), attention.flatten(2), gradients.flatten(3)
    constants = _constants(O, grad, y[0], a, out[0])
    channels = gradients.shape[2]
    launch.submit(
        Launch(
            norm_kernels.grad_branches_kernel,
            (N * triton.cdiv(y.shape[3], constants["ROWS"]), triton.cdiv(channels, constants["BLOCK_O"])),
            (
                grad, y, a, a_coef, b_coef, c_coef, out,
                grad.stride(), *_strides(y), a.stride(), *_strides(out), y.shape[3],
            ),
            {"K": K, **constants, "CHANNELS": channels},
        )
    )


def _grad_input_weight(
    config, problem: Geometry, source: Source, branch_stride: int, input: Tensor, weight: Tensor,
    grad_input: Optional[Tensor], grad_weight: Optional[Tensor],
) -> Launch:
    """As ``launch._grad_input_weight``; ``source`` is the first branch's gradient, the others ``branch_stride`` apart."""
    O, C = weight.shape[:2]
    walk = launch.Walk(problem, config, input.shape[0], transposed=True)
    align = launch.alignment(input, grad_input)
    blocks = triton.cdiv(C, config.block_c)
    packed = launch.repack(weight, config, (2, 0, 1))
    splits, sums = walk.num_tiles, None
    if grad_weight is not None:
        splits = min(splits, triton.cdiv(launch._resident_programs(input.device), blocks))
        sums = torch.zeros((splits, *packed.shape), dtype=torch.float32, device=input.device)

    def finish() -> None:
        if grad_weight is not None:
            grad_weight.copy_(sums.sum(0)[:, :O, :C].permute(1, 2, 0).reshape(grad_weight.shape))

    return Launch(
        norm_kernels.branches_grad_input_weight_kernel,
        (splits, blocks),
        (
            source.tensor, packed, input, grad_input, sums,
            branch_stride, source.stride, launch._stride(input, align), launch._stride(grad_input, align),
            *walk.arguments, walk.num_tiles,
        ),
        launch._constants(config, walk, source, weight, align, input, grad_input)
        | {
            "WANT_INPUT": grad_input is not None,
            "WANT_WEIGHT": grad_weight is not None,
            "BLEND": launch.blend_dtype(weight),
        },
        finish,
    )


# ------------------------------------------------------------------


def _constants(O: int, *volumes: Tensor) -> dict:
    """Tile and offsets of the kernels that treat each voxel alone; ``volumes`` are [N, channels, positions]."""
    block_o = min(MAX_BLOCK_O, triton.next_power_of_2(O))
    return {
        "O": O,
        "BLOCK_O": block_o,
        "ROWS": ELEMENTS // block_o,
        "ROW": launch._row_dtype(*volumes),
        "num_warps": WARPS,
        "num_stages": 1,
    }


def _strides(branches: Tensor) -> tuple[int, tuple[int, ...]]:
    """Of K, and of (N, channels, positions)."""
    return branches.stride(0), branches.stride()[1:]


def _deliver(flat: Tensor, target: Tensor) -> None:
    """Copies what a kernel left in ``flat`` to ``target``, of which it is a view only where strides allow."""
    if flat.data_ptr() != target.data_ptr():
        target.copy_(flat.view(target.shape))
