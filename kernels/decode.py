"""The Transformer on a few new tokens as one operator: C++ (cpu/decode_ops.cpp), or Triton kernels
one behind the other (cuda/step.py).

The arithmetic is that of the modules, rounded to the model's dtype at the same points; what is
saved is the time between the operators: a small model's products take a few microseconds each, and
so does calling one and waking the threads for it.
"""

import torch
from torch import Tensor, nn

from kernels import native
from kernels.choice import load_triton, triton_on


def make_cpp_plan(model: nn.Module) -> Tensor | None:
    """What the operator must know of a Transformer and of its caches, gathered once.

    A later call then passes a handle and the tokens, not hundreds of tensors. The plan keeps the
    tensors that the model has now: layers or caches set later need a new plan.

    Returns:
        int64 [2]: the handle (the plan lives as long as this tensor), and how many rows B T the
        operator takes. None where a linear layer has no form that it takes.
    """
    layers, norms, head_norms = [], [], []
    for block in model.layers:
        attention, feed_forward = block.attention, block.feed_forward
        layers += [attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2]
        norms += [block.attention_norm.weight, block.ffn_norm.weight]
        if attention.q_norm is not None:
            head_norms += [attention.q_norm.weight, attention.k_norm.weight]
    forms = [getattr(layer, "native_form", lambda: None)() for layer in [*layers, model.output]]
    if None in forms or not native.serves(model.norm.weight):
        return None
    tensors = [tensor for own, _ in forms for tensor in own]
    numbers = [n for own, form in forms for n in (len(own), len(form), *form)]
    caches = [block.attention.kv_cache for block in model.layers]
    scaled = [cache for cache in caches if hasattr(cache, "k_scale")]
    config = model.config
    return torch.ops.flatllama.plan_decode(
        [*norms, model.norm.weight], head_norms, config.norm_eps, model.rope_cos, model.rope_sin,
        [c.k for c in caches], [c.v for c in caches],
        [c.k_scale for c in scaled], [c.v_scale for c in scaled],
        config.n_heads, config.ffn_dim, config.vocab_size,
        tensors, numbers,
    )  # fmt: skip


def cpp_forward(
    plan: Tensor, tokens: Tensor, embedding: Tensor, start: Tensor, last: Tensor | None = None
) -> Tensor:
    """As `Transformer.forward`, for B T <= plan[1] tokens; `embedding` is the table [V, C]."""
    return torch.ops.flatllama.decode(plan, tokens, embedding, start, last)


def cpp_greedy(plan: Tensor, tokens: Tensor, embedding: Tensor, start: Tensor) -> Tensor:
    """The first of the largest logits of each row of `cpp_forward`: int64 [B, T].

    Each thread looks through the logits that it has just made.
    """
    return torch.ops.flatllama.decode_greedy(plan, tokens, embedding, start)


def make_triton_step(model: nn.Module) -> tuple[int, object] | None:
    """The Triton kernels of a Transformer and of its caches, see cuda/step.py.

    Returns:
        The number that `triton_forward` takes, and what must live as long; or None where the Triton
        kernels do not serve the model's device, or a layer of it.
    """
    if not triton_on(model.norm.weight.device):
        return None
    load_triton()
    from kernels.cuda import step

    return step.make_step(model)


def triton_forward(
    number: int, embedding: Tensor, tokens: Tensor, start: Tensor, last: Tensor | None = None
) -> Tensor:
    """As `Transformer.forward`, for B T <= FEW_ROWS tokens. No position is checked."""
    vocab_size, dtype = embedding.shape[0], embedding.dtype
    return torch.ops.flatllama.triton_decode(number, vocab_size, dtype, tokens, start, last)
