"""DTensor's sharding rules for the operator: importing this module registers them.

Along one axis of a device mesh the operator, and its backward, run on each device's own part if

* input and attention are sharded over the batch: parameters are whole, their gradients partial sums; or
* weight, bias, ``branch_scale`` and ``branch_shift`` are sharded over output channels: input and attention are whole,
  their gradients partial sums.

Other placements are redistributed to one of these, as DTensor does for every operator. The rules are a module of their
own because importing DTensor takes as long as importing torch.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

# Of input, weight, attention, bias, branch_scale and branch_shift.
_WHOLE = (Replicate(),) * 6
_BATCH = (Shard(0), Replicate(), Shard(0), Replicate(), Replicate(), Replicate())
_OUT_CHANNELS = (Replicate(), Shard(0), Replicate(), Shard(0), Shard(1), Shard(1))
# Each with the placement of the output and of its gradient.
_RULES = ((_WHOLE, Replicate()), (_BATCH, Shard(0)), (_OUT_CHANNELS, Shard(1)))


def _placed(tensors, placements) -> list[Placement | None]:
    return [None if tensor is None else placement for tensor, placement in zip(tensors, placements)]


@register_sharding(torch.ops.autofocus.forward.default)
def _forward(*arguments):
    tensors, settings = arguments[:6], arguments[6:]
    return [([output], [*_placed(tensors, primals), *(None for _ in settings)]) for primals, output in _RULES]


@register_sharding(torch.ops.autofocus.backward.default)
def _backward(grad_output, *arguments):
    tensors, settings, output_mask = arguments[:6], arguments[6:], arguments[-1]
    rules = []
    for primals, output in _RULES:
        gradients = [
            # An unwanted gradient is an empty tensor. That of a tensor that is whole where others are sharded is a sum.
            Replicate() if not wanted or primals is _WHOLE else Partial() if placement == Replicate() else placement
            for placement, wanted in zip(primals, output_mask)
        ]
        rules.append((gradients, [output, *_placed(tensors, primals), *(None for _ in settings)]))
    return rules


# DTensor keeps placements and shapes by those arguments that it is told matter, and register_sharding names single ints
# only. Without this line a backward that wants other gradients than an earlier one would get that one's placements.
_SETTINGS_START = 7
DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[torch.ops.autofocus.backward.default] = RuntimeSchemaInfo(
    _SETTINGS_START, needs_pytree=True
)
