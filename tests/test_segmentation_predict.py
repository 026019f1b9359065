"""Tilings against the network on the whole volume, and the files that predict writes, keeps and refuses."""

import dataclasses
import errno
import logging
import os
import shutil
import signal
import tempfile

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.segmentation_runs import in_process, kill_before_file, rewrite_header
from matplotlib.figure import Figure
from torch import nn

from autofocus_kernels import networks
from autofocus_kernels.segmentation import __main__ as command
from autofocus_kernels.segmentation import pictures
from autofocus_kernels.segmentation import predict as predict_module
from autofocus_kernels.segmentation.files import write_atomic, write_checkpoint, write_json
from autofocus_kernels.segmentation.predict import predict
from autofocus_kernels.segmentation.run import Config, build_network, write_config
from autofocus_kernels.segmentation.windows import Windows

CPU = torch.device("cpu")
SMALL = {"widths": (3, 4, 4, 3), "dilations": (1, 2, 3)}  # crop 16
CONFIG = Config("AFN-2", 2, modalities=("T1", "T2"), labels=("background", "organ", "lesion"), window=(26, 26), **SMALL)


def randomise(network):
    """Weights and running statistics with which logits differ from voxel to voxel."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
        elif hasattr(module, "weight"):
            fan_in = module.weight[0].numel()
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
    return network.eval()


def make(name, dims=2, padding="valid"):
    torch.manual_seed(0)
    widths = (*SMALL["widths"], 3) if name.startswith("ASPP") else SMALL["widths"]
    options = {"widths": widths, "dilations": SMALL["dilations"], "padding": padding}
    return randomise(networks.build(name, 2, 3, dims, **options))


def volume(*size):
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(2))


def whole(image):
    return tuple(slice(0, size) for size in image.shape[1:])


@torch.inference_mode()
def direct(network, image):
    """The network over the whole volume at once, zeros around it."""
    pads = [crop // 2 for crop in reversed(network.crop) for _ in range(2)]
    return network(F.pad(image[None], pads))[0]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("tiling", ["published", "gaussian"])
@pytest.mark.parametrize("size,window", [((30, 25), (26, 23)), ((9, 12, 11), (21, 22, 24))], ids=["2D", "3D"])
def test_without_padded_branches_any_tiling_equals_the_whole_volume(tiling, size, window):
    network, image = make("Basic", len(size)), volume(*size)
    prediction = Windows(network, window, tiling, CPU)(image, whole(image))
    close(prediction.logits, direct(network, image))


def test_a_box_inside_the_volume_reads_its_surroundings():
    network, image = make("Basic"), volume(40, 40)
    box = (slice(13, 30), slice(4, 25))
    prediction = Windows(network, (24, 25), "published", CPU)(image, box)
    close(prediction.logits, direct(network, image)[(slice(None), *box)])


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("name", ["AFN-6", "ASPP-s"])
def test_gaussian_with_a_window_as_large_as_the_volume_is_the_network_itself(name, padding):
    network, image = make(name, padding=padding), volume(20, 23)
    window = [size + crop for size, crop in zip((20, 23), network.crop)]
    close(Windows(network, window, "gaussian", CPU)(image, whole(image)).logits, direct(network, image))


def test_in_an_autofocus_layer_only_voxels_near_the_border_of_a_window_depend_on_it():
    network, image = make("AFN-1"), volume(60, 20)
    tiled = Windows(network, (30 + 16, 20 + 16), "published", CPU)(image, whole(image)).logits
    difference = (tiled - direct(network, image)).abs().amax(dim=(0, 2))
    # The last layer's largest branch, dilation 3, pads 2 voxels on either side of each window.
    near = [28, 29, 30, 31]
    far = [row for row in range(60) if row not in near]
    assert difference[near].min() > 1e-3 > 1e-4 > difference[far].max()


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_box_of_a_multiple_of_the_tile_is_covered_to_its_last_voxel(tiles):
    network = make("Basic")
    image, tile = volume(10 * tiles, 10 * tiles), 10
    prediction = Windows(network, (tile + 16, tile + 16), "published", CPU)(image, whole(image))
    assert prediction.logits.shape == (3, 10 * tiles, 10 * tiles)
    close(prediction.logits[:, -1], direct(network, image)[:, -1])


def test_published_tiles_do_not_overlap_and_gaussian_ones_do():
    network, image, places = make("Basic"), volume(20, 25), []
    network.register_forward_hook(lambda module, input, output: places.append(tuple(output.shape[2:])))
    Windows(network, (26, 26), "published", CPU)(image, whole(image))
    assert places == [(10, 10)] * 2 * 3
    places.clear()
    Windows(network, (26, 26), "gaussian", CPU)(image, whole(image))
    assert places == [(10, 10)] * 3 * 4


@pytest.mark.parametrize("tiling", ["published", "gaussian"])
def test_attention_is_that_of_the_layer(tiling):
    network, image = make("AFN-2"), volume(21, 18)
    seen = {}
    for name in ("layer1", "layer2"):
        gate = getattr(network.blocks[2], name).attention
        gate.register_forward_hook(lambda module, input, output, name=name: seen.update({name: output[0]}))
    direct(network, image)
    first, second = seen["layer1"][:, 1:-1, 1:-1], seen["layer2"]  # the first is larger by what the second crops
    seen.clear()
    prediction = Windows(network, (21 + 16, 18 + 16), tiling, CPU)(image, whole(image), attention=True)
    assert list(prediction.attention) == ["blocks.2.layer1", "blocks.2.layer2"]
    close(prediction.attention["blocks.2.layer1"], first)
    close(prediction.attention["blocks.2.layer2"], second)
    layers = (network.blocks[2].layer1, network.blocks[2].layer2)
    assert [len(layer.attention._forward_hooks) for layer in layers] == [1, 1]  # those above alone


def fail_above(monkeypatch, network, size, error=torch.OutOfMemoryError):
    """Makes the network run out of memory on inputs of more voxels than ``size`` along an axis."""
    forward = network.forward

    def limited(input):
        if input.shape[2] > size:
            raise error("DefaultCPUAllocator: can't allocate memory")
        return forward(input)

    monkeypatch.setattr(network, "forward", limited)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_takes_smaller_windows_and_stays_with_them(monkeypatch, caplog, error):
    network, image = make("Basic"), volume(40, 40)
    expected = direct(network, image)
    fail_above(monkeypatch, network, 30, error)
    windows = Windows(network, (56, 56), "published", CPU)
    with caplog.at_level(logging.WARNING):
        close(windows(image, whole(image)).logits, expected)
        windows(image, whole(image))
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory on cpu with windows of 56 x 56 voxels: from here on windows of 36 x 36 on cpu",
        "out of memory on cpu with windows of 36 x 36 voxels: from here on windows of 26 x 26 on cpu",
    ]


def test_out_of_memory_on_a_device_ends_on_the_cpu(monkeypatch, caplog):
    network, image = make("Basic"), volume(40, 40)
    expected = direct(network, image)
    # "meta" stands for a GPU: whatever runs there fails, here with an error of the kind that a GPU's would be.
    windows = Windows(network, (56, 56), "published", torch.device("meta"))
    run = windows._run

    def planted(image, box, attention, device, tile):
        if device.type == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(image, box, attention, device, tile)

    monkeypatch.setattr(windows, "_run", planted)
    monkeypatch.setattr(network, "to", lambda device: network)
    close(windows(image, whole(image)).logits, expected)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "from here on windows of 36 x 36 on meta",
        "from here on windows of 26 x 26 on meta",
        "from here on windows of 56 x 56 on cpu",
    ]


def test_memory_that_suffices_for_no_window_is_an_error(monkeypatch):
    network, image = make("Basic"), volume(40, 40)
    fail_above(monkeypatch, network, 0)
    with pytest.raises(MemoryError, match="out of memory on cpu with windows of 26 x 26 voxels"):
        Windows(network, (56, 56), "published", CPU)(image, whole(image))


def test_other_errors_are_no_lack_of_memory(monkeypatch):
    network, image = make("Basic"), volume(40, 40)
    monkeypatch.setattr(network, "forward", lambda input: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        Windows(network, (56, 56), "published", CPU)(image, whole(image))


@pytest.mark.parametrize("window", [(16, 40), (40,), (40, 40, 40)])
def test_windows_that_are_none(window):
    with pytest.raises(ValueError, match=r"window must be 2 sizes above \[16, 16\]"):
        Windows(make("Basic"), window, "published", CPU)


@pytest.fixture
def run(tmp_path):
    """A run's folder, as training leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, CONFIG)
    write_checkpoint(folder / "best.pt", {"model": randomise(build_network(CONFIG)).state_dict()})
    return folder


@pytest.fixture
def quick_pictures(monkeypatch):
    """Those that nobody looks at take most of a test's time."""

    def write_overlay(path, *_):
        write_atomic(path, lambda file: file.write(pictures._SOFTWARE.encode()))

    monkeypatch.setattr(predict_module, "write_overlay", write_overlay)


ROTATED = np.array([[0.0, 0.0, -2.0, 10.0], [0.9, 0.3, 0.0, -5.0], [-0.4, 0.7, 0.0, 3.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.fixture
def images(tmp_path):
    """Two images of two modalities, zero outside a disc."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows, columns = np.mgrid[:28, :24]
    disc = (rows - 13) ** 2 + (columns - 12) ** 2 < 100
    for name, seed in (("a", 0), ("b", 1)):
        image = np.random.default_rng(seed).normal(100, 20, (28, 24, 2)) * disc[..., None]
        nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), ROTATED), folder / f"{name}.nii.gz")
    return folder


def labels_of(path):
    return np.asarray(nibabel.load(path).dataobj)


def test_a_folder_is_segmented_inside_the_masks(run, images, tmp_path):
    files = predict(run, images, tmp_path / "out")
    assert [file.name for file in files] == ["a.nii.gz", "b.nii.gz"]
    for file in files:
        mask = labels_of(images / file.name).any(axis=-1)
        labels = labels_of(file)
        assert labels.dtype == np.uint8 and labels.shape == (28, 24)
        assert len(np.unique(labels)) > 1 and not labels[~mask].any()
        assert file.with_name(file.name.replace(".nii.gz", ".png")).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("quick_pictures")
def test_gaussian_predicts_outside_the_mask_too(run, images, tmp_path):
    (file, _) = predict(run, images, tmp_path / "out", tiling="gaussian")
    rows = labels_of(images / "a.nii.gz").any(axis=(1, 2))
    assert rows.any() and labels_of(file)[~rows].any()  # not only outside the mask, but outside the box around it


def test_affine_spacing_and_codes_are_those_of_the_image(tmp_path):
    config = dataclasses.replace(CONFIG, arch="Basic", spatial_dims=3, modalities=("CT",), window=(24, 24, 24))
    run, image = tmp_path / "run", tmp_path / "scan.nii"
    run.mkdir()
    write_config(run, config)
    write_checkpoint(run / "best.pt", {"model": randomise(build_network(config)).state_dict()})
    source = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32), ROTATED)
    source.header.set_xyzt_units("mm")
    source.set_sform(ROTATED, code="scanner")
    nibabel.save(source, image)
    (file,) = predict(run, image, tmp_path / "out")
    result = nibabel.load(file)
    np.testing.assert_allclose(result.affine, ROTATED, atol=1e-6)
    assert result.shape == (9, 8, 7)
    assert result.header.get_zooms() == nibabel.load(image).header.get_zooms()
    assert (int(result.header["sform_code"]), result.header.get_xyzt_units()[0]) == (1, "mm")


@pytest.mark.filterwarnings("error")  # of matplotlib, when the legend leaves no room for the picture
def test_a_picture_has_room_beside_the_names_of_many_labels(tmp_path, monkeypatch):
    legends = []
    legend = Figure.legend
    monkeypatch.setattr(Figure, "legend", lambda *args, **options: legends.append(options) or legend(*args, **options))
    labels = np.zeros((20, 20), np.uint16)
    labels.flat[:300] = np.arange(300)
    labels[-3:] = 299
    pictures.write_overlay(
        tmp_path / "a.png", np.ones((20, 20)), labels, np.eye(4), dict(enumerate(map(str, range(300))))
    )
    assert [handle.get_label() for handle in legends[0]["handles"]] == [*map(str, range(1, 20)), "299", "279 more"]


def test_a_picture_numbers_slices_as_the_file_does(tmp_path, monkeypatch):
    """Whichever way its axes run."""
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    labels = np.zeros((9, 8, 7), np.uint8)
    labels[1, 2, 3] = 1
    for affine in (np.eye(4), np.diag([-1, -1, 1, 1]), ROTATED):
        pictures.write_overlay(tmp_path / "a.png", np.ones(labels.shape), labels, affine, {1: "one"})
    titles = [sorted(axes.get_title().split(", ")[-1] for axes in figure.axes[:3]) for figure in figures]
    assert titles == [["slice 1", "slice 2", "slice 3"]] * 3
    assert figures[1].axes[0].get_title() == "sagittal, slice 1"


def test_a_name_of_a_label_is_no_formula(tmp_path):
    labels = np.eye(6, dtype=np.uint8)
    pictures.write_overlay(tmp_path / "a.png", np.ones((6, 6)), labels, np.eye(4), {1: r"$\frac$"})


@pytest.mark.usefixtures("quick_pictures")
def test_more_labels_than_eight_bits_hold(images, tmp_path):
    config = dataclasses.replace(CONFIG, labels=tuple(map(str, range(300))))
    network = randomise(build_network(config))
    network.head.bias.data[299] += 100
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", config)
    write_checkpoint(tmp_path / "run" / "best.pt", {"model": network.state_dict()})
    for _ in range(2):  # the second finds what the first has written
        (file,) = predict(tmp_path / "run", images / "a.nii.gz", tmp_path / "out")
    labels = labels_of(file)
    assert labels.dtype == np.uint16 and set(np.unique(labels)) == {0, 299}


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.parametrize("trained, warned", [((), False), (("SR", "AI"), False), (("AS", "RA"), True)])
def test_an_image_whose_axes_run_as_none_in_training_is_warned_of(run, images, tmp_path, caplog, trained, warned):
    data = labels_of(images / "a.nii.gz")
    affine = np.array([[0, 1.0, 0, 0], [0, 0, 1, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])  # upwards, and to the right
    nibabel.save(nibabel.Nifti1Image(data, affine), images / "a.nii.gz")
    write_config(run, dataclasses.replace(CONFIG, orientations=trained))
    predict(run, images / "a.nii.gz", tmp_path / "out")
    assert caplog.messages == warned * [
        f"{images / 'a.nii.gz'}: its axes run SR, those of the images of training AS, RA; nothing is turned, so the "
        "network sees this one mirrored or turned"
    ]


@pytest.mark.usefixtures("quick_pictures")
def test_images_without_masks_are_warned_of_where_training_had_some(run, images, tmp_path, caplog):
    """They are normalised inside another mask."""
    predict(run, images, tmp_path / "out")
    assert not caplog.messages
    write_config(run, dataclasses.replace(CONFIG, masks=True))
    predict(run, images, tmp_path / "out", overwrite=True)
    assert caplog.messages == [
        f"{images / 'a.nii.gz'}: has no mask file, as the cases of training had (2 such in all); it is normalised, and "
        "segmented, inside the mask that its voxels give"
    ]
    caplog.clear()
    mask = images.parent / "mask.nii"
    nibabel.save(nibabel.Nifti1Image(labels_of(images / "a.nii.gz").any(-1).astype(np.uint8), ROTATED), mask)
    entries = [{"image": str(images / "a.nii.gz"), "mask": str(mask), "split": "test"}]
    write_json(tmp_path / "list.json", entries)
    predict(run, tmp_path / "list.json", tmp_path / "masked")
    assert not caplog.messages


def test_attention_as_files(run, images, tmp_path):
    out = tmp_path / "out"
    predict(run, images / "a.nii.gz", out, attention=True)
    mask = labels_of(images / "a.nii.gz").any(axis=-1)
    rows, columns = (slice(axis.min(), axis.max() + 1) for axis in np.nonzero(mask))
    for layer in ("blocks.2.layer1", "blocks.2.layer2"):
        weights = labels_of(out / "attention" / "a" / f"{layer}_weights.nii.gz")
        assert weights.shape == (28, 24, 3)
        np.testing.assert_allclose(weights[rows, columns].sum(axis=-1), 1, atol=1e-5)
        dilation = labels_of(out / "attention" / "a" / f"{layer}_dilation.nii.gz")
        expected = np.zeros((28, 24))
        expected[rows, columns] = 1 + weights[rows, columns].argmax(axis=-1)  # the dilations are 1, 2, 3
        np.testing.assert_array_equal(dilation, expected)
    assert (out / "attention" / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [(28, 24), (28, 24, 1)])
def test_a_slice_stored_as_a_volume_keeps_its_shape(tmp_path, shape):
    config = dataclasses.replace(CONFIG, modalities=("CT",))
    run, image = tmp_path / "run", tmp_path / "in" / "a.nii.gz"
    for folder in (run, image.parent):
        folder.mkdir()
    write_config(run, config)
    write_checkpoint(run / "best.pt", {"model": randomise(build_network(config)).state_dict()})
    pixels = np.random.default_rng(0).normal(100, 20, (28, 24)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(pixels.reshape(shape), ROTATED), image)
    (file,) = predict(run, image.parent, tmp_path / "out", attention=True)
    weights, dilation = (
        tmp_path / f"out/attention/a/blocks.2.layer1_{kind}.nii.gz" for kind in ("weights", "dilation")
    )
    assert [labels_of(path).shape for path in (file, weights, dilation)] == [shape, (*shape, 3), shape]


@pytest.mark.usefixtures("quick_pictures")
def test_what_is_there_is_kept_and_what_is_missing_made(run, images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = predict_module.write_nifti

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_until_full(path, *arguments):
        with pytest.MonkeyPatch.context() as disk:
            if path.name == "b.nii.gz":
                disk.setattr("os.fsync", no_space)
            write(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "write_nifti", write_until_full)
        with pytest.raises(ValueError, match="b.nii.gz: cannot be written: No space left on device"):
            predict(run, images, out)
    assert sorted(path.name for path in out.iterdir()) == ["a.nii.gz", "a.png", "b.png"]
    before = (out / "a.nii.gz").stat().st_mtime_ns
    predict(run, images, out)
    assert (out / "b.nii.gz").exists()
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    predict(run, images, out, overwrite=True)
    assert (out / "a.nii.gz").stat().st_mtime_ns > before


def test_a_folder_that_takes_no_files_is_found_before_the_work(run, images, tmp_path, monkeypatch):
    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(predict_module, "read_case", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match="out: cannot be written to: Read-only file system"):
        predict(run, images, tmp_path / "out")


def killed_at_file(number, run, images, out):
    kill_before_file(number)
    predict(run, images, out)


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.parametrize("number", [2, 3])
def test_a_killed_call_goes_on(run, images, tmp_path, number):
    """Each case is a picture and then a label file."""
    assert in_process(killed_at_file, number, run, images, tmp_path / "out") == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["a.nii.gz"][: number // 3]
    predict(run, images, tmp_path / "out")
    predict(run, images, tmp_path / "expected")
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "expected")]
    assert contents[0] == contents[1] and len(contents[0]) == 4


@pytest.mark.usefixtures("quick_pictures")
def test_label_files_of_another_origin_are_neither_kept_nor_lost(run, images, tmp_path):
    out = tmp_path / "out"
    predict(run, images, out)
    before = (out / "a.nii.gz").read_bytes()
    with pytest.raises(ValueError, match="a.nii.gz: is there already, and not of this model, tiling, window and"):
        predict(run, images, out, tiling="gaussian")
    network = build_network(CONFIG)  # trained on, say
    write_checkpoint(run / "best.pt", {"model": network.state_dict()})
    with pytest.raises(ValueError, match="a.nii.gz: is there already"):
        predict(run, images, out)
    assert (out / "a.nii.gz").read_bytes() == before
    predict(run, images, out, overwrite=True)
    assert (out / "a.nii.gz").read_bytes() != before
    (out / "b.nii.gz").unlink()
    truth = nibabel.Nifti1Image(np.zeros((28, 24), np.uint8), ROTATED)  # somebody's
    truth.header["descrip"] = "d\xe9crit".encode("latin-1")  # not in UTF-8
    nibabel.save(truth, out / "b.nii.gz")
    with pytest.raises(ValueError, match="b.nii.gz: is there already"):
        predict(run, images, out)


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.parametrize("changed", ["image", "mask"])
def test_label_files_of_another_image_of_that_name_are_not_taken_for_its_own(run, images, tmp_path, changed):
    mask = tmp_path / "mask.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((28, 24), np.uint8), ROTATED), mask)
    entry = {"image": str(images / "a.nii.gz"), "mask": str(mask), "case": "a", "split": "test"}
    write_json(tmp_path / "list.json", [entry])
    out = tmp_path / "out"
    predict(run, tmp_path / "list.json", out)
    predict(run, tmp_path / "list.json", out)
    if changed == "image":
        shutil.copy(images / "b.nii.gz", images / "a.nii.gz")
    else:
        nibabel.save(nibabel.Nifti1Image(np.eye(28, 24, dtype=np.uint8), ROTATED), mask)
    with pytest.raises(ValueError, match="a.nii.gz: is there already, and not of .* image"):
        predict(run, tmp_path / "list.json", out)
    predict(run, tmp_path / "list.json", out, overwrite=True)
    assert len(nibabel.load(out / "a.nii.gz").header["descrip"].item()) < 80


def test_a_case_without_its_attention_is_not_complete(run, images, tmp_path, monkeypatch):
    predict(run, images / "a.nii.gz", tmp_path / "out")
    predict(run, images / "a.nii.gz", tmp_path / "out", attention=True)
    assert (tmp_path / "out" / "attention" / "a.png").exists()
    monkeypatch.setattr(Windows, "segment", lambda *_: pytest.fail("predicted again"))
    predict(run, images / "a.nii.gz", tmp_path / "out", attention=True)


def test_inputs_are_not_overwritten(run, images):
    before = (images / "a.nii.gz").read_bytes()
    with pytest.raises(ValueError, match="a.nii.gz: is an input"):
        predict(run, images, images, overwrite=True)
    assert (images / "a.nii.gz").read_bytes() == before


@pytest.mark.usefixtures("quick_pictures")
def test_pictures_of_others_are_not_overwritten(run, images, tmp_path):
    picture = tmp_path / "out" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(b"mine")
    with pytest.raises(ValueError, match="a.png: is there already, and no picture of a prediction"):
        predict(run, images, tmp_path / "out")
    assert picture.read_bytes() == b"mine"
    predict(run, images, tmp_path / "out", overwrite=True)
    assert picture.read_bytes() != b"mine"


@pytest.mark.parametrize("name", ["b.nii.gz", "b.png"])
def test_a_pipe_in_the_place_of_an_output_is_refused_before_the_work(run, images, tmp_path, name):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / name)
    with pytest.raises(ValueError, match=f"{name}: must be a file to write, and is no regular file"):
        predict(run, images, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.usefixtures("quick_pictures")
def test_a_data_set_gives_its_test_cases(run, phantom_2d, tmp_path):
    config = dataclasses.replace(CONFIG, labels=tuple("01234"))
    write_config(run, config)
    write_checkpoint(run / "best.pt", {"model": randomise(build_network(config)).state_dict()})
    dataset = predict_module.read_dataset(phantom_2d)
    files = predict(run, phantom_2d, tmp_path / "out")
    assert [file.name for file in files] == [f"{case.name}.nii.gz" for case in dataset.test]


@pytest.fixture
def paired(images, tmp_path):
    """The same images with a file a modality, those of a case in its folder, and a list of them for tests alone."""
    for case in ("a", "b"):
        (tmp_path / "paired" / case).mkdir(parents=True)
        image = nibabel.load(images / f"{case}.nii.gz")
        for index, name in enumerate(CONFIG.modalities):
            one = nibabel.Nifti1Image(image.get_fdata(dtype=np.float32)[..., index], ROTATED)
            nibabel.save(one, tmp_path / "paired" / case / f"{name}.nii")
    path = tmp_path / "paired" / "list.csv"
    path.write_text("case,T1,T2,split\na,a/T1.nii,a/T2.nii,test\nb,b/T1.nii,b/T2.nii,test\n")
    return path


@pytest.mark.usefixtures("quick_pictures")
def test_a_list_of_test_cases_with_a_file_a_modality(run, images, paired, tmp_path):
    files = predict(run, paired, tmp_path / "out")
    assert [file.name for file in files] == ["a.nii.gz", "b.nii.gz"]
    for file, expected in zip(files, predict(run, images, tmp_path / "expected")):
        np.testing.assert_array_equal(labels_of(file), labels_of(expected))


@pytest.mark.parametrize("names", [("T2", "T1"), ("t2", "t1"), ("T2", "FLAIR"), ("FLAIR", "T1")], ids=",".join)
def test_modalities_in_another_order_than_in_training(run, paired, tmp_path, names):
    paired.write_text(f"case,{','.join(names)},split\na,a/T2.nii,a/T1.nii,test\n")
    message = f"list.csv: modalities must be in the order of training, T1, T2, got {', '.join(names)}"
    with pytest.raises(ValueError, match=message):
        predict(run, paired, tmp_path / "out")


def test_labels_in_another_order_than_in_training(run, images, tmp_path):
    labels = {str(i): name for i, name in enumerate(reversed(CONFIG.labels))}
    write_json(images / "dataset.json", {"modality": {"0": "T1", "1": "T2"}, "labels": labels, "test": ["./a.nii.gz"]})
    with pytest.raises(ValueError, match="dataset.json: labels must be in the order of training"):
        predict(run, images, tmp_path / "out")


@pytest.mark.usefixtures("quick_pictures")
def test_a_description_without_cases_for_training(run, images, tmp_path):
    labels = {str(i): name for i, name in enumerate(CONFIG.labels)}
    description = {"modality": {"0": "T1", "1": "T2"}, "labels": labels, "test": ["./a.nii.gz"]}
    write_json(images / "dataset.json", description)
    assert [file.name for file in predict(run, images, tmp_path / "out")] == ["a.nii.gz"]


@pytest.mark.usefixtures("quick_pictures")
def test_what_other_systems_leave_beside_the_images_is_passed_over(run, images, tmp_path):
    (images / "._a.nii.gz").write_bytes(b"\0\5\x16\7")
    assert len(predict(run, images, tmp_path / "out")) == 2


def test_an_original_checkpoint_by_the_command(images, tmp_path, capsys):
    network = randomise(networks.build("AFN-1", 2, 3, 2))
    torch.save({"state_dict": networks.original.original_state_dict(network)}, tmp_path / "original.pth")
    arguments = ["--model", str(tmp_path / "original.pth"), "--arch", "AFN-1", "--device", "cpu", "--window", "60"]
    arguments += ["--input", str(images), "--output", str(tmp_path / "out")]
    assert command.main(["predict", *arguments]) == 0
    assert f"2 cases in {tmp_path / 'out'}" in capsys.readouterr().out


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def damage(path, kind):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "nan":
        image = np.full((28, 24, 2), np.nan, np.float32)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), path)
    elif kind == "modalities":
        nibabel.save(nibabel.Nifti1Image(np.ones((28, 24, 3), np.float32), np.eye(4)), path)
    elif kind == "singular":
        rewrite_header(path, "srow_z", 0, 0)  # the first axis of ROTATED runs along y and z
        rewrite_header(path, "srow_y", 0, 0)
    elif kind == "empty":
        nibabel.save(nibabel.Nifti1Image(np.zeros((28, 24, 2), np.float32), np.eye(4)), path)


@pytest.mark.parametrize(
    "kind,message",
    [
        ("truncated", "cannot be read"),
        ("nan", "voxels are NaN or infinite"),
        ("modalities", "expected 2 modalities"),
        ("singular", "must have an affine of finite numbers"),
        ("empty", "every voxel is zero"),
    ],
)
def test_a_bad_image_ends_the_command_and_keeps_what_was_done(run, images, tmp_path, capsys, kind, message):
    damage(images / "b.nii.gz", kind)
    arguments = ["--model", str(run), "--input", str(images), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert command.main(["predict", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {images / 'b.nii.gz'}") and message in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "a.png"]


def test_a_checkpoint_that_would_run_code_does_not(run, images, tmp_path, capsys):
    torch.save({"model": Code()}, run / "best.pt")
    with pytest.raises(ValueError, match="best.pt"):
        predict(run, images, tmp_path / "out")
    assert "this ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_architecture_is_refused(run, images, tmp_path):
    write_config(run, dataclasses.replace(CONFIG, arch="AFN-6"))
    with pytest.raises(ValueError, match="best.pt: is no checkpoint of this network"):
        predict(run, images, tmp_path / "out")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"device": "cuda:99"}, "device must be one that PyTorch has here, got 'cuda:99'"),
        ({"device": "meta"}, "device must be one that PyTorch has here, got 'meta'"),
        ({"device": "abacus"}, "device must be one that PyTorch has here, got 'abacus'"),
        ({"tiling": "roman"}, "tiling must be one of published, gaussian, got 'roman'"),
        ({"arch": "Basic"}, "best.pt: is a checkpoint of AFN-2, not of Basic"),
    ],
)
def test_arguments_that_do_not_fit(run, images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        predict(run, images, tmp_path / "out", **options)


def test_attention_of_a_network_without_it(run, images, tmp_path):
    config = dataclasses.replace(CONFIG, arch="Basic")
    write_config(run, config)
    write_checkpoint(run / "best.pt", {"model": build_network(config).state_dict()})
    with pytest.raises(ValueError, match="Basic has no autofocus layer"):
        predict(run, images, tmp_path / "out", attention=True)


@pytest.mark.parametrize(
    "names,message", [(["x.nii", "x.nii.gz"], "is the same case"), ([], "in: holds no NIfTI file")]
)
def test_folders_that_hold_no_cases(run, tmp_path, names, message):
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).touch()
    with pytest.raises(ValueError, match=message):
        predict(run, tmp_path / "in", tmp_path / "out")
