"""The registry of weight formats: a new format is one file of this folder and one entry here.

And its size, in `expected_bytes` of tests/test_formats.py.
"""

from kernels.codebook4 import Codebook4Linear
from kernels.float8 import Float8DynamicRowLinear, Float8DynamicTensorLinear, Float8Linear
from kernels.fpx import FLOAT_FORMATS
from kernels.int4 import Int4Linear
from kernels.int8 import Int8Linear
from kernels.int8dq import Int8DynamicLinear
from kernels.int8dq_int4 import Int8DynamicInt3Linear, Int8DynamicInt4Linear
from kernels.linear import QuantizedLinear
from kernels.sparse24 import Int4Sparse24Linear
from kernels.uint import UINT_FORMATS
from kernels.w4a8 import W4A8Linear

FORMATS: dict[str, type[QuantizedLinear]] = {
    cls.name: cls
    for cls in (
        Int8Linear, Int8DynamicLinear, Int4Linear, Int8DynamicInt4Linear, Int8DynamicInt3Linear,
        Float8Linear, Float8DynamicTensorLinear, Float8DynamicRowLinear, *FLOAT_FORMATS,
        *UINT_FORMATS, Codebook4Linear, Int4Sparse24Linear, W4A8Linear,
    )
}  # fmt: skip
