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

Scales are [G, N]: neighbouring rows of a tile are neighbours in memory. They are read in words of
32 bits, since fewer cannot be loaded ahead: the scale of a group, low, and its zero, both bf16; or
without zeros the scales of two groups, [ceil(G / 2), N], the earlier one low, in bf16, or in fp16
where they take the codes to int8 numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import row_chunks, unpack

LANES, SLOTS = 32, 8
CHUNK = LANES * SLOTS  # columns
PLANES = {4: torch.int32, 2: torch.int16, 1: torch.int8}  # binary digit of `bits`: a lane's type
DEQUANTIZE_ROWS = 512  # of x: from here on the weight is dequantized and the library multiplies


def lane_planes(packed: Tensor, bits: int, columns: int) -> list[Tensor | None]:
    """Packed codes (packing.py) [N, C] of K `columns` -> planes [N, 32 ceil(K / 256)] or None."""
    chunks = row_chunks(len(packed), columns)
    parts = [_planes(unpack(packed[rows], bits, columns), bits) for rows in chunks]
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
