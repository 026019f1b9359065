"""How networks are trained: the recipe published with the paper's code, and a modern one (docs/segmentation.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        optimiser: "rmsprop" (alpha 0.9, eps 1e-4, momentum 0.6) or "adamw"; weight decay is on every parameter.
        schedule: "poly", ``lr (1 - i / iterations)^0.9``, or "cosine"; a step an iteration.
        loss: "cross-entropy" or "dice+cross-entropy", unweighted, over the logits of a crop.
        batch_size: crops an iteration, of all processes together.
        epochs: how often each case gives a crop.
        flip_every_axis: each axis of a crop is flipped with probability 0.5, or the first one only.
        amp: forward under autocast to bfloat16, which needs no scaling of gradients.
    """

    name: str
    optimiser: str
    learning_rate: float
    weight_decay: float
    schedule: str
    loss: str
    batch_size: int = 10
    epochs: int = 400
    flip_every_axis: bool = False
    amp: bool = False

    def __post_init__(self) -> None:
        for field, known in (("optimiser", _OPTIMISERS), ("schedule", _SCHEDULES), ("loss", _LOSSES)):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}, got {value!r}")
        for field in ("batch_size", "epochs"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a whole number above 0, got {value!r}")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                "learning_rate must be a number above 0 and weight_decay one of at least 0, "
                f"got {self.learning_rate} and {self.weight_decay}"
            )


def make_optimiser(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return _OPTIMISERS[recipe.optimiser](parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def make_scheduler(recipe: Recipe, optimiser: torch.optim.Optimizer, iterations: int):
    return _SCHEDULES[recipe.schedule](optimiser, iterations)


def make_loss(recipe: Recipe) -> Callable[[Tensor, Tensor], Tensor]:
    """``loss(logits [N, C, *S], labels [N, *S] of int64)``, a mean over the crops."""
    return _LOSSES[recipe.loss]()


def _rmsprop(parameters: Iterable[nn.Parameter], **options) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, alpha=0.9, eps=1e-4, momentum=0.6, **options)


def _poly(optimiser: torch.optim.Optimizer, iterations: int):
    return torch.optim.lr_scheduler.PolynomialLR(optimiser, total_iters=iterations, power=0.9)


def _dice_cross_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    from monai.losses import DiceCELoss

    loss = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)  # over each crop by itself
    return lambda logits, labels: loss(logits, labels[:, None])


_OPTIMISERS = {"rmsprop": _rmsprop, "adamw": torch.optim.AdamW}
_SCHEDULES = {"poly": _poly, "cosine": torch.optim.lr_scheduler.CosineAnnealingLR}
_LOSSES = {"cross-entropy": nn.CrossEntropyLoss, "dice+cross-entropy": _dice_cross_entropy}

PUBLISHED = Recipe(
    "published",
    optimiser="rmsprop",
    learning_rate=1e-3,
    weight_decay=1e-4,
    schedule="poly",
    loss="cross-entropy",
)
MODERN = Recipe(
    "modern",
    optimiser="adamw",
    learning_rate=1e-3,
    weight_decay=1e-2,
    schedule="cosine",
    loss="dice+cross-entropy",
    flip_every_axis=True,
    amp=True,
)
RECIPES = {recipe.name: recipe for recipe in (PUBLISHED, MODERN)}
