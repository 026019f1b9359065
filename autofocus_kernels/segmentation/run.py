"""A run, the folder that training writes: config.json, last.pt, best.pt, log.csv, tensorboard/, lock; its models."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from .. import networks
from ..networks.models import SegmentationNetwork, resolve_arguments
from .files import SegmentationError, read_checkpoint, read_json, write_json
from .locks import lock
from .recipe import Recipe

# The last layer of each original network, whose shape tells the number of classes.
_CLASSES = {"ASPP-c": "fc9", "ASPP-s": "last_list.0"}


@dataclass(frozen=True)
class Config:
    """What a network is and how it was trained; tuples are lists in config.json.

    Args:
        arch: one of :data:`autofocus_kernels.networks.NAMES`.
        modalities, labels: names; the number of modalities is that of input channels, ``labels[i]`` that of label i.
        window: voxels along each axis that the network saw in training.
        widths, dilations, padding: as in :func:`autofocus_kernels.networks.build`.
        branch_norm: False for one batch norm after the sum of an autofocus layer, instead of one a branch.
        recipe and what follows: of the training; None for a checkpoint from elsewhere.
        training, validation: names of cases; ``fingerprints`` are of their files, one after the other.
        orientations: where the axes of the images of training run to, as "RAS"; empty if that is not known.
        masks: whether every case for training had a mask file.
    """

    arch: str
    spatial_dims: int
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    window: tuple[int, ...]
    widths: tuple[int, ...] | None = None
    dilations: tuple[int | tuple[int, ...], ...] = (2, 6, 10, 14)
    padding: str = "valid"
    branch_norm: bool = True
    recipe: Recipe | None = None
    iterations: int | None = None
    validate_every: int | None = None
    seed: int | None = None
    training: tuple[str, ...] | None = None
    validation: tuple[str, ...] | None = None
    fingerprints: tuple[str, ...] = ()
    orientations: tuple[str, ...] = ()
    masks: bool = False


class Lock:
    """Held by the one process that trains a run.

    The file is never removed: another process could then lock a new one of its name, while this one holds the old.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.file: IO | None = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def take(self) -> None:
        """Locks the run for this process.

        Raises:
            SegmentationError: another process trains the run, or there can be no file in its folder.
        """
        path = self.run / "lock"
        try:
            self.file = open(path, "a+", encoding="utf-8")
            if not lock(self.file):
                self.file.seek(0)
                holder = self.file.readline() or "another process"
                raise SegmentationError(f"{self.run}: is being trained by {holder}; wait for it to end, or end it")
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {platform.node()}")
            self.file.flush()
        except OSError as error:
            raise SegmentationError(f"{path}: cannot be written: {error.strerror}") from error


def write_config(run: Path, config: Config) -> None:
    write_json(run / "config.json", asdict(config))


def read_config(run: Path) -> Config:
    """What ``config.json`` of a run says.

    Raises:
        SegmentationError: there is no config.json, or it is none of a run.
    """
    path = run / "config.json"
    content = read_json(path)
    known = {field.name for field in fields(Config)}
    if not isinstance(content, dict) or not {"arch", "spatial_dims", "modalities", "labels"} <= set(content) <= known:
        raise SegmentationError(f"{path}: is no config of a run, whose fields are {', '.join(sorted(known))}")
    try:
        content = {name: _tuples(value) for name, value in content.items()}
        if content.get("recipe") is not None:
            content["recipe"] = Recipe(**content["recipe"])
        config = Config(**content)
    except (TypeError, ValueError) as error:
        raise SegmentationError(f"{path}: {error}") from error
    lists = (("modalities", str), ("labels", str), ("window", int), ("fingerprints", str), ("orientations", str))
    for name, kind in lists:
        values = getattr(config, name)
        if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
            raise SegmentationError(f"{path}: {name} must be a list of {kind.__name__}, got {values!r}")
    return config


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def require_same(run: Path, config: Config, files: Sequence[Path]) -> None:
    """Checks that a run was started with this config and these files.

    Args:
        files: those that ``config.fingerprints`` are of.

    Raises:
        SegmentationError: the run was started with another config, or with other files under the same names; the
            message names every field that differs, or the first such file.
    """
    before = read_config(run)
    fingerprints = before.fingerprints or config.fingerprints  # older runs kept none
    of_files = {name: getattr(config, name) for name in ("fingerprints", "orientations", "masks")}
    differences = [
        f"{name} is {old!r} there, {new!r} here" for name, old, new in _differences(replace(before, **of_files), config)
    ]
    if not differences and len(fingerprints) != len(files):
        differences.append(f"its cases had {len(fingerprints)} files there, {len(files)} here")
    if differences:
        raise SegmentationError(
            f"{run / 'config.json'}: a run goes on with the config it was started with, but {'; '.join(differences)}"
        )
    changed = [str(file) for file, old, new in zip(files, fingerprints, config.fingerprints) if old != new]
    if changed:
        raise SegmentationError(
            f"{changed[0]}: is not what it was when {run} was begun ({len(changed)} such in all); a run goes on with "
            "the data it was begun with: put that back, or train another run"
        )


def _differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    result = []
    for field in fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if isinstance(a, Recipe) and isinstance(b, Recipe):
            result += _differences(a, b, f"{field.name}.")
        elif a != b:
            result.append((prefix + field.name, a, b))
    return result


def build_network(config: Config) -> SegmentationNetwork:
    """The network of a config, with its initial weights.

    Raises:
        TypeError, ValueError: a field of the wrong form; the message names it.
    """
    arguments = (config.arch, len(config.modalities), len(config.labels), config.spatial_dims)
    options: dict[str, Any] = {"factory": {}}
    if not config.branch_norm:
        norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[config.spatial_dims]
        # A batch norm that is no _BatchNorm goes after the sum, as other norms do.
        options["norm_of"] = lambda channels: nn.Sequential(norm(channels))
    return SegmentationNetwork(
        *resolve_arguments(*arguments, config.widths, config.dilations, config.padding, None, None, **options)
    )


def load_model(path: str | os.PathLike, arch: str | None = None) -> tuple[SegmentationNetwork, Config]:
    """A trained network, on the CPU and in evaluation mode, and its config.

    Args:
        path: a run (its best.pt, or last.pt before the first validation), a checkpoint in a run, or a checkpoint of
            the authors' code.
        arch: needed for the latter; a run's own must agree with it.

    Raises:
        SegmentationError: no such file, a damaged one, one that is no plain checkpoint, or one of another network.
    """
    path = Path(path)
    if path.is_dir():
        path = path / ("best.pt" if (path / "best.pt").exists() else "last.pt")
    checkpoint = read_checkpoint(path)
    if "model" in checkpoint and (path.parent / "config.json").exists():
        config = read_config(path.parent)
        if arch not in (None, config.arch):
            raise SegmentationError(f"{path}: is a checkpoint of {config.arch}, not of {arch}")
        network = _built(config, path.parent / "config.json")
        load_weights(network, checkpoint["model"], path)
    else:
        network, config = _original(checkpoint, arch, path)
    return network.eval(), config


def _built(config: Config, path: Path) -> SegmentationNetwork:
    try:
        return build_network(config)
    except (TypeError, ValueError, KeyError) as error:
        raise SegmentationError(f"{path}: {error}") from error


def load_weights(network: nn.Module, weights: Any, path: Path) -> None:
    """Copies the weights of the checkpoint ``path`` into the network.

    Raises:
        SegmentationError: the weights are those of another network; the message names the file.
    """
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise SegmentationError(f"{path}: is no checkpoint of this network: {error}") from error


def _original(checkpoint: Mapping[str, Any], arch: str | None, path: Path) -> tuple[SegmentationNetwork, Config]:
    if arch is None:
        raise SegmentationError(
            f"{path}: has no config.json of a run beside it; for a checkpoint of the authors' code, name its network "
            f"(--arch {networks.NAMES[-1]})"
        )
    if arch not in networks.NAMES:
        raise ValueError(f"arch must be one of {', '.join(networks.NAMES)}, got {arch!r}")
    weights = checkpoint.get("state_dict", checkpoint)
    last_layer = _CLASSES.get(arch, "fc")
    first, last = (_weight(weights, layer, path) for layer in ("conv1", last_layer))
    spatial_dims = first.dim() - 2
    if spatial_dims not in (2, 3):
        raise SegmentationError(f"{path}: conv1.weight must have 4 or 5 axes, got {list(first.shape)}")
    if last.dim() != first.dim():  # its first axis is that of the classes
        raise SegmentationError(
            f"{path}: {last_layer}.weight must have {first.dim()} axes, as conv1.weight, got {list(last.shape)}"
        )
    modalities, labels = (tuple(str(i) for i in range(count)) for count in (first.shape[1], last.shape[0]))
    config = Config(arch, spatial_dims, modalities, labels, window=(75,) * spatial_dims)
    network = _built(config, path)
    try:
        networks.load_original_state_dict(network, checkpoint)
    except (TypeError, ValueError) as error:
        raise SegmentationError(f"{path}: {error}") from error
    return network, config


def _weight(weights: Any, layer: str, path: Path) -> torch.Tensor:
    if isinstance(weights, Mapping):
        for name in (f"{layer}.weight", f"module.{layer}.weight"):
            if isinstance(weights.get(name), torch.Tensor):
                return weights[name]
    raise SegmentationError(f"{path}: is no checkpoint of the authors' network: it has no {layer}.weight")
