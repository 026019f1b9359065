"""The problems that are timed. Sizes are those of the input; dilations are the paper's where none are named."""

from __future__ import annotations

import math

from autofocus_kernels.testing import Case

DILATIONS = (2, 6, 10, 14)


def _case(name: str, size, channels: int, out_channels: int, dilations=DILATIONS, **options) -> Case:
    return Case(name, size, channels=channels, out_channels=out_channels, dilations=dilations, **options)


# AFN-6 of the paper on 75^3 segments: its stem leaves 71^3, and every layer is unpadded for dilation 2. The paper
# normalises each branch, which in evaluation is branch mode: the same layers are timed in both modes.
AFN6 = tuple(
    _case(f"afn6-{layer}{suffix}", (edge,) * 3, channels, out_channels, padding="valid", mode=mode)
    for suffix, mode in (("", "plain"), ("-branch", "branch"))
    for layer, (channels, out_channels, edge) in enumerate(
        ((30, 40, 71), (40, 40, 67), (40, 40, 63), (40, 40, 59), (40, 50, 55), (50, 50, 51)), start=1
    )
)
PLAIN_AFN6, BRANCH_AFN6 = AFN6[:6], AFN6[6:]

OTHERS = (
    _case("32x64^3", (64, 64, 64), 32, 32),
    _case("64x48^3", (48, 48, 48), 64, 64),
    _case("2d-4x64x128^2", (128, 128), 64, 64, batch=4),
    _case("odd-7x33x21x18", (33, 21, 18), 7, 13),
)
LARGE = (
    _case("32x128^3", (128, 128, 128), 32, 32),
    _case("64x96^3", (96, 96, 96), 64, 64),
)
# As converted networks have them, with rates that begin at 1, and what the others leave out: other numbers of branches,
# other kernels, a stride, the rates of ASPP, one dimension. Where the naive layer comes nearest is among them.
CONVERTED = (1, 3, 5, 7)
SHAPES = (
    _case("first-1x96^3", (96, 96, 96), 1, 32, CONVERTED),
    _case("16x64^3", (64, 64, 64), 16, 16, CONVERTED),
    _case("decoder-64x48^3", (48, 48, 48), 64, 32, CONVERTED),
    _case("head-32x64^3", (64, 64, 64), 32, 2, CONVERTED),
    _case("128x16^3", (16, 16, 16), 128, 128, CONVERTED, batch=2),
    _case("320x6^3", (6, 6, 6), 320, 320, (1, 2, 3, 4), batch=2),
    _case("two-32x48^3", (48, 48, 48), 32, 32, (1, 4)),
    _case("eight-32x48^3", (48, 48, 48), 32, 32, (1, 2, 3, 4, 5, 6, 7, 8)),
    _case("kernel5-16x48^3", (48, 48, 48), 16, 16, (1, 2), kernel_size=5),
    _case("stride2-32x48^3", (48, 48, 48), 32, 64, CONVERTED, stride=2, padding=1),
    _case("2d-4x32x256^2", (256, 256), 32, 32, CONVERTED, batch=4),
    _case("2d-aspp-512x33^2", (33, 33), 512, 256, (6, 12, 18, 24), batch=2),
    _case("1d-8x64x4096", (4096,), 64, 64, CONVERTED, batch=8),
)
# So small that what the host does for a call, its checks and its way to the kernel, is all of the time.
HOST = (
    _case("host-1x2^3", (2, 2, 2), 1, 1),
    _case("host-4x6^3", (6, 6, 6), 4, 4),
)

CPU_CASES = PLAIN_AFN6 + OTHERS + BRANCH_AFN6 + HOST
GPU_CASES = PLAIN_AFN6 + OTHERS + LARGE + BRANCH_AFN6
# Seconds instead of minutes: to try a change of the harness itself, and for its tests.
TINY = (
    _case("tiny-8x12^3", (12, 12, 12), 8, 8),
    _case("tiny-2d-3x20x17", (20, 17), 3, 5),
    _case("tiny-4x9^3-branch", (9, 9, 9), 4, 6, mode="branch", padding="valid"),
)
BY_NAME = {case.name: case for case in GPU_CASES + SHAPES + HOST + TINY}


def shape(case: Case) -> str:
    """How a table writes the problem: batch x channels x size -> output channels, and what else is not as usual."""
    sizes = "x".join(str(n) for n in (case.batch, case.channels, *case.size))
    words = [f"{sizes} -> {case.out_channels}"]
    if case.kernel_size != 3:
        words.append(f"kernel {case.kernel_size}")
    if case.stride != 1:
        words.append(f"stride {case.stride}")
    if case.padding != "same":
        words.append("valid" if case.padding == "valid" else f"padding {case.padding}")
    if case.dilations != DILATIONS:
        words.append("dilations " + " ".join(map(str, case.dilations)))
    return ", ".join(words)


# ------------------------------------------------------------------ what a case must cost (docs/math.md)

# GEMM units, each one multiply-add per projected tap and pair of channels: the forward is one; the backward has
# W^T v for the input, v x^T for the weight and W^T G for the attention. The naive layer has K of each but the last,
# and none for the attention, since it keeps its branches.
FUSED_UNITS = {"inference": 1, "forward": 1, "training": 4}


def multiply_adds(case: Case, pass_name: str) -> int:
    """Of the fused op's matrix products, without the taps that no branch reads inside the input.

    Each axis is counted for its smallest dilation: where another branch reads inside the input, that one does too.
    """
    geometry = case.geometry
    reads = 1  # (voxel, tap) pairs to project
    for axis in range(geometry.spatial_dims):
        dilation = min(branch[axis] for branch in geometry.dilations)
        half = (geometry.kernel_size[axis] - 1) // 2
        reads *= sum(
            0 <= geometry.origin[axis] + geometry.stride[axis] * p + dilation * tap < geometry.input_size[axis]
            for p in range(geometry.output_size[axis])
            for tap in range(-half, half + 1)
        )
    return case.batch * case.channels * case.out_channels * reads * FUSED_UNITS[pass_name]


def elements(case: Case) -> dict[str, int]:
    """Number of elements of each tensor, "output" included."""
    geometry = case.geometry
    voxels = case.batch * math.prod(geometry.output_size)
    counts = {
        "input": case.batch * case.channels * math.prod(case.size),
        "weight": case.out_channels * case.channels * geometry.num_taps,
        "attention": case.num_branches * voxels,
        "output": case.out_channels * voxels,
    }
    if case.mode == "plain" and case.bias:
        counts["bias"] = case.out_channels
    if case.mode in ("branch", "scale"):
        counts["branch_scale"] = case.num_branches * case.out_channels
    if case.mode in ("branch", "shift"):
        counts["branch_shift"] = case.num_branches * case.out_channels
    return counts


def compulsory_bytes(case: Case, pass_name: str, element_size: int) -> int:
    """Memory traffic no implementation avoids: every tensor of a pass read or written once.

    The backward reads the arguments and the output's gradient again and writes a gradient for every argument.
    """
    counts = elements(case)
    forward = sum(counts.values())
    arguments = forward - counts["output"]
    backward = 2 * arguments + counts["output"] if pass_name == "training" else 0
    return element_size * (forward + backward)
