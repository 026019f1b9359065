"""The C++ kernels of csrc/cpu."""

from __future__ import annotations

from ..geometry import LARGEST
from .compiled import CompiledBackend

backend = CompiledBackend("cpu", "cpu", LARGEST)
