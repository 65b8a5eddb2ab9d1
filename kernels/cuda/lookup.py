"""Device functions of 4-bit codes that are indices into a table of 16 values.

The table lies in eight registers, low and high bytes of the values apart, four in each: a `prmt`
looks up four bytes at a time among eight values.
"""

import triton
import triton.language as tl


@triton.jit
def table_bytes(table, first: tl.constexpr, high: tl.constexpr, dtype: tl.constexpr):
    """The low or high bytes of values `first` to first + 3 in bf16 or fp16, one word."""
    word = 0
    for i in tl.static_range(4):
        value = tl.load(table + first + i).to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
        word |= ((value >> (8 * high)) & 255) << (8 * i)
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
def lookup_asm(slot):
    """PTX: $0, $1 the values of four neighbouring codes; $2, $3 their half planes (tiles.py).

    $4, $8, ... $32: the words of the table.
    """
    at = 4 * (slot % 4)
    lines = [".reg .b32 u, t, s, m, x, y, a, b;"]

    def shifted(out: str, source: str, by: int) -> None:  # to the right
        lines.append(f"sh{'r' if by >= 0 else 'l'}.b32 {out}, {source}, {abs(by)};")

    # the codes in the upper halves of bytes: 0, 2, 1, 3
    shifted("u", "$2", at - 4)
    shifted("t", "$3", at - 12)
    lines += [f"and.b32 u, u, {0x00F000F0};", f"lop3.b32 u, t, {0xF000F000}, u, 0xEA;"]
    # their low three bits as a selector, 0, 1, 2, 3; and bytes of their highest bit
    shifted("s", "u", 4)
    shifted("t", "u", 16)
    lines += [f"lop3.b32 s, s, t, {0x7777}, 0xA8;", "prmt.b32 m, u, u, 0xB9A8;"]
    for out, first in (("x", 4), ("y", 20)):  # low bytes, high bytes
        lines.append(f"prmt.b32 a, ${first}, ${first + 4}, s;")
        lines.append(f"prmt.b32 b, ${first + 8}, ${first + 12}, s;")
        lines.append(f"lop3.b32 {out}, m, b, a, 0xCA;")  # m ? b : a
    lines += ["prmt.b32 $0, x, y, 0x5140;", "prmt.b32 $1, x, y, 0x7362;"]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def looked_up(half, words, slot: tl.constexpr, dtype: tl.constexpr):
    """The values of a slot's codes as bf16 or fp16."""
    asm: tl.constexpr = lookup_asm(slot)
    bits = tl.inline_asm_elementwise(
        asm, "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [half, words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]],
        dtype=tl.int16, is_pure=True, pack=4,
    )  # fmt: skip
    return bits.to(dtype, bitcast=True)
