"""bench.py: turns, rows, the table and the plot, on tiny models; no figure's size is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_text import save_tiny_with_tokenizer

import bench
import bench_entries
import bench_report
from bench import make_rows
from bench_entries import Entry, read_modes
from bench_report import Row, plot, table
from calibration import BUNDLED
from checkpoint import open_checkpoint
from errors import UserError
from modes import parse_mode

ROOT = Path(__file__).parent.parent
KEYS = """mode perplexity decode_tokens_per_s ratio_to_bf16 bandwidth_bytes_per_s
percent_of_read_bandwidth peak_memory_bytes weight_bytes time_to_first_token_s spread noisy"""


def run(*arguments):
    command = [sys.executable, str(ROOT / "bench.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def figures(speed):
    """What a turn's generate.py writes, as far as bench.py reads it."""
    return {
        "decode_tokens_per_s": {"p50": speed}, "bandwidth_bytes_per_s": 10 * speed,
        "peak_memory_bytes": 1000, "weight_bytes": 300, "time_to_first_token_s": 0.5,
        "device": "d", "threads": 1, "read_bandwidth_bytes_per_s": 2000.0,
        "cuda_graphs_skipped": None,
    }  # fmt: skip


def rows():
    entries = [
        Entry("bf16", [], [figures(s) for s in (99, 100, 101)], 10.0),
        Entry("int8", [], [figures(s) for s in (150, 200, 210)], 10.5),
    ]
    return make_rows(entries, 2000.0)


def test_rows_are_medians_of_the_turns():
    base, int8 = rows()
    assert (base.decode_tokens_per_s, base.ratio_to_bf16, base.noisy) == (100, 1, False)
    assert (int8.decode_tokens_per_s, int8.ratio_to_bf16, int8.noisy) == (200, 2, True)
    assert int8.bandwidth_bytes_per_s == 2000 and int8.percent_of_read_bandwidth == 100
    assert int8.spread == pytest.approx(0.3)


def test_turns_interleave(monkeypatch):
    order = []

    def fake(script, flags, limit):
        order.append((flags[0], limit))
        return figures(100)

    monkeypatch.setattr(bench, "run_script", fake)
    entries = [Entry("a", ["a"]), Entry("b", ["b"])]
    turns = bench.take_turns(entries, ["--x"], 3, 60.0)
    next(turns)
    assert [len(e.turns) for e in entries] == [1, 0]
    assert len(list(turns)) == 5 and all(len(e.turns) == 3 for e in entries)
    assert order == [("a", 60.0), ("b", 60.0)] * 3


def test_a_mode_that_fails_is_left_out_and_named(monkeypatch):
    def fake(script, flags, limit):
        if flags[0] == "b":
            raise UserError("no such thing")
        return {**figures(100), "cuda_graphs_skipped": 3 if flags[0] == "c" else 0}

    monkeypatch.setattr(bench, "run_script", fake)
    entries = [Entry(name, [name]) for name in "abc"]
    assert len(list(bench.take_turns(entries, [], 2))) == 2
    assert [len(e.turns) for e in entries] == [2, 0, 0]
    assert [e.failure for e in entries][:2] == [None, "no such thing"]
    assert "CUDA graph" in entries[2].failure


def test_what_takes_too_long_is_one_line():
    with pytest.raises(UserError, match=r"generate.py --device cpu: took more than 0\.01 s"):
        bench.run_script("generate.py", ["--device", "cpu"], 0.01)


def test_table_and_plot(tmp_path):
    text = table([*rows(), Row("odd", None, 1, None, 1, 1, 1, 1, 1, 0, False)])
    lines = text.splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert "200.0 (noisy)" in lines[3] and "10.500" in lines[3]
    pytest.importorskip("matplotlib", reason="the optional package matplotlib")
    plot(rows(), tmp_path / "out.png", "title")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot write"):
        plot(rows(), tmp_path / "absent" / "out.png")


def test_missing_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        bench_report.pyplot()


def test_modes_and_group_sizes():
    modes = read_modes(["bf16", "int8", "int4", "int4:128", "x/y.safetensors"], 32)
    assert [getattr(m, "groupsize", "file") for m in modes] == [None, None, 32, 128, "file"]
    assert [bench_entries.label(m) for m in modes[:4]] == ["bf16", "int8", "int4.g32", "int4.g128"]
    for bad in ("int9", "int4:x", "int4:", "int4:65", "int8:64"):
        with pytest.raises(UserError):
            read_modes([bad], None)


def test_files_are_reused_only_if_the_header_matches(tmp_path, monkeypatch):
    source = open_checkpoint(save_tiny_with_tokenizer(tmp_path / "tiny")[0])
    mode, folder = parse_mode("int4", 64), tmp_path / "work"
    folder.mkdir()
    path = bench_entries.quantized_file(source, mode, folder, "cpu")
    assert path.parent == folder and open_checkpoint(path).header["mode"] == "int4"
    written = []
    real = bench_entries.run_script
    monkeypatch.setattr(bench_entries, "run_script", lambda *a: written.append(a) or real(*a))
    assert bench_entries.quantized_file(source, mode, folder, "cpu") == path and not written
    with monkeypatch.context() as patch:
        patch.setattr(bench_entries, "code_modified", lambda: 2**33)
        bench_entries.quantized_file(source, mode, folder, "cpu")  # the code is newer
    assert len(written) == 1
    written.clear()
    other = open_checkpoint(save_tiny_with_tokenizer(tmp_path / "other", seed=7)[0])
    before = path.read_bytes()
    bench_entries.quantized_file(other, mode, folder, "cpu")  # another model of the same shape
    assert len(written) == 1 and path.read_bytes() != before
    path.rename(folder / "model_int8.safetensors")  # a name that lies
    bench_entries.quantized_file(source, parse_mode("int8"), folder, "cpu")
    assert (
        len(written) == 2
        and open_checkpoint(folder / "model_int8.safetensors").header["mode"] == "int8"
    )
    wider = open_checkpoint(save_tiny_with_tokenizer(tmp_path / "wider", intermediate_size=96)[0])
    with pytest.raises(UserError, match="holds another model"):
        bench_entries.quantized_file(wider, mode, folder, "cpu")


def test_a_group_size_of_zero_is_asked_for():
    assert bench_entries.group_flags(parse_mode("w4a8", 0)) == ["--groupsize", "0"]
    assert bench_entries.group_flags(parse_mode("int8")) == []


def test_perplexities_are_kept_with_their_flags(tmp_path, monkeypatch):
    directory, calls = save_tiny_with_tokenizer(tmp_path / "tiny")[0], []
    fake = lambda script, flags: calls.append(flags) or {"perplexity": float(len(calls))}  # noqa: E731
    monkeypatch.setattr(bench, "run_script", fake)
    entry, kept = Entry("bf16", ["--checkpoint_path", str(directory)]), tmp_path / "kept.json"
    text = tmp_path / "text"
    text.write_text("text")
    one, two = (["--text", str(text), "--limit", n] for n in "12")
    assert [bench.perplexity(entry, one, kept) for _ in range(2)] == [1, 1]
    assert bench.perplexity(entry, two, kept) == 2  # other windows
    os.utime(text, (2**33, 2**33))  # another text under that name
    assert bench.perplexity(entry, two, kept) == 3
    os.utime(text, (0, 0))
    assert bench.perplexity(entry, two, kept) == 3
    os.utime(directory / "model.safetensors", (2**33, 2**33))  # another model under that name
    assert bench.perplexity(entry, two, kept) == 4
    os.utime(directory / "model.safetensors", (0, 0))
    assert bench.perplexity(entry, two, kept) == 4
    monkeypatch.setenv("FLATLLAMA_EXACT", "1")  # other kernels
    assert [bench.perplexity(entry, two, kept) for _ in range(2)] == [5, 5]
    monkeypatch.setattr(bench, "code_modified", lambda: 2**33)
    assert bench.perplexity(entry, two, kept) == 6


@pytest.mark.parametrize("name", ["model.py", "kernels/int4.py", "kernels/cpu/int4.cpp"])
def test_every_source_is_code(tmp_path, monkeypatch, name):
    monkeypatch.setattr(bench_entries, "HERE", tmp_path)
    for file in ("engine.py", "kernels/cpu/call.h", "README.md", name):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        os.utime(tmp_path / file, (5, 5))
    os.utime(tmp_path / "README.md", (9, 9))
    assert bench_entries.code_modified() == 5
    os.utime(tmp_path / name, (7, 7))
    assert bench_entries.code_modified() == 7


def test_two_modes_on_a_tiny_model(tmp_path):
    directory = save_tiny_with_tokenizer(tmp_path / "tiny")[0]
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(BUNDLED.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    pytest.importorskip("matplotlib", reason="the optional package matplotlib")
    done = run(
        "--checkpoint_path", directory, "--modes", "bf16,int8", "--text", text, "--seq_length", 64,
        "--limit", 2, "--prompt", 5, "--max_new_tokens", 51, "--repeats", 1, "--no-compile",
        "--device", "cpu", "--json", out, "--plot", tmp_path / "out.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert [row["mode"] for row in written["rows"]] == ["bf16", "int8"]
    assert "unfinished" not in written
    assert all(
        set(row) == set(KEYS.split()) and None not in row.values() for row in written["rows"]
    )
    assert written["machine"]["read_bandwidth_bytes_per_s"] > 0 and written["command"]
    assert "2 non-overlapping 64-token windows" in written["protocol"]
    assert (tmp_path / "out.png").exists() and "| int8 " in done.stdout


def test_random_weights(tmp_path):
    done = run(
        "--random_weights", "tiny", "--modes", "int8", "--prompt", 5, "--max_new_tokens", 51,
        "--repeats", 1, "--no-compile", "--device", "cpu", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["mode"] == "int8" and row["perplexity"] is None and "random weights" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--modes", "int9"], "unknown mode"),
        (["--modes", "absent.safetensors"], "absent.safetensors"),
        (["--max_new_tokens", "10"], "51"),
        (["--plot", "x.png"], "--text"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--random_weights", "tiny", "--text", "x"], "--random_weights"),
        (["--repeats", "0"], "at least 1"),
        (["--time_limit", "0"], "--time_limit 0"),
        (["--limit", "1"], "--limit is of a text"),
        (["--seq_length", "64"], "--seq_length is of a text"),
        (["--time_limit", "inf"], "--time_limit inf"),
        (["--threads", "-1"], "--threads -1: take 1 to"),
        (["start", "--package", "x.pt2", "--threads", "100000"], "--threads 100000: take 1 to"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        bench.cli(bench.main)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]
