"""The figures of the comparison, by hand; and that it refuses what it cannot run."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.compare_llama_cpp import compare

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "compare_llama_cpp.py"


def test_medians_and_their_ratio():
    figures = compare([[10.0, 5.0], [30.0, 10.0], [20.0, 16.0]])
    assert (figures["tokens_per_s"], figures["peer_tokens_per_s"]) == (20.0, 10.0)
    assert figures["ratio"] == 2.0
    assert figures["ratio_within_turns"] == pytest.approx(2.0)  # of 2, 3 and 1.25
    assert figures["turns"][1] == [30.0, 10.0]


def test_a_missing_peer_is_one_line(tmp_path):
    command = [sys.executable, SCRIPT, "--llama_bench", tmp_path / "none", "--gguf", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no file at" in done.stderr
