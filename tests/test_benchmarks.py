"""The benchmark harness: it refuses what is wrong, loses nothing to a kill, and counts memory right."""

import csv
import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autofocus_kernels import autofocus_conv, testing
from benchmarks import cases, contenders, gpu_table, measurement, memory, plot, provenance, roofline, run, tables
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


def test_a_shape_says_what_is_not_as_usual():
    shapes = {name: cases.shape(case) for name, case in cases.BY_NAME.items()}
    assert shapes["afn6-4"] == "1x40x59x59x59 -> 40, valid"
    assert shapes["stride2-32x48^3"] == "1x32x48x48x48 -> 64, stride 2, padding 1, dilations 1 3 5 7"
    assert shapes["kernel5-16x48^3"] == "1x16x48x48x48 -> 16, kernel 5, dilations 1 2"


def test_rows_are_made_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.environment("cpu")["commit"] == "unknown"


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
