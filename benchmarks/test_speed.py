"""The same race for pytest-benchmark: pytest benchmarks/test_speed.py

run.py interleaves the contenders and is what results are quoted from; this one compares commits
(--benchmark-autosave, then --benchmark-compare).
"""

import pytest

from autofocus_kernels import tolerance

from . import cases
from .contenders import NAIVE, Contender, Judge, backends_of, lay_out, layer, make_tensors, runner

DEVICE = "cpu"
TIMED = [cases.BY_NAME[name] for name in ("32x64^3", "64x48^3", "odd-7x33x21x18")]


@pytest.fixture(scope="module", params=TIMED, ids=str)
def judge(request):
    return Judge(request.param, "float32", make_tensors(request.param, "float32", DEVICE))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [NAIVE, *backends_of(DEVICE)])
@pytest.mark.parametrize("pass_name", ["inference", "training"])
def test_speed(benchmark, judge, name, layout, pass_name):
    reason = backends_of(DEVICE).get(name)
    if reason is not None:
        pytest.skip(reason)
    tensors = lay_out(make_tensors(judge.case, "float32", DEVICE), judge.case, layout)
    errors = judge.errors(Contender(name, layout), layer(name), tensors)
    assert not tolerance.complaints(errors, judge.limits)
    benchmark.group = f"{judge.case.name} {pass_name}"
    benchmark(runner(pass_name, layer(name), judge.case, tensors))
