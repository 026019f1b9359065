"""Finds accesses to a block's shared memory that nothing orders, even if the order of execution here hides the race.

Only barriers of the block order different warps. So between two of them no two warps may access the same place if one
of them writes, whatever the order here. Asynchronous work belongs to the warp that began it until it is waited for. A
bulk copy may write from when it is asked for until a thread knows that its phase has ended: from the copy's barrier, or
because another thread knew it at a barrier of the block.

Bulk copies and warpgroup MMA access shared memory through a proxy of their own. If they come to a place after ordinary
accesses, the threads that made these must have executed fence.proxy.async in between.
"""

import numpy as np

from .memory import SHARED_BASE, PtxError

_CELL = 2  # bytes, the smallest access


class Races:
    def __init__(self, shared_bytes: int, threads: int):
        cells = -(-shared_bytes // _CELL)
        # For each cell, a bit for each warp that has accessed it since the last barrier of the block.
        self._readers, self._writers = np.zeros((2, cells), np.uint32)
        # The same, since the warp's last fence.proxy.async.
        self._unfenced_readers, self._unfenced_writers = np.zeros((2, cells), np.uint32)
        self._under_way: list[tuple[np.ndarray, int, bool]] = []  # cells, warp, whether they are written
        self._copy = np.full(cells, -1)  # the last bulk copy to a cell, an index of _copies
        self._copies: list[tuple[int, int]] = []  # barrier, number of the phase
        self._ended: dict[int, np.ndarray] = {}  # by barrier, how many phases each thread knows to have ended
        self._threads = threads

    def access(self, addresses, size: int, active, writes: bool):
        """An ordinary access of ``size`` bytes by every active thread; ``addresses`` has only theirs."""
        warps = np.flatnonzero(active) // 32
        cells = self._cells(addresses, size)
        for warp in np.unique(warps):
            own = cells[warps == warp]
            self._require_known(own, np.flatnonzero(active)[warps == warp])
            self._access(own, warp, writes)
            self._leave_unfenced(own, warp, writes)

    def begin(self, addresses, size: int, warp: int, writes: bool):
        """Asynchronous accesses by a warp until :meth:`end`: copies of its threads, or warpgroup MMA that reads."""
        later = self._cells(addresses, size), warp, writes
        self._require_known(later[0].reshape(1, -1), np.array([32 * warp]))
        self._access(*later)
        if writes:
            self._leave_unfenced(*later)
        elif self._unfenced_writers[later[0]].any():
            raise PtxError("warpgroup MMA of what was written without fence.proxy.async since")
        self._under_way.append(later)
        return later

    def end(self, later):
        self._under_way = [other for other in self._under_way if other is not later]

    def copy(self, address: int, size: int, thread: int, barrier: int, phase: int):
        cells = self._cells(np.array([address], np.uint64), size)
        self._require_known(cells, np.array([thread]))
        others = (self._readers | self._writers)[cells] & ~np.uint32(1 << thread // 32)
        if others.any():
            raise PtxError("a bulk copy to where another warp has been since the last barrier")
        if (self._unfenced_readers | self._unfenced_writers)[cells].any():
            raise PtxError("a bulk copy to where a warp has been without fence.proxy.async since")
        self._copy[cells] = len(self._copies)
        self._copies.append((barrier, phase))

    def know(self, barrier: int, phases: int, active):
        """Threads learn how many phases of a barrier have ended."""
        ended = self._ended.setdefault(barrier, np.zeros(self._threads, np.int64))
        ended[active] = phases

    def forget(self, barrier: int):
        """A barrier is no more. All threads know of the copies that it has counted."""
        self._ended.pop(barrier, None)
        gone = [number for number, (of, _) in enumerate(self._copies) if of == barrier]
        self._copy[np.isin(self._copy, gone)] = -1

    def fence(self, active):
        """Whole warps have executed fence.proxy.async."""
        whole = np.flatnonzero(active.reshape(-1, 32).all(axis=1))
        others = ~np.bitwise_or.reduce(np.uint32(1) << whole.astype(np.uint32), initial=np.uint32(0))
        self._unfenced_readers &= others
        self._unfenced_writers &= others

    def barrier(self):
        """All threads are at the block's barrier."""
        self._readers[:] = self._writers[:] = 0
        for later in self._under_way:
            self._access(*later)
        for ended in self._ended.values():
            ended[:] = ended.max()

    def _access(self, cells, warp: int, writes: bool):
        own = np.uint32(1 << int(warp))
        others = self._writers[cells] | self._readers[cells] if writes else self._writers[cells]
        if (others & ~own).any():
            raise PtxError(f"two warps access one place and {'this' if writes else 'the other'} one writes")
        (self._writers if writes else self._readers)[cells] |= own

    def _leave_unfenced(self, cells, warp: int, writes: bool):
        (self._unfenced_writers if writes else self._unfenced_readers)[cells] |= np.uint32(1 << int(warp))

    def _require_known(self, cells, threads):
        """Fails if a bulk copy may still be writing to ``cells``, [threads, ...], as far as these threads know."""
        numbers = self._copy[cells]
        for number in np.unique(numbers[numbers >= 0]):
            barrier, phase = self._copies[number]
            here = threads[(numbers == number).reshape(len(threads), -1).any(axis=1)]
            if barrier not in self._ended or (self._ended[barrier][here] <= phase).any():
                raise PtxError("an access to where a bulk copy may still be under way")

    def _cells(self, addresses, size: int):
        first = (addresses.astype(np.int64) - SHARED_BASE) // _CELL
        count = max(1, size // _CELL)
        if first.size and (first.min() < 0 or first.max() + count > len(self._copy)):
            raise PtxError("an access outside of the memory")
        return first[..., None] + np.arange(count)
