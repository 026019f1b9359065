"""What this process can compute with, for bug reports."""

from __future__ import annotations

import platform

import torch

from . import self_check
from .backends.interface import MINIMUM_CAPABILITY
from .dispatch import BACKENDS, CUDA_FIRST, ENVIRONMENT_VARIABLE, PREFERENCE, available_backends, forced_backend
from .version import __version__


def show_config() -> str:
    """Versions, devices and backends of this process, and what its self-checks found (self_check.py)."""
    lines = [
        f"autofocus_kernels {__version__}",
        f"python            {platform.python_version()} on {platform.platform()}",
        f"torch             {torch.__version__}, {torch.get_num_threads()} CPU threads",
        f"cpu capability    {torch.backends.cpu.get_cpu_capability()}",
    ]
    backends = available_backends()
    if backends["cpu"] is None:
        lines.append(f"cpu kernels       {_cpu_kernels()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            lines += [
                f"cuda device {i}     {torch.cuda.get_device_name(i)}",
                f"  kernels         {_kernels(i, backends)}",
            ]
    lines.append(f"{ENVIRONMENT_VARIABLE} {_forced()}")
    lines += [
        f"backend {name:<9} {'available' if reason is None else 'unavailable: ' + reason}"
        for name, reason in backends.items()
    ]
    return "\n".join(lines + self_check.report())


def _forced() -> str:
    name = forced_backend()
    if name is None or name in BACKENDS:
        return name or "not set"
    return f"{name}: every call fails, it must be one of {', '.join(BACKENDS)}"


def _cpu_kernels() -> str:
    library = torch.ops.autofocus_cpu
    try:
        return f"{library.isa()}, bfloat16 multiplied by {library.bfloat16_products()}"
    except RuntimeError as error:  # of AUTOFOCUS_CPU_ISA
        return f"every call fails: {error}"


def _kernels(index: int, backends: dict[str, str | None]) -> str:
    """The backends that calls on this GPU go to, in the order in which they are tried where nothing is forced."""
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM_CAPABILITY:
        return f"reference: compute capability {capability} is below {MINIMUM_CAPABILITY}"
    usual = [name for name in PREFERENCE["cuda"] if backends[name] is None]
    dtypes = CUDA_FIRST.get(capability, ())
    if not dtypes or "cuda" not in usual or usual[0] == "cuda":
        return ", ".join(usual)
    cuda_first = ["cuda", *(name for name in usual if name != "cuda")]
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)  # float32: if TF32 is allowed
    return f"{', '.join(cuda_first)} for {names} where the fast tier has every pass; else {', '.join(usual)}"
