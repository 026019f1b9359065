"""A driver for Triton that executes the PTX of its kernels on CPU tensors."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from triton import knobs
from triton.backends.compiler import GPUTarget

from .block import Block, Launch
from .code import BITS, read


class Driver:
    """Pretends to be a GPU of one compute capability, such as 80 or 90."""

    def __init__(self, capability: int, shared_bytes: int, late: bool):
        self.capability, self.late = capability, late
        self.kernels = []  # kernels that were read; the index of one is its function handle
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda *_: None,
            get_device_properties=lambda _: {"max_shared_mem": shared_bytes},
        )
        knobs.runtime.kernel_load_start_hook.add(self._read)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def _read(self, module, function, name, files, hash):
        (kernel,) = read(Path(files[f"{name}.ptx"]).read_text()).values()
        self.kernels.append(kernel)

    def _load(self, *_):
        return None, len(self.kernels) - 1, 0, 0, 1024

    def launcher_cls(self, source, metadata):
        kinds = list(source.signature.values())

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, exit, *arguments):
            kernel = self.kernels[function]
            values = [value for pair in zip(kinds, arguments, strict=True) for value in _given(*pair)]
            sizes = list(kernel.parameters.values())
            # The last parameters are addresses of Triton's own scratch memory, which these kernels do not use.
            values += [np.zeros(1, np.uint64)] * (len(sizes) - len(values))
            assert [value.nbytes for value in values] == sizes
            addresses = tuple(value.ctypes.data for value in values)
            block = Block(
                kernel,
                Launch((x, y, z), 32 * metadata.num_warps, metadata.shared, addresses, self.late, repeats=True),
                set(),
            )
            for index in itertools.product(range(z), range(y), range(x)):
                block.run(index[::-1])

        return launch


def _given(kind, value) -> list[np.ndarray]:
    """The kernel parameters that pass one argument."""
    if isinstance(kind, tuple):
        return [parameter for pair in zip(kind, value, strict=True) for parameter in _given(*pair)]
    if kind == "constexpr":
        return []
    if kind.startswith("*"):
        return [np.array([value.data_ptr()], np.uint64)]
    return [np.array([value], f"i{BITS[f's{kind[1:]}'] // 8}")]
