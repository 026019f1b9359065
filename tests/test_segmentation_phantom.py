"""The phantom: what its classes differ in, and the data set it is written as."""

import json

import numpy as np
import pytest
from scipy import ndimage

from autofocus_kernels.segmentation.dataset import read_case, read_dataset
from autofocus_kernels.segmentation.files import SegmentationError, read_labels, read_nifti
from autofocus_kernels.segmentation.phantom import LABELS, SITES, make_case, make_phantom


def cases(count, size=(128, 128), site="A", modalities=2):
    generator = np.random.default_rng(0)
    return [make_case(generator, size, [1.0] * len(size), modalities, SITES[site]) for _ in range(count)]


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_phantom(tmp_path / name, cases=2, seed=seed, size=(30, 24), dims=2)
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert first["imagesTr/A_000.nii.gz"] != other["imagesTr/A_000.nii.gz"]


def test_classes_of_one_look_differ_in_size():
    volumes = {name: [] for name in LABELS}
    for case in cases(8):
        for value, name in enumerate(LABELS[1:], start=1):
            parts, count = ndimage.label(case.label == value)
            volumes[name] += [v for v in np.bincount(parts.flat)[1 : count + 1] if v > 3]  # not the odd loose pixel
    assert max(volumes["small"]) < min(volumes["medium"])
    assert max(volumes["medium"]) < min(volumes["large"])


def test_intensity_tells_the_bright_class_only():
    """Of a threshold on one modality, how well two classes can be told apart at best: the area under its curve."""

    def separation(first, second):
        return max(abs(_auc(f, s) - 0.5) + 0.5 for f, s in zip(first.T, second.T))

    voxels = {}
    for value in range(1, 5):
        voxels[LABELS[value]] = np.concatenate(
            [case.image[case.label == value] / case.image[case.mask > 0].mean(0) for case in cases(12, size=(96, 96))]
        )
    for other in ("small", "medium"):
        assert separation(voxels[other], voxels["large"]) < 0.65
    assert 0.9 < separation(voxels["bright"], voxels["large"]) < 1


def _auc(first, second):
    ranks = np.concatenate([first, second]).argsort().argsort()
    return (ranks[: len(first)].sum() - len(first) * (len(first) - 1) / 2) / (len(first) * len(second))


def test_site_b_shifts_contrast_noise_and_size():
    def measure(site):
        contrast, noise, area = [], [], []
        for case in cases(6, site=site):
            image = case.image[..., 0] / case.image[..., 0][case.mask > 0].mean()
            contrast.append(image[case.label == 3].mean() - image[(case.label == 0) & (case.mask > 0)].mean())
            noise.append((image - ndimage.median_filter(image, 5))[case.mask > 0].std())
            area.append(case.mask.mean())
        return np.mean(contrast), np.mean(noise), np.mean(area)

    (contrast_a, noise_a, area_a), (contrast_b, noise_b, area_b) = measure("A"), measure("B")
    assert contrast_b < 0.9 * contrast_a and noise_b > 1.2 * noise_a
    assert area_b == pytest.approx(area_a / 1.25**2, rel=0.1)


def test_layout(phantom_2d):
    dataset = read_dataset(phantom_2d)
    assert dataset.labels == LABELS and len(dataset.modalities) == 2
    assert len(dataset.training) == 6 and len(dataset.test) == 2 and dataset.spatial_dims() == 2
    case = dataset.training[0]
    image = read_nifti(case.images[0])
    assert image.data.shape == (36, 32, 2)
    np.testing.assert_array_equal(read_labels(case.mask).data != 0, (image.data != 0).any(-1))
    assert (phantom_2d / "phantom.png").stat().st_size > 10000
    description = json.loads((phantom_2d / "dataset.json").read_text())
    assert description["numTraining"] == 6 and description["modality"] == {"0": "modality 0", "1": "modality 1"}


def test_monai_reads_it(phantom_3d):
    from monai.data import load_decathlon_datalist

    items = load_decathlon_datalist(str(phantom_3d / "dataset.json"), True, "training")
    assert items[0]["image"] == str(phantom_3d / "imagesTr" / "A_000.nii.gz")


def test_anisotropic_volumes(phantom_3d):
    case = read_dataset(phantom_3d).training[0]
    assert read_nifti(case.images[0]).data.shape == (24, 26, 10, 2)
    assert read_labels(case.label).header.get_zooms() == (1, 1, 3)
    assert read_case(case, 2, 3, 5).image.shape == (2, 24, 26, 10)


def test_one_modality_and_the_spacing_of_b(tmp_path):
    make_phantom(tmp_path, cases=2, size=(20, 24), dims=2, site="B", modalities=1)
    image = read_nifti(tmp_path / "imagesTr" / "B_000.nii.gz")
    assert image.data.shape == (20, 24) and image.header.get_zooms() == (1.25, 1.25)


def test_a_data_set_is_not_overwritten(phantom_2d):
    before = contents(phantom_2d)
    with pytest.raises(SegmentationError, match="is there already"):
        make_phantom(phantom_2d, cases=2, dims=2)
    assert contents(phantom_2d) == before


@pytest.mark.parametrize(
    "argument, value", [("dims", 4), ("site", "C"), ("cases", 0), ("seed", -1), ("modalities", 0), ("size", (20,))]
)
def test_errors_name_the_argument(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        make_phantom(tmp_path / "new", **{"cases": 2, "dims": 2, argument: value})
    assert not (tmp_path / "new").exists()
