"""fp6 and fpx-E-M: floats of 1 sign, E exponent and M mantissa bits, one scale per row.

    s = max|w| / max_normal      code = sign, exponent, mantissa of the nearest float to w / s
    value = (-1)^sign * 2^(exponent - bias) * (1 + mantissa / 2^M),   bias = 2^(E - 1) - 1
    exponent 0 (subnormal): (-1)^sign * 2^(1 - bias) * mantissa / 2^M

No code is an infinity or a NaN; ties round to even; fp6 is e3m2, largest value 28, smallest step
1 / 16. Packed to exactly 1 + E + M bits; s in the model's dtype. Sources: FP6-LLM (arXiv
2401.14112), the OCP microscaling formats (v1.0) for the encoding, torchao's fpx for the scale.
"""

import torch
from torch import Tensor

from kernels.coded import CodedLinear
from kernels.linear import Grid, Params


def float_values(exponent_bits: int, mantissa_bits: int) -> Tensor:
    """The value of every code, fp32 [2 ** (1 + E + M)]."""
    magnitude = torch.arange(2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = magnitude >> mantissa_bits, magnitude & (2**mantissa_bits - 1)
    normal = exponent > 0
    whole = mantissa + normal * 2**mantissa_bits
    shift = exponent.clamp(min=1) - (2 ** (exponent_bits - 1) - 1) - mantissa_bits
    values = torch.ldexp(whole.float(), shift)
    return torch.cat([values, -values])


class FloatGrid(Grid):
    """Small floats times one scale per row; params: scales [N, 1] fp32, rounded to `dtype`."""

    def __init__(
        self, exponent_bits: int, mantissa_bits: int, in_features: int,
        dtype: torch.dtype = torch.bfloat16, max_code: int | None = None,
    ):  # fmt: skip
        super().__init__(in_features)
        self.mantissa_bits, self.dtype = mantissa_bits, dtype
        self.sign_code = 2 ** (exponent_bits + mantissa_bits)
        self.max_code = max_code or self.sign_code - 1
        self.lowest_exponent = 2 - 2 ** (exponent_bits - 1)
        # With 5 exponent bits the largest value is so large that fp16 does not hold the scales of
        # usual weights, and the range so wide that larger scales cost nothing.
        self.least = torch.finfo(dtype).tiny if exponent_bits == 5 else 0
        self.values = float_values(exponent_bits, mantissa_bits)

    def fit(self, w: Tensor, shrink: float = 1.0) -> Params:
        scale = w.abs().amax(1, keepdim=True) * shrink / self.values[self.max_code].item()
        scale = scale.clamp(min=1e-12)
        if self.least:
            doublings = torch.frexp(self.least / scale).exponent.clamp(min=0)
            scale = torch.ldexp(scale, doublings)  # the codes are the same, of lower exponents
        return {"scales": scale.to(self.dtype).float()}

    def round(self, w: Tensor, params: Params) -> Tensor:
        v = w / params["scales"]
        magnitude = v.abs().clamp(max=self.values[self.max_code].item())
        # frexp: v = f 2^e with f in [1/2, 1), of 0 with e = 0; codes of one e are evenly spaced.
        lowest = 2.0**self.lowest_exponent
        exponent = torch.frexp(magnitude.clamp(min=lowest)).exponent - 1
        steps = torch.round(torch.ldexp(magnitude, self.mantissa_bits - exponent)).int()
        code = steps + ((exponent - self.lowest_exponent) << self.mantissa_bits)
        negative = (v < 0) & (code > 0)
        return (code + negative * self.sign_code).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self.values.to(codes.device)[codes.long()] * params["scales"]


class FloatLinear(CodedLinear):
    """Buffers: weight uint8 [N, ceil(K (1 + E + M) / 8)]; scales [N, 1] in the model's dtype."""

    mantissa_bits: int
    code_kind = "float"

    def __init__(self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None):
        super().__init__(
            in_features, out_features, bias, dtype, device, groupsize=0, scale_dtype=dtype
        )

    def grid(self) -> FloatGrid:
        return FloatGrid(self.exponent_bits, self.mantissa_bits, self.in_features, self.dtype)

    def table(self) -> Tensor:
        return float_values(self.exponent_bits, self.mantissa_bits)


def float_format(name: str, exponent_bits: int, mantissa_bits: int) -> type[FloatLinear]:
    """The class of one format."""
    return type(
        f"{name.title().replace('-', '')}Linear",
        (FloatLinear,),
        {
            "name": name, "exponent_bits": exponent_bits, "mantissa_bits": mantissa_bits,
            "bits": 1 + exponent_bits + mantissa_bits,
            "__doc__": f"e{exponent_bits}m{mantissa_bits}.",
        },
    )  # fmt: skip


FLOAT_FORMATS = (
    float_format("fp6", 3, 2),
    *(float_format(f"fpx-{e}-{m}", e, m) for e in range(2, 6) for m in range(1, 8 - e)),
)
globals().update({cls.__name__: cls for cls in FLOAT_FORMATS})  # where pickle looks
