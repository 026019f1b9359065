"""Which kernels a layer's calls run, and what bounds each: by torch's profiler, and by Nsight Compute where it is.

What ``python -m benchmarks.gpu_table --profile`` prints. This file run by itself is the process that ncu looks into.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import torch

from autofocus_kernels.testing import Case

from . import cases
from .contenders import lay_out, layer, make_tensors, precision, runner
from .cross_build import tool
from .provenance import ROOT

PASSES = ("inference", "training")
SECONDS = 50  # ncu runs a kernel a dozen times over, and Python and torch at a crawl
# Of `ncu --page raw`, the counters that say what bounds a kernel; names differ between GPUs and versions, so a pattern
# each, of which the largest value counts.
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
COUNTERS = {
    "us": r"gpu__time_duration\.sum",
    "issue %": r"smsp?__(inst_issued|issue_active)\.avg\.pct_of_peak_sustained_active",
    "tensor %": r"sm__.*pipe_tensor.*\.avg\.pct_of_peak_sustained_active",
    "L1 %": r"l1tex__throughput\.avg\.pct_of_peak_sustained_(active|elapsed)",
    "L2 %": r"lts__throughput\.avg\.pct_of_peak_sustained_elapsed",
    "DRAM %": r"(gpu__)?dram__?throughput\.avg\.pct_of_peak_sustained_elapsed",
    "warps %": r"sm__warps_active\.avg\.pct_of_peak_sustained_active",
    "registers": r"launch__registers_per_thread",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def by_kernel(case: Case, dtype: str, device: str, name: str, layout: str) -> Iterator[str]:
    """Time on the device by kernel, of one inference and one training call of a backend."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    sort = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    for pass_name, call in _calls(case, dtype, device, name, layout):
        with torch.profiler.profile(activities=[activity]) as found:
            call()
            if device == "cuda":
                torch.cuda.synchronize()
        table = found.key_averages().table(sort_by=sort, row_limit=12, max_name_column_width=60)
        yield f"\n{case.name}, {dtype}, {pass_name}, {name}\n{table}"


def _calls(case: Case, dtype: str, device: str, name: str, layout: str):
    """(pass, call) of a backend, each called once already."""
    with precision(dtype, search=False):
        tensors = lay_out(make_tensors(case, dtype, device), case, layout)
        for pass_name in PASSES:
            call = runner(pass_name, layer(name), case, tensors)
            call()
            yield pass_name, call


def by_counter(case: Case, dtype: str, name: str, layout: str) -> str:
    """What Nsight Compute counts in each kernel of a training call, a line a kernel; or why there is nothing."""
    title = f"\n{case.name}, {dtype}, training, {name}: Nsight Compute"
    ncu = tool("ncu")
    if ncu is None:
        return f"{title}: there is no ncu"
    sections = [option for section in SECTIONS for option in ("--section", section)]
    counted = [sys.executable, "-m", "benchmarks.profiling", json.dumps([case.name, dtype, name, layout])]
    # Clocks as they are when calls are timed: by itself ncu holds them at their base.
    options = ["--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none", *sections]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([ncu, *options, *counted], cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"{title}: not done in {SECONDS} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what ncu looks into would go on using the GPU
                os.killpg(process.pid, signal.SIGKILL)
    kernels = list(read_counters(output.splitlines()))
    if not kernels:
        return f"{title}: {(output + errors).strip()[-400:]}"
    head = f"{'kernel':<44}" + "".join(f"{name:>11}" for name in COUNTERS) + "  stalls, warps a scheduler's issue"
    return "\n".join([title, head, *map(_line, kernels)])


def read_counters(lines: list[str]) -> Iterator[dict]:
    """The kernels of ``ncu --csv --page raw``: "kernel", COUNTERS that it has, and "stalls", the three longest."""
    # What the program printed comes first; then names, units, and a row a kernel.
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.reader(lines[start:]))
    if len(rows) < 3:
        return
    names, units, *kernels = rows
    for values in kernels:
        found: dict = {"stalls": {}}
        for name, unit, text in zip(names, units, values):
            if name == "Kernel Name":
                found["kernel"] = text
                continue
            try:
                value = float(text.replace(",", ""))
            except ValueError:
                continue
            stall = STALL.fullmatch(name)
            if stall:
                found["stalls"][stall[1]] = value
            for title, pattern in COUNTERS.items():
                if re.fullmatch(pattern, name):
                    value = value * MICROSECONDS.get(unit, 1.0) if title == "us" else value
                    found[title] = max(value, found.get(title, 0.0))
        longest = sorted(found["stalls"].items(), key=lambda item: -item[1])[:3]
        yield found | {"stalls": dict(longest)}


def _line(kernel: dict) -> str:
    numbers = (f"{kernel[name]:>11.1f}" if name in kernel else f"{'':>11}" for name in COUNTERS)
    stalls = ", ".join(f"{name} {value:.1f}" for name, value in kernel["stalls"].items())
    return f"{kernel['kernel'][:43]:<44}" + "".join(numbers) + f"  {stalls}"


def main(job: str) -> None:
    case, dtype, name, layout = json.loads(job)
    *_, (_, call) = _calls(cases.BY_NAME[case], dtype, "cuda", name, layout)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(sys.argv[1])
