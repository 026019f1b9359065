"""The convolution's operators under torch.vmap."""

from __future__ import annotations

import torch
from torch import Tensor

from .conv import ATTENTION, BIAS, INPUT, SCALE, SHIFT, WEIGHT


def _vmap(op, per_sample: tuple[int, ...], foldable: bool, batch_size: int, in_dims, tensors, settings):
    """The results of ``op`` with the vmapped axis in front.

    Where only ``per_sample`` tensors are batched (slots whose first axis is N) the vmapped axis folds into N and
    one call serves all; otherwise there is one call per vmapped sample.
    """
    dims = in_dims[: len(tensors)]
    tensors = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims)]
    batched = [slot for slot, dim in enumerate(dims) if dim is not None]
    if foldable and set(batched) <= set(per_sample):
        for slot in per_sample:
            if slot not in batched:
                tensors[slot] = tensors[slot].expand(batch_size, *tensors[slot].shape)
        # Gradients that are not wanted have no samples; -1 of nothing at all is no number.
        samples = -1 if batch_size > 0 else tensors[per_sample[0]].shape[1]
        for slot in per_sample:
            tensors[slot] = tensors[slot].flatten(0, 1)
        return [result.unflatten(0, (batch_size, samples)) for result in _as_list(op(*tensors, *settings))]
    if batch_size == 0:  # the shapes of results are those of any sample's
        tensors = [t.new_zeros(1, *t.shape[1:]) if slot in batched else t for slot, t in enumerate(tensors)]
    results = [
        _as_list(op(*(t[i] if slot in batched else t for slot, t in enumerate(tensors)), *settings))
        for i in range(max(batch_size, 1))
    ]
    return [torch.stack(column)[:batch_size] for column in zip(*results)]


def _as_list(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@torch.library.register_vmap("autofocus::forward")
def _forward_vmap(info, in_dims, *arguments):
    tensors, settings = arguments[:6], arguments[6:]
    op = torch.ops.autofocus.forward
    (output,) = _vmap(op, (INPUT, ATTENTION), True, info.batch_size, in_dims, tensors, settings)
    return output, 0


@torch.library.register_vmap("autofocus::backward")
def _backward_vmap(info, in_dims, *arguments):
    tensors, settings = arguments[:7], arguments[7:]
    mask = settings[-1]
    # A parameter's gradient is wanted per vmapped sample, and one folded call would sum over them.
    foldable = not (mask[WEIGHT] or mask[BIAS] or mask[SCALE] or mask[SHIFT])
    slots = (0, 1 + INPUT, 1 + ATTENTION)
    op = torch.ops.autofocus.backward
    results = _vmap(op, slots, foldable, info.batch_size, in_dims, tensors, settings)
    return tuple(results), (0,) * 6
