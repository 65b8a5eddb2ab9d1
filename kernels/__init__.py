"""One file per weight format. `FORMATS` is the registry: a new format adds its class here."""

from kernels.int4 import Int4Linear
from kernels.int8 import Int8Linear
from kernels.linear import Grid, Linear, QuantizedLinear

FORMATS: dict[str, type[QuantizedLinear]] = {cls.name: cls for cls in (Int8Linear, Int4Linear)}

__all__ = ["FORMATS", "Grid", "Linear", "QuantizedLinear"]
