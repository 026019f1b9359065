"""Pictures of a prediction: the labels over the image, and the attention of every autofocus layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import extra  # noqa: F401

# isort: split
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .files import write_atomic

_SOFTWARE = "autofocus_kernels.segmentation"
_NAMED = 20  # labels in a legend: more leave no room for the picture
_PLANES = {0: "sagittal", 1: "coronal", 2: "axial"}  # by the axis that a slice cuts, of left-right, back-front, up


def write_overlay(
    path: str | Path, image: np.ndarray, labels: np.ndarray, affine: np.ndarray, names: Mapping[int, str]
) -> None:
    """The slices with most labelled voxels along each axis, without the labels and under them.

    Args:
        image, labels: ``[*S]``, two or three axes; label 0 is not drawn.
        affine: voxel to world; volumes are turned to the axes nearest to those of the body.
        names: of the labels, for the legend, which holds those of most voxels.
    """
    (image, labels), spacing = _turned([image, labels], affine)
    cuts = _cuts(labels)
    if len(cuts) == 1:  # a plane: side by side
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots(1, 2).reshape(2, 1)
    else:
        figure = Figure(figsize=(3.6 * len(cuts), 7.6), layout="constrained")
        axes = figure.subplots(2, len(cuts))
    for column, (axis, index) in enumerate(cuts):
        grey, marked = _cut(image, axis, index), _cut(labels, axis, index)
        for row in (0, 1):
            _show(axes[row, column], grey, _aspect(spacing, axis), cmap="gray", **_window(image))
        title = "image" if axis is None else f"{_PLANES[axis]}, slice {_in_file(index, axis, image, affine)}"
        axes[0, column].set_title(title, fontsize=10)
        _draw_labels(axes[1, column], marked, _aspect(spacing, axis))
    axes[1, 0].set_title("segmentation", fontsize=10)
    present, voxels = np.unique(labels[labels > 0], return_counts=True)
    largest = np.sort(present[np.argsort(-voxels, kind="stable")[:_NAMED]]).tolist()
    handles = [Patch(color=_colour(label), label=_plain(names.get(label, f"label {label}"))) for label in largest]
    if len(present) > len(largest):
        handles.append(Patch(color="none", label=f"{len(present) - len(largest)} more"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    else:
        axes[1, 0].set_title("nothing segmented", fontsize=10)
    _save(figure, path)


def write_attention(
    path: str | Path,
    image: np.ndarray,
    labels: np.ndarray,
    affine: np.ndarray,
    attention: Mapping[str, np.ndarray],
    rates: Mapping[str, Sequence[int]],
) -> None:
    """One row for each layer: the image, which dilation has the largest weight, and the weights of all dilations.

    Args:
        image, labels: as for :func:`write_overlay`; the slice is the one with most labelled voxels, axial in 3D.
        attention: layer -> weights ``[K, *S]`` that sum to one over K.
        rates: layer -> the K dilations.
    """
    layers = list(attention)
    branches = max(len(rates[layer]) for layer in layers)
    (image, labels, *maps), spacing = _turned([image, labels, *attention.values()], affine)
    axis, index = _cuts(labels)[-1]
    grey, marked, aspect = _cut(image, axis, index), _cut(labels, axis, index), _aspect(spacing, axis)
    planes = [np.stack([_cut(weight, axis, index) for weight in weights]) for weights in maps]
    highest = max(float(slices.max()) for slices in planes)
    figure = Figure(figsize=(2.1 * (branches + 2) + 1, 2.3 * len(layers) + 0.7), layout="constrained")
    axes = figure.subplots(len(layers), branches + 2, squeeze=False)
    for row, layer, slices in zip(axes, layers, planes):
        dilations = rates[layer]
        _show(row[0], grey, aspect, cmap="gray", **_window(image))
        _draw_labels(row[0], marked, aspect)
        row[0].set_ylabel(layer, fontsize=9)
        colours = ListedColormap(colormaps["plasma"](np.linspace(0.1, 0.95, len(dilations))))
        scales = _show(row[1], slices.argmax(0), aspect, cmap=colours, vmin=-0.5, vmax=len(dilations) - 0.5)
        bar = figure.colorbar(scales, ax=row[1], ticks=range(len(dilations)), shrink=0.8)
        bar.ax.set_yticklabels([str(rate) for rate in dilations], fontsize=7)
        for panel, weight, rate in zip(row[2:], slices, dilations):
            shown = _show(panel, weight, aspect, cmap="viridis", vmin=0, vmax=highest)
            panel.set_title(f"weight of dilation {rate}", fontsize=8)
        for panel in row[2 + len(dilations) :]:
            panel.set_axis_off()
    axes[0, 0].set_title("image and labels", fontsize=8)
    axes[0, 1].set_title("dilation of largest weight", fontsize=8)
    figure.colorbar(shown, ax=axes[:, -1], shrink=0.8, label="weight")
    _save(figure, path)


def _turned(arrays: Sequence[np.ndarray], affine: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
    """Arrays whose last three axes run to the right, front and top as nearly as they can, and their spacing.

    Two axes stay as they are: a plane has no side that is up.
    """
    from nibabel import orientations

    dims = arrays[0].ndim
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[:dims].tolist()
    if dims == 2:
        return list(arrays), spacing
    turn = orientations.io_orientation(affine)
    order = np.argsort(turn[:, 0])
    turned = []
    for array in arrays:
        lead = tuple(range(array.ndim - dims))
        array = array.transpose(*lead, *(len(lead) + order))
        flips = [len(lead) + i for i in range(dims) if turn[order[i], 1] < 0]
        turned.append(np.flip(array, flips))
    return turned, [spacing[axis] for axis in order]


def _in_file(index: int, axis: int, turned: np.ndarray, affine: np.ndarray) -> int:
    """The number that a slice of a turned volume has in the file, from 0."""
    from nibabel import orientations

    direction = next(sign for to, sign in orientations.io_orientation(affine) if to == axis)
    return index if direction > 0 else turned.shape[axis] - 1 - index


def _cuts(labels: np.ndarray) -> list[tuple[int | None, int]]:
    """Axis and index of the slices with most labelled voxels, or the middle ones; axis None is a plane as it is."""
    if labels.ndim == 2:
        return [(None, 0)]
    cuts = []
    for axis in range(3):
        counts = (labels > 0).sum(axis=tuple(other for other in range(3) if other != axis))
        cuts.append((axis, int(counts.argmax()) if counts.any() else labels.shape[axis] // 2))
    return cuts


def _cut(volume: np.ndarray, axis: int | None, index: int) -> np.ndarray:
    return volume if axis is None else volume.take(index, axis)


def _aspect(spacing: Sequence[float], axis: int | None) -> float:
    """Height by width of a voxel in the slice."""
    across, up = (size for other, size in enumerate(spacing) if other != axis)
    return up / across


def _window(image: np.ndarray) -> dict[str, float]:
    """Grey values from the 1st to the 99.5th percentile of what is not background, which has the least value."""
    values = image[image > image.min()]
    if values.size == 0:
        return {"vmin": 0.0, "vmax": 1.0}
    low, high = np.percentile(values, (1, 99.5))
    return {"vmin": float(low), "vmax": float(max(high, low + 1e-6))}


def _show(panel, plane: np.ndarray, aspect: float, **options):
    """First axis to the right, second upwards."""
    panel.set_xticks([])
    panel.set_yticks([])
    return panel.imshow(plane.T, origin="lower", aspect=aspect, interpolation="nearest", **options)


def _draw_labels(panel, labels: np.ndarray, aspect: float) -> None:
    """Each label filled, so that the image shows through, with its border opaque."""
    for label in np.unique(labels[labels > 0]).tolist():
        mask = np.ma.masked_equal(labels == label, False)
        _show(panel, mask, aspect, cmap=ListedColormap([_colour(label)]), alpha=0.35)
        if min(labels.shape) > 1:
            panel.contour((labels == label).T.astype(float), levels=[0.5], colors=[_colour(label)], linewidths=0.9)


def _plain(text: str) -> str:
    """As matplotlib draws it without looking for a formula."""
    return text.replace("$", r"\$")


def _colour(label: int):
    return colormaps["tab10"]((label - 1) % 10)


def is_ours(path: Path) -> bool:
    """Whether a picture is there that this module wrote."""
    with path.open("rb") as file:
        return _SOFTWARE.encode() in file.read(1024)  # PNG's texts come before the pixels


def _save(figure: Figure, path: str | Path) -> None:
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110, metadata={"Software": _SOFTWARE}))
