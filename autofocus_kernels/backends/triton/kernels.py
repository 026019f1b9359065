"""The Triton kernels: `blend`, `project` and `gather` on tiles of a lattice.

Axes: N batch, C input channels, O output channels, K branches, T kernel taps, P rows (positions) of a tile, and always
three spatial axes D H W. The arithmetic is docs/math.md; what is tiled, in which order and why is docs/triton.md; how
a program finds its tile and what to read is addressing.py.

The tensor that is gathered (input, or grad_output in grad_input_weight_kernel) has READ adjacent channels and strides
in units of ALIGN elements; TILE_ALIGN says the same of the other tensors with C or O channels. DOT is the dtype of the
operands of tl.dot, BLEND that of blends. In formulas G is grad_output.
"""

import triton
import triton.language as tl

from .addressing import (
    blended,
    branch_offset,
    centre_tap,
    constant_dilation,
    corner_of,
    dilation_of,
    home_of,
    load_rows,
    load_vector,
    missed_word,
    offset_between,
    offset_of,
    outside_word,
    pinned,
    row_offsets,
    rows_inside,
    store_rows,
    tap_word,
    tile_rows,
    tile_start,
    weight_tile,
    widened,
    words_of_branches,
)

# ------------------------------------------------------------------ branches without a scale: blend, then project


@triton.jit
def forward_kernel(
    input,
    weight,
    attention,
    shift,
    output,
    input_stride,
    attention_stride,
    shift_stride,
    output_stride,
    input_size,
    output_size,
    origin,
    tiles,
    classes,
    C: tl.constexpr,
    O: tl.constexpr,
    TILING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    READ: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE_ALIGN: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BLEND: tl.constexpr,
    DOT: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = sum_t W_t u_t + sum_k a_k shift_k, u_t the blend of tap t. Weight [T, C, O]; grid (tiles, blocks of O)."""
    K: tl.constexpr = TILING.branches
    P: tl.constexpr = TILING.tile[0] * TILING.tile[1] * TILING.tile[2]
    C_PADDED: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C * BLOCK_C
    O_PADDED: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O * BLOCK_O
    n, start = tile_start(tl.program_id(0), tiles, classes, TILING)
    position, moved = tile_rows(TILING)
    valid = rows_inside(start, position, output_size)
    home = home_of(start, origin, TILING)
    input += offset_of(n, home, input_stride, ALIGN)
    input_rows = row_offsets(moved, input_stride, ALIGN, ROW)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)

    attention += offset_of(n, start, attention_stride, 1)
    attention_rows = row_offsets(position, attention_stride, 1, ROW)
    gates = ()
    total = tl.zeros([P], tl.float32)
    for k in tl.static_range(K):
        gate = tl.load(attention + branch_offset(k, attention_stride, ROW) + attention_rows, mask=valid, other=0.0)
        gates = gates + (gate.to(tl.float32),)
        total += gates[k]

    # The shift comes first: added last, the gates would stay in registers in a second layout.
    result = tl.zeros([P, BLOCK_O], tl.float32)
    if HAS_SHIFT:
        for k in tl.static_range(K):
            result += gates[k][:, None] * load_vector(shift, k, shift_stride, o, O, BLOCK_O)[None, :]
    outside, missed = words_of_branches(valid, moved, start, origin, input_size, TILING)
    for c_start in range(0, C, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        # The centre tap, which the branches share.
        tap = centre_tap(TILING)
        corner = corner_of(constant_dilation(0, TILING), tap, start, origin, TILING)
        mask = outside[0] & tap_word(tap, TILING) == 0
        rows = input_rows + offset_between(home, corner, input_stride, ALIGN, ROW)
        x = load_rows(input, rows, mask, c, 1, READ, BLOCK_C)
        w = tl.load(weight_tile(weight, tap, c, o, C_PADDED, O_PADDED, TILING)).to(DOT)
        shared = (total[:, None] * widened(x)).to(DOT)
        result = tl.dot(pinned(shared), w, result, input_precision=PRECISION)
        for tap_d in range(TILING.kernel[0]):
            for tap_h in range(TILING.kernel[1]):
                for tap_w in range(TILING.kernel[2]):
                    tap = (tap_d, tap_h, tap_w)
                    bits = tap_word(tap, TILING)
                    if (missed & bits == 0) & (bits != tap_word(centre_tap(TILING), TILING)):
                        blend = tl.zeros([P, BLOCK_C], BLEND)
                        for k in tl.static_range(K):
                            corner = corner_of(constant_dilation(k, TILING), tap, start, origin, TILING)
                            mask = outside[k] & bits == 0
                            source = input + offset_between(home, corner, input_stride, ALIGN, ROW)
                            x = load_rows(source, input_rows, mask, c, 1, READ, BLOCK_C)
                            blend = blended(blend, gates[k], x)
                        w = tl.load(weight_tile(weight, tap, c, o, C_PADDED, O_PADDED, TILING)).to(DOT)
                        result = tl.dot(pinned(blend.to(DOT)), w, result, input_precision=PRECISION)

    output += offset_of(n, start, output_stride, TILE_ALIGN)
    store_rows(output, row_offsets(position, output_stride, TILE_ALIGN, ROW), valid, o, output_stride[1], result, O)


@triton.jit
def grad_attention_kernel(
    grad_output,
    input,
    weight,
    shift,
    grad_attention,
    grad_output_stride,
    input_stride,
    shift_stride,
    grad_attention_stride,
    input_size,
    output_size,
    origin,
    tiles,
    classes,
    C: tl.constexpr,
    O: tl.constexpr,
    TILING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    READ: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE_ALIGN: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    DOT: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """da_k = sum_t <g_t, x read by branch k> + <shift_k, G> with g_t = W_t^T G. Weight [T, O, C]; grid (tiles, 1)."""
    K: tl.constexpr = TILING.branches
    P: tl.constexpr = TILING.tile[0] * TILING.tile[1] * TILING.tile[2]
    n, start = tile_start(tl.program_id(0), tiles, classes, TILING)
    position, moved = tile_rows(TILING)
    valid = rows_inside(start, position, output_size)
    home = home_of(start, origin, TILING)
    input += offset_of(n, home, input_stride, ALIGN)
    input_rows = row_offsets(moved, input_stride, ALIGN, ROW)
    grad_output += offset_of(n, start, grad_output_stride, TILE_ALIGN)
    grad_rows = row_offsets(position, grad_output_stride, TILE_ALIGN, ROW)

    results = ()
    for k in tl.static_range(K):
        results = results + (tl.zeros([P, BLOCK_C // ALIGN], tl.float32),)

    # The shift's part comes first: added last, the offsets of all channels of grad_output would stay in registers.
    constants = ()
    for k in tl.static_range(K):
        constants = constants + (tl.zeros([P], tl.float32),)
    if HAS_SHIFT:
        for o_start in range(0, O, BLOCK_O):
            o = o_start + tl.arange(0, BLOCK_O)
            block = widened(load_rows(grad_output, grad_rows, valid, o, grad_output_stride[1], O, BLOCK_O))
            added = ()
            for k in tl.static_range(K):
                row = load_vector(shift, k, shift_stride, o, O, BLOCK_O)
                added = added + (constants[k] + tl.sum(block * row[None, :], 1),)
            constants = added
    grad = load_rows(grad_output, grad_rows, valid, tl.arange(0, BLOCK_O), grad_output_stride[1], O, BLOCK_O)
    shared = tl.zeros([P, BLOCK_C // ALIGN], tl.float32)
    outside, missed = words_of_branches(valid, moved, start, origin, input_size, TILING)
    for c_start in range(0, C, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        # The centre tap, which the branches share.
        tap = centre_tap(TILING)
        g = tap_gradient(
            grad,
            grad_output,
            grad_rows,
            valid,
            grad_output_stride,
            weight,
            tap,
            c,
            C,
            O,
            TILING,
            BLOCK_C,
            BLOCK_O,
            DOT,
            PRECISION,
        )
        corner = corner_of(constant_dilation(0, TILING), tap, start, origin, TILING)
        mask = outside[0] & tap_word(tap, TILING) == 0
        rows = input_rows + offset_between(home, corner, input_stride, ALIGN, ROW)
        x = load_rows(input, rows, mask, c, 1, READ, BLOCK_C)
        shared += lane_sums(g, x, ALIGN)
        for tap_d in range(TILING.kernel[0]):
            for tap_h in range(TILING.kernel[1]):
                for tap_w in range(TILING.kernel[2]):
                    tap = (tap_d, tap_h, tap_w)
                    bits = tap_word(tap, TILING)
                    if (missed & bits == 0) & (bits != tap_word(centre_tap(TILING), TILING)):
                        g = tap_gradient(
                            grad,
                            grad_output,
                            grad_rows,
                            valid,
                            grad_output_stride,
                            weight,
                            tap,
                            c,
                            C,
                            O,
                            TILING,
                            BLOCK_C,
                            BLOCK_O,
                            DOT,
                            PRECISION,
                        )
                        added = ()
                        for k in tl.static_range(K):
                            corner = corner_of(constant_dilation(k, TILING), tap, start, origin, TILING)
                            mask = outside[k] & bits == 0
                            source = input + offset_between(home, corner, input_stride, ALIGN, ROW)
                            x = load_rows(source, input_rows, mask, c, 1, READ, BLOCK_C)
                            added = added + (results[k] + lane_sums(g, x, ALIGN),)
                        results = added

    grad_attention += offset_of(n, start, grad_attention_stride, 1)
    rows = row_offsets(position, grad_attention_stride, 1, ROW)
    for k in tl.static_range(K):
        result = tl.sum(results[k] + shared, 1) + constants[k]
        pointers = grad_attention + branch_offset(k, grad_attention_stride, ROW) + rows
        tl.store(pointers, result.to(grad_attention.dtype.element_ty), mask=valid)


@triton.jit
def lane_sums(g, x, ALIGN: tl.constexpr):
    """Sums of ALIGN adjacent channels, which one thread holds: the rest waits until after the loops."""
    P: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    g = tl.reshape(g, [P, B // ALIGN, ALIGN])
    x = tl.reshape(x, [P, B // ALIGN, ALIGN])
    return tl.sum(widened(x) * widened(g), 2)


@triton.jit
def tap_gradient(
    grad,
    grad_output,
    grad_rows,
    valid,
    grad_output_stride,
    weight,
    tap,
    c,
    C: tl.constexpr,
    O: tl.constexpr,
    TILING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g_t of one tile and one block of C: [P, BLOCK_C] in fp32. ``grad`` is the tile's first block of grad_output."""
    C_PADDED: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C * BLOCK_C
    O_PADDED: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O * BLOCK_O
    w = tl.load(weight_tile(weight, tap, tl.arange(0, BLOCK_O), c, O_PADDED, C_PADDED, TILING)).to(DOT)
    g = tl.dot(grad.to(DOT), w, input_precision=PRECISION)
    for o_start in range(BLOCK_O, O, BLOCK_O):
        o = o_start + tl.arange(0, BLOCK_O)
        block = load_rows(grad_output, grad_rows, valid, o, grad_output_stride[1], O, BLOCK_O).to(DOT)
        w = tl.load(weight_tile(weight, tap, o, c, O_PADDED, C_PADDED, TILING)).to(DOT)
        g = tl.dot(block, w, g, input_precision=PRECISION)
    # As in ``pinned``: g is converted once to the layout of the K tiles that it meets, not each of them to that of g.
    return g.to(DOT)


# ------------------------------------------------------------------ branches with a scale: project, then sum


@triton.jit
def project(
    input,
    weight,
    input_rows,
    input_stride,
    input_size,
    moved,
    valid,
    home,
    start,
    origin,
    k,
    o,
    C: tl.constexpr,
    O: tl.constexpr,
    TILING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    READ: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y_k of one tile and one block of O: [P, BLOCK_O] in fp32. Weight is [T, C, O]."""
    P: tl.constexpr = TILING.tile[0] * TILING.tile[1] * TILING.tile[2]
    C_PADDED: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C * BLOCK_C
    O_PADDED: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O * BLOCK_O
    dilation = dilation_of(k, TILING)
    outside = outside_word(dilation, valid, moved, start, origin, input_size, TILING)
    missed = missed_word(dilation, start, origin, input_size, TILING)
    y = tl.zeros([P, BLOCK_O], tl.float32)
    for c_start in range(0, C, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        for tap_d in range(TILING.kernel[0]):
            for tap_h in range(TILING.kernel[1]):
                for tap_w in range(TILING.kernel[2]):
                    tap = (tap_d, tap_h, tap_w)
                    bits = tap_word(tap, TILING)
                    if missed & bits == 0:
                        corner = corner_of(dilation, tap, start, origin, TILING)
                        mask = outside & bits == 0
                        source = input + offset_between(home, corner, input_stride, ALIGN, ROW)
                        x = load_rows(source, input_rows, mask, c, 1, READ, BLOCK_C).to(DOT)
                        w = tl.load(weight_tile(weight, tap, c, o, C_PADDED, O_PADDED, TILING)).to(DOT)
                        y = tl.dot(x, w, y, input_precision=PRECISION)
    return y


@triton.jit
def forward_scaled_kernel(
    input,
    weight,
    attention,
    scale,
    shift,
    output,
    input_stride,
    attention_stride,
    scale_stride,
    shift_stride,
    output_stride,
    input_size,
    output_size,
    origin,
    tiles,
    classes,
    C: tl.constexpr,
    O: tl.constexpr,
    TILING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    READ: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE_ALIGN: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    DOT: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = sum_k a_k (s_k y_k + h_k), branch by branch in the tile. Weight is [T, C, O]; grid (tiles, blocks of O)."""
    K: tl.constexpr = TILING.branches
    P: tl.constexpr = TILING.tile[0] * TILING.tile[1] * TILING.tile[2]
    n, start = tile_start(tl.program_id(0), tiles, classes, TILING)
    position, moved = tile_rows(TILING)
    valid = rows_inside(start, position, output_size)
    home = home_of(start, origin, TILING)
    input += offset_of(n, home, input_stride, ALIGN)
    input_rows = row_offsets(moved, input_stride, ALIGN, ROW)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    attention += offset_of(n, start, attention_stride, 1)
    attention_rows = row_offsets(position, attention_stride, 1, ROW)
    result = tl.zeros([P, BLOCK_O], tl.float32)
    for k in range(K):
        y = project(
            input,
            weight,
            input_rows,
            input_stride,
            input_size,
            moved,
            valid,
            home,
            start,
            origin,
            k,
            o,
            C,
            O,
            TILING,
            BLOCK_C,
            BLOCK_O,
            READ,
            ALIGN,
            DOT,
            ROW,
            PRECISION,
        )
        y *= load_vector(scale, k, scale_stride, o, O, BLOCK_O)[None, :]
        if HAS_SHIFT:
            y += load_vector(shift, k, shift_stride, o, O, BLOCK_O)[None, :]
        gate = tl.load(attention + branch_offset(k, attention_stride, ROW) + attention_rows, mask=valid, other=0.0)
        result += gate.to(tl.float32)[:, None] * y
    # The same n once more, which the compiler cannot know: else it would keep n from above in registers, or spill it.
    n, _ = tile_start(tl.maximum(tl.program_id(0), -tiles[0]), tiles, classes, TILING)
    output += offset_of(n, start, output_stride, TILE_ALIGN)
    store_rows(output, row_offsets(position, output_stride, TILE_ALIGN, ROW), valid, o, output_stride[1], result, O)


@triton.jit
def grad_scaled_kernel(
    grad_output,
    input,
    weight,
    attention,
    scale,
    shift,
    grad_attention,
    sums,
    grad_output_stride,
    input_stride,
    attention_stride,
    scale_stride,
    shift_stride,
    grad_attention_stride,
    input_size,
    output_size,
    origin,
    tiles,
    classes,
    C: tl.constexpr,
    O: tl.constexpr,
    TILING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    READ: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE_ALIGN: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    WANT_ATTENTION: tl.constexpr,
    WANT_SCALE: tl.constexpr,
    DOT: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """With y_k recomputed in the tile: da_k = sum_o G (s_k y_k + h_k), dscale_k = sum_p a_k G y_k.

    Weight is [T, C, O]; grid (tiles, 1). Each tile leaves its part of dscale in sums[tile, K, O], fp32.
    """
    K: tl.constexpr = TILING.branches
    P: tl.constexpr = TILING.tile[0] * TILING.tile[1] * TILING.tile[2]
    n, start = tile_start(tl.program_id(0), tiles, classes, TILING)
    position, moved = tile_rows(TILING)
    valid = rows_inside(start, position, output_size)
    home = home_of(start, origin, TILING)
    input += offset_of(n, home, input_stride, ALIGN)
    input_rows = row_offsets(moved, input_stride, ALIGN, ROW)
    grad_output += offset_of(n, start, grad_output_stride, TILE_ALIGN)
    grad_rows = row_offsets(position, grad_output_stride, TILE_ALIGN, ROW)
    attention += offset_of(n, start, attention_stride, 1)
    attention_rows = row_offsets(position, attention_stride, 1, ROW)
    if WANT_SCALE:
        sums += tl.program_id(0).to(tl.int64) * (K * O)
    for k in range(K):
        result = tl.zeros([P], tl.float32)
        for o_start in range(0, O, BLOCK_O):
            o = o_start + tl.arange(0, BLOCK_O)
            y = project(
                input,
                weight,
                input_rows,
                input_stride,
                input_size,
                moved,
                valid,
                home,
                start,
                origin,
                k,
                o,
                C,
                O,
                TILING,
                BLOCK_C,
                BLOCK_O,
                READ,
                ALIGN,
                DOT,
                ROW,
                PRECISION,
            )
            grad = load_rows(grad_output, grad_rows, valid, o, grad_output_stride[1], O, BLOCK_O).to(tl.float32)
            if WANT_SCALE:
                gate = tl.load(
                    attention + branch_offset(k, attention_stride, ROW) + attention_rows, mask=valid, other=0.0
                )
                tl.store(sums + k * O + o, tl.sum(gate.to(tl.float32)[:, None] * grad * y, 0), mask=o < O)
            if WANT_ATTENTION:
                y *= load_vector(scale, k, scale_stride, o, O, BLOCK_O)[None, :]
                if HAS_SHIFT:
                    y += load_vector(shift, k, shift_stride, o, O, BLOCK_O)[None, :]
                result += tl.sum(grad * y, 1)
        if WANT_ATTENTION:
            rows = row_offsets(position, grad_attention_stride, 1, ROW)
            target = grad_attention + offset_of(n, start, grad_attention_stride, 1)
            pointers = target + branch_offset(k, grad_attention_stride, ROW) + rows
            tl.store(pointers, result.to(grad_attention.dtype.element_ty), mask=valid)


# ------------------------------------------------------------------ both: gather, blend, project back


@triton.jit
def gathered_blend(
    grad_output,
    attention,
    scale,
    grad_rows,
    attention_rows,
    grad_output_stride,
    branch_stride,
    attention_stride,
    scale_stride,
    outside,
    home,
    start,
    origin,
    tap,
    o,
    O: tl.constexpr,
    TILING: tl.constexpr,
    BLOCK_O: tl.constexpr,
    READ: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLEND: tl.constexpr,
    ROW: tl.constexpr,
):
    """v_t of one tile and one block of O: the sum over branches of a_k (s_k) G at the outputs that read the row.

    Without gates the sum is of dy_k, each ``branch_stride`` after the one before it.
    """
    K: tl.constexpr = TILING.branches
    P: tl.constexpr = TILING.tile[0] * TILING.tile[1] * TILING.tile[2]
    v = tl.zeros([P, BLOCK_O], BLEND)
    for k in tl.static_range(K):
        corner = corner_of(constant_dilation(k, TILING), tap, start, origin, TILING)
        mask = outside[k] & tap_word(tap, TILING) == 0
        source = grad_output
        if HAS_GATE:
            rows = attention_rows + offset_between(home, corner, attention_stride, 1, ROW)
            gate = tl.load(attention + branch_offset(k, attention_stride, ROW) + rows, mask=mask, other=0.0)
        else:
            source += tl.full([], k, tl.int64) * branch_stride * ALIGN
            gate = mask
        source += offset_between(home, corner, grad_output_stride, ALIGN, ROW)
        g = load_rows(source, grad_rows, mask, o, 1, READ, BLOCK_O)
        if HAS_SCALE:
            g = g.to(BLEND) * load_vector(scale, k, scale_stride, o, O, BLOCK_O).to(BLEND)[None, :]
        v = blended(v, gate, g)
    return pinned(v)


@triton.jit
def recomputed(channel, index, ALIGN: tl.constexpr):
    """``channel``, in a way that depends on ``index`` where rows take a load for each channel.

    Else the compiler computes the offsets of all channels once, before the first tile, and keeps them. It cannot know
    that ``index`` is never negative.
    """
    if ALIGN == 1:
        return tl.maximum(channel, -index)
    else:
        return channel


@triton.jit
def line_of(start, position):
    """The point of w = 0 on the line of ``start``, and the rows counted from there."""
    return (start[0], start[1], start[2] * 0), (position[0], position[1], position[2] + start[2])


@triton.jit
def grad_input_weight_kernel(
    grad_output,
    attention,
    scale,
    weight,
    input,
    grad_input,
    sums,
    grad_output_stride,
    branch_stride,
    attention_stride,
    scale_stride,
    input_stride,
    grad_input_stride,
    input_size,
    output_size,
    origin,
    tiles,
    classes,
    num_tiles,
    C: tl.constexpr,
    O: tl.constexpr,
    TILING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    READ: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE_ALIGN: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WANT_INPUT: tl.constexpr,
    WANT_WEIGHT: tl.constexpr,
    BLEND: tl.constexpr,
    DOT: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """v_t once, then dx = sum_t W_t^T v_t and dW_t = sum_q v_t x^T. Weight is [T, O, C]; grid (splits, blocks of C).

    A program walks its share of the tiles in a fixed order and adds to its own part of dW in sums[split, T, O, C_SUMS]
    (fp32, zeroed by the launcher, C rounded up to whole sectors), which stays in L2: no atomics, so the same call gives
    the same bits. Without gates grad_output is [K, N, O, D, H, W], the gradient of each branch, and ``branch_stride``
    that of K in units of ALIGN.
    """
    P: tl.constexpr = TILING.tile[0] * TILING.tile[1] * TILING.tile[2]
    T: tl.constexpr = TILING.kernel[0] * TILING.kernel[1] * TILING.kernel[2]
    C_PADDED: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C * BLOCK_C
    O_PADDED: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O * BLOCK_O
    position, moved = tile_rows(TILING)
    grad_rows = row_offsets(moved, grad_output_stride, ALIGN, ROW)
    attention_rows = row_offsets(moved, attention_stride, 1, ROW)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    C_SUMS: tl.constexpr = (C + 7) // 8 * 8
    if WANT_WEIGHT:
        sums += tl.program_id(0).to(tl.int64) * (T * O * C_SUMS)
    index = tl.program_id(0)
    while index < num_tiles:
        n, start = tile_start(index, tiles, classes, TILING)
        valid = rows_inside(start, position, input_size)
        home = home_of(start, origin, TILING)
        tile_grad_output = grad_output + offset_of(n, home, grad_output_stride, ALIGN)
        tile_attention = attention
        if HAS_GATE:
            tile_attention += offset_of(n, home, attention_stride, 1)
        # Offsets of w count from the volume's side: did they not depend on the tile, those of all channels would be
        # computed before the first tile and stay in registers.
        line, in_line = line_of(start, position)
        if WANT_WEIGHT:
            source = input + offset_of(n, line, input_stride, TILE_ALIGN)
            rows = row_offsets(in_line, input_stride, TILE_ALIGN, ROW)
            channel = recomputed(c, index, TILE_ALIGN)
            x = load_rows(source, rows, valid, channel, input_stride[1], C, BLOCK_C).to(DOT)
        outside, missed = words_of_branches(valid, moved, start, origin, output_size, TILING)
        result = tl.zeros([P, BLOCK_C], tl.float32)
        for o_start in range(0, O, BLOCK_O):
            o = o_start + tl.arange(0, BLOCK_O)
            for tap_d in range(TILING.kernel[0]):
                for tap_h in range(TILING.kernel[1]):
                    for tap_w in range(TILING.kernel[2]):
                        tap = (tap_d, tap_h, tap_w)
                        if missed & tap_word(tap, TILING) == 0:
                            v = gathered_blend(
                                tile_grad_output,
                                tile_attention,
                                scale,
                                grad_rows,
                                attention_rows,
                                grad_output_stride,
                                branch_stride,
                                attention_stride,
                                scale_stride,
                                outside,
                                home,
                                start,
                                origin,
                                tap,
                                o,
                                O,
                                TILING,
                                BLOCK_O,
                                READ,
                                ALIGN,
                                HAS_GATE,
                                HAS_SCALE,
                                BLEND,
                                ROW,
                            ).to(DOT)
                            if WANT_INPUT:
                                w = tl.load(weight_tile(weight, tap, o, c, O_PADDED, C_PADDED, TILING)).to(DOT)
                                result = tl.dot(v, w, result, input_precision=PRECISION)
                            if WANT_WEIGHT:
                                # Always true: it puts the product into a block of its own. Otherwise the compiler takes
                                # it for a link of a chain and gives each warp rows of its own, and dW has too few rows.
                                if num_tiles > 0:
                                    pointers = weight_tile(sums, tap, o, c, O, C_SUMS, TILING)
                                    inside = (o < O)[:, None] & (c < C_SUMS)[None, :]
                                    part = tl.load(pointers, mask=inside, other=0.0)
                                    part = tl.dot(tl.trans(v), x, part, input_precision=PRECISION)
                                    tl.store(pointers, part, mask=inside)
        if WANT_INPUT:
            target = grad_input + offset_of(n, line, grad_input_stride, TILE_ALIGN)
            rows = row_offsets(in_line, grad_input_stride, TILE_ALIGN, ROW)
            # Another index than above, or the offsets would be kept from there.
            channel = recomputed(c, index + 1, TILE_ALIGN)
            store_rows(target, rows, valid, channel, grad_input_stride[1], result, C)
        if WANT_WEIGHT:
            # The next tile may load sums with other threads than this one stores.
            tl.debug_barrier()
        index += tl.num_programs(0)
