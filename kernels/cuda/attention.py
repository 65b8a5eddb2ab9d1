"""Attention of new tokens over the filled part of a cache, split over its slots.

    out[b, h, t] = softmax(q[b, h, t] . k[b, h / (H / H_kv), 0 : start[b] + t + 1] / sqrt(D)) v

A program takes the rows (t, g) of one key-value head: T new tokens times the G query heads that
share it, so that K and V are read once for all of them. The blocks of filled slots are dealt out
evenly to `splits` programs, by `start`, which stays on the device; a program without a block exits
at once. Each leaves its softmax's maximum, sum and weighted values; the last to come joins them.
Source: flash-decoding (Dao et al. 2023), online softmax (arXiv 1805.02867).

An int8 cache has a scale per slot and head: the keys' scale meets the scores, the values' the
weights, so that both products run on the codes themselves.

With `fresh` q and the new tokens' keys and values come as the projection left them. The norms of
heads, if there are any, and the rotary embedding are then applied on the way, and programs write
the new slots that lie in their own blocks before they read them.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.choice import interpreting
from kernels.cuda.common import dot, operand, round_even, wait_for_others
from kernels.cuda.launch import Card, Launch, card

MAX_SPLITS = 64
JOINED = 512  # rows of all splits that one program joins, at most
PROGRAMS = 2  # wanted on each multiprocessor


class Fresh(NamedTuple):
    """New keys and values [B, H_kv, T, D], with q's strides, that are not in the cache yet, and
    what q and the keys still lack: RMSNorms over heads [D], or none; rotation by cos, sin
    [S, D / 2] fp32."""

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0


@triton.jit
def block_share(start, tile, T, GROUP: tl.constexpr, R: tl.constexpr, BLOCK_S: tl.constexpr,
                SPLITS: tl.constexpr):  # fmt: skip
    """Of a tile of rows: slots that its last row sees, blocks of them, blocks a split."""
    last = tl.minimum((tile + 1) * R - 1, T * GROUP - 1) // GROUP
    end = start + last + 1
    blocks = tl.cdiv(end, BLOCK_S)
    return end, blocks, tl.cdiv(blocks, SPLITS)


@triton.jit
def rotated(x, rows, norm, eps, angles, cos, sin, d, D, mask):
    """x at rows [R], normed if there is a norm [D], each rotated by its row of cos, sin [., D / 2]:
    [R, BLOCK_D], rounded once."""
    half = D // 2
    i = tl.where(d < half, d, d - half)
    other = tl.where(d < half, d + half, i)  # what it turns with, minus it in the first half
    at = (angles * half)[:, None] + i[None, :]
    a = tl.load(x + rows[:, None] + d[None, :], mask=mask, other=0).to(tl.float32)
    b = tl.load(x + rows[:, None] + other[None, :], mask=mask, other=0).to(tl.float32)
    if norm is not None:
        root = tl.rsqrt(tl.sum(a * a, axis=1) / D + eps)[:, None]
        a *= root * tl.load(norm + d, mask=d < D, other=0).to(tl.float32)[None, :]
        b *= root * tl.load(norm + other, mask=d < D, other=0).to(tl.float32)[None, :]
    s = tl.load(sin + at, mask=mask, other=0)
    y = a * tl.load(cos + at, mask=mask, other=0) + tl.where(d < half, -1.0, 1.0)[None, :] * b * s
    return y.to(x.dtype.element_ty)


@triton.jit
def store_slots(x, cache, scales, lines, d, D, ok, mask):
    """Rows x [R, BLOCK_D] into lines [R] of a cache; one with scales is int8."""
    if scales is not None:
        x = x.to(tl.float32)
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), axis=1), 127.0), 1e-5)
        scale = scale.to(scales.dtype.element_ty)
        tl.store(scales + lines, scale, mask=ok)
        x = round_even(tl.div_rn(x, tl.broadcast_to(scale.to(tl.float32)[:, None], x.shape)))
        x = tl.minimum(tl.maximum(x, -127), 127).to(tl.int8)
    tl.store(cache + lines[:, None] * D + d[None, :], x, mask=mask)


@triton.jit
def insert(
    new_k, new_v, k, v, k_scale, v_scale, norm, eps, cos, sin, at, stride, line, first, begin, stop,
    d, D, NEW: tl.constexpr,
):  # fmt: skip
    """Keys, normed and rotated, and values of up to NEW tokens into slots [begin, stop) of a cache.

    Token 0, at `at`, belongs to slot `first`; `line` is that of slot 0.
    """
    token = tl.arange(0, NEW)
    slot = first + token
    ok = (slot >= begin) & (slot < stop)
    mask = ok[:, None] & (d < D)[None, :]
    rows = at + token.to(tl.int64) * stride
    keys = rotated(new_k, rows, norm, eps, slot, cos, sin, d, D, mask)
    store_slots(keys, k, k_scale, line + slot, d, D, ok, mask)
    values = tl.load(new_v + rows[:, None] + d[None, :], mask=mask, other=0)
    store_slots(values, v, v_scale, line + slot, d, D, ok, mask)


@triton.jit
def leave(acc, best, total, sums, maxima, totals, counter, rows, d, D, mask):
    """A split's values at `rows` [R] for the last to come; how many had left theirs before."""
    tl.store(maxima + rows, best)
    tl.store(totals + rows, total)
    tl.store(sums + rows[:, None] * D + d[None, :], acc, mask=mask)
    tl.debug_barrier()  # the atomic is of one thread: only then all have stored
    return tl.atomic_add(counter, 1)


@triton.jit
def join_splits(
    sums, maxima, totals, at, used, d, D, r_ok,
    R: tl.constexpr, BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """What the `used` splits of a tile have left, from row `at` on, as one: [R, BLOCK_D].

    Other programs wrote it: past the L1 cache. AT_ONCE splits are on their way together.
    """
    best = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, BLOCK_D], tl.float32)
    for begin in range(0, used, AT_ONCE):
        split = begin + tl.arange(0, AT_ONCE)
        row, there = at + split[:, None] * R + tl.arange(0, R)[None, :], (split < used)[:, None]
        mask = (there & r_ok[None, :])[:, :, None] & (d < D)[None, None, :]
        place = sums + row[:, :, None] * D + d[None, None, :]
        part = tl.load(place, mask=mask, other=0, cache_modifier=".cg")
        own = tl.load(maxima + row, mask=there, other=float("-inf"), cache_modifier=".cg")
        own_total = tl.load(totals + row, mask=there, other=0, cache_modifier=".cg")
        top = tl.maximum(best, tl.max(own, axis=0))  # the first split sees slot 0: finite
        fade, weight = tl.exp2(best - top), tl.exp2(own - top[None, :])
        total = total * fade + tl.sum(own_total * weight, axis=0)
        acc = acc * fade[:, None] + tl.sum(part * weight[:, :, None], axis=0)
        best = top
    return acc / total[:, None]


@triton.jit
def attend(
    q, k, v, start, k_scale, v_scale, new_k, new_v, cos, sin, q_norm, k_norm, eps,
    out, sums, maxima, totals, arrived, q_b, q_h, q_t, out_b, out_h, out_t,
    T, S, D, kv_heads, softmax_scale,
    GROUP: tl.constexpr, R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr, NEW: tl.constexpr, PDL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """out [B, H, T, D]. Grid (B H_kv, tiles of R rows, SPLITS). `softmax_scale`: log2(e) / sqrt(D).

    With new_k, new_v, T <= NEW, see Fresh, these go into the cache first. Two tiles write the same
    to the same slots.

    With several splits: scratch sums [B H_kv, tiles, SPLITS, R, D], maxima and totals of the same
    but for D, fp32, and `arrived`, int32 zeros, one a tile, zeros again at the end.
    """
    wait_for_others(PDL)
    pair, tile, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    first = tl.load(start + batch).to(tl.int32)
    end, blocks, share = block_share(first, tile, T, GROUP, R, BLOCK_S, SPLITS)
    if split * share >= blocks:
        return
    r = tile * R + tl.arange(0, R)
    t, d, slots = r // GROUP, tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    head = kv_head * GROUP + r % GROUP
    r_ok, d_ok = t < T, d < D
    at = batch * q_b + head * q_h + t.to(tl.int64) * q_t
    of_rows = r_ok[:, None] & d_ok[None, :]
    if new_k is None:
        qs = tl.load(q + at[:, None] + d[None, :], mask=of_rows, other=0)
    else:
        qs = rotated(q, at, q_norm, eps, first + t, cos, sin, d, D, of_rows)
        begin, stop = split * share * BLOCK_S, tl.minimum((split + 1) * share, blocks) * BLOCK_S
        if stop > first:
            insert(
                new_k, new_v, k, v, k_scale, v_scale, k_norm, eps, cos, sin,
                batch * q_b + kv_head * q_h, q_t, pair * S, first, begin, tl.minimum(stop, end),
                d, D, NEW,
            )  # fmt: skip
            tl.debug_barrier()  # what other threads have written is there
    best = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, BLOCK_D], tl.float32)
    for block in range(split * share, tl.minimum((split + 1) * share, blocks)):
        slot = block * BLOCK_S + slots
        s_ok = slot < end
        place = pair * S + slot
        offsets = place[:, None] * D + d[None, :]
        mask = s_ok[:, None] & d_ok[None, :]
        ks = operand(tl.load(k + offsets, mask=mask, other=0), qs.dtype, INTERPRET)
        none = tl.zeros([R, BLOCK_S], tl.float32)
        scores = dot(qs, tl.trans(ks), none, False, INTERPRET) * softmax_scale
        if k_scale is not None:
            scores *= tl.load(k_scale + place, mask=s_ok, other=0).to(tl.float32)[None, :]
        scores = tl.where(slot[None, :] <= (first + t)[:, None], scores, float("-inf"))
        top = tl.maximum(best, tl.max(scores, axis=1))
        base = tl.where(top == float("-inf"), 0.0, top)  # a row that sees nothing so far
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(best - base)
        best, total = top, total * fade + tl.sum(p, axis=1)
        if v_scale is not None:
            p *= tl.load(v_scale + place, mask=s_ok, other=0).to(tl.float32)[None, :]
        vs = operand(tl.load(v + offsets, mask=mask, other=0), qs.dtype, INTERPRET)
        acc = dot(operand(p, qs.dtype, INTERPRET), vs, acc * fade[:, None], False, INTERPRET)
    if SPLITS > 1:
        place, used = pair * tl.num_programs(1) + tile, tl.cdiv(blocks, share)
        own = (place * SPLITS + split) * R + tl.arange(0, R)
        before = leave(acc, best, total, sums, maxima, totals, arrived + place, own, d, D, of_rows)
        if before < used - 1:
            return
        acc = join_splits(
            sums, maxima, totals, place * SPLITS * R, used, d, D, r_ok, R, BLOCK_D,
            max(1, min(SPLITS, 16384 // (R * BLOCK_D))),
        )  # fmt: skip
        tl.store(arrived + place, 0)
    else:
        acc /= total[:, None]
    at = batch * out_b + head * out_h + t.to(tl.int64) * out_t
    tl.store(out + at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=of_rows)


def attention_launch(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, arrived: Tensor | None, out: Tensor, on: Card,
    fresh: Fresh | None = None,
) -> Launch:  # fmt: skip
    """The kernel that fills out [B, H, T, D]; tensors may be on the meta device.

    Without as many counters in `arrived` as it has tiles it is not split.
    """
    (batch, heads, t, d), kv_heads, slots = q.shape, k.shape[1], k.shape[2]
    group = heads // kv_heads
    block_d, rows = max(16, triton.next_power_of_2(d)), t * group
    r = 16 if rows <= 16 else 32 if rows <= 32 else 64
    block_s = 32 if q.dtype == torch.float32 else 64
    tiles, pairs = -(-rows // r), batch * kv_heads
    wanted = min(
        on.processors * PROGRAMS // (pairs * tiles), -(-slots // block_s), MAX_SPLITS,
        JOINED // min(r, rows),
    )  # fmt: skip
    splits = triton.next_power_of_2(max(1, wanted) + 1) // 2  # the power of two below
    if arrived is None or arrived.numel() < pairs * tiles:
        splits = 1
    sums, maxima, totals = None, None, None
    if splits > 1:
        sums = torch.empty((pairs, tiles, splits, r, d), device=q.device)
        maxima, totals = (torch.empty(sums.shape[:-1], device=q.device) for _ in range(2))
    new = fresh or Fresh(None, None, None, None)
    if fresh and not q.stride() == new.k.stride() == new.v.stride():
        raise ValueError("q and the new keys and values must have the same strides")
    arguments = {
        "q": q, "k": k, "v": v, "start": start, "k_scale": k_scale, "v_scale": v_scale,
        "new_k": new.k, "new_v": new.v, "cos": new.cos, "sin": new.sin, "q_norm": new.q_norm,
        "k_norm": new.k_norm, "eps": None if new.q_norm is None else new.eps,
        "out": out, "sums": sums, "maxima": maxima, "totals": totals,
        "arrived": None if sums is None else arrived,
        "q_b": q.stride(0), "q_h": q.stride(1), "q_t": q.stride(2),
        "out_b": out.stride(0), "out_h": out.stride(1), "out_t": out.stride(2),
        "T": t, "S": slots, "D": d, "kv_heads": kv_heads,
        "softmax_scale": math.log2(math.e) * d**-0.5,
    }  # fmt: skip
    constants = {"GROUP": group, "R": r, "BLOCK_S": block_s, "BLOCK_D": block_d, "SPLITS": splits}
    # asked for no number of registers the assembler at times takes 128 and spills the rest
    options = {"num_warps": 8 if r == 64 else 4, "num_stages": 2, "maxnreg": 255}
    slots_at_once = triton.next_power_of_2(t) if fresh else 1
    return Launch(
        attend, (pairs, tiles, splits), arguments,
        {**constants, "NEW": slots_at_once, "INTERPRET": interpreting()}, options,
    )  # fmt: skip


@torch.library.custom_op("flatllama::triton_attention", mutates_args=())
def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    arrived: Tensor | None,
) -> Tensor:  # fmt: skip
    """Arguments and result as kernels.attention.attention; the caches contiguous."""
    if not all(t is None or t.is_contiguous() for t in (k, v, k_scale, v_scale)):
        raise ValueError("the caches and their scales must be contiguous")
    if q.stride(-1) != 1:
        q = q.contiguous()
    start = start.contiguous()
    out = torch.empty_like(q)
    if out.numel():
        on = card(q.device)
        attention_launch(q, k, v, start, k_scale, v_scale, arrived, out, on).run()
    return out


@triton_attention.register_fake
def _(q, k, v, start, k_scale, v_scale, arrived):
    return torch.empty_like(q if q.stride(-1) == 1 else q.contiguous())
