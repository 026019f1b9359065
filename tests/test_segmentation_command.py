"""The command line: what is wrong ends in one line and 2, and the extra is named where a package is missing."""

import dataclasses
import importlib
import inspect
import shlex
import sys
from pathlib import Path

import pytest

from autofocus_kernels import segmentation
from autofocus_kernels.segmentation import __main__ as command

pytest.importorskip("autofocus_kernels.segmentation.extra", exc_type=ImportError)

from autofocus_kernels.segmentation.recipe import MODERN


def fails_in_one_line(capsys, words):
    assert command.main(words) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and not output.out
    return output.err


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "the following arguments are required: COMMAND"),
        ("polish", "argument COMMAND: invalid choice: 'polish'"),
        ("phantom", "the following arguments are required: OUT"),
        ("phantom out --dims 4", "argument --dims: invalid choice"),
        ("phantom out --dims 2 --size 4 4", "size must be 2 numbers of at least 8"),
        ("phantom file --dims 2 --cases 1", "file/imagesTr: cannot be made: Not a directory"),
        ("train", "the following arguments are required: --data, --out"),
        ("train --data none --out run", "none: cannot be read as JSON: No such file"),
        ("train --data none --out run --arch AFN-7", "argument --arch: invalid choice"),
        ("train --data none --out run --padding full", "argument --padding: invalid choice"),
        ("train --data none --out run --recipe mine", "argument --recipe: invalid choice"),
        ("train --data none --out run --dilations 2,x", "must be whole numbers as 6 or 6,6,2, got '2,x'"),
        ("train --data none --out run --seed -1", "seed must be at least 0"),
        ("train --data none --out run --epochs 2 --iterations 3", "not allowed with argument"),
        ("predict --model none", "the following arguments are required: --input, --output"),
        ("predict --model none --input none --output out", "none: cannot be read as a checkpoint: No such file"),
        ("predict --model none --input none --output out --tiling roman", "argument --tiling: invalid choice"),
        ("predict --model none --input '' --output out", "argument --input: must name a file or a folder, got ''"),
        ("train --data none --out=", "argument --out: must name a file or a folder, got ''"),
        ("phantom ''", "argument OUT: must name a file or a folder, got ''"),
        ("evaluate", "the following arguments are required: --pred, --truth, --out"),
        ("evaluate --pred none --truth none --out", "argument --out: expected one argument"),
        ("evaluate --pred none --truth none --out scores.csv", "none: must be a folder of NIfTI files"),
        ("evaluate --pred none --truth none --out scores.csv --regions core=x", "regions must be name=1,3"),
    ],
)
def test_wrong_arguments_end_in_one_line(tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert message in fails_in_one_line(capsys, shlex.split(line))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Command -> its function, what it has to be given, and a line with every other option at a value of its own.
FUNCTIONS = {"phantom": "make_phantom", "train": "train", "predict": "predict", "evaluate": "evaluate"}
REQUIRED = {
    "phantom": ("data", {"out": Path("data"), "cases": 12}),
    "train": ("--data data --out run", {"data": Path("data"), "run": Path("run")}),
    "predict": (
        "--model run --input data --output out",
        {"model": Path("run"), "input": Path("data"), "output": Path("out")},
    ),
    "evaluate": (
        "--pred out --truth data --out scores.csv",
        {"pred": Path("out"), "truth": Path("data"), "out": Path("scores.csv")},
    ),
}
OPTIONS = {
    "phantom": (
        "--cases 7 --seed 5 --dims 2 --size 40 50 --site B --modalities 3 --anisotropic",
        {"cases": 7, "seed": 5, "dims": 2, "size": [40, 50], "site": "B", "modalities": 3, "anisotropic": True},
    ),
    "train": (
        "--labels none liver --cache 3 --arch AFN-2 --widths 4 5 6 7 --dilations 1 2,3 --padding same --no-branch-norm "
        "--recipe modern --window 30 31 --batch-size 6 --learning-rate 0.5 --no-amp --epochs 9 --validate-every 8 "
        "--seed 5 --device cuda:1 --workers 2",
        {
            "labels": ["none", "liver"],
            "cache": 3,
            "arch": "AFN-2",
            "widths": [4, 5, 6, 7],
            "dilations": [1, (2, 3)],
            "padding": "same",
            "branch_norm": False,
            "recipe": dataclasses.replace(MODERN, batch_size=6, learning_rate=0.5, amp=False, epochs=9),
            "window": [30, 31],
            "validate_every": 8,
            "seed": 5,
            "device": "cuda:1",
            "workers": 2,
        },
    ),
    "predict": (
        "--arch AFN-1 --tiling gaussian --window 30 31 --device cuda:1 --attention --overwrite",
        {
            "arch": "AFN-1",
            "tiling": "gaussian",
            "window": [30, 31],
            "device": "cuda:1",
            "attention": True,
            "overwrite": True,
        },
    ),
    "evaluate": ("--regions core=1,3 --subset", {"regions": {"core": (1, 3)}, "subset": True}),
}


@pytest.fixture
def given(monkeypatch):
    """What a line gives the function of its command: every argument by name."""

    def of_line(name, line):
        module = importlib.import_module(f"{segmentation.__name__}.{name}")
        signature, arguments = inspect.signature(getattr(module, FUNCTIONS[name])), {}

        def function(*positional, **keywords):
            bound = signature.bind(*positional, **keywords)
            bound.apply_defaults()
            arguments.update(bound.arguments)
            raise ValueError("enough")

        monkeypatch.setattr(module, FUNCTIONS[name], function)
        assert command.main([name, *shlex.split(line)]) == 2
        return arguments, {key: p.default for key, p in signature.parameters.items() if p.default is not p.empty}

    return of_line


@pytest.mark.parametrize("name", command.COMMANDS)
def test_defaults_of_a_command_are_those_of_its_function(given, name):
    line, required = REQUIRED[name]
    arguments, defaults = given(name, line)
    assert arguments == defaults | required


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_option_reaches_the_function(given, name):
    line, required = REQUIRED[name]
    options, expected = OPTIONS[name]
    arguments, defaults = given(name, f"{line} {options}")
    assert arguments == defaults | required | expected


def test_the_number_of_iterations_reaches_the_function(given):
    assert given("train", f"{REQUIRED['train'][0]} --iterations 11")[0]["iterations"] == 11


@pytest.mark.parametrize("name", [*command.COMMANDS, "files", "dataset", "crops", "pictures", "run"])
def test_a_missing_package_names_the_extra(monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, "monai", None)  # as where it is not installed
    for module in [module for module in sys.modules if module.startswith(f"{segmentation.__name__}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(segmentation, "extra")
    with pytest.raises(ImportError, match=r"segmentation needs monai: pip install 'autofocus-kernels\[segmentation\]'"):
        importlib.import_module(f"{segmentation.__name__}.{name}")
    if name in command.COMMANDS:
        assert "'autofocus-kernels[segmentation]'" in fails_in_one_line(capsys, [name, "--help"])


def test_help_without_a_command_needs_no_package(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib, "import_module", lambda *_: pytest.fail("imported"))
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(help in shown for help in command.COMMANDS.values())
