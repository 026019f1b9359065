"""What this machine can do at most, and what a case costs at least."""

from __future__ import annotations

from collections.abc import Callable

import torch

from autofocus_kernels.testing import Case

from .cases import compulsory_bytes, elements, multiply_adds, shape
from .contenders import DTYPES, clock, interleave, precision


class Ceilings:
    """This machine's rates, each measured once: bytes a second of a copy, multiply-adds a second of a product."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._clock = clock(device)
        self._products: dict[str, float] = {}
        size = 2**31 if device == "cuda" else 2**28
        source = torch.ones(size, dtype=torch.int8, device=device)
        target = torch.ones_like(source)
        self.copy = 2 * size / self._best(lambda: target.copy_(source))

    def product(self, dtype: str) -> float:
        if dtype not in self._products:
            n = 8192 if self.device == "cuda" else 2048
            a, b = (torch.randn(n, n, device=self.device).to(DTYPES[dtype]) for _ in range(2))
            with precision(dtype):
                self._products[dtype] = n**3 / self._best(lambda: a @ b)
        return self._products[dtype]

    def _best(self, call: Callable) -> float:
        return min(interleave({"": call}, self._clock, budget=0.3, max_rounds=20)[""])


def costs(case: Case, pass_name: str, dtype: str, ceilings: Ceilings) -> dict:
    """The columns that follow from the case alone, and its floor at this machine's ceilings."""
    size = DTYPES[dtype].itemsize
    counts = elements(case)
    compulsory = compulsory_bytes(case, pass_name, size)
    products = multiply_adds(case, pass_name)
    floors = {"memory": compulsory / ceilings.copy, "compute": products / ceilings.product(dtype)}
    name = max(floors, key=floors.get)
    return {
        "case": case.name,
        "shape": shape(case),
        "dtype": dtype,
        "pass": pass_name,
        "argument_bytes": size * (sum(counts.values()) - counts["output"]),
        "output_bytes": size * counts["output"],
        "compulsory_bytes": compulsory,
        "multiply_adds": products,
        "floor_ms": 1e3 * floors[name],
        "floor": name,
        "copy_gbs": ceilings.copy / 1e9,
        "matmul_gflops": 2 * ceilings.product(dtype) / 1e9,
    }
