"""The table: speed, bandwidth, memory, size and perplexity of many modes in one run.

python bench.py --modes bf16,int8,int4,int4-gptq:128 --text wiki.test.raw --plot table.png
python bench.py --random_weights llama-3-8b --modes bf16,int8,int4
python bench.py throughput|latency|position ...        # bench_serving.py
python bench.py start --package model.pt2              # bench_start.py

Every quantized mode becomes a checkpoint first (quantize.py), so that what is measured is what
a user runs. Then the modes take turns, each turn a fresh `generate.py` process: memory is that
mode's alone, and a drift of the machine hits all alike. A figure is the median of the turns.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import bench_serving
import bench_start
from bench_entries import DEFAULT_MODES, Entry, code_modified, make_entries, modified, run_script
from bench_report import Row, check_plot, plot, table
from checkpoint import open_checkpoint
from config import CONFIGS
from errors import (
    Parser,
    UserError,
    check_device,
    check_outputs,
    check_threads,
    cli,
    progress,
    write_json,
)
from graphs import COMPILE_MODE, COMPILE_MODES
from kernels.choice import KERNELS
from loading import add_cache_argument

MIN_STEPS = 50  # timed; the three warm-up steps come on top
NOISE = 0.05  # a larger spread between a mode's turns is flagged


def take_turns(
    entries: list[Entry], flags: list[str], repeats: int, limit: float | None = None
) -> Iterator[None]:
    """Measure every entry `repeats` times, all of them once before any of them again.

    Yields after each. One that fails keeps the reason and is left out from then on.
    """
    for turn in range(repeats):
        for entry in entries:
            if entry.failure:
                continue
            try:
                figures = run_script("generate.py", [*entry.flags, *flags], limit)
                if figures["cuda_graphs_skipped"]:
                    raise UserError("torch did not capture the step in a CUDA graph")
            except UserError as error:
                entry.failure = str(error)
                progress(f"{entry.mode} failed: {error}")
                continue
            entry.turns.append(figures)
            speed = figures["decode_tokens_per_s"]["p50"]
            progress(f"turn {turn + 1} of {repeats}: {entry.mode} {speed:.1f} tokens/s")
            yield


def score(entries: list[Entry], flags: list[str], folder: Path) -> None:
    """The perplexity of every entry by eval.py, kept in `folder`; fills the entries."""
    for entry in entries:
        entry.perplexity = perplexity(entry, flags, folder / f"{entry.mode}.perplexity.json")
        progress(f"{entry.mode}: perplexity {entry.perplexity:.4f}")


def perplexity(entry: Entry, flags: list[str], kept: Path) -> float:
    """What eval.py finds, or found: `kept` holds its figures and flags from an earlier run.

    They are taken if the flags, and the variables that choose kernels, are the same, and neither
    checkpoint, text nor code is newer.
    """
    flags = [*entry.flags, *flags]
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith("FLATLLAMA_")}
    made_with = {"flags": flags, "variables": variables}
    checkpoint = open_checkpoint(Path(flags[flags.index("--checkpoint_path") + 1]))
    text = Path(flags[flags.index("--text") + 1])
    changed = max(modified(checkpoint), text.stat().st_mtime, code_modified())
    if kept.exists() and kept.stat().st_mtime > changed:
        earlier = json.loads(kept.read_text())
        if {name: earlier.get(name) for name in made_with} == made_with:
            return earlier["perplexity"]
    figures = run_script("eval.py", flags)
    write_json(kept, {**made_with, **figures})
    return figures["perplexity"]


def make_rows(entries: list[Entry], read_bandwidth: float) -> list[Row]:
    """Medians of the turns; percentages of `read_bandwidth`, bytes per second."""

    def middle(entry: Entry, pick: Callable[[dict], float]) -> float:
        return statistics.median(map(pick, entry.turns))

    speeds = [middle(e, lambda f: f["decode_tokens_per_s"]["p50"]) for e in entries]
    base = next((s for e, s in zip(entries, speeds, strict=True) if e.mode == "bf16"), None)
    rows = []
    for entry, speed in zip(entries, speeds, strict=True):
        turns = [f["decode_tokens_per_s"]["p50"] for f in entry.turns]
        spread = (max(turns) - min(turns)) / speed
        bandwidth = middle(entry, lambda f: f["bandwidth_bytes_per_s"])
        memory = int(middle(entry, lambda f: f["peak_memory_bytes"]))
        size = int(middle(entry, lambda f: f["weight_bytes"]))
        first = middle(entry, lambda f: f["time_to_first_token_s"])
        row = Row(
            entry.mode, entry.perplexity, speed, speed / base if base else None, bandwidth,
            100 * bandwidth / read_bandwidth, memory, size, first, spread, spread > NOISE,
        )  # fmt: skip
        rows.append(row)
    return rows


def parse_args() -> argparse.Namespace:
    """The command line of the table."""
    parser = Parser(
        description="Measure many modes in one run. Other measurements: bench.py throughput, "
        "latency, position or start, each with a --help of its own."
    )
    add = parser.add_argument
    add("--checkpoint_path", type=Path, help="a Hugging Face directory; default: the default model")
    add("--random_weights", choices=list(CONFIGS), metavar="NAME",
        help=f"true shapes, random weights, no files: {', '.join(CONFIGS)}")  # fmt: skip
    add("--modes", default=DEFAULT_MODES,
        help="comma-separated: modes, mode:groupsize, or files of quantize.py; all: every mode "
        "that can be made, hours of calibration")  # fmt: skip
    add("--groupsize", type=int, help="of the modes that have groups; default: the format's")
    add("--text", type=Path, help="text to measure perplexity on; default: no perplexity")
    add("--seq_length", type=int, help="tokens of a perplexity window; default: 2048")
    add("--limit", type=int, help="perplexity windows; default: all")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--threads", type=int, help="CPU threads; default: torch's, one per core")
    add("--exact_activations", action="store_true",
        help="CPU: weight-only kernels do not round activations")  # fmt: skip
    add("--kernels", choices=KERNELS, default="auto", help="see generate.py")
    add("--prompt", type=int, default=64, metavar="N", help="tokens of the synthetic prompt")
    add("--max_new_tokens", type=int, default=128, help="that are timed")
    add_cache_argument(parser)
    add("--compile", action=argparse.BooleanOptionalAction, default=True,
        help="compile the steps; default: yes")  # fmt: skip
    add("--compile_mode", default=COMPILE_MODE, choices=COMPILE_MODES, help="see generate.py")
    add("--repeats", type=int, default=3, help="turns; a figure is their median")
    add("--time_limit", type=float, metavar="SECONDS",
        help="a turn that takes longer counts as failed; default: none")  # fmt: skip
    add("--work_dir", type=Path,
        help="keep the quantized checkpoints and their perplexities here, and use those that "
        "are there and newer than the code; default: a temporary folder")  # fmt: skip
    add("--json", type=Path, help="write the rows here")
    add("--plot", type=Path, metavar="FILE", help="draw speed and size against perplexity")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before the long part begins."""
    check_device(args.device)
    check_threads(args.threads)
    if args.plot and not args.text:
        raise UserError("--plot draws against perplexity: give --text")
    check_plot(args.plot)
    if args.max_new_tokens <= MIN_STEPS:
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: at least {MIN_STEPS + 1}, "
                        f"because {MIN_STEPS} steps are timed")  # fmt: skip
    if args.repeats < 1 or args.prompt < 1:
        raise UserError("--repeats and --prompt must be at least 1")
    if args.time_limit is not None and not 0 < args.time_limit < threading.TIMEOUT_MAX:
        raise UserError(f"--time_limit {args.time_limit:g}: give seconds, more than none")
    if args.random_weights and (args.text or args.checkpoint_path):
        raise UserError("--random_weights goes without --checkpoint_path and --text")
    if not args.text and (args.limit is not None or args.seq_length is not None):
        name = "limit" if args.limit is not None else "seq_length"
        raise UserError(f"--{name} is of a text: give --text, or leave it out")
    args.seq_length = 2048 if args.seq_length is None else args.seq_length
    if args.seq_length < 2 or (args.limit is not None and args.limit < 1):
        raise UserError("--limit must be at least 1, --seq_length at least 2")
    own = set() if args.random_weights else open_checkpoint(args.checkpoint_path).own_files()
    check_outputs(args.json, args.plot, inputs={args.text, *own})
    if args.text and not args.text.is_file():
        raise UserError(f"no text file at {args.text}")


def shared_flags(args: argparse.Namespace) -> list[str]:
    """What every turn's generate.py and every eval.py get alike."""
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    exact = ["--exact_activations"] if args.exact_activations else []
    kernels = ["--kernels", args.kernels]
    return ["--device", args.device, *kernels, "--kv_cache", args.kv_cache, *threads, *exact]


def benchmark(entries: list[Entry], args: argparse.Namespace, folder: Path) -> dict:
    """Measure the entries in turns, then score them; the figures for --json, which are written
    after each turn too."""
    shared = shared_flags(args)
    compiled = ["--compile", "--compile_mode", args.compile_mode] if args.compile else []
    generate = [
        "--prompt", str(args.prompt), "--max_new_tokens", str(args.max_new_tokens),
        "--temperature", "0", "--ignore_eos", *compiled,
    ]  # fmt: skip
    for _ in take_turns(entries, [*shared, *generate], args.repeats, args.time_limit):
        write_json(args.json, {"unfinished": True, **summary(entries, args)})
    failed = [entry.failure for entry in entries if entry.failure]
    if len(failed) == len(entries):
        raise UserError(f"no mode could be measured: {failed[0]}")
    if args.text:
        limit = [] if args.limit is None else ["--limit", str(args.limit)]
        length = ["--seq_length", str(args.seq_length)]
        measured = [entry for entry in entries if not entry.failure]
        score(measured, [*shared, "--text", str(args.text), *length, *limit], folder)
    return summary(entries, args)


def summary(entries: list[Entry], args: argparse.Namespace) -> dict:
    """The figures of the turns so far; of at least one entry there are some."""
    failed = {entry.mode: entry.failure for entry in entries if entry.failure}
    entries = [entry for entry in entries if entry.turns and not entry.failure]
    turns = [figures for entry in entries for figures in entry.turns]
    modes = [figures["compile_mode"] for figures in turns]
    compiled = "compiled" if all(modes) else "compiled in part" if any(modes) else "not compiled"
    protocol = (
        f"decoding {args.max_new_tokens} tokens greedily after a prompt of {args.prompt}, batch 1, "
        f"{compiled}, prefill and compilation not counted; median "
        f"of {args.repeats} turns of a fresh process per mode"
    )
    if args.text:
        windows = f"the first {args.limit}" if args.limit else "all"
        protocol += (
            f"; token perplexity of {args.text.name}, {windows} non-overlapping "
            f"{args.seq_length}-token windows"
        )
    read = statistics.median(f["read_bandwidth_bytes_per_s"] for f in turns)
    machine = {
        "device": turns[0]["device"], "threads": turns[0]["threads"], "torch": torch.__version__,
        "platform": platform.platform(), "read_bandwidth_bytes_per_s": read,
    }  # fmt: skip
    rows = [asdict(row) for row in make_rows(entries, read)]
    return {"machine": machine, "command": sys.argv, "protocol": protocol, "rows": rows,
            "failed": failed}  # fmt: skip


def main() -> None:
    """Make the checkpoints, measure, print the table, write JSON and plot."""
    if sys.argv[1:2] == ["start"]:
        return bench_start.main(sys.argv[2:])
    if sys.argv[1:2] and sys.argv[1] in bench_serving.COLUMNS:
        return bench_serving.main(sys.argv[1], sys.argv[2:])
    args = parse_args()
    check(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        entries = make_entries(args, folder)
        figures = benchmark(entries, args, folder)
    progress("")
    rows = [Row(**row) for row in figures["rows"]]
    machine = figures["machine"]
    print(
        f"{args.random_weights or args.checkpoint_path or 'smollm2-135m-instruct'} on "
        f"{machine['device']}, {machine['threads']} threads, which reads "
        f"{machine['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s\n{figures['protocol']}\n"
    )
    print(table(rows))
    if args.random_weights:
        print("\nrandom weights of the true shape: speed and size only")
    write_json(args.json, figures)
    if args.plot:
        plot(rows, args.plot, f"{machine['device']}; {args.text.name}")
    if failed := figures["failed"]:
        raise UserError(f"no row for {', '.join(failed)}: {next(iter(failed.values()))}")


if __name__ == "__main__":
    cli(main)
