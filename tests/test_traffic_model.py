"""The traffic model: counts that can be done by hand, and its comparison with a CSV of measurements."""

import csv
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cases
import harness
import traffic_model
from autofocus_kernels.backends.triton.configs import Config, choose_tiling
from autofocus_kernels.testing import Case

CONFIG = Config(16, 16, 16, 4, 255)
POINTWISE = Case("pointwise", (8, 8, 8), 16, 16, kernel_size=1, dilations=(1, 2))
SMALL = Case("small", (12, 12, 12), 16, 16, dilations=(1, 2))


def test_a_cache_fetches_a_sector_once_while_it_holds_the_line():
    cache = traffic_model.Cache(2 * 128)
    cache.read("a", 16, 32)  # two sectors of the first line
    assert cache.missed == 2
    cache.read("a", 0, 96)
    assert cache.missed == 3
    cache.read("a", 128, 32)
    cache.read("b", 0, 32)  # the third line: the first one goes
    assert cache.missed == 5
    cache.read("a", 0, 32)
    assert cache.missed == 6


def test_without_neighbours_a_tile_fetches_its_rows_and_the_weight():
    tiling = choose_tiling(POINTWISE.geometry, 16)
    fetched = traffic_model.walk(POINTWISE, "forward", CONFIG, tiling, 2**20)
    assert fetched == 16 * 16 * 2 + 16 * 16 * 2


def test_a_cache_too_small_for_reuse_fetches_every_read():
    inside = replace(SMALL, size=(40, 40, 40))
    tiling = choose_tiling(inside.geometry, 16)
    nothing = traffic_model.walk(inside, "forward", CONFIG, tiling, 128)
    everything = traffic_model.walk(inside, "forward", CONFIG, tiling, 2**24)
    reads = 1 + 2 * 26
    distinct = {
        tuple(p + r * t for p, t in zip(point, tap))
        for point in itertools.product(*(range(0, step * tile, step) for step, tile in zip(tiling.step, tiling.tile)))
        for tap in itertools.product((-1, 0, 1), repeat=3)
        for r in (1, 2)
    }
    weight = 27 * 16
    assert nothing == 32 * (16 * reads + weight)
    assert everything == 32 * (len(distinct) + weight)


def test_reads_inside_count_taps_and_branches():
    one = Case("one", (4,), 1, 1, dilations=(1, 3))
    assert traffic_model.reads_inside(one) == (3 + 3 + 4 + 1 + 1 + 4) / 4


@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_every_kernel_of_a_case_has_its_rows(mode):
    rows = traffic_model.rows_of(replace(SMALL, mode=mode))
    kernels = {row["kernel"] for row in rows}
    assert kernels == {kernel for both in traffic_model.KERNELS.values() for kernel in both[mode]}
    assert sum(row["default"] for row in rows) == len(kernels)
    for row in rows:
        assert set(row) == set(traffic_model.COLUMNS)
        times = [float(row[f"{bound}_ms"]) for bound in ("memory", "mma", "l1", "l2", "issue")]
        assert all(time > 0 for time in times) and float(row["bound_ms"]) == max(times)


def test_scratch_is_what_the_launcher_allocates(monkeypatch):
    """The model's sums and copies against the tensors that a backward makes."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from autofocus_kernels import testing
    from autofocus_kernels.backends.triton import launch

    case = Case("scratch", (20, 21, 22), 20, 40, dilations=(2, 4))
    tensors = testing.make_tensors(case, torch.bfloat16)
    launches = []
    monkeypatch.setattr(launch, "submit", launches.append)
    monkeypatch.setattr(launch, "capability", lambda device: 9)
    monkeypatch.setattr(launch, "_resident_programs", lambda device: 8)
    launch.backward(
        case.geometry, tensors.grad_output, *tensors[:6],
        torch.empty_like(tensors.input), torch.empty_like(tensors.weight), None, None,
    )
    arguments = launches[-1].arguments
    memory = traffic_model.scratch(case, "contiguous", training=True, sms=8)
    assert memory.sums == arguments[6].nbytes
    assert memory.packed == arguments[0].nbytes


def test_measured_times_stand_beside_the_prediction(tmp_path, capsys):
    path = tmp_path / "measured.csv"
    case = cases.BY_NAME["tiny-8x12^3"]
    fixed = {"case": case.name, "dtype": "bfloat16", "layout": "channels_last", "status": "ok"}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, harness.COLUMNS)
        writer.writeheader()
        for contender, pass_name, milliseconds, changes in (
            ("triton", "inference", 0.5, {}),
            ("triton", "training", 2.0, {}),
            ("naive", "inference", 9.0, {}),
            ("triton", "forward", 9.0, {"status": "wrong", "min_ms": ""}),
            ("triton", "forward", 9.0, {"dtype": "float32"}),
            ("triton", "forward", 9.0, {"layout": "contiguous"}),
        ):
            row = {**fixed, "contender": contender, "pass": pass_name, "min_ms": milliseconds, **changes}
            writer.writerow(row)
    forward, training = traffic_model.compare(path)
    assert forward[:3] == (case.name, "bfloat16", "inference") and forward[4] == 0.5
    assert training[2] == "training" and training[4] == 2.0
    assert 0 < forward[3] < training[3] and math.isfinite(training[3])
    traffic_model.main(["--measured", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].split()[-2] == "0.5000"
