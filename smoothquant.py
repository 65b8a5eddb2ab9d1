"""SmoothQuant: move outliers from the inputs, which are quantized too, into the weight.

Xiao et al. 2022 (arXiv 2211.10438). For a format whose product quantizes its inputs:

    s_k = max|x_k|^alpha / max|W_:,k|^(1 - alpha)          W x = (W diag(s)) (x / s)

W diag(s) is rounded to nearest, 1 / s stays in the layer as its input scale. No alpha suits every
layer, and for some the best is s = 1: unless alpha is given, each layer takes the one of least
output error, the sum of the weight's part, tr(dW H dW^T), and the inputs' part, |dx W^T|^2 on a
sample of inputs quantized as the format quantizes them. Plain rounding is among the candidates.
"""

import torch
from torch import Tensor

from awq import inverse_scale, weight_error
from calibration import InputStatistics
from errors import UserError
from kernels.activations import WAYS
from kernels.linear import Grid, Params, QuantizedLinear

ALPHAS = (None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # None: s = 1


def refuse(layer: QuantizedLinear) -> str | None:
    """Why SmoothQuant makes no sense for a format, if it does not."""
    if layer.input_way != "none":
        return None
    return f"SmoothQuant eases the rounding of inputs, and {layer.name} leaves inputs as they are"


def smoothing(w: Tensor, stats: InputStatistics, alpha: float | None) -> Tensor:
    """1 / s [K] for the weight w [N, K], as stored."""
    if alpha is None:
        return torch.ones_like(stats.max_abs)
    x, columns = stats.max_abs, w.abs().amax(0)
    x, columns = (v.clamp(min=1e-5 * max(v.max().item(), 1e-30)) for v in (x, columns))
    return inverse_scale(x**alpha / columns ** (1 - alpha))


def output_error(
    w: Tensor, w_hat: Tensor, input_scale: Tensor, grid: Grid, stats: InputStatistics
) -> float:
    """Mean squared output error per token, summed over outputs, of x / s times w_hat [N, K]."""
    error = weight_error(w_hat * input_scale - w, stats.hessian)
    x = stats.sample * input_scale  # [T, K]
    codes, scale = WAYS[grid.input_way](x)
    rounding = (codes.float() * scale - x) @ w_hat.t()  # [T, N]
    return error + rounding.square().sum(1).mean().item()


def check(alpha: float | None = None) -> None:
    """A UserError for options of `smoothquant` that make no sense."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha}: SmoothQuant takes 0 to 1")


@torch.no_grad()
def smoothquant(
    w: Tensor, grid: Grid, stats: InputStatistics, *, alpha: float | None = None
) -> tuple[Tensor, Params]:
    """Codes [N, K] and params of the weight w [N, K] fp32; params carry "input_scale" [K].

    alpha None searches; a number in [0, 1] is taken as it is.
    """

    check(alpha)

    def attempt(alpha: float | None):
        input_scale = smoothing(w, stats, alpha)
        scaled = w / input_scale
        grid.learn([scaled])
        params = grid.fit(scaled)
        codes = grid.round_to_nearest(scaled, params)
        error = output_error(w, grid.decode_all(codes, params), input_scale, grid, stats)
        return error, codes, params, input_scale

    tried = (attempt(a) for a in (ALPHAS if alpha is None else (alpha,)))
    _, codes, params, input_scale = min(tried, key=lambda result: result[0])
    grid.learn([w / input_scale])  # the shared part that belongs to the chosen attempt
    return codes, {**params, "input_scale": input_scale}
