"""An interpreter of PTX on the CPU: it executes what nvcc makes of the CUDA kernels, and what Triton makes of its own.

The emulation of tests/cuda_host replaces csrc/cuda/device.h. So it never sees the inline PTX there, nor what nvcc makes
of the rest. This interpreter does. code.py reads a PTX file, block.py executes it for the threads of a block;
arithmetic.py, copies.py and warps.py know the instructions, memory.py what they read and write, and races.py finds
accesses to shared memory that nothing orders. launches.py takes over the emulation's launches, triton_driver.py those
of Triton. Instructions are implemented from the PTX manual (ISA 9.0), independently of the emulation. Not modelled:
ptxas, time, and when threads see each other's memory operations.
"""

from .code import Kernel, read
from .launches import Launches, NoLaunches

__all__ = ["Kernel", "Launches", "NoLaunches", "read"]
