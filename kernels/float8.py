"""float8: e4m3 weights; float8dq-row, float8dq-tensor: with dynamic e4m3 activations.

    float8            s = max|w| / 448 per row, in the model's dtype      w_hat = q s
    float8dq-row      s per row, fp32; x per token, s_x = max|x| / 448
    float8dq-tensor   s per tensor, fp32; x per tensor
    y = (sum_k q_x q_w) s_x s_w + b, the sum in fp32

q is torch.float8_e4m3fn (bias 7, largest 448, no infinity). The product of the dynamic formats is
`_scaled_mm` on a GPU that has it (compute capability 8.9, per row 9.0) with K and N in 16s;
elsewhere the same numbers are multiplied in fp32. Source: the float8 schemes of torchao.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.fpx import FloatGrid, FloatLinear
from kernels.linear import FEW_ROWS, Params

MAX_CODE = 0x7E  # 448; 0x7f is NaN


class Float8Grid(FloatGrid):
    """e4m3 times a scale per row; params: scales [N, 1]."""

    def __init__(self, in_features: int, dtype: torch.dtype):
        super().__init__(4, 3, in_features, dtype, MAX_CODE)


class Float8TensorGrid(Float8Grid):
    """e4m3 times one scale of the whole tensor, repeated in the params' rows; `shrink` is not used.

    The scale is part of what the tensor shares, see Grid.learn.
    """

    def __init__(self, in_features: int):
        super().__init__(in_features, torch.float32)
        self.scale: Tensor | None = None

    def learn(self, pieces: Iterable[Tensor]) -> None:
        amax = torch.stack([piece.abs().amax() for piece in pieces]).amax()
        self.scale = (amax.float() / 448).clamp(min=1e-12).reshape(1, 1)

    def shared(self) -> Params:
        return {"scales": self.scale}

    def fit(self, w: Tensor, shrink: float = 1.0) -> Params:
        if self.scale is None:
            self.learn([w])
        return {"scales": self.scale.expand(w.shape[0], 1)}


class Float8Linear(FloatLinear):
    """Buffers: weight float8_e4m3fn [N, K]; scales [N, 1] in the model's dtype."""

    name, bits, exponent_bits, mantissa_bits = "float8", 8, 4, 3
    code_kind = "e4m3"

    def __init__(self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None):
        super().__init__(in_features, out_features, bias, dtype, device)
        self.weight = self.weight.view(torch.float8_e4m3fn)

    def grid(self) -> Float8Grid:
        return Float8Grid(self.in_features, self.scales.dtype)

    def pack(self, codes: Tensor, params: Params) -> None:
        super().pack(codes, params)
        self.weight = self.weight.view(torch.float8_e4m3fn)

    def dequantize_rows(self, rows: slice) -> Tensor:
        return self.weight[rows].float() * self.scales[rows].float()


class Float8DynamicRowLinear(Float8Linear):
    """Buffers: weight float8_e4m3fn [N, K]; scales fp32 [N, 1]."""

    name = "float8dq-row"
    per_token = True
    input_way = "float8"
    rounds_few_rows = False

    def __init__(self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None):
        super().__init__(in_features, out_features, bias, dtype, device)
        self.scales = self.scales.float()

    def has_scaled_mm(self) -> bool:
        """Whether this device multiplies float8 matrices of this shape."""
        weight = self.scaled_weight()[0]
        if weight is None or weight.device.type != "cuda":
            return False
        needed = (9, 0) if self.per_token else (8, 9)
        whole = self.in_features % 16 == 0 and self.out_features % 16 == 0
        return whole and torch.cuda.get_device_capability(weight.device) >= needed

    def scaled_weight(self) -> tuple[Tensor, Tensor]:
        """e4m3 [N, K] and its scales, wherever they lie."""
        if self.packed is None:
            return self.weight, self.scales
        return self.packed.fours.view(torch.float8_e4m3fn), self.packed.row_scales

    def triton_multiply(self, x: Tensor) -> Tensor:
        """Few rows by our kernel, which reads the weight once; many on the float8 units."""
        if x.numel() > FEW_ROWS * self.in_features and self.has_scaled_mm():
            q, scale = self.triton_input(x)
            return self.scaled_mm(q.to(torch.float8_e4m3fn), scale, x.dtype)
        return super().triton_multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        if self.tiles is not None:
            return self.product(x)
        q, scale = self.quantize_input(x)
        if self.has_scaled_mm():
            return self.scaled_mm(q, scale, x.dtype)
        return self.quantized_reference(q, scale, x.dtype)

    def scaled_mm(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The product on tensor cores; one scale per row of x and of w, or one each."""
        q2, (weight, scales) = q.reshape(-1, q.shape[-1]), self.scaled_weight()
        w = weight.t()
        # Per-row scales come with bf16 output only.
        out = torch.bfloat16 if self.per_token else dtype
        x_scale = scale.reshape(-1, 1) if self.per_token else scale
        w_scale = scales.reshape(1, -1) if self.per_token else scales.flatten()[:1].reshape(())
        # The fast accumulation of sm_90 keeps about 14 bits of the sums.
        y = torch._scaled_mm(q2, w, x_scale, w_scale, out_dtype=out, use_fast_accum=False)
        y = y.view(*q.shape[:-1], -1).to(dtype)
        return y if self.bias is None else y + self.bias.to(dtype)


class Float8DynamicTensorLinear(Float8DynamicRowLinear):
    """Buffers: weight float8_e4m3fn [N, K]; scales fp32 [1, 1]."""

    name = "float8dq-tensor"
    per_token = False
    input_way = "float8-tensor"
    shared = ("scales",)

    def __init__(self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None):
        super().__init__(in_features, out_features, bias, dtype, device)
        self.scales = self.scales[:1]

    def grid(self) -> Float8TensorGrid:
        return Float8TensorGrid(self.in_features)

    def dequantize_rows(self, rows: slice) -> Tensor:
        return self.weight[rows].float() * self.scales

    def make_tiles(self) -> None:
        self.scales = self.scales.expand(self.out_features, 1)
        super().make_tiles()
