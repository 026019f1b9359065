"""Everything to do on a GPU that is rented by the minute, in one command, in at most eight of them.

    python -m benchmarks.gpu_check --out FOLDER            all of it
    python -m benchmarks.gpu_check --out FOLDER --quick    probes, the cuda backend's tests and the table

In this order: the probes (benchmarks/probes: what the kernels take for granted of a GPU), the tests of the cuda
backend, those of Triton's that a GPU adds something to, the table of times and memory (gpu_table.py), the paper's
networks against plain ones (networks.py), memory errors and races (compute-sanitizer). Each stage has a limit of its
own, and none that fails or overruns stops the next. log.txt, table.csv, networks.csv and summary.txt in the folder are
written while it runs.

Needs torch, Triton, pytest and hypothesis, no network. Uses what cross_build.py left in build/cross, if it is of these
sources and for this GPU; else nvcc compiles, if it is there. The status is non-zero if anything is wrong, fails or
hangs.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from autofocus_kernels import autofocus_conv, show_config, testing, tolerance
from autofocus_kernels.dispatch import PREFERENCE, backend_named

from . import cross_build, gpu_table
from .contenders import DTYPES, precision
from .provenance import ROOT

TABLE = ("-m", "benchmarks.gpu_table")
# Each result on a line of its own, with its reason: a run that is cut off has said what it found.
PYTEST = ("-m", "pytest", "-v", "--tb=short", "-rN", "-p", "benchmarks.failure_reasons")
# Seconds that a stage may take; together they are what a run may take.
LIMITS = {
    "probes": 25,
    "build": 90,
    "tests cuda": 60,
    "tests triton": 75,
    "table": 120,
    "networks": 60,
    "memcheck": 25,
    "racecheck": 25,
}
MORE_DTYPE, PROFILE = 120, 150  # seconds that the table takes longer where they are asked for
# Triton's compiler is what its tests take; so few configurations, each used by several tests. What the interpreter on a
# CPU shows as well is left out. Names of tests and cases as pytest's -k reads them.
TRITON_TESTS = (
    "[triton and (many_tiles and bfloat16 or many_tiles and larger- and not float32 or tf32 and triton-larger] "
    "or repeats and triton-larger-torch.bfloat16 or stream or graph or refused or compiled or elements "
    "or training_step and larger-torch.bfloat16)"
)
# What a sanitizer runs: every kernel, borders, odd channels. Truth is computed on the CPU, where it slows nothing.
SMALL_CASES = ("3d", "channels_30_to_50", "channels_32_to_32", "branch", "stride_2d")
SANITIZER_ERROR = 97


class Result(NamedTuple):
    stage: str
    outcome: str  # ok, FAILED, TIMED OUT or not run
    detail: str
    seconds: float

    @property
    def is_failure(self) -> bool:
        return self.outcome in ("FAILED", "TIMED OUT")

    def __str__(self) -> str:
        return f"{self.stage:<22}{self.outcome:<11}{self.seconds:>6.0f} s  {self.detail}"


class Session:
    """Runs the stages as processes of their own (an illegal access ends the process that made it) and keeps score."""

    def __init__(self, folder: Path, log: TextIO, seconds: float, patience: float = 1.0) -> None:
        self.folder, self.log, self.patience = folder, log, patience
        self.deadline = time.monotonic() + patience * seconds
        self.results: list[Result] = []

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def note(self, stage: str, outcome: str, detail: str = "", seconds: float = 0.0) -> Result:
        self.results.append(Result(stage, outcome, detail, seconds))
        self.say(f">>> {self.results[-1]}")
        return self.results[-1]

    def attempt(self, stage: Callable, *arguments) -> None:
        """A stage that breaks by itself, and not just what it runs, is a failure and no more."""
        try:
            stage(*arguments)
        except Exception as error:
            self.note(stage.__name__, "FAILED", f"{type(error).__name__}: {error}")

    def run(
        self,
        stage: str,
        command: list,
        limit: float,
        environment: dict | None = None,
        judge: Callable[[int, str], tuple[str, str]] | None = None,
    ) -> Result:
        """``judge`` turns status and output into outcome and detail; by default any status but 0 is a failure."""
        limit = min(self.patience * limit, self.left)
        if limit < 5:
            return self.note(stage, "not run", "no time left")
        command = [str(word) for word in command]
        self.say(f"\n=== {stage}, at most {limit:.0f} s: {' '.join(command)}")
        began = time.monotonic()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})},
            )
        except OSError as error:
            return self.note(stage, "FAILED", f"it cannot be run: {error}")
        late = threading.Event()

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        lines = []
        with process:
            for line in process.stdout:
                lines.append(line)
                self.say(line.rstrip("\n"))
            status = process.wait()
        timer.cancel()
        seconds = time.monotonic() - began
        if late.is_set():
            return self.note(stage, "TIMED OUT", lines[-1].strip() if lines else "", seconds)
        outcome = judge or (lambda status, _: ("ok", "") if status == 0 else ("FAILED", f"status {status}"))
        return self.note(stage, *outcome(status, "".join(lines)), seconds)


# ------------------------------------------------------------------ the stages


def architecture() -> str:
    """Of the GPU, as nvcc has it."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + "a" * (major == 9)


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
        folder = session.folder / "probes"
        folder.mkdir(exist_ok=True)
        commands = [cross_build.compile_probe(compiler, s, folder / s.stem, architecture()) for s in sources]
        with ThreadPoolExecutor(len(sources)) as pool:  # one that does not compile fails when it is run
            list(pool.map(lambda command: subprocess.run(list(map(str, command)), timeout=20), commands))
    for source in sources:
        session.run(f"probe {source.stem}", [folder / source.stem], LIMITS["probes"] / len(sources))


def build(session: Session, device: str) -> None:
    if device == "cpu":
        session.note("build", "not run", "nothing to build for a run without a GPU")
        return
    reason = cross_build.refusal(architecture())
    if reason is None:
        cross_build.install(ROOT / "autofocus_kernels")
        session.note("build", "ok", "the cross-built library")
    elif cross_build.tool("nvcc") is None:
        session.note("build", "not run", f"no nvcc, and {reason}: the cuda backend runs if it is built already")
    else:
        major, minor = torch.cuda.get_device_capability()
        session.run(
            "build",
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            LIMITS["build"],
            {"AUTOFOCUS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}" + "a" * (major == 9)},
        )


def backends(device: str) -> list[str]:
    """Those of ``device`` that run, asked of a new process: a library may have been built since this one began."""
    code = (
        "import sys; from autofocus_kernels.dispatch import PREFERENCE, backend_named as module\n"
        "print(*[n for n in PREFERENCE[sys.argv[1]] if n != 'reference' and module(n).unavailable() is None])"
    )
    command = [sys.executable, "-c", code, device]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


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
        session.run(stage, [*command, "tests/test_gpu.py"], LIMITS[stage])


def table(session: Session, device: str, options: argparse.Namespace) -> None:
    command = [sys.executable, *TABLE, "--device", device, "--out", session.folder / "table.csv"]
    if device == "cpu":
        command += ["--cases", "tiny-8x12^3", "tiny-4x9^3-branch", "--dtypes", "float32", "--seconds", "0.02"]
    else:
        command += ["--dtypes", *options.dtypes, "--time-limit", LIMITS["table"] + more_seconds(options) - 15]
        command += ["--profile"] if options.profile else []
    session.run("table", command, LIMITS["table"] + more_seconds(options))


def more_seconds(options: argparse.Namespace) -> int:
    return MORE_DTYPE * (len(options.dtypes) - 1) + PROFILE * options.profile


def networks(session: Session, device: str) -> None:
    command = [sys.executable, "-m", "benchmarks.networks", "--device", device, "--layouts", "channels_last"]
    command += ["--out", session.folder / "networks.csv"]
    if device == "cpu":
        command += ["--networks", "AFN-1", "--passes", "inference", "--inference-size", "31", "--seconds", "0"]
    else:
        command += ["--networks", "AFN-6", "AFN-1", "--dtypes", "bfloat16", "--seconds", "2", "--no-search"]
    session.run("networks", command, LIMITS["networks"])


def sanitize(session: Session, device: str, names: list[str]) -> None:
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
        if device == "cpu" or sanitizer is None:
            session.note(tool, "not run", "no compute-sanitizer or no GPU")
            continue
        small = [sys.executable, "-m", "benchmarks.gpu_check", "--small"]
        options = ["--tool", tool, "--error-exitcode", SANITIZER_ERROR]
        for name in sorted(names):  # cuda first
            session.run(
                f"{tool} {name}",
                [sanitizer, *options, *small, name],
                LIMITS[tool] / len(names),
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                judge,
            )


def check_small(name: str) -> int:
    """Small cases forward and backward on one backend, against float64 truth from the CPU."""
    device = next(device for device, names in PREFERENCE.items() if name in names)
    backend_named(name).checked = False  # its self-check runs the reference, and each kernel once more
    wrong = 0
    for case in (case for case in testing.CASES if case.name in SMALL_CASES):
        for dtype in ("bfloat16", "float32", "tf32"):
            tensors = testing.make_tensors(case, DTYPES[dtype])
            on_device = type(tensors)(*(None if t is None else t.to(device) for t in tensors))

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
    with (options.out / "log.txt").open("a") as log:
        # Without a GPU no machine waits to go back.
        patience = 10 if device == "cpu" else 1
        session = Session(options.out, log, sum(LIMITS.values()) + more_seconds(options), patience)
        run_stages(session, device, options)
        write_summary(session)
    return 1 if any(result.is_failure for result in session.results) else 0


def run_stages(session: Session, device: str, options: argparse.Namespace) -> None:
    session.attempt(probes, session, device)
    session.attempt(build, session, device)
    session.say(show_config())
    names = backends(device)
    if device == "cuda" and not names:
        session.note("backends", "FAILED", "no backend of this package runs on this GPU")
    session.attempt(tests, session, device, [name for name in names if name == "cuda" or not options.quick])
    session.attempt(table, session, device, options)
    if not options.quick:
        session.attempt(networks, session, device)
        session.attempt(sanitize, session, device, names)


def write_summary(session: Session) -> None:
    found = session.folder / "table.csv"
    lines = ["", "times as fast as the best naive layout, on the device (peak memory over the naive layer's)"]
    if found.exists():
        with found.open(newline="") as file:
            lines += gpu_table.summary(list(csv.DictReader(file)))
    lines += ["", *map(str, session.results)]
    session.say("\n".join(lines))
    (session.folder / "summary.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
