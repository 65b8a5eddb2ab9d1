"""int8 weight-only: one symmetric scale per output row.

    s = max|w| / 127.5      q = clamp(round(w / s), -128, 127)      w_hat = q * s

Source: the int8 weight-only scheme of torchao and gpt-fast; s is in the model's dtype. The product
is sum_k x_k q_k, then one multiplication by s per output, so it needs no dequantized weight. The
C++ product takes a bf16 or fp16 x rounded to 16 bits in blocks (`exact_activations` in native.py).
"""

import torch
from torch import Tensor

from kernels import affine, aten, native
from kernels.choice import aten_on
from kernels.cuda.weight import TritonWeight
from kernels.linear import Grid, Kind, NativeForm, Params, QuantizedLinear


class Int8Grid(Grid):
    """-128..127 times a scale per row; params: scales [N, 1] fp32, rounded to `dtype`."""

    def __init__(self, in_features: int, dtype: torch.dtype = torch.bfloat16):
        super().__init__(in_features)
        self.dtype = dtype

    def fit(self, w: Tensor, shrink: float = 1.0) -> Params:
        scale, _ = affine.choose_qparams(
            w, (1, w.shape[1]), -128, 127, symmetric=True, zero_domain="none",
            eps=1e-7, shrink=shrink, scale_dtype=self.dtype,
        )  # fmt: skip
        return {"scales": scale.float()}

    def round(self, w: Tensor, params: Params) -> Tensor:
        return torch.round(w / params["scales"]).clamp(-128, 127).to(torch.int8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float() * params["scales"]


class Int8Linear(QuantizedLinear):
    """Buffers: weight int8 [N, K], scales [N] in the model's dtype."""

    name, bits = "int8", 8

    def __init__(self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None):
        super().__init__(in_features, out_features, bias, dtype, device)
        shape = (out_features, in_features)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.empty(out_features, dtype=dtype, device=device))
        self.register_buffer("tiles", None, persistent=False)

    def grid(self) -> Int8Grid:
        return Int8Grid(self.in_features, self.dtype)

    def pack(self, codes: Tensor, params: Params) -> None:
        self.weight, self.scales = codes.to(torch.int8), params["scales"][:, 0].to(self.dtype)

    def stored_weight(self) -> Tensor:
        return self.weight.float() * self.scales.float()[:, None]

    def triton_weight(self) -> TritonWeight:
        shape = (self.out_features, self.in_features)
        return TritonWeight(*shape, "int8", [self.weight, None, None], row_scales=self.scales)

    def repack(self) -> None:
        if self.repack_for_triton():
            return
        if self.weight is not None and native.prepare(self.weight.device):
            self.tiles, self.weight = torch.ops.flatllama.int8_repack(self.weight), None

    def native_form(self) -> NativeForm | None:
        if self.tiles is None:
            return None
        tensors = [self.tiles, self.bias, self.input_scale, self.scales]
        exact = int(native.exact_activations())
        return tensors, [Kind.INT8, self.out_features, self.in_features, exact]

    def multiply(self, x: Tensor) -> Tensor:
        if self.tiles is not None:
            return torch.ops.flatllama.int8_linear(
                x, self.tiles, self.scales, self.bias, self.out_features, self.in_features,
                native.exact_activations(),
            )  # fmt: skip
        if aten_on(x.device):
            return aten.int8_product(x, self.weight, self.scales, self.bias)
        y = torch.nn.functional.linear(x, self.weight.to(x.dtype)) * self.scales.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)
