"""Cases, float64 truth and tolerances: what the tests and the benchmarks both judge a backend by.

A backend is right on a case if, with every uninitialised byte poisoned with NaN, its output and each gradient lie
within :func:`tolerances` of the reference evaluated in float64 on the same rounded inputs, as a whole and with each
element (:func:`~autofocus_kernels.tolerance.worst_error`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference, tolerance
from .call import Call
from .functional import autofocus_conv
from .geometry import Geometry, per_axis, resolve
from .tolerance import relative_error as relative_error  # for the tests
from .tolerance import worst_error

MODES = ("plain", "branch", "scale", "shift")
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")


@dataclass(frozen=True)
class Case:
    """One problem, without dtype, device and values.

    Attributes:
        size: spatial size of the input; its length is the number of spatial axes.
        mode: "plain", or branch mode with scale and shift ("branch") or with only one of them ("scale", "shift").
        bias: whether plain mode has a bias.
        layout: "transposed" reverses the order of all axes of every tensor in memory, "sliced" makes every tensor a
            window on a larger one of NaN, "channels_last" is for volumes and weight, "expanded" repeats one sample of
            each volume with stride 0 over the batch.
        gate: "softmax" (positive, sums to one over branches), "normal" (any sign) or "one_hot" (one branch a voxel).
    """

    name: str
    size: tuple[int, ...]
    channels: int = 4
    out_channels: int = 5
    batch: int = 1
    kernel_size: int | tuple[int, ...] = 3
    dilations: tuple[int | tuple[int, ...], ...] = (1, 2, 3)
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = "same"
    mode: str = "plain"
    bias: bool = True
    layout: str = "contiguous"
    gate: str = "softmax"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {self.layout!r}")

    def __str__(self) -> str:
        return self.name

    @property
    def spatial_dims(self) -> int:
        return len(self.size)

    @property
    def num_branches(self) -> int:
        return len(self.dilations)

    @property
    def kernel(self) -> tuple[int, ...]:
        return per_axis("kernel_size", self.kernel_size, self.spatial_dims, minimum=1)

    @property
    def geometry(self) -> Geometry:
        return resolve(self.size, self.kernel, self.dilations, self.stride, self.padding)

    @property
    def options(self) -> dict:
        """The keyword arguments of ``autofocus_conv`` that are no tensors."""
        return {"dilations": self.dilations, "stride": self.stride, "padding": self.padding}

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format that the output must have."""
        if self.layout == "channels_last" and self.spatial_dims > 1:
            return (torch.channels_last, torch.channels_last_3d)[self.spatial_dims - 2]
        return torch.contiguous_format


# Small, and odd on purpose: unequal axes, odd sizes, channels that are no multiple of anything. One feature each,
# so that the name of a failing case says what broke.
CASES = (
    Case("3d", (7, 9, 11), dilations=(2, 4, 6), batch=2),
    Case("2d", (13, 17), dilations=(1, 3, 5, 7), batch=2),
    Case("1d", (37,), dilations=(2, 5), batch=2),
    Case("no_bias", (6, 7, 5), bias=False),
    Case("normal_gate", (6, 7, 9), gate="normal"),
    Case("one_hot_gate", (6, 7, 9), gate="one_hot"),
    Case("branch", (6, 7, 9), mode="branch"),
    Case("scale_only", (6, 7, 9), mode="scale"),
    Case("shift_only", (6, 7, 9), mode="shift"),
    Case("branch_2d", (12, 11), mode="branch", gate="normal", batch=2),
    Case("branch_1d", (29,), mode="branch", dilations=(2, 6)),
    Case("valid", (11, 12, 13), padding="valid", dilations=(2, 3, 7)),
    Case("padding_per_axis", (9, 8, 10), padding=(0, 1, 4)),
    Case("wide_padding", (4, 5, 6), padding=(7, 9, 8), dilations=(1, 2)),
    Case("wide_padding_branch", (5, 6), padding=9, dilations=(1, 2), mode="branch"),
    Case("window", (17, 9, 12), padding=(-5, 1, -2), dilations=(1, 3, 6), batch=2),
    Case("window_branch", (19, 14), padding=(-4, -3), dilations=(2, 5), stride=(3, 1), mode="branch"),
    Case("stride", (9, 12, 11), stride=(2, 1, 3), padding=1),
    Case("stride_2d", (15, 14), stride=(3, 2), padding=(2, 0), dilations=(2, 4)),
    # Inputs that no output reads have a gradient too: zeros, on the last rows, and here on both sides.
    Case("stride_unread", (8, 14, 12), stride=2, padding=0, dilations=(2,)),
    Case("window_unread", (37, 12), padding=(-12, -4), dilations=(1, 3)),
    Case("stride_branch", (9, 10, 8), stride=2, padding=1, mode="branch"),
    Case("dilation_per_axis", (8, 9, 10), dilations=((1, 2, 3), (3, 1, 2), (2, 4, 1))),
    Case("dilation_beyond_volume", (4, 5, 3), dilations=(2, 8, 16)),
    Case("all_outside_but_centre", (3, 4, 2), dilations=(9, 12)),
    Case("kernel_per_axis", (7, 8, 12), kernel_size=(1, 3, 5)),
    Case("kernel_1", (5, 6, 7), kernel_size=1),
    Case("kernel_7", (19, 16), kernel_size=7, dilations=(1, 2)),
    Case("one_branch", (6, 7, 8), dilations=(2,)),
    Case("seven_branches", (6, 7, 8), dilations=(1, 2, 3, 4, 5, 6, 7)),
    Case("equal_dilations", (6, 7, 8), dilations=(2, 2)),
    Case("one_voxel", (1, 1, 1), batch=3),
    Case("flat_axes", (1, 12, 1), dilations=(1, 4)),
    Case("one_channel", (6, 7, 8), channels=1, out_channels=1),
    Case("channels_3_to_7", (6, 7, 8), channels=3, out_channels=7),
    Case("channels_30_to_50", (7, 6, 5), channels=30, out_channels=50),
    Case("channels_130_to_65", (5, 4, 6), channels=130, out_channels=65, dilations=(1, 2)),
    Case("channels_16_to_140", (4, 5, 6), channels=16, out_channels=140, dilations=(1, 3), mode="branch"),
    Case("channels_32_to_32", (9, 10, 11), channels=32, out_channels=32, dilations=(2, 6)),
    Case("many_rows", (5, 20, 70), channels=9, out_channels=10, dilations=(2, 4, 12)),
    # Dilations with a common factor on axes long enough to be cut into sub-lattices, of unequal sizes.
    Case("lattices", (3, 27, 50), dilations=(3, 6, 12), layout="channels_last"),
    Case("lattices_branch", (33, 40), channels=9, out_channels=10, dilations=(2, 6), mode="branch", padding=3),
    Case("lattices_stride", (36, 35), dilations=(2, 4), stride=2, padding=1),
    # One lattice, large enough to be cut into slabs.
    Case("slabs", (13, 7, 8), out_channels=20, dilations=(1, 2) * 4),
    Case("slabs_branch", (3, 25, 8), out_channels=20, dilations=(1, 2) * 4, mode="branch"),
    Case("slabs_unread", (64, 24), out_channels=20, dilations=(1, 2) * 4, stride=(2, 1), padding=0),
    Case("slabs_stride", (47, 23), out_channels=20, dilations=(1, 2, 3) * 4, stride=(2, 1), padding=1, mode="scale"),
    Case("channels_last", (7, 9, 11), layout="channels_last", batch=2),
    Case("channels_last_2d", (13, 9), layout="channels_last", channels=7, batch=2),
    Case("channels_last_branch", (7, 8, 5), layout="channels_last", mode="branch", channels=8, out_channels=9),
    Case("channels_last_stride", (9, 8, 7), layout="channels_last", stride=2, padding=1),
    Case("transposed", (7, 6, 5), layout="transposed", batch=2),
    Case("transposed_branch", (9, 8), layout="transposed", mode="branch", batch=2),
    Case("sliced", (7, 6, 9), layout="sliced", batch=2),
    Case("sliced_branch", (7, 10), layout="sliced", mode="branch", batch=2),
    Case("expanded", (7, 6, 5), layout="expanded", batch=3),
)


class Tensors(NamedTuple):
    """The tensor arguments of a call, in the order of the operator, and the gradient that enters its backward."""

    input: Tensor  # [N, C, *S]
    weight: Tensor  # [O, C, *kernel_size]
    attention: Tensor  # [N, K, *S_out]
    bias: Tensor | None  # [O]
    branch_scale: Tensor | None  # [K, O]
    branch_shift: Tensor | None  # [K, O]
    grad_output: Tensor  # [N, O, *S_out]

    def arguments(self) -> dict[str, Tensor]:
        """Name -> tensor of the arguments that are there."""
        return {name: tensor for name, tensor in zip(self._fields[:6], self[:6]) if tensor is not None}


def make_tensors(
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    requires_grad: bool = False,
) -> Tensors:
    """Values for ``case``: the same for every dtype up to rounding, the weight scaled to give outputs near one."""
    generator = torch.Generator().manual_seed(seed)
    geometry = case.geometry
    vectors = (case.num_branches, case.out_channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def lay_out(tensor: Tensor) -> Tensor:
        return _lay_out(tensor.to(device=device, dtype=dtype), case)

    def volume(values: Callable[..., Tensor], channels: int, size: tuple[int, ...]) -> Tensor:
        if case.layout == "expanded":
            sample = values(1, channels, *size).to(device=device, dtype=dtype)
            return sample.expand(case.batch, *sample.shape[1:])
        return lay_out(values(case.batch, channels, *size))

    def gate(*shape: int) -> Tensor:
        scores = normal(*shape)
        if case.gate == "normal":
            return scores
        if case.gate == "softmax":
            return scores.softmax(1)
        return torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)

    def parameter(*shape: int, scale: float = 1.0) -> Tensor:
        return lay_out(scale * normal(*shape))

    fan_in = case.channels * geometry.num_taps
    tensors = Tensors(
        input=volume(normal, case.channels, case.size),
        weight=parameter(case.out_channels, case.channels, *case.kernel, scale=fan_in**-0.5),
        attention=volume(gate, case.num_branches, geometry.output_size),
        bias=parameter(case.out_channels) if case.mode == "plain" and case.bias else None,
        branch_scale=parameter(*vectors) if case.mode in ("branch", "scale") else None,
        branch_shift=parameter(*vectors) if case.mode in ("branch", "shift") else None,
        grad_output=volume(normal, case.out_channels, geometry.output_size),
    )
    if requires_grad:
        for tensor in tensors.arguments().values():
            tensor.requires_grad_()
    return tensors


def _lay_out(tensor: Tensor, case: Case) -> Tensor:
    if case.layout == "channels_last" and tensor.dim() == case.spatial_dims + 2:
        return tensor.contiguous(memory_format=case.memory_format)
    if case.layout == "transposed":
        axes = tuple(reversed(range(tensor.dim())))
        return tensor.permute(axes).contiguous().permute(axes)
    if case.layout == "sliced":
        # Any read past the window meets a NaN.
        around = tensor.new_full([2 * size + 3 for size in tensor.shape], math.nan)
        window = around[tuple(slice(1, 2 * size + 1, 2) for size in tensor.shape)]
        return window.copy_(tensor)
    return tensor


# ------------------------------------------------------------------ running and comparing


def call_of(case: Case, tensors: Tensors) -> Call:
    """What a backend is handed for these arguments."""
    return Call(*tensors[:6], case.geometry, None)


def evaluate(function: Callable[..., Tensor], case: Case, tensors: Tensors) -> dict[str, Tensor]:
    """The key "output" and, under each argument's name, its gradient, of ``function``, called as the reference is."""
    arguments = {name: tensor.detach().requires_grad_() for name, tensor in tensors.arguments().items()}
    output = function(**arguments, **case.options)
    gradients = torch.autograd.grad(output, list(arguments.values()), tensors.grad_output)
    return {"output": output.detach(), **dict(zip(arguments, gradients))}


def truth(case: Case, tensors: Tensors) -> dict[str, Tensor]:
    """The reference in float64 on the same values (already rounded to the dtype under test)."""
    exact = Tensors(*(None if tensor is None else tensor.detach().double() for tensor in tensors))
    return evaluate(reference.autofocus_conv, case, exact)


def tolerances(case: Case, tensors: Tensors, expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest allowed relative error of each quantity in ``expected``, for the dtype of ``tensors`` (tolerance.py)."""
    dtype = tensors.input.dtype
    if dtype in tolerance.LOW_PRECISION:
        same_dtype = evaluate(reference.autofocus_conv, case, tensors)
        eps = torch.finfo(dtype).eps
        return {
            name: tolerance.of_rounding(worst_error(same_dtype[name], exact).item(), eps)
            for name, exact in expected.items()
        }
    terms = tolerance.terms(call_of(case, tensors))
    return {name: tolerance.of_sum(terms[name], dtype) for name in expected}


def check(
    backend: str | None,
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, float]:
    """Runs ``case`` forward and backward on ``backend`` with poisoned allocations and judges it against truth.

    Returns:
        Relative error of "output" and of each gradient.

    Raises:
        AssertionError: a result of the wrong shape, dtype, layout or value; the message holds every error.
        RuntimeError: the backend refuses the call.
    """
    tensors = make_tensors(case, dtype, device, seed)

    def function(**arguments) -> Tensor:
        return autofocus_conv(**arguments, backend=backend)

    with poisoned_memory():
        results = evaluate(function, case, tensors)
    return judge(results, case, tensors, label=f"{backend} on {case.name}, {dtype}")


def judge(results: dict[str, Tensor], case: Case, tensors: Tensors, label: str = "") -> dict[str, float]:
    """Relative errors of ``results`` (of :func:`evaluate`) against truth.

    Raises:
        AssertionError: a result of the wrong shape, dtype, layout or value; the message holds every error.
    """
    expected = truth(case, tensors)
    limits = tolerances(case, tensors, expected)
    problems = []
    for name, result in results.items():
        if result.shape != expected[name].shape:
            raise AssertionError(
                f"{label}: {name} has shape {tuple(result.shape)}, expected {tuple(expected[name].shape)}"
            )
        if result.dtype != tensors.input.dtype:
            problems.append(f"{name} has dtype {result.dtype}, expected {tensors.input.dtype}")
    # One channel or voxel is in every memory format.
    formats = [case.memory_format] + [torch.contiguous_format] * tensors.input.is_contiguous()
    if not any(results["output"].is_contiguous(memory_format=layout) for layout in formats):
        problems.append(f"output has strides {results['output'].stride()}, expected {case.memory_format} like input")
    errors = {name: worst_error(result, expected[name]).item() for name, result in results.items()}
    # "not <=" so that a NaN is a failure.
    problems += [
        f"{name}: relative error {error:.2e}, allowed {limits[name]:.2e}"
        for name, error in errors.items()
        if not error <= limits[name]
    ]
    if problems:
        raise AssertionError(f"{label}: " + "; ".join(problems))
    return errors


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, every ``torch.empty`` (in Python and in C++) is filled with NaN, or the largest integer."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def saved_bytes(function: Callable[[], object]) -> int:
    """Bytes of the distinct storages that autograd keeps for backward while ``function`` runs."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # alive until counted: a freed address could be used twice
    del result
    return sum(storages.values())
