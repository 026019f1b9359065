"""AutofocusConvNd and ScaleAttention as nn.Modules."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
from torch import nn

from autofocus_kernels import (
    AutofocusConv1d,
    AutofocusConv2d,
    AutofocusConv3d,
    ScaleAttention,
    reference,
)

LAYERS = {1: AutofocusConv1d, 2: AutofocusConv2d, 3: AutofocusConv3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZE = (9, 8, 7)
each_dims = pytest.mark.parametrize("dims", [1, 2, 3])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Constant(nn.Module):
    """A gate that ignores its input: one weight per branch."""

    def __init__(self, *weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, input):
        ones = (1,) * (input.dim() - 2)
        return self.weights.view(1, -1, *ones).expand(input.shape[0], -1, *input.shape[2:])


# ------------------------------------------------------------------ a convolution among convolutions


@each_dims
def test_is_a_convolution_with_its_constructor(dims):
    layer = LAYERS[dims](3, 5)
    assert isinstance(layer, CONV[dims])
    of_conv = list(inspect.signature(CONV[dims].__init__).parameters)
    of_layer = inspect.signature(LAYERS[dims].__init__).parameters
    assert list(of_layer)[: len(of_conv)] == of_conv
    assert all(
        parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in list(of_layer.values())[len(of_conv) :]
    )


@each_dims
def test_positional_arguments_mean_what_they_mean_in_conv(dims):
    arguments = (3, 5, 3, 2, 4, 2, 1, False, "zeros")
    layer, conv = LAYERS[dims](*arguments, dilations=(1, 2)), CONV[dims](*arguments)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "bias",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(conv, name), name
    assert layer.weight.shape == conv.weight.shape
    assert layer(torch.randn(2, 3, *SIZE[:dims])).shape == conv(torch.randn(2, 3, *SIZE[:dims])).shape


def test_initialised_as_a_convolution():
    torch.manual_seed(1)
    conv = nn.Conv3d(3, 5, 3)
    torch.manual_seed(1)
    layer = AutofocusConv3d(3, 5)
    assert torch.equal(layer.weight, conv.weight) and torch.equal(layer.bias, conv.bias)


def test_state_dict_names():
    assert list(AutofocusConv3d(3, 5).state_dict()) == [
        "weight",
        "bias",
        "attention.conv1.weight",
        "attention.conv1.bias",
        "attention.conv2.weight",
        "attention.conv2.bias",
    ]
    assert "bias" not in AutofocusConv3d(3, 5, bias=False).state_dict()


@each_dims
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_compute_the_same(dims, copied):
    layer = LAYERS[dims](3, 5, dilations=(1, 3), stride=2, padding=1)
    if copied == "deepcopy":
        other = copy.deepcopy(layer)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif copied == "torch.save":
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = LAYERS[dims](3, 5, dilations=(1, 3), stride=2, padding=1)
        other.load_state_dict(layer.state_dict())
    input = torch.randn(1, 3, *SIZE[:dims])
    assert torch.equal(other(input), layer(input))


@pytest.mark.parametrize("branch_norm", [False, True])
def test_device_and_dtype_reach_every_parameter(branch_norm):
    layer = AutofocusConv2d(3, 5, device="meta", dtype=torch.float64, branch_norm=branch_norm)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moves_to_another_dtype(dtype):
    layer = AutofocusConv2d(3, 5, dilations=(1, 2)).to(dtype)
    output, attention = layer(torch.randn(1, 3, 5, 6, dtype=dtype), return_attention=True)
    assert output.dtype == attention.dtype == dtype


def test_channels_last_in_channels_last_out():
    layer = AutofocusConv3d(3, 5, dilations=(1, 2))
    input = torch.randn(2, 3, 5, 6, 7).contiguous(memory_format=torch.channels_last_3d)
    assert layer(input).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("branch_norm", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_one_channel_keeps_its_memory_format(layout, branch_norm):
    """The strides of an image of one channel tell which of the two that it is in is meant."""
    layer = AutofocusConv3d(1, 5, dilations=(1, 2), branch_norm=branch_norm)
    assert layer(torch.randn(2, 1, 5, 6, 7).to(memory_format=layout)).is_contiguous(memory_format=layout)


def test_a_single_voxel_of_several_channels_is_contiguous():
    """Its strides fit both memory formats, whatever they are."""
    layer = AutofocusConv2d(3, 5, dilations=(1, 2), padding=2)
    assert layer(torch.randn(2, 3, 1, 1)).is_contiguous()


# ------------------------------------------------------------------ what it computes


@each_dims
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 3},
        {"padding": "valid"},
        {"kernel_size": 5, "padding": 1},
        {"dilation": 2},
        {"bias": False},
    ],
    ids=str,
)
def test_forward_is_the_function_of_its_parts(dims, settings):
    layer = LAYERS[dims](3, 5, dilations=(1, 2), **settings)
    input = torch.randn(2, 3, *SIZE[:dims])
    output, attention = layer(input, return_attention=True)
    expected = reference.autofocus_conv(
        input,
        layer.weight,
        attention,
        layer.bias,
        dilations=layer.dilations,
        stride=layer.stride,
        padding=layer.padding,
    )
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(layer(input), output)
    assert attention.shape == (2, 2, *output.shape[2:])
    torch.testing.assert_close(attention.sum(1), torch.ones_like(attention[:, 0]))


@pytest.mark.parametrize("chosen", [0, 1, 2, 3])
def test_one_hot_gate_is_a_plain_dilated_convolution(chosen):
    gate = Constant(*(float(k == chosen) for k in range(4)))
    layer = AutofocusConv3d(3, 5, attention=gate)
    conv = nn.Conv3d(3, 5, 3, padding="same", dilation=(2, 6, 10, 14)[chosen])
    conv.load_state_dict(layer.state_dict(), strict=False)
    input = torch.randn(1, 3, 9, 8, 7)
    torch.testing.assert_close(layer(input), conv(input), rtol=0, atol=1e-6)


def test_dilation_multiplies_dilations():
    layer = AutofocusConv2d(3, 5, dilation=(2, 3), dilations=(1, (2, 1)))
    assert layer.dilations == ((2, 3), (4, 3))
    assert layer.dilation == (2, 3)


def test_default_dilations_are_the_papers():
    assert AutofocusConv1d(3, 5).dilations == ((2,), (6,), (10,), (14,))


@each_dims
def test_unbatched_input(dims):
    layer = LAYERS[dims](3, 5, dilations=(1, 2))
    input = torch.randn(3, *SIZE[:dims])
    output, attention = layer(input, return_attention=True)
    batched, batched_attention = layer(input.unsqueeze(0), return_attention=True)
    torch.testing.assert_close(output, batched[0])
    torch.testing.assert_close(attention, batched_attention[0])


def test_empty_batch():
    layer = AutofocusConv2d(3, 5, dilations=(1, 2))
    output = layer(torch.randn(0, 3, 6, 7))
    assert output.shape == (0, 5, 6, 7)
    output.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@each_dims
def test_an_empty_spatial_axis_is_named(dims):
    layer = LAYERS[dims](3, 5, dilations=(1, 2))
    for batch in ((2,), ()):
        for axis in range(dims):
            size = [0 if other == axis else SIZE[other] for other in range(dims)]
            with pytest.raises(
                ValueError,
                match=f"^input must have at least one voxel on every spatial axis, got .*{re.escape(str(tuple(size)))}",
            ):
                layer(torch.randn(*batch, 3, *size))


@pytest.mark.parametrize("branch_norm", [False, True])
def test_a_parametrized_weight_is_computed_once(branch_norm):
    """spectral_norm takes a step of its power iteration each time: as many as a convolution's."""
    computed = []

    class Counting(nn.Module):
        def forward(self, weight):
            computed.append(weight)
            return 2 * weight

    layer = AutofocusConv2d(3, 5, dilations=(1, 2), branch_norm=branch_norm)
    expected = copy.deepcopy(layer)
    expected.weight.data *= 2
    nn.utils.parametrize.register_parametrization(layer, "weight", Counting())
    computed.clear()
    input = torch.randn(2, 3, 6, 7)
    assert torch.equal(layer(input), expected(input))
    assert len(computed) == 1


def test_backend_is_passed_on():
    layer = AutofocusConv2d(3, 5, dilations=(1, 2), backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call"):
        layer(torch.randn(1, 3, 6, 7))


# ------------------------------------------------------------------ the gate


def gradient_through(layer, input):
    input = input.clone().requires_grad_()
    return torch.autograd.grad(layer(input).square().sum(), input)[0]


def test_no_gradient_reaches_the_input_through_the_gate_by_default():
    layer = AutofocusConv2d(3, 5, dilations=(1, 2))
    input = torch.randn(1, 3, 6, 7)
    attention = layer.attention(input).detach()
    fixed = input.clone().requires_grad_()
    output = reference.autofocus_conv(fixed, layer.weight, attention, layer.bias, dilations=(1, 2))
    expected = torch.autograd.grad(output.square().sum(), fixed)[0]
    torch.testing.assert_close(gradient_through(layer, input), expected)


def test_detach_attention_false_lets_it_through():
    layer = AutofocusConv2d(3, 5, dilations=(1, 2), detach_attention=False)
    input = torch.randn(1, 3, 6, 7)
    whole = input.clone().requires_grad_()
    output = reference.autofocus_conv(whole, layer.weight, layer.attention(whole), layer.bias, dilations=(1, 2))
    expected = torch.autograd.grad(output.square().sum(), whole)[0]
    torch.testing.assert_close(gradient_through(layer, input), expected)
    layer.detach_attention = True
    assert not torch.allclose(gradient_through(layer, input), expected)


@pytest.mark.parametrize("detach", [True, False])
def test_the_gates_own_parameters_train(detach):
    layer = AutofocusConv2d(3, 5, dilations=(1, 2), detach_attention=detach)
    layer(torch.randn(1, 3, 6, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.attention.parameters())


def test_custom_gate_trains():
    gate = Constant(0.25, 0.5)
    layer = AutofocusConv2d(3, 5, dilations=(1, 2), attention=gate)
    assert layer.attention is gate
    layer(torch.randn(1, 3, 6, 7)).square().sum().backward()
    assert gate.weights.grad.all()


def test_custom_gate_may_compute_in_another_dtype():
    layer = AutofocusConv2d(3, 5, dilations=(1, 2), attention=Constant(0.25, 0.5), dtype=torch.bfloat16)
    output, attention = layer(torch.randn(1, 3, 6, 7, dtype=torch.bfloat16), return_attention=True)
    assert output.dtype == torch.bfloat16 and attention.dtype == torch.float32


def test_custom_gate_of_the_wrong_size_is_named():
    layer = AutofocusConv2d(3, 5, dilations=(1, 2, 3), attention=Constant(0.25, 0.5))
    with pytest.raises(ValueError, match=r"attention must be \[N, K, \*S_out\] = \[1, 3, 6, 7\].*\[1, 2, 6, 7\]"):
        layer(torch.randn(1, 3, 6, 7))


@each_dims
def test_scale_attention_is_two_convolutions_and_a_softmax(dims):
    gate = ScaleAttention(6, 4, spatial_dims=dims)
    assert isinstance(gate.conv1, CONV[dims]) and isinstance(gate.conv2, CONV[dims])
    assert gate.conv1.out_channels == 3
    input = torch.randn(2, 6, *SIZE[:dims])
    conv1 = CONV[dims](6, 3, 3, padding=1)
    conv1.load_state_dict(gate.conv1.state_dict())
    expected = gate.conv2(conv1(input).relu()).softmax(1)
    torch.testing.assert_close(gate(input), expected)


@pytest.mark.parametrize("channels, given, hidden", [(8, None, 4), (5, None, 2), (1, None, 1), (8, 3, 3)])
def test_hidden_channels(channels, given, hidden):
    assert ScaleAttention(channels, 2, hidden_channels=given).conv1.out_channels == hidden


def test_scale_attention_is_centred_where_the_layer_is():
    """Valid padding with smallest dilation 3 crops 3 voxels a side; the gate's own kernel reaches only 1."""
    gate = ScaleAttention(4, 2, spatial_dims=1, padding="valid", dilation=3)
    whole = ScaleAttention(4, 2, spatial_dims=1)
    whole.load_state_dict(gate.state_dict())
    input = torch.randn(1, 4, 15)
    torch.testing.assert_close(gate(input), whole(input)[..., 3:-3])


def test_scale_attention_strides_with_the_layer():
    gate = ScaleAttention(4, 2, spatial_dims=1, stride=3, padding=2, dilation=2)
    whole = ScaleAttention(4, 2, spatial_dims=1)
    whole.load_state_dict(gate.state_dict())
    input = torch.randn(1, 4, 15)
    torch.testing.assert_close(gate(input), whole(input)[..., ::3])


# ------------------------------------------------------------------ printing


def test_extra_repr_names_what_differs():
    assert AutofocusConv3d(3, 5).extra_repr() == (
        nn.Conv3d(3, 5, 3, padding="same").extra_repr() + ", dilations=(2, 6, 10, 14)"
    )
    layer = AutofocusConv2d(
        3, 5, dilations=(1, (2, 3)), save_branches=True, detach_attention=False, backend="reference"
    )
    assert layer.extra_repr().endswith(
        "dilations=(1, (2, 3)), save_branches=True, detach_attention=False, backend='reference'"
    )


def test_repr_shows_the_gate():
    text = repr(AutofocusConv1d(3, 5))
    assert text.startswith("AutofocusConv1d(\n")
    assert "(attention): ScaleAttention(\n    stride=(1,), padding='same', dilation=(2,)\n" in text


@each_dims
def test_docstring_names_its_dimension(dims):
    assert f"nn.Conv{dims}d" in LAYERS[dims].__doc__ and f"{dims} spatial axes" in LAYERS[dims].__doc__


# ------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    "settings, kind, message",
    [
        ({"groups": 3}, ValueError, r"groups must be 1 .*got 3"),
        ({"padding_mode": "reflect"}, ValueError, r'padding_mode must be "zeros", got \'reflect\''),
        ({"kernel_size": 2}, ValueError, r"kernel_size must be odd.*got \(2, 2\)"),
        ({"kernel_size": (3, 4)}, ValueError, r"kernel_size must be odd.*got \(3, 4\)"),
        ({"kernel_size": 0}, ValueError, r"kernel_size must be at least 1.*got 0"),
        ({"kernel_size": 3.0}, TypeError, r"kernel_size must be an int.*got 3\.0"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size must be an int or 2 ints.*got \(3, 3, 3\)"),
        ({"stride": 0}, ValueError, r"stride must be at least 1.*got 0"),
        ({"stride": 2}, ValueError, r'padding="same" needs stride 1, got stride'),
        ({"padding": -1}, ValueError, r"padding must be at least 0.*got -1"),
        ({"padding": "full"}, ValueError, r'padding must be "same", "valid" or ints, got \'full\''),
        ({"dilation": 0}, ValueError, r"dilation must be at least 1.*got 0"),
        ({"dilations": ()}, ValueError, r"dilations must name at least one branch"),
        ({"dilations": 2}, TypeError, r"dilations must be a sequence.*got 2"),
        ({"dilations": (1, 0)}, ValueError, r"dilations\[1\] must be at least 1.*got 0"),
        ({"dilations": (1, (2, 3, 4))}, ValueError, r"dilations\[1\] must be an int or 2 ints"),
        ({"dilations": (1.5,)}, TypeError, r"dilations\[0\] must be an int.*got 1\.5"),
        ({"backend": "fast"}, ValueError, r"backend must be None or one of .*got 'fast'"),
        ({"in_channels": 3.0}, TypeError, r"in_channels must be an int, got 3\.0"),
        ({"in_channels": True}, TypeError, r"in_channels must be an int, got True"),
        ({"out_channels": 0}, ValueError, r"out_channels must be at least 1, got 0"),
        ({"attention": "softmax"}, TypeError, r"attention must be None or a module, got str"),
        ({"attention": ScaleAttention}, TypeError, r"attention must be None or a module, got the class ScaleAttention"),
    ],
    ids=str,
)
def test_bad_constructor_argument(settings, kind, message):
    with pytest.raises(kind, match=message):
        AutofocusConv2d(**{"in_channels": 3, "out_channels": 5, **settings})


@pytest.mark.parametrize(
    "settings, kind, message",
    [
        ({"in_channels": None}, TypeError, r"in_channels must be an int, got None"),
        ({"num_branches": 0}, ValueError, r"num_branches must be at least 1, got 0"),
        ({"hidden_channels": -1}, ValueError, r"hidden_channels must be at least 1, got -1"),
        ({"spatial_dims": 2.0}, TypeError, r"spatial_dims must be an int, got 2\.0"),
        ({"spatial_dims": 4}, ValueError, r"spatial_dims must be 1, 2 or 3, got 4"),
        ({"kernel_size": 4}, ValueError, r"kernel_size must be odd.*4"),
        ({"padding": "full"}, ValueError, r'padding must be "same", "valid" or ints, got \'full\''),
        ({"stride": 2}, ValueError, r'padding="same" needs stride 1, got stride'),
    ],
    ids=str,
)
def test_bad_gate_argument(settings, kind, message):
    with pytest.raises(kind, match=message):
        ScaleAttention(**{"in_channels": 4, "num_branches": 2, **settings})


@pytest.mark.parametrize("shape", [(3, 8), (1, 1, 3, 8, 8), (1, 4, 8, 8)])
@pytest.mark.parametrize(
    "module", [AutofocusConv2d(3, 5, dilations=(1, 2)), ScaleAttention(3, 2, spatial_dims=2)], ids=["layer", "gate"]
)
def test_bad_input_shape_names_input(module, shape):
    with pytest.raises(ValueError, match=r"(input|weight) must"):
        module(torch.randn(shape))


def test_input_of_another_dtype_than_the_weight_is_named():
    with pytest.raises(TypeError, match=r"^input must have the dtype of the layer's weight, torch\.float32, got .*64"):
        AutofocusConv2d(3, 5, dilations=(1, 2))(torch.randn(1, 3, 6, 6, dtype=torch.float64))


def test_a_padding_mode_that_is_set_later_is_refused():
    layer = AutofocusConv2d(3, 5, dilations=(1, 2))
    layer.padding_mode = "circular"  # as it is done to all convolutions of a network, for images without borders
    with pytest.raises(ValueError, match="padding_mode must be \"zeros\", got 'circular'"):
        layer(torch.randn(1, 3, 6, 6))


@pytest.mark.parametrize("returned", [(torch.ones(1, 2, 6, 6), None), None], ids=["tuple", "NoneType"])
def test_gate_that_returns_no_tensor_is_named(returned):
    layer = AutofocusConv2d(3, 5, dilations=(1, 2), attention=lambda input: returned)
    kind = type(returned).__name__
    with pytest.raises(TypeError, match=rf"attention must return a tensor \[N, K, \*S_out\], got {kind}"):
        layer(torch.randn(1, 3, 6, 6))


def test_gate_names_what_is_no_tensor():
    gate = ScaleAttention(3, 2, spatial_dims=2)
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got NoneType"):
        gate(None)


@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_gate_leaves_its_convolutions_to_their_hooks(name):
    """As FSDP and offloading do it, a weight that is somewhere else until its convolution runs."""
    gate = ScaleAttention(3, 2, spatial_dims=2)
    input = torch.randn(1, 3, 6, 6)
    expected = gate(input)
    conv, weight = gate.get_submodule(name), gate.get_parameter(f"{name}.weight")
    conv.weight = nn.Parameter(torch.empty(0, device="meta"))
    conv.register_forward_pre_hook(lambda module, _: setattr(module, "weight", weight))
    torch.testing.assert_close(gate(input), expected)
