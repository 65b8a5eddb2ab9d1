"""What lies between the products of many rows, each as one kernel, where torch takes several.

    rms_norm       x / rms(x) * weight
    rotate         the rotary embedding
    update_cache   keys and values into the cache, rounded to int8 where it is int8
    silu_mul       silu(gate) * up

Modules run them eagerly; torch.compile is left the formulas, which it fuses with their neighbours.
rms_norm rounds as torch does, the others once, at the end. There is no backward pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.attention import store_slots
from kernels.cuda.common import wait_for_others
from kernels.cuda.inputs import ready_launch
from kernels.cuda.launch import Launch

BLOCK = 1024


@triton.jit
def rotate(x, cos, sin, out, stride, D, pairs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Rows x [M, H, D], `stride` apart, by angles [M, D / 2] -> out; pairs = H D / 2.

    Grid (M, blocks of pairs).
    """
    wait_for_others(PDL)
    m, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    half, ok = D // 2, i < pairs
    place, angle = i // half * D + i % half, m * half + i % half
    a = tl.load(x + m * stride + place, mask=ok, other=0).to(tl.float32)
    b = tl.load(x + m * stride + place + half, mask=ok, other=0).to(tl.float32)
    c, s = tl.load(cos + angle, mask=ok, other=0), tl.load(sin + angle, mask=ok, other=0)
    to = out + m * (2 * pairs) + place
    tl.store(to, (a * c - b * s).to(out.dtype.element_ty), mask=ok)
    tl.store(to + half, (b * c + a * s).to(out.dtype.element_ty), mask=ok)


@triton.jit
def update_cache(
    k, v, k_cache, v_cache, k_scale, v_scale, position, k_stride, v_stride, T, S, D, heads,
    HEADS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows k, v [B T, heads, D], a stride apart, into the slots position [B T]. Grid (B T)."""
    wait_for_others(PDL)
    m, h, d = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS), tl.arange(0, BLOCK_D)
    slot = tl.load(position + m)
    lines = (m // T * heads + h) * S + slot
    ok = (h < heads) & (slot >= 0) & (slot < S)
    mask, at = ok[:, None] & (d < D)[None, :], h[:, None] * D + d[None, :]
    keys = tl.load(k + m * k_stride + at, mask=mask, other=0)
    store_slots(keys, k_cache, k_scale, lines, d, D, ok, mask)
    values = tl.load(v + m * v_stride + at, mask=mask, other=0)
    store_slots(values, v_cache, v_scale, lines, d, D, ok, mask)


@triton.jit
def silu_mul(x, out, F, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x [M, 2 F] -> out [M, F]. Grid (M, blocks of F)."""
    wait_for_others(PDL)
    m, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + m * (2 * F) + i, mask=i < F, other=0).to(tl.float32)
    up = tl.load(x + m * (2 * F) + F + i, mask=i < F, other=0).to(tl.float32)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + m * F + i, y.to(out.dtype.element_ty), mask=i < F)


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, H, D] as rows (b, t) of H D neighbouring numbers, and how far they are apart."""
    if x.stride()[2:] != (x.shape[3], 1) or x.stride(0) != x.shape[1] * x.stride(1):
        x = x.contiguous()
    return x, x.stride(1 if x.shape[1] > 1 else 0)  # that of a dimension of one means nothing


def rotate_launch(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Launch:
    """x [B, T, H, D], cos and sin [B T, D / 2] -> out like x, contiguous."""
    (b, t, h, d), (x, stride) = x.shape, rows_of(x)
    if d % 2:
        raise ValueError(f"heads of {d} numbers have no halves to rotate")
    pairs = h * d // 2
    arguments = {"x": x, "cos": cos, "sin": sin, "out": out, "stride": stride, "D": d,
                 "pairs": pairs}  # fmt: skip
    grid = (b * t, -(-pairs // BLOCK))
    return Launch(rotate, grid, arguments, {"BLOCK": BLOCK}, {"num_warps": 4})


def update_cache_launch(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, position: Tensor,
) -> Launch:  # fmt: skip
    """See `triton_update_cache`."""
    (b, t, heads, d), (k, k_stride), (v, v_stride) = k.shape, rows_of(k), rows_of(v)
    arguments = {
        "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale,
        "v_scale": v_scale, "position": position, "k_stride": k_stride, "v_stride": v_stride,
        "T": t, "S": k_cache.shape[2], "D": d, "heads": heads,
    }  # fmt: skip
    constants = {"HEADS": triton.next_power_of_2(heads), "BLOCK_D": triton.next_power_of_2(d)}
    return Launch(update_cache, (b * t,), arguments, constants, {"num_warps": 4})


def silu_mul_launch(x: Tensor, out: Tensor) -> Launch:
    """x [M, 2 F] -> out [M, F]."""
    m, f = out.shape
    grid = (m, -(-f // BLOCK))
    return Launch(silu_mul, grid, {"x": x, "out": out, "F": f}, {"BLOCK": BLOCK}, {"num_warps": 4})


@torch.library.custom_op("flatllama::triton_rms_norm", mutates_args=())
def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] over its rms, times weight [C]; rounded after either, as torch does it."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(flat)
    if out.numel():
        ready_launch(flat, weight, None, None, eps, out, None, "none").run()
    return out.view(x.shape)


@torch.library.custom_op("flatllama::triton_rotate", mutates_args=())
def triton_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] rotated by angles [B or 1, T, 1, D / 2] fp32."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        shape = (*x.shape[:2], 1, x.shape[3] // 2)
        cos, sin = (angles.expand(shape).contiguous() for angles in (cos, sin))
        rotate_launch(x, cos, sin, out).run()
    return out


@torch.library.custom_op(
    "flatllama::triton_update_cache", mutates_args=("k_cache", "v_cache", "k_scale", "v_scale")
)
def triton_update_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, position: Tensor,
) -> None:  # fmt: skip
    """k, v [B, T, H_kv, D] into slots `position` [B, T] of caches [B, H_kv, S, D], contiguous.

    With scales [B, H_kv, S, 1] these are int8. What lies outside of the cache is not written.
    """
    if k.numel():
        position = position.contiguous()
        update_cache_launch(k, v, k_cache, v_cache, k_scale, v_scale, position).run()


@torch.library.custom_op("flatllama::triton_silu_mul", mutates_args=())
def triton_silu_mul(x: Tensor) -> Tensor:
    """silu of the first half of each row of x [..., 2 F], times the second half: [..., F]."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty((len(flat), flat.shape[1] // 2), dtype=x.dtype, device=x.device)
    if out.numel():
        silu_mul_launch(flat, out).run()
    return out.view(*x.shape[:-1], out.shape[1])


@triton_rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton_rotate.register_fake
def _(x, cos, sin):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton_update_cache.register_fake
def _(k, v, k_cache, v_cache, k_scale, v_scale, position):
    return None


@triton_silu_mul.register_fake
def _(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
