"""The autofocus layer (Qin et al., MICCAI 2018): K dilated convolutions, one weight, in a single fused pass."""

from . import networks, reference
from .dispatch import available_backends, show_config
from .export import decompositions
from .functional import autofocus_conv
from .modules import AutofocusConv1d, AutofocusConv2d, AutofocusConv3d, ScaleAttention

__version__ = "0.1.0"

__all__ = [
    "AutofocusConv1d",
    "AutofocusConv2d",
    "AutofocusConv3d",
    "ScaleAttention",
    "autofocus_conv",
    "available_backends",
    "decompositions",
    "networks",
    "reference",
    "show_config",
]
