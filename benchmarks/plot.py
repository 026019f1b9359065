"""Draws a CSV of run.py: python -m benchmarks.plot build/benchmark-cpu.csv picture.png"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .arguments import refuse
from .contenders import COMPILED, NAIVE
from .measurement import best_naive
from .rows import read
from .tables import groups

COLOURS = {NAIVE: "#9a9a9a", COMPILED: "#d9b44a", "cpu": "#2a6fbb", "triton": "#2a6fbb", "cuda": "#7a3e9d"}
TITLES = {
    "inference": "Forward, no gradients",
    "forward": "Forward, recorded for backward",
    "training": "Forward and backward, every gradient",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="CSV")
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="its suffix is the format: .png, .pdf, ...")
    options = parser.parse_args(arguments)
    source, picture = options.source, options.picture
    try:
        rows = read(source)
    except (OSError, ValueError) as error:
        refuse(error)
    if not rows:
        refuse(f"{source}: must have a measurement, and has none")
    figure = draw(rows)
    try:
        figure.savefig(picture, dpi=130)
    except (OSError, ValueError) as error:  # its folder, or a suffix that is no format
        refuse(f"{picture}: {error}")
    print(picture)
    return 0


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def draw(rows: list[dict]) -> plt.Figure:
    """A row of panels per dtype: speed in each pass, then peak memory of the heaviest pass, if it was measured."""
    found = groups(rows)
    dtypes = list(dict.fromkeys(dtype for _, dtype, _ in found))
    passes = list(dict.fromkeys(pass_name for *_, pass_name in found))
    cases = {dtype: list(dict.fromkeys(c for c, d, _ in found if d == dtype)) for dtype in dtypes}
    names = [name for name in COLOURS if any(row["contender"] == name for row in rows)]
    columns = len(passes) + any(row["peak_bytes"] is not None for row in rows)
    height = [0.7 + len(cases[dtype]) * (0.3 + 0.14 * len(names)) for dtype in dtypes]
    figure, axes = plt.subplots(
        len(dtypes),
        columns,
        figsize=(4.6 * max(columns, 2), 1.3 + sum(height)),
        squeeze=False,
        sharey="row",
        gridspec_kw={"height_ratios": height},
        layout="constrained",
    )
    for line, dtype in zip(axes, dtypes):
        for axis, pass_name in zip(line, passes):
            _speed(axis, [found.get((case, dtype, pass_name), []) for case in cases[dtype]], names)
            axis.set_title(f"{dtype}: {TITLES[pass_name].lower()}", fontsize=10)
        if columns > len(passes):
            heaviest = passes[-1]
            _memory(line[-1], [found.get((case, dtype, heaviest), []) for case in cases[dtype]], names)
            line[-1].set_title(f"{dtype}: peak memory, {heaviest}", fontsize=10)
        line[0].set_yticks(range(len(cases[dtype])), cases[dtype])
        line[0].set_ylim(len(cases[dtype]) - 0.5, -0.5)
    first = rows[0]
    machine = first["device"] if first["device"] != "cpu" else f"{first['cpu']}, {first['threads']} threads"
    figure.suptitle(
        f"Autofocus layer: fused against naive. {machine}, torch {first['torch']}, {first['commit']}\n"
        "Every bar is for the memory layout (contiguous or channels-last) in which the naive layer is faster.",
        fontsize=10,
    )
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    figure.legend(handles, [f"{n}, eager" if n == NAIVE else n for n in names], loc="outside lower center", ncols=4)
    return figure


def _bars(axis, found: list[list[dict]], names: list[str], value, label) -> None:
    """A bar per case and contender in the naive layer's faster layout, or the first one if naive has no time.

    ``value(row)`` may be None: no bar, only the label.
    """
    width = 0.8 / len(names)
    for y, group in enumerate(found):
        best = best_naive(group)
        shown = [row for row in group if row["layout"] == (best or group[0])["layout"]]
        shown.sort(key=lambda row: names.index(row["contender"]))
        for place, row in enumerate(shown):
            at = y + (place - (len(shown) - 1) / 2) * width
            note = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
            if row["status"] != "ok":
                axis.annotate(row["status"], (0, at), color="red", **note)
                continue
            length = value(row) or 0.0
            axis.barh(at, length, height=0.9 * width, color=COLOURS[row["contender"]])
            axis.annotate(label(row), (length, at), **note)
    axis.margins(x=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _speed(axis, found, names) -> None:
    def label(row: dict) -> str:
        time = f"{_rounded(row['min_ms'])} ms"
        return time if row["ratio"] is None else f"{row['ratio']:.2f}x, {time}"

    _bars(axis, found, names, lambda row: row["ratio"], label)
    axis.axvline(1, color=COLOURS[NAIVE], linewidth=0.8, linestyle=":")
    axis.set_xlabel("times as fast as the naive layer", fontsize=8)
    axis.set_xlim(left=0)


def _memory(axis, found, names) -> None:
    def value(row: dict) -> float | None:
        return None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20

    def label(row: dict) -> str:
        return "" if row["peak_bytes"] is None else f"{_rounded(value(row))} MiB"

    _bars(axis, found, names, value, label)
    axis.set_xlabel("MiB beyond the layer's arguments", fontsize=8)
    axis.set_xlim(left=0)


if __name__ == "__main__":
    sys.exit(main())
