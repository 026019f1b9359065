"""Which configuration runs: the first that fits the device.

The choice is made once per key (kernel, dtype, channels, branches, dilations, device), never per batch or volume, and
kept for the life of the process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence

from triton.runtime.errors import OutOfResources, PTXASError

from ..interface import CannotRun
from .configs import Config

logger = logging.getLogger("autofocus_kernels")

_chosen: dict[Hashable, Config] = {}
# Keys that nothing fits, with the message: to find that out takes seconds of compilation, so it is done once.
_unfit: dict[Hashable, str] = {}


class NoConfigurationFits(CannotRun):
    """Every configuration of a kernel needs more shared memory or registers than the device has."""


def forget() -> None:
    """Makes every choice anew."""
    _chosen.clear()
    _unfit.clear()


def require_fit(keys: Iterable[Hashable]) -> None:
    """Raises NoConfigurationFits if that is what an earlier :func:`run` with one of ``keys`` came to."""
    if _unfit:  # else ``keys``, a generator, is not even computed
        for key in keys:
            if key in _unfit:
                raise NoConfigurationFits(_unfit[key])


def run(key: Hashable, candidates: Sequence[Config], launch: Callable[[Config], None]) -> None:
    """Launches with the configuration of ``key``, choosing it on the first call.

    Raises:
        NoConfigurationFits: no candidate fits the device, now or in an earlier call.
    """
    require_fit([key])
    if key in _chosen and fits(key, _chosen[key], launch):
        return
    # One that fitted once may not fit now: a key does not tell layouts and 64-bit offsets apart.
    best = next((config for config in candidates if fits(key, config, launch)), None)
    if best is None:
        _unfit[key] = f"no configuration fits the device for {key}, tried {list(candidates)}"
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
