"""Registers with bits that nothing wrote, on any way: what Triton leaves of a pair or a word that it does not fill.

Moves, logic, shifts, sums and conversions hand such bits on. Only what looks at them is at fault: memory, an address, a
predicate, a product.
"""

import re

from .decode import ACT, VALUE, Instruction
from .parse import WIDTH

BITS = dict(zip(("e4m3x2", "e5m2x2"), (8, 8)), f16x2=16, bf16x2=16, s16x2=16, u16x2=16)  # of each half
PASSES = ("mov", "shfl")  # those of the ACT kind that hand on what they read


class Hollow:
    """For each register the bits, as those of a number, that none of the instructions which write it defines."""

    def __init__(self, code: list[Instruction], slots: dict[str, int], widths: list[int], registers: int):
        self.slots = slots
        self.full = [(1 << 8 * width) - 1 if width else 1 for width in widths]
        written = {i for x in code for i in x.writes}
        never = {i for x in code for i in x.reads if i < registers} - written
        self.bits = {slot: self.full[slot] for slot in never}
        changed = bool(never)
        while changed:
            found: dict[int, int] = {}
            for x in code:
                given = self._written(x) if self.passes(x) and self._any(x) else {}
                for slot in x.writes:
                    found[slot] = found.get(slot, self.full[slot]) & given.get(slot, 0)
            found = {slot: bits for slot, bits in found.items() if bits} | {slot: self.full[slot] for slot in never}
            changed, self.bits = found != self.bits, found

    @staticmethod
    def passes(x: Instruction) -> bool:
        """Whether an instruction hands on what it reads."""
        return x.kind == VALUE or (x.kind == ACT and x.statement.op[0] in PASSES)

    def looked_at(self, x: Instruction) -> tuple[int, ...]:
        """Registers whose bits an instruction looks at that nothing wrote."""
        if not self.bits or not self._any(x):
            return ()
        s, seen = x.statement, dict.fromkeys(() if self.passes(x) else x.reads, -1)
        if s.op[0] == "st":  # of a wider register the lower bits
            for text in re.findall(r"[%$\w]+", s.operands[1]):
                if text in self.slots:
                    seen[self.slots[text]] = (1 << 8 * WIDTH[s.op[-1]]) - 1
        seen |= {x.guard: -1} if x.guard >= 0 else {}
        return tuple(slot for slot, bits in seen.items() if self.bits.get(slot, 0) & bits)

    def _any(self, x: Instruction) -> bool:
        return any(slot in self.bits for slot in x.reads)

    def _of(self, text: str) -> int:
        """Such bits of an operand."""
        return self.bits.get(self.slots.get(text.lstrip("!"), -1), 0)

    def _written(self, x: Instruction) -> dict[int, int]:
        """Such bits of what an instruction writes."""
        s = x.statement
        if s.op[0] == "mov" and s.operands[0].startswith("{"):
            names = [name.strip() for name in s.operands[0][1:-1].split(",")]
            each, bits = 8 * WIDTH[s.op[-1]] // len(names), self._of(s.operands[1])
            parts = {name: bits >> each * i & (1 << each) - 1 for i, name in enumerate(names)}
            return {self.slots[name]: bits for name, bits in parts.items() if name in self.slots}
        if s.op[0] == "shfl":
            bits = self._of(s.operands[1])
            return {slot: bits if i == 0 else 0 for i, slot in enumerate(x.writes)}
        bits = self._made(s.op, s.operands[1:])
        return {slot: bits & self.full[slot] for slot in x.writes}

    def _made(self, op: tuple[str, ...], texts: tuple[str, ...]) -> int:
        """The same of a function of these operands."""
        name, kind = op[0], op[-1]
        given, numbers = [self._of(text) for text in texts], [_number(text) for text in texts]
        every = -1 if any(given) else 0
        if name == "mov" and texts[0].startswith("{"):
            parts = [self._of(part.strip()) for part in texts[0][1:-1].split(",")]
            each = 8 * WIDTH[kind] // len(parts)
            return sum((bits & (1 << each) - 1) << each * i for i, bits in enumerate(parts))
        if name in ("mov", "not"):
            return given[0]
        if name in ("and", "or", "xor"):
            mask = next((n if name == "and" else ~n for n in numbers if n is not None and name != "xor"), -1)
            return (given[0] | given[1]) & mask
        if name == "selp":
            return -1 if given[2] else given[0] | given[1]
        if name in ("shl", "shr") and numbers[1] is not None:
            shifted = given[0] << numbers[1] if name == "shl" else given[0] >> numbers[1]
            return shifted if name == "shl" or kind[0] != "s" else every
        if name == "prmt" and numbers[2] is not None:
            return self._permuted(given[0] | given[1] << 32, numbers[2])
        if name == "cvt":
            return self._converted(op, given)
        if kind in BITS:
            half = (1 << BITS[kind]) - 1
            return sum(half << at if any(bits >> at & half for bits in given) else 0 for at in (0, BITS[kind]))
        if name in ("add", "sub") and kind[0] in "us":  # a carry goes up
            low = min((bits & -bits for bits in given if bits), default=0)
            return -low
        return every

    @staticmethod
    def _permuted(both: int, choice: int) -> int:
        found = 0
        for i in range(4):
            byte = both >> 8 * (choice >> 4 * i & 7) & 255
            sign = choice >> 4 * i & 8
            found |= ((255 if byte & 128 else 0) if sign else byte) << 8 * i
        return found

    @staticmethod
    def _converted(op: tuple[str, ...], given: list[int]) -> int:
        to, kind = op[-2:]
        if to in BITS:
            each = BITS[to]
            if kind in BITS:
                parts = [given[0] >> BITS[kind] * i & (1 << BITS[kind]) - 1 for i in range(2)]
            else:
                parts = [given[1], given[0]] if len(given) > 1 else [given[0]] * 2
            return sum(((1 << each) - 1) << each * i for i, bits in enumerate(parts) if bits)
        bits = given[0] & (1 << 8 * WIDTH[kind]) - 1  # of a wider register the lower ones
        whole = to[0] in "us" and kind[0] in "us" and "sat" not in op
        return bits if whole and not (kind[0] == "s" and bits >> 8 * WIDTH[kind] - 1) else -1 if bits else 0


def _number(text: str) -> int | None:
    return int(text.rstrip("U"), 0) if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|0[bB][01]+|\d+)U?", text) else None
