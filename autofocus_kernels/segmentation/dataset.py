"""Data sets: the layout of the Medical Segmentation Decathlon or a list of files, checked as they are read."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .files import Grid, Image, SegmentationError, read_json, read_labels, read_nifti, stem

_SPLITS = ("training", "validation", "test")
_COLUMNS = ("case", "label", "mask", "split")  # of a CSV list; the others are modalities


@dataclass(frozen=True)
class Case:
    """The files of one subject: one image with the modalities along its last axis, or one a modality."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    mask: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(file for file in (*self.images, self.label, self.mask) if file is not None)


@dataclass(frozen=True)
class Dataset:
    """``labels[i]`` is the name of label i, 0 being the background. ``validation`` is None where no list is given.

    Any list of cases may be empty, but not all of them.
    """

    source: Path
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    training: tuple[Case, ...]
    validation: tuple[Case, ...] | None
    test: tuple[Case, ...]

    def spatial_dims(self) -> int:
        """2 or 3, as the first label map for training has; there must be one. A third axis of one voxel is none."""
        shape = read_labels(self.training[0].label).data.shape
        if len(shape) not in (2, 3):
            raise SegmentationError(f"{self.training[0].label}: must have 2 or 3 axes, got {len(shape)}")
        return 2 if shape[2:] == (1,) else len(shape)


class Sample(NamedTuple):
    """A case in memory: normalised float32 ``[M, *S]``, int16 ``[*S]`` or None, bool ``[*S]``, and where it lies.

    ``shape`` is that of label files: S, or what the image's file has of it, a third axis of one voxel for a slice.
    """

    image: np.ndarray
    label: np.ndarray | None
    mask: np.ndarray
    affine: np.ndarray
    header: Any
    shape: tuple[int, ...]


def read_dataset(path: str | os.PathLike, labels: Sequence[str] | None = None) -> Dataset:
    """The cases of a folder with a ``dataset.json``, of such a file, or of a list in CSV or JSON.

    A ``dataset.json`` is that of the Decathlon; entries may also have a list of files, one a modality, as "image", a
    "mask", a "case" (its name; without one that of the label's file, or of the first image), and entries of a
    "validation" list are used for validation. In a CSV list the columns "case", "label", "mask" and "split" (training,
    validation or test) are known by name, and every other column is a modality, with a file each. A JSON list holds
    entries as those of ``dataset.json``, with a "split" each. Paths are relative to the file.

    Args:
        labels: names of label 0, 1, ...; lists need them, as they hold none. Those of a ``dataset.json`` are kept.

    Raises:
        SegmentationError: a file that is missing or not of that form.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "dataset.json"
    if path.suffix == ".csv":
        modalities, entries = _read_csv(path)
    else:
        content = read_json(path)
        if isinstance(content, dict):
            return _from_decathlon(path, content)
        modalities, entries = None, content
    if labels is None:
        raise SegmentationError(f"{path}: a list names no labels: give their names (--labels background tumour)")
    return _from_list(path, entries, modalities, labels)


def _read_csv(path: Path) -> tuple[list[str], list[dict]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a text with a mark
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [_column(name) for name in reader.fieldnames or []]
            reader.fieldnames = columns
            # Empty lines are passed over, cells may have several lines.
            rows = [(reader.line_num, {key: _stripped(cell) for key, cell in row.items()}) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise SegmentationError(f"{path}: cannot be read as CSV: {error}") from error
    modalities = [column for column in columns if column not in _COLUMNS]
    if not rows or not modalities:
        raise SegmentationError(f"{path}: must have rows, and columns of images beside {', '.join(_COLUMNS)}")
    if len(columns) == 1 and (";" in columns[0] or "\t" in columns[0]):
        raise SegmentationError(f"{path}: columns must be separated by commas, got {columns[0]!r}")
    if len(set(columns)) < len(columns):
        raise SegmentationError(f"{path}: every column must have a name of its own, got {columns}")
    for number, row in rows:
        if None in row or None in row.values():
            raise SegmentationError(f"{path}: line {number} must have as many columns as the first")
        for modality in modalities:
            if not row[modality]:
                raise SegmentationError(f'{path}: line {number} must name a file in the column "{modality}"')
    entries = [
        {
            "image": [row[modality] for modality in modalities],
            **{key: row[key] for key in _COLUMNS if row.get(key)},
        }
        for _, row in rows
    ]
    return modalities, entries


def _column(name: str) -> str:
    """Those that are known by name, however they are written."""
    name = name.strip()
    return name.lower() if name.lower() in _COLUMNS else name


def _stripped(cell: Any) -> Any:
    return cell.rstrip() if isinstance(cell, str) else cell  # None where a row is short, a list where it is long


def _from_list(path: Path, entries: Any, modalities: Sequence[str] | None, labels: Sequence[str]) -> Dataset:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SegmentationError(f"{path}: must hold an object (dataset.json) or a list of objects")
    _require_different(path, labels)
    splits: dict[str, list] = {name: [] for name in _SPLITS}
    for entry in entries:
        split = entry.get("split", "training")
        if not isinstance(split, str) or split not in splits:
            raise SegmentationError(f"{path}: split must be one of {', '.join(_SPLITS)}, got {split!r}")
        splits[split].append(entry)
    if modalities is None:
        images = entries[0].get("image") if entries else None
        modalities = [str(i) for i in range(len(images))] if isinstance(images, list) else ["0"]
    return _dataset(path, modalities, labels, splits)


def _from_decathlon(path: Path, content: dict) -> Dataset:
    modality = content.get("modality", content.get("channel_names"))
    if not any(name in content for name in _SPLITS):
        raise SegmentationError(
            f'{path}: must list cases, as "training", "validation" or "test" (nnU-Net\'s own has no lists), got '
            f"{', '.join(content)}"
        )
    splits = {name: content.get(name, []) for name in _SPLITS}
    labels = label_names(path, content)
    return _dataset(path, _names_in_order(path, "modality", modality), labels, splits)


def label_names(path: Path, content: dict) -> list[str]:
    """The names of labels 0, 1, ... in a ``dataset.json``, which are all different.

    Raises:
        SegmentationError: its "labels" are of another form.
    """
    names = _names_in_order(path, "labels", content.get("labels"))
    _require_different(path, names)
    return names


def _require_different(path: Path, labels: Sequence[str]) -> None:
    """What is kept by name, scores and columns of a log, would be kept for the last label of a name alone."""
    for label, name in enumerate(labels):
        if labels.index(name) < label:
            raise SegmentationError(
                f"{path}: every label must have a name of its own, got {name!r} for labels {labels.index(name)} and "
                f"{label}"
            )


def _names_in_order(path: Path, key: str, table: Any) -> list[str]:
    """The values of {"0": name, "1": name, ...} in order; also of {name: 0, ...}, as newer files have it."""
    if isinstance(table, dict) and all(isinstance(value, int) for value in table.values()):
        names = {str(value): name for name, value in table.items()}
        table = names if len(names) == len(table) else table  # two names of one number are of no form
    if (
        not isinstance(table, dict)
        or not table
        or set(table) != {str(i) for i in range(len(table))}
        or not all(isinstance(name, str) for name in table.values())
    ):
        raise SegmentationError(f'{path}: "{key}" must map "0", "1", ... to names, got {table!r}')
    return [table[str(i)] for i in range(len(table))]


def _dataset(path: Path, modalities: Sequence[str], labels: Sequence[str], splits: dict[str, Any]) -> Dataset:
    if len(labels) < 2:
        raise SegmentationError(f"{path}: must name the background and at least one more label, got {list(labels)}")
    cases = {}
    for name, entries in splits.items():
        if not isinstance(entries, list):
            raise SegmentationError(f'{path}: "{name}" must be a list, got {type(entries).__name__}')
        cases[name] = tuple(_case(path, entry, len(modalities), name) for entry in entries)
    names = [case.name for group in cases.values() for case in group]
    if not names:
        raise SegmentationError(f"{path}: must list at least one case")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SegmentationError(
            f'{path}: every case must be listed once, got {twice} twice; give them names ("case") where files have '
            "the same in several folders"
        )
    validation = cases["validation"] or None
    return Dataset(path, tuple(modalities), tuple(labels), cases["training"], validation, cases["test"])


def _case(path: Path, entry: Any, num_modalities: int, split: str) -> Case:
    if isinstance(entry, str):  # the Decathlon's test cases
        entry = {"image": entry}
    if not isinstance(entry, dict) or "image" not in entry or (entry.get("label") is None and split != "test"):
        raise SegmentationError(
            f'{path}: entries of "{split}" must have an "image" and a "label", which only those for test may lack, '
            f"got {entry!r}"
        )
    images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    optional = [entry.get(key) for key in ("case", "label", "mask")]
    if not all(_is_name(file) for file in images + [file for file in optional if file is not None]):
        raise SegmentationError(f"{path}: cases and files must be given by names that a file can have, got {entry!r}")
    if not images or len(images) not in (1, num_modalities):
        raise SegmentationError(f"{path}: expected one image or {num_modalities} (one a modality), got {images}")
    files = tuple(path.parent / image for image in images)
    name = optional[0]
    label, mask = (None if file is None else path.parent / file for file in optional[1:])
    if name is None:
        name = stem(label if label is not None else files[0])
    elif name != os.path.basename(name) or name.startswith("."):
        raise SegmentationError(f"{path}: the name of a case must be one that a file can have, got {name!r}")
    return Case(name, files, label, mask)


def _is_name(value: Any) -> bool:
    """Whether it can be that of a file: no NUL, and no half of a character, as JSON may hold."""
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def read_case(case: Case, num_modalities: int, spatial_dims: int, num_labels: int | None = None) -> Sample:
    """A case in memory, normalised inside its mask.

    Args:
        num_labels: what label maps may hold is 0 .. num_labels - 1; None reads no label map.

    Raises:
        SegmentationError: a file that cannot be read, shapes or affines that differ, an unknown label, an empty mask,
            a NaN.
    """
    image = read_images(case.images, num_modalities, spatial_dims)
    grid = Grid(case.images[0], image.data.shape[1:], image.affine, image.header)
    mask = _read_mask(case.mask, image.data, grid)
    label = None
    if num_labels is not None and case.label is not None:
        label = _read_labels_on(case.label, grid)
        if label.max() >= num_labels:
            unknown = sorted(int(value) for value in np.unique(label[label >= num_labels]))
            raise SegmentationError(f"{case.label}: labels must be 0 to {num_labels - 1}, got {unknown}")
    files = case.images if len(case.images) > 1 else case.images * num_modalities
    stored = tuple(image.header.get_data_shape()[:3])
    shape = stored if math.prod(stored) == mask.size else mask.shape
    return Sample(normalise(image.data, mask, files), label, mask, image.affine, image.header, shape)


def read_images(files: Sequence[Path], num_modalities: int, spatial_dims: int) -> Image:
    """One image, ``[M, *S]``, from a file with M modalities along its last axis or from one file a modality.

    The affine and the header are those of the first file.

    Raises:
        SegmentationError: a file that cannot be read, or a shape or an affine that does not fit.
    """
    images = [read_nifti(file, spatial_dims) for file in files]
    if spatial_dims == 2:
        images = [_plane(image) for image in images]
    first = images[0]
    if len(files) == 1 and first.data.ndim == spatial_dims + 1 and first.data.shape[-1] == num_modalities:
        return first._replace(data=np.ascontiguousarray(np.moveaxis(first.data, -1, 0)))
    if first.data.ndim != spatial_dims or len(files) != num_modalities:
        raise SegmentationError(
            f"{files[0]}: expected {num_modalities} modalities of {spatial_dims} axes, along the last axis of one file "
            f"or in a file each, got {len(files)} file(s) of shape {list(first.data.shape)}"
        )
    grids = [Grid.of(file, image) for file, image in zip(files, images)]
    for grid in grids[1:]:
        grid.require_same(grids[0])
    return first._replace(data=np.stack([image.data for image in images]))


def _plane(image: Image) -> Image:
    """A slice that is stored as a volume, without its third axis."""
    return image._replace(data=image.data[:, :, 0]) if image.data.shape[2:3] == (1,) else image


def _read_mask(file: Path | None, image: np.ndarray, grid: Grid) -> np.ndarray:
    """Where to look, ``[*S]``: the nonzero voxels of the file or, without one, those nonzero in any modality.

    Without a file it is everything where zeros are less than a tenth as many as negative voxels: 0 is then a value like
    any other, as it is water in CT, and without these voxels the mask would have holes all over.
    """
    if file is None:
        mask = (image != 0).any(axis=0)
        if not mask.any():
            raise SegmentationError(f"{grid.file}: every voxel is zero, so there is nothing inside its mask")
        if 10 * np.count_nonzero(~mask) < np.count_nonzero((image < 0).any(axis=0)):
            mask[:] = True
        return mask
    mask = _read_labels_on(file, grid) != 0
    if not mask.any():
        raise SegmentationError(f"{file}: the mask is empty")
    return mask


def _read_labels_on(file: Path, grid: Grid) -> np.ndarray:
    """A label map or a mask whose voxels are those of the image."""
    image = read_labels(file)
    Grid.of(file, image).require_same(grid)
    return image.data.reshape(grid.shape)


def normalise(image: np.ndarray, mask: np.ndarray, files: Sequence[Path]) -> np.ndarray:
    """Each modality of ``[M, *S]`` with mean zero and variance one inside the mask, and zero outside, as float32.

    Raises:
        SegmentationError: a modality that is constant inside the mask.
    """
    result = np.zeros(image.shape, np.float32)
    for modality, values in enumerate(image):
        voxels = values[mask].astype(np.float64)
        deviation = voxels.std()
        if deviation <= 1e-6 * abs(voxels).max():
            raise SegmentationError(f"{files[modality]}: modality {modality} is constant inside the mask")
        voxels -= voxels.mean()
        result[modality][mask] = voxels / deviation
    return result
