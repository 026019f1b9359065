"""torch.fx.symbolic_trace through functions, layers and networks."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from autofocus_kernels import AutofocusConv1d, AutofocusConv2d, AutofocusConv3d, autofocus_conv, networks, testing
from autofocus_kernels.branch_norm import normed_autofocus_conv
from autofocus_kernels.testing import Case


@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_the_function_is_one_node(backend, mode):
    case = Case("traced", (6, 7), batch=2, mode=mode)
    tensors = testing.make_tensors(case)
    names = tuple(tensors.arguments())

    def function(input, weight, attention, *vectors):
        others = dict(zip(names[3:], vectors))
        return autofocus_conv(input, weight, attention, **others, **case.options, backend=backend).relu()

    # Python's way to say how many vectors there are; fx traces no argument of a variable number.
    functions = {
        4: lambda input, weight, attention, bias: function(input, weight, attention, bias),
        5: lambda input, weight, attention, scale, shift: function(input, weight, attention, scale, shift),
    }
    traced = fx.symbolic_trace(functions[len(names)])
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [autofocus_conv]
    arguments = tuple(tensors.arguments().values())
    assert torch.equal(traced(*arguments), function(*arguments))


def test_one_proxy_among_tensors_is_enough():
    tensors = testing.make_tensors(Case("traced", (6, 7), bias=False))
    traced = fx.symbolic_trace(
        lambda attention: autofocus_conv(tensors.input, tensors.weight, attention, dilations=(1, 2, 3))
    )
    expected = autofocus_conv(tensors.input, tensors.weight, tensors.attention, dilations=(1, 2, 3))
    assert torch.equal(traced(tensors.attention), expected)


@pytest.mark.parametrize(
    "Layer, settings",
    [
        (AutofocusConv1d, {"stride": 2, "padding": 1}),
        (AutofocusConv2d, {"padding": "valid", "detach_attention": False}),
        (AutofocusConv3d, {"branch_norm": True}),
    ],
)
def test_a_layer_and_its_gradients(backend, Layer, settings):
    torch.manual_seed(0)
    layer = Layer(2, 3, dilations=(1, 2, 4), backend=backend, **settings)
    original = copy.deepcopy(layer)
    traced = fx.symbolic_trace(layer)
    traced.graph.lint()
    input = torch.randn(2, 2, *(9, 8, 7)[: layer.spatial_dims])
    for output, expected in zip(traced(input, return_attention=True), original(input, return_attention=True)):
        assert torch.equal(output, expected)
    traced(input).square().sum().backward()
    original(input).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in traced.named_parameters()}
    assert gradients.keys() == dict(original.named_parameters()).keys()
    for name, parameter in original.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("branch_norm", [False, True])
def test_a_node_has_the_settings_of_its_layer(branch_norm):
    """Results alone would not tell a backend from another, nor whether branches are saved."""
    settings = {"stride": (2, 1), "padding": (1, 3), "backend": "reference"}
    layer = AutofocusConv2d(2, 3, dilations=(1, 2), branch_norm=branch_norm, save_branches=True, **settings)
    target = normed_autofocus_conv if branch_norm else autofocus_conv
    (node,) = fx.symbolic_trace(layer).graph.find_nodes(op="call_function", target=target)
    expected = {"dilations": layer.dilations, **settings, **({"save_branches": True} if branch_norm else {})}
    assert {name: value for name, value in node.kwargs.items() if value is not None} == expected


@pytest.mark.parametrize("name", ["AFN-6", "ASPP-c", "ASPP-s"])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_a_network_keeps_its_modes(name, padding):
    """The norms of a traced network are modules still: train and eval switch them, and a pickle keeps them."""
    torch.manual_seed(1)
    widths = (4, 5, 6, 7) if name == "AFN-6" else (4, 5, 6, 7, 3)
    model = networks.build(name, 2, 3, spatial_dims=2, widths=widths, dilations=(1, 2), padding=padding)
    original = copy.deepcopy(model)
    traced = pickle.loads(pickle.dumps(fx.symbolic_trace(model)))
    input = torch.randn(2, 2, 20, 21)
    for train in (True, False):  # training moves the running statistics that evaluation then uses
        assert torch.equal(traced.train(train)(input), original.train(train)(input))


def test_a_traced_layer_still_checks_its_input():
    traced = fx.symbolic_trace(nn.Sequential(AutofocusConv2d(2, 3, dilations=(1, 2))))
    with pytest.raises(ValueError, match="input must have the 2 channels of weight"):
        traced(torch.randn(1, 4, 6, 7))
