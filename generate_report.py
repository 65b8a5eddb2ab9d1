"""What generate.py reports of a run: the figures of --json, and their summary for people."""

import argparse
import math
import statistics
import sys

import torch

from engine import Engine, Result
from graphs import skipped_graphs
from measure import (
    device_name,
    numerics,
    peak_memory,
    read_bandwidth,
    spread,
    step_bytes,
    weight_bytes,
)


def report(
    engine: Engine, results: list[Result], args: argparse.Namespace, mode: str, compile_s: float
) -> dict:
    """The figures of `--json`, from the measured samples."""
    steps = [s for r in results for s in r.step_s]
    last = results[-1]
    position = last.prompt_tokens + len(last.step_s) / 2
    read, batch, peak = step_bytes(engine, position), engine.batch, peak_memory(args.device)
    step = spread(steps)
    bandwidth = read / step["p50"] if steps else float("nan")
    speeds = [n / s for r in results for n, s in zip(live_rows(r), r.step_s, strict=True) if n]
    if last.accept_counts:  # a round makes several tokens: a sample's speed is all over all
        read = bandwidth = None
        speeds = [len(r.step_s) / sum(r.step_s) for r in results if r.step_s]
    return {
        "model": str(args.random_weights or args.checkpoint_path or "smollm2-135m-instruct"),
        "mode": mode, "device": device_name(args.device), "threads": torch.get_num_threads(),
        **numerics(engine.model), "kernels": args.kernels, "compile": args.compile,
        "package": str(args.package) if args.package else None,
        "compile_mode": args.compile_mode if {*engine.compiled} - {"prefill"} else None,
        "compiled": engine.compiled,
        "cuda_graphs_skipped": skipped_graphs() if engine.device.type == "cuda" else None,
        "batch_size": batch, "prompt_tokens": last.prompt_tokens,
        "new_tokens": [len(ids) for r in results for ids in r.token_ids], "compile_s": compile_s,
        "time_to_first_token_s": statistics.median(r.time_to_first_token_s for r in results),
        "decode_tokens_per_s": spread(speeds), "step_s": step,
        "weight_bytes": weight_bytes(engine.model), "bytes_per_token": read and read // batch,
        "bandwidth_bytes_per_s": bandwidth,
        "read_bandwidth_bytes_per_s": read_bandwidth(args.device),
        "peak_memory_bytes": peak,
        "token_ids": [ids for r in results for ids in r.token_ids], **speculation(results),
    }  # fmt: skip


def live_rows(result: Result) -> list[int]:
    """How many rows of the batch each step made a token for: those that had not ended before."""
    lengths = [len(ids) for ids in result.token_ids]
    return [sum(n > i for n in lengths) for i in range(len(result.step_s))]


def speculation(results: list[Result]) -> dict:
    """How many rounds accepted 0, 1, ... k guesses, and why it stopped; {} without speculation."""
    if not results[-1].accept_counts:
        return {}
    counts = [sum(c) for c in zip(*(r.accept_counts for r in results), strict=True)]
    return {"accept_counts": counts, "notes": sorted({r.note for r in results if r.note})}


def print_report(figures: dict) -> None:
    """The report, for people, on stderr."""
    speed, step = figures["decode_tokens_per_s"], figures["step_s"]
    whole = figures["compile"] and "decode step" not in figures["compiled"]
    noisy = "  (noisy: spread over 5%)" if step["std"] > 0.05 * step["mean"] else ""
    lines = [
        f"{figures['mode']} on {figures['device']}, {figures['threads']} threads; prompt "
        f"{figures['prompt_tokens']} tokens, batch {figures['batch_size']}",
        f"time to first token {figures['time_to_first_token_s'] * 1e3:.1f} ms; compile and "
        f"warm-up {figures['compile_s']:.1f} s; recompiles {figures['recompiles']}"
        f"{'; the decode step is one C++ operator: not compiled' if whole else ''}",
        f"decode {speed['p50']:.1f} tokens/s (median; mean {speed['mean']:.1f}, "
        f"std {speed['std']:.1f}){noisy}",
    ]
    if figures["cuda_graphs_skipped"]:
        lines.insert(2, "torch did not capture the step in a CUDA graph, so the host launches it")
    if math.isnan(speed["p50"]):  # a single token: no step was timed
        lines.pop()
    elif counts := figures.get("accept_counts"):
        rounds = max(1, sum(counts))
        made = sum((n + 1) * c for n, c in enumerate(counts)) / rounds
        lines.append(
            f"speculation: {sum(counts)} rounds of {made:.2f} tokens; rounds that accepted 0, 1, "
            f"... {len(counts) - 1} guesses: {' '.join(map(str, counts))}"
        )
        lines += figures["notes"]
    else:
        percent = 100 * figures["bandwidth_bytes_per_s"] / figures["read_bandwidth_bytes_per_s"]
        lines.append(
            f"reads {figures['bytes_per_token'] / 1e6:.1f} MB a token: "
            f"{figures['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s, {percent:.0f}% of the "
            f"{figures['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s this machine reads; "
            f"peak memory {figures['peak_memory_bytes'] / 1e6:.0f} MB"
        )
    print("\n".join(lines), file=sys.stderr)
