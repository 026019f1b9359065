"""benchmarks.gpu_table and the profile of its kernels, on a GPU that is made up."""

import csv
import subprocess

import pytest

from autofocus_kernels import testing
from benchmarks import cases, cross_build, gpu_table, profiling
from benchmarks.contenders import NAIVE

TINY = cases.BY_NAME["tiny-8x12^3"]


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


def test_cuda_tools_are_found_beside_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cross_build.tool("ncu", tmp_path) is None
    (tmp_path / "cuda-13.0" / "bin").mkdir(parents=True)
    (tmp_path / "cuda-13.0" / "bin" / "ncu").touch()
    assert cross_build.tool("ncu", tmp_path) == tmp_path / "cuda-13.0" / "bin" / "ncu"
    (tmp_path / "ncu").touch(0o755)
    assert cross_build.tool("ncu", tmp_path) == tmp_path / "ncu"
