"""From tensors to launches: views, packing, grids, scratch memory.

Axes: N batch, C input channels, O output channels, K branches, T kernel taps, D H W space.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...call import Call, allows_tf32, as_3d
from ...geometry import Geometry
from ..interface import Gradients
from . import fitting, interpreted, kernels, packing
from .configs import Config, Tiling, choose_tiling, configurations

# A program repacks ELEMENTS of the weight, or adds up the parts of PARTS_BLOCK elements of its gradient, PARTS of them
# at a time.
ELEMENTS, PARTS_BLOCK, PARTS = 4096, 256, 16
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Plan:
    """How a kernel is launched on all tensors that are alike (:func:`likeness`).

    Attributes:
        kernel, grid, constants: as Triton takes them.
        numbers: the kernel's arguments after its tensors.
        any_numbers: compile one kernel whether or not numbers are multiples of 16: five times fewer kernels.
        repacking: the plan that repacks the weight before, if any.
        adding: the plan that adds up the parts of its gradient after, if any.
    """

    def __init__(
        self, kernel, grid: tuple[int, ...], numbers: tuple, constants: dict, any_numbers: bool = False
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.any_numbers = any_numbers
        self.repacking: Plan | None = None
        self.adding: Plan | None = None
        self._compiled: Callable | None = None
        self._after_tensors: tuple = ()

    def run(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Launches; after the first time without Triton's look-up, which would find the same again."""
        if self._compiled is None:
            if interpreted():
                self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
                return
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            self._after_tensors = (*self.numbers, *(self.constants[name] for name in names))
            self._compiled = self.compiled(tensors)[(*self.grid, 1, 1)[:3]]
        self._compiled(*tensors, *self._after_tensors)

    def compiled(self, tensors: tuple[Tensor | None, ...]):
        """What Triton compiles. It depends on the tensors' dtypes and on which of them are aligned to 16 bytes; and on
        which numbers are one, need 64 bits or, unless ``any_numbers``, are multiples of 16.

        The last is of no use to kernels that learn from ALIGN what they can load at once. And it differs from volume to
        volume, so the self-check would test another kernel than the call runs.
        """
        numbers = _representative(self.numbers) if self.any_numbers else self.numbers
        return self.kernel.warmup(*tensors, *numbers, grid=self.grid, **self.constants)


def _representative(number):
    """A number (or a tuple of them) that Triton compiles like ``number``, but that is no multiple of 16."""
    if isinstance(number, tuple):
        return tuple(map(_representative, number))
    if number == 1:
        return 1
    return 3 if -(2**31) <= number < 2**31 else 2**31 + 3


class Launch(NamedTuple):
    """One kernel call. ``finish`` turns what the kernel left in scratch memory into the result."""

    plan: Plan
    tensors: tuple[Tensor | None, ...]
    finish: Callable[[], None] = lambda: None


def submit(launch: Launch) -> None:
    launch.plan.run(launch.tensors)
    launch.finish()


class Kernel(NamedTuple):
    """How a kernel is called: ``plan(config, problem, *tensors)`` once, ``launch(plan, *tensors)`` each time.

    ``tensors`` are what ``run`` is given; of a gathered tensor it is the Source.
    """

    name: str
    plan: Callable[..., Plan]
    launch: Callable[..., Launch]


_plans: dict[tuple, Plan] = {}
_MOST_PLANS = 4096


def forget() -> None:
    """Makes every plan and choice anew."""
    _plans.clear()
    fitting.forget()


def _keep(key: tuple, plan: Plan) -> Plan:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def kept(kernel, tensors: tuple[Tensor | None, ...], make: Callable[[], Plan]) -> Plan:
    """The plan of ``kernel`` for tensors like these, which decide all of it."""
    key = (kernel.__name__, *map(likeness, tensors))
    plan = _plans.get(key)
    return _keep(key, make()) if plan is None else plan


def likeness(tensor: Tensor | Source | Weight | None) -> tuple | None:
    """All that a plan knows of a tensor."""
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        return tensor.likeness
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0


# ------------------------------------------------------------------ the two entry points


def forward(call: Call, output: Tensor) -> None:
    call = call.as_3d()
    branch_scale, shift = call.branch_scale, _shift(call)
    kernel = FORWARD if branch_scale is None else FORWARD_SCALED
    require_fit(call, kernel)
    with on_device_of(output):
        source, weight = gather_source(call.input), Weight(call.weight)
        run(kernel, call, source, weight, call.attention, branch_scale, shift, as_3d(output))


def backward(call: Call, grad_output: Tensor, gradients: Gradients) -> None:
    call = call.as_3d()
    weight, attention = Weight(call.weight), call.attention
    branch_scale, shift = call.branch_scale, _shift(call)
    grad_output, grad_input, grad_weight, grad_attention = map(as_3d, (grad_output, *gradients[:3]))
    grad_branch_scale = gradients.branch_scale
    if branch_scale is None:
        gather, dots = GRAD_INPUT_WEIGHT, GRAD_ATTENTION
    else:
        gather, dots = GRAD_INPUT_WEIGHT_SCALED, GRAD_SCALED
    wants_gather = grad_input is not None or grad_weight is not None
    wants_dots = grad_attention is not None or grad_branch_scale is not None
    require_fit(call, *[kernel for kernel, wanted in ((gather, wants_gather), (dots, wants_dots)) if wanted])
    with on_device_of(grad_output):
        if wants_gather:
            # Its packed copy is freed before the next one is made.
            source = gather_source(grad_output)
            run(gather, call, source, call.input, weight, attention, branch_scale, grad_input, grad_weight)
            del source
        if not wants_dots:
            return
        source = gather_source(call.input)
        if branch_scale is None:
            run(dots, call, grad_output, source, weight, shift, grad_attention)
        else:
            tensors = (weight, attention, branch_scale, shift, grad_attention, grad_branch_scale)
            run(dots, call, grad_output, source, *tensors)


def require_fit(call: Call, *kernels: Kernel) -> None:
    """Raises NoConfigurationFits, before anything is packed, if an earlier call found that nothing fits one of them."""
    fitting.require_fit(_key(kernel, call) for kernel in kernels)


def run(kernel: Kernel, call: Call, *tensors: Tensor | Source | Weight | None) -> None:
    """Launches ``kernel`` by the plan of earlier calls like this one, or by the first configuration that fits."""
    weight = call.weight
    key = (kernel.name, call.geometry, dot_precision(weight), *map(likeness, tensors))
    plan = _plans.get(key)
    if plan is not None:
        submit(kernel.launch(plan, *tensors))
        return

    def attempt(config: Config) -> None:
        plan = kernel.plan(config, call.geometry, *tensors)
        submit(kernel.launch(plan, *tensors))
        _keep(key, plan)

    O, C = weight.shape[:2]
    candidates = configurations(kernel.name, weight.itemsize, dot_precision(weight), capability(weight.device), C, O)
    fitting.run(_key(kernel, call), candidates, attempt)


def _key(kernel: Kernel, call: Call) -> tuple:
    """The class of problems that share a configuration."""
    weight, problem = call.weight, call.geometry
    O, C = weight.shape[:2]
    return (
        kernel.name,
        weight.device,
        weight.dtype,
        dot_precision(weight),
        C,
        O,
        problem.kernel_size,
        problem.dilations,
        problem.stride,
    )


# ------------------------------------------------------------------ two functions per kernel


def _plan_forward(config, problem, source, weight, attention, branch_scale, shift, output) -> Plan:
    """By the branches' scale if they have one, else blended."""
    walk = Walk(problem, config, source.tensor.shape[0])
    align = alignment(output)
    constants = _constants(config, walk, source, weight.tensor, align, attention, output) | {
        "HAS_SHIFT": shift is not None
    }
    strides = (_shift_strides(shift), strides_of(output, align))
    if branch_scale is None:
        kernel, constants["BLEND"] = kernels.forward_kernel, blend_dtype(weight.tensor)
    else:
        kernel, strides = kernels.forward_scaled_kernel, (branch_scale.stride(), *strides)
    grid = (walk.num_tiles, ceil_div(weight.tensor.shape[0], config.block_o))
    numbers = (source.stride, attention.stride(), *strides, *walk.arguments)
    plan = Plan(kernel, grid, numbers, constants, any_numbers=True)
    plan.repacking = _plan_repack(weight.tensor, config, "TCO")
    return plan


def _forward(plan, source, weight, attention, branch_scale, shift, output) -> Launch:
    return Launch(plan, (source.tensor, weight.repacked(plan), attention, shift, output))


def _forward_scaled(plan, source, weight, attention, branch_scale, shift, output) -> Launch:
    return Launch(plan, (source.tensor, weight.repacked(plan), attention, branch_scale, shift, output))


def _plan_grad_input_weight(
    config, problem, source, input, weight, attention, branch_scale, grad_input, grad_weight
) -> Plan:
    """Without ``attention``, each branch has its own gradient, ``source.branch_stride`` after the one before it."""
    walk = Walk(problem, config, input.shape[0], transposed=True)
    align = alignment(input, grad_input)
    blocks = ceil_div(weight.tensor.shape[1], config.block_c)
    splits = walk.num_tiles
    if grad_weight is not None:
        # Few: at least three tiles for each.
        most = ceil_div(walk.num_tiles, 3) if problem.few_blocks else _resident_programs(input.device, config)
        splits = min(splits, ceil_div(most, blocks))
    numbers = (
        source.stride,
        source.branch_stride,
        strides_of(attention),
        strides_of(branch_scale),
        strides_of(input, align),
        strides_of(grad_input, align),
        *walk.arguments,
        walk.num_tiles,
    )
    constants = _constants(config, walk, source, weight.tensor, align, attention, input, grad_input) | {
        "HAS_GATE": attention is not None,
        "HAS_SCALE": branch_scale is not None,
        "WANT_INPUT": grad_input is not None,
        "WANT_WEIGHT": grad_weight is not None,
        "BLEND": blend_dtype(weight.tensor),
    }
    plan = Plan(kernels.grad_input_weight_kernel, (splits, blocks), numbers, constants, any_numbers=True)
    plan.repacking = _plan_repack(weight.tensor, config, "TOC")
    if grad_weight is not None:
        plan.adding = _plan_add_parts(splits, grad_weight)
    return plan


def _grad_input_weight(plan, source, input, weight, attention, branch_scale, grad_input, grad_weight) -> Launch:
    packed = weight.repacked(plan)
    tensors = (source.tensor, attention, branch_scale, packed, input, grad_input)
    if grad_weight is None:
        return Launch(plan, (*tensors, None))
    of = plan.adding.constants
    sums = torch.zeros(plan.grid[0], of["T"], of["O"], of["C_SUMS"], dtype=torch.float32, device=weight.tensor.device)
    return Launch(plan, (*tensors, sums), lambda: submit(Launch(plan.adding, (sums, grad_weight))))


def _plan_grad_attention(config, problem, grad_output, source, weight, shift, grad_attention) -> Plan:
    walk = Walk(problem, config, grad_output.shape[0])
    align = alignment(grad_output)
    numbers = (
        strides_of(grad_output, align),
        source.stride,
        _shift_strides(shift),
        grad_attention.stride(),
        *walk.arguments,
    )
    constants = _constants(config, walk, source, weight.tensor, align, grad_output, grad_attention)
    constants["HAS_SHIFT"] = shift is not None
    plan = Plan(kernels.grad_attention_kernel, (walk.num_tiles, 1), numbers, constants, any_numbers=True)
    plan.repacking = _plan_repack(weight.tensor, config, "TOC")
    return plan


def _grad_attention(plan, grad_output, source, weight, shift, grad_attention) -> Launch:
    return Launch(plan, (grad_output, source.tensor, weight.repacked(plan), shift, grad_attention))


def _plan_grad_scaled(
    config, problem, grad_output, source, weight, attention, branch_scale, shift, grad_attention, grad_branch_scale
) -> Plan:
    walk = Walk(problem, config, grad_output.shape[0])
    align = alignment(grad_output)
    numbers = (
        strides_of(grad_output, align),
        source.stride,
        attention.stride(),
        branch_scale.stride(),
        _shift_strides(shift),
        strides_of(grad_attention),
        *walk.arguments,
    )
    constants = _constants(config, walk, source, weight.tensor, align, grad_output, attention, grad_attention) | {
        "HAS_SHIFT": shift is not None,
        "WANT_ATTENTION": grad_attention is not None,
        "WANT_SCALE": grad_branch_scale is not None,
    }
    plan = Plan(kernels.grad_scaled_kernel, (walk.num_tiles, 1), numbers, constants, any_numbers=True)
    plan.repacking = _plan_repack(weight.tensor, config, "TCO")
    return plan


def _grad_scaled(
    plan, grad_output, source, weight, attention, branch_scale, shift, grad_attention, grad_branch_scale
) -> Launch:
    packed = weight.repacked(plan)
    tensors = (grad_output, source.tensor, packed, attention, branch_scale, shift, grad_attention)
    if grad_branch_scale is None:
        return Launch(plan, (*tensors, None))
    sums = torch.empty((plan.grid[0], *branch_scale.shape), dtype=torch.float32, device=weight.tensor.device)
    return Launch(plan, (*tensors, sums), lambda: grad_branch_scale.copy_(sums.sum(0)))


FORWARD = Kernel("forward", _plan_forward, _forward)
FORWARD_SCALED = Kernel("forward_scaled", _plan_forward, _forward_scaled)
GRAD_INPUT_WEIGHT = Kernel("grad_input_weight", _plan_grad_input_weight, _grad_input_weight)
GRAD_INPUT_WEIGHT_SCALED = GRAD_INPUT_WEIGHT._replace(name="grad_input_weight_scaled")
# For branches without a scale, whose gradients share ``g_t = W_t^T G``.
GRAD_ATTENTION = Kernel("grad_attention", _plan_grad_attention, _grad_attention)
GRAD_SCALED = Kernel("grad_scaled", _plan_grad_scaled, _grad_scaled)


def _constants(config: Config, walk: Walk, source: Source, weight: Tensor, align: int, *volumes: Tensor | None) -> dict:
    """``volumes`` are the tensors [N, ..., D, H, W] that the kernel addresses besides the source."""
    return {
        "C": weight.shape[1],
        "O": weight.shape[0],
        "TILING": walk.tiling,
        "BLOCK_C": config.block_c,
        "BLOCK_O": config.block_o,
        "READ": source.tensor.shape[1],
        "ALIGN": source.align,
        "TILE_ALIGN": align,
        "DOT": dot_dtype(weight),
        "ROW": row_dtype(source.tensor, *volumes, beyond=walk.beyond),
        "PRECISION": dot_precision(weight),
        "num_warps": config.num_warps,
        # More stages would copy what is gathered past L1 into shared memory, and L1 is where its reuse is.
        "num_stages": 1,
        **_register_limit(config),
    }


def _register_limit(config: Config) -> dict:
    return {} if torch.version.hip else {"maxnreg": config.registers}


def row_dtype(*volumes: Tensor | None, beyond: tuple[int, ...] = ()) -> tl.dtype:
    """32 bits, or 64 if a batch entry spans too many elements; offsets between batch entries always have 64.

    Offsets count from a position at most ``beyond`` outside of the volume on each spatial axis.
    """
    spans = [
        sum(
            (size - 1 + more) * stride
            for size, stride, more in zip_longest(volume.shape[1:], volume.stride()[1:], (0, *beyond), fillvalue=0)
            if size > 1
        )
        for volume in volumes
        if volume is not None
    ]
    return tl.int32 if max(spans) < 2**31 else tl.int64


def _resident_programs(device: torch.device, config: Config) -> int:
    """How many programs of one kernel share the sum of grad_weight: as many as run at once, by their registers."""
    if device.type != "cuda":
        return 3
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * max(1, 2**16 // (32 * config.num_warps * config.registers))


# ------------------------------------------------------------------ tensors as the kernels want them


class Walk:
    """The tiles of one kernel on one problem.

    Attributes:
        arguments: the kernel's integers.
        beyond: how far outside the volume, on each axis, a position may lie that offsets count from.
    """

    def __init__(self, problem: Geometry, config: Config, batch: int, transposed: bool = False) -> None:
        self.tiling: Tiling = choose_tiling(problem.tiled, config.rows, transposed)
        sizes = problem.input_size if transposed else problem.output_size
        classes = tuple(map(min, self.tiling.step, sizes))
        tiles = tuple(
            ceil_div(ceil_div(size, step), tile) for size, step, tile in zip(sizes, self.tiling.step, self.tiling.tile)
        )
        self.num_tiles = batch * math.prod(classes) * math.prod(tiles)
        self.arguments = (problem.input_size, problem.output_size, problem.origin, tiles, classes)
        # By so much both where the first row reads at its centre tap and where the last one does.
        self.beyond = tuple(2 * abs(origin) for origin in problem.origin)


class Source(NamedTuple):
    """A tensor [N, C', D, H, W] fit to be gathered from: adjacent channels, every row aligned.

    Attributes:
        align: elements of the widest load, at most 16 bytes.
        branch_stride: in units of ``align``, where each branch has its own tensor; ``tensor`` is that of the first.
    """

    tensor: Tensor
    align: int
    branch_stride: int = 0

    @property
    def stride(self) -> tuple[int, ...]:
        """In units of ``align`` elements, except that of the channels."""
        return strides_of(self.tensor, self.align)

    @property
    def likeness(self) -> tuple:
        return self.align, self.branch_stride, *likeness(self.tensor)


def gather_source(tensor: Tensor) -> Source:
    """``tensor`` itself if its channels are adjacent and its rows aligned, else a packed copy.

    A copy costs a pass over the tensor and its memory; narrower loads would cost several instructions in each of the
    K T reads of a row. Packed channels are padded with zeros.
    """
    C = tensor.shape[1]
    widest = min(16 // tensor.itemsize, 1 << (C - 1).bit_length())
    if _alignment(tensor) < widest:
        tensor = pack(tensor, ceil_div(C, widest) * widest)
    return Source(tensor, widest)


def alignment(*tensors: Tensor | None) -> int:
    """Elements, at most 16 bytes of them, that may be loaded at once at the start of any row of every tensor."""
    return min(_alignment(tensor) for tensor in tensors if tensor is not None)


def _alignment(tensor: Tensor) -> int:
    return 1 if tensor.data_ptr() % 16 else _row_alignment(tensor.shape, tensor.stride(), 16 // tensor.itemsize)


@lru_cache(maxsize=1024)
def _row_alignment(shape: tuple[int, ...], stride: tuple[int, ...], most: int) -> int:
    if shape[1] > 1 and stride[1] != 1:
        return 1
    return math.gcd(most, *(stride[axis] for axis in (0, 2, 3, 4) if shape[axis] > 1))


def pack(tensor: Tensor, channels: int) -> Tensor:
    """A copy [N, channels, D, H, W] with adjacent channels, zero past those of ``tensor``."""
    N, C, D, H, W = tensor.shape
    stride = (D * H * W * channels, 1, H * W * channels, W * channels, channels)
    packed = tensor.new_empty_strided((N, channels, D, H, W), stride)
    if _collapsed_stride(tensor.shape, tensor.stride()) is None:
        packed[:, C:] = 0
        packed[:, :C] = tensor
        return packed
    key = ("pack", channels, likeness(tensor))
    plan = _plans.get(key)
    if plan is None:
        plan = _keep(key, _plan_pack(tensor, channels))
    submit(Launch(plan, (tensor, packed)))
    return packed


def _plan_pack(tensor: Tensor, channels: int) -> Plan:
    N, C, *size = tensor.shape
    points, rows, block = math.prod(size), 128, min(32, 1 << (channels - 1).bit_length())
    return Plan(
        packing.pack_kernel,
        (N * ceil_div(points, rows), ceil_div(channels, block)),
        (tensor.stride(0), tensor.stride(1), _collapsed_stride(tensor.shape, tensor.stride()), points),
        {"C": C, "C_PADDED": channels, "BLOCK_P": rows, "BLOCK_C": block},
    )


@lru_cache(maxsize=1024)
def _collapsed_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> int | None:
    """The stride of D, H and W seen as one axis, or None if they are not one."""
    axes = [(size, stride) for size, stride in zip(shape[2:], stride[2:]) if size > 1]
    for (_, outer), (size, inner) in pairwise(axes):
        if outer != size * inner:
            return None
    return axes[-1][1] if axes else 1


class Weight:
    """A call's weight: repacked once for all kernels that read it alike."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._repacked: dict[Plan, Tensor] = {}

    @property
    def likeness(self) -> tuple:
        return likeness(self.tensor)

    def repacked(self, plan: Plan) -> Tensor:
        """As the kernel of ``plan`` reads it."""
        packed = self._repacked.get(plan.repacking)
        if packed is None:
            of = plan.repacking.constants
            packed = self.tensor.new_empty(of["T"], of["ROWS_PADDED"], of["COLUMNS_PADDED"])
            submit(Launch(plan.repacking, (self.tensor, packed)))
            self._repacked[plan.repacking] = packed
        return packed


def _plan_repack(weight: Tensor, config: Config, order: str) -> Plan:
    """[O, C, *kernel] to [T, C, O] (``order`` "TCO") or [T, O, C] ("TOC"), zero-padded to whole blocks.

    The same plan for all kernels that read the same.
    """
    axes = ((0, config.block_o), (1, config.block_c))
    (row, row_block), (column, column_block) = axes if order == "TOC" else axes[::-1]
    T, rows, columns = math.prod(weight.shape[2:]), weight.shape[row], weight.shape[column]
    padded_rows, padded_columns = ceil_div(rows, row_block) * row_block, ceil_div(columns, column_block) * column_block
    key = ("repack", order, padded_rows, padded_columns, likeness(weight))
    plan = _plans.get(key)
    if plan is not None:
        return plan
    plan = Plan(
        packing.repack_kernel,
        (ceil_div(T * padded_rows * padded_columns, ELEMENTS),),
        (weight.stride(row), weight.stride(column), weight.stride()[2:]),
        {
            "T": T,
            "KERNEL_H": weight.shape[3],
            "KERNEL_W": weight.shape[4],
            "ROWS": rows,
            "COLUMNS": columns,
            "ROWS_PADDED": padded_rows,
            "COLUMNS_PADDED": padded_columns,
            "BLOCK": ELEMENTS,
        },
    )
    return _keep(key, plan)


def _plan_add_parts(splits: int, grad_weight: Tensor) -> Plan:
    """``grad_weight`` [O, C, *kernel] from its parts [splits, T, O, C_SUMS]."""
    O, C, *size = grad_weight.shape
    T, channels = math.prod(size), ceil_div(C, 8) * 8
    return Plan(
        packing.add_parts_kernel,
        (ceil_div(T * O * channels, PARTS_BLOCK),),
        (splits, grad_weight.stride()),
        {
            "T": T,
            "O": O,
            "C": C,
            "C_SUMS": channels,
            "KERNEL_H": size[1],
            "KERNEL_W": size[2],
            "SPLITS": PARTS,
            "BLOCK": PARTS_BLOCK,
        },
    )


def dot_dtype(tensor: Tensor) -> tl.dtype:
    """That of the tensor; but the interpreter's bfloat16 arithmetic is wrong, so it is only loaded and stored."""
    return tl.float32 if interpreted() and tensor.dtype == torch.bfloat16 else DTYPES[tensor.dtype]


def blend_dtype(tensor: Tensor) -> tl.dtype:
    """That of the tensor: two elements an instruction. Only CDNA has no such instruction for bfloat16."""
    return tl.float32 if torch.version.hip and tensor.dtype == torch.bfloat16 else dot_dtype(tensor)


def dot_precision(tensor: Tensor) -> str:
    return "tf32" if allows_tf32(tensor.dtype) else "ieee"


def capability(device: torch.device) -> int:
    """The major compute capability of an NVIDIA device, 8 for all else."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device)[0] if nvidia else 8


def _shift(call: Call) -> Tensor | None:
    """What is added to each branch: [K, O], or a bias, [O]."""
    return call.branch_shift if call.bias is None else call.bias


def strides_of(tensor: Tensor | None, align: int = 1) -> tuple[int, ...]:
    """Strides in units of ``align`` elements, but that of the channels in elements."""
    if tensor is None:
        return (0,) * 5
    strides = [stride if axis == 1 else stride // align for axis, stride in enumerate(tensor.stride())]
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, strides))


def _shift_strides(shift: Tensor | None) -> tuple[int, ...]:
    """Of branches and channels; a bias is the same for all branches."""
    return (0, shift.stride(0)) if shift is not None and shift.dim() == 1 else strides_of(shift)


def ceil_div(size: int, block: int) -> int:
    """As triton.cdiv, which takes ten times as long."""
    return -(-size // block)


def on_device_of(tensor: Tensor):
    """Triton launches on the current device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
