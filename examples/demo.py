"""The autofocus layer on a real 3D image, in about two minutes: is it right, how fast is it, what does it do?

    python -m examples.demo          writes demo/attention.png and demo/speed.png

1. Runs the layer on the image through every backend that this machine has and checks output and gradients against
   the reference in float64.
2. Times it against the naive layer, K dilated convolutions and a weighted sum, in turn and on the same tensors.
3. Teaches one layer to fill holes cut into the image. Near the rim of a hole a short reach finds known voxels, in
   its middle only a long one does, so the best dilation changes from voxel to voxel, which a convolution cannot follow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from autofocus_kernels import AutofocusConv3d
from autofocus_kernels.testing import Case, Tensors
from benchmarks.cases import DILATIONS
from benchmarks.contenders import NAIVE, backends_of, contenders
from benchmarks.measurement import failures, measure
from benchmarks.provenance import ROOT, environment
from benchmarks.roofline import Ceilings
from benchmarks.tables import groups, table

SEED = 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder for the pictures")
    parser.add_argument("--quick", action="store_true", help="a few seconds: tiny, and too short to learn anything")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image = read_image()

    print("1 and 2. Right, and how fast?")
    rows = race(image, device, options.quick)
    print(table(rows))

    print("\n3. What does it do? One layer learns to fill holes in the image.")
    size = Sizes(zoom=1, crop=20, steps=3) if options.quick else Sizes(zoom=3, crop=48, steps=250)
    lesson = Lesson(image, size, device)
    lesson.train()
    lesson.evaluate()
    print("\n".join(f"  {name:<34} {error:.3f}" for name, error in lesson.errors.items()))
    print("  (mean squared error in holes it never saw; the image has variance 1)")

    pictures = {"attention.png": lesson.draw(), "speed.png": draw_speed(rows)}
    for name, figure in pictures.items():
        figure.savefig(options.out / name, dpi=110)
        print(f"picture: {options.out / name}")
    wrong = failures(rows)
    for failure in wrong:
        print("FAILED:", failure)
    return 1 if wrong else 0


def read_image() -> Tensor:
    """The MR volume that nibabel ships for its own tests: the middle of a head, 33x41x25 voxels of 2 mm.

    Returns ``[1, 1, x, y, z]``, from left to right, back to front, bottom to top; mean 0, variance 1.
    """
    path = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
    volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata(dtype=np.float32)
    image = torch.from_numpy(np.ascontiguousarray(volume))[None, None]
    image = image.clamp(max=image.quantile(0.995).item())  # a few vessels would set the scale
    return (image - image.mean()) / image.std()


def enlarge(image: Tensor, zoom: int) -> Tensor:
    size = [zoom * (n - 1) + 1 for n in image.shape[2:]]
    return F.interpolate(image, size=size, mode="trilinear", align_corners=True)


def middle(image: Tensor, edge: int) -> Tensor:
    """The cube of this edge in the middle of the image; axes shorter than that stay whole."""
    for axis, size in enumerate(image.shape[2:], start=2):
        image = image.narrow(axis, max(size - edge, 0) // 2, min(size, edge))
    return image


# ------------------------------------------------------------------ 1 and 2: right and fast


def race(image: Tensor, device: str, quick: bool) -> list[dict]:
    """Rows of measure for a layer of 32 channels (8 if quick) on features of the image."""
    torch.manual_seed(SEED)
    channels = 8 if quick else 32
    features = middle(enlarge(image, 1 if quick else 2), 48).to(device)
    stem = nn.Conv3d(1, channels, 3, padding=1, device=device)
    layer = AutofocusConv3d(channels, channels, dilations=DILATIONS, device=device)
    with torch.no_grad():
        features = F.relu(stem(features))
        attention = layer.attention(features)
    case = Case("image", tuple(features.shape[2:]), channels=channels, out_channels=channels, dilations=DILATIONS)
    tensors = Tensors(
        features,
        layer.weight.detach(),
        attention,
        layer.bias.detach(),
        None,
        None,
        grad_output=torch.randn_like(features),
    )
    reasons = backends_of(device)
    for name, reason in reasons.items():
        if reason is not None:
            print(f"backend {name} takes no part: {reason}")
    backends = [name for name, reason in reasons.items() if reason is None]
    rows = []
    passes = ("inference", "training")
    with tqdm(total=len(passes), unit="pass", file=sys.stderr, dynamic_ncols=True, disable=None) as bar:
        measured = measure(
            case,
            "float32",
            passes,
            contenders(backends, compiled=False),
            device,
            Ceilings(device),
            seconds=0.05 if quick else 2.0,
            measure_memory=not quick,
            say=bar.set_postfix_str,
            tensors=tensors,
        )
        for group in measured:
            rows += [{**row, **environment(device)} for row in group]
            bar.update()
    return rows


def draw_speed(rows: list[dict]) -> plt.Figure:
    by_pass = {pass_name: group for (_, _, pass_name), group in groups(rows).items()}
    panels = [
        ("inference", "min_ms", 1, "Forward, milliseconds"),
        ("training", "min_ms", 1, "Forward and backward, milliseconds"),
        ("training", "peak_bytes", 2**20, "Peak memory of forward and backward, MiB"),
        ("training", "saved_bytes", 2**20, "Kept for backward, MiB"),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(11, 5.6), layout="constrained")
    for axis, (pass_name, column, unit, title) in zip(axes.flat, panels):
        shown = [row for row in by_pass[pass_name] if row.get(column) is not None]
        values = [row[column] / unit for row in shown]
        labels = [f"{row['contender']}, {row['layout'].replace('_', ' ')}" for row in shown]
        bars = axis.barh(
            range(len(shown)),
            values,
            color=["#9a9a9a" if row["contender"] == NAIVE else "#2a6fbb" for row in shown],
        )
        axis.bar_label(
            bars, [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values], padding=3, fontsize=9
        )
        axis.set_yticks(range(len(shown)), labels, fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(title, fontsize=11, loc="left")
    first = rows[0]
    machine = first["cpu"] if first["device"] == "cpu" else first["device"]
    figure.suptitle(
        f"The naive layer (grey) against the fused one (blue): image features {first['shape']}, float32, shorter is "
        f"better\n{machine}, {first['threads']} CPU threads, torch {first['torch']}",
        fontsize=11,
    )
    return figure


# ------------------------------------------------------------------ 3: filling holes


class Sizes(NamedTuple):
    zoom: int
    crop: int
    steps: int


class HoleGate(nn.Module):
    """Weights of the dilations from the share of known voxels (channel 1) within reach of each."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Sequential(
            nn.Conv3d(len(DILATIONS), 16, 1), nn.ReLU(), nn.Conv3d(16, len(DILATIONS), 1), nn.Softmax(1)
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.choose(torch.cat([self.known_share(input[:, 1:], reach) for reach in DILATIONS], 1))

    @staticmethod
    def known_share(known: Tensor, reach: int) -> Tensor:
        """Mean over the cube of this reach, one axis after the other."""
        for axis in range(3):
            kernel, padding = [1, 1, 1], [0, 0, 0]
            kernel[axis], padding[axis] = 2 * reach + 1, reach
            mean = known.new_full((1, 1, *kernel), 1 / (2 * reach + 1))
            known = F.conv3d(known, mean, padding=padding)
        return known


def cut_holes(image: Tensor, holes: list[tuple]) -> tuple[Tensor, Tensor]:
    """``[1, 2, *S]``, the image with 0 in balls (centre, radius) and 1 where it is known; and the holes, bool."""
    known = torch.ones_like(image)
    axes = [torch.arange(n, device=image.device) for n in image.shape[2:]]
    for centre, radius in holes:
        z, y, x = ((axis - c) ** 2 for axis, c in zip(axes, centre))
        known[0, 0][z[:, None, None] + y[:, None] + x <= radius**2] = 0
    return torch.cat([image * known, known], 1), known == 0


class Lesson:
    """One AutofocusConv3d that fills holes, and the best that plain dilated convolutions can do."""

    largest_hole = 14.0

    def __init__(self, image: Tensor, sizes: Sizes, device: str) -> None:
        torch.manual_seed(SEED)
        self.sizes = sizes
        self.image = enlarge(image, sizes.zoom).to(device)
        self.layer = AutofocusConv3d(2, 1, dilations=DILATIONS, attention=HoleGate()).to(device)
        nn.init.normal_(self.layer.weight, 0.02, 0.01)
        self.errors: dict[str, float] = {}

    def random_holes(self, size, generator: torch.Generator) -> list[tuple]:
        """About ten in a crop of 48^3, with radii from 1 to ``largest_hole``, most of them small."""
        count = max(1, round(10 * np.prod(size) / 48**3))
        draws = torch.rand(count, 4, generator=generator).tolist()
        return [
            ([share * n for share, n in zip(draw, size)], 1 + draw[3] ** 2 * (self.largest_hole - 1)) for draw in draws
        ]

    def train(self) -> None:
        generator = torch.Generator().manual_seed(SEED + 1)
        optimiser = torch.optim.Adam(self.layer.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-2, total_steps=self.sizes.steps)
        bar = tqdm(range(self.sizes.steps), unit="step", file=sys.stderr, dynamic_ncols=True, disable=None)
        for _ in bar:
            crop = [min(self.sizes.crop, n) for n in self.image.shape[2:]]
            corner = [
                int(torch.randint(n - edge + 1, (), generator=generator)) for n, edge in zip(self.image.shape[2:], crop)
            ]
            window = tuple(slice(c, c + edge) for c, edge in zip(corner, crop))
            target = self.image[(..., *window)]
            input, hole = cut_holes(target, self.random_holes(crop, generator))
            loss = F.mse_loss(self.layer(input)[hole], target[hole])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            bar.set_postfix(error=f"{loss.item():.2f}")

    @torch.no_grad()
    def evaluate(self) -> None:
        """Errors in holes of another draw. The plain convolutions are fitted by least squares to a third draw."""
        size = self.image.shape[2:]
        fit, test = (
            cut_holes(self.image, self.random_holes(size, torch.Generator().manual_seed(SEED + seed)))
            for seed in (2, 3)
        )
        choices = {f"dilation {rate} everywhere": (rate,) for rate in DILATIONS}
        choices["all four dilations, one fixed mix"] = DILATIONS
        for name, rates in choices.items():
            (taps, target), (test_taps, test_target) = (
                (gather_taps(input, hole, rates), self.image[hole].double()) for input, hole in (fit, test)
            )
            ridge = 1e-2 * torch.eye(taps.shape[1], dtype=taps.dtype, device=taps.device)
            weights = torch.linalg.solve(taps.T @ taps + ridge, taps.T @ target)
            self.errors[name] = F.mse_loss(test_taps @ weights, test_target).item()
        input, hole = test
        filled = self.layer(input)
        self.errors["autofocus: dilation per voxel"] = F.mse_loss(filled[hole], self.image[hole]).item()

    @torch.no_grad()
    def draw(self) -> plt.Figure:
        size = self.image.shape[2:]
        middle = size[2] // 2
        # Placed for the eye, all cut through their middle by the slice: small, medium and large.
        places = [(0.22, 0.75, 3), (0.75, 0.80, 5), (0.25, 0.45, 7), (0.72, 0.50, 9), (0.48, 0.20, 13)]
        scale = self.sizes.zoom / 3
        holes = [((size[0] * x, size[1] * y, middle), radius * scale) for x, y, radius in places]
        input, hole = cut_holes(self.image, holes)
        filled, attention = self.layer(input, return_attention=True)
        rates = torch.tensor(DILATIONS, dtype=attention.dtype, device=attention.device)
        reach = torch.einsum("nkzyx,k->nzyx", attention, rates)[:, None]
        rim = hole & (F.max_pool3d(input[:, 1:], 5, stride=1, padding=2) > 0)  # a known voxel within 2 on each axis
        near, far = reach[rim].mean(), reach[hole & ~rim].mean()

        def cut(tensor: Tensor) -> np.ndarray:
            return tensor[0, 0, :, :, middle].T.cpu().numpy()

        grey = {"cmap": "gray", "vmin": -2.5, "vmax": 2.5, "origin": "lower"}
        figure = plt.figure(figsize=(15, 8.6), layout="constrained")
        grid = figure.add_gridspec(2, 5, width_ratios=(1, 1, 1, 1, 1.05))
        top, bottom = ([figure.add_subplot(grid[row, column]) for column in range(5)] for row in range(2))
        where = cut(hole)

        def overlay(axis, values: Tensor, label: str, ticks, cmap: str) -> None:
            axis.imshow(cut(self.image), alpha=0.35, **grey)
            drawn = axis.imshow(
                np.ma.masked_where(~where, cut(values)), cmap=cmap, vmin=ticks[0], vmax=ticks[-1], origin="lower"
            )
            bar = {"location": "bottom", "shrink": 0.8, "aspect": 25, "pad": 0.02}
            figure.colorbar(drawn, ax=axis, ticks=ticks, label=label, **bar)

        top[0].imshow(cut(self.image), **grey)
        top[0].set_title("A slice of a head (MR)")
        top[1].imshow(cut(self.image), **grey)
        top[1].imshow(np.ma.masked_where(~where, where), cmap="Wistia", vmin=0, vmax=1, origin="lower")
        top[1].set_title("Holes are cut into it (orange)")
        top[2].imshow(cut(torch.where(hole, filled, self.image)), **grey)
        top[2].set_title("Filled by the layer")
        overlay(top[3], reach, "voxels", DILATIONS, "viridis")
        top[3].set_title("How far it looks: mean dilation")
        for k, rate in enumerate(DILATIONS):
            overlay(bottom[k], attention[:, k : k + 1], "weight", (0, 0.5, 1), "magma")
            bottom[k].set_title(f"Attention to dilation {rate}")
        for axis in [*top, *bottom[:4]]:
            axis.set_axis_off()
        top[4].text(
            0,
            0.95,
            "One AutofocusConv3d: a single 3x3x3\nkernel that is stretched by 2, 6, 10\nor 14 voxels, weighed "
            "anew at every\nvoxel. Its gate sees only which voxels\nare missing.\n\n"
            "Near the rim of a hole a short reach\nfinds known voxels, in the middle of\na large one only a long one.\n"
            f"{self.sizes.steps} training steps led to dilation {near:.1f}\nwithin 2 voxels of a rim (mean) and\n"
            f"{far:.1f} further in.\n\nThe holes shown were not trained on;\nthe image was.",
            va="top",
            fontsize=11,
            linespacing=1.35,
        )
        self._draw_errors(bottom[4])
        return figure

    def _draw_errors(self, axis) -> None:
        names = [*map(str, DILATIONS), "all,\nfixed", "auto-\nfocus"]
        values = list(self.errors.values())
        bars = axis.bar(range(len(names)), values, color=["#9a9a9a"] * 5 + ["#2a6fbb"])
        axis.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=9, padding=2)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_title(
            "Squared error in unseen holes\n(grey: plain convolutions of that dilation,\nfitted by least squares)",
            fontsize=11,
        )


def gather_taps(input: Tensor, hole: Tensor, rates) -> Tensor:
    """``[holes, taps + 1]`` in float64: what a 3x3x3 kernel at each of ``rates`` reads at every hole, and a one."""
    taps = torch.eye(27, device=input.device).view(27, 1, 3, 3, 3)
    columns = [
        F.conv3d(channel[None, None], taps, padding=rate, dilation=rate)[0][:, hole[0, 0]]
        for channel in input[0]
        for rate in rates
    ]
    columns.append(torch.ones_like(columns[0][:1]))
    return torch.cat(columns).T.double()


if __name__ == "__main__":
    sys.exit(main())
