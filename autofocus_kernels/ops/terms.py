"""The terms of the convolution and of its gradients that hold no convolution: those of bias and branch shift."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .allocation import memory_format_of


def constant_term(attention, bias, branch_shift) -> Tensor:
    """``sum_k a_k h_k`` ``[N, O, *S_out]`` with ``h_k`` the branch shift or the bias, one of which must be there."""
    if branch_shift is not None:
        return _mixed(attention, branch_shift.t())
    return _mixed(attention.sum(1, keepdim=True), bias[:, None])


def constant_term_grad(grad_output, attention, bias, branch_shift) -> Tensor:
    """The gradient of :func:`constant_term` for attention ``[N, K, *S_out]``: ``<h_k, G(p)>``."""
    if branch_shift is not None:
        return _mixed(grad_output, branch_shift)
    return _mixed(grad_output, bias[None]).expand_as(attention)


def _mixed(volume: Tensor, matrix: Tensor) -> Tensor:
    """``matrix`` ``[J, I]`` times the channels of ``volume`` ``[N, I, *S]`` at every position: ``[N, J, *S]``.

    By what the vmap of torch.autograd has rules for; it has none for einsum and matmul.
    """
    N, channels, *size = volume.shape
    rows = torch.bmm(matrix.expand(N, *matrix.shape), volume.reshape(N, channels, math.prod(size)))
    return rows.reshape(N, matrix.shape[0], *size)


def attention_weighted_sums(attention: Tensor, grad_output: Tensor) -> Tensor:
    """Parts, along the first axis, of ``sum_p a_k(p) G(p)`` ``[K, O]``: matrix products of grad_output as it lies.

    They are float32 for 16-bit tensors, where parts of either sign may be much larger than their sum.
    """
    contiguous = memory_format_of(grad_output) is torch.contiguous_format
    if attention.is_cpu and attention.element_size() > 2 and attention.numel() > _VOXELS_OF_A_SUM * attention.shape[1]:
        if contiguous:
            return _sums_of_pieces(attention.flatten(2), grad_output.flatten(2))
        return _sums_of_pieces(*(tensor.transpose(0, 1).flatten(1)[None] for tensor in (attention, grad_output)))
    if contiguous:
        # With K columns and not K rows: on a CPU a third of the time.
        product = _product(torch.bmm, grad_output.flatten(2), attention.flatten(2).transpose(1, 2))
        return product.transpose(1, 2)
    rows_a, rows_g = (tensor.movedim(1, -1).flatten(0, -2) for tensor in (attention, grad_output))
    return _product(torch.mm, rows_a.t(), rows_g)[None]


# BLAS may add up all voxels one by one, which is off by eps * sqrt(n) / 4 (tolerance.py), and by far more where all
# terms have one sign.
_VOXELS_OF_A_SUM = 256


def _sums_of_pieces(a: Tensor, g: Tensor) -> Tensor:
    """The products ``a g^T`` of ``[N, K, V]`` and ``[N, O, V]``, each of at most 256 voxels of a sample."""
    N, _, V = a.shape
    pieces = V // _VOXELS_OF_A_SUM
    if pieces < N:
        cut = zip(a.split(_VOXELS_OF_A_SUM, -1), g.split(_VOXELS_OF_A_SUM, -1))
        return torch.cat([torch.bmm(piece_a, piece_g.transpose(1, 2)) for piece_a, piece_g in cut])
    parts = []
    for sample_a, sample_g in zip(a, g):
        whole = pieces * _VOXELS_OF_A_SUM
        cut_a, cut_g = (t[:, :whole].unflatten(1, (pieces, -1)).transpose(0, 1) for t in (sample_a, sample_g))
        parts.append(torch.bmm(cut_a, cut_g.transpose(1, 2)))
        if whole < V:
            parts.append((sample_a[:, whole:] @ sample_g[:, whole:].t())[None])
    return torch.cat(parts)


def _product(multiply, a: Tensor, b: Tensor) -> Tensor:
    """``multiply(a, b)``, torch.mm or torch.bmm; in float32 for 16-bit tensors."""
    if a.element_size() > 2:
        return multiply(a, b)
    if a.is_cuda and torch.version.hip is None:  # ROCm refuses it
        return multiply(a, b, out_dtype=torch.float32)
    # In pieces of the long axis, whose float32 copies stay in cache.
    pieces = zip(a.split(_PIECE, -1), b.split(_PIECE, -2))
    return sum(multiply(piece_a.float(), piece_b.float()) for piece_a, piece_b in pieces)


_PIECE = 2**14


def sum_into(gradient: Tensor, parts: Tensor, axes) -> None:
    if gradient.dtype == parts.dtype:
        torch.sum(parts, axes, out=gradient)
    else:  # `out` of another dtype would round the parts
        gradient.copy_(parts.sum(axes))
