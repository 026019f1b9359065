"""The networks against benchmarks/plain_networks.py with the same weights, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import autofocus_kernels
from autofocus_kernels import AutofocusConv3d, networks
from autofocus_kernels.testing import relative_error
from benchmarks.plain_networks import PlainNetwork

PARAMETERS = {
    "Basic": 315_725,
    "ASPP-c": 478_435,
    "ASPP-s": 967_330,
    "AFN-1": 349_904,
    "AFN-2": 371_908,
    "AFN-3": 393_852,
    "AFN-4": 415_796,
    "AFN-5": 437_740,
    "AFN-6": 450_209,
}
MULTIPLY_ADDS = {
    "Basic": 61.3,
    "ASPP-c": 78.1,
    "ASPP-s": 128.8,
    "AFN-1": 86.3,
    "AFN-2": 111.0,
    "AFN-3": 136.6,
    "AFN-4": 168.1,
    "AFN-5": 206.5,
    "AFN-6": 239.7,
}
NAMES = tuple(PARAMETERS)
SMALL = {"widths": (4, 6, 6, 5), "aspp": 3}


def make_pair(name, save_branches=None, **sizes):
    """A network and its transcription with the same random state, nothing of it at its initial value."""
    torch.manual_seed(0)
    plain = PlainNetwork(name, **sizes).double()
    generator = torch.Generator().manual_seed(1)
    for module in plain.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    widths = sizes.get("widths", (30, 40, 40, 50))
    network = networks.build(
        name,
        sizes.get("inputs", 4),
        sizes.get("classes", 5),
        sizes.get("dims", 3),
        widths=(*widths, sizes["aspp"]) if name.startswith("ASPP") else widths,
        dilations=sizes.get("rates", (2, 6, 10, 14)),
        padding="same" if sizes.get("same") else "valid",
        save_branches=save_branches,
        dtype=torch.float64,
    )
    networks.load_original_state_dict(network, plain.state_dict())
    return network, plain


def assert_same_gradients(network, plain):
    results = dict(zip(networks_names(network), (p.grad for p in network.parameters())))
    expected = {name: p.grad for name, p in plain.named_parameters()}
    assert results.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        # A bias before a batch norm has no gradient but the rounding errors of its sum.
        if gradient.norm() < 1e-12 * largest:
            assert results[name].norm() < 1e-10 * largest, name
        else:
            assert relative_error(results[name], gradient) < 1e-10, name


def networks_names(network):
    """The original name of each parameter, in the order of ``network.parameters()``."""
    original = networks.original_state_dict(network)
    by_memory = {tensor.data_ptr(): name for name, tensor in original.items()}
    return [by_memory[parameter.data_ptr()] for parameter in network.parameters()]


def assert_parity(network, plain, size, batch=2, inputs=4, steps=3):
    """Logits in evaluation and training, gradients, and all state after some training steps."""
    generator = torch.Generator().manual_seed(2)
    optimisers = [
        torch.optim.RMSprop(m.parameters(), lr=1e-3, alpha=0.9, eps=1e-4, momentum=0.6, weight_decay=1e-4)
        for m in (network, plain)
    ]
    input = torch.randn(batch, inputs, *size, dtype=torch.float64, generator=generator)
    network.eval(), plain.eval()
    with torch.no_grad():
        assert relative_error(network(input), plain(input)) < 1e-10
    network.train(), plain.train()
    for _ in range(steps):
        input = torch.randn(batch, inputs, *size, dtype=torch.float64, generator=generator)
        labels = None
        for model, optimiser in zip((network, plain), optimisers):
            logits = model(input)
            if labels is None:
                first = logits.detach()
                labels = torch.randint(logits.shape[1], (batch, *logits.shape[2:]), generator=generator)
            optimiser.zero_grad()
            F.cross_entropy(logits, labels).backward()
        assert relative_error(first, logits) < 1e-10
        assert_same_gradients(network, plain)
        for optimiser in optimisers:
            optimiser.step()
    state = networks.original_state_dict(network)
    for name, value in plain.state_dict().items():
        assert relative_error(state[name], value) < 1e-10, name
    network.eval(), plain.eval()
    with torch.no_grad():
        assert relative_error(network(input), plain(input)) < 1e-10


# ------------------------------------------------------------------ the transcription against the paper's figures


@pytest.mark.parametrize("name", NAMES)
def test_transcription_has_the_published_size_and_cost(name):
    with torch.device("meta"):
        plain = PlainNetwork(name, aspp=120 if name == "ASPP-s" else 30).eval()
        input = torch.empty(1, 4, 75, 75, 75)
    assert sum(p.numel() for p in plain.parameters()) == PARAMETERS[name]
    with FlopCounterMode(display=False) as counter:
        assert plain(input).shape == (1, 5, 47, 47, 47)
    assert counter.get_total_flops() / 2e9 == pytest.approx(MULTIPLY_ADDS[name], abs=0.06)


# ------------------------------------------------------------------ parity


@pytest.mark.parametrize("name", NAMES)
def test_parity(name):
    network, plain = make_pair(name, rates=(1, 3, 5, 7), **SMALL)
    assert_parity(network, plain, size=(20, 18, 21))


@pytest.mark.parametrize(
    "save_branches, layers", [(None, (False, True)), (False, (False, False)), (True, (True, True))]
)
def test_parity_and_which_layers_save_branches(save_branches, layers):
    network, plain = make_pair("AFN-6", save_branches=save_branches, **SMALL)
    for block in network.blocks:
        assert (block.layer1.save_branches, block.layer2.save_branches) == layers
    assert_parity(network, plain, size=(32, 30, 33), steps=1)


def test_parity_at_full_width():
    network, plain = make_pair("AFN-6", dims=2)
    assert_parity(network, plain, size=(31, 30), batch=2, steps=1)


@pytest.mark.parametrize("name", ["ASPP-c", "ASPP-s", "AFN-3", "AFN-6"])
def test_parity_2d_same_padding_other_sizes(name):
    network, plain = make_pair(
        name, dims=2, inputs=3, classes=2, widths=(5, 4, 6, 6), aspp=2, rates=(1, 2, 5), same=True
    )
    assert_parity(network, plain, size=(9, 12), inputs=3)


@pytest.mark.parametrize("rates", [(3, 4), (2,), (1, 2, 3, 4, 5)])
def test_parity_for_other_rates(rates):
    network, plain = make_pair("AFN-4", dims=2, rates=rates, **SMALL)
    assert_parity(network, plain, size=(44, 45), steps=1)


# ------------------------------------------------------------------ build


@pytest.mark.parametrize("name", networks.NAMES)
def test_parameters_and_output_size(name):
    network = networks.build(name, device="meta")
    assert networks.NAMES == NAMES
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    assert network.crop == (28, 28, 28)
    same = networks.build(name, in_channels=2, num_classes=3, spatial_dims=2, padding="same", device="meta")
    assert same(torch.empty(2, 2, 7, 9, device="meta")).shape == (2, 3, 7, 9) and same.crop == (0, 0)
    assert network(torch.empty(1, 4, 75, 75, 75, device="meta")).shape == (1, 5, 47, 47, 47)


def test_repr_begins_with_the_name():
    assert repr(networks.build("ASPP-c", device="meta")).startswith("SegmentationNetwork(\n  name='ASPP-c'\n  (stem): ")


def test_initial_weights():
    """Convolutions normal(0, 0.01), their biases as PyTorch sets them, batch norms one and zero."""
    torch.manual_seed(0)
    network = networks.build("AFN-6")
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv3d)]
    assert sum(isinstance(m, AutofocusConv3d) for m in convolutions) == 6
    for conv in convolutions:
        bound = conv.weight[0].numel() ** -0.5
        spread = 0.01 / (2 * conv.weight.numel()) ** 0.5
        assert abs(conv.weight.std() - 0.01) < 5 * spread and abs(conv.weight.mean()) < 5 * 2**0.5 * spread
        assert 0 < conv.bias.abs().max() <= bound
    weights = torch.cat([conv.weight.flatten() for conv in convolutions])
    assert weights.abs().max() > 0.04  # normal, not uniform of that deviation
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm3d)):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_dilations_per_axis():
    network = networks.build("AFN-6", dilations=((1, 2, 2), (1, 4, 4)), widths=(2, 2, 2, 2))
    assert network.crop == (16, 28, 28)
    assert network(torch.randn(2, 4, 18, 30, 31)).shape == (2, 5, 2, 2, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "AFN-7"}, "name must be one of Basic, ASPP-c, .* got 'AFN-7'"),
        ({"spatial_dims": 4}, "spatial_dims must be 1, 2 or 3, got 4"),
        ({"padding": "full"}, 'padding must be "valid" or "same", got \'full\''),
        ({"widths": (1, 2, 3)}, r"widths must hold 4 channel counts for AFN-1, got \(1, 2, 3\)"),
        ({"name": "ASPP-s", "widths": (1, 2, 3, 4)}, "widths must hold 5 channel counts for ASPP-s"),
        ({"widths": (1, 2, 3, 0)}, r"widths\[3\] must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"dilations": ()}, "dilations must name at least one branch"),
        ({"backend": "gpu"}, "backend must be None or one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.build(**{"name": "AFN-1", "device": "meta", **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_channels": "4"}, "in_channels must be an int, got '4'"),
        ({"num_classes": None}, "num_classes must be an int, got None"),
        ({"widths": 30}, "widths must be a sequence of 4 channel counts for AFN-1, got 30"),
        ({"widths": (30, 40, 40.0, 50)}, r"widths\[2\] must be an int, got 40\.0"),
        ({"spatial_dims": True}, "spatial_dims must be an int, got True"),
    ],
)
def test_arguments_of_the_wrong_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        networks.build(**{"name": "AFN-1", "device": "meta", **arguments})


def test_bad_inputs():
    network = networks.build("AFN-6", widths=(2, 2, 2, 2)).eval()
    with pytest.raises(ValueError, match=r"at least \[29, 29, 29\] voxels, .* got \[40, 28, 40\]"):
        network(torch.zeros(1, 4, 40, 28, 40))
    with pytest.raises(ValueError, match=r"input must be \[N, 4, \*S\] with 3 spatial axes, got \[1, 3, 40, 40, 40\]"):
        network(torch.zeros(1, 3, 40, 40, 40))
    with pytest.raises(ValueError, match="with 3 spatial axes"):
        network(torch.zeros(4, 40, 40, 40))
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got NoneType"):
        network(None)
    assert network(torch.zeros(1, 4, 29, 29, 29)).shape == (1, 5, 1, 1, 1)


def test_public_name():
    assert autofocus_kernels.networks is networks
