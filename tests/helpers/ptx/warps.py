"""Instructions that whole warps execute: shuffles, loads and stores of matrices, MMA, with the manual's fragments."""

import re

import numpy as np

from .memory import PtxError, elements, halves, words

_LANES = np.arange(32)
_ROWS, _MEMBERS = _LANES // 4, _LANES % 4  # of a lane in fragments


def _shfl(block, parts, operands, number):
    _, mode, kind = parts
    to, source, lane, clamp, members = operands
    result, *found = to if isinstance(to, list) else [to]
    write, others = block.write(result, kind), [block.write(register, "pred") for register in found]
    value, lane = block.by_thread(source, kind), block.by_thread(lane, "u32")
    clamp, members = block.by_thread(clamp, "u32"), block.by_thread(members, "u32")
    own = block.lanes % 32

    def shuffle(active):
        if np.any(clamp[active] != 31) or np.any(members[active] != 0xFFFFFFFF):
            raise PtxError("a shuffle of a part of a warp")
        other = {"bfly": own ^ lane, "idx": lane}[mode] % 32
        write(value[block.lanes - own + other.astype(np.int64)], active)
        for write_found in others:
            write_found(True, active)

    return shuffle


def _movmatrix(block, parts, operands, number):
    write, source = block.write(operands[0], "b32"), block.source(operands[1], "b32")

    def transpose(active):
        matrices = halves(source).reshape(-1, 8, 8).transpose(0, 2, 1)
        write(words(matrices.reshape(-1, 2)), active)

    return transpose


def _ldmatrix(block, parts, operands, number):
    if parts[:3] != ["sync", "aligned", "m8n8"] or "b16" not in parts:
        raise PtxError("not known")
    writes, address = [block.write(register, "b32") for register in operands[0]], block.address(operands[1])
    count = len(writes)

    def load(active):
        # The first 8 * count lanes give the addresses of rows, eight a matrix: [warps, matrices, rows, elements].
        rows = address()[active].reshape(-1, 32)[:, : 8 * count]
        block.races.access(rows.reshape(-1), 16, active & (block.lanes % 32 < 8 * count), writes=False)
        matrices = halves(block.shared.load(rows, 4, 4)).reshape(-1, count, 8, 8)
        if "trans" in parts:
            matrices = matrices.transpose(0, 1, 3, 2)
        fragments = words(matrices.reshape(-1, count, 32, 2))
        whole = np.zeros((count, block.threads), np.uint32)
        whole[:, active] = fragments.transpose(1, 0, 2).reshape(count, -1)
        for write, fragment in zip(writes, whole):
            write(fragment, active)

    return load


def _stmatrix(block, parts, operands, number):
    if parts[:3] != ["sync", "aligned", "m8n8"] or "b16" not in parts:
        raise PtxError("not known")
    address, sources = block.address(operands[0]), [block.by_thread(register, "b32") for register in operands[1]]
    count = len(sources)

    def store(active):
        fragments = np.stack([source[active].reshape(-1, 32) for source in sources], axis=1)
        matrices = halves(fragments).reshape(-1, count, 8, 8)
        if "trans" in parts:
            matrices = matrices.transpose(0, 1, 3, 2)
        rows = address()[active].reshape(-1, 32)[:, : 8 * count].reshape(-1)
        stored = words(matrices.reshape(-1, 4, 2))
        block.note_store(rows, stored, active & (block.lanes % 32 < 8 * count))
        block.shared.store(rows, stored, 4)

    return store


def _depth_of(kind: str) -> int:
    """k of a product: the elements of 32 bytes."""
    return {"tf32": 8, "f16": 16, "bf16": 16}[kind]


def _row_operand(registers, kind: str):
    """Operand a, [warps, 16, k], from its four registers of [warps, 32]."""
    in_word = _depth_of(kind) // 8
    operand = np.zeros((registers[0].shape[0], 16, _depth_of(kind)), np.float32)
    for i, register in enumerate(registers):
        k = in_word * (_MEMBERS + 4 * (i // 2))[:, None] + np.arange(in_word)
        operand[:, (_ROWS + 8 * (i % 2))[:, None], k] = elements(register, kind)
    return operand


def _column_operand(registers, kind: str):
    """Operand b, [warps, k, 8], from its two registers."""
    in_word = _depth_of(kind) // 8
    operand = np.zeros((registers[0].shape[0], _depth_of(kind), 8), np.float32)
    for i, register in enumerate(registers):
        k = in_word * (_MEMBERS + 4 * i)[:, None] + np.arange(in_word)
        operand[:, k, _ROWS[:, None]] = elements(register, kind)
    return operand


def _place_of_sum(registers: int):
    """Row and column of each register of a warp's sums, [registers, 32]."""
    i = np.arange(registers)[:, None]
    return _ROWS + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * _MEMBERS + i % 2


def _by_warp(block, registers):
    return [block.source(register, "b32").reshape(-1, 32) for register in registers]


def _mma(block, parts, operands, number):
    shape, kind = parts[2], parts[6]
    if (
        parts != ["sync", "aligned", shape, "row", "col", "f32", kind, kind, "f32"]
        or shape != f"m16n8k{_depth_of(kind)}"
    ):
        raise PtxError("not known")
    writes = [block.write(register, "f32") for register in operands[0]]
    left, right = (_by_warp(block, registers) for registers in operands[1:3])
    added = [block.source(register, "f32") for register in operands[3]]
    rows, columns = _place_of_sum(4)

    def multiply(active):
        product = _row_operand(left, kind) @ _column_operand(right, kind)
        sums = product[:, rows, columns].transpose(1, 0, 2).reshape(4, -1) + np.stack(added)
        for write, values in zip(writes, sums):
            write(values, active)

    return multiply


def _block_addresses(descriptor: int, count: int, turned: bool):
    """Addresses of the rows of 16 bytes of an operand of warpgroup MMA: [count, 2 blocks along k, 8 rows].

    A row in memory is a row of the operand or, if turned, an element of k; a block's eight rows then lie along k.
    """
    start, leading, stride = (descriptor >> shift & 0x3FFF for shift in (0, 16, 32))
    swizzle = descriptor >> 62
    if descriptor >> 46 & 0xFFFF:
        raise PtxError("a descriptor with a base offset")
    blocks, along_k, rows = np.arange(count)[:, None, None], np.arange(2)[:, None], np.arange(8)
    if swizzle == 0:
        places = start + stride * blocks + leading * along_k + rows
    else:  # rows of 128, 64 or 32 bytes, in which parts of 16 bytes change places depending on the row
        width = {1: 8, 2: 4, 3: 2}[swizzle]
        if turned:
            places = start + blocks % width + leading * (blocks // width) + stride * along_k + width * rows
        else:
            places = start + stride * blocks + along_k + width * rows
        places = places ^ places >> 3 & width - 1
    return 16 * places.astype(np.uint64)


def _turned(blocks):
    """The same blocks of 8 x 8 elements with rows and elements exchanged."""
    return blocks.transpose(0, 1, 3, 2)


def _wgmma(block, parts, operands, number):
    if parts[0] == "fence":
        return lambda active: None
    if parts[0] == "commit_group":
        return lambda active: block.products.commit(active)
    if parts[0] == "wait_group":
        pending = int(operands[0].text)
        return lambda active: block.products.wait(active, pending)
    columns, depth = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", parts[3]).groups())
    kind = parts[5]
    d, a, b, adds, *flags = operands
    in_registers = isinstance(a, list)
    # Two signs; then, for 16 bits, whether each operand in shared memory is transposed.
    signs, turned = flags[:2], [flag.text == "1" for flag in flags[2:]]
    if [sign.text for sign in signs] != ["1", "1"] or len(turned) != (0 if kind == "tf32" else 2 - in_registers):
        raise PtxError("not known")
    if parts[4:] != ["f32", kind, kind] or depth != _depth_of(kind) or len(d) != columns // 2:
        raise PtxError("not known")
    turned_a, turned_b = [False] * (2 - len(turned)) + turned
    sums, numbers = block.files[32].view(np.float32), [register.index for register in d]
    rows_of_sum, columns_of_sum = _place_of_sum(len(d))
    left = _by_warp(block, a) if in_registers else block.source(a, "b64")
    right, adds = block.source(b, "b64"), block.by_thread(adds, "pred")

    def multiply(active):
        # Descriptors are read now. Registers of sums and of operand a belong to the product until it is waited for.
        names = [right.copy(), adds.copy(), *([] if in_registers else [left.copy()])]
        begun = {}
        for warp in np.flatnonzero(active[::32]):
            reads = [_block_addresses(int(right[32 * warp]), columns // 8, turned_b)]
            if not in_registers:
                own_rows = _block_addresses(int(left[32 * warp]), 8, turned_a)
                reads.append(own_rows if turned_a else own_rows[2 * (warp % 4) : 2 * (warp % 4) + 2])
            begun[warp] = [block.races.begin(addresses, 16, warp, writes=False) for addresses in reads]

        def run(due):
            read = {}  # operands that were read already: warpgroups mostly share operand b

            def operand(name, size, turned):
                """[size, k]"""
                addresses = _block_addresses(name, size // 8, turned)
                blocks = elements(block.shared.load(addresses, 4, 4), kind).reshape(size // 8, 2, 8, -1)
                return (_turned(blocks) if turned else blocks).transpose(0, 2, 1, 3).reshape(size, depth)

            def right_operand(name):
                return operand(name, columns, turned_b).T

            def left_operand(name):
                return operand(name, 64, turned_a).reshape(4, 16, depth)

            def once(function, name):
                if (function, name) not in read:
                    read[function, name] = function(name)
                return read[function, name]

            warps = np.flatnonzero(due[::32])
            by_warp = [name.reshape(-1, 32) for name in names]
            if any((name[warps] != name[warps, :1]).any() for name in by_warp):
                raise PtxError("the lanes of a warp name different operands")
            fragments = _row_operand(left, kind) if in_registers else None
            for warp in warps:
                name_of_b, is_added, *name_of_a = (name[warp, 0].item() for name in by_warp)
                own = fragments[warp] if in_registers else once(left_operand, *name_of_a)[warp % 4]
                lanes = slice(32 * warp, 32 * warp + 32)
                for later in begun[warp]:
                    block.races.end(later)
                product = (own @ once(right_operand, name_of_b))[rows_of_sum, columns_of_sum]
                sums[numbers, lanes] = product + sums[numbers, lanes] if is_added else product

        if block.launch.late:
            block.products.begin(active, run)
        else:
            run(active)

    return multiply


BINDERS = {
    "shfl": _shfl,
    "movmatrix": _movmatrix,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "mma": _mma,
    "wgmma": _wgmma,
}
