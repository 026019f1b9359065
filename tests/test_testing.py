"""The judge is judged: a wrong backend must not pass testing.check."""

import pytest
import torch

from autofocus_kernels import reference, testing

CASE = testing.Case("small", (5, 6), dilations=(1, 2))


def judge(change, dtype=torch.float32, case=CASE):
    """testing.judge on the reference's results after ``change`` edited them."""
    tensors = testing.make_tensors(case, dtype)
    results = testing.evaluate(reference.autofocus_conv, case, tensors)
    change(results)
    return testing.judge(results, case, tensors)


@pytest.mark.parametrize("name", ["output", "input", "weight", "attention", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_wrong_element_is_refused(name, dtype):
    def change(results):
        results[name].view(-1)[-1] += 0.05 * results[name].norm()

    with pytest.raises(AssertionError, match=f"{name}: relative error"):
        judge(change, dtype)


def test_one_nan_is_refused():
    with pytest.raises(AssertionError, match="weight: relative error nan"):
        judge(lambda results: results["weight"].view(-1)[0].fill_(torch.nan))


def test_bfloat16_arithmetic_is_refused_in_float32():
    def change(results):
        results["output"] = results["output"].bfloat16().float()

    with pytest.raises(AssertionError, match="output: relative error"):
        judge(change)


def test_wrong_dtype_is_refused():
    def change(results):
        results["weight"] = results["weight"].double()

    with pytest.raises(AssertionError, match="weight has dtype torch.float64"):
        judge(change)


def test_wrong_shape_is_refused():
    def change(results):
        results["bias"] = results["bias"][:1]

    with pytest.raises(AssertionError, match="bias has shape"):
        judge(change)


def test_wrong_layout_is_refused():
    def change(results):
        results["output"] = results["output"].contiguous(memory_format=torch.channels_last)

    with pytest.raises(AssertionError, match="output has strides"):
        judge(change)


def test_right_results_pass():
    errors = judge(lambda results: None)
    assert set(errors) == {"output", "input", "weight", "attention", "bias"}


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(5),
        lambda: torch.empty_like(torch.zeros(5, dtype=torch.bfloat16)),
        lambda: torch.zeros(5).new_empty(5),
        lambda: torch.empty(2, 3, 4, 5, memory_format=torch.channels_last),
    ],
)
def test_poisoned_memory_is_nan(allocate):
    with testing.poisoned_memory():
        assert allocate().isnan().all()


def test_poisoned_memory_ends():
    with testing.poisoned_memory():
        pass
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_values_do_not_depend_on_the_dtype_and_layout_is_as_named(case):
    tensors = testing.make_tensors(case, torch.float32)
    exact = testing.make_tensors(case, torch.float64)
    for single, double in zip(tensors, exact):
        assert (single is None) == (double is None)
        if single is not None:
            assert torch.equal(single, double.float())
    expected = {
        "contiguous": tensors.input.is_contiguous(),
        "channels_last": tensors.input.is_contiguous(memory_format=case.memory_format),
        "transposed": tensors.input.permute(*reversed(range(tensors.input.dim()))).is_contiguous(),
        "sliced": tensors.input.stride(-1) == 2,
        "expanded": tensors.input.stride(0) == 0,
    }
    assert expected[case.layout]


def test_saved_bytes_counts_each_storage_once():
    x = torch.ones(8, requires_grad=True)
    assert testing.saved_bytes(lambda: x * x) == 8 * 4
    assert testing.saved_bytes(lambda: x.exp() * x) == 2 * 8 * 4


@pytest.mark.parametrize("field, value", [("mode", "both"), ("layout", "blocked")])
def test_unknown_names_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be one of .*{value}"):
        testing.Case("bad", (3,), **{field: value})


def test_one_channel_is_in_every_memory_format():
    case = testing.Case("one channel", (3, 2), channels=1, out_channels=2, layout="channels_last")
    testing.check("reference", case)
