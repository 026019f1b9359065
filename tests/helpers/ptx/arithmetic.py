"""Instructions whose result is a function of their operands.

``PURE`` maps the first part of an opcode to a function of the other parts and of the types among them. That returns
what to compute, the type of the result and the types of the operands.
"""

import operator
from functools import partial

import numpy as np

from .code import BITS
from .memory import (
    PtxError,
    bfloat16_of_float,
    dtype_of,
    float_of_bfloat16,
    halves,
    tf32_of_float,
    words,
)

OTHER_KINDS = ("f16x2", "bf16x2", "f32x2", "bf16", "tf32")  # types beside those of code.BITS
COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def _same(function, count):
    def of(parts, kinds):
        (kind,) = kinds
        return _of_floats(function, kind, count) if kind in OTHER_KINDS else (function, kind, kinds * count)

    return of


def _logic(bitwise, logical, count):
    return lambda parts, kinds: (logical if kinds[0] == "pred" else bitwise, kinds[0], kinds * count)


def _wide(kind):
    return f"{kind[0]}{2 * BITS[kind]}"


def _of_floats(function, kind, count):
    """``function`` on ``count`` operands that are 16-bit floats or pairs of floats. Results are rounded once."""

    def on_halves(*operands):
        return words(
            function(*(halves(pair).view(np.float16).astype(np.float32) for pair in operands))
            .astype(np.float16)
            .view(np.uint16)
        )

    def on_bfloat16(*operands):
        return bfloat16_of_float(function(*map(float_of_bfloat16, operands)))

    def on_pairs(*operands):
        return words(on_bfloat16(*map(halves, operands)))

    def on_floats(*operands):
        pairs = (np.ascontiguousarray(pair)[..., None].view(np.float32) for pair in operands)
        return np.ascontiguousarray(function(*pairs)).view(np.uint64)[..., 0]

    compute, bits = {
        "f16x2": (on_halves, "b32"),
        "bf16x2": (on_pairs, "b32"),
        "bf16": (on_bfloat16, "b16"),
        "f32x2": (on_floats, "b64"),
    }[kind]
    return compute, bits, [bits] * count


def _mul(parts, kinds):
    (kind,) = kinds
    if kind in OTHER_KINDS:
        return _of_floats(operator.mul, kind, 2)
    if "lo" in parts or kind[0] == "f":
        return operator.mul, kind, [kind] * 2
    if "wide" in parts:
        return partial(np.multiply, dtype=dtype_of(_wide(kind))), _wide(kind), [kind] * 2
    high = np.frompyfunc(lambda a, b: int(a) * int(b) >> BITS[kind], 2, 1)
    return lambda a, b: high(a, b).astype(dtype_of(kind)), kind, [kind] * 2


def _mad(parts, kinds):
    (kind,) = kinds
    if parts[0] == "wide":
        return (
            lambda a, b, c: np.multiply(a, b, dtype=dtype_of(_wide(kind))) + c,
            _wide(kind),
            [kind] * 2 + [_wide(kind)],
        )
    if parts[0] != "lo":
        raise PtxError("not known")
    return lambda a, b, c: a * b + c, kind, [kind] * 3


def _fma(parts, kinds):
    (kind,) = kinds
    if kind in OTHER_KINDS:
        return _of_floats(lambda a, b, c: a * b + c, kind, 3)
    if kind == "f16":
        return lambda a, b, c: (a.astype(np.float32) * b + c).astype(np.float16), kind, [kind] * 3
    if kind == "f32":  # the product is exact in float64
        return lambda a, b, c: np.float32(np.multiply(a, b, dtype=np.float64) + c), kind, [kind] * 3
    return lambda a, b, c: a * b + c, kind, [kind] * 3


def _quotient(a, b):
    """Rounded towards zero. Dividing by zero may give anything."""
    b = np.where(np.equal(b, 0), np.ones_like(b), b)
    quotient = np.floor_divide(np.abs(a), np.abs(b))
    return np.where((a < 0) != (b < 0), np.negative(quotient), quotient)


def _div(parts, kinds):
    return operator.truediv if kinds[0][0] == "f" else _quotient, kinds[0], kinds * 2


def _rem(parts, kinds):
    return lambda a, b: a - _quotient(a, b) * b, kinds[0], kinds * 2


def _shift(function, beyond):
    """``beyond`` gives the result of shifting by at least as many places as there are bits."""

    def of(parts, kinds):
        (kind,) = kinds
        bits, dtype = BITS[kind], dtype_of(kind)

        def shifted(a, places):
            return np.where(places < bits, function(a, (places % bits).astype(dtype)), beyond(a, dtype.type(bits - 1)))

        return shifted, kind, [kind, "u32"]

    return of


def _selp(parts, kinds):
    return lambda a, b, chosen: np.where(chosen, a, b), kinds[0], [*kinds * 2, "pred"]


def _setp(parts, kinds):
    return COMPARISONS[parts[0]], "pred", kinds * 2


def _mask(dtype, length):
    return dtype.type((1 << int(length)) - 1)


def _bfi(parts, kinds):
    dtype = dtype_of(kinds[0])

    def inserted(a, b, position, length):
        mask = _mask(dtype, length) << dtype.type(position)
        return b & ~mask | a << dtype.type(position) & mask

    return inserted, kinds[0], [*kinds * 2, "u32", "u32"]


def _bfe(parts, kinds):
    (kind,) = kinds
    dtype = dtype_of(kind)

    def extracted(a, position, length):
        if kind[0] == "u":
            return a >> dtype.type(position) & _mask(dtype, length)
        above = BITS[kind] - int(position) - int(length)  # the field's highest bit is its sign
        return a << dtype.type(above) >> dtype.type(above + int(position))

    return extracted, kind, [kind, "u32", "u32"]


def _prmt(parts, kinds):
    def permuted(a, b, selector):
        a, b, selector = (np.asarray(value).astype(np.uint64) for value in (a, b, selector))
        both, result = a | b << np.uint64(32), np.uint64(0)
        for i in range(4):
            number = selector >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (number & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            byte = np.where(number < 8, byte, (byte >> np.uint64(7)) * np.uint64(255))  # its sign in all eight bits
            result = result | byte << np.uint64(8 * i)
        return result.astype(np.uint32)

    return permuted, "b32", ["b32"] * 3


def _cvt(parts, kinds):
    to, source = kinds
    if to == "tf32":
        return tf32_of_float, "b32", ["f32"]
    if to in ("f16x2", "bf16x2"):
        rounded = bfloat16_of_float if to == "bf16x2" else lambda value: value.astype(np.float16).view(np.uint16)
        return lambda high, low: words(np.stack([rounded(low), rounded(high)], axis=-1)), "b32", ["f32"] * 2
    if to == "bf16":
        return bfloat16_of_float, "b16", ["f32"]
    if source == "bf16":
        return float_of_bfloat16, to, ["b16"]
    if to[0] != "f" and source[0] == "f":
        raise PtxError("not known")
    dtype = dtype_of(to)
    return lambda value: value.astype(dtype), to, [source]


PURE = {
    "add": _same(operator.add, 2),
    "sub": _same(operator.sub, 2),
    "min": _same(np.fmin, 2),
    "max": _same(np.fmax, 2),
    "neg": _same(np.negative, 1),
    "abs": _same(np.abs, 1),
    "mul": _mul,
    "mad": _mad,
    "fma": _fma,
    "div": _div,
    "rem": _rem,
    "and": _logic(np.bitwise_and, np.logical_and, 2),
    "or": _logic(np.bitwise_or, np.logical_or, 2),
    "xor": _logic(np.bitwise_xor, np.logical_xor, 2),
    "not": _logic(np.invert, np.logical_not, 1),
    "shl": _shift(np.left_shift, lambda a, most: np.zeros_like(a)),
    # Zero for unsigned numbers; signed ones are filled with copies of their sign.
    "shr": _shift(np.right_shift, lambda a, most: a >> most if a.dtype.kind == "i" else np.zeros_like(a)),
    "selp": _selp,
    "setp": _setp,
    "bfi": _bfi,
    "bfe": _bfe,
    "prmt": _prmt,
    "cvt": _cvt,
}
