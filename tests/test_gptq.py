"""GPTQ against a plain float64 reference, and the corner cases of Hessians and shapes."""

import itertools
import math

import pytest
import torch

from calibration import InputStatistics
from errors import UserError
from gptq import damped, fit_clipped, gptq
from kernels.formats import FORMATS
from kernels.int4 import Int4Grid
from kernels.int8 import Int8Grid


def problem(rows: int, features: int, tokens: int = 400, seed: int = 0):
    """A random weight and the statistics of correlated inputs."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, features) @ torch.randn(features, features) / features**0.5
    stats = InputStatistics.empty(features)
    stats.add(x * (torch.rand(features) + 0.1))
    return torch.randn(rows, features), stats


def decode(grid, codes, params):
    columns = torch.arange(codes.shape[1])
    return grid.decode(codes, grid.columns(params, columns))


def loss(grid, w, codes, params, hessian):
    error = decode(grid, codes, params) - w
    return ((error @ hessian) * error).sum().item()


def nearest_loss(grid, w, hessian):
    params = grid.fit(w)
    return loss(grid, w, grid.round_to_nearest(w, params), params, hessian)


def plain_obq(w, grid, params, hessian):
    """Round the columns in turn by the definition: each rest is solved anew, in float64."""
    hessian = hessian.double()
    order = hessian.diagonal().float().argsort(descending=True, stable=True).tolist()
    w, codes = w.double(), torch.empty(w.shape, dtype=torch.int64)
    for turn, i in enumerate(order):
        own = grid.columns(params, torch.tensor([i]))
        code = grid.round(w[:, [i]].float(), own)
        codes[:, i] = code[:, 0]
        error = w[:, i] - grid.decode(code, own)[:, 0]
        rest = order[turn + 1 :]
        if rest:  # argmin over the free columns d of (error, d) H (error, d)^T
            pull = torch.linalg.solve(hessian[rest][:, rest], hessian[rest, i])
            w[:, rest] += error[:, None] * pull
    return codes


@pytest.mark.parametrize("features,groupsize,blocksize", [(96, 32, 16), (65, 32, 128), (50, 64, 7)])
def test_first_pass_equals_plain_obq(features, groupsize, blocksize):
    if features < groupsize:
        features = groupsize
    w, stats = problem(24, features)
    grid = Int4Grid(groupsize)
    codes, params = gptq(w, grid, stats, percdamp=0.0, refinements=0, blocksize=blocksize)
    expected = plain_obq(w, grid, params, stats.hessian)
    assert (codes.long() == expected).float().mean() > 0.995  # fp32 may break a tie otherwise
    got = loss(grid, w, codes, params, stats.hessian)
    assert got == pytest.approx(loss(grid, w, expected, params, stats.hessian), rel=5e-3)


@pytest.mark.parametrize(
    "features,grid",
    [
        (576, Int4Grid(128)),  # the last group has 64 columns
        (65, Int4Grid(64)),  # an odd width, a last group of one column
        (96, Int4Grid(32)),
        (96, Int8Grid(96)),  # one group per row
    ],
)
def test_beats_rounding_to_nearest(features, grid):
    w, stats = problem(16, features, tokens=2 * features)
    codes, params = gptq(w, grid, stats)
    assert codes.shape == w.shape and codes.is_contiguous()
    assert loss(grid, w, codes, params, stats.hessian) < 0.7 * nearest_loss(grid, w, stats.hessian)


@pytest.mark.parametrize("name", FORMATS)
def test_serves_every_format(name):
    w, stats = problem(16, 256)
    w = w.bfloat16().float() / 16
    module = FORMATS[name](256, 16, dtype=torch.bfloat16)
    grid = module.grid()
    codes, params = gptq(w, grid, stats)
    assert loss(grid, w, codes, params, stats.hessian) < nearest_loss(grid, w, stats.hessian)
    settings = {key: value for key, value in module.settings().items() if key != "format"}
    packed = FORMATS[name].from_codes(codes, params | grid.shared(), None, w.dtype, **settings)
    torch.testing.assert_close(packed.dequantize(), decode(grid, codes, params))


def test_the_clip_search_never_loses_to_the_full_range():
    w, stats = problem(16, 96)
    grid = Int4Grid(32)
    stats.hessian = torch.diag(stats.hessian.diagonal())  # groups are then independent
    params = fit_clipped(w, grid, stats.hessian)
    codes = grid.round_to_nearest(w, params)
    assert loss(grid, w, codes, params, stats.hessian) < nearest_loss(grid, w, stats.hessian)


@pytest.mark.parametrize("name", ["int4", "uint3", "int8", "int4-sparse24", "codebook4"])
def test_refinement_never_raises_the_error(name):
    """Each round of refit and sweep lowers tr(D H D^T), up to the rounding of the scales."""
    w, stats = problem(16, 200)
    w = w.bfloat16().float() / 16
    grid = FORMATS[name](200, 16, dtype=torch.bfloat16).grid()
    hessian = damped(stats.hessian, 0.1)
    losses = []
    for rounds in range(4):
        codes, params = gptq(w, grid, stats, percdamp=0.1, refinements=rounds)
        losses.append(loss(grid, w, codes, params, hessian))
    assert losses[3] < losses[0]
    assert all(b <= a * 1.0001 for a, b in itertools.pairwise(losses)), losses


def test_refit_solves_the_least_squares():
    """int4's refit against a float64 solve of the same problem in the whitened space."""
    w, stats = problem(5, 32)
    grid, h = Int4Grid(32), damped(stats.hessian, 0.1)
    codes = grid.round_to_nearest(w, grid.fit(w))
    new = grid.refit(codes, w @ h, h)
    root = torch.linalg.cholesky(h.double()).t()  # h = root^T root
    for row in range(5):
        basis = torch.stack([codes[row].double() - 8, torch.ones(32).double()], 1)
        best = torch.linalg.lstsq(root @ basis, root @ w[row].double()).solution
        got = torch.stack([new["scales"][row, 0], new["zeros"][row, 0]]).double()
        assert torch.allclose(got, best, rtol=1e-2, atol=1e-3)  # bf16 storage


def test_groups_stay_as_fitted_before_the_first_update():
    w, stats = problem(16, 96)
    grid = Int4Grid(32)
    _, params = gptq(w, grid, stats, percdamp=0.1, refinements=0)
    fitted = fit_clipped(w, grid, damped(stats.hessian, 0.1))
    assert all(torch.equal(params[name], fitted[name]) for name in fitted)


def test_uncorrelated_inputs_mean_rounding_to_nearest():
    w, stats = problem(16, 64)
    grid = Int4Grid(32)
    stats.hessian = torch.diag(torch.rand(64) + 0.1)
    codes, params = gptq(w, grid, stats)
    assert torch.equal(codes, grid.round_to_nearest(w, params))


def test_dead_columns_are_rounded_to_nearest():
    w, stats = problem(16, 64)
    dead = [3, 40, 63]
    stats.hessian[dead] = 0
    stats.hessian[:, dead] = 0
    grid = Int4Grid(32)
    codes, params = gptq(w, grid, stats)
    assert torch.equal(codes[:, dead], grid.round_to_nearest(w, params)[:, dead])
    stats.hessian.zero_()  # a layer that no token ever reached
    codes, params = gptq(w, grid, stats)
    assert torch.equal(codes, grid.round_to_nearest(w, params))


@pytest.mark.parametrize("percdamp", [0.0, 1e-6])
def test_a_singular_hessian_gets_more_damping(percdamp):
    w, stats = problem(16, 96, tokens=5)
    stats.hessian -= 1e-3 * torch.eye(96)  # not even semidefinite
    grid = Int4Grid(32)
    codes, params = gptq(w, grid, stats, percdamp=percdamp)
    assert loss(grid, w, codes, params, stats.hessian) < nearest_loss(grid, w, stats.hessian)


def test_a_hessian_that_overflowed_is_an_error():
    w, stats = problem(4, 32)
    stats.hessian[0, 0] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        gptq(w, Int4Grid(32), stats)


@pytest.mark.parametrize(
    "option",
    [{"percdamp": -1}, {"percdamp": math.nan}, {"percdamp": math.inf}, {"clip_steps": 0},
     {"refinements": -1}, {"blocksize": 0}],
)  # fmt: skip
def test_bad_options_are_refused(option):
    w, stats = problem(4, 32)
    with pytest.raises(UserError, match="GPTQ needs"):
        gptq(w, Int4Grid(32), stats, **option)


def test_the_weight_is_left_alone():
    w, stats = problem(8, 64)
    before, hessian = w.clone(), stats.hessian.clone()
    gptq(w, Int4Grid(32), stats)
    assert torch.equal(w, before) and torch.equal(stats.hessian, hessian)
