"""Arguments of the commands of this folder. An error that the user can mend is one line on stderr, with status 2."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch


def at_least(least: int | float) -> Callable[[str], int | float]:
    """A type of argparse: a finite number, whole if ``least`` is."""
    kind = type(least)

    def number(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"must be a {whole}number of at least {least}, got {text!r}")
        return value

    return number


class Distinct(argparse.Action):
    """Keeps each of several values once, so that nothing is measured twice."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def require_device(device: str, dtypes: Iterable[str]) -> None:
    """Ends the program where there is no such device, or the device has no such dtype."""
    if device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda needs a GPU that torch sees")
    if device == "cpu" and "tf32" in dtypes:
        refuse("--dtypes tf32 needs --device cuda: on a CPU it is float32")


def refuse(reason: object) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)
