"""The kernels of the linear layer: y[m, n] = sum_k x[m, k] w[n, k], one template for all formats.

    matmul       products on the tensor cores, the weight as the left operand, so that up to 8 rows
                 of x make a tile of 8 columns: one row costs what eight do, and the memory less
    dequantize   the whole weight, for the library's product of very many rows

`split` says which part of the columns a program adds up. With one part the program finishes the
result: times the scale of the weight's row, times the scale of x's row, plus the bias. With more
each leaves fp32 (or int32) sums, and the one that comes last adds them up in a fixed order: the
same input gives the same bits. What the tiles hold is said in tiles.py.
"""

import triton
import triton.language as tl

from kernels.cuda.common import dot, operand, round_even, wait_for_others
from kernels.cuda.epilogue import finish, gate, join_splits, mean_root, store_tile
from kernels.cuda.lookup import looked_up, table_words
from kernels.cuda.pairs import code_pairs, code_quads, lane_words, pair_base, scaled_pairs
from kernels.cuda.tiles import (
    group_ends,
    group_offset,
    group_scale,
    load_lanes,
    prefetch,
    same_group,
    value_of,
)


@triton.jit
def code_tile(
    fours, twos, ones, table, slot: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    EXPONENT: tl.constexpr, MID: tl.constexpr, PAIRS: tl.constexpr, dtype: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Values c of a tile as x's type; those of PAIRS plus `pair_base`."""
    if PAIRS:
        return code_pairs(fours, twos, ones, slot, KIND, BITS, EXPONENT, dtype, INTERPRET)
    else:
        c = value_of(fours, twos, ones, table, slot, KIND, BITS, EXPONENT, MID)
        return operand(c, dtype, INTERPRET)


@triton.jit
def scaled_value(
    fours, twos, ones, table, s, zero, slot: tl.constexpr, KIND: tl.constexpr,
    BITS: tl.constexpr, EXPONENT: tl.constexpr, MID: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Weights of a tile, without the scale of their row; fp32 where groups have scales s.

    INNER: the group's scale takes an integer to an int8 number (w4a8.py), rounded to even.
    """
    c = value_of(fours, twos, ones, table, slot, KIND, BITS, EXPONENT, MID)
    if GROUP == 0:
        return c
    else:
        w = c.to(tl.float32) * s
        if INNER:
            return round_even(w)
        elif ZERO == "none":
            return w
        else:
            return w + group_offset(s, zero, MID, ZERO)


@triton.jit
def weight_tile(
    fours, twos, ones, table, s, zero, slot: tl.constexpr, KIND: tl.constexpr,
    BITS: tl.constexpr, EXPONENT: tl.constexpr, MID: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, INNER: tl.constexpr, PAIRS: tl.constexpr, dtype: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """`scaled_value` as x's type, by the packed ways where there is one."""
    if PAIRS and dtype == tl.int8:
        return code_quads(fours, s, slot, GROUP, INTERPRET)
    elif PAIRS and GROUP == 0:
        return code_pairs(fours, twos, ones, slot, KIND, BITS, EXPONENT, dtype, INTERPRET)
    elif PAIRS:
        return scaled_pairs(fours, twos, ones, s, zero, slot, BITS, MID, ZERO, INTERPRET)
    else:
        w = scaled_value(
            fours, twos, ones, table, s, zero, slot, KIND, BITS, EXPONENT, MID, ZERO, GROUP, INNER
        )
        return operand(w, dtype, INTERPRET)


@triton.constexpr_function
def ones_asm(dtype):
    """PTX: two ones, whatever $1 is."""
    return f"mov.b32 $0, {0x3F803F80 if dtype == tl.bfloat16 else 0x3C003C00};"


@triton.jit
def units_like(units, lanes, INTERPRET: tl.constexpr):
    """The ones in `units`, if `lanes` has a plane of bytes behind it as if they came from there.

    The compiler lays out a left operand by the narrowest load behind it. With another layout for
    the ones x would have two, and then it is not loaded ahead.
    """
    if INTERPRET or lanes is None or units.dtype == tl.float32:
        return units
    else:
        asm: tl.constexpr = ones_asm(units.dtype)
        return tl.inline_asm_elementwise(
            asm, "=r,r", [lanes.to(tl.int16)], dtype=units.dtype, is_pure=True, pack=2
        )


@triton.jit
def weight_rows(N, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """The weight's rows that this program takes; instead of those behind the last, the last.

    GATED: neighbours are a gate and what it gates, N / 2 rows further on.
    """
    n = tl.arange(0, BLOCK_N)
    if GATED:
        pair = tl.program_id(1) * (BLOCK_N // 2) + n // 2
        return tl.minimum(pair, N // 2 - 1) + (n % 2) * (N // 2)
    else:
        return tl.minimum(tl.program_id(1) * BLOCK_N + n, N - 1)


@triton.jit
def x_tile(pointers, columns, m_ok, K, EVEN: tl.constexpr):
    """Columns [J] of the rows of x, [J, BLOCK_M]."""
    mask = m_ok[None, :]
    if not EVEN:
        mask = mask & (columns < K)[:, None]
    return tl.load(pointers, mask=mask, other=0)


@triton.jit
def add_group(
    acc, part, total, s, zero, MID: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    CENTRE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """acc plus a group's: `part` sums codes, which are CENTRE too large, `total` sums x."""
    if GROUP == 0:
        return acc + (part - total * CENTRE)
    elif not SUMS:
        return acc + part * s
    elif ZERO == "float":
        acc += part * s
        return acc + total * (zero - CENTRE * s)
    else:
        base = CENTRE if ZERO == "none" else zero + (CENTRE - MID)
        return acc + (part - total * base) * s


@triton.jit
def matmul(
    x, fours, twos, ones, scales, row_scales, table, x_scale, bias, out, sums, arrived,
    squares, residual, out_squares, factor, weighted, eps,
    M, N, K, width, n_chunks, chunks_per_split, n_lines,
    KIND: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, MID: tl.constexpr,
    ZERO: tl.constexpr, GROUP: tl.constexpr, INNER: tl.constexpr, SLOTS: tl.constexpr,
    J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr, LATE: tl.constexpr, PAIRS: tl.constexpr, INTEGER: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> out [M, N]. `width`: elements of storage in a row.

    Grid (tiles of M, tiles of N, SPLITS). With several: scratch `sums` [tiles, SPLITS, BLOCK_M,
    BLOCK_N], and `arrived`, int32 zeros, one a tile, zeros again at the end.
    EVEN: no chunk ends behind the last column.
    LATE: a group's scale meets its sums, not every weight, so that the operands are exact.
    PAIRS: codes come by `code_pairs`, those whose scale is not LATE by `scaled_pairs`, those that
    meet an int8 x by `code_quads`, tables by byte permutations. The sums of x that bases
    and zeros ask for are a product with ones.
    What a Transformer does in between, where it is given: `squares` [M, PARTS], the result over the
    rms of the x that they are of; GATED, half the rows are gates and out [M, N / 2] is silu(gate)
    * up; `residual` [M, N] is added, and the squares of the result are summed up in `out_squares`
    [M, tiles]; out times `factor` [N] also goes to `weighted`, rounded.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    near = weight_rows(N, BLOCK_N, GATED)
    m_ok = m < M
    begin = split * chunks_per_split
    if PDL:  # weights are there already: they are on their way while the kernel in front ends
        line, left = near.to(tl.int64) * width + begin * J, width - begin * J
        prefetch(fours, line, left, J, STAGES)
        prefetch(twos, line, left, J, STAGES)
        prefetch(ones, line, left, J, STAGES)
    wait_for_others(PDL)
    lanes = tl.arange(0, J)
    start = (near.to(tl.int64) * width)[:, None] + lanes[None, :]
    x_start = x + ((m.to(tl.int64) * K)[None, :] + lanes[:, None])
    BASE: tl.constexpr = pair_base(KIND, x.dtype.element_ty) if PAIRS else 0
    CENTRE: tl.constexpr = BASE + MID if BASE != 0 else 0
    SUMS: tl.constexpr = LATE and (BASE != 0 or ZERO != "none")
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if INTEGER else tl.float32)
    units = tl.full([BLOCK_N, J], 1.0, tl.float32).to(x.dtype.element_ty)
    LOOKED_UP: tl.constexpr = KIND == "table" and PAIRS and not INTERPRET
    CODED: tl.constexpr = PAIRS and KIND != "table"
    if LOOKED_UP:
        words = table_words(table, x.dtype.element_ty)
    for chunk in tl.range(begin, tl.minimum(begin + chunks_per_split, n_chunks), num_stages=STAGES):
        mask = None if EVEN or SLOTS > 1 else (chunk * J + lanes < width)[None, :]
        a = load_lanes(fours, start + chunk * J, mask)
        b = load_lanes(twos, start + chunk * J, mask)
        c = load_lanes(ones, start + chunk * J, mask)
        first = chunk * (SLOTS * J)
        s, zero = 0.0, 0.0
        part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for slot in tl.static_range(SLOTS):
            k = first + slot * J
            xk = x_tile(x_start + k, k + lanes, m_ok, K, EVEN)
            if GROUP != 0 and not same_group(slot, GROUP, J):
                s, zero = group_scale(
                    scales, first, lanes, near, n_lines, N, slot, ZERO, GROUP, INNER, J
                )
            if LOOKED_UP and slot % 4 == 0:
                half = lane_words(a, b, c, BITS)[slot // 4]
                w0, w1, w2, w3 = looked_up(half, words, xk.dtype)
            if LOOKED_UP:
                w, w0, w1, w2 = w0, w1, w2, w3
                if not LATE and GROUP != 0:
                    w = (w - CENTRE) * s.to(xk.dtype)
            elif LATE:
                w = code_tile(
                    a, b, c, table, slot, KIND, BITS, EXPONENT, MID, CODED, xk.dtype, INTERPRET
                )
            else:
                w = weight_tile(
                    a, b, c, table, s, zero, slot, KIND, BITS, EXPONENT, MID, ZERO, GROUP, INNER,
                    CODED, xk.dtype, INTERPRET,
                )  # fmt: skip
            if LATE:
                part = dot(w, xk, part, False, INTERPRET)
                if SUMS:
                    total = dot(units_like(units, c, INTERPRET), xk, total, False, INTERPRET)
                if group_ends(slot, SLOTS, GROUP, J):
                    acc = add_group(acc, part, total, s, zero, MID, ZERO, GROUP, CENTRE, SUMS)
                    part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            else:
                acc = dot(w, xk, acc, INTEGER, INTERPRET)
    if SPLITS > 1:
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        inner = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        scratch = sums + tile.to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_N) + inner
        tl.store(scratch + split * (BLOCK_M * BLOCK_N), acc, mask=m_ok[None, :])
        tl.debug_barrier()  # the atomic is of one thread: only then all have stored
        if tl.atomic_add(arrived + tile, 1) < SPLITS - 1:
            return
        acc = join_splits(scratch, m_ok, tl.zeros_like(acc), BLOCK_N, BLOCK_M, SPLITS)
        tl.store(arrived + tile, 0)
    y = acc.to(tl.float32)
    if squares is not None:
        y *= mean_root(squares, m, m_ok, K, eps, PARTS, PARTS_BLOCK)[None, :]
    y = finish(y, row_scales, x_scale, bias, near, m, m_ok)
    if GATED:
        y, N = gate(y, BLOCK_N, BLOCK_M), N // 2
    store_tile(y, out, residual, out_squares, factor, weighted, m, m_ok, N)


@triton.jit
def dequantize(
    fours, twos, ones, scales, row_scales, table, out,
    N, K, width, n_lines,
    KIND: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, MID: tl.constexpr,
    ZERO: tl.constexpr, GROUP: tl.constexpr, INNER: tl.constexpr, SLOTS: tl.constexpr,
    J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The weight [N, K] in the type of `out`, times the scale of its row where there is one."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    near = tl.minimum(rows, N - 1)
    lanes = tl.arange(0, J)
    chunk = tl.program_id(1)
    column = chunk * J + lanes
    offsets = near.to(tl.int64)[:, None] * width + column[None, :]
    mask = (column < width)[None, :]
    a = load_lanes(fours, offsets, mask)
    b = load_lanes(twos, offsets, mask)
    c = load_lanes(ones, offsets, mask)
    first = chunk * (SLOTS * J)
    s, zero = 0.0, 0.0
    for slot in tl.static_range(SLOTS):
        if GROUP != 0 and not same_group(slot, GROUP, J):
            s, zero = group_scale(
                scales, first, lanes, near, n_lines, N, slot, ZERO, GROUP, INNER, J
            )
        w = scaled_value(
            a, b, c, table, s, zero, slot, KIND, BITS, EXPONENT, MID, ZERO, GROUP, INNER
        )  # fmt: skip
        if row_scales is not None:
            w = w.to(tl.float32) * tl.load(row_scales + near).to(tl.float32)[:, None]
        k = first + slot * J + lanes
        pointers = out + rows.to(tl.int64)[:, None] * K + k[None, :]
        inside = (rows < N)[:, None] & (k < K)[None, :]
        tl.store(pointers, w.to(out.dtype.element_ty), mask=inside)
