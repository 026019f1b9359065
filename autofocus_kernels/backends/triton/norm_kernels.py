"""The Triton kernels of batch-normalised branches (docs/branch_norm.md). Launched by norm.py.

Axes as in kernels.py. All but the last kernel treat each voxel alone: they see every volume as [N, channels, positions]
with strides ``(batch, channel, position)``, tensors of branches with one of their own for K, and walk tiles of ROWS
positions of one batch entry by BLOCK_O channels. Vectors are [K, O], contiguous, fp32. ROW is the dtype of offsets within
a tile; those of branch, batch entry and tile have 64 bits. Arithmetic and sums are fp32.
"""

import triton
import triton.language as tl

from .kernels import (
    any_branch_reads,
    blended,
    constant_dilation,
    corner_of,
    home_of,
    load_rows,
    load_vector,
    offset_between,
    offset_of,
    pinned,
    row_offsets,
    rows_inside,
    store_rows,
    tile_rows,
    tile_start,
    weight_tile,
    widened,
)


@triton.jit
def tile_of(index, positions, ROWS: tl.constexpr):
    """Batch entry and first position of tile ``index``, 64-bit scalars, and how many rows it has."""
    tiles = tl.cdiv(positions, ROWS)
    first = (index % tiles).to(tl.int64) * ROWS
    return (index // tiles).to(tl.int64), first, tl.minimum(positions - first, ROWS)


@triton.jit
def offset_in(n, first, stride):
    return n * stride[0] + first * stride[2]


@triton.jit
def times(k, stride):
    """``k`` strides, a scalar in 64 bits."""
    return tl.full([], k, tl.int64) * stride


@triton.jit
def load_tile(pointer, n, first, row, valid, o, stride, O: tl.constexpr, BLOCK_O: tl.constexpr, ROW: tl.constexpr):
    """[ROWS, BLOCK_O] in fp32, zero where masked."""
    pointer += offset_in(n, first, stride)
    return widened(load_rows(pointer, row.to(ROW) * stride[2], valid, o, stride[1], O, BLOCK_O))


@triton.jit
def load_gate(attention, k, n, first, row, valid, stride, ROW: tl.constexpr):
    """a_k of a tile, [ROWS] in fp32, zero where masked."""
    attention += offset_in(n, first, stride) + times(k, stride[1])
    return widened(tl.load(attention + row.to(ROW) * stride[2], mask=valid, other=0.0))


@triton.jit
def statistics_kernel(
    branches, parts, branch_stride, branches_stride, positions, num_tiles,
    K: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, TILES: tl.constexpr, ROW: tl.constexpr,
):
    """Count, mean and squared distances from the mean of TILES tiles, in parts[3, chunks, K, O]; grid (chunks, blocks of O, K).

    Sums are of distances from the mean of the first tile. Where that holds a share f of the values, its square distance
    from the mean of all is at most (1 - f) / f times their variance, whatever they are: log2(1 / f) bits may cancel,
    two for TILES of 4, a few more where the first tile is the short one at the end of a batch entry.
    """
    k = tl.program_id(2)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.arange(0, ROWS)
    branches += times(k, branch_stride)
    start = tl.program_id(0) * TILES
    n, first, rows = tile_of(start, positions, ROWS)
    pivot = tl.sum(load_tile(branches, n, first, row, row < rows, o, branches_stride, O, BLOCK_O, ROW), 0) / rows.to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK_O], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_O], tl.float32)
    count = tl.full([], 0, tl.int64)
    for index in range(start, tl.minimum(start + TILES, num_tiles)):
        n, first, rows = tile_of(index, positions, ROWS)
        valid = row < rows
        y = load_tile(branches, n, first, row, valid, o, branches_stride, O, BLOCK_O, ROW)
        distance = tl.where(valid[:, None], y - pivot[None, :], 0.0)
        sums += distance
        squares += distance * distance
        count += rows
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
    branches, attention, scale, shift, output,
    branch_stride, branches_stride, attention_stride, output_stride, positions,
    K: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, ROW: tl.constexpr,
):
    """out = sum_k a_k (s_k y_k + h_k); grid (tiles, blocks of O)."""
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.arange(0, ROWS)
    n, first, rows = tile_of(tl.program_id(0), positions, ROWS)
    valid = row < rows
    result = tl.zeros([ROWS, BLOCK_O], tl.float32)
    for k in range(K):
        branch = branches + times(k, branch_stride)
        y = load_tile(branch, n, first, row, valid, o, branches_stride, O, BLOCK_O, ROW)
        y *= load_vector(scale, k, (O, 1), o, O, BLOCK_O)[None, :]
        y += load_vector(shift, k, (O, 1), o, O, BLOCK_O)[None, :]
        result += load_gate(attention, k, n, first, row, valid, attention_stride, ROW)[:, None] * y
    output += offset_in(n, first, output_stride)
    store_rows(output, row.to(ROW) * output_stride[2], valid, o, output_stride[1], result, O)


@triton.jit
def reduce_kernel(
    grad_output, branches, attention, mean, scale, shift, grad_attention, sums,
    grad_output_stride, branch_stride, branches_stride, attention_stride, part_stride, grad_attention_stride,
    positions, num_tiles,
    K: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, TILES: tl.constexpr, ROW: tl.constexpr,
    WANT_ATTENTION: tl.constexpr,
):
    """da_k = sum_o G (s_k y_k + h_k), and of TILES tiles the sums over p of a_k G (y_k - mean_k) and of a_k G.

    Grid (chunks, blocks of O). The sums go to sums[chunks, 2, K, O]; each block of O has its own part of da in
    grad_attention, [blocks, N, K, positions]. G is read again for each branch, and then from a cache: TILES bounds it.
    """
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.arange(0, ROWS)
    if WANT_ATTENTION:
        grad_attention += times(tl.program_id(1), part_stride)
    sums += tl.program_id(0).to(tl.int64) * (2 * K * O)
    start = tl.program_id(0) * TILES
    for k in range(K):
        branch = branches + times(k, branch_stride)
        mean_k = load_vector(mean, k, (O, 1), o, O, BLOCK_O)
        scale_k = load_vector(scale, k, (O, 1), o, O, BLOCK_O)
        shift_k = load_vector(shift, k, (O, 1), o, O, BLOCK_O)
        # Summed over rows after the loop: before, each thread adds up what it holds.
        of_scale = tl.zeros([ROWS, BLOCK_O], tl.float32)
        of_shift = tl.zeros([ROWS, BLOCK_O], tl.float32)
        for index in range(start, tl.minimum(start + TILES, num_tiles)):
            n, first, rows = tile_of(index, positions, ROWS)
            valid = row < rows
            grad = load_tile(grad_output, n, first, row, valid, o, grad_output_stride, O, BLOCK_O, ROW)
            y = load_tile(branch, n, first, row, valid, o, branches_stride, O, BLOCK_O, ROW)
            gated = load_gate(attention, k, n, first, row, valid, attention_stride, ROW)[:, None] * grad
            of_shift += gated
            of_scale += gated * (y - mean_k[None, :])
            if WANT_ATTENTION:
                result = tl.sum(grad * (y * scale_k[None, :] + shift_k[None, :]), 1)
                target = grad_attention + offset_in(n, first, grad_attention_stride) + times(k, grad_attention_stride[1])
                pointers = target + row.to(ROW) * grad_attention_stride[2]
                tl.store(pointers, result.to(grad_attention.dtype.element_ty), mask=valid)
        tl.store(sums + k * O + o, tl.sum(of_scale, 0), mask=o < O)
        tl.store(sums + (K + k) * O + o, tl.sum(of_shift, 0), mask=o < O)


@triton.jit
def grad_branches_kernel(
    grad_output, branches, attention, a_coef, b_coef, c_coef, grad_branches,
    grad_output_stride, branch_stride, branches_stride, attention_stride, grad_branch_stride, grad_branches_stride,
    positions,
    K: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dy_k = A_k a_k G + B_k y_k + C_k in CHANNELS channels, zero past O; grid (tiles, blocks of CHANNELS).

    ``grad_branches`` may be ``branches``: a tile is read whole before it is written.
    """
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.arange(0, ROWS)
    n, first, rows = tile_of(tl.program_id(0), positions, ROWS)
    valid = row < rows
    grad = load_tile(grad_output, n, first, row, valid, o, grad_output_stride, O, BLOCK_O, ROW)
    for k in range(K):
        gate = load_gate(attention, k, n, first, row, valid, attention_stride, ROW)
        y = load_tile(branches + times(k, branch_stride), n, first, row, valid, o, branches_stride, O, BLOCK_O, ROW)
        result = load_vector(a_coef, k, (O, 1), o, O, BLOCK_O)[None, :] * (gate[:, None] * grad)
        result += load_vector(b_coef, k, (O, 1), o, O, BLOCK_O)[None, :] * y
        result += load_vector(c_coef, k, (O, 1), o, O, BLOCK_O)[None, :]
        target = grad_branches + times(k, grad_branch_stride) + offset_in(n, first, grad_branches_stride)
        store_rows(target, row.to(ROW) * grad_branches_stride[2], valid, o, grad_branches_stride[1], result, CHANNELS)


# ------------------------------------------------------------------ gather from every branch, project back


@triton.jit
def gathered_sum(
    gradients, branch_stride, gradient_rows, gradients_stride, output_size, moved, valid, home, start, origin, tap, o,
    G: tl.constexpr, BLOCK_O: tl.constexpr, READ: tl.constexpr, ALIGN: tl.constexpr, BLEND: tl.constexpr,
    ROW: tl.constexpr,
):
    """v_t of one tile and one block of O: the sum over branches of dy_k at the outputs that read the row."""
    K: tl.constexpr = G.branches
    P: tl.constexpr = G.tile[0] * G.tile[1] * G.tile[2]
    v = tl.zeros([P, BLOCK_O], BLEND)
    for k in tl.static_range(K):
        corner = corner_of(constant_dilation(k, G), tap, start, origin, G)
        mask = valid & rows_inside(corner, moved, output_size)
        rows = gradient_rows + offset_between(home, corner, gradients_stride, ALIGN, ROW)
        branch = gradients + times(k, branch_stride) * ALIGN
        # A gate of ones keeps the sum in the layout of the loads (see ``pinned``).
        v = blended(v, pinned(mask), load_rows(branch, rows, mask, o, 1, READ, BLOCK_O))
    return v


@triton.jit
def branches_grad_input_weight_kernel(
    gradients, weight, input, grad_input, sums,
    branch_stride, gradients_stride, input_stride, grad_input_stride,
    input_size, output_size, origin, tiles, cosets, num_tiles,
    C: tl.constexpr, O: tl.constexpr, G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    READ: tl.constexpr, ALIGN: tl.constexpr, TILE_ALIGN: tl.constexpr, WANT_INPUT: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    BLEND: tl.constexpr, DOT: tl.constexpr, ROW: tl.constexpr, PRECISION: tl.constexpr,
):
    """``kernels.grad_input_weight_kernel`` where each branch has its own gradient dy_k: gradients [K, N, READ, D, H, W].

    ``branch_stride``, that of K, is in units of ALIGN too. One projection of v_t, not one per branch.
    """
    P: tl.constexpr = G.tile[0] * G.tile[1] * G.tile[2]
    T: tl.constexpr = G.kernel[0] * G.kernel[1] * G.kernel[2]
    C_PADDED: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C * BLOCK_C
    O_PADDED: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O * BLOCK_O
    position, moved = tile_rows(G)
    gradient_rows = row_offsets(moved, gradients_stride, ALIGN, ROW)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WANT_WEIGHT:
        sums += tl.program_id(0).to(tl.int64) * (T * O_PADDED * C_PADDED)
    index = tl.program_id(0)
    while index < num_tiles:
        n, start = tile_start(index, tiles, cosets, G)
        valid = rows_inside(start, position, input_size)
        home = home_of(start, origin, G)
        tile_gradients = gradients + offset_of(n, home, gradients_stride, ALIGN)
        if WANT_WEIGHT:
            source = input + offset_of(n, start, input_stride, TILE_ALIGN)
            rows = row_offsets(position, input_stride, TILE_ALIGN, ROW)
            x = load_rows(source, rows, valid, c, input_stride[1], C, BLOCK_C).to(DOT)
        result = tl.zeros([P, BLOCK_C], tl.float32)
        for o_start in range(0, O, BLOCK_O):
            o = o_start + tl.arange(0, BLOCK_O)
            for tap_d in range(G.kernel[0]):
                for tap_h in range(G.kernel[1]):
                    for tap_w in range(G.kernel[2]):
                        tap = (tap_d, tap_h, tap_w)
                        if any_branch_reads(tap, start, origin, output_size, G):
                            v = gathered_sum(
                                tile_gradients, branch_stride, gradient_rows, gradients_stride,
                                output_size, moved, valid, home, start, origin, tap, o,
                                G, BLOCK_O, READ, ALIGN, BLEND, ROW,
                            ).to(DOT)
                            if WANT_INPUT:
                                w = tl.load(weight_tile(weight, tap, o, c, O_PADDED, C_PADDED, G)).to(DOT)
                                result = tl.dot(v, w, result, input_precision=PRECISION)
                            if WANT_WEIGHT:
                                pointers = weight_tile(sums, tap, o, c, O_PADDED, C_PADDED, G)
                                tl.store(pointers, tl.dot(tl.trans(v), x, tl.load(pointers), input_precision=PRECISION))
                                # The next tile may load with other threads than this one stores.
                                tl.debug_barrier()
        if WANT_INPUT:
            target = grad_input + offset_of(n, start, grad_input_stride, TILE_ALIGN)
            rows = row_offsets(position, grad_input_stride, TILE_ALIGN, ROW)
            store_rows(target, rows, valid, c, grad_input_stride[1], result, C)
        index += tl.num_programs(0)
