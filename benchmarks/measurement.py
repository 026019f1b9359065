"""Measures case by case: checked against float64 truth, timed in turn."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from statistics import median

import torch

from autofocus_kernels import testing, tolerance
from autofocus_kernels.testing import Case, Tensors

from . import memory
from .contenders import (
    NAIVE,
    Contender,
    Judge,
    clock,
    interleave,
    lay_out,
    layer,
    make_tensors,
    precision,
    runner,
    verdict_on,
)
from .roofline import Ceilings, costs


def measure(
    case: Case,
    dtype: str,
    passes: Iterable[str],
    contenders: list[Contender],
    device: str,
    ceilings: Ceilings,
    seconds: float,
    measure_memory: bool = True,
    say: Callable[[str], None] = lambda text: None,
    tensors: Tensors | None = None,
) -> Iterable[list[dict]]:
    """The rows of one case in one dtype, a list per pass as soon as it is done.

    A contender whose output or any gradient is not within tolerance of float64 truth gets a row without a time.
    ``seconds`` is what the timed rounds of a pass may take; ``tensors`` are contiguous, random ones if None.
    """
    with precision(dtype):
        given = make_tensors(case, dtype, device) if tensors is None else tensors
        verdicts, ready = _checked(case, dtype, contenders, given, say)
        peaks = {}
        if measure_memory and device == "cpu" and memory.can_measure_cpu():
            say("peak memory")
            wanted = [(contender, pass_name) for contender in ready for pass_name in passes]
            peaks = {
                (contender, pass_name): peak
                for contender, pass_name, peak in memory.peaks_cpu(case, dtype, torch.get_num_threads(), wanted)
            }
        for pass_name in passes:
            say(f"timing {pass_name}")
            load = os.getloadavg()[0]
            calls = {
                contender: runner(pass_name, function, case, laid_out)
                for contender, (function, laid_out) in ready.items()
            }
            times = interleave(calls, clock(device), seconds) if calls else {}
            if measure_memory and device == "cuda":
                peaks |= {(key, pass_name): memory.peak_cuda(call) for key, call in calls.items()}
            fixed = costs(case, pass_name, dtype, ceilings)
            rows = []
            for contender in contenders:
                row = {**fixed, **contender._asdict(), **verdicts[contender], "load": load}
                row["contender"] = row.pop("name")
                if contender in ready:
                    seen = times[contender]
                    row["min_ms"], row["median_ms"] = 1e3 * min(seen), 1e3 * median(seen)
                    row["rounds"] = len(seen)
                    row["fraction_of_floor"] = fixed["floor_ms"] / row["min_ms"]
                    row["peak_bytes"] = peaks.get((contender, pass_name))
                    if pass_name != "inference":
                        function, laid_out = ready[contender]
                        row["saved_bytes"] = testing.saved_bytes(runner("forward", function, case, laid_out))
                rows.append(row)
            yield with_ratios(rows)


def _checked(
    case: Case, dtype: str, contenders: list[Contender], given: Tensors, say: Callable[[str], None]
) -> tuple[dict[Contender, dict], dict[Contender, tuple[Callable, Tensors]]]:
    """The verdict on each contender, and for those that are right their function and tensors."""
    say("float64 truth")
    judge = Judge(case, dtype, given)
    verdicts, ready = {}, {}
    torch.compiler.reset()  # what was compiled for another case must not count against dynamo's limit
    for contender in contenders:
        say(f"checking {contender.name}")
        laid_out = lay_out(given, case, contender.layout)
        function = layer(contender.name)
        verdicts[contender] = verdict = _judge(judge, contender, function, laid_out)
        if verdict["status"] == "ok":
            ready[contender] = (function, laid_out)
    return verdicts, ready


def _judge(judge: Judge, contender: Contender, function: Callable, tensors) -> dict:
    """The columns status, note, error, error_of_limit."""
    try:
        errors = judge.errors(contender, function, tensors)
    except Exception as error:
        return verdict_on(error)
    complaints = tolerance.complaints(errors, judge.limits)
    fractions = [error / judge.limits[name] for name, error in errors.items()]
    return {
        "status": "wrong" if complaints else "ok",
        "note": "; ".join(complaints),
        "error": _largest(errors.values()),
        "error_of_limit": _largest(fractions),
    }


def _largest(values: Iterable[float]) -> float:
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def best_naive(rows: Iterable[dict]) -> dict | None:
    """The faster layout of the eager naive layer, by min_ms."""
    timed = [row for row in rows if row["contender"] == NAIVE and row["status"] == "ok"]
    return min(timed, key=lambda row: row["min_ms"], default=None)


def with_ratios(rows: list[dict]) -> list[dict]:
    """The rows of one case, dtype and pass with ``ratio`` and ``ratio_median`` filled in."""
    best = best_naive(rows)
    for row in rows:
        if best is not None and row["status"] == "ok":
            row["ratio"] = best["min_ms"] / row["min_ms"]
            row["ratio_median"] = best["median_ms"] / row["median_ms"]
    return rows


def failures(rows: list[dict]) -> list[str]:
    """The wrong and broken results of ours, a line each. A wrong baseline is shown, but is no fault of this package."""
    found = {
        f"{row['contender']}, {row['layout']}, {row['case']}, {row['dtype']}: {row['status']}: {row['note']}": None
        for row in rows
        if Contender(row["contender"], row["layout"]).is_ours and row["status"] in ("wrong", "failed")
    }
    return list(found)
