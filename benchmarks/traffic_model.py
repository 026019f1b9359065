"""What should bound the Triton forward on an H200: predicted bytes and times per case and tile. Nothing here is measured.

    python benchmarks/traffic_model.py

Axes: C, O channels, K branches, T taps, P rows of a tile. A tile in the middle of the volume is walked in the kernel's
order (tap by tap, branch by branch) through an LRU cache of 128-byte lines filled by 32-byte sectors, of the size
that L1 leaves one program; what misses is what L2 serves. docs/triton.md says what was concluded from it.
"""

import itertools
import sys
from collections import OrderedDict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autofocus_kernels.backends.triton.configs import choose_tiling
from autofocus_kernels.geometry import resolve

# H200 (vendor's figures, and copy and matrix rates seen on one): bytes, bytes/s, flop/s, instructions/s of a warp.
L1_BYTES = 220 * 1024
L1_RATE = 132 * 128 * 1.7e9
L2_RATE = 5.5e12
MEMORY_RATE = 4.3e12
MMA_RATE = 788e12
ISSUE_RATE = 132 * 4 * 1.7e9
# Instructions of the compiled inner loop per 16 bytes gathered, counted in sm_90 machine code of the bfloat16 forward.
INSTRUCTIONS = 18
ITEMSIZE = 2

CASES = {"1x32x128^3 -> 32": (32, 32, 128), "1x64x96^3 -> 64": (64, 64, 96), "1x40x71^3 -> 40": (40, 40, 71)}
DILATIONS = (2, 6, 10, 14)


def sectors_from_l2(tiling, size, row_bytes, cache_bytes):
    """32-byte sectors that one tile in the middle of the volume misses in a cache of ``cache_bytes``."""
    start = [(n // 2) // (step * tile) * step * tile for n, step, tile in zip(size, tiling.step, tiling.tile)]
    rows = list(
        itertools.product(
            *(range(s, s + step * tile, step) for s, step, tile in zip(start, tiling.step, tiling.tile))
        )
    )
    cache, missed = OrderedDict(), 0
    for tap in itertools.product(*(range(-(k // 2), k // 2 + 1) for k in tiling.kernel)):
        for dilation in tiling.dilations if any(tap) else tiling.dilations[:1]:
            for row in rows:
                d, h, w = (p + r * t for p, r, t in zip(row, dilation, tap))
                if not (0 <= d < size[0] and 0 <= h < size[1] and 0 <= w < size[2]):
                    continue
                first = ((d * size[1] + h) * size[2] + w) * row_bytes
                for sector in range(first // 32, (first + row_bytes - 1) // 32 + 1):
                    line, bit = sector // 4, 1 << sector % 4
                    if line not in cache and len(cache) >= cache_bytes // 128:
                        cache.popitem(last=False)
                    held = cache.get(line, 0)
                    missed += not held & bit
                    cache[line] = held | bit
                    cache.move_to_end(line)
    return missed


def predict(C, O, edge, rows, programs_per_sm):
    """Milliseconds by each bound, and points that L2 serves per voxel."""
    size = (edge,) * 3
    tiling = choose_tiling(resolve(size, (3, 3, 3), DILATIONS), rows)
    voxels, K, T = edge**3, len(DILATIONS), 27
    row_bytes = C * ITEMSIZE
    sectors = sectors_from_l2(tiling, size, row_bytes, L1_BYTES // programs_per_sm)
    l2_bytes = sectors * 32 / rows * voxels
    gathered = K * T * row_bytes
    # Beside the gather, the blend goes through shared memory and back, and each 64 rows read the tile of the weight.
    shared = T * row_bytes * (2 + O / 64)
    bounds = {
        "memory": voxels * (C + O + K) * ITEMSIZE / MEMORY_RATE,
        "MMA": 2 * voxels * T * C * O / MMA_RATE,
        "L1": voxels * (gathered + shared) / L1_RATE,
        "L2": l2_bytes / L2_RATE,
        "issue": voxels * gathered / 16 * INSTRUCTIONS / 32 / ISSUE_RATE,
    }
    return tiling, {name: 1e3 * seconds for name, seconds in bounds.items()}, l2_bytes / voxels / row_bytes


def main():
    print("predicted, not measured: bfloat16 forward, channels-last, dilations", DILATIONS)
    for name, (C, O, edge) in CASES.items():
        unstaged = 1e3 * edge**3 * 4 * 27 * C * ITEMSIZE / L2_RATE
        print(f"{name}: every read from L2 would take {unstaged:.2f} ms")
        for rows, programs in ((128, 2), (256, 1), (512, 1)):
            tiling, bounds, points = predict(C, O, edge, rows, programs)
            bound = max(bounds, key=bounds.get)
            times = "  ".join(f"{key} {value:.2f}" for key, value in bounds.items())
            print(
                f"  tile {tiling.tile} step {tiling.step}, {programs} a SM: {times} ms; "
                f"{points:.0f} points a voxel from L2; bound by {bound}"
            )


if __name__ == "__main__":
    main()
