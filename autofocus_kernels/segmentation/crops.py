"""Crops to train on: number j of an endless list, the same in every run, process and order of asking.

So a sampler has no state to save. Case after case gives one crop, in a new order every round.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import extra  # noqa: F401

# isort: split
import numpy as np
import torch
from monai.data import CacheDataset
from monai.transforms import Transform
from torch import Tensor

from .dataset import Case, Dataset, read_case
from .files import SegmentationError
from .windows import cut


@dataclass(frozen=True)  # MONAI would take named tuples apart
class Loaded:
    """A normalised image ``[M, *S]``, its labels ``[*S]``, and flat indices of the voxels that crops may centre on.

    ``outside`` is how many voxels of the foreground are outside the mask.
    """

    image: Tensor
    label: Tensor
    foreground: np.ndarray
    background: np.ndarray
    outside: int


class _Load(Transform):
    def __init__(self, dataset: Dataset, spatial_dims: int) -> None:
        self.arguments = (len(dataset.modalities), spatial_dims, len(dataset.labels))

    def __call__(self, case: Case) -> Loaded:
        sample = read_case(case, *self.arguments)
        foreground = np.flatnonzero(sample.label).astype(np.int32)
        background = np.flatnonzero((sample.label == 0) & sample.mask).astype(np.int32)
        outside = np.count_nonzero(sample.label[~sample.mask])
        return Loaded(torch.from_numpy(sample.image), torch.from_numpy(sample.label), foreground, background, outside)


class Crops(torch.utils.data.Dataset):
    """Item j: a window ``[M, *window]`` float32, zero beyond the volume, and int64 labels ``[*tile]`` of its centre.

    Even items are centred on a voxel of the foreground, odd ones on one of the background inside the mask; but they are
    moved so that the labels lie within the volume, where that is large enough.

    ``outside`` is the part of all labelled voxels that is outside the masks.

    Args:
        cases: of ``dataset``.
        window, crop: voxels of a window along each axis, and how many of these the network takes away.
        cache: how many cases to keep in memory, the others being read for every crop; None for all.

    Raises:
        SegmentationError: a file of a case that does not fit, or no case with a label above 0. All cases are read once
            by the constructor.
    """

    def __init__(
        self,
        dataset: Dataset,
        cases: Sequence[Case],
        window: Sequence[int],
        crop: Sequence[int],
        seed: int,
        flip_every_axis: bool,
        cache: int | None = None,
    ) -> None:
        load = _Load(dataset, len(window))
        kept = sys.maxsize if cache is None else cache
        with _own_errors():
            self.cases = CacheDataset(list(cases), load, cache_num=kept, progress=False, copy_cache=False)
        labelled = outside = 0
        for loaded in itertools.chain((self.cases[i] for i in range(min(kept, len(cases)))), map(load, cases[kept:])):
            labelled += len(loaded.foreground)
            outside += loaded.outside
        if not labelled:
            raise SegmentationError(
                f"{dataset.source}: at least one case to train on must have a label above 0, got none in "
                f"{len(cases)} label files"
            )
        self.outside = outside / labelled
        self.window, self.crop, self.seed = window, crop, seed
        self.flipped_axes = len(window) if flip_every_axis else 1

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        round, place = divmod(number, len(self.cases))
        index = _order(self.seed, round, len(self.cases))[place]
        generator = np.random.default_rng([self.seed, round, index])
        with _own_errors():
            loaded = self.cases[index]
        size = loaded.label.shape
        tile = [length - less for length, less in zip(self.window, self.crop)]
        start = _start(_centre(loaded, number % 2 == 0, generator), tile, size)
        window = cut(loaded.image, [first - less // 2 for first, less in zip(start, self.crop)], self.window)
        label = cut(loaded.label[None], start, tile)[0]
        flips = [axis for axis in range(self.flipped_axes) if generator.random() < 0.5]
        return window.flip([axis + 1 for axis in flips]), label.flip(flips).long()


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raises the error of a transform itself: MONAI wraps it in a RuntimeError that names no file."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, SegmentationError):
            raise error.__cause__ from None
        raise


@functools.lru_cache(maxsize=2)
def _order(seed: int, round: int, cases: int) -> list[int]:
    return np.random.default_rng([seed, round]).permutation(cases).tolist()


def _centre(loaded: Loaded, foreground: bool, generator: np.random.Generator) -> tuple[int, ...]:
    """A voxel of the one kind, or of the other if a case has none."""
    first, second = (loaded.foreground, loaded.background)[:: 1 if foreground else -1]
    voxels = first if len(first) else second
    return np.unravel_index(voxels[generator.integers(len(voxels))], loaded.label.shape)


def _start(centre: Sequence[int], tile: Sequence[int], size: Sequence[int]) -> list[int]:
    """Where a tile begins along each axis: around the centre, but in the volume; in its middle if that is smaller."""
    return [min(max(int(c) - t // 2, 0), n - t) if n >= t else (n - t) // 2 for c, t, n in zip(centre, tile, size)]
