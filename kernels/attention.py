"""Causal attention of new tokens over a static KV cache.

    out[b, h, t] = softmax(q[b, h, t] . k[b, h / (H / H_kv), 0 : start[b] + t + 1] / sqrt(D)) v

Row t of sequence b sits at position start[b] + t and sees the slots up to its own. `start` is a
tensor, so the compiled step never recompiles as the cache fills. In the kernels the cost of a step
follows the filled length, not the cache's size, and an int8 cache is dequantized a block at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import native
from kernels.choice import load_triton, triton_on


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The formula above, in fp32. Shapes as in `attention`."""
    if k_scale is not None:
        k, v = k.float() * k_scale.float(), v.float() * v_scale.float()
    group = q.shape[1] // k.shape[1]
    k = k.float().repeat_interleave(group, 1)  # [B, H, S, D]
    v = v.float().repeat_interleave(group, 1)
    scores = q.float() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, T, S]
    position = start[:, None] + torch.arange(q.shape[2], device=q.device)  # [B, T]
    unseen = torch.arange(k.shape[2], device=q.device) > position[..., None]  # [B, T, S]
    scores = scores.masked_fill(unseen[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).to(q.dtype)


@torch.library.custom_op("flatllama::sdpa_filled", mutates_args=())
def sdpa_filled(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> Tensor:
    """ATen's attention on the filled slots of each sequence: the path without a kernel of ours.

    One call a sequence, so a batch of different lengths reads no unfilled slot either. The mask
    of a chunk of T new tokens is [T, filled], never S x S.
    """
    out = torch.empty_like(q)
    steps = torch.arange(q.shape[2], device=q.device)
    for b, first in enumerate(start.tolist()):
        filled = first + q.shape[2]
        kb, vb = k[b : b + 1, :, :filled], v[b : b + 1, :, :filled]
        if k_scale is not None:
            kb = (kb.float() * k_scale[b : b + 1, :, :filled].float()).to(q.dtype)
            vb = (vb.float() * v_scale[b : b + 1, :, :filled].float()).to(q.dtype)
        mask = None
        if first > 0 and q.shape[2] > 1:
            mask = torch.arange(filled, device=q.device) <= (first + steps)[:, None]
        out[b] = F.scaled_dot_product_attention(
            q[b : b + 1], kb, vb, mask,
            is_causal=first == 0 and q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1],
        )[0]  # fmt: skip
    return out


@sdpa_filled.register_fake
def _(q, k, v, start, k_scale, v_scale):
    return torch.empty_like(q)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> Tensor:
    """The plain form: every slot, those unseen masked. Nothing waits for the device."""
    if k_scale is not None:
        k, v = ((c.float() * s.float()).to(q.dtype) for c, s in ((k, k_scale), (v, v_scale)))
    position = start[:, None] + torch.arange(q.shape[2], device=q.device)  # [B, T]
    seen = torch.arange(k.shape[2], device=q.device) <= position[..., None]  # [B, T, S]
    if q.shape[2] == 1:  # heads that share keys as rows: the fast ones take no groups with a mask
        rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, H_kv, H / H_kv, D]
        y = F.scaled_dot_product_attention(rows, k, v, seen[:, None])
        return y.flatten(1, 2).unsqueeze(2)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, seen[:, None], enable_gqa=grouped)


def split_counters(device: torch.device) -> Tensor | None:
    """Where the Triton kernel counts finished splits, int32 zeros that it leaves as they were; None
    where it does not run."""
    if not triton_on(device):
        return None
    return torch.zeros(1024, dtype=torch.int32, device=device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    arrived: Tensor | None = None,
) -> Tensor:
    """Causal attention over the filled part of a cache.

    Args:
        q: [B, H, T, D] bf16, fp16 or fp32: T new tokens of each sequence.
        k, v: [B, H_kv, S, D], contiguous, in q's dtype or int8, H a multiple of H_kv. The new
            tokens' own keys and values are already in slots start[b] .. start[b] + T - 1.
        start: [B] int64, start[b] + T <= S.
        k_scale, v_scale: [B, H_kv, S, 1], for an int8 cache.
        arrived: of `split_counters`; without it the Triton kernel is not split over the slots.

    Returns:
        [B, H, T, D] in q's dtype.
    """
    if native.serves(q):
        return torch.ops.flatllama.attention(q, k, v, start, k_scale, v_scale)
    if triton_on(q.device):
        load_triton()
        return torch.ops.flatllama.triton_attention(q, k, v, start, k_scale, v_scale, arrived)
    plain = torch.ops.flatllama.sdpa_filled if q.device.type == "cpu" else masked_attention
    return plain(q, k, v, start, k_scale, v_scale)
