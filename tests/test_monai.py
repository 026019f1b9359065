"""Networks in MONAI's conventions, and as a bundle's configuration names them."""

import json
import sys

import pytest
import torch
from torch import nn

import autofocus_kernels as ak
from autofocus_kernels import networks

SMALL = {"spatial_dims": 2, "in_channels": 2, "out_channels": 3, "widths": [4, 6, 6, 5], "dilations": [1, 2]}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def parse():
    """A configuration's entry "network", through JSON, as MONAI builds it."""
    bundle = pytest.importorskip("monai.bundle", reason="MONAI is not installed (pip install '.[monai]')")

    def build(config):
        return bundle.ConfigParser(json.loads(json.dumps({"network": config}))).get_parsed_content("network")

    return build


@pytest.mark.parametrize("name", networks.NAMES)
def test_is_the_network_of_the_paper(name):
    widths = (4, 6, 6, 5, 3)[: 4 + name.startswith("ASPP")]
    network = networks.AFN(2, 2, 3, name, widths=widths, dilations=(1, 2), padding="valid")
    expected = networks.build(name, 2, 3, 2, widths=widths, dilations=(1, 2))
    assert list(network.state_dict()) == list(expected.state_dict())
    expected.load_state_dict(network.state_dict())
    input = torch.randn(1, 2, 19, 18)
    assert torch.equal(network(input), expected(input))


def test_settings_and_defaults_are_those_of_build():
    def settings(network):
        layers = [module for module in network.modules() if isinstance(module, ak.AutofocusConv2d)]
        return [(layer.dilations, layer.padding, layer.save_branches, layer.backend) for layer in layers]

    for options in ({}, {"save_branches": False, "backend": "reference"}, {"dilations": (1, 3)}):
        network = networks.AFN(2, 2, 3, widths=(4, 6, 6, 5), **options)
        expected = networks.build("AFN-6", 2, 3, 2, widths=(4, 6, 6, 5), padding="same", **options)
        assert settings(network) == settings(expected)


def test_needs_no_monai_for_what_the_paper_has(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.layers", None)
    networks.AFN(**SMALL, act="RELU", norm="BATCH")
    for wrong in ({"act": "prelu"}, {"norm": "instance"}):
        with pytest.raises(ImportError, match=r"needs MONAI .*autofocus-kernels\[monai\]"):
            networks.AFN(**SMALL, **wrong)


def test_bad_arguments():
    for wrong in ({"act": 3}, {"norm": [3]}, {"norm": []}):
        with pytest.raises(
            TypeError, match=r"(act|norm) must be a name or a pair of a name and a dict, got (3|\(3,\)|\(\))"
        ):
            networks.AFN(**SMALL, **wrong)
    with pytest.raises(ValueError, match="name must be one of Basic.*got 'AFN-7'"):
        networks.AFN(**SMALL, name="AFN-7")


def test_a_bundle_names_the_class(parse):
    network = parse({"_target_": "autofocus_kernels.networks.AFN", **SMALL})
    assert type(network) is networks.AFN and network.name == "AFN-6"
    assert network(torch.randn(1, 2, 9, 8)).shape == (1, 3, 9, 8)


@pytest.mark.parametrize(
    "act, norm, kinds",
    [
        ("prelu", "instance", (nn.PReLU, nn.InstanceNorm2d)),
        (["leakyrelu", {"negative_slope": 0.2}], ["group", {"num_groups": 1}], (nn.LeakyReLU, nn.GroupNorm)),
        ("relu", ["batch", {"eps": 0.001}], (nn.ReLU, nn.BatchNorm2d)),
    ],
)
@pytest.mark.parametrize("name", ["AFN-3", "ASPP-s", "ASPP-c"])
def test_a_bundle_chooses_act_and_norm(parse, name, act, norm, kinds):
    widths = {"widths": [4, 6, 6, 5, 3]} if name.startswith("ASPP") else {}
    config = {"_target_": "autofocus_kernels.networks.AFN", **SMALL, **widths, "name": name, "act": act, "norm": norm}
    network = parse(config)
    act_kind, norm_kind = kinds
    # The gate's own ReLU is a function. Two activations in the stem, two in each block, and the head's.
    acts = [module for module in network.modules() if isinstance(module, act_kind)]
    assert len(acts) == 8 + {"AFN-3": 0, "ASPP-s": 2, "ASPP-c": 1}[name]
    norms = [module for module in network.modules() if "Norm" in type(module).__name__]
    assert norms and all(type(module) is norm_kind for module in norms)
    if norm_kind is nn.BatchNorm2d:
        assert all(module.eps == 0.001 for module in norms)
    layers = [module for module in network.modules() if isinstance(module, ak.AutofocusConv2d)]
    assert all((layer.branch_norm is not None) == (norm_kind is nn.BatchNorm2d) for layer in layers)
    assert len(layers) == (3 if name == "AFN-3" else 0)
    network(torch.randn(2, 2, 9, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_misspelt_norm_is_named(parse):
    parse({"_target_": "autofocus_kernels.networks.AFN", **SMALL})
    with pytest.raises(ValueError, match="norm must be a name .* that MONAI knows, got 'btach'"):
        networks.AFN(**SMALL, norm="btach")


def test_other_acts_and_norms_are_no_original_checkpoint(parse):
    network = parse({"_target_": "autofocus_kernels.networks.AFN", **SMALL, "act": "prelu"})
    with pytest.raises(ValueError, match=r"model must have the activations and norms of the original.*acts\.0\.weight"):
        networks.original_state_dict(network)


def test_a_bundle_converts_monais_unet(parse):
    unet = {
        "_target_": "monai.networks.nets.UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "channels": [4, 8, 8],
        "strides": [2, 2],
        "num_res_units": 1,
        "act": "PRELU",
        "norm": "INSTANCE",
    }
    network = parse(
        {
            "_target_": "autofocus_kernels.convert",
            "network": unet,
            "dilations": [1, 2],
            "select": ["model.1.submodule"],
            "initial_attention": 1,
        }
    )
    layers = [name for name, module in network.named_modules() if isinstance(module, ak.AutofocusConv3d)]
    assert layers and all(name.startswith("model.1.submodule.") for name in layers)
    plain = parse(unet)
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if ".attention." not in name})
    input = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(network(input), plain(input), rtol=1e-4, atol=1e-5)
    ak.revert(network)
    assert repr(network) == repr(plain)


@pytest.mark.parametrize("branch_norm", [False, True])
def test_meta_tensors_train(branch_norm):
    """What MONAI's loaders give: a subclass of Tensor, whose new_empty takes nothing but a tuple."""
    data = pytest.importorskip("monai.data", reason="MONAI is not installed (pip install '.[monai]')")
    layer = ak.AutofocusConv2d(2, 3, dilations=(1, 2), branch_norm=branch_norm)
    input = torch.randn(2, 2, 6, 5)
    outputs = []
    for given in (input, data.MetaTensor(input, meta={"name": "scan"})):
        layer.zero_grad()
        output = layer(given.requires_grad_())
        output.square().sum().backward()
        outputs.append([output.detach(), given.grad, *(p.grad for p in layer.parameters())])
    for of_tensor, of_meta in zip(*outputs):
        assert torch.equal(torch.as_tensor(of_meta), of_tensor)
    assert isinstance(outputs[1][0], data.MetaTensor)


def test_compiled_layers_take_meta_tensors():
    """Their __torch_function__ breaks graphs, so that the operator is called from code that is not compiled.

    Not with a branch norm: torch 2.11 has no code for what is behind such a break there.
    """
    data = pytest.importorskip("monai.data", reason="MONAI is not installed (pip install '.[monai]')")
    layer = ak.AutofocusConv3d(2, 3, dilations=(1, 2))
    input = torch.randn(2, 2, 6, 5, 4)
    expected = layer(input)
    torch._dynamo.reset()
    output = torch.compile(layer)(data.MetaTensor(input))
    assert isinstance(output, data.MetaTensor)
    torch.testing.assert_close(output.as_tensor(), expected)
    gradients = (torch.autograd.grad(y.square().sum(), layer.weight)[0] for y in (output, expected))
    torch.testing.assert_close(*gradients)
