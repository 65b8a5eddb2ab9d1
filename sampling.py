"""How the next token is drawn from the logits: greedy, temperature, top-k, top-p, min-p."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError
from kernels import native


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 filter nothing."""

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError("sampling needs finite temperature >= 0, top_k >= 0, 0 < top_p <= 1")
        if 0 < self.temperature < 1e-5:  # logits over it would pass what fp32 holds
            raise UserError(f"temperature {self.temperature}: take 0, or at least 1e-5")
        if not 0 <= self.min_p <= 1:
            raise UserError("sampling needs 0 <= min_p <= 1")


def probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The filtered distribution: (p [B, n] unnormalized, their token ids [B, n] or None for all).

    In order: temperature; the top_k largest; the smallest set whose probability reaches top_p
    (nucleus, arXiv 1904.09751); tokens of at least min_p times the largest (arXiv 2407.01082).
    """
    ids = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, ids = top_k(logits, sampling.top_k)
    logits = logits.float() / sampling.temperature
    if ids is None and sampling.top_p < 1:
        logits, ids = logits.sort(descending=True)
    p = logits.softmax(-1)
    if sampling.top_p < 1:
        before = p.cumsum(-1) - p
        p = p.masked_fill((before > 0) & (before >= sampling.top_p), 0)  # the first always stays
    if sampling.min_p > 0:
        p = p.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), 0)
    return p, ids


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of logits [B, V], the largest first, and their ids: both [B, k]."""
    if native.serves(logits):  # torch's takes a tenth of a small model's step
        ids = torch.ops.flatllama.top_k(logits, k)
        return logits.gather(-1, ids), ids
    return logits.topk(k)


def sample(logits: Tensor, u: Tensor, sampling: Sampling) -> Tensor:
    """Draw a token per row. logits [B, V], u [B] uniform in [0, 1) -> int64 [B].

    The inverse of the cumulative distribution at u, so that one number per row, drawn by the host's
    seeded generator, decides the token in eager and in compiled code alike.
    """
    if sampling.temperature == 0:
        return greedy(logits)
    p, ids = probabilities(logits, sampling)
    choice = draw(p, u)
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]


def greedy(logits: Tensor) -> Tensor:
    """The first of the largest: logits [B, V] -> int64 [B].

    As a comparison with the maximum it is vectorized by the compiler; argmax is three times slower.
    """
    if native.serves(logits):
        return torch.ops.flatllama.greedy(logits)
    size = logits.shape[-1]
    ids = torch.arange(size, dtype=torch.int32, device=logits.device)
    largest = logits == logits.amax(-1, keepdim=True)
    return torch.where(largest, ids, size - 1).amin(-1).long()


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Indices [B, 1] drawn from p [B, n], unnormalized, at u [B] uniform in [0, 1)."""
    cdf = p.cumsum(-1)
    choice = (cdf <= u[:, None] * cdf[:, -1:]).sum(-1, keepdim=True)
    return choice.clamp(max=p.shape[-1] - 1)
