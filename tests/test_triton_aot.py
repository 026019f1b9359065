"""Every Triton kernel compiled ahead of time for GPUs that are not here, with its default configuration."""

import pytest
from helpers import triton_worker

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def results(request):
    names = [*map(str, triton_worker.chosen_entries(request)), triton_worker.PLANS]
    return triton_worker.results("compile", {"TRITON_INTERPRET": "0"}, names)


@pytest.mark.parametrize(
    "entry",
    [
        *triton_worker.COMPILED,
        *(pytest.param(entry, marks=pytest.mark.release) for entry in triton_worker.COMPILED_FOR_A_RELEASE),
    ],
    ids=str,
)
def test_fits_the_chip(results, entry):
    """Shared memory within the limit, no spills in a loop; tensor-core instructions (float32 has none), each once."""
    target, dtype, mode, *_, layout = entry
    figures = results[str(entry)]
    assert not isinstance(figures, str), figures
    kernels = {figure["kernel"] for figure in figures}
    arithmetic = [figure for figure in figures if figure["kernel"] not in triton_worker.PACKING]
    expected = {
        "plain": {"forward_kernel", "grad_input_weight_kernel", "grad_attention_kernel"},
        "branch": {"forward_scaled_kernel", "grad_input_weight_kernel", "grad_scaled_kernel"},
    }
    packing = triton_worker.PACKING - ({"pack_kernel"} if layout == "channels_last" else set())
    assert kernels >= expected[mode] | packing and kernels <= expected[mode] | triton_worker.PACKING
    for figure in figures:
        assert figure["spilled"] <= 16 and not figure["in_loops"], figure
        assert figure["shared"] <= triton_worker.SHARED_LIMIT[target], figure
        assert figure.get("repeated", 1) == 1, figure
    if dtype != "float32" or target == "gfx942":
        for figure in arithmetic:
            assert figure["tensor_core"] > 0, figure


def test_plans(results):
    assert results[triton_worker.PLANS] is None, results[triton_worker.PLANS]
