"""The kernels around those of kernels.py: tensors and weights packed for them, and parts of dW added up."""

import triton
import triton.language as tl


@triton.jit
def pack_kernel(
    source,
    target,
    source_batch,
    source_channel,
    source_space,
    points,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[N, C, points] of any strides to [N, points, C_PADDED], zero past C; grid (N * blocks of points, blocks of C)."""
    blocks = tl.cdiv(points, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pointers = source + n * source_batch + (p[:, None] * source_space + c[None, :].to(tl.int64) * source_channel)
    tile = tl.load(pointers, mask=(p < points)[:, None] & (c < C)[None, :], other=0.0)
    pointers = target + n * points * C_PADDED + (p[:, None] * C_PADDED + c[None, :])
    tl.store(pointers, tile, mask=(p < points)[:, None] & (c < C_PADDED)[None, :])


@triton.jit
def repack_kernel(
    weight,
    packed,
    row_stride,
    column_stride,
    tap_stride,
    T: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weight, of any strides, to [T, ROWS_PADDED, COLUMNS_PADDED], zero past ROWS and COLUMNS; grid (blocks,)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = index % COLUMNS_PADDED
    row = index // COLUMNS_PADDED % ROWS_PADDED
    tap = index // (COLUMNS_PADDED * ROWS_PADDED)
    source = weight + (row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride)
    inside = (row < ROWS) & (column < COLUMNS) & (tap < T)
    tile = tl.load(source + tap_offset(tap, tap_stride, KERNEL_H, KERNEL_W), mask=inside, other=0.0)
    tl.store(packed + index, tile, mask=tap < T)


@triton.jit
def tap_offset(tap, stride, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr):
    """Where a tap is in a weight, in elements."""
    d = (tap // (KERNEL_H * KERNEL_W)).to(tl.int64) * stride[0]
    h = (tap // KERNEL_W % KERNEL_H).to(tl.int64) * stride[1]
    return d + h + (tap % KERNEL_W).to(tl.int64) * stride[2]


@triton.jit
def add_parts_kernel(
    parts,
    grad_weight,
    splits,
    stride,
    T: tl.constexpr,
    O: tl.constexpr,
    C: tl.constexpr,
    C_SUMS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of parts[splits, T, O, C_SUMS], in a fixed order, to grad_weight [O, C, *kernel]; grid (blocks,)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = index % C_SUMS
    o = index // C_SUMS % O
    tap = index // (C_SUMS * O)
    inside = (c < C) & (tap < T)
    total = tl.zeros([BLOCK], tl.float32)
    first = splits * 0
    while first < splits:
        split = first + tl.arange(0, SPLITS)
        pointers = parts + (split.to(tl.int64)[:, None] * (T * O * C_SUMS) + index[None, :])
        total += tl.sum(tl.load(pointers, mask=(split < splits)[:, None] & inside[None, :], other=0.0), 0)
        first += SPLITS
    target = grad_weight + (o.to(tl.int64) * stride[0] + c.to(tl.int64) * stride[1])
    target += tap_offset(tap, (stride[2], stride[3], stride[4]), KERNEL_H, KERNEL_W)
    tl.store(target, total.to(grad_weight.dtype.element_ty), mask=inside)
