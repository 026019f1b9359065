"""Files, data sets and models that segmentation reads: what is accepted; errors that name the file for the rest."""

import csv
import dataclasses
import gzip
import os
import re
import shutil
import stat
import subprocess
import sys
import tracemalloc

import nibabel
import numpy as np
import pytest
import torch
from helpers.segmentation_runs import rewrite_header

from autofocus_kernels import networks
from autofocus_kernels.segmentation import files, locks
from autofocus_kernels.segmentation.dataset import Case, normalise, read_case, read_dataset
from autofocus_kernels.segmentation.files import SegmentationError, read_labels, read_nifti, write_nifti
from autofocus_kernels.segmentation.recipe import MODERN
from autofocus_kernels.segmentation.run import Config, build_network, load_model, read_config, write_config

AFFINE = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3, 1], [0, 0, 0, 1]])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 2), (5, 6, 7, 2)])
def test_round_trip(tmp_path, suffix, shape):
    data = np.random.default_rng(0).random(shape, np.float32)
    path = tmp_path / f"image{suffix}"
    write_nifti(path, data, AFFINE)
    image = read_nifti(path)
    np.testing.assert_array_equal(image.data, data)
    np.testing.assert_allclose(image.affine, AFFINE)
    first = path.read_bytes()
    write_nifti(path, data, AFFINE)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == [path.name]


def test_header_of_the_image_is_kept(tmp_path):
    original = nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), AFFINE)
    original.header.set_xyzt_units("mm", "sec")
    original.set_sform(AFFINE, code="mni")
    original.set_qform(AFFINE, code="scanner")
    original.header.set_slope_inter(2, 3)
    original.header["cal_max"] = 1000
    nibabel.save(original, tmp_path / "image.nii.gz")
    image = read_nifti(tmp_path / "image.nii.gz")
    write_nifti(tmp_path / "label.nii.gz", np.full((4, 5, 6), 7, np.uint8), image.affine, image.header)
    written = nibabel.load(tmp_path / "label.nii.gz")
    assert written.get_data_dtype() == np.uint8 and (read_labels(tmp_path / "label.nii.gz").data == 7).all()
    assert written.header.get_xyzt_units() == ("mm", "sec")
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (4, 1)
    assert written.header["cal_max"] == 0  # or viewers show labels as black
    nibabel.save(nibabel.Nifti2Image(np.ones((4, 5, 6), np.int16), AFFINE), tmp_path / "image.nii.gz")
    write_nifti(tmp_path / "label.nii.gz", np.ones((4, 5, 6), np.uint8), *read_nifti(tmp_path / "image.nii.gz")[1:])
    assert isinstance(nibabel.load(tmp_path / "label.nii.gz"), nibabel.Nifti2Image)


@pytest.mark.parametrize("codes", [(0, 0), (0, 1), (2, 0), (2, 1)])
@pytest.mark.parametrize(
    "shape, written", [((4, 5, 2), (4, 5)), ((4, 5), (4, 5, 3)), ((4, 5, 6, 2), (4, 5, 6)), ((4, 5, 6), (4, 5, 6, 3))]
)
def test_the_place_of_the_image_is_kept_as_its_header_says_it(tmp_path, codes, shape, written):
    """Of labels, which have no axis of modalities, and of attention, which has one of dilations."""
    source = nibabel.Nifti1Image(np.ones(shape, np.int16), None)
    source.header.set_zooms((1.5, 2.0, 3.0, 1.0)[: len(shape)])
    for set_form, code in zip((source.header.set_sform, source.header.set_qform), codes):
        if code:
            set_form(AFFINE, code)
    nibabel.save(source, tmp_path / "image.nii")
    image = nibabel.load(tmp_path / "image.nii")
    write_nifti(tmp_path / "label.nii", np.ones(written, np.uint8), image.affine, image.header)
    label = nibabel.load(tmp_path / "label.nii")
    for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x"):
        np.testing.assert_array_equal(label.header[field], image.header[field])
    if any(codes):
        np.testing.assert_allclose(label.affine, image.affine)
    assert label.header.get_zooms()[:2] == image.header.get_zooms()[:2]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    files.write_text(path, "before")

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SegmentationError, match="file.txt: cannot be written: No space left on device"):
        files.write_atomic(path, full)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file.txt"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(SegmentationError, match=f"{name}: must be a file to write, and is no regular file"):
            files.write_text(tmp_path / name, "text")
    with pytest.raises(SegmentationError, match="must be a file to write, and is a folder"):
        files.write_text(tmp_path, "text")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    for content in ("new", "replaced"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("folder/file")
        files.write_text(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == content
    assert os.listdir(tmp_path / "folder") == ["file"]
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(SegmentationError, match="round: must be a file to write, and is a link that leads nowhere"):
        files.write_text(tmp_path / "round", "text")


def test_a_file_that_another_process_writes_is_refused(tmp_path):
    path = tmp_path / "file.txt"
    command = f"""
from autofocus_kernels.segmentation import files
try:
    files.write_text({str(path)!r}, "other")
except files.SegmentationError as error:
    print(error)
"""

    def write(file):
        said = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
        assert said == f"{path}: is being written by another process\n"
        file.write(b"own")

    files.write_atomic(path, write)
    assert path.read_text() == "own" and os.listdir(tmp_path) == ["file.txt"]


def test_a_temporary_file_that_was_renamed_meanwhile(tmp_path, monkeypatch):
    """Another process opened it, gave it its name and ended, before it was locked here."""
    path, lock, renamed = tmp_path / "file.txt", files.lock, []

    def late(file):
        if not renamed:
            renamed.append(file)
            os.replace(tmp_path / ".file.txt.tmp", path)
            path.write_text("other")
        return lock(file)

    monkeypatch.setattr(files, "lock", late)
    files.write_atomic(path, lambda file: None if path.read_text() == "other" else pytest.fail("emptied"))
    assert renamed and path.read_text() == ""


def test_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    files.write_text(tmp_path / "file.txt", "text")
    assert (tmp_path / "file.txt").read_text() == "text" and os.listdir(tmp_path) == ["file.txt"]


def flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_changed_bit_in_packed_voxels(tmp_path):
    path = tmp_path / "image.nii.gz"
    voxels = np.random.default_rng(0).integers(0, 255, (20, 20, 20), np.uint8)
    write_nifti(path, voxels, np.eye(4))
    flip_a_bit(path, path.stat().st_size // 2)
    assert (nibabel.load(path).get_fdata() != voxels).any()  # nibabel does not see it
    with pytest.raises(SegmentationError, match=f"^{re.escape(str(path))}: cannot be read, it is damaged or truncated"):
        read_nifti(path)


def test_a_changed_bit_in_a_checkpoint(tmp_path):
    path = tmp_path / "best.pt"
    weight = torch.arange(1000.0)
    files.write_checkpoint(path, {"weight": weight})
    flip_a_bit(path, path.read_bytes().index(weight.numpy().tobytes()) + 2002)
    assert not torch.equal(torch.load(path, weights_only=True)["weight"], weight)  # torch does not see it
    with pytest.raises(
        SegmentationError, match=f"^{re.escape(str(path))}: cannot be read as a checkpoint: it is damag"
    ):
        files.read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_or_no_nifti(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    write_nifti(path, np.random.default_rng(0).random((9, 9, 9), np.float32), AFFINE)
    content = path.read_bytes()
    for length in (0, 10, 300, len(content) // 2, len(content) - 20):
        path.write_bytes(content[:length])
        with pytest.raises(SegmentationError, match=f"image{suffix}: cannot be read"):
            read_nifti(path)
    path.write_bytes(b"something else " * 100)
    with pytest.raises(SegmentationError, match=f"image{suffix}: cannot be read"):
        read_nifti(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path, value):
    data = np.ones((4, 4), np.float32)
    data[1, 2] = value
    write_nifti(tmp_path / "image.nii", data, AFFINE)
    with pytest.raises(SegmentationError, match="image.nii: must hold finite numbers, 1 voxels are NaN or infinite"):
        read_nifti(tmp_path / "image.nii")


@pytest.mark.parametrize("read", [read_nifti, read_labels])
@pytest.mark.parametrize(
    "index, value",
    [(1, 0), (0, np.nan), (3, np.inf)],  # that of AFFINE's second axis is its only entry
)
def test_voxels_without_a_size_or_a_place(tmp_path, read, index, value):
    write_nifti(tmp_path / "image.nii.gz", np.ones((4, 5, 6), np.uint8), AFFINE)
    rewrite_header(tmp_path / "image.nii.gz", "srow_x", index, value)
    with pytest.raises(SegmentationError, match="image.nii.gz: must have an affine of finite numbers"):
        read(tmp_path / "image.nii.gz")


def test_axes_that_are_one(tmp_path):
    turned = np.array([[1.0, 2, 0, 0], [1, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    write_nifti(tmp_path / "image.nii", np.ones((4, 5, 6), np.uint8), AFFINE)
    for row, field in zip(turned, ("srow_x", "srow_y", "srow_z")):
        rewrite_header(tmp_path / "image.nii", field, slice(None), row)
    with pytest.raises(SegmentationError, match="image.nii: must have an affine of finite numbers that takes its 3"):
        read_nifti(tmp_path / "image.nii")


def test_an_axis_of_modalities_needs_no_spacing(tmp_path):
    write_nifti(tmp_path / "image.nii", np.random.default_rng(0).random((4, 5, 2), np.float32), np.diag([1, 2, 3, 1]))
    rewrite_header(tmp_path / "image.nii", "srow_z", 2, 0)
    assert read_case(Case("case", (tmp_path / "image.nii",)), 2, 2).image.shape == (2, 4, 5)


@pytest.mark.parametrize("value", [0.5, -1, 1e6])
def test_labels_are_whole_numbers(tmp_path, value):
    write_nifti(tmp_path / "label.nii", np.full((4, 4), value, np.float32), AFFINE)
    with pytest.raises(SegmentationError, match=r"label.nii: labels must be whole numbers from 0 to 32767, got"):
        read_labels(tmp_path / "label.nii")


def test_labels_may_be_floats_with_their_rounding(tmp_path):
    write_nifti(tmp_path / "label.nii", np.array([[0.0, 1.0], [1.99999, 1e-5]]), AFFINE)
    assert read_labels(tmp_path / "label.nii").data.tolist() == [[0, 1], [2, 0]]


@pytest.mark.parametrize("shape", [(4, 5, 6, 1, 2), (4, 5, 1, 2), (4, 5, 1, 1, 2)])
def test_modalities_after_axes_of_one_voxel(tmp_path, shape):
    """ITK writes the components of an image along the fifth axis, as the fourth is time."""
    data = np.random.default_rng(0).random(shape, np.float32)
    source = nibabel.Nifti1Image(data, AFFINE)
    source.header.set_intent("vector")
    nibabel.save(source, tmp_path / "image.nii")
    size = tuple(n for n in shape[:-1] if n > 1)
    sample = read_case(Case("case", (tmp_path / "image.nii",)), 2, len(size))
    expected = normalise(np.moveaxis(data.reshape(*size, 2), -1, 0), np.ones(size, bool), ["image"])
    np.testing.assert_array_equal(sample.image, expected)
    assert sample.shape == shape[:3]
    write_nifti(tmp_path / "label.nii", np.ones(sample.shape, np.uint8), sample.affine, sample.header)
    label = nibabel.load(tmp_path / "label.nii")
    assert label.header.get_intent()[0] == "none"  # labels are no vectors
    np.testing.assert_array_equal(label.affine, nibabel.load(tmp_path / "image.nii").affine)


def test_axes_of_one_voxel_at_the_end(tmp_path):
    write_nifti(tmp_path / "image.nii", np.arange(24.0).reshape(2, 3, 4, 1, 1), AFFINE)
    write_nifti(tmp_path / "label.nii", np.ones((2, 3, 4, 1), np.uint8), AFFINE)
    case = Case("case", (tmp_path / "image.nii",), tmp_path / "label.nii")
    assert [part.shape for part in read_case(case, 1, 3, 2)[:3]] == [(1, 2, 3, 4), (2, 3, 4), (2, 3, 4)]


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]], ids=["complex", "colours"])
def test_no_real_numbers(tmp_path, dtype):
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4), dtype), AFFINE), tmp_path / "image.nii")
    with pytest.raises(SegmentationError, match="image.nii: must hold real numbers"):
        read_nifti(tmp_path / "image.nii")


def test_normalised_inside_the_mask(phantom_2d):
    case = read_dataset(phantom_2d).training[0]
    sample = read_case(case, 2, 2, 5)
    inside = sample.image[:, sample.mask]
    np.testing.assert_allclose(inside.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(inside.std(1), 1, atol=1e-5)
    assert not sample.image[:, ~sample.mask].any()
    without_file = read_case(dataclasses.replace(case, mask=None), 2, 2, 5)
    np.testing.assert_array_equal(without_file.mask, sample.mask)


def rewrite(path, change):
    image = read_nifti(path)
    write_nifti(path, change(image.data), image.affine)


def at(index, value):
    def change(data):
        data = data.copy()
        data[index] = value
        return data

    return change


BAD = {
    "label": [
        (at((3, 3), 9), r"label.nii.gz: labels must be 0 to 4, got \[9\]"),
        (lambda data: data[:-1], r"label.nii.gz: must have the shape of .*image.nii.gz, \[36, 32\], got \[35, 32\]"),
    ],
    "mask": [
        (lambda data: data * 0, "mask.nii.gz: the mask is empty"),
        (lambda data: data[:, 1:], r"mask.nii.gz: must have the shape of .*image.nii.gz, \[36, 32\], got \[36, 31\]"),
    ],
    "image": [
        (lambda data: data[..., :1], "image.nii.gz: expected 2 modalities of 2 axes"),
        (lambda data: data * [1, 0], "image.nii.gz: modality 1 is constant inside the mask"),
        (at((0, 0, 0), np.nan), "image.nii.gz: must hold finite numbers"),
    ],
}


@pytest.mark.parametrize("kind, number", [(kind, i) for kind, changes in BAD.items() for i in range(len(changes))])
def test_bad_cases(phantom_2d, tmp_path, kind, number):
    good = read_dataset(phantom_2d).training[0]
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("image", "label", "mask")}
    for source, target in zip((good.images[0], good.label, good.mask), paths.values()):
        shutil.copy(source, target)
    case = Case("case", (paths["image"],), paths["label"], paths["mask"])
    read_case(case, 2, 2, 5)
    change, message = BAD[kind][number]
    rewrite(paths[kind], lambda data: np.asarray(change(data), np.float32))
    with pytest.raises(SegmentationError, match=message):
        read_case(case, 2, 2, 5)


@pytest.fixture
def placed(tmp_path):
    """A case of two modalities in a file each, a label map and a mask; a function that puts one of them elsewhere."""
    random = np.random.default_rng(0)
    paths = {name: tmp_path / f"{name}.nii" for name in ("first", "second", "label", "mask")}

    def place(name, affine):
        data = random.random((4, 5, 6), np.float32) if name in ("first", "second") else np.ones((4, 5, 6), np.uint8)
        write_nifti(paths[name], data, affine)

    for name in paths:
        place(name, AFFINE)
    return Case("case", (paths["first"], paths["second"]), paths["label"], paths["mask"]), place


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1)])
def test_a_slice_may_be_stored_as_a_volume(tmp_path, shape):
    paths = [tmp_path / f"{name}.nii" for name in ("image", "label", "mask")]
    for path, stored in zip(paths, (shape, (4, 5, 1), (4, 5))):
        write_nifti(path, np.random.default_rng(0).integers(0, 2, (4, 5), np.uint8).reshape(stored), AFFINE)
    write_nifti(paths[0], np.random.default_rng(1).random(shape, np.float32), AFFINE)
    sample = read_case(Case("case", (paths[0],), *paths[1:]), 1, 2, 2)
    assert sample.image.shape == (1, 4, 5) and sample.label.shape == sample.mask.shape == (4, 5)
    assert sample.shape == shape
    paths.append(tmp_path / "other.nii")
    write_nifti(paths[3], np.random.default_rng(2).random((4, 5, 1), np.float32), AFFINE)
    assert read_case(Case("case", (paths[0], paths[3])), 2, 2).image.shape == (2, 4, 5)
    write_nifti(paths[1], np.ones((4, 5, 2), np.uint8), AFFINE)
    with pytest.raises(
        SegmentationError, match=r"label.nii: must have the shape of .*image.nii, \[4, 5\], got \[4, 5, 2"
    ):
        read_case(Case("case", (paths[0],), *paths[1:3]), 1, 2, 2)


@pytest.mark.parametrize("name", ["second", "label", "mask"])
@pytest.mark.parametrize("wrong", ["moved", "spacing", "turned"])
def test_files_of_a_case_that_lie_elsewhere(placed, name, wrong):
    case, place = placed
    affine = AFFINE.copy()
    if wrong == "moved":
        affine[0, 3] += 0.3
    elif wrong == "spacing":
        affine[2, 2] = 3.1  # over six voxels more than half a millimetre
    else:
        affine[:, 0] *= -1
    place(name, affine)
    with pytest.raises(SegmentationError, match=f"{name}.nii: must have the affine of .*first.nii, .* mm elsewhere"):
        read_case(case, 2, 3, 2)


def test_affines_may_differ_by_rounding(placed):
    case, place = placed
    place("second", AFFINE * (1 + 1e-4))
    place("label", AFFINE + 1e-3)
    read_case(case, 2, 3, 2)


def test_a_file_that_says_nothing_of_its_place_must_have_the_spacing(placed):
    """nibabel gives it an affine of its own making."""
    case = placed[0]
    for spacing, fits in (((2.0, 1.5, 3.0), False), ((1.5, 2.0, 3.0), True)):
        image = nibabel.Nifti1Image(np.ones((4, 5, 6), np.uint8), None)
        image.header.set_zooms(spacing)
        nibabel.save(image, case.label)
        assert not nibabel.load(case.label).header["sform_code"]
        if fits:
            read_case(case, 2, 3, 2)
        else:
            with pytest.raises(SegmentationError, match=r"label.nii: must have the spacing of .*first.nii"):
                read_case(case, 2, 3, 2)


def test_an_image_of_zeros_has_no_mask(tmp_path):
    write_nifti(tmp_path / "image.nii", np.zeros((4, 4), np.float32), AFFINE)
    with pytest.raises(SegmentationError, match="image.nii: every voxel is zero"):
        read_case(Case("case", (tmp_path / "image.nii",)), 1, 2)


def test_zero_is_no_background_in_ct(tmp_path):
    """It is water there, so that a mask of nonzero voxels has holes, and so do the labels that are predicted in it."""
    noise = np.random.default_rng(0).normal(0, 20, (16, 16, 8)).round()
    body = np.zeros(noise.shape, bool)
    body[3:13, 3:13] = True
    scans = {"ct": noise + np.where(body, 0, -1000), "standardised": noise / 20 * body, "magnitude": abs(noise) * body}
    masks = {}
    for name, scan in scans.items():
        write_nifti(tmp_path / f"{name}.nii", scan.astype(np.float32), AFFINE)
        masks[name] = read_case(Case("case", (tmp_path / f"{name}.nii",)), 1, 3).mask
    assert not scans["ct"].all() and masks["ct"].all()
    for name in ("standardised", "magnitude"):
        np.testing.assert_array_equal(masks[name], scans[name] != 0)


def test_modalities_in_files_of_their_own(tmp_path):
    random = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("t1.nii", "t2.nii")]
    for path in paths:
        write_nifti(path, random.random((4, 5), np.float32), AFFINE)
    sample = read_case(Case("case", tuple(paths)), 2, 2)
    assert sample.image.shape == (2, 4, 5) and sample.label is None
    write_nifti(paths[1], random.random((4, 6), np.float32), AFFINE)
    with pytest.raises(SegmentationError, match=r"t2.nii: must have the shape of .*t1.nii, \[4, 5\], got \[4, 6\]"):
        read_case(Case("case", tuple(paths)), 2, 2)


def test_normalise_in_float64():
    """float32 sums of large numbers would not do."""
    image = (1e4 + np.random.default_rng(0).random((1, 100, 100))).astype(np.float32)
    normalised = normalise(image, np.ones((100, 100), bool), ["image"])
    assert abs(normalised.mean()) < 1e-4 and normalised.std() == pytest.approx(1, abs=1e-4)


def test_normalise_takes_one_modality_at_a_time():
    """In float64 those of a large volume together would need twice the memory of the volume."""
    image = np.random.default_rng(0).random((8, 40, 40, 40), np.float32)
    tracemalloc.start()
    try:
        normalise(image, np.ones((40, 40, 40), bool), ["image"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * image.nbytes  # of which the result is half


def test_csv_and_json_lists(tmp_path):
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["t1", "t2", "label", "split"],
                ["a/1.nii", "b/1.nii", "l/1.nii", "training"],
                ["a/2.nii", "b/2.nii", "l/2.nii", "validation"],
                ["a/3.nii", "b/3.nii", "", "test"],
            ]
        )
    entries = [
        {"image": ["a/1.nii", "b/1.nii"], "label": "l/1.nii"},
        {"image": ["a/2.nii", "b/2.nii"], "label": "l/2.nii", "split": "validation"},
        {"image": ["a/3.nii", "b/3.nii"], "split": "test"},
    ]
    files.write_json(tmp_path / "list.json", entries)
    from_csv, from_json = (read_dataset(tmp_path / f"list.{end}", ["back", "front"]) for end in ("csv", "json"))
    assert from_csv.modalities == ("t1", "t2") and from_json.modalities == ("0", "1")
    assert from_csv.labels == ("back", "front")
    assert from_csv.training == from_json.training
    assert from_csv.training == (Case("1", (tmp_path / "a/1.nii", tmp_path / "b/1.nii"), tmp_path / "l/1.nii"),)
    assert [case.name for case in from_csv.validation + from_csv.test] == ["2", "3"]
    with pytest.raises(SegmentationError, match="list.csv: a list names no labels"):
        read_dataset(tmp_path / "list.csv")
    with pytest.raises(
        SegmentationError, match="list.csv: every label must have a name of its own, got 'a' for labels"
    ):
        read_dataset(tmp_path / "list.csv", ("a", "b", "a"))
    files.write_json(tmp_path / "list.json", [{"image": [], "label": "l/1.nii"}])
    with pytest.raises(SegmentationError, match="list.json: expected one image"):
        read_dataset(tmp_path / "list.json", ["back", "front"])


def test_a_list_from_a_spreadsheet(tmp_path):
    """With the mark that these begin a text with, spaces, and files of one name in folders of their own."""
    lines = ["case, t1, t2, label", "p1, p1/t1.nii, p1/t2.nii, p1/seg.nii", "p2, p2/t1.nii, p2/t2.nii, p2/seg.nii"]
    (tmp_path / "list.csv").write_text("\r\n".join([*lines, "", ""]), encoding="utf-8-sig")
    dataset = read_dataset(tmp_path / "list.csv", ["back", "front"])
    assert dataset.modalities == ("t1", "t2") and [case.name for case in dataset.training] == ["p1", "p2"]
    assert dataset.training[1].images == (tmp_path / "p2/t1.nii", tmp_path / "p2/t2.nii")
    (tmp_path / "list.csv").write_text("\n".join(lines).replace("p1,", ",").replace("p2,", ","))
    with pytest.raises(SegmentationError, match="got seg twice; give them names"):
        read_dataset(tmp_path / "list.csv", ["back", "front"])


def test_a_list_with_blanks_and_capitals(tmp_path):
    (tmp_path / "list.csv").write_text("Case ,t1 ,Label, SPLIT\np1 ,a.nii ,b.nii ,training \n")
    dataset = read_dataset(tmp_path / "list.csv", ["back", "front"])
    assert dataset.modalities == ("t1",)
    assert dataset.training == (Case("p1", (tmp_path / "a.nii",), tmp_path / "b.nii"),)


@pytest.mark.parametrize(
    "lines, message",
    [
        ("case;t1;label\np1;a.nii;b.nii", "columns must be separated by commas, got 'case;t1;label'"),
        ("t1\tlabel\na.nii\tb.nii", "columns must be separated by commas, got 't1.+label'"),
        ("case,t1,t1 ,label\np1,a.nii,b.nii,c.nii", "every column must have a name of its own"),
        ("case,t1,label\np1,a.nii,b.nii,c.nii", "line 2 must have as many columns as the first"),
        ("case,t1,label\np1,a.nii", "line 2 must have as many columns as the first"),
    ],
)
def test_lists_that_are_none(tmp_path, lines, message):
    (tmp_path / "list.csv").write_text(lines)
    with pytest.raises(SegmentationError, match=f"list.csv: {message}"):
        read_dataset(tmp_path / "list.csv", ["back", "front"])


@pytest.mark.parametrize("cell", ["", " ", '" "'])
def test_a_list_with_an_empty_cell(tmp_path, cell):
    """Which would name the folder."""
    lines = ["case,t1,t2,label", "p1,1.nii,2.nii,l.nii", "", f"p2,3.nii,{cell},m.nii"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    with pytest.raises(SegmentationError, match='list.csv: line 4 must name a file in the column "t2"'):
        read_dataset(tmp_path / "list.csv", ["back", "front"])


@pytest.mark.parametrize("name", ["", "a\0.nii", "\ud800.nii"])
@pytest.mark.parametrize("key", ["image", "label", "mask"])
def test_names_that_no_file_can_have(tmp_path, key, name):
    files.write_json(tmp_path / "list.json", [{"image": "a.nii", "label": "b.nii", key: name}])
    message = f"list.json: cases and files must be given by names that a file can have, got .*{re.escape(repr(name))}"
    with pytest.raises(SegmentationError, match=message):
        read_dataset(tmp_path / "list.json", ["back", "front"])


@pytest.mark.parametrize("name", ["", "../p1", "a/p1", ".p1", 1, "p\0"])
def test_names_of_cases_that_are_no_names_of_files(tmp_path, name):
    files.write_json(tmp_path / "list.json", [{"image": "a.nii", "split": "test", "case": name}])
    with pytest.raises(SegmentationError, match=r"list.json: .* name"):
        read_dataset(tmp_path / "list.json", ["back", "front"])


GOOD = {
    "modality": {"0": "MR"},
    "labels": {"0": "background", "1": "organ"},
    "training": [{"image": "./i/1.nii.gz", "label": "./l/1.nii.gz"}],
    "test": ["./i/2.nii.gz"],
}


def test_decathlon(tmp_path):
    files.write_json(tmp_path / "dataset.json", GOOD)
    dataset = read_dataset(tmp_path)
    assert (dataset.modalities, dataset.labels) == (("MR",), ("background", "organ"))
    assert dataset.validation is None and dataset.test[0].images == (tmp_path / "i/2.nii.gz",)
    newer = GOOD | {"channel_names": GOOD["modality"], "labels": {"background": 0, "organ": 1}}
    del newer["modality"]
    files.write_json(tmp_path / "dataset.json", newer)
    assert read_dataset(tmp_path) == dataset


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"modality": None}, '"modality" must map'),
        ({"labels": {"0": "background", "2": "organ"}}, '"labels" must map'),
        ({"labels": {"0": "background", "1": ["organ"]}}, '"labels" must map'),
        ({"labels": {"background": 0, "organ": 1, "lesion": 1}}, '"labels" must map'),
        ({"labels": {"0": "rest", "1": "organ", "2": "organ"}}, "name of its own, got 'organ' for labels 1 and 2"),
        ({"labels": {"0": "background"}}, "must name the background and at least one more label"),
        ({"training": [], "test": []}, "must list at least one case"),
        ({"training": [{"image": "1.nii"}]}, '"training" must have an "image" and a "label"'),
        ({"training": [{"image": "1.nii", "label": None}]}, '"training" must have an "image" and a "label"'),
        ({"training": [{"image": ["1.nii", "2.nii"], "label": "3.nii"}]}, "expected one image or 1"),
        ({"training": [{"image": 3, "label": "1.nii"}]}, "files must be given by name"),
        ({"training": GOOD["training"] * 2}, "every case must be listed once, got 1 twice"),
        ({"training": [{"image": [], "label": "1.nii"}]}, "expected one image or 1"),
        ({"test": 3}, '"test" must be a list'),
    ],
)
def test_bad_descriptions(tmp_path, changes, message):
    files.write_json(tmp_path / "dataset.json", GOOD | changes)
    with pytest.raises(SegmentationError, match=f"dataset.json: .*{message}"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("split", ["train", ["test"], {"test": 1}, None])
def test_a_split_of_another_form(tmp_path, split):
    files.write_json(tmp_path / "list.json", [GOOD["training"][0] | {"split": split}])
    with pytest.raises(SegmentationError, match="list.json: split must be one of training, validation, test, got "):
        read_dataset(tmp_path / "list.json", ["background", "organ"])


@pytest.mark.parametrize(
    "shape, dims", [((4, 5), 2), ((4, 5, 1), 2), ((4, 5, 1, 1), 2), ((4, 1, 5), 3), ((4, 5, 2), 3)]
)
def test_slices_stored_as_volumes_are_for_a_network_of_two_axes(tmp_path, shape, dims):
    files.write_json(tmp_path / "dataset.json", GOOD)
    (case,) = read_dataset(tmp_path).training
    case.label.parent.mkdir(exist_ok=True)
    write_nifti(case.label, np.ones(shape, np.uint8), AFFINE)
    assert read_dataset(tmp_path).spatial_dims() == dims


def test_a_description_without_lists(tmp_path):
    files.write_json(tmp_path / "dataset.json", {key: GOOD[key] for key in ("modality", "labels")})
    with pytest.raises(SegmentationError, match='must list cases, as "training", .* got modality, labels'):
        read_dataset(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"'])
def test_no_description(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(SegmentationError, match="dataset.json: "):
        read_dataset(tmp_path, ["a", "b"])
    with pytest.raises(SegmentationError, match="nothing.csv: cannot be read"):
        read_dataset(tmp_path / "nothing.csv", ["a", "b"])


CONFIG = Config(
    "AFN-1",
    2,
    ("a", "b"),
    ("background", "organ"),
    (40, 40),
    (2, 2, 2, 2),
    dilations=(1, (2, 3)),
    branch_norm=False,
    recipe=MODERN,
)


def test_config_round_trip(tmp_path):
    write_config(tmp_path, CONFIG)
    assert read_config(tmp_path) == CONFIG
    for change, message in (
        ({"extra": 1}, "is no config of a run"),
        ({"recipe": {"lr": 1}}, "unexpected keyword"),
        ({"window": 40}, "window must be a list of int, got 40"),
        ({"labels": "background"}, "labels must be a list of str, got 'background'"),
    ):
        files.write_json(tmp_path / "config.json", dataclasses.asdict(CONFIG) | change)
        with pytest.raises(SegmentationError, match=f"config.json: .*{message}"):
            read_config(tmp_path)


def test_branch_norm_of_a_config():
    counts = {}
    for branch_norm in (True, False):
        network = build_network(dataclasses.replace(CONFIG, branch_norm=branch_norm))
        counts[branch_norm] = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert counts[True] - counts[False] == 1  # two dilations


def test_load_model_of_a_run(tmp_path):
    network = build_network(CONFIG)
    write_config(tmp_path, CONFIG)
    files.write_checkpoint(tmp_path / "last.pt", {"model": network.state_dict()})
    for path in (tmp_path, tmp_path / "last.pt"):
        loaded, config = load_model(path)
        assert config == CONFIG and not loaded.training
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(SegmentationError, match="last.pt: is a checkpoint of AFN-1, not of Basic"):
        load_model(tmp_path, "Basic")
    files.write_checkpoint(
        tmp_path / "best.pt", {"model": build_network(CONFIG).state_dict() | {"more": torch.ones(1)}}
    )
    with pytest.raises(SegmentationError, match="best.pt: is no checkpoint of this network"):
        load_model(tmp_path)


@pytest.mark.parametrize("arch", ["Basic", "ASPP-c", "ASPP-s", "AFN-6"])
def test_load_model_of_the_authors(tmp_path, arch):
    network = networks.build(arch, in_channels=3, num_classes=4)
    weights = {f"module.{name}": value for name, value in networks.original_state_dict(network).items()}
    torch.save({"state_dict": weights}, tmp_path / "original.pth")
    loaded, config = load_model(tmp_path / "original.pth", arch)
    assert len(config.modalities) == 3 and len(config.labels) == 4 and config.window == (75, 75, 75)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(SegmentationError, match="original.pth: has no config.json of a run beside it"):
        load_model(tmp_path / "original.pth")
    with pytest.raises(SegmentationError, match="original.pth: "):
        load_model(tmp_path / "original.pth", "AFN-2")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("fc.weight", torch.tensor(1.0), "fc.weight must have 5 axes, as conv1.weight, got []"),
        ("fc.weight", torch.zeros(0, 50, 1, 1, 1), "num_classes must be at least 1, got 0"),
        ("conv1.weight", torch.zeros(30, 0, 3, 3, 3), "in_channels must be at least 1, got 0"),
    ],
)
def test_weights_of_the_authors_of_no_shape(tmp_path, name, value, message):
    weights = networks.original_state_dict(networks.build("AFN-1"))
    torch.save(weights | {name: value}, tmp_path / "original.pth")
    with pytest.raises(SegmentationError, match=re.escape(f"original.pth: {message}")):
        load_model(tmp_path / "original.pth", "AFN-1")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04" * 20])
def test_no_checkpoint(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(SegmentationError, match="model.pt: "):
        load_model(tmp_path / "model.pt", "AFN-6")
    with pytest.raises(SegmentationError, match="nothing.pt: cannot be read as a checkpoint: No such file"):
        load_model(tmp_path / "nothing.pt", "AFN-6")


def test_a_fingerprint_is_of_what_a_file_holds(tmp_path):
    image, other = np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.arange(1, 25, dtype=np.int16).reshape(2, 3, 4)
    packed, plain = tmp_path / "a.nii.gz", tmp_path / "a.nii"
    for path, bytes_of in ((packed, gzip.compress), (plain, bytes)):
        values = [bytes_of(nibabel.Nifti1Image(array, np.eye(4)).to_bytes()) for array in (image, other)]
        marks = []
        for content in (*values, values[0]):
            path.write_bytes(content)
            marks.append(files.fingerprint_of(path))
        assert marks[0] == marks[2] != marks[1]
    packed.write_bytes(gzip.compress(nibabel.Nifti1Image(image, np.eye(4)).to_bytes(), compresslevel=1))
    again = files.fingerprint_of(packed)
    packed.write_bytes(gzip.compress(nibabel.Nifti1Image(image, np.eye(4)).to_bytes(), compresslevel=9))
    assert files.fingerprint_of(packed) == again  # packed anew
    packed.write_bytes(b"")
    assert files.fingerprint_of(packed) == ""
    with pytest.raises(SegmentationError, match="nothing.nii.gz: cannot be read"):
        files.fingerprint_of(tmp_path / "nothing.nii.gz")
