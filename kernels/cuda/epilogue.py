"""Device functions: from the sums of a product to its result."""

import triton
import triton.language as tl


@triton.jit
def mean_root(squares, m, m_ok, K, eps, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr):
    """1 / rms of rows of x, [BLOCK_M], from the sums of squares of their parts [M, PARTS]."""
    part = tl.arange(0, PARTS_BLOCK)
    mask = m_ok[:, None] & (part < PARTS)[None, :]
    each = tl.load(squares + (m[:, None] * PARTS + part[None, :]), mask=mask, other=0)
    return tl.rsqrt(tl.sum(each, axis=1) / K + eps)


@triton.jit
def gate(y, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """silu(gate) * up of rows gate, up, gate, up, ...: [BLOCK_N, BLOCK_M] -> half as many rows."""
    pairs = tl.permute(tl.reshape(y, [BLOCK_N // 2, 2, BLOCK_M]), (0, 2, 1))
    a, b = tl.split(pairs)
    return a / (1 + tl.exp(-a)) * b


@triton.jit
def finish(y, row_scales, x_scale, bias, near, m, m_ok):
    """Scales and bias of sums y [BLOCK_N, BLOCK_M] -> fp32."""
    y = y.to(tl.float32)
    if x_scale is not None:
        y *= tl.load(x_scale + m, mask=m_ok, other=0).to(tl.float32)[None, :]
    if row_scales is not None:
        y *= tl.load(row_scales + near).to(tl.float32)[:, None]
    if bias is not None:
        y += tl.load(bias + near).to(tl.float32)[:, None]
    return y


@triton.jit
def join_splits(
    scratch, m_ok, acc, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr
):
    """acc plus the sums of all splits, in order. Other programs wrote them: past the L1 cache.

    Small tiles are asked for all at once; large ones would not fit the registers.
    """
    if BLOCK_M <= 16:
        for i in tl.static_range(SPLITS):
            part = scratch + i * (BLOCK_M * BLOCK_N)
            acc += tl.load(part, mask=m_ok[None, :], other=0, cache_modifier=".cg")
    else:
        for i in range(SPLITS):
            part = scratch + i * (BLOCK_M * BLOCK_N)
            acc += tl.load(part, mask=m_ok[None, :], other=0, cache_modifier=".cg")
    return acc


@triton.jit
def store_tile(y, out, residual, out_squares, factor, weighted, m, m_ok, N):
    """y [BLOCK_N, BLOCK_M] fp32, plus the residual, to out [M, N]; its squares' sums, by tile.

    And to `weighted` [M, N] that times `factor` [N].
    """
    n = tl.program_id(1) * y.shape[0] + tl.arange(0, y.shape[0])
    place = (m.to(tl.int64) * N)[None, :] + n[:, None]
    mask = (n < N)[:, None] & m_ok[None, :]
    if residual is not None:
        y += tl.load(residual + place, mask=mask, other=0).to(tl.float32)
    stored = y.to(out.dtype.element_ty)
    tl.store(out + place, stored, mask=mask)
    y = tl.where(mask, stored.to(tl.float32), 0.0)
    if weighted is not None:
        by = tl.load(factor + tl.minimum(n, N - 1)).to(tl.float32)[:, None]
        tl.store(weighted + place, (y * by).to(out.dtype.element_ty), mask=mask)
    if out_squares is not None:
        total = tl.sum(y * y, axis=0)
        tl.store(out_squares + m * tl.num_programs(1) + tl.program_id(1), total, mask=m_ok)
