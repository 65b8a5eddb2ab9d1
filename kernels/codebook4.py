"""codebook4: 16 learned values per tensor, a scale per group of 64 columns.

    s = max|w| of the group, bf16      code = index of the value nearest to w / s
    w_hat = codebook[code] * s

The 16 values minimize the squared error of the weights, sum s^2 (w / s - value)^2: k-means over at
most 2^20 scaled weights of the tensor, by Lloyd's iteration from the distribution's quantiles and
from even spacing, whichever ends better; in one dimension, on sorted values with running sums, an
iteration costs 16 searches. Source: the codebook scheme of torchao, whose scale is the signed
maximum; the magnitude is what is meant.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels import affine
from kernels.coded import CodedLinear
from kernels.linear import Grid, Params

SAMPLE = 2**20  # weights that the codebook is learned from
STEPS = 200  # of Lloyd's iteration, at most


def group_scales(w: Tensor, groupsize: int) -> Tensor:
    """max|w| of each group, [N, G] fp32, rounded to bf16."""
    amax = affine.block_reduce(w.abs(), (1, groupsize), torch.amax)
    return amax.clamp(min=1e-9).to(torch.bfloat16).float()


def kmeans_1d(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """`count` ascending centers of least weighted squared distance to values, weights [S]."""
    values, order = values.double().sort()
    weights = weights.double()[order]
    zero = values.new_zeros(1)
    mass = torch.cat([zero, weights.cumsum(0)])
    moment = torch.cat([zero, (weights * values).cumsum(0)])
    parts = (torch.arange(count, dtype=torch.float64, device=values.device) + 0.5) / count
    quantiles = torch.searchsorted(mass[1:], parts * mass[-1]).clamp(max=len(values) - 1)
    even = torch.lerp(values[0], values[-1], (parts * count - 0.5) / (count - 1))
    results = [_lloyd(values, mass, moment, start) for start in (values[quantiles], even)]
    return max(results, key=lambda result: result[1])[0].float()


def _lloyd(values: Tensor, mass: Tensor, moment: Tensor, centers: Tensor) -> tuple[Tensor, float]:
    """Lloyd's iteration on sorted values, by running sums of weights and of weighted values.

    Returns the centers and how much they explain: sum weight * center^2, the larger the better.
    """
    for _ in range(STEPS):
        edges = torch.searchsorted(values, (centers[1:] + centers[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_tensor([len(values)])])
        inside = mass[edges].diff()
        means = moment[edges].diff() / inside.clamp(min=1e-300)
        moved = torch.where(inside > 0, means, centers)  # an empty cell keeps its center
        done = torch.allclose(moved, centers, rtol=1e-6, atol=1e-9)
        centers = moved
        if done:
            break
    return centers, (inside * centers.square()).sum().item()


class CodebookGrid(Grid):
    """16 values of the tensor times a scale per group; params: scales [N, G].

    The codebook is what the tensor shares: `learn` finds it, `shared` gives it to the module.
    """

    def __init__(self, groupsize: int):
        super().__init__(groupsize)
        self.codebook: Tensor | None = None

    def learn(self, pieces: Iterable[Tensor]) -> None:
        """The 16 values, from a seeded sample of all weights: of each piece its share."""
        generator, seen, sample = torch.Generator().manual_seed(0), 0, torch.empty(2, 0)

        def some(count: int, most: int) -> Tensor:
            return torch.randperm(count, generator=generator, device="cpu")[:most]

        for piece in pieces:
            w = piece.float()
            scales = affine.block_expand(
                group_scales(w, self.groupsize), (1, self.groupsize), w.shape
            )
            points = torch.stack([w / scales, scales.square()]).flatten(1)  # values and weights
            seen += w.numel()
            new = some(w.numel(), -(-SAMPLE * w.numel() // seen))
            old = some(sample.shape[1], SAMPLE - len(new))
            sample = torch.cat([sample[:, old].to(points), points[:, new]], 1)
        self.codebook = kmeans_1d(*sample, 16)

    def shared(self) -> Params:
        return {"codebook": self.codebook}

    def fit(self, w: Tensor, shrink: float = 1.0) -> Params:
        if self.codebook is None:
            self.learn([w])
        scales = group_scales(w, self.groupsize) * shrink
        return {"scales": scales.to(torch.bfloat16).float()}

    def round(self, w: Tensor, params: Params) -> Tensor:
        middles = (self.codebook[1:] + self.codebook[:-1]) / 2
        return torch.bucketize((w / params["scales"]).contiguous(), middles).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self.codebook[codes.long()] * params["scales"]


class Codebook4Linear(CodedLinear):
    """Buffers: weight uint8 [N, ceil(K / 2)]; scales bf16 [N, G]; codebook fp32 [16]."""

    name, bits = "codebook4", 4
    default_groupsize = 64
    shared = ("codebook",)

    def __init__(
        self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None,
        groupsize: int | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, dtype, device, groupsize)
        self.register_buffer("codebook", torch.empty(16, device=device))

    def grid(self) -> CodebookGrid:
        return CodebookGrid(self.groupsize)

    def pack(self, codes: Tensor, params: Params) -> None:
        super().pack(codes, params)
        self.codebook = params["codebook"].float()

    def table(self) -> Tensor:
        return self.codebook
