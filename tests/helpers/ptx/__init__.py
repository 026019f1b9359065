"""Executes PTX, what nvcc makes of the CUDA kernels and Triton of its own, on the CPU.

The emulation of tests/cuda_host replaces csrc/cuda/device.h, so what is written there for the GPU, inline PTX above
all, it never sees, nor what nvcc makes of everything else. This does: code.py reads a file, block.py executes it for
the threads of a block, arithmetic.py, copies.py and warps.py know the instructions, memory.py what they read and write,
races.py what must not happen to shared memory. launches.py takes over the emulation's launches, triton_driver.py those
of Triton. What an instruction does is written down from the PTX manual (ISA 9.0), once more and apart from the
emulation. Not modelled: ptxas, time, and which memory operations other threads see.
"""

from .code import Kernel, read
from .launches import Launches, NoLaunches

__all__ = ["Kernel", "Launches", "NoLaunches", "read"]
