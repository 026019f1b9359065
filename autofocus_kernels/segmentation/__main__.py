"""``python -m autofocus_kernels.segmentation``: phantom, train, predict, evaluate."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

COMMANDS = {
    "phantom": "make a data set to try things on",
    "train": "train a network on a data set",
    "predict": "segment volumes with a trained network",
    "evaluate": "compare segmentations with the truth",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. An error that the user can mend is one line on stderr, and the status is 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parser = _Parser(prog="python -m autofocus_kernels.segmentation", description=__doc__)
        commands = parser.add_subparsers(metavar="COMMAND", required=True)
        for name, help in COMMANDS.items():
            command = commands.add_parser(name, help=help, formatter_class=_Help)
            if name in arguments[:1]:  # the others, and what they import, are not needed
                module = importlib.import_module(f".{name}", __package__)
                command.description = module.__doc__
                module.add_arguments(command)
                command.set_defaults(main=module.main)
        options = parser.parse_args(arguments)
        options.main(options)
    except (ImportError, ValueError, OSError, MemoryError) as error:
        return _fail(str(error) or "out of memory")
    except KeyboardInterrupt:
        return _fail("interrupted") + 128  # 130, as shells have it
    return 0


class _Parser(argparse.ArgumentParser):
    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.register("type", Path, _path)  # of every argument with type=Path

    def error(self, message: str) -> NoReturn:
        """Instead of printing all options, which --help does, and exiting."""
        raise ValueError(f"{message} ({self.prog} --help tells more)")


def _path(text: str) -> Path:
    """Refuses "", which an unset variable of a shell leaves: Path would take it for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or a folder, got ''")
    return Path(text)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that say nothing: None, and whether a flag is set."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, True, False) else super()._get_help_string(action)


def _fail(message: str) -> int:
    print("error: " + "; ".join(line.strip() for line in message.splitlines()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
