"""SmoothQuant: the same product before rounding, never worse than plain after it."""

import pytest
import torch
from torch import nn

from calibration import InputStatistics
from errors import UserError
from modes import make_grid, mode_names, parse_mode, quantize_linear
from smoothquant import output_error, smoothing, smoothquant


def problem(outlier: float = 50.0):
    torch.manual_seed(0)
    x = torch.randn(300, 96)
    x[:, ::30] *= outlier
    stats = InputStatistics.empty(96)
    stats.add(x)
    return torch.randn(24, 96) / 10, x, stats


def test_smoothing_by_hand():
    stats = InputStatistics.empty(2)
    stats.add(torch.tensor([[16.0, -1.0], [-4.0, 0.5]]))
    w = torch.tensor([[0.5, -0.25], [1.0, 1.0]])
    # s = (sqrt 16 / sqrt 1, sqrt 1 / sqrt 1) = (4, 1), normalized by sqrt(4 * 1): (2, 1/2)
    assert smoothing(w, stats, 0.5).tolist() == [0.5, 2.0]
    assert smoothing(w, stats, 1.0).tolist() == [0.25, 4.0]  # (16, 1) / 4
    assert smoothing(w, stats, None).tolist() == [1.0, 1.0]


def test_the_product_is_the_same_before_rounding():
    w, x, stats = problem()
    scale = smoothing(w, stats, 0.5).double()
    w, x = w.double(), x.double()
    torch.testing.assert_close((x * scale) @ (w / scale).t(), x @ w.t())


@pytest.mark.parametrize(
    "name", [n.removesuffix("-smooth") for n in mode_names() if n.endswith("-smooth")]
)
@pytest.mark.parametrize("outlier", [1.0, 50.0])
def test_never_worse_than_plain_in_its_estimate(name, outlier):
    w, _, stats = problem(outlier)
    grid = make_grid(parse_mode(name), 96, torch.float32)
    codes, params = smoothquant(w, grid, stats)
    scale = params.pop("input_scale")
    ours = output_error(w, grid.decode_all(codes, params), scale, grid, stats)
    ones = torch.ones(96)
    grid.learn([w])
    params = grid.fit(w)
    codes = grid.round_to_nearest(w, params)
    assert ours <= output_error(w, grid.decode_all(codes, params), ones, grid, stats)


def layer_error(mode, w, x, stats, **options):
    linear = nn.Linear(96, 24, bias=False)
    linear.weight.data = w
    layer = quantize_linear(linear, parse_mode(mode), stats, **options)
    return (layer(x) - x @ w.t()).square().sum(1).mean().item()


def test_the_estimate_is_the_real_error():
    w, x, stats = problem()
    stats.sample = x
    grid = make_grid(parse_mode("int8dq"), 96, torch.float32)
    with pytest.raises(UserError, match="takes 0 to 1"):
        smoothquant(w, grid, stats, alpha=3.0)
    codes, params = smoothquant(w, grid, stats, alpha=0.5)
    scale = params.pop("input_scale")
    estimate = output_error(w, grid.decode_all(codes, params), scale, grid, stats)
    real = layer_error("int8dq-smooth", w, x, stats, alpha=0.5)
    assert estimate == pytest.approx(real, rel=0.05)


def test_outliers_gain_much():
    w, x, stats = problem()
    plain = layer_error("int8dq", w, x, None)
    assert layer_error("int8dq-smooth", w, x, stats, alpha=0.5) < 0.3 * plain
    assert layer_error("int8dq-smooth", w, x, stats) < 0.3 * plain


def test_formats_with_plain_inputs_are_refused():
    for mode in ("int4-smooth", "int8-smooth", "fp6-smooth"):
        with pytest.raises(UserError, match="leaves inputs as they are"):
            parse_mode(mode)
        assert mode not in mode_names()
