"""A Transformer on a few new tokens as one operator: five kernels a layer, no tensor in between
that another kernel could have made on its way.

    embed      rows of the table; their RMSNorm begun
    matmul     wqkv, its input's RMSNorm ended                                  } every
    attend     norms of heads, rotary embedding; keys and values into the       } layer
               cache, rounded to int8 where it is int8; attention               }
    matmul     wo, plus the residual; the result's RMSNorm begun                }
    matmul     w13, its input's RMSNorm ended; silu(gate) * up comes out        }
    matmul     w2, plus the residual; the result's RMSNorm begun                }
    matmul     the head, its input's RMSNorm ended

An RMSNorm is two factors. The kernel that makes x also leaves x times the norm's weight, and sums
of squares; the product's result is over the rms of those. The arithmetic is that of the modules,
rounded less often. A kernel more runs in front of a product, and does the norm too, where a format
quantizes the inputs of few rows, where wo has an input scale, and in fp16:

    ready      RMSNorm, input scale, dynamic quantization; see inputs.py
"""

import itertools
import weakref

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from kernels.activations import TRITON_WAYS
from kernels.cuda.attention import Fresh, attention_launch
from kernels.cuda.common import wait_for_others
from kernels.cuda.inputs import READY_TYPES, ready_launch
from kernels.cuda.launch import Launch, card
from kernels.cuda.linear import Between, Product, matmul_launch
from kernels.linear import Linear, QuantizedLinear


@triton.jit
def embed(
    tokens, table, out, squares, factor, weighted, C, BLOCK_C: tl.constexpr, PDL: tl.constexpr
):
    """out [M, C] = table [tokens [M]]; squares [M] fp32; weighted = out factor [C]. Grid (M)."""
    wait_for_others(PDL)
    m = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    place = m.to(tl.int64) * C + c
    row = tl.load(tokens + m).to(tl.int64)
    x = tl.load(table + row * C + c, mask=c < C, other=0)
    tl.store(out + place, x, mask=c < C)
    x = x.to(tl.float32)
    tl.store(squares + m, tl.sum(x * x, axis=0))
    if weighted is not None:
        by = tl.load(factor + c, mask=c < C, other=0).to(tl.float32)
        tl.store(weighted + place, (x * by).to(out.dtype.element_ty), mask=c < C)


def embed_launch(
    tokens: Tensor, table: Tensor, out: Tensor, squares: Tensor, factor: Tensor | None,
    weighted: Tensor | None,
) -> Launch:  # fmt: skip
    """tokens [B, T], table [V, C], factor [C] -> out, weighted [M, C], squares [M, 1]."""
    c = table.shape[1]
    arguments = {"tokens": tokens, "table": table, "out": out, "squares": squares,
                 "factor": factor, "weighted": weighted, "C": c}  # fmt: skip
    constants = {"BLOCK_C": triton.next_power_of_2(c)}
    return Launch(embed, (out.shape[0],), arguments, constants, {"num_warps": 8})


class FusedLinear:
    """A linear layer, and the RMSNorm in front of it, as the kernels take them.

    Attributes:
        early: `ready` runs in front of the product, on x itself.
        factor: [K]: the product takes x times this, made by the kernel in front; None: x itself,
            or `early`.
    """

    def __init__(
        self, layer: nn.Module, norm: Tensor | None = None, eps: float = 0.0, weighted: bool = True
    ):
        """`weighted`: the kernel in front can leave its result times `factor`."""
        self.bias, self.norm, self.eps = layer.bias, norm, eps
        self.input_scale, self.way = getattr(layer, "input_scale", None), way_of_few(layer)
        packed = getattr(layer, "packed", None)
        if packed is None:
            self.n, self.k = layer.weight.shape
            self.form = {"kind": "plain"}
            self.tensors = ([layer.weight, None, None], None, None, None, None)
        else:
            self.n, self.k = packed.n, packed.k
            self.form = {
                "kind": packed.kind, "bits": packed.bits, "exponent": packed.exponent,
                "zero": packed.zero, "group": packed.groupsize, "inner": packed.inner,
            }  # fmt: skip
            planes = [packed.fours, packed.twos, packed.ones]
            rest = (packed.scales, packed.row_scales, packed.table, packed.arrived)
            self.tensors = (planes, *rest)
        factors = [f for f in (norm, self.input_scale) if f is not None]
        # Not yet over its rms, a large x times a norm's weight passes what fp16 holds.
        large = norm is not None and norm.dtype == torch.float16
        self.early = self.way != "none" or large or bool(factors and not weighted)
        self.factor = None
        if factors and not self.early:
            self.factor = factors[0] if len(factors) == 1 else factors[0].float() * factors[1]

    def __call__(
        self, x: Tensor, squares: Tensor | None = None, gated: bool = False,
        residual: Tensor | None = None, factor: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """x [M, K], times the layer's own factor -> y [M, N], of a gated one [M, N / 2].

        Also y times the next layer's `factor`, or y; and with a residual its squares' sums.
        """
        rows, n = x.shape[0], self.n // 2 if gated else self.n
        out, x_scale = torch.empty((rows, n), dtype=x.dtype, device=x.device), None
        if self.early:
            x, x_scale = self.ready(x, squares)
            squares = None
        between = Between(squares, self.eps, gated, residual, factor)
        product = Product(rows, self.n, x.shape[1], x.dtype, **self.form)
        launch = matmul_launch(
            product, x, *self.tensors, x_scale, self.bias, out, card(x.device), between
        )
        launch.run()
        return out, out if factor is None else between.weighted, between.out_squares

    def ready(self, x: Tensor, squares: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [M, K] as the product takes it, and the scales of its rows."""
        dtype = READY_TYPES.get(self.way, x.dtype)
        out = torch.empty((x.shape[0], self.k), dtype=dtype, device=x.device)
        x_scale = None
        if self.way != "none":
            x_scale = torch.empty(x.shape[0], device=x.device)
        launch = ready_launch(
            x, self.norm, squares, self.input_scale, self.eps, out, x_scale, self.way
        )
        launch.run()
        return out, x_scale


def way_of_few(layer: nn.Module) -> str:
    """How few rows of its inputs are quantized, "none" if not."""
    rounds = isinstance(layer, QuantizedLinear) and layer.rounds_few_rows
    return layer.input_way if rounds else "none"


def serves(model: nn.Module) -> bool:
    """Whether every product of the model is of a float weight, or a packed one, in a known way."""
    dtype = model.tok_embeddings.weight.dtype
    layers = [model.output]
    for block in model.layers:
        attention, feed_forward = block.attention, block.feed_forward
        layers += [attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2]
    for layer in layers:
        if isinstance(layer, QuantizedLinear):
            if layer.packed is None or way_of_few(layer) not in ("none", *TRITON_WAYS):
                return False
            if layer.packed.exponent == 5 and dtype == torch.float16:  # passes its largest number
                return False
        elif type(layer) is not Linear or layer.weight.dtype != dtype:
            return False
    return type(model.tok_embeddings) is nn.Embedding


class Step:
    """The kernels of a Transformer on few tokens; see the top of the file."""

    def __init__(self, model: nn.Module):
        self.config, self.embedding = model.config, model.tok_embeddings.weight
        self.cos, self.sin = model.rope_cos, model.rope_sin
        self.blocks, self.head = [], FusedLinear(model.output, model.norm.weight, model.norm.eps)
        for block in model.layers:
            attention, feed_forward = block.attention, block.feed_forward
            norms = block.attention_norm, block.ffn_norm
            of_heads = attention.q_norm, attention.k_norm
            self.blocks.append((
                FusedLinear(attention.wqkv, norms[0].weight, norms[0].eps),
                FusedLinear(attention.wo, weighted=False),
                FusedLinear(feed_forward.w13, norms[1].weight, norms[1].eps),
                FusedLinear(feed_forward.w2),
                attention.kv_cache,
                [None if norm is None else norm.weight for norm in of_heads],
            ))  # fmt: skip

    def attention(
        self, qkv: Tensor, cache: nn.Module, norms: list[Tensor | None], start: Tensor, t: int
    ) -> Tensor:
        """qkv [M, (H + 2 H_kv) D] -> [M, H D], the keys and values added to the cache; norms [D] of
        queries and keys, or none."""
        rows, h, d = qkv.shape[0], self.config.n_heads, self.config.head_dim
        kv_heads = cache.k.shape[1]
        heads = qkv.view(rows // t, t, h + 2 * kv_heads, d).transpose(1, 2)
        q, new_k, new_v = heads.split([h, kv_heads, kv_heads], dim=1)
        out = torch.empty((rows // t, t, h, d), dtype=qkv.dtype, device=qkv.device)
        scales = [getattr(cache, name, None) for name in ("k_scale", "v_scale")]
        launch = attention_launch(
            q, cache.k, cache.v, start, *scales, cache.arrived, out.transpose(1, 2), card(q.device),
            Fresh(new_k, new_v, self.cos, self.sin, *norms, self.config.norm_eps),
        )  # fmt: skip
        launch.run()
        return out.view(rows, h * d)

    def run(self, tokens: Tensor, start: Tensor, last: Tensor | None) -> Tensor:
        """As `Transformer.forward`, for B T <= FEW_ROWS tokens."""
        (b, t), c = tokens.shape, self.config.dim
        start = start.contiguous()
        x = torch.empty((b * t, c), dtype=self.embedding.dtype, device=tokens.device)
        squares = torch.empty((b * t, 1), device=tokens.device)
        # each product is told what the next one wants its x times
        factors = [*(wqkv.factor for wqkv, *_ in self.blocks), self.head.factor]
        y = x if factors[0] is None else torch.empty_like(x)
        weighted = None if factors[0] is None else y
        embed_launch(tokens.contiguous(), self.embedding, x, squares, factors[0], weighted).run()
        for block, factor in zip(self.blocks, factors[1:], strict=True):
            wqkv, wo, w13, w2, cache, norms = block
            qkv, _, _ = wqkv(y, squares)
            heads = self.attention(qkv, cache, norms, start, t)
            x, y, squares = wo(heads, residual=x, factor=w13.factor)
            _, hidden, _ = w13(y, squares, gated=True, factor=w2.factor)
            x, y, squares = w2(hidden, residual=x, factor=factor)
        if last is not None:
            rows = torch.arange(b, device=last.device) * t + last
            y, squares, t = y[rows], squares[rows], 1
        return self.head(y, squares)[0].view(b, t, -1)


_steps: weakref.WeakValueDictionary[int, Step] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def make_step(model: nn.Module) -> tuple[int, Step] | None:
    """The step of a model, and the number by which `triton_decode` knows it while it lives.

    None where a layer is not known here.
    """
    if not serves(model):
        return None
    step = Step(model)
    number = next(_numbers)
    _steps[number] = step
    return number, step


@torch.library.custom_op("flatllama::triton_decode", mutates_args=())
def triton_decode(
    number: int, vocab_size: int, dtype: torch.dtype,
    tokens: Tensor, start: Tensor, last: Tensor | None,
) -> Tensor:  # fmt: skip
    """Logits as of `Transformer.forward`, from the step of that number; its caches are written.

    It is declared to write nothing, since torch leaves graphs that write to their inputs out of
    CUDA graphs. A graph holds one call, and uses its result: there is nothing to merge or to drop.
    Their number and dtype are arguments so that compiled code, which torch keeps on disk under what
    it sees of a graph, is not taken for another model, which another process gives the same number.
    """
    return _steps[number].run(tokens, start, last)


@triton_decode.register_fake
def _(number, vocab_size, dtype, tokens, start, last):
    t = tokens.shape[1] if last is None else 1
    return tokens.new_empty((tokens.shape[0], t, vocab_size), dtype=dtype)
