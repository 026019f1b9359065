"""Checkpoints of the authors' code (github.com/yaq007/Autofocus-Layer) into these networks, and back.

Only names differ. Such a file may hold its weights under "state_dict", may prefix every name with "module." (saved
from ``nn.DataParallel``), and has no num_batches_tracked if older than PyTorch 0.4.1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .blocks import ConcatHead, SumHead
from .models import SegmentationNetwork

_COUNTER = "num_batches_tracked"
_PREFIX = "module."


def load_original_state_dict(model: SegmentationNetwork, state_dict: Mapping[str, Any]) -> None:
    """Copies the weights of an original checkpoint, as ``torch.load`` gives it, into ``model``.

    Counters that an old file lacks become zero.

    Raises:
        TypeError: ``model`` is none of :func:`build`'s, ``state_dict`` no mapping of names, or an entry no tensor.
        ValueError: entries are missing, unexpected or of another shape; the message names each. Or the model has norms
            or activations with parameters that the original has not. The model is then unchanged.
    """
    names = _names(model)
    given = state_dict.get("state_dict", state_dict) if isinstance(state_dict, Mapping) else state_dict
    if not isinstance(given, Mapping):
        raise TypeError(f"state_dict must map names to tensors, got {type(given).__name__}")
    strangers = [name for name in given if not isinstance(name, str)]
    if strangers:
        raise TypeError(f"state_dict must have strings as names, got {strangers[0]!r}")
    if given and all(name.startswith(_PREFIX) for name in given):
        given = {name[len(_PREFIX) :]: value for name, value in given.items()}
    own = model.state_dict()

    problems = [
        f"missing: {theirs}" for theirs in names.values() if theirs not in given and not theirs.endswith(_COUNTER)
    ]
    expected = set(names.values())
    problems += [f"unexpected: {name}" for name in given if name not in expected]
    values = {}
    for ours, theirs in names.items():
        value = given.get(theirs, torch.zeros_like(own[ours]))
        if not isinstance(value, Tensor):
            raise TypeError(f"{theirs} must be a tensor, got {type(value).__name__}")
        if value.shape != own[ours].shape:
            problems.append(f"{theirs}: expected shape {list(own[ours].shape)}, got {list(value.shape)}")
        values[ours] = value
    if problems:
        raise ValueError(f"state_dict is no checkpoint of this {model.name}:\n  " + "\n  ".join(problems))
    model.load_state_dict(values)


def original_state_dict(model: SegmentationNetwork) -> OrderedDict[str, Tensor]:
    """The state of ``model`` under the names of the original code: the inverse of :func:`load_original_state_dict`.

    Raises:
        TypeError: ``model`` is none of :func:`build`'s.
        ValueError: it has norms or activations with parameters that the original has not.
    """
    names = _names(model)
    return OrderedDict((names[ours], value) for ours, value in model.state_dict().items())


def _names(model: SegmentationNetwork) -> dict[str, str]:
    """Every entry of the model's state_dict -> its original name."""
    if not isinstance(model, SegmentationNetwork):
        raise TypeError(f"model must come from autofocus_kernels.networks.build, got {type(model).__name__}")
    modules = dict(_modules(model))
    names = {}
    for ours in model.state_dict():
        module, entry = ours.rsplit(".", 1)
        if module not in modules:
            raise ValueError(f"model must have the activations and norms of the original, which holds no {ours}")
        names[ours] = f"{modules[module]}.{entry}"
    return names


def _modules(model: SegmentationNetwork) -> Iterator[tuple[str, str]]:
    """Names here and there of all modules that hold parameters."""
    for i in (1, 2):
        yield f"stem.{i - 1}.conv", f"conv{i}"
        yield f"stem.{i - 1}.norm", f"bn{i}"
    for i, block in enumerate(model.blocks):
        original = f"layers.{i}" if model.name.startswith("AFN") else f"layer{i + 3}"
        for ours, theirs in _block_modules(block):
            yield f"blocks.{i}.{ours}", f"{original}.{theirs}"
    if isinstance(model.head, ConcatHead):
        for k in range(len(model.head.branches)):
            yield f"head.branches.{k}", f"aspp.{k}"
        yield "head.norm", "bn9"
        yield "head.classes", "fc9"
    elif isinstance(model.head, SumHead):
        for k in range(len(model.head.branches)):
            yield f"head.branches.{k}.conv", f"conv_list.{k}"
            yield f"head.branches.{k}.norm", f"bn_list.{k}"
            yield f"head.classes.{k}", f"last_list.{k}"
    else:
        yield "head", "fc"


def _block_modules(block: Any) -> Iterator[tuple[str, str]]:
    autofocus = [hasattr(layer, "branch_norm") for layer in (block.layer1, block.layer2)]
    for i, layer in enumerate((block.layer1, block.layer2), start=1):
        if not autofocus[i - 1]:
            yield f"layer{i}.conv", f"conv{i}"
            yield f"layer{i}.norm", f"bn{i}"
            continue
        yield f"layer{i}", f"conv{i}"
        gate = f"convatt{i}" if all(autofocus) else "convatt"
        yield f"layer{i}.attention.conv1", f"{gate}1"
        yield f"layer{i}.attention.conv2", f"{gate}2"
        for k in range(len(layer.branch_norm)):
            yield f"layer{i}.branch_norm.{k}", f"bn_list{i}.{k}"
    yield "shortcut.conv", "downsample.0"
    yield "shortcut.norm", "downsample.1"
