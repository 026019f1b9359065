"""The benchmark harness: it refuses what is wrong, loses nothing to a kill, and counts memory right."""

import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from autofocus_kernels import autofocus_conv, testing
from benchmarks import (
    cases,
    contenders,
    cross_build,
    gpu_check,
    gpu_table,
    measurement,
    memory,
    networks,
    plot,
    profiling,
    provenance,
    roofline,
    run,
    tables,
)
from benchmarks.contenders import NAIVE, Contender
from benchmarks.rows import COLUMNS, read

ROOT = Path(__file__).resolve().parents[1]

TINY = cases.BY_NAME["tiny-8x12^3"]
SOON = ["--seconds", "0.01", "--no-memory", "--compiled", "--dtypes", "float32"]


@pytest.fixture(scope="module")
def ceilings():
    found = roofline.Ceilings.__new__(roofline.Ceilings)
    found.copy, found.product = 1e10, lambda dtype: 1e10
    return found


def measure(case, names, ceilings, passes=("inference", "training"), **options):
    entrants = [Contender(name, layout) for name in names for layout in contenders.LAYOUTS]
    options = {"seconds": 0.01, "measure_memory": False, **options}
    return list(measurement.measure(case, "float32", passes, entrants, "cpu", ceilings, **options))


# ------------------------------------------------------------------ cases


def test_afn6_cases_are_the_layers_of_the_paper():
    """203.1 G multiply-adds of one 75^3 segment are in the branches: K convolutions each, 47^3 logits at the end."""
    layers = cases.PLAIN_AFN6
    total = sum(
        case.num_branches * 27 * case.channels * case.out_channels * math.prod(case.geometry.output_size)
        for case in layers
    )
    assert round(total / 1e9, 1) == 203.1
    assert layers[0].size == (71, 71, 71) and layers[-1].geometry.output_size == (47, 47, 47)
    for case, following in itertools.pairwise(layers):
        assert case.geometry.output_size == following.size and case.out_channels == following.channels


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_multiply_adds_count_the_taps_inside(padding):
    """Against a convolution of ones: with a weight of ones it counts the taps of the smallest dilation."""
    case = testing.Case("counted", (9, 7, 12), channels=3, out_channels=5, dilations=(2, 6), padding=padding, batch=2)
    ones = torch.ones(1, 1, *case.size)
    counted = autofocus_conv(
        ones,
        torch.ones(1, 1, 3, 3, 3),
        torch.ones(1, 1, *case.geometry.output_size),
        dilations=(2,),
        padding=padding,
        backend="reference",
    )
    assert cases.multiply_adds(case, "inference") == 2 * 3 * 5 * counted.sum().item()
    assert cases.multiply_adds(case, "training") == 4 * cases.multiply_adds(case, "inference")


def test_compulsory_bytes_are_those_of_the_tensors():
    case = cases.BY_NAME["tiny-4x9^3-branch"]
    tensors = testing.make_tensors(case)
    given = sum(tensor.nbytes for tensor in tensors.arguments().values())
    output = tensors.grad_output.nbytes
    assert cases.compulsory_bytes(case, "inference", 4) == given + output
    assert cases.compulsory_bytes(case, "training", 4) == given + output + given + output + given


# ------------------------------------------------------------------ right before fast


def wrong_layer(name, where):
    """Contender ``name`` with an error in the output, or only in one gradient, or only without a graph."""
    right = contenders.layer("reference")

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.001 * grad

    def layer(input, weight, attention, **rest):
        if where == "attention":
            attention = Off.apply(attention)
        output = right(input=input, weight=weight, attention=attention, **rest)
        if where == "output" or (where == "inference" and not torch.is_grad_enabled()):
            output = output + 1e-3 * output.detach().roll(1, -1)
        if where == "nan":
            output = output.clone()
            output[0, 0, 0, 0, 0] = math.nan
        if where == "one element":  # which the norm of them all would not show
            output = output.clone()
            output[0, 0, 0, 0, 0] += 2e-5 * output.detach().abs().max()
        return output

    return contenders.layer(name) if name == NAIVE else layer


@pytest.mark.parametrize("where", ["output", "attention", "inference", "nan", "one element"])
def test_a_wrong_contender_gets_no_time(monkeypatch, ceilings, where):
    monkeypatch.setattr(measurement, "layer", lambda name: wrong_layer(name, where))
    for rows in measure(TINY, [NAIVE, "broken"], ceilings):
        statuses = {row["contender"]: row for row in rows}
        assert statuses[NAIVE]["status"] == "ok" and statuses[NAIVE]["min_ms"] > 0
        assert statuses["broken"]["status"] == "wrong" and "min_ms" not in statuses["broken"]
        assert ("attention" if where == "attention" else "output") in statuses["broken"]["note"]
        assert len(measurement.failures(rows)) == 2  # one per layout
        assert "WRONG" in tables.table(rows) and "WRONG" in tables.summary(rows)


def test_a_contender_that_raises_does_not_end_the_run(monkeypatch, ceilings):
    def layer(name):
        def refusing(**arguments):
            raise RuntimeError(messages[name])

        return contenders.layer(name) if name == NAIVE else refusing

    found = f"forward for {'many channels, ' * 50}: output is off by 0.3"
    messages = {"x": "not today", "w": f"its self-check fails, {found}"}
    messages = {name: f"backend {name!r} cannot run this call: {why}" for name, why in messages.items()} | {"y": "boom"}
    monkeypatch.setattr(measurement, "layer", layer)
    (rows,) = measure(TINY, [NAIVE, "x", "y", "w"], ceilings, passes=("inference",))
    assert [row["status"] for row in rows[::2]] == ["ok", "refused", "failed", "wrong"]
    assert "not today" in rows[2]["note"] and "boom" in rows[4]["note"] and "off by 0.3" in rows[6]["note"]
    assert len(measurement.failures(rows)) == 4  # a refusal is no failure
    monkeypatch.setattr(gpu_table, "layer", layer)
    tensors = gpu_table.make_tensors(TINY, "float32", "cpu")
    verdict = gpu_table.judge(Contender("w", "contiguous"), TINY, tensors, {}, {})
    assert verdict["status"] == "wrong" and verdict["note"].endswith("off by 0.3")


def test_the_judge_knows_every_layout_and_mode(ceilings):
    for name in ("tiny-2d-3x20x17", "tiny-4x9^3-branch"):
        for rows in measure(cases.BY_NAME[name], [NAIVE, "reference"], ceilings):
            assert {row["status"] for row in rows} == {"ok"}


# ------------------------------------------------------------------ rows


def timed(contender, layout, ms, status="ok"):
    return {"contender": contender, "layout": layout, "status": status, "min_ms": ms, "median_ms": 2 * ms}


def test_ratio_is_to_the_faster_eager_layout():
    rows = measurement.with_ratios(
        [
            timed(NAIVE, "contiguous", 6.0),
            timed(NAIVE, "channels_last", 4.0),
            timed(contenders.COMPILED, "contiguous", 3.0),
            timed("cpu", "contiguous", 2.0),
            timed("cpu", "channels_last", 1.0),
            {"contender": "cuda", "layout": "contiguous", "status": "wrong", "note": ""},
        ]
    )
    assert [row.get("ratio") for row in rows] == [4 / 6, 1, 4 / 3, 2, 4, None]
    assert rows[4]["ratio_median"] == 4
    without = measurement.with_ratios([timed("cpu", "contiguous", 1.0), timed(NAIVE, "contiguous", 1.0, "wrong")])
    assert "ratio" not in without[0]


def test_interleaving_takes_turns_and_keeps_to_its_budget():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}

    def clock(call):
        call()
        return 1.0

    times = contenders.interleave(calls, clock, budget=9.0, min_rounds=3)
    assert order == ["a", "b"] * (1 + 5)  # one round to warm up; five rounds of two seconds reach nine
    assert times == {"a": [1.0] * 5, "b": [1.0] * 5}
    assert len(contenders.interleave(calls, clock, budget=0.0, min_rounds=3)["a"]) == 3


def test_csv_columns_environment_and_continuing(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    arguments = ["--cases", TINY.name, "--passes", "inference", *SOON, "--threads", "1", "--out", str(out)]
    assert run.main(arguments) == 0
    with out.open() as file:
        assert next(csv.reader(file)) == list(COLUMNS)
    rows = read(out)
    assert {row["contender"] for row in rows} >= {NAIVE}
    for row in rows:
        assert row["status"] == "ok" and row["min_ms"] <= row["median_ms"] and row["rounds"] >= 3
        assert row["torch"] == torch.__version__ and row["commit"] and row["cpu"] and row["onednn"]
        assert row["multiply_adds"] == cases.multiply_adds(TINY, "inference")
        assert 0 < row["error_of_limit"] <= 1 and row["fraction_of_floor"] > 0
    before = out.read_text()

    # The same command measures nothing again; a new pass is added, and a torn last line is dropped.
    assert run.main(arguments) == 0
    assert out.read_text() == before and "measured already" in capsys.readouterr().out
    with out.open("a") as file:
        file.write("torn,line")
    arguments[3] = "training"
    assert run.main(arguments) == 0
    passes = [row["pass"] for row in read(out)]
    assert passes == ["inference"] * len(rows) + ["training"] * len(rows)
    assert all(row["saved_bytes"] for row in read(out) if row["pass"] == "training")

    figure = plot.draw(read(out))
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_default_plan_covers_every_case_the_results_are_quoted_for():
    jobs = run.plan(run.parse([]))
    assert [case for case, dtype, _ in jobs if dtype == "float32"] == [*cases.PLAIN_AFN6, *cases.OTHERS, *cases.HOST]
    assert {case.name for case, dtype, _ in jobs if dtype == "bfloat16"} == set(run.DEFAULT_16_BIT)
    full = run.plan(run.parse(["--full"]))
    assert len(full) == 2 * len(cases.CPU_CASES) and all(compiled for *_, compiled in full)
    on_gpu = run.plan(run.parse(["--device", "cuda"]))
    assert {case for case, *_ in on_gpu} == set(cases.GPU_CASES)


def test_rows_are_made_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.environment("cpu")["commit"] == "unknown"


# ------------------------------------------------------------------ memory


@pytest.mark.skipif(not memory.can_measure_cpu(), reason="the kernel does not let a process reset its peak memory")
def test_peak_memory_of_the_naive_layer_is_what_its_code_says():
    case = replace(TINY, size=(40, 40, 40), channels=16, out_channels=16, dilations=(1, 2))
    wanted = [(Contender(NAIVE, "channels_last"), pass_name) for pass_name in ("inference", "forward")]
    output = 16 * 40**3 * 4
    found = {pass_name: peak / output for _, pass_name, peak in memory.peaks_cpu(case, "float32", 1, wanted)}
    # The sum so far, the second branch and the new sum; with a graph the first branch is still there.
    assert found == {"inference": pytest.approx(3, rel=0.15), "forward": pytest.approx(4, rel=0.15)}


@pytest.mark.skipif(not memory.can_measure_cpu(), reason="the kernel does not let a process reset its peak memory")
def test_peak_here_sees_memory_that_is_freed_again():
    code = (
        "import torch\nfrom benchmarks import memory\n"
        "size = 2**23\n"
        "print(memory.peak_here(lambda: [torch.ones(size).sum(), torch.ones(2 * size).sum()]) / (4 * size))\n"
        "print(memory.peak_here(lambda: torch.ones(size)) / (4 * size))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**memory.SETTINGS, "OMP_NUM_THREADS": "1"},
    )
    freed, kept = map(float, result.stdout.split())
    assert freed == pytest.approx(2, rel=0.1) and kept == pytest.approx(1, rel=0.1)


# ------------------------------------------------------------------ gpu_check, dry


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
    gpu_check.main(["--quick", "--out", str(tmp_path)])
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


def test_the_gpu_table_gives_peak_and_ratio_against_the_best_naive_layout():
    rows = [
        {"contender": NAIVE, "layout": "contiguous", "status": "ok", "device_ms": 3.0, "peak_bytes": 40},
        {"contender": NAIVE, "layout": "channels_last", "status": "ok", "device_ms": 2.0, "peak_bytes": 20},
        {"contender": "cuda", "layout": "contiguous", "status": "ok", "device_ms": 1.0, "peak_bytes": 10},
        {"contender": "triton", "layout": "contiguous", "status": "wrong"},
    ]
    gpu_table.with_ratios(rows)
    assert (rows[2]["ratio"], rows[2]["peak_ratio"]) == (2.0, 0.25) and "ratio" not in rows[3]


TABLE = ["--device", "cpu", "--dtypes", "float32", "--seconds", "0"]
TWO_CASES = ["--cases", "tiny-2d-3x20x17", "tiny-4x9^3-branch"]


@pytest.fixture
def table_of(tmp_path):
    """Status and rows of a gpu_table."""

    def run(*arguments):
        status = gpu_table.main([*TABLE, *arguments, "--out", str(tmp_path / "table.csv")])
        with (tmp_path / "table.csv").open() as file:
            return status, list(csv.DictReader(file))

    return run


def test_a_gpu_that_dies_while_the_table_is_made_is_said_case_by_case(monkeypatch, table_of):
    """The first case's backend makes an illegal access while it is timed: it, and all after it, fails."""
    evaluate, seconds, dead = testing.evaluate, gpu_table.seconds, []

    def check():
        if dead:
            raise RuntimeError("an illegal memory access")

    def kill_third(call, device, budget):
        timed.append(call)
        if len(timed) == 3:  # after the naive layer in two layouts
            dead.append(True)
        check()
        return seconds(call, device, budget)

    timed = []
    monkeypatch.setattr(gpu_table, "seconds", kill_third)
    monkeypatch.setattr(testing, "evaluate", lambda *arguments: check() or evaluate(*arguments))
    status, rows = table_of(*TWO_CASES, "--backends", "reference")
    assert status == 1
    first, second = ([row for row in rows if row["case"] == case] for case in TWO_CASES[1:])
    assert [row["status"] for row in first] == ["ok", "ok", "failed"] + ["failed"] * 3 and len(second) == 1
    assert all("an illegal memory access" in row["note"] for row in first[2:] + second)
    assert "reference channels_last FAILED" in gpu_table.summary(rows)[0] and "FAILED" in gpu_table.summary(rows)[-1]


def test_a_table_without_rows_is_no_success(table_of):
    assert table_of(*TWO_CASES, "--backends", "reference", "--time-limit", "-1") == (1, [])


def test_what_compiles_for_the_table_ends(monkeypatch):
    """More cases than processes, each of which hangs."""
    limits = []

    def run(command, timeout, **_):
        limits.append(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu_table.subprocess, "run", run)
    options = gpu_table.parse(["--device", "cpu", "--backends", "reference"])
    gpu_table.warm_in_processes(list(cases.GPU_CASES), "bfloat16", options)
    assert len(limits) == len(cases.GPU_CASES) and all(0 <= limit <= gpu_table.WARMING for limit in limits)


def test_the_profile_of_a_backend_that_refuses_takes_nothing_from_the_others(table_of, capsys):
    status, rows = table_of(TWO_CASES[0], TWO_CASES[1], "--backends", "cuda", "reference", "--profile")
    printed = capsys.readouterr().out
    assert "float32, cuda: no profile: backend 'cuda' cannot run this call" in printed
    assert status == 0 and "float32, training, reference" in printed.split("no profile")[1]
    assert {row["status"] for row in rows if row["contender"] == "cuda"} == {"refused"}


PEAK = ".avg.pct_of_peak_sustained_active"
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
NCU_TABLE = [
    ["ID", "Kernel Name", "gpu__time_duration.sum", "launch__registers_per_thread", f"smsp__issue_active{PEAK}"]
    + [f"sm__inst_executed_pipe_tensor{PEAK}", f"sm__pipe_tensor_cycles_active{PEAK}"]
    + [STALLED.format("barrier"), STALLED.format("wait")],
    ["", "", "ns", "register/thread", "%", "%", "%", "", ""],
    ["0", "void pack_kernel<half>(Packing)", "12,345", "44", "61.5", "n/a", "0", "0.25", "1.5"],
    ["1", "branches_kernel", "0.25e6", "128", "30", "12.5", "37", "3.25", "1"],
]


def test_counters_of_nsight_compute(monkeypatch, tmp_path):
    ncu = tmp_path / "ncu"
    asked = (TINY, "bfloat16", "cuda", "channels_last")
    monkeypatch.setattr(profiling, "tool", lambda name: None)
    assert profiling.by_counter(*asked).endswith("there is no ncu")
    monkeypatch.setattr(profiling, "tool", lambda name: tmp_path / name)
    rows = [",".join(f'"{value}"' for value in row) for row in NCU_TABLE]
    (tmp_path / "printed").write_text("\n".join(['==PROF== Profiling "pack_kernel": 11 passes', *rows, ""]))
    ncu.write_text(f'#!/bin/sh\nwhile read -r line; do echo "$line"; done < {tmp_path}/printed\n')
    ncu.chmod(0o755)
    pack, branches = profiling.by_counter(*asked).splitlines()[-2:]
    assert pack.split("(Packing)")[1].split() == ["12.3", "61.5", "0.0", "44.0", "wait", "1.5,", "barrier", "0.2"]
    assert branches.split() == ["branches_kernel", "250.0", "30.0", "37.0", "128.0", "barrier", "3.2,", "wait", "1.0"]
    ncu.write_text("#!/bin/sh\necho ==ERROR== ERR_NVGPUCTRPERM: no permission\n")
    assert "ERR_NVGPUCTRPERM" in profiling.by_counter(*asked)
    ncu.write_text('#!/bin/sh\necho "$@"\n')
    assert "--clock-control none" in profiling.by_counter(*asked)


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


def test_cuda_tools_are_found_beside_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cross_build.tool("ncu", tmp_path) is None
    (tmp_path / "cuda-13.0" / "bin").mkdir(parents=True)
    (tmp_path / "cuda-13.0" / "bin" / "ncu").touch()
    assert cross_build.tool("ncu", tmp_path) == tmp_path / "cuda-13.0" / "bin" / "ncu"
    (tmp_path / "ncu").touch(0o755)
    assert cross_build.tool("ncu", tmp_path) == tmp_path / "ncu"


# ------------------------------------------------------------------ cross-building


def test_what_was_cross_built_is_used_for_its_gpu_and_sources_only(tmp_path, monkeypatch):
    assert cross_build.refusal("90a", tmp_path) == "nothing was cross-built"
    record = {"torch": "9.9", "architectures": ["90a"], "source": cross_build.source_digest()}
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert cross_build.refusal("90a", tmp_path) is None
    assert "this GPU is 80" in cross_build.refusal("80", tmp_path)
    (tmp_path / "record.json").write_text(json.dumps({**record, "source": "older"}))
    assert cross_build.refusal("90a", tmp_path) == "cross-built from other sources"


def test_a_cross_built_library_is_installed_beside_the_others(tmp_path):
    built, package = tmp_path / "built", tmp_path / "package"
    built.mkdir()
    package.mkdir()
    (built / "record.json").write_text(json.dumps({"torch": "9.9", "architectures": ["90a"], "source": ""}))
    (built / cross_build.LIBRARY).write_bytes(b"a library")
    (package / "_build.json").write_text(json.dumps({"cpu": {"torch": "1"}, "cuda": {"skipped": "no GPU"}}))
    cross_build.install(package, built)
    record = json.loads((package / "_build.json").read_text())
    assert record["cpu"] == {"torch": "1"} and record["cuda"]["torch"] == "9.9"
    assert (package / cross_build.LIBRARY).read_bytes() == b"a library"


@pytest.mark.skipif(cross_build.tool("nvcc") is None, reason="no nvcc")
def test_a_cross_built_library_asks_for_torchs_libraries_by_name(tmp_path, monkeypatch):
    """One kernel file stands for all; nothing but the library's own symbols is looked for when it is linked."""
    kernels = [path for path in cross_build.KERNELS if path.stem == "weight_sum"]
    monkeypatch.setattr(cross_build, "KERNELS", kernels)
    monkeypatch.setattr(cross_build, "PROBES", [])
    cross_build.build(["90a"], Path(torch.__file__).parent, tmp_path / "cross")
    library = (tmp_path / "cross" / cross_build.LIBRARY).read_bytes()
    assert all(f"lib{name}.so".encode() in library for name in cross_build.TORCH_LIBRARIES)
    assert cross_build.refusal("90a", tmp_path / "cross") is None


# ------------------------------------------------------------------ gpu_check's own parts


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


# ------------------------------------------------------------------ networks


@pytest.fixture
def narrow(monkeypatch):
    """Networks of few channels."""
    monkeypatch.setattr(networks, "CHECK_SIZE", 31)
    widths = (4, 4, 5, 6)

    class Narrow(networks.PlainNetwork):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, widths=widths, **options)

    monkeypatch.setattr(networks, "PlainNetwork", Narrow)
    monkeypatch.setattr(networks.networks, "build", partial(networks.networks.build, widths=widths))
    networks.truth.cache_clear()


NARROW = ["--networks", "AFN-1", "--layouts", "channels_last", "--training-size", "31", "--inference-size", "31"]
NARROW += ["--seconds", "0", "--anew"]


def test_networks_are_judged_before_they_are_timed(narrow, tmp_path, monkeypatch):
    def run():
        status = networks.main([*NARROW, "--passes", "training", "--out", str(tmp_path / "networks.csv")])
        with (tmp_path / "networks.csv").open() as file:
            return status, {row["contender"]: row for row in csv.DictReader(file)}

    status, rows = run()
    assert status == 0
    assert set(rows) == {networks.PLAIN, networks.OURS, networks.SAVE_NONE, networks.SAVE_ALL}
    assert all(0 < float(row["error"]) < 1e-4 and float(row["min_ms"]) > 0 for row in rows.values())
    saved = [float(rows[name]["saved_bytes"]) for name in (networks.SAVE_NONE, networks.SAVE_ALL, networks.PLAIN)]
    assert saved == sorted(set(saved))

    build = networks.build

    def build_wrong(name, contender):
        if contender == networks.OURS:
            raise RuntimeError("out of luck")
        network = build(name, contender)
        if contender == networks.SAVE_NONE:
            network.head.weight.data[0, 0] *= 1.01
        return network

    monkeypatch.setattr(networks, "build", build_wrong)
    status, rows = run()
    assert status == 1
    assert {name: (row["status"], row["min_ms"] > "") for name, row in rows.items()} == {
        networks.PLAIN: ("ok", True),
        networks.OURS: ("failed", False),
        networks.SAVE_NONE: ("wrong", False),
        networks.SAVE_ALL: ("ok", True),
    }
    assert "out of luck" in rows[networks.OURS]["note"] and "relative error" in rows[networks.SAVE_NONE]["note"]


def test_a_plain_network_that_fails_takes_its_reason_with_it(narrow, monkeypatch):
    error = networks.error

    def out_of_memory(name, contender, *where):
        if contender == networks.PLAIN:
            raise torch.OutOfMemoryError("out of memory")
        return error(name, contender, *where)

    monkeypatch.setattr(networks, "error", out_of_memory)
    plain, ours = networks.measure("AFN-1", "inference", "float32", networks.parse(NARROW))
    assert (plain["status"], ours["status"]) == ("failed", "failed")
    assert "out of memory" in plain["note"] and "the plain network failed" in ours["note"]


def test_the_peak_of_a_training_step_is_not_that_of_the_first(narrow, monkeypatch):
    """A fake GPU: what the optimiser allocates at its first step is no part of a step."""
    called, at_peak = [], []
    build, make_input, training_step = networks.build, networks.make_input, networks.training_step

    def on_cpu(*arguments):
        network = build(*arguments)
        network.to = lambda *_, **__: network
        return network

    def counted(*arguments):
        step = training_step(*arguments)
        return lambda: called.append(step()) or called

    monkeypatch.setattr(networks, "build", on_cpu)
    monkeypatch.setattr(networks, "make_input", lambda size, batch, *_: make_input(size, batch, "cpu", "contiguous"))
    monkeypatch.setattr(networks, "training_step", counted)
    monkeypatch.setattr(networks, "clock", lambda device: contenders.clock("cpu"))
    monkeypatch.setattr(networks.memory, "peak_cuda", lambda call: at_peak.append(len(called)) or 7)
    options = networks.parse([*NARROW, "--device", "cuda", "--batch", "1"])
    rows = networks.measure("AFN-1", "training", "float32", options)
    assert [row["peak_bytes"] for row in rows] == [7] * 4 and min(at_peak) >= 4
