"""GPTQ: choose a weight's codes so that the layer's output, not the weight, changes least.

Frantar et al. 2022 (arXiv 2210.17323). With H = E[x x^T] of the layer's inputs, the columns of
W [N, K] are rounded one after another, and each rounding error is passed on to the columns still
free, so as to minimize tr((W - Q) H (W - Q)^T):

    U = upper Cholesky factor of H^-1          e = (w_i - q_i) / U_ii          w_j -= e U_ij, j > i

The scales are fixed before the first update ("static groups"), chosen by a clip search in the
metric of H; then the columns can go in order of falling H_ii ("act-order"), and nothing needs to be
stored of that order. Written against a format's grid: it serves every format.
"""

import torch
from torch import Tensor

from calibration import InputStatistics
from kernels.linear import Grid, Params


def damped(hessian: Tensor, percdamp: float) -> Tensor:
    """H + percdamp * mean(diag H) * I, with 1 on the diagonal of a dead column (H_ii = 0).

    A dead column's input was never seen; with no correlation to the others it is rounded to
    nearest, which is safer than the usual zero should its input turn up after all.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    diagonal.add_(percdamp * diagonal[~dead].mean() if not dead.all() else 0.0)
    diagonal[dead] = 1.0
    return hessian


def inverse_factor(hessian: Tensor, percdamp: float) -> Tensor:
    """U, upper triangular, with U^T U = (H + damping)^-1; damping grows tenfold until one exists."""
    for attempt in range(8):
        factor, info = torch.linalg.cholesky_ex(damped(hessian, percdamp * 10**attempt))
        if info == 0:
            factor, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if info == 0 and factor.isfinite().all():
            return factor
    raise ValueError("the Hessian is not finite: the calibration activations overflowed")


def fit_clipped(w: Tensor, grid: Grid, hessian: Tensor, steps: int = 20, lowest: float = 0.5):
    """The grid's params whose range, shrunk by some factor of `lowest`..1, fits each group best.

    The error of a group's rounding error e is e H_gg e^T, H_gg its block of the Hessian. The best
    factor is chosen for each row and group. w [N, K] fp32 -> params, entries [N, G].
    """
    best, best_error = None, None
    for step in range(steps):
        params = grid.fit(w, 1 - (1 - lowest) * step / steps)
        error = w - grid.decode(codes := grid.round_to_nearest(w, params), expand(grid, params, w))
        del codes
        error = torch.stack(
            [
                ((e @ h) * e).sum(1)
                for e, h in zip(
                    error.split(grid.groupsize, 1), diagonal_blocks(hessian, grid), strict=True
                )
            ],
            dim=1,
        )  # [N, G]
        if best is None:
            best, best_error = params, error
            continue
        better = error < best_error
        best = {name: torch.where(better, params[name], best[name]) for name in best}
        best_error = torch.where(better, error, best_error)
    return best


def expand(grid: Grid, params: Params, w: Tensor) -> Params:
    """Every column's params, entries [N, K]."""
    return grid.columns(params, torch.arange(w.shape[1], device=w.device))


def diagonal_blocks(hessian: Tensor, grid: Grid) -> list[Tensor]:
    """The Hessian within each group of columns, [g, g] each."""
    rows = hessian.split(grid.groupsize)
    return [r[:, i * grid.groupsize :][:, : len(r)] for i, r in enumerate(rows)]


def gptq(
    w: Tensor, grid: Grid, stats: InputStatistics, percdamp: float = 0.01, blocksize: int = 128
) -> tuple[Tensor, Params]:
    """Codes [N, K] and params of the weight w [N, K] fp32, for inputs like those of `stats`."""
    params = fit_clipped(w, grid, stats.hessian)
    order = stats.hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(stats.hessian[order][:, order], percdamp)
    free = w.t()[order]  # [K, N], the columns in the order of their turn
    codes = None
    for first in range(0, len(order), blocksize):
        columns = order[first : first + blocksize]
        last = first + len(columns)
        rows, errors = round_block(
            free[first:last], factor[first:last, first:last], grid, grid.columns(params, columns)
        )
        free[last:] -= factor[first:last, last:].t() @ errors
        if codes is None:
            codes = torch.empty(free.shape, dtype=rows.dtype, device=w.device)
        codes[columns] = rows
    return codes.t().contiguous(), params


def round_block(w: Tensor, factor: Tensor, grid: Grid, params: Params) -> tuple[Tensor, Tensor]:
    """Round the columns w [C, N] in turn, passing errors on within the block (w is overwritten).

    Returns the codes [C, N] and the errors e [C, N] that the columns after the block shall absorb.
    """
    params = {name: p.t().contiguous() for name, p in params.items()}  # [C, N]
    codes, errors = [], torch.empty_like(w)
    for i in range(len(w)):
        own = {name: p[i][:, None] for name, p in params.items()}
        codes.append(grid.round(w[i][:, None], own))
        errors[i] = (w[i] - grid.decode(codes[-1], own)[:, 0]) / factor[i, i]
        w[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return torch.cat(codes, 1).t(), errors
