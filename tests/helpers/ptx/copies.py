"""Asynchronous copies by threads and by the copy engine, and the barriers that count the engine's bytes."""

import ctypes

import numpy as np

from .memory import PROCESS, PtxError


class Groups:
    """Asynchronous work (copies, or products of matrices) in groups, which each thread commits in order."""

    def __init__(self, threads: int):
        self.committed = np.zeros(threads, np.int64)
        self.under_way = []  # (number of the work's group by thread, -1 if not its own; function of the due threads)

    def begin(self, active, run):
        self.under_way.append((np.where(active, self.committed, -1), run))

    def commit(self, active):
        self.committed[active] += 1

    def wait(self, active, pending: int):
        """Does the work of all groups of these threads but the last ``pending``."""
        for groups, run in self.under_way:
            due = active & (groups >= 0) & (groups < self.committed - pending)
            if due.any():
                run(due)
                groups[due] = -1
        self.under_way = [later for later in self.under_way if (later[0] >= 0).any()]


class _Barrier:
    """A phase ends when all arrivals have been made and all expected bytes have landed."""

    def __init__(self, arrivals: int, thread: int):
        self.arrivals = self.missing = arrivals
        self.expected = self.phases = 0
        self.thread, self.is_fenced = thread, False  # which thread made it; whether bulk copies may see it


class Bulk:
    """The barriers of a block and the bulk copies that they count."""

    def __init__(self, block):
        self.block = block
        self.barriers: dict[int, _Barrier] = {}
        self.under_way = []  # (barrier, place in shared memory, bytes)
        self.sleeping = []  # threads that wait at a barrier: (number of the instruction where they go on, mask)
        self.may_rouse = True

    def begin(self, barrier: int, to: int, content, thread: int):
        counted_by = self.barriers[barrier]
        if not counted_by.is_fenced:
            raise PtxError("a bulk copy whose barrier was made without fence.proxy.async since")
        self.block.races.copy(to, len(content), thread, barrier, counted_by.phases)
        self.under_way.append((counted_by, self.block.shared.part(to, len(content)), content))
        if not self.block.launch.late:
            self.land_all()

    def rouse(self) -> bool:
        """Wakes threads that wait, once before a phase ends, as a GPU may. Returns whether there were any."""
        may, self.may_rouse = self.may_rouse and bool(self.sleeping), False
        if may:
            self._wake()
        return may

    def land_all(self) -> bool:
        """Lands all bulk copies. Returns whether that has let any thread go on."""
        waited = self.sleeping
        for barrier, to, content in self.under_way:
            to[:] = content
            barrier.expected -= len(content)
            self.end_phase(barrier)
        self.under_way = []
        return waited is not self.sleeping

    def end_phase(self, barrier: _Barrier):
        if barrier.missing == 0 and barrier.expected == 0:
            barrier.phases += 1
            barrier.missing = barrier.arrivals
            self.may_rouse = True
            self._wake()

    def _wake(self):
        for part in self.sleeping:
            self.block.make_ready(*part)
        self.sleeping = []


class _PlaneMap(ctypes.Structure):
    """The tensor map of tests/cuda_host/cuda_emulation.h, which takes the place of the driver's."""

    _fields_ = [
        ("points", ctypes.c_uint64),
        ("volumes", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("z", "y", "x", "columns", "rows")),
    ]

    def box(self, word: int, y: int, z: int, volume: int):
        """The bytes of a copy that begins at these coordinates; a point is four words. Zeros outside the volume."""
        if word % 4:
            raise PtxError("a plane that begins within a point")
        box = np.zeros((self.rows, self.columns, 16), np.uint8)
        if 0 <= volume < self.volumes and 0 <= z < self.z:
            first = self.points + 16 * (volume * self.z + z) * self.y * self.x
            plane = PROCESS.part(first, 16 * self.y * self.x).reshape(self.y, self.x, 16)
            rows, columns = np.arange(self.rows) + y, np.arange(self.columns) + word // 4
            has_row, has_column = (rows >= 0) & (rows < self.y), (columns >= 0) & (columns < self.x)
            box[np.ix_(has_row, has_column)] = plane[np.ix_(rows[has_row], columns[has_column])]
        return box.reshape(-1)


def _cp(block, parts, operands, number):
    if parts[1] == "bulk":
        return _copy_plane(block, operands) if parts[2:4] == ["tensor", "4d"] else _copy_bulk(block, operands)
    if parts[1] == "commit_group":
        return lambda active: block.copies.commit(active)
    if parts[1] == "wait_group":
        pending = int(operands[0].text)
        return lambda active: block.copies.wait(active, pending)
    to, source = block.address(operands[0]), block.address(operands[1])
    size, given = int(operands[2].text), block.by_thread(operands[3], "u32")

    def copy(active):
        targets, sources, there = to(), source(), given == size
        if np.any(given[active & ~there]):
            raise PtxError("a part of an asynchronous copy")

        begun = [
            (warp, block.races.begin(targets[lanes][active[lanes]], size, warp, writes=True))
            for warp in np.unique(np.flatnonzero(active) // 32)
            for lanes in [slice(32 * warp, 32 * warp + 32)]
        ]

        def run(threads):
            values = np.zeros((len(targets), size // 8), np.uint64)
            values[threads & there] = PROCESS.load(sources[threads & there], 8, size // 8)
            block.shared.store(targets[threads], values[threads], size // 8)
            for warp, later in begun:
                if threads[32 * warp : 32 * warp + 32].any():
                    block.races.end(later)

        if block.launch.late:
            block.copies.begin(active, run)
        else:
            run(active)

    return copy


def _copy_plane(block, operands):
    to, plane_map = operands[:2]
    coordinates = [block.by_thread(coordinate, "s32") for coordinate in plane_map.coordinates]
    map_address = block.address(plane_map)

    def content(thread):
        return _PlaneMap.from_address(int(map_address()[thread])).box(*(int(c[thread]) for c in coordinates))

    return _bulk_copy(block, to, operands[-1], 128, content)


def _copy_bulk(block, operands):
    to, source, size, barrier = operands
    address, size = block.address(source), block.by_thread(size, "u32")

    def content(thread):
        if address()[thread] % 16 or size[thread] % 16:
            raise PtxError("a bulk copy of other than multiples of 16 bytes")
        return PROCESS.part(int(address()[thread]), int(size[thread]))

    return _bulk_copy(block, to, barrier, 16, content)


def _bulk_copy(block, to, barrier, alignment, content):
    to, barrier = block.address(to), block.address(barrier)

    def copy(active):
        for thread in np.flatnonzero(active):
            if to()[thread] % alignment:
                raise PtxError(f"a bulk copy to no multiple of {alignment} bytes")
            block.bulk.begin(int(barrier()[thread]), int(to()[thread]), content(thread), thread)

    return copy


def _mbarrier(block, parts, operands, number):
    action = parts[0]
    address = block.address(operands[1] if action in ("arrive", "try_wait") else operands[0])

    def barrier_of(active):
        (place,) = np.unique(address()[active])
        return block.bulk.barriers[int(place)]

    if action == "init":
        arrivals = int(operands[1].text)

        def init(active):
            (place,) = np.unique(address()[active])
            if place % 8:
                raise PtxError("a barrier at no multiple of 8 bytes")
            block.bulk.barriers[int(place)] = _Barrier(arrivals, np.flatnonzero(active)[0])

        return init
    if action == "inval":

        def inval(active):
            (place,) = np.unique(address()[active])
            block.races.access(address()[active], 8, active, True)
            del block.bulk.barriers[int(place)]
            block.races.forget(int(place))

        return inval
    if action == "expect_tx":
        size = block.by_thread(operands[1], "u32")

        def expect(active):
            barrier_of(active).expected += int(size[active].sum())

        return expect
    if action == "arrive":

        def arrive(active):
            barrier = barrier_of(active)
            barrier.missing -= int(active.sum())
            if barrier.missing < 0:
                raise PtxError("more arrivals than a barrier has")
            block.bulk.end_phase(barrier)

        return arrive
    if parts[:2] != ["try_wait", "parity"]:
        raise PtxError("not known")
    write, parity = block.write(operands[0], "pred"), block.by_thread(operands[2], "u32")

    def try_wait(active):
        """Tells whether the phase of this parity has ended. If not, threads sleep until one ends, then look again."""
        (asked,) = np.unique(parity[active])
        phases = barrier_of(active).phases
        block.races.access(address()[active], 8, active, False)
        ended = phases % 2 != asked
        write(ended, active)
        if ended:
            block.races.know(int(address()[active][0]), phases, active)
            return None
        block.bulk.sleeping.append((number + 1, active))
        return []

    return try_wait


def _fence(block, parts, operands, number):
    if parts[:2] != ["proxy", "async"]:
        raise PtxError("not known")

    def fence(active):
        block.races.fence(active)
        for barrier in block.bulk.barriers.values():
            barrier.is_fenced |= bool(active[barrier.thread])

    return fence


def _nothing(block, parts, operands, number):
    """An instruction without an effect that is modelled here."""
    return lambda active: None


BINDERS = {"cp": _cp, "mbarrier": _mbarrier, "fence": _fence, "prefetch": _nothing}
