"""Everything to do on a machine with a GPU, in one command: build, test, look for memory errors, measure.

    python benchmarks/gpu_check.py --out FOLDER            under nine minutes
    python benchmarks/gpu_check.py --out FOLDER --quick    under three

Needs torch, Triton, pytest and hypothesis, no network. Compiles the CUDA library for this GPU if nvcc is there. Writes
log.txt, benchmark.csv and summary.txt to the folder while it runs, so that a run that is cut off loses little; a
benchmark.csv that is there already is continued. The status is non-zero if anything is wrong, fails or hangs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "benchmarks" / "run.py"
sys.path.insert(0, str(ROOT))

import torch

from autofocus_kernels import autofocus_conv, show_config, testing
from autofocus_kernels.dispatch import PREFERENCE

# Seconds: of everything, and of each stage at most. The benchmark takes what the stages before it leave.
LIMITS = {
    True: {"all": 165, "build": 75, "small": 30, "tests": 45, "memcheck": 0, "racecheck": 0},
    False: {"all": 525, "build": 150, "small": 40, "tests": 120, "memcheck": 40, "racecheck": 40},
}
# What a sanitizer runs: every kernel, borders, odd channels. Truth is computed on the CPU, where it slows nothing.
SMALL_CASES = ("3d", "channels_30_to_50", "channels_32_to_32", "branch", "stride_2d")
SANITIZER_ERROR = 97
FIRST_CASES = ("32x128^3", "64x96^3", "afn6-2", "afn6-6", "32x64^3", "64x48^3")


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

    def __init__(self, folder: Path, log: TextIO, seconds: float) -> None:
        self.folder, self.log = folder, log
        self.deadline = time.monotonic() + seconds
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

    def run(
        self,
        stage: str,
        command: list,
        limit: float,
        environment: dict | None = None,
        judge: Callable[[int, str], tuple[str, str]] | None = None,
    ) -> Result:
        """``judge`` turns status and output into outcome and detail; by default any status but 0 is a failure."""
        limit = min(limit, self.left)
        if limit < 5:
            return self.note(stage, "not run", "no time left")
        command = [str(word) for word in command]
        self.say(f"\n=== {stage}, at most {limit:.0f} s: {' '.join(command)}")
        began = time.monotonic()
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


def build(session: Session, limits: dict, device: str) -> None:
    nvcc = shutil.which("nvcc") or next(iter(Path("/usr/local").glob("cuda*/bin/nvcc")), None)
    if device == "cpu":
        session.note("build", "not run", "nothing to build for a run without a GPU")
    elif nvcc is None:
        session.note("build", "not run", "no nvcc: the cuda backend takes no part unless it is built already")
    else:
        major, minor = torch.cuda.get_device_capability()
        session.run(
            "build",
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            limits["build"],
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


def tests(session: Session, limits: dict, quick: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x" if quick else "--maxfail=30", "-rs", "tests/test_gpu.py"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    if quick:
        command += ["-k", "not truth or bfloat16 or tf32"]
    session.run("tests", command, limits["tests"])


def sanitize(session: Session, limits: dict, device: str, names: list[str]) -> None:
    sanitizer = shutil.which("compute-sanitizer") or next(
        iter(Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )

    def judge(status: int, output: str) -> tuple[str, str]:
        if status == SANITIZER_ERROR:
            return "FAILED", next((line for line in output.splitlines() if "ERROR SUMMARY" in line), "")
        if status == 0:
            return "ok", ""
        if "========= ERROR SUMMARY" in output or "WRONG" in output:
            return "FAILED", f"status {status}"
        return "not run", "the tool does not work on this machine: " + output.strip()[-200:]

    for tool in ("memcheck", "racecheck"):
        if device == "cpu" or sanitizer is None or not limits[tool]:
            reason = "left out of --quick" if sanitizer and device != "cpu" else "no compute-sanitizer or no GPU"
            session.note(tool, "not run", reason)
            continue
        for name in names:
            session.run(
                f"{tool} {name}",
                [
                    sanitizer,
                    "--tool",
                    tool,
                    "--error-exitcode",
                    SANITIZER_ERROR,
                    sys.executable,
                    __file__,
                    "--small",
                    name,
                ],
                limits[tool],
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                judge,
            )


def benchmark(session: Session, device: str, quick: bool, reserve: float) -> None:
    """16 bits on every case first; then the other dtypes, for as long as there is time."""
    csv = session.folder / "benchmark.csv"
    common = [sys.executable, RUN, "--device", device, "--out", csv]
    if device == "cpu":
        tiny = ["--cases", "tiny-8x12^3", "tiny-4x9^3-branch", "--dtypes", "float32", "--seconds", "0.02"]
        parts = {"benchmark": [*tiny, "--no-memory", "--compiled"]}
    elif quick:
        parts = {"benchmark bfloat16": ["--dtypes", "bfloat16", "--seconds", "0.2", "--cases", *FIRST_CASES]}
    else:
        from cases import GPU_CASES

        first = [*FIRST_CASES, *(case.name for case in GPU_CASES if case.name not in FIRST_CASES)]
        compiled = ["--compiled", "32x128^3", "afn6-2", "64x48^3"]
        parts = {
            "benchmark bfloat16": ["--dtypes", "bfloat16", "--cases", *first, *compiled],
            "benchmark, the rest": ["--dtypes", "float16", "tf32", "float32", "--cases", *first, "--compiled"],
        }
    for name, options in parts.items():
        left = session.left - reserve
        # It stops by itself well before it would be stopped: a case that has begun may take this long.
        session.run(name, [*common, *options, "--time-limit", max(1.0, left - 45)], left)


def check_small(name: str) -> int:
    """Small cases forward and backward on one backend, against float64 truth from the CPU."""
    device = next(device for device, names in PREFERENCE.items() if name in names)
    wrong = 0
    for case in (case for case in testing.CASES if case.name in SMALL_CASES):
        for dtype in (torch.bfloat16, torch.float32):
            tensors = testing.make_tensors(case, dtype)
            on_device = type(tensors)(*(None if t is None else t.to(device) for t in tensors))

            def function(**arguments) -> torch.Tensor:
                return autofocus_conv(**arguments, backend=name)

            results = testing.evaluate(function, case, on_device)
            label = f"{name}, {case.name}, {dtype}"
            try:
                testing.judge({key: value.cpu() for key, value in results.items()}, case, tensors, label)
                print("right:", label, flush=True)
            except AssertionError as error:
                wrong += 1
                print("WRONG:", error, flush=True)
    return 1 if wrong else 0


# ------------------------------------------------------------------ the command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="the same steps on tiny problems without a GPU, to try them")
    parser.add_argument("--small", metavar="BACKEND", help="only check a few small cases on this backend")
    options = parser.parse_args(arguments)
    if options.small:
        # Exact float32, as the tolerances assume.
        torch.backends.cudnn.allow_tf32 = False
        return check_small(options.small)
    device = "cpu" if options.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here (--cpu tries the steps without one)")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    limits = LIMITS[options.quick]
    if device == "cpu":
        limits = {stage: 10 * seconds for stage, seconds in limits.items()}  # no machine waits to go back
    with (options.out / "log.txt").open("a") as log:
        session = Session(options.out, log, limits["all"])
        build(session, limits, device)
        session.say(show_config())
        names = backends(device)
        if device == "cuda" and not names:
            session.note("backends", "FAILED", "no backend of this package runs on this GPU")
        for name in names:
            session.run(f"small cases {name}", [sys.executable, __file__, "--small", name], limits["small"])
        tests(session, limits, options.quick)
        reserve = len(names) * (limits["memcheck"] + limits["racecheck"]) if device == "cuda" else 0
        benchmark(session, device, options.quick, reserve)
        sanitize(session, limits, device, names)
        write_summary(session)
    return 1 if any(result.is_failure for result in session.results) else 0


def write_summary(session: Session) -> None:
    import harness

    csv = session.folder / "benchmark.csv"
    lines = ["", "times as fast as the best naive layer, share of the floor (peak memory over the naive layer's)"]
    lines += [harness.summary(harness.read(csv))] if csv.exists() else ["no benchmark"]
    lines += ["", *map(str, session.results)]
    session.say("\n".join(lines))
    (session.folder / "summary.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
