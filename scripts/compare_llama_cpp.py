"""Ours beside llama.cpp: the same work on the same machine, in turns.

python scripts/compare_llama_cpp.py --llama_bench llama-bench --gguf FOLDER --json out.json

FOLDER holds BF16.gguf, Q8_0.gguf and Q4_0.gguf of the default model, made by llama-quantize. Each
turn runs every pair, ours and then the peer, each in a process of its own: decoding and prefill
behind an empty cache, and, with --deep, decoding behind 4,000 tokens. A figure is the median of
the turns.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_entries import checkpoint_entry, run_script
from checkpoint import open_checkpoint
from errors import Parser, UserError, check_outputs, check_threads, cli, progress, write_json
from measure import device_name
from modes import parse_mode

PAIRS = [("bf16", None, "BF16"), ("int8", None, "Q8_0"), ("int4", 64, "Q4_0"), ("int4", 32, "Q4_0")]
CACHES = {"bf16": [], "int8": ["-ctk", "q8_0", "-ctv", "q8_0", "-fa", "1"]}
GREEDY = ["--compile", "--temperature", "0", "--ignore_eos"]
DECODE = ["--prompt", "5", "--max_new_tokens", "128", "--num_samples", "3"]
PREFILL = ["--prompt", "512", "--max_new_tokens", "2", "--num_samples", "3"]
DEEP = ["--prompt", "4000", "--max_new_tokens", "64", "--cache_size", "4096"]


def peer(args: argparse.Namespace, file: str, flags: list[str]) -> list[float]:
    """Mean tokens per second of each test that llama-bench runs, in its order."""
    command = [str(args.llama_bench), "-m", str(args.gguf / f"{file}.gguf"), *flags]
    command += ["-t", str(args.threads), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {(done.stderr.splitlines() or ['failed'])[-1]}")
    return [test["avg_ts"] for test in json.loads(done.stdout)]


def ours(args: argparse.Namespace, entry: list[str], flags: list[str]) -> dict:
    """What generate.py measures."""
    return run_script("generate.py", [*entry, *GREEDY, *flags, "--threads", str(args.threads)])


def compare(turns: list[list[float]]) -> dict:
    """Medians of [ours, the peer's] of each turn, and their ratio."""
    mine, other = (statistics.median(column) for column in zip(*turns, strict=True))
    within = statistics.median(a / b for a, b in turns)
    return {
        "tokens_per_s": round(mine, 1), "peer_tokens_per_s": round(other, 1),
        "ratio": round(mine / other, 3), "ratio_within_turns": round(within, 3),
        "turns": [[round(x, 1) for x in turn] for turn in turns],
    }  # fmt: skip


def short_turn(args: argparse.Namespace, entries: list[list[str]], rows: list[dict]) -> None:
    """Decoding after a prompt of 5 and prefill of 512 of every pair."""
    for entry, row in zip(entries, rows, strict=True):
        decode = ours(args, entry, DECODE)
        first = ours(args, entry, PREFILL)["time_to_first_token_s"]
        prompt, tokens = peer(args, row["peer"], ["-p", "512", "-n", "128", "-r", "3"])
        row["decode"].append([1 / decode["step_s"]["mean"], tokens])
        row["prefill"].append([512 / first, prompt])
        percent = 100 * decode["bandwidth_bytes_per_s"] / decode["read_bandwidth_bytes_per_s"]
        row["percent_of_read_bandwidth"].append(round(percent, 1))
        progress(f"{row['mode']}: {row['decode'][-1]} {row['prefill'][-1]}")


def deep_turn(args: argparse.Namespace, entry: list[str], rows: list[dict]) -> None:
    """Decoding of int8 behind 4,000 tokens with every kind of cache."""
    for row in rows:
        decode = ours(args, entry, [*DEEP, "--kv_cache", row["cache"]])
        flags = ["-p", "0", "-n", "64", "-d", "4000", "-r", "1", *CACHES[row["cache"]]]
        row["decode"].append([1 / decode["step_s"]["mean"], *peer(args, "Q8_0", flags)])
        progress(f"{row['cache']} cache: {row['decode'][-1]}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Ours beside llama.cpp, in turns.")
    add = parser.add_argument
    add("--llama_bench", type=Path, required=True, help="the peer's program")
    add("--gguf", type=Path, required=True, help="folder of BF16.gguf, Q8_0.gguf, Q4_0.gguf")
    add("--work_dir", type=Path, default=Path("checkpoints/compare"), help="keeps our checkpoints")
    add("--turns", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--deep", action="store_true", help="also behind 4,000 tokens")
    add("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    """Make the checkpoints, take the turns, print and write the ratios."""
    args = parse_args()
    check_outputs(args.json)
    check_threads(args.threads)
    if args.turns < 1:
        raise UserError("--turns must be at least 1")
    for path in (args.llama_bench, *(args.gguf / f"{file}.gguf" for _, _, file in PAIRS)):
        if not path.is_file():
            raise UserError(f"no file at {path}")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    source = open_checkpoint(None)
    modes = [parse_mode(name, size) for name, size, _ in PAIRS]
    entries = [checkpoint_entry(source, mode, args.work_dir, "cpu") for mode in modes]
    rows = [
        {"mode": entry.mode, "peer": file, "decode": [], "prefill": [],
         "percent_of_read_bandwidth": []}
        for entry, (_, _, file) in zip(entries, PAIRS, strict=True)
    ]  # fmt: skip
    deep = [{"cache": cache, "decode": []} for cache in CACHES] if args.deep else []
    for _ in range(args.turns):
        short_turn(args, [entry.flags for entry in entries], rows)
        deep_turn(args, entries[1].flags, deep)
    for row in [*rows, *deep]:
        for test in {"decode", "prefill"} & row.keys():
            row[test] = compare(row[test])
            print(row.get("mode", f"{row.get('cache')} cache"), test, row[test])
    machine = {"device": device_name("cpu"), "threads": args.threads, "torch": torch.__version__,
               "platform": platform.platform()}  # fmt: skip
    write_json(args.json, {"machine": machine, "command": sys.argv, "rows": rows, "deep": deep})


if __name__ == "__main__":
    cli(main)
