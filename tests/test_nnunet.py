"""nnUNetTrainerAutofocus, found and run by nnU-Net's own commands. Run these with ``pytest -m nnunet``: they train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import autofocus_kernels
from autofocus_kernels import nnunet

PACKAGE = Path(autofocus_kernels.__file__).parent
TINY = """
import os
from autofocus_kernels.nnunet.nnUNetTrainerAutofocus import nnUNetTrainerAutofocus


class nnUNetTrainerTiny(nnUNetTrainerAutofocus):
    dilations = (1, 2, 3)

    # nnU-Net reads the names of the arguments.
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ.get("EPOCHS", 1))
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 3, 1
"""

GATES = """
import sys
import torch
from autofocus_kernels import AutofocusConv3d
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args

plain, tiny = (
    get_trainer_from_args("1", "3d_fullres", 0, name, device=torch.device("cpu"))
    for name in ("nnUNetTrainer", "nnUNetTrainerTiny")
)
plain.initialize()
tiny.initialize()
plain.save_checkpoint(sys.argv[1])
tiny.add_gates(sys.argv[1], sys.argv[2])
load_pretrained_weights(tiny.network, sys.argv[2])
weights = tiny.network.state_dict()
for name, value in plain.network.state_dict().items():
    assert ".seg_layers." in name or torch.equal(weights[name], value), name
layers = [module for module in tiny.network.modules() if isinstance(module, AutofocusConv3d)]
assert layers and not any(layer.attention.conv2.weight.any() for layer in layers)
torch.save({"weights": {}}, sys.argv[1])
for wrong, message in ((sys.argv[1], "be a checkpoint of nnU-Net"), (sys.argv[2], "hold the weights of the network")):
    try:
        tiny.add_gates(wrong, sys.argv[2] + ".gates")
    except ValueError as error:
        assert str(error).startswith("source must " + message) and wrong in str(error), error
    else:
        raise AssertionError(wrong)
"""


def run(code, *arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_missing_nnunet_is_named_with_its_extra():
    code = "import sys; sys.modules['nnunetv2'] = None; import autofocus_kernels.nnunet.nnUNetTrainerAutofocus"
    result = run(code)
    assert result.returncode == 1
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("ImportError: nnUNetTrainerAutofocus needs nnunetv2") and "autofocus-kernels[nnunet]" in last


def test_the_folder_holds_the_trainer_and_nothing_else_to_import():
    names = {path.name for path in Path(nnunet.FOLDER).iterdir() if path.name != "__pycache__"}
    assert names == {"__init__.py", "nnUNetTrainerAutofocus.py"}


@pytest.mark.nnunet
def test_nnunet_finds_the_trainer():
    pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed (pip install '.[nnunet]')")
    result = run(
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "print(find('nnUNetTrainerAutofocus').__mro__[:2])",
        nnUNet_extTrainer=nnunet.FOLDER,
    )
    assert result.returncode == 0, result.stdout
    assert "nnUNetTrainerAutofocus.nnUNetTrainerAutofocus" in result.stdout.splitlines()[-1]


def command(module, entry, *arguments, **environment):
    """Runs one of nnU-Net's commands, by the function that it calls."""
    result = run(f"from nnunetv2.{module} import {entry} as main; main()", *arguments, **environment)
    assert result.returncode == 0, result.stdout[-5000:]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """nnU-Net's folders with five volumes, noise with a bright ball that is to be found, planned and preprocessed."""
    pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed (pip install '.[nnunet]')")
    tmp_path = tmp_path_factory.mktemp("nnunet")
    nibabel = pytest.importorskip("nibabel")
    numpy = pytest.importorskip("numpy")
    folders = {f"nnUNet_{name}": tmp_path / name for name in ("raw", "preprocessed", "results")}
    dataset = folders["nnUNet_raw"] / "Dataset001_Ball"
    for folder in (*folders.values(), dataset / "imagesTr", dataset / "labelsTr", tmp_path / "trainers"):
        folder.mkdir(parents=True)
    random = numpy.random.default_rng(0)
    grid = numpy.stack(numpy.meshgrid(*(numpy.arange(32),) * 3, indexing="ij"))
    for case in range(5):
        centre = random.integers(10, 22, (3, 1, 1, 1))
        label = (((grid - centre) ** 2).sum(0) < 49).astype(numpy.uint8)
        image = (label + random.normal(0, 0.3, label.shape)).astype(numpy.float32)
        nibabel.save(nibabel.Nifti1Image(image, numpy.eye(4)), dataset / "imagesTr" / f"ball_{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, numpy.eye(4)), dataset / "labelsTr" / f"ball_{case}.nii.gz")
    (dataset / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "noise"},
                "labels": {"background": 0, "ball": 1},
                "numTraining": 5,
                "file_ending": ".nii.gz",
            }
        )
    )
    (tmp_path / "trainers" / "tiny_trainer.py").write_text(TINY)
    environment = {
        **{name: str(folder) for name, folder in folders.items()},
        "nnUNet_n_proc_DA": "1",
        "nnUNet_extTrainer": os.pathsep.join([nnunet.FOLDER, str(tmp_path / "trainers")]),
    }
    plan = "experiment_planning.plan_and_preprocess_entrypoints"
    command(plan, "plan_and_preprocess_entry", "-d", "1", "-c", "3d_fullres", "-np", "1", "-npfp", "1", **environment)
    return environment


@pytest.mark.nnunet
def test_an_epoch_of_training_and_prediction(environment, tmp_path):
    settings = ("-tr", "nnUNetTrainerTiny", "-device", "cpu")
    command("run.run_training", "run_training_entry", "1", "3d_fullres", "0", *settings, **environment)
    trained = Path(environment["nnUNet_results"]) / "Dataset001_Ball" / "nnUNetTrainerTiny__nnUNetPlans__3d_fullres"
    checkpoint = torch.load(trained / "fold_0" / "checkpoint_final.pth", weights_only=False)
    gates = {name.split(".convs")[0] for name in checkpoint["network_weights"] if ".attention." in name}
    stages = max(int(name.split(".")[2]) for name in checkpoint["network_weights"] if "decoder.stages" in name)
    assert gates == {f"decoder.stages.{stages - 1}", f"decoder.stages.{stages}"}
    assert all(tensor.isfinite().all() for tensor in checkpoint["network_weights"].values())
    assert (trained / "fold_0" / "validation" / "summary.json").exists()

    raw = Path(environment["nnUNet_raw"]) / "Dataset001_Ball" / "imagesTr"
    command(
        "inference.predict_from_raw_data",
        "predict_entry_point",
        "-i",
        str(raw),
        "-o",
        str(tmp_path / "predicted"),
        "-d",
        "1",
        "-c",
        "3d_fullres",
        "-f",
        "0",
        *settings,
        "-npp",
        "1",
        "-nps",
        "1",
        "--disable_tta",
        **environment,
    )
    assert len(list((tmp_path / "predicted").glob("ball_*.nii.gz"))) == 5

    command(
        "run.run_training", "run_training_entry", "1", "3d_fullres", "0", *settings, "--c", EPOCHS="2", **environment
    )
    further = torch.load(trained / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert further["current_epoch"] == 2
    gate = next(name for name in further["network_weights"] if name.endswith("attention.conv1.weight"))
    assert not torch.equal(further["network_weights"][gate], checkpoint["network_weights"][gate])


@pytest.mark.nnunet
def test_a_checkpoint_of_plain_nnunet_becomes_pretrained_weights(environment, tmp_path):
    result = run(GATES, str(tmp_path / "plain.pth"), str(tmp_path / "with_gates.pth"), **environment)
    assert result.returncode == 0, result.stdout[-5000:]
