"""Label files of whole volumes from a trained network, with a picture of each and the attention if asked for."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import extra  # noqa: F401

# isort: split
import numpy as np
from torch import nn
from tqdm import tqdm

from .dataset import Case, Sample, read_case, read_dataset
from .files import (
    SegmentationError,
    digest_of,
    make_folder,
    nifti_files,
    orientation_of,
    read_nifti,
    stem,
    target_of,
    write_nifti,
)
from .parallel import find_device
from .pictures import is_ours, write_attention, write_overlay
from .run import Config, load_model
from .windows import TILINGS, Windows, autofocus_layers, window_sizes

_log = logging.getLogger(__name__)


def predict(
    model: str | os.PathLike,
    input: str | os.PathLike,
    output: str | os.PathLike,
    *,
    arch: str | None = None,
    tiling: str = "published",
    window: Sequence[int] | None = None,
    device: str | None = None,
    attention: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Segments every case of ``input`` that ``output`` does not hold yet; label files record what they were made of.

    Each case gives ``CASE.nii.gz`` (uint8, uint16 for more than 256 labels, with the shape, affine and orientation of
    its image) and ``CASE.png``, and with ``attention`` ``attention/CASE.png`` and for every autofocus layer
    ``attention/CASE/LAYER_weights.nii.gz`` (float32, dilations along the last axis) and ``LAYER_dilation.nii.gz`` (the
    dilation of the largest weight, 0 where nothing was predicted). The label file comes last: where it is, its case is
    complete.

    Args:
        model: a run's folder, a checkpoint of one, or with ``arch`` a checkpoint of the authors' code.
        input: a NIfTI file, a folder of them, or what :func:`.dataset.read_dataset` reads: of that the test cases or,
            where it lists none, all.
        tiling: "published": the box around the mask, the prediction outside the mask set to 0. "gaussian": the whole
            volume. See :class:`.windows.Windows`.
        window: voxels that the network reads at once, ``(n,)`` for every axis or one number an axis; None is what it
            read in training.
        device: as PyTorch names it; None is "cuda" where there is one.
        overwrite: predict cases again that ``output`` holds.

    Returns:
        The label files, of this call and of earlier ones.

    Raises:
        SegmentationError, ValueError: a file or an argument that does not fit; the message names it. What was written
            before stays, and a later call goes on from there.
    """
    network, config = load_model(model, arch=arch)
    if attention and not autofocus_layers(network):
        raise ValueError(f"attention: {network.name} has no autofocus layer whose attention could be written")
    window = window_sizes(config.window if window is None else window, config.spatial_dims)
    windows = Windows(network, window, tiling, find_device(device))
    cases = find_cases(Path(input), config)
    files = {case.name: Path(output) / f"{case.name}.nii.gz" for case in cases}
    _require_places(cases, files.values(), overwrite)
    origin = f"autofocus_kernels {_fingerprint(network)} {tiling} {'x'.join(map(str, window))}"
    done = set() if overwrite else {case.name for case in cases if _is_done(files[case.name], attention, case, origin)}
    if len(done) < len(cases):
        make_folder(output)
    unmasked = [case for case in cases if case.mask is None and case.name not in done]
    if config.masks and unmasked:
        _log.warning(
            "%s: has no mask file, as the cases of training had (%d such in all); it is normalised, and segmented, "
            "inside the mask that its voxels give",
            unmasked[0].images[0],
            len(unmasked),
        )
    for case in tqdm(cases, desc="predict", unit="case", disable=None):
        if case.name not in done:
            _predict_case(case, windows, config, files[case.name], attention, origin)
    return list(files.values())


def find_cases(input: Path, config: Config) -> list[Case]:
    """The cases of a file or a folder, as :func:`predict` takes them.

    Raises:
        SegmentationError: nothing there, two files of one case, or modalities or labels in another order than in
            training.
    """
    if (input / "dataset.json").is_file() or input.suffix in (".json", ".csv"):
        dataset = read_dataset(input, config.labels)
        _require_order(dataset.source, "modalities", dataset.modalities, config.modalities)
        _require_order(dataset.source, "labels", dataset.labels, config.labels)
        return list(dataset.test or dataset.training + (dataset.validation or ()))
    if not input.exists():
        raise SegmentationError(f"{input}: no such file or folder")
    files = nifti_files(input) if input.is_dir() else {stem(input): input}
    return [Case(name, (file,)) for name, file in files.items()]


def _require_order(source: Path, kind: str, names: Sequence[str], trained: Sequence[str]) -> None:
    """Names that training did not have may be other words for the same; one that it had must have its number."""
    number_of = {name.casefold(): number for number, name in enumerate(trained)}
    if any(number_of.get(name.casefold(), number) != number for number, name in enumerate(names)):
        raise SegmentationError(
            f"{source}: {kind} must be in the order of training, {', '.join(trained)}, got {', '.join(names)}"
        )


def _require_places(cases: Sequence[Case], files: Iterable[Path], overwrite: bool) -> None:
    """Refuses, before the work, outputs in the place of an input, of what is no file, or of a picture not ours."""
    inputs = {file.resolve() for case in cases for file in case.files}
    for file in files:
        picture = target_of(_picture(file))
        if picture.exists() and not overwrite and not is_ours(picture):
            raise SegmentationError(
                f"{picture}: is there already, and no picture of a prediction: choose another folder"
            )
        if target_of(file) in inputs:
            raise SegmentationError(f"{file}: is an input; choose another folder for the output")


def _picture(labels: Path) -> Path:
    return labels.with_name(f"{stem(labels)}.png")


def _attention_picture(labels: Path) -> Path:
    return labels.parent / "attention" / f"{stem(labels)}.png"


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _signature(case: Case, origin: str) -> str:
    """``origin`` and the files that were segmented, by their content; it fits into the 80 bytes of ``descrip``.

    Raises:
        SegmentationError: a file that cannot be read.
    """
    digest = hashlib.sha256()
    for path in (*case.images, case.mask):
        if path is not None:
            digest.update(digest_of(path))
    return f"{origin} {digest.hexdigest()[:12]}"


def _is_done(labels: Path, attention: bool, case: Case, origin: str) -> bool:
    """Whether the files of a case are all there, made from this image in this way.

    Raises:
        SegmentationError: the label file is there, but of another origin or of another image.
    """
    if not labels.exists():
        return False
    if read_nifti(labels).header["descrip"].item().decode(errors="replace") != _signature(case, origin):
        raise SegmentationError(
            f"{labels}: is there already, and not of this model, tiling, window and image: choose another folder for "
            "the output, or overwrite"
        )
    return not attention or _attention_picture(labels).exists()


def _predict_case(case: Case, windows: Windows, config: Config, file: Path, attention: bool, origin: str) -> None:
    sample = read_case(case, len(config.modalities), config.spatial_dims)
    axes = orientation_of(sample.affine, sample.header, config.spatial_dims)
    if axes and config.orientations and axes not in config.orientations:
        _log.warning(
            "%s: its axes run %s, those of the images of training %s; nothing is turned, so the network sees this one "
            "mirrored or turned",
            case.images[0],
            axes,
            ", ".join(config.orientations),
        )
    try:
        labels, box, weights_of = windows.segment(sample.image, sample.mask, attention)
    except MemoryError as error:
        raise SegmentationError(f"{case.images[0]}: {error}, and there is nothing smaller to try") from error
    labels = labels.astype(np.min_scalar_type(len(config.labels) - 1))
    image = np.where(sample.mask, sample.image[0], sample.image[0].min())
    if attention:
        maps = {name: weights.numpy() for name, weights in weights_of.items()}
        layers = autofocus_layers(windows.network)
        rates = {name: [max(rate) for rate in layers[name].dilations] for name in maps}
        folder = file.parent / "attention" / case.name
        make_folder(folder)
        for name, weights in maps.items():
            _write_attention_files(folder, name, weights, rates[name], box, sample)
        write_attention(_attention_picture(file), image[box], labels[box], sample.affine, maps, rates)
    write_overlay(_picture(file), image, labels, sample.affine, dict(enumerate(config.labels)))
    header = sample.header.copy()
    header["descrip"] = _signature(case, origin)
    write_nifti(file, labels.reshape(sample.shape), sample.affine, header)


def _write_attention_files(
    folder: Path, layer: str, weights: np.ndarray, rates: Sequence[int], box: tuple[slice, ...], sample: Sample
) -> None:
    """Writes ``weights`` ``[K, *B]``, and which dilation has the largest, with zeros around the box B."""
    whole = np.zeros((*sample.mask.shape, len(rates)), np.float32)
    whole[box] = np.moveaxis(weights, 0, -1)
    whole = whole.reshape(*sample.shape, len(rates))
    write_nifti(folder / f"{layer}_weights.nii.gz", whole, sample.affine, sample.header)
    dilation = np.zeros(sample.mask.shape, np.int16)
    dilation[box] = np.array(rates)[weights.argmax(0)]
    write_nifti(folder / f"{layer}_dilation.nii.gz", dilation.reshape(sample.shape), sample.affine, sample.header)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="a run's folder, or a checkpoint")
    parser.add_argument("--input", type=Path, required=True, help="a NIfTI file, a folder of them, or a data set")
    parser.add_argument("--output", type=Path, required=True, help="folder for the label files and pictures")
    parser.add_argument("--arch", help="for a checkpoint of the authors' code: AFN-6, ...")
    parser.add_argument("--tiling", choices=TILINGS, default="published", help="how windows are laid out")
    parser.add_argument(
        "--window",
        type=int,
        nargs="+",
        metavar="N",
        help="voxels read at once, for each axis or all (as in training)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    parser.add_argument("--attention", action="store_true", help="write which dilation each voxel used")
    parser.add_argument("--overwrite", action="store_true", help="predict again what the output folder holds already")


def main(options: argparse.Namespace) -> None:
    files = predict(
        options.model,
        options.input,
        options.output,
        arch=options.arch,
        tiling=options.tiling,
        window=options.window,
        device=options.device,
        attention=options.attention,
        overwrite=options.overwrite,
    )
    print(f"{len(files)} cases in {options.output}")
