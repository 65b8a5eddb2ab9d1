"""The linear layer on Triton: which kernel, how large its blocks, how many splits; the operator.

The constants below are first guesses from the counts of instructions and bytes (benchmarks/
cuda_lab_book.md); measurement on a GPU has to settle them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.activations import int8_matmul
from kernels.choice import interpreting
from kernels.cuda import products
from kernels.cuda.launch import Launch, multiprocessors
from kernels.cuda.layout import DEQUANTIZE_ROWS, LANES, SLOTS

LATE_ROWS = 32  # up to this block of rows the scales of groups without zeros meet the sums
MAX_SPLITS = 16
MATVEC_PROGRAMS = 8  # wanted on each multiprocessor, so that enough loads are under way
MATMUL_PROGRAMS = 2


@dataclass(frozen=True)
class Product:
    """Of which shape and format a product is; the constants of tiles.py in lower case."""

    rows: int
    n: int
    k: int  # columns of x, in the order of the lanes for 2:4
    kind: str
    bits: int = 8
    exponent: int = 0
    zero: str = "none"
    group: int = 0  # columns that share a scale; 0: the row's scale is all there is
    inner: bool = False
    integer: bool = False  # int8 x, int32 sums

    @property
    def laned(self) -> bool:
        return self.kind == "sparse" or (self.kind != "plain" and self.bits < 8)

    @property
    def mid(self) -> int:
        return 2 ** (self.bits - 1) if self.kind == "integer" else 0

    def constants(self) -> dict:
        """What the template's device functions take."""
        return {
            "KIND": self.kind, "BITS": self.bits, "EXPONENT": self.exponent, "MID": self.mid,
            "ZERO": self.zero, "GROUP": self.group, "INNER": self.inner,
        }  # fmt: skip

    def one_group_a_tile(self) -> bool:
        return self.group % (128 if self.kind == "sparse" else LANES) == 0


def lanes(product: Product, item: int) -> int:
    """Columns of a tile, J, for storage of `item` bytes an element."""
    if product.laned:
        return LANES
    if product.rows == 1:
        return min(512 // item, max(32, triton.next_power_of_2(product.k)))
    return 128 if product.rows <= 16 and item == 1 else 64


def blocks(product: Product, item: int) -> tuple[dict, dict]:
    """Constants and options of the product's kernel: 4 KiB of weights a program and step."""
    j = lanes(product, item)
    constants = {"SLOTS": SLOTS if product.laned else 1, "J": j, "INTEGER": product.integer}
    constants["INTERPRET"] = interpreting()
    if product.rows == 1:
        block_n = 64 if product.laned else max(1, 4096 // (j * item))
        if product.kind == "table":  # look-ups want registers
            block_n = 32
        return constants | {"BLOCK_N": min(block_n, 64)}, {"num_warps": 4, "num_stages": 2}
    # Every slot's tile of x is in shared memory once a stage: 8 tiles of [32, BLOCK_M].
    block_m = next((b for b in (16, 32, 64) if b >= product.rows), 64 if product.laned else 128)
    late = product.group > 0 and product.zero == "none" and not product.inner
    constants |= {
        "BLOCK_N": 64 if block_m <= 32 or product.kind == "table" else 128,
        "BLOCK_M": block_m,
        "LATE": late and block_m <= LATE_ROWS and product.one_group_a_tile(),
    }
    stages = 2 if product.laned and block_m > 32 else 3
    if product.kind == "table":
        stages = 1  # look-ups would be staged through shared memory too
    warps = 8 if constants["BLOCK_N"] * block_m > 64 * 32 else 4
    return constants, {"num_warps": warps, "num_stages": stages}


def splits(product: Product, programs: int, chunks: int, processors: int) -> tuple[int, int]:
    """Into how many parts the columns are split, and chunks a part."""
    wanted = processors * (MATVEC_PROGRAMS if product.rows == 1 else MATMUL_PROGRAMS)
    count = max(1, min(wanted // programs, MAX_SPLITS, chunks))
    each = -(-chunks // count)
    return -(-chunks // each), each


def launches(
    product: Product, x: Tensor, planes: list[Tensor | None], scales: Tensor | None,
    zeros: Tensor | None, row_scales: Tensor | None, table: Tensor | None,
    x_scale: Tensor | None, bias: Tensor | None, out: Tensor, processors: int,
) -> list[Launch]:  # fmt: skip
    """The kernels that compute out [M, N] from x [M, K]; tensors may be on the meta device."""
    rows, n = product.rows, product.n
    stored = next(p for p in planes if p is not None)
    constants, options = blocks(product, stored.element_size())
    j, block_n, block_m = constants["J"], constants["BLOCK_N"], constants.get("BLOCK_M", 1)
    width = stored.shape[1]
    tiles, row_tiles, chunks = -(-n // block_n), -(-rows // block_m), -(-width // j)
    count, each = splits(product, tiles * row_tiles, chunks, processors)
    target = out
    if count > 1:
        sums = torch.int32 if product.integer else torch.float32
        target = torch.empty((count, rows, n), dtype=sums, device=x.device)
    names = ("fours", "twos", "ones")
    finish = {"row_scales": row_scales, "x_scale": x_scale, "bias": bias}
    arguments = {
        "x": x, **dict(zip(names, planes, strict=True)), "scales": scales, "zeros": zeros,
        "row_scales": row_scales, "table": table, "x_scale": x_scale, "bias": bias, "out": target,
        "M": rows, "N": n, "K": product.k, "width": width, "n_chunks": chunks,
        "chunks_per_split": each, "n_groups": 1 if scales is None else scales.shape[0],
    }  # fmt: skip
    constants = product.constants() | constants | {"WHOLE": count == 1}
    if rows == 1:
        del arguments["M"]
        first = Launch(products.matvec, (tiles, count), arguments, constants, options)
    else:
        grid = (row_tiles, tiles, count)
        first = Launch(products.matmul, grid, arguments, constants, options)
    if count == 1:
        return [first]
    arguments = {"sums": target, **finish, "out": out, "M": rows, "N": n}
    constants = {"SPLITS": count, "BLOCK_N": 256}
    grid = (-(-n // 256), rows)
    return [first, Launch(products.reduce, grid, arguments, constants, {"num_warps": 4})]


def dequantize_launch(
    product: Product, planes: list[Tensor | None], scales: Tensor | None, zeros: Tensor | None,
    row_scales: Tensor | None, table: Tensor | None, out: Tensor,
) -> Launch:  # fmt: skip
    """The kernel that writes the weight into out [N, K]."""
    stored = next(p for p in planes if p is not None)
    j = LANES if product.laned else 128
    fours, twos, ones = planes
    arguments = {
        "fours": fours, "twos": twos, "ones": ones, "scales": scales, "zeros": zeros,
        "row_scales": row_scales, "table": table, "out": out, "N": product.n, "K": out.shape[1],
        "width": stored.shape[1], "n_groups": 1 if scales is None else scales.shape[0],
    }  # fmt: skip
    block_n = 32
    constants = {"SLOTS": SLOTS if product.laned else 1, "J": j, "BLOCK_N": block_n}
    constants["INTERPRET"] = interpreting()
    grid = (-(-product.n // block_n), -(-stored.shape[1] // j))
    return Launch(
        products.dequantize, grid, arguments, product.constants() | constants, {"num_warps": 4}
    )


def converts_float8(device: torch.device) -> bool:
    """Whether the GPU itself turns e4m3 into larger floats."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@torch.library.custom_op("flatllama::triton_linear", mutates_args=())
def triton_linear(
    x: Tensor, fours: Tensor | None, twos: Tensor | None, ones: Tensor | None,
    scales: Tensor | None, zeros: Tensor | None, row_scales: Tensor | None, table: Tensor | None,
    x_scale: Tensor | None, bias: Tensor | None, n: int, k: int, kind: str, bits: int,
    exponent: int, zero: str, group: int, inner: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y [M, N] in `dtype` = (x [M, K] times the weight) x_scale [M] + bias. See TritonWeight.

    x is bf16, fp16, fp32, or int8, which is multiplied in integers; for 2:4, in the lanes' order
    unless it has DEQUANTIZE_ROWS rows. The planes are those of layout.py, 8 bits and more in
    `fours`; scales, zeros [G, N]; row_scales [N]; table fp32 [16].
    """
    if kind == "e4m3" and not converts_float8(x.device):
        kind = "float"
    rows, integer = x.shape[0], x.dtype == torch.int8
    out = torch.empty((rows, n), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, planes = x.contiguous(), [fours, twos, ones]
    product = Product(rows, n, x.shape[1], kind, bits, exponent, zero, group, inner, integer)
    if rows < DEQUANTIZE_ROWS or kind == "plain":
        rest = (scales, zeros, row_scales, table, x_scale, bias, out)
        for launch in launches(product, x, planes, *rest, multiprocessors(x.device)):
            launch.run()
        return out
    return _by_library(product, x, planes, scales, zeros, row_scales, table, x_scale, bias, k, out)


def _by_library(product, x, planes, scales, zeros, row_scales, table, x_scale, bias, k, out):
    """The same from a dequantized weight and the library's product. Returns `out`'s values."""
    if product.integer and product.kind == "int8":
        w = planes[0]
    else:
        w = torch.empty((product.n, k), dtype=x.dtype, device=x.device)
        own = None if product.integer else row_scales
        dequantize_launch(product, planes, scales, zeros, own, table, w).run()
    if not product.integer:
        y = F.linear(x, w)
        if x_scale is None and bias is None and y.dtype == out.dtype:
            return y
        y = y.float()
    else:
        y = int8_matmul(x, w).float() * row_scales.float()
    if x_scale is not None:
        y *= x_scale.float()[:, None]
    return (y if bias is None else y + bias.float()).to(out.dtype)


@triton_linear.register_fake
def _(x, *rest):
    return x.new_empty((x.shape[0], rest[9]), dtype=rest[-1])
