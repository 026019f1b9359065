"""Where a number comes from: machine, versions, commit and sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# What identifies a measurement: rows that agree in these may stand beside each other and be compared.
ENVIRONMENT = (
    "device",
    "cpu",
    "threads",
    "torch",
    "cuda",
    "cudnn",
    "onednn",
    "triton",
    "python",
    "commit",
    "source",
)


def environment(device: str) -> dict:
    on_gpu = device == "cuda"
    onednn = re.search(r"(?:MKL-DNN|oneDNN) v(\S+)", torch.__config__.show())
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cpu": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else "",
        "cudnn": torch.backends.cudnn.version() if on_gpu else "",
        "onednn": onednn.group(1) if onednn else "",
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "source": source_digest(),
    }


def command_line(arguments: list[str] | None = None) -> str:
    """What was typed; ``arguments`` if they are not those of the process."""
    spec = sys.modules["__main__"].__spec__  # None for a script
    program = sys.argv[:1] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return " ".join(["python", *program, *(sys.argv[1:] if arguments is None else arguments)])


def source_digest() -> str:
    """Of everything whose change may change a result: the package, its compiled libraries, and this folder."""
    digest = hashlib.sha1()
    files = [*ROOT.glob("autofocus_kernels/**/*.py"), *ROOT.glob("autofocus_kernels/*.so")]
    for path in sorted(files + [*ROOT.glob("benchmarks/*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # there is no git
        return "unknown"
    return result.stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
