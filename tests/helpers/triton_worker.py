"""The Triton kernels in a process of their own: python triton_worker.py interpret|compile NAME ...

Triton decides at its import whether kernels are interpreted, so the two ways to check them without a GPU each need
their own process. Prints one line of JSON, [name, problem or figures], for every entry named.
"""

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from autofocus_kernels import testing
from autofocus_kernels.backends.interface import Gradients
from autofocus_kernels.backends.triton import backend as triton_backend
from autofocus_kernels.backends.triton.configs import Config
from autofocus_kernels.testing import Case

# ------------------------------------------------------------------ interpreted: name -> what to run

# Beyond the list that every backend is checked on: what only this one could get wrong, and small cases in the place of
# large ones there.
_OWN = (
    Case("scale_only_2d", (9, 8), mode="scale", layout="channels_last", channels=8),
    Case("shift_only_2d", (6, 7), mode="shift"),
    Case("stride_on_a_lattice", (17, 13), dilations=(2, 4), stride=(2, 4), padding=(2, 1), bias=False),
    Case("stride_last_2d", (9, 8), stride=2, padding=1, layout="channels_last", channels=8, out_channels=8),
    Case("seven_branches_2d", (6, 7), dilations=(1, 2, 3, 4, 5, 6, 7)),
    Case("whole_blocks_2d", (5, 6), channels=32, out_channels=16, dilations=(2, 4)),
    Case("expanded_2d", (5, 6), layout="expanded", batch=3),
)
# At least two programs on every axis of every grid, and two blocks in every loop over channels.
SMALL = Config(rows=16, block_c=16, block_o=16, num_warps=4, registers=255)
_GRID = (
    Case("grid_1d", (34,), channels=20, out_channels=20, dilations=(2, 6), batch=2),
    Case("grid_2d_branch", (5, 7), channels=20, out_channels=20, dilations=(1, 2), mode="branch"),
    Case("grid_3d", (3, 4, 3), channels=20, out_channels=20, dilations=(1, 3), kernel_size=(3, 1, 3)),
)
# Tiles of 2 x 8 x 4 points, with another step on each axis.
_STEPS = Case("steps_of_axes", (4, 5, 9), 2, 2, dilations=((2, 1, 3), (4, 2, 6)))
# Other values, or a geometry, layout or number of channels of which a smaller case is here too: no other code of these
# kernels. (On a GPU all run.)
_AS_ANOTHER = (
    "no_bias",
    "normal_gate",
    "one_hot_gate",
    "scale_only",
    "shift_only",
    "branch_2d",
    "valid",
    "wide_padding",
    "window",
    "stride",
    "stride_branch",
    "seven_branches",
    "equal_dilations",
    "channels_3_to_7",
    "channels_30_to_50",
    "channels_130_to_65",
    "channels_16_to_140",
    "channels_32_to_32",
    "many_rows",
    "lattices",
    "channels_last",
    "channels_last_stride",
    "transposed",
    "sliced",
    "expanded",
)
_16_BIT = ("1d", "branch_1d", "kernel_1", "channels_last_2d", "all_outside_but_centre")


def large(case):
    """Few, large programs: the interpreter's time goes by program, tap and branch, hardly by the size of a tile."""
    points = max(math.prod(case.size), math.prod(case.geometry.output_size))

    def power(n, least, most):
        return min(most, max(least, 1 << (n - 1).bit_length()))

    return Config(
        power(2 * points, 16, 4096),
        power(case.channels, 16, 64),
        power(case.out_channels, 16, 64),
        num_warps=4,
        registers=255,
    )


def _interpreted():
    cases = [case for case in testing.CASES if case.name not in _AS_ANOTHER]
    entries = [(case, torch.float32, large(case)) for case in (*cases, *_OWN)]
    entries += [(case, torch.float32, SMALL) for case in _GRID]
    entries += [(_STEPS, torch.float32, SMALL._replace(rows=64))]
    entries += [
        (case, dtype, large(case))
        for dtype in (torch.bfloat16, torch.float16)
        for case in testing.CASES
        if case.name in _16_BIT
    ]
    return {
        f"{case.name}-{str(dtype).removeprefix('torch.')}": partial(interpret, case, dtype, config)
        for case, dtype, config in entries
    }


def interpret(case, dtype, config):
    """Forward and every gradient against truth; gradients wanted alone, and again, are the same bits."""
    from autofocus_kernels.backends.triton import backend, launch

    launch.configurations = lambda *key: (config,)
    launch.PARTS = 2  # of the three that the interpreter has
    launch.forget()
    testing.check("triton", case, dtype)
    if dtype != torch.float32 or case.spatial_dims != 1:
        return
    tensors = testing.make_tensors(case, dtype)
    wanted = [tensors.input, tensors.weight, tensors.attention, tensors.branch_scale]

    def gradients(*slots):
        outputs = [
            torch.full_like(tensor, torch.nan) if slot in slots and tensor is not None else None
            for slot, tensor in enumerate(wanted)
        ]
        backend.backward(testing.call_of(case, tensors), tensors.grad_output, Gradients(*outputs))
        return outputs

    together = gradients(0, 1, 2, 3)
    for slot, gradient in enumerate(together):
        alone = gradients(slot)[slot]
        assert gradient is None or torch.equal(alone, gradient), f"gradient {slot} differs when it is wanted alone"


def spare_the_interpreter():
    """Leaves out what Triton's interpreter does again or for nothing, two thirds of its time here."""
    from triton.language import core
    from triton.runtime import interpreter

    patched = set()

    def call(function, *arguments, **constants):
        # The language is patched for each module once, not at each call of a device function.
        if function.fn.__module__ not in patched:
            patched.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **constants)

    interpreter.InterpretedFunction.__call__ = call
    # It computes whether integers overflow, and drops the answer.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    # Tensors are on the CPU and used in place: to copy their storages onto themselves would touch all of it.
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    # Every tensor's shape is a tuple, whose type, a list of types and its name, nothing asks for here but fields.
    nameless = core.tuple_type([])
    core._type_for_tuple_values = lambda _, fields=None: core.tuple_type([], fields) if fields else nameless
    # It makes the table of all types at each look-up.
    of_pointer, of_number = np.dtype(np.uint64), functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda type: of_pointer if type.scalar.is_ptr() else of_number(type.scalar)


INTERPRETED = _interpreted()

# ------------------------------------------------------------------ ahead of time: name -> what to compile

# Shared memory of one program at most, in bytes: CUDA C++ Programming Guide, compute capabilities; LDS of CDNA3.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Tensor-core instructions in the machine code of each.
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}

# Launched by the others besides.
PACKING = {"pack_kernel", "repack_kernel", "add_parts_kernel"}


class Compiled(NamedTuple):
    """One problem whose forward and backward are compiled."""

    target: str
    dtype: str
    mode: str
    channels: int
    out_channels: int
    layout: str

    def __str__(self):
        return "-".join(map(str, self))


# Several targets, every mode, and where registers ran out before: masked blocks, several blocks of channels, strided
# tiles. Each takes ten seconds.
COMPILED = [
    Compiled("sm_90", "bfloat16", "branch", 40, 50, "contiguous"),
    Compiled("sm_80", "tf32", "plain", 32, 32, "channels_last"),
    Compiled("gfx942", "float32", "branch", 32, 32, "channels_last"),
]
# With these every dtype and mode, and every target with and without TF32 or 16 bits.
COMPILED_FOR_A_RELEASE = [
    Compiled("sm_90", "bfloat16", "plain", 128, 128, "contiguous"),
    Compiled("sm_90", "bfloat16", "plain", 64, 64, "channels_last"),
    Compiled("sm_90", "float16", "plain", 32, 32, "contiguous"),
    Compiled("sm_90", "tf32", "branch", 50, 50, "contiguous"),
    Compiled("sm_80", "bfloat16", "branch", 64, 64, "channels_last"),
    Compiled("sm_80", "bfloat16", "plain", 40, 50, "channels_last"),
    Compiled("sm_80", "float32", "plain", 32, 32, "channels_last"),
    Compiled("sm_100", "bfloat16", "branch", 32, 32, "channels_last"),
    Compiled("gfx942", "bfloat16", "plain", 40, 50, "contiguous"),
]


# Which is no compilation only, but needs the same process.
PLANS = "a_plan_launches_what_triton_would"


class OfflineDriver:
    """What Triton asks of a driver before it launches: enough to compile for a device that is not there."""

    def __init__(self, target):
        self.get_current_target = lambda: target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_for(target, dtype, *modules):
    """Has the kernels of ``modules`` compiled for ``target``, as launches there would in ``dtype``."""
    import triton
    from triton.backends.compiler import GPUTarget

    from autofocus_kernels.backends.triton import launch

    amd = target.startswith("gfx")
    torch.version.hip = "offline" if amd else None
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    arch = target if amd else int(target.removeprefix("sm_"))
    launch.capability = lambda device: 8 if amd else arch // 10
    triton.runtime.driver.set_active(OfflineDriver(GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32)))
    for module in modules:
        for kernel in vars(module).values():
            if isinstance(kernel, triton.runtime.JITFunction):
                kernel.device_caches.clear()
    launch.forget()


def compile_kernels(target, dtype, mode, channels, out_channels, layout):
    """Figures of every kernel that a forward and a backward launch with the default configuration."""
    from autofocus_kernels.backends.triton import kernels, launch, packing

    compile_for(target, dtype, kernels, packing)
    figures = []

    def submit(work):
        name = work.plan.kernel.__name__
        if name not in PACKING or name not in {figure["kernel"] for figure in figures}:
            figures.append({"kernel": name, **figures_of(work.plan.compiled(work.tensors), target)})
        work.finish()

    launch.submit = submit
    case = Case(
        "aot",
        (40, 40, 40),
        channels=channels,
        out_channels=out_channels,
        dilations=(2, 6, 10, 14),
        mode=mode,
        layout=layout,
    )
    tensors = testing.make_tensors(case, torch.float32 if dtype == "tf32" else getattr(torch, dtype))
    gradients = [
        None if tensor is None else torch.empty_like(tensor)
        for tensor in (tensors.input, tensors.weight, tensors.attention, tensors.branch_scale)
    ]
    call = testing.call_of(case, tensors)
    launch.forward(call, torch.empty_like(tensors.grad_output))
    launch.backward(call, tensors.grad_output, Gradients(*gradients))
    return figures


def a_plan_launches_what_triton_would():
    """The launcher is given what it is by Triton, twice. One kernel is for volumes of any size, others for tensors that
    are aligned otherwise."""
    import triton

    from autofocus_kernels.backends.triton import kernels, launch, packing

    compile_for("sm_90", "bfloat16", kernels, packing)
    launches = []

    def launcher(source, metadata):
        # After grid, stream, function, metadata and hooks come the kernel's arguments.
        return lambda *arguments: launches.append((metadata.hash, arguments[:3], arguments[9:]))

    def submit(work):
        plan = work.plan
        plan.run(work.tensors)
        plan.run(work.tensors)
        plan.kernel[plan.grid](*work.tensors, *plan.numbers, **plan.constants)

    launch.submit = submit
    driver = triton.runtime.driver.active
    driver.launcher_cls = launcher
    driver.utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 128, 0, 1024),
        unload_module=lambda *_: None,
        get_device_properties=lambda _: {"max_shared_mem": SHARED_LIMIT["sm_90"]},
    )
    hashes = []
    for width, offset in ((16, 0), (17, 0), (17, 1)):
        case = Case("plans", (1, 1, width), 8, 8, dilations=(1, 2), kernel_size=(1, 1, 3), layout="channels_last")
        tensors = testing.make_tensors(case, torch.bfloat16)
        memory = torch.empty(tensors.attention.numel() + 1, dtype=torch.bfloat16)
        attention = memory.as_strided(tensors.attention.shape, tensors.attention.stride(), offset)
        call = testing.call_of(case, tensors._replace(attention=attention))
        launch.forward(call, torch.empty_like(tensors.grad_output))
        assert len(launches) == 6, launches  # the weight is repacked first
        for first, second, third in (launches[:3], launches[3:]):
            assert first == second and first[1] == third[1]
            for one, other in zip(first[2], third[2], strict=True):
                assert one is other or (type(one) is type(other) and one == other), (one, other)
        hashes.append(launches[3][0])
        launches.clear()
    assert hashes[0] == hashes[1], "a volume of another size has a kernel of its own"
    assert hashes[2] != hashes[1], "the kernel for aligned tensors ran on others"


def figures_of(compiled, target):
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        # Scalar registers spill to lanes of vector registers; what those spill goes to memory, the private segment.
        spilled = sum(map(int, re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size): *(\d+)", assembly)))
        return {"shared": shared, "spilled": spilled, "in_loops": spilled, "tensor_core": assembly.count("v_mfma")}
    tools = os.path.join(os.path.dirname(__import__("triton").__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def cuobjdump(option):
            command = [os.path.join(tools, "cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, machine_code = cuobjdump("--dump-resource-usage"), cuobjdump("--dump-sass")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "shared": shared,
        "spilled": int(stack),
        "registers": int(registers),
        "in_loops": len(re.findall(r"\b(?:LDL|STL)\b", " ".join(innermost_loops(machine_code)))),
        "tensor_core": len(re.findall(rf"\b{TENSOR_CORE[target]}\b", machine_code)),
        "repeated": repeated_products(compiled),
    }


def innermost_loops(machine_code):
    """The instructions of each, as they are printed."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^/]*?);", machine_code)]
    branches = [(at, re.match(r"(?:@\S+ )?BRA\b.* (0x[0-9a-f]+)", text)) for at, text in code]
    loops = [(int(to[1], 16), at) for at, to in branches if to and int(to[1], 16) < at]
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    return [text for at, text in code if any(first <= at <= last for first, last in inner)]


def repeated_products(compiled):
    """How many warps compute the same part of a product by mma.sync, where fewer would do; 1 if all have work."""
    code, most = compiled.asm["ttgir"], 1.0
    pair = r"\[(\d+), (\d+)\]"
    mma_sync = rf"(#mma\d*) = #ttg.nvidia_mma<{{versionMajor = 2, .*?warpsPerCTA = {pair}, instrShape = {pair}"
    for name, *sizes in re.findall(mma_sync, code):
        *warps, rows, columns = map(int, sizes)
        for shape in set(re.findall(rf"tt.dot .* -> tensor<(\d+)x(\d+)xf32, {name}>", code)):
            tiles = [int(shape[0]) / rows, int(shape[1]) / columns]
            copies = math.prod(max(1.0, of / there) for of, there in zip(warps, tiles))
            most = max(most, copies / max(1.0, math.prod(warps) / math.prod(tiles)))
    return most


# ------------------------------------------------------------------


def main(command, names):
    torch.set_num_threads(1)
    triton_backend.checked = False  # it would interpret everything twice
    if command == "interpret":
        from helpers import triton_checks

        spare_the_interpreter()
        entries = {**INTERPRETED, **{check.__name__: check for check in triton_checks.CHECKS}}
    else:
        entries = {
            **{str(entry): partial(compile_kernels, *entry) for entry in (*COMPILED, *COMPILED_FOR_A_RELEASE)},
            PLANS: a_plan_launches_what_triton_would,
        }
    print_results(entries, names)


def print_results(entries, names):
    for name in names:
        try:
            result = entries[name]()
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        print(json.dumps([name, result]), flush=True)


def chosen_entries(request):
    """Of a module's fixture: the parameters ``entry`` of the module's tests that this run has chosen."""
    parameters = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.node.path and hasattr(item, "callspec")
    ]
    return [each["entry"] for each in parameters if "entry" in each]


def results(command, environment, names):
    """name -> result of the entries named, by two processes at once; what they print besides is theirs to print."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, command, *names[share::2]],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        for share in range(2)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    for worker in workers:
        if worker.returncode:
            raise RuntimeError(f"{command} worker ended with {worker.returncode}")
    return dict(json.loads(line) for output in outputs for line in output.splitlines() if line.startswith("["))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
