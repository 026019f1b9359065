"""Convolutions that become autofocus layers and convolutions again, against the network that they were."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import autofocus_kernels as ak
from autofocus_kernels.testing import relative_error

LAYERS = {1: ak.AutofocusConv1d, 2: ak.AutofocusConv2d, 3: ak.AutofocusConv3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZE = (9, 8, 7)
SETTINGS = [
    {},
    {"padding": 1},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": 1, "stride": 2},
    {"padding": 3, "stride": (2, 1, 3), "bias": False},
    {"padding": 2, "dilation": 2},
    {"padding": "same", "dilation": (2, 1, 3)},
    {"kernel_size": (1, 3, 5), "padding": (0, 1, 2)},
]
each_dims = pytest.mark.parametrize("dims", [1, 2, 3])
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_conv(dims, settings, **options):
    settings = {k: v[-dims:] if isinstance(v, tuple) else v for k, v in {"kernel_size": 3, **settings}.items()}
    return CONV[dims](3, 4, **settings, **options)


class UNet(nn.Module):
    """Two resolutions, one of whose convolutions is used twice under three names, and once more by no name."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False)
        self.deep = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=2, dilation=2)] * 2)
        self.alias = self.deep[0]
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.head = nn.Conv2d(4, 3, 1)
        self.unnamed = [self.deep[0]]

    def forward(self, input):
        skip = self.stem(input)
        x = self.down(skip)
        for layer in (*self.deep, *self.unnamed):
            x = layer(x).relu()
        return self.head(self.up(x) + skip)


def layers(network):
    return [name for name, module in network.named_modules() if isinstance(module, tuple(LAYERS.values()))]


# ------------------------------------------------------------------ the same network


@each_dims
@each_setting
def test_one_hot_start_is_the_convolution(dims, settings):
    conv = make_conv(dims, settings, dtype=torch.float64)
    layer = ak.convert(copy.deepcopy(conv), (1, 2, 3), initial_attention=1)
    assert type(layer) is LAYERS[dims]
    results = []
    for module in (conv, layer):
        input = torch.randn(2, 3, *SIZE[:dims], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        output = module(input.requires_grad_())
        output.square().sum().backward()
        results.append([output, input.grad, *(p.grad for p in (module.weight, module.bias) if p is not None)])
    for expected, result in zip(*results):
        assert relative_error(result, expected) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_hot_start_is_one_hot_in_every_dtype(dtype):
    layer = ak.convert(nn.Conv2d(3, 4, 3, padding=1, dtype=dtype), (3, 1, 2), initial_attention=1)
    _, attention = layer(torch.randn(1, 3, 5, 6, dtype=dtype), return_attention=True)
    assert attention.unique(dim=1).shape[1] == 2
    assert attention[:, 1].eq(1).all() and attention[:, (0, 2)].eq(0).all()


def test_a_network_starts_where_it_was():
    network = UNet().double()
    input = torch.randn(2, 2, 8, 12, dtype=torch.float64)
    expected = network(input)
    assert ak.convert(network, initial_attention=1) is network
    assert layers(network) == ["stem.0", "down", "deep.0"]
    assert relative_error(network(input), expected) < 1e-13


def test_near_one_hot_start_trains_the_gate():
    layer = ak.convert(nn.Conv2d(3, 4, 3, padding=1), (1, 2, 4), initial_attention=0.9)
    output, attention = layer(torch.randn(1, 3, 5, 6), return_attention=True)
    expected = torch.tensor([0.9, 0.05, 0.05]).view(1, 3, 1, 1).expand(1, 3, 5, 6)
    torch.testing.assert_close(attention, expected)
    output.square().sum().backward()
    assert layer.attention.conv2.weight.grad.any() and layer.attention.conv2.bias.grad.any()


def test_without_initial_attention_the_gate_is_that_of_a_new_layer():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    torch.manual_seed(1)
    layer = ak.convert(conv, (1, 2), initial_attention=None)
    torch.manual_seed(1)
    gate = ak.ScaleAttention(4, 2, spatial_dims=2)
    for name, tensor in gate.state_dict().items():
        assert torch.equal(layer.attention.state_dict()[name], tensor), name


def test_a_single_branch():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    input = torch.randn(1, 3, 5, 6)
    expected = conv(input)
    torch.testing.assert_close(ak.convert(conv, (1,))(input), expected)


# ------------------------------------------------------------------ what a module keeps


def test_parameters_are_the_same_objects_and_an_optimizer_keeps_them():
    network = UNet()
    before = dict(network.named_parameters())
    ak.convert(network)
    after = dict(network.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name.split(".attention.")[0] for name in after.keys() - before.keys()} == {"stem.0", "down", "deep.0"}


def test_a_shared_convolution_stays_one():
    network = ak.convert(UNet())
    assert network.deep[0] is network.deep[1] is network.alias is network.unnamed[0]
    assert type(network.alias) is ak.AutofocusConv2d


def test_a_checkpoint_of_the_original_loads():
    checkpoint = UNet().state_dict()
    network = ak.convert(UNet())
    result = network.load_state_dict(checkpoint, strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys and all(".attention." in name for name in result.missing_keys)
    for name, tensor in checkpoint.items():
        assert torch.equal(network.state_dict()[name], tensor), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gates_follow_dtype_device_and_mode(device):
    network = UNet().to(device, torch.bfloat16).eval().requires_grad_(False)
    ak.convert(network)
    assert {(p.dtype, p.device.type) for p in network.parameters()} == {(torch.bfloat16, device)}
    assert not any(module.training for module in network.modules())
    trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trainable and all(".attention." in name for name in trainable)


def test_memory_format_is_kept():
    conv = nn.Conv3d(4, 4, 3, padding=1).to(memory_format=torch.channels_last_3d)
    ak.convert(conv)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert conv.attention.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not conv.attention.conv1.weight.is_contiguous()


def test_hooks_and_attributes_stay():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    seen = []
    handle = conv.register_forward_hook(lambda module, arguments, output: seen.append(type(module)))
    conv.note = "mine"
    input = torch.randn(1, 3, 5, 6)
    ak.convert(conv)(input)
    assert ak.revert(conv).note == "mine"
    conv(input)
    handle.remove()
    conv(input)
    assert seen == [ak.AutofocusConv2d, nn.Conv2d]


def test_a_converted_network_can_be_copied_and_saved():
    network = ak.convert(UNet()).eval()
    input = torch.randn(1, 2, 8, 12)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(input), network(input))


# ------------------------------------------------------------------ select


@pytest.mark.parametrize(
    "select, expected",
    [
        (["down"], ["down"]),
        (("down", "stem.0"), ["stem.0", "down"]),
        (["stem"], ["stem.0"]),
        (["alias"], ["deep.0"]),
        (["deep.1"], ["deep.0"]),
        (lambda name, module: module.stride == (2, 2), ["down"]),
        (lambda name, module: name.startswith("deep"), ["deep.0"]),
        ([""], ["stem.0", "down", "deep.0"]),
    ],
)
def test_select(select, expected):
    assert layers(ak.convert(UNet(), select=select)) == expected


def test_a_predicate_is_asked_once_for_each_convolution():
    asked = []
    ak.convert(UNet(), select=lambda name, module: asked.append((name, type(module))) or True)
    assert asked == [("stem.0", nn.Conv2d), ("down", nn.Conv2d), ("deep.0", nn.Conv2d)]


def test_autofocus_layers_and_their_gates_are_left_alone():
    network = ak.convert(UNet(), select=["down"])
    gate = network.down.attention
    with pytest.raises(ValueError, match="select must name a convolution .*'down' holds none"):
        ak.convert(network, select=["down"])
    ak.convert(network)
    assert network.down.attention is gate and type(gate.conv1) is nn.Conv2d
    assert layers(network) == ["stem.0", "down", "deep.0"]


# ------------------------------------------------------------------ what is refused


class Standardised(nn.Conv2d):
    def forward(self, input):
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


def replaced_forward(conv):
    conv.forward = lambda input: input
    return conv


REFUSED = {
    "groups must be 1": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
    "kernel_size must be odd": lambda: nn.Conv2d(4, 4, (3, 2)),
    'padding_mode must be "zeros"': lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "subclass Standardised": lambda: Standardised(4, 4, 3, padding=1),
    "subclass LazyConv2d": lambda: nn.LazyConv2d(4, 3, padding=1),
    "computes its weight": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
    "computes its bias": lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 3, padding=1), "bias", 1),
    "forward replaced": lambda: replaced_forward(nn.Conv2d(4, 4, 3, padding=1)),
    "got torch.complex64": lambda: nn.Conv2d(4, 4, 3, padding=1, dtype=torch.complex64),
    "got torch.float8_e5m2": lambda: nn.Conv2d(4, 4, 3, padding=1).to(torch.float8_e5m2),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_carried_exactly_is_refused_by_name(message):
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.ReLU(), REFUSED[message]()))
    with pytest.raises(ValueError, match=f"^1\\.1 .*{message}"):
        ak.convert(network)
    assert not layers(network), "an error leaves the network as it was"
    ak.convert(network, select=["0"])


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weight_norm_by_hooks_is_refused(norm):
    with pytest.raises(ValueError, match="^network computes its weight"):
        ak.convert(norm(nn.Conv2d(4, 4, 3, padding=1)))


@pytest.mark.parametrize("attribute", ["attention", "backend"])
def test_attributes_that_the_layer_needs_are_refused(attribute):
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    setattr(network[0], attribute, "mine")
    with pytest.raises(ValueError, match=f"^0 has attributes of its own that an autofocus layer needs: {attribute}"):
        ak.convert(network)
    assert type(network[0]) is nn.Conv2d and getattr(network[0], attribute) == "mine"


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"network": "unet"}, TypeError, r"network must be a module, got str"),
        ({"network": nn.Conv2d(2, 2, 1)}, ValueError, r"network must hold a convolution .*got Conv2d without any"),
        ({"dilations": (2, 6)}, ValueError, r"dilations must hold a branch of 1 on every axis.*got \(2, 6\)"),
        ({"dilations": 3}, TypeError, r"dilations must be a sequence.*got 3"),
        ({"dilations": (1, 0)}, ValueError, r"dilations\[1\] must be at least 1"),
        ({"select": "down"}, TypeError, r"select must be None, names or a predicate, got 'down'"),
        ({"select": 3}, TypeError, r"select must be None, names or a predicate, got 3"),
        ({"select": []}, ValueError, r"select must hold at least one name"),
        ({"select": [1]}, TypeError, r"select must hold names, got 1"),
        ({"select": ["dwon"]}, ValueError, r"select must name a convolution .*'dwon' is no module of network"),
        ({"select": ["head"]}, ValueError, r"select must name a convolution .*'head' holds none"),
        ({"select": lambda *_: False}, ValueError, r"select must choose .*got none of stem\.0, down, deep\.0"),
        ({"initial_attention": 0}, ValueError, r"initial_attention must be above 0 and at most 1, got 0"),
        ({"initial_attention": "one"}, TypeError, r"initial_attention must be a number, got 'one'"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),  # of a function: the same in every process of a run
)
def test_bad_argument_of_convert(arguments, kind, message):
    with pytest.raises(kind, match=message):
        ak.convert(**{"network": UNet(), **arguments})


# ------------------------------------------------------------------ and back


@each_dims
@each_setting
def test_there_and_back_changes_nothing(dims, settings):
    conv = make_conv(dims, settings)
    expected = copy.deepcopy(conv)
    ak.revert(ak.convert(conv))
    assert type(conv) is type(expected) and repr(conv) == repr(expected)
    assert vars(conv).keys() == vars(expected).keys()
    assert list(conv.state_dict()) == list(expected.state_dict())
    input = torch.randn(1, 3, *SIZE[:dims])
    assert torch.equal(conv(input), expected(input))


@each_dims
@each_setting
@pytest.mark.parametrize("branch", [0, 1, 2])
def test_a_branch_by_its_index(dims, settings, branch):
    layer = make_conv(dims, settings, dtype=torch.float64)
    ak.convert(layer, (2, 1, (3, 2, 1)[:dims]), initial_attention=1)
    layer.attention.conv2.bias.data.zero_()[branch] = 1000
    input = torch.randn(2, 3, *SIZE[:dims], dtype=torch.float64)
    expected = layer(input)
    ak.revert(layer, branch)
    assert type(layer) is CONV[dims]
    assert relative_error(layer(input), expected) < 1e-13


def test_the_branch_that_a_trained_gate_chooses_is_measured():
    network = UNet().double()
    input = torch.randn(2, 2, 8, 12, dtype=torch.float64)
    ak.convert(network, (1, 2, 3), select=["down", "deep"], initial_attention=None)
    network.train()
    counted = network.stem[1].num_batches_tracked.clone()
    for name, branch in (("down", 2), ("deep.0", 1)):
        network.get_submodule(name).attention.conv2.bias.data[branch] += 20
    network.eval()
    expected = network(input)
    network.train()
    ak.revert(network, example=input)
    assert network.down.dilation == (3, 3) and network.alias.dilation == (4, 4)
    assert network.stem[1].training and network.stem[1].num_batches_tracked == counted
    assert relative_error(network.eval()(input), expected) < 1e-4


def test_layers_on_the_meta_device():
    """As a network is built whose weights are loaded later: a branch that is named needs no values of the gate."""
    network = ak.convert(UNet().to("meta"))
    with pytest.raises(ValueError, match=r"^stem\.0 has a gate that is not known to ignore its input: give a branch"):
        ak.revert(network)
    assert layers(ak.revert(network, 1)) == [] and network.down.dilation == (3, 3)


def test_a_gate_that_changes_its_mind_is_refused_by_name():
    network = ak.convert(UNet(), (1, 2), initial_attention=None)
    with pytest.raises(ValueError, match=r"^stem\.0 must give a branch at least 0\.95 of the attention .*got at least"):
        ak.revert(network, example=torch.randn(1, 2, 8, 12))
    with pytest.raises(ValueError, match=r"^stem\.0 has a gate that is not known to ignore its input: give a branch"):
        ak.revert(network)
    assert layers(network) == ["stem.0", "down", "deep.0"]


class OwnGate(ak.ScaleAttention):
    """Ignores its input by its parameters, but may do anything with them."""


@pytest.mark.parametrize(
    "gate", [nn.Conv2d(3, 2, 1), OwnGate(3, 2, spatial_dims=2)], ids=lambda gate: type(gate).__name__
)
def test_a_gate_of_another_class_is_not_known_to_ignore_its_input(gate):
    for parameter in gate.parameters():
        parameter.data.zero_()[:1] = 100
    if isinstance(gate, OwnGate):
        gate.conv2.weight.data.zero_()
    layer = ak.AutofocusConv2d(3, 3, dilations=(1, 2), attention=gate)
    with pytest.raises(ValueError, match="^network has a gate that is not known to ignore its input"):
        ak.revert(layer)


def test_a_layer_that_the_example_does_not_reach_is_named():
    network = ak.convert(UNet())
    network.spare = ak.AutofocusConv2d(3, 3)
    with pytest.raises(ValueError, match="^spare is not reached by example"):
        ak.revert(network, example=(torch.randn(1, 2, 8, 12),))


def test_a_shared_layer_is_measured_at_each_of_its_places():
    class Sign(nn.Module):
        """Branch 0 for an input that is mostly positive, branch 1 for another."""

        def forward(self, input):
            first = (input.mean() > 0).expand(input.shape[0], 1, *input.shape[2:])
            return torch.cat([first, ~first], 1).to(input.dtype)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ak.AutofocusConv2d(3, 3, dilations=(1, 2), attention=Sign())

        def forward(self, input):
            return self.layer(input) + self.layer(-input)

    with pytest.raises(ValueError, match=r"^layer must give .*got at least 0 for"):
        ak.revert(Twice(), example=torch.ones(1, 3, 5, 6))
    assert type(ak.revert(Twice().layer, example=torch.ones(1, 3, 5, 6))) is nn.Conv2d


@pytest.mark.parametrize(
    "layer, message",
    [
        (lambda: type("Mine", (ak.AutofocusConv2d,), {})(3, 3), "AutofocusConv3d itself, got its subclass Mine"),
        (lambda: prune.l1_unstructured(ak.AutofocusConv2d(3, 3), "weight", 1), "computes its weight"),
    ],
)
def test_a_layer_that_computes_something_else_is_refused_by_name(layer, message):
    with pytest.raises(ValueError, match=f"^0 .*{message}"):
        ak.revert(nn.Sequential(layer()), 0)


def test_revert_selects_as_convert_does():
    network = ak.revert(ak.convert(UNet()), select=["deep", "stem"])
    assert layers(network) == ["down"]


def test_branch_norm_cannot_become_a_convolution():
    network = nn.Sequential(ak.AutofocusConv2d(3, 3, branch_norm=True))
    with pytest.raises(ValueError, match="^0 has a branch norm"):
        ak.revert(network, 0)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"network": None}, TypeError, r"network must be a module, got NoneType"),
        ({"network": UNet()}, ValueError, r"network must hold an autofocus layer, got UNet without any"),
        ({"branch": 4}, ValueError, r"branch must be from 0 to 3 for stem\.0, got 4"),
        ({"branch": -1}, ValueError, r"branch must be from 0 to 3 for stem\.0, got -1"),
        ({"branch": 1.0}, TypeError, r"branch must be None or an int, got 1\.0"),
        ({"branch": 1, "example": torch.zeros(1)}, ValueError, r"branch and example both choose"),
        ({"select": ["head"]}, ValueError, r"select must name .*autofocus layer.*'head' holds none"),
        ({"tolerance": 1}, ValueError, r"tolerance must be at least 0 and below 1, got 1"),
        ({"tolerance": 0.001}, ValueError, r"^stem\.0 must give a branch at least 0\.999 .*got at least 0\.99"),
    ],
    ids=str,
)
def test_bad_argument_of_revert(arguments, kind, message):
    with pytest.raises(kind, match=message):
        ak.revert(**{"network": ak.convert(UNet()), **arguments})
