"""Derivatives of every order and kind: gradcheck, forward mode, torch.func, and what is saved for backward."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from autofocus_kernels import AutofocusConv2d, autofocus_conv, reference, testing
from autofocus_kernels.testing import Case

CASES = (
    Case("plain", (3, 2), channels=2, out_channels=2, dilations=(1, 2), gate="normal"),
    Case("branch", (3, 2), channels=2, out_channels=2, dilations=(1, 2), gate="normal", mode="branch"),
    Case("scale", (4,), channels=2, out_channels=2, dilations=(1, 2), gate="normal", mode="scale"),
    Case("shift", (4,), channels=2, out_channels=2, dilations=(1, 2), gate="normal", mode="shift"),
    Case("stride", (7, 4), channels=1, out_channels=2, dilations=(2, 3), stride=2, padding=1, bias=False),
    Case("3d", (2, 3, 2), channels=2, out_channels=1, dilations=(1, 2), kernel_size=(1, 3, 3)),
)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def positional(backend, case):
    """(function of the argument tensors, the argument tensors), for checkers that take a tuple of inputs."""
    arguments = testing.make_tensors(case, torch.float64, requires_grad=True).arguments()

    def function(*tensors):
        return autofocus_conv(**dict(zip(arguments, tensors)), **case.options, backend=backend)

    return function, tuple(arguments.values())


@each_case
def test_gradcheck(backend, case):
    function, inputs = positional(backend, case)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)


@each_case
def test_gradgradcheck(backend, case):
    function, inputs = positional(backend, case)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@each_case
def test_double_backward_equals_the_references(backend, case):
    tensors = testing.make_tensors(case, torch.float64)

    def second_order(function):
        arguments = {n: t.detach().requires_grad_() for n, t in tensors.arguments().items()}
        output = function(**arguments, **case.options)
        first = torch.autograd.grad(output, list(arguments.values()), tensors.grad_output, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        return dict(zip(arguments, torch.autograd.grad(penalty, list(arguments.values()))))

    results = second_order(partial(autofocus_conv, backend=backend))
    expected = second_order(reference.autofocus_conv)
    for name in expected:
        assert testing.relative_error(results[name], expected[name]) < 1e-12, name


@each_case
def test_forward_mode_without_functorch(backend, case):
    tensors = testing.make_tensors(case, torch.float64)
    along = testing.make_tensors(case, torch.float64, seed=1)

    def tangent(function):
        with forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(tensor, along.arguments()[name])
                for name, tensor in tensors.arguments().items()
            }
            return forward_ad.unpack_dual(function(**duals, **case.options)).tangent

    result = tangent(partial(autofocus_conv, backend=backend))
    assert testing.relative_error(result, tangent(reference.autofocus_conv)) < 1e-13


# ------------------------------------------------------------------ torch.func


@each_case
def test_func_grad_jvp_and_vjp(backend, case):
    function, inputs = positional(backend, case)
    inputs = tuple(tensor.detach() for tensor in inputs)
    along = tuple(testing.make_tensors(case, torch.float64, seed=1).arguments().values())
    everything = tuple(range(len(inputs)))

    output, tangent = jvp(function, inputs, along)
    loss_gradients = grad(lambda *tensors: function(*tensors).sum(), argnums=everything)(*inputs)
    pulled = vjp(function, *inputs)[1](torch.ones_like(output))
    for one, other in zip(loss_gradients, pulled):
        torch.testing.assert_close(one, other)
    # <J v, 1> = <v, J^T 1>
    inner = sum((gradient * v).sum() for gradient, v in zip(loss_gradients, along))
    torch.testing.assert_close(tangent.sum(), inner)
    expected = reference.autofocus_conv(**dict(zip(testing.make_tensors(case).arguments(), inputs)), **case.options)
    torch.testing.assert_close(output, expected)


def test_jacrev_equals_jacfwd(backend):
    function, inputs = positional(backend, CASES[0])
    inputs = tuple(tensor.detach() for tensor in inputs)
    everything = tuple(range(len(inputs)))
    for reverse, forward in zip(jacrev(function, everything)(*inputs), jacfwd(function, everything)(*inputs)):
        torch.testing.assert_close(reverse, forward)


def test_hessian_of_the_input(backend):
    """Reverse over reverse and forward over reverse, of a loss that is not linear in the output."""
    function, (input, *others) = positional(backend, CASES[0])
    others = [tensor.detach() for tensor in others]

    def loss(input):
        return function(input, *others).pow(3).sum()

    def expected_loss(input):
        names = testing.make_tensors(CASES[0]).arguments()
        return reference.autofocus_conv(**dict(zip(names, (input, *others))), **CASES[0].options).pow(3).sum()

    expected = torch.autograd.functional.hessian(expected_loss, input.detach())
    torch.testing.assert_close(jacrev(grad(loss))(input.detach()), expected)
    torch.testing.assert_close(jacfwd(grad(loss))(input.detach()), expected)


def along_itself(function):
    """The derivative of ``function`` at tensors along a direction that depends on them."""
    return lambda *tensors: jvp(function, tensors, tuple(tensor.sin() for tensor in tensors))[1]


def vectorized_hessian(function, inputs):
    rows = torch.autograd.functional.hessian(lambda *tensors: function(*tensors).tanh().sum(), inputs, vectorize=True)
    return [block for row in rows for block in row]


# Of the layer as a function of its tensors, and of these: tensors.
NESTED = {
    "forward twice": lambda f, x: along_itself(along_itself(f))(*x),
    "forward three times": lambda f, x: along_itself(along_itself(along_itself(f)))(*x),
    "forward twice over samples": lambda f, x: vmap(along_itself(along_itself(f)))(*(torch.stack([t, -t]) for t in x)),
    "reverse over forward": lambda f, x: grad(lambda *t: along_itself(f)(*t).tanh().sum())(*x),
    "forward over reverse over forward": lambda f, x: along_itself(grad(lambda *t: along_itself(f)(*t).tanh().sum()))(
        *x
    ),
    "forward over reverse twice": lambda f, x: along_itself(
        grad(lambda *s: grad(lambda *t: f(*t).tanh().sum())(*s).sin().sum())
    )(*x),
    "reverse over forward over reverse": lambda f, x: grad(
        lambda *s: along_itself(grad(lambda *t: f(*t).tanh().sum()))(*s).sum()
    )(*x),
    "hessian": lambda f, x: hessian(lambda *t: f(*t).tanh().sum(), tuple(range(len(x))))(*x)[0][1],
    "jacfwd twice": lambda f, x: jacfwd(jacfwd(lambda *t: f(*t).tanh().sum()))(*x),
    "jacrev over jacfwd": lambda f, x: jacrev(jacfwd(lambda *t: f(*t).tanh().sum()))(*x),
    "functionalize": lambda f, x: functionalize(f)(*x),
    "hessian of torch.autograd, vectorized": lambda f, x: torch.cat([t.flatten() for t in vectorized_hessian(f, x)]),
    "jacobian of torch.autograd, vectorized, forward": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    )[-1],
}


@pytest.mark.parametrize("transforms", NESTED)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_transforms_nest(backend, case, transforms):
    names = testing.make_tensors(case).arguments()
    function, inputs = positional(backend, case)
    inputs = tuple(tensor.detach() for tensor in inputs)

    def plain(*tensors):
        return reference.autofocus_conv(**dict(zip(names, tensors)), **case.options)

    result, expected = (NESTED[transforms](f, inputs) for f in (function, plain))
    assert expected.norm() > 1e-3
    torch.testing.assert_close(result, expected)


def test_forward_over_reverse_twice_without_functorch(backend):
    function, (input, *others) = positional(backend, CASES[0])
    names = testing.make_tensors(CASES[0]).arguments()

    def tangent(function):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(input, input.detach().sin())
            (first,) = torch.autograd.grad(function(dual, *others).tanh().sum(), dual, create_graph=True)
            (second,) = torch.autograd.grad(first.sin().sum(), dual)
            return forward_ad.unpack_dual(second).tangent

    def plain(*tensors):
        return reference.autofocus_conv(**dict(zip(names, tensors)), **CASES[0].options)

    torch.testing.assert_close(tangent(function), tangent(plain))


SUBSETS = (
    ("input",),
    ("input", "attention"),
    ("weight",),
    ("attention", "bias"),
    ("input", "weight", "attention", "bias"),
)


@pytest.mark.parametrize("batched", SUBSETS, ids="-".join)
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_over(backend, batched, axis):
    """vmap over any subset of arguments, along any axis, equals a loop."""
    case = CASES[0]
    samples = [testing.make_tensors(case, torch.float64, seed=seed).arguments() for seed in range(3)]
    stacked = {
        name: torch.stack([sample[name] for sample in samples], min(axis, samples[0][name].dim())) for name in batched
    }

    def function(varying):
        return autofocus_conv(**{**samples[0], **varying}, **case.options, backend=backend)

    dims = ({name: min(axis, samples[0][name].dim()) for name in batched},)
    results = vmap(function, in_dims=dims)(stacked)
    for result, sample in zip(results, samples):
        expected = function({name: sample[name] for name in batched})
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dilations", [(1, 2), (2, 3)])
def test_per_sample_gradients(backend, dilations):
    """vmap(grad) over a batch equals one backward per sample."""
    layer = AutofocusConv2d(3, 4, dilations=dilations, backend=backend, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    inputs = torch.randn(3, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample.unsqueeze(0),)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs)
    for i, sample in enumerate(inputs):
        layer.zero_grad()
        layer(sample.unsqueeze(0)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(per_sample[name][i], parameter.grad)


@pytest.mark.parametrize("dims", [(0, None, 0), (None, 0, None), (0, 0, 0)], ids=str)
def test_vmap_over_nothing(backend, dims):
    """Results and gradients have the shapes that a longer axis gives them."""
    tensors = testing.make_tensors(CASES[0])[:3]
    arguments = [t if dim is None else t.new_zeros(0, *t.shape) for t, dim in zip(tensors, dims)]

    def function(*tensors):
        return autofocus_conv(*tensors, **CASES[0].options, backend=backend)

    def total(*tensors):
        return function(*tensors).sum()

    assert vmap(function, dims)(*arguments).shape == (0, *function(*tensors).shape)
    for i, tensor in enumerate(tensors):
        assert vmap(grad(total, i), dims)(*arguments).shape == (0, *tensor.shape)


def test_vmap_of_backward_over_each_gradient(backend):
    """A batch of incoming gradients (is_grads_batched), for every argument at once and for the input alone."""
    function, inputs = positional(backend, CASES[0])
    output = function(*inputs)
    incoming = torch.randn(3, *output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for wanted in (inputs, inputs[:1]):
        batched = torch.autograd.grad(output, wanted, incoming, is_grads_batched=True, retain_graph=True)
        for i, gradient in enumerate(incoming):
            for one, other in zip(batched, torch.autograd.grad(output, wanted, gradient, retain_graph=True)):
                torch.testing.assert_close(one[i], other)


# ------------------------------------------------------------------ memory


@each_case
@pytest.mark.parametrize("branches", [1, 7])
def test_saved_for_backward_are_the_arguments_only(backend, case, branches):
    case = Case("saved", case.size, 3, 4, dilations=tuple(range(1, branches + 1)), mode=case.mode, bias=case.bias)
    arguments = testing.make_tensors(case, requires_grad=True).arguments()
    saved = testing.saved_bytes(lambda: autofocus_conv(**arguments, **case.options, backend=backend))
    assert saved == sum(tensor.nbytes for tensor in arguments.values())


def test_nothing_is_saved_without_gradients(backend):
    arguments = testing.make_tensors(CASES[0]).arguments()
    assert testing.saved_bytes(lambda: autofocus_conv(**arguments, **CASES[0].options, backend=backend)) == 0


def test_inference_mode(backend):
    arguments = testing.make_tensors(CASES[0]).arguments()
    with torch.inference_mode():
        output = autofocus_conv(**arguments, **CASES[0].options, backend=backend)
    assert output.is_inference()
    assert torch.equal(output, autofocus_conv(**arguments, **CASES[0].options, backend=backend))


def test_checkpoint_recomputes_the_same_gradients(backend):
    function, inputs = positional(backend, CASES[1])
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    again = torch.autograd.grad(checkpoint(function, *inputs, use_reentrant=False).square().sum(), inputs)
    for one, other in zip(again, expected):
        assert torch.equal(one, other)


def test_calls_from_several_threads_do_not_meet(backend):
    case = Case("threads", (9, 8, 10), channels=8, out_channels=8, dilations=(1, 2))
    tensors = [testing.make_tensors(case, seed=seed) for seed in range(4)]
    run = partial(testing.evaluate, partial(autofocus_conv, backend=backend), case)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, tensors))
    for results, expected in zip(together, map(run, tensors)):
        for name in expected:
            torch.testing.assert_close(results[name], expected[name], msg=lambda text: f"{name}: {text}")


def test_in_place_change_before_backward_is_an_error(backend):
    function, inputs = positional(backend, CASES[0])
    output = function(*inputs)
    with torch.no_grad():
        inputs[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
