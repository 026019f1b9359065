"""Scores of predicted label files: Dice, 95 % Hausdorff distance and mean surface distance, by MONAI.

Empty structures, here and in docs/segmentation.md. Where a structure is empty in the prediction and in the truth there
is nothing to measure: all three scores are NaN ("both empty"). Where only the prediction is empty ("missed") or only
the truth ("spurious"), Dice is 0 and the distances, which do not exist, are NaN. Means and deviations leave NaN out,
and the summary counts all three: a mean distance that does not say how many structures were missed flatters.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from . import extra  # noqa: F401

# isort: split
import numpy as np
from tqdm import tqdm

from .dataset import label_names
from .files import (
    Grid,
    Image,
    SegmentationError,
    make_folder,
    nifti_files,
    read_json,
    read_labels,
    target_of,
    write_csv,
)

# The labels that BRATS had in 2015; the challenge's later years number theirs otherwise.
PRESETS = {"brats2015": {"whole": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (4,)}}

METRICS = ("dice", "hausdorff95", "surface_distance")
BOTH_EMPTY, MISSED, SPURIOUS = EMPTY = ("both empty", "missed", "spurious")

Regions = Mapping[str, Sequence[int]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """One structure of one case; distances in the unit of the files' spacing, which is mostly mm."""

    case: str
    structure: str
    dice: float
    hausdorff95: float
    surface_distance: float
    empty: str = ""  # or one of EMPTY


def evaluate(
    pred: str | Path,
    truth: str | Path,
    out: str | Path | None = None,
    regions: Regions | str | None = None,
    subset: bool = False,
) -> list[Score]:
    """Scores every case and structure of a folder of label files against another.

    Args:
        pred, truth: folders of NIfTI label files, matched by name as :func:`match_cases` says.
        out: file for the scores as CSV; the summary goes beside it, as ``NAME_summary.csv``. None writes nothing.
        regions: name -> label values that make it up, or a name of :data:`PRESETS`; None is every label by itself,
            named by the dataset.json in or above ``truth`` where there is one. Where there is none, a warning names
            values that no file holds.
        subset: leave out truths that have no prediction instead of raising.

    Raises:
        ValueError, OSError: a file or an argument that does not fit; the message names it. Nothing is written then.
    """
    pairs = match_cases(Path(pred), Path(truth), subset)
    names = _label_names(Path(truth))
    known = None if names is None else set(names)
    if isinstance(regions, str):
        if regions not in PRESETS:
            raise ValueError(f"regions must be a mapping or one of {', '.join(PRESETS)}, got {regions!r}")
        regions = PRESETS[regions]
        known = {0}.union(*regions.values())
    if regions is None:
        labels = set(names) if names is not None else _labels_of(path for pair in pairs.values() for path in pair)
        structures = {(names or {}).get(label, f"label {label}"): (label,) for label in sorted(labels - {0})}
    else:
        structures = _check_regions(regions, known)
    if not structures:
        raise SegmentationError(f"{truth}: no label but 0 in any file, so there is nothing to score")

    if out is not None:  # before the work
        inputs = {path.resolve() for pair in pairs.values() for path in pair}
        for file in (Path(out), summary_path(Path(out))):
            if target_of(file) in inputs:
                raise SegmentationError(f"{file}: is an input; choose another name for the scores")
            make_folder(target_of(file).parent)

    scores, found = [], set()
    for case, (pred_path, truth_path) in tqdm(pairs.items(), desc="evaluate", unit="case", disable=None):
        predicted, true, spacing = _read_pair(pred_path, truth_path, known)
        scores += [Score(case, *score) for score in score_structures(predicted, true, structures, spacing)]
        found.update(np.unique(predicted).tolist(), np.unique(true).tolist())
    if known is None:  # nothing else tells a wrong number from a label that these cases do not have
        for name, labels in structures.items():
            if strangers := [label for label in labels if label not in found]:
                _log.warning("region %s holds %s, which no file in %s or %s does", name, strangers, pred, truth)
    if out is not None:
        write_csv(out, _rounded([asdict(score) for score in scores]))
        write_csv(summary_path(Path(out)), _rounded(summarise(scores)))
    return scores


def score_structures(
    predicted: np.ndarray, true: np.ndarray, structures: Regions, spacing: Sequence[float]
) -> list[tuple[str, float, float, float, str]]:
    """Name, Dice, 95 % Hausdorff distance, mean symmetric surface distance and emptiness of each structure.

    Args:
        predicted, true: integer label arrays of one shape, 2D or 3D. Axes of one voxel do not count: a slice that is
            stored as a volume is scored in 2D, since in 3D all of its voxels would be surface.
        spacing: voxel size along each axis.
    """
    thick = [axis for axis, size in enumerate(true.shape) if size > 1 or true.ndim <= 2]
    thin = tuple(axis for axis in range(true.ndim) if axis not in thick)
    predicted, true = predicted.squeeze(thin), true.squeeze(thin)
    spacing = [float(spacing[axis]) for axis in thick]
    return [
        (name, *_score(np.isin(predicted, labels), np.isin(true, labels), spacing))
        for name, labels in structures.items()
    ]


def _score(predicted: np.ndarray, true: np.ndarray, spacing: list[float]) -> tuple[float, float, float, str]:
    """Of two masks: the only place that decides what an empty one means."""
    import torch
    from monai import metrics

    if not predicted.any() and not true.any():
        return math.nan, math.nan, math.nan, BOTH_EMPTY
    if not predicted.any() or not true.any():
        return 0.0, math.nan, math.nan, SPURIOUS if predicted.any() else MISSED
    masks = [torch.from_numpy(mask)[None, None] for mask in (predicted, true)]
    distances = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():  # MONAI 1.6 calls its own function with an argument that it has deprecated
        warnings.filterwarnings("ignore", "monai.metrics.utils get_mask_edges:always_return_as_numpy", FutureWarning)
        return (
            metrics.compute_dice(*masks, include_background=True).item(),
            metrics.compute_hausdorff_distance(*masks, percentile=95, **distances).item(),
            metrics.compute_average_surface_distance(*masks, symmetric=True, **distances).item(),
            "",
        )


def summarise(scores: Iterable[Score]) -> list[dict[str, str | int | float]]:
    """Per structure: mean and population standard deviation of each metric over the cases that have it (NaN where none
    has), and how many cases were scored, and were empty in each way."""
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.structure, []).append(score)
    rows = []
    for structure, group in groups.items():
        row = {"structure": structure, "cases": len(group)}
        for metric in METRICS:
            values = [value for score in group if not math.isnan(value := getattr(score, metric))]
            row[f"{metric}_mean"] = float(np.mean(values)) if values else math.nan
            row[f"{metric}_std"] = float(np.std(values)) if values else math.nan
        for kind in EMPTY:
            row[kind.replace(" ", "_")] = sum(score.empty == kind for score in group)
        rows.append(row)
    return rows


def match_cases(pred: Path, truth: Path, subset: bool = False) -> dict[str, tuple[Path, Path]]:
    """Case -> files of the prediction and of the truth, for every prediction, sorted.

    The case is the prediction's file name without ``.nii`` or ``.nii.gz``. Its truth has that name, or is the only one
    whose name goes on from it, or it from the other, with ``_``, ``-`` or ``.``: ``p7`` and ``p7_seg``.

    Raises:
        ValueError: no file, none or several that fit one, two predictions of one truth, a prediction that is the
            truth's file, or without ``subset`` a truth without a prediction.
    """
    predictions, truths = nifti_files(pred), nifti_files(truth)
    pairs = {}
    for case, path in predictions.items():
        fitting = [case] if case in truths else [name for name in truths if _extends(name, case)]
        if len(fitting) != 1:
            found = f"several fit: {', '.join(fitting)}" if fitting else "none fits"
            raise SegmentationError(
                f"{path} must have one truth in {truth} whose name is or begins with {case}; {found}"
            )
        pairs[case] = path, truths[fitting[0]]
    used: dict[Path, Path] = {}
    for path, true in pairs.values():
        if true in used:
            raise SegmentationError(f"{path} and {used[true]} are both predictions of {true}: only one can be scored")
        if path.samefile(true):  # one folder for both, say, or links: perfect scores of nothing
            raise SegmentationError(f"{path}: must be a prediction, and is the truth itself, {true}")
        used[true] = path
    missing = [str(path) for path in truths.values() if path not in used]
    if missing and not subset:
        raise SegmentationError(
            f"{missing[0]} has no prediction in {pred} ({len(missing)} such in all); "
            "--subset scores the cases that have one"
        )
    return pairs


def _extends(first: str, second: str) -> bool:
    short, long = sorted((first, second), key=len)
    return long.startswith(short) and long[len(short) :][:1] in ("_", "-", ".")


def _label_names(truth: Path) -> dict[int, str] | None:
    """Label value -> name from the dataset.json in ``truth`` or the folder above; None without one."""
    for path in (truth / "dataset.json", truth.resolve().parent / "dataset.json"):
        if path.is_file():
            content = read_json(path)
            return dict(enumerate(label_names(path, content if isinstance(content, dict) else {})))
    return None


def _check_regions(regions: Regions, known: set[int] | None) -> dict[str, tuple[int, ...]]:
    for name, labels in regions.items():
        if not labels or min(labels) < 1:
            raise ValueError(f"region {name} must hold labels above 0, got {list(labels)}")
        if known is not None and not known.issuperset(labels):
            raise ValueError(f"region {name} holds {list(labels)}; the labels of the dataset are {sorted(known)}")
    return {name: tuple(labels) for name, labels in regions.items()}


def _labels_of(paths: Iterable[Path]) -> set[int]:
    return {label for path in paths for label in np.unique(_read_labels(path).data).tolist()}


def _read_pair(pred: Path, truth: Path, known: set[int] | None) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Both label arrays and the spacing of their axes."""
    predicted, true = _read_labels(pred, known), _read_labels(truth, known)
    Grid.of(pred, predicted).require_same(Grid.of(truth, true))
    spacing = np.linalg.norm(true.affine[:3, :3], axis=0)
    return predicted.data.reshape(true.data.shape), true.data, spacing[: true.data.ndim].tolist()


def _read_labels(path: Path, known: set[int] | None = None) -> Image:
    image = read_labels(path)
    if image.data.ndim not in (2, 3):
        raise SegmentationError(f"{path} must hold one label map of 2 or 3 axes, its shape is {list(image.data.shape)}")
    strangers = set() if known is None else set(np.unique(image.data).tolist()) - known
    if strangers:
        raise SegmentationError(f"{path} must hold labels of {sorted(known)} only, got {sorted(strangers)}")
    return image


def summary_path(out: Path) -> Path:
    return out.parent / f"{out.stem}_summary{out.suffix}"


def _rounded(rows: Sequence[Mapping]) -> list[dict]:
    return [{key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def table(rows: Sequence[Mapping]) -> str:
    """The rows of :func:`summarise` as text, ``mean (std)`` of each metric."""
    head = ("structure", "cases", "Dice", "95 % Hausdorff", "surface distance", *EMPTY)
    body = [
        (
            row["structure"],
            str(row["cases"]),
            *(f"{row[f'{metric}_mean']:.3f} ({row[f'{metric}_std']:.3f})" for metric in METRICS),
            *(str(row[kind.replace(" ", "_")]) for kind in EMPTY),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in (head, *body)
    )


def parse_regions(words: Sequence[str] | None) -> Regions | str | None:
    """What ``--regions`` got: a preset's name by itself, or any number of ``name=1,3``."""
    if words is None:
        return None
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    regions = {}
    for word in words:
        name, _, labels = word.partition("=")
        try:
            values = tuple(int(label) for label in labels.split(","))
        except ValueError:
            values = ()
        if not name or not values or name in regions:
            raise ValueError(f"regions must be name=1,3 with a name each, or one of {', '.join(PRESETS)}, got {word!r}")
        regions[name] = values
    return regions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pred", type=Path, required=True, help="folder of predicted label files")
    parser.add_argument(
        "--truth", type=Path, required=True, help="folder of true label files, names as in --pred or longer"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="CSV of all scores; NAME_summary.csv is written beside it"
    )
    parser.add_argument(
        "--regions", nargs="+", metavar="NAME=1,3", help=f"score these unions of labels, or {', '.join(PRESETS)}"
    )
    parser.add_argument("--subset", action="store_true", help="leave out truths without a prediction")


def main(options: argparse.Namespace) -> None:
    scores = evaluate(options.pred, options.truth, options.out, parse_regions(options.regions), options.subset)
    print(table(summarise(scores)))
    print(f"{options.out}, {summary_path(options.out)}")
