"""int4-sparse24: of every 4 columns at most 2 are kept, in int4 with a symmetric scale per group.

    keep the 2 of 4 of largest importance (magnitude for round-to-nearest)
    s = max|w| / 7.5 in bf16      q = clamp(round(w / s), -8, 7)      w_hat = q s, pruned: 0

Groups of 128 columns, or one per row (group size 0). Stored per row and 4 columns: the 2 kept codes
q + 8 in one byte, the earlier column low, and their positions 0..3 in 2 bits each, the earlier
lowest. Source: the 2:4 sparse int4 format of Sparse-Marlin (arXiv 2408.11743) in torchao.

For algorithms: the grid's `prune_block` is 4 and `keep(importance)` says which weights of whole
blocks may be nonzero. A weight that is not kept is rounded as 0: its code is the code of 0. So the
codes [N, K] alone carry the mask, and `pack` refuses a block with three nonzero codes. An algorithm
that goes through the columns decides at each block's first column, from weights updated so far
(SparseGPT: importance = w^2 / diag(U)^2), and takes columns in order of whole blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import affine
from kernels.coded import CodedLinear, interleave_rows, plane_tiles
from kernels.cuda.layout import lane_planes
from kernels.int8dq_int4 import SymmetricGrid
from kernels.linear import Params
from kernels.packing import pack, packed_size, unpack

ZERO = 8  # the code of a pruned weight


class Sparse24Grid(SymmetricGrid):
    """-8..7 times a scale, at most 2 of 4 columns nonzero; params: scales [N, G]."""

    prune_block = 4

    def __init__(self, groupsize: int):
        super().__init__(4, groupsize)

    def keep(self, importance: Tensor) -> Tensor:
        blocks = F.pad(importance, (0, -importance.shape[1] % 4), value=-1.0).unflatten(1, (-1, 4))
        kept = torch.zeros_like(blocks, dtype=torch.bool)
        kept.scatter_(-1, blocks.topk(2, dim=-1).indices, True)
        return kept.flatten(1)[:, : importance.shape[1]]


class Int4Sparse24Linear(CodedLinear):
    """Buffers, Q = ceil(K / 4): weight uint8 [N, Q]; positions uint8 [N, ceil(Q / 2)]; scales bf16
    [N, G]."""

    name, bits = "int4-sparse24", 4
    default_groupsize = 128
    groupsizes = (0, 32, 64, 128, 256)
    code_kind = "integer"

    def __init__(
        self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None,
        groupsize: int | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, dtype, device, groupsize)
        shape = (out_features, packed_size(self.row_bytes(), 4))
        positions = torch.empty(shape, dtype=torch.uint8, device=device)
        self.register_buffer("positions", positions)

    def row_bytes(self) -> int:
        return -(-self.in_features // 4)

    def column_bits(self, buffer: str) -> int:
        return {"weight": 2, "positions": 1}[buffer]

    def grid(self) -> Sparse24Grid:
        return Sparse24Grid(self.groupsize)

    def table(self) -> Tensor:
        return torch.arange(16.0) - ZERO

    def pack(self, codes: Tensor, params: Params) -> None:
        parts = [self._compress(codes[rows]) for rows in self.panels()]
        self.weight, self.positions = (torch.cat(p) for p in zip(*parts, strict=True))
        self.scales = params["scales"].to(torch.bfloat16)

    def _compress(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """codes [n, K] -> kept codes [n, Q] and positions [n, ceil(Q / 2)], uint8."""
        blocks = F.pad(codes, (0, -codes.shape[1] % 4), value=ZERO).unflatten(1, (-1, 4))
        kept = blocks != ZERO
        if (kept.sum(-1) > 2).any():
            raise ValueError("more than 2 of 4 weights are nonzero: not 2:4 sparse")
        order = kept.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
        where = order[..., :2].sort(dim=-1).values  # [n, Q, 2]
        both = blocks.gather(-1, where)
        weight = both[..., 0] | both[..., 1] << 4
        return weight, pack(where[..., 0] | where[..., 1] << 2, 4)

    def codes(self, rows: slice) -> Tensor:
        """Codes of rows, those of pruned columns too: uint8 [n, K]."""
        weight = self.weight[rows]
        where = unpack(self.positions[rows], 4, weight.shape[1]).long()
        where = torch.stack([where & 3, where >> 2], -1)  # [n, Q, 2]
        both = torch.stack([weight & 15, weight >> 4], -1)
        codes = weight.new_full((*weight.shape, 4), ZERO)
        return codes.scatter(-1, where, both).flatten(1)[:, : self.in_features]

    def dequantize_rows(self, rows: slice) -> Tensor:
        values, scales = self.codes(rows).float() - ZERO, self.scales[rows].float()
        return values * affine.block_expand(scales, (1, self.groupsize), values.shape)

    def triton_planes(self) -> list[Tensor | None]:
        """Dense: spreading kept codes in the loop takes more time than the bytes that it saves."""
        packed = torch.cat([pack(self.codes(rows), 4) for rows in self.panels()])
        return lane_planes(packed, 4, self.in_features)

    def make_tiles(self) -> None:
        """Kept codes as signed numbers, so that what fills a tile up is 0, and positions."""
        kept = 2 * self.row_bytes()
        self.tiles = plane_tiles(self.weight ^ 0x88, 4, kept)
        self.tile_positions = plane_tiles(self.positions, 2, kept)
        self.tile_scales = interleave_rows(self.scales, 1)
        self.lookup = self.table()
        self.positions = None
