"""Every instruction that the machine for PTX knows, against numpy, torch or exact fractions: rounding, NaN, infinities,
denormals, shifts past the width, conversions, fragments of matrices. Written from the PTX ISA, whose sections the
functions under test name.
"""

import ast
import itertools
import math
import operator
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from rnn_gpu.kernels.machine import Fault
from rnn_gpu.kernels.machine.access import HINTS
from rnn_gpu.kernels.machine.decode import HANDLERS
from rnn_gpu.kernels.machine.launch import Machine
from tests.ptx import HEAD, kernel, lanes, launch, value_of

SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1.0,
    -1.0,
    2.0**-149,
    -(2.0**-127),
    2.0**-126,
    3.4028235e38,
    -3.4028235e38,
    65504.0,
    65520.0,
    2.0**-24,
    2.0**-25,
]
MODES = ("rn", "rz", "rm", "rp")
FORMATS = {  # bits, exponent of the smallest number, largest number
    "f32": (24, -149, 3.4028234663852886e38),
    "f16": (11, -24, 65504.0),
    "bf16": (8, -133, 3.3895313892515355e38),
    "tf32": (11, -136, 3.4011621342146535e38),
}


def random_floats(seed: int) -> np.ndarray:
    """Random bit patterns: every exponent, NaN and denormals among them."""
    return np.random.default_rng(seed).integers(0, 1 << 32, 32, dtype=np.uint64).astype(np.uint32).view(np.float32)


def near(seed: int) -> np.ndarray:
    """Numbers of similar size, so that sums cancel and round."""
    draw = np.random.default_rng(seed)
    return (draw.standard_normal(32) * 2.0 ** draw.integers(-12, 13, 32)).astype(np.float32)


def round_exactly(x: Fraction, kind: str, mode: str) -> float:
    """What an exact number rounds to in a type, by integer arithmetic; ties to even (rn) or away from zero (rna)."""
    bits, least, largest = FORMATS[kind]
    if x == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(x.numerator))) - math.floor(math.log2(x.denominator))
    while Fraction(2) ** exponent > abs(x):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(x):
        exponent += 1
    unit = Fraction(2) ** max(exponent - bits + 1, least)
    below = math.floor(x / unit)
    rest = x / unit - below
    up = {
        "rz": x < 0,
        "rm": False,
        "rp": True,
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1),
        "rna": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and x > 0),
    }[mode]
    result = (below + (1 if rest and up else 0)) * unit
    if abs(result) > Fraction(largest):
        saturates = mode == "rz" or (mode == "rm" and x > 0) or (mode == "rp" and x < 0)
        return math.copysign(largest if saturates else math.inf, x)
    return math.copysign(float(result), x)


def bits_of(values, kind: str) -> np.ndarray:
    """Numbers that a type holds -> their bits; NaN as hardware makes it."""
    values = np.asarray(values, np.float64)
    canonical = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF, "tf32": 0x7FFFFFFF}[kind]
    if kind == "f16":
        found = values.astype(np.float16).view(np.uint16)
    else:
        found = values.astype(np.float32).view(np.uint32)
        found = (found >> 16).astype(np.uint16) if kind == "bf16" else found
    return np.where(np.isnan(values), found.dtype.type(canonical), found)


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view({"f16": np.float16, "f32": np.float32}[kind]).astype(np.float64)


def assert_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    differ = np.flatnonzero(actual != expected)
    assert not differ.size, [(int(i), hex(int(actual[i])), hex(int(expected[i]))) for i in differ]


# ---- Floating point --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_float32_rounds_once_in_every_direction(name, mode):
    """Catches a result rounded twice, or the wrong way. Sums that cancel and fused products included."""
    function = {
        "add": lambda x, y, z: x + y,
        "sub": lambda x, y, z: x - y,
        "mul": lambda x, y, z: x * y,
        "fma": lambda x, y, z: x * y + z,
    }[name]
    for seed in range(6):
        a, b, c = near(seed), near(seed + 100), near(seed + 200)
        if seed % 2:  # c nearly cancels the product: what is left is the product's last bits
            c = -(a * b)
        if seed == 4:  # products below the normal numbers
            a, b, c = a * np.float32(2**-80), b * np.float32(2**-60), c * np.float32(2**-140)
        operands = ("$1, $2, $3", [a, b, c]) if name == "fma" else ("$1, $2", [a, b])
        found = value_of(f"{name}.{mode}.f32 $0, {operands[0]};", "f32", *(("f32", x) for x in operands[1]))
        exact = [function(*map(Fraction, map(float, xs))) for xs in zip(a, b, c, strict=True)]
        expected = bits_of([round_exactly(x, "f32", mode) for x in exact], "f32")
        zero = np.array([x == 0 for x in exact])  # whose sign is another rule
        assert_bits(found[~zero], expected[~zero])


def test_fused_products_of_float64_round_once():
    """Catches last bits of a product that are lost, above all where the sum cancels, and at both ends of the range."""
    draw = np.random.default_rng(1)
    for scale in (0, 0, 300, 520, 1023):
        a, b, c = (draw.standard_normal(32) * 2.0 ** draw.integers(-scale, scale + 1, 32) for _ in range(3))
        with np.errstate(all="ignore"):
            c[:16] = np.nan_to_num(-(a * b), posinf=1e300, neginf=-1e300)[:16] * draw.choice([1, 1 + 2**-50, 0.5], 16)
            a[31], b[30], c[29] = np.inf, np.nan, 0
            expected = a * b + c
        for i in range(30):
            try:
                expected[i] = float(Fraction(a[i]) * Fraction(b[i]) + Fraction(c[i]))
            except OverflowError:
                assert np.isinf(expected[i])
        found = value_of("fma.rn.f64 $0, $1, $2, $3;", "f64", ("f64", a), ("f64", b), ("f64", c)).view(np.float64)
        np.testing.assert_array_equal(found, expected)
    zeros = [np.array([0.0, -0.0, 1.0, -1.0] * 8), np.full(32, -0.0), np.array([-0.0] * 31 + [0.0])]
    found = value_of("fma.rn.f64 $0, $1, $2, $3;", "f64", *(("f64", x) for x in zeros)).view(np.float64)
    assert_bits(np.signbit(found), np.signbit(zeros[0] * zeros[1] + zeros[2]))


@pytest.mark.parametrize("name", ["add", "mul", "fma"])
def test_float32_of_nan_infinities_and_denormals_is_as_ieee_has_it(name):
    """Catches another NaN than hardware makes, and denormals taken for zero."""
    a = np.array(SPECIAL + SPECIAL[::-1], np.float32)
    b = np.array(SPECIAL * 2, np.float32)
    with np.errstate(all="ignore"):
        expected = {"add": a + b, "mul": a * b, "fma": a.astype(np.float64) * b + 1}[name].astype(np.float32)
    found = value_of(
        f"{name}.rn.f32 $0, $1, $2{', $3' if name == 'fma' else ''};",
        "f32",
        ("f32", a),
        ("f32", b),
        *([("f32", np.float32(1))] if name == "fma" else []),
    )
    assert_bits(found, bits_of(expected, "f32"))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_16_bits_round_once(name, kind):
    """Catches double rounding of a fused product."""
    function = {
        "add": lambda x, y, z: x + y,
        "sub": lambda x, y, z: x - y,
        "mul": lambda x, y, z: x * y,
        "fma": lambda x, y, z: x * y + z,
    }[name]
    for seed in range(6):
        given = [
            bits_of([round_exactly(Fraction(float(x)), kind, "rn") for x in near(seed + 50 * i)], kind)
            for i in range(3)
        ]
        a, b, c = (numbers(x, kind) for x in given)
        count = 3 if name == "fma" else 2
        found = value_of(
            f"{name}.rn.{kind} $0, {', '.join(f'${i + 1}' for i in range(count))};",
            kind,
            *((kind, x) for x in given[:count]),
        )
        exact = [function(*map(Fraction, xs)) for xs in zip(a, b, c, strict=True)]
        zero = np.array([x == 0 for x in exact])
        assert_bits(found[~zero], bits_of([round_exactly(x, kind, "rn") for x in exact], kind)[~zero])


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("name", ["add", "mul", "fma", "min", "max"])
def test_pairs_are_two_numbers(name, kind):
    """Catches halves that are exchanged, or computed with the wrong neighbour."""
    if kind == "f32" and name in ("min", "max"):
        return
    width = 16 if kind != "f32" else 32
    count = 3 if name == "fma" else 2
    rounding = "" if name in ("min", "max") else ".rn"
    low = [
        bits_of([round_exactly(Fraction(float(x)), kind, "rn") for x in near(i)], kind).astype(np.uint64)
        for i in range(3)
    ]
    high = [
        bits_of([round_exactly(Fraction(float(x)), kind, "rn") for x in near(9 + i)], kind).astype(np.uint64)
        for i in range(3)
    ]
    operands = ", ".join(f"${i + 1}" for i in range(count))
    whole = f"{kind}x2"
    found = value_of(
        f"{name}{rounding}.{whole} $0, {operands};",
        whole,
        *((whole, x | y << width) for x, y in list(zip(low, high, strict=True))[:count]),
    )
    for part, given in ((found & ((1 << width) - 1), low), (found >> width, high)):
        alone = value_of(f"{name}{rounding}.{kind} $0, {operands};", kind, *((kind, x) for x in given[:count]))
        assert_bits(part.astype(np.uint64), alone.astype(np.uint64))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mixed_precision_sums_in_float32(kind):
    """Catches a 16-bit operand that is read as float32, or a sum that is rounded to 16 bits."""
    a = bits_of([round_exactly(Fraction(float(x)), kind, "rn") for x in near(1)], kind)
    c = near(2)
    expected = (numbers(a, kind).astype(np.float32) + c).view(np.uint32)
    assert_bits(value_of(f"add.rn.f32.{kind} $0, $1, $2;", "f32", (kind, a), ("f32", c)), expected)


def test_flush_and_saturation():
    """Catches `.ftz` that leaves denormals or loses signs, and `.sat` outside of [0, 1] or of NaN."""
    a = np.array(SPECIAL * 2, np.float32)
    tiny = np.abs(a) < 2.0**-126
    flushed = np.where(tiny, np.copysign(np.float32(0), a), a)
    found = value_of("mul.rn.ftz.f32 $0, $1, $2;", "f32", ("f32", a), ("f32", np.float32(1)))
    assert_bits(found, bits_of(flushed, "f32"))
    found = value_of("add.sat.f32 $0, $1, $2;", "f32", ("f32", a), ("f32", np.float32(0)))
    assert_bits(found, bits_of(np.where(np.isnan(a), 0, np.clip(a, 0, 1)) + 0.0, "f32"))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_negative_results_are_cut_off(kind):
    """Catches `.relu` that loses NaN, or cuts an operand instead of the result."""
    a = near(1)
    x = bits_of([round_exactly(Fraction(float(v)), kind, "rn") for v in a], kind)
    x[:2] = bits_of([np.nan, -np.inf], kind)
    cut = bits_of(np.where(numbers(x, kind) < 0, 0, numbers(x, kind)), kind)
    one, zero = bits_of(np.ones(32), kind), bits_of(np.zeros(32), kind)
    assert_bits(value_of(f"fma.rn.relu.{kind} $0, $1, $2, $3;", kind, (kind, x), (kind, one), (kind, zero)), cut)
    wide = numbers(x, kind).astype(np.float32)
    assert_bits(value_of(f"cvt.rn.relu.{kind}.f32 $0, $1;", kind, ("f32", wide)), cut)
    pairs = value_of(f"cvt.rn.relu.{kind}x2.f32 $0, $1, $2;", "b32", ("f32", -np.abs(a)), ("f32", wide))
    assert_bits(pairs, cut.astype(np.uint32))


@pytest.mark.parametrize("name", ["min", "max"])
def test_least_and_greatest_know_nan_and_the_sign_of_zero(name):
    """Catches NaN instead of the number (or the number with .NaN), and 0 taken for -0."""
    a = np.array(list(itertools.islice(itertools.cycle([0.0, -0.0, np.nan, 1.0, -np.inf]), 32)), np.float32)
    b = np.array(list(itertools.islice(itertools.cycle([-0.0, 0.0, 1.0, np.nan, np.nan, 0.0, 2.0]), 32)), np.float32)

    def one(x, y, nan):
        if math.isnan(x) or math.isnan(y):
            return math.nan if nan or (math.isnan(x) and math.isnan(y)) else y if math.isnan(x) else x
        key = lambda v: (v, math.copysign(1, v))
        return (min if name == "min" else max)(x, y, key=key)

    for nan in (False, True):
        expected = bits_of([one(float(x), float(y), nan) for x, y in zip(a, b, strict=True)], "f32")
        assert_bits(value_of(f"{name}{'.NaN' if nan else ''}.f32 $0, $1, $2;", "f32", ("f32", a), ("f32", b)), expected)
        size = [one(abs(float(x)), abs(float(y)), nan) for x, y in zip(a, b, strict=True)]
        expected = bits_of(np.where(np.signbit(a) != np.signbit(b), -np.array(size), size), "f32")
        form = f"{name}{'.NaN' if nan else ''}.xorsign.abs.f32"
        assert_bits(value_of(f"{form} $0, $1, $2;", "f32", ("f32", a), ("f32", b)), expected)


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("ex2.approx.ftz.f32", np.exp2),
        ("lg2.approx.f32", np.log2),
        ("rcp.approx.ftz.f32", lambda x: 1 / x),
        ("sqrt.rn.f32", np.sqrt),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
        ("sin.approx.f32", np.sin),
        ("cos.approx.f32", np.cos),
        ("tanh.approx.f32", np.tanh),
    ],
)
def test_functions_of_one_number(code, function):
    """Catches one function taken for another, and wrong limits at zero and infinity."""
    x = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 2.0, *np.random.default_rng(3).standard_normal(25) * 3], np.float32
    )
    with np.errstate(all="ignore"):
        expected = function(x.astype(np.float64)).astype(np.float32)
    assert_bits(value_of(f"{code} $0, $1;", "f32", ("f32", x)), bits_of(expected, "f32"))


def test_division_absolute_value_negation_and_signs():
    """Catches a quotient upside down, and a sign that is lost."""
    a, b = near(1), near(2)
    assert_bits(value_of("div.rn.f32 $0, $1, $2;", "f32", ("f32", a), ("f32", b)), (a / b).view(np.uint32))
    assert_bits(value_of("div.full.f32 $0, $1, $2;", "f32", ("f32", a), ("f32", b)), (a / b).view(np.uint32))
    assert_bits(value_of("abs.f32 $0, $1;", "f32", ("f32", a)), np.abs(a).view(np.uint32))
    assert_bits(value_of("neg.f32 $0, $1;", "f32", ("f32", a)), (-a).view(np.uint32))
    assert_bits(value_of("copysign.f32 $0, $1, $2;", "f32", ("f32", a), ("f32", b)), np.copysign(b, a).view(np.uint32))


def test_kinds_of_numbers():
    """Catches testp that takes a denormal for a normal number."""
    x = np.array(SPECIAL * 2, np.float32)
    tiny = np.finfo(np.float32).tiny
    for name, expected in {
        "finite": np.isfinite(x),
        "infinite": np.isinf(x),
        "number": ~np.isnan(x),
        "notanumber": np.isnan(x),
        "normal": np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": (x != 0) & (np.abs(x) < tiny),
    }.items():
        assert_bits(value_of(f"testp.{name}.f32 $0, $1;", "pred", ("f32", x)), expected)


# ---- Integers and bits -----------------------------------------------------------------------------------------------

EDGES = [
    0,
    1,
    2,
    3,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x7FFFFFFFFFFFFFFF,
    1 << 63,
    (1 << 64) - 1,
]


def integers(bits: int, seed: int) -> list[int]:
    """Edges and random numbers of so many bits, unsigned."""
    draw = np.random.default_rng(seed)
    every = [x & ((1 << bits) - 1) for x in EDGES] + [
        int(x) & ((1 << bits) - 1) for x in draw.integers(0, 1 << 64, 16, dtype=np.uint64)
    ]
    return [every[i] for i in draw.permutation(32)]


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def assert_integers(code: str, kind: str, function, *kinds: str) -> None:
    """`code` against a function of Python's integers, signed where the type is."""
    given = []
    for i, k in enumerate(kinds):
        given.append(integers(int(k[1:]), 7 * i + 1))
    found = value_of(code, kind, *((k, np.array(x, np.uint64)) for k, x in zip(kinds, given, strict=True)))
    width = int(kind[1:])
    for i in range(32):
        values = [signed(x[i], int(k[1:])) if k[0] == "s" else x[i] for k, x in zip(kinds, given, strict=True)]
        expected = function(*values)
        if expected is not None:
            assert int(found[i]) == expected & ((1 << width) - 1), (code, values, hex(int(found[i])))


def quotient(a: int, b: int) -> int | None:
    return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_arithmetic(kind):
    """Catches signs, carries and halves of products that are wrong for some width."""
    bits = int(kind[1:])
    assert_integers(f"add.{kind} $0, $1, $2;", kind, lambda a, b: a + b, kind, kind)
    assert_integers(f"sub.{kind} $0, $1, $2;", kind, lambda a, b: a - b, kind, kind)
    assert_integers(f"mul.lo.{kind} $0, $1, $2;", kind, lambda a, b: a * b, kind, kind)
    assert_integers(f"mul.hi.{kind} $0, $1, $2;", kind, lambda a, b: a * b >> bits, kind, kind)
    assert_integers(f"mad.lo.{kind} $0, $1, $2, $3;", kind, lambda a, b, c: a * b + c, kind, kind, kind)
    assert_integers(f"mad.hi.{kind} $0, $1, $2, $3;", kind, lambda a, b, c: (a * b >> bits) + c, kind, kind, kind)
    assert_integers(f"div.{kind} $0, $1, $2;", kind, quotient, kind, kind)
    assert_integers(
        f"rem.{kind} $0, $1, $2;", kind, lambda a, b: None if b == 0 else a - quotient(a, b) * b, kind, kind
    )
    assert_integers(f"min.{kind} $0, $1, $2;", kind, min, kind, kind)
    assert_integers(f"max.{kind} $0, $1, $2;", kind, max, kind, kind)
    if kind[0] == "s":
        assert_integers(f"neg.{kind} $0, $1;", kind, lambda a: -a, kind)
        assert_integers(f"abs.{kind} $0, $1;", kind, abs, kind)
    if bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        assert_integers(f"mul.wide.{kind} $0, $1, $2;", wide, lambda a, b: a * b, kind, kind)
        assert_integers(f"mad.wide.{kind} $0, $1, $2, $3;", wide, lambda a, b, c: a * b + c, kind, kind, wide)


def test_products_with_carries():
    """Catches a carry of the other half of a product, and one that is lost or counted twice."""
    given = {name: ("u32", np.array(integers(32, seed), np.uint64)) for seed, name in enumerate("abcd")}
    code = "mad.lo.cc.u32 low, a, b, c; madc.hi.cc.u32 high, a, b, d; madc.lo.u32 more, a, b, c;"
    found = lanes(code, dict.fromkeys(("low", "high", "more"), "u32"), given)
    for i, (a, b, c, d) in enumerate(zip(*(x.tolist() for _, x in given.values()), strict=True)):
        low = (a * b & 0xFFFFFFFF) + c
        high = (a * b >> 32) + d + (low >> 32)
        expected = [x & 0xFFFFFFFF for x in (low, high, low + (high >> 32))]
        assert [int(found[name][i]) for name in ("low", "high", "more")] == expected


@pytest.mark.parametrize("kind", ["s16", "u16"])
def test_pairs_of_integers(kind):
    """Catches a carry from one half into the other, and signed halves taken for unsigned."""
    both = lambda x: [signed(h, 16) if kind[0] == "s" else h for h in (x & 0xFFFF, x >> 16)]
    given = integers(32, 1), integers(32, 2)
    for name, function in (("add", operator.add), ("sub", operator.sub), ("min", min), ("max", max)):
        found = value_of(f"{name}.{kind}x2 $0, $1, $2;", "b32", *(("u32", np.array(x, np.uint64)) for x in given))
        for a, b, result in zip(*given, found.tolist(), strict=True):
            low, high = (function(x, y) & 0xFFFF for x, y in zip(both(a), both(b), strict=True))
            assert result == high << 16 | low


def test_saturated_sum():
    """Catches add.sat that wraps."""
    assert_integers(
        "add.sat.s32 $0, $1, $2;", "s32", lambda a, b: max(-(1 << 31), min((1 << 31) - 1, a + b)), "s32", "s32"
    )


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts_past_the_width(bits):
    """Catches shifts that wrap at the width, as those of a CPU do."""
    kind = f"b{bits}"
    for name, function in {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}.items():
        assert_integers(f"{name}.{kind} $0, $1, $2;", kind, function, kind, kind)
    assert_integers(f"not.{kind} $0, $1;", kind, lambda a: ~a, kind)
    values = np.array(integers(bits, 5), np.uint64)
    for amounts in (np.arange(32), np.arange(32) + bits - 16, np.array([0xFFFFFFFF] * 32)):
        given = (f"u{bits}", values), ("u32", amounts)
        for name, function in {
            f"shl.b{bits}": lambda a, n: a << n if n < bits else 0,
            f"shr.u{bits}": lambda a, n: a >> n if n < bits else 0,
            f"shr.s{bits}": lambda a, n: signed(a, bits) >> min(n, bits - 1),
        }.items():
            found = value_of(f"{name} $0, $1, $2;", kind, *given)
            expected = [function(int(a), int(n)) & ((1 << bits) - 1) for a, n in zip(values, amounts, strict=True)]
            assert_bits(found.astype(np.uint64), np.array(expected, np.uint64))


def test_fields_of_bits():
    """Catches bfe without the sign that its last bit has, and bits past the end of a register."""

    def extract(a, position, length, bits, negative):
        position, length = position & 255, length & 255
        last = min(position + length - 1, bits - 1)
        sign = a >> last & 1 if negative and length else 0
        return sum((a >> position + i & 1 if position + i < bits else sign) << i for i in range(min(length, bits))) | (
            (-1 << min(length, bits)) if sign and length < bits else 0
        )

    for kind in ("u32", "s32", "u64", "s64"):
        bits = int(kind[1:])
        a = np.array(integers(bits, 3), np.uint64)
        for position, length in ((0, 5), (3, bits - 3), (bits - 4, 9), (0, 0), (1, bits), (40, 5)):
            found = value_of(f"bfe.{kind} $0, $1, {position}, {length};", kind, (f"u{bits}", a))
            expected = [extract(int(x), position, length, bits, kind[0] == "s") & ((1 << bits) - 1) for x in a]
            assert_bits(found.astype(np.uint64), np.array(expected, np.uint64))
    a, b = np.array(integers(32, 4), np.uint64), np.array(integers(32, 6), np.uint64)
    for position, length in ((0, 5), (7, 9), (28, 9), (3, 0)):
        mask = ((1 << length) - 1) << position & 0xFFFFFFFF
        expected = [(int(y) & ~mask) | (int(x) << position & mask) for x, y in zip(a, b, strict=True)]
        assert_bits(
            value_of(f"bfi.b32 $0, $1, $2, {position}, {length};", "b32", ("u32", a), ("u32", b)),
            np.array(expected, np.uint32),
        )


def test_counting_turning_choosing_and_funnels():
    """Catches popc, clz, brev, lop3, prmt and shf that count from the wrong end."""
    a, b, c = (integers(32, seed) for seed in (1, 2, 3))
    u = lambda x: ("u32", np.array(x, np.uint64))
    assert_bits(value_of("popc.b32 $0, $1;", "u32", u(a)), np.array([x.bit_count() for x in a], np.uint32))
    assert_bits(value_of("clz.b32 $0, $1;", "u32", u(a)), np.array([32 - x.bit_length() for x in a], np.uint32))
    assert_bits(value_of("brev.b32 $0, $1;", "u32", u(a)), np.array([int(f"{x:032b}"[::-1], 2) for x in a], np.uint32))
    for table in (0xEA, 0x96, 0x1B, 0xCA):
        expected = []
        for x, y, z in zip(a, b, c, strict=True):
            expected.append(
                sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1) << i for i in range(32))
            )
        assert_bits(
            value_of(f"lop3.b32 $0, $1, $2, $3, {table};", "b32", u(a), u(b), u(c)), np.array(expected, np.uint32)
        )
    pool = [[(x | y << 32) >> 8 * i & 255 for i in range(8)] for x, y in zip(a, b, strict=True)]
    for choice in (0x3210, 0x7531, 0x6420, 0x8F0C):
        picks = [choice >> 4 * i & 15 for i in range(4)]
        expected = [
            sum(((255 if p[k & 7] >> 7 else 0) if k & 8 else p[k]) << 8 * i for i, k in enumerate(picks)) for p in pool
        ]
        assert_bits(value_of(f"prmt.b32 $0, $1, $2, {choice};", "b32", u(a), u(b)), np.array(expected, np.uint32))
    n = list(range(20, 52))
    for mode, clip in (("wrap", lambda k: k & 31), ("clamp", lambda k: min(k, 32))):
        both = [x | y << 32 for x, y in zip(a, b, strict=True)]
        left = [(x << clip(k)) >> 32 & 0xFFFFFFFF for x, k in zip(both, n, strict=True)]
        right = [x >> clip(k) & 0xFFFFFFFF for x, k in zip(both, n, strict=True)]
        assert_bits(value_of(f"shf.l.{mode}.b32 $0, $1, $2, $3;", "b32", u(a), u(b), u(n)), np.array(left, np.uint32))
        assert_bits(value_of(f"shf.r.{mode}.b32 $0, $1, $2, $3;", "b32", u(a), u(b), u(n)), np.array(right, np.uint32))


# ---- Comparisons and choices -----------------------------------------------------------------------------------------

ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "s32", "u32", "s16", "u64"])
def test_comparisons(kind):
    """Catches NaN that compares equal, and unsigned numbers compared as signed."""
    if kind in ("f32", "f16", "bf16"):
        draw = [0.0, -0.0, 1.0, -1.0, np.inf, np.nan, 2.0]
        x, y = (list(itertools.islice(itertools.cycle(v), 32)) for v in (draw, [*draw[::-1], 1.0]))
        a, b = bits_of(x, kind), bits_of(y, kind)
        names = {name: lambda p, q, f=f: f(p, q) and p == p and q == q for name, f in ORDERED.items()}
        unordered = zip(["equ", "neu", "ltu", "leu", "gtu", "geu"], ORDERED.values(), strict=True)
        names |= {name: lambda p, q, f=f: f(p, q) or p != p or q != q for name, f in unordered}
        names |= {"num": lambda p, q: p == p and q == q, "nan": lambda p, q: p != p or q != q}
    else:
        bits = int(kind[1:])
        a, b = (np.array(integers(bits, seed), np.uint64) for seed in (1, 2))
        b[:8] = a[:8]
        x, y = ([signed(int(v), bits) if kind[0] == "s" else int(v) for v in values] for values in (a, b))
        names = dict(ORDERED)
        if kind[0] == "u":
            names |= {"lo": ORDERED["lt"], "ls": ORDERED["le"], "hi": ORDERED["gt"], "hs": ORDERED["ge"]}
    for name, function in names.items():
        found = value_of(f"setp.{name}.{kind} $0, $1, $2;", "pred", (kind, a), (kind, b))
        assert_bits(found, np.array([bool(function(p, q)) for p, q in zip(x, y, strict=True)]))


def test_comparisons_joined_and_of_pairs():
    """Catches the second predicate of `p|q`, and the third operand, negated or not."""
    a, b, c = np.arange(32), np.arange(32)[::-1], np.arange(32) % 3 == 0
    inputs = {"a": ("s32", a), "b": ("s32", b), "c": ("pred", c)}
    found = lanes("setp.lt.and.s32 p|q, a, b, c;", {"p": "pred", "q": "pred"}, inputs)
    assert_bits(found["p"], (a < b) & c), assert_bits(found["q"], ~(a < b) & c)
    found = lanes("setp.lt.or.s32 p, a, b, !c;", {"p": "pred"}, inputs)
    assert_bits(found["p"], (a < b) | ~c)
    x, y = (np.random.default_rng(s).standard_normal((32, 2)).astype(np.float16) for s in (1, 2))
    pairs = {"a": ("b32", x.view(np.uint32)[:, 0]), "b": ("b32", y.view(np.uint32)[:, 0])}
    found = lanes("setp.gtu.f16x2 p|q, a, b;", {"p": "pred", "q": "pred"}, pairs)
    assert_bits(found["p"], x[:, 0] > y[:, 0]), assert_bits(found["q"], x[:, 1] > y[:, 1])


def test_choices_and_guards():
    """Catches the operands of selp exchanged, and a guard that is not negated, or lets other lanes through."""
    a, b, c = np.arange(32), 100 + np.arange(32), np.arange(32) % 2 == 0
    inputs = {"a": ("u32", a), "b": ("u32", b), "c": ("pred", c)}
    assert_bits(lanes("selp.b32 d, a, b, c;", {"d": "u32"}, inputs)["d"], np.where(c, a, b))
    assert_bits(lanes("mov.b32 d, a; @c mov.b32 d, b;", {"d": "u32"}, inputs)["d"], np.where(c, b, a))
    assert_bits(lanes("mov.b32 d, a; @!c mov.b32 d, b;", {"d": "u32"}, inputs)["d"], np.where(c, a, b))
    code = "mov.b32 d, 0; @c bra EVEN; add.s32 d, a, 1; bra JOIN; EVEN: add.s32 d, a, 2; JOIN: add.s32 d, d, 10;"
    assert_bits(lanes(code, {"d": "u32"}, inputs)["d"], a + np.where(c, 12, 11))


# ---- Conversions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("f16", "rn"),
        ("f16", "rz"),
        ("f16", "rm"),
        ("f16", "rp"),
        ("bf16", "rn"),
        ("bf16", "rz"),
        ("tf32", "rna"),
        ("tf32", "rn"),
        ("tf32", "rz"),
    ],
)
def test_float32_becomes_narrower(kind, mode):
    """Catches ties, overflow, denormals and NaN that round another way."""
    ties = np.arange(1, 33, dtype=np.uint32) * 0x1000 + np.uint32(0x3F800000)  # half of the last place of tf32, f16
    for x in (
        random_floats(1),
        random_floats(2),
        near(3),
        ties.view(np.float32),
        (ties << 3).view(np.float32) * np.float32(2**-20),
        np.array(SPECIAL * 2, np.float32),
    ):
        expected = []
        for value in x.astype(np.float64):
            finite = math.isfinite(value)
            rounded = round_exactly(Fraction(value), kind, mode) if finite else value
            expected.append(math.copysign(rounded, value) if rounded == 0 else rounded)
        found = value_of(f"cvt.{mode}.{kind}.f32 $0, $1;", "b32" if kind == "tf32" else kind, ("f32", x))
        assert_bits(found, bits_of(expected, kind))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bits_become_wider_and_pairs(kind):
    """Catches halves of a pair exchanged: the first operand is the upper one."""
    a, b = near(1), near(2)
    as_halves = [bits_of([round_exactly(Fraction(float(v)), kind, "rn") for v in x], kind) for x in (a, b)]
    found = value_of(f"cvt.rn.{kind}x2.f32 $0, $1, $2;", "b32", ("f32", a), ("f32", b))
    assert_bits(found, as_halves[0].astype(np.uint32) << 16 | as_halves[1])
    wide = value_of(f"cvt.f32.{kind} $0, $1;", "f32", (kind, as_halves[0]))
    assert_bits(wide, numbers(as_halves[0], kind).astype(np.float32).view(np.uint32))


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_8_bits_are_those_of_torch(kind, dtype):
    """Catches an exponent's bias, saturation and NaN of the 8-bit types."""
    every = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    wide = every.view(dtype).float().numpy()
    for begin in range(0, 256, 64):
        pairs = every.numpy()[begin : begin + 64].view(np.uint16)
        found = (
            value_of(f"cvt.rn.f16x2.{kind}x2 $0, $1;", "b32", (f"{kind}x2", pairs)).view(np.float16).astype(np.float32)
        )
        np.testing.assert_array_equal(found, wide[begin : begin + 64])
    x = np.concatenate(
        [near(5)[:16], np.linspace(-500, 500, 10), [0.0, -0.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9, 448.0]]
    ).astype(np.float32)
    limit = torch.finfo(dtype).max
    expected = torch.from_numpy(np.clip(x, -limit, limit)).to(dtype).view(torch.uint8).numpy()
    found = value_of(
        f"cvt.rn.satfinite.{kind}x2.f32 $0, $1, $2;", f"{kind}x2", ("f32", np.zeros(32, np.float32)), ("f32", x)
    )
    assert_bits(found & 255, expected)


@pytest.mark.parametrize(
    ("mode", "function"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_floats_become_integers(mode, function):
    """Catches clamping at the ends, and NaN, which is 0."""
    x = np.concatenate(
        [SPECIAL, [0.5, 1.5, 2.5, -0.5, -1.5, 2147483500.0, -2147483648.0, 4e9, 1e19, -1e19], near(4)[:6]]
    ).astype(np.float32)
    for kind in ("s32", "u32", "s64", "u64", "s16", "u16"):
        bits = int(kind[1:])
        least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
        expected = []
        for value in x:
            whole = (
                0
                if math.isnan(value)
                else most
                if value == np.inf
                else least
                if value == -np.inf
                else int(function(np.float64(value)))
            )
            expected.append(max(least, min(most, whole)) & ((1 << bits) - 1))
        assert_bits(
            value_of(f"cvt.{mode}.{kind}.f32 $0, $1;", kind, ("f32", x)).astype(np.uint64),
            np.array(expected, np.uint64),
        )


def test_integers_become_floats_and_other_integers():
    """Catches a sign that is not copied, and 64 bits that round twice."""
    for kind in ("s32", "u32", "s64", "u64"):
        given = integers(int(kind[1:]), 3)
        values = [signed(x, int(kind[1:])) if kind[0] == "s" else x for x in given]
        expected = bits_of([round_exactly(Fraction(v), "f32", "rn") for v in values], "f32")
        assert_bits(value_of(f"cvt.rn.f32.{kind} $0, $1;", "f32", (kind, np.array(given, np.uint64))), expected)
    for kind, mode in itertools.product(("s32", "u32", "s64", "u64"), ("rz", "rm", "rp")):
        given = integers(int(kind[1:]), 4)
        values = [signed(x, int(kind[1:])) if kind[0] == "s" else x for x in given]
        expected = bits_of([round_exactly(Fraction(v), "f32", mode) for v in values], "f32")
        assert_bits(value_of(f"cvt.{mode}.f32.{kind} $0, $1;", "f32", (kind, np.array(given, np.uint64))), expected)
    for to, kind in itertools.product(
        ("s64", "u64", "s32", "u32", "u16", "s16"), ("s32", "u32", "s16", "u16", "u64", "s64")
    ):
        assert_integers(f"cvt.{to}.{kind} $0, $1;", to, lambda a: a, kind)
    assert_integers("cvt.sat.s16.s32 $0, $1;", "s16", lambda a: max(-32768, min(32767, a)), "s32")
    assert_integers("cvt.sat.u16.s32 $0, $1;", "u16", lambda a: max(0, min(65535, a)), "s32")
    given = np.arange(-500, 524, 32, np.int32)
    narrow = {kind: value_of(f"cvt.{kind}.s32 $0, $1;", "b16", ("s32", given)) for kind in ("s8", "u8")}
    assert np.array_equal(narrow["s8"].view(np.int16), given.astype(np.int8))  # the register is wider: with the sign
    assert np.array_equal(narrow["u8"], given.astype(np.uint8))


def test_registers_taken_apart_and_put_together():
    """Catches the order of parts: the first is the lowest."""
    a = np.array(integers(32, 1), np.uint64)
    found = lanes(
        "mov.b32 {lo, hi}, a; mov.b32 back, {lo, hi}; mov.b64 wide, {a, back};",
        {"lo": "b16", "hi": "b16", "back": "b32", "wide": "b64"},
        {"a": ("u32", a)},
    )
    assert_bits(found["lo"], a & 0xFFFF), assert_bits(found["hi"], a >> 16), assert_bits(found["back"], a)
    assert_bits(found["wide"], a | a << np.uint64(32))


# ---- What lanes do together ------------------------------------------------------------------------------------------


def shuffled(kind: str, values, b: int, c: int):
    """The pseudocode of PTX ISA 9.7.9.6 -> values and predicates."""
    found, good = [], []
    for lane in range(32):
        segment, bound = c >> 8 & 31, c & 31
        most, least = (lane & segment) | (bound & ~segment), lane & segment
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[kind]
        p = j >= most if kind == "up" else j <= most
        found.append(values[j if p else lane]), good.append(p)
    return np.array(found), np.array(good)


@pytest.mark.parametrize(
    ("kind", "c"),
    [("up", 0), ("down", 31), ("bfly", 31), ("idx", 31), ("idx", 0x181F), ("up", 0x1800), ("bfly", 0x1C03)],
)
def test_shuffles(kind, c):
    """Catches lanes counted the wrong way, segments, and lanes past the end, which keep their own value."""
    x = np.array(integers(32, 3), np.uint64)
    for b in (0, 1, 3, 8, 17, 31):
        found = lanes(f"shfl.sync.{kind}.b32 d|p, x, {b}, {c}, -1;", {"d": "b32", "p": "pred"}, {"x": ("u32", x)})
        values, good = shuffled(kind, x, b, c)
        assert_bits(found["d"], values), assert_bits(found["p"], good)


def test_votes_and_reductions():
    """Catches a reduction over other lanes, and signed numbers taken for unsigned."""
    x = np.array(integers(32, 3), np.uint64).astype(np.uint32)
    for name, kind, expected in (
        ("add", "u32", x.sum(dtype=np.uint32)),
        ("min", "u32", x.min()),
        ("max", "s32", x.view(np.int32).max()),
        ("min", "s32", x.view(np.int32).min()),
        ("and", "b32", np.bitwise_and.reduce(x)),
        ("or", "b32", np.bitwise_or.reduce(x)),
        ("xor", "b32", np.bitwise_xor.reduce(x)),
    ):
        found = value_of(f"redux.sync.{name}.{kind} $0, $1, 0xffffffff;", "b32", ("u32", x))
        assert_bits(found, np.full(32, expected).astype(np.int64) & 0xFFFFFFFF)
    for p in (np.arange(32) % 3 == 0, np.zeros(32, bool), np.ones(32, bool)):
        ballot = lanes("vote.sync.ballot.b32 d, p, -1;", {"d": "b32"}, {"p": ("pred", p)})["d"]
        assert_bits(ballot, np.full(32, sum(1 << i for i in range(32) if p[i]), np.uint32))
        for name, expected in (("all", p.all()), ("any", p.any()), ("uni", p.all() or not p.any())):
            assert_bits(
                lanes(f"vote.sync.{name}.pred d, p, -1;", {"d": "pred"}, {"p": ("pred", p)})["d"], np.full(32, expected)
            )
    found = lanes("elect.sync d|p, -1;", {"d": "b32", "p": "pred"}, {})
    assert found["p"].sum() == 1 and (found["d"] == found["p"].argmax()).all()


MMA = {"tf32": (4, 8), "f16": (8, 16), "bf16": (8, 16), "s8": (16, 32), "u8": (16, 32), "e4m3": (32,), "e5m2": (32,)}


@pytest.mark.parametrize(("kind", "k"), [(kind, k) for kind, ks in MMA.items() for k in ks])
@pytest.mark.parametrize("result", ["f32", "f16", "s32"])
def test_products_of_matrices(kind, k, result):
    """Catches an element of a fragment in another place: the fragments are made by the formulas of PTX ISA 9.7.14.5."""
    if (result == "s32") != (kind in ("s8", "u8")) or (result == "f16" and kind not in ("f16", "e4m3", "e5m2")):
        return
    draw = np.random.default_rng(k)
    per_word = {"tf32": 1, "f16": 2, "bf16": 2}.get(kind, 4)
    a, b, c = draw.integers(-4, 5, (16, k)), draw.integers(-4, 5, (k, 8)), draw.integers(-9, 10, (16, 8))
    if kind == "u8":
        a, b = abs(a), abs(b)

    def word(values) -> int:
        """Numbers as one register, the first one lowest."""
        x = torch.tensor([float(v) for v in values])
        if kind in ("s8", "u8"):
            data = np.array(values, np.int64).astype(np.uint8)
        else:
            dtype = {
                "tf32": torch.float32,
                "f16": torch.float16,
                "bf16": torch.bfloat16,
                "e4m3": torch.float8_e4m3fn,
                "e5m2": torch.float8_e5m2,
            }[kind]
            data = x.to(dtype).view(torch.uint8).numpy()
        return int(data.view(np.uint32)[0])

    group, member = np.arange(32) // 4, np.arange(32) % 4
    words_a, words_b = 16 * k // per_word // 32, 8 * k // per_word // 32
    inputs = {}
    for i in range(words_a):
        columns = [per_word * m + 4 * per_word * (i // 2) for m in member]
        inputs[f"a{i}"] = (
            "b32",
            np.array(
                [word(a[g + 8 * (i % 2), q : q + per_word]) for g, q in zip(group, columns, strict=True)], np.uint64
            ),
        )
    for i in range(words_b):
        rows = [per_word * m + 4 * per_word * i for m in member]
        inputs[f"b{i}"] = (
            "b32",
            np.array([word(b[r : r + per_word, g]) for g, r in zip(group, rows, strict=True)], np.uint64),
        )
    places = [(group + 8 * (i // 2), 2 * member + i % 2) for i in range(4)]
    held = [c[rows, columns] for rows, columns in places]
    if result == "f16":
        pairs = [np.stack(held[i : i + 2], 1).astype(np.float16).view(np.uint32)[:, 0] for i in (0, 2)]
    else:
        pairs = [
            x.astype(np.float32).view(np.uint32) if result == "f32" else x.astype(np.int32).view(np.uint32)
            for x in held
        ]
    inputs |= {f"c{i}": ("b32", x) for i, x in enumerate(pairs)}
    names = lambda letter, count: "{" + ", ".join(f"{letter}{i}" for i in range(count)) + "}"
    form = "kind::f8f6f4." if (kind, result) == ("e5m2", "f32") else ""  # as sm_120 has it
    shape, kinds = f"mma.sync.aligned.{form}m16n8k{k}.row.col", f"{result}.{kind}.{kind}.{result}"
    fragments = ", ".join([names("d", len(pairs)), names("a", words_a), names("b", words_b), names("c", len(pairs))])
    code = f"{shape}.{kinds} {fragments};"
    found = lanes(code, {f"d{i}": "b32" for i in range(len(pairs))}, inputs)
    expected = a @ b + c
    for i, (rows, columns) in enumerate(places):
        if result == "f16":
            value = found[f"d{i // 2}"].view(np.float16).reshape(32, 2)[:, i % 2]
        else:
            value = found[f"d{i}"].view(np.float32 if result == "f32" else np.int32)
        np.testing.assert_array_equal(value, expected[rows, columns])


@pytest.mark.parametrize(("rows", "k"), [(8, 4), (16, 4), (16, 8), (16, 16)])
def test_products_of_float64(rows, k):
    """The same, of float64 with one number in a register, and sums that float32 does not have."""
    draw = np.random.default_rng(k)
    a, b, c = (draw.integers(-(1 << 20), 1 << 20, shape) * 1.0 for shape in ((rows, k), (k, 8), (rows, 8)))
    group, member = np.arange(32) // 4, np.arange(32) % 4
    given = [a[group + 8 * (i % 2), member + 4 * (i // 2)] for i in range(rows * k // 32)]
    inputs = {f"a{i}": ("f64", x) for i, x in enumerate(given)}
    inputs |= {f"b{i}": ("f64", b[member + 4 * i, group]) for i in range(k // 4)}
    places = [(group + 8 * (i // 2), 2 * member + i % 2) for i in range(rows // 4)]
    inputs |= {f"c{i}": ("f64", c[place]) for i, place in enumerate(places)}
    names = lambda letter: ", ".join(name.replace("c", "d") for name in inputs if name[0] == letter)
    code = f"mma.sync.aligned.m{rows}n8k{k}.row.col.f64.f64.f64.f64 "
    code += f"{{{names('c')}}}, {{{names('a')}}}, {{{names('b')}}}, {{{names('c').replace('d', 'c')}}};"
    found = lanes(code, {f"d{i}": "f64" for i in range(rows // 4)}, inputs)
    for i, place in enumerate(places):
        np.testing.assert_array_equal(found[f"d{i}"].view(np.float64), (a @ b + c)[place])


@pytest.mark.parametrize("saturates", [False, True])
def test_sums_of_integers_wrap_or_are_cut_off(saturates):
    """Catches `.satfinite` that wraps, and a sum without it that does not."""
    word, most = ("b32", np.uint64(0x7F7F7F7F)), ("b32", np.uint64(0x7FFFFFFF))
    inputs = {"a": word, "b": word, "c": most}
    code = f"mma.sync.aligned.m16n8k32.row.col.{'satfinite.' if saturates else ''}s32.s8.s8.s32 "
    code += "{d0, d1, d2, d3}, {a, a, a, a}, {b, b}, {c, c, c, c};"
    found = lanes(code, {f"d{i}": "b32" for i in range(4)}, inputs)
    total = (1 << 31) - 1 + 32 * 127 * 127
    assert (found["d3"] == (0x7FFFFFFF if saturates else total & 0xFFFFFFFF)).all()


def test_tf32_ignores_the_low_bits():
    """Catches products of whole float32 numbers where a tensor core has 10 bits."""
    x = np.float32(1 + 2.0**-12)
    inputs = {f"a{i}": ("f32", x) for i in range(4)} | {"b0": ("f32", x), "b1": ("f32", x), "z": ("f32", np.float32(0))}
    code = (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {d0, d1, d2, d3}, {a0, a1, a2, a3}, {b0, b1}, {z, z, z, z};"
    )
    assert (lanes(code, {f"d{i}": "f32" for i in range(4)}, inputs)["d0"].view(np.float32) == 8).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_to_and_from_shared_memory(count, transposed):
    """Catches rows given by other lanes, and transposed fragments: PTX ISA 9.7.14.5.15 and .16."""
    matrices = np.random.default_rng(1).integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    source, out, back = (
        torch.from_numpy(x.view(np.int16))
        for x in (matrices, np.zeros((4, 32, 2), np.uint16), np.zeros((4, 8, 8), np.uint16))
    )
    trans = ".trans" if transposed else ""
    names = "{" + ", ".join(f"m{i}" for i in range(count)) + "}"
    launch(
        f"""
        .reg .b32 m<4>, row, x<4>;
        mad.wide.u32 offset, tid, 16, %rd0;
        ld.global.v4.b32 {{x0, x1, x2, x3}}, [offset];
        shl.b32 row, tid, 4;
        st.shared.v4.b32 [row], {{x0, x1, x2, x3}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names}, [row];
        {" ".join(f"mad.wide.u32 offset, tid, 4, %rd1; st.global.b32 [offset+{128 * i}], m{i};" for i in range(count))}
        bar.warp.sync -1;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [row+512], {names};
        bar.warp.sync -1;
        {"" if count == 4 else f".reg .pred some; setp.lt.u32 some, tid, {8 * count};"}
        {"" if count == 4 else "@some "}ld.shared.v4.b32 {{x0, x1, x2, x3}}, [row+512];
        mad.wide.u32 offset, tid, 16, %rd2;
        {"" if count == 4 else "@some "}st.global.v4.b32 [offset], {{x0, x1, x2, x3}};
        """,
        [source, out, back],
        shared=1024,
    )
    for j in range(count):
        matrix = matrices[j].T if transposed else matrices[j]
        for lane in range(32):
            expected = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            np.testing.assert_array_equal(out.numpy().view(np.uint16)[j, lane], expected)
    np.testing.assert_array_equal(back.numpy().view(np.uint16)[:count], matrices[:count])


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_loads_extend_and_vectors_keep_their_order():
    """Catches a narrow load without its sign, and the elements of a vector exchanged."""
    data = torch.arange(-64, 64, dtype=torch.int8)
    out = torch.zeros(32, 4, dtype=torch.int32)
    launch(
        """
        .reg .b32 w, x, y, z; .reg .b16 h;
        cvt.u64.u32 offset, tid; add.s64 offset, offset, %rd0;
        ld.global.s8 w, [offset]; ld.global.u8 x, [offset]; ld.global.b8 h, [offset]; cvt.u32.u16 y, h; mov.b32 z, 7;
        mad.wide.u32 offset, tid, 16, %rd1;
        st.global.v4.b32 [offset], {w, x, y, z};
        """,
        [data, out],
    )
    first = data[:32].int()
    assert torch.equal(out[:, 0], first)
    assert torch.equal(out[:, 1], first & 255) and torch.equal(out[:, 2], first & 255) and (out[:, 3] == 7).all()


def test_local_memory_is_each_threads_own():
    """Catches threads that share it, and elements of vectors or of another width in another place."""
    out = torch.zeros(64, 4, dtype=torch.int16)
    launch(
        """
        .local .align 16 .b8 one[4]; .local .align 16 .b8 two[16]; .reg .b64 there; .reg .b32 at, x; .reg .b16 h<4>;
        mov.b64 there, one; st.local.b32 [there], 7; mov.b64 there, two; cvt.u32.u64 at, there;
        st.local.v2.b32 [at+8], {tid, 5}; ld.local.v4.b16 {h0, h1, h2, h3}, [there+8]; ld.local.b32 x, [one];
        cvt.u16.u32 h1, x; mad.wide.u32 offset, tid, 8, %rd0; st.global.v4.b16 [offset], {h0, h1, h2, h3};
        """,
        [out],
        warps=2,
    )
    expected = torch.tensor([[i, 7, 5, 0] for i in range(64)], dtype=torch.int16)
    assert torch.equal(out, expected)


ATOMICS = {
    ("add", "u32"): lambda xs, start: start + sum(xs),
    ("max", "s32"): lambda xs, start: max(start, *xs),
    ("min", "s32"): lambda xs, start: min(start, *xs),
    ("or", "b32"): lambda xs, start: start | int(np.bitwise_or.reduce(xs)),
    ("and", "b32"): lambda xs, start: start & int(np.bitwise_and.reduce(xs)),
    ("xor", "b32"): lambda xs, start: start ^ int(np.bitwise_xor.reduce(xs)),
    ("add", "f32"): lambda xs, start: start + sum(xs),
}


@pytest.mark.parametrize(("name", "kind"), ATOMICS)
def test_atomics(name, kind):
    """Catches an update that is lost, or an old value that nobody had."""
    numpy_type = {"f": np.float32, "s": np.int32}.get(kind[0], np.uint32)
    values = np.random.default_rng(1).integers(1, 50, 64).astype(numpy_type)
    start = numpy_type(37)
    given, place, old = (
        torch.from_numpy(x.view(np.int32).copy()) for x in (values, np.array([start]), np.zeros(64, np.int32))
    )
    launch(
        f"""
        .reg .b32 x, d, number; mov.u32 number, %ctaid.x; mad.lo.s32 number, number, 32, tid;
        mad.wide.u32 offset, number, 4, %rd0; ld.global.b32 x, [offset];
        atom.global.gpu.acq_rel.{name}.{kind} d, [%rd1], x;
        mad.wide.u32 offset, number, 4, %rd2; st.global.b32 [offset], d;
        """,
        [given, place, old],
        grid=2,
    )
    expected = ATOMICS[name, kind](values, start)
    assert place.numpy().view(numpy_type)[0] == expected
    if (name, kind) == ("add", "u32"):
        steps = np.sort(np.append(old.numpy().view(np.uint32), expected))
        assert sorted(np.diff(steps).tolist()) == sorted(values.tolist())


@pytest.mark.parametrize(
    "name",
    [
        "global f32",
        "global v2.f32",
        "global v4.f32",
        "global noftz.f16",
        "global noftz.v8.f16",
        "global noftz.v2.bf16",
        "global noftz.f16x2",
        "global noftz.v4.bf16x2",
        "shared f32",
        "shared noftz.bf16x2",
    ],
)
def test_atomic_sums(name):
    """Catches elements exchanged or added to others, sums rounded in another way, and denormals flushed or kept where
    hardware does not.
    """
    space, what = name.split()
    kind = what.split(".")[-1]
    element = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind.removesuffix("x2")]
    width, count = (2 if kind in ("f16", "bf16") else 4), next((int(n) for n in "248" if f"v{n}" in what), 1)
    elements = width * count // element.itemsize
    integers = {2: torch.int16, 4: torch.int32}[element.itemsize]
    draw = torch.Generator().manual_seed(1)
    given = []
    for _ in range(2):  # every bit pattern, denormals, and numbers of like size
        numbers = torch.randint(-(2**31), 2**31, (32, elements), generator=draw).to(integers).view(element)
        numbers[8:16] = (torch.randn(8, elements, generator=draw) * torch.finfo(element).tiny / 2).to(element)
        numbers[16:] = torch.randn(16, elements, generator=draw).to(element)
        given.append(numbers)
    place, old = given[0].clone(), torch.zeros_like(given[0])
    x, y, d = (", ".join(f"{letter}{i}" for i in range(count)) for letter in "xyd")
    access = f"v{count}.b{8 * width}" if count > 1 else f"b{8 * width}"
    at, before, after = "[offset]", "", ""
    if space == "shared":
        at, before = "[there]", f"st.shared.{access} [there], {{{y}}}; bar.sync 0;"
        after = f"bar.sync 0; ld.shared.{access} {{{y}}}, [there]; st.global.{access} [offset], {{{y}}};"
    launch(
        f"""
        .reg .b{8 * width} x<{count}>, y<{count}>, d<{count}>; .reg .b32 there; mul.lo.u32 there, tid, {width * count};
        mad.wide.u32 offset, tid, {width * count}, %rd1; ld.global.{access} {{{x}}}, [offset];
        mad.wide.u32 offset, tid, {width * count}, %rd0; ld.global.{access} {{{y}}}, [offset]; {before}
        atom.{space}.gpu.relaxed.add.{what} {{{d}}}, {at}, {{{x}}}; {after}
        mad.wide.u32 offset, tid, {width * count}, %rd2; st.global.{access} [offset], {{{d}}};
        """,
        [place, given[1], old],
        shared=32 * width * count,
    )
    assert torch.equal(old.view(integers), given[0].view(integers))
    flushes = name.startswith("global") and kind == "f32"
    kept = lambda v: torch.where(v.abs() < torch.finfo(element).tiny, torch.copysign(v * 0, v), v) if flushes else v
    expected = kept(kept(given[0]) + kept(given[1]))
    torch.testing.assert_close(place, expected, atol=0, rtol=0, equal_nan=True)
    signed = expected == expected
    assert torch.equal(place.signbit()[signed], expected.signbit()[signed])


def test_compare_and_swap_and_exchange():
    """Catches a swap that happens for several, or for none."""
    place, old = torch.zeros(2, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    launch(
        """
        .reg .b32 mine, d; add.s32 mine, tid, 1;
        atom.global.relaxed.gpu.cas.b32 d, [%rd0], 0, mine;
        mad.wide.u32 offset, tid, 4, %rd1; st.global.b32 [offset], d;
        atom.global.exch.b32 d, [%rd0+4], mine;
        """,
        [place, old],
    )
    winner = int(place[0])
    assert 1 <= winner <= 32 and 1 <= int(place[1]) <= 32
    assert (old == 0).sum() == 1 and int(old.argmin()) == winner - 1 and set(old.tolist()) <= {0, winner}


@pytest.mark.parametrize(("name", "expected"), [("inc", [1, 6, 7, 0, 0]), ("dec", [7, 4, 5, 6, 7])])
def test_counters(name, expected):
    """Catches a counter that goes on past its bound (7), and one beyond it that does not begin anew."""
    start = [0, 5, 6, 7, 8]
    place = torch.tensor(start + [0] * 27, dtype=torch.int32)
    launch(f"mad.wide.u32 offset, tid, 4, %rd0; red.global.relaxed.gpu.{name}.u32 [offset], 7;", [place])
    assert place.tolist()[:5] == expected


def test_what_only_a_gpu_has_changes_nothing():
    """Catches a hint of caches, policies, time or launches that this machine takes for something else, or not at all;
    and prefetches that are not counted.
    """
    hints = [hint for hint in HINTS.split() if hint not in ("nc", "gpu", "sys", "cta", "v2", "v4", "v8")]
    policy = lambda hint: ", policy" if hint == "L2::cache_hint" else ""
    place = torch.arange(32, dtype=torch.int32)
    counts = launch(
        """
        .reg .b32 x; .reg .b64 policy, there; .reg .pred last; mad.wide.u32 offset, tid, 4, %rd0;
        cvta.to.global.u64 there, offset; createpolicy.fractional.L2::evict_unchanged.b64 policy, 1.0;
        createpolicy.fractional.L2::evict_first.b64 policy, 1.0; fence.proxy.alias; fence.proxy.async.shared::cta;
        prefetch.global.L2::evict_last [there]; prefetch.global.L1 [there+4]; prefetchu.L1 [there];
        applypriority.global.L2::evict_normal [there], 128; discard.global.L2 [there], 128;
        nanosleep.u32 20; pmevent 1; griddepcontrol.wait; griddepcontrol.launch_dependents;
        """
        + "".join(
            f"ld.global.{hint}.b32 x, [there]{policy(hint)}; add.u32 x, x, 1;"
            f"st.global.{hint}.b32 [there], x{policy(hint)};"
            for hint in hints
        )
        + "ld.global.nc.b32 x, [%rd1]; setp.eq.u32 last, tid, 31; @last exit; st.global.b32 [there], x; ret;",
        [place, torch.tensor([5])],
    )
    assert place.tolist() == [5] * 31 + [31 + len(hints)]
    assert (counts.prefetched, counts.prefetched_outside) == (96, 1)


@pytest.mark.parametrize("wait", ["cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"])
@pytest.mark.parametrize("cached", ["cg", "ca"])
def test_asynchronous_copies(wait, cached):
    """Catches a copy that fills other bytes, or none where its source size is 0."""
    source, out = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    launch(
        f"""
        .reg .b32 to, size, x<4>; .reg .pred odd;
        shl.b32 to, tid, 4; and.b32 size, tid, 1; setp.ne.b32 odd, size, 0; selp.b32 size, 0, 16, odd;
        mad.wide.u32 offset, tid, 16, %rd0;
        cp.async.{cached}.shared.global [to], [offset], 16, size;
        {wait}
        bar.sync 0;
        ld.shared.v4.b32 {{x0, x1, x2, x3}}, [to];
        mad.wide.u32 offset, tid, 16, %rd1; st.global.v4.b32 [offset], {{x0, x1, x2, x3}};
        """,
        [source, out],
        shared=512,
    )
    expected = source.view(32, 4).clone()
    expected[1::2] = 0
    assert torch.equal(out.view(32, 4), expected)


# ---- What is known, and what is not ----------------------------------------------------------------------------------


def test_the_clock_goes_on_whenever_somebody_looks():
    """Catches a pause that never ends, and one that is none. (10.23)"""
    code = "mov.u32 a, %clock; mov.u32 b, %clock; sub.u32 b, b, a;"
    code += "AGAIN: mov.u32 c, %clock; sub.u32 c, c, a; setp.lt.u32 p, c, 1000; @p bra AGAIN;"
    found = lanes(".reg .pred p; .reg .b32 a; " + code, {"b": "u32", "c": "u32"}, {})
    assert (found["b"] > 0).all() and (found["c"] >= 1000).all() and (found["c"] < 2000).all()


def test_every_instruction_that_is_known_is_tested():
    """Catches an instruction, or a part of a name, that the machine knows and no test of it has."""
    Machine(kernel(1, ""), 1, 0)  # now all are registered
    written = []
    for path in (Path(__file__), *Path(__file__).parent.glob("test_machine*.py"), Path(__file__).with_name("ptx.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        written += [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        ]
    names = {name for text in written for name in re.findall(r"(?:^|[\s;}])([a-z]\w+)(?=[.;\s]|$)", text)}
    parts = {part for text in written for part in re.findall(r"\w+(?:::\w+)?", text)}
    untested = HANDLERS.keys() - names
    assert not untested
    missing = {name: known - parts - set(HINTS.split()) for name, (_, known) in HANDLERS.items()}
    shape = re.compile(r"m\d+n\d+k\d+|x\d")  # which tests put together
    missing = {name: [part for part in some if not shape.fullmatch(part)] for name, some in missing.items()}
    assert not any(missing.values()), missing


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("bfind.u32 x, x;", "bfind.u32"),
        ("cvt.rz.f64.s64 d, d;", "64-bit integers as float64"),
        ("atom.shared.add.v2.f32 {x, x}, [x], {x, x};", "atom.shared.add.v2.f32"),
        ("red.global.add.f16x2 [%rd0], x;", "add of f16, without noftz"),
        ("red.global.max.f32 [%rd0], x;", "max of f32"),
        ("add.cc.u32 x, x, x;", "add.cc.u32"),
        ("ld.b32 x, [%rd0];", "ld.b32 x"),
        ("bar.sync 1, 64;", "bar.sync 1, 64"),
        ("mov.u32 x, %clock_hi;", "(%clock_hi)"),
        ("cvta.local.u64 d, d;", "(generic addresses of local memory, as of device_print)"),
        ("mad.lo.cc.u64 d, d, d, d;", "(carries of u64)"),
        ("tcgen05.alloc.b32 [x], 32;", "(tensor memory): tcgen05.alloc.b32 [x], 32"),
        ("fma.rz.f64 d, d, d, d;", "rounding rz"),
        ("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {d,d}, {d}, {d}, {d,d};", "fragments of another size"),
    ],
)
def test_what_is_not_known_is_an_error_that_names_it(code, named):
    """Catches an instruction, or a part of its name, that is passed over in silence."""
    with pytest.raises(Fault, match=r"does not know|not understood") as error:
        Machine(kernel(1, ".reg .b32 x; .reg .b64 d; " + code), 1, 0)
    assert named in str(error.value) and "\n" not in str(error.value)  # no line of Python is known


def test_text_that_is_no_kernel_is_an_error():
    """Catches a module without an entry that runs as an empty one."""
    with pytest.raises(Fault, match=r"\.entry"):
        Machine(HEAD, 1, 0)
