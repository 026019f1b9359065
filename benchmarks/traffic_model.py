"""What should bound the Triton kernels on an H200, per case and configuration, in 16-bit channels-last tensors.

    python benchmarks/traffic_model.py                     every configuration of every case, as CSV
    python benchmarks/traffic_model.py --memory            scratch memory of every case
    python benchmarks/traffic_model.py --measured FILE     the default's prediction beside what run.py measured

Predictions: nothing here is measured. A tile in the middle of the volume is walked in the kernel's order (block of
channels, tap, branch) through an LRU cache of 128-byte lines filled by 32-byte sectors, of the size that L1 leaves one
program; what misses is what L2 serves. docs/triton.md says what was concluded from it.

Axes: C, O channels, K branches, T taps, P rows of a tile.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import harness  # first: it puts this checkout on the path
from autofocus_kernels.backends.triton.configs import Config, Tiling, choose_tiling, configurations
from autofocus_kernels.testing import Case
from cases import BY_NAME, GPU_CASES, elements

# H200: vendor's figures, and copy and matrix rates seen on one.
SMS = 132
L1_BYTES = 228 * 1024  # shared memory included
REGISTERS = 65536
CLOCK = 1.7e9
L1_RATE = SMS * 128 * CLOCK
L2_RATE = 5.5e12
MEMORY_RATE = 4.3e12
MMA_RATE = 788e12
ISSUE_RATE = SMS * 4 * CLOCK
# Instructions of the compiled inner loop per 16 bytes gathered: counted in sm_90 machine code of the bfloat16 forward;
# without the blend's eight conversions and multiply-adds assumed for the kernels that project each branch.
BLEND_INSTRUCTIONS, PROJECT_INSTRUCTIONS = 18, 10
ITEMSIZE = 2
MAX_SHARE = 1.2  # of the tensors' own memory: the aim for peak memory

KERNELS = {
    "forward": {"plain": ("forward",), "branch": ("forward_scaled",)},
    "backward": {
        "plain": ("grad_input_weight", "grad_attention"),
        "branch": ("grad_input_weight_scaled", "grad_scaled"),
    },
}
COLUMNS = (
    "case", "kernel", "rows", "block_c", "block_o", "warps", "registers", "default", "tile", "step",
    "l2_mb", "memory_mb", "memory_ms", "mma_ms", "l1_ms", "l2_ms", "issue_ms", "bound", "bound_ms",
)


class Prediction(NamedTuple):
    tiling: Tiling
    l2_bytes: float
    memory_bytes: float
    milliseconds: dict[str, float]  # by each bound

    @property
    def bound(self) -> str:
        return max(self.milliseconds, key=self.milliseconds.get)

    @property
    def bound_ms(self) -> float:
        return self.milliseconds[self.bound]


def kernels_of(case: Case, direction: str) -> tuple[str, ...]:
    return KERNELS[direction]["branch" if case.mode == "branch" else "plain"]


def configurations_of(case: Case, kernel: str) -> tuple[Config, ...]:
    return configurations(kernel, ITEMSIZE, "ieee", 9, case.channels, case.out_channels)


class Cache:
    """Least recently used lines of 128 bytes; counts the 32-byte sectors that have to be fetched."""

    def __init__(self, size: int) -> None:
        self.lines, self.capacity, self.missed = OrderedDict(), size // 128, 0

    def read(self, space: str, first: int, size: int) -> None:
        """``size`` bytes at ``first`` of an array."""
        sectors = range(first // 32, (first + size - 1) // 32 + 1)
        for line, group in itertools.groupby(sectors, lambda sector: sector // 4):
            wanted = sum(1 << sector % 4 for sector in group)
            held = self.lines.pop((space, line), 0)
            self.missed += (wanted & ~held).bit_count()
            if len(self.lines) >= self.capacity:
                self.lines.popitem(last=False)
            self.lines[space, line] = held | wanted


def walk(case: Case, kernel: str, config: Config, tiling: Tiling, cache_bytes: int) -> int:
    """Bytes that one tile in the middle of the volume has from L2, but for the sums of dW."""
    problem = case.geometry.as_3d()
    assert problem.stride == (1, 1, 1), "no timed case has a stride"
    transposed, blends = tiling.transposed, kernel in ("forward", "grad_attention")
    size, read_size = (problem.output_size, problem.input_size)[:: -1 if transposed else 1]
    channels, block = _gathered(case, kernel, config)
    other = min(config.block_c if transposed else config.block_o, case.channels if transposed else case.out_channels)
    row_bytes = -(-channels // 8) * 8 * ITEMSIZE
    sign = -1 if transposed else 1
    start = [
        n // 2 // (step * tile) * step * tile for n, step, tile in zip(size, tiling.step, tiling.tile)
    ]
    rows = list(itertools.product(*(
        range(s, s + step * tile, step) for s, step, tile in zip(start, tiling.step, tiling.tile)
    )))
    halves = [range(-(k // 2), k // 2 + 1) for k in tiling.kernel]
    cache = Cache(cache_bytes)
    for first in range(0, channels, block):
        width = min(block, channels - first) * ITEMSIZE
        for number, tap in enumerate(itertools.product(*halves)):
            cache.read("weight", (number * channels + first) * other * ITEMSIZE, block * other * ITEMSIZE)
            branches = tiling.dilations if any(tap) or not blends else tiling.dilations[:1]
            for k, dilation in enumerate(branches):
                for row in rows:
                    d, h, w = (p + sign * (o + r * t) for p, o, r, t in zip(row, problem.origin, dilation, tap))
                    if 0 <= d < read_size[0] and 0 <= h < read_size[1] and 0 <= w < read_size[2]:
                        point = (d * read_size[1] + h) * read_size[2] + w
                        cache.read("rows", point * row_bytes + first * ITEMSIZE, width)
                        if transposed:
                            cache.read("attention", (k * math.prod(read_size) + point) * ITEMSIZE, ITEMSIZE)
    return 32 * cache.missed


def _gathered(case: Case, kernel: str, config: Config) -> tuple[int, int]:
    """Channels of the gathered tensor, and how many are read at a time."""
    if kernel.startswith("grad_input_weight"):
        return case.out_channels, config.block_o
    return case.channels, config.block_c


def reads_inside(case: Case) -> float:
    """(tap, branch) pairs that a position reads inside the volume, on average."""
    geometry = case.geometry
    total = 0.0
    for dilation in geometry.dilations:
        reads = 1.0
        for axis, r in enumerate(dilation):
            half = geometry.kernel_size[axis] // 2
            inside = sum(
                0 <= geometry.origin[axis] + p + r * tap < geometry.input_size[axis]
                for p in range(geometry.output_size[axis])
                for tap in range(-half, half + 1)
            )
            reads *= inside / geometry.output_size[axis]
        total += reads
    return total


def predict(case: Case, kernel: str, config: Config) -> Prediction:
    geometry = case.geometry
    gathers_back = kernel.startswith("grad_input_weight")
    scaled = kernel in ("forward_scaled", "grad_scaled")
    tiling = choose_tiling(geometry.as_3d(), config.rows, gathers_back)
    channels, block = _gathered(case, kernel, config)
    T, K, C, O = geometry.num_taps, geometry.num_branches, case.channels, case.out_channels
    counts = elements(case)
    positions = case.batch * math.prod(geometry.input_size if gathers_back else geometry.output_size)
    # Every block of the other channels gathers anew, except where dots replace the second product's columns.
    repeats = {"grad_attention": 1}.get(kernel, -(-C // config.block_c) if gathers_back else -(-O // config.block_o))

    programs = max(1, REGISTERS // (32 * config.num_warps * config.registers))
    shared = ITEMSIZE * (config.rows * block + config.block_c * config.block_o) * (2 if gathers_back else 1)
    inside = reads_inside(case)  # K T where nothing is outside
    if gathers_back:
        inside *= math.prod(geometry.output_size) / math.prod(geometry.input_size)
    tile_bytes = walk(case, kernel, config, tiling, L1_BYTES // programs - shared)
    l2 = tile_bytes / config.rows * positions * repeats
    if gathers_back:
        l2 += 2 * 4 * T * O * -(-C // 8) * 8 / config.rows * positions
    gathered = inside * positions * channels * ITEMSIZE * repeats
    # What is blended, or each branch, goes through shared memory and back; each 64 rows read the tile of the weight.
    through = (inside if scaled else inside / K) * positions * channels * ITEMSIZE * repeats
    products = {"grad_input_weight": 2, "grad_input_weight_scaled": 2, "forward_scaled": K, "grad_scaled": K}
    memory = ITEMSIZE * {
        "forward": counts["input"] + counts["attention"] + counts["output"],
        "grad_input_weight": counts["output"] + counts["attention"] + 2 * counts["input"],
        "grad_attention": counts["output"] + counts["attention"] + counts["input"],
        "grad_scaled": counts["output"] + 2 * counts["attention"] + counts["input"],
    }[{"forward_scaled": "forward", "grad_input_weight_scaled": "grad_input_weight"}.get(kernel, kernel)]
    instructions = PROJECT_INSTRUCTIONS if scaled else BLEND_INSTRUCTIONS
    seconds = {
        "memory": memory / MEMORY_RATE,
        "MMA": 2 * products.get(kernel, 1) * inside / K * positions * C * O / MMA_RATE,
        "L1": (gathered + through * (2 + (O if channels == C else C) / 64)) / L1_RATE,
        "L2": l2 / L2_RATE,
        "issue": gathered / 16 * instructions / 32 / ISSUE_RATE,
    }
    return Prediction(tiling, l2, memory, {name: 1e3 * value for name, value in seconds.items()})


def rows_of(case: Case) -> list[dict]:
    """The CSV's rows of one case: every kernel with every configuration."""
    rows = []
    for kernel in (*kernels_of(case, "forward"), *kernels_of(case, "backward")):
        for number, config in enumerate(configurations_of(case, kernel)):
            prediction = predict(case, kernel, config)
            times = {f"{name.lower()}_ms": f"{value:.3g}" for name, value in prediction.milliseconds.items()}
            rows.append(dict(zip(COLUMNS[:7], (case.name, kernel, *config))) | times | {
                "default": int(number == 0),
                "tile": "x".join(map(str, prediction.tiling.tile)),
                "step": "x".join(map(str, prediction.tiling.step)),
                "l2_mb": f"{prediction.l2_bytes / 1e6:.4g}",
                "memory_mb": f"{prediction.memory_bytes / 1e6:.4g}",
                "bound": prediction.bound,
                "bound_ms": f"{prediction.bound_ms:.3g}",
            })
    return rows


# ------------------------------------------------------------------ memory


class Memory(NamedTuple):
    """Bytes: tensors of a pass with their gradients, and what the kernels take beside them at the worst moment."""

    tensors: int
    sums: int  # the parts of dW
    packed: int

    @property
    def share(self) -> float:
        return (self.tensors + self.sums + self.packed) / self.tensors


def scratch(case: Case, layout: str, training: bool, sms: int = SMS) -> Memory:
    counts = elements(case)
    tensors = sum(counts.values()) * (2 if training else 1) * ITEMSIZE

    def packed(tensor: str, channels: int) -> int:
        """A copy unless channels are adjacent and rows whole units of 16 bytes."""
        adjacent = layout == "channels_last" and channels % 8 == 0
        return 0 if adjacent else counts[tensor] // channels * -(-channels // 8) * 8 * ITEMSIZE

    packed_input = packed("input", case.channels)
    if not training:
        return Memory(tensors, 0, packed_input)
    config = configurations_of(case, kernels_of(case, "backward")[0])[0]
    problem = case.geometry.as_3d()
    tiling = choose_tiling(problem, config.rows, transposed=True)
    tiles = case.batch * math.prod(
        min(step, size) * -(-(-(-size // step)) // tile)
        for size, step, tile in zip(problem.input_size, tiling.step, tiling.tile)
    )
    splits = min(tiles, -(-sms // -(-case.channels // config.block_c)))
    sums = 4 * splits * problem.num_taps * case.out_channels * -(-case.channels // 8) * 8
    packed_grad = packed("output", case.out_channels)
    # First dx and dW with their sums, then the attention's gradient with a packed input.
    return Memory(tensors, sums, packed_grad) if sums + packed_grad > packed_input else Memory(tensors, 0, packed_input)


def print_memory() -> None:
    print("16-bit training, 132 SMs, computed: peak over tensors and gradients, MB of dW's parts, MB of packed copies")
    for case in GPU_CASES:
        line = f"{case.name:<18}"
        for layout in ("channels_last", "contiguous"):
            memory = scratch(case, layout, training=True)
            flag = " " if memory.share <= MAX_SHARE else "!"
            line += f"  {layout} {memory.share:.2f}{flag} {memory.sums / 1e6:6.1f} {memory.packed / 1e6:6.1f}"
        print(line)


# ------------------------------------------------------------------ beside what was measured


def compare(path: Path) -> list[tuple[str, str, str, float, float]]:
    """(case, dtype, pass, predicted ms, measured ms) of the Triton rows, 16-bit and channels-last, of a run's CSV."""
    found = []
    for row in harness.read(path):
        ours = (row["contender"], row["layout"], row["status"]) == ("triton", "channels_last", "ok")
        if ours and row["dtype"] in ("bfloat16", "float16") and row["case"] in BY_NAME:
            case = BY_NAME[row["case"]]
            directions = ("forward", "backward") if row["pass"] == "training" else ("forward",)
            predicted = sum(
                predict(case, kernel, configurations_of(case, kernel)[0]).bound_ms
                for direction in directions
                for kernel in kernels_of(case, direction)
            )
            found.append((case.name, row["dtype"], row["pass"], predicted, row["min_ms"]))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="a CSV written by run.py or gpu_check.py")
    options = parser.parse_args(arguments)
    if options.memory:
        print_memory()
    elif options.measured:
        print(f"{'case':<18}{'dtype':<10}{'pass':<11}{'predicted ms':>13}{'measured ms':>13} {'ratio':>9}")
        for case, dtype, pass_name, predicted, measured in compare(options.measured):
            ratio = measured / predicted
            print(f"{case:<18}{dtype:<10}{pass_name:<11}{predicted:>13.4f}{measured:>13.4f} {ratio:>9.4g}")
    else:
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for case in GPU_CASES:
            writer.writerows(rows_of(case))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
