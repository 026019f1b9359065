"""Bad arguments: the exact kind of error, and a message that names the argument, what was expected and what came."""

import numpy as np
import pytest
import torch

from autofocus_kernels import autofocus_conv, reference, testing
from autofocus_kernels.testing import Case

CASE = Case("good", (6, 7), channels=3, out_channels=4, batch=2, dilations=(1, 2))


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


BAD_TENSORS = [
    # no tensors at all
    ({"input": np.zeros((2, 3, 6, 7))}, TypeError, r"input must be a torch\.Tensor, got ndarray"),
    ({"weight": [[1.0]]}, TypeError, r"weight must be a torch\.Tensor, got list"),
    ({"attention": None}, TypeError, r"attention must be a torch\.Tensor, got NoneType"),
    ({"bias": 0.0}, TypeError, r"bias must be a torch\.Tensor, got float"),
    (
        {"bias": None, "branch_scale": 1},
        TypeError,
        r"branch_scale must be a torch\.Tensor, got int",
    ),
    (
        {"bias": None, "branch_shift": 1.0},
        TypeError,
        r"branch_shift must be a torch\.Tensor, got float",
    ),
    # dtypes
    (
        {"input": zeros(2, 3, 6, 7, dtype=torch.int64)},
        TypeError,
        r"input must be float16, bfloat16, float32 or float64, got torch\.int64",
    ),
    (
        {"weight": zeros(4, 3, 3, 3, dtype=torch.bool)},
        TypeError,
        r"weight must be float16, bfloat16, float32 or float64, got torch\.bool",
    ),
    (
        {"input": zeros(2, 3, 6, 7, dtype=torch.complex64)},
        TypeError,
        r"input must be float16, bfloat16, float32 or float64, got torch\.complex64",
    ),
    (
        {"attention": zeros(2, 2, 6, 7, dtype=torch.uint8)},
        TypeError,
        r"attention must be float16, bfloat16, float32 or float64, got torch\.uint8",
    ),
    (
        {"weight": zeros(4, 3, 3, 3, dtype=torch.float64)},
        TypeError,
        r"weight must have the dtype of input, torch\.float32, got torch\.float64",
    ),
    (
        {"attention": zeros(2, 2, 6, 7, dtype=torch.bfloat16)},
        TypeError,
        r"attention must have the dtype of input, torch\.float32, got torch\.bfloat16",
    ),
    (
        {"bias": zeros(4, dtype=torch.float16)},
        TypeError,
        r"bias must have the dtype of input, torch\.float32, got torch\.float16",
    ),
    (
        {"bias": None, "branch_scale": zeros(2, 4, dtype=torch.float64)},
        TypeError,
        r"branch_scale must have the dtype of input, torch\.float32, got torch\.float64",
    ),
    (
        {"bias": None, "branch_shift": zeros(2, 4, dtype=torch.float64)},
        TypeError,
        r"branch_shift must have the dtype of input, torch\.float32, got torch\.float64",
    ),
    # devices and layouts
    (
        {"weight": zeros(4, 3, 3, 3, device="meta")},
        ValueError,
        r"weight must be on the device of input, cpu, got meta",
    ),
    (
        {"attention": zeros(2, 2, 6, 7, device="meta")},
        ValueError,
        r"attention must be on the device of input, cpu, got meta",
    ),
    (
        {"bias": zeros(4, device="meta")},
        ValueError,
        r"bias must be on the device of input, cpu, got meta",
    ),
    (
        {"input": zeros(2, 3, 6, 7).to_sparse()},
        ValueError,
        r"input must be a dense \(strided\) tensor, got layout torch\.sparse_coo",
    ),
    # ranks
    (
        {"weight": zeros(4, 3)},
        ValueError,
        r"weight must be \[O, C, \*kernel_size\] with one to three spatial axes, got shape \[4, 3\]",
    ),
    (
        {"weight": zeros(4, 3, 1, 1, 1, 1)},
        ValueError,
        r"weight must be \[O, C, \*kernel_size\].*got shape \[4, 3, 1, 1, 1, 1\]",
    ),
    (
        {"weight": zeros(4, 3, 3)},
        ValueError,
        r"input must be \[N, C, \*S\] with 1 spatial axes.*got shape \[2, 3, 6, 7\]",
    ),
    (
        {"input": zeros(2, 3, 6)},
        ValueError,
        r"input must be \[N, C, \*S\] with 2 spatial axes.*got shape \[2, 3, 6\]",
    ),
    (
        {"input": zeros(2, 3, 5, 6, 7)},
        ValueError,
        r"input must be \[N, C, \*S\] with 2 spatial axes.*got shape \[2, 3, 5, 6, 7\]",
    ),
    (
        {"attention": zeros(2, 6, 7)},
        ValueError,
        r"attention must be \[N, K, \*S_out\] = \[2, 2, 6, 7\], got shape \[2, 6, 7\]",
    ),
    ({"bias": zeros(4, 1)}, ValueError, r"bias must be \[O\] = \[4\], got shape \[4, 1\]"),
    # sizes
    (
        {"weight": zeros(4, 1, 3, 3)},
        ValueError,
        r"input must have the 1 channels of weight \[4, 1, 3, 3\].*groups.*got shape \[2, 3, 6, 7\]",
    ),
    (
        {"weight": zeros(0, 3, 3, 3), "bias": None},
        ValueError,
        r"weight must have at least one output and one input channel, got \[0, 3, 3, 3\]",
    ),
    (
        {"weight": zeros(4, 0, 3, 3), "input": zeros(2, 0, 6, 7)},
        ValueError,
        r"weight must have at least one output and one input channel, got \[4, 0, 3, 3\]",
    ),
    ({"weight": zeros(4, 3, 2, 3)}, ValueError, r"the kernel of weight must be odd.*got \(2, 3\)"),
    ({"weight": zeros(4, 3, 3, 0)}, ValueError, r"the kernel of weight must be odd.*got \(3, 0\)"),
    (
        {"attention": zeros(2, 3, 6, 7)},
        ValueError,
        r"attention must be \[N, K, \*S_out\] = \[2, 2, 6, 7\], got shape \[2, 3, 6, 7\]",
    ),
    (
        {"attention": zeros(2, 2, 6, 8)},
        ValueError,
        r"attention must be .* = \[2, 2, 6, 7\], got shape \[2, 2, 6, 8\]",
    ),
    (
        {"attention": zeros(1, 2, 6, 7)},
        ValueError,
        r"attention must be .* = \[2, 2, 6, 7\], got shape \[1, 2, 6, 7\]",
    ),
    ({"bias": zeros(3)}, ValueError, r"bias must be \[O\] = \[4\], got shape \[3\]"),
    (
        {"bias": None, "branch_scale": zeros(2)},
        ValueError,
        r"branch_scale must be \[K, O\] = \[2, 4\], got shape \[2\]",
    ),
    (
        {"bias": None, "branch_shift": zeros(4, 2)},
        ValueError,
        r"branch_shift must be \[K, O\] = \[2, 4\], got shape \[4, 2\]",
    ),
    (
        {"branch_scale": zeros(2, 4)},
        ValueError,
        r"bias must be None when branch_scale or branch_shift is given",
    ),
    (
        {"branch_shift": zeros(2, 4)},
        ValueError,
        r"bias must be None when branch_scale or branch_shift is given",
    ),
]

BAD_NUMBERS = [
    ({"dilations": 2}, TypeError, r"dilations must be a sequence with one int .* got 2"),
    ({"dilations": "12"}, TypeError, r"dilations must be a sequence with one int .* got '12'"),
    ({"dilations": {1, 2}}, TypeError, r"dilations must be a sequence .* got \{1, 2\}"),  # no order, so no branches
    ({"dilations": torch.tensor([1, 2])}, TypeError, r"dilations must be a sequence .* got tensor\(\[1, 2\]\)"),
    (
        {"dilations": (1, 2**48 + 1)},
        ValueError,
        r"dilations\[1\] must be at most 2\*\*48 on every axis, got 281474976710657",
    ),
    ({"dilations": (1, 2**48), "weight": zeros(4, 3, 5, 3)}, ValueError, r"dilations\[1\] must keep kernel \(5, 3\) "),
    ({"stride": 2**63}, ValueError, r"stride must be at most 2\*\*48 on every axis, got 9223372036854775808"),
    (
        {"dilations": ()},
        ValueError,
        r"dilations must name at least one branch, got an empty sequence",
    ),
    ({"dilations": (0, 2)}, ValueError, r"dilations\[0\] must be at least 1 on every axis, got 0"),
    (
        {"dilations": (1, -2)},
        ValueError,
        r"dilations\[1\] must be at least 1 on every axis, got -2",
    ),
    (
        {"dilations": (1, (2, 0))},
        ValueError,
        r"dilations\[1\] must be at least 1 on every axis, got \(2, 0\)",
    ),
    (
        {"dilations": (1, (2, 2, 2))},
        ValueError,
        r"dilations\[1\] must be an int or 2 ints.*got \(2, 2, 2\)",
    ),
    ({"dilations": (1, 2.0)}, TypeError, r"dilations\[1\] must be an int .*got 2\.0"),
    ({"dilations": (1, (2, 1.5))}, TypeError, r"dilations\[1\] must hold ints, got \(2, 1\.5\)"),
    ({"dilations": (1, None)}, TypeError, r"dilations\[1\] must be an int .*got None"),
    (
        {"dilations": (1, 2, 3)},
        ValueError,
        r"attention must be .* = \[2, 3, 6, 7\], got shape \[2, 2, 6, 7\]",
    ),
    ({"stride": 0}, ValueError, r"stride must be at least 1 on every axis, got 0"),
    ({"stride": (1, -1)}, ValueError, r"stride must be at least 1 on every axis, got \(1, -1\)"),
    ({"stride": (1, 1, 1)}, ValueError, r"stride must be an int or 2 ints.*got \(1, 1, 1\)"),
    ({"stride": 1.0}, TypeError, r"stride must be an int .*got 1\.0"),
    ({"stride": "2"}, TypeError, r"stride must be an int .*got '2'"),
    ({"stride": True}, TypeError, r"stride must hold ints, got True"),
    ({"stride": 2}, ValueError, r'padding="same" needs stride 1, got stride \(2, 2\)'),
    ({"padding": -2}, ValueError, r"input is too small: spatial size \(6, 7\) with padding \(-2, -2\)"),
    ({"padding": (1,)}, ValueError, r"padding must be an int or 2 ints.*got \(1,\)"),
    ({"padding": 0.5}, TypeError, r"padding must be an int .*got 0\.5"),
    ({"padding": "full"}, ValueError, r'padding must be "same", "valid" or ints, got \'full\''),
    ({"padding": None}, TypeError, r"padding must be an int .*got None"),
    (
        {"padding": "valid", "dilations": (4, 5)},
        ValueError,
        r"input is too small: spatial size \(6, 7\) with padding \(0, 0\)",
    ),
]


def call(function, changes):
    arguments = {**testing.make_tensors(CASE).arguments(), **CASE.options, **changes}
    return function(**arguments)


@pytest.mark.parametrize("function", [autofocus_conv, reference.autofocus_conv], ids=["public", "reference"])
@pytest.mark.parametrize("changes, kind, message", BAD_TENSORS + BAD_NUMBERS)
def test_bad_argument(function, changes, kind, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call(function, changes)
    assert caught.type is kind


@pytest.mark.parametrize("backend", ["fast", "CPU", "", 3, ["cpu"]])
def test_unknown_backend(backend):
    with pytest.raises(ValueError, match=r"backend must be None or one of reference, cpu, triton, cuda, got"):
        call(autofocus_conv, {"backend": backend})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_not_dense():
    with pytest.raises(ValueError, match=r"input must be a dense \(strided\) tensor, got a nested tensor"):
        call(autofocus_conv, {"input": torch.nested.nested_tensor([zeros(3, 6, 7)] * 2)})


def test_numpy_integers_are_ints():
    """As in torch's own convolutions: rates often come from np.arange."""
    changes = {"dilations": tuple(np.arange(1, 3)), "stride": np.int64(1), "padding": (np.int32(1), np.int64(1))}
    assert torch.equal(call(autofocus_conv, changes), call(autofocus_conv, {}))


def test_unbatched_input_needs_an_unbatched_attention():
    tensors = testing.make_tensors(CASE)
    with pytest.raises(ValueError, match=r"input must be \[N, C, \*S\].*got shape \[3, 6, 7\]"):
        call(autofocus_conv, {"input": tensors.input[0]})
    with pytest.raises(ValueError, match=r"attention must be .* = \[2, 2, 6, 7\], got shape \[2, 6, 7\]"):
        call(autofocus_conv, {"attention": tensors.attention[0]})


def test_autocast_does_not_hide_an_integer_dtype():
    with (
        torch.autocast("cpu"),
        pytest.raises(TypeError, match="attention must be float16, bfloat16, float32 or float64"),
    ):
        call(autofocus_conv, {"attention": zeros(2, 2, 6, 7, dtype=torch.int32)})


def test_a_bad_call_under_compile_still_raises():
    compiled = torch.compile(autofocus_conv, backend="eager")
    with pytest.raises(ValueError, match="stride must be at least 1"):
        call(compiled, {"stride": 0})


@pytest.mark.parametrize("dilation", [10**4, 2**31, 2**48])
def test_a_huge_dilation_leaves_the_centre_tap(backend, dilation):
    """No allocation grows with the dilation and no offset overflows: everything but the centre reads zeros."""
    tensors = testing.make_tensors(Case("huge", (6, 7), channels=3, out_channels=4))
    input, weight, attention = tensors.input, tensors.weight, tensors.attention[:, :1]
    output = autofocus_conv(input, weight, attention, dilations=(dilation,), backend=backend)
    expected = attention * torch.einsum("oc,nchw->nohw", weight[:, :, 1, 1], input)
    torch.testing.assert_close(output, expected)


def test_padding_and_stride_beyond_32_bits(backend):
    """Three outputs of which the middle one reads the input's only voxel."""
    one = torch.ones(1, 1, 1)
    output = autofocus_conv(
        one, one, torch.ones(1, 2, 3), dilations=(1, 2), stride=2**40, padding=2**40, backend=backend
    )
    assert output.flatten().tolist() == [0, 2, 0]


@pytest.mark.parametrize("branches", [33, 70])
def test_many_branches(branches):
    """More than a compiled backend may hold in its tables: another one takes the call."""
    case = Case("many", (5, 6), dilations=tuple(range(1, branches + 1)))
    testing.check(None, case)


# ------------------------------------------------------------------ operators called directly


def of_operator(**changes):
    """Arguments of ``torch.ops.autofocus.forward`` in two dimensions."""
    tensors = {"input": zeros(1, 2, 6, 7), "weight": zeros(3, 2, 3, 3), "attention": zeros(1, 2, 6, 7)}
    others = {"bias": None, "branch_scale": None, "branch_shift": None}
    integers = {"dilations": [1, 1, 2, 2], "stride": [1, 1], "origin": [0, 0]}
    return {**tensors, **others, **integers, "backend": None, **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stride": []}, r"stride must have an int for each of the 2 spatial axes of weight, got \(\)"),
        ({"stride": [1, 1, 1]}, "stride must have an int for each of the 2"),
        ({"origin": [0]}, "origin must have an int for each of the 2"),
        ({"dilations": []}, "dilations must have 2 ints for each branch"),
        ({"dilations": [1, 1, 2]}, "dilations must have 2 ints for each branch"),
    ],
)
def test_lists_of_an_operator_have_the_length_that_they_must(changes, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.autofocus.forward(**of_operator(**changes))


def test_an_operator_names_its_backend():
    with pytest.raises(ValueError, match="^backend must be None or one of .*, got 'fast'"):
        torch.ops.autofocus.forward(**of_operator(backend="fast"))


@pytest.mark.parametrize("mask", [[], [True] * 3, [True] * 7, [True] * 6])
def test_the_mask_of_a_backward_is_of_what_there_is(mask):
    with pytest.raises(ValueError, match="output_mask must have one bool for each of 6 arguments, false where"):
        torch.ops.autofocus.backward(zeros(1, 3, 6, 7), **of_operator(), output_mask=mask)


def of_norms(**changes):
    arguments = of_operator()
    for name in ("branch_scale", "branch_shift"):
        del arguments[name]
    norms = {
        "norm_weight": zeros(2, 3),
        "norm_bias": zeros(2, 3),
        "eps": [1e-5] * 2,
        "save_branches": True,
        "group": None,
    }
    return {**arguments, **norms, **changes}


@pytest.mark.parametrize("eps", [[], [1e-5], [1e-5] * 3])
def test_there_is_an_eps_for_each_branch(eps):
    with pytest.raises(ValueError, match="eps must have a float for each of 2 branches"):
        torch.ops.autofocus.branch_norm(**of_norms(eps=eps))


@pytest.mark.parametrize("mask", [[True] * 3, [True] * 7])
def test_the_mask_of_batch_norms_backward_too(mask):
    arguments = of_norms()
    del arguments["bias"]
    output, mean, var, count, branches = torch.ops.autofocus.branch_norm(**of_norms())
    saved = {"mean": mean, "var": var, "count": count, "branches": branches}
    with pytest.raises(ValueError, match="output_mask must have one bool for each of 5 arguments"):
        torch.ops.autofocus.branch_norm_backward(output, **arguments, **saved, output_mask=mask)
