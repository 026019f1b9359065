"""Trains a network of the paper on a data set. Stopped at any moment, the same command goes on where it was."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import extra  # noqa: F401

# isort: split
import numpy as np
import torch
from monai.metrics import DiceHelper
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .. import networks
from .crops import Crops
from .dataset import Case, Dataset, read_case, read_dataset
from .files import (
    SegmentationError,
    fingerprint_of,
    make_folder,
    read_checkpoint,
    read_orientation,
    write_checkpoint,
    write_csv,
)
from .parallel import Place, gather, mean_over_processes, parallel, processes
from .recipe import PUBLISHED, RECIPES, Recipe, make_loss, make_optimiser, make_scheduler
from .run import Config, Lock, build_network, load_weights, require_same, write_config
from .windows import Windows, out_of_memory, window_sizes

_log = logging.getLogger(__name__)


def train(
    data: str | os.PathLike,
    run: str | os.PathLike,
    arch: str = "AFN-6",
    *,
    recipe: Recipe = PUBLISHED,
    iterations: int | None = None,
    window: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    dilations: Sequence[int | Sequence[int]] = (2, 6, 10, 14),
    padding: str = "valid",
    branch_norm: bool = True,
    validate_every: int | None = None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    device: str | None = None,
    cache: int | None = None,
    workers: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains a network, or goes on with a run that was stopped, as if it had not been.

    In processes that ``torchrun`` started each takes its part of every batch. Nothing is drawn from, or seeds, the
    global random generators.

    Args:
        data: as :func:`.dataset.read_dataset` takes it; with ``labels`` for lists. Without a list of cases for
            validation a fifth of those for training, chosen by ``seed``, are held out.
        run: the folder to write, see :mod:`.run`.
        arch, widths, dilations, padding: as in :func:`autofocus_kernels.networks.build`.
        branch_norm: False for one batch norm after the sum of an autofocus layer, instead of one a branch.
        iterations: None for ``recipe.epochs`` rounds through the cases.
        window: voxels that the network reads at once, ``(n,)`` for every axis or one number an axis; None is 75.
        validate_every: iterations between validations; the run is saved at each. None for 40 in all, but at most one
            a round through the cases.
        device: as PyTorch names it; None is a GPU where there is one.
        cache: cases of those to train on that are kept in memory; None for all.
        workers: processes that make crops beside this one.
        progress: show a bar on a terminal.

    Returns:
        the rows of log.csv, one a validation: iteration, learning_rate, loss (the mean since the row before), dice (the
        mean over labels) and "dice LABEL" (the mean over the cases that have it, NaN if none has).

    Raises:
        SegmentationError: a file that is no good, or a run of another config or of other data; the message names it.
        ValueError, TypeError: an argument of the wrong form; the message names it.
        MemoryError: a batch is too large.
    """
    counts = (("iterations", iterations, 1), ("validate_every", validate_every, 1), ("seed", seed, 0))
    for name, value, least in (*counts, ("cache", cache, 0), ("workers", workers, 0)):
        if value is not None and not least <= value < 2**63:
            raise ValueError(f"{name} must be at least {least} and below 2^63, got {value}")
    dataset = read_dataset(data, labels)
    if labels is not None and tuple(labels) != dataset.labels:
        raise SegmentationError(
            f"labels must be None or those of {dataset.source}, {list(dataset.labels)}, got {list(labels)}"
        )
    training, validation = _split(dataset, seed)
    spatial_dims = dataset.spatial_dims()
    orientations = _orientations((*training, *validation), spatial_dims)
    round_length = math.ceil(len(training) / recipe.batch_size)
    iterations = round_length * recipe.epochs if iterations is None else iterations
    if validate_every is None:
        validate_every = max(round_length, math.ceil(iterations / 40))
    config = Config(
        arch,
        spatial_dims,
        dataset.modalities,
        dataset.labels,
        (75,) * spatial_dims if window is None else window_sizes(window, spatial_dims),
        None if widths is None else tuple(widths),
        tuple(d if isinstance(d, int) else tuple(d) for d in dilations),
        padding,
        branch_norm,
        recipe,
        iterations,
        validate_every,
        seed,
        tuple(case.name for case in training),
        tuple(case.name for case in validation),
        tuple(map(fingerprint_of, _files(training, validation))),
        tuple(sorted(_orientations(training, spatial_dims))),
        all(case.mask is not None for case in training),
    )
    run = Path(run)
    with processes(device) as place, Lock(run) as lock:
        if place.rank == 0 and len(orientations) > 1:
            _log.warning(
                "%s: the axes of images run differently, %s; nothing is turned, so the network sees some of them "
                "mirrored or turned",
                dataset.source,
                ", ".join(f"{axes} in {file}" for axes, file in orientations.items()),
            )
        training_run = _Training(run, config, dataset, training, validation, place, lock, cache)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            return training_run(workers, progress)


def _split(dataset: Dataset, seed: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Cases to train on, and cases to validate on."""
    if not dataset.training:
        raise SegmentationError(f"{dataset.source}: must list at least one case for training")
    if dataset.validation is not None:
        return dataset.training, dataset.validation
    count = len(dataset.training)
    if count < 2:
        raise SegmentationError(f"{dataset.source}: must list two cases for training, of which one is held out")
    held_out = set(np.random.default_rng(seed).permutation(count)[: max(1, count // 5)].tolist())
    cases = list(enumerate(dataset.training))
    return tuple(c for i, c in cases if i not in held_out), tuple(c for i, c in cases if i in held_out)


def _files(training: Sequence[Case], validation: Sequence[Case]) -> list[Path]:
    return [file for case in (*training, *validation) for file in case.files]


def _orientations(cases: Sequence[Case], spatial_dims: int) -> dict[str, Path]:
    """Where the axes of images run to -> the first image of which that holds; without those that do not say."""
    found: dict[str, Path] = {}
    for case in cases:
        found.setdefault(read_orientation(case.images[0], spatial_dims), case.images[0])
    found.pop("", None)
    return found


class _Training:
    """A run in memory: network, optimiser, scheduler, the iterations done, and the rows of the log."""

    def __init__(
        self,
        run: Path,
        config: Config,
        dataset: Dataset,
        training: Sequence[Case],
        validation: Sequence[Case],
        place: Place,
        lock: Lock,
        cache: int | None,
    ) -> None:
        self.run, self.config, self.dataset, self.place = run, config, dataset, place
        self.validation = validation[place.rank :: place.world]
        recipe = config.recipe
        if recipe.batch_size % place.world:
            raise ValueError(
                f"batch_size must be a multiple of the {place.world} processes, which share it, got {recipe.batch_size}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = build_network(config).to(place.device)
        self.windows = Windows(self.network, config.window, "published", place.device)
        self.loss = make_loss(recipe)
        self.optimiser = make_optimiser(recipe, self.network.parameters())
        self.scheduler = make_scheduler(recipe, self.optimiser, config.iterations)
        self.done, self.history = 0, []
        begun = (run / "config.json").exists()
        if begun:
            if place.rank == 0:
                lock.take()
            require_same(run, config, _files(training, validation))
        if (run / "last.pt").exists():
            self._resume(run / "last.pt")
        self.crops = Crops(
            dataset, training, config.window, self.network.crop, config.seed, recipe.flip_every_axis, cache
        )
        if place.rank == 0 and self.crops.outside > 0.01:
            _log.warning(
                "%s: %.0f %% of the labelled voxels to train on lie outside the masks, where predict writes label 0",
                dataset.source,
                100 * self.crops.outside,
            )
        for case in validation:
            self._read(case)  # what is wrong with it is said now, not after the first round
        if place.rank == 0:
            make_folder(run)
            if not begun:  # only now that all arguments and files are known to be good
                lock.take()
                if (run / "config.json").exists():
                    raise SegmentationError(
                        f"{run}: was begun by another process meanwhile; the same command resumes it"
                    )
            write_config(run, config)
        done = gather([self.done], place)
        if len(set(done)) > 1:
            raise SegmentationError(
                f"{run}: must be one folder for all processes, in theirs {done} iterations are done"
            )
        self.wrapped = parallel(self.network, place)

    def _resume(self, path: Path) -> None:
        if not (path.parent / "config.json").exists():
            raise SegmentationError(f"{path}: is a run's, whose config.json is missing")
        saved = read_checkpoint(path)
        if not {"model", "optimiser", "scheduler", "iteration", "history"} <= set(saved):
            raise SegmentationError(f"{path}: is no last.pt of a run")
        load_weights(self.network, saved["model"], path)
        try:
            self.optimiser.load_state_dict(saved["optimiser"])
            self.scheduler.load_state_dict(saved["scheduler"])
            self.done, self.history = int(saved["iteration"]), list(saved["history"])
            self.history[-1]["dice"] + 0.0  # a row, of numbers
        except Exception as error:  # of whatever other forms lead to
            raise SegmentationError(f"{path}: is no last.pt of this run: {type(error).__name__}: {error}") from error

    def __call__(self, workers: int, progress: bool) -> list[dict[str, float]]:
        config, first = self.config, self.place.rank == 0
        if self.done == config.iterations:
            return self.history
        # A generator of its own, as DataLoader would draw from the global one.
        loader = DataLoader(self.crops, batch_sampler=self._batches(), num_workers=workers, generator=torch.Generator())
        bar = tqdm(
            total=config.iterations, initial=self.done, desc=config.arch, disable=None if first and progress else True
        )
        tensorboard = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.done + 1) if first else None
        losses = []
        try:
            for input, label in loader:
                losses.append(self._step(input, label))
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                if self.done % config.validate_every == 0 or self.done == config.iterations:
                    self._validate(mean_over_processes(sum(losses) / len(losses), self.place))
                    losses.clear()
                    if first:
                        self._save()
                        _report(tensorboard, self.history[-1])
        finally:
            bar.close()
            if first:
                tensorboard.close()
        return self.history

    def _batches(self) -> list[range]:
        """The numbers of the crops of this process in each iteration that is left."""
        batch = self.config.recipe.batch_size
        part = batch // self.place.world
        starts = (i * batch + self.place.rank * part for i in range(self.done, self.config.iterations))
        return [range(start, start + part) for start in starts]

    def _step(self, input: torch.Tensor, label: torch.Tensor) -> float:
        self.wrapped.train()
        self.optimiser.zero_grad()
        try:
            loss = self._loss(input.to(self.place.device), label.to(self.place.device))
            if not torch.isfinite(loss):
                raise SegmentationError(f"{self.run}: the loss is {loss.item()} in iteration {self.done + 1}")
            loss.backward()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise MemoryError(
                f"out of memory on {self.place.device} with {len(input)} windows of {list(self.config.window)} voxels "
                "in a process: a smaller batch_size or window needs less"
            ) from error
        self.optimiser.step()
        self.scheduler.step()
        self.done += 1
        return loss.item()

    def _loss(self, input: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.config.recipe.amp):
            logits = self.wrapped(input)
        return self.loss(logits.to(input.dtype), label)

    def _validate(self, loss: float) -> None:
        """Adds a row to the history."""
        self.network.eval()
        scores = np.array(gather([self._dice(case) for case in self.validation], self.place))
        self.network.to(self.place.device)  # Windows leaves it on the CPU if memory ran out
        by_label = [_mean(column) for column in scores.T]
        self.history.append(
            {
                "iteration": self.done,
                "learning_rate": self.scheduler.get_last_lr()[0],
                "loss": loss,
                "dice": _mean(by_label),
                **{f"dice {name}": dice for name, dice in zip(self.config.labels[1:], by_label)},
            }
        )

    def _read(self, case: Case):
        return read_case(case, len(self.config.modalities), self.config.spatial_dims, len(self.config.labels))

    def _dice(self, case: Case) -> list[float]:
        """Of every label but the background; NaN where a case has none of it."""
        sample = self._read(case)
        predicted = self.windows.segment(sample.image, sample.mask).labels
        dice = DiceHelper(
            include_background=False,
            apply_argmax=False,
            get_not_nans=False,
            reduction="none",
            num_classes=len(self.config.labels),
        )
        maps = (torch.from_numpy(labels.astype(np.int64))[None, None] for labels in (predicted, sample.label))
        return dice(*maps)[0].tolist()

    def _save(self) -> None:
        """Writes last.pt last: killed before that, the run repeats the round and writes the same files again."""
        row = self.history[-1]
        weights = self.network.state_dict()
        if best_row(self.history) is row:
            write_checkpoint(self.run / "best.pt", {"model": weights, "iteration": self.done, "dice": row["dice"]})
        write_csv(self.run / "log.csv", self.history)
        write_checkpoint(
            self.run / "last.pt",
            {
                "model": weights,
                "optimiser": self.optimiser.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "iteration": self.done,
                "history": self.history,
            },
        )


def best_row(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the best validation, the first if several are; one that scored nothing (NaN) is none."""
    return max(history, key=lambda row: -math.inf if math.isnan(row["dice"]) else row["dice"])


def _mean(values: Sequence[float]) -> float:
    """Of the numbers among them; NaN if there are none."""
    numbers = [float(value) for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _report(tensorboard: SummaryWriter, row: dict[str, float]) -> None:
    for name, value in row.items():
        if name != "iteration":
            tensorboard.add_scalar(name.replace(" ", "/"), value, row["iteration"])
    tensorboard.flush()


def _dilation(text: str) -> int | tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers as 6 or 6,6,2, got {text!r}") from None
    return numbers[0] if len(numbers) == 1 else numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, required=True, help="folder with a dataset.json, or a list (.csv, .json)")
    data.add_argument("--labels", nargs="+", help="names of label 0, 1, ..., for lists")
    data.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run, new or to go on with")
    data.add_argument("--cache", type=int, help="cases kept in memory (all)")
    network = parser.add_argument_group("network")
    network.add_argument("--arch", choices=networks.NAMES, default="AFN-6")
    network.add_argument("--widths", type=int, nargs="+", help="channels of the stem and the blocks (the paper's)")
    network.add_argument(
        "--dilations", type=_dilation, nargs="+", default=(2, 6, 10, 14), help="a number, or one an axis as in 6,6,2"
    )
    network.add_argument("--padding", choices=("valid", "same"), default="valid")
    network.add_argument(
        "--branch-norm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a batch norm for each branch, or one after their sum",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--recipe", choices=tuple(RECIPES), default=PUBLISHED.name)
    training.add_argument("--window", type=int, nargs="+", help="voxels that the network reads at once (75)")
    training.add_argument("--batch-size", type=int, help="crops an iteration, of all processes (10)")
    training.add_argument("--learning-rate", type=float, help="at the start (1e-3)")
    training.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None, help="bfloat16 (the recipe's)")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="rounds through the cases (400)")
    length.add_argument("--iterations", type=int)
    training.add_argument("--validate-every", type=int, metavar="ITERATIONS", help="and save (40 times in all)")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", help="as PyTorch names it (a GPU where there is one)")
    training.add_argument("--workers", type=int, default=0, help="processes that make crops beside this one")


def main(options: argparse.Namespace) -> None:
    overrides = {name: getattr(options, name) for name in ("batch_size", "learning_rate", "amp", "epochs")}
    recipe = dataclasses.replace(
        RECIPES[options.recipe], **{name: value for name, value in overrides.items() if value is not None}
    )
    names = (
        "iterations",
        "window",
        "widths",
        "dilations",
        "padding",
        "branch_norm",
        "validate_every",
        "seed",
        "labels",
        "device",
        "cache",
        "workers",
    )
    history = train(
        options.data, options.out, options.arch, recipe=recipe, **{name: getattr(options, name) for name in names}
    )
    if int(os.environ.get("RANK", 0)) == 0:
        best = best_row(history)
        if math.isnan(best["dice"]):
            print(
                f"{options.out}: no case for validation holds a label, so best.pt is of iteration {best['iteration']}"
            )
        else:
            print(f"{options.out}: best Dice {best['dice']:.4f} in iteration {best['iteration']}")
