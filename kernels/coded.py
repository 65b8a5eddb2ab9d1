"""What the n-bit formats share: a value per code, a scale (and perhaps a zero) per group.

    w_hat = (value[code] - zero) * scale

The codes of a row are one little-endian bit stream of exactly n bits each (packing.py). `value` is
a table of 2^n numbers, the same for the whole tensor: integers for the affine formats, small
floats for fpx and float8, the learned numbers of a codebook.

One C++ product serves all of them (cpu/coded.cpp). Its tiles hold 16 rows, whose codes lie in bit
planes, so that four columns of all 16 are taken at once: by products of bytes (cpu/planes.cpp; 2:4
codes cpu/sparse.cpp), by AMX (floats, cpu/amx_few.cpp). Codes of 8 bits lie as they are, four
columns of a row in a word. Few rows of x stream the codes and widen them in registers; many rows
widen a panel of the weight at a time. The whole weight is never dequantized. Products of bytes take
a bf16 or fp16 x rounded to 16 bits in blocks (`exact_activations` in native.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import affine, native
from kernels.cuda.layout import lane_planes
from kernels.cuda.weight import TritonWeight
from kernels.linear import Kind, NativeForm, Params, QuantizedLinear
from kernels.packing import pack, packed_size, row_chunks, unpack

# What the product reads: codes, scales, zeros, positions (2:4), values.
TILES = ("tiles", "tile_scales", "tile_zeros", "tile_positions", "lookup")
# How coded_ops.cpp quantizes x, of activations.WAYS.
NATIVE_WAYS = {"none": 0, "asymmetric": 1, "float8": 2, "float8-tensor": 3}


def interleave_rows(x: Tensor, width: int) -> Tensor:
    """[N, C] -> [ceil(N / 16), ceil(C / width) * width, 16]: rows become lanes; zeros fill up."""
    n, c = x.shape
    x = F.pad(x, (0, -c % width, 0, -n % 16))
    return x.unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def byte_tiles(codes: Tensor) -> Tensor:
    """Codes of 8 bits [N, K] as int32 lanes of four columns, [ceil(N / 16), 8 ceil(K / 32), 16]."""
    padded = F.pad(codes.view(torch.uint8), (0, -codes.shape[1] % 4))
    words = padded.contiguous().flatten().view(torch.int32)  # one row may have a stride of 1
    return interleave_rows(words.view(len(codes), -1), 8)


def plane_tiles(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Packed codes uint8 [N, ceil(K bits / 8)] of K `columns`, of less than 8 bits each, as bit
    planes: int32 [ceil(N / 16), bits ceil(K / 32), 16].

    32 columns are `bits` lines of 64 bytes: 4 with the codes' lowest 4 bits, 2 with the next 2, 1
    with the next, as `bits` is a sum of these. Byte 4 r + i of a line is of row r and of columns
    i, 4 + i, ... from the lowest bit up; see cpu/coded.h.
    """
    parts = []
    for chunk in row_chunks(len(packed), columns, 16):
        rows = packed[chunk]
        codes = unpack(rows, bits, columns)
        codes = F.pad(codes, (0, -columns % 32, 0, -codes.shape[0] % 16))
        codes = codes.view(codes.shape[0] // 16, 16, -1, 8, 4)  # [tile, row, block, step, byte]
        lines, below = [], 0
        for width in (4, 2, 1):
            if bits & width:
                fields = codes.unflatten(3, (width, -1)) >> below & (1 << width) - 1
                shifts = width * torch.arange(8 // width, dtype=torch.uint8)[:, None]
                lines.append((fields << shifts).sum(4, dtype=torch.uint8))
                below += width
        lines = torch.cat(lines, 3)  # [tile, row, block, line, byte]
        parts.append(lines.permute(0, 2, 3, 1, 4).flatten(1).contiguous())
    return torch.cat(parts).view(torch.int32).unflatten(1, (-1, 16))


class CodedLinear(QuantizedLinear):
    """Buffers: weight uint8 [N, ceil(K bits / 8)]; scales [N, G]; zeros, if the format has any,
    integers of `bits` bits each, packed: uint8 [N, ceil(G bits / 8)].

    A format sets `bits`, `table` and `grid`. The defaults below are those of a table of arbitrary
    values with one scale per row. There are C++ products of arbitrary tables of 16 values, of
    neighbouring integers of 1 to 7 bits, and of small floats; what else a format may be runs in
    plain PyTorch on the CPU. Group size 0 is one group per row; so is a format without group sizes.
    """

    bits: int
    has_zeros = False
    exponent_bits = 0  # of codes that are small floats: sign, exponent, mantissa

    def __init__(
        self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None,
        groupsize: int | None = None, scale_dtype: torch.dtype = torch.bfloat16,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, dtype, device, groupsize)
        groups, bytes_ = -(-in_features // self.groupsize), {"dtype": torch.uint8, "device": device}
        shape = (out_features, self.row_bytes())
        self.register_buffer("weight", torch.empty(shape, **bytes_))
        shape = (out_features, groups)
        self.register_buffer("scales", torch.empty(shape, dtype=scale_dtype, device=device))
        shape = (out_features, packed_size(groups, self.bits))
        self.register_buffer("zeros", torch.empty(shape, **bytes_) if self.has_zeros else None)
        for name in TILES:
            self.register_buffer(name, None, persistent=False)

    def row_bytes(self) -> int:
        """Bytes of a row's codes."""
        return packed_size(self.in_features, self.bits)

    def table(self) -> Tensor:
        """What each code stands for, fp32 [2 ** bits]."""
        raise NotImplementedError

    def pack(self, codes: Tensor, params: Params) -> None:
        self.weight = pack(codes, self.bits)
        self.scales = params["scales"].to(self.scales.dtype)
        if self.has_zeros:
            self.zeros = pack(params["zeros"], self.bits)

    def dequantize_rows(self, rows: slice) -> Tensor:
        """Rows of the weight, fp32."""
        codes = unpack(self.weight[rows], self.bits, self.in_features)
        values = self.table().to(codes.device)[codes.long()]
        scales = self.scales[rows].float()
        block = (1, self.groupsize)
        if self.has_zeros:
            zeros = unpack(self.zeros[rows], self.bits, scales.shape[1]).float()
            values = values - affine.block_expand(zeros, block, codes.shape)
        return values * affine.block_expand(scales, block, codes.shape)

    def panels(self) -> list[slice]:
        """All rows, as many at a time as make a bounded piece of the weight."""
        return row_chunks(self.out_features, self.in_features, 16)

    def stored_weight(self) -> Tensor:
        return torch.cat([self.dequantize_rows(rows) for rows in self.panels()])

    code_kind = "table"  # what a code is, see cuda/tiles.py

    def triton_planes(self) -> list[Tensor | None]:
        """The codes as the Triton kernels read them."""
        if self.bits == 8:
            return [self.weight.view(torch.int8), None, None]
        return lane_planes(self.weight, self.bits, self.in_features)

    def triton_weight(self) -> TritonWeight:
        """Bit planes, scales and zeros [G, N] as the Triton products read them."""
        scales, zeros = self.scales.t(), None
        if scales.shape[1] != self.out_features:
            scales = scales.expand(-1, self.out_features)
        if self.has_zeros:
            zeros = unpack(self.zeros, self.bits, scales.shape[0]).to(torch.bfloat16).t()
        kind = self.code_kind
        return TritonWeight(
            self.out_features, self.in_features, kind, self.triton_planes(), bits=self.bits,
            exponent=self.exponent_bits, groupsize=self.groupsize, scales=scales, zeros=zeros,
            zero="int" if self.has_zeros else "none",
            table=self.table().float().to(scales.device) if kind == "table" else None,
        )  # fmt: skip

    def repack(self) -> None:
        if self.repack_for_triton():
            return
        if self.weight is None or not self.has_cpu_product():
            return
        if native.prepare(self.weight.device):
            self.make_tiles()
            self.weight = self.scales = self.zeros = None

    def has_cpu_product(self) -> bool:
        """Whether there is a C++ product of such codes; here that of coded_ops.cpp."""
        if not self.has_whole_words() or self.input_way not in NATIVE_WAYS:
            return False
        if self.code_kind == "integer":
            return self.bits < 8
        return self.exponent_bits > 0 or self.bits == 4

    def has_whole_words(self) -> bool:
        """Whether every group but the last is of whole words of codes, as the tiles want it."""
        return self.groupsize % 32 == 0 or self.groupsize >= self.in_features

    def make_tiles(self) -> None:
        """The canonical buffers as tiles of 16 rows; see the top of the file."""
        if self.bits < 8:
            self.tiles = plane_tiles(self.weight, self.bits, self.in_features)
        else:
            self.tiles = byte_tiles(self.weight)
        self.tile_scales = interleave_rows(self.scales, 1)
        self.lookup = self.table().float().to(self.weight.device)
        if self.has_zeros:
            zeros = unpack(self.zeros, self.bits, self.scales.shape[1])
            self.tile_zeros = interleave_rows(zeros, 1)

    def multiply(self, x: Tensor) -> Tensor:
        return self.reference(x) if self.tiles is None else self.product(x)

    def native_form(self) -> NativeForm | None:
        if self.tiles is None:
            return None
        tensors = [
            self.tiles, self.bias, self.input_scale, self.tile_scales, self.tile_zeros,
            self.tile_positions, self.lookup,
        ]  # fmt: skip
        shape = [self.out_features, self.in_features]
        return tensors, [
            Kind.CODED, *shape, self.bits, self.groupsize, self.exponent_bits,
            NATIVE_WAYS[self.input_way], int(native.exact_activations()),
        ]  # fmt: skip

    def product(self, x: Tensor) -> Tensor:
        """The product of the tiles."""
        return torch.ops.flatllama.coded_linear(
            x, self.tiles, self.tile_scales, self.tile_zeros, self.tile_positions, self.lookup,
            self.bias, self.out_features, self.in_features, self.bits, self.groupsize,
            self.exponent_bits, NATIVE_WAYS[self.input_way], native.exact_activations(),
        )  # fmt: skip

    def reference(self, x: Tensor) -> Tensor:
        """The product in plain torch, a panel of the weight at a time."""
        parts = [F.linear(x, self.dequantize_rows(r).to(x.dtype)) for r in self.panels()]
        y = torch.cat(parts, -1)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def quantized_reference(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Quantized x (integers or e4m3 values) times the weight, then times x's scale."""
        y = torch.cat([F.linear(x.float(), self.dequantize_rows(r)) for r in self.panels()], -1)
        y = y * scale
        return (y if self.bias is None else y + self.bias.float()).to(dtype)


class IntegerProduct:
    """4-bit codes that multiply the inputs, rounded to bytes, in integers: cpu/int4dq.cpp.

    Without `tile_scales` a group's scale applies to its sum. With them, fp32 [N], it takes the
    codes to integers of 8 bits, and `tile_scales` takes those to the weight.
    """

    def has_cpu_product(self) -> bool:
        return self.has_whole_words()

    def make_integer_tiles(self, scales: Tensor, groupsize: int) -> None:
        """Tiles of `weight` and the groups' scales [N, G]: bf16, or fp16 with `tile_scales`."""
        self.tile_groupsize = min(groupsize, -(-self.in_features // 32) * 32)
        self.tiles = torch.ops.flatllama.int4dq_repack(
            self.weight, scales, self.in_features, self.tile_groupsize
        )

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.flatllama.int4dq_linear(
            x, self.tiles, self.tile_scales, self.bias, self.out_features, self.in_features,
            self.tile_groupsize,
        )  # fmt: skip

    def native_form(self) -> NativeForm | None:
        if self.tiles is None:
            return None
        numbers = [Kind.INT4DQ, self.out_features, self.in_features, self.tile_groupsize]
        return [self.tiles, self.bias, self.input_scale, self.tile_scales], numbers
