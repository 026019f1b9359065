"""Checks kernels against the reference at their first use, so that none is silently wrong on a GPU nobody tried.

Before a call goes to a backend that asks for it (``Backend.checked``), its function runs once on a small random problem
of the same kind: same channels, branches, dilations, kernel, stride, padding, dtype, order of axes in memory, tensors
given and gradients wanted; two samples of a volume with interior and ragged tiles, shared among few thread blocks. From
memory filled with NaN, results must come within twice the tolerance of tolerance.py, in norm and at the worst element.
The truth is the reference in float32 (hence twice), or in float64 for float64. A kernel that is wrong is refused, on
that device, for the rest of the process.

Few blocks, because a large GPU has one for each tile of so small a volume. Then none would go from one tile to the
next, nor would the CUDA backend cut the call into parts, as both do with most volumes of users.

The kind of a problem is the small problem itself: calls with the same one share its check. Nothing is checked while a
CUDA graph is recorded, when nothing may wait for the GPU: warm up first, as recording demands anyway. The check leaves
random states, streams, autograd, autocast and the precision of float32 products alone: values have so few bits that
TF32 holds them and products of two or three of them, so the truth is the same with and without it. Only cuDNN's search
for the fastest convolution is off, for all threads, while the truth is computed.

Not seen: what only large volumes do (64-bit offsets). Not survived: a kernel that reads or writes where it must not may
end the process's use of the GPU, check or no check. Then no backend can go on, and the error says which kernel it was.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import tolerance
from .backends.interface import Backend, CannotRun, Gradients, compute
from .backends.reference import backend as reference
from .call import Call, allows_tf32
from .geometry import Geometry

logger = logging.getLogger("autofocus_kernels")

# The small problem has BATCH samples, of VOXELS unless the dilations need more, but at most MOST_VOXELS in all, and at
# most MOST_WORK multiply-adds in the reference's forward. Rates 2, 6, 10, 14 keep interior voxels up to 64 channels.
BATCH = 2
VOXELS = 4096
MOST_VOXELS = 2**17
MOST_WORK = 2**35
# By TF32: an eps each for two operands, a blend and a result. Not by the reference's own error, as in 16 bits: whether
# that uses TF32 is for cuDNN to decide.
TF32_TOLERANCE = 4 * tolerance.TF32_EPS

# What each function of backends/interface.py reads and then fills after the call; gradients have their tensor's name.
_READ = {
    "forward": (),
    "backward": ("grad_output",),
    "branch_statistics": (),
    "branch_combine": ("branches", "scale", "shift"),
    "branch_reduce": ("grad_output", "branches", "mean", "scale", "shift"),
    "branch_norm_backward": ("grad_output", "branches", "a_coef", "b_coef", "c_coef"),
}
_FILLED = {
    "forward": ("output",),
    "backward": Gradients._fields,
    "branch_statistics": ("branches", "mean", "var"),
    "branch_combine": ("output",),
    "branch_reduce": ("attention", "scale", "shift"),
    "branch_norm_backward": ("branches", "input", "weight"),
}
_NORM_VECTORS = ("mean", "var", "scale", "shift", "a_coef", "b_coef", "c_coef")
# Of tolerance.terms, for what is not named there: sums of the same kind and at least as long.
_TERMS = {
    "branches": "output",
    "mean": "branch_scale",
    "var": "branch_scale",
    "scale": "branch_scale",
    "shift": "branch_shift",
}


class Layout(NamedTuple):
    """How a tensor lies in memory, whatever its size."""

    order: tuple[int, ...]  # axes, the outermost first
    expanded: tuple[int, ...]  # axes of stride 0

    def allocate(self, shape: tuple[int, ...], values: Callable[[list[int]], Tensor]) -> Tensor:
        """A tensor of ``shape`` and this layout; ``values`` makes one, contiguous, of the shape that it is given."""
        memory = values([1 if axis in self.expanded else shape[axis] for axis in self.order])
        return memory.permute([self.order.index(axis) for axis in range(len(shape))]).expand(shape)


class Variant(NamedTuple):
    """A small problem, without values: all calls that it stands for run the same kernels."""

    backend: str
    function: str
    device: torch.device
    dtype: torch.dtype
    tf32: bool
    geometry: Geometry
    channels: int
    out_channels: int
    call: tuple[Layout | None, ...]  # of the call's six tensors
    arguments: tuple[Layout | None, ...]  # of what is read and filled
    in_place: bool  # grad_branches is memory of the branches

    def __str__(self) -> str:
        wanted = [
            name for name, layout in zip(_FILLED[self.function], self.arguments[len(_READ[self.function]) :]) if layout
        ]
        geometry = self.geometry
        return (
            f"{self.function} ({', '.join(wanted)}) for {self.channels} to {self.out_channels} channels of "
            f"{self.dtype} on {self.device}, kernel {geometry.kernel_size}, dilations {geometry.dilations}, "
            f"stride {geometry.stride}, volume {geometry.input_size}"
        )


class Outcome(NamedTuple):
    verdict: str  # "right", "wrong" or "not checked"
    reason: str

    @property
    def refusal(self) -> str | None:
        return self.reason if self.verdict == "wrong" else None


_outcomes: dict[Variant, Outcome] = {}
# The refusals by call: a call that came before is looked up without making its small problem.
_known: dict[tuple, str | None] = {}
_MOST_KNOWN = 4096
_lock = threading.RLock()
_checking = False


def refusal(name: str, backend: Backend, function: str, call: Call, arguments: tuple) -> str | None:
    """Why ``backend``, of this name, may not run ``function(call, *arguments)``: it was wrong on such a problem.

    None if it was right, or could not be checked. The first call of its kind is checked here.
    """
    if function == "backward":
        arguments = (arguments[0], *arguments[1])
    input, weight, attention, bias, scale, shift, geometry, _ = call
    device, dtype = weight.device, weight.dtype
    tf32 = device.type == "cuda" and allows_tf32(dtype)
    in_place = function == "branch_norm_backward" and arguments[5].data_ptr() == arguments[1].data_ptr()
    # Every call passes here, so the key has no more strides than it needs: what is filled lies in memory like what is
    # read, and the layout of vectors hardly matters.
    key = (
        name,
        function,
        geometry,
        dtype,
        device,
        tf32,
        in_place,
        weight.shape,
        input.stride(),
        weight.stride(),
        attention.stride(),
        arguments[0].stride(),
        bias is None,
        scale is None,
        shift is None,
        *[argument is None for argument in arguments],
    )
    try:
        return _known[key]
    except KeyError:
        pass
    if capturing(device):
        return None
    O, C = weight.shape[:2]
    layouts = [None if tensor is None else _layout(tensor) for tensor in (*call[:6], *arguments)]
    variant = Variant(
        name,
        function,
        device,
        dtype,
        tf32,
        _small(geometry, C, O, backend.tiles_by_volume),
        C,
        O,
        tuple(layouts[:6]),
        tuple(layouts[6:]),
        in_place,
    )
    with _lock:
        outcome = _outcome(variant, backend)
        if outcome is None:
            return None
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = outcome.refusal
        return outcome.refusal


def _outcome(variant: Variant, backend: Backend) -> Outcome | None:
    """Of the check of a variant, which runs here if it has not yet; None if it cannot run now. Under the lock."""
    global _checking
    if _checking:  # by this thread, whose check has come to a call of its own
        return None
    if variant not in _outcomes:
        _checking = True
        try:
            _outcomes[variant] = _check(variant, backend)
        except torch.OutOfMemoryError:
            return None  # no fault of the kernel: the next call may find room
        finally:
            _checking = False
    return _outcomes[variant]


def capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device`` records a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def report() -> list[str]:
    """What was checked in this process: one line a backend and device, and one for each variant that was not right."""
    with _lock:
        outcomes = dict(_outcomes)
    counts: dict[str, list[str]] = {}
    for variant, outcome in outcomes.items():
        counts.setdefault(f"{variant.backend} on {variant.device}", []).append(outcome.verdict)
    lines = [
        f"self-check {where}: " + ", ".join(f"{verdicts.count(v)} {v}" for v in ("right", "wrong", "not checked"))
        for where, verdicts in counts.items()
    ]
    lines += [f"  {outcome.reason}" for outcome in outcomes.values() if outcome.verdict != "right"]
    return lines or ["self-check        nothing yet: kernels are checked at their first use on a GPU"]


def forget() -> None:
    """Checks everything anew."""
    with _lock:
        _outcomes.clear()
        _known.clear()


# ------------------------------------------------------------------ the small problem


def _layout(tensor: Tensor) -> Layout:
    strides, axes = tensor.stride(), range(tensor.dim())
    # The stride of a single sample may be anything, and the small problem has more.
    order = sorted(axes, key=lambda axis: -strides[axis] if axis > 0 or tensor.shape[0] > 1 else -math.inf)
    return Layout(tuple(order), tuple(a for a in axes if strides[a] == 0 and tensor.shape[a] > 1))


def _small(geometry: Geometry, C: int, O: int, tiles_by_volume: bool) -> Geometry:
    """The same problem on a volume no larger than it has to be, and on no axis larger than the call's."""
    dims = geometry.spatial_dims
    room = round(VOXELS ** (1 / dims)) // 2
    axes = list(
        zip(geometry.kernel_size, zip(*geometry.dilations), geometry.stride, geometry.origin, geometry.input_size)
    )
    # As long as all that is read for one voxel, so that some voxels read within the volume only, and some more.
    targets = [
        min(size, max(dilations) * (kernel - 1) + 1 + room * stride) for kernel, dilations, stride, _, size in axes
    ]

    def clipped(longest: int) -> list[int]:
        return [
            min(target, max(longest, 2 * origin + stride)) for target, (_, _, stride, origin, _) in zip(targets, axes)
        ]

    def outputs(sizes: list[int]) -> tuple[int, ...]:
        return tuple(_output_size(size, stride, origin) for size, (_, _, stride, origin, _) in zip(sizes, axes))

    most = min(MOST_VOXELS, MOST_WORK // (geometry.num_branches * geometry.num_taps * C * O)) // BATCH
    longest = max(targets)
    while longest > 1 and math.prod(outputs(clipped(longest))) > most:
        longest = longest * 7 // 8
    sizes = [
        _similar_size(size, target, stride, origin)
        for target, (_, _, stride, origin, size) in zip(clipped(longest), axes)
    ]
    return Geometry(
        geometry.kernel_size,
        geometry.dilations,
        geometry.stride,
        geometry.origin,
        tuple(sizes),
        outputs(sizes),
        (geometry.input_size, geometry.output_size) if tiles_by_volume else None,
        few_blocks=True,
    )


def _output_size(size: int, stride: int, origin: int) -> int:
    return -(-(size - 2 * origin) // stride)


def _similar_size(size: int, target: int, stride: int, origin: int) -> int:
    """The size nearest to ``target`` that is a multiple of 16, input and output, where ``size`` is and only there.

    Rows of 16 bytes are other code.
    """

    def divisible(size: int) -> tuple[bool, bool]:
        return size % 16 == 0, _output_size(size, stride, origin) % 16 == 0

    if size <= target:
        return size
    candidates = range(max(target - 15, 2 * origin + 1, 1), min(target + 16, size) + 1)
    return min(candidates, key=lambda other: (divisible(other) != divisible(size), abs(other - target)))


def _values(variant: Variant) -> tuple[Call, dict[str, Tensor]]:
    """A random call, and what its function reads besides."""
    generator = torch.Generator(variant.device).manual_seed(0)
    fan_in = variant.channels * variant.geometry.num_taps

    def make(name: str, layout: Layout | None) -> Tensor | None:
        if layout is None:
            return None

        def values(shape: list[int]) -> Tensor:
            # Eighths from 0 to 1 for the attention, else quarters from -3 to 3.
            random = torch.rand if name == "attention" else torch.randn
            tensor = random(shape, generator=generator, device=variant.device, dtype=torch.float32)
            steps = 8 if name == "attention" else 4
            tensor = tensor.mul_(steps).round_().div_(steps).clamp_(-3, 3)
            if name == "weight":
                tensor *= 2.0 ** round(-math.log2(fan_in) / 2)
            return tensor.to(_dtype(name, variant.dtype))

        return layout.allocate(_shape(name, variant), values)

    call = Call(*map(make, Call._fields[:6], variant.call), variant.geometry, None)
    return call, {name: make(name, layout) for name, layout in zip(_READ[variant.function], variant.arguments)}


def _shape(name: str, variant: Variant) -> tuple[int, ...]:
    geometry, C, O = variant.geometry, variant.channels, variant.out_channels
    K = geometry.num_branches
    shapes = {
        "input": (BATCH, C, *geometry.input_size),
        "weight": (O, C, *geometry.kernel_size),
        "attention": (BATCH, K, *geometry.output_size),
        "bias": (O,),
        "output": (BATCH, O, *geometry.output_size),
        "grad_output": (BATCH, O, *geometry.output_size),
        "branches": (K, BATCH, O, *geometry.output_size),
    }
    return shapes.get(name, (K, O))


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Of the truth, and of the vectors of branch norm."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return _exact(dtype) if name in _NORM_VECTORS else dtype


# ------------------------------------------------------------------ the check


def _check(variant: Variant, backend: Backend) -> Outcome:
    device = variant.device
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            call, read = _values(variant)
            expected, limits = _truth(variant, call, read)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return _not_checked(variant, f"the reference fails: {error}")
        try:
            results = _run(backend, variant, call, read)
            errors = torch.stack([tolerance.worst_error(results[name], expected[name]) for name in expected]).tolist()
        except CannotRun as error:
            return Outcome("not checked", f"{variant}: {error}")  # as the call itself will find
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if _lost(device):
                raise RuntimeError(
                    f"the self-check of backend {variant.backend!r} has ended this process's use of the GPU, "
                    f"{variant}: {type(error).__name__}: {error}. In a new process the environment variable "
                    "AUTOFOCUS_BACKEND can name another backend; please report this"
                ) from error
            return Outcome("wrong", f"its self-check fails, {variant}: {type(error).__name__}: {error}")
    wrong = tolerance.complaints(dict(zip(expected, errors)), dict(zip(expected, limits)))
    if wrong:
        return Outcome("wrong", f"its self-check fails, {variant}: {'; '.join(wrong)}")
    return Outcome("right", "")


def _lost(device: torch.device) -> bool:
    """Whether an error that no process recovers from has come to ``device``, such as an illegal address."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _not_checked(variant: Variant, why: str) -> Outcome:
    logger.warning("backend %r runs without a self-check, %s: %s", variant.backend, variant, why)
    return Outcome("not checked", f"{variant}: {why}")


def _truth(variant: Variant, call: Call, read: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[float]]:
    """The reference in float32 or float64, and how far each result may be from it."""
    exact = _exact(variant.dtype)
    exact_call = Call(*(t if t is None else t.to(exact) for t in call[:6]), *call[6:])
    with _no_search():
        expected = _run(reference, variant, exact_call, {name: tensor.to(exact) for name, tensor in read.items()})
        if variant.tf32:
            return expected, [TF32_TOLERANCE] * len(expected)
        if variant.dtype == exact:
            terms = tolerance.terms(call)
            return expected, [2 * tolerance.of_sum(terms[_TERMS.get(name, name)], exact) for name in expected]
        same = _run(reference, variant, call, read)
    errors = torch.stack([tolerance.worst_error(same[name], expected[name]) for name in expected]).tolist()
    eps = torch.finfo(variant.dtype).eps
    return expected, [2 * tolerance.of_rounding(error, eps) for error in errors]


def _run(backend: Backend, variant: Variant, call: Call, read: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the function of ``variant`` fills, by name, from memory of NaN; the dtype is that of ``call``."""
    function, dtype = variant.function, call.weight.dtype

    def make(name: str, layout: Layout | None) -> Tensor | None:
        def nan(shape: list[int]) -> Tensor:
            return torch.full(shape, math.nan, dtype=_dtype(name, dtype), device=variant.device)

        return None if layout is None else layout.allocate(_shape(name, variant), nan)

    filled = list(map(make, _FILLED[function], variant.arguments[len(_READ[function]) :]))
    if variant.in_place:
        filled[0].copy_(read["branches"])
        read = {**read, "branches": filled[0]}
    gradients = (Gradients(*filled),) if function == "backward" else filled
    compute(backend, function, call, (*read.values(), *gradients))
    results = {name: tensor for name, tensor in zip(_FILLED[function], filled) if tensor is not None}
    if function == "branch_norm_backward":
        del results["branches"]  # memory to work in: what is left there is no result
    return results


@contextlib.contextmanager
def _no_search() -> Iterator[None]:
    """Without cudnn.benchmark, which would take seconds."""
    before = torch.backends.cudnn.benchmark
    if before:
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        if before:
            torch.backends.cudnn.benchmark = True
