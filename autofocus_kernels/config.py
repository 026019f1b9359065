"""What this process has to compute with, for bug reports."""

from __future__ import annotations

import os
import platform

import torch

from . import self_check
from .dispatch import ENVIRONMENT_VARIABLE, available_backends
from .version import __version__


def show_config() -> str:
    """Versions, devices and backends of this process, and what its self-checks found (self_check.py)."""
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    lines = [
        f"autofocus_kernels {__version__}",
        f"python            {platform.python_version()} on {platform.platform()}",
        f"torch             {torch.__version__}, {torch.get_num_threads()} CPU threads",
        f"cpu capability    {torch.backends.cpu.get_cpu_capability()}",
    ]
    if torch.cuda.is_available():
        lines += [f"cuda device {i}     {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    lines.append(f"{ENVIRONMENT_VARIABLE} {forced if forced else 'not set'}")
    lines += [
        f"backend {name:<9} {'available' if reason is None else 'unavailable: ' + reason}"
        for name, reason in available_backends().items()
    ]
    return "\n".join(lines + self_check.report())
