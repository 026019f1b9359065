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
    "error",  # the worst (tolerance.py) of output and gradients
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
    """A CSV file that grows group by group, so that a run that was killed can go on.

    A group is what was timed in turn: its rows agree in the columns before "contender". Every change writes a whole new
    file beside the old one and renames it: a kill leaves one of the two.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it is no table with these columns; or, unless ``anew``, has rows of another environment or other
            sources.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], environment: dict, anew: bool = False) -> None:
        self.path = Path(os.path.realpath(path))  # what a link leads to is replaced, and not the link
        self.columns = columns
        self.environment = {name: str(value) for name, value in environment.items()}
        if os.path.lexists(self.path) and not self.path.is_file():
            raise ValueError(f"{path}: must be a CSV file, and is no regular file")
        self.rows = self._kept(anew) if self.path.exists() else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def _kept(self, anew: bool) -> list[dict]:
        rows = read(self.path, self.columns)
        if anew:
            return []
        for row in rows:
            for name, text in self.environment.items():
                if row[name] != text:
                    raise ValueError(
                        f"{self.path}: has rows of another {name}, {row[name]} where this is {text}: --anew "
                        "replaces them, another file keeps them"
                    )
        return rows

    def of(self, values: dict) -> list[dict]:
        """The rows with these values."""
        return [row for row in self.rows if values.items() <= row.items()]

    def add(self, rows: list[dict]) -> None:
        """A group, in place of what was there of it."""
        shared = {name: rows[0][name] for name in self.columns[: self.columns.index("contender")]}
        self.rows = [row for row in self.rows if not shared.items() <= row.items()]
        self.rows += [{**row, **self.environment, "command": command_line()} for row in rows]
        self._write()

    def _write(self) -> None:
        whole = self.path.with_name(f".{self.path.name}.new")
        with whole.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(
                {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()} for row in self.rows
            )
            file.flush()
            os.fsync(file.fileno())
        whole.replace(self.path)


_TEXT = {"case", "shape", "network", "dtype", "pass", "contender", "layout", "status", "note", "floor", "command"}
_TEXT |= set(ENVIRONMENT)


def read(path: Path, columns: tuple[str, ...] = COLUMNS) -> list[dict]:
    """The rows of a CSV with numbers as floats and what was not measured as None; a torn line is dropped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table with these columns.
    """
    try:
        with Path(path).open(newline="") as file:
            head, *lines = csv.reader(file)
            if head != list(columns):
                raise ValueError("other columns")
        return [
            {name: text if name in _TEXT else _number(text) if text else None for name, text in zip(columns, line)}
            for line in lines
            if len(line) == len(columns)
        ]
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path}: must be a table of measurements with the columns {', '.join(columns[:5])}, ..., and is none"
        ) from error


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)
