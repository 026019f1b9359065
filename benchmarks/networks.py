"""Times the paper's networks against their plain transcription: python -m benchmarks.networks [--device cuda].

Per network a training step (forward, cross-entropy, backward, RMSprop) and the inference of one segment, both in both
memory layouts, by turns. Our logits and gradients are first checked against float64, and a network that is worse than
the plain one is not timed. Also counted: bytes that autograd keeps for backward.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from autofocus_kernels import networks, testing

from . import memory
from .arguments import Distinct, at_least, refuse, require_device
from .contenders import DTYPES, LAYOUTS, clock, interleave, precision, verdict_on
from .plain_networks import BLOCKS, PlainNetwork
from .provenance import ENVIRONMENT, ROOT, environment
from .rows import Rows

PLAIN, OURS, SAVE_NONE, SAVE_ALL = "plain", "ours", "ours, save_branches=False", "ours, save_branches=True"
PASSES = ("inference", "training")
COLUMNS = (
    "network",
    "pass",
    "dtype",
    "segment",
    "batch",
    "contender",
    "layout",
    "status",  # ok; wrong or failed, and then no time
    "note",  # why not ok
    "min_ms",
    "median_ms",
    "rounds",
    "ratio",  # the best plain time of both layouts over this one
    "saved_bytes",
    "saved_ratio",  # over the plain network's in the same layout
    "peak_bytes",  # on a GPU, beyond parameters and input
    "error",
    "plain_error",  # of logits and gradients against float64 on a small segment
    *ENVIRONMENT,
    "command",
)
MARGIN = 28  # voxels that the networks take off each axis
CHECK_SIZE = 35  # voxels a side


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    several = {"nargs": "+", "action": Distinct}
    dtypes = [name for name in DTYPES if name != "float64"]  # which only the truth has
    parser.add_argument("--networks", **several, choices=tuple(BLOCKS), default=["AFN-1", "AFN-6"])
    parser.add_argument("--dtypes", **several, choices=dtypes, help="16-bit ones by autocast, tf32 on a GPU only")
    parser.add_argument("--passes", **several, choices=PASSES, default=list(PASSES))
    parser.add_argument("--layouts", **several, choices=LAYOUTS, default=list(LAYOUTS))
    size = at_least(MARGIN + 1)
    parser.add_argument("--training-size", type=size, help="voxels a side; default 75 on a GPU, 51 on a CPU")
    parser.add_argument("--inference-size", type=size, default=75)
    parser.add_argument("--batch", type=at_least(1), default=2, help="of training; inference takes one segment")
    parser.add_argument("--seconds", type=at_least(0.0), default=20.0, help="timed rounds per network, pass and dtype")
    parser.add_argument("--no-search", action="store_true", help="cuDNN picks algorithms by its rules, not by trial")
    parser.add_argument("--out", type=Path, help="CSV; default: build/networks-<device>.csv")
    parser.add_argument("--anew", action="store_true", help="measure again what the CSV already has")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.dtypes = options.dtypes or (["float32", "tf32", "bfloat16"] if on_gpu else ["float32"])
    options.training_size = options.training_size or (75 if on_gpu else 51)
    options.out = options.out or ROOT / "build" / f"networks-{options.device}.csv"
    return options


def build(name: str, contender: str) -> nn.Module:
    """The contender's network; all have the same weights."""
    torch.manual_seed(0)
    plain = PlainNetwork(name, aspp=120 if name == "ASPP-s" else 30)
    if contender == PLAIN:
        return plain
    network = networks.build(name, save_branches={OURS: None, SAVE_NONE: False, SAVE_ALL: True}[contender])
    networks.load_original_state_dict(network, plain.state_dict())
    return network


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    if dtype not in ("float16", "bfloat16"):
        return contextlib.nullcontext()
    return torch.autocast(device, DTYPES[dtype])


def lay_out(value, layout: str):
    return value.to(memory_format=torch.channels_last_3d) if layout == "channels_last" else value


def make_input(size: int, batch: int, device: str, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(batch, 4, size, size, size, generator=generator)
    labels = torch.randint(5, (batch, *[size - MARGIN] * 3), generator=generator)
    return lay_out(input.to(device), layout), labels.to(device)


def inference(model: nn.Module, input, device: str, dtype: str) -> Callable:
    def call():
        with torch.no_grad(), autocast(device, dtype):
            return model(input)

    model.eval()
    return call


def training_step(model: nn.Module, input, labels, device: str, dtype: str) -> Callable:
    optimiser = torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.9, eps=1e-4, momentum=0.6, weight_decay=1e-4)

    def call():
        optimiser.zero_grad()
        loss_of(model, input, labels, device, dtype).backward()
        optimiser.step()

    model.train()
    return call


def loss_of(model: nn.Module, input, labels, device: str, dtype: str) -> torch.Tensor:
    with autocast(device, dtype):
        logits = model(input)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


@contextlib.contextmanager
def smooth_activations() -> Iterator[None]:
    """Softplus for ReLU: otherwise the gradient's error is decided by which values round to the other side of zero."""
    with mock.patch.object(F, "relu", lambda input, inplace=False: F.softplus(input)):
        yield


class Judged(NamedTuple):
    """What is judged of a network: its parameters' gradients by original name, and its logits in evaluation."""

    gradients: dict[str, torch.Tensor]
    logits: torch.Tensor


def judged(model: nn.Module, input, labels, device: str, dtype: str) -> Judged:
    with smooth_activations():
        loss_of(model, input, labels, device, dtype).backward()
        model.eval()
        with torch.no_grad(), autocast(device, dtype):
            logits = model(input)
    return Judged({name: parameter.grad for name, parameter in original_parameters(model).items()}, logits)


@lru_cache(maxsize=1)
def truth(name: str, device: str) -> Judged:
    input, labels = make_input(CHECK_SIZE, 2, device, "contiguous")
    return judged(build(name, PLAIN).double().to(device), input.double(), labels, device, "float64")


def error(name: str, contender: str, layout: str, device: str, dtype: str) -> float:
    """The larger relative error of logits and of the whole gradient against float64, on a small segment."""
    exact = truth(name, device)
    input, labels = make_input(CHECK_SIZE, 2, device, layout)
    results = judged(lay_out(build(name, contender).to(device), layout), input, labels, device, dtype)
    gradient = testing.relative_error(
        torch.cat([gradient.flatten() for gradient in results.gradients.values()]),
        torch.cat([exact.gradients[original].flatten() for original in results.gradients]),
    )
    return max(gradient, testing.relative_error(results.logits, exact.logits))


def original_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    if isinstance(model, PlainNetwork):
        return dict(model.named_parameters())
    by_memory = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    state = networks.original_state_dict(model)
    return {name: by_memory[tensor.data_ptr()] for name, tensor in state.items() if tensor.data_ptr() in by_memory}


def segments(pass_name: str, options: argparse.Namespace) -> dict[str, int]:
    """What a pass takes: voxels a side, and how many."""
    training = pass_name == "training"
    return {
        "segment": options.training_size if training else options.inference_size,
        "batch": options.batch if training else 1,
    }


def check(row: dict, plain: dict, device: str) -> None:
    """Fills in error and plain_error and, where the network is wrong, status and note. ``plain`` is checked first."""
    dtype = row["dtype"]
    row["error"] = error(row["network"], row["contender"], row["layout"], device, dtype)
    if "error" not in plain:
        raise ValueError("there is nothing to compare with: the plain network failed")
    row["plain_error"] = plain["error"]
    limit = 2 * plain["error"] + 16 * torch.finfo(DTYPES[dtype]).eps
    if not row["error"] <= limit:
        row |= {"status": "wrong", "note": f"relative error {row['error']:.1e}, allowed {limit:.1e}"}


def prepare(row: dict, plain: dict, input, labels, device: str) -> Callable:
    """The call to be timed; fills in what autograd keeps for a training step."""
    dtype = row["dtype"]
    model = lay_out(build(row["network"], row["contender"]).to(device), row["layout"])
    if row["pass"] != "training":
        return inference(model, input, device, dtype)
    row["saved_bytes"] = testing.saved_bytes(lambda: loss_of(model, input, labels, device, dtype))
    if "saved_bytes" in plain:
        row["saved_ratio"] = row["saved_bytes"] / plain["saved_bytes"]
    return training_step(model, input, labels, device, dtype)


def measure(name: str, pass_name: str, dtype: str, options: argparse.Namespace) -> list[dict]:
    """Rows of all contenders and layouts; one that is wrong or fails has no time, and the others go on without it."""
    device = options.device
    shape = segments(pass_name, options)
    names = (PLAIN, OURS, SAVE_NONE, SAVE_ALL) if pass_name == "training" else (PLAIN, OURS)
    rows, calls = {}, {}
    for layout in options.layouts:
        given = make_input(shape["segment"], shape["batch"], device, layout)
        for contender in names:
            key = contender, layout
            rows[key] = row = {"network": name, "pass": pass_name, "dtype": dtype, **shape}
            row |= {"contender": contender, "layout": layout, "status": "ok"}
            try:
                check(row, rows[PLAIN, layout], device)
                if row["status"] == "ok":
                    calls[key] = prepare(row, rows[PLAIN, layout], *given, device)
            except Exception as failure:
                row |= verdict_on(failure)
    times = interleave(calls, clock(device), options.seconds)
    best = min((min(times[key]) for key in calls if key[0] == PLAIN), default=math.nan)
    for key, call in calls.items():
        fastest = min(times[key])
        rows[key] |= {
            "min_ms": 1e3 * fastest,
            "median_ms": 1e3 * median(times[key]),
            "rounds": len(times[key]),
            "ratio": best / fastest,
        }
        if device == "cuda":  # now, since the first step also allocates what RMSprop keeps
            rows[key]["peak_bytes"] = memory.peak_cuda(call)
    return list(rows.values())


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    require_device(options.device, options.dtypes)
    try:
        store = Rows(options.out, COLUMNS, environment(options.device), options.anew)
    except (OSError, ValueError) as error:
        refuse(f"--out: {error}")
    all_ok = True
    print("| network | pass | dtype | contender | layout | ms (min) | against best plain | MiB saved | of plain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.networks:
        for pass_name in options.passes:
            for dtype in options.dtypes:
                rows = store.of({"network": name, "pass": pass_name, "dtype": dtype, **segments(pass_name, options)})
                found = {row["layout"] for row in rows}
                if not found.issuperset(options.layouts):
                    # These rows are replaced: what they had is measured again, too.
                    layouts = [layout for layout in LAYOUTS if layout in found.union(options.layouts)]
                    asked = argparse.Namespace(**{**vars(options), "layouts": layouts})
                    with precision(dtype, search=not options.no_search):
                        rows = measure(name, pass_name, dtype, asked)
                    store.add(rows)
                for row in rows:
                    print(table_row(row), flush=True)
                    all_ok &= row["status"] == "ok"
    print(f"\n{options.out}")
    return 0 if all_ok else 1


def table_row(row: dict) -> str:
    problem = f"{row['pass']}, {row['batch']} x {row['segment']}^3"
    cells = [row["network"], problem, row["dtype"], row["contender"], row["layout"]]
    if row["status"] != "ok":
        cells += [f"{row['status'].upper()}: {row['note']}", "", "", ""]
    else:
        saved, of_plain = row.get("saved_bytes"), row.get("saved_ratio")
        cells += [
            f"{row['min_ms']:.1f}",
            f"{row['ratio']:.2f}x",
            "" if saved is None else f"{saved / 2**20:.0f}",
            "" if of_plain is None else f"{of_plain:.2f}",
        ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
