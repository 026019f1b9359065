"""The paper's networks in MONAI's conventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..geometry import IntOrTuple
from .models import SegmentationNetwork, resolve_arguments

Spec = str | Sequence


class AFN(SegmentationNetwork):
    """A network of the paper as MONAI's networks are called, so that a bundle can name it, with arguments of JSON::

        {"_target_": "autofocus_kernels.networks.AFN", "spatial_dims": 3, "in_channels": 4, "out_channels": 5,
         "norm": ["group", {"num_groups": 2}]}

    MONAI's own networks get autofocus layers by ``{"_target_": "autofocus_kernels.convert", "network": {...}}``.

    Args:
        spatial_dims, in_channels, out_channels: 1 to 3; channels of the images and of the logits.
        name: one of :data:`autofocus_kernels.networks.NAMES`.
        widths, dilations, save_branches, backend: as in :func:`autofocus_kernels.networks.build`.
        padding: "same" (logits of the input's size, as sliding windows expect) or "valid", as published.
        act, norm: a name or ``(name, arguments)``, as MONAI's factories take them. "batch" is the paper's. In an
            autofocus layer every branch has a batch norm of its own; a norm of another kind follows the branches' sum.

    Shape:
        ``[N, in_channels, *S]`` -> logits ``[N, out_channels, *S]``.

    Raises:
        TypeError, ValueError: an argument of the wrong form; the message names it.
        ImportError: an ``act`` or a ``norm`` other than "relu" and "batch", and MONAI is missing.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        name: str = "AFN-6",
        widths: Sequence[int] | None = None,
        dilations: Sequence[IntOrTuple] = (2, 6, 10, 14),
        padding: str = "same",
        act: Spec = "relu",
        norm: Spec = "batch",
        save_branches: bool | None = None,
        backend: str | None = None,
    ) -> None:
        options: dict[str, Any] = {"factory": {}}
        if not _is("relu", act):
            options["act"] = lambda: _monai("get_act_layer", "act", act)
        if not _is("batch", norm):
            options["norm_of"] = lambda channels: _monai("get_norm_layer", "norm", norm, spatial_dims, channels)
        super().__init__(
            *resolve_arguments(
                name,
                in_channels,
                out_channels,
                spatial_dims,
                widths,
                dilations,
                padding,
                save_branches,
                backend,
                **options,
            )
        )


def _is(name: str, spec: Spec) -> bool:
    return isinstance(spec, str) and spec.lower() == name


def _monai(factory: str, argument: str, spec: Spec, *arguments) -> nn.Module:
    """What a factory of MONAI makes of the name, or the pair of a name and its arguments, ``spec``."""
    if isinstance(spec, list):  # a pair that comes from JSON
        spec = tuple(spec)
    if not isinstance(spec, str) and not (isinstance(spec, tuple) and spec and isinstance(spec[0], str)):
        raise TypeError(f"{argument} must be a name or a pair of a name and a dict, got {spec!r}")
    try:
        from monai.networks.layers import utils
    except ImportError as error:
        raise ImportError(
            f"{argument}={spec!r} needs MONAI ({error}): pip install 'autofocus-kernels[monai]'"
        ) from error
    try:
        return getattr(utils, factory)(spec, *arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{argument} must be a name or a pair of a name and a dict that MONAI knows, got {spec!r}: {error}"
        ) from error
