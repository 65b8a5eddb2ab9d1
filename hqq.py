"""HQQ: choose each group's zero point by half-quadratic optimization. No data is needed.

Badri and Shaji 2023 (https://mobiusml.github.io/hqq_blog). The rounding error of a group shall be
small in the norm |.|^p, p < 1, which forgives a few large errors. With the scale fixed, two steps
take turns, `beta` growing slowly:

    e = shrink(w - w_hat) = sign(x) max(|x| - |x|^(p - 1) / beta, 0)       the errors forgiven
    zero = mean over the group of q - (w - e) / s                          the rest, least squares

The second step moves the whole grid by mean(w - e - w_hat). Here x is measured in units of the
group's scale, so that the result does not depend on the weight's units.

A group keeps whichever of all the parameters tried has the least squared error, those of plain
rounding among them. Beyond the paper, the full range is not the only start: some narrower ones are
tried as well (`ranges`; 1 is the paper's). Formats of integer zero points (uint1 .. uint7) live on
that: a move is less than half a step and rounds away, so that from the full range alone HQQ is
plain rounding there. torchao's uintx-hqq takes float zeros, and whole bytes for its codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from kernels.linear import Grid, Params, QuantizedLinear

__version__ = "0"  # transformers takes any module of this name for the package hqq, and asks


def refuse(layer: QuantizedLinear) -> str | None:
    """Why HQQ makes no sense for a format, if it does not."""
    if layer.grid().free_zero:
        return None
    return f"HQQ refits zero points, and {layer.name} has none"


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The proximal step of |x|^p: small entries become 0, large ones a little smaller."""
    magnitude = x.abs()
    return x.sign() * F.relu(magnitude - magnitude.clamp(min=1e-8) ** (p - 1) / beta)


def check(steps: int = 1, ranges: int = 1, **rest: float) -> None:
    """A UserError for options of `hqq` that make no sense; of p, beta, growth, lowest any number is
    tried."""
    if steps < 1 or ranges < 1:
        raise UserError("HQQ needs steps >= 1 and ranges >= 1")


@torch.no_grad()
def hqq(
    w: Tensor,
    grid: Grid,
    stats: object = None,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
    ranges: int = 5,
    lowest: float = 0.5,
) -> tuple[Tensor, Params]:
    """Codes [N, K] and params of the weight w [N, K] fp32.

    Args:
        p, beta, growth: the norm, and the penalty and its growth per step.
        steps: at most so many; they end when the mean error stops falling.
        ranges: how many ranges to start from, 1 down towards `lowest` times the full one.
    """
    check(steps, ranges)
    (n, k), size = w.shape, min(grid.groupsize, w.shape[1])
    # One row per group, the last one of a row of w filled up: [N G, g].
    groups = F.pad(w, (0, -k % size)).view(-1, size)
    inside = F.pad(torch.ones_like(w[:1]), (0, -k % size)).view(-1, size).repeat(n, 1)
    count = inside.sum(1, keepdim=True)
    best: Params = {}
    best_error = torch.full_like(count, torch.inf)
    for i in range(ranges):
        params = grid.fit(w, 1 - (1 - lowest) * i / ranges)  # [N, G]
        params = {name: value.reshape(-1, 1) for name, value in params.items()}
        penalty, last = beta, float("inf")
        for _ in range(steps + 1):
            error = (groups - grid.decode(grid.round(groups, params), params)) * inside
            squared = error.square().sum(1, keepdim=True)
            better = squared < best_error
            best = {name: torch.where(better, v, best.get(name, v)) for name, v in params.items()}
            best_error = torch.where(better, squared, best_error)
            if (mean := error.abs().mean().item()) >= last:
                break
            last = mean
            step = grid.step(params)
            kept = error - shrink(error / step, penalty, p) * step
            params = grid.shift(params, kept.sum(1, keepdim=True) / count)
            penalty *= growth
    params = {name: value.view(n, -1) for name, value in best.items()}
    return grid.round_to_nearest(w, params), params
