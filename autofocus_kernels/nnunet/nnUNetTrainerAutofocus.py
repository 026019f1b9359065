"""The trainer of nnU-Net whose planned network has autofocus layers in its decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# Absolute: nnU-Net imports this file by its bare name, outside of the package.
from autofocus_kernels.conversion import RELATIVE_DILATIONS, convert
from autofocus_kernels.geometry import IntOrTuple

try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
except ImportError as error:
    raise ImportError(
        f"nnUNetTrainerAutofocus needs nnunetv2 2.8 or newer ({error}): pip install 'autofocus-kernels[nnunet]'"
    ) from error


class nnUNetTrainerAutofocus(nnUNetTrainer):
    """Turns the convolutions of the last two decoder stages, those before the head, into autofocus layers.

    All else is as planned and as in ``nnUNetTrainer``, kernels, strides and deep supervision included. nnU-Net plans
    patch and batch for the network without gates. Subclass to choose other dilations or convolutions.
    """

    # In units of a voxel of the stage; 1 must be among them (autofocus_kernels.conversion).
    dilations: Sequence[IntOrTuple] = RELATIVE_DILATIONS

    @classmethod
    def select(cls, network: nn.Module):
        """What :func:`autofocus_kernels.convert` is to convert.

        Raises:
            ValueError: ``network`` has no decoder with stages, as nnU-Net's own have.
        """
        stages = getattr(getattr(network, "decoder", None), "stages", None)
        if stages is None:
            raise ValueError(
                f"the planned network must have decoder.stages, got {type(network).__name__}: override select"
            )
        return [f"decoder.stages.{i}" for i in range(len(stages))[-2:]]

    # nnU-Net's is static, and is called on the class and on instances: a class method serves both.
    @classmethod
    def build_network_architecture(
        cls, plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        network = super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        # Nothing is trained yet that a one-hot start would preserve.
        return convert(network, cls.dilations, cls.select(network), initial_attention=None)

    @classmethod
    def add_gates(cls, source, target) -> None:
        """Writes ``source``, a checkpoint of plain nnU-Net, to ``target`` as one for ``-pretrained_weights``.

        nnU-Net loads pretrained weights only if they hold every parameter of the network. The gates added here give
        nearly all attention to the trained convolution, so that training starts close to where ``source`` ended.
        nnU-Net's checkpoints are pickles, which can run code: give it only files that you trust.

        Raises:
            ValueError: ``source`` is no checkpoint of nnU-Net, or not of its planned network as it is.
        """
        checkpoint = torch.load(source, map_location="cpu", weights_only=False)
        if not isinstance(checkpoint, dict) or not {"init_args", "network_weights"} <= set(checkpoint):
            raise ValueError(
                f"source must be a checkpoint of nnU-Net, with init_args and network_weights, got {source}"
            )
        made_with = checkpoint["init_args"]
        plans = PlansManager(made_with["plans"])
        configuration = plans.get_configuration(made_with["configuration"])
        network = super().build_network_architecture(
            plans,
            configuration,
            determine_num_input_channels(plans, configuration, made_with["dataset_json"]),
            plans.get_label_manager(made_with["dataset_json"]).num_segmentation_heads,
        )
        try:
            network.load_state_dict(checkpoint["network_weights"])
        except RuntimeError as error:  # it has gates already, or another trainer built the network
            raise ValueError(
                f"source must hold the weights of the network as nnU-Net plans it, got {source}: {error}"
            ) from error
        convert(network, cls.dilations, cls.select(network))
        torch.save({**checkpoint, "network_weights": network.state_dict()}, target)
