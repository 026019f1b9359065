"""Memory of every result, for both families of operators."""

from __future__ import annotations

import torch
from torch import Tensor


def allocate_output(input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
    shape = (input.shape[0], weight.shape[0], *attention.shape[2:])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def memory_format_of(input: Tensor) -> torch.memory_format:
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if channels_last is not None and input.is_contiguous(memory_format=channels_last):
        # A single channel is contiguous in either format: its stride says which is meant, as in torch's convolutions.
        if not input.is_contiguous() or (input.shape[1] == 1 and input.stride(1) == 1):
            return channels_last
    return torch.contiguous_format


def allocate_gradients(primals, output_mask) -> list[Tensor]:
    """One tensor like each wanted primal; an empty one, never read, where no gradient is wanted.

    Volumes and weight keep their layout; the vectors become contiguous, so that no kernel needs strides for them.

    Raises:
        ValueError: ``output_mask`` does not have one bool for each primal, or asks for the gradient of None.
    """
    if len(output_mask) != len(primals) or any(w and p is None for p, w in zip(primals, output_mask)):
        raise ValueError(
            f"output_mask must have one bool for each of {len(primals)} arguments, false where that is None, "
            f"got {list(output_mask)}"
        )
    formats = [torch.preserve_format] * 3 + [torch.contiguous_format] * 3
    return [
        torch.empty_like(primal, memory_format=layout) if wanted else primals[0].new_empty((0,))
        for primal, wanted, layout in zip(primals, output_mask, formats)
    ]
