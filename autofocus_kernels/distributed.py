"""For a volume that is too large for one device: one shard, along one spatial axis, on each rank of a process group.

Every rank calls the layer on its own shard. First the ranks exchange the halo, the voxels that the layer reads beyond
a shard. An output belongs to the rank whose shard holds its centre, so none is computed twice (docs/distributed.md).
"""

from __future__ import annotations

import copy
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .branch_norm import uses_batch_statistics
from .functional import autocasts
from .geometry import Geometry, resolve, smallest_dilation
from .modules import AutofocusConvNd, ScaleAttention, check_layer_input
from .ops.allocation import memory_format_of


class Span(NamedTuple):
    """Positions ``start`` to ``stop - 1`` of the sharded axis of the whole volume; zeros where they lie outside."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def common(self, other: Span) -> Span:
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

    def around(self, other: Span) -> Span:
        """The smallest span that holds both."""
        return Span(min(self.start, other.start), max(self.stop, other.stop))


class SpatiallySharded(nn.Module):
    """Runs ``layer`` on a volume that is sharded along one spatial axis over the ranks of a process group.

    Outputs and gradients of the inputs, joined along ``dim``, are those of ``layer`` on the whole volume. Gradients of
    its parameters are each rank's own share, as in every other layer of a network on shards. One process would have
    their sum; adding them up is left to data parallelism (docs/distributed.md). Differentiable twice, in reverse mode.

    All ranks must call the layer, and its backward, together and in the same order. Shards may differ in size.

    Args:
        layer: an ``AutofocusConvNd``, or an ``nn.ConvNd`` with an odd kernel and zero padding.
        dim: the sharded axis of a batched input ``[N, C, *S]``: 2 is the first spatial axis, -1 the last.
        process_group: its ranks, in order, hold the shards in order; None is the default group.
        attention_reach: for a gate that is not a ``ScaleAttention``: how many voxels it reads, along ``dim``, on either
            side of the centre of an output. The gate must treat all voxels alike, as convolutions do.

    Shape:
        as ``layer``; input and output hold the rank's part of axis ``dim``.

    Raises:
        TypeError, ValueError: an argument of the wrong form; inputs whose dtype, shape outside ``dim`` or need for a
            gradient differs between ranks; a rank without any output; norms that would use a shard's statistics alone.
        RuntimeError: ``torch.distributed`` is not initialised, or this process is not in the group.
    """

    def __init__(
        self,
        layer: nn.Module,
        dim: int,
        process_group: dist.ProcessGroup | None = None,
        *,
        attention_reach: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise TypeError(f"layer must be an AutofocusConvNd or an nn.ConvNd, got {type(layer).__name__}")
        _check_layer(layer)
        axes = len(layer.kernel_size)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim must be an int, got {dim!r}")
        if not (2 <= dim < axes + 2 or -axes <= dim < 0):
            raise ValueError(f"dim must be 2 to {axes + 1} or -{axes} to -1 (a spatial axis of the input), got {dim}")
        self.layer = layer
        self.dim = dim - axes - 2 if dim > 0 else dim  # from the end: right with and without a batch axis
        self.process_group = process_group
        self.attention_reach = attention_reach
        if isinstance(layer, AutofocusConvNd):
            _attention_reach(layer.attention, self.dim, attention_reach)  # raises now what forward would

    def forward(self, input: Tensor, return_attention: bool = False):
        if torch.compiler.is_compiling():  # torch.compile cannot trace messages between processes
            return torch.compiler.disable(self._forward)(input, return_attention)
        return self._forward(input, return_attention)

    @parametrize.cached()  # the weight is looked at several times, and of spectral_norm each look would be a step
    def _forward(self, input: Tensor, return_attention: bool):
        layer: Any = self.layer
        dim = self.dim
        fused = isinstance(layer, AutofocusConvNd)
        shards = self._agreed_shards(input, return_attention)
        geometry = self._geometry(input, shards)
        axis = _Axis.of(geometry, dim)
        outputs = axis.outputs(shards)
        contexts, windows = self._reads(axis, outputs)
        rank = dist.get_rank(self.process_group)
        window = _Gather.apply(input, Exchange(dim, rank, self.process_group, shards, windows))

        def part(span: Span) -> Tensor:
            if span == windows[rank]:
                return window  # the gradient of a view would be a copy of the size of the window
            return window.narrow(dim, span.start - windows[rank].start, span.length)

        def own_outputs(of_context: Tensor) -> Tensor:
            first = outputs[rank].start - contexts[rank].start // axis.stride
            return of_context.narrow(dim, first, outputs[rank].length)

        context = part(contexts[rank])
        if not fused:
            # No view, as of no convolution: FSDP loses its hook on one that nn.ReLU, say, changes in place.
            return own_outputs(layer(context)).clone()
        attention = layer.attention(context.detach() if layer.detach_attention else context)
        _check_attention(attention, dim, axis.outputs_of(contexts[rank]))
        attention = own_outputs(attention)
        # The layer's own padding, in numbers. Along dim the window holds all that the largest dilation reads, which is
        # cropped again: padding counts from the smallest.
        smallest = smallest_dilation(geometry.dilations)
        padding = [r * (k // 2) - o for r, k, o in zip(smallest, geometry.kernel_size, geometry.origin)]
        padding[dim] += geometry.origin[dim] - axis.reach
        output = layer.blend(part(axis.read_by(outputs[rank])), layer.weight, attention, tuple(padding))
        return (output, attention) if return_attention else output

    def _agreed_shards(self, input: Tensor, return_attention: bool) -> list[Span]:
        """The shard of every rank, after all checks of what the ranks pass and of the layer as it is now."""
        layer: Any = self.layer
        _check_process(self.process_group)
        try:
            self._check_own(input, return_attention)
            error = None
        except (TypeError, ValueError, RuntimeError) as raised:
            error = raised  # for _gather_shards to raise, once the other ranks know
        return _gather_shards(input, self.dim, self.process_group, error, layer.weight.device)

    def _geometry(self, input: Tensor, shards: list[Span]) -> Geometry:
        """Of the layer on the whole volume."""
        layer: Any = self.layer
        size = list(input.shape[-len(layer.kernel_size) :])
        size[self.dim] = shards[-1].stop
        dilations = layer.dilations if isinstance(layer, AutofocusConvNd) else (layer.dilation,)
        return resolve(tuple(size), layer.kernel_size, dilations, layer.stride, layer.padding)

    def _reads(self, axis: _Axis, outputs: list[Span]) -> tuple[list[Span], list[Span]]:
        """For every rank's outputs: what its gate (or its plain convolution) runs on, and all that the rank reads."""
        layer: Any = self.layer
        if not isinstance(layer, AutofocusConvNd):
            contexts = [axis.context(span, axis.reach) for span in outputs]
            return contexts, contexts
        # Not in the constructor: since then convert may have changed the layer in place, or the gate been replaced.
        reach = _attention_reach(layer.attention, self.dim, self.attention_reach)
        contexts = [axis.context(span, reach) for span in outputs]
        return contexts, [axis.read_by(span).around(context) for span, context in zip(outputs, contexts)]

    def _check_own(self, input, return_attention: bool) -> None:
        """What a rank can tell by itself."""
        layer: Any = self.layer
        _check_layer(layer)  # again: a padding_mode may be set later
        if isinstance(layer, AutofocusConvNd):
            check_layer_input(input, layer.weight)
            _attention_reach(layer.attention, self.dim, self.attention_reach)
            if layer.branch_norm is not None:
                self._check_norms(layer.branch_norm)
        elif return_attention:
            raise TypeError(f"return_attention is for autofocus layers, got a layer of type {type(layer).__name__}")
        elif not isinstance(input, Tensor) or input.dim() - len(layer.kernel_size) not in (1, 2):
            raise ValueError(f"input must be a tensor [N, C, *S] or [C, *S] for {layer}, got {_describe(input)}")
        elif input.device != layer.weight.device:
            raise ValueError(
                f"input must be on the device of the layer's weight, {layer.weight.device}, got {input.device}"
            )
        elif input.dtype != layer.weight.dtype and not autocasts(input):
            raise TypeError(f"input must have the dtype of the layer's weight, {layer.weight.dtype}, got {input.dtype}")

    def _check_norms(self, norms: nn.ModuleList) -> None:
        if not uses_batch_statistics(norms):
            return
        ranks = set(dist.get_process_group_ranks(self.process_group))
        norm: Any
        for k, norm in enumerate(norms):
            shared = isinstance(norm, nn.SyncBatchNorm) and norm.training
            if len(ranks) > 1 and not (shared and ranks.issubset(dist.get_process_group_ranks(norm.process_group))):
                raise ValueError(
                    f"branch_norm[{k}] must share its statistics with all ranks that hold a shard "
                    f"(nn.SyncBatchNorm.convert_sync_batchnorm), got {type(norm).__name__}"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> SpatiallySharded:
        """As of every module, but in the same process group, which cannot be copied."""
        copied = type(self).__new__(type(self))
        memo |= {id(self): copied, id(self.process_group): self.process_group}
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _check_process(group: dist.ProcessGroup | None) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("SpatiallySharded needs torch.distributed.init_process_group to have been called")
    if dist.get_rank(group) < 0:
        raise RuntimeError("SpatiallySharded: this process is not in process_group")


def _check_layer(layer) -> None:
    if layer.padding_mode != "zeros" or any(size % 2 == 0 for size in layer.kernel_size):
        raise ValueError(f"layer must have odd kernel sizes and zero padding, got {layer}")


def _attention_reach(gate: nn.Module, dim: int, given: int | None) -> int:
    if isinstance(gate, ScaleAttention):
        return gate.kernel_size[dim] // 2
    if given is None:
        raise ValueError(f"attention_reach must be given for a gate of type {type(gate).__name__}, got None")
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"attention_reach must be an int, got {given!r}")
    if given < 0:
        raise ValueError(f"attention_reach must be at least 0, got {given}")
    return given


def _check_attention(attention, dim: int, outputs: int) -> None:
    """What the layer checks of a gate's output, before this rank's part is cut out of it."""
    if not isinstance(attention, Tensor):
        raise TypeError(f"attention must return a tensor [N, K, *S_out], got {type(attention).__name__}")
    if attention.shape[dim] != outputs:
        raise ValueError(
            f"attention must be [N, K, *S_out] with {outputs} voxels on axis {dim} for the part that this rank reads, "
            f"got shape {list(attention.shape)}"
        )


def _describe(input) -> str:
    return f"shape {list(input.shape)}" if isinstance(input, Tensor) else type(input).__name__


# ------------------------------------------------------------------ what each rank holds, computes and reads


def _gather_shards(
    input: Tensor, dim: int, group: dist.ProcessGroup | None, error: Exception | None, device: torch.device
) -> list[Span]:
    """The shard of every rank of ``group``. All ranks raise if their shards do not make one volume.

    ``error`` is why this rank cannot go on; ``device`` is where messages may be.
    """
    facts = []  # none from a rank that cannot go on
    if error is None:
        wants_gradient = input.requires_grad and torch.is_grad_enabled()
        facts = [input.dtype.itemsize, input.dtype is torch.bfloat16, wants_gradient, input.dim(), *input.shape]
    own = torch.tensor(facts + [0] * (_SHAPE + 5 - len(facts)), device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    ranks = torch.stack(gathered).tolist()
    if error is not None:
        raise error
    if refused := [number for number, rank in enumerate(ranks) if rank[0] == 0]:
        raise ValueError(f"input must be one that all ranks take, got one that rank {refused[0]} refuses")
    at = _SHAPE + input.dim() + dim
    sizes = [rank[at] for rank in ranks]
    alike = [rank[:at] + rank[at + 1 :] for rank in ranks]
    if any(rank != alike[0] for rank in alike):
        forms = [_described(*rank) for rank in ranks]
        raise ValueError(
            "input must have one dtype and, except along the sharded axis, one shape on all ranks, and require a "
            f"gradient on all or none, got {', '.join(forms)}"
        )
    stops = list(accumulate(sizes))
    return [Span(stop - size, stop) for size, stop in zip(sizes, stops)]


_SHAPE = 4  # where the shape begins among the facts of a rank


def _described(itemsize: int, is_bfloat16: int, wants_gradient: int, dims: int, *shape: int) -> str:
    """The facts of a rank in words."""
    dtype = "bfloat16" if is_bfloat16 else f"{8 * itemsize} bits"
    return f"{list(shape[:dims])} ({dtype}, gradient {bool(wants_gradient)})"


class _Axis(NamedTuple):
    """The sharded axis of the whole volume: output ``p`` has its centre at ``origin + stride * p``."""

    size: int
    num_outputs: int
    origin: int
    stride: int
    reach: int  # of the largest dilation

    @staticmethod
    def of(geometry: Geometry, dim: int) -> _Axis:
        reach = max(dilation[dim] for dilation in geometry.dilations) * (geometry.kernel_size[dim] // 2)
        return _Axis(
            geometry.input_size[dim], geometry.output_size[dim], geometry.origin[dim], geometry.stride[dim], reach
        )

    def outputs(self, shards: list[Span]) -> list[Span]:
        """The outputs of every rank: those with their centre in its shard; those in the padding go to the ends."""
        first = [-((self.origin - shard.start) // self.stride) for shard in shards[1:]]
        bounds = [0, *(min(max(start, 0), self.num_outputs) for start in first), self.num_outputs]
        outputs = [Span(*pair) for pair in pairwise(bounds)]
        if any(span.length == 0 for span in outputs):
            raise ValueError(
                "every rank must hold the centre of an output, got shards of "
                f"{[shard.length for shard in shards]} with {[span.length for span in outputs]} outputs"
            )
        return outputs

    def outputs_of(self, context: Span) -> int:
        """How many outputs the layer has on a part, with its own padding."""
        return -(-(context.length - 2 * self.origin) // self.stride)

    def centres(self, outputs: Span) -> Span:
        return Span(self.origin + self.stride * outputs.start, self.origin + self.stride * (outputs.stop - 1) + 1)

    def read_by(self, outputs: Span) -> Span:
        """What the largest dilation reads for these outputs."""
        centres = self.centres(outputs)
        return Span(centres.start - self.reach, centres.stop + self.reach)

    def context(self, outputs: Span, reach: int) -> Span:
        """A part of the volume on which a module, run with its own padding, is right about these outputs.

        ``reach`` is how far the module reads. The part starts at a multiple of the stride: output ``p`` of the volume
        is output ``p - start / stride`` of the part.
        """
        centres = self.centres(outputs)
        first = min((centres.start - reach) // self.stride, outputs.start, (self.size - 1) // self.stride)
        stop = max(centres.stop + reach, centres.stop + self.origin, 1)  # no convolution takes an empty part
        return Span(max(first, 0) * self.stride, min(stop, self.size))


# ------------------------------------------------------------------ messages


class Exchange(NamedTuple):
    """Who holds and who needs what along ``dim`` (negative): a shard and a window for each rank of ``group``."""

    dim: int
    rank: int
    group: dist.ProcessGroup | None
    shards: list[Span]
    windows: list[Span]

    def gather(self, shard: Tensor) -> Tensor:
        """The window of this rank, from the shards of all; zeros outside the volume."""
        own = self.windows[self.rank]
        window = self._empty(shard, own)
        for outside in (Span(own.start, min(own.stop, 0)), Span(max(own.start, self.shards[-1].stop), own.stop)):
            if outside.length > 0:
                self._of_window(window, outside).zero_()
        needed_of_me = {rank: self._of_shard(shard, span) for rank, span in self._needed_of_me().items()}
        needed_by_me = self._needed_by_me()
        for rank, received in self._swap(shard, needed_of_me, needed_by_me).items():
            self._of_window(window, needed_by_me[rank]).copy_(received)
        return window

    def scatter(self, window: Tensor) -> Tensor:
        """The adjoint: what the windows of all ranks hold of this rank's shard, summed."""
        shard = self._empty(window, self.shards[self.rank]).zero_()
        needed_by_me = {rank: self._of_window(window, span) for rank, span in self._needed_by_me().items()}
        needed_of_me = self._needed_of_me()
        for rank, received in self._swap(window, needed_by_me, needed_of_me).items():
            self._of_shard(shard, needed_of_me[rank]).add_(received)
        return shard

    def _needed_by_me(self) -> dict[int, Span]:
        """What this rank's window holds of the shards of the ranks, where it holds anything."""
        needed = {rank: self.windows[self.rank].common(shard) for rank, shard in enumerate(self.shards)}
        return {rank: span for rank, span in needed.items() if span.length > 0}

    def _needed_of_me(self) -> dict[int, Span]:
        """What the windows of the ranks hold of this rank's shard, where they hold anything."""
        needed = {rank: window.common(self.shards[self.rank]) for rank, window in enumerate(self.windows)}
        return {rank: span for rank, span in needed.items() if span.length > 0}

    def _swap(self, like: Tensor, sent: dict[int, Tensor], spans: dict[int, Span]) -> dict[int, Tensor]:
        """Sends ``sent[r]`` to rank ``r``; what came from the ranks in ``spans``, as long as these.

        All have the shape of ``like`` on the other axes.
        """
        group: Any = self.group or dist.group.WORLD
        received, messages = {}, []
        for rank, tensor in sent.items():
            if rank != self.rank:
                messages.append(dist.P2POp(dist.isend, tensor.contiguous(), dist.get_global_rank(group, rank), group))
        for rank, span in spans.items():
            if rank == self.rank:
                received[rank] = sent[rank]
            else:
                received[rank] = like.new_empty(self._shape(like, span))
                messages.append(dist.P2POp(dist.irecv, received[rank], dist.get_global_rank(group, rank), group))
        messages = [message for message in messages if message.tensor.numel() > 0]  # as both sides know
        if messages:
            for work in dist.batch_isend_irecv(messages):
                work.wait()
        return received

    def _of_shard(self, shard: Tensor, span: Span) -> Tensor:
        return shard.narrow(self.dim, span.start - self.shards[self.rank].start, span.length)

    def _of_window(self, window: Tensor, span: Span) -> Tensor:
        return window.narrow(self.dim, span.start - self.windows[self.rank].start, span.length)

    def _empty(self, like: Tensor, span: Span) -> Tensor:
        memory_format = memory_format_of(like)
        return torch.empty(self._shape(like, span), dtype=like.dtype, device=like.device, memory_format=memory_format)

    def _shape(self, like: Tensor, span: Span) -> list[int]:
        shape = list(like.shape)
        shape[self.dim] = span.length
        return shape


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.gather(shard)

    @staticmethod
    def backward(ctx, grad_window: Tensor):
        return _Scatter.apply(grad_window, ctx.exchange), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, window: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.scatter(window)

    @staticmethod
    def backward(ctx, grad_shard: Tensor):
        return _Gather.apply(grad_shard, ctx.exchange), None
