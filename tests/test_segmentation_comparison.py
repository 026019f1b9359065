"""benchmarks/segmentation.py, on a phantom of seconds."""

import csv
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("monai")
from benchmarks import segmentation


def run(folder):
    where = ["--work", str(folder / "work"), "--out", str(folder / "out")]
    size = ["--cases", "4", "--seeds", "2", "--iterations", "2", "--batch", "2"]
    assert segmentation.main([*where, *size, "--variants", "Basic", "AFN-6/sum"]) == 0


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of the command, which ran in this process."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "SIZE", (40, 36))
        patch.setattr(segmentation, "WINDOW", 32)
        patch.setattr(segmentation, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(1))
        run(folder)
        yield folder


def test_rows_and_summary_agree(compared):
    tables = ("segmentation.csv", "segmentation-summary.csv")
    rows, summary = (list(csv.DictReader((compared / "out" / name).open())) for name in tables)
    assert {(row["network"], row["site"]) for row in summary} == {
        (network, site) for network in ("Basic", "AFN-6/sum") for site in "AB"
    }
    for entry in summary:
        own = [row for row in rows if (row["network"], row["site"]) == (entry["network"], entry["site"])]
        assert entry["seeds"] == "2" and {row["seed"] for row in own} == {"0", "1"}
        large = [float(row["dice"]) for row in own if row["structure"] == "large"]
        assert float(entry["large"]) == pytest.approx(sum(large) / len(large), abs=1e-3)
    assert (compared / "out" / "segmentation.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["segmentation.csv", "segmentation-summary.csv"])
def test_every_row_says_how_it_came_about(compared, name):
    settings = {"iterations": "2", "batch": "2", "recipe": "published", "cases_per_site": "4"}
    for row in csv.DictReader((compared / "out" / name).open()):
        assert settings.items() <= row.items() and row["commit"] and row["source"]
        assert row["command"].endswith("--batch 2 --variants Basic AFN-6/sum")


def test_finished_runs_stay(compared, monkeypatch):
    monkeypatch.setattr(segmentation, "train", lambda *_, **__: pytest.fail("trained again"))
    run(compared)
