"""A volume sharded over three processes, and data parallelism over them, against one process that sees everything.

One start of the processes runs everything; each saves its results under the names of the tests below.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from autofocus_kernels import AutofocusConv1d, AutofocusConv2d, AutofocusConv3d
from autofocus_kernels.distributed import SpatiallySharded
from autofocus_kernels.testing import relative_error

RANKS = 3


class TwoConvGate(nn.Module):
    """Reaches two voxels; its biases and ReLU tell zeros outside the volume from values computed there."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))

    def forward(self, input):
        return self.layers(input).softmax(1)


def autofocus(dims, **options):
    layer = {1: AutofocusConv1d, 2: AutofocusConv2d, 3: AutofocusConv3d}[dims]
    return lambda: layer(3, 4, **{"dilations": (1, 3), **options})


# name: (layer, sizes of the shards, sizes of the other spatial axes, dim, options of SpatiallySharded)
VOLUMES = {
    "first of three axes": (autofocus(3), (4, 4, 4), (5, 6), 2, {}),
    "second of three axes": (autofocus(3), (4, 4, 4), (5, 6), -2, {}),
    "third of three axes": (autofocus(3), (4, 4, 4), (5, 6), 4, {}),
    "uneven": (autofocus(2, dilations=(2, 4)), (9, 5, 6), (7,), 2, {}),
    "halo of several neighbours": (autofocus(2, dilations=(2, 9)), (1, 2, 9), (5,), 3, {}),
    "dilations beyond the volume": (autofocus(1, dilations=(2, 40)), (3, 4, 5), (), 2, {}),
    "stride": (autofocus(1, stride=3, padding=1, dilations=(1, 4)), (9, 8, 7), (), 2, {}),
    "stride and crop": (autofocus(2, stride=(2, 1), padding=0, dilations=(2, 3)), (9, 8, 7), (9,), 2, {}),
    "valid": (autofocus(2, padding="valid", dilations=(2, 3)), (5, 3, 6), (9,), 2, {}),
    "wide padding": (autofocus(1, padding=7, dilations=(1, 2)), (3, 1, 2), (), -1, {}),
    "wide padding, empty last": (autofocus(1, padding=3, dilations=(1, 2)), (3, 2, 0), (), -1, {}),
    "kernel and dilation per axis": (
        autofocus(2, kernel_size=(5, 3), dilations=((1, 3), (2, 1), (3, 2))), (6, 7, 5), (8,), 2, {},
    ),
    "kernel of one": (autofocus(2, kernel_size=1, stride=2, padding=0), (3, 4, 6), (5,), 2, {}),
    "gradient through the gate": (autofocus(2, detach_attention=False), (4, 3, 5), (6,), 2, {}),
    "gate of the user's": (
        lambda: autofocus(2, attention=TwoConvGate(), detach_attention=False)(), (3, 4, 3), (5,), 2,
        {"attention_reach": 2},
    ),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2), (4, 3, 5), (6,), 2, {}),
    "strided convolution": (lambda: nn.Conv3d(3, 4, 3, stride=2, padding=1), (5, 4, 6), (6, 7), 3, {}),
    "convolution of the same size": (lambda: nn.Conv1d(3, 6, 5, padding="same", groups=3), (5, 4, 6), (), 2, {}),
    "channels last": (autofocus(3), (4, 3, 4), (3, 4), 3, {}),
    "without a batch axis": (autofocus(2), (4, 3, 4), (3,), -2, {}),
    "batch norm": (autofocus(2, branch_norm=True), (4, 3, 5), (6,), 2, {}),
    "batch norm in evaluation": (autofocus(2, branch_norm=True), (4, 3, 5), (6,), 2, {}),
}


def make_volume(name):
    """The layer, the whole volume and the shards' sizes; the same in every process."""
    build, sizes, others, dim, _ = VOLUMES[name]
    torch.manual_seed(list(VOLUMES).index(name))
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(build().double())
    if "evaluation" in name:
        layer.eval()
        for norm in layer.branch_norm:
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    size = list(others)
    size.insert(dim - 2 if dim > 0 else dim + len(size) + 1, sum(sizes))
    input = torch.randn(2, 3, *size, dtype=torch.float64)
    if name == "channels last":
        input = input.contiguous(memory_format=torch.channels_last_3d)
    if name == "without a batch axis":
        input = input[0]
    return layer, input, dim - input.dim() if dim > 0 else dim


def gradients_of(layer, input, grad_output):
    input = input.detach().requires_grad_()
    output = layer(input)
    output.backward(grad_output)
    return output.detach(), input.grad, {name: parameter.grad for name, parameter in layer.named_parameters()}


def check_volume(name, rank):
    """Largest errors of this rank's shard; of the parameters' gradients, the error of their sum."""
    _, sizes, _, _, options = VOLUMES[name]
    layer, input, dim = make_volume(name)
    whole = copy.deepcopy(layer)
    dims = len(layer.kernel_size)
    if "norm" in name:
        # One process shares nothing, and its norms are the definition.
        whole.branch_norm = nn.ModuleList(nn.BatchNorm2d(4, dtype=torch.float64) for _ in layer.branch_norm)
        whole.branch_norm.load_state_dict(layer.branch_norm.state_dict())
        whole.train(layer.training)
    torch.manual_seed(100)
    grad_output = torch.randn_like(whole(input))
    if "norm" in name:
        whole.branch_norm.load_state_dict(layer.branch_norm.state_dict())
    expected = gradients_of(whole, input, grad_output)

    dim = dim if dim < 0 else dim - dims
    sharded = SpatiallySharded(layer, dim, **options)
    shard = input.split(sizes, dim)[rank]
    with torch.no_grad():
        length = torch.tensor(copy.deepcopy(sharded)(shard).shape[dim])
    lengths = [torch.empty_like(length) for _ in range(RANKS)]
    dist.all_gather(lengths, length)
    lengths = [int(length) for length in lengths]
    assert sum(lengths) == grad_output.shape[dim]
    output, grad_input, gradients = gradients_of(sharded, shard, grad_output.split(lengths, dim)[rank])
    errors = {
        "output": relative_error(output, expected[0].split(lengths, dim)[rank]),
        "input": relative_error(grad_input, expected[1].split(sizes, dim)[rank]),
    }
    for parameter, gradient in gradients.items():
        dist.all_reduce(gradient)
        errors[parameter] = relative_error(gradient, expected[2][parameter.removeprefix("layer.")])
    for buffer, value in layer.named_buffers():
        errors[buffer] = relative_error(value, whole.get_buffer(buffer))
    return errors


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = {}
    try:
        for name in VOLUMES:
            results[name] = check_volume(name, rank)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(process, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", VOLUMES)
def test_shards_equal_one_process(ranks, name):
    for results in ranks:
        for quantity, error in results[name].items():
            assert error < 1e-12, quantity
