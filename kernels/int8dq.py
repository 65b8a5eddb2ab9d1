"""int8 with dynamic int8 activations: the product itself is in 8 bits.

    weight as in int8.py: w_hat = q_w s_w, one scale per row
    x per token: s_x = max(max|x| / 127, 1e-5), q_x = round(x / s_x)
    y = (sum_k q_x q_w) s_x s_w + b        the sum in int32, exact

Source: the int8 dynamic scheme of torchao. Few rows on a GPU: see activations.py.
"""

import torch
from torch import Tensor

from kernels.activations import int8_matmul, int8_symmetric
from kernels.int8 import Int8Linear
from kernels.linear import Kind, NativeForm


class Int8DynamicLinear(Int8Linear):
    """Buffers as Int8Linear: weight int8 [N, K], scales [N] in the model's dtype."""

    name = "int8dq"
    input_way = "symmetric"
    rounds_few_rows = False

    def native_form(self) -> NativeForm | None:
        form = super().native_form()
        return form and (form[0], [Kind.INT8DQ, *form[1][1:]])

    def multiply(self, x: Tensor) -> Tensor:
        if self.tiles is not None:
            return torch.ops.flatllama.int8dq_linear(
                x, self.tiles, self.scales, self.bias, self.out_features, self.in_features
            )
        q, scale = int8_symmetric(x)
        y = int8_matmul(q.reshape(-1, q.shape[-1]), self.weight).view(*x.shape[:-1], -1)
        y = y.float() * scale * self.scales.float()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)
