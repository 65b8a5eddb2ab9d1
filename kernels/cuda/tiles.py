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
    "sparse"    2:4 (sparse24.py), 4-bit integers minus 8

A code's value c becomes the weight w = c s + o, with a scale s and an offset o per row and group:
    ZERO "none"   o = 0
    ZERO "float"  o = zero                  (int4)
    ZERO "int"    o = (MID - zero) s        (uint-n: w = (code - zero) s)
"""

import triton
import triton.language as tl


@triton.jit
def load_lanes(plane, offsets, mask):
    """A tile of storage, or nothing for a plane that the format lacks. Weights are read once."""
    if plane is None:
        return  # not `return None`, which Triton 3.6 would make a tensor
    else:
        return tl.load(plane + offsets, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def code_of(fours, twos, ones, slot: tl.constexpr, BITS: tl.constexpr):
    """Code `slot` of each lane, int32 in [0, 2^BITS)."""
    if BITS == 8:
        code = fours.to(tl.int32) & 255
    elif BITS & 4 != 0:
        code = (fours >> (4 * slot)) & 15
        if BITS & 2 != 0:
            code |= ((twos.to(tl.int32) >> (2 * slot)) & 3) << 4
        if BITS & 1 != 0:
            code |= ((ones.to(tl.int32) >> slot) & 1) << (BITS & 6)
    elif BITS & 2 != 0:
        code = (twos.to(tl.int32) >> (2 * slot)) & 3
        if BITS & 1 != 0:
            code |= ((ones.to(tl.int32) >> slot) & 1) << 2
    else:
        code = (ones.to(tl.int32) >> slot) & 1
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
def keep_bits(word, mask: tl.constexpr, above: tl.constexpr, INTERPRET: tl.constexpr):
    """(word & mask) | above, one instruction on the GPU, which alone would take two."""
    if INTERPRET:
        return (word & mask) | above
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [word, mask, above],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def nibble_plus(fours, slot: tl.constexpr, INTERPRET: tl.constexpr):
    """A 4-bit code plus `nibble_base`, fp32, in a shift and one logic operation.

    The code's bits become mantissa bits of a power of two whose last place makes them count as the
    integer. Neighbouring slots share the shift.
    """
    SHIFT: tl.constexpr = 4 * (slot // 2 * 2) - 12
    if SHIFT > 0:
        word = fours >> SHIFT
    else:
        word = fours << -SHIFT
    if slot % 2 == 0:
        bits = keep_bits(word, 0x0000F000, 0x45000000, INTERPRET)  # 2048 = 2^11, bit 12 counts 1
    else:
        bits = keep_bits(word, 0x000F0000, 0x43000000, INTERPRET)  # 128 = 2^7, bit 16 counts 1
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def nibble_base(slot: tl.constexpr):
    """What `nibble_plus` has added."""
    if slot % 2 == 0:
        return 2048.0
    else:
        return 128.0


@triton.jit
def sparse_of(codes, positions, slot: tl.constexpr):
    """Column slot % 4 of block slot // 4 of each lane: its 4-bit integer, or 0. int32."""
    both = codes.to(tl.int32) >> (8 * (slot // 4))
    where = positions.to(tl.int32) >> (4 * (slot // 4))
    first = tl.where((where & 3) == slot % 4, both & 15, 8)
    second = ((where >> 2) & 3) == slot % 4
    return tl.where(second, (both >> 4) & 15, first) - 8


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
    elif KIND == "sparse":
        return sparse_of(twos, ones, slot)
    else:
        code = code_of(fours, twos, ones, slot, BITS)
        if KIND == "float":
            return float_of(code, BITS, EXPONENT)
        elif KIND == "table":
            return tl.load(table + code)
        else:
            return code - MID


@triton.jit
def group_columns(
    first, slot: tl.constexpr, lanes, KIND: tl.constexpr, GROUP: tl.constexpr,
    J: tl.constexpr,
):  # fmt: skip
    """The group of each column, [J], or one number where the tile lies in one group.

    `first` is the chunk's first column; see layout.py for the columns of a 2:4 lane.
    """
    if KIND == "sparse":
        begin = first + (slot // 4) * 128
        if GROUP % 128 == 0:
            return begin // GROUP
        else:
            return (begin + lanes * 4 + slot % 4) // GROUP
    else:
        begin = first + slot * J
        if GROUP % J == 0:
            return begin // GROUP
        else:
            return (begin + lanes) // GROUP


@triton.jit
def group_param(params, group, rows, mask, n_groups, N):
    """Entries of params [G, N] for the tile, fp32: [BLOCK_N, 1], or [BLOCK_N, J] by column."""
    inside = group < n_groups
    offsets = group * N
    if group.type.is_block():
        pointers = params + (offsets[None, :] + rows[:, None])
        value = tl.load(pointers, mask=mask[:, None] & inside[None, :], other=0)
        return value.to(tl.float32)
    else:
        value = tl.load(params + (offsets + rows), mask=mask & inside, other=0)
        return value.to(tl.float32)[:, None]


@triton.constexpr_function
def same_group(slot, KIND, GROUP, J):
    """Whether all of this slot's columns lie in the group of the slot before."""
    if slot == 0 or GROUP == 0:
        return GROUP == 0
    elif KIND == "sparse":
        return GROUP % 128 == 0 and (slot % 4 != 0 or (slot // 4 * 128) % GROUP != 0)
    else:
        return GROUP % J == 0 and (slot * J) % GROUP != 0


@triton.jit
def group_scale(
    scales, zeros, first, lanes, rows, row_ok, n_groups, N, slot: tl.constexpr,
    KIND: tl.constexpr, MID: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    J: tl.constexpr,
):  # fmt: skip
    """s and o of a tile: [BLOCK_N, 1], or [BLOCK_N, J] where groups do not fit the tile."""
    group = group_columns(first, slot, lanes, KIND, GROUP, J)
    s = group_param(scales, group, rows, row_ok, n_groups, N)
    if ZERO == "none":
        return s, s * 0
    else:
        zero = group_param(zeros, group, rows, row_ok, n_groups, N)
        if ZERO == "float":
            return s, zero
        else:
            return s, (MID - zero) * s


@triton.jit
def round_even(x):
    """To the nearest integer, ties to even, int32, for |x| < 2^22.

    Adding 1.5 * 2^23 rounds, and leaves the integer in the low bits of the mantissa.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
