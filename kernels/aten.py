"""ATen's own quantized products on a GPU, for `--kernels aten`: the peers inside PyTorch.

    bf16, fp16, fp32     cuBLAS
    int8                 `_weight_int8pack_mm`
    int8dq               `_int_mm`                              (int8dq.py calls it anyway)
    int4                 `_weight_int4pack_mm`, the tinygemm kernel: bf16, K in 128s, N in 8s
    float8dq-*           `_scaled_mm`                           (float8.py calls it anyway)

Other formats have no product in ATen.
"""

import torch
from torch import Tensor, nn

INNER_K_TILES = 8  # of the tinygemm layout: 8 tiles of 16 columns
ATEN_FORMATS = ("int8", "int8dq", "int4", "float8dq-row", "float8dq-tensor")


def refusal(layer: nn.Module) -> str | None:
    """Why ATen has no product for a quantized layer, or None if it has one."""
    if layer.name not in ATEN_FORMATS:
        return (
            f"ATen has no product for {layer.name}; it has {', '.join(ATEN_FORMATS)} and the floats"
        )
    if layer.name == "int4":
        k, n, size = layer.in_features, layer.out_features, layer.groupsize
        if layer.dtype != torch.bfloat16:
            return "ATen's int4 product is for bf16: take --precision bf16"
        if k % (16 * INNER_K_TILES) or n % 8 or size not in (32, 64, 128, 256) or k % size:
            return f"ATen's int4 product does not fit a weight [{n}, {k}] in groups of {size}"
    if layer.name == "int8" and not has_int8():
        return "this torch has no _weight_int8pack_mm for CUDA: take int8dq, or a newer torch"
    return None


def has_int8() -> bool:
    """Whether this build of torch multiplies int8 weights on a GPU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_weight_int8pack_mm", "CUDA")


class TinygemmWeight(nn.Module):
    """An int4 weight [N, K] in the layout of `_weight_int4pack_mm`.

    Args:
        weight: canonical codes uint8 [N, K / 2], the even column in the low nibble.
        scales, zeros: bf16 [N, G].
    """

    def __init__(self, weight: Tensor, scales: Tensor, zeros: Tensor, groupsize: int):
        super().__init__()
        self.groupsize = groupsize
        swapped = (weight << 4) | (weight >> 4)  # tinygemm wants the even column high
        tiles = torch.ops.aten._convert_weight_to_int4pack(swapped, INNER_K_TILES)
        params = torch.stack([scales, zeros], -1).transpose(0, 1).contiguous()  # [G, N, 2]
        self.register_buffer("tiles", tiles, persistent=False)
        self.register_buffer("params", params, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x bf16 [..., K] -> [..., N]."""
        y = torch.ops.aten._weight_int4pack_mm(
            x.reshape(-1, x.shape[-1]), self.tiles, self.groupsize, self.params
        )
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias.to(y.dtype)


@torch.library.custom_op("flatllama::aten_int8", mutates_args=())
def aten_int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """x [M, K] times int8 weight [N, K] and its scales [N]: [M, N].

    In fp32, which is what torch 2.11's product returns on a GPU for any x, whatever its fake says.
    An operator of its own, since Inductor's lowering of that product fails on computed scales.
    """
    return torch.ops.aten._weight_int8pack_mm(x.float(), weight, scales.float()).to(x.dtype)


@aten_int8.register_fake
def _(x, weight, scales):
    return x.new_empty((x.shape[0], weight.shape[0]))


def int8_product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times int8 weight [N, K] and its scales [N], plus the bias: [..., N]."""
    y = torch.ops.flatllama.aten_int8(x.reshape(-1, x.shape[-1]), weight, scales)
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)
