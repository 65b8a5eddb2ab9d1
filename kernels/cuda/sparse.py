"""Device functions of 2:4 weights: the kept codes of a lane, spread over its 8 columns.

A lane (layout.py) holds 4 kept codes in 16 bits and which columns they are of in 8: a nibble for
each block of 4 columns, the number of its pattern. A pruned code is 8, which is 0.
"""

import triton
import triton.language as tl

from kernels.cuda.layout import PATTERNS


@triton.constexpr_function
def shifts(which):
    """The column of kept code `which` of pattern i, in bits 2 i and 2 i + 1."""
    return sum(pattern[which] << 2 * i for i, pattern in enumerate(PATTERNS))


@triton.jit
def placed(kept, patterns, block: tl.constexpr, which: tl.constexpr):
    """Kept code `which` of a block, at the place of its column among 8 codes of 4 bits."""
    columns: tl.constexpr = shifts(which)
    column = (columns >> (2 * ((patterns >> (4 * block)) & 7))) & 3
    return ((kept >> (8 * which + 4 * block)) & 15) << (4 * column + 16 * block)


@triton.jit
def sparse_codes(codes, patterns):
    """The 8 codes of a lane, 4 bits each like those of other lanes. int32."""
    kept, where = codes.to(tl.int32) ^ 0x8888, patterns.to(tl.int32)
    first = placed(kept, where, 0, 0) ^ placed(kept, where, 0, 1)
    second = placed(kept, where, 1, 0) ^ placed(kept, where, 1, 1)
    return first ^ second ^ -2004318072  # 8 where nothing is


@triton.constexpr_function
def sparse_asm(block, dtype):
    """PTX: columns 0 to 3 of a block of 4 lanes, as floats plus 128 (fp16: 1024).

    $0 to $7: two lanes each, column by column. $8, $9: codes of two lanes; $10: patterns of four.
    One `prmt` makes two floats: it puts together kept codes, or the 8 of pruned ones, and the byte
    of the exponent. Which of them another `prmt` has looked up, for four lanes at a time, in the
    pattern's row of a table. A byte there has the choice for the low byte of a float in its lower
    half and for the high one in its upper half: of an even lane's kept codes 0 and 1, of an odd
    lane's 2 and 3; of a table of constants 4 to 7.
    """
    high = 0x43 if dtype == tl.bfloat16 else 0x64
    mask = 0x0F0F0F0F
    lines = [".reg .b32 s, t, k0, k1, c;", f"mov.b32 c, {(high | 8 << 8) * 0x10001};"]
    for out, source in (("k0", "$8"), ("k1", "$9"), ("s", "$10")):
        if block:
            lines.append(f"shr.b32 {out}, {source}, 4;")
        lines.append(f"and.b32 {out}, {out if block else source}, {mask};")
    # four nibbles out of four bytes
    lines += ["shr.b32 t, s, 4;", "or.b32 s, s, t;", "prmt.b32 s, s, s, 0x0020;"]
    for column in range(4):
        row = [p.index(column) if column in p else 5 for p in PATTERNS] + [5, 5]
        low, upper = (
            sum((0x40 | r) << 8 * i for i, r in enumerate(row[j : j + 4])) for j in (0, 4)
        )
        lines.append(f"prmt.b32 t, {low}, {upper}, s;")
        lines.append(f"add.u32 t, t, {0x22002200};")  # the odd lanes'
        lines.append(f"prmt.b32 ${2 * column}, k0, c, t;")
        lines.append("shr.b32 t, t, 16;")
        lines.append(f"prmt.b32 ${2 * column + 1}, k1, c, t;")
    return "{ " + " ".join(lines) + " }"


@triton.jit
def sparse_block(codes, patterns, block: tl.constexpr, dtype: tl.constexpr):
    """Four tiles: the columns of a block in every lane, exact, plus `tiles.pair_base`."""
    asm: tl.constexpr = sparse_asm(block, dtype)
    # as bits: a tuple of types cannot have a type that is an argument
    a, b, c, d = tl.inline_asm_elementwise(
        asm, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r", [codes, patterns],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=4,
    )  # fmt: skip
    a, b = a.to(dtype, bitcast=True), b.to(dtype, bitcast=True)
    return a, b, c.to(dtype, bitcast=True), d.to(dtype, bitcast=True)
