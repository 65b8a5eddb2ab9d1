"""From the start of a process to its first token: eager, compiled, and from a package.

python scripts/export.py --output model.pt2 && python bench.py start --package model.pt2

Every figure is a fresh `generate.py`, timed from outside until the first character after the
prompt. Compiled cold starts with an empty cache of torch.compile's, compiled warm with the one that
the cold run left. The four take turns; a figure is the median.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench_report import markdown
from checkpoint import open_checkpoint
from errors import Parser, UserError, check_outputs, check_threads, progress, write_json
from measure import device_name

PROMPT = "Once upon a time"
WAYS = {
    "eager": [],
    "compiled, cold cache": ["--compile", "--compile_prefill"],
    "compiled, warm cache": ["--compile", "--compile_prefill"],
    "package": ["--package"],
}


def seconds_to_first_token(flags: list[str], cache: str) -> float:
    """Of a generate.py with these flags and that folder as torch.compile's cache."""
    script = str(Path(__file__).parent / "generate.py")
    command = [sys.executable, script, "--prompt", PROMPT, "--max_new_tokens", "4", *flags]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        first = process.stdout.read(len(PROMPT) + 1)
        seconds = time.perf_counter() - begin
        _, errors = process.communicate()
    if process.returncode or len(first) <= len(PROMPT):
        last = (errors.decode(errors="replace").strip().splitlines() or ["no text came"])[-1]
        raise UserError(f"generate.py {' '.join(flags)}: {last.removeprefix('error: ')}")
    return seconds


def measure(flags: list[str], package: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way to start, one for each turn."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for way, extra in WAYS.items():
                path = [str(package)] if extra == ["--package"] else []
                seconds = seconds_to_first_token([*flags, *extra, *path], cache)
                times[way].append(seconds)
                progress(f"turn {turn + 1} of {repeats}: {way} {seconds:.1f} s")
    return times


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line of `bench.py start`."""
    parser = Parser(prog="bench.py start")
    add = parser.add_argument
    add("--package", type=Path, required=True, metavar="FILE.pt2", help="of scripts/export.py")
    add("--checkpoint_path", type=Path, help="a file of quantize.py or a Hugging Face directory; "
        "default: the default model")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--threads", type=int, help="CPU threads; default: torch's, one per core")
    add("--repeats", type=int, default=3, help="turns; a figure is their median")
    add("--json", type=Path, help="write the rows here")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure, print the table, write the JSON."""
    args = parse_args(argv)
    check_threads(args.threads)
    if args.repeats < 1:
        raise UserError("--repeats must be at least 1")
    if not args.package.is_file():
        raise UserError(f"no package at {args.package}: scripts/export.py writes one")
    own = open_checkpoint(args.checkpoint_path).own_files()
    check_outputs(args.json, inputs={args.package, *own})
    flags = ["--device", args.device]
    for name in ("checkpoint_path", "threads"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    times = measure(flags, args.package, args.repeats)
    progress("")
    rows = [
        {"way": way, "start_to_first_token_s": statistics.median(t), "turns": t}
        for way, t in times.items()
    ]
    cells = [[r["way"], f"{r['start_to_first_token_s']:.1f}"] for r in rows]
    print(markdown([["Start", "Seconds to the first token"], *cells]))
    machine = {"device": device_name(args.device), "torch": torch.__version__}
    write_json(args.json, {"kind": "start", "machine": machine, "command": sys.argv, "rows": rows})
