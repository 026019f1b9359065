"""A network over a whole volume in windows, MONAI's sliding window, for networks that crop what they read as well.

MONAI expects of a network logits of its input's size. Those of unpadded networks are smaller by ``network.crop``. So
the windows that MONAI lays out are those of the *logits*; each reads from the volume its place and half the crop on
either side, zeros where that lies beyond the volume, and its logits fall on their voxels.

What is exact: a network all of whose convolutions are unpadded ("Basic", "valid") gives every voxel the same logits in
any window, those of the whole volume padded by half the crop. In an autofocus layer, and in ASPP's, the branches of
larger dilations pad their input with zeros, at the window's border instead of the volume's, so that voxels near the
border of a window differ: by the size of the window, and by the tiling. Networks with "same" padding do so everywhere
near a border. That is why "gaussian" overlaps its windows and trusts their centres most.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import AutofocusConvNd
from ..networks.blocks import centre

TILINGS = ("published", "gaussian")

_LARGEST = 2**31 - 1  # voxels of a window; what counts more is no window but a mistake

_log = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """Of a box of the volume: logits ``[classes, *B]``, and by layer its attention ``[K, *B]``, float32 on the CPU."""

    logits: Tensor
    attention: dict[str, Tensor]


class Segmentation(NamedTuple):
    """Of a volume: labels ``[*S]``, int16; the box that was predicted; and of that, by layer, the attention."""

    labels: np.ndarray
    box: tuple[slice, ...]
    attention: dict[str, Tensor]


class Windows:
    """Runs ``network`` over volumes, in smaller windows and at last on the CPU where memory runs out.

    Memory beside the volume: on the CPU one float32 array of the box for each class, for each branch of each layer if
    attention is asked for, and two more for MONAI's weights; on the device one window.

    Args:
        network: of :func:`autofocus_kernels.networks.build`.
        window: voxels that the network reads at once along each axis, more than its ``crop``.
        tiling: "published": windows whose logits do not overlap, the last ones reaching beyond the box. "gaussian":
            logits overlap by half and are averaged with Gaussian weights; windows no larger than the box.
        device: where the network runs.

    Raises:
        ValueError: the window is too small or too large, or the tiling none of :data:`TILINGS`.
    """

    def __init__(self, network: nn.Module, window: Sequence[int], tiling: str, device: torch.device) -> None:
        if tiling not in TILINGS:
            raise ValueError(f"tiling must be one of {', '.join(TILINGS)}, got {tiling!r}")
        if len(window) != len(network.crop) or any(size <= crop for size, crop in zip(window, network.crop)):
            raise ValueError(
                f"window must be {len(network.crop)} sizes above {list(network.crop)}, which {network.name} takes "
                f"away, got {list(window)}"
            )
        if math.prod(window) > _LARGEST:
            raise ValueError(f"window must hold at most {_LARGEST} voxels, got {list(window)}")
        self.network = network.eval()
        self.tiling = tiling
        tile = tuple(size - crop for size, crop in zip(window, network.crop))
        tiles = [tile, _halved(tile), _halved(_halved(tile))]
        self.attempts = [(device, size) for size in dict.fromkeys(tiles)]
        if device.type != "cpu":
            self.attempts.append((torch.device("cpu"), tile))

    def segment(self, image: np.ndarray, mask: np.ndarray, attention: bool = False) -> Segmentation:
        """A volume ``[C, *S]``: published, the box around the mask ``[*S]``, label 0 outside it; gaussian, all of it.

        Raises:
            MemoryError: even the last attempt found too little.
        """
        masked = self.tiling == "published"
        box = _bounding_box(mask) if masked else tuple(slice(0, size) for size in mask.shape)
        prediction = self(torch.from_numpy(image), box, attention)
        labels = np.zeros(mask.shape, np.int16)
        labels[box] = prediction.logits.argmax(0).numpy()
        if masked:
            labels *= mask
        return Segmentation(labels, box, prediction.attention)

    def __call__(self, image: Tensor, box: tuple[slice, ...], attention: bool = False) -> Prediction:
        """The logits of a box of the volume, and the attention of every layer if that is asked for.

        Args:
            image: ``[C, *S]``, float32 on the CPU.
            box: the part of ``S`` to predict.

        Raises:
            MemoryError: even the last attempt found too little.
        """
        while True:
            device, tile = self.attempts[0]
            try:
                self.network.to(device)  # outside inference mode: parameters moved inside could not be trained again
                return self._run(image, box, attention, device, tile)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # Here, and not above, where the exception holds on to the tensors of the failed attempt.
            failed = f"out of memory on {device} with windows of {self._window(tile)} voxels"
            if len(self.attempts) == 1:
                raise MemoryError(failed)
            self.attempts.pop(0)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            device, tile = self.attempts[0]
            _log.warning("%s: from here on windows of %s on %s", failed, self._window(tile), device)

    def _window(self, tile: Sequence[int]) -> str:
        return " x ".join(str(size + crop) for size, crop in zip(tile, self.network.crop))

    @torch.inference_mode()
    def _run(
        self, image: Tensor, box: tuple[slice, ...], attention: bool, device: torch.device, tile: tuple[int, ...]
    ) -> Prediction:
        from monai.inferers import SlidingWindowInferer

        size = [axis.stop - axis.start for axis in box]
        if self.tiling == "gaussian":
            tile = tuple(min(pair) for pair in zip(tile, size))
            laid_out, how = size, {"overlap": 0.5, "mode": "gaussian"}
        else:
            # A whole number of tiles, so that MONAI moves none back into the box, where it would overlap another.
            laid_out, how = [math.ceil(n / t) * t for n, t in zip(size, tile)], {"overlap": 0.0, "mode": "constant"}
        crop = self.network.crop
        read = [t + c for t, c in zip(tile, crop)]
        layers = autofocus_layers(self.network) if attention else {}

        def predict(_: Tensor, places: list[list[slice]]) -> Tensor:
            start = [axis.start + place.start - c // 2 for axis, place, c in zip(box, places[0][2:], crop)]
            with _recorded_attention(layers) as maps:
                logits = self.network(cut(image, start, read)[None].to(device))
            # Layers before the last see more than the window's logits cover.
            return torch.cat([logits, *(centre(maps[name], tile) for name in layers)], dim=1).float()

        grid = torch.zeros(1).expand(1, 1, *laid_out)  # MONAI asks for a volume; what is read is cut from the image
        inferer = SlidingWindowInferer(tile, sw_batch_size=1, sw_device=device, device="cpu", with_coord=True, **how)
        stitched = inferer(grid, predict)[0][(slice(None), *(slice(n) for n in size))]
        branches = [len(layer.dilations) for layer in layers.values()]
        logits, *maps = stitched.split([stitched.shape[0] - sum(branches), *branches])
        return Prediction(logits, dict(zip(layers, maps)))


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around all true voxels; there must be one."""
    box = []
    for axis in range(mask.ndim):
        (inside,) = np.nonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(box)


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def window_sizes(window: Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """One size for each axis; a single one is that of all.

    Raises:
        ValueError: there are neither one nor ``spatial_dims`` of them.
    """
    if len(window) not in (1, spatial_dims):
        raise ValueError(f"window must be one size, or {spatial_dims}, got {list(window)}")
    return tuple(window) * (spatial_dims // len(window))


def _halved(tile: tuple[int, ...]) -> tuple[int, ...]:
    """Half along every axis, but not below 8, where windows would read almost only borders."""
    return tuple(max(size // 2, min(size, 8)) for size in tile)


def cut(image: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """``size`` voxels of ``[C, *S]`` from ``start`` on, zeros where these lie beyond the image."""
    pads = []
    for axis, (first, length) in enumerate(zip(start, size), start=1):
        before, after = max(-first, 0), max(first + length - image.shape[axis], 0)
        image = image.narrow(axis, first + before, length - before - after)
        pads = [before, after, *pads]  # F.pad begins with the last axis
    return F.pad(image, pads)


@contextlib.contextmanager
def _recorded_attention(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A dict that fills as the network runs: name of each layer -> the weights ``[N, K, *S]`` that its gate gave."""
    maps: dict[str, Tensor] = {}
    hooks = [
        layer.attention.register_forward_hook(lambda _, __, weights, name=name: maps.update({name: weights}))
        for name, layer in layers.items()
    ]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def autofocus_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, in the order of the forward."""
    modules = network.named_modules()
    return {name: module for name, module in modules if isinstance(module, AutofocusConvNd)}
