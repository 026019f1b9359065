"""benchmarks.cross_build: a CUDA library built on a machine without a GPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cross_build


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
