"""``nn.SyncBatchNorm`` branches in two processes against one process that sees the whole batch."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from autofocus_kernels import AutofocusConv2d
from autofocus_kernels.testing import relative_error

# Samples of each process, of a batch of five.
SPLITS = {"uneven": (3, 2), "one_is_empty": (5, 0)}


def make_layer(save_branches):
    torch.manual_seed(0)
    layer = AutofocusConv2d(3, 4, dilations=(1, 2), branch_norm=True, save_branches=save_branches, dtype=torch.float64)
    for norm in layer.branch_norm:
        nn.init.normal_(norm.weight)
    return nn.SyncBatchNorm.convert_sync_batchnorm(layer)


def run_steps(layer, rows):
    """Two training steps on some rows of the batch, then gradients: those of the input, and sums over rows."""
    generator = torch.Generator().manual_seed(1)
    results = {}
    for step in range(2):
        input, grad_output = (
            torch.randn(5, channels, 6, 7, dtype=torch.float64, generator=generator)[rows] for channels in (3, 4)
        )
        input.requires_grad_()
        output = layer(input)
        output.backward(grad_output)
        results[f"output {step}"], results[f"grad {step}"] = output.detach(), input.grad
    results.update({f"parameter {name}": p.grad for name, p in layer.named_parameters()})
    results.update(layer.named_buffers())
    return results


def two_samples_of_one_voxel():
    return torch.randn(2, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def step_without_samples(layer):
    """The state before and after a step on an empty batch, and its gradients."""
    run_steps(layer, slice(0, 5))
    layer.zero_grad()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.empty(0, 3, 6, 7, dtype=torch.float64)).sum().backward()
    return before, layer.state_dict(), {name: parameter.grad for name, parameter in layer.named_parameters()}


def evaluate_without_running_statistics():
    layer = make_layer(False).eval()
    for norm in layer.branch_norm:
        norm.running_mean = norm.running_var = None
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    return layer(torch.randn(2, 3, 6, 7, dtype=torch.float64, generator=generator)).detach()


def process(rank, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        timeout=datetime.timedelta(minutes=2),  # a rank that others left waiting fails, instead of half an hour later
        rank=rank,
        world_size=2,
    )
    results = {}
    try:
        for name, split in SPLITS.items():
            rows = slice(0, split[0]) if rank == 0 else slice(split[0], 5)
            for save_branches in (False, True):
                results[name, save_branches] = run_steps(make_layer(save_branches), rows)

        results["one value"] = make_layer(False)(two_samples_of_one_voxel()[rank : rank + 1]).detach()
        results["all are empty"] = step_without_samples(make_layer(False))

        layer = make_layer(False)
        for norm, group in zip(layer.branch_norm, (dist.new_group([0, 1]), dist.new_group([0, 1]))):
            norm.process_group = group
        results["two groups"] = error_of(lambda: run_steps(layer, slice(0, 2)))
        alone = dist.new_group([0]), dist.new_group([1])
        for norm in layer.branch_norm:
            norm.process_group = alone[rank]
        results["alone"] = run_steps(layer, slice(0, 5))

        layer = make_layer(False)
        input = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(input).square().sum(), input, create_graph=True)
        results["double backward"] = error_of(lambda: gradient.sum().backward())
        results["functorch"] = error_of(lambda: torch.func.grad(lambda x: layer(x).sum())(input.detach()))
        results["evaluation"] = evaluate_without_running_statistics()
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def error_of(function):
    with pytest.raises(RuntimeError) as caught:
        function()
    return str(caught.value)


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("save_branches", [False, True], ids=["recompute", "save"])
@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_equal_one(of_processes, split, save_branches):
    expected = run_steps(make_layer(save_branches), slice(0, 5))
    first, second = (results[split, save_branches] for results in of_processes)
    for name, value in expected.items():
        if name.startswith(("output", "grad")):
            joined = torch.cat([first[name], second[name]])
        elif name.startswith("parameter"):
            joined = first[name] + second[name]
        else:
            joined = first[name]
            assert torch.equal(joined, second[name]), name
        assert relative_error(joined, value) < 1e-11, name


def test_empty_batches_in_all_processes_are_counted_and_change_nothing_else(of_processes):
    for results in of_processes:
        before, after, gradients = results["all are empty"]
        for name, value in before.items():
            assert torch.equal(after[name], value + 1 if name.endswith("num_batches_tracked") else value), name
        assert gradients
        for name, gradient in gradients.items():
            assert not gradient.any(), name


def test_sharing_matters(of_processes):
    """The same processes without shared statistics would give something else: the test above can fail."""
    local = run_steps(make_layer(False), slice(0, 3))
    assert relative_error(local["output 0"], of_processes[0]["uneven", False]["output 0"]) > 1e-2


def test_a_group_of_one_process_shares_nothing(of_processes):
    expected = run_steps(make_layer(False), slice(0, 5))
    for results in of_processes:
        for name, value in expected.items():
            assert torch.equal(results["alone"][name], value), name


def test_one_value_of_each_process_is_enough(of_processes):
    """A process alone would refuse it, since it has no variance."""
    expected = make_layer(False)(two_samples_of_one_voxel())
    assert relative_error(torch.cat([results["one value"] for results in of_processes]), expected) < 1e-11


def test_evaluation_shares_nothing(of_processes):
    """As nn.SyncBatchNorm: in evaluation a process may be on its own, so it must not wait for others."""
    assert torch.equal(of_processes[0]["evaluation"], evaluate_without_running_statistics())


def test_errors(of_processes):
    for results in of_processes:
        assert "must share one process group, got" in results["two groups"]
        assert "cannot be differentiated twice" in results["double backward"]
        assert "reverse mode only" in results["functorch"]
