"""ruff and mypy as pyproject.toml configures them, the types that a user's checker sees, the map of the files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPP = (".c", ".cpp", ".cu", ".h")
PRIVATE = re.compile(r"_(?!_|fields|replace|asdict)")  # those three are the public names of a NamedTuple

USER = """
import torch
from torch import Tensor, nn

import autofocus_kernels as ak
from autofocus_kernels import networks

layer = ak.AutofocusConv3d(4, 8, dilations=(2, 6, (6, 6, 2)), branch_norm=True, device="meta")
weight: Tensor = layer.weight
gate: nn.Module = layer.attention
x = torch.randn(1, 4, 9, 9, 9)
attention = torch.rand(1, 2, 9, 9, 9)
y: Tensor = ak.autofocus_conv(x, weight, attention, dilations=(1, 2), padding="same")
same: Tensor = ak.reference.autofocus_conv(x, weight, attention, dilations=[1, 2])
network: nn.Module = ak.convert(networks.build("AFN-6"), select=["blocks"])
reasons: dict[str, str | None] = ak.available_backends()
"""

WRONG = """
import autofocus_kernels as ak

ak.AutofocusConv3d("four", 8)
ak.convert("network")
ak.show_config().items()
"""


def run(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_every_file_is_on_the_map():
    """docs/layout.md names all that is compiled or imported, in the section of its folder."""
    page = (ROOT / "docs" / "layout.md").read_text()
    for folder, patterns in (("autofocus_kernels", ("*.py",)), ("csrc", ("*.cpp", "*.cu", "*.h", "*.py"))):
        section = page.split(f"## `{folder}/`")[1].split("\n## ")[0]
        names = {path.name for pattern in patterns for path in (ROOT / folder).rglob(pattern)}
        missing = [name for name in sorted(names) if name not in section]
        assert missing == [], folder


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    pytest.importorskip("ruff")
    result = run("ruff", *command, "--no-cache")
    assert result.returncode == 0, result.stdout


def test_clang_format():
    formatter = pytest.importorskip("clang_format")
    folders = ("csrc", "tests/cuda_host", "tests/helpers", "benchmarks/probes")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in CPP]
    command = [formatter.get_executable("clang-format"), "--dry-run", "--Werror", *sources]
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert sources and result.returncode == 0, result.stdout


@pytest.mark.parametrize("isa", ["avx2", "avx512", "generic"])
def test_what_instruction_sets_share_is_compiled_before_any(isa):
    """The linker keeps one copy of an inline function, and AVX-512's would end a process on a lesser CPU."""
    include = re.compile(r'#include ["<](?:\.\./)?([^">]+)[">]')
    headers = {path.name: path.read_text() for path in (ROOT / "csrc" / "cpu").glob("*.h")}

    def with_their_own(names):
        included, new = set(), set(names)
        while new:
            included |= new
            new = {name for header in new for name in include.findall(headers.get(header, ""))} - included
        return included

    shared = {name for name in with_their_own(["kernels_isa.h"]) if "AUTOFOCUS_ISA" not in headers.get(name, "")}
    before, after = (ROOT / "csrc" / "cpu" / f"kernels_{isa}.cpp").read_text().split('#include "kernels_isa.h"')
    included = with_their_own(include.findall(before))
    assert include.findall(after) == [] and shared <= included, sorted(shared - included)


def test_private_names_stay_in_their_file():
    found = []
    for path in (ROOT / "autofocus_kernels").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {}  # of this package: name in this file -> name there
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.level:
                imported |= {alias.asname or alias.name: alias.name for alias in node.names}
        used = [name for name in imported.values() if PRIVATE.match(name)]
        used += [
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if node.value.id in imported and PRIVATE.match(node.attr)
        ]
        found += [f"{path.relative_to(ROOT)}: {name}" for name in used]
    assert found == []


def test_types(tmp_path):
    """Of the package, and of a user's programs: in one run, most of which goes into torch's own types."""
    pytest.importorskip("mypy")
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(USER)
    wrong.write_text(WRONG)
    result = run("mypy", "--cache-dir", ROOT / "build" / "mypy", "autofocus_kernels", right, wrong)
    errors = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert [line for line in errors if "wrong.py" not in line] == []
    assert [int(line.split("wrong.py:")[1].split(":")[0]) for line in errors] == [4, 5, 6], result.stdout
