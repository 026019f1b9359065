"""The commands of benchmarks/: what they refuse, what they never overwrite, and what they measure again."""

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import networks, plot, run
from benchmarks.arguments import at_least, require_device
from benchmarks.contenders import COMPILED, LAYOUTS, NAIVE
from benchmarks.rows import COLUMNS, Rows, read

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TINY, OTHER = "tiny-8x12^3", "tiny-2d-3x20x17"


def refused(capsys, command, arguments):
    """What a command that ends with status 2 says."""
    with pytest.raises(SystemExit) as ended:
        command([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def module(name):
    """``benchmarks.name``, if what it needs is there."""
    pytest.importorskip(
        {"segmentation": "monai", "triton_configs": "triton", "triton_host": "triton"}.get(name, "torch")
    )
    return importlib.import_module(f"benchmarks.{name}")


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("least, text, value", [(1, "1", 1), (0.0, "0", 0.0), (0.0, "0.5", 0.5), (29, "30", 30)])
def test_numbers(least, text, value):
    assert at_least(least)(text) == value and type(at_least(least)(text)) is type(least)


BAD = [
    ("run", "--threads", "0"),
    ("run", "--threads", "1.5"),
    ("run", "--threads", "100000"),
    ("run", "--seconds", "-1"),
    ("run", "--seconds", "soon"),
    ("run", "--seconds", "nan"),
    ("run", "--seconds", "inf"),
    ("run", "--time-limit", "-1"),
    ("networks", "--batch", "0"),
    ("networks", "--inference-size", "-5"),
    ("networks", "--inference-size", "0"),
    ("networks", "--training-size", "28"),
    ("networks", "--dtypes", "float64"),  # it would time float32
    ("sharded", "--processes", "0"),
    ("sharded", "--processes", "129"),  # of 128 planes
    ("sharded", "--channels", "0"),
    ("sharded", "--size", "0 8 8"),
    ("triton_configs", "--seconds", "-1"),
    ("triton_configs", "--time-limit", "soon"),
    ("triton_host", "--calls", "0"),
    ("triton_host", "--size", "0"),
    ("segmentation", "--seeds", "0"),
    ("segmentation", "--iterations", "0"),
    ("segmentation", "--batch", "0"),
    ("segmentation", "--jobs", "0"),
    ("segmentation", "--cases", "3"),  # none to test on
]


@pytest.mark.parametrize("command, name, value", BAD, ids=map(" ".join, BAD))
def test_a_bad_value_is_refused_by_name(capsys, command, name, value):
    assert f"argument {name}: " in refused(capsys, module(command).parse, [name, *value.split()])


@pytest.mark.parametrize(
    "command, arguments",
    [
        ("run", {"--cases": TINY, "--dtypes": "float32", "--passes": "training", "--backends": "cpu"}),
        (
            "networks",
            {"--networks": "AFN-1", "--dtypes": "float32", "--passes": "training", "--layouts": "contiguous"},
        ),
        ("sharded", {"--processes": 2}),
        ("segmentation", {"--variants": "Basic"}),
    ],
    ids=["run", "networks", "sharded", "segmentation"],
)
def test_what_is_named_twice_is_measured_once(command, arguments):
    options = module(command).parse([str(word) for name, value in arguments.items() for word in (name, value, value)])
    assert {name: getattr(options, name[2:]) for name in arguments} == {n: [v] for n, v in arguments.items()}


@pytest.mark.parametrize("command", [run, networks], ids=["run", "networks"])
@pytest.mark.parametrize("arguments", [("--device", "cuda"), ("--dtypes", "tf32")], ids=" ".join)
def test_what_the_device_cannot_do_is_refused(capsys, monkeypatch, command, arguments):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(command, "environment", lambda device: pytest.fail("went on"))
    assert " ".join(arguments) in refused(capsys, command.main, arguments)


def test_a_backend_that_is_asked_for_and_does_not_run_is_refused(capsys):
    assert "--backends triton: it is no backend of cpu" in refused(capsys, run.main, ["--backends", "triton"])


def test_a_gpu_takes_tf32(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    require_device("cuda", ["tf32", "float32"])


def test_no_time_is_no_time(tmp_path, capsys):
    """--time-limit 0 begins nothing."""
    out = tmp_path / "rows.csv"
    assert run.main(["--cases", TINY, "--dtypes", "float32", "--time-limit", "0", "--out", str(out)]) == 0
    assert read(out) == []


# ------------------------------------------------------------------ files that are none of ours


FOREIGN = {
    "one line": b"my thesis\n",
    "no line": b"",
    "two lines": b"precious\ntext\n",
    "binary": b"\x89PNG\r\n\x1a\n\x00\xff",
    "a table of networks": (RESULTS / "networks-cpu.csv").read_bytes(),
    "a table of words": (",".join(COLUMNS) + "\n" + ",".join(["word"] * len(COLUMNS))).encode(),
}


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_no_such_table_stays(tmp_path, content, anew):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="file: must be a table of measurements with the columns case, shape"):
        Rows(path, COLUMNS, {}, anew)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_a_device_stays_one(tmp_path, monkeypatch):
    path = tmp_path / "pipe"
    monkeypatch.setattr("benchmarks.rows.read", lambda *_: pytest.fail("what is no file was opened"))
    os.mkfifo(path)
    with pytest.raises(ValueError, match="pipe: must be a CSV file, and is no regular file"):
        Rows(path, COLUMNS, {})
    assert path.is_fifo() and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path):
    """The table that it leads to, there already or not, gets the rows."""
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    link.symlink_to(target)
    for contender in ("one", "two"):
        Rows(link, COLUMNS, {}).add([row(contender=contender)])
        assert link.is_symlink() and read(target)[-1]["contender"] == contender


@pytest.mark.parametrize("command", [run.main, networks.main], ids=["run", "networks"])
@pytest.mark.parametrize("out", ["folder", "file/rows.csv"])
def test_where_no_file_can_be_is_refused(tmp_path, capsys, command, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert "--out: " in refused(capsys, command, ["--out", tmp_path / out])


@pytest.mark.parametrize("content", [*FOREIGN.values(), (",".join(COLUMNS) + "\n").encode()], ids=[*FOREIGN, "no rows"])
def test_a_plot_needs_measurements(tmp_path, capsys, content):
    source = tmp_path / "rows.csv"
    source.write_bytes(content)
    assert f"{source}: must " in refused(capsys, plot.main, [source, tmp_path / "picture.png"])
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("source, picture", [("none.csv", "p.png"), (None, "no/p.png"), (None, "p.xyz")])
def test_a_plot_names_the_file_that_it_cannot_read_or_write(tmp_path, capsys, monkeypatch, source, picture):
    monkeypatch.setattr(plot, "draw", lambda rows: plot.plt.figure())
    paths = [tmp_path / source if source else RESULTS / "cpu-host.csv", tmp_path / picture]
    assert str(paths[0] if source else paths[1]) in refused(capsys, plot.main, paths)
    assert list(tmp_path.iterdir()) == []


def drawn(rows):
    """The panels of a plot, by title: the width of each bar that has one, and the texts beside them."""
    figure = plot.draw(rows)
    figure.canvas.draw()
    panels = {
        axis.get_title(): (
            [bar.get_width() for bar in axis.patches if bar.get_width()],
            [t.get_text() for t in axis.texts],
        )
        for axis in figure.axes
    }
    plot.plt.close(figure)
    return panels


def timed(contender, **values):
    missing = dict.fromkeys(COLUMNS)
    return {**missing, **row(contender=contender), "min_ms": 7.0, "peak_bytes": 2**20, **values}


def test_a_plot_shows_what_ran_where_naive_did_not():
    rows = [timed(NAIVE, status="refused", min_ms=None, peak_bytes=None), timed("cpu")]
    panels = drawn(rows)
    assert panels["float32: forward, no gradients"] == ([], ["refused", "7 ms"])
    assert panels["float32: peak memory, inference"] == ([1], ["refused", "1 MiB"])


def test_a_plot_has_no_panel_for_memory_that_was_not_measured():
    rows = [timed(name, ratio=ratio, peak_bytes=None) for name, ratio in ((NAIVE, 1.0), ("cpu", 2.0))]
    assert drawn(rows) == {"float32: forward, no gradients": ([1, 2], ["1.00x, 7 ms", "2.00x, 7 ms"])}


def test_the_help_of_the_plot_is_no_error(capsys):
    with pytest.raises(SystemExit) as ended:
        plot.main(["--help"])
    assert ended.value.code == 0 and "PICTURE" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cpu-bf16", "cpu-fp32", "cpu-fp32-avx2", "cpu-host"])
def test_published_tables_are_read(name):
    assert read(RESULTS / f"{name}.csv")


# ------------------------------------------------------------------ rows that are kept


def row(case="a", pass_name="inference", **values):
    return {
        "case": case,
        "shape": "1x1",
        "dtype": "float32",
        "pass": pass_name,
        "layout": "contiguous",
        "status": "ok",
        **values,
    }


def test_a_group_replaces_itself_and_nothing_else(tmp_path):
    store = Rows(tmp_path / "rows.csv", COLUMNS, {})
    store.add([row(contender="naive", min_ms=1.0)])
    store.add([row("b", contender="naive", min_ms=2.0)])
    store.add([row(pass_name="training", contender="naive", min_ms=3.0)])
    store.add([row(contender="naive", min_ms=4.0), row(contender="cpu", min_ms=5.0)])
    assert [kept["min_ms"] for kept in read(store.path)] == [2, 3, 4, 5]
    again = Rows(store.path, COLUMNS, {})
    assert [kept["min_ms"] for kept in again.of({"case": "a", "pass": "inference"})] == [4, 5]


def test_rows_of_other_sources_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    Rows(path, COLUMNS, {"commit": "one"}).add([row(contender="naive")])
    with pytest.raises(ValueError, match="rows.csv: has rows of another commit, one where this is two: --anew"):
        Rows(path, COLUMNS, {"commit": "two"})
    assert Rows(path, COLUMNS, {"commit": "one"}).of({"case": "a"})
    assert Rows(path, COLUMNS, {"commit": "two"}, anew=True).rows == []


@pytest.fixture
def measured(monkeypatch):
    """Runs that measure nothing: (case, names of contenders) of each measurement."""
    asked = []

    def measure(case, dtype, passes, entrants, *_, measure_memory, **__):
        asked.append((case.name, [name for name, _ in entrants[:: len(LAYOUTS)]]))
        peak = 7 if measure_memory else None
        for pass_name in passes:
            yield [
                row(case.name, pass_name, contender=name, layout=layout, peak_bytes=peak) for name, layout in entrants
            ]

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "Ceilings", lambda device: None)
    monkeypatch.setattr(run, "backends_of", lambda device: {"cpu": None, "fast": None})
    monkeypatch.setattr(run.memory, "can_measure_cpu", lambda: True)
    monkeypatch.setattr(run, "table", str)
    monkeypatch.setattr(run, "summary", str)
    monkeypatch.setattr(run, "failures", lambda rows: [])
    return asked


FIRST = ["--passes", "inference", "--compiled", "--no-memory", "--backends", "cpu"]
SECOND = {
    "the same": (FIRST, None),
    "a compiled layer": ([*FIRST, "--compiled", TINY], [NAIVE, COMPILED, "cpu"]),
    "everything": ([*FIRST, "--full"], [NAIVE, COMPILED, "cpu"]),
    "all backends": (FIRST[:-2], [NAIVE, "cpu", "fast"]),
    "another backend": ([*FIRST[:-1], "fast"], [NAIVE, "fast", "cpu"]),
    "memory": ([word for word in FIRST if word != "--no-memory"], [NAIVE, "cpu"]),
}


@pytest.mark.parametrize("second, names", SECOND.values(), ids=SECOND)
def test_what_was_not_asked_for_before_is_measured(tmp_path, measured, second, names):
    rest = ["--cases", TINY, "--dtypes", "float32", "--out", str(tmp_path / "rows.csv")]
    run.main([*FIRST, *rest])
    assert measured.pop() == (TINY, [NAIVE, "cpu"])
    run.main([*second, *rest])
    assert measured == ([] if names is None else [(TINY, names)])
    measured.clear()
    run.main([*second, *rest])
    assert measured == []


@pytest.mark.parametrize("torn", [0, 60], ids=["between lines", "within a line"])
def test_a_group_that_was_cut_is_measured_again(tmp_path, measured, torn):
    out = tmp_path / "rows.csv"
    command = ["--cases", TINY, OTHER, "--dtypes", "float32", *FIRST, "--out", str(out)]
    run.main(command)
    whole, lines = out.read_bytes(), out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 4
    out.write_bytes(b"".join(lines[:-1]) + lines[-1][:torn])
    measured.clear()
    run.main(command)
    assert [case for case, _ in measured] == [OTHER] and out.read_bytes() == whole


@pytest.fixture
def networks_measured(monkeypatch):
    """Networks of no time: the sizes that were measured."""
    asked = []

    def measure(name, pass_name, dtype, options):
        asked.append(networks.segments(pass_name, options)["segment"])
        if "broken" in asked:
            raise RuntimeError("out of luck")
        shared = {"network": name, "pass": pass_name, "dtype": dtype, **networks.segments(pass_name, options)}
        return [
            {**shared, "contender": networks.PLAIN, "layout": layout, "status": "ok", "min_ms": 1.0, "ratio": 1.0}
            for layout in options.layouts
        ]

    monkeypatch.setattr(networks, "measure", measure)
    return asked


def test_networks_keep_what_they_have(tmp_path, networks_measured, capsys):
    """Through the same command again, another size, a failure; and not where all is asked for anew."""
    out = tmp_path / "networks.csv"
    command = ["--networks", "AFN-1", "--passes", "inference", "--layouts", "contiguous", "--out", str(out)]
    for _ in range(2):
        assert networks.main([*command, "--inference-size", "31"]) == 0
        assert "inference, 1 x 31^3" in capsys.readouterr().out
    networks.main([*command, "--inference-size", "33"])
    assert networks_measured == [31, 33]
    before = out.read_text()
    refused(capsys, networks.main, [*command, "--inference-size", "-5"])
    networks_measured.append("broken")
    with pytest.raises(RuntimeError, match="out of luck"):
        networks.main([*command, "--inference-size", "35"])
    assert out.read_text() == before
    networks_measured.clear()
    networks.main([*command, "--inference-size", "33", "--layouts", "channels_last"])
    networks.main([*command, "--inference-size", "33", "--layouts", *LAYOUTS])
    networks.main([*command, "--inference-size", "31", "--anew"])
    assert networks_measured == [33, 31]
    assert [(kept["segment"], kept["layout"]) for kept in read(out, networks.COLUMNS)] == [(31, "contiguous")]


# ------------------------------------------------------------------ segmentation


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize(
    "variants", [["ASPP-c"], ["AFN-6/sum"], ["Basic", "ASPP-s", "AFN-2", "AFN-6/sum"]], ids=",".join
)
def test_any_variants_are_drawn(variants, seeds):
    compared = module("segmentation")
    rows = [
        {"network": variant, "seed": seed, "site": site, "structure": "small", "dice": 0.5 + 0.1 * seed}
        for variant in variants
        for seed in range(seeds)
        for site in compared.SITES
    ]
    figure = compared.draw(compared.summarise(rows, {variant: {} for variant in variants}), ["small"])
    figure.canvas.draw()
    compared.plt.close(figure)


@pytest.mark.parametrize("name", ["--work", "--out"])
def test_a_folder_that_cannot_be_is_refused(tmp_path, capsys, monkeypatch, name):
    compared = module("segmentation")
    monkeypatch.setattr(compared, "make_phantom", lambda *_, **__: pytest.fail("made data"))
    (tmp_path / "file").write_text("")
    folders = {"--work": tmp_path / "work", "--out": tmp_path / "out", name: tmp_path / "file"}
    assert f"{tmp_path / 'file'}: " in refused(
        capsys, compared.main, [word for pair in folders.items() for word in pair]
    )


@pytest.mark.parametrize("changed", ["iterations", "cases_per_site", "commit", "source"])
def test_runs_of_other_settings_or_sources_are_refused(tmp_path, capsys, changed):
    """Two trees with changes have one commit, and another source each."""
    compared = module("segmentation")
    settings = {"iterations": 2, "batch": 2, "recipe": "published", "cases_per_site": 4, "commit": "a", "source": "b"}
    compared.require_same(tmp_path, settings)
    compared.require_same(tmp_path, dict(settings))
    message = refused(capsys, lambda _: compared.require_same(tmp_path, {**settings, changed: "other"}), [])
    assert f"--work: {tmp_path} holds runs of" in message


def test_a_trial_stays_beside_its_runs():
    compared = module("segmentation")
    assert compared.parse([]).out == ROOT / "build" / "segmentation" / "results"
    assert compared.parse(["--work", "here"]).out == Path("here", "results")


# ------------------------------------------------------------------ make


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def make(folder, *arguments, **environment):
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "csrc").mkdir(exist_ok=True)
    # Without what a make that runs the tests hands down.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command, settings = ["make", *arguments], {**inherited, **environment}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_make
def test_clean_leaves_measurements_and_trained_runs(tmp_path):
    kept = {"build/benchmark-cpu.csv", "build/segmentation/runs/AFN-1-0/last.pt", "build/gpu_check/table.csv"}
    built = {"build/lib.linux/x.so", "build/temp.linux/x.o", "build/.built-python", "autofocus_kernels/_cpu.abi3.so"}
    for name in kept | built:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    make(tmp_path, "clean")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"Makefile", *kept}


@needs_make
def test_python3_of_another_environment_is_another_interpreter(tmp_path):
    stamps = []
    (tmp_path / "setup.py").write_text("")
    for name in ("one", "an other"):
        python = tmp_path / name / "python3"
        python.parent.mkdir()
        python.write_text("#!/bin/sh\n")
        python.chmod(0o755)
        printed = make(tmp_path, "-n", "demo", "PYTHON=python3", PATH=f"{python.parent}:{os.environ['PATH']}")
        stamps += [line for line in printed.splitlines() if line.startswith("touch")]
    first, second = stamps
    assert first != second and all(len(stamp.split()) == 2 for stamp in stamps)
