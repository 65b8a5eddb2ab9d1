"""HQQ: the half-quadratic steps by hand, never worse than rounding, ragged groups."""

import pytest
import torch

from errors import UserError
from hqq import hqq, shrink
from kernels.int4 import Int4Grid
from kernels.int8 import Int8Grid
from kernels.uint import UintGrid
from modes import mode_names, parse_mode


def heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(3.0).sample((rows, columns)) * 0.02


def squared(grid, w, codes, params):
    return (grid.decode_all(codes, params) - w).square()


def test_shrink_by_hand():
    # |x| - |x|^-0.3 / 10: 1 - 0.1 = 0.9; at 0.1 it is 0.1 - 0.1995 < 0
    x = torch.tensor([1.0, -1.0, 0.1, 0.0])
    torch.testing.assert_close(shrink(x, 10.0, 0.7), torch.tensor([0.9, -0.9, 0.0, 0.0]))


@pytest.mark.parametrize("columns, groupsize", [(128, 64), (100, 32), (65, 64), (40, 64)])
@pytest.mark.parametrize("make", [Int4Grid, lambda g: UintGrid(4, g), lambda g: UintGrid(2, g)])
def test_no_group_is_worse_than_rounded(columns, groupsize, make):
    w, grid = heavy_tailed(24, columns), make(groupsize)
    codes, params = hqq(w, grid)
    start = grid.fit(w)
    assert {n: p.shape for n, p in params.items()} == {n: p.shape for n, p in start.items()}
    plain = squared(grid, w, grid.round_to_nearest(w, start), start)
    ours = squared(grid, w, codes, params)
    for a, b in zip(ours.split(groupsize, 1), plain.split(groupsize, 1), strict=True):
        assert (a.sum(1) <= b.sum(1) * (1 + 1e-6)).all()
    assert ours.sum() < (0.95 if make is Int4Grid else 1) * plain.sum()


def test_only_the_zero_moves():
    w, grid = heavy_tailed(8, 128), Int4Grid(64)
    for option in ("ranges", "steps"):
        with pytest.raises(UserError, match="HQQ needs"):
            hqq(w, grid, **{option: 0})
    _, params = hqq(w, grid, ranges=1)
    start = grid.fit(w)
    assert torch.equal(params["scales"], start["scales"])
    assert not torch.equal(params["zeros"], start["zeros"])
    assert torch.equal(params["zeros"], params["zeros"].bfloat16().float())


def test_from_the_full_range_integer_zeros_gain_nothing():
    w, grid = heavy_tailed(8, 128), UintGrid(4, 64)
    codes, params = hqq(w, grid, ranges=1)
    assert torch.equal(codes, grid.round_to_nearest(w, grid.fit(w)))
    assert torch.equal(params["zeros"], grid.fit(w)["zeros"])


def test_integer_zeros_stay_integers_of_their_bits():
    _, params = hqq(heavy_tailed(8, 128), UintGrid(3, 64))
    assert torch.equal(params["zeros"], params["zeros"].round())
    assert params["zeros"].min() >= 0 and params["zeros"].max() <= 7


def test_grid_hooks():
    w = heavy_tailed(4, 64)
    for grid in (Int4Grid(32), UintGrid(4, 32)):
        params = grid.fit(w)
        step = grid.step(params)
        torch.testing.assert_close(step, params["scales"])
        moved = grid.shift(params, step)
        codes = torch.full((4, 64), 5, dtype=torch.uint8)
        difference = grid.decode_all(codes, moved) - grid.decode_all(codes, params)
        expected = step.repeat_interleave(32, 1)
        torch.testing.assert_close(difference, expected, rtol=0.02, atol=1e-3)


def test_formats_without_a_zero_point_are_refused():
    assert not Int8Grid(8).free_zero
    assert "int4-hqq" in mode_names() and "uint3-hqq" in mode_names()
    for mode in ("int8-hqq", "w4a8-hqq", "fp6-hqq", "codebook4-hqq", "int4-sparse24-hqq"):
        assert mode not in mode_names()
        with pytest.raises(UserError, match="zero points"):
            parse_mode(mode)
