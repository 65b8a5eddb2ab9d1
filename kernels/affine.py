"""Affine quantization of blocks of a tensor: choose the parameters, quantize, dequantize.

One rule serves every affine scheme of the published tables:

    integer zero point   q = clamp(round(x / s) + z)             x = (q - z) * s
    float zero point     q = clamp(round((x - z) / s + mid))     x = (q - mid) * s + z
    no zero point        q = clamp(round(x / s))                 x = q * s

with mid = (quant_min + quant_max + 1) // 2. A `block_size` tuple says how many neighbours along
each dimension share one scale: (1, K) is per row, (1, g) per group, x.shape per tensor. The last
block of a dimension may be shorter than the others.

Sources: Jacob et al. 2018 (arXiv 1712.05877) for the integer zero point; the float zero point is
the one of the tinygemm int4 kernels in PyTorch.
"""

from typing import Literal

import torch
from torch import Tensor

ZeroDomain = Literal["int", "float", "none"]


def block_reduce(x: Tensor, block_size: tuple[int, ...], op) -> Tensor:
    """Reduce each block of `x` by `op` (torch.amin or torch.amax): one element per block."""
    for dim, size in enumerate(block_size):
        length = x.shape[dim]
        if size >= length:
            x = op(x, dim=dim, keepdim=True)
            continue
        if ragged := -length % size:  # repeating the last element changes no block's extremes
            x = torch.cat(
                [x, x.narrow(dim, length - 1, 1).expand_as(x.narrow(dim, 0, ragged))], dim
            )
        x = op(x.unflatten(dim, (-1, size)), dim=dim + 1)
    return x


def block_expand(params: Tensor, block_size: tuple[int, ...], shape: torch.Size) -> Tensor:
    """Repeat each block's parameter over its block, up to `shape`."""
    for dim, size in enumerate(block_size):
        if params.shape[dim] == 1:
            continue
        params = params.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return params.expand(shape)


def choose_qparams(
    x: Tensor,
    block_size: tuple[int, ...],
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool,
    zero_domain: ZeroDomain = "int",
    preserve_zero: bool = True,
    eps: float = 1e-6,
    shrink: float | Tensor = 1.0,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each block.

    Args:
        x: any shape, floating point.
        block_size: as many entries as x has dimensions.
        symmetric: s = max|x| / ((quant_max - quant_min) / 2), so 127.5 for -128..127 and 127 for
            -127..127; otherwise s = (max - min) / (quant_max - quant_min).
        preserve_zero: widen an asymmetric range to hold 0, so that 0 is exactly representable.
        eps: the smallest scale.
        shrink: factor on the range (clipping), in (0, 1].
        scale_dtype: what the scale (and a float zero) is rounded to; x's dtype by default.

    Returns:
        (scale, zero), one element per block. The zero is int32 in the integer domain, of the
        scale's dtype in the float domain, None without one.
    """
    if len(block_size) != x.dim():
        raise ValueError(f"block_size {block_size} does not fit a tensor of shape {list(x.shape)}")
    scale_dtype = scale_dtype or x.dtype
    low, high = block_reduce(x, block_size, torch.amin), block_reduce(x, block_size, torch.amax)
    low, high = low.float() * shrink, high.float() * shrink
    mid = (quant_min + quant_max + 1) // 2
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / ((quant_max - quant_min) / 2)
        scale = scale.clamp(min=eps).to(scale_dtype)
        if zero_domain == "none":
            return scale, None
        if zero_domain == "float":
            return scale, torch.zeros_like(scale)
        return scale, torch.full_like(scale, mid, dtype=torch.int32)
    if preserve_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=eps).to(scale_dtype)
    if zero_domain == "none":
        return scale, None
    if zero_domain == "float":
        return scale, (low + scale.float() * (mid - quant_min)).to(scale_dtype)
    zero = quant_min - torch.round(low / scale.float())
    return scale, zero.clamp(quant_min, quant_max).to(torch.int32)


def quantize(
    x: Tensor,
    block_size: tuple[int, ...],
    scale: Tensor,
    zero: Tensor | None,
    quant_min: int,
    quant_max: int,
    zero_domain: ZeroDomain = "int",
) -> Tensor:
    """Nearest codes of `x`, int32, clamped to [quant_min, quant_max]; ties round to even."""
    s = block_expand(scale.float(), block_size, x.shape)
    q = x.float()
    if zero_domain == "float":
        q = q - block_expand(zero.float(), block_size, x.shape)
        q = torch.round(q / s + (quant_min + quant_max + 1) // 2)
    else:
        q = torch.round(q / s)
        if zero_domain == "int":
            q = q + block_expand(zero.float(), block_size, x.shape)
    return q.clamp(quant_min, quant_max).to(torch.int32)


def dequantize(
    q: Tensor,
    block_size: tuple[int, ...],
    scale: Tensor,
    zero: Tensor | None,
    quant_min: int,
    quant_max: int,
    zero_domain: ZeroDomain = "int",
) -> Tensor:
    """The values that the codes stand for, fp32."""
    s = block_expand(scale.float(), block_size, q.shape)
    w = q.float()
    if zero_domain == "float":
        mid = (quant_min + quant_max + 1) // 2
        return (w - mid) * s + block_expand(zero.float(), block_size, q.shape)
    if zero_domain == "int":
        w = w - block_expand(zero.float(), block_size, q.shape)
    return w * s
