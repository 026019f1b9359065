"""Where a tile is, where its branches and taps read, and the loads and stores of rows: what the kernels are made of.

A program owns a tile of lattice points: on every axis the positions ``start + step * point`` with a scalar ``start``
and ``point`` in 0 .. tile - 1. For one branch and one tap, the coordinates read are ``corner + move * point``. So
all that depends on tile, branch and tap is scalar, and the row tensors are small constants of each thread.

``TILING`` is the constexpr ``Tiling`` of configs.py. ``*_stride`` is (batch, channel or branch, d, h, w). Strides are
in units of ALIGN elements, which shows the compiler how wide its loads may be. ROW is the dtype of offsets within a
tile.
"""

import triton
import triton.language as tl

# A corner that switches a read off: outside every admitted volume, and so is any row's move from there.
OUTSIDE = tl.constexpr(1 << 30)


# ------------------------------------------------------------------ where a tile is


@triton.jit
def tile_start(index, tiles, classes, TILING: tl.constexpr):
    """Batch entry and position of the first row of tile ``index``, scalars.

    ``classes`` is how many classes of positions, equal modulo the step, each axis has; ``tiles`` how many tiles each.
    """
    w = index % tiles[2]
    index = index // tiles[2]
    h = index % tiles[1]
    index = index // tiles[1]
    d = index % tiles[0]
    index = index // tiles[0]
    w = index % classes[2] + w * (TILING.step[2] * TILING.tile[2])
    index = index // classes[2]
    h = index % classes[1] + h * (TILING.step[1] * TILING.tile[1])
    index = index // classes[1]
    d = index % classes[0] + d * (TILING.step[0] * TILING.tile[0])
    return (index // classes[0]).to(tl.int64), (d, h, w)


@triton.jit
def tile_rows(TILING: tl.constexpr):
    """How far the rows lie from the first, as positions and as coordinates read: [P] per axis, twice."""
    row = tl.arange(0, TILING.tile[0] * TILING.tile[1] * TILING.tile[2])
    d = row // (TILING.tile[1] * TILING.tile[2])
    h = row // TILING.tile[2] % TILING.tile[1]
    w = row % TILING.tile[2]
    return (d * TILING.step[0], h * TILING.step[1], w * TILING.step[2]), (
        d * TILING.move[0],
        h * TILING.move[1],
        w * TILING.move[2],
    )


@triton.jit
def row_offsets(rows, stride, ALIGN: tl.constexpr, ROW: tl.constexpr):
    """Element offsets of rows from the first [P]."""
    return (rows[0].to(ROW) * stride[2] + rows[1].to(ROW) * stride[3] + rows[2].to(ROW) * stride[4]) * ALIGN


@triton.jit
def offset_of(n, point, stride, ALIGN: tl.constexpr):
    """Element offset of a point of batch entry ``n``, a scalar in 64 bits."""
    d = point[0].to(tl.int64) * stride[2]
    h = point[1].to(tl.int64) * stride[3]
    w = point[2].to(tl.int64) * stride[4]
    return (n * stride[0] + d + h + w) * ALIGN


@triton.jit
def branch_offset(k, stride, ROW: tl.constexpr):
    return tl.full([], k, ROW) * stride[1]


@triton.jit
def offset_between(home, corner, stride, ALIGN: tl.constexpr, ROW: tl.constexpr):
    """Elements from one point to another, a scalar."""
    d = (corner[0] - home[0]).to(ROW) * stride[2]
    h = (corner[1] - home[1]).to(ROW) * stride[3]
    w = (corner[2] - home[2]).to(ROW) * stride[4]
    return (d + h + w) * ALIGN


@triton.jit
def rows_inside(corner, rows, size):
    """Which rows, counted from ``corner``, lie inside the volume [P]; a negative coordinate is a huge unsigned one."""
    mask = (corner[0] + rows[0]).to(tl.uint32, bitcast=True) < size[0]
    mask = mask & ((corner[1] + rows[1]).to(tl.uint32, bitcast=True) < size[1])
    return mask & ((corner[2] + rows[2]).to(tl.uint32, bitcast=True) < size[2])


# ------------------------------------------------------------------ where a branch and a tap read


@triton.jit
def constant_dilation(k: tl.constexpr, TILING: tl.constexpr):
    d: tl.constexpr = TILING.dilations[k][0]
    h: tl.constexpr = TILING.dilations[k][1]
    w: tl.constexpr = TILING.dilations[k][2]
    return d, h, w


@triton.jit
def dilation_of(k, TILING: tl.constexpr):
    """Dilation of a branch known at run time: selects over constants, so that no table has to be in memory."""
    K: tl.constexpr = TILING.branches
    d, h, w = constant_dilation(0, TILING)
    for other in tl.static_range(1, K):
        other_d, other_h, other_w = constant_dilation(other, TILING)
        d = tl.where(k == other, other_d, d)
        h = tl.where(k == other, other_h, h)
        w = tl.where(k == other, other_w, w)
    return d, h, w


@triton.jit
def corner_on_axis(start, origin, reach, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Coordinate that the first row reads on one axis, for a tap ``reach`` away from the centre.

    Output position p reads ``origin + stride * p + reach``. TRANSPOSED: input position q reads the p that reads it;
    the step is then a multiple of the stride, so that either all rows have such a p or none has.
    """
    if TRANSPOSED:
        distance = start - origin - reach
        corner = tl.where(distance % STRIDE == 0, distance // STRIDE, OUTSIDE)
    else:
        corner = start * STRIDE + origin + reach
    return corner


@triton.jit
def axis_corner(axis: tl.constexpr, dilation, tap, start, origin, TILING: tl.constexpr):
    reach = dilation[axis] * (tap - TILING.kernel[axis] // 2)
    return corner_on_axis(start[axis], origin[axis], reach, TILING.stride[axis], TILING.transposed)


@triton.jit
def corner_of(dilation, tap, start, origin, TILING: tl.constexpr):
    """Coordinates that the first row reads, for one branch's dilation and one tap: three scalars."""
    d = axis_corner(0, dilation, tap[0], start, origin, TILING)
    h = axis_corner(1, dilation, tap[1], start, origin, TILING)
    w = axis_corner(2, dilation, tap[2], start, origin, TILING)
    return d, h, w


@triton.jit
def home_of(start, origin, TILING: tl.constexpr):
    """Coordinates near those that the first row reads at the centre tap: offsets of all taps count from there."""
    if TILING.transposed:
        d = (start[0] - origin[0]) // TILING.stride[0]
        h = (start[1] - origin[1]) // TILING.stride[1]
        w = (start[2] - origin[2]) // TILING.stride[2]
    else:
        d = start[0] * TILING.stride[0] + origin[0]
        h = start[1] * TILING.stride[1] + origin[1]
        w = start[2] * TILING.stride[2] + origin[2]
    return d, h, w


@triton.jit
def word_of(bits, TILING: tl.constexpr):
    """A word with room for a bit for each tap of each axis: first those of D, then H, then W."""
    if TILING.kernel[0] + TILING.kernel[1] + TILING.kernel[2] < 32:
        return tl.full([], bits, tl.int32)
    else:
        return tl.full([], bits, tl.int64)


@triton.jit
def axis_bit(axis: tl.constexpr, tap, TILING: tl.constexpr):
    first: tl.constexpr = (axis > 0) * TILING.kernel[0] + (axis > 1) * TILING.kernel[1]
    return word_of(1, TILING) << (first + tap)


@triton.jit
def tap_word(tap, TILING: tl.constexpr):
    """The three bits of a tap."""
    return axis_bit(0, tap[0], TILING) | axis_bit(1, tap[1], TILING) | axis_bit(2, tap[2], TILING)


@triton.jit
def outside_on_axis(axis: tl.constexpr, dilation, moved, start, origin, size, TILING: tl.constexpr):
    TAPS: tl.constexpr = TILING.kernel[axis]
    word = word_of(0, TILING)
    for tap in tl.static_range(TAPS):
        corner = axis_corner(axis, dilation, tap, start, origin, TILING)
        # A negative coordinate is a huge unsigned one.
        inside = (corner + moved[axis]).to(tl.uint32, bitcast=True) < size[axis]
        word |= tl.where(inside, word_of(0, TILING), axis_bit(axis, tap, TILING))
    return word


@triton.jit
def outside_word(dilation, valid, moved, start, origin, size, TILING: tl.constexpr):
    """For one branch, which taps of an axis read outside the volume [P]; all bits where not ``valid``.

    In the loops over taps one instruction asks it for the three bits of a tap, where coordinates would take six.
    """
    word = tl.where(valid, word_of(0, TILING), word_of(-1, TILING))
    word |= outside_on_axis(0, dilation, moved, start, origin, size, TILING)
    word |= outside_on_axis(1, dilation, moved, start, origin, size, TILING)
    return word | outside_on_axis(2, dilation, moved, start, origin, size, TILING)


@triton.jit
def missed_on_axis(axis: tl.constexpr, dilation, start, origin, size, TILING: tl.constexpr):
    TAPS: tl.constexpr = TILING.kernel[axis]
    word = word_of(0, TILING)
    for tap in tl.static_range(TAPS):
        corner = axis_corner(axis, dilation, tap, start, origin, TILING)
        reads = (corner < size[axis]) & (corner + TILING.move[axis] * (TILING.tile[axis] - 1) >= 0)
        word |= tl.where(reads, word_of(0, TILING), axis_bit(axis, tap, TILING))
    return word


@triton.jit
def missed_word(dilation, start, origin, size, TILING: tl.constexpr):
    """For one branch, with which taps of an axis no row of the tile's box reads inside the volume (a scalar)."""
    word = missed_on_axis(0, dilation, start, origin, size, TILING) | missed_on_axis(
        1, dilation, start, origin, size, TILING
    )
    return word | missed_on_axis(2, dilation, start, origin, size, TILING)


@triton.jit
def words_of_branches(valid, moved, start, origin, size, TILING: tl.constexpr):
    """``outside_word`` of each branch, and the taps of an axis with which no branch reads inside the volume.

    A tap of which any bit is among the latter adds nothing.
    """
    K: tl.constexpr = TILING.branches
    outside = ()
    missed = word_of(-1, TILING)
    for k in tl.static_range(K):
        dilation = constant_dilation(k, TILING)
        outside = outside + (outside_word(dilation, valid, moved, start, origin, size, TILING),)
        missed &= missed_word(dilation, start, origin, size, TILING)
    return outside, missed


@triton.jit
def centre_tap(TILING: tl.constexpr):
    d: tl.constexpr = TILING.kernel[0] // 2
    h: tl.constexpr = TILING.kernel[1] // 2
    w: tl.constexpr = TILING.kernel[2] // 2
    return d, h, w


@triton.jit
def tap_index(tap, TILING: tl.constexpr):
    return (tap[0] * TILING.kernel[1] + tap[1]) * TILING.kernel[2] + tap[2]


# ------------------------------------------------------------------ loads and stores


@triton.jit
def load_rows(pointer, rows, mask, channel, channel_stride, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A [P, BLOCK] tile, zero where masked and past the last channel."""
    pointers = pointer + (rows[:, None] + channel.to(rows.dtype)[None, :] * channel_stride)
    if CHANNELS % BLOCK == 0:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=mask[:, None] & (channel < CHANNELS)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, rows, mask, channel, channel_stride, tile, CHANNELS: tl.constexpr):
    pointers = pointer + (rows[:, None] + channel.to(rows.dtype)[None, :] * channel_stride)
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def weight_tile(pointer, tap, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILING: tl.constexpr):
    """Pointers to a tile of one tap of a [T, ROWS, COLUMNS] tensor: the repacked weight or a sum of its gradient.

    The weight is padded with zeros to whole blocks, so that it needs no mask.
    """
    return pointer + tap_index(tap, TILING) * (ROWS * COLUMNS) + (row[:, None] * COLUMNS + column[None, :])


@triton.jit
def load_vector(vector, k, stride, channel, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of row ``k`` of a [K, CHANNELS] tensor, in fp32."""
    pointers = vector + (k * stride[0] + channel * stride[1])
    if CHANNELS % BLOCK == 0:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=channel < CHANNELS, other=0.0).to(tl.float32)


@triton.jit
def widened(tile):
    """In fp32. bfloat16 by its bits: the compiler takes two instructions where one mask or shift does."""
    if tile.dtype == tl.bfloat16:
        return (tile.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return tile.to(tl.float32)


@triton.jit
def blended(blend, gate, tile):
    """``blend`` + gate * tile in the dtype of ``blend``: packed instructions where that has 16 bits."""
    gates = tl.broadcast_to(gate.to(blend.dtype)[:, None], blend.shape)
    return tl.fma(gates, tile.to(blend.dtype), blend)


@triton.jit
def pinned(tile):
    """A tile [P, B] as it is, by way of a sum over an axis of one.

    The compiler would move the conversion to the layout of tl.dot's operand up to the loads: K tiles through shared
    memory instead of their blend. It does not move it past a reduction.
    """
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1], 1]), 2)
