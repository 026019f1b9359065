"""Batch-normalised branches by Triton (docs/branch_norm.md).

Axes: N batch, C input channels, O output channels, K branches, and the spatial axes, one to three or, flattened, one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ...call import Call, as_3d
from ...geometry import Geometry
from . import launch, norm_kernels
from .launch import Launch, Plan, Source, Weight

# Elements of a tile in the kernels that treat each voxel alone: 16 a thread of eight warps, two loads of 16 bytes
# in 16 bits, so a few programs of an SM keep enough in flight, with registers to spare for two sums.
ELEMENTS = 4096
WARPS = 8
# Channels of a tile at most: the rest of ELEMENTS are then 32 positions, whole sectors of contiguous tensors.
MAX_BLOCK_O = 128
# Tiles of a program that leaves sums. It sums over rows, and stores, once for all of them. The grad_output of four
# (32 KiB in 16 bits) stays in a cache for all branches but the first, and 32^3 voxels of 32 channels still make 64
# programs.
TILES = 4
GRAD_INPUT_WEIGHT_BRANCHES = launch.GRAD_INPUT_WEIGHT._replace(name="grad_input_weight_branches")


def branch_statistics(call: Call, branches: Tensor, mean: Tensor | None, var: Tensor | None) -> None:
    """Each branch is a forward with one dilation and a gate of ones; one pass over them all gives mean and var."""
    call = call.as_3d()
    problem, weight = call.geometry, Weight(call.weight)
    with launch.on_device_of(branches):
        source = launch.gather_source(call.input)
        gate = branches.new_ones(()).expand(call.input.shape[0], 1, *problem.output_size)
        for dilation, branch in zip(problem.dilations, branches):
            one = call._replace(geometry=dataclasses.replace(problem, dilations=(dilation,)))
            launch.run(launch.FORWARD, one, source, weight, gate, None, None, as_3d(branch))
        if mean is not None:
            _fill_statistics(branches, mean, var)


def branch_combine(call: Call, branches: Tensor, scale: Tensor, shift: Tensor, output: Tensor) -> None:
    K, N, O = branches.shape[:3]
    y, a, out = branches.flatten(3), call.attention.flatten(2), output.flatten(2)
    tensors = (y, a, scale, shift, out)

    def plan() -> Plan:
        align = _align(y, out)
        constants = _constants(O, align, y[0], a, out)
        return Plan(
            norm_kernels.combine_kernel,
            (N * launch.ceil_div(y.shape[3], constants["ROWS"]), launch.ceil_div(O, constants["BLOCK_O"])),
            (*_strides(y, align), a.stride(), launch.strides_of(out, align), y.shape[3]),
            {"K": K, **constants},
        )

    with launch.on_device_of(output):
        kept = launch.kept(norm_kernels.combine_kernel, tensors, plan)
        launch.submit(Launch(kept, tensors, lambda: _deliver(out, output)))


def branch_reduce(
    call: Call,
    grad_output: Tensor,
    branches: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    grad_attention: Tensor | None,
    grad_scale: Tensor,
    grad_shift: Tensor,
) -> None:
    K, N, O = branches.shape[:3]
    grad, y, a = grad_output.flatten(2), branches.flatten(3), call.attention.flatten(2)
    positions = y.shape[3]
    with launch.on_device_of(grad_output):
        parts = None if grad_attention is None else grad_attention.flatten(2).unsqueeze(0)
        blocks = launch.ceil_div(O, _block_o(O))
        if blocks > 1 and parts is not None:
            parts = parts.new_empty((blocks, N, K, positions), dtype=torch.float32)
        tiles = N * launch.ceil_div(positions, _rows(O))
        chunks = launch.ceil_div(tiles, TILES)
        sums = mean.new_empty((chunks, 2, K, O))
        tensors = (grad, y, a, mean, scale, shift, parts, sums)

        def plan() -> Plan:
            align = _align(grad, y)
            return Plan(
                norm_kernels.reduce_kernel,
                (chunks, blocks),
                (
                    launch.strides_of(grad, align),
                    *_strides(y, align),
                    a.stride(),
                    *((0, (0,) * 3) if parts is None else _strides(parts)),
                    positions,
                    tiles,
                ),
                {
                    "K": K,
                    **_constants(O, align, grad, y[0], a, *(() if parts is None else parts)),
                    "TILES": TILES,
                    "WANT_ATTENTION": parts is not None,
                    # Left alone, the compiler takes some 165, and one program would have the SM for itself.
                    **({} if torch.version.hip else {"maxnreg": 128}),
                },
            )

        def finish() -> None:
            if parts is not None:
                _deliver(parts[0] if blocks == 1 else parts.sum(0), grad_attention)
            for gradient, total in zip((grad_scale, grad_shift), sums.sum(0)):
                gradient.copy_(total)

        launch.submit(Launch(launch.kept(norm_kernels.reduce_kernel, tensors, plan), tensors, finish))


def branch_norm_backward(
    call: Call,
    grad_output: Tensor,
    branches: Tensor,
    a_coef: Tensor,
    b_coef: Tensor,
    c_coef: Tensor,
    grad_branches: Tensor,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """All dy_k, then one kernel that gathers from each and projects their sum once."""
    call = call.as_3d()
    with launch.on_device_of(grad_output):
        gradients, problem = _branch_gradients(call, grad_output, branches, (a_coef, b_coef, c_coef), grad_branches)
        align = _widest(branches)
        first = as_3d(gradients[0])
        source = Source(first, align, gradients.stride(0) // align)
        launch.run(
            GRAD_INPUT_WEIGHT_BRANCHES,
            call._replace(geometry=problem),
            source,
            call.input,
            Weight(call.weight),
            None,
            None,
            as_3d(grad_input),
            as_3d(grad_weight),
        )


# ------------------------------------------------------------------ one function per launch


def _fill_statistics(branches: Tensor, mean: Tensor, var: Tensor) -> None:
    K, N, O = branches.shape[:3]
    y = branches.flatten(3)
    tiles = N * launch.ceil_div(y.shape[3], _rows(O))
    chunks = launch.ceil_div(tiles, TILES)
    parts = mean.new_empty((3, chunks, K, O))

    def plan() -> Plan:
        align = _align(y)
        constants = _constants(O, align, y[0])
        return Plan(
            norm_kernels.statistics_kernel,
            (chunks, launch.ceil_div(O, constants["BLOCK_O"]), K),
            (*_strides(y, align), y.shape[3], tiles),
            {"K": K, **constants, "TILES": TILES},
        )

    def finish() -> None:
        counts, means, squares = parts.double()
        total = counts.sum(0)
        mean64 = (counts * means).sum(0) / total
        mean.copy_(mean64)
        # Chan, Golub and LeVeque: square distances of the parts, and of their means from the mean of all.
        var.copy_((squares + counts * (means - mean64).square()).sum(0) / total)

    tensors = (y, parts)
    launch.submit(Launch(launch.kept(norm_kernels.statistics_kernel, tensors, plan), tensors, finish))


def _branch_gradients(
    call: Call, grad_output: Tensor, branches: Tensor, coefs: tuple[Tensor, ...], grad_branches: Tensor
) -> tuple[Tensor, Geometry]:
    """All dy_k, ``[K, N, O or more, *S]``, as kernels gather them: adjacent channels, aligned rows.

    In ``grad_branches`` unless padded channels need more memory than that. Also the geometry with the dilations in the
    order in which the branches lie.
    """
    geometry, attention = call.geometry, call.attention
    K, N, O, *size = branches.shape
    align = _widest(branches)

    def fill(branches: Tensor, attention: Tensor, coefs: Iterable[Tensor], gradients: Tensor) -> None:
        _fill_gradients(grad_output, branches, attention, *coefs, gradients)

    if launch.alignment(as_3d(grad_branches[0])) >= align and grad_branches.stride(0) % align == 0:
        fill(branches, attention, coefs, grad_branches)
        return grad_branches, geometry
    if O % align or not grad_branches.is_contiguous():
        gradients = branches.new_empty((K, N, *size, launch.ceil_div(O, align) * align)).movedim(-1, 2)
        fill(branches, attention, coefs, gradients)
        return gradients, geometry
    gradients = grad_branches.view(K, N, *size, O).movedim(-1, 2)
    if grad_branches.data_ptr() != branches.data_ptr():
        fill(branches, attention, coefs, gradients)
        return gradients, geometry
    # Each dy_k in its new order goes where the branch before lay, the first to spare memory and from there to the end.
    spare = torch.empty_like(gradients[:1])
    for k in range(K):
        one = slice(k, k + 1)
        target = gradients[k - 1 : k] if k > 0 else spare
        fill(branches[one], attention[:, one], (coef[one] for coef in coefs), target)
    gradients[-1:].copy_(spare)
    dilations = (*geometry.dilations[1:], geometry.dilations[0])
    return gradients, dataclasses.replace(geometry, dilations=dilations)


def _widest(branches: Tensor) -> int:
    """Channels that one load of at most 16 bytes gathers."""
    return min(16 // branches.itemsize, 1 << (branches.shape[2] - 1).bit_length())


def _fill_gradients(
    grad_output: Tensor,
    branches: Tensor,
    attention: Tensor,
    a_coef: Tensor,
    b_coef: Tensor,
    c_coef: Tensor,
    gradients: Tensor,
) -> None:
    K, N, O = branches.shape[:3]
    grad, y, a, out = grad_output.flatten(2), branches.flatten(3), attention.flatten(2), gradients.flatten(3)
    channels = gradients.shape[2]
    tensors = (grad, y, a, a_coef, b_coef, c_coef, out)

    def plan() -> Plan:
        align = _align(grad, y, out)
        constants = _constants(O, align, grad, y[0], a, out[0])
        return Plan(
            norm_kernels.grad_branches_kernel,
            (N * launch.ceil_div(y.shape[3], constants["ROWS"]), launch.ceil_div(channels, constants["BLOCK_O"])),
            (launch.strides_of(grad, align), *_strides(y, align), a.stride(), *_strides(out, align), y.shape[3]),
            {"K": K, **constants, "CHANNELS": channels},
        )

    launch.submit(Launch(launch.kept(norm_kernels.grad_branches_kernel, tensors, plan), tensors))


# ------------------------------------------------------------------ tiles and strides


def _constants(O: int, align: int, *volumes: Tensor) -> dict:
    """Tile and offsets of the kernels that treat each voxel alone; ``volumes`` are [N, channels, positions]."""
    return {
        "O": O,
        "BLOCK_O": _block_o(O),
        "ROWS": _rows(O),
        "ALIGN": align,
        "ROW": launch.row_dtype(*volumes),
        "num_warps": WARPS,
        "num_stages": 1,
    }


def _block_o(O: int) -> int:
    return min(MAX_BLOCK_O, 1 << (O - 1).bit_length())


def _rows(O: int) -> int:
    return ELEMENTS // _block_o(O)


def _align(*volumes: Tensor) -> int:
    """``launch.alignment`` of tensors [N, O, positions] and of branches, [K, N, O, positions]."""
    branches = [volume for volume in volumes if volume.dim() == 4]
    align = launch.alignment(*((volume[0] if volume.dim() == 4 else volume)[..., None, None] for volume in volumes))
    return math.gcd(align, *(volume.stride(0) for volume in branches if volume.shape[0] > 1))


def _strides(branches: Tensor, align: int = 1) -> tuple[int, tuple[int, ...]]:
    """Of K, and of (N, channels, positions), in units of ``align`` elements but that of the channels."""
    return branches.stride(0) // align, launch.strides_of(branches[0], align)


def _deliver(flat: Tensor, target: Tensor) -> None:
    """Copies what a kernel left in ``flat`` to ``target``, unless it is a view of that: not all strides allow one."""
    if flat.data_ptr() != target.data_ptr():
        target.copy_(flat.view(target.shape))
