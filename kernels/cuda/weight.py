"""A weight in the layout of the Triton kernels: what `repack` leaves on a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cuda.layout import CHUNK


def dtype_name(dtype: torch.dtype) -> str:
    """Its name, bfloat16: operators take names, as packages of torch 2.11 hand on wrong numbers."""
    return str(dtype).removeprefix("torch.")


def converts_float8(device: torch.device) -> bool:
    """Whether the GPU itself turns e4m3 into larger floats."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class TritonWeight(nn.Module):
    """The weight [N, K] of a linear layer, whatever its format.

    Args:
        n, k: its shape.
        kind: "plain", "int8", "e4m3", "float", "integer" or "table", see tiles.py.
        planes: its codes (layout.py); of 8 bits and more: one plane [N, K].
        bits, exponent: of a code, and of its exponent where it is a small float.
        groupsize: columns that share a scale, 0: none do.
        scales, zeros: [G, N] bf16; zero says what the zeros are: "none", "int", "float".
        inner: the group scales, fp16, take the codes to int8 numbers.
        row_scales: [N], times the whole row.
        table: fp32, the value of each code.
    """

    def __init__(
        self, n: int, k: int, kind: str, planes: list[Tensor | None], *, bits: int = 8,
        exponent: int = 0, groupsize: int = 0, scales: Tensor | None = None,
        zeros: Tensor | None = None, zero: str = "none", inner: bool = False,
        row_scales: Tensor | None = None, table: Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        self.n, self.k, self.kind, self.bits, self.exponent = n, k, kind, bits, exponent
        self.zero, self.inner = zero, inner
        if scales is not None and scales.shape[0] == 1:  # one group a row
            groupsize = -(-k // CHUNK) * CHUNK
            if zero == "none" and not inner:
                scales, row_scales, groupsize = None, scales[0], 0
        self.groupsize = 0 if scales is None else groupsize
        if scales is not None:
            if scales.dtype != (torch.float16 if inner else torch.bfloat16):
                raise ValueError(f"scales of groups in {scales.dtype}: they would be rounded")
            if zeros is None:
                scales = F.pad(scales, (0, 0, 0, scales.shape[0] % 2))
                scales, zeros = scales[::2], scales[1::2]
            scales = torch.stack([scales, zeros.to(scales.dtype)], -1).view(torch.int32).squeeze(-1)
        # Every tile of every product counts its finished splits; see products.py. There are at most
        # N / 16 tiles, or 8 rows of tiles of N / 128.
        device = next(p for p in planes if p is not None).device
        if kind == "e4m3" and not converts_float8(device):
            self.kind = "float"
        arrived = torch.zeros(-(-n // 16) + 8, dtype=torch.int32, device=device)
        tensors = dict(zip(("fours", "twos", "ones"), planes, strict=True))
        tensors |= {"scales": scales, "row_scales": row_scales, "table": table, "arrived": arrived}
        for name, tensor in tensors.items():
            tensor = None if tensor is None else tensor.contiguous()
            self.register_buffer(name, tensor, persistent=False)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, x_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """x [..., K], times x_scale [..., 1] afterwards, plus the bias: [..., N] in `dtype`."""
        if x_scale is not None:
            x_scale = x_scale.float().expand(*x.shape[:-1], 1).reshape(-1).contiguous()
        y = self.product(self.arranged(x), bias, x_scale, dtype or x.dtype)
        return y.view(*x.shape[:-1], self.n)

    def arranged(self, x: Tensor) -> Tensor:
        """x [..., K] as `product` takes it: [M, K]."""
        flat = x.reshape(-1, x.shape[-1])
        if self.exponent == 5 and x.dtype == torch.float16:
            flat = flat.float()  # codes of 5 exponent bits pass fp16's largest number
        return flat

    def product(
        self, x: Tensor, bias: Tensor | None, x_scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The result [M, N] in `dtype`; x_scale fp32 [M]."""
        return torch.ops.flatllama.triton_linear(
            x, self.fours, self.twos, self.ones, self.scales, self.row_scales, self.table,
            self.arrived, x_scale, bias, self.n, self.k, self.kind, self.bits, self.exponent,
            self.zero, self.groupsize, self.inner, dtype_name(dtype),
        )  # fmt: skip


def float_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times a bf16, fp16 or fp32 weight [N, K], plus the bias, for few rows."""
    none = (None,) * 7
    y = torch.ops.flatllama.triton_linear(
        x.reshape(-1, x.shape[-1]), weight.contiguous(), *none, bias, *weight.shape, "plain", 8, 0,
        "none", 0, False, dtype_name(x.dtype),
    )  # fmt: skip
    return y.view(*x.shape[:-1], weight.shape[0])
