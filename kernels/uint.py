"""uint1 .. uint7: unsigned codes of n bits in groups along K, with an integer zero point.

    s = (max(w, 0) - min(w, 0)) / (2^n - 1)      z = clamp(round(-min(w, 0) / s), 0, 2^n - 1)
    q = clamp(round(w / s) + z, 0, 2^n - 1)      w_hat = (q - z) s

0 is always representable. s is bf16; z takes n bits like the codes, packed. Source: the uintx
weight-only scheme of torchao, which stores z as int32 and shards the codes in powers of two.
"""

import torch
from torch import Tensor

from kernels import affine
from kernels.coded import CodedLinear
from kernels.linear import Grid, Params


class UintGrid(Grid):
    """2^bits integers, shifted by an integer zero and scaled; params: scales, zeros [N, G]."""

    free_zero = True

    def __init__(self, bits: int, groupsize: int):
        super().__init__(groupsize)
        self.bits, self.top = bits, 2**bits - 1

    def fit(self, w: Tensor, shrink: float = 1.0) -> Params:
        scale, zero = affine.choose_qparams(
            w, (1, self.groupsize), 0, self.top, symmetric=False, zero_domain="int",
            preserve_zero=True, shrink=shrink, scale_dtype=torch.bfloat16,
        )  # fmt: skip
        return {"scales": scale.float(), "zeros": zero.float()}

    def round(self, w: Tensor, params: Params) -> Tensor:
        q = torch.round(w / params["scales"]) + params["zeros"]
        return q.clamp(0, self.top).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return (codes.float() - params["zeros"]) * params["scales"]

    def shift(self, params: Params, offset: Tensor) -> Params:
        zeros = torch.round(params["zeros"] - offset / params["scales"])
        return {**params, "zeros": zeros.clamp(0, self.top)}


class UintLinear(CodedLinear):
    """Buffers: weight, zeros uint8 [N, ceil(K n / 8)], [N, ceil(G n / 8)]; scales bf16 [N, G]."""

    default_groupsize = 64
    has_zeros = True
    code_kind = "integer"

    def grid(self) -> UintGrid:
        return UintGrid(self.bits, self.groupsize)

    def table(self) -> Tensor:
        return torch.arange(2.0**self.bits)


UINT_FORMATS = tuple(
    type(f"Uint{n}Linear", (UintLinear,), {"name": f"uint{n}", "bits": n, "__doc__": f"{n} bits."})
    for n in range(1, 8)
)
globals().update({cls.__name__: cls for cls in UINT_FORMATS})  # where pickle looks
