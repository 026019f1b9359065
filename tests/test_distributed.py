"""A volume sharded over three processes, and data parallelism over them, against one process that sees everything.

One start of the processes runs everything; each saves its results under the names of the tests below.
"""

import copy
import datetime
import multiprocessing
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autofocus_kernels import (
    AutofocusConv1d,
    AutofocusConv2d,
    AutofocusConv3d,
    autofocus_conv,
    convert,
    networks,
    testing,
)
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
    "wide padding, empty first": (autofocus(2, kernel_size=(3, 1), padding=3), (0, 2, 3), (4,), -1, {}),
    "kernel and dilation per axis": (
        autofocus(2, kernel_size=(5, 3), dilations=((1, 3), (2, 1), (3, 2))),
        (6, 7, 5),
        (8,),
        2,
        {},
    ),
    # Not on both axes: the branches would be equal, and the gate's gradients nothing but rounding.
    "kernel of one": (autofocus(2, kernel_size=(1, 3), stride=2, padding=0), (3, 4, 6), (5,), 2, {}),
    "gradient through the gate": (autofocus(2, detach_attention=False), (4, 3, 5), (6,), 2, {}),
    "gate of the user's": (
        lambda: autofocus(2, attention=TwoConvGate(), detach_attention=False)(),
        (3, 4, 3),
        (5,),
        2,
        {"attention_reach": 2},
    ),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2), (4, 3, 5), (6,), 2, {}),
    "strided convolution": (lambda: nn.Conv3d(3, 4, 3, stride=2, padding=1), (5, 4, 6), (6, 7), 3, {}),
    # Of what the first and the last rank compute nothing lies in the volume, yet a convolution takes no empty part.
    "convolution, empty first and last": (lambda: nn.Conv1d(3, 4, 1, stride=2, padding=4), (0, 5, 0), (), 2, {}),
    "convolution of the same size": (lambda: nn.Conv1d(3, 6, 5, padding="same", groups=3), (5, 4, 6), (), 2, {}),
    "channels last": (autofocus(3), (4, 3, 4), (3, 4), 3, {}),
    "without a batch axis": (autofocus(2), (4, 3, 4), (3,), -2, {}),
    "convolution without a batch axis": (lambda: nn.Conv2d(3, 4, 3, padding=1), (4, 3, 4), (3,), -2, {}),
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
    if "without a batch axis" in name:
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


# ------------------------------------------------------------------ more about shards


def check_second_derivative(rank):
    """A gradient penalty on shards: gradients of the sum over ranks of the squared gradient of the input."""
    layer, input, dim = make_volume("first of three axes")
    sizes = VOLUMES["first of three axes"][1]
    results = []
    for module, part in ((layer, input), (SpatiallySharded(copy.deepcopy(layer), dim), input.split(sizes, dim)[rank])):
        part = part.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(module(part).square().sum(), part, create_graph=True)
        gradient.square().sum().backward()
        results.append((part.grad, {name: p.grad for name, p in module.named_parameters()}))
    (whole, whole_parameters), (shard, parameters) = results
    errors = {"input": relative_error(shard, whole.split(sizes, dim)[rank])}
    for name, gradient in parameters.items():
        dist.all_reduce(gradient)
        errors[name] = relative_error(gradient, whole_parameters[name.removeprefix("layer.")])
    return errors


def check_converted(rank):
    """A convolution that becomes an autofocus layer, in place, inside of its wrapper."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64))
    sharded = nn.Sequential(SpatiallySharded(copy.deepcopy(network[0]), 2))
    for module in (network, sharded):
        convert(module, dilations=(1, 3), initial_attention=None)
    sharded[0].layer.load_state_dict(network[0].state_dict())
    input = torch.randn(1, 3, 11, 6, dtype=torch.float64)
    sizes = (4, 3, 4)
    return {"output": relative_error(sharded(input.split(sizes, 2)[rank]), network(input).split(sizes, 2)[rank])}


def check_computed_weight(rank):
    """spectral_norm takes a step of its power iteration whenever the weight is looked at: once for a call."""
    errors = {}
    for kind, layer in (("autofocus", autofocus(2)()), ("convolution", nn.Conv2d(3, 4, 3, padding=1))):
        torch.manual_seed(0)
        layer = layer.double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        nn.utils.parametrizations.spectral_norm(layer)
        sharded = SpatiallySharded(copy.deepcopy(layer), 2)
        input = torch.randn(1, 3, 11, 6, dtype=torch.float64)
        sizes = (4, 3, 4)
        output = sharded(input.split(sizes, 2)[rank])
        errors[kind] = relative_error(output, layer(input).split(sizes, 2)[rank])
    return errors


def check_group(rank):
    """A group of the last two ranks; the first one, outside, is refused."""
    layer, input, dim = make_volume("uneven")
    group = dist.new_group([1, 2])
    sharded = SpatiallySharded(layer, dim, group)
    if rank == 0:
        return {"outside": error_of(lambda: sharded(input))}
    sizes = (7, input.shape[dim] - 7)
    normed, image = AutofocusConv2d(3, 4, dilations=(1, 3), branch_norm=True), torch.randn(1, 3, 6, 6)
    unshared = error_of(lambda: SpatiallySharded(normed, 2, group)(image))
    sharded = copy.deepcopy(sharded)  # as averages of weights do; in the same group, of which there is no copy
    assert sharded.process_group is group and sharded.layer.weight is not layer.weight
    output, attention = sharded(input.split(sizes, dim)[rank - 1], return_attention=True)
    whole, whole_attention = layer(input, return_attention=True)
    return {
        "output": relative_error(output, whole.split(sizes, dim)[rank - 1]),
        "attention": relative_error(attention, whole_attention.split(sizes, dim)[rank - 1]),
        "norms": unshared,
    }


def check_group_of_one(rank):
    """Which holds the whole volume and so may keep its statistics to itself; with other ranks that is not enough."""
    torch.manual_seed(0)
    alone = [dist.new_group([number]) for number in range(RANKS)][rank]
    layer = AutofocusConv2d(3, 4, dilations=(1, 3), branch_norm=True)
    image = torch.randn(1, 3, 6, 6)
    shared_with_itself = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer), alone)
    return {
        "alone": relative_error(SpatiallySharded(copy.deepcopy(layer), 2, alone)(image), layer(image)),
        "among others": error_of(lambda: SpatiallySharded(shared_with_itself, 2)(image)),
    }


def shard_convolutions(module, dim):
    """The recipe of docs/distributed.md."""
    for name, child in module.named_children():
        if isinstance(child, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            setattr(module, name, SpatiallySharded(child, dim))
        else:
            shard_convolutions(child, dim)


def check_network(rank):
    torch.manual_seed(0)
    network = networks.build(
        "AFN-4", 2, 3, 2, widths=(3, 4, 4, 5), dilations=(1, 3), padding="same", dtype=torch.float64
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    network.eval()
    sharded = copy.deepcopy(network)
    shard_convolutions(sharded, 2)
    image = torch.randn(1, 2, 13, 6, dtype=torch.float64)
    output, grad_image, gradients = gradients_of(network, image, torch.ones(1, 3, 13, 6, dtype=torch.float64))
    sizes = (4, 3, 6)
    part, grad_part, shares = gradients_of(
        sharded, image.split(sizes, 2)[rank], torch.ones(1, 3, sizes[rank], 6, dtype=torch.float64)
    )
    errors = {
        "output": relative_error(part, output.split(sizes, 2)[rank]),
        "input": relative_error(grad_part, grad_image.split(sizes, 2)[rank]),
    }
    for name, share in shares.items():
        dist.all_reduce(share)
        errors[name] = relative_error(share, gradients[name.replace(".layer.", ".").removeprefix("layer.")])
    return errors


def error_of(function):
    try:
        function()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def gated(gate):
    layer = AutofocusConv2d(3, 4, dilations=(1, 3), attention=gate)
    return SpatiallySharded(layer, 2, attention_reach=0)


def circular():
    sharded = SpatiallySharded(nn.Conv2d(3, 4, 3, padding=1), 2)
    sharded.layer.padding_mode = "circular"
    return sharded


def with_eval_norm(on_this_rank):
    """Norms that are not in one mode, on some ranks."""
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(AutofocusConv2d(3, 4, dilations=(1, 3), branch_norm=True))
    layer.branch_norm[0].train(not on_this_rank)
    return SpatiallySharded(layer, 2)


def with_statistics_of_its_own():
    """Norms that use batch statistics in evaluation too, and there do not share them."""
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(AutofocusConv2d(3, 4, dilations=(1, 3), branch_norm=True))
    for norm in layer.branch_norm:
        norm.running_mean = norm.running_var = None
    return SpatiallySharded(layer.eval(), 2)


def with_other_gate(on_this_rank):
    """A gate of unknown reach, which came after the constructor, on some ranks."""
    sharded = SpatiallySharded(AutofocusConv2d(3, 4, dilations=(1, 3)), 2)
    if on_this_rank:
        sharded.layer.attention = nn.Conv2d(3, 2, 1)
    return sharded


def under_autocast(module, input):
    """Where a rank takes an input of another dtype than its weight's."""
    with torch.autocast("cpu", torch.bfloat16):
        return module(input)


def check_errors(rank):
    layer = AutofocusConv2d(3, 4, dilations=(1, 3))
    normed = AutofocusConv2d(3, 4, dilations=(1, 3), branch_norm=True)
    strided = AutofocusConv2d(3, 4, dilations=(1, 3), stride=4, padding=1)
    image = torch.randn(1, 3, 6, 6)
    halves = image.bfloat16() if rank else image.half()
    volume = torch.randn(1, 3, 4, 4, 4)
    valid = AutofocusConv2d(3, 4, dilations=(1, 3), padding="valid")
    return {
        "shapes": error_of(lambda: SpatiallySharded(layer, 2)(torch.randn(1, 3, 6, 6 + rank))),
        "gradients": error_of(lambda: SpatiallySharded(layer, 2)(image.clone().requires_grad_(rank == 1))),
        "dtypes": error_of(lambda: under_autocast(SpatiallySharded(nn.Conv2d(3, 4, 3), 2), halves)),
        "refused": error_of(lambda: SpatiallySharded(layer, 2)(image.double() if rank == 1 else image)),
        "refused in 3D": error_of(
            lambda: SpatiallySharded(autofocus(3)(), 2)(volume.double() if rank == 1 else volume)
        ),
        "refused by a convolution": error_of(
            lambda: SpatiallySharded(nn.Conv2d(3, 4, 3), 2)(image.int() if rank == 1 else image)
        ),
        "norms of a rank": error_of(lambda: with_eval_norm(rank == 1)(image)),
        "gate of a rank": error_of(lambda: with_other_gate(rank == 1)(image)),
        "channels": error_of(lambda: SpatiallySharded(layer, 2)(image[:, : 3 - rank])),
        "empty": error_of(lambda: SpatiallySharded(strided, 2)(image[:, :, : 1 if rank else 6])),
        "empty first": error_of(lambda: SpatiallySharded(valid, 2)(image[:, :, : 6 if rank else 1])),
        "norms": error_of(lambda: SpatiallySharded(normed, 2)(image)),
        "norms in evaluation": error_of(lambda: with_statistics_of_its_own()(image)),
        "small": error_of(lambda: SpatiallySharded(nn.Conv2d(3, 4, 3, dilation=20), 2)(image)),
        "attention": error_of(lambda: SpatiallySharded(nn.Conv2d(3, 4, 3), 2)(image, return_attention=True)),
        "wide gate": error_of(lambda: gated(nn.Conv2d(3, 2, 1, padding=1))(image)),
        "padding mode": error_of(lambda: circular()(image)),
        "no tensor": error_of(lambda: gated(lambda input: [input])(image)),
        "input": error_of(lambda: SpatiallySharded(nn.Conv2d(3, 4, 3), 2)([image])),
        "axes": error_of(lambda: SpatiallySharded(nn.Conv2d(3, 4, 3), 2)(image[0, 0])),
        "device": error_of(lambda: SpatiallySharded(nn.Conv2d(3, 4, 3), 2)(image.to("meta"))),
        "gradients that are not recorded": error_of(
            torch.no_grad()(lambda: SpatiallySharded(layer, 2)(image.clone().requires_grad_(rank == 1)))
        ),
    }


# ------------------------------------------------------------------ data parallelism


def make_network(branch_norm):
    torch.manual_seed(0)
    options = {"dilations": (1, 3), "branch_norm": branch_norm, "dtype": torch.float64}
    return nn.Sequential(
        AutofocusConv2d(2, 4, **options),
        nn.ReLU(),
        AutofocusConv2d(4, 5, **options),
        nn.Sigmoid(),
        nn.Conv2d(5, 3, 1, dtype=torch.float64),
    )


def make_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(RANKS, 2, 7, 6, dtype=torch.float64, generator=generator)


def train(network, batch, steps=2):
    """Steps of plain gradient descent on a mean over the batch, as data parallelism expects.

    Not by torch.optim, whose first step imports the compilers: seconds in every process.
    """
    for _ in range(steps):
        network.zero_grad()
        network(batch).square().mean().backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 2 * parameter.grad
    return network


def check_ddp(rank):
    # Without norms: DDP itself refuses nn.SyncBatchNorm on a CPU.
    network = DistributedDataParallel(make_network(branch_norm=False))
    return train(network, make_batch()[rank : rank + 1]).module.state_dict()


def check_ddp_of_shards(rank):
    """A network on shards of a volume: DDP takes the mean over ranks of the parameters' gradients, not their sum."""
    whole = make_network(branch_norm=False)
    image = make_batch()[:1]
    whole(image).square().mean().backward()
    network = copy.deepcopy(whole)
    network.zero_grad()
    for index in (0, 2):
        network[index] = SpatiallySharded(network[index], -1)
    parallel = DistributedDataParallel(network)
    share = parallel(image.tensor_split(RANKS, -1)[rank]).square().sum() / whole(image).numel()
    (RANKS * share).backward()
    return {
        name: relative_error(parameter.grad, whole.get_parameter(name.replace("layer.", "")).grad)
        for name, parameter in network.named_parameters()
    }


def check_fsdp(rank):
    """fully_shard of every layer and of the whole: parameters live as shards, DTensors, between steps."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    network = nn.SyncBatchNorm.convert_sync_batchnorm(make_network(branch_norm=True))
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for layer in (network[0], network[2], network):
        fully_shard(layer, mesh=mesh)
    train(network, make_batch()[rank : rank + 1])
    assert isinstance(network[2].weight, DTensor)
    state = network.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def check_fsdp_of_shards(rank):
    """Activations in place, which FSDP allows after a module whose output is no view, as that of a convolution."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    options = {"padding": 1, "dtype": torch.float64}
    whole = nn.Sequential(
        AutofocusConv2d(2, 4, dilations=(1, 3), **options),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3, **options),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 3, 3, **options),
        nn.ReLU(inplace=True),
    )
    image = make_batch()[:1]
    whole(image).square().mean().backward()
    network = copy.deepcopy(whole)
    network.zero_grad()
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for index in (0, 2, 4):
        network[index] = fully_shard(SpatiallySharded(network[index], -1), mesh=mesh)
    fully_shard(network, mesh=mesh)
    share = network(image.tensor_split(RANKS, -1)[rank]).square().sum() / whole(image).numel()
    (RANKS * share).backward()
    return {
        name: relative_error(parameter.grad.full_tensor(), whole.get_parameter(name.replace("layer.", "")).grad)
        for name, parameter in network.named_parameters()
    }


# ------------------------------------------------------------------ DTensor

TENSOR_CASES = {
    "plain": testing.Case("plain", (6, 7), batch=RANKS + 1),
    "branch": testing.Case("branch", (7, 6, 5), batch=RANKS, mode="branch", stride=2, padding=1, dilations=(1, 2)),
}


def check_dtensor(mesh, case, sharding):
    """Errors, placements of output and gradients, and the number of collectives."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    placements = {
        "batch": {"input": Shard(0), "attention": Shard(0)},
        "channels": {"weight": Shard(0), "bias": Shard(0), "branch_scale": Shard(1), "branch_shift": Shard(1)},
    }[sharding]
    tensors = testing.make_tensors(case, torch.float64)
    expected = testing.truth(case, tensors)
    results = {}
    # Other gradients in every round: what DTensor remembers of one must not be taken for another.
    for wanted in (["input"], ["weight", "attention"], list(tensors.arguments())):
        arguments = {
            name: distribute_tensor(tensor, mesh, [placements.get(name, Replicate())]).requires_grad_(name in wanted)
            for name, tensor in tensors.arguments().items()
        }
        grad_output = distribute_tensor(tensors.grad_output, mesh, [Shard(0 if sharding == "batch" else 1)])
        with CommDebugMode() as messages:
            output = autofocus_conv(**arguments, **case.options)
            output.backward(grad_output)
        results["collectives"] = messages.get_total_counts()
        results["placements"] = {"output": str(output.placements[0])}
        errors = {"output": relative_error(output.full_tensor(), expected["output"])}
        for name in wanted:
            gradient = arguments[name].grad
            results["placements"][name] = str(gradient.placements[0])
            errors[name] = relative_error(gradient.full_tensor(), expected[name])
        results[f"errors {wanted}"] = errors
    return results


def check_layer_of_dtensors(mesh):
    """The whole layer, gate included, on a batch that DTensor holds in shards."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    torch.manual_seed(0)
    layer = AutofocusConv2d(3, 4, dilations=(1, 3), dtype=torch.float64)
    input = torch.randn(RANKS, 3, 6, 5, dtype=torch.float64)
    whole = copy.deepcopy(layer)
    whole(input).square().sum().backward()
    distribute_module(layer, mesh)
    layer(distribute_tensor(input, mesh, [Shard(0)])).square().sum().backward()
    return {
        name: relative_error(layer.get_parameter(name).grad.full_tensor(), parameter.grad)
        for name, parameter in whole.named_parameters()
    }


# ------------------------------------------------------------------ the processes and the tests


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        timeout=datetime.timedelta(minutes=2),  # a rank that others left waiting fails, instead of half an hour later
        rank=rank,
        world_size=RANKS,
    )
    results = {}
    try:
        for name in VOLUMES:
            results[name] = check_volume(name, rank)
        results["second derivative"] = check_second_derivative(rank)
        results["network"] = check_network(rank)
        results["converted"] = check_converted(rank)
        results["computed weight"] = check_computed_weight(rank)
        results["group"] = check_group(rank)
        results["group of one"] = check_group_of_one(rank)
        results["errors"] = check_errors(rank)
        results["DDP"] = check_ddp(rank)
        results["DDP of shards"] = check_ddp_of_shards(rank)
        results["FSDP2"] = check_fsdp(rank)
        results["FSDP2 of shards"] = check_fsdp_of_shards(rank)

        import autofocus_kernels.dtensor  # noqa: F401, registers the rules

        mesh = dist.init_device_mesh("cpu", (RANKS,))
        for name, case in TENSOR_CASES.items():
            for sharding in ("batch", "channels"):
                results["DTensor", name, sharding] = check_dtensor(mesh, case, sharding)
        results["layer of DTensors"] = check_layer_of_dtensors(mesh)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    # Forks of a process that has imported torch once, not a process each that imports it again.
    preloaded = ["torch.distributed.fsdp", "autofocus_kernels.dtensor"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)
    mp.start_processes(process, args=(str(folder),), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(
    "name",
    [
        *VOLUMES,
        "second derivative",
        "network",
        "converted",
        "computed weight",
        "DDP of shards",
        "FSDP2 of shards",
        "layer of DTensors",
    ],
)
def test_parts_equal_one_process(ranks, name):
    for results in ranks:
        for quantity, error in results[name].items():
            assert error < 1e-12, quantity


def test_a_group_of_some_ranks(ranks):
    outside, *inside = (results["group"] for results in ranks)
    assert outside == {"outside": "RuntimeError: SpatiallySharded: this process is not in process_group"}
    for errors in inside:
        assert errors.pop("norms").startswith("ValueError: branch_norm[0] must share its statistics with all ranks")
        assert max(errors.values()) < 1e-12


def test_a_group_of_one_rank(ranks):
    for results in ranks:
        assert results["group of one"]["alone"] < 1e-6
        assert re.match(r"ValueError: branch_norm\[0\] must .*SyncBatchNorm$", results["group of one"]["among others"])


def test_every_rank_refuses_what_no_rank_can_run(ranks):
    expected = {
        "shapes": r"ValueError: input must have .* one shape on all ranks.*\[1, 3, 6, 6\] .*\[1, 3, 6, 7\]",
        "gradients": "ValueError: input must .* require a gradient on all or none.*gradient False.*gradient True",
        "dtypes": r"ValueError: input must have one dtype.*\(16 bits, .*\(bfloat16, ",
        "empty": r"ValueError: every rank must hold the centre of an output, got shards of \[6, 1, 1\]",
        "empty first": r"ValueError: every rank must hold the centre .*, got shards of \[1, 6, 6\] with \[0, ",
        "norms": r"ValueError: branch_norm\[0\] must share its statistics.*got BatchNorm2d",
        "norms in evaluation": r"ValueError: branch_norm\[0\] must share its statistics.*got SyncBatchNorm",
        "small": "ValueError: input is too small",
        "wide gate": r"ValueError: attention must be .* with 6 voxels on axis -2 .*, got shape \[1, 2, 8, 8\]",
        "padding mode": "ValueError: layer must have odd kernel sizes and zero padding, got Conv2d",
        "no tensor": r"TypeError: attention must return a tensor \[N, K, \*S_out\], got list",
        "attention": "TypeError: return_attention is for autofocus layers, got a layer of type Conv2d",
        "input": r"ValueError: input must be a tensor \[N, C, \*S\] or \[C, \*S\] for Conv2d.*, got list",
        "axes": r"ValueError: input must be a tensor \[N, C, \*S\] or \[C, \*S\] for Conv2d.*, got shape \[6, 6\]",
        "device": "ValueError: input must be on the device of the layer's weight, cpu, got meta",
    }
    for results in ranks:
        for name, pattern in expected.items():
            assert re.match(pattern, results["errors"][name]), results["errors"][name]


def test_every_rank_refuses_what_one_rank_refuses(ranks):
    other = "ValueError: input must be one that all ranks take, got one that rank 1 refuses"
    for name, error in {
        "refused": "TypeError: input must have the dtype of the layer's weight",
        "refused in 3D": "TypeError: input must have the dtype of the layer's weight",
        "refused by a convolution": "TypeError: input must have the dtype of the layer's weight",
        "norms of a rank": "RuntimeError: the norms of branch_norm must use either all batch or all running",
        "gate of a rank": "ValueError: attention_reach must be given for a gate of type Conv2d",
    }.items():
        first, refusing, last = (results["errors"][name] for results in ranks)
        assert first == last == other and refusing.startswith(error), name
    of_channels = [results["errors"]["channels"] for results in ranks]
    assert of_channels[0] == other and all("channels" in error for error in of_channels[1:])


def test_a_gradient_that_is_not_recorded_may_be_wanted_by_some_ranks(ranks):
    assert [results["errors"]["gradients that are not recorded"] for results in ranks] == RANKS * [None]


@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_data_parallel_training_equals_one_process(ranks, name):
    expected = train(make_network(name == "FSDP2"), make_batch()).state_dict()
    for results in ranks:
        assert results[name].keys() == expected.keys()
        for key, value in expected.items():
            assert relative_error(results[name][key], value) < 1e-12, key


@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_training_moves_the_network(ranks, name):
    """The test above can fail: steps change the weights, and the rows of one rank alone change them otherwise."""
    for other in (make_network(name == "FSDP2"), train(make_network(name == "FSDP2"), make_batch()[:1])):
        assert relative_error(ranks[0][name]["2.weight"], other[2].weight) > 1e-3


def test_sync_batch_norm_replaces_the_norms_of_a_network():
    network = networks.build("AFN-6", 2, 3, 2, widths=(3, 4, 4, 5), dilations=(1, 3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 2 + 6 * 2 + 2 and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", TENSOR_CASES)
@pytest.mark.parametrize("sharding", ["batch", "channels"])
def test_dtensor_runs_on_parts_without_a_message(ranks, name, sharding):
    vectors = {"plain": ["bias"], "branch": ["branch_scale", "branch_shift"]}[name]
    if sharding == "batch":
        expected = {"output": "S(0)", "input": "S(0)", "attention": "S(0)"}
        expected |= dict.fromkeys(["weight", *vectors], "P(sum)")
    else:
        expected = {"output": "S(1)", "input": "P(sum)", "attention": "P(sum)", "weight": "S(0)"}
        expected |= {vector: "S(0)" if vector == "bias" else "S(1)" for vector in vectors}
    for results in ranks:
        results = results["DTensor", name, sharding]
        assert results["collectives"] == 0
        assert results["placements"] == expected
        for key in results:
            if key.startswith("errors"):
                assert max(results[key].values()) < 1e-12, key


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((nn.Linear(3, 4), 2), TypeError, "layer must be an AutofocusConvNd or an nn.ConvNd, got Linear"),
        ((nn.Conv2d(3, 4, 2), 2), ValueError, "layer must have odd kernel sizes and zero padding, got Conv2d"),
        ((nn.Conv2d(3, 4, 3, padding_mode="circular"), 2), ValueError, "zero padding, got Conv2d"),
        ((nn.Conv2d(3, 4, 3), 1), ValueError, r"dim must be 2 to 3 or -2 to -1 .*, got 1"),
        ((nn.Conv2d(3, 4, 3), -3), ValueError, r"dim must be 2 to 3 or -2 to -1 .*, got -3"),
        ((nn.Conv2d(3, 4, 3), 4), ValueError, r"dim must be 2 to 3 or -2 to -1 .*, got 4"),
        ((nn.Conv2d(3, 4, 3), 0), ValueError, r"dim must be 2 to 3 or -2 to -1 .*, got 0"),
        ((nn.Conv2d(3, 4, 3), 2.0), TypeError, "dim must be an int, got 2.0"),
        ((nn.Conv2d(3, 4, 3), True), TypeError, "dim must be an int, got True"),
        ((AutofocusConv2d(3, 4, attention=nn.Conv2d(3, 4, 3)), 2), ValueError, "attention_reach must be given for a"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SpatiallySharded(*arguments)


@pytest.mark.parametrize(
    "reach, error, message",
    [
        (True, TypeError, "attention_reach must be an int, got True"),
        (1.0, TypeError, "attention_reach must be an int, got 1.0"),
        (-1, ValueError, "attention_reach must be at least 0, got -1"),
    ],
)
def test_bad_attention_reach(reach, error, message):
    layer = AutofocusConv2d(3, 4, attention=nn.Conv2d(3, 4, 3))
    with pytest.raises(error, match=message):
        SpatiallySharded(layer, 2, attention_reach=reach)


def test_repr_shows_the_axis_from_the_end():
    text = repr(SpatiallySharded(AutofocusConv2d(3, 4), 2))
    assert text.startswith("SpatiallySharded(\n  dim=-2\n  (layer): AutofocusConv2d(")


def test_a_process_alone_is_told_to_initialise():
    with pytest.raises(RuntimeError, match="needs torch.distributed.init_process_group"):
        SpatiallySharded(AutofocusConv2d(3, 4), 2)(torch.randn(1, 3, 5, 5))
