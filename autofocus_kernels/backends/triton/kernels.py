"""The Triton kernels: `blend`, `project` and `gather` on tiles of a lattice.

Axes: N batch, C input channels, O output channels, K branches, P rows (positions) of a tile, and always three spatial
axes D H W. The arithmetic is docs/math.md; what is tiled, in which order and why is docs/triton.md.

A program owns a tile of lattice points: on every axis the positions ``coset + step * point``. For one branch and one tap,
the coordinate read on an axis is ``base + move * point`` with a scalar ``base``: an address is one scalar offset plus a
row offset that never changes, and a base of OUTSIDE switches a whole read off. ``G`` is the constexpr ``Tiling`` of
configs.py, ``*_stride`` is (batch, channel or branch, d, h, w), and the tensor that is gathered (input, or grad_output
in grad_input_weight_kernel) has adjacent channels and strides in units of ALIGN elements, which shows the compiler how
wide its loads may be. DOT is the dtype of the operands of tl.dot.
"""

import triton
import triton.language as tl

# No admitted size or reach gets here (launch.py refuses them); twice it wraps to a negative int32, a huge uint32.
OUTSIDE = tl.constexpr(1 << 30)


@triton.jit
def tile_points(index, tiles, cosets, G: tl.constexpr):
    """Batch entry, coset, lattice points ([P] per axis) and first lattice point of tile ``index``."""
    w = index % tiles[2]
    index = index // tiles[2]
    h = index % tiles[1]
    index = index // tiles[1]
    d = index % tiles[0]
    index = index // tiles[0]
    coset_w = index % cosets[2]
    index = index // cosets[2]
    coset_h = index % cosets[1]
    index = index // cosets[1]
    coset_d = index % cosets[0]
    n = (index // cosets[0]).to(tl.int64)
    first = (d * G.tile[0], h * G.tile[1], w * G.tile[2])
    row = tl.arange(0, G.tile[0] * G.tile[1] * G.tile[2])
    point_d = first[0] + row // (G.tile[1] * G.tile[2])
    point_h = first[1] + row // G.tile[2] % G.tile[1]
    point_w = first[2] + row % G.tile[2]
    return n, (coset_d, coset_h, coset_w), (point_d, point_h, point_w), first


@triton.jit
def positions(coset, point, G: tl.constexpr):
    return coset[0] + G.step[0] * point[0], coset[1] + G.step[1] * point[1], coset[2] + G.step[2] * point[2]


@triton.jit
def moves(point, G: tl.constexpr):
    return point[0] * G.move[0], point[1] * G.move[1], point[2] * G.move[2]


@triton.jit
def within(position, size):
    """Which rows hold a position of the volume [P]; positions are never negative."""
    return (position[0] < size[0]) & (position[1] < size[1]) & (position[2] < size[2])


@triton.jit
def offset_of(point, stride, ALIGN: tl.constexpr):
    """Element offset of a point, in 64 bits."""
    d = point[0].to(tl.int64) * stride[2]
    h = point[1].to(tl.int64) * stride[3]
    w = point[2].to(tl.int64) * stride[4]
    return (d + h + w) * ALIGN


@triton.jit
def dilation_of(k, G: tl.constexpr):
    """Dilation of a branch known at run time: selects over constants, so that no table has to be in memory."""
    K: tl.constexpr = G.branches
    d = k * 0 + G.dilations[0][0]
    h = k * 0 + G.dilations[0][1]
    w = k * 0 + G.dilations[0][2]
    for other in tl.static_range(1, K):
        d = tl.where(k == other, G.dilations[other][0], d)
        h = tl.where(k == other, G.dilations[other][1], h)
        w = tl.where(k == other, G.dilations[other][2], w)
    return d, h, w


@triton.jit
def base_on_axis(coset, origin, reach, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Coordinate read by lattice point 0 on one axis, for a tap ``reach`` away from the centre.

    Output position p reads ``origin + stride * p + reach``. TRANSPOSED: input position q reads the p that reads it;
    the step is then a multiple of the stride, so that either all points of a lattice have such a p or none has.
    """
    if TRANSPOSED:
        distance = coset - origin - reach
        base = tl.where(distance % STRIDE == 0, distance // STRIDE, OUTSIDE)
    else:
        base = coset * STRIDE + origin + reach
    return base


@triton.jit
def base_of(dilation, tap, coset, origin, G: tl.constexpr):
    """Coordinates read by lattice point 0 for one branch's dilation and one tap."""
    reach_d = dilation[0] * (tap[0] - G.kernel[0] // 2)
    reach_h = dilation[1] * (tap[1] - G.kernel[1] // 2)
    reach_w = dilation[2] * (tap[2] - G.kernel[2] // 2)
    d = base_on_axis(coset[0], origin[0], reach_d, G.stride[0], G.transposed)
    h = base_on_axis(coset[1], origin[1], reach_h, G.stride[1], G.transposed)
    w = base_on_axis(coset[2], origin[2], reach_w, G.stride[2], G.transposed)
    return d, h, w


@triton.jit
def tile_reads(base, first, size, G: tl.constexpr):
    """Whether any point of the tile's box reads inside the volume (a scalar)."""
    d = base[0] + G.move[0] * first[0]
    h = base[1] + G.move[1] * first[1]
    w = base[2] + G.move[2] * first[2]
    reads = (d < size[0]) & (d + G.move[0] * (G.tile[0] - 1) >= 0)
    reads = reads & (h < size[1]) & (h + G.move[1] * (G.tile[1] - 1) >= 0)
    return reads & (w < size[2]) & (w + G.move[2] * (G.tile[2] - 1) >= 0)


@triton.jit
def any_branch_reads(tap, coset, origin, first, size, G: tl.constexpr):
    """Whether the tap reads anything for this tile (a scalar)."""
    K: tl.constexpr = G.branches
    reads = tile_reads(base_of(G.dilations[0], tap, coset, origin, G), first, size, G)
    for k in tl.static_range(1, K):
        reads = reads | tile_reads(base_of(G.dilations[k], tap, coset, origin, G), first, size, G)
    return reads


@triton.jit
def rows_inside(base, moved, valid, size):
    """Which rows read inside the volume [P]; a negative coordinate is a huge unsigned one."""
    mask = valid & ((base[0] + moved[0]).to(tl.uint32, bitcast=True) < size[0])
    mask = mask & ((base[1] + moved[1]).to(tl.uint32, bitcast=True) < size[1])
    return mask & ((base[2] + moved[2]).to(tl.uint32, bitcast=True) < size[2])


@triton.jit
def is_centre(tap, G: tl.constexpr):
    return (tap[0] == G.kernel[0] // 2) & (tap[1] == G.kernel[1] // 2) & (tap[2] == G.kernel[2] // 2)


@triton.jit
def tap_index(tap, G: tl.constexpr):
    return (tap[0] * G.kernel[1] + tap[1]) * G.kernel[2] + tap[2]


@triton.jit
def load_rows(pointer, rows, mask, channel, channel_stride, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A [P, BLOCK] tile, zero where masked and past the last channel."""
    pointers = pointer + (rows[:, None] + channel[None, :].to(tl.int64) * channel_stride)
    if CHANNELS % BLOCK == 0:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=mask[:, None] & (channel < CHANNELS)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, rows, mask, channel, channel_stride, tile, CHANNELS: tl.constexpr):
    pointers = pointer + (rows[:, None] + channel[None, :].to(tl.int64) * channel_stride)
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def load_weight(weight, tap, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr):
    """A tile of the repacked weight [T, ROWS, COLUMNS], which is zero-padded to whole blocks and so needs no mask."""
    return tl.load(weight + ((tap * ROWS + row).to(tl.int64)[:, None] * COLUMNS + column[None, :])).to(DOT)


@triton.jit
def forward_kernel(
    input, weight, attention, shift, output,
    input_stride, attention_stride, shift_stride, output_stride,
    input_size, output_size, origin, tiles, cosets,
    C: tl.constexpr, O: tl.constexpr, G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    READ: tl.constexpr, ALIGN: tl.constexpr, HAS_SHIFT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """out = sum_t W_t u_t + sum_k a_k shift_k, u_t the blend of tap t. Weight is [T, C, O]; grid (tiles, blocks of O)."""
    K: tl.constexpr = G.branches
    P: tl.constexpr = G.tile[0] * G.tile[1] * G.tile[2]
    C_PADDED: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C * BLOCK_C
    O_PADDED: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O * BLOCK_O
    n, coset, point, first = tile_points(tl.program_id(0), tiles, cosets, G)
    position = positions(coset, point, G)
    valid = within(position, output_size)
    moved = moves(point, G)
    input_rows = n * input_stride[0] * ALIGN + offset_of(moved, input_stride, ALIGN)
    attention_rows = n * attention_stride[0] + offset_of(position, attention_stride, 1)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)

    gates = ()
    total = tl.zeros([P], tl.float32)
    for k in tl.static_range(K):
        gate = tl.load(attention + (k * attention_stride[1] + attention_rows), mask=valid, other=0.0).to(tl.float32)
        gates = gates + (gate,)
        total += gate

    result = tl.zeros([P, BLOCK_O], tl.float32)
    for c_start in range(0, C, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        for tap_d in range(G.kernel[0]):
            for tap_h in range(G.kernel[1]):
                for tap_w in range(G.kernel[2]):
                    tap = (tap_d, tap_h, tap_w)
                    if any_branch_reads(tap, coset, origin, first, input_size, G):
                        centre = is_centre(tap, G)
                        blend = tl.zeros([P, BLOCK_C], tl.float32)
                        for k in tl.static_range(K):
                            base = base_of(G.dilations[k], tap, coset, origin, G)
                            mask = rows_inside(base, moved, valid, input_size)
                            gate = gates[k]
                            # The branches share the centre tap: branch 0 reads it once, with the sum of the gates.
                            if k == 0:
                                gate = tl.where(centre, total, gate)
                            else:
                                mask = mask & (centre == 0)
                            rows = input_rows + offset_of(base, input_stride, ALIGN)
                            blend += gate[:, None] * load_rows(input, rows, mask, c, 1, READ, BLOCK_C).to(tl.float32)
                        w = load_weight(weight, tap_index(tap, G), c, o, C_PADDED, O_PADDED, DOT)
                        result = tl.dot(blend.to(DOT), w, result, input_precision=PRECISION)

    if HAS_SHIFT:
        for k in tl.static_range(K):
            h = tl.load(shift + (k * shift_stride[0] + o * shift_stride[1]), mask=o < O, other=0.0).to(tl.float32)
            result += gates[k][:, None] * h[None, :]
    output_rows = n * output_stride[0] + offset_of(position, output_stride, 1)
    store_rows(output, output_rows, valid, o, output_stride[1], result, O)


@triton.jit
def grad_input_weight_kernel(
    grad_output, attention, scale, weight, input, grad_input, partial,
    grad_output_stride, attention_stride, scale_stride, input_stride, grad_input_stride,
    input_size, output_size, origin, tiles, cosets, num_tiles,
    C: tl.constexpr, O: tl.constexpr, G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    READ: tl.constexpr, ALIGN: tl.constexpr, HAS_SCALE: tl.constexpr, WANT_INPUT: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """v_t once, then dx = sum_t W_t^T v_t and dW_t = sum_q v_t x^T. Weight is [T, O, C]; grid (splits, blocks of C).

    A program walks its share of the tiles in a fixed order and keeps its own sum of dW in partial[split, T, O, C] (fp32,
    zeroed by the launcher), which stays in L2: no atomics, so that the same call gives the same bits.
    """
    K: tl.constexpr = G.branches
    P: tl.constexpr = G.tile[0] * G.tile[1] * G.tile[2]
    T: tl.constexpr = G.kernel[0] * G.kernel[1] * G.kernel[2]
    C_PADDED: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C * BLOCK_C
    O_PADDED: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O * BLOCK_O
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(0)
    index = split
    while index < num_tiles:
        n, coset, point, first = tile_points(index, tiles, cosets, G)
        position = positions(coset, point, G)
        valid = within(position, input_size)
        moved = moves(point, G)
        grad_rows = n * grad_output_stride[0] * ALIGN + offset_of(moved, grad_output_stride, ALIGN)
        attention_rows = n * attention_stride[0] + offset_of(moved, attention_stride, 1)
        if WANT_WEIGHT:
            input_rows = n * input_stride[0] + offset_of(position, input_stride, 1)
            x = load_rows(input, input_rows, valid, c, input_stride[1], C, BLOCK_C).to(DOT)
        if WANT_INPUT:
            result = tl.zeros([P, BLOCK_C], tl.float32)
        for o_start in range(0, O, BLOCK_O):
            o = o_start + tl.arange(0, BLOCK_O)
            for tap_d in range(G.kernel[0]):
                for tap_h in range(G.kernel[1]):
                    for tap_w in range(G.kernel[2]):
                        tap = (tap_d, tap_h, tap_w)
                        if any_branch_reads(tap, coset, origin, first, output_size, G):
                            # At the centre tap all branches read the same row of grad_output: their gates add up on
                            # the way to branch 0, which reads it alone (unless a scale tells the branches apart).
                            shared = is_centre(tap, G) & (not HAS_SCALE)
                            carried = tl.zeros([P], tl.float32)
                            v = tl.zeros([P, BLOCK_O], tl.float32)
                            for back in tl.static_range(K):
                                k: tl.constexpr = K - 1 - back
                                base = base_of(G.dilations[k], tap, coset, origin, G)
                                mask = rows_inside(base, moved, valid, output_size)
                                rows = attention_rows + offset_of(base, attention_stride, 1)
                                gate = tl.load(attention + (k * attention_stride[1] + rows), mask=mask, other=0.0)
                                gate = gate.to(tl.float32) + carried
                                carried = tl.where(shared, gate, 0.0)
                                if k > 0:
                                    mask = mask & (shared == 0)
                                rows = grad_rows + offset_of(base, grad_output_stride, ALIGN)
                                g = load_rows(grad_output, rows, mask, o, 1, READ, BLOCK_O).to(tl.float32)
                                if HAS_SCALE:
                                    s = tl.load(scale + (k * scale_stride[0] + o * scale_stride[1]), mask=o < O, other=0.0)
                                    g = g * s.to(tl.float32)[None, :]
                                v += gate[:, None] * g
                            v = v.to(DOT)
                            t = tap_index(tap, G)
                            if WANT_INPUT:
                                w = load_weight(weight, t, o, c, O_PADDED, C_PADDED, DOT)
                                result = tl.dot(v, w, result, input_precision=PRECISION)
                            if WANT_WEIGHT:
                                rows = ((split * T + t).to(tl.int64) * O + o) * C
                                pointers = partial + (rows[:, None] + c[None, :])
                                mask = (o < O)[:, None] & (c < C)[None, :]
                                old = tl.load(pointers, mask=mask, other=0.0)
                                tl.store(pointers, tl.dot(tl.trans(v), x, old, input_precision=PRECISION), mask=mask)
                                # The next tile's load may fall to another thread of this program.
                                tl.debug_barrier()
        if WANT_INPUT:
            rows = n * grad_input_stride[0] + offset_of(position, grad_input_stride, 1)
            store_rows(grad_input, rows, valid, c, grad_input_stride[1], result, C)
        index += tl.num_programs(0)


@triton.jit
def grad_attention_kernel(
    grad_output, input, weight, shift, grad_attention,
    grad_output_stride, input_stride, shift_stride, grad_attention_stride,
    input_size, output_size, origin, tiles, cosets,
    C: tl.constexpr, O: tl.constexpr, G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    READ: tl.constexpr, ALIGN: tl.constexpr, HAS_SHIFT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """da_k = sum_t <g_t, x(base_k + ...)> + <shift_k, G> with g_t = W_t^T G. Weight is [T, O, C]; grid (tiles,)."""
    K: tl.constexpr = G.branches
    P: tl.constexpr = G.tile[0] * G.tile[1] * G.tile[2]
    C_PADDED: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C * BLOCK_C
    O_PADDED: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O * BLOCK_O
    n, coset, point, first = tile_points(tl.program_id(0), tiles, cosets, G)
    position = positions(coset, point, G)
    valid = within(position, output_size)
    moved = moves(point, G)
    input_rows = n * input_stride[0] * ALIGN + offset_of(moved, input_stride, ALIGN)
    grad_rows = n * grad_output_stride[0] + offset_of(position, grad_output_stride, 1)

    results = ()
    for k in tl.static_range(K):
        result = tl.zeros([P], tl.float32)
        if HAS_SHIFT:
            for o_start in range(0, O, BLOCK_O):
                o = o_start + tl.arange(0, BLOCK_O)
                grad = load_rows(grad_output, grad_rows, valid, o, grad_output_stride[1], O, BLOCK_O).to(tl.float32)
                h = tl.load(shift + (k * shift_stride[0] + o * shift_stride[1]), mask=o < O, other=0.0)
                result += tl.sum(grad * h.to(tl.float32)[None, :], 1)
        results = results + (result,)

    shared = tl.zeros([P], tl.float32)
    for c_start in range(0, C, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        for tap_d in range(G.kernel[0]):
            for tap_h in range(G.kernel[1]):
                for tap_w in range(G.kernel[2]):
                    tap = (tap_d, tap_h, tap_w)
                    if any_branch_reads(tap, coset, origin, first, input_size, G):
                        t = tap_index(tap, G)
                        g = tl.zeros([P, BLOCK_C], tl.float32)
                        for o_start in tl.static_range(0, O, BLOCK_O):
                            o = o_start + tl.arange(0, BLOCK_O)
                            grad = load_rows(grad_output, grad_rows, valid, o, grad_output_stride[1], O, BLOCK_O).to(DOT)
                            w = load_weight(weight, t, o, c, O_PADDED, C_PADDED, DOT)
                            g = tl.dot(grad, w, g, input_precision=PRECISION)
                        # At the centre tap branch 0 reads alone, for all.
                        centre = is_centre(tap, G)
                        added = ()
                        for k in tl.static_range(K):
                            base = base_of(G.dilations[k], tap, coset, origin, G)
                            mask = rows_inside(base, moved, valid, input_size)
                            if k > 0:
                                mask = mask & (centre == 0)
                            rows = input_rows + offset_of(base, input_stride, ALIGN)
                            x = load_rows(input, rows, mask, c, 1, READ, BLOCK_C).to(tl.float32)
                            product = tl.sum(g * x, 1)
                            if k == 0:
                                shared += tl.where(centre, product, 0.0)
                                product = tl.where(centre, 0.0, product)
                            added = added + (results[k] + product,)
                        results = added

    rows = n * grad_attention_stride[0] + offset_of(position, grad_attention_stride, 1)
    for k in tl.static_range(K):
        pointers = grad_attention + (k * grad_attention_stride[1] + rows)
        tl.store(pointers, (results[k] + shared).to(grad_attention.dtype.element_ty), mask=valid)


@triton.jit
def project(
    input, weight, input_rows, input_stride, input_size, moved, valid, coset, origin, first, k, o,
    C: tl.constexpr, O_PADDED: tl.constexpr, G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    READ: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """y_k of one tile and one block of O: [P, BLOCK_O] in fp32. Weight is [T, C, O]."""
    P: tl.constexpr = G.tile[0] * G.tile[1] * G.tile[2]
    C_PADDED: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C * BLOCK_C
    dilation = dilation_of(k, G)
    y = tl.zeros([P, BLOCK_O], tl.float32)
    for c_start in range(0, C, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        for tap_d in range(G.kernel[0]):
            for tap_h in range(G.kernel[1]):
                for tap_w in range(G.kernel[2]):
                    tap = (tap_d, tap_h, tap_w)
                    base = base_of(dilation, tap, coset, origin, G)
                    if tile_reads(base, first, input_size, G):
                        mask = rows_inside(base, moved, valid, input_size)
                        rows = input_rows + offset_of(base, input_stride, ALIGN)
                        x = load_rows(input, rows, mask, c, 1, READ, BLOCK_C).to(DOT)
                        w = load_weight(weight, tap_index(tap, G), c, o, C_PADDED, O_PADDED, DOT)
                        y = tl.dot(x, w, y, input_precision=PRECISION)
    return y


@triton.jit
def forward_scaled_kernel(
    input, weight, attention, scale, shift, output,
    input_stride, attention_stride, scale_stride, shift_stride, output_stride,
    input_size, output_size, origin, tiles, cosets,
    C: tl.constexpr, O: tl.constexpr, G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    READ: tl.constexpr, ALIGN: tl.constexpr, HAS_SHIFT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """out = sum_k a_k (s_k y_k + h_k), branch by branch in the tile. Weight is [T, C, O]; grid (tiles, blocks of O)."""
    K: tl.constexpr = G.branches
    P: tl.constexpr = G.tile[0] * G.tile[1] * G.tile[2]
    O_PADDED: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O * BLOCK_O
    n, coset, point, first = tile_points(tl.program_id(0), tiles, cosets, G)
    position = positions(coset, point, G)
    valid = within(position, output_size)
    moved = moves(point, G)
    input_rows = n * input_stride[0] * ALIGN + offset_of(moved, input_stride, ALIGN)
    attention_rows = n * attention_stride[0] + offset_of(position, attention_stride, 1)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    result = tl.zeros([P, BLOCK_O], tl.float32)
    for k in range(K):
        y = project(input, weight, input_rows, input_stride, input_size, moved, valid, coset, origin, first, k, o,
                    C, O_PADDED, G, BLOCK_C, BLOCK_O, READ, ALIGN, DOT, PRECISION)
        y *= tl.load(scale + (k * scale_stride[0] + o * scale_stride[1]), mask=o < O, other=0.0).to(tl.float32)[None, :]
        if HAS_SHIFT:
            h = tl.load(shift + (k * shift_stride[0] + o * shift_stride[1]), mask=o < O, other=0.0).to(tl.float32)
            y += h[None, :]
        gate = tl.load(attention + (k * attention_stride[1] + attention_rows), mask=valid, other=0.0)
        result += gate.to(tl.float32)[:, None] * y
    output_rows = n * output_stride[0] + offset_of(position, output_stride, 1)
    store_rows(output, output_rows, valid, o, output_stride[1], result, O)


@triton.jit
def grad_scaled_kernel(
    grad_output, input, weight, attention, scale, shift, grad_attention, partial,
    grad_output_stride, input_stride, attention_stride, scale_stride, shift_stride, grad_attention_stride,
    input_size, output_size, origin, tiles, cosets,
    C: tl.constexpr, O: tl.constexpr, G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    READ: tl.constexpr, ALIGN: tl.constexpr, HAS_SHIFT: tl.constexpr, WANT_ATTENTION: tl.constexpr, WANT_SCALE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):
    """With y_k recomputed in the tile: da_k = sum_o G (s_k y_k + h_k) and dscale_k = sum_p a_k G y_k.

    Weight is [T, C, O]; grid (tiles,). dscale leaves as partial[tile, K, O] in fp32, summed in order by the launcher.
    """
    K: tl.constexpr = G.branches
    P: tl.constexpr = G.tile[0] * G.tile[1] * G.tile[2]
    O_PADDED: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O * BLOCK_O
    n, coset, point, first = tile_points(tl.program_id(0), tiles, cosets, G)
    position = positions(coset, point, G)
    valid = within(position, output_size)
    moved = moves(point, G)
    input_rows = n * input_stride[0] * ALIGN + offset_of(moved, input_stride, ALIGN)
    grad_rows = n * grad_output_stride[0] + offset_of(position, grad_output_stride, 1)
    attention_rows = n * attention_stride[0] + offset_of(position, attention_stride, 1)
    grad_attention_rows = n * grad_attention_stride[0] + offset_of(position, grad_attention_stride, 1)
    for k in range(K):
        result = tl.zeros([P], tl.float32)
        for o_start in range(0, O, BLOCK_O):
            o = o_start + tl.arange(0, BLOCK_O)
            y = project(input, weight, input_rows, input_stride, input_size, moved, valid, coset, origin, first, k, o,
                        C, O_PADDED, G, BLOCK_C, BLOCK_O, READ, ALIGN, DOT, PRECISION)
            grad = load_rows(grad_output, grad_rows, valid, o, grad_output_stride[1], O, BLOCK_O).to(tl.float32)
            if WANT_SCALE:
                gate = tl.load(attention + (k * attention_stride[1] + attention_rows), mask=valid, other=0.0)
                rows = (tl.program_id(0).to(tl.int64) * K + k) * O + o
                tl.store(partial + rows, tl.sum(gate.to(tl.float32)[:, None] * grad * y, 0), mask=o < O)
            if WANT_ATTENTION:
                s = tl.load(scale + (k * scale_stride[0] + o * scale_stride[1]), mask=o < O, other=0.0).to(tl.float32)
                y *= s[None, :]
                if HAS_SHIFT:
                    h = tl.load(shift + (k * shift_stride[0] + o * shift_stride[1]), mask=o < O, other=0.0)
                    y += h.to(tl.float32)[None, :]
                result += tl.sum(grad * y, 1)
        if WANT_ATTENTION:
            pointers = grad_attention + (k * grad_attention_stride[1] + grad_attention_rows)
            tl.store(pointers, result.to(grad_attention.dtype.element_ty), mask=valid)


@triton.jit
def pack_kernel(
    source, target, source_batch, source_channel, source_space, points,
    C: tl.constexpr, C_PADDED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """source [N, C, points] with any strides to target [N, points, C_PADDED], zeros past C; grid (blocks of N * points, blocks of C)."""
    blocks = tl.cdiv(points, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pointers = source + (n * source_batch + p.to(tl.int64) * source_space)[:, None] + (c.to(tl.int64) * source_channel)[None, :]
    tile = tl.load(pointers, mask=(p < points)[:, None] & (c < C)[None, :], other=0.0)
    pointers = target + ((n * points + p) * C_PADDED)[:, None] + c[None, :]
    tl.store(pointers, tile, mask=(p < points)[:, None] & (c < C_PADDED)[None, :])
