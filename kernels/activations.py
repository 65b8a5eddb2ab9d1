"""Dynamic quantization of activations, the scale taken from the values at hand.

    per token, symmetric   s = max(max|x| / 127, 1e-5)              q = round(x / s)
    per token, asymmetric  s = (max(x, 0) - min(x, 0)) / 255        z = -128 - round(min(x, 0) / s)
                           q = clamp(round(x / s) + z, -128, 127)   x_hat = (q - z) s
    float8 e4m3            s = max|x| / 448, of a token or of the whole tensor

All in fp32, whatever the dtype of x. Sources: the int8 and float8 dynamic schemes of torchao.

On the CPU every number of rows is quantized, one row too. Of the formats that quantize x the Triton
kernels leave up to FEW_ROWS rows as they are (`rounds_few_rows`), but for w4a8, whose product is
of integers. The time of such a product is that of reading the weight, which is the same, and to
quantize x would be a kernel more in front of each: slower, and less exact. So there a prompt, or a
batch of 17, is rounded, and the steps of up to 16 sequences are not; eval.py's passes of 256 tokens
are (`--rows`).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def int8_symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> int8 codes [..., K] in -127..127 and scales [..., 1] fp32."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-5)
    return torch.round(x / scale).to(torch.int8), scale


def int8_asymmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> q - z [..., K], integers in fp32, and scales [..., 1] fp32."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127)
    return (torch.round(x / scale) + zero).clamp(-128, 127) - zero, scale


def float8(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    """x [..., K] -> e4m3 [..., K] and scales fp32, [..., 1] per token, else of no dimension."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True) if per_token else x.abs().amax()
    scale = (amax / 448).clamp(min=1e-12)
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


# By the name that a format gives as its `input_way`.
WAYS = {
    "symmetric": int8_symmetric,
    "asymmetric": int8_asymmetric,
    "float8": partial(float8, per_token=True),
    "float8-tensor": partial(float8, per_token=False),
}
TRITON_WAYS = ("symmetric", "asymmetric", "float8")  # for which there is a Triton kernel


def int8_matmul(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] times w [N, K] transposed, both int8 -> int32 [M, N], exact.

    CUDA's product wants more than 16 rows and K, N in eights: zeros fill up what is missing.
    """
    if x.device.type == "cpu":
        return torch._int_mm(x, w.t())
    rows, n = x.shape[0], w.shape[0]
    k_pad, n_pad = -x.shape[1] % 8, -n % 8
    if k_pad or n_pad:
        w = F.pad(w, (0, k_pad, 0, n_pad))
    x = F.pad(x, (0, k_pad, 0, max(0, 17 - rows)))
    return torch._int_mm(x, w.t())[:rows, :n]
