"""The Llama Transformer with a static KV cache.

Touvron et al. 2023 (arXiv 2302.13971); grouped-query attention, Ainslie et al. 2023 (2305.13245);
rotary embedding in the rotate-half layout of Hugging Face checkpoints, so no weight is permuted;
its long-context scaling as published with Llama 3.1; norms of query and key heads as in Qwen3
(arXiv 2505.09388).

Shapes: B sequences, T new tokens each, S cache slots, H heads, H_kv key-value heads, D head size,
C model width, V vocabulary.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from kernels import native
from kernels.attention import attention, split_counters
from kernels.choice import eager_triton
from kernels.decode import cpp_forward, make_cpp_plan, make_triton_step, triton_forward
from kernels.linear import FEW_ROWS, Linear


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Rotation per position of each pair of dimensions, fp32 [D / 2].

    theta ** (-2i / D); with scaling, wavelengths longer than original / low are stretched by
    `factor`, those shorter than original / high are kept, and those between are interpolated.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    freqs = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return freqs
    factor, low, high, original = config.rope_scaling
    wavelength = 2 * math.pi / freqs
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freqs / factor + smooth * freqs


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, H, D] by angles [B or 1, T, 1, D / 2], computed in fp32."""
    if native.serves(x):
        return torch.ops.flatllama.rotate(x, cos, sin)
    if eager_triton(x.device):
        return torch.ops.flatllama.triton_rotate(x, cos, sin)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class KVCache(nn.Module):
    """Keys and values of all positions so far: [B, H_kv, S, D], in the model's dtype."""

    def __init__(self, batch: int, heads: int, length: int, head_dim: int, dtype, device=None):
        super().__init__()
        shape = (batch, heads, length, head_dim)
        for name in ("k", "v"):
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            self.register_buffer(name, zeros, persistent=False)
        # where attention on a GPU counts its splits that have ended
        self.register_buffer("arrived", split_counters(self.k.device), persistent=False)

    def update(self, k: Tensor, v: Tensor, position: Tensor) -> None:
        """Write k, v [B, T, H_kv, D] into the slots `position` [B, T]."""
        if eager_triton(k.device):
            scales = (getattr(self, name, None) for name in ("k_scale", "v_scale"))
            torch.ops.flatllama.triton_update_cache(k, v, self.k, self.v, *scales, position)
        else:
            self.write(k, v, position)

    def write(self, k: Tensor, v: Tensor, position: Tensor) -> None:
        """`update` by torch's operators."""
        batch = torch.arange(position.shape[0], device=position.device)[:, None]  # [B, 1]
        self.k[batch, :, position] = k
        self.v[batch, :, position] = v

    def attend(self, q: Tensor, start: Tensor) -> Tensor:
        """q [B, H, T, D] over the slots filled so far -> [B, H, T, D]."""
        return attention(q, self.k, self.v, start, arrived=self.arrived)


class Int8KVCache(KVCache):
    """int8 keys and values, one scale per token and head: s = max|x| / 127, q = round(x / s).

    The kernels dequantize a block at a time; PyTorch's operators widen a layer's cache.
    """

    def __init__(self, batch: int, heads: int, length: int, head_dim: int, dtype, device=None):
        super().__init__(batch, heads, length, head_dim, torch.int8, device)
        for name in ("k_scale", "v_scale"):
            zeros = torch.zeros((batch, heads, length, 1), dtype=dtype, device=device)
            self.register_buffer(name, zeros, persistent=False)

    def write(self, k: Tensor, v: Tensor, position: Tensor) -> None:
        (k, k_scale), (v, v_scale) = self.quantize(k), self.quantize(v)
        super().write(k, v, position)
        batch = torch.arange(position.shape[0], device=position.device)[:, None]
        self.k_scale[batch, :, position] = k_scale
        self.v_scale[batch, :, position] = v_scale

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] -> int8 [..., D] and its scale [..., 1] in the scale's storage dtype."""
        scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-5)
        scale = scale.to(self.k_scale.dtype)
        return torch.round(x.float() / scale.float()).clamp(-127, 127).to(torch.int8), scale

    def attend(self, q: Tensor, start: Tensor) -> Tensor:
        return attention(q, self.k, self.v, start, self.k_scale, self.v_scale, self.arrived)


KV_CACHES = {"bf16": KVCache, "int8": Int8KVCache}  # "bf16" stores the model's own dtype


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if native.serves(x):
            return torch.ops.flatllama.rms_norm(x, self.weight, self.eps)
        if eager_triton(x.device):
            return torch.ops.flatllama.triton_rms_norm(x, self.weight, self.eps)
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


class Attention(nn.Module):
    """Grouped-query attention; the rows of wqkv are all query heads, then key, then value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.n_heads, config.n_kv_heads, config.head_dim,
        )  # fmt: skip
        width = config.n_heads * config.head_dim
        kv_width = config.n_kv_heads * config.head_dim
        self.wqkv = Linear(config.dim, width + 2 * kv_width, bias=config.attention_bias)
        self.wo = Linear(width, config.dim, bias=config.output_bias)
        norm = config.head_dim, config.norm_eps
        self.q_norm = RMSNorm(*norm) if config.qk_norm else None
        self.k_norm = RMSNorm(*norm) if config.qk_norm else None
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, position: Tensor):
        """x [B, T, C] at positions [B, T] = start[b] + t; cos, sin [B, T, 1, D / 2]."""
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 H_kv, D]
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        self.kv_cache.update(k, v, position)
        y = self.kv_cache.attend(q.transpose(1, 2), start)  # [B, H, T, D]
        return self.wo(y.transpose(1, 2).flatten(2))


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., gate's F columns, then up's] -> [..., F]."""
    if native.serves(gate_up):
        return torch.ops.flatllama.silu_mul(gate_up)
    if eager_triton(gate_up.device):
        return torch.ops.flatllama.triton_silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """w2(silu(gate) * up); the rows of w13 are the gate's, then up's (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.ffn_dim, bias=config.ffn_bias)
        self.w2 = Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu_mul(self.w13(x)))


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, position: Tensor):
        x = x + self.attention(self.attention_norm(x), cos, sin, start, position)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Token ids in, logits out, keys and values kept between calls. Inference only."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Embedding draws its table on the meta device by way of torch._dynamo: 2 s to import.
        table = torch.randn(config.vocab_size, config.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_head:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("cpp_plan", None, persistent=False)  # see `fuse`
        self.cpp_rows = 0
        self.revision = 0  # counts up where weights may have changed
        self.triton_step: int | None = None
        self._triton_alive: object | None = None  # keeps what `triton_step` numbers
        self.requires_grad_(False)

    def setup_cache(self, batch: int, length: int, kind: str = "bf16") -> KVCache:
        """Allocate an empty cache of `length` slots for `batch` sequences, and the rotary table.

        ValueError: `kind` is none of KV_CACHES.

        Returns the first layer's cache, with which its owner later calls `check_cache`.
        """
        if kind not in KV_CACHES:
            raise ValueError(f"a cache of kind {kind!r}: known are {', '.join(KV_CACHES)}")
        weight = self.tok_embeddings.weight
        config, device = self.config, weight.device
        cache = (batch, config.n_kv_heads, length, config.head_dim, weight.dtype, device)
        for layer in self.layers:
            layer.attention.kv_cache = KV_CACHES[kind](*cache)
            native.to_huge_pages(layer.attention.kv_cache)
        self.unfuse()
        angles = torch.outer(torch.arange(length).float(), rope_frequencies(config)).to(device)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)  # [S, D / 2]
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        return self.layers[0].attention.kv_cache

    def check_cache(self, first: KVCache) -> None:
        """ValueError if another `setup_cache` followed the one that returned `first`."""
        if self.layers[0].attention.kv_cache is not first:
            raise ValueError("another Engine or Scorer has taken this cache: make a new one")

    def fuse(self) -> None:
        """From now on run on few tokens as one operator, if there is one for all of the layers.

        Until the next `setup_cache`, conversion or loading of weights. Hooks on the layers inside
        are passed over, and layers that are replaced afterwards go unnoticed until `unfuse` (which
        `quantize_` calls).
        """
        self.cpp_plan = make_cpp_plan(self)
        self.cpp_rows = 0 if self.cpp_plan is None else int(self.cpp_plan[1])
        self.triton_step, self._triton_alive = make_triton_step(self) or (None, None)

    def unfuse(self) -> None:
        """Run as modules again, for other weights. The new `revision` tells an Engine that the keys
        and values in its cache are of the old ones."""
        self.cpp_plan = self.triton_step = self._triton_alive = None
        self.cpp_rows = 0
        self.revision += 1

    def _apply(self, fn, recurse=True):
        """.to() and its like make new tensors; the angles stay in fp32."""
        self.unfuse()
        rope = {name: self._buffers.pop(name, None) for name in ("rope_cos", "rope_sin")}
        super()._apply(fn, recurse)
        for name, angles in rope.items():
            if angles is not None:
                device = self.tok_embeddings.weight.device
                self.register_buffer(name, angles.to(device), persistent=False)
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        self.unfuse()
        super()._load_from_state_dict(*args, **kwargs)

    def runs_in_cpp(self, rows: int) -> bool:
        """Whether a pass of so many rows (B T) is the one C++ operator."""
        return rows <= self.cpp_rows

    def __deepcopy__(self, memo: dict) -> "Transformer":
        """A copy that is not fused: the plan knows the tensors of this model alone."""
        other = memo[id(self)] = self.__class__.__new__(self.__class__)
        fused = ("_triton_alive", "triton_step")
        own = {name: value for name, value in self.__dict__.items() if name not in fused}
        other.__dict__ = copy.deepcopy(own, memo)
        other.unfuse()
        return other

    def rope(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles at `position` [B, T]: [B, T, 1, D / 2] each."""
        return self.rope_cos[position].unsqueeze(2), self.rope_sin[position].unsqueeze(2)

    def forward(self, tokens: Tensor, start: Tensor, last: Tensor | None = None) -> Tensor:
        """Logits of the next token after each given one.

        Args:
            tokens: [B, T] int64.
            start: [B] int64, the position of each sequence's first given token; the cache holds
                its earlier ones. start[b] + T <= S.
            last: [B] int64, compute the logits of row last[b] of each sequence only.

        Returns:
            [B, T, V] in the model's dtype, or [B, 1, V] with `last`.
        """
        if self.runs_in_cpp(tokens.numel()):
            return cpp_forward(self.cpp_plan, tokens, self.tok_embeddings.weight, start, last)
        if self.triton_step is not None and tokens.numel() <= FEW_ROWS:
            table = self.tok_embeddings.weight
            return triton_forward(self.triton_step, table, tokens, start, last)
        if self.layers[0].attention.kv_cache is None:
            raise ValueError("a Transformer needs a cache: call setup_cache(batch, length) first")
        position = start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # [B, T]
        cos, sin = self.rope(position)
        x = self.tok_embeddings(tokens)  # [B, T, C]
        for layer in self.layers:
            x = layer(x, cos, sin, start, position)
        if last is not None:
            x = x.gather(1, last[:, None, None].expand(-1, 1, x.shape[-1]))
        return self.output(self.norm(x))
