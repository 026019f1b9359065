"""benchmarks/segmentation.py, on a phantom of seconds."""

import csv
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("monai")
from benchmarks import segmentation


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """The command in this process, with the tables that it writes."""
    monkeypatch.setattr(segmentation, "SIZE", (40, 36))
    monkeypatch.setattr(segmentation, "WINDOW", 32)
    monkeypatch.setattr(segmentation, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(1))

    def run():
        where = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
        size = ["--cases", "4", "--seeds", "2", "--iterations", "2", "--batch", "2"]
        assert segmentation.main([*where, *size, "--variants", "Basic", "AFN-6/sum"]) == 0
        tables = ("segmentation.csv", "segmentation-summary.csv")
        return [list(csv.DictReader((tmp_path / "out" / name).open())) for name in tables]

    return run


def test_rows_and_summary_agree(compare, tmp_path):
    rows, summary = compare()
    assert {(row["network"], row["site"]) for row in summary} == {
        (network, site) for network in ("Basic", "AFN-6/sum") for site in "AB"
    }
    for entry in summary:
        own = [row for row in rows if (row["network"], row["site"]) == (entry["network"], entry["site"])]
        assert entry["seeds"] == "2" and {row["seed"] for row in own} == {"0", "1"}
        large = [float(row["dice"]) for row in own if row["structure"] == "large"]
        assert float(entry["large"]) == pytest.approx(sum(large) / len(large), abs=1e-3)
    assert (tmp_path / "out" / "segmentation.png").stat().st_size > 0


def test_finished_runs_stay(compare, tmp_path, monkeypatch):
    compare()
    monkeypatch.setattr(segmentation, "train", lambda *_, **__: pytest.fail("trained again"))
    compare()
