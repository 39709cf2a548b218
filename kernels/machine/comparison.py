"""Comparisons, and choices by their results. (PTX ISA 9.7.6, 9.7.7)"""

import operator
from collections.abc import Callable

import numpy as np

from .decode import Decoder, Instruction, instruction
from .operands import bits, of
from .parse import Statement
from .values import flush, halves, is_float, typed


@instruction("selp")
def selp(d: Decoder, s: Statement) -> Instruction:
    """9.7.6.3: a where the predicate is true, else b."""
    kind = bits(s.op[-1])
    return of(d, s, lambda a, b, p: np.where(p, a, b), kind, kind, "pred", result=kind)


_COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}
_JOIN = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def comparison(name: str, floats: bool) -> Callable:
    """9.7.6.2: of NaN, ordered comparisons are false, those that end in u true."""
    if not floats:
        return _COMPARE[name]
    nan = lambda a, b: (a != a) | (b != b)
    if name in ("num", "nan"):
        return nan if name == "nan" else lambda a, b: ~nan(a, b)
    if name.endswith("u"):
        return lambda a, b: _COMPARE[name[:-1]](a, b) | nan(a, b)
    return (lambda a, b: (a != b) & ~nan(a, b)) if name == "ne" else _COMPARE[name]


@instruction("setp", "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz")
def setp(d: Decoder, s: Statement) -> Instruction:
    """9.7.6.2, 9.7.7.2: `p` or `p|q`: the comparison and its contrary, or of pairs the lower and the upper half."""
    kind = s.op[-1]
    compare = comparison(s.op[1], is_float(kind.removesuffix("x2")))
    if s.has("ftz"):
        plain = compare
        compare = lambda a, b: plain(flush(a), flush(b))
    join = _JOIN.get(s.one_of("and", "or", "xor"))
    names = [name.strip() for name in s.operands[0].split("|")]
    if len(names) == 1 and not kind.endswith("x2") and join is None:
        return of(d, s, compare, kind, kind, result="pred")
    a, b = d.sources(s.operands[1:3], kind, kind)
    other = d.source(s.operands[3].lstrip("!"), 0) if join else None
    flipped = join is not None and s.operands[3].startswith("!")
    targets = [d.target(name) for name in names]

    def both(run, mask):
        f = run.frame
        if kind.endswith("x2"):
            found = compare(halves(f[a], kind[:-2]), halves(f[b], kind[:-2]))
            found = found[..., 0], found[..., 1]
        else:
            found = compare(typed(f[a], kind), typed(f[b], kind))
            found = found, ~found
        for target, value in zip(targets, found):
            run.put(target, value if join is None else join(value, f[other] ^ flipped), mask)

    return d.act(both)
