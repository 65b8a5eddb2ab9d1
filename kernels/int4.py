"""int4 weight-only: unsigned codes in groups along K, with a floating-point zero.

    s = (max - min) / 15      z = min + 8 s      q = clamp(round((w - z) / s + 8), 0, 15)
    w_hat = (q - 8) * s + z

s and z are bf16, one pair per row and group of 32, 64, 128 or 256 columns. Where the group size
does not divide K the last group is shorter; nothing is padded.
Source: the int4 scheme of PyTorch's tinygemm kernels (`_weight_int4pack_mm`), used by gpt-fast and
torchao. Stored as ceil(K / 2) bytes a row, the even column in the low nibble. The C++ product also
rounds x, to int8 in blocks of at most 64 columns (`exact_activations` in native.py).
"""

import torch
from torch import Tensor

from kernels import affine, aten, native
from kernels.choice import aten_on
from kernels.cuda.layout import lane_planes
from kernels.cuda.weight import TritonWeight
from kernels.linear import Grid, Kind, NativeForm, Params, QuantizedLinear
from kernels.packing import pack, packed_size, unpack


class Int4Grid(Grid):
    """16 levels, evenly spaced in each group; params: scales, zeros [N, G], bf16 values in fp32."""

    free_zero = True

    def fit(self, w: Tensor, shrink: float = 1.0) -> Params:
        scale, zero = affine.choose_qparams(
            w, (1, self.groupsize), 0, 15, symmetric=False, zero_domain="float",
            preserve_zero=False, shrink=shrink, scale_dtype=torch.bfloat16,
        )  # fmt: skip
        return {"scales": scale.float(), "zeros": zero.float()}

    def round(self, w: Tensor, params: Params) -> Tensor:
        q = torch.round((w - params["zeros"]) / params["scales"] + 8)
        return q.clamp(0, 15).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return (codes.float() - 8) * params["scales"] + params["zeros"]

    def shift(self, params: Params, offset: Tensor) -> Params:
        return {**params, "zeros": (params["zeros"] + offset).to(torch.bfloat16).float()}

    def refit(self, codes: Tensor, target: Tensor, h: Tensor) -> Params:
        """Two unknowns a row, s and z: the normal equations of q s + z in the metric of H."""
        q = codes.float() - 8
        qh = q @ h
        ss, sz, zz = (qh * q).sum(1), qh.sum(1), h.sum()  # the normal matrix [[ss, sz], [sz, zz]]
        right_s, right_z = (target * q).sum(1), target.sum(1)
        scale = (zz * right_s - sz * right_z) / (ss * zz - sz * sz)
        scale = torch.where(scale > 0, scale, torch.nan).to(torch.bfloat16).float()
        zero = ((right_z - sz * scale) / zz).to(torch.bfloat16).float()  # given the rounded scale
        return {"scales": scale[:, None], "zeros": zero[:, None]}


class Int4Linear(QuantizedLinear):
    """Buffers: weight uint8 [N, ceil(K/2)]; scales, zeros bf16 [N, G], G = ceil(K / groupsize)."""

    name = "int4"
    bits = 4
    default_groupsize = 64

    def __init__(
        self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None,
        groupsize: int | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, dtype, device, groupsize)
        groups = (out_features, -(-in_features // self.groupsize))
        bf16 = {"dtype": torch.bfloat16, "device": device}
        shape = (out_features, packed_size(in_features, 4))
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(groups, **bf16))
        self.register_buffer("zeros", torch.empty(groups, **bf16))
        self.register_buffer("tiles", None, persistent=False)
        self.tinygemm: aten.TinygemmWeight | None = None

    def grid(self) -> Int4Grid:
        return Int4Grid(self.groupsize)

    def pack(self, codes: Tensor, params: Params) -> None:
        self.weight = pack(codes, 4)
        self.scales = params["scales"].to(torch.bfloat16)
        self.zeros = params["zeros"].to(torch.bfloat16)

    def stored_weight(self) -> Tensor:
        codes = unpack(self.weight, 4, self.in_features)
        block = (1, self.groupsize)
        return affine.dequantize(codes, block, self.scales, self.zeros, 0, 15, "float")

    def triton_weight(self) -> TritonWeight:
        return TritonWeight(
            self.out_features, self.in_features, "integer",
            lane_planes(self.weight, 4, self.in_features), bits=4, groupsize=self.groupsize,
            scales=self.scales.t(), zeros=self.zeros.t(), zero="float",
        )  # fmt: skip

    def repack(self) -> None:
        """To the tiles of Triton, of ATen or of the C++ products, whichever serves the device."""
        if self.repack_for_triton() or self.tinygemm is not None:
            return
        if self.weight is not None and aten_on(self.weight.device) and not aten.refusal(self):
            self.tinygemm = aten.TinygemmWeight(
                self.weight, self.scales, self.zeros, self.groupsize
            )
            self.weight = self.scales = self.zeros = None
        if self.weight is not None and native.prepare(self.weight.device):
            self.tiles = torch.ops.flatllama.int4_repack(
                self.weight, self.scales, self.zeros, self.in_features, self.groupsize
            )
            self.weight = self.scales = self.zeros = None

    def native_form(self) -> NativeForm | None:
        if self.tiles is None:
            return None
        numbers = [Kind.INT4, self.out_features, self.in_features, self.groupsize]
        return [self.tiles, self.bias, self.input_scale], [
            *numbers, int(native.exact_activations()),
        ]  # fmt: skip

    def multiply(self, x: Tensor) -> Tensor:
        if self.tiles is not None:
            return torch.ops.flatllama.int4_linear(
                x, self.tiles, self.bias, self.out_features, self.in_features,
                self.groupsize, native.exact_activations(),
            )  # fmt: skip
        if self.tinygemm is not None:
            return self.tinygemm(x, self.bias)
        return super().multiply(x)
