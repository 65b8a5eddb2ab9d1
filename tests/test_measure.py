"""measure.py: statistics, memory and bandwidth are what they say; no figure's size is judged."""

import math

import torch

from measure import device_name, peak_memory, read_bandwidth, spread


def test_spread():
    figures = spread([3.0, 1.0, 2.0, 4.0])
    assert figures == {"mean": 2.5, "std": math.sqrt(1.25), "p50": 2.5, "p99": 4.0}
    assert spread(range(1000))["p99"] == 990
    assert spread(x for x in [7]) == {"mean": 7, "std": 0, "p50": 7, "p99": 7}
    assert all(math.isnan(value) for value in spread([]).values())


def test_peak_memory_is_in_bytes_and_stays():
    """The kernel counts resident pages in batches, so the peak may be off by some hundred KB."""
    slack = 2**23
    before = peak_memory("cpu")
    block = torch.ones(2**24)  # 64 MB, written
    after = peak_memory("cpu")
    del block
    assert 2**24 < before <= after + slack and after < 2**40
    assert peak_memory("cpu") >= after - slack


def test_machine():
    assert device_name("cpu")
    assert read_bandwidth("cpu") > 1e6
