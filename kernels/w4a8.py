"""w4a8: 4-bit weights that multiply int8 activations as int8 numbers.

One scale per row (group size 0):
    s = max|w| / 7      q = clamp(round(w / s), -7, 7)      w_hat = q s
Groups (128): a group's scale takes its 4 bits to int8, the row's scale takes int8 to the weight:
    S = (16 / 15) max|w_row| / 127, fp32
    s = max(2 max|w_group| / 15 / S, 1), fp16               q = clamp(round(w / (s S)), -8, 7)
    w8 = round(q s), an integer of -127..127                w_hat = w8 S
x per token: symmetric int8 (activations.py); y = (sum_k q_x w8) s_x S + b, the sum in int32.

Stored as q + 8. Where a group is 16 times smaller than its row, s stays 1: int8 is no finer.
Source: Marlin QQQ (arXiv 2406.09904), which rounds the same way inside its kernel.
"""

import torch
from torch import Tensor

from kernels import affine
from kernels.activations import int8_matmul, int8_symmetric
from kernels.coded import CodedLinear, IntegerProduct
from kernels.cuda.weight import TritonWeight
from kernels.int8dq_int4 import SymmetricGrid
from kernels.linear import Grid, Params
from kernels.packing import unpack


class RowGrid(SymmetricGrid):
    """-7..7 times a scale per row."""

    def __init__(self, in_features: int):
        super().__init__(4, in_features)

    def fit(self, w: Tensor, shrink: float = 1.0) -> Params:
        scale = w.abs().amax(1, keepdim=True) * shrink / 7
        return {"scales": scale.clamp(min=1e-9)}

    def round(self, w: Tensor, params: Params) -> Tensor:
        return (torch.round(w / params["scales"]).clamp(-7, 7) + 8).to(torch.uint8)


class GroupGrid(Grid):
    """round(q s) S with q in -8..7; params [N, G]: scales S (equal along a row), group_scales s."""

    def fit(self, w: Tensor, shrink: float = 1.0) -> Params:
        # S does not shrink, so that groups of different shrink fit one row.
        row = (w.abs().amax(1, keepdim=True) * (16 / 15 / 127)).clamp(min=1e-9)
        amax = affine.block_reduce(w.abs(), (1, self.groupsize), torch.amax)
        group = (amax * (shrink * 2 / 15) / row).clamp(min=1).to(torch.float16).float()
        return {"scales": row.expand_as(group).clone(), "group_scales": group}

    def round(self, w: Tensor, params: Params) -> Tensor:
        q = torch.round(w / (params["scales"] * params["group_scales"])).clamp(-8, 7)
        return (q + 8).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return torch.round((codes.float() - 8) * params["group_scales"]) * params["scales"]


class W4A8Linear(IntegerProduct, CodedLinear):
    """Buffers: weight uint8 [N, ceil(K / 2)]; scales fp32 [N, 1]; group_scales fp16 [N, G]."""

    name, bits = "w4a8", 4
    default_groupsize = 128
    groupsizes = (0, 32, 64, 128, 256)
    input_way = "symmetric"

    def __init__(
        self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None,
        groupsize: int | None = None,
    ):  # fmt: skip
        super().__init__(
            in_features, out_features, bias, dtype, device, groupsize, scale_dtype=torch.float32
        )
        shape = self.scales.shape
        self.scales = self.scales[:, :1].contiguous()
        half = None
        if self.groupsize_setting:
            half = torch.empty(shape, dtype=torch.float16, device=device)
        self.register_buffer("group_scales", half)

    def grid(self) -> Grid:
        return GroupGrid(self.groupsize) if self.groupsize_setting else RowGrid(self.in_features)

    def table(self) -> Tensor:
        return torch.arange(16.0) - 8

    def pack(self, codes: Tensor, params: Params) -> None:
        super().pack(codes, {"scales": params["scales"][:, :1].contiguous()})
        if self.groupsize_setting:
            self.group_scales = params["group_scales"].to(torch.float16)

    def int8_rows(self, rows: slice) -> Tensor:
        """Rows of the weight as the product sees them, int8 [n, K]."""
        q = unpack(self.weight[rows], 4, self.in_features).to(torch.int8) - 8
        if not self.groupsize_setting:
            return q
        scales = self.group_scales[rows].float()
        scales = affine.block_expand(scales, (1, self.groupsize), q.shape)
        return torch.round(q.float() * scales).to(torch.int8)

    def dequantize_rows(self, rows: slice) -> Tensor:
        return self.int8_rows(rows).float() * self.scales[rows]

    def reference(self, x: Tensor) -> Tensor:
        q, scale = int8_symmetric(x)
        parts = [int8_matmul(q.reshape(-1, q.shape[-1]), self.int8_rows(r)) for r in self.panels()]
        y = torch.cat(parts, -1).view(*x.shape[:-1], -1).float() * scale * self.scales[:, 0]
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def triton_weight(self) -> TritonWeight:
        inner = self.group_scales
        return TritonWeight(
            self.out_features, self.in_features, "integer", self.triton_planes(), bits=4,
            groupsize=self.groupsize, scales=None if inner is None else inner.t(),
            inner=inner is not None, row_scales=self.scales[:, 0],
        )  # fmt: skip

    def make_tiles(self) -> None:
        group, scales = self.groupsize_setting, self.group_scales
        if not group:  # 4 bits are int8 already: groups of any size, times 1
            group, rows = 256, self.out_features
            scales = self.scales.new_ones(rows, -(-self.in_features // group), dtype=torch.float16)
        self.make_integer_tiles(scales, group)
        self.tile_scales = self.scales[:, 0].contiguous()
        self.group_scales = None
