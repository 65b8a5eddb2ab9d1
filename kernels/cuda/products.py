"""The kernels of the linear layer: y[m, n] = sum_k x[m, k] w[n, k], one template for all formats.

    matvec       one row of x: products in fp32 (int8 x: int32) on the plain arithmetic units
    matmul       more rows: products on the tensor cores, the weight as the left operand, so that
                 16 rows of x make a tile of no more than 16 columns
    reduce       adds the parts of a product whose columns were split, in a fixed order
    dequantize   the whole weight, for the library's product of very many rows

`split` says which part of the columns a program adds up. With one part the program finishes the
result: times the scale of the weight's row, times the scale of x's row, plus the bias. With more it
writes fp32 (or int32) sums [splits, M, N], which `reduce` finishes. No atomics: the same input
gives the same bits. What the tiles hold is said in tiles.py.
"""

import triton
import triton.language as tl

from kernels.cuda.tiles import (
    group_scale,
    load_lanes,
    nibble_base,
    nibble_plus,
    round_even,
    same_group,
    value_of,
)


@triton.jit
def centred(
    fours, twos, ones, table, slot: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    EXPONENT: tl.constexpr, MID: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Values c of a tile; 4-bit integers come as fp32, exact."""
    if KIND == "integer" and BITS == 4:
        return nibble_plus(fours, slot, INTERPRET) - (nibble_base(slot) + MID)
    else:
        return value_of(fours, twos, ones, table, slot, KIND, BITS, EXPONENT, MID)


@triton.jit
def weight_tile(
    fours, twos, ones, table, s, o, slot: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    EXPONENT: tl.constexpr, MID: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    INNER: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Weights of a tile, without the scale of their row; fp32 where groups have scales s.

    INNER: the group's scale takes an integer to an int8 number (w4a8.py), rounded to even.
    """
    if GROUP == 0:
        return centred(fours, twos, ones, table, slot, KIND, BITS, EXPONENT, MID, INTERPRET)
    elif KIND == "integer" and BITS == 4 and not INNER:  # c s + o in one fused operation
        nibble = nibble_plus(fours, slot, INTERPRET)
        return nibble * s + (o - (nibble_base(slot) + MID) * s)
    else:
        c = centred(fours, twos, ones, table, slot, KIND, BITS, EXPONENT, MID, INTERPRET)
        w = c.to(tl.float32) * s
        if INNER:
            return round_even(w)
        elif ZERO == "none":
            return w
        else:
            return w + o


@triton.jit
def finish(y, row_scales, x_scale, bias, rows, row_ok, m, m_ok):
    """Scales and bias of sums y [BLOCK_N, BLOCK_M] -> fp32."""
    y = y.to(tl.float32)
    if x_scale is not None:
        y *= tl.load(x_scale + m, mask=m_ok, other=0).to(tl.float32)[None, :]
    if row_scales is not None:
        y *= tl.load(row_scales + rows, mask=row_ok, other=0).to(tl.float32)[:, None]
    if bias is not None:
        y += tl.load(bias + rows, mask=row_ok, other=0).to(tl.float32)[:, None]
    return y


@triton.jit
def matvec(
    x, fours, twos, ones, scales, zeros, row_scales, table, x_scale, bias, out,
    N, K, width, n_chunks, chunks_per_split, n_groups,
    KIND: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, MID: tl.constexpr,
    ZERO: tl.constexpr, GROUP: tl.constexpr, INNER: tl.constexpr, SLOTS: tl.constexpr,
    J: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, INTEGER: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """x [K] -> out [N], or, not WHOLE, sums [splits, N]. `width`: elements of storage in a row."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    lanes = tl.arange(0, J)
    start = rows.to(tl.int64)[:, None] * width
    acc = tl.zeros([BLOCK_N, J], tl.int32 if INTEGER else tl.float32)
    end = tl.minimum((split + 1) * chunks_per_split, n_chunks)
    for chunk in range(split * chunks_per_split, end):
        column = chunk * J + lanes
        mask = row_ok[:, None] & (column < width)[None, :]
        a = load_lanes(fours, start + column[None, :], mask)
        b = load_lanes(twos, start + column[None, :], mask)
        c = load_lanes(ones, start + column[None, :], mask)
        first = chunk * (SLOTS * J)
        s, o = 0.0, 0.0
        for slot in tl.static_range(SLOTS):
            k = first + slot * J + lanes
            if not same_group(slot, KIND, GROUP, J):
                s, o = group_scale(
                    scales, zeros, first, lanes, rows, row_ok, n_groups, N, slot,
                    KIND, MID, ZERO, GROUP, J,
                )  # fmt: skip
            w = weight_tile(
                a, b, c, table, s, o, slot, KIND, BITS, EXPONENT, MID, ZERO, GROUP, INNER,
                INTERPRET,
            )  # fmt: skip
            xk = tl.load(x + k, mask=k < K, other=0)
            if INTEGER:
                acc += w.to(tl.int32) * xk.to(tl.int32)[None, :]
            else:
                acc += w.to(tl.float32) * xk.to(tl.float32)[None, :]
    y = tl.sum(acc, axis=1)[:, None]  # [BLOCK_N, 1]
    m = tl.zeros([1], tl.int32)
    pointers = out + split.to(tl.int64) * N + rows[:, None] + m[None, :]
    if WHOLE:
        y = finish(y, row_scales, x_scale, bias, rows, row_ok, m, m == 0)
    tl.store(pointers, y.to(out.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def dot(a, b, acc, INTEGER: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a b. The interpreter is silently wrong on bf16, so there the operands become fp32."""
    if INTEGER:
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    elif INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def operand(w, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """w as x's type. The interpreter misreads int8 made bf16 at once."""
    if INTERPRET and dtype.is_floating():
        return w.to(tl.float32).to(dtype)
    else:
        return w.to(dtype)


@triton.jit
def matmul(
    x, fours, twos, ones, scales, zeros, row_scales, table, x_scale, bias, out,
    M, N, K, width, n_chunks, chunks_per_split, n_groups,
    KIND: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, MID: tl.constexpr,
    ZERO: tl.constexpr, GROUP: tl.constexpr, INNER: tl.constexpr, SLOTS: tl.constexpr,
    J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr,
    LATE: tl.constexpr, INTEGER: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> out [M, N], or, not WHOLE, sums [splits, M, N].

    LATE: a group's scale meets the sums, not every weight, so that the operands are exact.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    m_ok, row_ok = m < M, rows < N
    lanes = tl.arange(0, J)
    start = rows.to(tl.int64)[:, None] * width
    x_rows = x + m.to(tl.int64)[None, :] * K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if INTEGER else tl.float32)
    end = tl.minimum((split + 1) * chunks_per_split, n_chunks)
    for chunk in range(split * chunks_per_split, end):
        column = chunk * J + lanes
        mask = row_ok[:, None] & (column < width)[None, :]
        a = load_lanes(fours, start + column[None, :], mask)
        b = load_lanes(twos, start + column[None, :], mask)
        c = load_lanes(ones, start + column[None, :], mask)
        first = chunk * (SLOTS * J)
        s, o = 0.0, 0.0
        for slot in tl.static_range(SLOTS):
            k = first + slot * J + lanes
            if not same_group(slot, KIND, GROUP, J):
                s, o = group_scale(
                    scales, zeros, first, lanes, rows, row_ok, n_groups, N, slot,
                    KIND, MID, ZERO, GROUP, J,
                )  # fmt: skip
            xk = tl.load(x_rows + k[:, None], mask=(k < K)[:, None] & m_ok[None, :], other=0)
            if LATE:
                w = centred(a, b, c, table, slot, KIND, BITS, EXPONENT, MID, INTERPRET)
                w = operand(w, xk.dtype, INTERPRET)
                none = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                acc += dot(w, xk, none, INTEGER, INTERPRET) * s
            else:
                w = weight_tile(
                    a, b, c, table, s, o, slot, KIND, BITS, EXPONENT, MID, ZERO, GROUP, INNER,
                    INTERPRET,
                )  # fmt: skip
                acc = dot(operand(w, xk.dtype, INTERPRET), xk, acc, INTEGER, INTERPRET)
    if WHOLE:
        acc = finish(acc, row_scales, x_scale, bias, rows, row_ok, m, m_ok)
    line = split.to(tl.int64) * M + m
    pointers = out + line[None, :] * N + rows[:, None]
    mask = row_ok[:, None] & m_ok[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def reduce(
    sums, row_scales, x_scale, bias, out, M, N,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums [SPLITS, M, N] fp32 or int32 -> out [M, N]."""
    m = tl.program_id(1) + tl.zeros([1], tl.int32)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    line = m.to(tl.int64)[None, :] * N + rows[:, None]  # [BLOCK_N, 1]
    y = tl.load(sums + line, mask=row_ok[:, None], other=0)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(sums + (split * M * N + line), mask=row_ok[:, None], other=0)
    y = finish(y, row_scales, x_scale, bias, rows, row_ok, m, m < M)
    tl.store(out + line, y.to(out.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def dequantize(
    fours, twos, ones, scales, zeros, row_scales, table, out,
    N, K, width, n_groups,
    KIND: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, MID: tl.constexpr,
    ZERO: tl.constexpr, GROUP: tl.constexpr, INNER: tl.constexpr, SLOTS: tl.constexpr,
    J: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The weight [N, K] in the type of `out`, times the scale of its row where there is one."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    lanes = tl.arange(0, J)
    chunk = tl.program_id(1)
    column = chunk * J + lanes
    offsets = rows.to(tl.int64)[:, None] * width + column[None, :]
    mask = row_ok[:, None] & (column < width)[None, :]
    a = load_lanes(fours, offsets, mask)
    b = load_lanes(twos, offsets, mask)
    c = load_lanes(ones, offsets, mask)
    first = chunk * (SLOTS * J)
    s, o = 0.0, 0.0
    for slot in tl.static_range(SLOTS):
        if not same_group(slot, KIND, GROUP, J):
            s, o = group_scale(
                scales, zeros, first, lanes, rows, row_ok, n_groups, N, slot,
                KIND, MID, ZERO, GROUP, J,
            )  # fmt: skip
        w = weight_tile(
            a, b, c, table, s, o, slot, KIND, BITS, EXPONENT, MID, ZERO, GROUP, INNER,
            INTERPRET,
        )  # fmt: skip
        if row_scales is not None:
            row_s = tl.load(row_scales + rows, mask=row_ok, other=0).to(tl.float32)
            w = w.to(tl.float32) * row_s[:, None]
        if KIND == "sparse":  # back from the lanes' order to that of the columns
            k = first + (slot // 4) * 128 + lanes * 4 + slot % 4
        else:
            k = first + slot * J + lanes
        pointers = out + rows.to(tl.int64)[:, None] * K + k[None, :]
        inside = row_ok[:, None] & (k < K)[None, :]
        tl.store(pointers, w.to(out.dtype.element_ty), mask=inside)
