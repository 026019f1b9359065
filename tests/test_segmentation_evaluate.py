"""Scores against what can be counted by hand, and the files that must not be scored."""

import csv
import errno
import math
import os
import tempfile

import numpy as np
import pytest

pytest.importorskip("autofocus_kernels.segmentation.extra", exc_type=ImportError)
import nibabel
from helpers.segmentation_runs import rewrite_header
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

from autofocus_kernels.segmentation import __main__ as command
from autofocus_kernels.segmentation.evaluate import (
    evaluate,
    match_cases,
    parse_regions,
    score_structures,
    summarise,
    table,
)


def write(path, labels, affine=None):
    path.parent.mkdir(exist_ok=True)
    affine = np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(np.asarray(labels, np.uint8), affine), path)
    return path


def box(shape, *ranges, value=1):
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(*pair) for pair in ranges)] = value
    return labels


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "pred").mkdir()
    (tmp_path / "truth").mkdir()
    return tmp_path / "pred", tmp_path / "truth"


def score(predicted, true, spacing):
    ((_, *values),) = score_structures(predicted, true, {"all": (1,)}, spacing)
    return values


def test_a_shifted_box_has_the_scores_that_counting_gives():
    true = box((12, 9, 8), (2, 6), (2, 6), (2, 6))
    predicted = box((12, 9, 8), (3, 7), (2, 6), (2, 6))
    dice, hausdorff, surface, empty = score(predicted, true, (2.0, 1.0, 1.0))
    assert dice == pytest.approx(2 * 48 / 128)
    # Of the 56 surface voxels of each box the 16 of the far face are 2 mm from the other's surface, those of the inner
    # part of the near face (4 of 16) 1 mm along another axis; all others lie on it.
    assert hausdorff == pytest.approx(2.0)
    assert surface == pytest.approx((16 * 2.0 + 4 * 1.0) / 56)
    assert empty == ""


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distances_are_in_the_spacing_of_their_axis(axis):
    true, predicted = np.zeros((9, 9, 9), np.uint8), np.zeros((9, 9, 9), np.uint8)
    true[4, 4, 4] = 1
    predicted[tuple(6 if i == axis else 4 for i in range(3))] = 1
    spacing = (0.5, 1.5, 4.0)
    _, hausdorff, surface, _ = score(predicted, true, spacing)
    assert (hausdorff, surface) == pytest.approx((2 * spacing[axis], 2 * spacing[axis]))


@pytest.mark.parametrize("shape, spacing", [((17, 12), (0.5, 3.0)), ((9, 12, 7), (1.0, 0.7, 5.0))])
def test_scores_are_those_that_scipy_gives(shape, spacing):
    random = np.random.default_rng(0)
    for smoothness in (0.5, 1.0, 2.0):
        masks = [gaussian_filter(random.standard_normal(shape), smoothness) > 0 for _ in range(2)]
        surfaces = [mask & ~binary_erosion(mask) for mask in masks]
        directed = [distance_transform_edt(~surfaces[1 - i], sampling=spacing)[surfaces[i]] for i in range(2)]
        dice, hausdorff, surface, _ = score(*(mask.astype(np.uint8) for mask in masks), spacing)
        assert dice == pytest.approx(2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()))
        assert hausdorff == pytest.approx(max(np.percentile(distances, 95) for distances in directed), rel=1e-5)
        assert surface == pytest.approx(np.concatenate(directed).mean(), rel=1e-5)


def test_hausdorff_leaves_out_the_farthest_twentieth():
    true, predicted = box((60, 60), (5, 55), (5, 55)), box((60, 60), (5, 55), (5, 55))
    predicted[0, 0] = 1
    assert score(predicted, true, (1.0, 1.0))[1] == 0.0


def test_a_slice_stored_as_a_volume_has_the_scores_of_the_slice():
    true, predicted = box((12, 9), (2, 7), (2, 7)), box((12, 9), (3, 8), (2, 7))
    flat = score(predicted, true, (2.0, 1.0))
    assert score(predicted[..., None], true[..., None], (2.0, 1.0, 5.0)) == flat
    assert score(predicted[:, None], true[:, None], (2.0, 5.0, 1.0)) == flat


def test_an_image_of_one_column_is_scored_in_2d():
    true, predicted = box((9, 1), (3, 6), (0, 1)), box((9, 1), (2, 5), (0, 1))
    dice, hausdorff, surface, _ = score(predicted, true, (2.0, 1.0))
    # Of three voxels, all of them surface, one is 2 mm from the other's.
    assert (dice, hausdorff, surface) == pytest.approx((2 / 3, np.percentile([2.0, 0.0, 0.0], 95), 2 / 3))


@pytest.mark.parametrize("shapes", [((6, 6), (6, 6, 1)), ((6, 6, 1), (6, 6)), ((6, 6, 1), (6, 6, 1))])
def test_one_of_two_slices_may_be_stored_as_a_volume(folders, shapes):
    organ = box((6, 6), (1, 4), (1, 4))
    for folder, shape in zip(folders, shapes):
        write(folder / "a.nii.gz", organ.reshape(shape))
    (of_a,) = evaluate(*folders)
    assert (of_a.dice, of_a.hausdorff95) == (1.0, 0.0)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_what_monai_does_to_itself_is_no_warning_to_the_user():
    organ = box((6, 6, 6), (1, 4), (1, 4), (1, 4))
    assert score(organ, organ, (1.0, 1.0, 1.0))[:2] == [1.0, 0.0]


@pytest.mark.parametrize(
    "in_prediction,in_truth,dice,empty",
    [(False, False, math.nan, "both empty"), (False, True, 0.0, "missed"), (True, False, 0.0, "spurious")],
)
def test_empty_structures(in_prediction, in_truth, dice, empty):
    full = box((4, 4), (1, 2), (1, 2))
    got = score(full * in_prediction, full * in_truth, (1.0, 1.0))
    np.testing.assert_equal(got, [dice, math.nan, math.nan, empty])


def test_summary_leaves_out_what_is_empty_and_counts_it(folders):
    pred, truth = folders
    organ = box((6, 6, 6), (1, 4), (1, 4), (1, 4))
    for name, predicted, true in [("a", organ, organ), ("b", 0 * organ, organ), ("c", 0 * organ, 0 * organ)]:
        write(pred / f"{name}.nii.gz", predicted)
        write(truth / f"{name}.nii.gz", true)
    (row,) = summarise(evaluate(pred, truth))
    assert row["cases"] == 3
    assert (row["both_empty"], row["missed"], row["spurious"]) == (1, 1, 0)
    assert (row["dice_mean"], row["dice_std"]) == (0.5, 0.5)  # of a and b
    assert (row["hausdorff95_mean"], row["hausdorff95_std"]) == (0.0, 0.0)  # of a alone


@pytest.mark.parametrize(
    "missed, whole, core, enhancing",
    [(1, 6 / 7, 4 / 5, 1), (2, 6 / 7, 1, 1), (3, 6 / 7, 4 / 5, 1), (4, 6 / 7, 4 / 5, 0)],
)
def test_regions_of_brats_2015(folders, missed, whole, core, enhancing):
    """One voxel of each of four labels, of which the prediction misses one."""
    pred, truth = folders
    true = np.zeros((6, 6, 6), np.uint8)
    true[0, 0, :4] = 1, 2, 3, 4
    write(pred / "a.nii.gz", np.where(true == missed, 0, true))
    write(truth / "a.nii.gz", true)
    dice = {score.structure: score.dice for score in evaluate(pred, truth, regions="brats2015")}
    assert dice == pytest.approx({"whole": whole, "core": core, "enhancing": enhancing})


def test_a_number_of_no_label_in_a_region_is_warned_of(folders, caplog):
    pred, truth = folders
    write(pred / "a.nii.gz", ORGAN)
    write(truth / "a.nii.gz", ORGAN * 3)
    evaluate(pred, truth, regions={"both": (1, 3), "core": (1, 4), "rest": (12,)})
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "region core holds [4]",
        "region rest holds [12]",
    ]
    caplog.clear()
    (truth / "dataset.json").write_text('{"labels": {"0": "background", "1": "a", "2": "b", "3": "c", "4": "d"}}')
    evaluate(pred, truth, regions={"both": (1, 3), "core": (1, 4)})
    evaluate(pred, truth, regions="brats2015")
    assert not caplog.records


def test_labels_have_the_names_of_the_dataset(folders):
    pred, truth = folders
    (truth / "dataset.json").write_text('{"labels": {"0": "background", "1": "liver", "2": "spleen"}}')
    write(pred / "a.nii.gz", box((4, 4, 4), (0, 2)))
    write(truth / "a.nii.gz", box((4, 4, 4), (0, 2)))
    scores = evaluate(pred, truth)
    assert [(score.structure, score.empty) for score in scores] == [("liver", ""), ("spleen", "both empty")]


def test_names_of_labels_as_newer_descriptions_have_them(folders):
    pred, truth = folders
    (truth / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1}}')
    write(pred / "a.nii.gz", box((4, 4), (0, 2)))
    write(truth / "a.nii.gz", box((4, 4), (0, 2)))
    assert [score.structure for score in evaluate(pred, truth)] == ["liver"]
    for content in ('{"labels": ["background", "liver"]}', '["background", "liver"]'):
        (truth / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match='dataset.json: "labels" must map'):
            evaluate(pred, truth)


def test_a_name_of_two_labels_is_refused(folders):
    """Of the two one would be scored."""
    pred, truth = folders
    (truth / "dataset.json").write_text('{"labels": {"0": "background", "1": "tumour", "2": "tumour"}}')
    for folder in folders:
        write(folder / "a.nii.gz", box((4, 4), (0, 2)))
    with pytest.raises(
        ValueError, match="dataset.json: every label must have a name of its own, got 'tumour' for labels 1 "
    ):
        evaluate(pred, truth)


def test_a_folder_for_the_scores_is_made_and_one_in_their_place_refused(folders):
    pred, truth = folders
    for folder in folders:
        write(folder / "a.nii.gz", ORGAN)
    evaluate(pred, truth, pred.parent / "new" / "scores.csv")
    assert len(list((pred.parent / "new").iterdir())) == 2
    write(pred / "a.nii.gz", ORGAN[:5])  # the place is looked at before the files
    for place, name in ((pred.parent / "new", "new"), (".", ".")):
        with pytest.raises(ValueError, match=f"^.*{name}: must be a file to write, and is a folder"):
            evaluate(pred, truth, place)


@pytest.mark.parametrize("of", [0, 1], ids=["prediction", "truth"])
def test_inputs_are_not_overwritten(folders, of):
    for folder in folders:
        write(folder / "a.nii.gz", ORGAN)
    file = folders[of] / "a.nii.gz"
    before = file.read_bytes()
    with pytest.raises(ValueError, match="a.nii.gz: is an input"):
        evaluate(*folders, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["scores.csv", "scores_summary.csv"])
def test_a_pipe_in_the_place_of_the_scores_is_refused_before_the_work(folders, name):
    pred, truth = folders
    write(truth / "a.nii.gz", ORGAN)
    write(pred / "a.nii.gz", ORGAN[:5])
    os.mkfifo(pred.parent / name)
    with pytest.raises(ValueError, match=f"{name}: must be a file to write, and is no regular file"):
        evaluate(pred, truth, pred.parent / "scores.csv")
    assert (pred.parent / name).is_fifo()


def test_a_folder_that_takes_no_files_is_found_before_the_work(folders, monkeypatch):
    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    pred, truth = folders
    write(truth / "a.nii.gz", ORGAN)
    write(pred / "a.nii.gz", ORGAN[:5])
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(ValueError, match="out: cannot be written to: Read-only file system"):
        evaluate(pred, truth, pred.parent / "out" / "scores.csv")


def test_the_command_writes_both_tables(folders, capsys):
    pred, truth = folders
    for name in ("p1", "p2"):
        write(pred / f"{name}.nii.gz", box((5, 5), (0, 2), value=3))
        write(truth / f"{name}_seg.nii.gz", box((5, 5), (0, 3), value=3))
    out = pred.parent / "scores.csv"
    arguments = ["evaluate", "--pred", str(pred), "--truth", str(truth), "--out", str(out), "--regions", "organ=3"]
    assert command.main(arguments) == 0
    rows = list(csv.DictReader(out.open()))
    assert [(row["case"], row["structure"], float(row["dice"])) for row in rows] == [
        ("p1", "organ", 0.8),
        ("p2", "organ", 0.8),
    ]
    (summary,) = csv.DictReader((pred.parent / "scores_summary.csv").open())
    assert float(summary["dice_mean"]) == 0.8
    assert "organ      2      0.800 (0.000)" in capsys.readouterr().out


def test_a_table_aligns_its_columns():
    rows = [
        {"structure": name, "cases": 2, "both_empty": 0, "missed": 1, "spurious": 0}
        | {
            f"{metric}_{kind}": 12.5
            for metric in ("dice", "hausdorff95", "surface_distance")
            for kind in ("mean", "std")
        }
        for name in ("a", "a long name")
    ]
    head, *lines = table(rows).splitlines()
    assert all(line[head.index("Dice") :].startswith("12.500 (12.500)") for line in lines)


@pytest.mark.parametrize(
    "words,regions",
    [
        (None, None),
        (["brats2015"], "brats2015"),
        (["core=1,3", "rest=2"], {"core": (1, 3), "rest": (2,)}),
    ],
)
def test_regions_as_words(words, regions):
    assert parse_regions(words) == regions


@pytest.mark.parametrize("words", [["core=1,x"], ["=1"], ["core="], ["core=1", "core=2"], ["brats2015", "core=1"]])
def test_regions_that_are_none(words):
    with pytest.raises(ValueError, match="regions must be name=1,3"):
        parse_regions(words)


def touch(folder, *names):
    for name in names:
        (folder / f"{name}.nii.gz").touch()


def test_truths_are_found_by_the_beginning_of_their_name(folders):
    pred, truth = folders
    touch(pred, "p1", "p10", "p2_0000")
    touch(truth, "p1_seg", "p10_seg", "p2")
    found = {case: true.name for case, (_, true) in match_cases(pred, truth).items()}
    assert found == {"p1": "p1_seg.nii.gz", "p10": "p10_seg.nii.gz", "p2_0000": "p2.nii.gz"}


@pytest.mark.parametrize(
    "predictions,truths,message",
    [
        (["p1"], ["p10"], "p1.nii.gz must have one truth .* none fits"),
        (["p1"], ["p1_a", "p1_b"], "p1.nii.gz must have one truth .* several fit: p1_a, p1_b"),
        (["p1", "p1_x"], ["p1"], "are both predictions of .*p1.nii.gz"),
        (["p1"], ["p1", "p2"], "p2.nii.gz has no prediction"),
        ([], ["p1"], "pred: holds no NIfTI file"),
    ],
    ids=["missing truth", "ambiguous", "twice", "missing prediction", "empty folder"],
)
def test_cases_that_do_not_match(folders, predictions, truths, message):
    pred, truth = folders
    touch(pred, *predictions)
    touch(truth, *truths)
    with pytest.raises(ValueError, match=message):
        match_cases(pred, truth)


def test_the_truth_is_no_prediction_of_itself(folders):
    pred, truth = folders
    touch(truth, "p1")
    with pytest.raises(ValueError, match="truth/p1.nii.gz: must be a prediction, and is the truth itself"):
        match_cases(truth, truth)
    (pred / "p1.nii.gz").symlink_to(truth / "p1.nii.gz")
    with pytest.raises(ValueError, match="pred/p1.nii.gz: must be a prediction, and is the truth itself"):
        match_cases(pred, truth)


def test_a_subset_is_scored_when_asked_for(folders):
    pred, truth = folders
    touch(pred, "p1")
    touch(truth, "p1", "p2")
    assert list(match_cases(pred, truth, subset=True)) == ["p1"]


ORGAN = box((6, 6, 6), (1, 4), (1, 4), (1, 4))
TURNED = np.diag([-1.0, 2.0, 3.0, 1.0])


@pytest.mark.parametrize(
    "predicted,affine,regions,message",
    [
        (
            ORGAN[:5],
            None,
            None,
            r"pred/a.nii.gz: must have the shape of .*truth/a.nii.gz, \[6, 6, 6\], got \[5,",
        ),
        (ORGAN, TURNED, None, "pred/a.nii.gz: must have the affine of .*truth/a.nii.gz"),
        (ORGAN * 9, None, "brats2015", r"pred/a.nii.gz must hold labels of \[0, 1, 2, 3, 4\] only, got \[9\]"),
        (ORGAN[..., None] * [1, 1], None, None, "pred/a.nii.gz must hold one label map"),
        (ORGAN, None, "brats1066", "regions must be a mapping or one of brats2015, got 'brats1066'"),
        (ORGAN, None, {"organ": (0, 1)}, "region organ must hold labels above 0"),
        (ORGAN, None, {"organ": (1, -1)}, r"region organ must hold labels above 0, got \[1, -1\]"),
    ],
    ids=["shape", "affine", "label", "axes", "preset", "background", "negative"],
)
def test_bad_input_names_the_file_and_writes_nothing(folders, predicted, affine, regions, message):
    pred, truth = folders
    write(truth / "a.nii.gz", ORGAN)
    write(pred / "a.nii.gz", predicted, affine)
    out = pred.parent / "scores.csv"
    with pytest.raises(ValueError, match=message):
        evaluate(pred, truth, out, regions)
    assert not out.exists()


@pytest.mark.parametrize("folder", [0, 1])
def test_a_file_without_a_place_is_not_scored(folders, capsys, folder):
    """Along an axis of no length every distance would be zero."""
    pred, truth = folders
    for path in folders:
        write(path / "a.nii.gz", ORGAN)
    rewrite_header(folders[folder] / "a.nii.gz", "srow_x", 0, 0)
    out = pred.parent / "scores.csv"
    assert command.main(["evaluate", "--pred", str(pred), "--truth", str(truth), "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {folders[folder] / 'a.nii.gz'}: must have an affine") and not out.exists()


def test_a_truncated_file_ends_the_command_with_one_line(folders, capsys):
    pred, truth = folders
    write(truth / "a.nii.gz", ORGAN)
    file = write(pred / "a.nii.gz", ORGAN)
    file.write_bytes(file.read_bytes()[:60])
    out = pred.parent / "scores.csv"
    assert command.main(["evaluate", "--pred", str(pred), "--truth", str(truth), "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and str(file) in error
