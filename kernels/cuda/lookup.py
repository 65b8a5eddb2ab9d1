"""Device functions of 4-bit codes that are indices into a table of 16 values.

The table lies in eight registers, low and high bytes of the values apart, four in each: a `prmt`
looks up four bytes at a time among eight values.
"""

import triton
import triton.language as tl


@triton.jit
def table_bytes(table, first: tl.constexpr, high: tl.constexpr, dtype: tl.constexpr):
    """The low or high bytes of values `first` to first + 3 in bf16 or fp16, one word, [1, 1].

    Loaded as a tensor, not a number: the compiler moves a change of layout back to loads, where it
    costs nothing, but not past a number that has to be spread over a tile.
    """
    word = tl.zeros([1, 1], tl.int32)
    for i in tl.static_range(4):
        value = tl.load(table + (first + i) + tl.zeros([1, 1], tl.int32))
        bits = value.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
        word |= ((bits >> (8 * high)) & 255) << (8 * i)
    return word


@triton.jit
def table_words(table, dtype: tl.constexpr):
    """The table [16] fp32 as `looked_up` takes it."""
    a, b = table_bytes(table, 0, 0, dtype), table_bytes(table, 4, 0, dtype)
    c, d = table_bytes(table, 8, 0, dtype), table_bytes(table, 12, 0, dtype)
    e, f = table_bytes(table, 0, 1, dtype), table_bytes(table, 4, 1, dtype)
    g, h = table_bytes(table, 8, 1, dtype), table_bytes(table, 12, 1, dtype)
    return a, b, c, d, e, f, g, h


@triton.constexpr_function
def lookup_asm():
    """PTX: $0 to $3, the values of codes 0 to 3 of two neighbouring lanes, whose halves are in $4.

    $5, $7, ... $19: the words of the table. First codes 0 and 2, then 1 and 3: their low three bits
    are a selector, and bytes of their highest bits say which half of the table is right.
    """
    lines = [".reg .b32 u, s, t, m, x, y, a, b;", f"and.b32 u, $4, {0x77777777};"]
    for odd in (0, 1):
        lines.append(f"shr.b32 t, u, {16 if odd else 12};")
        lines.append("shr.b32 s, u, 4;" if odd else "mov.b32 s, u;")
        lines.append(f"lop3.b32 s, s, t, {0x0F0F}, 0xE4;")  # 0x0F0F ? s : t
        lines.append("mov.b32 m, $4;" if odd else "shl.b32 m, $4, 4;")
        lines.append("prmt.b32 m, m, m, 0xB9A8;")
        for out, first in (("x", 5), ("y", 13)):  # low bytes, high bytes
            lines.append(f"prmt.b32 a, ${first}, ${first + 2}, s;")
            lines.append(f"prmt.b32 b, ${first + 4}, ${first + 6}, s;")
            lines.append(f"lop3.b32 {out}, m, b, a, 0xCA;")  # m ? b : a
        lines += [f"prmt.b32 ${odd}, x, y, 0x5140;", f"prmt.b32 ${odd + 2}, x, y, 0x7362;"]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def looked_up(half, words, dtype: tl.constexpr):
    """Four tiles: the values of codes 0 to 3 of the half lanes, as bf16 or fp16."""
    asm: tl.constexpr = lookup_asm()
    # as bits: a tuple of types cannot have a type that is an argument
    a, b, c, d = tl.inline_asm_elementwise(
        asm, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [half, words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
    )  # fmt: skip
    a, b = a.to(dtype, bitcast=True), b.to(dtype, bitcast=True)
    return a, b, c.to(dtype, bitcast=True), d.to(dtype, bitcast=True)
