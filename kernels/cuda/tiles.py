"""Device functions: a tile of weights in registers, whatever the format.

A tile is [BLOCK_N, J]: J neighbouring columns of BLOCK_N rows. Formats of 8 bits and more have one
slot per tile of storage; those of fewer bits have 8 slots per lane (layout.py), and the callers go
through them in a static loop, so that every shift and mask is a constant.

KIND says what a code is:
    "plain"     the weight itself, bf16, fp16 or fp32
    "int8"      an int8 number
    "e4m3"      float8, converted by the GPU; "float" where it cannot
    "float"     a small float: sign, EXPONENT bits, the rest mantissa; no infinity, no NaN
    "integer"   an unsigned number of BITS bits, taken minus MID
    "table"     an index into `table`, fp32

A code's value c becomes the weight w = c s + o, with a scale s and an offset o per row and group:
    ZERO "none"   o = 0
    ZERO "float"  o = zero                  (int4)
    ZERO "int"    o = (MID - zero) s        (uint-n: w = (code - zero) s)

Nothing is masked along the rows of the weight: those behind the last read the last one (`near`),
and their sums are not stored.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.cuda.layout import PIECES


@triton.jit
def wait_for_others(PDL: tl.constexpr):
    """With PDL the kernel in front may still run: only from here on are its results there.

    The kernel behind is let in at once. It, too, waits until all of this one has ended.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(plane, start, width, J: tl.constexpr, STAGES: tl.constexpr):
    """Ask the L2 cache for the columns of the first STAGES tiles of rows of storage."""
    if plane is not None:
        ITEM: tl.constexpr = plane.dtype.element_ty.primitive_bitwidth // 8
        LINES: tl.constexpr = max(1, STAGES * J * ITEM // 128)
        lines = tl.arange(0, triton.next_power_of_2(LINES)) * (128 // ITEM)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
            [plane + start[:, None] + tl.minimum(lines, width - 1)[None, :]],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_lanes(plane, offsets, mask):
    """A tile of storage, or nothing for a plane that the format lacks. Weights are read once."""
    if plane is None:
        return  # not `return None`, which Triton 3.6 would make a tensor
    elif mask is None:
        return tl.load(plane + offsets, eviction_policy="evict_first")
    else:
        return tl.load(plane + offsets, mask=mask, other=0, eviction_policy="evict_first")


@triton.constexpr_function
def piece(BITS, slot, i):
    """Of piece i of a code: plane, shift to its place in the plane, mask, shift in the code."""
    parts = PIECES[BITS][slot]
    plane, first, width = parts[i]
    return plane, first, 2**width - 1, sum(part[2] for part in parts[:i])


@triton.constexpr_function
def piece_count(BITS, slot):
    return len(PIECES[BITS][slot])


@triton.jit
def code_piece(fours, twos, ones, slot: tl.constexpr, BITS: tl.constexpr, i: tl.constexpr):
    """Piece i of a code, at its place in the code, int32."""
    at: tl.constexpr = piece(BITS, slot, i)
    if at[0] == 0:
        lane = fours
    elif at[0] == 1:
        lane = twos
    else:
        lane = ones
    return ((lane.to(tl.int32) >> at[1]) & at[2]) << at[3]


@triton.jit
def code_of(fours, twos, ones, slot: tl.constexpr, BITS: tl.constexpr):
    """Code `slot` of each lane, int32 in [0, 2^BITS)."""
    code = code_piece(fours, twos, ones, slot, BITS, 0)
    for i in tl.static_range(1, piece_count(BITS, slot)):
        code |= code_piece(fours, twos, ones, slot, BITS, i)
    return code


@triton.jit
def float_of(code, BITS: tl.constexpr, EXPONENT: tl.constexpr):
    """The value of a small float, fp32: its fields moved to fp32's, the bias mended by a product.

    A code of exponent 0 becomes an fp32 subnormal, which the product makes normal: exact.
    """
    FIELDS: tl.constexpr = ((1 << (BITS - 1)) - 1) << (24 + EXPONENT - BITS)
    scale: tl.constexpr = 2.0 ** (128 - 2 ** (EXPONENT - 1))
    word = code << (32 - BITS)  # the sign comes to its place, the rest by a shift back
    bits = (word & -2147483648) | ((word >> (8 - EXPONENT)) & FIELDS)
    return bits.to(tl.float32, bitcast=True) * scale


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


@triton.jit
def value_of(
    fours, twos, ones, table, slot: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, MID: tl.constexpr,
):  # fmt: skip
    """The codes' values: the stored type for "plain" and "int8", int32 for integers, else fp32."""
    if KIND == "plain" or KIND == "int8":
        return fours
    elif KIND == "e4m3":
        return fours.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        code = code_of(fours, twos, ones, slot, BITS)
        if KIND == "float":
            return float_of(code, BITS, EXPONENT)
        elif KIND == "table":
            return tl.load(table + code)
        else:
            return code - MID


@triton.jit
def group_columns(first, slot: tl.constexpr, lanes, GROUP: tl.constexpr, J: tl.constexpr):
    """The group of each column, [J], or one number where the tile lies in one group.

    `first` is the chunk's first column.
    """
    begin = first + slot * J
    if GROUP % J == 0:
        return begin // GROUP
    else:
        return (begin + lanes) // GROUP


@triton.constexpr_function
def same_group(slot, GROUP, J):
    """Whether all columns of this slot lie in the group of all those of the slot before."""
    if slot == 0 or GROUP == 0:
        return GROUP == 0
    whole = 256 % GROUP == 0 or GROUP % 256 == 0
    return whole and GROUP % J == 0 and (slot * J) % GROUP != 0


@triton.constexpr_function
def group_ends(slot, SLOTS, GROUP, J):
    """Whether the chunk or the group, of whole slots, ends with this slot."""
    return slot == SLOTS - 1 or not same_group(slot + 1, GROUP, J)


@triton.constexpr_function
def odd_group(slot, GROUP, J):
    """0 or 1 where it is known whether the number of a slot's group is odd, else None."""
    if GROUP == 0 or 128 % GROUP or GROUP % J:
        return None
    return slot * J // GROUP % 2


@triton.jit
def group_scale(
    scales, first, lanes, near, n_lines, N, slot: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, INNER: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """s and the zero of a tile: [BLOCK_N, 1], or [BLOCK_N, J] where groups do not fit the tile.

    `scales` [n_lines, N], see layout.py. Columns behind the last group take its scale: no code
    there meets an x that is not 0.
    """
    TWO_SCALES: tl.constexpr = ZERO == "none"  # in a word
    group = group_columns(first, slot, lanes, GROUP, J)
    line = tl.minimum(group // 2 if TWO_SCALES else group, n_lines - 1)
    if group.type.is_block():
        word = tl.load(scales + ((line * N)[None, :] + near[:, None]))
        odd = (group % 2)[None, :]
    else:
        word = tl.load(scales + (line * N + near))[:, None]
        odd = group % 2
    ODD: tl.constexpr = odd_group(slot, GROUP, J)
    if TWO_SCALES:
        half = word >> (16 * (odd if ODD is None else ODD))
        if INNER:
            s = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            s = (half << 16).to(tl.float32, bitcast=True)
        return s, s * 0
    else:
        s = (word << 16).to(tl.float32, bitcast=True)
        return s, (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def group_offset(s, zero, MID: tl.constexpr, ZERO: tl.constexpr):
    """o of the formula above."""
    if ZERO == "int":
        return (MID - zero) * s
    else:
        return zero


@triton.jit
def round_even(x):
    """To the nearest integer, ties to even, int32, for |x| < 2^22.

    Adding 1.5 * 2^23 rounds, and leaves the integer in the low bits of the mantissa.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
