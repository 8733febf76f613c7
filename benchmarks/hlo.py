"""Reads the text of a compiled XLA program: memory traffic, cycles, kernels and collectives.

`parse(compiled.as_text())` returns a `Program`. Its totals are those of a usual run: the cheapest
branch of a conditional counts, and a loop counts as often as XLA says that it runs. Known limits:
an update in place counts as a write of the whole buffer, and a loop whose trip count is unknown to
XLA counts once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

# These name, group or reinterpret arrays that are already in memory. The computation that
# async-start calls is counted by itself.
FREE = frozenset(
    {
        "after-all",
        "async-done",
        "async-update",
        "bitcast",
        "constant",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
    }
)
# Custom calls of XLA for TPUs that move no data either.
FREE_CALL = 'custom_call_target="ConcatBitcast"'
# These read only as much of their first operand as they return.
SLICES = frozenset({"slice", "dynamic-slice", "gather"})
# Copies between memories, which overlap with the kernels.
COPIES = frozenset({"copy-start", "slice-start", "dynamic-slice-start"})
COLLECTIVES = frozenset(
    {
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    }
)

SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
DIMENSIONS = re.compile(r"\bdimensions=\{([\d,]*)\}")
OP_NAME = re.compile(r'op_name="(.*?)"')


class Shape(NamedTuple):
    """One array: the name of its dtype in HLO, and its dimensions."""

    dtype: str
    dimensions: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.dimensions)

    @property
    def bytes(self) -> int:
        # Tokens have no width and use no memory. The names of 8-bit floats are longer: f8e4m3fn.
        width = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = 8 if self.dtype == "pred" else int(width[1]) if width else 0
        return -(-self.size * bits // 8)


@dataclass(eq=False)
class Instruction:
    """One line of a computation; `operands` are the instructions whose results it reads."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str
    operands: tuple[Instruction, ...] = field(repr=False)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The bytes of the result, or of all results of a tuple."""
        return tuple(
            Shape(dtype, tuple(int(n.removeprefix("<=")) for n in dimensions.split(",") if n))
            for dtype, dimensions in SHAPE.findall(self.type)
        )

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def called(self) -> list[str]:
        """The names of the computations that it runs."""
        branches = ",".join(BRANCHES.findall(self.attributes)).split(",")
        return CALLED.findall(self.attributes) + [b.strip(" %") for b in branches if b.strip()]

    @property
    def rounds(self) -> int:
        """The trip count of a loop; 1 if XLA does not know it."""
        known = ROUNDS.search(self.attributes)
        return int(known[1]) if known else 1

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The axes that a reduction sums over, or to which a broadcast maps its operand's axes."""
        found = DIMENSIONS.search(self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()

    @property
    def op_name(self) -> str:
        """The name of the JAX operation, with its enclosing functions."""
        found = OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def is_done(self) -> bool:
        """Whether it is the second half of an asynchronous operation; the first ends in -start."""
        return self.opcode.endswith("-done")

    @property
    def collective(self) -> str:
        """The kind of a collective, or "". An asynchronous one counts as its second half.

        Only the second half has the type of the result.
        """
        kind = self.opcode.removesuffix("-done")
        return kind if kind in COLLECTIVES else ""

    @property
    def is_kernel(self) -> bool:
        """Whether a device launches a kernel for it."""
        free = self.opcode in FREE or FREE_CALL in self.attributes
        return not (free or self.is_done or self.opcode in COPIES)


@dataclass(eq=False)
class Program:
    """The computations of a compiled program by name, and the name of the entry computation."""

    computations: dict[str, list[Instruction]]
    entry: str

    def __iter__(self) -> Iterator[Instruction]:
        """All instructions, including those in fusions."""
        for computation in self.computations.values():
            yield from computation

    def total(self, measure: Callable[[Instruction], int], name: str | None = None) -> int:
        """The sum of `measure` over the instructions that a usual run executes."""
        found = 0
        for instruction in self.computations[name or self.entry]:
            if instruction.opcode == "conditional":
                found += min(self.total(measure, branch) for branch in instruction.called)
            elif instruction.opcode in ("call", "while", "async-start"):
                parts = (self.total(measure, part) for part in instruction.called)
                found += instruction.rounds * sum(parts)
            else:
                found += measure(instruction)
        return found

    def traffic(self) -> int:
        """Bytes that kernels read from memory and write to it.

        A kernel reads each operand once. If it only slices an operand, it reads the slices.
        """
        return self.total(self._traffic)

    def cycles(self) -> int:
        """Cycles estimated by the cost model of XLA for TPUs; 0 for other devices."""
        return self.total(lambda i: sum(map(int, CYCLES.findall(i.attributes))))

    def kernels(self) -> int:
        return self.total(lambda i: i.is_kernel)

    def conditionals(self) -> int:
        """The number of conditionals; a device may have to wait for its host at each."""
        return sum(i.opcode == "conditional" for i in self)

    def collectives(self) -> list[Instruction]:
        """All collectives, including those in branches that are seldom taken."""
        return [i for i in self if i.collective]

    def usual_collectives(self, name: str | None = None) -> list[Instruction]:
        """The collectives of a run where each conditional takes the branch with the fewest."""
        found: list[Instruction] = []
        for instruction in self.computations[name or self.entry]:
            parts = [self.usual_collectives(called) for called in instruction.called]
            if instruction.collective:
                found.append(instruction)
            elif instruction.opcode == "conditional":
                found += min(parts, key=len)
            else:
                found += [collective for part in parts for collective in part]
        return found

    def _traffic(self, instruction: Instruction) -> int:
        if instruction.opcode in FREE or FREE_CALL in instruction.attributes:
            return 0
        if instruction.is_done:
            return instruction.bytes
        # The type of the first half includes its operands, so the second half counts as the write.
        written = 0 if instruction.opcode.endswith("-start") else instruction.bytes
        reads: dict[Instruction, int] = {}
        for place, operand in enumerate(instruction.operands):
            read = min(operand.bytes, self._read(instruction, place))
            reads[operand] = max(reads.get(operand, 0), read)
        return written + sum(reads.values())

    def _read(self, instruction: Instruction, place: int) -> int:
        """The bytes that an instruction reads of one operand."""
        whole = instruction.operands[place].bytes
        if instruction.opcode in SLICES and place == 0:
            return instruction.bytes
        if instruction.opcode != "fusion":
            return whole
        (name,) = instruction.called
        inner = self.computations[name]
        users = [
            user
            for user in inner
            for operand in user.operands
            if operand.opcode == "parameter" and operand.arguments == str(place)
        ]
        if users and all(user.opcode in SLICES for user in users):
            return sum(user.bytes for user in users)
        return whole


def parse(text: str | None) -> Program:
    """Parses the text of a compiled program. None, if a backend has no text, raises an error."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    known: dict[str, Instruction] = {}
    for line in (text or "").splitlines():
        if head := COMPUTATION.match(line):
            known = {}
            computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif computations and (found := INSTRUCTION.match(line)):
            instruction = _instruction(found[1], found[2], known)
            known[instruction.name] = instruction
            next(reversed(computations.values())).append(instruction)
    if not entry:
        raise ValueError(
            f"no computation of this text is marked ENTRY, and there are {len(computations)}. "
            "Pass what `jax.jit(f).lower(...).compile().as_text()` returns."
        )
    return Program(computations, entry)


def _instruction(name: str, text: str, known: dict[str, Instruction]) -> Instruction:
    """Parses the right side of an instruction: type, opcode(arguments), attributes."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].strip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    arguments, attributes = rest[1 : end - 1], rest[end:].lstrip(", ")
    names = re.findall(r"%([\w.\-]+)", arguments)
    operands = tuple(known[name] for name in names if name in known)
    return Instruction(name, kind, opcode, arguments, attributes, operands)


def _closing(text: str) -> int:
    """The index after the parenthesis that closes the first one; the end if there is none."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    return len(text)
