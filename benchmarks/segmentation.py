"""The paper's comparison on the phantom: its networks and this package's variants, in site and across sites.

    python -m benchmarks.segmentation          about an hour on two cores; stopped, it goes on where it was

Every network trains on site A, with the same budget, for each seed, and is tested on other cases of site A and on site
B, whose scans differ in contrast, noise and spacing. AFN-n/sum has one batch norm after the sum of an autofocus layer
instead of one a branch. Writes segmentation.csv (a row a network, seed, site and structure), segmentation-summary.csv
and segmentation.png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from autofocus_kernels.segmentation.evaluate import evaluate
from autofocus_kernels.segmentation.files import SegmentationError, make_folder, read_json, write_csv, write_json
from autofocus_kernels.segmentation.phantom import make_phantom
from autofocus_kernels.segmentation.predict import predict
from autofocus_kernels.segmentation.recipe import RECIPES, Recipe, make_loss, make_optimiser
from autofocus_kernels.segmentation.run import load_model
from autofocus_kernels.segmentation.train import train

from .arguments import Distinct, at_least, refuse
from .provenance import ROOT, command_line, environment

SUM = "/sum"
VARIANTS = ("Basic", "ASPP-c", "ASPP-s", "AFN-1", "AFN-2", "AFN-4", "AFN-6", "AFN-6" + SUM)
SITES = ("A", "B")
WIDTHS = (12, 16, 16, 20)
PARALLEL_WIDTH = {"ASPP-c": 12, "ASPP-s": 48}  # of the paper's 30 and 120, as WIDTHS is of its 30 40 40 50
WINDOW, CASES, SIZE = 75, 80, (128, 128)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "segmentation", help="data and runs")
    parser.add_argument("--out", type=Path, help="tables and picture; default: WORK/results")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--iterations", type=at_least(1), default=600)
    parser.add_argument("--batch", type=at_least(1), default=8)
    parser.add_argument("--recipe", choices=RECIPES, default="published")
    parser.add_argument("--variants", nargs="+", action=Distinct, choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--cases", type=at_least(4), default=CASES, help="of each site; a quarter of them to test on")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="runs at a time, one thread each")
    options = parser.parse_args(arguments)
    options.out = options.out or options.work / "results"
    return options


def main(arguments: list[str] | None = None) -> int:
    try:
        compare(parse(arguments), command_line(arguments))
    except (OSError, SegmentationError) as error:  # of folders and files, which it names
        refuse(error)
    return 0


def compare(options: argparse.Namespace, command: str) -> None:
    """Makes and trains what is not there yet, and reports."""
    settings = {
        "iterations": options.iterations,
        "batch": options.batch,
        "recipe": options.recipe,
        "cases_per_site": options.cases,
    }
    where = environment("cpu")  # of the sources that run; those on disk may change in an hour
    require_same(options.work, {**settings, "commit": where["commit"], "source": where["source"]})
    make_folder(options.out)
    for site in SITES:
        if not (options.work / site / "dataset.json").exists():
            make_phantom(options.work / site, options.cases, seed=SITES.index(site), dims=2, size=SIZE, site=site)
    recipe = replace(RECIPES[options.recipe], batch_size=options.batch, amp=False)
    # Seed by seed: stopped early, every network has had the same number of them.
    todo = [(variant, seed) for seed in range(options.seeds) for variant in options.variants]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(one_run, options.work, *run, recipe, options.iterations) for run in todo]
        for done in tqdm(as_completed(runs), total=len(runs), unit="run", file=sys.stderr, disable=None):
            done.result()
    report(options, todo, recipe, {**settings, **where, "command": command})


def require_same(work: Path, settings: dict) -> None:
    """What an earlier call made stays: it must have been made by these settings, and these sources."""
    make_folder(work)
    file = work / "settings.json"
    if file.exists():
        if (made := read_json(file)) != settings:
            refuse(f"--work: {work} holds runs of {made}, not {settings}: name another folder")
    elif (work / "runs").exists():
        refuse(f"--work: {work} holds runs of unknown settings: name another folder")
    write_json(file, settings)


def folder(work: Path, variant: str, seed: int) -> Path:
    return work / "runs" / f"{variant.replace('/', '-')}-{seed}"


def one_run(work: Path, variant: str, seed: int, recipe: Recipe, iterations: int) -> None:
    """Trains, predicts and scores; what an earlier call finished stays."""
    torch.set_num_threads(1)
    run = folder(work, variant, seed)
    if (run / "scores.json").exists():
        return
    arch = variant.removesuffix(SUM)
    train(
        work / "A",
        run,
        arch,
        recipe=recipe,
        iterations=iterations,
        window=(WINDOW,),
        widths=(*WIDTHS, *([PARALLEL_WIDTH[arch]] if arch in PARALLEL_WIDTH else [])),
        branch_norm=variant == arch,
        validate_every=max(iterations // 2, 1),
        seed=seed,
        device="cpu",
        progress=False,
    )
    scores = []
    for site in SITES:
        predict(run / "last.pt", work / site, run / site, device="cpu")
        for score in evaluate(run / site, work / site / "labelsTs", subset=True):
            scores.append({"site": site, "case": score.case, "structure": score.structure, "dice": score.dice})
    write_json(run / "scores.json", scores)


def report(options: argparse.Namespace, todo: list[tuple[str, int]], recipe: Recipe, where: dict) -> None:
    """``where`` is what all rows share: settings, machine, sources, command."""
    work, out, rows = options.work, options.out, []
    for variant, seed in todo:
        scores = read_json(folder(work, variant, seed) / "scores.json")
        names = list(dict.fromkeys(score["structure"] for score in scores))
        for site in SITES:
            for name in names:
                # A case without the structure, and predicted without it, has no Dice.
                dice = [
                    s["dice"] for s in scores if (s["site"], s["structure"]) == (site, name) and s["dice"] == s["dice"]
                ]
                row = {"network": variant, "seed": seed, "site": site, "structure": name}
                rows.append({**row, "dice": round(statistics.mean(dice), 4), "cases": len(dice)})
    summary = summarise(rows, times(work, options.variants, recipe))
    for name, table in (("segmentation.csv", rows), ("segmentation-summary.csv", summary)):
        write_csv(out / name, [{**rounded(row), **where} for row in table])
    draw(summary, names).savefig(out / "segmentation.png", dpi=110)
    for row in summary:
        print("  ".join(f"{value:>9.3f}" if isinstance(value, float) else f"{value:>9}" for value in row.values()))


def summarise(rows: list[dict], costs: dict[str, dict]) -> list[dict]:
    """A row a network and site: mean and standard deviation, over the seeds, of the mean Dice over cases."""
    summary = []
    for variant, cost in costs.items():
        for site in SITES:
            own = [row for row in rows if (row["network"], row["site"]) == (variant, site)]
            by_seed: dict[int, list[float]] = {}
            for row in own:
                by_seed.setdefault(row["seed"], []).append(row["dice"])
            means = [statistics.mean(values) for values in by_seed.values()]
            structures = {}
            for name in dict.fromkeys(row["structure"] for row in own):
                structures[name] = statistics.mean(row["dice"] for row in own if row["structure"] == name)
            deviation = statistics.stdev(means) if len(means) > 1 else float("nan")
            row = {"network": variant, "site": site, "dice": statistics.mean(means), "std": deviation, **structures}
            summary.append({**row, "seeds": len(means), **cost})
    return summary


def times(work: Path, variants: list[str], recipe: Recipe) -> dict[str, dict]:
    """Parameters, and the least time of a training step of a batch on all threads: the networks in turn, six rounds."""
    steps, costs = {}, {}
    for variant in variants:
        network, config = load_model(folder(work, variant, 0))
        network.train()
        optimiser, loss = make_optimiser(recipe, network.parameters()), make_loss(recipe)
        input = torch.randn(recipe.batch_size, len(config.modalities), WINDOW, WINDOW)
        size = (WINDOW - network.crop[0],) * 2
        labels = torch.randint(len(config.labels), (recipe.batch_size, *size))

        def step(network=network, optimiser=optimiser, loss=loss, input=input, labels=labels):
            optimiser.zero_grad()
            loss(network(input), labels).backward()
            optimiser.step()

        steps[variant] = step
        costs[variant] = {"parameters": sum(p.numel() for p in network.parameters()), "step_ms": float("inf")}
    for _ in range(6):
        for variant, step in steps.items():
            begin = time.perf_counter()
            step()
            elapsed = 1e3 * (time.perf_counter() - begin)
            costs[variant]["step_ms"] = round(min(costs[variant]["step_ms"], elapsed), 1)
    return costs


def rounded(row: dict) -> dict:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def draw(summary: list[dict], structures: list[str]) -> plt.Figure:
    """Dice against the number of autofocus layers, and by structure, for each site."""
    colours = {"small": "#e3b341", "medium": "#3b9eea", "large": "#d1495b", "bright": "#6cbf6c"}
    figure, axes = plt.subplots(len(SITES), 2, figsize=(13, 8), layout="constrained", width_ratios=(1, 1.6))
    for (left, right), site in zip(axes, SITES):
        own = {entry["network"]: entry for entry in summary if entry["site"] == site}
        draw_by_layers(left, own)
        where = "the site of the training" if site == "A" else "another site"
        left.set_title(f"Dice, mean of all structures: {where}", loc="left", fontsize=11)
        width = 0.8 / len(structures)
        for i, name in enumerate(structures):
            at = [place + (i - (len(structures) - 1) / 2) * width for place in range(len(own))]
            right.bar(at, [entry[name] for entry in own.values()], width, color=colours.get(name), label=name)
        right.set_title("By structure: small, medium and large differ in size alone", loc="left", fontsize=11)
        right.set_xticks(range(len(own)), own, fontsize=9)
        right.set_ylim(0, 1)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=9)
    figure.legend(*axes[0][1].get_legend_handles_labels(), loc="outside lower right", ncols=len(structures), fontsize=9)
    seeds = min(entry["seeds"] for entry in summary)
    figure.suptitle(
        f"The paper's networks on the 2D phantom: means over {seeds} seeds, whiskers and bands are standard deviations",
        fontsize=12,
    )
    return figure


def draw_by_layers(axis, own: dict[str, dict]) -> None:
    """A line from Basic to AFN-6, a point for the norm after the sum, and a level with its band for each ASPP."""
    layers = {"Basic": 0, **{f"AFN-{n}": n for n in range(1, 7)}}
    line = [(layers[name], entry["dice"], entry["std"]) for name, entry in own.items() if name in layers]
    if line:
        axis.errorbar(*zip(*line), marker="o", capsize=3, color="#2a6fbb", label="Basic (0), AFN-1 to AFN-6")
    for name, entry in own.items():
        if name.endswith(SUM):
            at = layers[name.removesuffix(SUM)] + 0.15
            axis.errorbar([at], entry["dice"], entry["std"], marker="s", capsize=3, color="#7a3e9d", label=name)
    for name, colour in (("ASPP-c", "#9a9a9a"), ("ASPP-s", "#d9b44a")):
        if name in own:
            level, band = own[name]["dice"], own[name]["std"]
            axis.axhline(level, color=colour, linestyle="--", label=name)
            axis.axhspan(level - band, level + band, color=colour, alpha=0.2, linewidth=0)
    axis.set_xticks(sorted({layers[name.removesuffix(SUM)] for name in own if not name.startswith("ASPP")}))
    axis.set_xlabel("autofocus layers", fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
