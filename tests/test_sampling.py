"""sampling.py: distributions worked out by hand, filters beside transformers', greedy ties."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from errors import UserError
from sampling import Sampling, greedy, probabilities, sample


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(1.0, 0), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(1.0, 2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(1.0, 0, top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(1.0, 0, top_p=0.75), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(1.0, 0, min_p=0.29), [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        (Sampling(0.5, 0), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        (Sampling(1.0, 100, top_p=1.0), [0.5, 0.25, 0.15, 0.1]),
    ],
)
def test_sampled_frequencies(sampling, expected):
    """Chi-square of 4000 draws against the distribution worked out by hand."""
    p = torch.tensor([0.25, 0.1, 0.5, 0.15])
    u = torch.rand(4000, generator=torch.Generator().manual_seed(3))
    drawn = sample(p.log().expand(4000, 4), u, sampling)
    counts = drawn.bincount(minlength=4)[[2, 0, 3, 1]].double()
    wanted = torch.tensor(expected, dtype=torch.float64) * 4000
    assert (counts[wanted == 0] == 0).all()
    positive = wanted > 0
    chi2 = ((counts - wanted)[positive] ** 2 / wanted[positive]).sum()
    assert chi2 < 16.3  # 0.1% point for 3 degrees of freedom


def test_extreme_uniforms_stay_in_range():
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    for u in (0.0, 1 - 2**-24):
        assert sample(logits, torch.tensor([u]), Sampling(1.0, 0)).item() in (0, 2)
    for top_p in (1e-6, 1e-300):  # which is 0 in fp32
        p, _ = probabilities(torch.zeros(1, 3), Sampling(1.0, 0, top_p=top_p))
        assert (p > 0).tolist() == [[True, False, False]]


@pytest.mark.parametrize("top_k, top_p, min_p", [(40, 0.8, 0.05), (0, 0.6, 0.0), (7, 1.0, 0.2)])
def test_filters_equal_transformers(top_k, top_p, min_p):
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * 3
    p, ids = probabilities(logits, Sampling(0.7, top_k, top_p, min_p))
    found = p if ids is None else torch.zeros_like(logits).scatter(-1, ids, p)
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    for warper, value in (
        (TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p), (MinPLogitsWarper, min_p),
    ):  # fmt: skip
        expected = warper(value)(None, expected) if value else expected
    expected = expected.softmax(-1)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"temperature": float("nan")}, {"temperature": 1e-6}, {"top_k": -1},
     {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.5}],
)  # fmt: skip
def test_senseless_settings_are_refused(settings):
    with pytest.raises(UserError):
        Sampling(**settings)


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [-2.0, -5.0, -1.0, -1.5]])
    assert greedy(logits).tolist() == [1, 2]
    logits = torch.randn(5, 1000)
    assert torch.equal(greedy(logits), logits.argmax(-1))
