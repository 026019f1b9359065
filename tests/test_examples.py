"""The scripts of examples/, run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(name, *arguments):
    """What the script prints."""
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_tested():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    assert {path.name for path in ROOT.glob("examples/*.py")} == tested | {"demo.py"}  # test_demo.py


def test_monai_unet():
    pytest.importorskip("monai")
    dice = re.search(r"Dice on new volumes: (.+)", run("monai_unet.py"))[1]
    assert float(dice) > 0.8


def test_original_checkpoint(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    pytest.importorskip("monai")
    run("original_checkpoint.py", "--out", tmp_path)
    (labels,) = (tmp_path / "labels").glob("*.nii.gz")
    assert nibabel.load(labels).shape == (20, 23, 18)


def test_export_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert "FILE.onnx" in run("export_onnx.py", "--help")
    path = tmp_path / "network.onnx"
    printed = run("export_onnx.py", path)
    assert path.stat().st_size > 0
    assert float(re.search(r"relative: (.+)", printed)[1]) < 1e-5
