"""Batch-normalised branches against the layer written out: a convolution and an ``nn.BatchNormNd`` per branch."""

import copy
import io
from functools import partial

import pytest
import torch
from helpers.plain_norms import (
    CASES,
    assert_same,
    check_rounding,
    compare,
    evaluate,
    make_norms,
    plain,
    plain_layer,
    run_both,
)
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.library import opcheck

from autofocus_kernels import AutofocusConv1d, AutofocusConv2d, AutofocusConv3d, testing
from autofocus_kernels.branch_norm import normed_autofocus_conv
from autofocus_kernels.call import Call
from autofocus_kernels.ops import branch_norm as branch_norm_ops
from autofocus_kernels.testing import Case, relative_error

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_choice = pytest.mark.parametrize("save_branches", [False, True], ids=["recompute", "save"])
# ------------------------------------------------------------------ numbers


@each_choice
@each_case
def test_batch_statistics(backend, case, save_branches):
    tensors = testing.make_tensors(case, torch.float64)
    results, expected = run_both(case, tensors, make_norms(case), backend, save_branches=save_branches)
    assert_same(results, expected)
    assert results["output"].is_contiguous(memory_format=case.memory_format)


@each_case
def test_running_statistics(backend, case):
    tensors = testing.make_tensors(case, torch.float64)
    results, expected = run_both(case, tensors, make_norms(case).eval(), backend)
    assert_same(results, expected)


@each_choice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_rounding_is_no_worse_than_the_plain_layers(backend, dtype, save_branches, training):
    case = Case("rounding", (9, 10, 11), channels=24, out_channels=17, dilations=(1, 2, 4), batch=2)
    check_rounding(case, backend, dtype, save_branches, training)


@each_choice
def test_means_far_from_zero(backend, save_branches):
    """A mean 1000 times the deviation: sums of squares would lose every digit of a float32 variance."""
    case = Case("offset", (16, 17), dilations=(1, 2), padding=0, channels=3, out_channels=4, bias=False)
    tensors = testing.make_tensors(case)
    tensors = tensors._replace(input=tensors.input + 1000)
    function = partial(normed_autofocus_conv, save_branches=save_branches, backend=backend)
    compare(function, case, tensors, make_norms(case, torch.float32))


# ------------------------------------------------------------------ what is kept for backward

LAYER_CASE = Case("layer", (6, 7, 8), channels=3, out_channels=5, dilations=(1, 2, 3), batch=2)


def test_bytes_saved_for_backward(backend):
    case = LAYER_CASE
    tensors = testing.make_tensors(case, requires_grad=True)
    primals = sum(t.numel() for t in tensors[:4])
    branches = case.num_branches * case.out_channels * tensors.attention[:, 0].numel()

    def saved(training, **options):
        norms = make_norms(case, torch.float32).train(training)
        return testing.saved_bytes(
            lambda: normed_autofocus_conv(*tensors[:4], norms, **case.options, backend=backend, **options)
        )

    vectors = 10 * 4 * case.num_branches * case.out_channels
    assert 4 * primals <= saved(True) <= 4 * primals + vectors
    assert 4 * (primals + branches) <= saved(True, save_branches=True) <= 4 * (primals + branches) + vectors
    assert saved(False) <= 4 * primals + vectors


@each_choice
@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_bytes_saved_by_a_whole_layer(backend, padding, save_branches):
    """Input, hidden channels of the gate and attention, each once: no padded or cropped copy of the input."""
    layer = AutofocusConv3d(
        8, 8, padding=padding, dilations=(2, 3), branch_norm=True, save_branches=save_branches, backend=backend
    )
    input = torch.randn(1, 8, 12, 13, 14, requires_grad=True)
    _, attention = layer(input, return_attention=True)
    hidden = 4 * attention[:, 0].numel()
    branches = 2 * 8 * attention[:, 0].numel() if save_branches else 0
    parameters = sum(p.numel() for p in layer.parameters())
    expected = 4 * (input.numel() + hidden + attention.numel() + branches + parameters)
    saved = testing.saved_bytes(lambda: layer(input))
    assert 4 * (input.numel() + branches) <= saved <= expected + 10 * 4 * 2 * 8


@each_choice
def test_backward_twice_gives_the_same(backend, save_branches):
    """Nothing that is saved is overwritten."""
    tensors = testing.make_tensors(LAYER_CASE, requires_grad=True)
    norms = make_norms(LAYER_CASE, torch.float32)
    output = normed_autofocus_conv(
        *tensors[:4], norms, **LAYER_CASE.options, backend=backend, save_branches=save_branches
    )
    leaves = [*tensors[:4], *norms.parameters()]
    first = torch.autograd.grad(output, leaves, tensors.grad_output, retain_graph=True)
    second = torch.autograd.grad(output, leaves, tensors.grad_output)
    assert all(map(torch.equal, first, second))


@each_choice
def test_only_what_is_wanted(backend, save_branches):
    """Frozen arguments get no gradient and change none of the others."""
    tensors = testing.make_tensors(LAYER_CASE, torch.float64)
    norms = make_norms(LAYER_CASE)
    expected = evaluate(plain, LAYER_CASE, tensors, copy.deepcopy(norms))
    for name in ("input", "weight", "attention", "0.weight"):
        leaf = {**dict(norms.named_parameters()), **tensors.arguments()}[name]
        arguments = [t.detach() for t in tensors[:4]]
        for parameter in norms.parameters():
            parameter.requires_grad_(parameter is leaf)
        if name in tensors.arguments():
            slot = tensors._fields.index(name)
            leaf = arguments[slot] = arguments[slot].requires_grad_()
        output = normed_autofocus_conv(
            *arguments, norms, **LAYER_CASE.options, backend=backend, save_branches=save_branches
        )
        (gradient,) = torch.autograd.grad(output, leaf, tensors.grad_output)
        assert relative_error(gradient, expected[f"gradient of {name}"]) < 1e-12


# ------------------------------------------------------------------ the norms are real batch norms


def make_layer(backend=None, dtype=torch.float64, **options):
    torch.manual_seed(3)
    return AutofocusConv2d(3, 4, dilations=(1, 2, 3), branch_norm=True, backend=backend, dtype=dtype, **options)


CHANGES = ("momentum", "cumulative", "no_affine", "mixed_affine", "no_bias", "no_tracking", "no_count", "eps")


@pytest.mark.parametrize("change", CHANGES)
def test_three_steps_and_evaluation(backend, change):
    """Running statistics and optimiser steps as in the plain layer, whatever is set on the norms."""
    layer = make_layer(backend)
    if change in ("no_affine", "mixed_affine", "no_tracking"):
        affine = {"no_affine": (), "mixed_affine": (1,)}.get(change, (0, 1, 2))
        layer.branch_norm = nn.ModuleList(
            nn.BatchNorm2d(4, affine=k in affine, track_running_stats=change != "no_tracking") for k in range(3)
        ).double()
    for k, norm in enumerate(layer.branch_norm):
        norm.momentum = {"momentum": 0.2 + 0.1 * k, "cumulative": None}.get(change, norm.momentum)
        norm.eps = 0.1 * (k + 1) if change == "eps" else norm.eps
        if change == "no_bias" and k > 0:
            norm.register_parameter("bias", None)
        if change == "no_count":
            norm.num_batches_tracked = None
    other = copy.deepcopy(layer)
    optimisers = [
        torch.optim.RMSprop(
            [
                {"params": m.branch_norm.parameters(), "weight_decay": 0.0},
                {"params": [m.weight, m.bias, *m.attention.parameters()]},
            ],
            lr=1e-2,
            weight_decay=1e-2,
        )
        for m in (layer, other)
    ]
    for step in range(4):
        input = torch.randn(2, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        if step == 3:
            layer.eval()
            other.eval()
        outputs = layer(input), plain_layer(other, input)
        assert relative_error(*outputs) < 1e-10
        for output, optimiser in zip(outputs, optimisers):
            optimiser.zero_grad()
            output.square().sum().backward()
            if step < 3:
                optimiser.step()
    for name, value in other.state_dict().items():
        assert relative_error(layer.state_dict()[name], value) < 1e-9, name
    for (name, parameter), expected in zip(layer.named_parameters(), other.parameters()):
        assert relative_error(parameter.grad, expected.grad) < 1e-8 or name == "bias", name


@each_choice
def test_bias_goes_to_the_first_branch(backend, save_branches):
    """As in the paper's code: absorbed in training, with a gradient of zeros so that weight decay reaches it."""
    layer, free = make_layer(backend, save_branches=save_branches), make_layer(backend)
    with torch.no_grad():
        layer.bias.copy_(torch.arange(1.0, 5.0))
        free.bias = None
    input = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    output = layer(input)
    assert relative_error(output, free(input)) < 1e-13
    output.square().sum().backward()
    assert torch.equal(layer.bias.grad, torch.zeros_like(layer.bias))
    for k, (norm, other) in enumerate(zip(layer.branch_norm, free.branch_norm)):
        moved = 0.1 * layer.bias if k == 0 else torch.zeros_like(layer.bias)
        torch.testing.assert_close(norm.running_mean - other.running_mean, moved, rtol=0, atol=1e-12)
        assert torch.equal(norm.running_var, other.running_var)


def test_state_dict_and_deep_copy():
    layer = make_layer()
    names = set(layer.state_dict())
    entries = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert {f"branch_norm.{k}.{entry}" for k in range(3) for entry in entries} < names
    assert names - {n for n in names if n.startswith("branch_norm")} == set(
        AutofocusConv2d(3, 4, dilations=(1, 2, 3)).state_dict()
    )
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in other.branch_norm)


def test_frozen_norms_in_a_layer_that_trains(backend):
    """The usual way to freeze batch norm: eval() on the norms alone."""
    layer = make_layer(backend)
    layer(torch.randn(2, 3, 6, 7, dtype=torch.float64))
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = copy.deepcopy(layer.state_dict())
    input = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    assert layer.training
    assert relative_error(layer(input), plain_layer(layer, input)) < 1e-12
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_unbatched_input_is_a_batch_of_one(backend):
    layer = make_layer(backend)
    input = torch.randn(3, 6, 7, dtype=torch.float64)
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(layer(input), layer(input.unsqueeze(0)).squeeze(0))


@each_choice
@pytest.mark.parametrize("requires_grad", [True, False], ids=["inner", "first"])
def test_empty_batch(backend, save_branches, requires_grad):
    """No output, gradients of zeros, and running statistics that stay, as with nn.BatchNorm2d."""
    layer = make_layer(backend, save_branches=save_branches)
    input = torch.randn(0, 3, 6, 7, dtype=torch.float64, requires_grad=requires_grad)
    output = layer(input)
    assert output.shape == (0, 4, 6, 7)
    output.sum().backward()
    assert (input.grad.shape == input.shape) if requires_grad else (input.grad is None)
    for name, parameter in layer.named_parameters():
        assert "attention" in name or torch.equal(parameter.grad, torch.zeros_like(parameter))
    for norm in layer.branch_norm:
        assert norm.num_batches_tracked == 1
        assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))


def test_input_of_which_only_padding_is_left(backend):
    """An empty axis that padding fills: every branch is zero, and so is its variance."""
    case = Case("filled", (0, 7), padding=2, dilations=(1, 2), batch=2)
    tensors = testing.make_tensors(case, torch.float64, requires_grad=True)
    norms = make_norms(case)
    output = normed_autofocus_conv(*tensors[:4], norms, **case.options, backend=backend)
    expected = sum(a.unsqueeze(1) * norm.bias.view(-1, 1, 1) for a, norm in zip(tensors.attention.unbind(1), norms))
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert torch.equal(tensors.weight.grad, torch.zeros_like(tensors.weight))


@pytest.mark.parametrize("size", [(10**6,), (1000, 1000)], ids=str)
def test_statistics_of_many_voxels_far_from_zero(backend, size):
    """Sums of 10^6 numbers around 0.1 +- 0.001, in float32, which gives these numbers to 1e-5 of their deviation."""
    layer = (AutofocusConv1d, AutofocusConv2d)[len(size) - 1](
        1, 1, 1, dilations=(1, 2), branch_norm=True, bias=False, backend=backend
    )
    nn.init.ones_(layer.weight)
    input = 0.1 + 1e-3 * torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
    output = layer.blend(input, layer.weight, torch.full((1, 2, *size), 0.5), "same")
    norm = (nn.BatchNorm1d, nn.BatchNorm2d)[len(size) - 1](1, dtype=torch.float64)
    assert relative_error(output, norm(input.double())) < 1e-5
    output.backward(0.1 * torch.ones_like(output))
    for norm in layer.branch_norm:
        assert norm.bias.grad.item() == pytest.approx(0.05e6, rel=1e-5)


def test_sums_over_many_samples_of_one_sign(backend):
    """All terms are rounded alike: the samples' sums, added one by one in float32, lose 1.5e-4."""
    shape = (2**14, 1, 2, 2)
    layer = AutofocusConv2d(1, 2, 1, dilations=(1, 2), branch_norm=True, bias=False, backend=backend)
    input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    output = layer.blend(input, layer.weight, torch.full((shape[0], 2, 2, 2), 0.5), "same")
    output.backward(0.1 * torch.ones_like(output))
    for norm in layer.branch_norm:
        torch.testing.assert_close(norm.bias.grad, torch.full((2,), 0.05 * input.numel()), rtol=1e-5, atol=0)


def test_statistics_of_many_samples_far_from_zero_in_forward_mode():
    """By the plain definition, as every transform: 2^14 samples around 0.1 +- 0.001."""
    shape = (2**14, 1, 2, 2)
    layer = AutofocusConv2d(1, 1, 1, dilations=(1, 2), branch_norm=True, bias=False)
    nn.init.ones_(layer.weight)
    input = 0.1 + 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(input, torch.ones_like(input))
        output = layer.blend(dual, layer.weight, torch.full((shape[0], 2, 2, 2), 0.5), "same")
        output = forward_ad.unpack_dual(output).primal
    assert relative_error(output, nn.BatchNorm2d(1, dtype=torch.float64)(input.double())) < 1e-5


# ------------------------------------------------------------------ errors


def test_errors_say_what_is_needed(backend):
    layer = make_layer(backend)
    input = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"more than one value per channel .* got an output of shape \[1, 4, 1, 1\]"):
        layer(input[:1, :, :1, :1])
    layer.branch_norm[1].eval()
    with pytest.raises(RuntimeError, match="all batch or all running statistics, got batch, running, batch"):
        layer(input)
    layer.branch_norm[1] = nn.GroupNorm(1, 4)
    with pytest.raises(TypeError, match=r"branch_norm\[1\] must be a batch norm, got GroupNorm"):
        layer(input)
    layer.branch_norm[1] = nn.BatchNorm3d(4)
    with pytest.raises(
        TypeError, match=r"branch_norm\[1\] must be of the layer's dimension, BatchNorm2d, got BatchNorm3d"
    ):
        layer(input)
    layer.branch_norm[1] = nn.BatchNorm2d(5)
    with pytest.raises(ValueError, match=r"branch_norm\[1\] must have num_features = 4, got 5"):
        layer(input)
    layer.branch_norm = layer.branch_norm[:1]
    with pytest.raises(ValueError, match="one norm for each of the 3 dilations, got 1"):
        layer(input)


@pytest.mark.parametrize("absent", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_a_norm_on_another_device_is_named(absent):
    """By whichever of its tensors it has."""
    layer = make_layer("reference")
    layer.branch_norm[1] = nn.BatchNorm2d(4, device="meta", **absent)
    with pytest.raises(ValueError, match=r"branch_norm\[1\] must be on the device of input, cpu, got meta"):
        layer(torch.randn(2, 3, 6, 7, dtype=torch.float64))


def test_norms_that_are_sharded_without_their_layer_are_named(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        layer = make_layer("reference")
        fully_shard(layer.branch_norm[1])
        with pytest.raises(RuntimeError, match=r"branch_norm\[1\] must not be sharded without its layer"):
            layer(torch.randn(2, 3, 6, 7, dtype=torch.float64))
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------ derivatives of every kind


def layer_loss(layer, function=None):
    generator = torch.Generator().manual_seed(5)
    input = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator).requires_grad_()
    output = (function or layer)(input)
    return (output**3).sum(), [input, *layer.parameters()]


@each_choice
@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_gradient_of_a_gradient(backend, training, save_branches):
    layer = make_layer(backend, detach_attention=False, save_branches=save_branches).train(training)
    plain_one = copy.deepcopy(layer)

    def second_order(layer, function=None):
        loss, leaves = layer_loss(layer, function)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        penalty = sum((g**2).sum() for g in gradients)
        return torch.autograd.grad(penalty, leaves, materialize_grads=True)

    expected = second_order(plain_one, lambda input: plain_layer(plain_one, input))
    largest = max(g.abs().max() for g in expected)
    for result, exact in zip(second_order(layer), expected):
        torch.testing.assert_close(result, exact, rtol=1e-8, atol=1e-10 * largest)


def norm_by_arithmetic(norm):
    """``norm`` by batch statistics, written out: ``F.batch_norm`` has wrong third derivatives, or none (torch 2.14)."""
    weight, bias = (vector.view(-1, 1, 1) for vector in (norm.weight, norm.bias))

    def function(branch):
        centred = branch - branch.mean((0, 2, 3), keepdim=True)
        return weight * centred / (centred.square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt() + bias

    return function


def test_a_third_derivative(backend):
    layer = make_layer(backend, detach_attention=False)
    plain_one = copy.deepcopy(layer)

    def third_order(layer, function=None):
        value, (input, *_) = layer_loss(layer, function)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, input, create_graph=True)
            value = (gradient**2).sum()
        return gradient

    norms = [norm_by_arithmetic(norm) for norm in plain_one.branch_norm]
    expected = third_order(plain_one, lambda input: plain_layer(plain_one, input, norms))
    assert relative_error(third_order(layer), expected) < 1e-9


def test_gradgradcheck(backend):
    """Numerically, with each argument independent of the others."""
    case = Case("tiny", (3,), dilations=(1, 2), channels=2, out_channels=2, batch=2)
    tensors = testing.make_tensors(case, torch.float64, requires_grad=True)
    norms = make_norms(case)

    def function(input, weight, attention, norm_weight, norm_bias):
        output, _ = branch_norm_ops.apply(
            Call(input, weight, attention, None, None, None, case.geometry, backend),
            None,
            norm_weight,
            norm_bias,
            eps=[0.1, 0.2],
            save_branches=False,
            group=None,
        )
        return output

    vectors = [torch.stack([getattr(norm, name) for norm in norms]) for name in ("weight", "bias")]
    leaves = [*tensors[:3], *(v.detach().requires_grad_() for v in vectors)]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_functorch_and_forward_mode(backend, training):
    layer = make_layer(backend).train(training)
    for norm in layer.branch_norm:
        norm.track_running_stats = not training  # a transform may not update buffers that it does not own
    input = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    tangent = torch.randn(2, 3, 4, 5, dtype=torch.float64)

    def loss(function):
        return lambda input: (function(input) ** 3).sum()

    gradient = torch.func.grad(loss(layer))(input)
    expected = torch.func.grad(loss(lambda input: plain_layer(layer, input)))(input)
    assert relative_error(gradient, expected) < 1e-12
    _, moved = torch.func.jvp(loss(layer), (input,), (tangent,))
    torch.testing.assert_close(moved, (expected * tangent).sum())
    samples = torch.randn(3, 2, 3, 4, 5, dtype=torch.float64)
    mapped = torch.func.vmap(layer)(samples)
    torch.testing.assert_close(mapped, torch.stack([layer(sample) for sample in samples]))


def test_vmap_over_samples_that_would_share_running_statistics_says_what_to_do():
    layer = make_layer()
    samples = torch.randn(3, 2, 3, 4, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"branch_norm\[0\] cannot update .*replace_all_batch_norm_modules_"):
        torch.func.vmap(layer)(samples)
    assert all(norm.num_batches_tracked == 0 for norm in layer.branch_norm)
    torch.func.replace_all_batch_norm_modules_(layer)
    mapped = torch.func.vmap(layer)(samples)
    torch.testing.assert_close(mapped, torch.stack([layer(sample) for sample in samples]))


# ------------------------------------------------------------------ torch.library, torch.compile, autocast


def operator_arguments(case, save_branches, backend):
    tensors = testing.make_tensors(case, torch.float64, requires_grad=True)
    vectors = [torch.randn(case.num_branches, case.out_channels, dtype=torch.float64) for _ in range(2)]
    return (
        tensors,
        [v.requires_grad_() for v in vectors],
        (
            [1e-5] * case.num_branches,
            save_branches,
            None,
            *case.geometry.integers,
            backend,
        ),
    )


# Which gradients are wanted: of input, weight, attention and the norms' weight and bias.
MASKS = ([True] * 5, [False, True, False, True, True])


@each_choice
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(backend, save_branches, layout):
    case = Case("opcheck", (4, 5), channels=2, out_channels=3, dilations=(1, 2), batch=2, layout=layout)
    tensors, vectors, settings = operator_arguments(case, save_branches, backend)
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.autofocus.branch_norm.default, (*tensors[:4], *vectors, *settings), test_utils=quick)
    with torch.no_grad():
        _, *saved = torch.ops.autofocus.branch_norm(*tensors[:4], *vectors, *settings)
    if save_branches:
        assert saved[-1].shape == (2, 2, 3, 4, 5)  # [K, N, O, *S_out], each branch laid out like the output
        assert all(branch.is_contiguous(memory_format=case.memory_format) for branch in saved[-1])
    for mask in MASKS:
        arguments = (tensors.grad_output, *tensors[:3], *vectors, *saved, *settings, mask)
        opcheck(torch.ops.autofocus.branch_norm_backward.default, arguments, test_utils=quick)


@each_choice
def test_opcheck_of_tracing(save_branches):
    """Slow, and the same for all backends and layouts, whose fakes test_opcheck checks."""
    case = Case("opcheck", (4, 5), channels=2, out_channels=3, dilations=(1, 2), batch=2)
    tensors, vectors, settings = operator_arguments(case, save_branches, "cpu")
    dynamic = ("test_aot_dispatch_dynamic",)
    opcheck(torch.ops.autofocus.branch_norm.default, (*tensors[:4], *vectors, *settings), test_utils=dynamic)
    with torch.no_grad():
        _, *saved = torch.ops.autofocus.branch_norm(*tensors[:4], *vectors, *settings)
    arguments = (tensors.grad_output, *tensors[:3], *vectors, *saved, *settings)
    # The gradient of backward is that of plain convolutions' gradients, which PyTorch cannot trace with symbolic sizes.
    static = ("test_aot_dispatch_static",)
    opcheck(torch.ops.autofocus.branch_norm_backward.default, (*arguments, MASKS[0]), test_utils=static)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    for mask in MASKS:
        opcheck(torch.ops.autofocus.branch_norm_backward.default, (*detached, mask), test_utils=dynamic)


# No branch is kept with running statistics.
@pytest.mark.parametrize("training, save_branches", [(True, False), (True, True), (False, False)])
def test_compiled_steps(backend, training, save_branches):
    """One graph for forward and backward, running statistics included, and no recompile."""
    torch.compiler.reset()
    layer = make_layer(backend, torch.float32, save_branches=save_branches).train(training)
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(3):
        input = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(step)).requires_grad_()
        for function in (compiled, other):
            function(input).square().sum().backward()
        if step == 0:
            torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")
    for (name, value), expected in zip(layer.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(value, expected, msg=lambda text: f"{name}: {text}")
    for parameter, expected in zip(layer.parameters(), other.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_an_exported_layer_in_training_loads_and_trains():
    """torch.export of a network that is to be trained: the program updates running statistics as the layer does."""
    layer = make_layer(dtype=torch.float32)
    input = torch.randn(2, 3, 6, 7)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (input,)), file)
    file.seek(0)
    program = torch.export.load(file)
    expected = layer(input)
    expected.square().sum().backward()
    for module in (program.module(), torch.export.unflatten(program)):
        output = module(input)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        parameters = dict(module.named_parameters())
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameters[name].grad, parameter.grad)
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(buffer, layer.get_buffer(name))


@each_choice
@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_autocast(backend, training, save_branches):
    """The convolution in bfloat16, the norms in float32, as the plain layer under autocast."""
    torch.manual_seed(0)
    layer = AutofocusConv3d(
        6, 7, dilations=(1, 2), branch_norm=True, save_branches=save_branches, backend=backend
    ).train(training)
    other, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
    input = torch.randn(2, 6, 7, 8, 9)
    grad_output = torch.randn(2, 7, 7, 8, 9)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(input), plain_layer(other, input)
    truth = plain_layer(exact, input.double())
    assert outputs[0].dtype == torch.bfloat16
    for output in (*outputs, truth):
        output.backward(grad_output.to(output.dtype))
    assert relative_error(outputs[0], truth) < 2 * relative_error(outputs[1], truth) + 2**-9
    for (name, parameter), plain_one, double in zip(layer.named_parameters(), other.parameters(), exact.parameters()):
        assert parameter.grad.dtype == torch.float32
        if name != "bias" or not training:
            limit = 2 * relative_error(plain_one.grad, double.grad) + 2**-8
            assert relative_error(parameter.grad, double.grad) < limit, name
    for norm, double in zip(layer.branch_norm, exact.branch_norm):
        assert norm.running_mean.dtype == torch.float32
        assert relative_error(norm.running_var, double.running_var) < 2**-8
