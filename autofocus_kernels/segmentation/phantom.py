"""Makes a data set in which size tells what a structure is: the case that several dilation rates are for.

Inside a head there are small, medium and large structures of one look, each size a class of its own, and a class that
intensity does tell. Their outlines are irregular on one scale, so that a piece of outline says little about the size.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import SegmentationError, make_folder, write_atomic, write_json, write_nifti

LABELS = ("background", "small", "medium", "large", "bright")


@dataclass(frozen=True)
class Site:
    """How a scanner differs from another; ``voxel`` scales the spacing, and so the size of all things in voxels."""

    voxel: float
    contrast: float
    noise: float
    bias: float


SITES = {
    "A": Site(voxel=1.0, contrast=1.0, noise=0.15, bias=0.2),
    "B": Site(voxel=1.25, contrast=0.75, noise=0.22, bias=0.35),
}

# Of each class how many there are in two and in three dimensions, and between which radii, relative to the head's.
_STRUCTURES = {
    "large": ((1, 1), (0.36, 0.42)),
    "medium": ((2, 3), (0.17, 0.21)),
    "small": ((5, 10), (0.06, 0.08)),
    "bright": ((2, 2), (0.08, 0.2)),
}
_STRETCH, _WOBBLE = 0.2, 0.12  # of outlines: log of the ratio of axes, and bumps, relative to the radius
_ROOM = 1.3  # structures keep this many radii to themselves


class Phantom(NamedTuple):
    """``image`` int16 ``[*S, M]``, zero outside the head; ``label`` uint8 and ``mask`` uint8, ``[*S]``."""

    image: np.ndarray
    label: np.ndarray
    mask: np.ndarray


def make_case(
    generator: np.random.Generator, size: Sequence[int], spacing: Sequence[float], modalities: int, site: Site
) -> Phantom:
    """One head. ``spacing`` is that of site A, whose images it just fits; all is laid out in millimetres."""
    dims = len(size)
    voxel = np.asarray(spacing) * site.voxel
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(size, voxel)]
    world = np.stack(np.meshgrid(*axes, indexing="ij"))
    head = np.array([n * step * generator.uniform(0.42, 0.46) for n, step in zip(size, spacing)])
    mask = np.square(world / _column(head)).sum(0) < 1

    wobble = _smooth(generator, size, 0.12 * head.min() / voxel)
    label = np.zeros(size, np.uint8)
    brightness = np.zeros(size)  # of a structure: its own deviation from the look of its kind
    taken: list[tuple[np.ndarray, float]] = []
    for name, (counts, radii) in _STRUCTURES.items():
        for _ in range(counts[dims - 2]):
            radius = generator.uniform(*radii) * head.min()
            centre = _free_place(generator, head, radius, taken)
            if centre is None:  # a full head has one structure less
                continue
            taken.append((centre, radius))
            inside = _distance(generator, world, centre) / radius + _WOBBLE * wobble < 1
            label[inside & mask] = LABELS.index(name)
            brightness[inside] = generator.normal(0, 0.06)

    tissue = 0.12 * _smooth(generator, size, 0.1 * head.min() / voxel)
    image = np.zeros((*size, modalities), np.int16)
    for modality in range(modalities):
        odd = modality % 2
        look = np.choose(label, (0.0, *3 * ((0.5, -0.4)[odd],), (0.8, 0.4)[odd])) + brightness * (label > 0)
        signal = 1 + site.contrast * (look + np.where(label > 0, 0, tissue))
        signal *= np.exp(site.bias * _smooth(generator, size, 0.6 * head.min() / voxel))
        signal += site.noise * generator.standard_normal(size)
        gain = generator.uniform(300, 500)
        image[..., modality] = np.where(mask, np.clip(gain * signal, 1, 32767), 0)
    return Phantom(image, label, mask.astype(np.uint8))


def _column(values: np.ndarray) -> np.ndarray:
    """One value an axis, to be combined with ``[dims, *S]``."""
    return values.reshape(-1, *[1] * len(values))


def _smooth(generator: np.random.Generator, size: Sequence[int], sigma: np.ndarray) -> np.ndarray:
    """Smooth noise of mean zero and variance one; ``sigma`` in voxels."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(generator.standard_normal(size), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _free_place(
    generator: np.random.Generator, head: np.ndarray, radius: float, taken: list[tuple[np.ndarray, float]]
) -> np.ndarray | None:
    """A centre for a structure that touches neither others nor the border of the head; None if none was found."""
    inner = head - _ROOM * radius
    for centre in generator.uniform(-1, 1, (1000, len(head))) * inner:
        apart = all(np.linalg.norm(centre - other) > _ROOM * (radius + size) for other, size in taken)
        if apart and np.square(centre / inner).sum() < 1:
            return centre
    return None


def _distance(generator: np.random.Generator, world: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """From the centre, in a space stretched along random axes, volumes unchanged."""
    dims = len(centre)
    stretch = generator.uniform(-_STRETCH, _STRETCH, dims)
    rotation = np.linalg.qr(generator.standard_normal((dims, dims)))[0]
    transform = np.exp(stretch - stretch.mean())[:, None] * rotation
    return np.linalg.norm(np.tensordot(transform, world - _column(centre), axes=1), axis=0)


def make_phantom(
    out: Path,
    cases: int,
    seed: int = 0,
    size: Sequence[int] | None = None,
    dims: int = 3,
    site: str = "A",
    modalities: int = 2,
    anisotropic: bool = False,
) -> None:
    """Writes the data set, a quarter of it for tests, and phantom.png, a picture of its first three cases.

    Args:
        size: voxels along each axis; None for 128 in 2D and 96 in 3D.
        anisotropic: voxels are three times as long along the last axis, whose default size is a third.

    Raises:
        ValueError: an argument out of range.
        SegmentationError: ``out`` holds a data set already, or a file cannot be written.
    """
    size, spacing = _resolve(cases, seed, size, dims, site, modalities, anisotropic)
    if (out / "dataset.json").exists():
        raise SegmentationError(f"{out / 'dataset.json'}: is there already: name a new folder")
    affine = np.diag([*(np.asarray(spacing) * SITES[site].voxel), *[1.0] * (4 - dims)])
    entries: dict[str, list] = {"training": [], "test": []}
    shown = []
    for index in range(cases):
        generator = np.random.default_rng([seed, ord(site), index])
        phantom = make_case(generator, size, spacing, modalities, SITES[site])
        split, end = ("training", "Tr") if index < cases - cases // 4 else ("test", "Ts")
        files = {kind: f"./{kind}s{end}/{site}_{index:03d}.nii.gz" for kind in ("image", "label", "mask")}
        for file, data in zip(files.values(), phantom):
            make_folder((out / file).parent)
            write_nifti(out / file, data if modalities > 1 or data.ndim == dims else data[..., 0], affine)
        entries[split].append(files)
        if len(shown) < 3:
            shown.append(phantom)
    _draw(out / "phantom.png", shown, spacing)
    description = {
        "name": f"phantom, site {site}, seed {seed}",
        "tensorImageSize": f"{dims + (modalities > 1)}D",
        "modality": {str(i): f"modality {i}" for i in range(modalities)},
        "labels": {str(i): name for i, name in enumerate(LABELS)},
        "numTraining": len(entries["training"]),
        "numTest": len(entries["test"]),
    }
    write_json(out / "dataset.json", description | entries)  # last: with it the data set is complete


def _resolve(cases, seed, size, dims, site, modalities, anisotropic) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The checked size and spacing."""
    if dims not in (2, 3):
        raise ValueError(f"dims must be 2 or 3, got {dims}")
    if site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, got {site!r}")
    for name, value, least in (("cases", cases, 1), ("seed", seed, 0), ("modalities", modalities, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    spacing = (*[1.0] * (dims - 1), 3.0 if anisotropic else 1.0)
    if size is None:
        size = [round((128, 96)[dims - 2] / step) for step in spacing]
    if len(size) != dims or min(size) < 8:
        raise ValueError(f"size must be {dims} numbers of at least 8, got {list(size)}")
    return tuple(size), spacing


def _draw(path: Path, phantoms: Sequence[Phantom], spacing: Sequence[float]) -> None:
    """A row a case: its modalities, and the truth; of volumes the slice with most structures."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = ("black", "#e8c33c", "#39a0ed", "#d1495b", "#6fbf73")
    columns = phantoms[0].image.shape[-1] + 1
    figure = Figure(figsize=(3 * columns, 3.1 * len(phantoms) + 0.5), layout="constrained")
    rows = figure.subplots(len(phantoms), columns, squeeze=False)
    for row, phantom in zip(rows, phantoms):
        image, label, mask = phantom
        if label.ndim == 3:
            depth = np.argmax([len(np.unique(plane)) + (plane > 0).mean() for plane in np.moveaxis(label, 2, 0)])
            image, label, mask = image[:, :, depth], label[:, :, depth], mask[:, :, depth]
        for axes, modality in zip(row, np.moveaxis(image, -1, 0)):
            low, high = np.percentile(modality[mask > 0], (1, 99))
            axes.imshow(modality, cmap="gray", vmin=low - 0.3 * (high - low), vmax=high, aspect=spacing[0] / spacing[1])
        row[-1].imshow(label, cmap=ListedColormap(colours), vmin=0, vmax=4, interpolation="nearest")
        row[-1].contour(mask, [0.5], colors="white", linewidths=0.8)
        row[-1].set_aspect(spacing[0] / spacing[1])
    for column, axes in enumerate(rows[0]):
        axes.set_title("truth" if column == columns - 1 else f"modality {column}")
    for axes in rows.flat:
        axes.set_axis_off()
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours[1:], LABELS[1:])]
    handles.append(Patch(facecolor="black", edgecolor="black", label="head outlined in white"))
    figure.legend(handles=handles, ncols=len(handles), loc="outside lower center", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    write_atomic(path, lambda file: file.write(buffer.getvalue()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--cases", type=int, default=12, help="a quarter of them for tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dims", type=int, choices=(2, 3), default=3)
    parser.add_argument("--size", type=int, nargs="+", help="voxels along each axis (default: 128 in 2D, 96 in 3D)")
    parser.add_argument("--site", choices=tuple(SITES), default="A", help="B has other contrast, noise and spacing")
    parser.add_argument("--modalities", type=int, default=2)
    parser.add_argument("--anisotropic", action="store_true", help="voxels three times as long along the last axis")


def main(options: argparse.Namespace) -> None:
    make_phantom(
        options.out,
        options.cases,
        options.seed,
        options.size,
        options.dims,
        options.site,
        options.modalities,
        options.anisotropic,
    )
    print(f"{options.cases} cases in {options.out}, pictured in {options.out / 'phantom.png'}")
