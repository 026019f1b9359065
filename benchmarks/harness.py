"""Measures case by case and keeps the rows: checked against float64 truth, timed in turn, written as they come."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # what is measured is this checkout, installed or not

import memory
import torch
from cases import compulsory_bytes, elements, multiply_adds, shape
from contenders import (
    DTYPES,
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
)

from autofocus_kernels import testing
from autofocus_kernels.testing import Case, Tensors

# What identifies a measurement: rows that agree in these may stand beside each other and be compared.
ENVIRONMENT = (
    "device",
    "cpu",
    "threads",
    "torch",
    "cuda",
    "cudnn",
    "onednn",
    "triton",
    "python",
    "commit",
    "source",
)
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


# ------------------------------------------------------------------ where a number comes from


def environment(device: str) -> dict:
    on_gpu = device == "cuda"
    onednn = re.search(r"(?:MKL-DNN|oneDNN) v(\S+)", torch.__config__.show())
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cpu": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else "",
        "cudnn": torch.backends.cudnn.version() if on_gpu else "",
        "onednn": onednn.group(1) if onednn else "",
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "source": source_digest(),
    }


def source_digest() -> str:
    """Of everything whose change may change a result: the package, its compiled libraries, and this folder."""
    digest = hashlib.sha1()
    files = [*ROOT.glob("autofocus_kernels/**/*.py"), *ROOT.glob("autofocus_kernels/*.so")]
    for path in sorted(files + [*ROOT.glob("benchmarks/*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def _commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True
    )
    return result.stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ------------------------------------------------------------------ ceilings


class Ceilings:
    """This machine's rates, each measured once: bytes a second of a copy, multiply-adds a second of a product."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._clock = clock(device)
        self._products: dict[str, float] = {}
        size = 2**31 if device == "cuda" else 2**28
        source = torch.ones(size, dtype=torch.int8, device=device)
        target = torch.ones_like(source)
        self.copy = 2 * size / self._best(lambda: target.copy_(source))

    def product(self, dtype: str) -> float:
        if dtype not in self._products:
            n = 8192 if self.device == "cuda" else 2048
            a, b = (torch.randn(n, n, device=self.device).to(DTYPES[dtype]) for _ in range(2))
            with precision(dtype):
                self._products[dtype] = n**3 / self._best(lambda: a @ b)
        return self._products[dtype]

    def _best(self, call: Callable) -> float:
        return min(interleave({"": call}, self._clock, budget=0.3, max_rounds=20)[""])


def costs(case: Case, pass_name: str, dtype: str, ceilings: Ceilings) -> dict:
    """The columns that follow from the case alone, and its floor at this machine's ceilings."""
    size = DTYPES[dtype].itemsize
    counts = elements(case)
    compulsory = compulsory_bytes(case, pass_name, size)
    products = multiply_adds(case, pass_name)
    floors = {"memory": compulsory / ceilings.copy, "compute": products / ceilings.product(dtype)}
    name = max(floors, key=floors.get)
    return {
        "case": case.name,
        "shape": shape(case),
        "dtype": dtype,
        "pass": pass_name,
        "argument_bytes": size * (sum(counts.values()) - counts["output"]),
        "output_bytes": size * counts["output"],
        "compulsory_bytes": compulsory,
        "multiply_adds": products,
        "floor_ms": 1e3 * floors[name],
        "floor": name,
        "copy_gbs": ceilings.copy / 1e9,
        "matmul_gflops": 2 * ceilings.product(dtype) / 1e9,
    }


# ------------------------------------------------------------------ measuring


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
    say("float64 truth")
    with precision(dtype):
        given = make_tensors(case, dtype, device) if tensors is None else tensors
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
        del judge
        peaks = {}
        if measure_memory and device == "cpu" and memory.can_measure_cpu():
            say("peak memory")
            wanted = [(contender, pass_name) for contender in ready for pass_name in passes]
            threads = torch.get_num_threads()
            peaks = {
                (contender, pass_name): peak
                for contender, pass_name, peak in memory.peaks_cpu(case, dtype, threads, wanted)
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


def _judge(judge: Judge, contender: Contender, function: Callable, tensors) -> dict:
    """The columns status, note, error, error_of_limit."""
    try:
        errors = judge.errors(contender, function, tensors)
    except Exception as error:
        # One that cannot run (out of memory, no compiler, a refusal) must not end the whole run.
        refused = isinstance(error, RuntimeError) and "cannot run this call" in str(error)
        reason = " ".join(str(error).split())[:300]
        return {
            "status": "refused" if refused else "failed",
            "note": reason if refused else f"{type(error).__name__}: {reason}",
        }
    complaints = judge.complaints(errors)
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


# ------------------------------------------------------------------ rows on disk


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
        command = " ".join(["python", *sys.argv])
        rows = [{**row, **self.environment, "command": command} for row in rows]
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


# ------------------------------------------------------------------ the table


def groups(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(case, dtype, pass) -> its rows, in the order of the file."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["case"], row["dtype"], row["pass"]), []).append(row)
    return found


def table(rows: list[dict]) -> str:
    """One line per row: milliseconds, the ratio of the best naive layer to it, memory, share of the floor."""
    lines = []
    for (_, dtype, pass_name), group in groups(rows).items():
        first = group[0]
        lines.append(
            f"\n{first['case']}  ({first['shape']})  {dtype}  {pass_name}: floor {first['floor_ms']:.2f} ms "
            f"({first['floor']}), arguments {_mib(first['argument_bytes'])}, output {_mib(first['output_bytes'])}"
        )
        lines.append(
            f"  {'':<16}{'layout':<15}{'min ms':>10}{'median':>10}{'best naive':>12}{'peak':>11}{'saved':>11}"
            f"{'of floor':>10}{'error':>10}"
        )
        best = best_naive(group)
        for row in group:
            head = f"  {row['contender']:<16}{row['layout']:<15}"
            if row["status"] != "ok":
                lines.append(f"{head}{row['status'].upper()}: {row['note']}")
                continue
            ratio = "1 (best)" if row is best else "" if best is None else f"{row['ratio']:.2f}x"
            lines.append(
                f"{head}{_ms(row['min_ms']):>10}{_ms(row['median_ms']):>10}{ratio:>12}{_mib(row.get('peak_bytes')):>11}"
                f"{_mib(row.get('saved_bytes')):>11}{row['fraction_of_floor']:>10.0%}{row['error']:>10.0e}"
            )
    return "\n".join(lines)


def summary(rows: list[dict]) -> str:
    """One line per case, dtype and pass, all in the layout (nc: contiguous, cl: channels-last) of the best naive.

    Per backend: its time, how many times faster than the naive layer, share of the floor, and in brackets its peak
    memory over the naive layer's.
    """
    found = groups(rows)
    names = list(dict.fromkeys(row["contender"] for row in rows if row["contender"] != NAIVE))
    head = f"{'case':<18}{'dtype':<10}{'pass':<11}{'naive ms':>12}"
    lines = [head + "".join(f"{name:>30}" for name in names)]
    for (case, dtype, pass_name), group in found.items():
        line = f"{case:<18}{dtype:<10}{pass_name:<11}"
        best = best_naive(group)
        layout = best["layout"] if best else group[0]["layout"]
        short = "nc" if layout == "contiguous" else "cl"
        line += f"{_ms(best['min_ms']):>9} {short}" if best else f"{'not ok':>12}"
        in_layout = {row["contender"]: row for row in group if row["layout"] == layout}
        line += "".join(f"{_brief(in_layout.get(name), best):>30}" for name in names)
        lines.append(line)
    return "\n".join(lines)


def _brief(row: dict | None, best: dict | None) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return row["status"].upper()
    parts = [_ms(row["min_ms"])]
    if best is not None:
        parts.append(f"{row['ratio']:.2f}x")
    parts.append(f"{row['fraction_of_floor']:.0%}")
    if best is not None and row.get("peak_bytes") is not None and best.get("peak_bytes"):
        parts.append(f"({row['peak_bytes'] / best['peak_bytes']:.2f})")
    return " ".join(parts)


def _mib(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MiB"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds >= 1 else f"{milliseconds:.3f}"
