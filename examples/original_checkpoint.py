"""Loads a checkpoint of the authors' code and segments a volume with the paper's sliding windows.

    python examples/original_checkpoint.py                                    an untrained one, to see it work
    python examples/original_checkpoint.py --checkpoint FILE --image T.nii.gz --out FOLDER

The image holds the modalities along its last axis, in the order that the network was trained with. This writes the
labels as NIfTI, with the affine of the image, and an overlay picture. The command line does the same for a folder of
images: ``python -m autofocus_kernels.segmentation predict``.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from autofocus_kernels import networks
from autofocus_kernels.segmentation.phantom import make_phantom
from autofocus_kernels.segmentation.predict import predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a .pth of the authors' code")
    parser.add_argument("--arch", choices=networks.NAMES, default="AFN-1")
    parser.add_argument("--image", type=Path, help="a NIfTI file")
    parser.add_argument("--out", type=Path, help="a folder for the labels")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp()) if options.out is None else options.out
    folder.mkdir(parents=True, exist_ok=True)
    if options.checkpoint is None:
        options.checkpoint = folder / "untrained.pth"
        torch.save(untrained(options.arch), options.checkpoint)
    if options.image is None:
        if not (folder / "phantom").exists():
            make_phantom(folder / "phantom", cases=4, size=(20, 23, 18), modalities=4)
        options.image = folder / "phantom" / "imagesTs" / "A_003.nii.gz"
    for written in predict(options.checkpoint, options.image, folder / "labels", arch=options.arch, window=(51,)):
        print("labels:", written)


def untrained(arch: str) -> dict:
    """What the authors' training would have saved before its first step, on several GPUs; always the same."""
    torch.manual_seed(0)
    state = networks.original_state_dict(networks.build(arch))
    return {"state_dict": {f"module.{name}": value for name, value in state.items()}}


if __name__ == "__main__":
    main()
