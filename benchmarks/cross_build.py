"""Compiles the CUDA library and the probes on a machine without a GPU and without a CUDA build of torch.

    python -m benchmarks.cross_build [--architectures 90a ...] [--torch FOLDER]

Needs nvcc, a C++ compiler and the headers of a torch: the installed one's, or those of FOLDER, an unpacked torch
package of another version (the library uses torch's stable ABI: those of 2.10 serve every later one). Writes
build/cross; where that lies beside the same sources on a machine with a GPU, gpu_check.py uses it and compiles nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cross"
LIBRARY = "_cuda.abi3.so"
FLAGS = runpy.run_path(str(ROOT / "csrc" / "flags.py"))
KERNELS = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
PROBES = sorted((ROOT / "benchmarks" / "probes").glob("*.cu"))
# What the library needs of torch. The loader finds the real ones in the process, by these names.
TORCH_LIBRARIES = ("torch_cuda", "torch_cpu", "c10")


def source_digest() -> str:
    return FLAGS["source_digest"]("csrc", "benchmarks/probes")


def tool(name: str, toolkits: Path = Path("/usr/local")) -> Path | None:
    """A program of the CUDA toolkit, which is often installed but not on the PATH; None if it is not there."""
    found = shutil.which(name) or next(iter(sorted(toolkits.glob(f"cuda*/bin/{name}"))), None)
    return None if found is None else Path(found)


def compile_probe(compiler: Path, source: Path, target: Path, architecture: str) -> list:
    """The command for one probe."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    return [compiler, "-std=c++17", "-O3", code, "-o", target, source]


def run(command: list) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{shlex.join(map(str, command))}\n{result.stdout}{result.stderr}")


def build(architectures: list[str], torch: Path, folder: Path = FOLDER) -> None:
    """Fills ``folder`` anew; the record comes last, so that what is half done is not used."""
    compiler = tool("nvcc")
    if compiler is None:
        sys.exit("there is no nvcc")
    if not (torch / "include" / "torch" / "csrc" / "stable").is_dir():
        sys.exit(f"{torch} holds no headers of torch's stable ABI")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "probes").mkdir(parents=True)
    cxx = FLAGS["compiler"]()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        objects = [work / f"{source.parent.name}_{source.stem}.o" for source in KERNELS]
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        commands = [
            [compiler, *FLAGS["NVCC"], *code, "-Xcompiler=-fPIC", "-c", source, "-o", target]
            for source, target in zip(KERNELS, objects)
        ]
        binding = work / "binding.o"
        flags = [*FLAGS["CXX_CUDA"], "-fPIC", f"-I{ROOT / 'csrc'}", "-isystem", torch / "include"]
        commands.append([*cxx, *flags, "-c", ROOT / "csrc" / "binding" / "cuda.cpp", "-o", binding])
        commands += [compile_probe(compiler, p, folder / "probes" / p.stem, architectures[0]) for p in PROBES]
        # Empty, for their names alone.
        commands += [
            [*cxx, "-shared", f"-Wl,-soname,lib{name}.so", "-x", "c", os.devnull, "-o", work / f"lib{name}.so"]
            for name in TORCH_LIBRARIES
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        needed = [f"-l{name}" for name in TORCH_LIBRARIES]
        run(
            [
                compiler,
                "-shared",
                "-Xlinker=--no-as-needed",
                f"-L{work}",
                "-o",
                folder / LIBRARY,
                binding,
                *objects,
                *needed,
            ]
        )
    version = runpy.run_path(str(torch / "version.py"))["__version__"]
    record = {"torch": str(version), "architectures": architectures, "source": source_digest()}
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")


def refusal(architecture: str, folder: Path = FOLDER) -> str | None:
    """Why what is in ``folder`` cannot be used on a GPU of ``architecture`` ("90a"); None if it can."""
    if not (folder / "record.json").exists():
        return "nothing was cross-built"
    record = json.loads((folder / "record.json").read_text())
    if architecture not in record["architectures"]:
        return f"cross-built for {', '.join(record['architectures'])}, this GPU is {architecture}"
    if record["source"] != source_digest():
        return "cross-built from other sources"
    return None


def install(package: Path, folder: Path = FOLDER) -> None:
    """Puts the library where ``setup.py build_ext --inplace`` does, and notes it in the build record."""
    note = package / "_build.json"
    built = json.loads(note.read_text()) if note.exists() else {}
    record = json.loads((folder / "record.json").read_text())
    shutil.copy(folder / LIBRARY, package / LIBRARY)
    built["cuda"] = {
        "torch": record["torch"],
        "flags": {"architectures": record["architectures"]},
        "sources": FLAGS["source_digest"]("csrc"),  # refusal() has compared those it was built of
    }
    note.write_text(json.dumps(built, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["90a"], metavar="90a", help="probes: the first one's")
    parser.add_argument("--torch", type=Path, metavar="FOLDER", help="a torch package; default: the installed one")
    options = parser.parse_args(arguments)
    spec = importlib.util.find_spec("torch")
    if options.torch is None and spec is None:
        sys.exit("torch is not installed here; --torch names the folder of one")
    build(options.architectures, options.torch or Path(spec.origin).parent)
    print(f"{FOLDER}: {LIBRARY} for {', '.join(options.architectures)} and {len(PROBES)} probes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
