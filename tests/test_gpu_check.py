"""benchmarks.gpu_check: its stages, their time, and what they survive; on a GPU that is made up."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from autofocus_kernels import testing
from benchmarks import cases, contenders, cross_build, gpu_check, gpu_table, profiling

ROOT = Path(__file__).resolve().parents[1]
TINY = cases.BY_NAME["tiny-8x12^3"]


WRONG_TABLE = """
import sys
from benchmarks import gpu_table
right = gpu_table.layer
gpu_table.layer = lambda name: right(name) if name == "naive" else lambda **a: FACTOR * right(name)(**a)
sys.exit(gpu_table.main())
"""


@pytest.mark.parametrize("factor, status", [(1.0, 0), (1.001, 1)])
def test_gpu_check_fails_if_a_result_is_wrong(monkeypatch, tmp_path, factor, status):
    script = tmp_path / "wrong_table.py"
    script.write_text(WRONG_TABLE.replace("FACTOR", str(factor)))
    monkeypatch.setattr(gpu_check, "TABLE", (str(script),))
    monkeypatch.setattr(gpu_check, "backends", lambda session, device: ["reference"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert gpu_check.main(["--cpu", "--quick", "--out", str(tmp_path)]) == status
    summary = (tmp_path / "summary.txt").read_text()
    assert ("FAILED" in summary) == ("reference channels_last WRONG" in summary) == (status == 1)
    assert "tiny-8x12^3" in summary
    assert (tmp_path / "table-reference.csv").exists() and "=== table" in (tmp_path / "log.txt").read_text()


@pytest.fixture
def fake_gpu(monkeypatch):
    """What gpu_check would run where a GPU is: (stage, command, seconds from the beginning to its end)."""
    planned = []

    def run(session, stage, command, environment=None, judge=None):
        planned.append((stage, [str(word) for word in command], session.ends[stage]))
        return session.note(stage, "ok")

    monkeypatch.setattr(gpu_check.Session, "run", run)
    monkeypatch.setattr(gpu_check, "architecture", lambda dot="": f"9{dot}0a")
    monkeypatch.setattr(gpu_check.cross_build, "tool", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu_check.cross_build, "install", lambda package: planned.append(("install", [], 0)))
    monkeypatch.setattr(gpu_check.cross_build, "refusal", lambda architecture: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return planned


def test_gpu_check_does_everything_within_eight_minutes(fake_gpu, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    probes = [
        f"probe {name}" for name in ("plane_copies", "shifted_windows", "transposed_windows", "unaligned_ldmatrix")
    ]
    stages = [stage for stage, *_ in fake_gpu]
    assert stages == [
        *probes,
        "install",
        "build",
        "config",
        "backend cuda",
        "backend triton",
        "tests cuda",
        "tests triton",
        "table cuda",
        "table triton",
        "networks",
        "memcheck",
        "racecheck",
    ]
    stages.remove("install")
    assert ["compile probes", *stages] == list(gpu_check.LIMITS)
    assert all(gpu_check.LIMITS[probe] == 15 for probe in probes)
    # Where the earlier ones need all their time, each has its own.
    ends = gpu_check.schedule(gpu_check.parse([])).values()
    assert [end - begin for begin, end in itertools.pairwise([0, *ends])] == list(gpu_check.LIMITS.values())
    assert max(ends) + gpu_check.GRACE <= 480


def test_gpu_check_makes_a_table_of_each_backend(fake_gpu, tmp_path):
    (tmp_path / "table-cuda.csv").write_text("of another run")
    assert gpu_check.main(["--quick", "--out", str(tmp_path)]) == 0
    tables = {stage: " ".join(command) for stage, command, _ in fake_gpu if stage.startswith("table")}
    assert list(tables) == ["table cuda", "table triton"]
    for stage, command in tables.items():
        name = stage.split()[1]
        assert f"--backends {name} --out {tmp_path}/table-{name}.csv" in command
    assert not (tmp_path / "table-cuda.csv").exists()


def test_gpu_check_gives_more_dtypes_more_time(fake_gpu, tmp_path):
    assert gpu_check.main(["--quick", "--dtypes", "bfloat16", "tf32", "--profile", "--out", str(tmp_path)]) == 0
    assert [stage for stage, *_ in fake_gpu][-3:] == ["tests cuda", "table cuda", "table triton"]
    _, command, end = fake_gpu[-2]
    assert "--dtypes bfloat16 tf32" in " ".join(command) and "--profile" in command
    usual = gpu_check.schedule(gpu_check.parse(["--quick"]))["table cuda"]
    assert end - usual == gpu_check.MORE_DTYPE + 2 * gpu_check.PROFILE
    # What the cases may take leaves the profiles their time.
    limit = int(command[command.index("--time-limit") + 1])
    assert limit == pytest.approx(end - 2 * gpu_check.PROFILE - 15, abs=5)


def test_gpu_check_ends_within_ten_minutes_whatever_is_asked_for():
    ends = gpu_check.schedule(gpu_check.parse(["--dtypes", *contenders.DTYPES, "--profile"]))
    assert max(ends.values()) == gpu_check.LONGEST <= 570


def test_gpu_check_goes_on_after_a_stage_that_breaks(fake_gpu, tmp_path, monkeypatch):
    def tests(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu_check, "tests", tests)
    assert gpu_check.main(["--quick", "--out", str(tmp_path)]) == 1
    assert fake_gpu[-1][0] == "table triton"
    assert "out of luck" in (tmp_path / "summary.txt").read_text()


def test_gpu_check_compiles_the_probes_where_nothing_is_cross_built(fake_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.cross_build, "refusal", lambda architecture: "nothing was cross-built")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "COMPILED_PROBES", tmp_path / "probes")
    gpu_check.main(["--quick", "--out", str(tmp_path / "results")])
    run = {stage: command for stage, command, _ in fake_gpu}
    commands = run["compile probes"][-1].splitlines()
    assert [command.split()[-2:] for command in commands[:-1]] == [[str(probe), "&"] for probe in cross_build.PROBES]
    assert all("arch=compute_90a" in command for command in commands[:-1]) and commands[-1] == "wait"
    assert run["probe shifted_windows"] == [str(tmp_path / "probes" / "shifted_windows")]
    assert "setup.py" in run["build"]


def test_gpu_check_runs_probes_that_were_carried_without_their_mode(fake_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.cross_build, "FOLDER", tmp_path)
    probe = tmp_path / "probes" / cross_build.PROBES[0].stem
    probe.parent.mkdir()
    probe.touch(0o644)
    gpu_check.main(["--quick", "--out", str(tmp_path)])
    assert os.access(probe, os.X_OK)


@pytest.fixture
def session(monkeypatch, tmp_path):
    """A session whose processes run a script in place of Python: Python's words are its own."""

    def begin(script):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        monkeypatch.setattr(gpu_check.sys, "executable", str(python))
        return gpu_check.Session(tmp_path, {})

    return begin


def outcomes(session):
    return {f"{result.stage}: {result.detail}": result.outcome for result in session.results}


def test_a_backend_that_crashes_as_it_loads_takes_no_other_with_it(session, tmp_path):
    begun = session('case "$*" in *autofocus_kernels | *cuda) kill -ABRT $$;; esac')
    assert begun.attempt(gpu_check.backends, begun, "cuda") == ["triton"]
    crashed = {"config: status -6: ": "FAILED", "backend cuda: status -6: ": "FAILED"}
    assert outcomes(begun) == {**crashed, "backend triton: ": "ok"}
    assert "backend cuda" in (tmp_path / "summary.txt").read_text()  # already


def test_a_backend_that_does_not_run_is_no_failure_unless_it_is_the_only_one(session):
    begun = session(f'case "$*" in *cuda) echo not built; exit {gpu_check.UNAVAILABLE};; esac')
    assert gpu_check.backends(begun, "cuda") == ["triton"]
    assert not any(result.is_failure for result in begun.results)
    begun = session(f"exit {gpu_check.UNAVAILABLE}")
    assert gpu_check.backends(begun, "cuda") == [] and begun.results[-1].is_failure


def test_gpu_check_asks_whether_a_backend_runs(monkeypatch, capsys):
    def asked(name):
        monkeypatch.setattr(sys, "argv", ["-c", name])
        with pytest.raises(SystemExit) as ended:
            exec(gpu_check.ASK)
        return ended.value.code, capsys.readouterr().out.strip()

    assert asked("reference") == (0, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert asked("cuda") == (gpu_check.UNAVAILABLE, "torch sees no CUDA device")


def test_a_cross_built_library_that_does_not_load_is_built_anew(session, monkeypatch):
    monkeypatch.setattr(gpu_check, "architecture", lambda dot="": f"9{dot}0a")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check.cross_build, "refusal", lambda architecture: None)
    monkeypatch.setattr(gpu_check.cross_build, "install", lambda package: None)
    script = f'case "$1" in -c) echo GLIBC is too old; exit {gpu_check.UNAVAILABLE};; esac'
    does_not_load = {f"build: status {gpu_check.UNAVAILABLE}: GLIBC is too old": "FAILED"}

    monkeypatch.setattr(gpu_check.cross_build, "tool", lambda name: f"/bin/{name}")
    begun = session(script)
    gpu_check.build(begun, "cuda")
    assert outcomes(begun) == {**does_not_load, "build: ": "ok"}
    assert "setup.py" in begun.log.read_text()

    monkeypatch.setattr(gpu_check.cross_build, "tool", lambda name: None)
    begun = session(script)
    gpu_check.build(begun, "cuda")
    assert [result.outcome for result in begun.results] == ["FAILED", "not run"]


def test_the_summary_passes_over_half_a_row(tmp_path):
    begun = gpu_check.Session(tmp_path, {})
    begun.tables.append(tmp_path / "table.csv")
    assert gpu_check.summary(begun)
    row = dict.fromkeys(gpu_table.COLUMNS, "1") | {"case": "whole", "contender": "cuda", "status": "ok"}
    begun.tables[0].write_text(",".join(gpu_table.COLUMNS) + "\n" + ",".join(row.values()) + "\nhalf,1,2")
    assert "whole" in gpu_check.summary(begun) and "half" not in gpu_check.summary(begun)


def test_gpu_check_selects_a_few_tests_of_triton():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-k",
        gpu_check.TRITON_TESTS,
        "tests/test_gpu.py",
    ]
    # What the caller's options add to -q would change how tests are listed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment).stdout.splitlines()
    names = [line for line in listed if line.startswith("tests/test_gpu.py::")]
    assert 10 <= len(names) <= 30 and all("[triton" in name for name in names)
    for wanted in ("many_tiles", "tf32", "repeats", "stream", "cuda_graph", "refused", "compiled", "training_step"):
        assert any(wanted in name for name in names), wanted
    # The longest: all kernels of a dtype. A test a dtype, so that workers share them.
    assert sum("refused" in name for name in names) == 3


TORCH = """
class cuda:
    @staticmethod
    def synchronize():
        if dead:
            raise RuntimeError("an illegal memory access")
dead = []
"""
TESTS = """
import pytest, torch
from helpers.dead_context import a_dead_context_ends_the_process
@pytest.mark.parametrize("number", range(12))
def test_it(number):
    if number in (3, 5):
        torch.dead.append(number)
    assert number != 3 or not torch.dead, "a wrong kernel"
"""


@pytest.mark.parametrize("processes", [["-n", "1"], []], ids=["xdist", "alone"])
def test_a_dead_context_takes_one_test_and_says_why_at_once(tmp_path, processes):
    """A fake torch, whose GPU is dead after the third test, that fails, and after the fifth, that passes."""
    if processes:
        pytest.importorskip("xdist")
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_it.py").write_text(TESTS)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'tests'}", "PYTEST_ADDOPTS": ""}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist" if processes else ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, *gpu_check.PYTEST, "--rootdir", tmp_path, *processes, tmp_path / "test_it.py"]
    result = subprocess.run(list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True)
    at_once, _, summary = result.stdout.partition("= FAILURES =")
    assert result.returncode == 1 and "FAILED (AssertionError: a wrong kernel" in at_once
    reason = "leaves a GPU that cannot be used: an illegal memory access"
    if processes:
        assert f"test_it[3] {reason}" in result.stderr and f"test_it[5] {reason}" in result.stderr
        assert "3 failed, 11 passed" in summary
    else:
        assert f"test_it[3] {reason}" in summary


def ends(process):
    """Whether process number ``process`` is gone soon, or a zombie that nobody asks how it ended."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_what_nsight_compute_looks_into_ends_with_it(monkeypatch, tmp_path):
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {tmp_path}/inner\nwait\n")
    ncu.chmod(0o755)
    monkeypatch.setattr(profiling, "tool", lambda name: ncu)
    monkeypatch.setattr(profiling, "SECONDS", 1)
    assert "not done in 1 s" in profiling.by_counter(TINY, "bfloat16", "cuda", "channels_last")
    assert ends((tmp_path / "inner").read_text().strip())


def test_gpu_check_stages(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    session = gpu_check.Session(tmp_path, {"too late": 0})
    assert not session.run("fine", ["echo", "hello"]).is_failure
    assert session.run("broken", ["sh", "-c", "echo no luck; exit 3"]).detail == "status 3: no luck"
    assert "cannot be run" in session.run("not there", [tmp_path / "nothing"]).detail
    assert session.run("too late", ["true"]).outcome == "not run"
    session.run("path", ["sh", "-c", "echo $PYTHONPATH"])
    log = (tmp_path / "log.txt").read_text()
    assert "hello" in log and f"{ROOT}:/elsewhere" in log


def late_as_soon_as(condition, monkeypatch):
    """The time of a stage is over, not when it is, but when ``condition`` holds."""
    show = gpu_check.show_until_end

    def shown(process, written, seconds):
        if seconds == gpu_check.GRACE:
            return show(process, written, seconds)
        while not condition() and process.poll() is None:
            time.sleep(0.01)
        return show(process, written, 0)

    monkeypatch.setattr(gpu_check, "show_until_end", shown)


@pytest.mark.parametrize("answer", ["here; exit", "but there"])
def test_a_stage_that_is_late_is_interrupted_and_then_killed(tmp_path, monkeypatch, answer):
    """What it says when it is interrupted is kept, whether it then ends or not; nothing of it is left.

    Also where gpu_check was started in the background, and so ignores interrupts itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    session, inner = gpu_check.Session(tmp_path, {}), tmp_path / "inner"
    late_as_soon_as(lambda: inner.exists() and inner.read_text(), monkeypatch)
    script = f"trap 'echo {answer}' INT; sleep 60 & echo $! > {inner}; while :; do wait; done"
    late = session.run("late", ["sh", "-c", script])
    assert (late.outcome, late.detail) == ("TIMED OUT", answer.removesuffix("; exit"))
    assert late.is_failure and ends(inner.read_text().strip())


def test_a_stage_ends_with_its_process_and_not_with_what_it_leaves_behind(tmp_path):
    """One child is in the process's group and is killed with it, one is not; both have its output open."""
    session = gpu_check.Session(tmp_path, {})
    leaves = session.run("leaves", ["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/inner; setsid sleep 10 & exit 0"])
    assert leaves.outcome == "ok" and leaves.seconds < 8
    assert ends((tmp_path / "inner").read_text().strip())


def test_a_test_stage_that_is_late_says_what_failed_and_where(tmp_path, monkeypatch):
    """pytest, interrupted in a test that hangs, prints the traceback of one that failed."""
    (tmp_path / "test_it.py").write_text("import time\ndef test_a(): assert 0, 'me'\ndef test_b(): time.sleep(60)\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider")
    session = gpu_check.Session(tmp_path, {})
    late_as_soon_as(lambda: "test_b" in session.log.read_text().rpartition("FAILED")[2], monkeypatch)
    command = [sys.executable, *gpu_check.PYTEST, "--rootdir", tmp_path, tmp_path / "test_it.py"]
    assert session.run("tests", command).outcome == "TIMED OUT"
    log = session.log.read_text()
    assert "FAILED (AssertionError: me" in log and "test_it.py:2: in test_a" in log and "1 failed" in log


def test_gpu_check_small_cases_on_the_reference():
    names = {case.name for case in testing.CASES}
    assert set(gpu_check.SMALL_CASES) <= names
    assert gpu_check.check_small("reference") == 0


def test_gpu_check_small_cases_check_each_kernel_once(monkeypatch):
    cpu = gpu_check.backend_named("cpu")
    monkeypatch.setattr(cpu, "checked", True, raising=False)
    monkeypatch.setattr(gpu_check, "SMALL_CASES", ("3d",))
    monkeypatch.setattr(gpu_check.testing, "evaluate", lambda *_: {})
    monkeypatch.setattr(gpu_check, "judge_small", lambda *_: None)
    assert gpu_check.check_small("cpu") == 0 and not cpu.checked
