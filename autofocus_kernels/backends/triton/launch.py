"""From tensors to launches: views, packing, grids, scratch memory.

Axes: N batch, C input channels, O output channels, K branches, T kernel taps, D H W space.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import Call, as_3d
from ...geometry import Geometry
from ..interface import Gradients
from . import fitting, interpreted, kernels
from .configs import Config, Tiling, choose_tiling, configurations

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Launch(NamedTuple):
    """One kernel call. ``finish`` turns what the kernel left in scratch memory into the result."""

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict
    finish: Callable[[], None] = lambda: None


def submit(launch: Launch) -> None:
    launch.kernel[launch.grid](*launch.arguments, **launch.constants)
    launch.finish()


# ------------------------------------------------------------------ the two entry points


def forward(call: Call, output: Tensor) -> None:
    call = call.as_3d()
    weight, branch_scale, shift = call.weight, call.branch_scale, _shift(call)
    kernel, make = ("forward", make_forward) if branch_scale is None else ("forward_scaled", _forward_scaled)
    fitting.require_fit(_key(kernel, call))  # before anything is packed
    with on_device_of(weight):
        source = gather_source(call.input)
        run(kernel, make, call, source, weight, call.attention, branch_scale, shift, as_3d(output))


def backward(call: Call, grad_output: Tensor, gradients: Gradients) -> None:
    call = call.as_3d()
    weight, attention = call.weight, call.attention
    branch_scale, shift = call.branch_scale, _shift(call)
    grad_output, *volumes = map(as_3d, (grad_output, *gradients[:3]))
    grad_input, grad_weight, grad_attention = volumes
    grad_branch_scale = gradients.branch_scale
    if branch_scale is None:
        gather, dots = "grad_input_weight", "grad_attention"
    else:
        gather, dots = "grad_input_weight_scaled", "grad_scaled"
    wants_gather = grad_input is not None or grad_weight is not None
    wants_dots = grad_attention is not None or grad_branch_scale is not None
    wanted = [kernel for kernel, is_wanted in ((gather, wants_gather), (dots, wants_dots)) if is_wanted]
    fitting.require_fit(*(_key(kernel, call) for kernel in wanted))
    with on_device_of(weight):
        if wants_gather:
            # Its packed copy is freed before the next one is made.
            run(
                gather,
                make_grad_input_weight,
                call,
                gather_source(grad_output),
                call.input,
                weight,
                attention,
                branch_scale,
                grad_input,
                grad_weight,
            )
        if not wants_dots:
            return
        source = gather_source(call.input)
        if branch_scale is None:
            run(dots, _grad_attention, call, grad_output, source, weight, shift, grad_attention)
        else:
            run(
                dots,
                _grad_scaled,
                call,
                grad_output,
                source,
                weight,
                attention,
                branch_scale,
                shift,
                grad_attention,
                grad_branch_scale,
            )


def run(kernel: str, make: Callable[..., Launch], call: Call, *tensors) -> None:
    """Submits ``make(config, problem, *tensors)`` by the configuration of this class of problems."""
    weight = call.weight
    O, C = weight.shape[:2]
    fitting.run(
        _key(kernel, call),
        configurations(kernel, weight.itemsize, dot_precision(weight), capability(weight.device), C, O),
        lambda config: submit(make(config, call.geometry, *tensors)),
    )


def _key(kernel: str, call: Call) -> tuple:
    """The class of problems that share a configuration."""
    weight, problem = call.weight, call.geometry
    O, C = weight.shape[:2]
    return (
        kernel,
        weight.device,
        weight.dtype,
        dot_precision(weight),
        C,
        O,
        problem.kernel_size,
        problem.dilations,
        problem.stride,
    )


# ------------------------------------------------------------------ one function per kernel
# Each turns (config, problem, *tensors) into a Launch; ``source`` is the Source of the gathered tensor.


def make_forward(config, problem, source, weight, attention, branch_scale, shift, output) -> Launch:
    """For branches without a scale: ``branch_scale`` is None."""
    walk = Walk(problem, config, source.tensor.shape[0])
    align = alignment(output)
    return Launch(
        kernels.forward_kernel,
        (walk.num_tiles, triton.cdiv(weight.shape[0], config.block_o)),
        (
            source.tensor,
            repack(weight, config, (2, 1, 0)),
            attention,
            shift,
            output,
            source.stride,
            attention.stride(),
            strides_of(shift),
            strides_of(output, align),
            *walk.arguments,
        ),
        _constants(config, walk, source, weight, align, attention, output)
        | {"HAS_SHIFT": shift is not None, "BLEND": blend_dtype(weight)},
    )


def _forward_scaled(config, problem, source, weight, attention, branch_scale, shift, output) -> Launch:
    walk = Walk(problem, config, source.tensor.shape[0])
    align = alignment(output)
    return Launch(
        kernels.forward_scaled_kernel,
        (walk.num_tiles, triton.cdiv(weight.shape[0], config.block_o)),
        (
            source.tensor,
            repack(weight, config, (2, 1, 0)),
            attention,
            branch_scale,
            shift,
            output,
            source.stride,
            attention.stride(),
            branch_scale.stride(),
            strides_of(shift),
            strides_of(output, align),
            *walk.arguments,
        ),
        _constants(config, walk, source, weight, align, attention, output) | {"HAS_SHIFT": shift is not None},
    )


def make_grad_input_weight(
    config, problem, source, input, weight, attention, branch_scale, grad_input, grad_weight
) -> Launch:
    """Without ``attention``, each branch has its own gradient, ``source.branch_stride`` after the one before it."""
    O, C = weight.shape[:2]
    walk = Walk(problem, config, input.shape[0], transposed=True)
    align = alignment(input, grad_input)
    blocks = triton.cdiv(C, config.block_c)
    packed = repack(weight, config, (2, 0, 1))
    splits, sums = walk.num_tiles, None
    if grad_weight is not None:
        splits = min(splits, triton.cdiv(_resident_programs(input.device), blocks))
        T, channels = packed.shape[0], triton.cdiv(C, 8) * 8
        sums = torch.zeros((splits, T, O, channels), dtype=torch.float32, device=input.device)

    def finish() -> None:
        if grad_weight is not None:
            grad_weight.copy_(sums.sum(0)[:, :, :C].permute(1, 2, 0).reshape(grad_weight.shape))

    return Launch(
        kernels.grad_input_weight_kernel,
        (splits, blocks),
        (
            source.tensor,
            attention,
            branch_scale,
            packed,
            input,
            grad_input,
            sums,
            source.stride,
            source.branch_stride,
            strides_of(attention),
            strides_of(branch_scale),
            strides_of(input, align),
            strides_of(grad_input, align),
            *walk.arguments,
            walk.num_tiles,
        ),
        _constants(config, walk, source, weight, align, attention, input, grad_input)
        | {
            "HAS_GATE": attention is not None,
            "HAS_SCALE": branch_scale is not None,
            "WANT_INPUT": grad_input is not None,
            "WANT_WEIGHT": grad_weight is not None,
            "BLEND": blend_dtype(weight),
        },
        finish,
    )


def _grad_attention(config, problem, grad_output, source, weight, shift, grad_attention) -> Launch:
    """For branches without a scale, whose gradients share ``g_t = W_t^T G``."""
    walk = Walk(problem, config, grad_output.shape[0])
    align = alignment(grad_output)
    return Launch(
        kernels.grad_attention_kernel,
        (walk.num_tiles, 1),
        (
            grad_output,
            source.tensor,
            repack(weight, config, (2, 0, 1)),
            shift,
            grad_attention,
            strides_of(grad_output, align),
            source.stride,
            strides_of(shift),
            grad_attention.stride(),
            *walk.arguments,
        ),
        _constants(config, walk, source, weight, align, grad_output, grad_attention) | {"HAS_SHIFT": shift is not None},
    )


def _grad_scaled(
    config, problem, grad_output, source, weight, attention, branch_scale, shift, grad_attention, grad_branch_scale
) -> Launch:
    walk = Walk(problem, config, grad_output.shape[0])
    align = alignment(grad_output)
    sums = None
    if grad_branch_scale is not None:
        sums = torch.empty((walk.num_tiles, *branch_scale.shape), dtype=torch.float32, device=grad_output.device)

    def finish() -> None:
        if grad_branch_scale is not None:
            grad_branch_scale.copy_(sums.sum(0))

    return Launch(
        kernels.grad_scaled_kernel,
        (walk.num_tiles, 1),
        (
            grad_output,
            source.tensor,
            repack(weight, config, (2, 1, 0)),
            attention,
            branch_scale,
            shift,
            grad_attention,
            sums,
            strides_of(grad_output, align),
            source.stride,
            attention.stride(),
            branch_scale.stride(),
            strides_of(shift),
            strides_of(grad_attention),
            *walk.arguments,
        ),
        _constants(config, walk, source, weight, align, grad_output, attention, grad_attention)
        | {
            "HAS_SHIFT": shift is not None,
            "WANT_ATTENTION": grad_attention is not None,
            "WANT_SCALE": grad_branch_scale is not None,
        },
        finish,
    )


def _constants(config: Config, walk: Walk, source: Source, weight: Tensor, align: int, *volumes: Tensor | None) -> dict:
    """``volumes`` are the tensors [N, ..., D, H, W] that the kernel addresses besides the source."""
    return {
        "C": weight.shape[1],
        "O": weight.shape[0],
        "G": walk.tiling,
        "BLOCK_C": config.block_c,
        "BLOCK_O": config.block_o,
        "READ": source.tensor.shape[1],
        "ALIGN": source.align,
        "TILE_ALIGN": align,
        "DOT": dot_dtype(weight),
        "ROW": row_dtype(source.tensor, *volumes),
        "PRECISION": dot_precision(weight),
        "num_warps": config.num_warps,
        # More stages would copy what is gathered past L1 into shared memory, and L1 is where its reuse is.
        "num_stages": 1,
        **_register_limit(config),
    }


def _register_limit(config: Config) -> dict:
    return {} if torch.version.hip else {"maxnreg": config.registers}


def row_dtype(*volumes: Tensor | None) -> tl.dtype:
    """32 bits, or 64 if a batch entry spans too many elements; offsets between batch entries always have 64."""
    spans = [
        sum((size - 1) * stride for size, stride in zip(volume.shape[1:], volume.stride()[1:]))
        for volume in volumes
        if volume is not None
    ]
    return tl.int32 if max(spans) < 2**31 else tl.int64


def _resident_programs(device: torch.device) -> int:
    """How many programs of one kernel share the sum of grad_weight: as many as run at once."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 3


# ------------------------------------------------------------------ tensors as the kernels want them


class Walk:
    """The tiles of one kernel on one problem; ``arguments`` are the kernel's integers."""

    def __init__(self, problem: Geometry, config: Config, batch: int, transposed: bool = False) -> None:
        self.tiling: Tiling = choose_tiling(problem.tiled, config.rows, transposed)
        sizes = problem.input_size if transposed else problem.output_size
        cosets = tuple(map(min, self.tiling.step, sizes))
        tiles = tuple(
            triton.cdiv(triton.cdiv(size, step), tile)
            for size, step, tile in zip(sizes, self.tiling.step, self.tiling.tile)
        )
        self.num_tiles = batch * math.prod(cosets) * math.prod(tiles)
        self.arguments = (problem.input_size, problem.output_size, problem.origin, tiles, cosets)


class Source(NamedTuple):
    """A tensor [N, C', D, H, W] fit to be gathered from: adjacent channels, every row aligned.

    Attributes:
        stride: in units of ``align`` elements, except that of the channels.
        align: elements of the widest load, at most 16 bytes.
        branch_stride: in the same units, where each branch has its own tensor; ``tensor`` is that of the first.
    """

    tensor: Tensor
    stride: tuple[int, ...]
    align: int
    branch_stride: int = 0


def gather_source(tensor: Tensor) -> Source:
    """``tensor`` itself if its channels are adjacent and its rows aligned, else a packed copy.

    A copy costs a pass over the tensor and its memory; narrower loads would cost several instructions in each of the
    K T reads of a row. Packed channels are padded with zeros.
    """
    C = tensor.shape[1]
    widest = min(16 // tensor.itemsize, triton.next_power_of_2(C))
    if alignment(tensor) < widest:
        tensor = pack(tensor, triton.cdiv(C, widest) * widest)
    return Source(tensor, strides_of(tensor, widest), widest)


def alignment(*tensors: Tensor | None) -> int:
    """Elements, at most 16 bytes of them, that may be loaded at once at the start of any row of every tensor."""
    aligned = 16
    for tensor in tensors:
        if tensor is None:
            continue
        adjacent = tensor.shape[1] == 1 or tensor.stride(1) == 1
        if not adjacent or tensor.data_ptr() % 16:
            return 1
        strides = [tensor.stride(axis) for axis in (0, 2, 3, 4) if tensor.shape[axis] > 1]
        aligned = math.gcd(aligned, 16 // tensor.itemsize, *strides)
    return aligned


def pack(tensor: Tensor, channels: int) -> Tensor:
    """A copy [N, channels, D, H, W] with adjacent channels, zero past those of ``tensor``."""
    N, C, *size = tensor.shape
    packed = tensor.new_empty((N, *size, channels)).movedim(-1, 1)
    points = math.prod(size)
    collapsed = _collapsed_stride(tensor)
    if collapsed is None:
        packed[:, C:] = 0
        packed[:, :C] = tensor
        return packed
    rows, block = 128, min(32, triton.next_power_of_2(channels))
    submit(
        Launch(
            kernels.pack_kernel,
            (N * triton.cdiv(points, rows), triton.cdiv(channels, block)),
            (tensor, packed, tensor.stride(0), tensor.stride(1), collapsed, points),
            {"C": C, "C_PADDED": channels, "BLOCK_P": rows, "BLOCK_C": block},
        )
    )
    return packed


def _collapsed_stride(tensor: Tensor) -> int | None:
    """The stride of D, H and W seen as one axis, or None if they are not one."""
    axes = [(size, stride) for size, stride in zip(tensor.shape[2:], tensor.stride()[2:]) if size > 1]
    for (_, outer), (size, inner) in pairwise(axes):
        if outer != size * inner:
            return None
    return axes[-1][1] if axes else 1


def repack(weight: Tensor, config: Config, order: tuple[int, int, int]) -> Tensor:
    """[O, C, *kernel] to [T, C, O] (``order`` (2, 1, 0)) or [T, O, C] ((2, 0, 1)), zero-padded to whole blocks."""
    O, C = weight.shape[:2]
    padded = weight.new_zeros(
        [
            (
                triton.cdiv(O, config.block_o) * config.block_o,
                triton.cdiv(C, config.block_c) * config.block_c,
                math.prod(weight.shape[2:]),
            )[axis]
            for axis in order
        ]
    )
    rows, columns = (weight.shape[axis] for axis in order[1:])
    padded[:, :rows, :columns] = weight.flatten(2).permute(order)
    return padded


def dot_dtype(tensor: Tensor) -> tl.dtype:
    """That of the tensor; but the interpreter's bfloat16 arithmetic is wrong, so it is only loaded and stored."""
    return tl.float32 if interpreted() and tensor.dtype == torch.bfloat16 else DTYPES[tensor.dtype]


def blend_dtype(tensor: Tensor) -> tl.dtype:
    """That of the tensor: two elements an instruction. Only CDNA has no such instruction for bfloat16."""
    return tl.float32 if torch.version.hip and tensor.dtype == torch.bfloat16 else dot_dtype(tensor)


def dot_precision(tensor: Tensor) -> str:
    """TF32 where torch would use it for a float32 convolution on this device, else "ieee"."""
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if tensor.dtype == torch.float32 and tf32 else "ieee"


def capability(device: torch.device) -> int:
    """The major compute capability of an NVIDIA device, 8 for all else."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device)[0] if nvidia else 8


def _shift(call: Call) -> Tensor | None:
    """What is added to each branch, [K, O]: a bias is the same shift for all."""
    return call.branch_shift if call.bias is None else call.bias.expand(call.geometry.num_branches, -1)


def strides_of(tensor: Tensor | None, align: int = 1) -> tuple[int, ...]:
    """Strides in units of ``align`` elements, but that of the channels in elements."""
    if tensor is None:
        return (0,) * 5
    strides = [stride if axis == 1 else stride // align for axis, stride in enumerate(tensor.stride())]
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, strides))


def on_device_of(tensor: Tensor):
    """Triton launches on the current device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
