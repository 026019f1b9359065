"""The layer as the conv_op of networks that are given the class of their convolutions."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autofocus_kernels as ak
from autofocus_kernels.testing import relative_error

OPS = {1: ak.ConvOp1d, 2: ak.ConvOp2d, 3: ak.ConvOp3d}
LAYERS = {1: ak.AutofocusConv1d, 2: ak.AutofocusConv2d, 3: ak.AutofocusConv3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
each_dims = pytest.mark.parametrize("dims", [1, 2, 3])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Few(ak.ConvOp3d):
    dilations = (1, 2)


class Wide(ak.ConvOp3d):
    dilations = (2, 4)


@each_dims
def test_makes_the_layer_with_sizes_of_a_convolution(dims):
    assert issubclass(OPS[dims], CONV[dims]) and f"AutofocusConv{dims}d" in OPS[dims].__doc__
    settings = {"stride": [2] * dims, "padding": [1] * dims, "dilation": 1, "bias": False}
    layer = OPS[dims](3, 5, [3] * dims, **settings)
    assert type(layer) is LAYERS[dims]
    assert layer.dilations == tuple((r,) * dims for r in (1, 3, 5, 7)) and layer.bias is None
    input = torch.randn(1, 3, *(9, 8, 7)[:dims])
    assert layer(input).shape == CONV[dims](3, 5, [3] * dims, **settings)(input).shape


@each_dims
def test_a_kernel_of_one_voxel_is_a_convolution(dims):
    layer = OPS[dims](3, 5, 1, 1, 0, bias=True)
    assert type(layer) is CONV[dims] and repr(layer) == repr(CONV[dims](3, 5, 1, 1, 0))


def test_what_it_makes_can_be_copied_and_pickled():
    layer = Few(3, 5, kernel_size=3, padding=1)
    assert layer.dilations == ((1, 1, 1), (2, 2, 2))
    input = torch.randn(1, 3, 5, 6, 7)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(input), layer(input))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"dilations of Wide must start at 1 on every axis .*got \(2, 4\)"):
        Wide(3, 5, 3, padding=1)
    with pytest.raises(ValueError, match=r"kernel_size must be odd.*\(2, 2, 2\)"):
        Few(3, 5, 2)
    with pytest.raises(TypeError, match="kernel_size must be an int or a sequence of 3 ints, got None"):
        Few(3, 5, None)


# ------------------------------------------------------------------ nnU-Net's networks


def nnunet(name, conv_op):
    """One of nnU-Net's U-Nets with an anisotropic first stage, as its planner makes for thick slices, initialised."""
    unet = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet",
        reason="dynamic_network_architectures is not installed (pip install '.[nnunet]')",
    )
    per_stage = "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage"
    network = getattr(unet, name)(
        input_channels=2,
        n_stages=3,
        features_per_stage=[4, 6, 8],
        conv_op=conv_op,
        kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        **{per_stage: [1, 2, 2]},
        num_classes=3,
        n_conv_per_stage_decoder=[2, 1],
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    network.apply(network.initialize)
    return network.double()


each_network = pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])


@each_network
def test_nnunets_networks_train(name):
    network = nnunet(name, Few)
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True)
    input = torch.randn(2, 2, 8, 16, 16, dtype=torch.float64)
    target = torch.randint(3, (2, 1, 8, 16, 16))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    losses = []
    for _ in range(2):
        logits = network(input)
        assert [tuple(scale.shape) for scale in logits] == [(2, 3, 8, 16, 16), (2, 3, 8, 8, 8)]
        loss = sum(
            F.cross_entropy(scale, F.interpolate(target.double(), scale.shape[2:]).long()[:, 0]) for scale in logits
        )
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    gates = [name for name in before if ".attention." in name]
    assert gates and all(not torch.equal(before[name], parameter) for name, parameter in network.named_parameters())


@each_network
def test_nnunets_networks_are_themselves_while_the_gates_choose_dilation_one(name):
    plain, network = nnunet(name, nn.Conv3d), nnunet(name, Few)
    result = network.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys and all(".attention." in key for key in result.missing_keys)
    for module in network.modules():
        if isinstance(module, ak.ScaleAttention):
            module.conv2.weight.data.zero_()
            module.conv2.bias.data.copy_(torch.tensor([1000.0, 0.0]))
    input = torch.randn(1, 2, 8, 16, 16, dtype=torch.float64)
    for result, expected in zip(network(input), plain(input), strict=True):
        assert relative_error(result, expected) < 1e-12


@each_network
def test_nnunets_networks_convert(name):
    network = nnunet(name, nn.Conv3d)
    input = torch.randn(1, 2, 8, 16, 16, dtype=torch.float64)
    expected = network(input)
    ak.convert(network, select=["decoder.stages"], initial_attention=1)
    layers = {name for name, module in network.named_modules() if isinstance(module, ak.AutofocusConv3d)}
    assert layers == {f"decoder.stages.{path}.conv" for path in ("0.convs.0", "0.convs.1", "1.convs.0")}
    for result, wanted in zip(network(input), expected, strict=True):
        assert relative_error(result, wanted) < 1e-12
