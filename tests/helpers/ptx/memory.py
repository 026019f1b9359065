"""What instructions read and write: element types, this process's memory, and a block's shared memory."""

import ctypes

import numpy as np

from .code import BITS

SHARED_BASE = 1024  # address of a block's shared memory, as on a GPU, which keeps the first KB for itself


class PtxError(Exception):
    """The code does something that a GPU does not accept, or that is not implemented here."""


def dtype_of(kind: str) -> np.dtype:
    """The dtype of a PTX type; untyped bits are unsigned."""
    if kind == "pred":
        return np.dtype(bool)
    return np.dtype(f"{kind[0] if kind[0] in 'fu' else 'i' if kind[0] == 's' else 'u'}{BITS[kind] // 8}")


def float_of_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_of_float(values):
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def tf32_of_float(values):
    """The bits of the nearest TF32 number, halves away from zero."""
    bits = values.view(np.uint32)
    return np.where((bits & 0x7F800000) == 0x7F800000, bits, (bits + 0x1000) & np.uint32(0xFFFFE000))


def halves(words):
    """The 16-bit halves of 32-bit words, the low one first, along a new last axis."""
    return np.ascontiguousarray(words)[..., None].view(np.uint16)


def words(halves):
    """The inverse of :func:`halves`."""
    return np.ascontiguousarray(halves).view(np.uint32)[..., 0]


def elements(words, kind: str):
    """Elements of MMA operands in 32-bit words as float32, along a new last axis. The low bits of TF32 are not read."""
    if kind == "tf32":
        return (np.ascontiguousarray(words) & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    return halves(words).view(np.float16).astype(np.float32) if kind == "f16" else float_of_bfloat16(halves(words))


class Memory:
    """An array of bytes that begins at address ``base``."""

    def __init__(self, array: np.ndarray, base: int):
        self.bytes, self.base = array, base
        self._views = {size: array[: len(array) // size * size].view(f"u{size}") for size in (1, 2, 4, 8)}

    def places(self, addresses, size: int, count: int = 1):
        """The element indices, [..., count], of ``count`` elements of ``size`` bytes at aligned addresses."""
        if np.any(addresses % np.uint64(size * count)):
            raise PtxError(f"an access of {size * count} bytes is not aligned")
        offsets = addresses.astype(np.int64) - self.base
        if np.any(offsets < 0) or np.any(offsets + size * count > len(self.bytes)):
            raise PtxError("an access outside of the memory")
        return (offsets // size)[..., None] + np.arange(count)

    def load(self, addresses, size: int, count: int = 1):
        return self._views[size][self.places(addresses, size, count)]

    def store(self, addresses, values, count: int = 1):
        """``values`` are [..., count]."""
        self._views[values.itemsize][self.places(addresses, values.itemsize, count)] = values

    def part(self, address: int, size: int):
        """A view of ``size`` bytes."""
        start = address - self.base
        if start < 0 or start + size > len(self.bytes):
            raise PtxError("an access outside of the memory")
        return self.bytes[start : start + size]


def _process() -> Memory:
    first = 1 << 16  # nothing is mapped below
    everything = (ctypes.c_uint8 * ((1 << 47) - first)).from_address(first)
    return Memory(np.frombuffer(everything, np.uint8), first)


# Global memory. Accessing an address that is not allocated ends the process.
PROCESS = _process()
