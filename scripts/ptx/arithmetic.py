"""What one thread computes: arithmetic, bits, comparisons, moves, conversions."""

from collections.abc import Callable

import numpy as np

from scripts.ptx.numbers import RAW, SIGNED, WIDTH, Array, EmulationError, integer
from scripts.ptx.program import Program, builds
from scripts.ptx.warps import Warps


def divide(a: Array, b: Array) -> Array:
    """Integers towards zero."""
    if a.dtype.kind == "f":
        return a / b
    y = a // b
    return y + ((y < 0) & (y * b != a)).astype(a.dtype)


def shift(a: Array, by: Array, left: bool) -> Array:
    """Past the width: zeros, or ones of a negative number to the right."""
    bits = a.dtype.itemsize * 8
    least = np.minimum(by, bits - 1).astype(a.dtype)
    y = a << least if left else a >> least
    return y if a.dtype.kind == "i" and not left else np.where(by < bits, y, np.zeros_like(y))


def logic(a: Array, b: Array, c: Array, table: int) -> Array:
    """Bit by bit, the entry 4 a + 2 b + c of a table of 8 bits."""
    y = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            y |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return y


def bit_field(a: Array, at: Array, width: Array) -> Array:
    """`width` bits of a from bit `at` on; a's sign where it has one and the field passes it."""
    bits, signed = a.dtype.itemsize * 8, a.dtype.kind == "i"
    at, width = at.astype(np.int64) & 255, width.astype(np.int64) & 255
    value = a.astype(np.int64)  # the sign, or zeros, go on to the left
    ones = (1 << np.minimum(width, 62)) - 1
    y = np.where(at < 63, value >> np.minimum(at, 63), value >> 63) & ones
    last = np.minimum(at + width, bits) - 1
    negative = signed & (width > 0) & ((value >> np.clip(last, 0, 63) & 1) == 1)
    return np.where(negative, y | ~ones, y)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes out of a's and b's; the highest bit of a selector asks for the byte's sign."""
    source = np.stack((a, b), 1).view(np.uint8)  # [threads, 8], the lowest byte of a first
    pick = (selector[:, None] >> (4 * np.arange(4, dtype=np.uint32))) & 15
    y = np.take_along_axis(source, (pick & 7).astype(np.int64), 1)
    return np.where(pick & 8, np.where(y >= 128, 255, 0), y).astype(np.uint8).view(np.uint32)[:, 0]


def flushed(x: Array) -> Array:
    """Subnormal fp32 as zeros."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a b + c in fp64, its last bit set where it is inexact: to round it is the only rounding."""
    p = a * b  # exact for 24 bits each
    y = p + c
    t = y - p
    rest = (p - (y - t)) + (c - t)
    inexact = np.isfinite(y) & (rest != 0)
    bits = y.view(np.int64) - (inexact & ((rest > 0) != (y > 0)))
    return (bits | inexact).view(np.float64)


OPERATIONS = {  # on operands of one type
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative, "abs": np.abs, "div": divide,
    "rem": lambda a, b: a - divide(a, b) * b, "fma": fused, "prmt": permute,
    "min": np.fmin, "max": np.fmax, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
    "rcp": lambda a: 1 / a, "rsqrt": lambda a: 1 / np.sqrt(a),
}  # fmt: skip
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def not_modelled(name: str, parts: list[str]) -> EmulationError:
    return EmulationError(f"not modelled: {'.'.join([name, *parts])}")


@builds("fence", "membar", "griddepcontrol", "createpolicy")
def _nothing(program, name, parts, args):
    return None


@builds(*OPERATIONS)
def _operation(program, name, parts, args):
    kind, function = parts[-1], OPERATIONS[name]
    known = set(parts[:-1]) <= {"rn", "approx", "full", "ftz", "NaN"}
    if not known or ("ftz" in parts and kind != "f32"):
        raise not_modelled(name, parts)
    if "NaN" in parts:
        function = {"min": np.minimum, "max": np.maximum}[name]
    out, inputs = program.numbers[args[0]], program.sources(args[1:], kind)

    def run(w: Warps) -> None:
        values = [w.read(i, kind) for i in inputs]
        if name == "fma":  # rounded once
            values = [v.astype(np.float64) for v in values]
        if "ftz" in parts:
            values = [flushed(v) for v in values]
        y = function(*values)
        w.write(out, kind, flushed(y) if "ftz" in parts else y)

    return run


@builds("mul", "mad")
def _multiply(program, name, parts, args):
    """a b, or a b + c: the low half of integers, with `wide` all of it, with `hi` the high half."""
    kind, half = parts[-1], parts[0]
    bits, wide = WIDTH[kind], kind[0] + str(2 * WIDTH[kind])
    result = wide if half == "wide" else kind
    out, inputs = program.numbers[args[0]], program.sources(args[1:3], kind)
    inputs += program.sources(args[3:], result)
    known = set(parts[:-1]) <= {"lo", "hi", "wide", "rn"}
    if not known or (half == "hi" and bits > 32) or (name == "mad" and kind[0] == "f"):
        raise not_modelled(name, parts)

    def run(w: Warps) -> None:
        a, b = (w.read(i, kind) for i in inputs[:2])
        if half in ("wide", "hi"):
            a, b = a.astype(integer(wide)), b.astype(integer(wide))
        y = a * b >> bits if half == "hi" else a * b
        w.write(out, result, y if name == "mul" else y + w.read(inputs[2], result))

    return run


@builds("shl", "shr")
def _shift(program, name, parts, args):
    kind, out = parts[0], program.numbers[args[0]]
    a, by = program.source(args[1], kind), program.source(args[2], "u32")
    return lambda w: w.write(out, kind, shift(w.read(a, kind), w.read(by, "u32"), name == "shl"))


@builds("bfe")
def _bit_field(program, name, parts, args):
    kind, out = parts[0], program.numbers[args[0]]
    if WIDTH[kind] > 32:
        raise not_modelled(name, parts)
    inputs = [(program.source(args[1], kind), kind)]
    inputs += [(number, "u32") for number in program.sources(args[2:], "u32")]
    return lambda w: w.write(out, kind, bit_field(*(w.read(*i) for i in inputs)))


@builds("lop3")
def _logic(program, name, parts, args):
    out, inputs = program.numbers[args[0]], program.sources(args[1:4], "b32")
    table = int(args[4], 0)
    return lambda w: w.write(out, "b32", logic(*(w.r[i] for i in inputs), table))


@builds("setp")
def _compare(program, name, parts, args):
    if len(parts) != 2 or parts[0] not in COMPARISONS:
        raise not_modelled(name, parts)
    function, kind = COMPARISONS[parts[0]], parts[1]
    out, (a, b) = program.numbers[args[0]], program.sources(args[1:], kind)

    def run(w: Warps) -> None:
        x, y = w.read(a, kind), w.read(b, kind)
        w.write(out, "pred", function(x, y) & (x == x) & (y == y))  # no NaN compares

    return run


@builds("selp")
def _select(program, name, parts, args):
    kind, out, which = parts[0], program.numbers[args[0]], program.numbers[args[3]]
    a, b = program.sources(args[1:3], kind)
    return lambda w: w.write(out, kind, np.where(w.r[which], w.read(a, kind), w.read(b, kind)))


@builds("mov")
def _move(program, name, parts, args):
    kind, (to, source) = parts[0], args
    if isinstance(source, list):
        return _join(program, to, source)
    if isinstance(to, list):
        return _split(program, to, source)
    out, a = program.numbers[to], program.source(source, kind)
    return lambda w: w.write(out, kind, w.read(a, kind))


def _join(program: Program, to: str, sources: list[str]) -> Callable[[Warps], None]:
    """Several registers in one, the first in the lowest bits."""
    out, inputs = program.numbers[to], [program.numbers[s] for s in sources]
    width = program.widths[out]

    def run(w: Warps) -> None:
        raw = np.stack([w.r[i] for i in inputs], 1)
        w.write(out, f"b{width}", raw.view(RAW[width])[:, 0])

    return run


def _split(program: Program, to: list[str], source: str) -> Callable[[Warps], None]:
    """One register in several; `_` takes none."""
    a = program.numbers[source]
    width = program.widths[a] // len(to)
    outs = [(i, program.numbers[name]) for i, name in enumerate(to) if name != "_"]

    def run(w: Warps) -> None:
        raw = w.r[a].copy().view(RAW[width]).reshape(w.threads, len(to))
        for i, out in outs:
            w.write(out, f"b{width}", np.ascontiguousarray(raw[:, i]))

    return run


@builds("cvt")
def _convert(program, name, parts, args):
    """Two operands become the halves of one register, the first one the upper half."""
    to, kind = parts[-2:]
    out, inputs = program.numbers[args[0]], program.sources(args[1:], kind)
    rounding = next((ROUNDINGS[p] for p in parts if p in ROUNDINGS), None)
    cut = to[0] in "su" and kind[0] in "bf" and rounding is None
    wide = rounding is not None and WIDTH[to] == 64  # fp64 does not hold its limits
    if cut or wide or not set(parts[:-2]) <= {"rn", *ROUNDINGS}:
        raise not_modelled(name, parts)

    def run(w: Warps) -> None:
        values = [w.read(i, kind) for i in reversed(inputs)]
        value = values[0] if len(values) == 1 else np.stack(values, 1).reshape(-1)
        if rounding is not None:
            value = rounding(value.astype(np.float64))
            if to[0] in "su":
                limits = np.iinfo((SIGNED if to[0] == "s" else RAW)[WIDTH[to]])
                value = np.clip(np.nan_to_num(value), limits.min, limits.max)
        w.write(out, to, value)

    return run
