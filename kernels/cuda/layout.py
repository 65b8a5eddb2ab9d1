"""Weights as the Triton kernels read them.

Codes of 8 bits and float weights stay as they are, row by row. Codes of fewer bits are laid out in
chunks of 256 columns, 32 lanes of 8 codes each; column 32 s + j of a chunk is code s of lane j. So
one shift by a constant gives 32 neighbouring columns of a row, x is read in order, and four lanes
of codes are one 128-bit load. A code's bits lie in up to three planes, one per binary digit of
`bits`:

    4 bits   the code's lowest 4 bits      8 codes fill an int32 a lane
    2 bits   the next 2                                an int16
    1 bit    the next 1                                an int8

so 6-bit codes take an int32 and an int16. A 2:4 lane holds two blocks of 4 columns, in the storage
of 3-bit codes. In the int16 are the first kept codes of both blocks, then their second ones; in the
int8 the numbers of their two patterns (PATTERNS). Lane j of a chunk has its blocks j and 32 + j,
and x is permuted to match (`sparse_columns`).

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
PLANES = {4: torch.int32, 2: torch.int16, 1: torch.int8}  # bits of a code in it: a lane's type
PANEL = 2**22  # codes that are rearranged at a time
PATTERNS = list(itertools.combinations(range(4), 2))  # columns of a 2:4 block's two kept codes
DEQUANTIZE_ROWS = 512  # of x: from here on the weight is dequantized and the library multiplies


def lane_planes(packed: Tensor, bits: int, columns: int) -> list[Tensor | None]:
    """Packed codes (packing.py) [N, C] of K `columns` -> planes [N, 32 ceil(K / 256)] or None."""
    step = max(1, PANEL // columns)
    parts = [_planes(unpack(p, bits, columns), bits) for p in packed.split(step)]
    return [None if p[0] is None else torch.cat(p) for p in zip(*parts, strict=True)]


def _planes(codes: Tensor, bits: int) -> list[Tensor | None]:
    codes = F.pad(codes, (0, -codes.shape[1] % CHUNK)).unflatten(1, (-1, SLOTS, LANES))
    planes, below = [], 0
    for width, dtype in PLANES.items():
        if not bits & width:
            planes.append(None)
            continue
        part = (codes >> below).to(torch.int64) & (2**width - 1)  # [n, chunks, 8, 32]
        shifts = torch.arange(SLOTS, device=codes.device)[:, None] * width
        planes.append((part << shifts).sum(2).flatten(1).to(dtype))  # the sign bit wraps
        below += width
    return planes


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
