"""The comparison with transformers, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ["scripts/compare_transformers.py", "--random_weights", "tiny", "--device", "cpu"]


def run(*flags) -> subprocess.CompletedProcess:
    command = [sys.executable, *SCRIPT, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_turns_and_what_is_left_out(tmp_path):
    pytest.importorskip("transformers")
    flags = ("--turns", 2, "--prompt", 5, "--max_new_tokens", 4, "--json", tmp_path / "out.json")
    done = run("--modes", "bf16,fp6", *flags)
    assert done.returncode == 0, done.stderr
    assert "fp6" in done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    (row,) = found["results"]
    assert row["mode"] == "bf16" and len(row["turns"]) == 2
    assert row["ratio"] == pytest.approx(row["tokens_per_s"] / row["peer_tokens_per_s"])
    assert found["read_bandwidth_bytes_per_s"] > 1e8


def test_refusals():
    for flags in (("--turns", 0), ("--max_new_tokens", 1), ("--modes", "fp6"), ("--modes", ""),
                  ("--modes", "gemlite:x")):  # fmt: skip
        done = run(*flags)
        assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
        assert "gemlite:x" not in flags or "not a number" in done.stderr
