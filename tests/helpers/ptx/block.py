"""Executes a kernel for the threads of a block. All threads that are at the same instruction execute it at once.

The threads that are furthest behind in the code go first, so that threads that took different branches meet again.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from . import copies, warps
from .arithmetic import OTHER_KINDS, PURE
from .code import BITS, Immediate, Kernel, Memory, Register, Symbol
from .memory import PROCESS, SHARED_BASE, PtxError, dtype_of
from .memory import Memory as Bytes
from .races import Races


@dataclass(frozen=True)
class Launch:
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: tuple[int, ...]  # addresses of the parameters
    late: bool  # asynchronous work is done when it is waited for; else at once
    repeats: bool = False  # storing a value that is there already is no race: in Triton several threads store the same


class Block:
    """Executes a kernel for one block after another.

    Each instruction is bound to its operands once. It is then a function of ``active``, a mask of the threads that
    execute it. It returns where they go on, as [(number of an instruction, mask)], or None if all go on at the next.
    """

    def __init__(self, kernel: Kernel, launch: Launch, executed: set[str]):
        """``executed`` collects the opcodes that were executed."""
        if launch.threads % 32:
            raise PtxError("a block of other than whole warps")
        self.kernel, self.launch, self.executed = kernel, launch, executed
        self.threads = launch.threads
        self.files = {
            bits: np.empty((count, self.threads), bool if bits == 1 else f"u{bits // 8}")
            for bits, count in kernel.registers.items()
        }
        self.shared = Bytes(np.empty(launch.shared_bytes, np.uint8), SHARED_BASE)
        self.lanes = np.arange(self.threads)
        numbers = {"%tid.x": self.lanes, "%tid.y": 0, "%tid.z": 0, "%ntid.x": self.threads, "%clock_hi": 0}
        for axis, size in zip("xyz", launch.grid):
            numbers |= {f"%nctaid.{axis}": size, f"%ctaid.{axis}": 0}
        self.special = {name: np.full(self.threads, value, np.uint32) for name, value in numbers.items()}
        self.parameters = dict(zip(kernel.parameters, launch.parameters, strict=True))
        self.code = [self._bind(number) for number in range(len(kernel.instructions))]

    def run(self, index: tuple[int, int, int]):
        for axis, value in zip("xyz", index):
            self.special[f"%ctaid.{axis}"][:] = value
        for file in self.files.values():  # NaN, like all memory that nobody has written yet
            file.view(np.uint8).fill(1 if file.dtype == bool else 0xFF)
        self.shared.bytes.fill(0xFF)
        self.races = Races(self.launch.shared_bytes, self.threads)
        self.bulk = copies.Bulk(self)
        self.copies, self.products = copies.Groups(self.threads), copies.Groups(self.threads)
        self.alive = np.ones(self.threads, bool)
        self.ready = {0: self.alive}
        self.parted: dict[int, np.ndarray] = {}  # parts of warps that wait at an instruction of whole warps
        self.at_barrier: list[tuple[int, np.ndarray]] = []
        with np.errstate(all="ignore"):
            while self.alive.any():
                if not self.ready and not self._release() and not self.bulk.rouse() and not self.bulk.land_all():
                    raise PtxError("some threads wait where others never come")
                if self.ready:
                    self._go_on()
        if self.bulk.under_way or self.copies.under_way or self.products.under_way:
            raise PtxError("a block ends before what it has begun")

    def _go_on(self):
        at = min(self.ready)
        active = self.ready.pop(at)
        others = min(self.ready, default=len(self.code))
        while at < others:
            if at in self.parted:
                active = active | self.parted.pop(at)
            outcome = self.code[at](active)
            if outcome is None:
                at += 1
            elif len(outcome) == 1:
                ((at, active),) = outcome
            else:
                for part in outcome:
                    self.make_ready(*part)
                return
        self.make_ready(at, active)

    def make_ready(self, at: int, active):
        self.ready[at] = self.ready[at] | active if at in self.ready else active

    def _release(self) -> bool:
        """Lets all threads go on if they have come to the barrier, and returns whether they have."""
        if not self.at_barrier or not np.array_equal(sum(active for _, active in self.at_barrier), self.alive):
            return False
        for part in self.at_barrier:
            self.make_ready(*part)
        self.at_barrier = []
        self.races.barrier()
        return True

    def note_store(self, addresses, values, active):
        """Tells ``races`` of a store to shared memory; ``values`` are [threads, elements] of the active threads."""
        count = values.shape[-1]
        if self.launch.repeats:
            new = (self.shared.load(addresses, values.itemsize, count) != values).any(axis=-1)
            _, first, group = np.unique(addresses, return_index=True, return_inverse=True)
            again = first[group] != np.arange(len(addresses))
            new &= ~(again & (values == values[first[group]]).all(axis=-1))
            active = active.copy()
            active[active] = new
            addresses = addresses[new]
        self.races.access(addresses, values.itemsize * count, active, writes=True)

    # ------------------------------------------------------------------ operands

    def source(self, operand, kind: str):
        """The values of an operand by thread, a view that follows the register, or a number for all threads."""
        dtype = dtype_of(kind)
        if isinstance(operand, Register):
            row = self.files[operand.bits][operand.index]
            if dtype.kind == "b":
                return row
            if operand.bits < 8 * dtype.itemsize:
                raise PtxError(f"a register of {operand.bits} bits as {kind}")
            return row.view(dtype)[:: operand.bits // (8 * dtype.itemsize)]  # the low bits of a wider register
        if isinstance(operand, Immediate):
            if operand.text[:2] in ("0f", "0d"):
                return np.array(int(operand.text[2:], 16), f"u{dtype.itemsize}").view(dtype)[()]
            if dtype.kind in "fb":
                return dtype.type(int(operand.text))
            bits = int(operand.text.rstrip("U"), 0) & (1 << BITS[kind]) - 1
            return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]
        if operand.name in self.special:
            return self.special[operand.name]
        if operand.name in self.parameters:
            return np.uint64(self.parameters[operand.name])
        if operand.name in self.kernel.variables:
            return np.uint64(self.kernel.variables[operand.name].ctypes.data)
        if operand.name.endswith(("autofocus_sharedE", "global_smem")):
            return dtype.type(SHARED_BASE)
        raise PtxError(f"what is {operand.name}?")

    def by_thread(self, operand, kind: str):
        return np.broadcast_to(self.source(operand, kind), self.threads)

    def write(self, register: Register | Symbol, kind: str):
        """A function of values and ``active`` that writes a register. Values with fewer bits are extended."""
        if register == Symbol("_"):  # the result is not wanted
            return lambda values, active: None
        row = self.files[register.bits][register.index]
        if register.bits > 1:
            row = row.view(f"{dtype_of(kind).kind if BITS[kind] == register.bits or kind[0] == 's' else 'u'}"
                           f"{register.bits // 8}")  # fmt: skip
        return lambda values, active: np.copyto(row, values, where=active, casting="unsafe")

    def address(self, memory: Memory):
        """A function that returns the addresses by thread."""
        wide = isinstance(memory.base, Symbol) or memory.base.bits == 64
        base = self.by_thread(memory.base, "u64" if wide else "u32")
        offset = base.dtype.type(memory.offset & (1 << 8 * base.itemsize) - 1)
        return lambda: (base + offset).astype(np.uint64)

    # ------------------------------------------------------------------ instructions

    def _bind(self, number: int):
        instruction = self.kernel.instructions[number]
        name, *parts = instruction.opcode.split(".")
        try:
            if name in PURE:
                step = _pure(self, name, parts, instruction.operands)
            else:
                step = _BINDERS[name](self, parts, instruction.operands, number)
        except (PtxError, KeyError, ValueError) as error:  # an error only if the instruction is executed
            return partial(_fail, f"{instruction.text}: {error!r}")
        if name in warps.BINDERS:
            step = self.whole_warps(step, number)
        return self._guarded(self._noted(step, instruction.opcode), instruction.guard, number)

    def _noted(self, step, opcode: str):
        if opcode in self.executed:
            return step

        def noted(active):
            self.executed.add(opcode)
            return step(active)

        return noted

    def _guarded(self, step, guard, number: int):
        if guard is None:
            return step
        row = self.source(guard.register, "pred")

        def guarded(active):
            chosen = active & (row != guard.negated)
            if not chosen.any():
                return None
            outcome = step(chosen)
            if outcome is None or np.array_equal(chosen, active):
                return outcome
            return [*outcome, (number + 1, active & ~chosen)]

        return guarded

    def whole_warps(self, step, number: int):
        """Makes ``step`` wait until warps are whole: a part of a warp waits for its other threads, as on a GPU."""

        def whole_warps(active):
            whole = np.repeat(active.reshape(-1, 32).all(axis=1), 32)
            if np.array_equal(whole, active):
                return step(active)
            self.parted[number] = active & ~whole
            if not whole.any():
                return []
            step(whole)
            return [(number + 1, whole)]

        return whole_warps


def _fail(message, active):
    raise PtxError(message)


def _pure(block: Block, name, parts, operands):
    kinds = [part for part in parts if part in BITS or part in OTHER_KINDS]
    function, result, sources = PURE[name](parts, kinds)
    write = block.write(operands[0], result)
    values = [block.source(operand, kind) for operand, kind in zip(operands[1:], sources, strict=True)]
    return lambda active: write(function(*values), active)


def _mov(block: Block, parts, operands, number):
    kind = parts[-1]
    to, source = operands
    if isinstance(to, list):  # takes a value apart, the low bits first
        value, bits = block.source(source, kind), BITS[kind] // len(to)
        writes = [block.write(register, f"b{bits}") for register in to]

        def apart(active):
            for i, write in enumerate(writes):
                write(value >> value.dtype.type(bits * i), active)

        return apart
    write = block.write(to, kind)
    if isinstance(source, list):
        dtype, bits = dtype_of(kind), BITS[kind] // len(source)
        values = [block.source(register, f"b{bits}") for register in source]
        return lambda active: write(sum(v.astype(dtype) << dtype.type(bits * i) for i, v in enumerate(values)), active)
    value = block.source(source, kind)
    return lambda active: write(value, active)


def _ld(block: Block, parts, operands, number):
    space, kind = parts[0], parts[-1]
    registers = operands[0] if isinstance(operands[0], list) else [operands[0]]
    memory = block.shared if space in ("shared", "shared::cta") else PROCESS
    address, dtype = block.address(operands[1]), dtype_of(kind)
    writes = [block.write(register, kind) for register in registers]
    whole = np.zeros((block.threads, len(registers)), dtype)

    def load(active):
        if memory is block.shared:
            block.races.access(address()[active], dtype.itemsize * len(registers), active, writes=False)
        whole[active] = memory.load(address()[active], dtype.itemsize, len(registers)).view(dtype)
        for i, write in enumerate(writes):
            write(whole[:, i], active)

    return load


def _st(block: Block, parts, operands, number):
    space, kind = parts[0], parts[-1]
    sources = operands[1] if isinstance(operands[1], list) else [operands[1]]
    memory = block.shared if space in ("shared", "shared::cta") else PROCESS
    address = block.address(operands[0])
    values = [block.by_thread(source, f"b{BITS[kind]}") for source in sources]

    def store(active):
        stored = np.stack([value[active] for value in values], axis=-1)
        if memory is block.shared:
            block.note_store(address()[active], stored, active)
        memory.store(address()[active], stored, len(values))

    return store


def _bra(block: Block, parts, operands, number):
    target = block.kernel.labels[operands[0].name]
    return lambda active: [(target, active)]


def _ret(block: Block, parts, operands, number):
    def end(active):
        block.alive = block.alive & ~active
        return []

    return end


def _bar(block: Block, parts, operands, number):
    if parts == ["warp", "sync"]:
        return block.whole_warps(lambda active: None, number)
    if parts != ["sync"] or operands != [Immediate("0")]:
        raise PtxError("a barrier of some threads")

    def wait(active):
        block.at_barrier.append((number + 1, active))
        return []

    return wait


_BINDERS = {
    "mov": _mov,
    "cvta": _mov,
    "ld": _ld,
    "st": _st,
    "bra": _bra,
    "ret": _ret,
    "bar": _bar,
    **copies.BINDERS,
    **warps.BINDERS,
}
