"""A kernel's launch as data, so that it can be run, or compiled ahead of time without a GPU."""

import functools
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from kernels.choice import dependent_launch

DTYPE_NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass
class Launch:
    """One kernel, its grid, its arguments in order, its constants and its options.

    Attributes:
        arguments: run-time arguments: tensors, integers and floats; None where there is none.
        constants: the tl.constexpr arguments, but for PDL, which `--kernels` decides.
        options: num_warps, num_stages, maxnreg.
    """

    kernel: object
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]
    constants: dict
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        if "PDL" in self.kernel.arg_names:
            self.constants = {**self.constants, "PDL": dependent_launch()}
            self.options = {**self.options, "launch_pdl": dependent_launch()}

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    def source(self) -> "triton.compiler.ASTSource":
        """What `triton.compile` takes; specialized like a run: ones, and multiples of 16."""
        signature, constants, attributes = {}, dict(self.constants), {}
        for i, (name, value) in enumerate(self.arguments.items()):
            if value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = "*" + DTYPE_NAMES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(self.constants, "constexpr")
        return triton.compiler.ASTSource(
            fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes
        )

    def compile(self, capability: int):
        """Machine code for a GPU of that compute capability (80, 90), without one at hand."""
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        return triton.compile(self.source(), target=target, options=self.options)


@dataclass(frozen=True)
class Card:
    """What the sizes of blocks depend on: multiprocessors, and bytes of shared memory a program."""

    processors: int
    shared: int


@functools.cache
def card(device: torch.device) -> Card:
    """Of that device. For the interpreter few multiprocessors, so that small shapes are split."""
    if device.type != "cuda":
        return Card(4, 227 * 1024)
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.multi_processor_count, properties.shared_memory_per_block_optin)
