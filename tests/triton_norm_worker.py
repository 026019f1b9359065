"""Batch-normalised branches by the Triton kernels, as triton_worker.py: python triton_norm_worker.py interpret|compile."""

import copy
import json
import os
import subprocess
import sys

import torch

import test_branch_norm
import triton_worker
from autofocus_kernels import AutofocusConv1d, AutofocusConv2d, AutofocusConv3d, norm_ops, testing
from autofocus_kernels.branch_norm import normed_autofocus_conv
from autofocus_kernels.testing import Case, relative_error
from test_branch_norm import evaluate, make_norms, plain
from triton_worker import LARGE, SMALL

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

# ------------------------------------------------------------------ interpreted: (case, dtype, save_branches)

_SHARED = ("stride", "dilation_per_axis", "one_channel", "channels_last_2d", "transposed", "sliced", "expanded")
# Small tiles: at least two programs on every axis of every grid.
_GRID = (
    Case("grid_1d", (40,), channels=20, out_channels=20, dilations=(2, 6), batch=2),
    Case("grid_2d", (6, 9), channels=20, out_channels=20, dilations=(1, 2), batch=2, layout="channels_last"),
    Case("grid_3d", (3, 5, 5), channels=20, out_channels=36, dilations=(1, 3), kernel_size=(1, 3, 1), batch=2),
)
_ROUNDING = (
    Case("3d", (5, 6, 7), channels=12, out_channels=9, dilations=(1, 2, 4), batch=2),
    Case("3d_channels_last", (5, 6, 7), channels=8, out_channels=16, dilations=(2, 4), batch=2, layout="channels_last"),
)
_OFFSET = Case("means_far_from_zero", (16, 17), dilations=(1, 2), padding=0, channels=3, out_channels=4, bias=False)

INTERPRETED = [
    *(
        (case, FLOAT32, index % 2 == 1)
        for index, case in enumerate(c for c in test_branch_norm.CASES if c.name in _SHARED)
    ),
    *((case, FLOAT32, save) for case in _GRID for save in (False, True)),
    *((case, dtype, save) for case in _ROUNDING for dtype in (FLOAT32, BFLOAT16, FLOAT16) for save in (False, True)),
    (_OFFSET, FLOAT32, False),
]
LAYERS = {1: AutofocusConv1d, 2: AutofocusConv2d, 3: AutofocusConv3d}
NAMES = [
    *(
        f"{case.name}-{str(dtype).removeprefix('torch.')}-{'save' if save else 'recompute'}"
        for case, dtype, save in INTERPRETED
    ),
    *(f"layer_{dims}d" for dims in LAYERS),
]


def configure(small):
    """Large programs, for the interpreter's time goes by program; or small ones, with their grids recorded."""
    from autofocus_kernels.backends.triton import launch, norm

    launch.configurations = lambda *key: (SMALL if small else LARGE,)
    norm.ELEMENTS, norm.MAX_BLOCK_O = (256, 16) if small else (4096, 128)
    grids = {}

    def submit(work):
        grids[work.kernel.__name__] = work.grid
        work.kernel[work.grid](*work.arguments, **work.constants)
        work.finish()

    launch.submit = submit
    return grids


def interpret(case, dtype, save_branches):
    """Output, every gradient and running statistics against float64 truth, by the error of the plain layer in ``dtype``."""
    small = case in _GRID
    grids = configure(small)
    tensors = testing.make_tensors(case, dtype)
    if case is _OFFSET:
        tensors = tensors._replace(input=tensors.input + 1000)
    norms = make_norms(case, FLOAT32)
    exact = testing.Tensors(*(t if t is None else t.double() for t in tensors))
    truth = evaluate(plain, case, exact, copy.deepcopy(norms).double())
    same_dtype = evaluate(plain, case, tensors, copy.deepcopy(norms))

    def fused(*arguments, **options):
        return normed_autofocus_conv(*arguments, **options, save_branches=save_branches, backend="triton")

    with testing.poisoned_memory():
        results = evaluate(fused, case, tensors, copy.deepcopy(norms))
    again = evaluate(fused, case, tensors, copy.deepcopy(norms))
    problems = []
    for name, value in truth.items():
        if name == "gradient of bias":
            assert not results[name].any()
            continue
        own, error = relative_error(same_dtype[name], value), relative_error(results[name], value)
        eps = torch.finfo(same_dtype[name].dtype if same_dtype[name].is_floating_point() else FLOAT32).eps
        # In float32 the order of sums decides; in 16 bits there is the rounding of branches and of their gradients.
        limit = 4 * own + 1e-6 if dtype == FLOAT32 else 2 * own + eps
        if not error <= limit:
            problems.append(f"{name}: relative error {error:.1e}, allowed {limit:.1e}")
        if not torch.equal(results[name], again[name]):
            problems.append(f"{name}: the same call gives other bits")
    assert not problems, "; ".join(problems)
    assert results["output"].is_contiguous(memory_format=case.memory_format)
    assert set(grids) - {"pack_kernel"} == {
        "forward_kernel", "statistics_kernel", "combine_kernel", "reduce_kernel", "grad_branches_kernel",
        "branches_grad_input_weight_kernel",
    }
    if small:
        assert all(min(grid) > 1 for name, grid in grids.items() if name != "pack_kernel"), grids
        _wanted_alone(fused, case, tensors, norms, results)


def _wanted_alone(fused, case, tensors, norms, together):
    """A gradient that is wanted alone is the same, to the last bit."""
    names = ("input", "weight", "attention")
    for name in names:
        leaves = {n: getattr(tensors, n).detach().requires_grad_(n == name) for n in names}
        frozen = copy.deepcopy(norms).requires_grad_(False)
        output = fused(leaves["input"], leaves["weight"], leaves["attention"], None, frozen, **case.options)
        (gradient,) = torch.autograd.grad(output, leaves[name], tensors.grad_output)
        assert torch.equal(gradient, together[f"gradient of {name}"]), f"gradient of {name} differs when wanted alone"


def interpret_layer(dims):
    """One training step of a layer, its gate included, against the layer written out in float64."""
    configure(False)
    torch.manual_seed(dims)
    size = (6, 7, 8)[:dims]
    layer = LAYERS[dims](3, 5, dilations=(1, 2, 4), branch_norm=True, save_branches=dims == 2, backend="triton")
    exact = copy.deepcopy(layer).double()
    input = torch.randn(2, 3, *size, requires_grad=True)
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


# ------------------------------------------------------------------ ahead of time: (target, dtype, layout)

COMPILED = [
    *((target, "bfloat16", "channels_last") for target in triton_worker.SHARED_LIMIT),
    *((target, "tf32", "channels_last") for target in ("sm_80", "sm_90")),
    ("sm_90", "float16", "channels_last"),
    ("sm_90", "bfloat16", "contiguous"),
    ("gfx942", "float32", "channels_last"),
]


def compiled_name(target, dtype, layout):
    return f"{target}-{dtype}-{layout}"


def compile_kernels(target, dtype, layout):
    """Figures of every kernel of a training step with batch statistics, by the default configurations."""
    import triton
    from triton.backends.compiler import GPUTarget

    from autofocus_kernels.backends import triton as backend
    from autofocus_kernels.backends.triton import kernels, launch, norm_kernels, tuning

    amd = target.startswith("gfx")
    torch.version.hip = "offline" if amd else None
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    arch = target if amd else int(target.removeprefix("sm_"))
    launch.capability = lambda device: 9 if amd else arch // 10
    triton.runtime.driver.set_active(
        triton_worker.OfflineDriver(GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32))
    )
    for kernel in (*vars(kernels).values(), *vars(norm_kernels).values()):
        if isinstance(kernel, triton.runtime.JITFunction):
            kernel.device_caches.clear()
    tuning._chosen.clear()
    figures = []

    def submit(work):
        if work.kernel.__name__ == "pack_kernel":
            return  # triton_worker.py compiles it
        compiled = work.kernel.warmup(*work.arguments, grid=work.grid, **work.constants)
        figures.append({"kernel": work.kernel.__name__, **triton_worker._figures(compiled, target)})

    launch.submit = submit
    channels = 64 if dtype == "bfloat16" else 32
    case = Case(
        "aot", (24, 24, 24), channels=channels, out_channels=channels, dilations=(2, 6, 10, 14), layout=layout, batch=1
    )
    tensors = testing.make_tensors(case, FLOAT32 if dtype in ("tf32", "float32") else getattr(torch, dtype))
    one_branch = Case("aot", case.size, dilations=(6,)).geometry
    K, O = case.num_branches, channels
    vectors = torch.ones(7, K, O)
    branches = norm_ops._allocate_branches(tensors.input, tensors.weight, tensors.attention)
    backend.branch_statistics(one_branch, tensors.input, tensors.weight, branches[:1], vectors[0, :1], vectors[1, :1])
    backend.branch_combine(branches, tensors.attention, vectors[0], vectors[1], torch.empty_like(tensors.grad_output))
    backend.branch_reduce(
        tensors.grad_output, branches, tensors.attention, vectors[0], vectors[1], vectors[2],
        torch.empty_like(tensors.attention), vectors[3], vectors[4],
    )
    backend.branch_norm_backward(
        case.geometry, tensors.grad_output, tensors.input, tensors.weight, tensors.attention, branches,
        vectors[0], vectors[1], vectors[2], branches, torch.empty_like(tensors.input), torch.empty_like(tensors.weight),
    )
    return figures


# ------------------------------------------------------------------


def main(command):
    torch.set_num_threads(1)
    if command == "interpret":
        work = [lambda entry=entry: interpret(*entry) for entry in INTERPRETED]
        work += [lambda dims=dims: interpret_layer(dims) for dims in LAYERS]
        entries = zip(NAMES, work)
    else:
        entries = ((compiled_name(*entry), lambda entry=entry: compile_kernels(*entry)) for entry in COMPILED)
    for name, run in entries:
        try:
            result = run()
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        print(json.dumps([name, result]), flush=True)


def results(command, environment):
    """name -> result of every entry; what the process prints besides is its own."""
    worker = subprocess.run(
        [sys.executable, __file__, command], stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    return dict(json.loads(line) for line in worker.stdout.splitlines() if line.startswith("["))


if __name__ == "__main__":
    main(sys.argv[1])
