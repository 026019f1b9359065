"""The public function: contract, dtype rules, one operator call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .arguments import check_call
from .call import Call
from .dispatch import check_backend_name
from .ops import derivatives


def autofocus_conv(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None = None,
    *,
    dilations,
    stride=1,
    padding="same",
    branch_scale: Tensor | None = None,
    branch_shift: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Sums K dilated convolutions of one shared weight, weighted per voxel: ``out = sum_k a_k (s_k y_k + h_k)``.

    ``y_k`` is the convolution of ``input`` with ``weight`` at dilation ``dilations[k]``, zero padded so that all
    branches are centred on the same voxel; ``a_k`` is ``attention[:, k]``. Without ``branch_scale`` and
    ``branch_shift``, ``s_k`` is 1 and ``h_k`` is ``bias``. All branches are computed in one pass and none is kept
    for backward.

    The result can be differentiated in every tensor, any number of times, in reverse and forward mode. The function
    works under ``torch.func``, ``torch.compile(fullgraph=True)``, ``torch.fx.symbolic_trace`` (as one node) and
    autocast (which casts all tensors except float64 to its dtype).

    Source: Qin et al., "Autofocus Layer for Semantic Segmentation", MICCAI 2018, section 2; docs/math.md.

    Args:
        input: ``[N, C, *S]`` with one to three spatial axes, or ``[C, *S]``; float16, bfloat16, float32, float64.
        weight: ``[O, C, *kernel_size]``, odd kernel sizes.
        attention: ``[N, K, *S_out]`` (or ``[K, *S_out]``), any real weights; a softmax over K in the paper.
        bias: ``[O]`` or None; added in every branch. Must be None in branch mode.
        dilations: K branches, each an int or one int per spatial axis.
        stride: int or one int per spatial axis.
        padding: "same", "valid", an int or one int per spatial axis, as in ``nn.ConvNd`` for the smallest
            dilation of each axis; larger dilations are padded further to stay centred. An int below zero crops:
            that many more positions on each side of the input are read but are not the centre of an output.
        branch_scale: ``[K, O]`` or None (ones): ``s_k``. Giving it or ``branch_shift`` selects branch mode.
        branch_shift: ``[K, O]`` or None (zeros): ``h_k``.
        backend: "reference", "cpu", "triton" or "cuda" forces one. With None, the environment variable
            AUTOFOCUS_BACKEND may force one; otherwise one is chosen for each call.

    Returns:
        ``[N, O, *S_out]`` (``[O, *S_out]`` for an input without a batch axis) in the dtype and memory format of
        ``input``; ``S_out`` is that of ``nn.ConvNd`` at the smallest dilation.

    Raises:
        TypeError: an argument of the wrong type, a dtype that is not floating, or mixed dtypes.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument, what was expected
            and what came.
        RuntimeError: a forced backend cannot run the call; the message says why.
    """
    tensors = (input, weight, attention, bias, branch_scale, branch_shift)
    if is_overridden(tensors):
        return handle_torch_function(
            autofocus_conv,
            tensors,
            *tensors[:4],
            dilations=dilations,
            stride=stride,
            padding=padding,
            branch_scale=branch_scale,
            branch_shift=branch_shift,
            backend=backend,
        )
    call, unbatched = prepare(*tensors, dilations, stride, padding, backend)
    output = derivatives.apply(call)
    return output.squeeze(0) if unbatched else output


def is_overridden(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a ``__torch_function__`` takes the call: that of a proxy of torch.fx, or of a subclass of Tensor.

    Under torch.compile none does, and the operator meets the subclass: there has_torch_function also holds within a
    __torch_function__, where it should not, so the call would come back for ever.
    """
    return has_torch_function(tensors) and not torch.compiler.is_compiling()


def prepare(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    branch_scale: Tensor | None,
    branch_shift: Tensor | None,
    dilations,
    stride,
    padding,
    backend: str | None,
) -> tuple[Call, bool]:
    """What public functions do before they compute: autocast, the batch axis, every check.

    Returns:
        the call, and whether a batch axis was added that the result must lose again.
    """
    check_backend_name(backend)
    if autocasts(input):
        input, weight, attention, bias, branch_scale, branch_shift = _autocast(
            input.device.type, input, weight, attention, bias, branch_scale, branch_shift
        )
    unbatched = (
        isinstance(input, Tensor)
        and isinstance(weight, Tensor)
        and isinstance(attention, Tensor)
        and input.dim() == attention.dim() == weight.dim() - 1
    )
    if unbatched:
        input, attention = input.unsqueeze(0), attention.unsqueeze(0)
    call = check_call(input, weight, attention, bias, branch_scale, branch_shift, dilations, stride, padding, backend)
    return call, unbatched


def autocasts(input: Tensor) -> bool:
    """Whether autocast is on for the device of ``input``."""
    if not isinstance(input, Tensor):
        return False
    # Asking about a device without autocast is an error, and torch.compile cannot trace
    # torch.amp.is_autocast_available before torch 2.13. Of such devices, layers are found on meta alone.
    device_type = input.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _autocast(device_type: str, *tensors):
    """The tensors as autocast casts a convolution's: floating ones but float64, to its dtype."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )
