"""Times the fused layer against the naive one: python -m benchmarks.run [--full] [--device cuda].

Every row is first checked against float64 truth and refused if wrong; then the status is non-zero. Rows are written
as they come; the same command continues a run that was stopped, and --anew starts over.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from . import cases
from .contenders import DTYPES, PASSES, backends_of, contenders
from .measurement import failures, measure
from .provenance import ROOT, environment
from .roofline import Ceilings
from .rows import Rows, read
from .tables import summary, table

# Chosen so that two CPU cores are done in under ten minutes; --full times everything.
DEFAULT_16_BIT = ("32x64^3", "64x48^3")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", metavar="CASE", choices=cases.BY_NAME, help=", ".join(cases.BY_NAME))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=["inference", "training"])
    parser.add_argument("--backends", nargs="+", help="default: all that run on the device")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--seconds", type=float, help="timed rounds per case, dtype and pass")
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
    parser.add_argument("--time-limit", type=float, help="start no new case after this many seconds")
    parser.add_argument("--out", type=Path, help="CSV; default: build/benchmark-<device>.csv")
    parser.add_argument("--anew", action="store_true", help="measure again what the CSV already has")
    parsed = parser.parse_args(arguments)
    if parsed.full:
        parsed.passes = list(PASSES)
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


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda needs a GPU that torch sees")
    if options.threads is not None and options.threads < 1:
        sys.exit(f"--threads must be at least 1, got {options.threads}")
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.monotonic()
    available = backends_of(options.device)
    wanted = options.backends or list(available)
    for name in wanted:
        reason = available.get(name, f"it is no backend of {options.device}")
        if reason is not None:
            print(f"backend {name} takes no part: {reason}")
            if options.backends:
                return 2
    backends = [name for name in wanted if available[name] is None]

    here = environment(options.device)
    print("\n".join(f"{name:<8} {value}" for name, value in here.items()))
    try:
        store = Rows(options.out, here, options.anew)
    except ValueError as error:
        sys.exit(str(error))
    jobs = plan(options)
    todo = [
        (case, dtype, compiled, [p for p in options.passes if not store.has(case.name, dtype, p)])
        for case, dtype, compiled in jobs
    ]
    done = sum(not passes for *_, passes in todo)
    if done:
        print(f"{done} of {len(todo)} are measured already in {options.out} (--anew measures them again)")
    if done < len(todo):
        ceilings = Ceilings(options.device)
        seconds = options.seconds or (5.0 if options.device == "cpu" else 0.5)
        # No bar in a log: a finished case prints a line there too.
        with tqdm(todo, unit="case", file=sys.stderr, dynamic_ncols=True, disable=None) as bar:
            for case, dtype, compiled, passes in bar:
                if not passes:
                    continue
                if options.time_limit and time.monotonic() - began > options.time_limit:
                    bar.write("time is up: the rest is not measured")
                    break
                measured = measure(
                    case,
                    dtype,
                    passes,
                    contenders(backends, compiled),
                    options.device,
                    ceilings,
                    seconds,
                    measure_memory=not options.no_memory,
                    say=lambda text: bar.set_postfix_str(f"{case.name} {dtype}: {text}"),
                )
                for rows in measured:
                    store.add(rows)
                    bar.write(summary(rows).splitlines()[-1])

    names = {case.name for case, *_ in jobs}
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
