"""As triton_worker.py, for batch-normalised branches: python triton_norm_worker.py interpret|compile NAME ..."""

import copy
import json
import os
import subprocess
import sys
from functools import partial

import test_branch_norm
import torch
from helpers import triton_worker
from helpers.triton_worker import SMALL
from test_branch_norm import make_norms
from torch.utils._python_dispatch import TorchDispatchMode

from autofocus_kernels import AutofocusConv2d, testing
from autofocus_kernels.backends.reference import backend as reference_backend
from autofocus_kernels.backends.triton import backend as triton_backend
from autofocus_kernels.backends.triton.configs import Config
from autofocus_kernels.branch_norm import normed_autofocus_conv
from autofocus_kernels.ops.branch_norm import allocate_branches
from autofocus_kernels.testing import Case, relative_error

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
# Of one training step by batch statistics.
KERNELS = {
    "forward_kernel",
    "statistics_kernel",
    "combine_kernel",
    "reduce_kernel",
    "grad_branches_kernel",
    "grad_input_weight_kernel",
}
# Few, large programs, for the interpreter's time goes by program.
LARGE = Config(rows=1024, block_c=64, block_o=64, num_warps=4, registers=255)

# ------------------------------------------------------------------ interpreted: (case, dtype, save_branches)

# Outputs of 8 channels are gathered where the branches lay, or in their memory order if that is channels-last; of 5 and
# 9 in wider rows.
_1D = Case("1d", (23,), channels=12, out_channels=8, dilations=(1, 2, 4), batch=2)
_PADDED = Case("padded_1d", (23,), channels=5, out_channels=9, dilations=(2, 6), batch=2)
_LAST = Case("channels_last", (6, 7), channels=8, out_channels=16, dilations=(2, 4), batch=2, layout="channels_last")
_OF_EVERY_BACKEND = ("stride", "dilation_per_axis", "one_branch", "one_channel", "channels_last_2d")
_LAYOUTS = tuple(
    Case(f"{layout}_2d", (6, 7), layout=layout, batch=2, dilations=(1, 3), out_channels=8)
    for layout in ("transposed", "sliced", "expanded")
)
# At least two programs on every axis of every grid of the kernels that treat each voxel alone; _SMALL has small tiles
# in the others too, of which triton_worker.py tests more.
_SMALL = Case("small_1d", (20,), channels=9, out_channels=20, dilations=(2, 6))
_GRIDS = (
    Case("grid_1d", (40,), channels=20, out_channels=36, dilations=(2, 6), batch=2),
    Case("grid_2d", (6, 9), channels=20, out_channels=20, dilations=(1, 2), batch=2, layout="channels_last"),
    Case("grid_3d", (3, 5, 5), channels=20, out_channels=20, dilations=(1, 3), kernel_size=(1, 3, 1), batch=2),
)
_OFFSET = Case("means_far_from_zero", (150,), dilations=(1, 2), padding=0, channels=3, out_channels=20, bias=False)

INTERPRETED = [
    (_1D, FLOAT32, False),
    (_1D, FLOAT32, True),
    (_1D, BFLOAT16, False),
    (_1D, FLOAT16, True),
    (_PADDED, FLOAT32, True),
    (_PADDED, BFLOAT16, False),
    (_LAST, FLOAT32, True),
    (_LAST, BFLOAT16, False),
    *(
        (next(c for c in test_branch_norm.CASES if c.name == name), FLOAT32, index % 2 == 1)
        for index, name in enumerate(_OF_EVERY_BACKEND)
    ),
    *((case, FLOAT32, index % 2 == 1) for index, case in enumerate(_LAYOUTS)),
    *((case, FLOAT32, index % 2 == 1) for index, case in enumerate(_GRIDS)),
    (_SMALL, FLOAT32, False),
    (_OFFSET, FLOAT32, False),
]


def interpreted_name(case, dtype, save_branches):
    return f"{case.name}-{str(dtype).removeprefix('torch.')}-{'save' if save_branches else 'recompute'}"


NAMES = [*(interpreted_name(*entry) for entry in INTERPRETED), "layer", "memory", "one_voxel"]


def configure(config=LARGE, elements=4096, block_o=128):
    """Tiles of every kernel; returns a record of the grids that are launched."""
    from autofocus_kernels.backends.triton import launch, norm

    launch.forget()
    launch.configurations = lambda *key: (config,)
    norm.ELEMENTS, norm.MAX_BLOCK_O = elements, block_o
    grids = {}

    def submit(work):
        grids[work.plan.kernel.__name__] = work.plan.grid
        work.plan.run(work.tensors)
        work.finish()

    launch.submit = submit
    return grids


def interpret(case, dtype, save_branches):
    """Output, every gradient and running statistics against float64 truth."""
    many = case in (*_GRIDS, _SMALL)
    if many or case is _OFFSET:
        grids = configure(SMALL if case is _SMALL else LARGE, 4 * 16 if case is _SMALL else 16 * 16, 16)
    else:
        grids = configure()
    tensors = testing.make_tensors(case, dtype)
    if case is _OFFSET:
        tensors = tensors._replace(input=tensors.input + 1000)
    norms = make_norms(case, FLOAT32)
    fused = partial(normed_autofocus_conv, save_branches=save_branches, backend="triton")
    results = test_branch_norm.compare(fused, case, tensors, norms)
    assert results["output"].is_contiguous(memory_format=case.memory_format)
    assert set(grids) - triton_worker.PACKING == KERNELS
    if many:
        assert all(min(grids[name]) > 1 for name in KERNELS - {"forward_kernel", "grad_input_weight_kernel"}), grids
    if case is _SMALL:
        _same_bits(case, tensors)


def _same_bits(case, tensors):
    """A gradient that is wanted alone is the same, to the last bit."""
    from autofocus_kernels.backends.triton import backend

    volumes = (tensors.input, tensors.weight, tensors.attention)
    branches = allocate_branches(*volumes).normal_()
    vectors = torch.randn(3, case.num_branches, case.out_channels)
    call = testing.call_of(case, tensors)._replace(bias=None)

    def gradients(*wanted):
        outputs = [torch.full_like(v, torch.nan) if slot in wanted else None for slot, v in enumerate(volumes)]
        backend.branch_norm_backward(
            call, tensors.grad_output, branches, *vectors, torch.empty_like(branches), *outputs[:2]
        )
        sums = torch.empty_like(vectors[:2])
        backend.branch_reduce(call, tensors.grad_output, branches, *vectors, outputs[2], *sums)
        return *outputs, sums

    together = gradients(0, 1, 2)
    for slot in (0, 1):
        alone = gradients(slot)
        assert torch.equal(alone[slot], together[slot]), f"gradient {slot} differs when it is wanted alone"
        assert torch.equal(alone[3], together[3]), "sums differ when no gradient of attention is wanted"


class Allocations(TorchDispatchMode):
    """Bytes of each storage that is new."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor):
            self.bytes[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
        return result


def interpret_memory():
    """The gradients of branches take the memory of the branches, and at most one branch more. Launches nothing."""
    from autofocus_kernels.backends.triton import backend, launch

    configure(SMALL)
    launch.submit = lambda work: None
    for layout in ("contiguous", "channels_last"):
        case = Case("memory", (40, 50), channels=2, out_channels=8, dilations=(1, 2, 4), batch=2, layout=layout)
        tensors = testing.make_tensors(case)
        branches = allocate_branches(tensors.input, tensors.weight, tensors.attention)
        coefs = torch.ones(3, case.num_branches, case.out_channels)
        outputs = torch.empty_like(tensors.input), torch.empty_like(tensors.weight)
        with Allocations() as new:
            backend.branch_norm_backward(
                testing.call_of(case, tensors)._replace(bias=None),
                tensors.grad_output,
                branches,
                *coefs,
                branches,
                *outputs,
            )
        new.bytes.pop(branches.data_ptr(), None)
        assert max(new.bytes.values()) <= branches[0].nbytes, (layout, new.bytes)


def interpret_layer():
    """A training step of a layer, its gate included, against the layer written out in float64."""
    configure()
    torch.manual_seed(0)
    layer = AutofocusConv2d(3, 5, dilations=(1, 2, 4), branch_norm=True, backend="triton")
    exact = copy.deepcopy(layer).double()
    input = torch.randn(2, 3, 6, 7, requires_grad=True)
    double = input.detach().double().requires_grad_()
    output = layer(input)
    expected = test_branch_norm.plain_layer(exact, double)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    expected.backward(grad_output.double())
    errors = {"output": relative_error(output, expected), "input": relative_error(input.grad, double.grad)}
    for (name, parameter), other in zip(layer.named_parameters(), exact.parameters()):
        if name == "bias":
            assert not parameter.grad.any()
        else:
            errors[name] = relative_error(parameter.grad, other.grad)
    for (name, buffer), other in zip(layer.named_buffers(), exact.buffers()):
        errors[name] = relative_error(buffer, other)
    assert all(error <= 1e-5 for error in errors.values()), errors


def interpret_one_voxel():
    """Then only the distance between branches says that their five channels allow no wide loads."""
    configure()
    case = Case("one_voxel", (1, 1), channels=3, out_channels=5, dilations=(1, 2), batch=1)
    tensors = testing.make_tensors(case)
    call = testing.call_of(case, tensors)._replace(bias=None)
    vectors = torch.randn(3, case.num_branches, case.out_channels)

    def run(backend):
        branches = allocate_branches(tensors.input, tensors.weight, tensors.attention)
        mean, var, *sums = torch.empty(4, *vectors.shape[1:])
        output, *gradients = (torch.empty_like(t) for t in (tensors.grad_output, *call[:3]))
        backend.branch_statistics(call, branches, mean, var)
        backend.branch_combine(call, branches, *vectors[:2], output)
        backend.branch_reduce(call, tensors.grad_output, branches, *vectors, gradients[2], *sums)
        backend.branch_norm_backward(call, tensors.grad_output, branches, *vectors, branches, *gradients[:2])
        return mean, var, *sums, output, *gradients

    torch.testing.assert_close(run(triton_backend), run(reference_backend))


# ------------------------------------------------------------------ ahead of time: (target, dtype, layout)

COMPILED = [("sm_90", "bfloat16", "channels_last")]
COMPILED_FOR_A_RELEASE = [
    ("sm_100", "bfloat16", "contiguous"),
    ("sm_80", "tf32", "channels_last"),
    ("gfx942", "float32", "channels_last"),
]


def compiled_name(target, dtype, layout):
    return f"{target}-{dtype}-{layout}"


def compile_kernels(target, dtype, layout):
    """Figures of every kernel of a training step with batch statistics, by the default configurations."""
    from autofocus_kernels.backends.triton import backend, kernels, launch, norm_kernels, packing

    triton_worker.compile_for(target, dtype, kernels, packing, norm_kernels)
    figures = {}

    def submit(work):
        name = work.plan.kernel.__name__
        # The same kernel is launched for each branch.
        if name not in figures and name not in triton_worker.PACKING:
            figures[name] = triton_worker.figures_of(work.plan.compiled(work.tensors), target)

    launch.submit = submit
    channels = 40 if dtype == "bfloat16" else 32  # rows of whole loads, but no multiple of 16, which Triton would see
    case = Case(
        "aot", (24, 24, 24), channels=channels, out_channels=channels, dilations=(2, 6, 10, 14), layout=layout, batch=1
    )
    tensors = testing.make_tensors(case, FLOAT32 if dtype in ("tf32", "float32") else getattr(torch, dtype))
    K, O = case.num_branches, channels
    vectors = torch.ones(5, K, O)
    branches = allocate_branches(tensors.input, tensors.weight, tensors.attention)
    call = testing.call_of(case, tensors)._replace(bias=None)
    one_branch = call._replace(geometry=Case("aot", case.size, dilations=(6,)).geometry)
    backend.branch_statistics(one_branch, branches[:1], vectors[0, :1], vectors[1, :1])
    backend.branch_combine(call, branches, vectors[0], vectors[1], torch.empty_like(tensors.grad_output))
    backend.branch_reduce(
        call,
        tensors.grad_output,
        branches,
        vectors[0],
        vectors[1],
        vectors[2],
        torch.empty_like(tensors.attention),
        vectors[3],
        vectors[4],
    )
    backend.branch_norm_backward(
        call,
        tensors.grad_output,
        branches,
        vectors[0],
        vectors[1],
        vectors[2],
        branches,
        torch.empty_like(tensors.input),
        torch.empty_like(tensors.weight),
    )
    return figures


# ------------------------------------------------------------------


def main(command, names):
    torch.set_num_threads(1)
    triton_backend.checked = False  # it would interpret everything twice
    if command == "interpret":
        triton_worker.spare_the_interpreter()
        work = [partial(interpret, *entry) for entry in INTERPRETED]
        entries = dict(zip(NAMES, [*work, interpret_layer, interpret_memory, interpret_one_voxel]))
    else:
        every = (*COMPILED, *COMPILED_FOR_A_RELEASE)
        entries = {compiled_name(*entry): partial(compile_kernels, *entry) for entry in every}
    triton_worker.print_results(entries, names)


def results(command, environment, names):
    """name -> result of the entries named; what the process prints besides is its own."""
    worker = subprocess.run(
        [sys.executable, __file__, command, *names],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    return dict(json.loads(line) for line in worker.stdout.splitlines() if line.startswith("["))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
