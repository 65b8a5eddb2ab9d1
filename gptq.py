"""GPTQ: choose a weight's codes so that the layer's output, not the weight, changes least.

Frantar et al. 2022 (arXiv 2210.17323). With H = E[x x^T] of the layer's inputs, the columns of
W [N, K] are rounded one after another, and each rounding error is passed on to the columns still
free, so as to minimize tr((W - Q) H (W - Q)^T):

    U = upper Cholesky factor of H^-1          e = (w_i - q_i) / U_ii          w_j -= e U_ij, j > i

The scales are fixed before the first update ("static groups"), chosen by a clip search in the
metric of H; then the columns can go in order of falling H_ii ("act-order"), and nothing needs to be
stored of that order. Two cheap steps afterwards, repeated, lower the same error further: the scales
refitted to the codes by least squares (int4), and each code rounded anew given all the others.
Written against a format's grid: it serves every format.
"""

import math

import torch
from torch import Tensor

from calibration import InputStatistics
from errors import UserError
from kernels.linear import Grid, Params


def damped(hessian: Tensor, percdamp: float) -> Tensor:
    """H + percdamp * diag(H), and 1 on the diagonal of a dead column (H_ii = 0).

    In proportion to each entry, not to their mean as in the paper: correlations shrink by
    1 / (1 + percdamp) however small the inputs are, and any covariance becomes positive definite.
    A dead column's input was never seen; without correlations it is rounded to nearest, safer than
    zero if it turns up after all.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal.mul_(1 + percdamp)
    diagonal[diagonal <= 0] = 1.0
    return hessian


def inverse_factor(hessian: Tensor, percdamp: float) -> Tensor:
    """U, upper triangular, with U^T U = (H + damping)^-1.

    Damping grows tenfold, from 1e-4 at least, until the factor exists.
    """
    for attempt in range(8):
        damping = max(percdamp, 1e-4) * 10**attempt if attempt else percdamp
        factor, info = torch.linalg.cholesky_ex(damped(hessian, damping))
        if info == 0:
            factor, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if info == 0 and factor.isfinite().all():
            return factor
    raise UserError("the Hessian is not finite: the calibration activations overflowed")


def fit_clipped(
    w: Tensor, grid: Grid, hessian: Tensor, steps: int = 20, lowest: float = 0.5
) -> Params:
    """The grid's params for w [N, K] fp32, the range of each group shrunk to fit it best.

    Tries `steps` factors from 1 down towards `lowest` and keeps, for each row and group, the one of
    the least error e H_gg e^T, e the rounding error [g], H_gg the group's block of H.
    """
    groups = w.split(grid.groupsize, 1)
    best: Params = {}
    best_error = torch.full((len(w), len(groups)), torch.inf, device=w.device)
    for step in range(steps):
        params = grid.fit(w, 1 - (1 - lowest) * step / steps)
        errors = []
        for i, group in enumerate(groups):
            own = {name: p[:, i : i + 1] for name, p in params.items()}
            error = grid.decode(grid.round(group, own), own) - group  # [N, g]
            columns = slice(i * grid.groupsize, i * grid.groupsize + group.shape[1])
            errors.append(((error @ hessian[columns, columns]) * error).sum(1))
        error = torch.stack(errors, 1)
        better = error < best_error
        best = {name: torch.where(better, p, best.get(name, p)) for name, p in params.items()}
        best_error = torch.where(better, error, best_error)
    return best


def check(
    percdamp: float = 0, clip_steps: int = 1, refinements: int = 0, blocksize: int = 1, **rest: bool
) -> None:
    """A UserError for options of `gptq` that make no sense; the rest of them always do."""
    if not 0 <= percdamp < math.inf or clip_steps < 1 or refinements < 0 or blocksize < 1:
        raise UserError("GPTQ needs percdamp >= 0 (finite), clip_steps >= 1, refinements >= 0 and "
                        "blocksize >= 1")  # fmt: skip


@torch.no_grad()
def gptq(
    w: Tensor,
    grid: Grid,
    stats: InputStatistics,
    *,
    percdamp: float = 0.25,
    clip_steps: int = 20,
    act_order: bool = True,
    refinements: int = 2,
    blocksize: int = 128,
) -> tuple[Tensor, Params]:
    """Codes [N, K] and params of the weight w [N, K] fp32, for inputs like those of `stats`.

    Args:
        percdamp: damping, in proportion to the Hessian's diagonal.
        clip_steps: how many ranges the clip search tries; 1 takes the full range.
        act_order: columns of large inputs first; else from left to right.
        refinements: rounds of `refit` and `sweep` after GPTQ's own pass.
            What each of the four changes: benchmarks/README.md.
        blocksize: columns updated at once; changes the speed only.
    """
    check(percdamp, clip_steps, refinements, blocksize)
    hessian = damped(stats.hessian, percdamp)
    keep = grid.keep(w.abs() * hessian.diagonal().sqrt())  # Wanda's importance, arXiv 2306.11695
    params, keep = fit_clipped(w * keep, grid, hessian, clip_steps), keep.t()  # [K, N]
    order = torch.arange(w.shape[1], device=w.device)
    if act_order:
        order = stats.hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(stats.hessian[order][:, order], percdamp)
    free, free_keep = w.t()[order], keep[order]  # [K, N], the columns in the order of their turn
    codes = []
    for first in range(0, len(order), blocksize):
        last = min(first + blocksize, len(order))
        rows, errors = round_block(
            free[first:last], free_keep[first:last], factor[first:last, first:last],
            grid, grid.columns(params, order[first:last]),
        )  # fmt: skip
        free[last:] -= factor[first:last, last:].t() @ errors
        codes.append(rows)
    back = order.argsort()
    codes = torch.cat(codes)[back].t().contiguous()
    for _ in range(refinements):
        params = refit(w, codes, params, grid, hessian)
        codes = sweep(w, codes, params, keep, grid, hessian, order, blocksize)
    return codes, params


def round_block(
    w: Tensor, keep: Tensor, factor: Tensor, grid: Grid, params: Params
) -> tuple[Tensor, Tensor]:
    """Round the columns w [C, N] in turn, passing errors on within the block (w is overwritten).

    Where `keep` [C, N] is false a sparse grid wants 0. Returns the codes [C, N] and the errors e
    [C, N] that the columns after the block shall absorb.
    """
    params = {name: p.t().contiguous() for name, p in params.items()}  # [C, N]
    codes, errors = [], torch.empty_like(w)
    for i in range(len(w)):
        own = {name: p[i][:, None] for name, p in params.items()}
        codes.append(grid.round((w[i] * keep[i])[:, None], own))  # [N, 1]
        errors[i] = (w[i] - grid.decode(codes[-1], own)[:, 0]) / factor[i, i]
        w[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return torch.cat(codes, 1).t(), errors


def refit(w: Tensor, codes: Tensor, params: Params, grid: Grid, hessian: Tensor) -> Params:
    """Each group's params by least squares in the metric of H, the codes kept.

    A group's new params are taken in the rows where they lower tr(D H D^T), D = W_hat - W, all
    other groups as they are; so the error never grows. Unchanged where the grid has no `refit`.
    """
    params = {name: p.clone() for name, p in params.items()}
    columns = torch.arange(w.shape[1], device=w.device)
    w_hat = grid.decode(codes, grid.columns(params, columns))  # [N, K]
    gradient = (w_hat - w) @ hessian
    for i, own in enumerate(columns.split(grid.groupsize)):
        h, old = hessian[own][:, own], w_hat[:, own]
        new = grid.refit(codes[:, own], old @ h - gradient[:, own], h)
        if new is None:
            return params
        step = grid.decode(codes[:, own], new) - old
        gain = ((step @ h) * step).sum(1) + 2 * (step * gradient[:, own]).sum(1)
        better = gain < 0  # false where a refit failed: NaN
        step = torch.where(better[:, None], step, 0)
        gradient += step @ hessian[own]
        w_hat[:, own] += step
        for name, value in new.items():
            params[name][:, i] = torch.where(better, value[:, 0], params[name][:, i])
    return params


def sweep(
    w: Tensor, codes: Tensor, params: Params, keep: Tensor, grid: Grid, hessian: Tensor,
    order: Tensor, blocksize: int,
) -> Tensor:  # fmt: skip
    """Round every column once more, to the best value given all the others: coordinate descent.

    The best value of column i is w_hat_i - (D H)_i / H_ii, and rounding it can only lower the
    error. w and codes [N, K]; `keep` [K, N] as in `round_block`.
    """
    columns = torch.arange(w.shape[1], device=w.device)
    codes = codes.t().contiguous()  # [K, N]
    w_hat = grid.decode(codes.t(), grid.columns(params, columns)).t().contiguous()
    gradient = hessian @ (w_hat - w.t())
    for own in order.split(blocksize):
        h, grad, old, kept = hessian[own][:, own], gradient[own], w_hat[own], keep[own]
        new, chosen = torch.empty_like(old), []
        p = {name: v.t().contiguous() for name, v in grid.columns(params, own).items()}
        for i in range(len(own)):
            best = (old[i] - grad[i] / h[i, i]) * kept[i]
            column = {name: v[i][:, None] for name, v in p.items()}
            chosen.append(grid.round(best[:, None], column))  # [N, 1]
            new[i] = grid.decode(chosen[-1], column)[:, 0]
            grad[i + 1 :].addr_(h[i, i + 1 :], new[i] - old[i])
        codes[own] = torch.cat(chosen, 1).t()
        gradient += hessian[:, own] @ (new - old)
        w_hat[own] = new
    return codes.t().contiguous()
