"""The linear layer on Triton: how large the kernel's blocks are, how many splits; the operator.

The constants below are first guesses from the counts of instructions and bytes (benchmarks/
cuda_lab_book.md); measurement on a GPU has to settle them.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.activations import int8_matmul
from kernels.choice import interpreting
from kernels.cuda import products
from kernels.cuda.launch import Card, Launch, card
from kernels.cuda.layout import CHUNK, DEQUANTIZE_ROWS, LANES, SLOTS

LATE_ROWS = 16  # up to this block of rows the scales of groups meet the sums
MAX_SPLITS = 16
START = 0.5  # turns of the loop that the begin and the end of a program are worth


@dataclass
class Between:
    """What a Transformer does between two products, done by one of their kernels. M rows, N, K.

    Attributes:
        squares: [M, parts] fp32, the squares of a row add up to them; the result is over its rms.
        gated: the weight's rows are N / 2 gates, then N / 2 ups: silu(gate) * up comes out.
        residual: [M, N] of the result's type, added to it; the sum's squares are summed up too.
        factor: [N] of the result: also multiply it by this.
        out_squares, weighted: [M, tiles] fp32 and [M, N], made by `matmul_launch` for the two.
    """

    squares: Tensor | None = None
    eps: float = 0.0
    gated: bool = False
    residual: Tensor | None = None
    factor: Tensor | None = None
    out_squares: Tensor | None = None
    weighted: Tensor | None = None


@dataclass(frozen=True)
class Product:
    """Of which shape and format a product is; the constants of tiles.py in lower case."""

    rows: int
    n: int
    k: int
    dtype: torch.dtype  # of x; int8: the sums are int32
    kind: str
    bits: int = 8
    exponent: int = 0
    zero: str = "none"
    group: int = 0  # columns that share a scale; 0: the row's scale is all there is
    inner: bool = False

    @property
    def laned(self) -> bool:
        """Whether the weight lies in lanes of 8 codes, see layout.py."""
        return self.kind != "plain" and self.bits < 8

    @property
    def integers(self) -> bool:
        """Whether codes of less than 8 bits are evenly spaced."""
        return self.laned and self.kind == "integer"

    @property
    def mid(self) -> int:
        """The code of 0 where no zero is stored."""
        return 2 ** (self.bits - 1) if self.kind == "integer" else 0

    def constants(self) -> dict:
        """What the template's device functions take."""
        return {
            "KIND": self.kind, "BITS": self.bits, "EXPONENT": self.exponent, "MID": self.mid,
            "ZERO": self.zero, "GROUP": self.group, "INNER": self.inner,
        }  # fmt: skip

    def shortcuts(self, block_m: int) -> dict:
        """LATE and PAIRS, see products.matmul. Groups that fill no slots take neither way."""
        g = self.group
        whole_slots = g == 0 or (g % LANES == 0 and (CHUNK % g == 0 or g % CHUNK == 0))
        if self.dtype == torch.int8:
            return {"LATE": False, "PAIRS": self.integers and self.bits == 4}
        half = self.dtype in (torch.bfloat16, torch.float16)
        late = block_m <= LATE_ROWS and whole_slots and (self.integers or (self.laned and g > 0))
        if g == 0:  # nothing to apply late but the base of pairs
            late = late and half
        scaled = g > 0 and self.dtype == torch.bfloat16
        in_pairs = self.integers or (self.kind == "table" and self.bits == 4)
        pairs = half and (self.kind == "float" or (in_pairs and (late or scaled)))
        return {"LATE": late, "PAIRS": pairs}


def large_tiles(product: Product, plane_bytes: int, shared: int) -> bool:
    """Whether tiles of 256 x 128 fit: two stages of them, as only sm_90 and later have room for."""
    if product.rows <= 64 or product.kind == "plain" or shared < 200 * 1024:
        return False
    columns = CHUNK if product.laned else 64
    return 2 * (256 * plane_bytes + 128 * columns * product.dtype.itemsize) <= shared


def blocks(product: Product, items: tuple[int, ...], shared: int) -> tuple[dict, dict]:
    """Constants and options of the product's kernel, from the bytes of an element of each of its
    planes (0: there is no such plane) and of a card's shared memory."""
    laned, item = product.laned, max(items)
    constants = {"SLOTS": SLOTS if laned else 1, "J": LANES if laned else 64}
    row = sum(items) * constants["J"]  # of a chunk
    large = large_tiles(product, row, shared)
    sizes = (8, 16, 32, 64) if laned and not large else (8, 16, 32, 64, 128)
    block_m = next((b for b in sizes if b >= product.rows), sizes[-1])
    if product.kind == "table" and not product.shortcuts(block_m)["PAIRS"]:
        # look-ups in memory want registers, and would be staged like weights
        block_n, warps, stages = 64, 4, 1
    elif block_m > 16:
        block_n = 64 if block_m == 32 else 256 if large else 128
        warps, stages = (4, 3) if block_m == 32 else (8, 2)
    elif laned:
        block_n, warps, stages = 64, 2, 4 if block_m == 8 else 3
    else:  # each warp 16 rows, or 32 where x would be read too often otherwise
        block_n, warps = (
            (16, 1) if item == 4 else (64, 2) if (item, block_m) == (1, 16) else (32, 2)
        )
        stages = 5 if block_m == 8 or item == 4 else 4
        constants["J"] = 128
    if product.dtype == torch.float32 and block_m > 16:  # x takes twice the room
        stages = max(1, stages - 1)
    constants |= {
        "BLOCK_N": block_n, "BLOCK_M": block_m, "STAGES": stages,
        "INTEGER": product.dtype == torch.int8, "INTERPRET": interpreting(),
        "EVEN": product.k % (constants["SLOTS"] * constants["J"]) == 0,
        **product.shortcuts(block_m),
    }  # fmt: skip
    # asked for no number of registers the assembler at times takes 128 and spills the rest
    return constants, {"num_warps": warps, "num_stages": stages, "maxnreg": 255}


def splits(programs: int, chunks: int, warps: int, join: float, processors: int) -> tuple[int, int]:
    """Into how many parts the columns are split, and chunks a part.

    The multiprocessor with the most programs ends last. A program takes a turn a chunk, START to
    begin with, and `join` where its sums are added to others'. With few warps the turns are slow.
    """

    def time(count: int) -> float:
        each = -(-chunks // count)
        total = programs * -(-chunks // each)
        beside = total * warps / processors / 2  # pairs of warps on a multiprocessor
        turns = each + START + (join if count > 1 else 0)
        return -(-total // processors) * turns * (1 + beside**-2)

    count = min(range(1, min(MAX_SPLITS, chunks) + 1), key=time)
    each = -(-chunks // count)
    return -(-chunks // each), each


@dataclass(frozen=True)
class Sizes:
    """What a product's launch is but for its tensors, worked out once: `count` splits of `each`
    chunks."""

    constants: dict
    options: dict
    row_tiles: int
    tiles: int
    chunks: int
    count: int
    each: int


@functools.lru_cache(maxsize=4096)
def sizes_of(
    product: Product, items: tuple[int, ...], width: int, counters: int, gated: bool, on: Card
) -> Sizes:
    """Of a product whose planes are `width` wide, with so many `counters` of finished splits."""
    constants, options = blocks(product, items, on.shared)
    block_n, block_m = constants["BLOCK_N"], constants["BLOCK_M"]
    tiles = -(-product.n // 2 // (block_n // 2)) if gated else -(-product.n // block_n)
    row_tiles, chunks = -(-product.rows // block_m), -(-width // constants["J"])
    programs, count, each = tiles * row_tiles, 1, chunks
    if programs <= counters:
        chunk = sum(items) * constants["J"]  # bytes a row
        join = 2 * 4 * min(product.rows, block_m) / chunk  # written and read again
        count, each = splits(programs, chunks, options["num_warps"], join, on.processors)
    constants = product.constants() | constants | {"SPLITS": count, "GATED": gated}
    return Sizes(constants, options, row_tiles, tiles, chunks, count, each)


def matmul_launch(
    product: Product, x: Tensor, planes: list[Tensor | None], scales: Tensor | None,
    row_scales: Tensor | None, table: Tensor | None, arrived: Tensor | None,
    x_scale: Tensor | None, bias: Tensor | None, out: Tensor, on: Card,
    between: Between | None = None,
) -> Launch:  # fmt: skip
    """The kernel that computes out [M, N] from x [M, K]; tensors may be on the meta device."""
    between = between or Between()
    rows, n = product.rows, product.n
    width = next(p for p in planes if p is not None).shape[1]
    items = tuple(0 if p is None else p.element_size() for p in planes)
    counters = 0 if arrived is None else arrived.numel()
    size = sizes_of(product, items, width, counters, between.gated, on)
    sums = None
    if size.count > 1:
        dtype = torch.int32 if size.constants["INTEGER"] else torch.float32
        tile = size.constants["BLOCK_N"] * size.constants["BLOCK_M"]
        numbers = size.row_tiles * size.tiles * size.count * tile
        sums = torch.empty(numbers, dtype=dtype, device=x.device)
    if between.residual is not None:
        between.out_squares = torch.empty((rows, size.tiles), device=x.device)
    if between.factor is not None:
        between.weighted = torch.empty_like(out)
    normed = between.squares is not None
    arguments = {
        "x": x, **dict(zip(("fours", "twos", "ones"), planes, strict=True)), "scales": scales,
        "row_scales": row_scales, "table": table, "x_scale": x_scale, "bias": bias, "out": out,
        "sums": sums, "arrived": None if sums is None else arrived,
        "squares": between.squares, "residual": between.residual,
        "out_squares": between.out_squares, "factor": between.factor,
        "weighted": between.weighted, "eps": between.eps if normed else None,
        "M": rows, "N": n, "K": product.k, "width": width, "n_chunks": size.chunks,
        "chunks_per_split": size.each, "n_lines": 1 if scales is None else scales.shape[0],
    }  # fmt: skip
    parts = between.squares.shape[1] if normed else 1
    blocks_of_parts = {"PARTS": parts, "PARTS_BLOCK": triton.next_power_of_2(parts)}
    constants = {**size.constants, **blocks_of_parts}
    grid = (size.row_tiles, size.tiles, size.count)
    return Launch(products.matmul, grid, arguments, constants, size.options)


def dequantize_launch(
    product: Product, planes: list[Tensor | None], scales: Tensor | None,
    row_scales: Tensor | None, table: Tensor | None, out: Tensor,
) -> Launch:  # fmt: skip
    """The kernel that writes the weight into out [N, K]."""
    stored = next(p for p in planes if p is not None)
    j = LANES if product.laned else 128
    arguments = {
        **dict(zip(("fours", "twos", "ones"), planes, strict=True)), "scales": scales,
        "row_scales": row_scales, "table": table, "out": out, "N": product.n, "K": out.shape[1],
        "width": stored.shape[1], "n_lines": 1 if scales is None else scales.shape[0],
    }  # fmt: skip
    block_n = 32
    constants = {"SLOTS": SLOTS if product.laned else 1, "J": j, "BLOCK_N": block_n}
    grid = (-(-product.n // block_n), -(-stored.shape[1] // j))
    return Launch(
        products.dequantize, grid, arguments, product.constants() | constants, {"num_warps": 4}
    )


@torch.library.custom_op("flatllama::triton_linear", mutates_args=())
def triton_linear(
    x: Tensor, fours: Tensor | None, twos: Tensor | None, ones: Tensor | None,
    scales: Tensor | None, row_scales: Tensor | None, table: Tensor | None,
    arrived: Tensor | None, x_scale: Tensor | None, bias: Tensor | None, n: int, k: int,
    kind: str, bits: int, exponent: int, zero: str, group: int, inner: bool, dtype: str,
) -> Tensor:  # fmt: skip
    """y [M, N] = (x [M, K] times the weight) x_scale [M] + bias, in `dtype`. See TritonWeight.

    x is bf16, fp16, fp32, or int8, which is multiplied in integers. The planes are those of
    layout.py, 8 bits and more in `fours`; scales [G, N]; row_scales [N]; table fp32 [16]; arrived
    int32 zeros, which it leaves as they were. Without `arrived` the columns are not split.
    """
    rows = x.shape[0]
    out = torch.empty((rows, n), dtype=getattr(torch, dtype), device=x.device)
    if out.numel() == 0:
        return out
    x, planes = x.contiguous(), [fours, twos, ones]
    product = Product(rows, n, x.shape[1], x.dtype, kind, bits, exponent, zero, group, inner)
    if rows < DEQUANTIZE_ROWS or kind == "plain":
        rest = (scales, row_scales, table, arrived, x_scale, bias, out)
        matmul_launch(product, x, planes, *rest, card(x.device)).run()
        return out
    return _by_library(product, x, planes, scales, row_scales, table, x_scale, bias, k, out)


def _by_library(product, x, planes, scales, row_scales, table, x_scale, bias, k, out):
    """The same from a dequantized weight and the library's product. Returns `out`'s values."""
    integer = x.dtype == torch.int8
    if integer and product.kind == "int8":
        w = planes[0]
    else:
        w = torch.empty((product.n, k), dtype=x.dtype, device=x.device)
        own = None if integer else row_scales
        dequantize_launch(product, planes, scales, own, table, w).run()
    if not integer:
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
def _(
    x, fours, twos, ones, scales, row_scales, table, arrived, x_scale, bias, n, k, kind, bits,
    exponent, zero, group, inner, dtype,
):  # fmt: skip
    return x.new_empty((x.shape[0], n), dtype=getattr(torch, dtype))
