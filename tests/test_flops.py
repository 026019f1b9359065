"""What torch.utils.flop_counter counts and what torch.profiler names."""

import importlib
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from autofocus_kernels import AutofocusConv2d, autofocus_conv, flops, reference, testing
from autofocus_kernels.testing import Case

CASES = (
    Case("3d", (5, 6, 4), batch=2, channels=3, out_channels=5, dilations=(1, 2)),
    Case("2d_stride", (9, 8), channels=2, stride=2, padding=1, kernel_size=(3, 5), mode="branch"),
    Case("1d", (11,), dilations=(2,), bias=False),
)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def count(function):
    """Flops of each operator that ``function`` calls, by its name."""
    with FlopCounterMode(display=False) as counter:
        function()
    return {packet.__name__: number for packet, number in counter.get_flop_counts()["Global"].items()}


def convolutions(case):
    """One pass over the taps of all branches, as the sum over all that it is."""
    positions = testing.make_tensors(case).grad_output[:, 0].numel()  # of all samples
    taps = case.geometry.num_taps * case.num_branches
    return 2 * positions * taps * case.channels * case.out_channels


@each_case
def test_forward_counts_as_the_layer_in_plain_pytorch(backend, case):
    tensors = testing.make_tensors(case).arguments()
    ours = count(lambda: autofocus_conv(**tensors, **case.options, backend=backend))
    naive = count(lambda: reference.autofocus_conv(**tensors, **case.options))
    assert ours == {"forward": convolutions(case)} and sum(naive.values()) == convolutions(case)


@each_case
@pytest.mark.parametrize(
    "wanted, passes",
    [(("input",), 1), (("weight",), 1), (("attention",), 1), (("input", "weight"), 2), (("input", "attention"), 2)],
)
def test_backward_counts_a_pass_for_each_gradient_that_needs_one(backend, case, wanted, passes):
    check_backward(case, wanted, passes, backend)


def check_backward(case, wanted, passes, backend):
    tensors = testing.make_tensors(case)
    arguments = tensors.arguments()
    for name in wanted:
        arguments[name].requires_grad_()
    output = autofocus_conv(**arguments, **case.options, backend=backend)
    assert count(lambda: output.backward(tensors.grad_output)) == {"backward": passes * convolutions(case)}


@pytest.mark.parametrize(
    "mode, wanted, passes",
    [
        ("plain", ("bias",), 0),
        ("branch", ("branch_shift",), 0),
        ("branch", ("branch_scale",), 1),
        ("branch", ("branch_scale", "attention"), 1),
    ],
)
def test_bias_and_shift_cost_nothing_and_scale_shares_the_pass_of_attention(mode, wanted, passes):
    check_backward(Case("vectors", (6, 5), mode=mode), wanted, passes, None)


@pytest.mark.parametrize("save_branches, passes", [(True, 2), (False, 3)])
def test_branch_norm_counts_what_its_backward_computes_again(backend, save_branches, passes):
    case = Case("norm", (6, 5), batch=2, channels=3, dilations=(1, 2))
    layer = AutofocusConv2d(
        3, case.out_channels, dilations=(1, 2), branch_norm=True, save_branches=save_branches, backend=backend
    )
    counts = count(lambda: layer(testing.make_tensors(case, requires_grad=True).input).sum().backward())
    ours = {name: number for name, number in counts.items() if name.startswith("branch_norm")}
    assert ours == {"branch_norm": convolutions(case), "branch_norm_backward": passes * convolutions(case)}


@pytest.mark.parametrize("first", ["counter", "package"])
def test_formulas_are_there_whichever_is_imported_first(first, monkeypatch):
    name = "torch.utils.flop_counter"
    monkeypatch.setattr(torch.utils, "flop_counter", None)  # both are what they were, afterwards
    monkeypatch.delitem(sys.modules, name)
    modules = [name, flops.__name__] if first == "counter" else [flops.__name__, name]
    finders = list(sys.meta_path)
    for module in modules:
        if module == name:
            counter = importlib.import_module(name)
        else:
            importlib.reload(flops)
    assert sys.meta_path == finders
    operators = torch.ops.autofocus
    for operator in (operators.forward, operators.backward, operators.branch_norm, operators.branch_norm_backward):
        assert operator in counter.flop_registry


@pytest.mark.parametrize("branch_norm", [False, True])
def test_the_profiler_tells_forward_from_backward(backend, branch_norm):
    layer = AutofocusConv2d(2, 3, dilations=(1, 2), branch_norm=branch_norm, backend=backend)
    input = torch.randn(2, 2, 6, 5, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        layer(input).sum().backward()
        with torch.no_grad():
            layer(input)
    counts = {event.key: event.count for event in profiler.key_averages()}
    if branch_norm:
        assert (counts["autofocus::branch_norm"], counts["autofocus::branch_norm_backward"]) == (2, 1)
    else:
        assert (counts["autofocus::forward"], counts["autofocus::backward"]) == (2, 1)
