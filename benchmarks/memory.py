"""Peak memory of one pass beyond what it is given.

On a GPU the caching allocator counts, cuDNN's workspaces included. On the CPU nothing counts every allocation
(oneDNN and C++ take theirs from malloc), so the kernel does: the resident set's high-water mark during a call, in a
process where every block of 64 KiB or more is a mapping of its own and so comes and goes with its owner. Pages are
counted when first written. For our backends it is the first call of its size, so scratch that they keep for the next
call counts too; the naive layer has run before, since oneDNN generates code in a first call. Right to about 0.3 MB.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from autofocus_kernels.testing import Case

from .contenders import Contender, lay_out, layer, make_tensors, precision, runner
from .provenance import ROOT

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def can_measure_cpu() -> bool:
    """Whether the kernel lets a process reset its high-water mark (Linux, /proc/self/clear_refs)."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def peak_cuda(call: Callable) -> int:
    """Bytes beyond what was allocated before, in the caching allocator. The call must have run before."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def peak_here(call: Callable) -> int:
    """Bytes by which the resident set of this process grew at most; see the head of this file for the settings."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM")
    del result
    return max(0, peak - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peaks_cpu(
    case: Case, dtype: str, threads: int, wanted: list[tuple[Contender, str]]
) -> Iterator[tuple[Contender, str, int]]:
    """Measures each (contender, pass) in one fresh process; yields as they come."""
    job = {"case": asdict(case), "dtype": dtype, "threads": threads, "wanted": wanted}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(job)],
        cwd=ROOT,
        env={**os.environ, **SETTINGS, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            for line in process.stdout:
                name, layout, pass_name, peak = json.loads(line)
                yield Contender(name, layout), pass_name, peak
        finally:
            process.kill()


def main(job: dict) -> None:
    torch.set_num_threads(job["threads"])
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in job["case"].items()}
    case = Case(**fields)
    small = replace(case, name="warm-up", size=tuple(max(min(n, 9), n // 2) for n in case.size), batch=1)
    for (name, layout), pass_name in job["wanted"]:
        function = layer(name)
        first = small if Contender(name, layout).is_ours else case
        with precision(job["dtype"]):
            for problem in (first, case):
                tensors = lay_out(make_tensors(problem, job["dtype"], "cpu"), problem, layout)
                peak = peak_here(runner(pass_name, function, problem, tensors))
        print(json.dumps([name, layout, pass_name, peak]), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
