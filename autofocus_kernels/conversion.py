"""Turns convolutions of an existing network into autofocus layers with the same weights, and back.

A module changes in place. It takes another class and keeps its identity, its hooks, its mode, and its ``weight`` and
``bias`` (the same parameters, so dtype, device, memory format, ``requires_grad`` and an optimizer's hold on them).
Whatever refers to it, under several names or from outside ``named_modules``, therefore sees the change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .arguments import DTYPES
from .geometry import IntOrTuple, resolve_dilations, smallest_dilation
from .modules import AUTOFOCUS, CONV, AutofocusConv1d, AutofocusConvNd, ScaleAttention

# The paper's (2, 6, 10, 14) in units of the smallest: that of the convolution itself.
RELATIVE_DILATIONS = (1, 3, 5, 7)
# The softmax of logits this far apart is one-hot in every floating dtype.
_SATURATED = 1000.0

Conv = TypeVar("Conv", bound=_ConvNd)
Select = Sequence[str] | Callable[[str, Any], bool] | None  # names, or a predicate of a name and its module


def convert(
    network: nn.Module,
    dilations: Sequence[IntOrTuple] = RELATIVE_DILATIONS,
    select: Select = None,
    *,
    initial_attention: float | None = 0.99,
) -> nn.Module:
    """Turns convolutions of ``network``, in place, into autofocus layers that keep their weights.

    Every ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with a kernel larger than one on some axis is eligible;
    transposed convolutions and the gates of autofocus layers are not. Output sizes do not change. A state_dict keeps
    its keys and gains those of the gates (``NAME.attention.*``), so a checkpoint of the original network loads with
    ``strict=False``. The gates are new, trainable parameters in the convolution's dtype, device and memory format:
    create the optimizer afterwards, or add them to it. Forward and other hooks stay. A convolution used in several
    places stays one layer. Convert before ``torch.compile``, FSDP and the like, not after; and after the weights are
    loaded where the network is built on the meta device, on which a gate cannot hold ``initial_attention``.

    Args:
        network: a module; it may be a convolution itself.
        dilations: K branches, each an int or one int per axis, in units of the convolution's own dilation. One branch
            must be 1 on every axis: the convolution as it was.
        select: None for every eligible convolution; or names of convolutions, or of modules that hold some, as
            ``named_modules`` gives them; or a predicate ``(name, convolution) -> bool``, called once for each eligible
            convolution with the first of its names.
        initial_attention: the attention that the branch of dilation 1 starts with at every voxel, above 0 and at most
            1; the others share the rest. With 1 the network computes what it did, but no gradient reaches the saturated
            gate, which then never trains. With 0.99 it starts close to that and trains. None initialises the gate as in
            a new layer, for networks without trained weights.

    Returns:
        ``network``.

    Raises:
        TypeError: an argument of the wrong form.
        ValueError: ``select`` chooses nothing or names no eligible convolution; or a chosen one cannot be converted
            exactly: groups, even kernel sizes, a padding_mode other than "zeros", a subclass, a weight that is
            computed (parametrizations, weight_norm, pruning). The message names it. The network is then unchanged.
    """
    _require_module(network)
    if initial_attention is not None:
        _require_number("initial_attention", initial_attention)
        if not 0 < initial_attention <= 1:
            raise ValueError(f"initial_attention must be above 0 and at most 1, got {initial_attention!r}")
    # The layers themselves and their gates.
    done = {id(part) for layer in _autofocus_layers(network).values() for part in layer.modules()}
    eligible = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and max(module.kernel_size) > 1
        and id(module) not in done
    }
    chosen = _chosen(network, eligible, select, "a convolution with a kernel larger than one")
    layers = {name: _layer_like(name, conv, dilations) for name, conv in chosen.items()}
    for name, conv in chosen.items():
        layer = layers[name]
        _allocate_gate(layer.attention, conv)
        if initial_attention is not None:
            _set_gate(layer.attention, layer.dilations.index(conv.dilation), float(initial_attention))
        _become(conv, layer)
        conv.attention = layer.attention
    return network


def revert(
    network: nn.Module,
    branch: int | None = None,
    select: Select = None,
    *,
    example: Tensor | tuple | None = None,
    tolerance: float = 0.05,
) -> nn.Module:
    """Turns autofocus layers of ``network``, in place, into convolutions at the dilation of one of their branches.

    The inverse of :func:`convert`: weight and bias stay, the gate is dropped, and the padding keeps the output's size.
    The branch that a gate prefers must be known: name it, or give an example on which it is measured. Neither is needed
    for gates that ignore their input, as :func:`convert` makes them.

    Args:
        network: a module; it may be an autofocus layer itself.
        branch: index into ``dilations`` of every chosen layer, whatever its gate says. None takes the branch that has
            at least ``1 - tolerance`` of the attention at every voxel.
        select: None for all autofocus layers; names or a predicate as in :func:`convert`.
        example: for ``branch=None``: an input of the network (or a tuple of its arguments). The network is run on it
            once, in evaluation mode and without gradients.
        tolerance: see ``branch``; at least 0 and below 1.

    Returns:
        ``network``.

    Raises:
        TypeError: an argument of the wrong form.
        ValueError: ``select`` chooses nothing or names no autofocus layer; a chosen layer has no such branch, no branch
            with nearly all attention, a branch norm, a subclass as its class or a weight that is computed. The message
            names the layer. The network is then unchanged.
    """
    _require_module(network)
    if branch is not None and example is not None:
        raise ValueError("branch and example both choose a branch: give one of them")
    _require_number("tolerance", tolerance)
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance!r}")
    chosen = _chosen(network, _autofocus_layers(network), select, "an autofocus layer")
    for name, layer in chosen.items():
        _refuse(name, layer, AUTOFOCUS)
        if layer.branch_norm is not None:
            raise ValueError(f"{name or 'network'} has a branch norm: a convolution alone cannot replace it")
    measured = None if example is None else _least_attention(network, chosen, example)
    convs = {
        name: _conv_like(layer, _branch_of(name, layer, branch, measured, tolerance)) for name, layer in chosen.items()
    }
    stale = _settings_of_layers_only()
    for name, layer in chosen.items():
        del layer.attention
        for setting in stale & vars(layer).keys():
            del vars(layer)[setting]
        _become(layer, convs[name])
    return network


# ------------------------------------------------------------------ which modules


def _autofocus_layers(network: nn.Module) -> dict[str, AutofocusConvNd]:
    return {name: module for name, module in network.named_modules() if isinstance(module, AutofocusConvNd)}


def _chosen(network: nn.Module, eligible: dict[str, Conv], select: Select, kind: str) -> dict[str, Conv]:
    """The entries of ``eligible`` that ``select`` means."""
    if not eligible:
        raise ValueError(f"network must hold {kind}, got {type(network).__name__} without any")
    if select is None:
        return eligible
    if callable(select):
        chosen = {name: module for name, module in eligible.items() if select(name, module)}
        if not chosen:
            raise ValueError(f"select must choose {kind}, got none of {_listed(eligible)}")
        return chosen
    if isinstance(select, (str, bytes)) or not isinstance(select, Sequence):
        raise TypeError(f"select must be None, names or a predicate, got {select!r}")
    if not select:
        raise ValueError("select must hold at least one name, got none")
    # Every name of a module that has several.
    modules = dict(network.named_modules(remove_duplicate=False))
    wanted = set()
    for name in select:
        if not isinstance(name, str):
            raise TypeError(f"select must hold names, got {name!r}")
        inside = {id(module) for module in modules[name].modules()} if name in modules else set()
        found = {other for other, module in eligible.items() if id(module) in inside}
        if not found:
            problem = "holds none" if name in modules else "is no module of network"
            raise ValueError(f"select must name {kind} or a module that holds one: {name!r} {problem}")
        wanted |= found
    return {name: module for name, module in eligible.items() if name in wanted}


def _listed(names) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _refuse(name: str, module: nn.Module, classes: dict[int, Any]) -> None:
    """Raises ValueError unless ``module`` computes what its class says, from parameters of its own."""
    name = name or "network"
    for entry in ("weight", "bias"):
        if entry not in module._parameters:
            raise ValueError(
                f"{name} computes its {entry} (a parametrization, weight_norm, pruning?): remove that first, so that "
                "it is a parameter"
            )
    if type(module) not in classes.values():
        raise ValueError(
            f"{name} must be one of {', '.join(kind.__name__ for kind in classes.values())} itself, got its subclass "
            f"{type(module).__name__}, which may compute something else"
        )
    if "forward" in vars(module):
        raise ValueError(f"{name} has had its forward replaced: what it computes is not known")


# ------------------------------------------------------------------ what they become


def _layer_like(name: str, conv: _ConvNd, dilations: Sequence[IntOrTuple]) -> Any:
    """An autofocus layer on the meta device with the settings of ``conv``, after every check of these."""
    _refuse(name, conv, CONV)
    name = name or "network"
    spatial_dims = len(conv.kernel_size)
    if (1,) * spatial_dims not in resolve_dilations(dilations, spatial_dims):
        raise ValueError(
            f"dilations must hold a branch of 1 on every axis, the convolution as it was, got {dilations!r}"
        )
    own = [attribute for attribute in sorted(_settings_of_layers_only() | {"attention"}) if hasattr(conv, attribute)]
    if own:
        raise ValueError(f"{name} has attributes of its own that an autofocus layer needs: {', '.join(own)}")
    if conv.weight.dtype not in DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {conv.weight.dtype}")
    try:
        return AUTOFOCUS[spatial_dims](
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            "meta",
            conv.weight.dtype,
            dilations=dilations,
        )
    except ValueError as error:
        raise ValueError(f"{name} cannot become an autofocus layer: {error}") from error


def _conv_like(layer: AutofocusConvNd, branch: int) -> _ConvNd:
    """A convolution on the meta device that computes the branch of ``layer``, on the same voxels."""
    dilation = layer.dilations[branch]
    padding = layer.padding
    if padding != "same":
        smallest = smallest_dilation(layer.dilations)
        given: Any = (0,) * len(dilation) if padding == "valid" else padding
        padding = tuple(
            pad + (r - least) * (size // 2) for pad, r, least, size in zip(given, dilation, smallest, layer.kernel_size)
        )
        if layer.padding == "valid" and not any(padding):
            padding = "valid"
    return CONV[len(dilation)](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        padding,
        dilation,
        bias=layer.bias is not None,
        device="meta",
        dtype=layer.weight.dtype,
    )


def _become(module: nn.Module, other: nn.Module) -> None:
    """Gives ``module`` the class and settings of ``other``; what every ``nn.Module`` holds stays its own."""
    general = vars(nn.Module()).keys()
    module.__class__ = type(other)
    vars(module).update({name: value for name, value in vars(other).items() if name not in general})


def _settings_of_layers_only() -> set[str]:
    """Attributes that an autofocus layer has and a convolution has not."""
    return vars(AutofocusConv1d(1, 1, device="meta")).keys() - vars(nn.Conv1d(1, 1, 1, device="meta")).keys()


# ------------------------------------------------------------------ gates


def _allocate_gate(gate: ScaleAttention, conv: _ConvNd) -> None:
    """Initial weights for a gate on the meta device, where and how those of ``conv`` are stored."""
    gate.to_empty(device=conv.weight.device)
    for part in (gate.conv1, gate.conv2):
        part.reset_parameters()
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(conv.weight.dim())
    if memory_format and conv.weight.is_contiguous(memory_format=memory_format) and not conv.weight.is_contiguous():
        gate.to(memory_format=memory_format)  # type: ignore[call-overload]
    gate.train(conv.training)


@torch.no_grad()
def _set_gate(gate: ScaleAttention, branch: int, share: float) -> None:
    """Lets the gate ignore its input and give ``share`` to one branch, the rest to the others alike."""
    others = gate.conv2.out_channels - 1
    margin = _SATURATED
    if share < 1:
        margin = min(math.log(share / (1 - share) * max(others, 1)), _SATURATED)
    gate.conv2.weight.zero_()
    gate.conv2.bias.zero_()
    gate.conv2.bias[branch] = margin


@torch.no_grad()
def _least_attention(network: nn.Module, layers: dict[str, AutofocusConvNd], example) -> dict[str, Tensor]:
    """[K] for each of the layers that ``network(*example)`` reaches: the least attention that any voxel gives."""
    least: dict[str, Tensor] = {}

    def measure(name):
        def hook(layer, arguments, keywords, output):
            attention = layer.attention(arguments[0] if arguments else keywords["input"])
            lowest = attention.movedim(-1 - layer.spatial_dims, 0).flatten(1).amin(1)
            least[name] = torch.minimum(least[name], lowest) if name in least else lowest

        return hook

    training = [module for module in network.modules() if module.training]
    hooks = [layer.register_forward_hook(measure(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        network.eval()
        network(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return least


def _branch_of(
    name: str, layer: AutofocusConvNd, branch: int | None, measured: dict[str, Tensor] | None, tolerance: float
) -> int:
    """The branch that ``layer`` becomes: ``branch``, or the one that gets nearly all attention.

    ``measured`` is what :func:`_least_attention` found; None where there was no example.

    Raises:
        TypeError, ValueError: ``branch`` is no branch of the layer, or no branch has nearly all attention.
    """
    shown = name or "network"
    if branch is not None:
        if isinstance(branch, bool) or not isinstance(branch, int):
            raise TypeError(f"branch must be None or an int, got {branch!r}")
        last = len(layer.dilations) - 1
        if not 0 <= branch <= last:
            raise ValueError(f"branch must be from 0 to {last} for {shown}, got {branch}")
        return branch
    least = _constant_attention(layer.attention) if measured is None else measured.get(name)
    if least is None and measured is None:
        raise ValueError(
            f"{shown} has a gate that is not known to ignore its input: give a branch, or an example to measure it on"
        )
    if least is None:
        raise ValueError(f"{shown} is not reached by example: give a branch, or leave it out with select")
    chosen = int(least.argmax())
    if not least[chosen] >= 1 - tolerance:
        raise ValueError(
            f"{shown} must give a branch at least {1 - tolerance:g} of the attention at every voxel, got at least "
            f"{least[chosen].item():.3g} for branch {chosen} at best: give a branch, or another tolerance"
        )
    return chosen


def _constant_attention(gate) -> Tensor | None:
    """[K], what the gate gives every voxel of any input; None if that depends on the input or has no values (meta)."""
    if type(gate) is not ScaleAttention or gate.conv2.weight.is_meta or gate.conv2.weight.any():
        return None
    return gate.conv2.bias.detach().softmax(0)


# ------------------------------------------------------------------ arguments


def _require_module(network) -> None:
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a module, got {type(network).__name__}")


def _require_number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
