"""All transformer blocks for a few new tokens as one call of a C++ operator (cpu/blocks_ops.cpp).

The arithmetic is that of `TransformerBlock.forward`, rounded to the model's dtype at the same
points; what is saved is the time between the operators: a small model's products take a few
microseconds each, and so does calling one and waking the threads for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels import native

MOST_ROWS = 16  # B * T that the operator takes


def linears(block: nn.Module) -> list[nn.Module]:
    """The linear layers of a TransformerBlock, in the operator's order."""
    attention, feed_forward = block.attention, block.feed_forward
    return [attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2]


def can_fuse(blocks: Sequence[nn.Module]) -> bool:
    """Whether every linear layer of the blocks has a form that the operator takes."""
    layers = [linear for block in blocks for linear in linears(block)]
    forms = [getattr(layer, "native_form", lambda: None)() for layer in layers]
    return native.serves(blocks[0].attention_norm.weight) and None not in forms


def decode_blocks(
    blocks: Sequence[nn.Module], x: Tensor, cos: Tensor, sin: Tensor, start: Tensor
) -> Tensor:
    """The blocks' output, and their new keys and values in their caches.

    Args:
        blocks: TransformerBlocks that `can_fuse`, with caches of one kind.
        x: [B, T, C], B T <= MOST_ROWS.
        cos, sin: [B, T, 1, D / 2] fp32.
        start: [B] int64, the position of each sequence's first token.

    Returns:
        [B, T, C] in x's dtype.
    """
    norms, tensors, numbers = [], [], []
    for block in blocks:
        norms += [block.attention_norm.weight, block.ffn_norm.weight]
        for linear in linears(block):
            own_tensors, own_numbers = linear.native_form()
            tensors += own_tensors
            numbers += [len(own_tensors), len(own_numbers), *own_numbers]
    caches = [block.attention.kv_cache for block in blocks]
    scaled = [cache for cache in caches if hasattr(cache, "k_scale")]
    return torch.ops.flatllama.decode_blocks(
        x, norms, blocks[0].attention_norm.eps, cos, sin, start,
        [c.k for c in caches], [c.v for c in caches],
        [c.k_scale for c in scaled], [c.v_scale for c in scaled],
        blocks[0].attention.heads, blocks[0].feed_forward.w2.in_features, tensors, numbers,
    )  # fmt: skip
