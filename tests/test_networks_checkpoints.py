"""Checkpoints of the original code: every form they come in, the way back, and errors that name the entry."""

import io

import pytest
import torch
from torch import nn

from autofocus_kernels import networks
from benchmarks.plain_networks import PlainNetwork

NAMES = networks.NAMES
WIDTHS = (4, 6, 6, 5)


def make_plain(name, **sizes):
    torch.manual_seed(0)
    plain = PlainNetwork(name, dims=2, widths=WIDTHS, aspp=3, **sizes)
    for tensor in plain.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
    return plain


def make_network(name, **options):
    widths = (*WIDTHS, 3) if name.startswith("ASPP") else WIDTHS
    return networks.build(name, spatial_dims=2, widths=widths, **options)


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name):
    plain, network = make_plain(name), make_network(name)
    networks.load_original_state_dict(network, plain.state_dict())
    assert_equal(networks.original_state_dict(network), plain.state_dict())
    plain.load_state_dict(networks.original_state_dict(make_network(name)))


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize("prefixed", [False, True], ids=["single", "data_parallel"])
def test_forms_of_a_file(wrapped, prefixed):
    plain, network = make_plain("AFN-3"), make_network("AFN-3")
    saved = (nn.DataParallel(plain) if prefixed else plain).state_dict()
    file = io.BytesIO()
    torch.save({"state_dict": saved, "epoch": 400} if wrapped else saved, file)
    file.seek(0)
    networks.load_original_state_dict(network, torch.load(file))
    assert_equal(networks.original_state_dict(network), plain.state_dict())


def test_file_older_than_counters():
    plain, network = make_plain("AFN-6"), make_network("AFN-6")
    old = {name: value for name, value in plain.state_dict().items() if "num_batches" not in name}
    networks.load_original_state_dict(network, plain.state_dict())
    networks.load_original_state_dict(network, old)
    state = networks.original_state_dict(network)
    assert_equal({name: state[name] for name in old}, old)
    assert all(value == 0 for name, value in state.items() if name not in old)


def test_loading_converts_to_the_dtype_of_the_model():
    network = make_network("AFN-1", dtype=torch.float64)
    networks.load_original_state_dict(network, make_plain("AFN-1").state_dict())
    assert all(p.dtype == torch.float64 for p in network.parameters())


def errors_of(network, state):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        networks.load_original_state_dict(network, state)
    assert_equal(network.state_dict(), before)
    first, *problems = str(caught.value).split("\n  ")
    assert first == f"state_dict is no checkpoint of this {network.name}:"
    return problems


def test_every_missing_or_unexpected_entry_and_wrong_shape_is_named():
    network = make_network("AFN-6")
    state = dict(make_plain("AFN-6").state_dict())
    del state["layers.1.convatt21.bias"], state["bn2.running_var"]
    state["layers.3.conv1.weight"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(5, 7, 1, 1)
    assert errors_of(network, state) == [
        "missing: bn2.running_var",
        "missing: layers.1.convatt21.bias",
        "unexpected: layers.3.conv1.weight",
        "fc.weight: expected shape [5, 5, 1, 1], got [5, 7, 1, 1]",
    ]


def test_a_prefix_on_some_names_only_is_part_of_them():
    state = make_plain("Basic").state_dict()
    state["module.fc.bias"] = state.pop("fc.bias")
    assert errors_of(make_network("Basic"), state) == ["missing: fc.bias", "unexpected: module.fc.bias"]


def test_another_architecture_or_number_of_branches():
    problems = errors_of(make_network("AFN-2"), make_plain("AFN-1").state_dict())
    assert "missing: layers.2.bn_list1.0.weight" in problems and "unexpected: layers.2.bn1.weight" in problems
    problems = errors_of(make_network("AFN-1"), make_plain("AFN-1", rates=(2, 6)).state_dict())
    assert "missing: layers.2.bn_list2.3.running_var" in problems
    assert "layers.2.convatt2.weight: expected shape [4, 2, 1, 1], got [2, 2, 1, 1]" in problems
    assert "missing: conv1.weight" in errors_of(make_network("Basic"), {})


def test_what_is_no_network_or_no_tensor():
    with pytest.raises(TypeError, match="model must come from autofocus_kernels.networks.build, got Linear"):
        networks.load_original_state_dict(nn.Linear(1, 1), {})
    with pytest.raises(TypeError, match="model must come from .* got Linear"):
        networks.original_state_dict(nn.Linear(1, 1))
    for given, came in ((None, "got NoneType"), ({"state_dict": [1]}, "got list"), ({1: torch.ones(1)}, "got 1")):
        with pytest.raises(TypeError, match=f"state_dict must .*{came}"):
            networks.load_original_state_dict(make_network("Basic"), given)
    state = {**make_plain("Basic").state_dict(), "fc.bias": [1.0]}
    with pytest.raises(TypeError, match="fc.bias must be a tensor, got list"):
        networks.load_original_state_dict(make_network("Basic"), state)
