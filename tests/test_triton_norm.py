"""Batch-normalised branches by the Triton kernels: in the interpreter, and compiled for GPUs that are not here."""

import pytest
from helpers import triton_norm_worker, triton_worker

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted():
    return triton_norm_worker.results("interpret", {"TRITON_INTERPRET": "1"}, triton_norm_worker.NAMES)


@pytest.fixture(scope="module")
def compiled(request):
    names = [triton_norm_worker.compiled_name(*entry) for entry in triton_worker.chosen_entries(request)]
    return triton_norm_worker.results("compile", {"TRITON_INTERPRET": "0"}, names)


@pytest.mark.parametrize("name", triton_norm_worker.NAMES)
def test_truth(interpreted, name):
    assert interpreted[name] is None, interpreted[name]


@pytest.mark.parametrize(
    "entry",
    [
        *triton_norm_worker.COMPILED,
        *(pytest.param(entry, marks=pytest.mark.release) for entry in triton_norm_worker.COMPILED_FOR_A_RELEASE),
    ],
    ids=lambda entry: triton_norm_worker.compiled_name(*entry),
)
def test_fits_the_chip(compiled, entry):
    """No spills, shared memory within the limit, and tensor-core instructions where v_t is projected."""
    target = entry[0]
    figures = compiled[triton_norm_worker.compiled_name(*entry)]
    assert not isinstance(figures, str), figures
    assert set(figures) == triton_norm_worker.KERNELS
    for name, figure in figures.items():
        assert figure["spilled"] == 0, (name, figure)
        assert figure["shared"] <= triton_worker.SHARED_LIMIT[target], (name, figure)
    assert figures["grad_input_weight_kernel"]["tensor_core"] > 0, figures
