"""benchmarks.triton_configs with kernels that are the reference: what is tried, judged, kept and said."""

import csv
import sys

import pytest

pytest.importorskip("triton")

from autofocus_kernels.backends.reference import backend as reference
from autofocus_kernels.backends.triton import fitting, launch
from autofocus_kernels.backends.triton.configs import Config
from benchmarks import triton_configs

CASE = "tiny-2d-3x20x17"
FAST, SLOW, MISFIT, WRONG, BROKEN, IDLE = (Config(rows, 16, 16, 4, 255) for rows in (8, 16, 24, 40, 48, 56))


@pytest.fixture
def planted(monkeypatch):
    """The reference in the place of the kernels, which a configuration may fail; yields the launches, by gradients."""
    launched = []

    def run(function):
        def launched_with(call, *arguments):
            (config,) = launch.configurations("any")
            wanted = (
                tuple(name for name, tensor in arguments[-1]._asdict().items() if tensor is not None)
                if function == "backward"
                else ()
            )
            launched.append((wanted, config))
            if config == BROKEN:
                raise RuntimeError("an illegal memory access")
            if config == MISFIT:
                raise fitting.NoConfigurationFits(f"no configuration fits the device for x, tried {[config]}: too big")
            if config == IDLE:
                return
            getattr(reference, function)(call, *arguments)
            if config == WRONG:
                filled = arguments[-1] if function == "forward" else arguments[-1].attention
                if filled is not None:
                    filled += 1

        return launched_with

    monkeypatch.setattr(launch, "forward", run("forward"))
    monkeypatch.setattr(launch, "backward", run("backward"))
    monkeypatch.setattr(launch, "configurations", lambda *_: (SLOW,))
    monkeypatch.setattr(triton_configs.configs, "configurations", lambda *_: (SLOW,))
    monkeypatch.setattr(triton_configs, "device", lambda: "cpu")
    times = {FAST: 1e-3, SLOW: 2e-3}
    monkeypatch.setattr(triton_configs, "seconds", lambda call, *_: (call(), (times.get(launched[-1][1], 3e-3),))[1])
    return launched


@pytest.fixture
def sweep(planted, tmp_path, capsys):
    def run(*arguments, configs=(FAST, MISFIT, WRONG, BROKEN)):
        out = tmp_path / "configs.csv"
        named = [",".join(map(str, config)) for config in configs]
        options = ["--cases", CASE, "--dtypes", "float32", "--configs", *named, *arguments, "--out", str(out)]
        status = triton_configs.main(options)
        with out.open() as file:
            return status, list(csv.DictReader(file)), capsys.readouterr().out

    return run


def test_each_launch_runs_in_each_configuration_and_the_fastest_are_named(sweep, planted):
    status, rows, said = sweep("--launches", "forward", "grad_attention")
    assert status == 0 and len(rows) == 2 * 5
    for name, of in (("forward", rows[:5]), ("grad_attention", rows[5:])):
        assert [(row["launch"], row["default"]) for row in of] == [(name, str(int(i == 0))) for i in range(5)]
        assert [row["status"] for row in of] == ["ok", "ok", "misfit", "wrong", "failed"]
        assert [row["device_ms"] for row in of] == ["2.0", "1.0", "", "", ""]
        assert of[2]["note"] == "too big" and "illegal memory access" in of[4]["note"]
        assert of[3]["note"].startswith({"forward": "output", "grad_attention": "attention"}[name] + " is off by")
    first, second = (said.index(f"{time:8.3f} ms  rows {config.rows},") for time, config in ((1, FAST), (2, SLOW)))
    assert first < second and said.count("(the default)") == 2 and said.count("of 5 configurations 2 run") == 2


def test_gradients_of_input_and_weight_together_and_apart(sweep, planted):
    sweep("--launches", "grad_input_weight", "grad_input", "grad_weight", configs=(SLOW,))
    assert list(dict.fromkeys(wanted for wanted, _ in planted)) == [("input", "weight"), ("input",), ("weight",)]


def test_what_is_not_written_is_not_right(sweep):
    _, rows, _ = sweep("--launches", "forward", "grad_weight", configs=(IDLE,))
    assert [row["status"] for row in rows] == ["ok", "wrong"] * 2


def test_nothing_begins_after_the_time_limit_and_nothing_is_no_success(sweep):
    assert sweep("--time-limit", "0") == (1, [], "")


def test_the_launcher_is_as_before_afterwards(sweep):
    known = launch.configurations
    sweep()
    assert launch.configurations is known


def test_the_grid_reaches_the_blocks_that_hold_all_channels():
    small, large = triton_configs.grid(7, 40), triton_configs.grid(200, 200)
    assert {config.block_c for config in small} == {16} and {config.block_o for config in small} == {16, 32, 64}
    assert {config.block_c for config in large} == {32, 64} and max(config.block_o for config in large) == 128
    assert len(set(large)) == len(large)


@pytest.mark.parametrize("text", ["128,32,32,8", "128,32,32,8,128,1", "128,32,32,8,fast", "0,32,32,8,128"])
def test_a_configuration_that_is_none_is_refused(capsys, text):
    with pytest.raises(SystemExit):
        triton_configs.parse(["--configs", text])
    assert f"must be rows,block_c,block_o,num_warps,registers in numbers, got {text!r}" in capsys.readouterr().err


def test_every_core_compiles_its_share(monkeypatch, planted):
    configs = (FAST, Config(32, 16, 16, 4, 255))
    arguments = ["--cases", CASE, "--dtypes", "float32", "--launches", "forward", "grad_input"]
    arguments += ["--configs", *(",".join(map(str, config)) for config in configs)]
    for index in range(2):
        assert triton_configs.main([*arguments, "--share", str(index), "2"]) == 0
    assert len(planted) == len(set(planted)) == 2 * 3  # the default too


def test_a_compiler_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(triton_configs, "COMPILING", 0)
    monkeypatch.setattr(triton_configs.os, "cpu_count", lambda: 2)
    popen, begun = triton_configs.subprocess.Popen, []

    def hang(command, **options):
        begun.append((command, popen([sys.executable, "-c", "import time; time.sleep(100)"], **options)))
        return begun[-1][1]

    monkeypatch.setattr(triton_configs.subprocess, "Popen", hang)
    triton_configs.compile_in_processes(["--cases", CASE])
    assert [command[-5:] for command, _ in begun] == [["--cases", CASE, "--share", str(i), "2"] for i in range(2)]
    assert all(process.wait(20) != 0 for _, process in begun)
