"""AWQ: scale a weight's columns up where the inputs are large, so that these are rounded finer.

Lin et al. 2023 (arXiv 2306.00978). With the input statistics of the layer:

    s = mean|x|^ratio, divided by sqrt(max s * min s)      W x = (W diag(s)) (x / s)

W diag(s) is rounded to nearest, 1 / s stays in the layer as its input scale. Of 20 ratios i / 20
the one is taken that minimizes the layer's squared output error tr(dW H dW^T), H = E[x x^T]: the
same as comparing the outputs on all calibration tokens, without storing any. Then each group's
range is clipped where that lowers the error further. Ratio 0 is plain rounding: never worse.
"""

import torch
from torch import Tensor

from calibration import InputStatistics
from errors import UserError
from gptq import fit_clipped
from kernels.linear import Grid, Params, QuantizedLinear


def refuse(layer: QuantizedLinear) -> str | None:
    """Why AWQ makes no sense for a format, if it does not."""
    if getattr(layer, "exponent_bits", 0) < 4:
        return None
    return f"AWQ rounds large columns finer, and a float of {layer.name} has the same at any scale"


def inverse_scale(s: Tensor) -> Tensor:
    """1 / s [K] as a layer stores it: normalized by sqrt(max * min), rounded to bf16; fp32."""
    return ((s.max() * s.min()).sqrt() / s).to(torch.bfloat16).float()


def weight_error(error: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) of a weight error D [N, K]."""
    return ((error @ hessian) * error).sum().item()


def check(ratios: int = 1, clip_steps: int = 1) -> None:
    """A UserError for options of `awq` that make no sense."""
    if ratios < 1 or clip_steps < 1:
        raise UserError("AWQ needs ratios >= 1 and clip_steps >= 1")


@torch.no_grad()
def awq(
    w: Tensor, grid: Grid, stats: InputStatistics, *, ratios: int = 20, clip_steps: int = 20
) -> tuple[Tensor, Params]:
    """Codes [N, K] and params of the weight w [N, K] fp32; params carry "input_scale" [K].

    Args:
        ratios: how many exponents i / ratios are tried.
        clip_steps: how many ranges the clip search tries; 1 keeps the full range.
    """
    check(ratios, clip_steps)
    mean = stats.mean_abs / stats.mean_abs.max().clamp(min=1e-30)
    mean = mean.clamp(min=1e-4)  # a channel that is never used shall not set the others' scale

    def attempt(input_scale: Tensor, params: Params | None = None):
        """(error, codes, params, input_scale)"""
        scaled = w / input_scale
        if params is None:
            grid.learn([scaled])
            params = grid.fit(scaled)
        codes = grid.round_to_nearest(scaled, params)
        error = weight_error(grid.decode_all(codes, params) * input_scale - w, stats.hessian)
        return error, codes, params, input_scale

    tried = (attempt(inverse_scale(mean ** (i / ratios))) for i in range(ratios))
    error, codes, params, input_scale = min(tried, key=lambda result: result[0])
    scaled = w / input_scale
    grid.learn([scaled])  # what the best attempt learned
    if clip_steps > 1:
        pruned = scaled * grid.keep(scaled.abs())
        hessian = stats.hessian * input_scale * input_scale[:, None]  # of the scaled inputs
        clipped = attempt(input_scale, fit_clipped(pruned, grid, hessian, clip_steps))
        if clipped[0] < error:
            _, codes, params, _ = clipped
    return codes, {**params, "input_scale": input_scale}
