"""Everything to check and measure on a GPU, in one command, in at most eight minutes.

    python -m benchmarks.gpu_check --out FOLDER            all of it
    python -m benchmarks.gpu_check --out FOLDER --quick    probes, the cuda backend's tests and the table

In this order: the probes (benchmarks/probes: what the kernels take for granted of a GPU), the tests of the cuda
backend, those of Triton's that a GPU adds something to, the table of times and memory (gpu_table.py), the paper's
networks against plain ones (networks.py), memory errors and races of the cuda backend (compute-sanitizer). Each stage
is a process, of one backend where it can be, so that a crash takes nothing else with it. Each has a deadline: what one
stage leaves of its time the next may use, but none can take another's. log.txt, table-BACKEND.csv, networks.csv and
summary.txt in the folder are written while it runs.

Needs torch, Triton, pytest and hypothesis, no network. Uses what cross_build.py left in build/cross, if it is of these
sources, for this GPU and loads; else nvcc compiles, if it is there. The status is non-zero if anything is wrong, fails
or hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from autofocus_kernels import autofocus_conv, testing, tolerance
from autofocus_kernels.dispatch import PREFERENCE, backend_named

from . import cross_build, gpu_table
from .contenders import DTYPES, precision
from .provenance import ROOT

COMPILED_PROBES = ROOT / "build" / "probes"  # those that were not cross-built; programs are no results
TABLE = ("-m", "benchmarks.gpu_table")
# Each result on a line of its own, with its reason: a run that is cut off has said what it found.
PYTEST = ("-m", "pytest", "-v", "--tb=short", "-rN", "-p", "benchmarks.failure_reasons")
# Seconds that each stage may take, whatever the others do; together they are what a run may take.
LIMITS = {
    "compile probes": 20,
    **{f"probe {source.stem}": 15 for source in cross_build.PROBES},  # a copy that never lands gives up after 11
    "build": 70,
    "config": 10,
    "backend cuda": 10,
    "backend triton": 10,
    "tests cuda": 60,
    "tests triton": 55,
    "table cuda": 40,
    "table triton": 75,
    "networks": 40,
    "memcheck": 15,
    "racecheck": 10,
}
MORE_DTYPE, PROFILE = 60, 75  # seconds that a table takes longer where they are asked for
LONGEST = 570  # for all: many a machine ends a command after ten minutes
GRACE = 5  # seconds from an interrupt, after which pytest says what it has found, to the end of it
# Most of the time of Triton's tests is its compiler's, so these share few configurations. What the interpreter on a CPU
# shows as well is left out. Names of tests and cases as pytest's -k reads them.
TRITON_TESTS = (
    "[triton and (many_tiles and bfloat16 or many_tiles and larger- and not float32 or tf32 and triton-larger] "
    "or repeats and triton-larger-torch.bfloat16 or stream or graph or refused or compiled or elements "
    "or training_step and larger-torch.bfloat16)"
)
# What a sanitizer runs: every kernel, borders, odd channels. Truth is computed on the CPU, where it slows nothing.
SMALL_CASES = ("3d", "channels_30_to_50", "channels_32_to_32", "branch", "stride_2d")
SANITIZER_ERROR, UNAVAILABLE = 97, 3  # statuses of processes
ASK = f"""
import sys
from autofocus_kernels.dispatch import backend_named
reason = backend_named(sys.argv[1]).unavailable()
print(reason or "")
sys.exit({UNAVAILABLE} if reason else 0)
"""


class Result(NamedTuple):
    stage: str
    outcome: str  # ok, FAILED, TIMED OUT or not run
    detail: str
    seconds: float

    @property
    def is_failure(self) -> bool:
        return self.outcome in ("FAILED", "TIMED OUT")

    def __str__(self) -> str:
        return f"{self.stage:<26}{self.outcome:<11}{self.seconds:>6.0f} s  {self.detail}"


def profile_seconds(options: argparse.Namespace) -> int:
    """Of one backend."""
    return PROFILE * len(options.dtypes) if options.profile else 0


def schedule(options: argparse.Namespace) -> dict[str, float]:
    """Stage -> seconds from the beginning to when it must have ended."""
    more = MORE_DTYPE * (len(options.dtypes) - 1) + profile_seconds(options)
    limits = [limit + more if stage.startswith("table") else limit for stage, limit in LIMITS.items()]
    return {stage: min(end, LONGEST) for stage, end in zip(LIMITS, itertools.accumulate(limits))}


class Session:
    """Runs the stages as processes of their own (an illegal access ends the process that made it) and keeps score."""

    def __init__(self, folder: Path, ends: dict[str, float]) -> None:
        self.folder, self.ends = folder, ends
        self.log = folder / "log.txt"
        self.began = time.monotonic()
        self.results: list[Result] = []
        self.tables: list[Path] = []
        # If a shell started this in the background it ignores interrupts, and so would the processes that it starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def left(self, stage: str) -> float:
        return self.began + self.ends.get(stage, LONGEST) - time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a") as log:
            print(text, file=log)

    def note(self, stage: str, outcome: str, detail: str = "", seconds: float = 0.0) -> Result:
        self.results.append(Result(stage, outcome, detail, seconds))
        self.say(f">>> {self.results[-1]}")
        (self.folder / "summary.txt").write_text(summary(self))
        return self.results[-1]

    def attempt(self, stage: Callable, *arguments):
        """What a stage returns; or None, after a note, if the stage itself fails and not only what it runs."""
        try:
            return stage(*arguments)
        except Exception as error:
            self.note(stage.__name__, "FAILED", f"{type(error).__name__}: {error}")

    def run(
        self,
        stage: str,
        command: list,
        environment: dict | None = None,
        judge: Callable[[int, str], tuple[str, str]] | None = None,
    ) -> Result:
        """``judge`` turns status and output into outcome and detail; by default any status but 0 is a failure."""
        limit = self.left(stage)
        if limit < GRACE:
            return self.note(stage, "not run", "no time left")
        command = [str(word) for word in command]
        self.say(f"\n=== {stage}, at most {limit:.0f} s: {' '.join(command)}")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **(environment or {})}
        began = time.monotonic()
        with self.log.open("ab") as log, self.log.open(errors="replace") as written:
            written.seek(0, os.SEEK_END)
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, **settings},
                )
            except OSError as error:
                return self.note(stage, "FAILED", f"it cannot be run: {error}")
            try:
                output = show_until_end(process, written, limit)
                late = process.poll() is None
                if late:
                    process.send_signal(signal.SIGINT)
                    output += show_until_end(process, written, GRACE)
            finally:
                with contextlib.suppress(ProcessLookupError):  # with all that it started
                    os.killpg(process.pid, signal.SIGKILL)
            output += show_until_end(process, written, GRACE)
        seconds = time.monotonic() - began
        last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")
        if late:
            return self.note(stage, "TIMED OUT", last, seconds)
        status = process.returncode
        outcome, detail = judge(status, output) if judge else ("FAILED" if status else "ok", "")
        return self.note(stage, outcome, detail or (f"status {status}: {last}" if status else ""), seconds)


def show_until_end(process: subprocess.Popen, written: TextIO, seconds: float) -> str:
    """Shows what is written until the process has ended, or ``seconds`` are over; returns it.

    The end of a pipe would not tell that it has ended: processes that it left behind may hold that open.
    """
    deadline, shown = time.monotonic() + seconds, []
    while True:
        is_last = process.poll() is not None or time.monotonic() > deadline
        shown.append(written.read())
        print(shown[-1], end="", flush=True)
        if is_last:
            return "".join(shown)
        time.sleep(0.05)


# ------------------------------------------------------------------ the stages


def architecture(dot: str = "") -> str:
    """Of the GPU, as nvcc has it; torch writes it with a dot."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{dot}{minor}" + "a" * (major == 9)


def probes(session: Session, device: str) -> None:
    """Each a program of its own; a failing one says what the kernels may not take for granted here."""
    sources = cross_build.PROBES
    if device == "cpu":
        session.note("probes", "not run", "they ask a GPU")
        return
    folder, compiler = cross_build.FOLDER / "probes", cross_build.tool("nvcc")
    if cross_build.refusal(architecture()) is not None:
        if compiler is None:
            session.note("probes", "not run", f"no nvcc, and {cross_build.refusal(architecture())}")
            return
        folder = COMPILED_PROBES
        folder.mkdir(parents=True, exist_ok=True)
        commands = [cross_build.compile_probe(compiler, s, folder / s.stem, architecture()) for s in sources]
        # All at once; one that does not compile fails when it is run.
        script = "".join(f"{shlex.join(map(str, command))} &\n" for command in commands) + "wait"
        session.run("compile probes", ["sh", "-c", script])
    for source in sources:
        probe = folder / source.stem
        if probe.exists():
            probe.chmod(0o755)  # what was carried here may have lost that
        session.run(f"probe {source.stem}", [probe])


def build(session: Session, device: str) -> None:
    if device == "cpu":
        session.note("build", "not run", "nothing to build for a run without a GPU")
        return
    reason = cross_build.refusal(architecture())
    if reason is None:
        cross_build.install(ROOT / "autofocus_kernels")
        if runs(session, "build", "cuda", unavailable="FAILED"):
            return
        reason = "the cross-built library does not load"
    if cross_build.tool("nvcc") is None:
        session.note("build", "not run", f"no nvcc, and {reason}: the cuda backend runs if it is built already")
        return
    session.run(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        {"AUTOFOCUS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": architecture(".")},
    )


def runs(session: Session, stage: str, name: str, unavailable: str = "not run") -> bool:
    """Whether backend ``name`` runs, asked of a new process: a library that was just built may end the process."""

    def judge(status: int, _: str) -> tuple[str, str]:
        return {0: "ok", UNAVAILABLE: unavailable}.get(status, "FAILED"), ""

    return session.run(stage, [sys.executable, "-c", ASK, name], judge=judge).outcome == "ok"


def backends(session: Session, device: str) -> list[str]:
    """Those of ``device`` that run."""
    session.run("config", [sys.executable, "-m", "autofocus_kernels"])
    names = [name for name in sorted(PREFERENCE[device]) if name != "reference"]  # cuda first
    found = [name for name in names if runs(session, f"backend {name}", name)]
    if device == "cuda" and not found:
        session.note("backends", "FAILED", "no backend of this package runs on this GPU")
    return found


def tests(session: Session, device: str, names: list[str]) -> None:
    for name in ("cuda", "triton"):
        stage = f"tests {name}"
        if device == "cpu" or name not in names:
            session.note(stage, "not run", "the backend does not run here")
            continue
        wanted = TRITON_TESTS if name == "triton" else "[cuda or gradcheck"
        command = [sys.executable, *PYTEST, "-k", wanted]
        if importlib.util.find_spec("xdist"):
            command += ["-n", "8"]
        session.run(stage, [*command, "tests/test_gpu.py"])


def tables(session: Session, device: str, names: list[str], options: argparse.Namespace) -> None:
    """One a backend, each against the naive layer."""
    for name in names:
        stage = f"table {name}"
        out = session.folder / f"table-{name}.csv"
        out.unlink(missing_ok=True)  # that of another run is no result of this one
        session.tables.append(out)
        command = [sys.executable, *TABLE, "--device", device, "--backends", name, "--out", out]
        if device == "cpu":
            command += ["--cases", "tiny-8x12^3", "tiny-4x9^3-branch", "--dtypes", "float32", "--seconds", "0.02"]
        else:
            limit = session.left(stage) - profile_seconds(options) - 15
            command += ["--dtypes", *options.dtypes, "--time-limit", round(limit)]
            command += ["--profile"] if options.profile else []
        session.run(stage, command)


def networks(session: Session, device: str) -> None:
    command = [sys.executable, "-m", "benchmarks.networks", "--device", device, "--layouts", "channels_last"]
    command += ["--anew", "--out", session.folder / "networks.csv"]
    if device == "cpu":
        command += ["--networks", "AFN-1", "--passes", "inference", "--inference-size", "31", "--seconds", "0"]
    else:
        command += ["--networks", "AFN-6", "AFN-1", "--dtypes", "bfloat16", "--seconds", "2", "--no-search"]
    session.run("networks", command)


def sanitize(session: Session, names: list[str]) -> None:
    sanitizer = cross_build.tool("compute-sanitizer")

    def judge(status: int, output: str) -> tuple[str, str]:
        if status == SANITIZER_ERROR:
            return "FAILED", next((line for line in output.splitlines() if "ERROR SUMMARY" in line), "")
        if status == 0:
            return "ok", ""
        if "========= ERROR SUMMARY" in output or "WRONG" in output:
            return "FAILED", f"status {status}"
        return "not run", "the tool does not work on this machine: " + output.strip()[-200:]

    for tool in ("memcheck", "racecheck"):
        if "cuda" not in names or sanitizer is None:  # of Triton's kernels most of the time would be their compiler's
            session.note(tool, "not run", "no compute-sanitizer or no cuda backend")
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", SANITIZER_ERROR]
        command += [sys.executable, "-m", "benchmarks.gpu_check", "--small", "cuda"]
        session.run(tool, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, judge)


def check_small(name: str) -> int:
    """Small cases forward and backward on one backend, against float64 truth from the CPU."""
    device = next(device for device, names in PREFERENCE.items() if name in names)
    backend_named(name).checked = False  # its self-check runs the reference, and each kernel once more
    wrong = 0
    for case in (case for case in testing.CASES if case.name in SMALL_CASES):
        for dtype in ("bfloat16", "float32", "tf32"):
            tensors = testing.make_tensors(case, DTYPES[dtype])
            on_device = testing.Tensors(*(None if t is None else t.to(device) for t in tensors))

            def function(**arguments) -> torch.Tensor:
                return autofocus_conv(**arguments, backend=name)

            with precision(dtype, search=False):
                results = testing.evaluate(function, case, on_device)
            label = f"{name}, {case.name}, {dtype}"
            try:
                judge_small({key: value.cpu() for key, value in results.items()}, case, tensors, dtype, label)
                print("right:", label, flush=True)
            except AssertionError as error:
                wrong += 1
                print("WRONG:", error, flush=True)
    return 1 if wrong else 0


def judge_small(results: dict, case: testing.Case, tensors: testing.Tensors, dtype: str, label: str) -> None:
    """As testing.judge, which knows float32 but not what TF32 may be off by."""
    if dtype != "tf32":
        testing.judge(results, case, tensors, label)
        return
    for name, expected in testing.truth(case, tensors).items():
        error = testing.relative_error(results[name], expected)
        if not error <= tolerance.TF32_EPS:
            raise AssertionError(f"{label}: {name}: relative error {error:.2e}, allowed {tolerance.TF32_EPS:.2e}")


# ------------------------------------------------------------------ the command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="of the table")
    parser.add_argument("--profile", action="store_true", help="the table also says which kernels its calls run")
    parser.add_argument("--cpu", action="store_true", help="the same steps on tiny problems without a GPU, to try them")
    parser.add_argument("--small", metavar="BACKEND", help="only check a few small cases on this backend")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.small:
        return check_small(options.small)
    device = "cpu" if options.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here (--cpu tries the steps without one)")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    # Without a GPU nothing is in a hurry.
    session = Session(options.out, {} if options.cpu else schedule(options))
    run_stages(session, device, options)
    session.say(summary(session))
    return 1 if any(result.is_failure for result in session.results) else 0


def run_stages(session: Session, device: str, options: argparse.Namespace) -> None:
    session.attempt(probes, session, device)
    session.attempt(build, session, device)
    names = session.attempt(backends, session, device) or []
    session.attempt(tests, session, device, [name for name in names if name == "cuda" or not options.quick])
    session.attempt(tables, session, device, names, options)
    if not options.quick:
        session.attempt(networks, session, device)
        session.attempt(sanitize, session, names)


def summary(session: Session) -> str:
    rows = []
    for table in filter(Path.exists, session.tables):
        with table.open(newline="") as file:  # a process that was killed may leave half a row
            rows += [row for row in csv.DictReader(file) if row["command"]]
    lines = ["", "times as fast as the best naive layout, on the device (peak memory over the naive layer's)"]
    return "\n".join([*lines, *gpu_table.summary(rows), "", *map(str, session.results), ""])


if __name__ == "__main__":
    sys.exit(main())
