"""Which configuration runs: the first that fits the device, or, with AUTOFOCUS_TRITON_AUTOTUNE=1, the fastest.

The choice is made once per key (kernel, dtype, channels, branches, dilations, device), never per batch or volume, and
kept for the life of the process.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Optional

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from .configs import Config, NoConfigurationFits

logger = logging.getLogger("autofocus_kernels")

ENVIRONMENT_VARIABLE = "AUTOFOCUS_TRITON_AUTOTUNE"
# Largest relative error of a candidate: far above rounding (TF32 included), far below any wrong index.
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.004, torch.float32: 0.004}

_chosen: dict[Hashable, Config] = {}
# Keys that nothing fits, with the message: to find that out takes seconds of compilation, so it is done once.
_unfit: dict[Hashable, str] = {}


def require_fit(*keys: Hashable) -> None:
    """Raises NoConfigurationFits if that is what an earlier :func:`run` with one of ``keys`` came to."""
    for key in keys:
        if key in _unfit:
            raise NoConfigurationFits(_unfit[key])


def run(
    key: Hashable,
    candidates: Sequence[Config],
    launch: Callable[[Config], None],
    outputs: Sequence[Tensor],
    expected: Callable[[], Sequence[Tensor]],
) -> None:
    """Fills ``outputs`` by ``launch`` with the configuration of ``key``, choosing it on the first call.

    ``expected()`` gives the right outputs; it is asked for only when tuning.

    Raises:
        NoConfigurationFits: no candidate fits the device (or, when tuning, none is right), now or in an earlier call.
    """
    require_fit(key)
    if key in _chosen and fits(key, _chosen[key], launch):
        return
    # One that fitted once may not fit now: a key does not tell layouts and 64-bit offsets apart.
    if key not in _chosen and os.environ.get(ENVIRONMENT_VARIABLE, "0") == "1":
        best = fastest(key, candidates, launch, outputs, expected())
        if best is not None:
            launch(best)
    else:
        best = next((config for config in candidates if fits(key, config, launch)), None)
    if best is None:
        _unfit[key] = f"no configuration fits the device and is right for {key}, tried {list(candidates)}"
        raise NoConfigurationFits(_unfit[key])
    _chosen[key] = best


def fits(key: Hashable, config: Config, launch: Callable[[Config], None]) -> bool:
    """Launches; False, with a log line, if the device has too little shared memory or too few registers."""
    try:
        launch(config)
    except (OutOfResources, PTXASError) as error:
        logger.info("triton: %s does not fit for %s: %s", config, key, error)
        return False
    return True


def fastest(
    key: Hashable,
    candidates: Sequence[Config],
    launch: Callable[[Config], None],
    outputs: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> Optional[Config]:
    """The fastest of the candidates that fit and give the expected outputs; None if there is none."""
    best: Optional[Config] = None
    best_time = math.inf
    for config in candidates:
        for output in outputs:
            output.fill_(math.nan)
        if not fits(key, config, launch):
            continue
        errors = [relative_error(output, truth) for output, truth in zip(outputs, expected)]
        # "not <=" so that a NaN is a failure.
        if any(not error <= TOLERANCE[output.dtype] for error, output in zip(errors, outputs)):
            logger.error("triton: %s gives wrong results for %s: relative errors %s", config, key, errors)
            continue
        elapsed = measure(lambda: launch(config), outputs[0].device)
        logger.info("triton: %s takes %.3f ms for %s", config, 1e3 * elapsed, key)
        if elapsed < best_time:
            best, best_time = config, elapsed
    return best


def relative_error(result: Tensor, truth: Tensor) -> float:
    truth = truth.to(torch.float32)
    return ((result.to(torch.float32) - truth).norm() / truth.norm().clamp_min(1e-20)).item()


def measure(call: Callable[[], None], device: torch.device, repeats: int = 10) -> float:
    """Seconds of one call, the least of ``repeats``."""

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def once() -> float:
        start = wait()
        call()
        return wait() - start

    return min(once() for _ in range(repeats))
