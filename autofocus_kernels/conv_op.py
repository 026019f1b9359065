"""Classes for networks that take the class of their convolutions as an argument: ``conv_op=ConvOp3d``.

Such networks, for example those of nnU-Net's dynamic_network_architectures, call the class like ``nn.ConvNd``, with a
padding that fits a dilation of 1, and ask whether it is a subclass of ``nn.ConvNd``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .conversion import RELATIVE_DILATIONS
from .geometry import IntOrTuple, per_axis, resolve_dilations, smallest_dilation
from .modules import AUTOFOCUS, CONV


class _ConvOp:
    """What the three classes share, in front of ``nn.Conv1d/2d/3d``. Calling one makes an instance of another class."""

    spatial_dims: int
    dilations: Sequence[IntOrTuple] = RELATIVE_DILATIONS

    def __new__(cls, in_channels, out_channels, kernel_size, *arguments, **keywords):
        sizes = per_axis("kernel_size", kernel_size, cls.spatial_dims, minimum=1)
        branches = resolve_dilations(cls.dilations, cls.spatial_dims)
        if max(smallest_dilation(branches)) > 1:
            raise ValueError(
                f"dilations of {cls.__name__} must start at 1 on every axis (the padding of the caller fits a dilation "
                f"of 1), got {cls.dilations!r}"
            )
        if max(sizes) == 1:
            return CONV[cls.spatial_dims](in_channels, out_channels, sizes, *arguments, **keywords)
        return AUTOFOCUS[cls.spatial_dims](
            in_channels, out_channels, sizes, *arguments, dilations=cls.dilations, **keywords
        )


_DOC = """Called as ``nn.Conv{n}d``, makes an :class:`autofocus_kernels.AutofocusConv{n}d`.

Its dilations start at 1, so that a padding for a plain convolution keeps the sizes, with or without a stride. They
count voxels of the stage that the layer is in: after two strides of 2, a dilation of 3 is one of 12 in the image. A
kernel of one voxel has nothing to choose and makes a plain ``nn.Conv{n}d``.

``dilations`` is an attribute of the class, (1, 3, 5, 7): the paper's in units of the smallest. Subclass to set it; a
class in a module of its own can be named in a file (nnU-Net's plans)::

    class ConvOp(autofocus_kernels.ConvOp{n}d):
        dilations = (1, 2, 4)

Raises:
    TypeError, ValueError: ``dilations`` that do not start at 1, or an argument that the layer refuses.
"""


class ConvOp1d(_ConvOp, nn.Conv1d):
    __doc__ = _DOC.format(n=1)
    spatial_dims = 1


class ConvOp2d(_ConvOp, nn.Conv2d):
    __doc__ = _DOC.format(n=2)
    spatial_dims = 2


class ConvOp3d(_ConvOp, nn.Conv3d):
    __doc__ = _DOC.format(n=3)
    spatial_dims = 3
