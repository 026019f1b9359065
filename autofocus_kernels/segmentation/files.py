"""Files in and out: NIfTI images, checkpoints and JSON, read with errors that name the file and written all or not."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from . import extra  # noqa: F401
from .locks import lock

SUFFIXES = (".nii", ".nii.gz")


class SegmentationError(ValueError):
    """Something is wrong with a file or with the data in it; the message names the file."""


class Image(NamedTuple):
    """What :func:`read_nifti` gives: voxels, ``[4, 4]`` voxel-to-world matrix, and nibabel's header."""

    data: np.ndarray
    affine: np.ndarray
    header: Any


def is_nifti(path: str | os.PathLike) -> bool:
    return str(path).endswith(SUFFIXES)


def stem(path: str | os.PathLike) -> str:
    """The name of a NIfTI file without its folder and suffix: "a/b.nii.gz" -> "b"."""
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def nifti_files(folder: Path) -> dict[str, Path]:
    """Case -> its file, sorted; what other systems leave beside them ("._a.nii") is passed over.

    Raises:
        SegmentationError: no such folder, none in it, or two files of one case.
    """
    if not folder.is_dir():
        raise SegmentationError(f"{folder}: must be a folder of NIfTI files, and is no folder")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not is_nifti(path):
            continue
        if stem(path) in files:
            raise SegmentationError(f"{path}: {files[stem(path)]} is the same case")
        files[stem(path)] = path
    if not files:
        raise SegmentationError(f"{folder}: holds no NIfTI file (.nii or .nii.gz)")
    return files


def read_nifti(path: str | os.PathLike, spatial_dims: int = 3) -> Image:
    """An image as float32, without the axes of one voxel beyond the third that some programs add.

    Args:
        spatial_dims: 2 where a third axis is one of modalities, whose spacing means nothing.

    Raises:
        SegmentationError: the file is missing, unreadable, truncated or empty, holds colours, complex numbers, a NaN
            or an infinity, or does not say how large a voxel is and where it lies.
    """
    image = _load(path)
    if image.get_data_dtype().kind not in "iuf":
        raise SegmentationError(f"{path}: must hold real numbers, got {image.get_data_dtype()}")
    try:
        data = image.get_fdata(dtype=np.float32, caching="unchanged")
        if str(path).endswith(".gz"):  # nibabel stops at the last voxel; the checksum comes after it
            with gzip.open(path) as file:
                while file.read(1 << 20):
                    pass
    except Exception as error:  # gzip, zlib, nibabel and numpy each have their own for a damaged file
        raise SegmentationError(f"{path}: cannot be read, it is damaged or truncated: {_reason(error)}") from error
    data = data.squeeze(tuple(axis for axis, size in enumerate(data.shape) if axis > 2 and size == 1))
    if data.size == 0:
        raise SegmentationError(f"{path}: must hold voxels, its shape is {list(data.shape)}")
    bad = data.size - np.count_nonzero(np.isfinite(data))
    if bad:
        raise SegmentationError(f"{path}: must hold finite numbers, {bad} voxels are NaN or infinite")
    _require_place(path, image.affine, min(data.ndim, spatial_dims))
    return Image(data, image.affine, image.header)


def read_orientation(path: str | os.PathLike, spatial_dims: int) -> str:
    """:func:`orientation_of` a file, of which only the header is read.

    Raises:
        SegmentationError: the file is missing or no NIfTI, or has an affine that :func:`read_nifti` refuses.
    """
    image = _load(path)
    dims = min(len(image.shape), spatial_dims)
    _require_place(path, image.affine, dims)
    return orientation_of(image.affine, image.header, dims)


def orientation_of(affine: np.ndarray, header: Any, spatial_dims: int) -> str:
    """Where the axes run to: "RAS" is to the right, the front and the top. "" where the header does not say."""
    from nibabel import aff2axcodes

    if not _is_placed(header):
        return ""
    return "".join(aff2axcodes(affine[:, [*range(spatial_dims), 3]]))


def digest_of(path: str | os.PathLike) -> bytes:
    """SHA-256 of the bytes of a file.

    Raises:
        SegmentationError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise SegmentationError(f"{path}: cannot be read: {_reason(error)}") from error
    return digest.digest()


def fingerprint_of(path: str | os.PathLike) -> str:
    """A string that changes with the content of a file, but not with its place or age.

    Of a gzip file only the end is read, the checksum and the length of what is packed: data sets have gigabytes.

    Raises:
        SegmentationError: the file cannot be read.
    """
    if not os.fspath(path).endswith(".gz"):
        return digest_of(path).hex()[:16]
    try:
        with open(path, "rb") as file:
            file.seek(-min(8, os.path.getsize(path)), os.SEEK_END)
            return file.read().hex()
    except OSError as error:
        raise SegmentationError(f"{path}: cannot be read: {_reason(error)}") from error


def _require_place(path: str | os.PathLike, affine: np.ndarray, dims: int) -> None:
    """Raises SegmentationError unless the affine gives every axis a length and a direction of its own.

    Otherwise all distances and pictures would be wrong, or fail without naming the file.
    """
    axes = affine[:3, :dims]
    lengths = np.linalg.norm(axes, axis=0)
    # float32, as sforms are, leaves 1e-7 between axes that are one.
    if not np.isfinite(affine).all() or not lengths.all() or np.linalg.matrix_rank(axes / lengths, tol=1e-5) < dims:
        raise SegmentationError(
            f"{path}: must have an affine of finite numbers that takes its {dims} axes to as many directions, "
            f"got {affine.round(4).tolist()}"
        )


def read_labels(path: str | os.PathLike) -> Image:
    """A label map, or a mask, as int16. Its numbers may be 0.001 off, as those of programs that compute in floats are.

    Raises:
        SegmentationError: as :func:`read_nifti`, and for numbers that are not whole or not in 0 .. 32767.
    """
    image = read_nifti(path)
    labels = np.rint(image.data)
    strange = image.data[(abs(labels - image.data) > 1e-3) | (labels < 0) | (labels > 32767)]
    if strange.size:
        raise SegmentationError(f"{path}: labels must be whole numbers from 0 to 32767, got {strange[0]}")
    return image._replace(data=labels.astype(np.int16))


class Grid(NamedTuple):
    """Where the voxels of a file lie: the shape without an axis of modalities, and the affine."""

    file: str | os.PathLike
    shape: tuple[int, ...]
    affine: np.ndarray
    header: Any

    @classmethod
    def of(cls, file: str | os.PathLike, image: Image) -> Grid:
        """Of an image without an axis of modalities."""
        return cls(file, image.data.shape, image.affine, image.header)

    def require_same(self, other: Grid) -> None:
        """Checks that both files have the same voxels in the same places.

        Raises:
            SegmentationError: the shapes differ (one of them may have a third axis of one voxel), or a voxel lies more
                than a tenth of a voxel from that of ``other``.
        """
        shape = self.shape[: len(other.shape)]  # a slice may be stored as a volume
        if shape != other.shape[: len(shape)] or math.prod(self.shape) != math.prod(other.shape):
            raise SegmentationError(
                f"{self.file}: must have the shape of {other.file}, {list(other.shape)}, got {list(self.shape)}"
            )
        name, affines = "affine", [self.affine, other.affine]
        if not (_is_placed(self.header) and _is_placed(other.header)):
            # nibabel makes an affine up: the spacing is all there is.
            name, affines = "spacing", [np.diag(np.linalg.norm(affine, axis=0)) for affine in affines]
        corners = [(*index, *[0] * (3 - len(index)), 1) for index in itertools.product(*((0, n) for n in shape))]
        apart = np.linalg.norm((affines[0] - affines[1])[:3] @ np.transpose(corners), axis=0).max()
        spacing = np.linalg.norm(other.affine[:3, : len(shape)], axis=0)
        if apart > 0.1 * spacing.min():
            got, expected = (a.diagonal()[: len(spacing)] if name == "spacing" else a for a in affines)
            raise SegmentationError(
                f"{self.file}: must have the {name} of {other.file}, {expected.round(4).tolist()}, "
                f"got {got.round(4).tolist()}, which puts voxels up to {apart:.3g} mm elsewhere"
            )


def _is_placed(header: Any) -> bool:
    return bool(header["sform_code"] or header["qform_code"])


def _load(path: str | os.PathLike):
    import nibabel

    if not is_nifti(path):
        raise SegmentationError(f"{path}: must be a NIfTI file (.nii or .nii.gz)")
    try:
        return nibabel.load(path)
    except Exception as error:
        raise SegmentationError(f"{path}: cannot be read as NIfTI: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]


def write_nifti(path: str | os.PathLike, data: np.ndarray, affine: np.ndarray, header: Any = None) -> None:
    """Writes voxels of any NIfTI dtype under an affine; all of the file, or nothing. The same bytes for the same image.

    Args:
        header: of the image the voxels belong to, which has this affine; units, spacing, qform and sform are kept.

    Raises:
        SegmentationError: the file cannot be written (a full disk, say); what it held before is kept.
    """
    import nibabel

    if header is not None:
        header = header.copy()
        header.set_data_dtype(data.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0  # the grey values that a viewer would show of the image
        header.set_intent("none")
        spacing = header["pixdim"][:4].copy()
        header.set_data_shape(data.shape)
        header["pixdim"][:4] = spacing  # also that of an axis the voxels do not have, on which a qform depends
    placed = header is None or _is_placed(header)  # or nibabel would write the affine that it has made up
    make = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = make(data, affine if placed else None, header, dtype=data.dtype)

    def write(file: BinaryIO) -> None:
        if str(path).endswith(".gz"):
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=4, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)

    write_atomic(path, write)


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Makes the file that ``write(file)`` fills; one that was there is replaced at once or, on any failure, kept.

    It is filled under another name in the same folder, ``.NAME.tmp``: all that a kill can leave behind.

    Raises:
        SegmentationError: the file cannot be written, or another process is writing it.
    """
    try:
        target = target_of(path)
        with _temporary(target) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                if os.name != "posix":
                    file.close()  # Windows renames no open file; elsewhere it keeps its lock until it has its name
                os.replace(_temporary_name(target), target)
            except BaseException:
                with contextlib.suppress(OSError):
                    _temporary_name(target).unlink()
                raise
        _sync_folder(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save makes the latter of the former
        raise SegmentationError(f"{path}: cannot be written: {_reason(error)}") from error


def target_of(path: str | os.PathLike) -> Path:
    """The file to be written under this name: the one that a link leads to, there or not.

    Raises:
        SegmentationError: a device, a pipe or a folder is there, in whose place no file may come.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # links that lead to each other
        raise SegmentationError(f"{path}: must be a file to write, and is a link that leads nowhere")
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise SegmentationError(f"{path}: must be a file to write, and is {what}")
    return target


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _temporary(target: Path) -> BinaryIO:
    """An empty file beside the target, locked as long as it is open."""
    path = _temporary_name(target)
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
        if not lock(file):
            file.close()
            raise SegmentationError(f"{target}: is being written by another process")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate()
            return file
        file.close()  # another process gave it its name between the lines


def _sync_folder(folder: Path) -> None:
    """Writes a folder to the disk: only then does a rename in it survive a power failure."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: str | os.PathLike) -> None:
    """Makes a folder and those above it, where they are missing, and checks that files can be written to it.

    Raises:
        SegmentationError: it cannot be made, or no file can be written to it.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise SegmentationError(f"{path}: cannot be made: {_reason(error)}") from error
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise SegmentationError(f"{path}: cannot be written to: {_reason(error)}") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: str | os.PathLike, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """At least one row; all have the columns of the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds.

    Raises:
        SegmentationError: the file is missing, or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows begins a text with a mark
    except (OSError, ValueError) as error:
        raise SegmentationError(f"{path}: cannot be read as JSON: {_reason(error)}") from error


def write_checkpoint(path: str | os.PathLike, values: dict) -> None:
    """``torch.save``, all of it or nothing."""
    import torch

    write_atomic(path, lambda file: torch.save(values, file))


def read_checkpoint(path: str | os.PathLike) -> dict:
    """``torch.load`` onto the CPU of tensors and plain values only: a pickle that would run code is refused.

    Raises:
        SegmentationError: the file is missing, damaged, truncated, or holds anything else.
    """
    import pickle

    import torch

    try:
        if zipfile.is_zipfile(path):  # torch.load compares no checksums; files before torch 1.6 have none
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"it is damaged, {damaged} has another checksum")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SegmentationError(
            f"{path}: must be a checkpoint of tensors and plain values only; it is none, is damaged, or holds objects, "
            "which could run code as they load"
        ) from error
    except Exception as error:  # zip, pickle and the operating system each have their own
        raise SegmentationError(f"{path}: cannot be read as a checkpoint: {_reason(error)}") from error
    if not isinstance(values, dict):
        raise SegmentationError(f"{path}: must hold a dict, got {type(values).__name__}")
    return values
