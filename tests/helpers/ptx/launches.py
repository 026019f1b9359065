"""Executes the launches of the emulation (tests/cuda_host) from PTX instead."""

import ctypes
import itertools
import re
import subprocess
from pathlib import Path

from .block import Block, Launch
from .code import Kernel
from .memory import PtxError

_RUNNER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_int,
    ctypes.c_void_p,
)


def _demangled(symbols: list[str]) -> list[str]:
    """The names of kernels in a form that is the same for both compilers."""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    text = re.sub(r"_GLOBAL__N__\w+|\(anonymous namespace\)", "{}", text)
    return (
        text.replace("autofocus::cuda::Half", "__half")
        .replace("autofocus::cuda::BFloat16", "__nv_bfloat16")
        .split("\n")
    )


class NoLaunches:
    """While entered, the emulation's kernels do nothing. ``grids`` collects theirs."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.grids: list[tuple[int, ...]] = []
        self._runner = _RUNNER(self._run)  # lives as long as the library may call it

    def __enter__(self):
        self.library.autofocus_emulation_run_by(self._runner)
        return self

    def __exit__(self, *error):
        self.library.autofocus_emulation_run_by(None)

    def _run(self, address, numbers, parameters, sizes, count, message) -> int:
        self.grids.append(tuple(numbers[:3]))
        return 1


class Launches(NoLaunches):
    """While entered, the emulation's kernels are executed from their PTX.

    ``late`` is that of ``Launch`` (block.py). ``executed`` collects the opcodes that were executed, ``launched`` the
    symbols of the kernels.
    """

    MESSAGE_BYTES = 1000

    def __init__(self, library: ctypes.CDLL, kernels: dict[str, Kernel]):
        super().__init__(library)
        self.late = True
        self.executed: set[str] = set()
        self.launched: set[str] = set()
        self._kernels = dict(zip(_demangled(list(kernels)), kernels.values()))
        self._names = self._names_by_address(Path(library._name))

    def _names_by_address(self, path: Path) -> dict[int, str]:
        listed = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        offsets = {symbol: int(offset, 16) for offset, _, symbol in map(str.split, listed.splitlines())}
        known = "autofocus_emulation_run_by"
        base = ctypes.cast(self.library[known], ctypes.c_void_p).value - offsets[known]
        return {base + offset: name for offset, name in zip(offsets.values(), _demangled(list(offsets)))}

    def _run(self, address, numbers, parameters, sizes, count, message) -> int:
        """Returns whether the kernel ran. An exception cannot pass through the library, so its message does."""
        try:
            kernel = self._kernels[self._names[address]]
            if list(kernel.parameters.values()) != sizes[:count]:
                raise PtxError("parameters have other sizes on the GPU")
            *grid, threads, shared_bytes = numbers[:5]
            launch = Launch(tuple(grid), threads, shared_bytes, tuple(parameters[:count]), self.late)
            block = Block(kernel, launch, self.executed)
            for z, y, x in itertools.product(*map(range, reversed(grid))):
                block.run((x, y, z))
            self.launched.add(kernel.name)
            return 1
        except Exception as error:
            text = f"{type(error).__name__}: {error}".encode()[: self.MESSAGE_BYTES - 1]
            ctypes.memmove(message, text + b"\0", len(text) + 1)
            return 0
