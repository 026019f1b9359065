"""The Triton kernels in Triton's interpreter, on the CPU: forward and every gradient against float64 truth."""

import pytest

import triton_worker

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def results():
    return triton_worker.results("interpret", {"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize(
    "name", [triton_worker.interpreted_name(case, dtype) for case, dtype, _ in triton_worker.INTERPRETED]
)
def test_truth(results, name):
    assert results[name] is None, results[name]
