"""Weights as the Triton kernels read them.

Codes of 8 bits and float weights stay as they are, row by row. Codes of fewer bits are laid out in
chunks of 256 columns, 32 lanes of 8 codes each; column 32 s + j of a chunk is code s of lane j. So
one shift by a constant gives 32 neighbouring columns of a row, x is read in order, and four lanes
of codes are one 128-bit load. A lane has up to three planes, one per binary digit of `bits`:

    4    an int32, two words of 16 bits
    2    an int16, one word
    1    an int8, a word of 8 bits

so 6-bit codes take an int32 and an int16. Each word holds as many whole codes as fit, from its
lowest bit on, since a code in one piece takes the fewest instructions; the codes that are then
missing are made of the bits left over (`pieces`).

A 2:4 lane holds two blocks of 4 columns, in the storage of 3-bit codes. In the int16 are the first
kept codes of both blocks, then their second ones; in the int8 the numbers of their two patterns
(PATTERNS). Lane j of a chunk has its blocks j and 32 + j, and x is permuted to match
(`sparse_columns`).

Scales are [G, N]: neighbouring rows of a tile are neighbours in memory. They are read in words of
32 bits, since fewer cannot be loaded ahead: the scale of a group, low, and its zero, both bf16; or
without zeros the scales of two groups, [ceil(G / 2), N], the earlier one low, in bf16, or in fp16
where they take the codes to int8 numbers.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import unpack

LANES, SLOTS = 32, 8
CHUNK = LANES * SLOTS  # columns
PLANES = {4: torch.int32, 2: torch.int16, 1: torch.int8}  # binary digit of `bits`: a lane's type
PANEL = 2**22  # codes that are rearranged at a time
PATTERNS = list(itertools.combinations(range(4), 2))  # columns of a 2:4 block's two kept codes
DEQUANTIZE_ROWS = 512  # of x: from here on the weight is dequantized and the library multiplies


def lane_planes(packed: Tensor, bits: int, columns: int) -> list[Tensor | None]:
    """Packed codes (packing.py) [N, C] of K `columns` -> planes [N, 32 ceil(K / 256)] or None."""
    step = max(1, PANEL // columns)
    parts = [_planes(unpack(p, bits, columns), bits) for p in packed.split(step)]
    return [None if p[0] is None else torch.cat(p) for p in zip(*parts, strict=True)]


def pieces(bits: int) -> list[list[tuple[int, int, int]]]:
    """Where a lane's codes lie: of each its pieces (plane, first bit, bits), lowest bits first."""
    words = [(0, 0, 16), (0, 16, 16)] if bits & 4 else []  # plane, first bit, bits
    words += [(1, 0, 16)] if bits & 2 else []
    words += [(2, 0, 8)] if bits & 1 else []
    codes, left = [], []
    for plane, first, size in words:
        codes += [[(plane, first + i * bits, bits)] for i in range(size // bits)]
        if size % bits:
            left.append((plane, first + size - size % bits, size % bits))
    while left:
        code, wanted = [], bits
        while wanted:
            plane, first, size = left.pop(0)
            taken = min(size, wanted)
            code.append((plane, first, taken))
            wanted -= taken
            if taken < size:
                left.insert(0, (plane, first + taken, size - taken))
        codes.append(code)
    return codes


PIECES = [*map(pieces, range(8)), [[(0, 0, 8)]]]  # by bits


def _planes(codes: Tensor, bits: int) -> list[Tensor | None]:
    codes = F.pad(codes, (0, -codes.shape[1] % CHUNK)).unflatten(1, (-1, SLOTS, LANES)).long()
    planes = [0, 0, 0]
    for code, parts in zip(codes.unbind(2), PIECES[bits], strict=True):  # [n, chunks, 32]
        for plane, first, width in parts:
            planes[plane] += (code & (2**width - 1)) << first
            code = code >> width
    return [
        plane.flatten(1).to(dtype) if bits & digit else None  # the sign bit wraps
        for plane, (digit, dtype) in zip(planes, PLANES.items(), strict=True)
    ]


def sparse_planes(weight: Tensor, positions: Tensor) -> list[Tensor | None]:
    """Canonical 2:4 buffers (sparse24.py) [N, Q], [N, ceil(Q / 2)] -> planes as of 3-bit codes."""
    quads = weight.shape[1]

    def blocks(x: Tensor) -> Tensor:  # j and 32 + j of a chunk together: [N, chunks, 2, 32]
        return F.pad(x, (0, -quads % (CHUNK // 4))).unflatten(1, (-1, 2, LANES)).to(torch.int32)

    first, second = blocks(weight & 15), blocks(weight >> 4)
    codes = first[:, :, 0] | first[:, :, 1] << 4 | second[:, :, 0] << 8 | second[:, :, 1] << 12
    pattern = torch.zeros(16, dtype=torch.uint8, device=weight.device)
    for i, (a, b) in enumerate(PATTERNS):
        pattern[a | b << 2] = i
    pattern = blocks(pattern[unpack(positions, 4, quads).long()])
    pattern = pattern[:, :, 0] | pattern[:, :, 1] << 4
    return [None, codes.flatten(1).to(torch.int16), pattern.flatten(1).to(torch.int8)]


def sparse_columns(x: Tensor) -> Tensor:
    """x [..., K] in the order of the 2:4 lanes, zeros filled in: [..., 256 ceil(K / 256)].

    Column 128 h + 4 j + c of a chunk, c of block 32 h + j, comes to place 32 (4 h + c) + j.
    """
    x = F.pad(x, (0, -x.shape[-1] % CHUNK)).unflatten(-1, (-1, 2, LANES, 4))
    return x.transpose(-1, -2).flatten(-4)
