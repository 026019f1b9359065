"""Training: the recipe, the crops, runs killed at every moment, two processes, and bad input."""

import contextlib
import csv
import dataclasses
import errno
import itertools
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import warnings

import nibabel
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.segmentation_runs import SMALL, in_process, kill_before_file, rewrite_header
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autofocus_kernels import networks
from autofocus_kernels.segmentation import __main__ as command_line
from autofocus_kernels.segmentation import crops, files, parallel, train
from autofocus_kernels.segmentation.crops import Crops
from autofocus_kernels.segmentation.dataset import read_case, read_dataset
from autofocus_kernels.segmentation.files import SegmentationError
from autofocus_kernels.segmentation.parallel import Place
from autofocus_kernels.segmentation.recipe import MODERN, PUBLISHED, make_optimiser, make_scheduler
from autofocus_kernels.segmentation.run import build_network, load_model, read_config
from autofocus_kernels.segmentation.windows import Windows

REAL_DICE = train._Training._dice


@pytest.fixture(scope="module", autouse=True)
def rising_dice():
    """So that every validation makes a new best.pt, which two epochs of so small a network would not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train._Training, "_dice", lambda self, case: [self.done / 10] * 4)
        yield


@pytest.fixture(scope="module")
def finished(phantom_2d, tmp_path_factory):
    """A run of two epochs that nothing interrupted, and what it returned."""
    run = tmp_path_factory.mktemp("finished") / "run"
    return run, train.train(phantom_2d, run, **SMALL)


def assert_same_run(first, second):
    for name in ("config.json", "log.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for name in ("best.pt", "last.pt"):
        assert_same(files.read_checkpoint(first / name), files.read_checkpoint(second / name), name)


def assert_same(first, second, where):
    """Bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_same(first[key], second[key], f"{where} {key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for i, pair in enumerate(zip(first, second)):
            assert_same(*pair, f"{where} {i}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and first.numpy().tobytes() == second.numpy().tobytes(), where
    else:
        assert first == second or (first != first and second != second), where


def test_two_epochs(finished):
    run, history = finished
    with open(run / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["3", "6"]
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in history]
    assert history[1]["loss"] < history[0]["loss"] < 1.5 * math.log(5)

    config = read_config(run)
    assert (config.arch, config.spatial_dims, config.iterations, config.window) == ("AFN-1", 2, 6, (24, 24))
    assert len(config.training) == 5 and len(config.validation) == 1
    assert not set(config.training) & set(config.validation)
    network, loaded = load_model(run)
    assert loaded == config and not network.training
    assert network(torch.zeros(1, 2, 24, 24)).shape == (1, 5, 8, 8)


def test_tensorboard_shows_the_history(finished):
    run, history = finished
    shown = EventAccumulator(str(run / "tensorboard"))
    shown.Reload()
    assert {"loss", "learning_rate", "dice"} < set(shown.Tags()["scalars"])
    for name in history[0].keys() - {"iteration"}:
        values = {event.step: event.value for event in shown.Scalars(name.replace(" ", "/"))}
        assert values == pytest.approx({row["iteration"]: row[name] for row in history}, nan_ok=True), name


def test_best_is_the_best(phantom_2d, tmp_path, monkeypatch):
    scores = {1: math.nan, 2: 0.2, 3: 0.4, 4: 0.4, 5: 0.3}
    monkeypatch.setattr(train._Training, "_dice", lambda self, case: [math.nan, scores[self.done], math.nan, math.nan])
    train.train(phantom_2d, tmp_path, **SMALL | {"iterations": 5, "validate_every": 1})
    best, last = (files.read_checkpoint(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert (best["iteration"], best["dice"], last["iteration"]) == (3, 0.4, 5)
    assert any(not torch.equal(best["model"][name], value) for name, value in last["model"].items())


def test_validation_that_scores_nothing(phantom_2d, tmp_path, monkeypatch, capsys):
    """The best is the first, and no number."""
    monkeypatch.setattr(train._Training, "_dice", lambda self, case: [math.nan] * 4)
    command = ["train", "--data", phantom_2d, "--out", tmp_path, "--arch", "AFN-1", "--device", "cpu", "--window", 24]
    command += ["--widths", 3, 3, 3, 4, "--dilations", 1, 2, "--batch-size", 2, "--iterations", 2]
    assert command_line.main([str(word) for word in [*command, "--validate-every", 1]]) == 0
    assert "no case for validation holds a label, so best.pt is of iteration 1" in capsys.readouterr().out
    assert files.read_checkpoint(tmp_path / "best.pt")["iteration"] == 1


def test_validation_is_the_dice_of_whole_images(phantom_2d, tmp_path, monkeypatch):
    monkeypatch.setattr(train._Training, "_dice", REAL_DICE)
    row = train.train(phantom_2d, tmp_path, **SMALL | {"iterations": 3})[-1]
    network, config = load_model(tmp_path)
    case = next(c for c in read_dataset(phantom_2d).training if c.name == config.validation[0])
    image, label, mask, *_ = read_case(case, 2, 2, 5)
    with torch.no_grad():
        predicted = Windows(network, (24, 24), "published", torch.device("cpu"))(
            torch.from_numpy(image), _box(mask)
        ).logits.argmax(0)
    found = np.zeros_like(label)
    found[_box(mask)] = predicted
    found *= mask
    for value in range(1, 5):
        expected = 2 * ((found == value) & (label == value)).sum() / ((found == value).sum() + (label == value).sum())
        assert row[f"dice {config.labels[value]}"] == pytest.approx(expected), value


def _box(mask):
    rows, columns = np.nonzero(mask)
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)


def test_the_seed_decides(finished, phantom_2d, tmp_path):
    torch.manual_seed(12)  # the global generator does not matter
    np.random.seed(12)
    state = torch.get_rng_state()
    train.train(phantom_2d, tmp_path / "same", **SMALL)
    assert torch.equal(state, torch.get_rng_state())
    assert_same_run(finished[0], tmp_path / "same")
    other = train.train(phantom_2d, tmp_path / "other", **SMALL, seed=1)
    assert other[1]["loss"] != finished[1][1]["loss"]


def killed_at_file(number, data, run):
    kill_before_file(number)
    train.train(data, run, **SMALL)


def killed_in_checkpoint(number, data, run):
    """In the middle of the bytes of a file."""
    save, count = torch.save, [0]

    def halved(values, file):
        count[0] += 1
        if count[0] == number:
            file.write(b"PK" * 1000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(values, file)

    torch.save = halved
    train.train(data, run, **SMALL)


def killed_in_iteration(number, data, run):
    step = train._Training._step

    def counted(self, *arguments):
        if self.done == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)

    train._Training._step = counted
    train.train(data, run, **SMALL)


KILLS = (
    [(killed_at_file, number) for number in (1, 4, 5, 6, 7)]
    + [(killed_in_checkpoint, number) for number in (2, 3)]
    + [(killed_in_iteration, number) for number in (0, 4)]
)


@pytest.mark.parametrize("kill, number", KILLS, ids=[f"{kill.__name__}-{number}" for kill, number in KILLS])
def test_a_killed_run_goes_on_bit_for_bit(finished, phantom_2d, tmp_path, kill, number):
    run = tmp_path / "run"
    if kill is killed_at_file and number > 1 + 3 * len(finished[1]) - (
        finished[1][1]["dice"] <= finished[1][0]["dice"]
    ):
        pytest.fail("there is no such file: take it off the list")
    assert in_process(kill, number, phantom_2d, run) == -signal.SIGKILL
    for name in ("best.pt", "last.pt"):
        if (run / name).exists():
            files.read_checkpoint(run / name)
    train.train(phantom_2d, run, **SMALL)
    assert_same_run(finished[0], run)
    assert not list(run.glob(".*"))


def test_killed_twice(finished, phantom_2d, tmp_path):
    for number in (4, 5):
        assert in_process(killed_in_iteration, number, phantom_2d, tmp_path / "run") == -signal.SIGKILL
    train.train(phantom_2d, tmp_path / "run", **SMALL)
    assert_same_run(finished[0], tmp_path / "run")


def trains_until_killed(started, data, run):
    """Stops in its second iteration, while other processes make its crops."""
    step = train._Training._step

    def stopped(self, *arguments):
        if self.done:
            started.set()
            signal.pause()
        return step(self, *arguments)

    train._Training._step = stopped
    train.train(data, run, **SMALL, workers=1)


def test_a_run_that_is_being_trained_is_refused(finished, phantom_2d, tmp_path, capsys):
    run, context = tmp_path / "run", multiprocessing.get_context("fork")
    started = context.Event()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks, as above
        process = context.Process(target=trains_until_killed, args=(started, phantom_2d, run))
        process.start()
    try:
        assert started.wait(60)
        before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
        with pytest.raises(SegmentationError, match=rf"run: is being trained by process {process.pid} on .*; wait for"):
            train.train(phantom_2d, run, **SMALL)
        assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    finally:
        process.kill()
        process.join()
    train.train(phantom_2d, run, **SMALL)  # at once, while those that made crops may still be there
    assert_same_run(finished[0], run)


def test_of_two_that_begin_a_run_one_is_refused(finished, phantom_2d, tmp_path, monkeypatch):
    """The other was faster with reading the cases."""

    def other(*arguments):
        shutil.copytree(finished[0], tmp_path / "run", dirs_exist_ok=True)
        return Crops(*arguments)

    monkeypatch.setattr(train, "Crops", other)
    with pytest.raises(SegmentationError, match="run: was begun by another process meanwhile"):
        train.train(phantom_2d, tmp_path / "run", **SMALL)
    assert_same_run(finished[0], tmp_path / "run")


def test_a_finished_run_stays(finished, phantom_2d):
    def contents():
        return {path: path.read_bytes() for path in finished[0].rglob("*") if path.is_file()}

    before = contents()
    assert_same(train.train(phantom_2d, finished[0], **SMALL), finished[1], "history")
    assert contents() == before


def test_another_config_is_refused(finished, phantom_2d):
    before = (finished[0] / "config.json").read_bytes()
    recipe = dataclasses.replace(SMALL["recipe"], learning_rate=0.5)
    for changes, named in (({"seed": 3}, "seed is 0 there, 3 here"), ({"recipe": recipe}, "recipe.learning_rate is")):
        with pytest.raises(SegmentationError, match=named):
            train.train(phantom_2d, finished[0], **SMALL | changes)
    assert (finished[0] / "config.json").read_bytes() == before


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr", "masksTr"])
def test_a_run_does_not_go_on_with_changed_data(finished, phantom_2d, tmp_path, folder):
    data = tmp_path / "data"
    shutil.copytree(phantom_2d, data)  # elsewhere, and newer: only what the files hold counts
    train.train(data, finished[0], **SMALL)
    other, case, *_ = read_config(finished[0]).training
    shutil.copy(data / folder / f"{other}.nii.gz", data / folder / f"{case}.nii.gz")
    with pytest.raises(SegmentationError, match=rf"{folder}/{case}.nii.gz: is not what it was when .* \(1 such"):
        train.train(data, finished[0], **SMALL)


def test_a_run_does_not_go_on_without_its_masks(finished, phantom_2d, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_2d, data)
    content = files.read_json(data / "dataset.json")
    for entry in content["training"]:
        del entry["mask"]
    files.write_json(data / "dataset.json", content)
    with pytest.raises(SegmentationError, match="config.json: .* its cases had 18 files there, 12 here"):
        train.train(data, finished[0], **SMALL)


def test_a_run_that_kept_no_fingerprints_goes_on(finished, phantom_2d, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    config = files.read_json(run / "config.json")
    assert config["masks"]
    later = ("fingerprints", "orientations", "masks")
    files.write_json(run / "config.json", {name: value for name, value in config.items() if name not in later})
    assert len(train.train(phantom_2d, run, **SMALL)) == 2
    assert files.read_json(run / "config.json") == config


@pytest.mark.parametrize("split, orientations", [("training", ("RA", "RP")), ("validation", ("RA",))])
def test_cases_whose_axes_run_differently_are_warned_of(finished, phantom_2d, tmp_path, caplog, split, orientations):
    config = read_config(finished[0])
    assert config.orientations == ("RA",) and not caplog.records
    data = tmp_path / "data"
    shutil.copytree(phantom_2d, data)
    (case,) = (case for case in read_dataset(data).training if case.name == getattr(config, split)[-1])
    for file in case.files:
        image = nibabel.load(file)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), np.diag([1.0, -1, 1, 1])), file)
    train.train(data, tmp_path / "run", **SMALL | {"iterations": 1})
    assert read_config(tmp_path / "run").orientations == orientations
    (warning,) = caplog.messages
    assert f"RP in {case.images[0]}" in warning and "RA in " in warning


def as_rank(rank, port, data, run, options):
    """As torchrun would start it, in float64."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        in_float64(patch)
        train.train(data, run, **options)


def as_rank_with_own_folder(rank, port, data, run, options):
    as_rank(rank, port, data, run / str(rank), options)


def train_in_two(data, run, options, function=as_rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forks of a process that has imported all and started no thread.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["autofocus_kernels.segmentation.train"])
    mp.start_processes(function, args=(port, data, run, options), nprocs=2, start_method="forkserver")


@pytest.mark.parametrize("branch_norm", [True, False])
def test_two_processes_equal_one(phantom_2d, tmp_path, monkeypatch, branch_norm):
    """One crop each, of which neither alone has the statistics of both.

    In float64, since RMSprop makes whole steps of the rounding of gradients that are zero.
    """
    in_float64(monkeypatch)
    options = SMALL | {"iterations": 3, "branch_norm": branch_norm}
    train.train(phantom_2d, tmp_path / "one", **options)
    train_in_two(phantom_2d, tmp_path / "two", options)
    one, two = (files.read_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert two["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=1e-9)


def in_float64(patch):
    def read_in_float64(*arguments):
        sample = read_case(*arguments)
        return sample._replace(image=sample.image.astype(np.float64))

    for module in (crops, train):
        patch.setattr(module, "read_case", read_in_float64)
    patch.setattr(train, "build_network", lambda config: build_network(config).double())


def test_processes_resume_one_run(finished, phantom_2d, tmp_path):
    """On two machines with a folder of that name each, the second would begin anew beside the first."""
    shutil.copytree(finished[0], tmp_path / "0")
    with pytest.raises(mp.ProcessRaisedException, match=r"must be one folder for all processes.*\[6, 0\] iterations"):
        train_in_two(phantom_2d, tmp_path, SMALL, as_rank_with_own_folder)


def test_the_gpu_of_a_process_is_its_current_one(monkeypatch):
    """nccl gathers objects by way of the current GPU: left alone, that is the first one in all processes."""
    current, groups = [torch.device("cuda:0")], []

    @contextlib.contextmanager
    def select(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", select)
    monkeypatch.setattr(parallel, "find_device", torch.device)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", groups.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(groups))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", groups.clear)
    with parallel.processes(None) as place:
        assert groups == ["nccl"]
        assert place == Place(1, 2, torch.device("cuda:1")) and current[-1] == place.device
    assert current == [torch.device("cuda:0")] and not groups


def test_one_process_without_a_gpu_is_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with parallel.processes(None) as place:
        assert place == Place(0, 1, torch.device("cpu")) and not dist.is_initialized()


def test_processes_share_a_batch_evenly(phantom_2d, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "processes", lambda _: contextlib.nullcontext(Place(0, 3, torch.device("cpu"))))
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes"):
        train.train(phantom_2d, tmp_path / "run", **SMALL)


def test_modern_recipe_in_3d(phantom_3d, tmp_path, monkeypatch):
    """AdamW, cosine, Dice + cross-entropy, autocast, a dilation an axis, "same" padding."""
    monkeypatch.setattr(train._Training, "_dice", REAL_DICE)
    options = SMALL | {
        "recipe": dataclasses.replace(MODERN, batch_size=2),
        "iterations": 2,
        "padding": "same",
        "dilations": ((1, 1, 1), (3, 3, 1)),
        "window": (16, 16, 8),
    }
    *_, row = train.train(phantom_3d, tmp_path, **options)
    assert row["learning_rate"] == 0 and 0 < row["loss"] < 2 * math.log(5)
    assert load_model(tmp_path)[0](torch.zeros(1, 2, 4, 5, 6)).shape == (1, 5, 4, 5, 6)


def test_published_recipe():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimiser = make_optimiser(PUBLISHED, [parameter])
    assert isinstance(optimiser, torch.optim.RMSprop)
    expected = {"lr": 1e-3, "alpha": 0.9, "eps": 1e-4, "momentum": 0.6, "weight_decay": 1e-4, "centered": False}
    assert expected.items() <= optimiser.param_groups[0].items()
    scheduler = make_scheduler(PUBLISHED, optimiser, 50)
    for i in range(50):
        assert optimiser.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - i / 50) ** 0.9)
        optimiser.step()
        scheduler.step()
    assert (PUBLISHED.batch_size, PUBLISHED.epochs, PUBLISHED.loss) == (10, 400, "cross-entropy")


def make_crops(folder, window=(20, 20), crop=(8, 8), **options):
    dataset = read_dataset(folder)
    return Crops(dataset, dataset.training, window, crop, **{"seed": 0, "flip_every_axis": False} | options)


def test_crops_are_half_on_foreground(phantom_2d):
    """A tile of one pixel is its centre."""
    made = make_crops(phantom_2d, (9, 9), crop=(8, 8))
    assert [made[number][1].item() > 0 for number in range(24)] == [True, False] * 12
    for window, _ in (made[number] for number in range(24)):
        assert window[:, 4, 4].abs().sum() > 0  # inside the mask


@pytest.mark.parametrize("flip_every_axis", [False, True])
def test_crops_are_the_image_and_its_labels(phantom_2d, monkeypatch, flip_every_axis):
    """Where the image is the label map, plus one, a window's middle is its labels; beyond the volume it is zero."""

    def labels_as_image(*arguments):
        sample = read_case(*arguments)
        places = np.arange(sample.label.size).reshape(sample.label.shape)
        return sample._replace(image=np.stack([sample.label + 1.0, places + 1.0]).astype(np.float32))

    monkeypatch.setattr(crops, "read_case", labels_as_image)
    made = make_crops(phantom_2d, window=(40, 24), crop=(12, 12), flip_every_axis=flip_every_axis)
    flips = []
    for number in range(40):
        window, label = made[number]
        assert torch.equal(window[0, 6:-6, 6:-6], label + 1.0) and label.shape == (28, 12)
        assert window.min() == 0  # a tile of 28 of 36 rows: 6 more a side reach beyond
        places = window[1, 6:-6, 6:-6]
        flips.append([bool(places[0, 0] > places[-1, 0]), bool(places[0, 0] > places[0, -1])])
    often = np.mean(flips, axis=0)
    assert 0.25 < often[0] < 0.75 and (0.25 < often[1] < 0.75 if flip_every_axis else often[1] == 0)


@pytest.mark.parametrize("kind", ["foreground", "background"])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_case_with_voxels_of_one_kind_gives_crops_around_them(kind, wanted):
    voxels = {"foreground": np.array([], np.int32), "background": np.array([], np.int32), kind: np.array([6], np.int32)}
    loaded = crops.Loaded(torch.zeros(1, 3, 4), torch.zeros(3, 4), outside=0, **voxels)
    assert crops._centre(loaded, wanted, np.random.default_rng(0)) == (1, 2)


def test_crops_do_not_depend_on_what_came_before(phantom_2d):
    first, second = make_crops(phantom_2d), make_crops(phantom_2d, cache=2)
    for number in (13, 2, 13, 7):
        for a, b in zip(first[number], second[number]):
            assert torch.equal(a, b)
    assert not torch.equal(first[0][0], make_crops(phantom_2d, seed=1)[0][0])


def test_a_round_takes_every_case_once_and_anew(phantom_2d):
    made = make_crops(phantom_2d)
    orders = [crops._order(0, round, len(made.cases)) for round in range(3)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert orders[0] != orders[1]
    numbers = [6 * round + order.index(0) for round, order in enumerate(orders)]
    one, other = next(pair for pair in itertools.combinations(numbers, 2) if pair[0] % 2 == pair[1] % 2)
    assert not torch.equal(made[one][0], made[other][0])


def test_a_volume_smaller_than_a_tile(phantom_2d):
    window, label = make_crops(phantom_2d, window=(60, 60), crop=(8, 8))[0]
    assert window.shape == (2, 60, 60) and label.shape == (52, 52)
    assert label.sum() > 0 and window[:, :12].abs().sum() == 0


def test_a_full_disk_loses_nothing(phantom_2d, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert in_process(killed_in_iteration, 4, phantom_2d, run) == -signal.SIGKILL
    before = {name: (run / name).read_bytes() for name in ("best.pt", "last.pt", "log.csv")}

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SegmentationError, match=r"config.json: cannot be written: No space left"):
            train.train(phantom_2d, run, **SMALL)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("damage", ["truncated", "pickle", "another network", "no last.pt", "no config"])
def test_bad_last_checkpoint(finished, phantom_2d, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    last = run / "last.pt"
    if damage == "truncated":
        last.write_bytes(last.read_bytes()[:-100])
    elif damage == "pickle":
        last.write_bytes(pickle.dumps({"model": RunsCode(tmp_path / "ran")}, protocol=2))
    elif damage == "another network":
        saved = files.read_checkpoint(last)
        torch.save(saved | {"model": networks.build("Basic", 2, 5, 2).state_dict()}, last)
    elif damage == "no last.pt":
        torch.save({"model": {}}, last)
    else:
        (run / "config.json").unlink()
    with pytest.raises(SegmentationError, match="last.pt: "):
        train.train(phantom_2d, run, **SMALL)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "entry, value",
    [("iteration", "six"), ("history", []), ("history", [{"dice": "high"}]), ("optimiser", {}), ("scheduler", None)],
    ids=str,
)
def test_a_last_checkpoint_of_another_form(finished, phantom_2d, tmp_path, entry, value):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    torch.save(files.read_checkpoint(run / "last.pt") | {entry: value}, run / "last.pt")
    with pytest.raises(SegmentationError, match=r"last.pt: is no last.pt of this run: \w+Error: "):
        train.train(phantom_2d, run, **SMALL)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_processes_that_make_crops_change_nothing(finished, phantom_2d, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks, as above
        train.train(phantom_2d, tmp_path, **SMALL, workers=2, cache=2)
    assert_same_run(finished[0], tmp_path)


def test_a_label_that_a_case_has_not_is_left_out_of_its_dice(phantom_2d, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(phantom_2d, data)
    for file in (data / "labelsTr").iterdir():
        image = files.read_labels(file)
        files.write_nifti(file, np.where(image.data > 2, 0, image.data), image.affine, image.header)
    monkeypatch.setattr(train._Training, "_dice", REAL_DICE)
    row = train.train(data, tmp_path / "run", **SMALL | {"iterations": 1})[-1]
    assert math.isnan(row["dice large"]) and math.isnan(row["dice bright"])
    assert row["dice"] == pytest.approx((row["dice small"] + row["dice medium"]) / 2)


@pytest.mark.parametrize("cache", [None, 0])
@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_bad_case_is_found_before_training(finished, phantom_2d, tmp_path, capsys, split, cache):
    """Not as MONAI's RuntimeError, which does not name the file."""
    data = tmp_path / "data"
    shutil.copytree(phantom_2d, data)
    (name, *_) = getattr(read_config(finished[0]), split)
    image = files.read_nifti(data / "imagesTr" / f"{name}.nii.gz")
    files.write_nifti(data / "imagesTr" / f"{name}.nii.gz", image.data, 2 * image.affine)
    words = ["train", "--data", data, "--out", tmp_path / "run", "--window", 40, "--device", "cpu"]
    words += [] if cache is None else ["--cache", cache]
    assert command_line.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {data}") and f"{name}.nii.gz: must have the" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cache", [None, 0])
def test_cases_without_any_label_are_not_trained_on(phantom_2d, tmp_path, cache):
    """Crops of background alone would train for days, and validation score nothing."""
    data = tmp_path / "data"
    shutil.copytree(phantom_2d, data)
    for file in (data / "labelsTr").iterdir():
        image = files.read_labels(file)
        files.write_nifti(file, 0 * image.data, image.affine, image.header)
    with pytest.raises(SegmentationError, match="dataset.json: at least one case to train on must have a label above"):
        train.train(data, tmp_path / "run", **SMALL, cache=cache)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cache", [None, 0])
def test_labels_outside_the_masks_are_warned_of_once(phantom_2d, tmp_path, caplog, monkeypatch, cache):
    """As those of lungs in CT whose air was cut off to zero: they are trained on, and never predicted."""
    train.train(phantom_2d, tmp_path / "first", **SMALL | {"iterations": 1}, cache=cache)
    assert not caplog.messages
    data = tmp_path / "data"
    shutil.copytree(phantom_2d, data)
    for file in (data / "masksTr").iterdir():
        mask = files.read_labels(file)
        files.write_nifti(file, mask.data * (np.arange(mask.data.shape[1]) < 16), mask.affine, mask.header)
    train.train(data, tmp_path / "run", **SMALL | {"iterations": 1}, cache=cache)
    (warning,) = caplog.messages
    assert re.search(r"dataset.json: \d\d % of the labelled voxels to train on lie outside the masks", warning)

    # The second process of two has nothing to add.
    monkeypatch.setattr(train, "processes", lambda _: contextlib.nullcontext(Place(1, 2, torch.device("cpu"))))
    monkeypatch.setattr(train, "parallel", lambda network, _: network)
    monkeypatch.setattr(train, "gather", lambda values, _: values)
    monkeypatch.setattr(train, "mean_over_processes", lambda value, _: value)
    train.train(data, tmp_path / "second", **SMALL | {"iterations": 1}, cache=cache)
    assert caplog.messages == [warning] and not (tmp_path / "second").exists()


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_a_file_without_a_place_is_not_trained_on(phantom_2d, tmp_path, folder):
    data = tmp_path / "data"
    shutil.copytree(phantom_2d, data)
    file = min((data / folder).iterdir())
    for row in ("srow_x", "srow_y", "srow_z"):
        rewrite_header(file, row, 0, 0)
    with pytest.raises(SegmentationError, match=f"{file.name}: must have an affine of finite numbers"):
        train.train(data, tmp_path / "run", **SMALL)


def test_a_case_that_breaks_during_training(phantom_2d, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_2d, data)
    made = make_crops(data, cache=0)
    for file in (data / "imagesTr").iterdir():
        file.write_bytes(b"")
    with pytest.raises(SegmentationError, match=r"imagesTr/.*: cannot be read"):
        made[0]


def test_a_batch_too_large_for_the_memory(phantom_2d, tmp_path, monkeypatch):
    def full(recipe):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "make_loss", lambda recipe: lambda logits, label: full(recipe))
    with pytest.raises(MemoryError, match=r"out of memory on cpu with 2 windows of \[24, 24\] voxels"):
        train.train(phantom_2d, tmp_path / "run", **SMALL)


def test_a_loss_that_is_no_number(phantom_2d, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_loss", lambda recipe: lambda logits, label: logits.sum() * math.nan)
    with pytest.raises(SegmentationError, match="the loss is nan in iteration 1"):
        train.train(phantom_2d, tmp_path / "run", **SMALL)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    "argument, value",
    [
        ("iterations", 0),
        ("window", (24, 24, 24)),
        ("window", (16,)),
        ("window", (10**6,)),
        ("arch", "AFN-9"),
        ("validate_every", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("cache", -1),
        ("workers", -1),
        ("device", "abacus"),
        ("device", "meta"),
    ],
)
def test_errors_name_the_argument(phantom_2d, tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"{'name' if argument == 'arch' else argument} must "):
        train.train(phantom_2d, tmp_path / "run", **SMALL | {argument: value})
    assert not (tmp_path / "run").exists()


def test_command_line(phantom_2d, tmp_path, capsys, finished):
    command = ["train", "--data", phantom_2d, "--out", tmp_path / "run", "--arch", "AFN-1", "--device", "cpu"]
    command += ["--widths", 3, 3, 3, 4, "--dilations", 1, 2, 3, 4, "--window", 24, "--batch-size", 2, "--epochs", 2]
    assert command_line.main([str(word) for word in command]) == 0
    assert "best Dice 0.6000 in iteration 6" in capsys.readouterr().out
    assert_same_run(finished[0], tmp_path / "run")
    assert command_line.main([str(word) for word in [*command, "--seed", 1]]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "seed is 0 there, 1 here" in output.err and not output.out


@pytest.mark.parametrize("rate", [0.0, math.nan, math.inf])
def test_learning_rates_that_are_none(rate):
    with pytest.raises(ValueError, match="learning_rate must be a number above 0"):
        dataclasses.replace(PUBLISHED, learning_rate=rate)


def test_labels_that_are_not_those_of_the_description(phantom_2d, tmp_path):
    with pytest.raises(SegmentationError, match="labels must be None or those of .*dataset.json"):
        train.train(phantom_2d, tmp_path / "run", labels=["background", "tumour"], **SMALL)


def test_a_data_set_without_cases_to_train_on(phantom_2d, tmp_path):
    description = files.read_json(phantom_2d / "dataset.json")
    files.write_json(tmp_path / "dataset.json", description | {"training": []})
    with pytest.raises(SegmentationError, match="dataset.json: must list at least one case for training"):
        train.train(tmp_path, tmp_path / "run", **SMALL)
