"""The Triton kernels of batch-normalised branches (docs/branch_norm.md). Launched by norm.py.

Axes as in kernels.py, but every voxel is treated alone: volumes are [N, channels, positions] with strides
``(batch, channel, position)``, tensors of branches have one more, for K, and a program walks tiles of ROWS positions of
one batch entry by BLOCK_O channels. Strides of tensors with O channels, but that of the channels, are in units of ALIGN
elements, which shows the compiler how wide its loads may be. Vectors are [K, O], contiguous, fp32. ROW is the dtype of
offsets within a tile; those of branch, batch entry and tile have 64 bits. Arithmetic and sums are fp32.
"""

import triton
import triton.language as tl

from .addressing import load_rows, load_vector, store_rows, widened


@triton.jit
def tile_of(index, positions, ROWS: tl.constexpr):
    """Batch entry and first position of tile ``index``, and how many positions are left from there: 64-bit scalars."""
    tiles = tl.cdiv(positions, ROWS)
    first = (index % tiles).to(tl.int64) * ROWS
    return (index // tiles).to(tl.int64), first, positions - first


@triton.jit
def offset_in(n, first, stride, ALIGN: tl.constexpr):
    return (n * stride[0] + first * stride[2]) * ALIGN


@triton.jit
def times(k, stride, ALIGN: tl.constexpr):
    """``k`` strides, a scalar in 64 bits."""
    return tl.full([], k, tl.int64) * stride * ALIGN


@triton.jit
def rows_in(row, stride, ALIGN: tl.constexpr, ROW: tl.constexpr):
    """Offsets of rows within a tile."""
    return row.to(ROW) * stride[2] * ALIGN


@triton.jit
def load_tile(
    pointer,
    n,
    first,
    row,
    valid,
    o,
    stride,
    O: tl.constexpr,
    BLOCK_O: tl.constexpr,
    ALIGN: tl.constexpr,
    ROW: tl.constexpr,
):
    """[ROWS, BLOCK_O] in fp32, zero where masked."""
    pointer += offset_in(n, first, stride, ALIGN)
    return widened(load_rows(pointer, rows_in(row, stride, ALIGN, ROW), valid, o, stride[1], O, BLOCK_O))


@triton.jit
def load_row(vector, k, o, O: tl.constexpr, BLOCK_O: tl.constexpr):
    """A block of row ``k`` of a [K, O] tensor, for all rows of a tile."""
    return load_vector(vector, k, (O, 1), o, O, BLOCK_O)[None, :]


@triton.jit
def load_gate(attention, k, n, first, row, valid, stride, ROW: tl.constexpr):
    """a_k of a tile, [ROWS] in fp32, zero where masked."""
    attention += offset_in(n, first, stride, 1) + times(k, stride[1], 1)
    return widened(tl.load(attention + rows_in(row, stride, 1, ROW), mask=valid, other=0.0))


@triton.jit
def statistics_kernel(
    branches,
    parts,
    branch_stride,
    branches_stride,
    positions,
    num_tiles,
    K: tl.constexpr,
    O: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    ROW: tl.constexpr,
):
    """Count, mean and squared distances from the mean of TILES tiles; grid (chunks, blocks of O, K).

    They go to parts[3, chunks, K, O]. Sums are of distances from the mean of the first tile. Where that holds a share
    f of the values, its square distance from the mean of all is at most (1 - f) / f times their variance, whatever they
    are: log2(1 / f) bits may cancel, two for TILES of 4, a few more where the first tile is the short one at the end of
    a batch entry.
    """
    k = tl.program_id(2)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.arange(0, ROWS)
    branches += times(k, branch_stride, ALIGN)
    index = tl.program_id(0) * TILES
    last = tl.minimum(index + TILES, num_tiles)
    n, first, left = tile_of(index, positions, ROWS)
    y = load_tile(branches, n, first, row, row < left, o, branches_stride, O, BLOCK_O, ALIGN, ROW)
    pivot = tl.sum(y, 0) / tl.minimum(left, ROWS).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK_O], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_O], tl.float32)
    count = tl.full([], 0, tl.int64)
    while index < last:
        n, first, left = tile_of(index, positions, ROWS)
        valid = row < left
        y = load_tile(branches, n, first, row, valid, o, branches_stride, O, BLOCK_O, ALIGN, ROW)
        distance = tl.where(valid[:, None], y - pivot[None, :], 0.0)
        sums += distance
        squares += distance * distance
        count += tl.minimum(left, ROWS)
        index += 1
    values = count.to(tl.float32)
    distance = tl.sum(sums, 0) / values
    square = tl.maximum(tl.sum(squares, 0) - values * distance * distance, 0.0)
    size = tl.num_programs(0).to(tl.int64) * (K * O)
    parts += (tl.program_id(0).to(tl.int64) * K + k) * O
    tl.store(parts + o, tl.zeros([BLOCK_O], tl.float32) + values, mask=o < O)
    tl.store(parts + size + o, pivot + distance, mask=o < O)
    tl.store(parts + 2 * size + o, square, mask=o < O)


@triton.jit
def combine_kernel(
    branches,
    attention,
    scale,
    shift,
    output,
    branch_stride,
    branches_stride,
    attention_stride,
    output_stride,
    positions,
    K: tl.constexpr,
    O: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    ALIGN: tl.constexpr,
    ROW: tl.constexpr,
):
    """out = sum_k a_k (s_k y_k + h_k); grid (tiles, blocks of O)."""
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.arange(0, ROWS)
    n, first, left = tile_of(tl.program_id(0), positions, ROWS)
    valid = row < left
    result = tl.zeros([ROWS, BLOCK_O], tl.float32)
    for k in range(K):
        branch = branches + times(k, branch_stride, ALIGN)
        y = load_tile(branch, n, first, row, valid, o, branches_stride, O, BLOCK_O, ALIGN, ROW)
        y *= load_row(scale, k, o, O, BLOCK_O)
        y += load_row(shift, k, o, O, BLOCK_O)
        result += load_gate(attention, k, n, first, row, valid, attention_stride, ROW)[:, None] * y
    output += offset_in(n, first, output_stride, ALIGN)
    store_rows(output, rows_in(row, output_stride, ALIGN, ROW), valid, o, output_stride[1], result, O)


@triton.jit
def reduce_kernel(
    grad_output,
    branches,
    attention,
    mean,
    scale,
    shift,
    grad_attention,
    sums,
    grad_output_stride,
    branch_stride,
    branches_stride,
    attention_stride,
    part_stride,
    grad_attention_stride,
    positions,
    num_tiles,
    K: tl.constexpr,
    O: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    ROW: tl.constexpr,
    WANT_ATTENTION: tl.constexpr,
):
    """da_k = sum_o G (s_k y_k + h_k), and of TILES tiles the sums over p of a_k G (y_k - mean_k) and of a_k G.

    Grid (chunks, blocks of O). The sums go to sums[chunks, 2, K, O]; each block of O has its own part of da in
    grad_attention, [blocks, N, K, positions]. G is read again for each branch, and then from a cache: TILES bounds it.
    """
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.arange(0, ROWS)
    if WANT_ATTENTION:
        grad_attention += times(tl.program_id(1), part_stride, 1)
    sums += tl.program_id(0).to(tl.int64) * (2 * K * O)
    start = tl.program_id(0) * TILES
    last = tl.minimum(start + TILES, num_tiles)
    for k in range(K):
        branch = branches + times(k, branch_stride, ALIGN)
        mean_k = load_row(mean, k, o, O, BLOCK_O)
        scale_k = load_row(scale, k, o, O, BLOCK_O)
        shift_k = load_row(shift, k, o, O, BLOCK_O)
        # Summed over rows after the loop: before, each thread adds up what it holds.
        of_scale = tl.zeros([ROWS, BLOCK_O], tl.float32)
        of_shift = tl.zeros([ROWS, BLOCK_O], tl.float32)
        index = start
        while index < last:
            n, first, left = tile_of(index, positions, ROWS)
            valid = row < left
            grad = load_tile(grad_output, n, first, row, valid, o, grad_output_stride, O, BLOCK_O, ALIGN, ROW)
            y = load_tile(branch, n, first, row, valid, o, branches_stride, O, BLOCK_O, ALIGN, ROW)
            gated = load_gate(attention, k, n, first, row, valid, attention_stride, ROW)[:, None] * grad
            of_shift += gated
            of_scale += gated * (y - mean_k)
            if WANT_ATTENTION:
                result = tl.sum(grad * (y * scale_k + shift_k), 1)
                target = grad_attention + offset_in(n, first, grad_attention_stride, 1)
                target += times(k, grad_attention_stride[1], 1)
                pointers = target + rows_in(row, grad_attention_stride, 1, ROW)
                tl.store(pointers, result.to(grad_attention.dtype.element_ty), mask=valid)
            index += 1
        tl.store(sums + k * O + o, tl.sum(of_scale, 0), mask=o < O)
        tl.store(sums + (K + k) * O + o, tl.sum(of_shift, 0), mask=o < O)


@triton.jit
def grad_branches_kernel(
    grad_output,
    branches,
    attention,
    a_coef,
    b_coef,
    c_coef,
    grad_branches,
    grad_output_stride,
    branch_stride,
    branches_stride,
    attention_stride,
    grad_branch_stride,
    grad_branches_stride,
    positions,
    K: tl.constexpr,
    O: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    ALIGN: tl.constexpr,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dy_k = A_k a_k G + B_k y_k + C_k in CHANNELS channels, zero past O; grid (tiles, blocks of CHANNELS).

    ``grad_branches`` may be ``branches``: a tile is read whole before it is written.
    """
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.arange(0, ROWS)
    n, first, left = tile_of(tl.program_id(0), positions, ROWS)
    valid = row < left
    grad = load_tile(grad_output, n, first, row, valid, o, grad_output_stride, O, BLOCK_O, ALIGN, ROW)
    for k in range(K):
        gate = load_gate(attention, k, n, first, row, valid, attention_stride, ROW)
        y = load_tile(
            branches + times(k, branch_stride, ALIGN), n, first, row, valid, o, branches_stride, O, BLOCK_O, ALIGN, ROW
        )
        result = load_row(a_coef, k, o, O, BLOCK_O) * (gate[:, None] * grad)
        result += load_row(b_coef, k, o, O, BLOCK_O) * y
        result += load_row(c_coef, k, o, O, BLOCK_O)
        target = grad_branches + times(k, grad_branch_stride, ALIGN) + offset_in(n, first, grad_branches_stride, ALIGN)
        store_rows(
            target, rows_in(row, grad_branches_stride, ALIGN, ROW), valid, o, grad_branches_stride[1], result, CHANNELS
        )
