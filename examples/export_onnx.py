"""Exports a network of the paper to ONNX, for any size of volume, and runs it in onnxruntime.

python examples/export_onnx.py [FILE.onnx]
"""

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch.export import Dim

from autofocus_kernels import networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE.onnx", help="default: in a new temporary folder")
    path = parser.parse_args().file or Path(tempfile.mkdtemp()) / "afn2.onnx"
    torch.manual_seed(0)
    network = networks.build("AFN-2", in_channels=1, num_classes=3, widths=(8, 8, 12, 12), padding="same").eval()
    volume = {axis: Dim(name, min=2, max=4096) for axis, name in enumerate("dhw", start=2)}
    example = torch.randn(2, 1, 12, 14, 16)
    shapes = ({0: Dim("batch", min=1, max=64), **volume},)
    torch.onnx.export(network, (example,), str(path), dynamo=True, dynamic_shapes=shapes, verbose=False)
    print("written:", path)

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    other = torch.randn(1, 1, 20, 17, 15)
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    with torch.no_grad():
        expected = network(other)
    error = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max()
    print(f"shape {tuple(found.shape)}, largest difference from PyTorch, relative: {error.item():.1e}")
    assert error < 1e-4


if __name__ == "__main__":
    main()
