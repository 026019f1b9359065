"""The autofocus layer (Qin et al., MICCAI 2018): K dilated convolutions, one weight, in a single fused pass."""

from . import flops as flops
from . import networks, reference
from .config import show_config
from .conv_op import ConvOp1d, ConvOp2d, ConvOp3d
from .conversion import convert, revert
from .dispatch import available_backends
from .functional import autofocus_conv
from .modules import AutofocusConv1d, AutofocusConv2d, AutofocusConv3d, ScaleAttention
from .ops.decompositions import decompositions
from .version import __version__ as __version__

__all__ = [
    "AutofocusConv1d",
    "AutofocusConv2d",
    "AutofocusConv3d",
    "ConvOp1d",
    "ConvOp2d",
    "ConvOp3d",
    "ScaleAttention",
    "autofocus_conv",
    "available_backends",
    "convert",
    "decompositions",
    "networks",
    "reference",
    "revert",
    "show_config",
]
