"""What a call of the Triton backend costs the host, with launches that do nothing: python -m benchmarks.triton_host.

Needs no GPU: tensors are on the CPU, a stand-in for Triton's driver compiles for sm_90 and drops what is launched. So
the figures hold all that Python and Triton do for a call, from the backend's function down, but no launch, and the
CPU's allocator and copies where a GPU's would be. Prints the least and the median of many calls in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from autofocus_kernels.backends.interface import Gradients
from autofocus_kernels.backends.triton import launch
from autofocus_kernels.testing import Case, call_of, make_tensors

from .arguments import at_least


class SilentDriver:
    """What Triton asks of a driver, for an sm_90 that takes every launch and does nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 128, 0, 1024),
            unload_module=lambda *_: None,
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *_: None


def microseconds(function, calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=at_least(1), default=2000)
    parser.add_argument("--size", type=at_least(1), default=16)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(None)
    calls, size = options.calls, options.size
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(SilentDriver())
    launch.capability = lambda device: 9
    print(f"torch {torch.__version__}, triton {triton.__version__}, {size}^3, bfloat16, 32 -> 32, {calls} calls")
    for layout in ("channels_last", "contiguous"):
        for mode in ("plain", "branch"):
            case = Case("host", (size,) * 3, 32, 32, dilations=(2, 6, 10, 14), mode=mode, layout=layout, batch=1)
            tensors = make_tensors(case, torch.bfloat16)
            call, output = call_of(case, tensors), torch.empty_like(tensors.grad_output)
            like = (tensors.input, tensors.weight, tensors.attention, tensors.branch_scale)
            gradients = Gradients(*(None if tensor is None else torch.empty_like(tensor) for tensor in like))
            passes = {
                "forward": lambda: launch.forward(call, output),
                "backward": lambda: launch.backward(call, tensors.grad_output, gradients),
            }
            for name, function in passes.items():
                function()
                times = microseconds(function, calls)
                print(f"{layout:14} {mode:7} {name:9} least {min(times):6.1f}  median {statistics.median(times):6.1f}")


if __name__ == "__main__":
    main()
