"""Products of matrices by four warps, with operands in shared memory. (PTX ISA 9.7.15)

A warp has 16 of the 64 rows, with fragments as those of `mma`, 8 columns after 8 columns, and computes them by itself
here, at once. But until `wait_group` its registers count as on their way, for all but other products, and whoever
writes the shared memory that it reads is at fault (`Outstanding`). `wgmma.fence` must stand between other accesses of
its registers and the product, `fence.proxy.async` behind what wrote its shared memory. All four warps must come to the
same products, with no barrier of the program between them (`Meeting`).
"""

import re
from dataclasses import dataclass, field

import numpy as np

from .decode import Decoder, Instruction, instruction
from .parse import Statement, split
from .products import FORMS, SUMS, accumulator, elements, fragments, left, multiply, results, whole

LANES = np.arange(32)
CHUNK = 16  # bytes that a swizzle moves together
ROW = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row of a swizzled tile, by the mode in a descriptor


@dataclass
class Outstanding:
    """What a warp knows of its products.

    groups: those that it has not waited for, the open group last: their registers, and the places of shared memory that
    they read. used: since its last fence, registers of products that others accessed (""), or products of a shape;
    None: no fence yet.
    """

    groups: list[list[tuple[frozenset[int], np.ndarray]]] = field(default_factory=lambda: [[]])
    used: dict[int, str] | None = None

    def registers(self) -> set[int]:
        """All registers on their way."""
        return {slot for group in self.groups for slots, _ in group for slot in slots}

    def unfenced(self, accumulators: list[int], a: list[int], shape: str) -> bool:
        """Whether a product with these registers must have a fence before it."""
        if self.used is None:
            return True
        return any(self.used.get(slot, shape) != shape for slot in accumulators) or any(slot in self.used for slot in a)

    def wait(self, left: int) -> list[np.ndarray]:
        """Until all closed groups but the latest `left` are over -> the places that they read."""
        over, self.groups = self.groups[: -1 - left], self.groups[-1 - left :]
        return [places for group in over for _, places in group]


class Meeting:
    """The products, (number of the instruction, barriers of the program before it), that some of four warps have come
    to and others not yet.
    """

    def __init__(self):
        self.ahead: list[list[tuple[int, int]]] = [[] for _ in range(4)]

    def come(self, warp: int, product: tuple[int, int]) -> int | None:
        """One of the four comes to a product -> another one that came to another product in its place, or None."""
        self.ahead[warp].append(product)
        number = len(self.ahead[warp]) - 1
        for other, products in enumerate(self.ahead):
            if len(products) > number and products[number] != product:
                return other
        if all(self.ahead):
            for products in self.ahead:
                del products[0]
        return None

    def missing(self) -> tuple[int, int, int] | None:
        """A warp that did not come to a product, one that did, and which."""
        counts = [len(products) for products in self.ahead]
        came = int(np.argmax(counts))
        return (int(np.argmin(counts)), came, self.ahead[came][min(counts)][0]) if any(counts) else None


class Operand:
    """A matrix in shared memory, by its descriptor, [warps, 1]. (9.7.15.5.1)"""

    def __init__(self, descriptor: np.ndarray):
        field = lambda bit: (descriptor >> np.uint64(bit) & np.uint64(0x3FFF)).astype(np.int64) * 16
        self.start, self.leading, self.stride = field(0), field(16), field(32)
        modes = np.unique(descriptor >> np.uint64(62))
        if modes.size != 1:
            raise ValueError("warps with other swizzles")
        self.row = ROW[int(modes[0])]
        self.read_from: list[np.ndarray] = []  # addresses, [warps, 32], of 16 bytes each

    def address(self, line: np.ndarray, byte: np.ndarray, transposed: bool) -> np.ndarray:
        """Where a byte of a line lies. A line has the numbers that are contiguous: along k, or, transposed, across it;
        eight lines are a tile, `stride` bytes from the next; a line's rows of tiles are `leading` bytes apart.
        """
        at = self.start + line // 8 * self.stride + line % 8 * self.row + byte % self.row
        at = at + (byte // self.row * self.leading if transposed or self.row == CHUNK else 0)
        bits = self.row // CHUNK - 1  # which of the bits 4 to 6 are exclusive-ored with the bits 7 to 9
        return at ^ ((at >> 7 & bits) << 4)

    def read(self, run, lines: int, size: int, transposed: bool) -> np.ndarray:
        """All lines, of `size` bytes each -> words [warps, lines, size / 4]."""
        count = lines * size // CHUNK
        found = []
        for begin in range(0, count, 32):
            part = (begin + LANES) % count
            address = self.address(part // (size // CHUNK), part % (size // CHUNK) * CHUNK, transposed)
            address = np.broadcast_to(address, (run.warps, 32))
            found.append(run.load("shared", address, 4, 4, None))
            self.read_from.append(address)
        return np.stack(found, 1).reshape(run.warps, -1, 4)[:, :count].reshape(run.warps, lines, size // 4)


SHAPES = " ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16, 32))


@instruction("wgmma", "fence commit_group wait_group mma_async sync aligned e4m3 e5m2 " + SHAPES)
def wgmma(d: Decoder, s: Statement) -> Instruction:
    """9.7.15.5.2: D = A B + D, or A B where the predicate is false; A in registers or shared memory, B there."""
    if s.has("commit_group"):
        return d.act(lambda run, mask: run.commit_products(), together=True)
    if s.has("wait_group"):
        return d.act(lambda run, mask, left=int(s.operands[0], 0): run.wait_for_products(left), together=True)
    if s.has("fence"):
        return d.act(lambda run, mask: run.fence_products(), together=True)
    n, k = map(int, re.search(r"m64n(\d+)k(\d+)", ".".join(s.op)).groups())
    d_kind, kind, _ = s.op[-3:]
    width = FORMS[kind]
    fits = ("s32",) if kind in ("s8", "u8") else ("f32", "f16")
    if d_kind not in fits or k * width != 32 or s.op[-2] != s.op[-1]:
        raise ValueError("this product")
    accumulators = split(s.operands[0][1:-1])
    fresh = s.operands[3] == "0"
    held = [] if fresh else [d.source(text, 4) for text in accumulators]
    targets = [d.target(text) for text in accumulators]
    in_registers = s.operands[1].startswith("{")
    a = [d.source(text, 4) for text in split(s.operands[1][1:-1])] if in_registers else d.source(s.operands[1], 8)
    b, adds = d.source(s.operands[2], 8), d.source(s.operands[3], 0)
    given = [int(text) for text in s.operands[4:]]
    if given[:2] not in ([], [1, 1]):  # integers have none
        raise ValueError("signs")
    trans_a, trans_b = (False, *map(bool, given[2:]))[-2:] if len(given) > 2 else (False, False)

    def matrix(run, slot, lines, transposed):
        """-> [warps, lines, k]."""
        operand = Operand(whole(run.frame[slot], run)[:, :1])
        words = operand.read(run, k, lines * width, True) if transposed else operand.read(run, lines, 32, False)
        places.extend(operand.read_from)
        if transposed:
            return elements(words, kind).reshape(run.warps, k, lines).swapaxes(1, 2)
        return elements(words, kind).reshape(run.warps, lines, k)

    places: list[np.ndarray] = []  # that the product in hand has read

    def product(run, mask):
        places.clear()
        if in_registers:
            x = left(fragments([run.frame[i] for i in a], run), kind)
        else:
            own = run.launch.thread[run.rows][:, :1] // 32 % 4 * 16 + np.arange(16)  # the rows of each warp
            x = matrix(run, a, 64, trans_a)[np.arange(run.warps)[:, None], own]
        y = matrix(run, b, n, trans_b)
        keep = whole(run.frame[adds], run)[:, :1, None]
        each = 2 if d_kind == "f16" else 4  # registers of 8 columns
        for j in range(n // 8):
            before = np.zeros((run.warps, 16, 8), SUMS[d_kind])
            if not fresh:
                words = fragments([run.frame[i] for i in held[each * j : each * (j + 1)]], run)
                before = np.where(keep, accumulator(words, d_kind), before)
            found = results(multiply(x, y[:, 8 * j : 8 * j + 8].swapaxes(1, 2), before, d_kind), d_kind)
            for i in range(each):
                run.put(targets[each * j + i], found[:, i], mask)
        run.begin_product(targets, a if in_registers else [], f"{n} x {k}", places)

    holds = frozenset((*targets, *(a if in_registers else ())))
    return d.act(product, together=True, holds=holds, junk=frozenset(held), unless=adds)
