"""`Code`: all instructions of a kernel, and what is known before any runs: which registers are live or perhaps never
written, which loops wait, which parameters lead to memory that is written.
"""

from functools import cached_property

from .decode import BARRIER, BRANCH, EXIT, SPECIAL, VALUE, Decoder
from .hollow import Hollow
from .parse import WIDTH, parse


class Code:
    """A decoded kernel: what `Machine` runs. Registers are numbers from here on."""

    def __init__(self, ptx: str):
        from . import access, arithmetic, bits, comparison, control, conversion, floating, lanes, warpgroup  # noqa: F401

        self.kernel = parse(ptx)
        decoder = Decoder(self.kernel)
        self.code = [decoder.decode(s) for s in self.kernel.statements]
        self.widths, self.slots = decoder.widths, decoder.slots
        self.special = {name: decoder.slots[name] for name in SPECIAL}
        self.blank = [None] * decoder.variables + decoder.constants  # a frame with nothing in its registers
        # Shadows of memory have one entry for as many bytes as the narrowest access has.
        self.grain = {space: self._grain(space) for space in ("global", "shared")}
        self._needs: dict[tuple, tuple[int, ...]] = {}
        self._find_waits()
        self._find_held()
        self._find_doubts()

    def _grain(self, space: str) -> int:
        found = (s for s in self.kernel.statements if s.has(space) and s.op[0] in ("st", "atom", "red"))
        return min((WIDTH[s.op[-1].removesuffix("x2")] for s in found), default=4)  # of a pair, its elements

    def _find_waits(self) -> None:
        for at, found in enumerate(self.code):
            if found.kind == BRANCH and found.target <= at:
                inside = self.code[found.target : at]
                found.spins = any(x.asks for x in inside) and not any(x.tells and not x.asks for x in inside)

    def _find_held(self) -> None:
        held = frozenset().union(*(x.holds for x in self.code))
        for x in self.code:
            if held and not x.holds:
                x.touches = tuple(held.intersection((*x.reads, *x.writes)))

    def _find_doubts(self) -> None:
        """Moves may read what nothing wrote: Triton makes pairs of which it uses a half. Others say what (`junk`). What
        nothing writes at all is followed to those that look at it.
        """
        unsure = self._live(guarded=True)[0] & ((1 << len(self.kernel.registers)) - 1)
        hollow = Hollow(self.code, self.slots, self.widths, len(self.kernel.registers)) if unsure else None
        for x in self.code if unsure else ():
            x.hollow = hollow.looked_at(x)
            used = x.reads if x.statement.op[0] != "mov" else (x.guard,)
            used = [i for i in used if i not in hollow.bits]
            used = used if x.unless >= 0 else [i for i in used if i not in x.junk]
            x.doubts = tuple(i for i in used if i >= 0 and unsure >> i & 1)
            x.settles = tuple(i for i in x.writes if unsure >> i & 1)
            x.careful = bool(x.doubts or x.settles or x.hollow)

    @cached_property
    def ends(self) -> list[int]:
        """For each instruction, one past the last of the straight line that begins there: a branch, a barrier, an exit,
        or what stands before the target of a branch.
        """
        targets = {x.target for x in self.code if x.kind == BRANCH}
        ends, end = [0] * len(self.code), len(self.code)
        for at in range(len(self.code) - 1, -1, -1):
            if at + 1 in targets or self.code[at].kind in (BRANCH, BARRIER, EXIT):
                end = at + 1
            ends[at] = end
        return ends

    def needs(self, begin: int, end: int, masked: bool) -> tuple[int, ...]:
        """Registers that a straight line reads before it writes them; where not all lanes write, also those that it
        writes.
        """
        key = begin, masked
        if key not in self._needs:
            found, made = dict.fromkeys(()), set()
            for x in self.code[begin:end]:
                some = masked or x.guard >= 0
                for slot in (*x.reads, *(x.writes if some else ())):
                    if slot not in made:
                        found[slot] = None
                made.update(x.writes)
            self._needs[key] = tuple(found)
        return self._needs[key]

    @cached_property
    def live(self) -> list[int]:
        """For each instruction, which registers may be read from it on before they are written, as the bits of a
        number.
        """
        return self._live(guarded=False)

    def _live(self, guarded: bool) -> list[int]:
        """guarded: whether an instruction writes its registers that some lanes do not execute."""
        code, n = self.code, len(self.code)
        reads = [sum(1 << i for i in set(x.reads)) for x in code]
        kills = [0 if x.guard >= 0 and not guarded else sum(1 << i for i in {*x.writes}) for x in code]
        live, changed = [0] * (n + 1), True
        while changed:
            changed = False
            for at in range(n - 1, -1, -1):
                x = code[at]
                after = 0 if x.kind == EXIT and x.guard < 0 else live[at + 1]
                if x.kind == BRANCH:
                    after = live[x.target] | (after if x.guard >= 0 else 0)
                now = reads[at] | (after & ~kills[at])
                if now != live[at]:
                    live[at], changed = now, True
        return live

    def reached(self, how: str) -> set[str]:
        """Parameters through whose address instructions access global memory that `tells` or `asks`: from each one,
        follow the registers that are made of it.
        """
        from_parameters: dict[int, set[str]] = {}
        changed = True
        while changed:
            changed = False
            for x in self.code:
                s = x.statement
                if s.op[0] == "ld" and s.has("param"):
                    known = {s.operands[1].strip("[]").split("+")[0]}
                elif s.op[0] in ("ld", "atom") or (x.kind != VALUE and s.op[0] != "mov"):
                    continue  # no address comes out of memory
                else:
                    known = set().union(*(from_parameters.get(i, ()) for i in x.reads))
                for i in x.writes:
                    if not known <= from_parameters.get(i, set()):
                        from_parameters[i] = from_parameters.get(i, set()) | known
                        changed = True
        found = set()
        for x in self.code:
            if getattr(x, how) and x.statement.has("global"):
                base = x.reads[0]
                found |= from_parameters.get(base, set(self.kernel.parameters))
        return found
