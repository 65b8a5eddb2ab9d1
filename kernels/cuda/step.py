"""A Transformer on a few new tokens as one operator: seven kernels a layer, no tensor in between
that another kernel could have made on its way.

    embed      rows of the table, and their sums of squares
    matmul     wqkv, with the RMSNorm of its input                              } every
    place      rotary embedding; queries to their place, keys and values into   } layer
               the cache, rounded to int8 where it is int8                      }
    attend, combine                                                             }
    matmul     wo, plus the residual, and the result's sums of squares          }
    matmul     w13, with the RMSNorm of its input; silu(gate) * up comes out    }
    matmul     w2, plus the residual, and the result's sums of squares          }
    matmul     the head, with the RMSNorm of its input

An RMSNorm is two factors: the weight meets x on its way to the tensor cores, 1 / rms the result.
The arithmetic is that of the modules, rounded less often.
"""

import itertools
import weakref

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from kernels.cuda.attention import attention_launches
from kernels.cuda.launch import Launch, multiprocessors
from kernels.cuda.linear import Between, Product, converts_float8, matmul_launch
from kernels.cuda.tiles import round_even, wait_for_others
from kernels.linear import Linear, QuantizedLinear


@triton.jit
def embed(tokens, table, out, squares, C, BLOCK_C: tl.constexpr, PDL: tl.constexpr):
    """out [M, C] = table [tokens [M]]; squares [M] fp32. Grid (M)."""
    wait_for_others(PDL)
    m = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    row = tl.load(tokens + m).to(tl.int64)
    x = tl.load(table + row * C + c, mask=c < C, other=0)
    tl.store(out + m.to(tl.int64) * C + c, x, mask=c < C)
    tl.store(squares + m, tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=0))


@triton.jit
def place(
    qkv, cos, sin, start, q, k, v, k_scale, v_scale, T, S, HEADS, KV_HEADS,
    D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """qkv [M, H + 2 H_kv, D] -> q [M, H, D], and slots of k, v [B, H_kv, S, D]. Grid (M, heads).

    cos, sin [S, D / 2] fp32. With k_scale, v_scale [B, H_kv, S] the caches are int8.
    """
    wait_for_others(PDL)
    m, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = m // T
    slot = tl.load(start + batch) + m % T
    i = tl.arange(0, BLOCK)
    ok = i < D // 2
    source = qkv + (m * tl.num_programs(1) + head) * D + i
    a = tl.load(source, mask=ok, other=0).to(tl.float32)
    b = tl.load(source + D // 2, mask=ok, other=0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        c = tl.load(cos + slot * (D // 2) + i, mask=ok, other=0)
        s = tl.load(sin + slot * (D // 2) + i, mask=ok, other=0)
        a, b = a * c - b * s, b * c + a * s
    a, b = a.to(qkv.dtype.element_ty), b.to(qkv.dtype.element_ty)
    if head < HEADS:
        out = q + (m * HEADS + head) * D + i
        tl.store(out, a, mask=ok)
        tl.store(out + D // 2, b, mask=ok)
        return
    is_key = head < HEADS + KV_HEADS
    kv_head = (head - HEADS) % KV_HEADS
    line = (batch * KV_HEADS + kv_head) * S + slot
    cache = k if is_key else v
    out = cache + line * D + i
    if k_scale is not None:
        a, b = a.to(tl.float32), b.to(tl.float32)
        largest = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=0)
        scales = k_scale if is_key else v_scale
        scale = tl.maximum(largest / 127, 1e-5).to(k_scale.dtype.element_ty)
        tl.store(scales + line, scale)
        scale = scale.to(tl.float32)
        a = tl.minimum(tl.maximum(round_even(a / scale), -127), 127).to(tl.int8)
        b = tl.minimum(tl.maximum(round_even(b / scale), -127), 127).to(tl.int8)
    tl.store(out, a, mask=ok)
    tl.store(out + D // 2, b, mask=ok)


def embed_launch(tokens: Tensor, table: Tensor, out: Tensor, squares: Tensor) -> Launch:
    """tokens [B, T], table [V, C] -> out [M, C], squares [M, 1]."""
    c = table.shape[1]
    arguments = {"tokens": tokens, "table": table, "out": out, "squares": squares, "C": c}
    constants = {"BLOCK_C": triton.next_power_of_2(c)}
    return Launch(embed, (out.shape[0],), arguments, constants, {"num_warps": 8})


def place_launch(
    qkv: Tensor, cos: Tensor, sin: Tensor, start: Tensor, q: Tensor, k: Tensor, v: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> Launch:  # fmt: skip
    """qkv [M, (H + 2 H_kv) D], q [B, T, H, D], caches k, v [B, H_kv, S, D]."""
    (b, t, h, d), (kv, slots) = q.shape, k.shape[1:3]
    arguments = {
        "qkv": qkv, "cos": cos, "sin": sin, "start": start, "q": q, "k": k, "v": v,
        "k_scale": k_scale, "v_scale": v_scale, "T": t, "S": slots, "HEADS": h, "KV_HEADS": kv,
    }  # fmt: skip
    constants = {"D": d, "BLOCK": triton.next_power_of_2(d // 2)}
    return Launch(place, (b * t, h + 2 * kv), arguments, constants, {"num_warps": 1})


class Weight:
    """A linear layer's weight as `matmul_launch` takes it."""

    def __init__(self, layer: nn.Module):
        self.bias, packed = layer.bias, getattr(layer, "packed", None)
        if packed is None:
            self.n, self.k = layer.weight.shape
            self.form = {"kind": "plain"}
            self.tensors = ([layer.weight, None, None], None, None, None, None)
        else:
            self.n, self.k, kind = packed.n, packed.k, packed.kind
            if kind == "e4m3" and not converts_float8(packed.fours.device):
                kind = "float"
            self.form = {
                "kind": kind, "bits": packed.bits, "exponent": packed.exponent,
                "zero": packed.zero, "group": packed.groupsize, "inner": packed.inner,
            }  # fmt: skip
            planes = [packed.fours, packed.twos, packed.ones]
            rest = (packed.scales, packed.row_scales, packed.table, packed.arrived)
            self.tensors = (planes, *rest)

    def __call__(self, x: Tensor, between: Between) -> Tensor:
        """x [M, K] -> [M, N], or [M, N / 2] of a gated one."""
        rows, n = x.shape[0], self.n // 2 if between.gated else self.n
        out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
        product = Product(rows, self.n, self.k, x.dtype, **self.form)
        processors = multiprocessors(x.device)
        matmul_launch(product, x, *self.tensors, None, self.bias, out, processors, between).run()
        return out


def serves(model: nn.Module) -> bool:
    """Whether every product of the model is one kernel of float or packed weights, x as it is."""
    dtype = model.tok_embeddings.weight.dtype
    layers = [model.output]
    for block in model.layers:
        attention, feed_forward = block.attention, block.feed_forward
        layers += [attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2]
    for layer in layers:
        if isinstance(layer, QuantizedLinear):
            packed = layer.packed
            if packed is None or layer.quantize_input is not None or layer.input_scale is not None:
                return False
            wide = packed.exponent == 5 and dtype == torch.float16  # passes fp16's largest number
            if packed.kind == "sparse" or wide:
                return False
        elif type(layer) is not Linear or layer.weight.dtype != dtype:
            return False
    return type(model.tok_embeddings) is nn.Embedding


class Step:
    """The kernels of a Transformer on few tokens; see the top of the file."""

    def __init__(self, model: nn.Module):
        self.config, self.embedding = model.config, model.tok_embeddings.weight
        self.cos, self.sin = model.rope_cos, model.rope_sin
        self.blocks = []
        for block in model.layers:
            attention, feed_forward = block.attention, block.feed_forward
            layers = (attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2)
            norms = (block.attention_norm.weight, block.ffn_norm.weight)
            self.blocks.append((*map(Weight, layers), *norms, attention.kv_cache))
        self.head, self.norm = Weight(model.output), model.norm.weight

    def attention(self, qkv: Tensor, cache: nn.Module, start: Tensor, t: int) -> Tensor:
        """qkv [M, (H + 2 H_kv) D] -> [M, H D], the keys and values added to the cache."""
        rows, h, d = qkv.shape[0], self.config.n_heads, self.config.head_dim
        q, out = (torch.empty((rows // t, t, h, d), dtype=qkv.dtype, device=qkv.device)
                  for _ in range(2))  # fmt: skip
        scales = [getattr(cache, name, None) for name in ("k_scale", "v_scale")]
        place_launch(qkv, self.cos, self.sin, start, q, cache.k, cache.v, *scales).run()
        launches = attention_launches(
            q.transpose(1, 2), cache.k, cache.v, start, *scales, out.transpose(1, 2),
            multiprocessors(q.device),
        )  # fmt: skip
        for launch in launches:
            launch.run()
        return out.view(rows, h * d)

    def run(self, tokens: Tensor, start: Tensor, last: Tensor | None) -> Tensor:
        """As `Transformer.forward`, for B T <= MOST_ROWS tokens."""
        (b, t), c, eps = tokens.shape, self.config.dim, self.config.norm_eps
        x = torch.empty((b * t, c), dtype=self.embedding.dtype, device=tokens.device)
        squares = torch.empty((b * t, 1), device=tokens.device)
        embed_launch(tokens.contiguous(), self.embedding, x, squares).run()
        for wqkv, wo, w13, w2, attention_norm, ffn_norm, cache in self.blocks:
            qkv = wqkv(x, Between(attention_norm, squares, eps))
            between = Between(residual=x, sum_squares=True)
            x = wo(self.attention(qkv, cache, start, t), between)
            hidden = w13(x, Between(ffn_norm, between.out_squares, eps, gated=True))
            between = Between(residual=x, sum_squares=True)
            x = w2(hidden, between)
            squares = between.out_squares
        if last is not None:
            rows = torch.arange(b, device=last.device) * t + last
            x, squares, t = x[rows], squares[rows], 1
        return self.head(x, Between(self.norm, squares, eps)).view(b, t, -1)


_steps: weakref.WeakValueDictionary[int, Step] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def make_step(model: nn.Module) -> tuple[int, Step] | None:
    """The step of a model, and the number by which `triton_decode` knows it while it lives.

    None where a layer's product is not one kernel: activations are quantized, or scaled, first.
    """
    if not serves(model):
        return None
    step = Step(model)
    number = next(_numbers)
    _steps[number] = step
    return number, step


@torch.library.custom_op("flatllama::triton_decode", mutates_args=())
def triton_decode(number: int, tokens: Tensor, start: Tensor, last: Tensor | None) -> Tensor:
    """Logits as of `Transformer.forward`, from the step of that number; its caches are written."""
    return _steps[number].run(tokens, start, last)


@triton_decode.register_fake
def _(number, tokens, start, last):
    step = _steps[number]
    t = tokens.shape[1] if last is None else 1
    shape = (tokens.shape[0], t, step.config.vocab_size)
    return tokens.new_empty(shape, dtype=step.embedding.dtype)
