"""Rows of a benchmark on disk, written as they come."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from .provenance import ENVIRONMENT, command_line

COLUMNS = (
    "case",
    "shape",
    "dtype",
    "pass",
    "contender",
    "layout",
    "status",  # ok; wrong, refused or failed, and then no time
    "note",  # why not ok
    "error",  # largest relative error of output and gradients
    "error_of_limit",  # the same, each over its tolerance: at most 1
    "min_ms",
    "median_ms",
    "rounds",
    "ratio",  # the best naive layer's min_ms (eager, of both layouts) over this row's
    "ratio_median",
    "peak_bytes",  # beyond the arguments
    "saved_bytes",  # kept by autograd between forward and backward, arguments included
    "argument_bytes",
    "output_bytes",
    "compulsory_bytes",
    "multiply_adds",
    "floor_ms",
    "floor",  # the larger of compulsory bytes and multiply-adds at the ceilings measured here
    "fraction_of_floor",
    "copy_gbs",
    "matmul_gflops",  # those ceilings
    "load",  # other processes: 1-minute load average before the group
    *ENVIRONMENT,
    "command",
)


class Rows:
    """A CSV file that grows group by group (case, dtype, pass), so that a run that was killed can go on.

    Rows of an existing file are kept if they were measured in the same environment and by the same sources.
    """

    def __init__(self, path: Path, environment: dict, anew: bool = False) -> None:
        self.path = path
        self.environment = {name: str(value) for name, value in environment.items()}
        self.rows = (
            []
            if anew or not path.exists()
            else [row for row in read(path) if all(str(row[name]) == text for name, text in self.environment.items())]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writeheader()
        self._append(self.rows)

    def has(self, case: str, dtype: str, pass_name: str) -> bool:
        return any((r["case"], r["dtype"], r["pass"]) == (case, dtype, pass_name) for r in self.rows)

    def add(self, rows: list[dict]) -> None:
        rows = [{**row, **self.environment, "command": command_line()} for row in rows]
        self._append(rows)
        self.rows += rows

    def _append(self, rows: list[dict]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerows(
                {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows
            )
            file.flush()
            os.fsync(file.fileno())


_TEXT = {"case", "shape", "dtype", "pass", "contender", "layout", "status", "note", "floor", "command"}
_TEXT |= set(ENVIRONMENT)


def read(path: Path) -> list[dict]:
    """The rows of a CSV with numbers as floats and what was not measured as None; a torn last line is dropped."""
    with Path(path).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [
        {name: value if name in _TEXT else _number(value) if value else None for name, value in row.items()}
        for row in rows
    ]


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)
