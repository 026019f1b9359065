"""What is timed against what: the naive layer, torch.compile of it, and our backends, in every pass and layout."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from autofocus_kernels import autofocus_conv, reference, testing, tolerance
from autofocus_kernels.dispatch import PREFERENCE, backend_named
from autofocus_kernels.testing import Case, Tensors

# "tf32" is float32 tensors with the matrix units' 19-bit products allowed to everybody; "float32" forbids them.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# inference: forward under no_grad; forward: forward recorded for backward; training: forward and backward to input,
# weight, attention and bias (or scale and shift).
PASSES = ("inference", "forward", "training")
LAYOUTS = ("contiguous", "channels_last")
NAIVE, COMPILED = "naive", "naive compiled"


class Contender(NamedTuple):
    name: str  # NAIVE, COMPILED or the name of a backend
    layout: str  # of every tensor with channels: input, weight, attention, grad_output

    @property
    def is_ours(self) -> bool:
        return self.name not in (NAIVE, COMPILED)


def backends_of(device: str) -> dict[str, str | None]:
    """Backend -> None or why it cannot run, for those meant for ``device``; the reference is the naive layer."""
    names = [name for name in PREFERENCE[device] if name != "reference"]
    return {name: backend_named(name).unavailable() for name in names}


def contenders(backends: list[str], compiled: bool) -> list[Contender]:
    names = [NAIVE, *([COMPILED] if compiled else []), *backends]
    return [Contender(name, layout) for name in names for layout in LAYOUTS]


def layer(name: str) -> Callable[..., Tensor]:
    """The function of contender ``name``, with the signature of the reference."""
    if name == NAIVE:
        return reference.autofocus_conv
    if name == COMPILED:
        return torch.compile(reference.autofocus_conv, dynamic=False)
    return partial(autofocus_conv, backend=name)


def make_tensors(case: Case, dtype: str, device: str) -> Tensors:
    """Random values, contiguous."""
    return testing.make_tensors(case, DTYPES[dtype], device)


def lay_out(tensors: Tensors, case: Case, layout: str) -> Tensors:
    """The same values in ``layout``, the weight too, as ``module.to(memory_format=...)`` would."""
    memory_format = replace(case, layout=layout).memory_format
    return Tensors(
        *(
            tensor if tensor is None or tensor.dim() < 4 else tensor.contiguous(memory_format=memory_format)
            for tensor in tensors
        )
    )


def runner(pass_name: str, function: Callable[..., Tensor], case: Case, tensors: Tensors) -> Callable:
    """One pass as a call without arguments; what it returns must be dropped before the next."""
    arguments = {name: tensor.detach() for name, tensor in tensors.arguments().items()}
    if pass_name == "inference":
        return torch.no_grad()(partial(function, **arguments, **case.options))
    for tensor in arguments.values():
        tensor.requires_grad_()
    forward = partial(function, **arguments, **case.options)
    if pass_name == "forward":
        return forward
    wanted = list(arguments.values())
    return lambda: torch.autograd.grad(forward(), wanted, tensors.grad_output)


@contextlib.contextmanager
def precision(dtype: str, search: bool = True):
    """TF32 as ``dtype`` says, cuDNN free to choose its fastest algorithm: by trial if ``search``, else by its rules."""
    allow = dtype == "tf32"
    before = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    _set_precision(allow, allow, search)
    try:
        yield
    finally:
        _set_precision(*before)


def _set_precision(matmul: bool, convolution: bool, benchmark: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = convolution
    torch.backends.cudnn.benchmark = benchmark


# ------------------------------------------------------------------ right before fast


class Judge:
    """float64 truth and tolerances of one case with these values; judges every contender's results."""

    def __init__(self, case: Case, dtype: str, tensors: Tensors) -> None:
        self.case = case
        # cuDNN has returned wrong convolutions before: on a GPU, truth is columns and a float64 matrix product.
        with torch.backends.cudnn.flags(enabled=False):
            self.expected = testing.truth(case, tensors)
        if dtype == "tf32":
            same = testing.evaluate(reference.autofocus_conv, case, tensors)
            self.limits = {
                name: tolerance.of_tf32(tolerance.worst_error(same[name], exact).item())
                for name, exact in self.expected.items()
            }
        else:
            self.limits = testing.tolerances(case, tensors, self.expected)

    def errors(self, contender: Contender, function: Callable[..., Tensor], tensors: Tensors) -> dict[str, float]:
        """The worst error (tolerance.py) of "output" and of each gradient, with and without a graph for backward."""
        runs = [testing.evaluate(function, self.case, tensors)]
        runs.append({"output": runner("inference", function, self.case, tensors)()})
        if contender.is_ours:
            # What a kernel forgets to write must not be right by accident. Not for compiled layers: the mode that
            # poisons makes torch.compile start over.
            with testing.poisoned_memory():
                runs.append(testing.evaluate(function, self.case, tensors))
        errors: dict[str, float] = {}
        for results in runs:
            for name, result in results.items():
                error = tolerance.worst_error(result, self.expected[name]).item()
                # Not max(): a NaN comes and stays.
                if error > errors.get(name, -1.0) or math.isnan(error):
                    errors[name] = error
        return errors


def verdict_on(error: Exception) -> dict:
    """The columns status and note of a contender that raised: out of memory, a compiler's; the next may be fine."""
    note = " ".join(str(error).split())
    if not (isinstance(error, RuntimeError) and "cannot run this call" in note):
        return {"status": "failed", "note": f"{type(error).__name__}: {note}"[:300]}
    # Whole: the end says what the self-check found.
    return {"status": "wrong" if "its self-check fails" in note else "refused", "note": note}


# ------------------------------------------------------------------ time


def clock(device: str) -> Callable[[Callable], float]:
    """A function that runs a call once and returns its seconds."""
    return _cpu_clock if device == "cpu" else _cuda_clock()


def _cpu_clock(call: Callable) -> float:
    start = perf_counter()
    result = call()
    seconds = perf_counter() - start
    del result  # its memory is handed back outside the timed region
    return seconds


def _cuda_clock() -> Callable[[Callable], float]:
    # Writing this much empties the L2 and keeps the device busy while the host queues the call, so that
    # the events around it time the device alone.
    flood = torch.empty(2**30, dtype=torch.int8, device="cuda")

    def seconds(call: Callable) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        flood.zero_()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    return seconds


def interleave(
    calls: dict,
    seconds_of: Callable[[Callable], float],
    budget: float,
    min_rounds: int = 3,
    max_rounds: int = 100,
) -> dict:
    """Times the calls in turn, round after round, so that all meet the same machine: key -> seconds of each round.

    One untimed round warms up. Stops after ``budget`` seconds in calls, but not before ``min_rounds``.
    """
    times = {key: [] for key in calls}
    for call in calls.values():
        seconds_of(call)
    spent = 0.0
    gc.collect()
    gc.disable()
    try:
        for round_number in range(max_rounds):
            if round_number >= min_rounds and spent >= budget:
                break
            for key, call in calls.items():
                times[key].append(seconds_of(call))
                spent += times[key][-1]
    finally:
        gc.enable()
    return times
