"""Device functions: codes of less than 8 bits, two or four at a time, in PTX.

KIND, ZERO and the rest mean what tiles.py says. The interpreter takes codes one by one, from there.
"""

import triton
import triton.language as tl

from kernels.cuda.common import round_even
from kernels.cuda.layout import PIECES
from kernels.cuda.tiles import code_of, float_of, group_offset


@triton.constexpr_function
def pair_base(KIND, dtype):
    """What `code_pairs` adds to an integer: a power of two whose last mantissa bit counts 1."""
    if KIND != "integer":
        return 0
    return 128 if dtype == tl.bfloat16 else 1024


@triton.constexpr_function
def pair_fields(KIND, BITS, EXPONENT, slot, dtype):
    """Where a code's bits lie and belong: (word, shift to the right, mask of the result) each.

    The words are those of `lane_words`. An integer comes to the lowest bits; a small float's
    magnitude to the top of the mantissa, so that its exponent bits are the lowest of the exponent,
    and its sign to the top.
    """
    mantissa = 7 if dtype == tl.bfloat16 else 10
    up = mantissa - (BITS - 1 - EXPONENT) if KIND == "float" else 0
    fields, below = [], 0
    for plane, first, width in PIECES[BITS][slot]:
        word, at = (plane + 1, first) if plane else (first // 16, first % 16)
        signed = KIND == "float" and below + width == BITS
        bits = width - 1 if signed else width
        if bits:
            fields.append((word, at - below - up, ((1 << bits) - 1) << (below + up)))
        if signed:
            fields.append((word, at + width - 1 - 15, 1 << 15))
        below += width
    return fields


@triton.constexpr_function
def pair_asm(KIND, BITS, EXPONENT, slot, dtype, MID=0, ZERO=None):
    """PTX: the fields of two neighbouring codes, one in each half of a register, as two floats.

    Both halves are shifted at once: what crosses from one into the other is masked. $1 to $4 are
    the words. With a ZERO the result is scaled, rounded once: $5 is the scale, $6 the offset.
    """
    name, bias, mantissa = ("bf16", 127, 7) if dtype == tl.bfloat16 else ("f16", 15, 10)
    above = 0 if KIND == "float" else (bias + mantissa) << mantissa  # 2^mantissa as a float
    lines = [".reg .b32 t, u, a, b;", f"mov.b32 u, {above * 0x10001};"]
    for word, shift, mask in pair_fields(KIND, BITS, EXPONENT, slot, dtype):
        lines.append(f"sh{'r' if shift >= 0 else 'l'}.b32 t, ${word + 1}, {abs(shift)};")
        lines.append(f"lop3.b32 u, t, {mask * 0x10001}, u, 0xEA;")  # (t & mask) | u

    def fma(out: str, x: str, times: int | str, plus: int | str) -> None:
        for register, value in (("a", times), ("b", plus)):
            if isinstance(value, int):
                lines.append(f"mov.b32 {register}, {value * 0x10001};")
        a, b = (n if isinstance(v, int) else v for n, v in (("a", times), ("b", plus)))
        lines.append(f"fma.rn.{name}x2 {out}, {x}, {a}, {b};")

    one, minus_zero = bias << mantissa, 0x8000  # x + -0 = x, the sign of 0 too
    if KIND == "float":  # a product mends the bias of the exponent
        fma("$0", "u", (2 * bias + 1 - 2 ** (EXPONENT - 1)) << mantissa, minus_zero)
    elif ZERO is None:
        lines.append("mov.b32 $0, u;")
    elif ZERO == "int":  # $6 is the zero plus the base
        fma("t", "$6", one | 0x8000, "u")
        fma("$0", "t", "$5", minus_zero)
    else:
        centre = 0x8000 | (bias + mantissa) << mantissa | MID  # -(2^mantissa + MID)
        fma("t", "u", one, centre)
        fma("$0", "t", "$5", "$6" if ZERO == "float" else minus_zero)
    return "{ " + " ".join(lines) + " }"


@triton.jit
def widened(plane):
    """Bytes as 16-bit tiles, zeros above: two `prmt` for four, where a conversion takes ten."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;", "=r,=r,r", [plane],
        dtype=tl.int16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def lane_words(fours, twos, ones, BITS: tl.constexpr):
    """The lanes as 16-bit tiles: `fours`' low half, its high one, `twos`, `ones`; what a format
    lacks is one of the others."""
    if BITS == 8:
        a = widened(fours)
    elif BITS & 4 != 0:
        a = fours.to(tl.int16)
    elif BITS & 2 != 0:
        a = twos
    else:
        a = widened(ones)
    b = (fours >> 16).to(tl.int16) if BITS & 4 != 0 and BITS != 8 else a
    c = twos if BITS & 2 != 0 and BITS != 8 else a
    d = widened(ones) if BITS & 1 != 0 else a
    return a, b, c, d


@triton.jit
def code_pairs(
    fours, twos, ones, slot: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    EXPONENT: tl.constexpr, dtype: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Codes of a slot as bf16 or fp16, exact: integers plus `pair_base`, or small floats.

    On the GPU two at a time, in a shift and one logic operation for each plane.
    """
    if INTERPRET:
        code = code_of(fours, twos, ones, slot, BITS)
        if KIND == "float":
            return float_of(code, BITS, EXPONENT).to(dtype)
        else:
            return (code + pair_base(KIND, dtype)).to(tl.float32).to(dtype)
    else:
        a, b, c, d = lane_words(fours, twos, ones, BITS)
        asm: tl.constexpr = pair_asm(KIND, BITS, EXPONENT, slot, dtype)
        pairs = tl.inline_asm_elementwise(
            asm, "=r,r,r,r,r", [a, b, c, d], dtype=tl.int16, is_pure=True, pack=2
        )
        return pairs.to(dtype, bitcast=True)


@triton.jit
def scaled_pairs(
    fours, twos, ones, s, zero, slot: tl.constexpr, BITS: tl.constexpr, MID: tl.constexpr,
    ZERO: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Integers of a slot times their scale, bf16, rounded once; s and zero from `group_scale`."""
    if INTERPRET:
        code = code_of(fours, twos, ones, slot, BITS) - MID
        return (code.to(tl.float32) * s + group_offset(s, zero, MID, ZERO)).to(tl.bfloat16)
    else:
        a, b, c, d = lane_words(fours, twos, ones, BITS)
        if ZERO == "int":
            zero += pair_base("integer", tl.bfloat16)
        s, zero = s.to(tl.bfloat16), zero.to(tl.bfloat16)
        asm: tl.constexpr = pair_asm("integer", BITS, 0, slot, tl.bfloat16, MID, ZERO)
        return tl.inline_asm_elementwise(
            asm, "=r,r,r,r,r,r,r", [a, b, c, d, s, zero], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.constexpr_function
def quad_asm(slot, SCALED):
    """PTX: four neighbouring 4-bit codes as int8, minus 8 and, SCALED, times $3 rounded to even.

    In fp16, where adding 1536 rounds to an integer and leaves it in the low byte.
    """
    lines = [".reg .b32 t, u, v, a, b, c;"]
    constants = {"a": 0x3C00, "b": 0xE408 if SCALED else 0x5FE0, "c": 0x6600}  # 1, -1032 or 504
    lines += [f"mov.b32 {name}, {value * 0x10001};" for name, value in constants.items()]
    for out, source in (("u", "$1"), ("v", "$2")):
        lines.append(f"shr.b32 t, {source}, {4 * (slot % 4)};")
        lines.append(f"mov.b32 {out}, {0x64006400};")
        lines.append(f"lop3.b32 t, t, {0x000F000F}, {out}, 0xEA;")
        lines.append(f"fma.rn.f16x2 {out}, t, a, b;")
        if SCALED:
            lines.append(f"fma.rn.f16x2 {out}, {out}, {'$3' if out == 'u' else '$4'}, c;")
    lines.append(f"prmt.b32 $0, u, v, {0x6420};")
    return "{ " + " ".join(lines) + " }"


@triton.jit
def code_quads(fours, s, slot: tl.constexpr, GROUP: tl.constexpr, INTERPRET: tl.constexpr):
    """4-bit codes of a slot minus 8, times the scale of their group if there is one, as int8."""
    if INTERPRET:
        c = code_of(fours, fours, fours, slot, 4) - 8
        if GROUP == 0:
            return c.to(tl.int8)
        else:
            return round_even(c.to(tl.float32) * s).to(tl.int8)
    else:
        a = lane_words(fours, fours, fours, 4)[slot // 4]
        if GROUP == 0:
            asm: tl.constexpr = quad_asm(slot, False)
            return tl.inline_asm_elementwise(
                asm, "=r,r,r", [a], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            asm: tl.constexpr = quad_asm(slot, True)
            return tl.inline_asm_elementwise(
                asm, "=r,r,r,r,r", [a, s.to(tl.float16)], dtype=tl.int8, is_pure=True, pack=4
            )
