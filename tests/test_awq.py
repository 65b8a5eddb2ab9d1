"""AWQ: never worse than rounding in the output error; the input scale on all its ways."""

import pytest
import torch
from tiny import save_tiny
from torch import nn

from awq import awq, inverse_scale, weight_error
from calibration import CalibrationStream, InputStatistics
from checkpoint import load_model, open_checkpoint
from checkpoint_quantizer import CheckpointQuantizer
from errors import UserError
from kernels.formats import FORMATS
from kernels.int4 import Int4Grid
from modes import head_mode, make_grid, mode_names, parse_mode, quantize_linear
from quantize import quantize_


def problem(rows: int = 24, features: int = 96, tokens: int = 300):
    """A weight, and inputs with a few channels far larger than the others."""
    torch.manual_seed(0)
    size = torch.ones(features)
    size[::17] = 20.0
    x = torch.randn(tokens, features) * size
    stats = InputStatistics.empty(features)
    stats.add(x)
    return torch.randn(rows, features) / 10, x, stats


def test_inverse_scale_by_hand():
    # sqrt(8 * 2) = 4
    assert inverse_scale(torch.tensor([8.0, 4.0, 2.0])).tolist() == [0.5, 1.0, 2.0]
    assert inverse_scale(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]


def test_weight_error_is_the_output_error():
    w, x, stats = problem()
    expected = (x.double() @ w.double().t()).square().sum(1).mean().item()
    assert weight_error(w, stats.hessian) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", [f for f in FORMATS if f"{f}-awq" in mode_names()])
def test_never_worse_than_rounding(name):
    w, _, stats = problem()
    mode = parse_mode(name)
    grid = make_grid(mode, w.shape[1], torch.float32)
    grid.learn([w])
    start = grid.fit(w)
    codes = grid.round_to_nearest(w, start)
    plain = weight_error(grid.decode_all(codes, start) - w, stats.hessian)
    codes, params = awq(w, grid, stats, ratios=5, clip_steps=4)
    scale = params.pop("input_scale")
    ours = grid.decode_all(codes, params) * scale - w
    assert weight_error(ours, stats.hessian) <= plain


def test_large_channels_gain_much():
    w, _, stats = problem()
    grid = Int4Grid(32)
    start = grid.fit(w)
    codes = grid.round_to_nearest(w, start)
    plain = weight_error(grid.decode_all(codes, start) - w, stats.hessian)
    codes, params = awq(w, grid, stats)
    scale = params.pop("input_scale")
    ours = grid.decode_all(codes, params) * scale - w
    assert weight_error(ours, stats.hessian) < 0.6 * plain
    assert scale.min() < 0.7


def test_a_layer_that_no_token_reached_is_rounded():
    w, _, _ = problem()
    grid = Int4Grid(32)
    codes, params = awq(w, grid, InputStatistics.empty(w.shape[1]), clip_steps=1)
    assert torch.equal(params["input_scale"], torch.ones(w.shape[1]))
    assert torch.equal(codes, grid.round_to_nearest(w, grid.fit(w)))


def test_the_layer_multiplies_by_what_dequantize_says():
    w, x, stats = problem()
    linear = nn.Linear(96, 24)
    linear.weight.data = w
    layer = quantize_linear(linear, parse_mode("int4-awq", 32), stats)
    assert layer.input_scale.dtype == torch.bfloat16 and layer.input_scale.shape == (96,)
    expected = x.double() @ layer.dequantize().double().t() + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-3)
    plain = quantize_linear(linear, parse_mode("int4", 32))
    assert layer.weight_bytes() == plain.weight_bytes() + 96 * 2
    assert "input_scale=True" in repr(layer) and "input_scale" not in repr(plain)


@pytest.mark.parametrize("name", ["int4-awq", "int8dq-smooth"])
def test_checkpoint_round_trip(tmp_path, name):
    directory, _ = save_tiny(tmp_path, torch.bfloat16)
    source, mode = open_checkpoint(directory), parse_mode(name)
    embeddings = source.tensor("tok_embeddings.weight")
    stream = CalibrationStream(torch.arange(180).view(3, 60), embeddings, source.config)
    head = head_mode(mode, None)
    job = CheckpointQuantizer(source, mode, head, tmp_path / "q.safetensors", stream=stream)
    report = job.run()
    assert all(0 < r["error"] < 0.3 for r in report)
    stored = open_checkpoint(tmp_path / "q.safetensors")
    assert stored.header["layers"]["layers.0.attention.wo"]["input_scale"] is True
    assert "input_scale" not in stored.header["layers"]["output"]
    model = load_model(stored)
    layer = model.layers[1].feed_forward.w2
    expected = stored.tensor("layers.1.feed_forward.w2.input_scale")
    assert torch.equal(layer.input_scale, expected)


@pytest.mark.parametrize("option", ["ratios", "clip_steps"])
def test_options_of_none_are_refused(option):
    w, _, stats = problem(4)
    with pytest.raises(UserError, match="AWQ needs"):
        awq(w, Int4Grid(32), stats, **{option: 0})


def test_in_place_on_any_module():
    _, x, _ = problem()
    model = nn.Sequential(nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 7))
    with torch.no_grad():
        expected = model(x)
        quantize_(model, "int4-awq", 32, inputs=[(x,)])
        error = (model(x) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_floats_of_wide_range_are_refused():
    with pytest.raises(UserError, match="same at any scale"):
        parse_mode("float8-awq")
    assert "fpx-2-1-awq" in mode_names()
