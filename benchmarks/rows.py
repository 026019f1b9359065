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

    Raises:
        ValueError: the file is no such table; or, unless ``anew``, has rows of another environment or other sources.
    """

    def __init__(self, path: Path, environment: dict, anew: bool = False) -> None:
        self.path = path
        self.environment = {name: str(value) for name, value in environment.items()}
        self.rows = self._kept(anew) if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f".{path.name}.new")  # killed here, the old file is still there
        with whole.open("w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writeheader()
        self._append(self.rows, whole)
        whole.replace(path)

    def _kept(self, anew: bool) -> list[dict]:
        try:
            rows = read(self.path)
        except (OSError, ValueError, csv.Error):
            rows = [{}]
        if any("case" not in row or "contender" not in row for row in rows):
            raise ValueError(f"{self.path}: is no table of measurements; choose another file")
        if anew:
            return []
        for row in rows:
            for name, text in self.environment.items():
                if str(row.get(name)) != text:
                    raise ValueError(
                        f"{self.path}: has rows of another {name}, {row.get(name)} where this is {text}: --anew "
                        "replaces them, another file keeps them"
                    )
        return rows

    def has(self, case: str, dtype: str, pass_name: str) -> bool:
        return any((r["case"], r["dtype"], r["pass"]) == (case, dtype, pass_name) for r in self.rows)

    def add(self, rows: list[dict]) -> None:
        rows = [{**row, **self.environment, "command": command_line()} for row in rows]
        self._append(rows, self.path)
        self.rows += rows

    @staticmethod
    def _append(rows: list[dict], path: Path) -> None:
        with path.open("a", newline="") as file:
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
