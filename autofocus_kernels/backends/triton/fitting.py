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

# In the RuntimeError that Triton raises where its compiler gives a kernel up.
_COMPILER_FAILED = "PassManager::run failed"


class NoConfigurationFits(CannotRun):
    """No configuration of a kernel compiles into the shared memory and registers of the device."""


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
    if key in _chosen and _misfit(key, _chosen[key], launch) is None:
        return
    # One that fitted once may not fit now: a key does not tell layouts and 64-bit offsets apart.
    for config in candidates:
        why = _misfit(key, config, launch)
        if why is None:
            _chosen[key] = config
            return
    # The last is the least demanding.
    _unfit[key] = f"no configuration fits the device for {key}, tried {list(candidates)}: {why}"
    raise NoConfigurationFits(_unfit[key])


def _misfit(key: Hashable, config: Config, launch: Callable[[Config], None]) -> str | None:
    """Launches, and returns None; or logs and returns why there is no kernel with ``config`` on the device."""
    try:
        launch(config)
    except (OutOfResources, PTXASError, RuntimeError) as error:
        # Errors of the device are RuntimeErrors as well, and no configuration mends them.
        if isinstance(error, RuntimeError) and _COMPILER_FAILED not in str(error):
            raise
        logger.info("triton: %s does not fit for %s: %s", config, key, error)
        return str(error).partition("\n")[0]
    return None
