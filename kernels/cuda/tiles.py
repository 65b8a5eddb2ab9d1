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

from kernels.cuda.layout import CHUNK, PIECES


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
    whole = CHUNK % GROUP == 0 or GROUP % CHUNK == 0
    return whole and GROUP % J == 0 and (slot * J) % GROUP != 0


@triton.constexpr_function
def group_ends(slot, SLOTS, GROUP, J):
    """Whether the chunk or the group, of whole slots, ends with this slot."""
    return slot == SLOTS - 1 or not same_group(slot + 1, GROUP, J)


@triton.constexpr_function
def odd_group(slot, GROUP, J):
    """0 or 1 where it is known whether the number of a slot's group is odd, else None."""
    if GROUP == 0 or CHUNK % (2 * GROUP) or GROUP % J:  # a chunk begins with an even group
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
