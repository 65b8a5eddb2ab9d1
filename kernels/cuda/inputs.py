"""The inputs of a product made ready: RMSNorm, input scale, dynamic quantization in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.common import round_even, wait_for_others
from kernels.cuda.epilogue import mean_root
from kernels.cuda.launch import Launch

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# What the products take of inputs that are quantized in each way: e4m3, and integers of at most
# 255, are exact in bf16.
READY_TYPES = {
    "symmetric": torch.int8, "asymmetric": torch.bfloat16, "float8": torch.bfloat16,
}  # fmt: skip


@triton.jit
def e4m3(x):
    """fp32 of at most 448 to the nearest e4m3, ties to even, on GPUs that cannot convert too."""
    bits = x.to(tl.int32, bitcast=True)
    kept = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = round_even(x * 512).to(tl.float32) / 512  # below 2^-6 the steps are 2^-9
    return tl.where(tl.abs(x) < 0.015625, small, kept)


@triton.jit
def ready(
    x, norm, squares, input_scale, eps, out, x_scale, K,
    WAY: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> out [M, K], x_scale [M]. Grid (M).

    RMSNorm and input scale round to DTYPE, as the modules do; WAY: activations.py's.
    """
    wait_for_others(PDL)
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    ok = i < K
    v = tl.load(x + m * K + i, mask=ok, other=0).to(tl.float32)
    if norm is not None:
        if squares is None:
            root = tl.rsqrt(tl.sum(v * v, axis=0) / K + eps)
        else:
            one = m + tl.zeros([1], tl.int64)
            root = tl.sum(mean_root(squares, one, one >= 0, K, eps, PARTS, PARTS_BLOCK), axis=0)
        v = (v * root).to(DTYPE).to(tl.float32)
        v = (v * tl.load(norm + i, mask=ok, other=0).to(tl.float32)).to(DTYPE).to(tl.float32)
    if input_scale is not None:
        factor = tl.load(input_scale + i, mask=ok, other=0).to(tl.float32)
        v = (v * factor).to(DTYPE).to(tl.float32)
    if WAY == "symmetric":
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(v), axis=0), 127.0), 1e-5)
        v = round_even(tl.div_rn(v, scale)).to(tl.float32)
    elif WAY == "asymmetric":
        low, high = tl.minimum(tl.min(v, axis=0), 0), tl.maximum(tl.max(v, axis=0), 0)
        scale = tl.maximum(tl.div_rn(high - low, 255.0), 1.1920928955078125e-07)
        zero = -128 - round_even(tl.div_rn(low, scale)).to(tl.float32)
        zero = tl.minimum(tl.maximum(zero, -128), 127)
        v = round_even(tl.div_rn(v, scale)).to(tl.float32) + zero
        v = tl.minimum(tl.maximum(v, -128), 127) - zero
    elif WAY == "float8":
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(v), axis=0), 448.0), 1e-12)
        v = e4m3(tl.minimum(tl.maximum(tl.div_rn(v, scale), -448), 448))
    if WAY != "none":
        tl.store(x_scale + m, scale)
    v = v.to(out.dtype.element_ty)
    tl.store(out + m * K + i, v, mask=ok)


def ready_launch(
    x: Tensor, norm: Tensor | None, squares: Tensor | None, input_scale: Tensor | None, eps: float,
    out: Tensor, x_scale: Tensor | None, way: str,
) -> Launch:  # fmt: skip
    """x [M, K], with a norm's sums of its squares [M, parts] or none -> out [M, K], x_scale [M]."""
    k, parts = x.shape[1], 1 if squares is None else squares.shape[1]
    arguments = {"x": x, "norm": norm, "squares": squares, "input_scale": input_scale, "eps": eps,
                 "out": out, "x_scale": x_scale, "K": k}  # fmt: skip
    block = triton.next_power_of_2(k)
    constants = {
        "WAY": way, "PARTS": parts, "BLOCK": block,
        "PARTS_BLOCK": triton.next_power_of_2(parts), "DTYPE": TYPES[x.dtype],
    }  # fmt: skip
    return Launch(
        ready, (x.shape[0],), arguments, constants, {"num_warps": min(8, max(1, block // 256))}
    )


@torch.library.custom_op("flatllama::triton_quantize", mutates_args=())
def triton_quantize(x: Tensor, way: str) -> tuple[Tensor, Tensor]:
    """x [..., K] as activations.py's `way` quantizes it: int8, or bf16 [..., K]; scales [..., 1].

    What torch's operators take some ten kernels for, where torch.compile does not fuse them.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(flat, dtype=READY_TYPES[way])
    scale = torch.empty(len(flat), device=x.device)
    if flat.numel():
        ready_launch(flat, None, None, None, 0.0, out, scale, way).run()
    return out.view(x.shape), scale.view(*x.shape[:-1], 1)


@triton_quantize.register_fake
def _(x, way):
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=READY_TYPES[way]), scale
