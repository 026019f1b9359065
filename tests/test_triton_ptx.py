"""The Triton kernels as Triton compiles them, launched by launch.py as on a GPU and executed on the CPU from their PTX.

The interpreter (tests/test_triton_interpreter.py) runs the same kernels on many more cases, but neither compiles them
nor passes by Triton's launcher.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import triton_ptx_worker

pytest.importorskip("triton")

ALWAYS = {
    80: ("ragged-float16", "branch-bfloat16", "rows-float32"),
    90: ("norm-bfloat16", "rows-float16", "ragged-bfloat16", "branch-float16", "rows-float32"),
}
NAMES = [
    *(f"{case}-{dtype}" for case, dtype in itertools.product(triton_ptx_worker.CASES, triton_ptx_worker.DTYPES)),
    *(f"{triton_ptx_worker.NORM}-{dtype}" for dtype in ("float16", "bfloat16")),
]
EVERY = list(itertools.product(triton_ptx_worker.SHARED_BYTES, NAMES))


@pytest.fixture(scope="module")
def results(request):
    """(capability, name) -> problem or None, of all that the chosen tests ask for."""
    here = [item for item in request.session.items if item.getparent(pytest.Module) is request.node]
    wanted = {}
    for item in here:
        wanted.setdefault(item.callspec.params["capability"], []).append(item.callspec.params["name"])
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(triton_ptx_worker.results, wanted, wanted.values())
        return {(capability, name): problem for capability, of in zip(wanted, found) for name, problem in of.items()}


@pytest.mark.parametrize(
    "capability, name",
    [pytest.param(*pair, marks=[] if pair[1] in ALWAYS.get(pair[0], ()) else [pytest.mark.release]) for pair in EVERY],
)
def test_compiled_kernels_are_right(results, capability, name):
    assert results[capability, name] is None, results[capability, name]
