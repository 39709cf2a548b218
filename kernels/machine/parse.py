"""PTX text -> `Kernel`: the instructions of its one entry function in order, its registers, labels and parameters.

Blocks in braces, which inline assembly opens, have registers and labels of their own: their names get a number here, so
that all names of a kernel are different afterwards.
"""

import re
from dataclasses import dataclass, field

# Bytes of a register or an access of each type; a predicate has none. (PTX ISA 5.2)
WIDTH = {
    "pred": 0,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "tf32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "s16x2": 4,
    "u16x2": 4,
    "e4m3x2": 2,
    "e5m2x2": 2,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "f32x2": 8,
    "b128": 16,
}


CARRY = "%cc"  # the register of a carry, which instructions do not name


class Fault(RuntimeError):
    """What a kernel does is wrong, or this machine does not know it."""


@dataclass(frozen=True)
class Statement:
    """One instruction as text."""

    text: str  # without the semicolon, spaces made single
    where: str  # the lines of Python it comes from, the innermost first
    guard: str | None = None  # the predicate that lets a lane execute it
    negated: bool = False  # or the absence of it
    op: tuple[str, ...] = ()  # the parts of the name between dots
    operands: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """A line of a message; nothing where the compiler names no line of Python."""
        return f"\n  from {self.where}" if self.where else ""

    def has(self, *parts: str) -> bool:
        """Whether the name has one of these parts."""
        return any(part in self.op for part in parts)

    def one_of(self, *parts: str) -> str | None:
        """The first part of the name that is one of these, or None."""
        return next((part for part in self.op if part in parts), None)


@dataclass
class Kernel:
    """The entry function of a module."""

    name: str
    parameters: dict[str, int] = field(default_factory=dict)  # name -> bytes
    registers: dict[str, int] = field(default_factory=dict)  # name -> bytes, 0 for a predicate
    labels: dict[str, int] = field(default_factory=dict)  # name -> number of the statement behind it
    statements: list[Statement] = field(default_factory=list)
    local: dict[str, tuple[int, int]] = field(default_factory=dict)  # arrays of local memory: where, how many bytes
    data: dict[str, bytes] = field(default_factory=dict)  # arrays of the module in global memory


_TOKEN = re.compile(
    r"""\s*(?:
      \.loc\b[^\n/]*(?://(?P<where>[^\n]*))?           # the line of the source, spelled out in the comment
    | //[^\n]*
    | (?P<label>[A-Za-z_$][\w$]*)\s*:(?!:)
    | (?P<brace>[{}])
    | (?P<statement>[^\s;{}][^;]*);
    | (?P<odd>\S)
    )""",
    re.X,
)
_ARRAY = re.compile(r"\.b8\s+([\w$]+)\[(\d+)\](?:\s*=\s*\{([^}]*)\})?")
_NAME = re.compile(r"[%$\w]+")


def parse(ptx: str) -> Kernel:
    """The one kernel of a module."""
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", ptx, re.S)
    if entry is None:
        raise Fault("no .entry in this PTX")
    kernel = Kernel(entry[1])
    for parameter in filter(None, map(str.strip, entry[2].split(","))):
        words = parameter.split()
        if words[1].lstrip(".") not in WIDTH:
            raise Fault(f"a parameter that this machine does not know: {parameter}")
        kernel.parameters[words[-1]] = WIDTH[words[1].lstrip(".")]
    for name, size, numbers in re.findall(rf"\.global\b[^;]*?{_ARRAY.pattern}", ptx[: entry.start()]):
        kernel.data[name] = bytes(map(int, filter(None, numbers.split(",")))).ljust(int(size), b"\0")
    tokens = _tokens(re.sub(r"/\*.*?\*/", "", ptx[entry.end() :], flags=re.S))
    where, scopes, made = "", [], 0
    for i, (kind, text) in enumerate(tokens):
        if kind == "where":
            where = " < ".join(re.findall(r"([\w.]+:\d+):\d+", text)[:4])
        elif kind == "brace":
            if text == "}":
                scopes.pop()
            else:
                made += 1
                scopes.append({name: f"{name}__{made}" for name in _declared_in(tokens, i)})
        elif kind == "label":
            kernel.labels[_renamed(text, scopes)] = len(kernel.statements)
        elif text.startswith(".reg"):
            _, register_type, names = text.split(None, 2)
            for name in _registers(names):
                kernel.registers[_renamed(name, scopes)] = WIDTH[register_type[1:]]
        elif text.startswith(".local") and (array := _ARRAY.search(text)):
            begin = max((-(-(at + size) // 16) * 16 for at, size in kernel.local.values()), default=0)
            kernel.local[array[1]] = begin, int(array[2])
        elif not text.startswith("."):
            kernel.statements.append(_statement(_renamed(text, scopes), where))
            if kernel.statements[-1].has("cc"):
                kernel.registers[CARRY] = 0
    return kernel


def _tokens(body: str) -> list[tuple[str, str]]:
    """What stands in a body up to its closing brace."""
    found, at, depth = [], 0, 1
    while depth:
        match = _TOKEN.match(body, at)
        if match is None or match.lastgroup == "odd":
            raise Fault(f"not understood: {body[at : at + 80].strip()!r}")
        at = match.end()
        kind = match.lastgroup
        if kind is None:
            continue
        text = match[kind]
        if kind == "brace":
            depth += 1 if text == "{" else -1
        if depth:
            found.append((kind, " ".join(re.sub(r"//[^\n]*", "", text).split()) if kind == "statement" else text))
    return found


def _declared_in(tokens: list[tuple[str, str]], begin: int) -> list[str]:
    """Names of the registers and labels that the block opened by token `begin` declares itself."""
    names, depth = [], 0
    for kind, text in tokens[begin:]:
        if kind == "brace":
            depth += 1 if text == "{" else -1
            if not depth:
                break
        elif depth == 1 and kind == "label":
            names.append(text)
        elif depth == 1 and kind == "statement" and text.startswith(".reg"):
            names += _registers(text.split(None, 2)[2])
    return names


def _registers(names: str) -> list[str]:
    """`%r<3>, a` -> %r0, %r1, %r2, a."""
    found = []
    for name in map(str.strip, names.split(",")):
        many = re.fullmatch(r"(\S+?)<(\d+)>", name)
        found += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
    return found


def _renamed(text: str, scopes: list[dict[str, str]]) -> str:
    for scope in reversed(scopes):
        if scope:
            text = _NAME.sub(lambda m, scope=scope: scope.get(m[0], m[0]), text)
    return text


def _statement(text: str, where: str) -> Statement:
    code, guard, negated = text, None, False
    if code.startswith("@"):
        guard, code = code[1:].split(None, 1)
        negated, guard = guard.startswith("!"), guard.lstrip("!")
    name, _, rest = code.partition(" ")
    op = tuple(name.replace("::cta", "").replace("::cluster", "::cluster").split("."))
    return Statement(text, where, guard, negated, op, tuple(split(rest)))


def split(text: str) -> list[str]:
    """Operands, at the commas outside of braces and brackets."""
    parts, depth, begin = [], 0, 0
    for i, ch in enumerate(text):
        depth += (ch in "{[") - (ch in "}]")
        if ch == "," and not depth:
            parts.append(text[begin:i].strip())
            begin = i + 1
    last = text[begin:].strip()
    return [*parts, last] if last else parts
