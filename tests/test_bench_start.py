"""bench.py start: the turns, the caches they share, and one real start."""

from pathlib import Path

import pytest
from tiny_text import save_tiny_with_tokenizer

import bench_start
from errors import UserError


def test_turns_share_a_cache_and_a_new_turn_starts_cold(monkeypatch):
    starts = []

    def fake(flags, cache):
        assert Path(cache).is_dir()
        starts.append((flags, cache))
        return float(len(starts))

    monkeypatch.setattr(bench_start, "seconds_to_first_token", fake)
    times = bench_start.measure(["--x"], Path("p.pt2"), 2)
    assert times == {way: [i + 1.0, i + 5.0] for i, way in enumerate(bench_start.WAYS)}
    flags, caches = zip(*starts, strict=True)
    assert flags[1] == flags[2] == ["--x", "--compile", "--compile_prefill"]
    assert flags[3] == ["--x", "--package", "p.pt2"]
    assert caches[1] == caches[2] != caches[5] == caches[6]


def test_a_start_is_timed_and_a_failure_is_one_line(tmp_path):
    directory = save_tiny_with_tokenizer(tmp_path / "tiny")[0]
    flags = ["--checkpoint_path", str(directory), "--device", "cpu"]
    assert bench_start.seconds_to_first_token(flags, str(tmp_path)) > 0
    with pytest.raises(UserError, match=r"no package at absent\.pt2"):
        bench_start.seconds_to_first_token([*flags, "--package", "absent.pt2"], str(tmp_path))
