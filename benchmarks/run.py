"""Times the fused layer against the naive one: python -m benchmarks.run [--full] [--device cuda].

Every row is first checked against float64 truth and refused if wrong; then the status is non-zero. Rows are written
as they come; the same command continues a run that was stopped, one that asks for more measures again what lacks it,
and --anew starts over.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from autofocus_kernels.testing import Case

from . import cases, memory
from .arguments import Distinct, at_least, refuse, require_device
from .contenders import DTYPES, PASSES, Contender, backends_of, contenders
from .measurement import failures, measure
from .provenance import ROOT, environment
from .roofline import Ceilings
from .rows import COLUMNS, Rows, read
from .tables import summary, table

# Chosen so that two CPU cores are done in under ten minutes; --full times everything.
DEFAULT_16_BIT = ("32x64^3", "64x48^3")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    several = {"nargs": "+", "action": Distinct}
    parser.add_argument("--cases", **several, metavar="CASE", choices=cases.BY_NAME, help=", ".join(cases.BY_NAME))
    parser.add_argument("--dtypes", **several, choices=DTYPES, help="tf32 on a GPU only")
    parser.add_argument("--passes", **several, choices=PASSES, default=["inference", "training"])
    parser.add_argument("--backends", **several, help="default: all that run on the device")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads; default: torch's choice")
    parser.add_argument("--seconds", type=at_least(0.0), help="timed rounds per case, dtype and pass")
    parser.add_argument("--full", action="store_true", help="every case, dtype and pass, and torch.compile in each")
    parser.add_argument(
        "--compiled",
        nargs="*",
        metavar="CASE",
        choices=cases.BY_NAME,
        default=["32x64^3"],
        help="cases in which torch.compile of the naive layer takes part (slow to compile)",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--time-limit", type=at_least(0.0), help="start no new case after this many seconds")
    parser.add_argument("--out", type=Path, help="CSV; default: build/benchmark-<device>.csv")
    parser.add_argument("--anew", action="store_true", help="measure again what the CSV already has")
    parsed = parser.parse_args(arguments)
    if parsed.full:
        parsed.passes = list(PASSES)
    if parsed.threads is not None and parsed.threads > (cores := os.cpu_count() or 1):
        parser.error(f"argument --threads: must be at most the {cores} of this machine, got {parsed.threads}")
    if parsed.seconds is None:
        parsed.seconds = 5.0 if parsed.device == "cpu" else 0.5
    if parsed.out is None:
        parsed.out = ROOT / "build" / f"benchmark-{parsed.device}.csv"
    return parsed


def plan(options: argparse.Namespace) -> list[tuple]:
    """(case, dtype, whether torch.compile takes part), in the order in which they are measured."""
    on_gpu = options.device == "cuda"
    default = not (options.full or options.cases or on_gpu)
    if options.cases:
        chosen = [cases.BY_NAME[name] for name in options.cases]
    else:
        chosen = cases.GPU_CASES if on_gpu else cases.CPU_CASES
    if default:
        chosen = [case for case in chosen if case not in cases.BRANCH_AFN6]
    gpu_dtypes = ["bfloat16", "float16", "tf32", "float32"]
    dtypes = options.dtypes or (gpu_dtypes if on_gpu else ["float32", "bfloat16"])
    return [
        (case, dtype, options.full or case.name in options.compiled)
        for dtype in dtypes
        for case in chosen
        if not default or options.dtypes or dtype == "float32" or case.name in DEFAULT_16_BIT
    ]


def is_complete(rows: list[dict], entrants: list[Contender], with_memory: bool) -> bool:
    """Whether rows of one case, dtype and pass are all that is asked for: what is compared is measured together."""
    if with_memory:
        rows = [row for row in rows if row["peak_bytes"] is not None or row["status"] != "ok"]
    return {(row["contender"], row["layout"]) for row in rows}.issuperset(entrants)


class Job(NamedTuple):
    """What is left to measure of one case in one dtype; no passes if nothing is."""

    case: Case
    dtype: str
    entrants: list[Contender]
    passes: list[str]


def jobs_of(options: argparse.Namespace, backends: list[str], store: Rows, with_memory: bool) -> list[Job]:
    jobs = []
    for case, dtype, compiled in plan(options):
        entrants = contenders(backends, compiled)
        kept = {name: store.of({"case": case.name, "dtype": dtype, "pass": name}) for name in options.passes}
        passes = [name for name, rows in kept.items() if not is_complete(rows, entrants, with_memory)]
        # These rows are replaced: what they had is measured again, too.
        found = [Contender(row["contender"], row["layout"]) for name in passes for row in kept[name]]
        entrants = list(dict.fromkeys([*entrants, *found]))
        jobs.append(Job(case, dtype, entrants, passes))
    return jobs


def run_jobs(options: argparse.Namespace, jobs: list[Job], store: Rows, with_memory: bool, began: float) -> None:
    ceilings = Ceilings(options.device)
    # No bar in a log: a finished case prints a line there too.
    with tqdm(jobs, unit="case", file=sys.stderr, dynamic_ncols=True, disable=None) as bar:
        for case, dtype, entrants, passes in bar:
            if not passes:
                continue
            if options.time_limit is not None and time.monotonic() - began > options.time_limit:
                bar.write("time is up: the rest is not measured")
                break
            groups = measure(
                case,
                dtype,
                passes,
                entrants,
                options.device,
                ceilings,
                options.seconds,
                measure_memory=with_memory,
                say=lambda text: bar.set_postfix_str(f"{case.name} {dtype}: {text}"),
            )
            for rows in groups:
                store.add(rows)
                bar.write(summary(rows).splitlines()[-1])


def usable_backends(options: argparse.Namespace) -> list[str]:
    """Those to measure. One that was asked for and does not run ends the program, another is left out."""
    reasons = backends_of(options.device)
    for name in options.backends or ():
        reason = reasons.get(name, f"it is no backend of {options.device}")
        if reason is not None:
            refuse(f"--backends {name}: {reason}")
    if options.backends:
        return options.backends
    for name, reason in reasons.items():
        if reason is not None:
            print(f"backend {name} takes no part: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    require_device(options.device, options.dtypes or ())
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.monotonic()
    backends = usable_backends(options)
    here = environment(options.device)
    print("\n".join(f"{name:<8} {value}" for name, value in here.items()))
    try:
        store = Rows(options.out, COLUMNS, here, options.anew)
    except (OSError, ValueError) as error:
        refuse(f"--out: {error}")
    with_memory = not options.no_memory and (options.device == "cuda" or memory.can_measure_cpu())
    jobs = jobs_of(options, backends, store, with_memory)
    done = sum(not job.passes for job in jobs)
    if done:
        print(f"{done} of {len(jobs)} are measured already in {options.out} (--anew measures them again)")
    if done < len(jobs):
        run_jobs(options, jobs, store, with_memory, began)

    names = {job.case.name for job in jobs}
    rows = [row for row in read(options.out) if row["case"] in names and row["pass"] in options.passes]
    print(table(rows))
    print("\nTime, times as fast as the best naive layer, share of the floor (peak memory over the naive layer's):\n")
    print(summary(rows))
    print(f"\n{len(rows)} rows in {options.out}")
    wrong = failures(rows)
    for failure in wrong:
        print("FAILED:", failure)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
