"""A transformer block for a few new tokens as one call of a C++ operator (cpu/block_ops.cpp).

The arithmetic is that of `TransformerBlock.forward`, rounded to the model's dtype at the same
points; what is saved is the time between the operators: a small model's products take a few
microseconds each, and so does calling one and waking the threads for it.
"""

import torch
from torch import Tensor, nn

from kernels import native

MOST_ROWS = 16  # B * T that the operator takes


def can_fuse(block: nn.Module) -> bool:
    """Whether every linear layer of the block has a form that the operator takes."""
    linears = (
        block.attention.wqkv, block.attention.wo, block.feed_forward.w13, block.feed_forward.w2
    )  # fmt: skip
    weight = block.attention_norm.weight
    forms = [getattr(linear, "native_form", lambda: None)() for linear in linears]
    return weight.device.type == "cpu" and native.loaded() and None not in forms


def decode_block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, start: Tensor) -> Tensor:
    """The block's output, and its new keys and values in its cache.

    Args:
        block: a TransformerBlock that `can_fuse`, with a cache.
        x: [B, T, C], B T <= MOST_ROWS.
        cos, sin: [B, T, 1, D / 2] fp32.
        start: [B] int64, the position of each sequence's first token.

    Returns:
        [B, T, C] in x's dtype.
    """
    attention, feed_forward = block.attention, block.feed_forward
    cache = attention.kv_cache
    linears = (attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2)
    forms = [part for linear in linears for part in linear.native_form()]
    return torch.ops.flatllama.decode_block(
        x, block.attention_norm.weight, block.ffn_norm.weight, block.attention_norm.eps, cos, sin,
        start, cache.k, cache.v, getattr(cache, "k_scale", None), getattr(cache, "v_scale", None),
        attention.heads, *forms,
    )  # fmt: skip
