"""int8dq-int4 and int8dq-int3: symmetric grouped weights, dynamic int8 activations.

    s = max|w| / 7.5 (3 bits: 3.5)    q = clamp(round(w / s), -8, 7) (3 bits: -4, 3)    w_hat = q s
    x per token, asymmetric (activations.py)
    y = s_x sum over groups of s (sum_k (q_x - z_x) q) + b       the inner sums are exact integers

No zeros; groups of 256, 128, 64 or 32 columns, scales in bf16, q stored plus 8 (4). Source: the
edge scheme known as 8da4w (torchao, ExecuTorch), whose scales are fp32: the codes here are chosen
for the rounded scale. The inner sums stay below 2^24, so fp32 arithmetic computes them exactly.
"""

import torch
from torch import Tensor

from kernels import affine
from kernels.activations import int8_asymmetric
from kernels.coded import CodedLinear, IntegerProduct
from kernels.linear import Grid, Params


class SymmetricGrid(Grid):
    """2^bits integers around 0 times a scale; codes are the integers plus 2^(bits - 1).

    params: scales [N, G] fp32, rounded to bf16.
    """

    def __init__(self, bits: int, groupsize: int):
        super().__init__(groupsize)
        self.mid = 2 ** (bits - 1)

    def fit(self, w: Tensor, shrink: float = 1.0) -> Params:
        scale, _ = affine.choose_qparams(
            w, (1, self.groupsize), -self.mid, self.mid - 1, symmetric=True, zero_domain="none",
            eps=1e-7, shrink=shrink, scale_dtype=torch.bfloat16,
        )  # fmt: skip
        return {"scales": scale.float()}

    def round(self, w: Tensor, params: Params) -> Tensor:
        q = torch.round(w / params["scales"]).clamp(-self.mid, self.mid - 1)
        return (q + self.mid).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return (codes.float() - self.mid) * params["scales"]


class GroupedDynamicLinear(CodedLinear):
    """Buffers: weight uint8 [N, ceil(K bits / 8)]; scales bf16 [N, G]."""

    default_groupsize = 128
    code_kind = "integer"
    input_way = "asymmetric"
    rounds_few_rows = False

    def grid(self) -> SymmetricGrid:
        return SymmetricGrid(self.bits, self.groupsize)

    def table(self) -> Tensor:
        return torch.arange(2.0**self.bits) - 2 ** (self.bits - 1)

    def reference(self, x: Tensor) -> Tensor:
        q, scale = int8_asymmetric(x)
        return self.quantized_reference(q, scale, x.dtype)


class Int8DynamicInt3Linear(GroupedDynamicLinear):
    """3 bits."""

    name, bits = "int8dq-int3", 3


class Int8DynamicInt4Linear(IntegerProduct, GroupedDynamicLinear):
    """4 bits."""

    name, bits = "int8dq-int4", 4

    def make_tiles(self) -> None:
        self.make_integer_tiles(self.scales, self.groupsize)
