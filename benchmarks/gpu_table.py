"""The table of one GPU in two minutes: python -m benchmarks.gpu_table [--dtypes bfloat16 ...] [--profile].

Every case, inference and training, the naive layer against each backend: time of the device alone, wall time of a
call, peak memory. A light check first: results against the naive layer in float32, at most twice as far off as the
naive layer in the dtype that is timed. cuDNN picks its algorithms by its rules, not by trial, which would take seconds
a case; run.py does that, against float64 truth. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch

from autofocus_kernels import testing, tolerance
from autofocus_kernels.testing import Case, Tensors

from . import cases, memory
from .arguments import require_device
from .contenders import DTYPES, LAYOUTS, NAIVE, Contender, backends_of, lay_out, layer, precision, runner, verdict_on
from .profiling import PASSES, by_counter, by_kernel
from .provenance import ENVIRONMENT, ROOT, command_line, environment

# First what the figures of the README rest on.
ORDER = ("32x64^3", "afn6-2", "64x48^3", "afn6-2-branch", "2d-4x64x128^2", "32x128^3", "64x96^3")
COLUMNS = (
    "case",
    "shape",
    "dtype",
    "pass",
    "contender",
    "layout",
    "status",  # ok; wrong, refused or failed, and then no time
    "note",
    "error_of_limit",  # at most 1
    "device_ms",  # medians
    "wall_ms",
    "ratio",  # the best naive layout's device_ms over this one's
    "peak_bytes",  # beyond the arguments
    "peak_ratio",  # over the naive layer's in the same layout
    *ENVIRONMENT,
    "command",
)
WARMING = 45  # seconds for all that Triton compiles of a dtype beforehand
SLEEP = 20_000_000  # cycles of the device, 10 ms: longer than the host takes to queue the calls that are timed


def make_tensors(case: Case, dtype: str, device: str) -> Tensors:
    """Random values, made on the device."""
    generator = torch.Generator(device).manual_seed(0)
    geometry, vectors = case.geometry, (case.num_branches, case.out_channels)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    tensors = Tensors(
        input=random(case.batch, case.channels, *case.size),
        weight=random(
            case.out_channels, case.channels, *case.kernel, scale=(case.channels * geometry.num_taps) ** -0.5
        ),
        attention=random(case.batch, case.num_branches, *geometry.output_size).softmax(1),
        bias=random(case.out_channels) if case.mode == "plain" else None,
        branch_scale=random(*vectors) if case.mode == "branch" else None,
        branch_shift=random(*vectors) if case.mode == "branch" else None,
        grad_output=random(case.batch, case.out_channels, *geometry.output_size),
    )
    return Tensors(*(None if tensor is None else tensor.to(DTYPES[dtype]) for tensor in tensors))


def limits(case: Case, dtype: str, tensors: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The naive layer in float32 on the same values, and how far from it a result may be."""
    exact = Tensors(*(None if tensor is None else tensor.float() for tensor in tensors))
    with precision("float32", search=False):
        expected = testing.evaluate(layer(NAIVE), case, exact)
    if dtype == "float32":
        terms = tolerance.terms(testing.call_of(case, tensors))
        return expected, {name: 2 * tolerance.of_sum(terms[name], torch.float32) for name in expected}
    same = testing.evaluate(layer(NAIVE), case, tensors)
    errors = {name: tolerance.worst_error(same[name], value).item() for name, value in expected.items()}
    if dtype == "tf32":
        return expected, {name: tolerance.of_tf32(error) for name, error in errors.items()}
    eps = torch.finfo(DTYPES[dtype]).eps
    return expected, {name: tolerance.of_rounding(error, eps) for name, error in errors.items()}


def judge(contender: Contender, case: Case, tensors: Tensors, expected: dict, allowed: dict) -> dict:
    """The columns status, note and error_of_limit."""
    try:
        results = testing.evaluate(layer(contender.name), case, tensors)
    except Exception as error:
        return verdict_on(error)
    errors = {name: tolerance.worst_error(results[name], value).item() for name, value in expected.items()}
    wrong = tolerance.complaints(errors, allowed)
    worst = max(error / allowed[name] for name, error in errors.items())
    return {"status": "wrong" if wrong else "ok", "note": "; ".join(wrong), "error_of_limit": worst}


def seconds(call: Callable, device: str, budget: float) -> tuple[float, float]:
    """Median seconds of a call on the device alone, and from its begin on the host to the end of its work."""
    wall = []
    while len(wall) < 3 or (sum(wall) < budget / 2 and len(wall) < 50):
        began = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - began)
        del result
    if device == "cpu":
        return median(wall), median(wall)
    calls = max(1, min(5, int(0.005 / median(wall))))
    alone, spent = [], 0.0
    while len(alone) < 3 or (spent < budget / 2 and len(alone) < 20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        torch.cuda._sleep(SLEEP)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        alone.append(start.elapsed_time(end) / 1e3 / calls)
        spent += time.perf_counter() - began
    return median(alone), median(wall)


def costs(call: Callable, device: str, budget: float) -> dict:
    """The columns device_ms, wall_ms and, on a GPU, peak_bytes."""
    on_device, wall = seconds(call, device, budget)
    times = {"device_ms": 1e3 * on_device, "wall_ms": 1e3 * wall}
    return times if device == "cpu" else {**times, "peak_bytes": memory.peak_cuda(call)}


def measure(case: Case, dtype: str, options: argparse.Namespace) -> Iterator[list[dict]]:
    """The rows of one case, a list a pass."""
    device = options.device
    with precision(dtype, search=False):
        given = make_tensors(case, dtype, device)
        expected, allowed = limits(case, dtype, given)
        contenders = [Contender(NAIVE, layout) for layout in LAYOUTS]
        contenders += [Contender(name, layout) for name in options.backends for layout in options.layouts]
        laid_out = {layout: lay_out(given, case, layout) for layout in LAYOUTS}
        verdicts = {c: judge(c, case, laid_out[c.layout], expected, allowed) for c in contenders}
        del expected
        for pass_name in PASSES:
            rows = []
            for contender in contenders:
                row = {"case": case.name, "shape": cases.shape(case), "dtype": dtype, "pass": pass_name}
                row |= {"contender": contender.name, "layout": contender.layout, **verdicts[contender]}
                rows.append(row)
                if row["status"] != "ok":
                    continue
                call = runner(pass_name, layer(contender.name), case, laid_out[contender.layout])
                try:
                    row |= costs(call, device, options.seconds)
                except Exception as error:
                    row |= verdict_on(error)
            yield with_ratios(rows)


def measure_or_say_why(case: Case, dtype: str, options: argparse.Namespace) -> Iterator[list[dict]]:
    """As :func:`measure`; a case that nothing can be measured of, as after an illegal access, is a row that failed."""
    try:
        yield from measure(case, dtype, options)
    except Exception as error:
        nobody = {"pass": "", "contender": "", "layout": ""}
        yield [{"case": case.name, "shape": cases.shape(case), "dtype": dtype, **nobody, **verdict_on(error)}]


def with_ratios(rows: list[dict]) -> list[dict]:
    naive = {row["layout"]: row for row in rows if row["contender"] == NAIVE and row["status"] == "ok"}
    best = min((row["device_ms"] for row in naive.values()), default=None)
    for row in rows:
        if row["status"] != "ok":
            continue
        if best is not None:
            row["ratio"] = best / row["device_ms"]
        peak = naive.get(row["layout"], {}).get("peak_bytes")
        if peak:
            row["peak_ratio"] = row["peak_bytes"] / peak
    return rows


def lines(rows: list[dict]) -> list[str]:
    """How the table says a case and pass."""
    said = []
    for row in rows:
        head = f"{row['case']:<18}{row['dtype']:<10}{row['pass']:<11}{row['contender']:<8}{row['layout']:<14}"
        if row["status"] != "ok":
            said.append(f"{head}{row['status'].upper()}: {row['note']}")
            continue
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else ""
        peak = f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else ""
        of_naive = f"({row['peak_ratio']:.2f})" if "peak_ratio" in row else ""
        said.append(
            f"{head}device {row['device_ms']:8.3f} ms {ratio:>7}  wall {row['wall_ms']:8.3f} ms  peak {peak} {of_naive}"
        )
    return said


def summary(rows: list[dict]) -> list[str]:
    """A line a case, dtype and pass, of the rows of a CSV: the best naive layout, and each backend against it."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["dtype"], row["pass"]), []).append(row)
    said = []
    for (case, dtype, pass_name), group in groups.items():
        naive = [float(row["device_ms"]) for row in group if row["contender"] == NAIVE and row["device_ms"]]
        line = f"{case:<18}{dtype:<10}{pass_name:<11}naive {min(naive):8.3f} ms" if naive else f"{case:<18} no naive"
        for row in (row for row in group if row["contender"] != NAIVE):
            peak = f" ({float(row['peak_ratio']):.2f})" if row["peak_ratio"] else ""
            good = f"{float(row['ratio'] or 0):.2f}x{peak}" if row["status"] == "ok" else row["status"].upper()
            line += f"   {row['contender']} {row['layout']} {good}"
        said.append(line)
    return said


# ------------------------------------------------------------------ compiling beforehand


def warm(case: Case, dtype: str, options: argparse.Namespace) -> None:
    """Every kernel of the case once, so that what Triton compiles lies in its cache."""
    with precision(dtype, search=False):
        given = make_tensors(case, dtype, options.device)
        for layout in options.layouts:
            for name in options.backends:
                testing.evaluate(layer(name), case, lay_out(given, case, layout))


def warm_in_processes(chosen: list[Case], dtype: str, options: argparse.Namespace) -> None:
    """A process a case: Triton compiles in one thread, and its compiler is most of the time of a first run."""
    deadline = time.monotonic() + WARMING

    def run(case: Case) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu_table", "--warm", "--cases", case.name, "--dtypes", dtype]
        command += ["--device", options.device, "--backends", *options.backends, "--layouts", *options.layouts]
        # What fails here fails again, and is said, when it is judged; what is not compiled in time is so then.
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=ROOT, timeout=max(0, deadline - time.monotonic()), **silent)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(run, chosen))


# ------------------------------------------------------------------ the command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--cases", nargs="+", metavar="CASE", choices=cases.BY_NAME, help=", ".join(cases.BY_NAME))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--backends", nargs="+", help="default: all that run on the device")
    parser.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=["channels_last"], help="of the backends' tensors"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="timed calls per contender and pass")
    parser.add_argument("--time-limit", type=float, help="begin no new case after this many seconds")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also which kernels the first case's calls run, and what ncu counts in them",
    )
    parser.add_argument("--warm", action="store_true", help="only compile")
    parser.add_argument("--out", type=Path, help="CSV; default: build/gpu-table.csv")
    options = parser.parse_args(arguments)
    options.out = options.out or ROOT / "build" / "gpu-table.csv"
    if options.backends is None:
        options.backends = [name for name, reason in backends_of(options.device).items() if reason is None]
    return options


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    if options.cases:
        return [cases.BY_NAME[name] for name in options.cases]
    return sorted(cases.GPU_CASES, key=lambda case: ORDER.index(case.name) if case.name in ORDER else len(ORDER))


def profile(case: Case, dtype: str, options: argparse.Namespace) -> None:
    for name in options.backends:
        try:
            for text in by_kernel(case, dtype, options.device, name, options.layouts[0]):
                print(text, flush=True)
            if options.device == "cuda":
                print(by_counter(case, dtype, name, options.layouts[0]), flush=True)
        except Exception as error:
            print(f"\n{case.name}, {dtype}, {name}: no profile: {verdict_on(error)['note']}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    require_device(options.device, options.dtypes)
    chosen = chosen_cases(options)
    if options.warm:
        for case in chosen:
            warm(case, options.dtypes[0], options)
        return 0
    began = time.monotonic()
    where = environment(options.device) | {"command": command_line()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    bad, written = False, 0
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for dtype in options.dtypes:
            if "triton" in options.backends:
                warm_in_processes(chosen, dtype, options)
                print(f"compiled what {dtype} needs: {time.monotonic() - began:.0f} s", flush=True)
            for case in chosen:
                if options.time_limit is not None and time.monotonic() - began > options.time_limit:
                    print(f"{case.name} {dtype}: no time left", flush=True)
                    continue
                for rows in measure_or_say_why(case, dtype, options):
                    writer.writerows({**where, **row} for row in rows)
                    file.flush()
                    print(*lines(rows), sep="\n", flush=True)
                    written += len(rows)
                    bad |= any(row["status"] in ("wrong", "failed") and row["contender"] != NAIVE for row in rows)
    if options.profile:  # when all is measured: ncu takes long
        for dtype in options.dtypes:
            profile(chosen[0], dtype, options)
    return 1 if bad or not written else 0


if __name__ == "__main__":
    sys.exit(main())
