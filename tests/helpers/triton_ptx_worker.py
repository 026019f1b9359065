"""Triton's kernels, compiled and executed from their PTX: python triton_ptx_worker.py CAPABILITY CASE-DTYPE ...

In a process of its own: a driver is set for all of it, and what Triton compiled for one GPU is not asked for another.
Prints one line of JSON, [name, problem or null], for each.
"""

import json
import os
import subprocess
import sys
from functools import partial

import torch

from autofocus_kernels import autofocus_conv, testing, tolerance
from autofocus_kernels.testing import Case

CASES = {
    case.name: case
    for case in (
        # Loads of 16 bytes and an input of many tiles; packing, one voxel at a time; a scale and shift by branch.
        Case("rows", (3, 5, 9), 16, 16, dilations=(1, 2), layout="channels_last"),
        Case("ragged", (3, 4, 9), 5, 7, dilations=(1, 2, 4)),
        Case("branch", (3, 4, 6), 9, 8, dilations=(1, 2), mode="branch"),
    )
}
NORM = "norm"  # a training step by batch statistics
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}  # the last as TF32
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}


def results(capability, names):
    """name -> problem or None."""
    command = [sys.executable, __file__, str(capability), *names]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return dict(json.loads(line) for line in output.splitlines() if line.startswith("["))


def problem_of_norm(dtype):
    import test_branch_norm

    from autofocus_kernels.branch_norm import normed_autofocus_conv

    case = Case(NORM, (3, 4, 6), 5, 8, dilations=(1, 2), batch=2, layout="channels_last")
    step = partial(normed_autofocus_conv, save_branches=False, backend="triton")
    norms = test_branch_norm.make_norms(case, torch.float32)
    try:
        test_branch_norm.compare(step, case, testing.make_tensors(case, dtype), norms)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def problem_of(case, dtype):
    tensors = testing.make_tensors(case, dtype)
    try:
        with testing.poisoned_memory():
            found = testing.evaluate(partial(autofocus_conv, backend="triton"), case, tensors)
        if dtype != torch.float32:
            testing.judge(found, case, tensors)
            return None
        for name, expected in testing.truth(case, tensors).items():  # operands are cut, not rounded (tolerance.py)
            error = testing.relative_error(found[name], expected)
            assert error < tolerance.TF32_EPS, f"{name} is off by {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(capability, names):
    import triton
    from helpers.ptx.triton_driver import Driver

    from autofocus_kernels.backends.triton import backend, launch

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver(capability, SHARED_BYTES[capability], late=True))
    launch.capability = lambda device: capability // 10
    backend.refusal = lambda call: None
    backend.checked = False
    for name in names:
        case, dtype = name.split("-")
        problem = problem_of_norm(DTYPES[dtype]) if case == NORM else problem_of(CASES[case], DTYPES[dtype])
        print(json.dumps([name, problem]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
