"""benchmarks.networks on networks of a few channels."""

import csv
from functools import partial

import pytest
import torch

from benchmarks import contenders, networks


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
