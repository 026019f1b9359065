"""The Triton kernels in Triton's interpreter, on the CPU: forward and every gradient against float64 truth."""

import pytest
from helpers import triton_worker

pytest.importorskip("triton")

from helpers import triton_checks

CHECKS = [check.__name__ for check in triton_checks.CHECKS]


@pytest.fixture(scope="module")
def results():
    return triton_worker.results("interpret", {"TRITON_INTERPRET": "1"}, [*triton_worker.INTERPRETED, *CHECKS])


@pytest.mark.parametrize("name", triton_worker.INTERPRETED)
def test_truth(results, name):
    assert results[name] is None, results[name]


@pytest.mark.parametrize("name", CHECKS)
def test_launcher(results, name):
    assert results[name] is None, results[name]
