"""Reads a PTX file into kernels and instructions."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

BITS = {"pred": 1, **{f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)}}


class Register(NamedTuple):
    bits: int  # 1: a predicate
    index: int  # among the registers of its width


class Immediate(NamedTuple):
    text: str


class Symbol(NamedTuple):
    """A parameter, a variable, a special register or a label."""

    name: str


class Memory(NamedTuple):
    base: Register | Symbol
    offset: int
    coordinates: list[Register]  # of a tensor


class Guard(NamedTuple):
    register: Register
    negated: bool


@dataclass
class Instruction:
    opcode: str
    operands: list  # of the classes above; a list is a vector, or a result and its predicate
    guard: Guard | None
    text: str


@dataclass
class Kernel:
    name: str
    parameters: dict[str, int]  # name -> bytes
    variables: dict[str, np.ndarray]  # those of the file, in global memory
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> number of the instruction behind it
    registers: dict[int, int] = field(default_factory=dict)  # width -> how many


def read(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX file by symbol."""
    text = re.sub(r"//[^\n]*|^\s*\.loc\s[^\n]*", "", text, flags=re.MULTILINE)
    variables = {
        name: np.zeros(int(size), np.uint8)
        for name, size in re.findall(r"\.global \.align \d+ \.b8 (\S+)\[(\d+)\];", text)
    }
    kernels = {}
    for entry in re.finditer(r"\.entry\s+(\S+?)\s*\((.*?)\)[^{]*\{", text, re.DOTALL):
        name, listed = entry.groups()
        parameters = {
            parameter: BITS[kind] // 8 * int(count or 1) for kind, parameter, count in _PARAMETER.findall(listed)
        }
        kernels[name] = Kernel(name, parameters, variables)
        _Body(kernels[name], text, entry.end())
    return kernels


_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+) (?:\.ptr (?:\.global )?\.align \d+ )?(\w+)(?:\[(\d+)\])?")
# A brace that opens or closes a scope, a label, or a statement, which may contain vectors in braces.
_TOKEN = re.compile(r"\s*(?:(\{)|(\})|([\w$]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")


class _Body:
    """Reads the body of a kernel. Inline PTX opens scopes, whose names hide those outside."""

    def __init__(self, kernel: Kernel, text: str, at: int):
        self.kernel = kernel
        self.scopes: list[dict[str, Register | Symbol]] = [{}]
        while self.scopes:
            token = _TOKEN.match(text, at)
            assert token, f"what is this? {text[at : at + 100]}"
            at = token.end()
            opens, closes, label, statement = token.groups()
            if opens:
                self.scopes.append({})
            elif closes:
                self.scopes.pop()
            elif label:
                unique = f"{label}, {len(kernel.labels)}"
                kernel.labels[unique] = len(kernel.instructions)
                self.scopes[-1][label] = Symbol(unique)
            else:
                self._statement(statement.strip())
        for instruction in kernel.instructions:  # labels are all known now
            instruction.operands = [self._operand(text, scopes) for text, scopes in instruction.operands]

    def _statement(self, statement: str):
        if statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            for name in names.split(","):
                self._declare(name.strip(), BITS[kind[1:]])
        elif not statement.startswith(".pragma"):
            negated, guard, opcode, rest = re.match(
                r"(?:@(!?)([\w%]+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL
            ).groups()
            scopes = tuple(self.scopes)
            operands = [(operand, scopes) for operand in _split(rest)]
            guard = Guard(_look_up(guard, scopes), bool(negated)) if guard else None
            self.kernel.instructions.append(Instruction(opcode, operands, guard, statement))

    def _declare(self, name: str, bits: int):
        counts = self.kernel.registers
        many = re.fullmatch(r"(.+)<(\d+)>", name)
        for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            self.scopes[-1][one] = Register(bits, counts.setdefault(bits, 0))
            counts[bits] += 1

    def _operand(self, text: str, scopes):
        if text.startswith("{"):
            return [self._operand(part, scopes) for part in _split(text[1:-1])]
        if text.startswith("["):
            place, *coordinates = _split(text[1:-1])
            base, offset = re.fullmatch(r"(\S+?)\s*(?:\+\s*(-?\d+))?", place).groups()
            coordinates = self._operand(coordinates[0], scopes) if coordinates else []
            return Memory(self._operand(base, scopes), int(offset or 0), coordinates)
        if "|" in text:
            return [self._operand(part, scopes) for part in text.split("|")]
        return Immediate(text) if re.match(r"-?\d", text) else _look_up(text, scopes)


def _look_up(name: str, scopes) -> Register | Symbol:
    for scope in reversed(scopes):
        if name in scope:
            return scope[name]
    return Symbol(name)


def _split(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
