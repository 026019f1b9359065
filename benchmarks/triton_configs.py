"""Which configuration of a Triton kernel is the fastest on this GPU: python -m benchmarks.triton_configs [--cases ...].

The defaults of autofocus_kernels/backends/triton/configs.py are reasoned, not measured. Here every kernel of a case
runs by itself in each configuration of a grid around them: first compiled, in a process a core; then judged as in
gpu_table.py, and timed on the device alone. Rows are written as they come; the best of each launch are printed last.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from autofocus_kernels import testing, tolerance
from autofocus_kernels.backends.interface import Gradients
from autofocus_kernels.backends.triton import configs, fitting, interpreted, launch
from autofocus_kernels.backends.triton.configs import Config
from autofocus_kernels.testing import Case, Tensors

from . import cases
from .arguments import Distinct, at_least, refuse
from .contenders import DTYPES, LAYOUTS, lay_out, precision, verdict_on
from .gpu_table import limits, make_tensors, seconds
from .provenance import ENVIRONMENT, ROOT, command_line, environment

# The gradients that each launch is asked for. One kernel makes those of input and weight, in one launch or in two.
LAUNCHES = {
    "forward": (),
    "grad_input_weight": ("input", "weight"),
    "grad_input": ("input",),
    "grad_weight": ("weight",),
    "grad_attention": ("attention", "branch_scale"),
}
WARPS_AND_REGISTERS = ((4, 255), (8, 128), (8, 255), (16, 128))
ROWS = {64: WARPS_AND_REGISTERS[:3], 128: WARPS_AND_REGISTERS, 256: WARPS_AND_REGISTERS[1:]}
COMPILING = 180  # seconds for all that is compiled beforehand
COLUMNS = (
    "case",
    "shape",
    "dtype",
    "layout",
    "launch",
    *Config._fields,
    "default",  # the first that configs.py has for it
    "status",  # ok; misfit, wrong or failed, and then no time
    "note",
    "device_ms",
    *ENVIRONMENT,
    "command",
)


def grid(C: int, O: int) -> list[Config]:
    """Blocks of C up to one that holds all, and the half of that, since each gathers anew; of O any."""

    def blocks(channels: int, most: int) -> list[int]:
        return [block for block in (16, 32, 64, 128) if block <= most and (block == 16 or block < 2 * channels)]

    shapes = itertools.product(blocks(C, 64)[-2:], blocks(O, 128))
    ways = [(rows, *way) for rows, several in ROWS.items() for way in several]
    return [Config(rows, *shape, *way) for shape in shapes for rows, *way in ways]


@contextlib.contextmanager
def only(config: Config) -> Iterator[None]:
    """The launcher knows no other configuration."""
    known = launch.configurations
    launch.forget()
    launch.configurations = lambda *_: (config,)
    try:
        yield
    finally:
        launch.configurations = known
        launch.forget()


def job(name: str, case: Case, tensors: Tensors) -> tuple[Callable[[], None], dict[str, torch.Tensor]]:
    """A call of one launch, beside what prepares and finishes for it, and what it fills, now NaN."""
    call = testing.call_of(case, tensors)
    if name == "forward":
        output = torch.full_like(tensors.grad_output, math.nan)
        return lambda: launch.forward(call, output), {"output": output}
    arguments = tensors.arguments()
    filled = {wanted: torch.full_like(arguments[wanted], math.nan) for wanted in LAUNCHES[name] if wanted in arguments}
    gradients = Gradients(*map(filled.get, Gradients._fields))
    return lambda: launch.backward(call, tensors.grad_output, gradients), filled


def defaults(name: str, case: Case, dtype: str) -> tuple[Config, ...]:
    """What configs.py has for the kernel of a launch, on this device."""
    kernel = "grad_input_weight" if name in ("grad_input", "grad_weight") else name
    if case.mode == "branch":
        kernel = "grad_scaled" if name == "grad_attention" else f"{kernel}_scaled"
    how = "tf32" if dtype == "tf32" else "ieee"
    where = launch.capability(torch.device(device()))
    return configs.configurations(kernel, DTYPES[dtype].itemsize, how, where, case.channels, case.out_channels)


def device() -> str:
    return "cpu" if interpreted() else "cuda"


def chosen(name: str, case: Case, dtype: str, options: argparse.Namespace) -> list[Config]:
    """The defaults first: the rest is compared with them."""
    others = options.configs or grid(case.channels, case.out_channels)
    return list(dict.fromkeys((*defaults(name, case, dtype), *others)))


def measure(case: Case, dtype: str, options: argparse.Namespace, deadline: float) -> Iterator[dict]:
    """The rows of one case; of each launch the default first."""
    with precision(dtype, search=False):
        given = make_tensors(case, dtype, device())
        expected, allowed = limits(case, dtype, given)
        tensors = lay_out(given, case, options.layout)
        for name in options.launches:
            for place, config in enumerate(chosen(name, case, dtype, options)):
                if time.monotonic() > deadline:
                    return
                row = {"case": case.name, "shape": cases.shape(case), "dtype": dtype, "layout": options.layout}
                row |= {"launch": name, **config._asdict(), "default": int(place == 0)}
                with only(config):
                    yield row | verdict(*job(name, case, tensors), expected, allowed, options.seconds)


def verdict(call: Callable[[], None], filled: dict, expected: dict, allowed: dict, budget: float) -> dict:
    """The columns status, note and device_ms."""
    try:
        call()
        errors = {name: tolerance.worst_error(tensor, expected[name]).item() for name, tensor in filled.items()}
        wrong = tolerance.complaints(errors, allowed)
        if wrong:
            return {"status": "wrong", "note": "; ".join(wrong)}
        return {"status": "ok", "device_ms": 1e3 * seconds(call, device(), budget)[0]}
    except fitting.NoConfigurationFits as error:
        return {"status": "misfit", "note": str(error).rpartition("]: ")[2]}
    except Exception as error:
        return verdict_on(error)


def best(rows: list[dict]) -> list[str]:
    """The four fastest rows of a launch, and the default, which is the first, in words."""
    timed = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["device_ms"])
    first = rows[0]
    head = f"{first['case']:<16}{first['dtype']:<9}{first['launch']:<18}"
    said = [f"{head}of {len(rows)} configurations {len(timed)} run"]
    fastest = timed[:4]
    for row in fastest + [first] * (first not in fastest):
        time = f"{row['device_ms']:8.3f} ms" if row["status"] == "ok" else row["status"].upper()
        named = ", ".join(f"{name} {row[name]}" for name in Config._fields)
        said.append(f"    {time}  {named}{'  (the default)' if row['default'] else ''}")
    return said


# ------------------------------------------------------------------ compiling beforehand


def compile_share(options: argparse.Namespace) -> None:
    """Every n-th launch once, so that what Triton makes of them lies in its cache."""
    index, n = options.share
    count = itertools.count()
    for dtype, case in itertools.product(options.dtypes, map(cases.BY_NAME.get, options.cases)):
        with precision(dtype, search=False):
            tensors = lay_out(make_tensors(case, dtype, device()), case, options.layout)
            for name in options.launches:
                for config in chosen(name, case, dtype, options):
                    if next(count) % n != index:
                        continue
                    # What fails here fails again, and is said, when it is measured.
                    with contextlib.suppress(Exception), only(config):
                        job(name, case, tensors)[0]()


def compile_in_processes(arguments: list[str]) -> None:
    """What is not compiled in time is so when it is measured."""
    n, deadline = os.cpu_count() or 1, time.monotonic() + COMPILING
    command = [sys.executable, "-m", "benchmarks.triton_configs", *arguments, "--share"]
    silent = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen([*command, str(index), str(n)], **silent) for index in range(n)]
    for process in running:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


# ------------------------------------------------------------------ the command


def config(text: str) -> Config:
    try:
        return Config(*map(at_least(1), text.split(",")))
    except (TypeError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"must be {','.join(Config._fields)} in numbers, got {text!r}") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = {"nargs": "+", "action": Distinct}
    parser.add_argument("--cases", **several, choices=cases.BY_NAME, default=["32x64^3", "64x48^3"], metavar="CASE")
    parser.add_argument("--dtypes", **several, choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--launches", **several, choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument(
        "--configs", **several, type=config, metavar="CONFIG", help=f"{','.join(Config._fields)}; default: a grid"
    )
    parser.add_argument("--seconds", type=at_least(0.0), default=0.05, help="timed calls per configuration")
    limit = "begin no new configuration after this many seconds"
    parser.add_argument("--time-limit", type=at_least(0.0), default=math.inf, help=limit)
    parser.add_argument("--out", type=Path, help="CSV; default: build/triton-configs.csv")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out or ROOT / "build" / "triton-configs.csv"
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if device() == "cuda" and not torch.cuda.is_available():
        refuse("there is no GPU that torch sees")
    if options.share:
        compile_share(options)
        return 0
    began = time.monotonic()
    if device() == "cuda":
        compile_in_processes(sys.argv[1:] if arguments is None else arguments)
        print(f"compiled: {time.monotonic() - began:.0f} s", flush=True)
    where = environment(device()) | {"command": command_line()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple, list[dict]] = {}
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for dtype, case in itertools.product(options.dtypes, map(cases.BY_NAME.get, options.cases)):
            for row in measure(case, dtype, options, began + options.time_limit):
                writer.writerow(where | row)
                file.flush()
                groups.setdefault((dtype, case.name, row["launch"]), []).append(row)
    for rows in groups.values():
        print(*best(rows), sep="\n", flush=True)
    return 0 if any(row["status"] == "ok" for rows in groups.values() for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
