"""What bench.py measures beyond one prompt: batches, a stream of requests, long contexts.

python bench.py throughput --batch_sizes 1,2,4,8,16,32,64 --json out.json --plot out.png
python bench.py latency --requests 40          # compiled against eager, and how lengths are padded
python bench.py position --positions 8192      # time of a step and peak memory as the cache fills

Greedy, synthetic prompts, end-of-sequence ignored. A warm-up compiles and is not counted. One
process measures all rows, one after another: a drift of the machine shows up between rows.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench_report import check_plot, markdown, pyplot, save
from checkpoint import open_checkpoint
from config import CONFIGS
from engine import BUCKETS, Engine, cache_length
from errors import Parser, UserError, check_outputs, check_seed, progress, write_json
from graphs import COMPILE_MODE, COMPILE_MODES, compiled_graphs, configure_compiler
from loading import add_cache_argument, add_model_arguments, load, model_flags
from measure import device_name, peak_memory, reset_peak_memory, spread, step_bytes
from model import Transformer
from sampling import Sampling

GREEDY = Sampling(temperature=0)
WARM_STEPS = 3  # of every timed run, on top of the warm-up that compiles


def synthetic(length: int, vocab: int, generator: torch.Generator) -> list[int]:
    """Random token ids."""
    return torch.randint(0, vocab, (length,), generator=generator).tolist()


def throughput(model: Transformer, args: argparse.Namespace) -> list[dict]:
    """Tokens per second of whole batches, a row per batch size."""
    rows = []
    for batch in args.batch_sizes:
        length = args.prompt_tokens + args.max_new_tokens
        torch._dynamo.reset()
        engine = Engine(model, GREEDY, batch=batch, length=length, kv_cache=args.kv_cache,
                        compile_mode=args.compile_mode if args.compile else None)  # fmt: skip
        compile_s = engine.warm_up(args.prompt_tokens)
        generator = torch.Generator().manual_seed(args.seed)
        vocab = model.config.vocab_size
        prompts = [synthetic(args.prompt_tokens, vocab, generator) for _ in range(batch)]
        result = engine.generate(prompts, args.max_new_tokens)
        step = spread(result.step_s[WARM_STEPS:])
        position = args.prompt_tokens + args.max_new_tokens / 2
        rows.append({
            "batch_size": batch, "decode_tokens_per_s": batch / step["p50"], "step_s": step,
            "prefill_tokens_per_s": batch * args.prompt_tokens / result.time_to_first_token_s,
            "time_to_first_token_s": result.time_to_first_token_s, "compile_s": compile_s,
            "bytes_per_step": step_bytes(engine, position),
        })  # fmt: skip
        progress(f"batch {batch}: {rows[-1]['decode_tokens_per_s']:.1f} tokens/s")
    return rows


POLICIES = ("padding", "buckets", "dynamic", "eager")


def policy_engine(policy: str, model: Transformer, args: argparse.Namespace) -> Engine:
    """padding: every prompt runs at one full size; buckets: at the smallest that holds it; dynamic:
    at its own length, compiled with dynamic=True; eager: at its own length, not compiled."""
    full = cache_length(args.max_prompt_tokens)
    buckets = {"padding": (full,), "buckets": BUCKETS}.get(policy)
    compiled = policy != "eager"
    return Engine(
        model, GREEDY, length=full + args.max_new_tokens, kv_cache=args.kv_cache, buckets=buckets,
        compile_mode=args.compile_mode if compiled else None, compile_prefill=compiled,
    )  # fmt: skip


def request_stream(count: int, args: argparse.Namespace, vocab: int) -> list[tuple[list[int], int]]:
    """(prompt, new tokens) of each request: lengths log-uniform up to the largest, seeded."""
    generator = torch.Generator().manual_seed(args.seed)
    stream = []
    for _ in range(count):
        u, v = torch.rand(2, generator=generator).tolist()
        length = round(math.exp(u * math.log(args.max_prompt_tokens)))
        new = max(2, round(math.exp(v * math.log(args.max_new_tokens))))
        stream.append((synthetic(length, vocab, generator), new))
    return stream


def latency(model: Transformer, args: argparse.Namespace) -> list[dict]:
    """First-token and step times of one stream of requests, and recompilations, per policy."""
    stream, rows = request_stream(args.requests, args, model.config.vocab_size), []
    for policy in args.policies:
        torch._dynamo.reset()
        engine = policy_engine(policy, model, args)
        progress(f"{policy}: warm-up ...")
        compile_s = engine.warm_up()
        if args.device.startswith("cuda") and "prefill" not in engine.compiled:
            for prompt, _ in stream:  # a new length may be the first for one of Triton's kernels
                engine.cached = []
                engine.generate([prompt], 2)
        graphs, first, steps = compiled_graphs(), [], []
        for prompt, new in stream:
            engine.cached = []  # requests of strangers share nothing
            result = engine.generate([prompt], new)
            first.append(result.time_to_first_token_s)
            steps += result.step_s
        rows.append({
            "policy": policy, "requests": len(stream), "time_to_first_token_s": spread(first),
            "step_s": spread(steps), "recompiles": compiled_graphs() - graphs,
            "compile_s": compile_s,
        })  # fmt: skip
        progress(f"{policy}: p99 to the first token {spread(first)['p99'] * 1e3:.1f} ms")
    return rows


def position(model: Transformer, args: argparse.Namespace) -> list[dict]:
    """The cache filled bit by bit: a step's time, prefill time and peak memory at each position."""
    engine = Engine(
        model, GREEDY, length=args.positions, kv_cache=args.kv_cache,
        compile_mode=args.compile_mode if args.compile else None,
    )  # fmt: skip
    engine.warm_up()
    generator = torch.Generator().manual_seed(args.seed)
    tokens = synthetic(args.positions, model.config.vocab_size, generator)
    rows, filled = [], 0
    reset_peak_memory(args.device)
    for i in range(1, args.points + 1):
        end = max(filled + 1, (args.positions - 1) * i // args.points)
        begin = time.perf_counter()
        engine.prefill([tokens[:end]], filled)[0, 0].item()
        prefill_s = time.perf_counter() - begin
        step = spread(time_steps(engine, tokens[end], end, args.steps)[WARM_STEPS:])
        rows.append({
            "position": end, "step_s": step, "peak_memory_bytes": peak_memory(args.device),
            "prefill_tokens_per_s": (end - filled) / prefill_s,
            "bytes_per_step": step_bytes(engine, end),
        })  # fmt: skip
        filled = end
        progress(f"position {end}: {step['p50'] * 1e3:.2f} ms a step")
    return rows


def time_steps(engine: Engine, token: int, at: int, count: int) -> list[float]:
    """Seconds of `count` steps, the same token at the same position again and again."""
    seconds = []
    with torch.inference_mode():
        start = torch.tensor([at], device=engine.device)
        new = torch.tensor([[token]], device=engine.device)
        u = torch.zeros(1, device=engine.device)
        for _ in range(WARM_STEPS + count):
            begin = time.perf_counter()
            engine.decode_step(new, start, u).tolist()
            seconds.append(time.perf_counter() - begin)
    return seconds


COLUMNS: dict[str, list[tuple[str, Callable[[dict], str]]]] = {
    "throughput": [
        ("Batch", lambda r: str(r["batch_size"])),
        ("Tokens/s", lambda r: f"{r['decode_tokens_per_s']:.1f}"),
        ("Step ms (p50)", lambda r: f"{r['step_s']['p50'] * 1e3:.2f}"),
        ("Step ms (p99)", lambda r: f"{r['step_s']['p99'] * 1e3:.2f}"),
        ("Prefill tokens/s", lambda r: f"{r['prefill_tokens_per_s']:.0f}"),
    ],
    "latency": [
        ("Policy", lambda r: r["policy"]),
        ("First token ms (p50)", lambda r: f"{r['time_to_first_token_s']['p50'] * 1e3:.1f}"),
        ("First token ms (p99)", lambda r: f"{r['time_to_first_token_s']['p99'] * 1e3:.1f}"),
        ("Step ms (p50)", lambda r: f"{r['step_s']['p50'] * 1e3:.2f}"),
        ("Step ms (p99)", lambda r: f"{r['step_s']['p99'] * 1e3:.2f}"),
        ("Recompilations", lambda r: str(r["recompiles"])),
        ("Warm-up s", lambda r: f"{r['compile_s']:.1f}"),
    ],
    "position": [
        ("Position", lambda r: str(r["position"])),
        ("Step ms (p50)", lambda r: f"{r['step_s']['p50'] * 1e3:.2f}"),
        ("Prefill tokens/s", lambda r: f"{r['prefill_tokens_per_s']:.0f}"),
        ("Peak memory MB", lambda r: f"{r['peak_memory_bytes'] / 1e6:.0f}"),
    ],
}


def draw_plot(kind: str, rows: list[dict], path: Path, title: str) -> None:
    """Throughput against the batch, latency per policy, or step time and memory by position."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    x = [row.get("batch_size") or row.get("position") or row["policy"] for row in rows]
    step_ms = [row["step_s"]["p50"] * 1e3 for row in rows]
    if kind == "throughput":
        axes[0].plot(x, [row["decode_tokens_per_s"] for row in rows], "o-")
        axes[0].set(xscale="log", yscale="log", xlabel="batch size", ylabel="decode tokens/s")
        axes[1].plot(x, step_ms, "o-")
        axes[1].set(xscale="log", xlabel="batch size", ylabel="step, ms", ylim=(0, None))
    elif kind == "latency":
        first = [[r["time_to_first_token_s"][p] * 1e3 for r in rows] for p in ("p50", "p99")]
        steps = [step_ms, [r["step_s"]["p99"] * 1e3 for r in rows]]
        for axis, (p50, p99), name in zip(axes, (first, steps), ("first token", "step"),
                                          strict=True):  # fmt: skip
            axis.bar(x, p99, color="lightgray", label="p99")
            axis.bar(x, p50, width=0.5, label="p50")
            axis.set(ylabel=f"{name}, ms")
            axis.legend()
    else:
        axes[0].plot(x, step_ms, "o-")
        axes[0].set(xlabel="position", ylabel="step, ms", ylim=(0, None))
        axes[1].plot(x, [row["peak_memory_bytes"] / 1e6 for row in rows], "o-")
        axes[1].set(xlabel="position", ylabel="peak memory, MB", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    save(figure, path)


def integers(text: str) -> list[int]:
    """1,2,4 -> [1, 2, 4]"""
    return [int(part) for part in text.split(",")]


def parse_args(kind: str, argv: list[str]) -> argparse.Namespace:
    """The command line of one `kind`."""
    parser = Parser(prog=f"bench.py {kind}")
    add = parser.add_argument
    add_model_arguments(parser)
    add("--random_weights", choices=list(CONFIGS), metavar="NAME", help="true shapes, no files")
    add_cache_argument(parser)
    if kind != "latency":  # whose policies say it
        add("--compile", action=argparse.BooleanOptionalAction, default=True,
        help="compile the steps; default: yes")  # fmt: skip
    add("--compile_mode", default=COMPILE_MODE, choices=COMPILE_MODES, help="see generate.py")
    add("--seed", type=int, default=0, help="of the random prompts")
    if kind == "throughput":
        sizes = "1,2,4,8,16,32,64"
        add("--batch_sizes", type=integers, default=sizes, help="comma-separated")
        add("--prompt_tokens", type=int, default=64, help="of each row")
    if kind == "latency":
        add("--requests", type=int, default=40, help="one after another, for each policy")
        add("--max_prompt_tokens", type=int, default=512, help="of the longest request")
        add("--policies", type=lambda text: text.split(","), default=",".join(POLICIES),
            help="comma-separated: how prompts are padded, see the README")  # fmt: skip
    if kind == "position":
        add("--positions", type=int, default=8192, help="cache slots")
        add("--points", type=int, default=16, help="positions at which is measured")
        add("--steps", type=int, default=50, help="timed at each of them")
    else:
        most = " at most" if kind == "latency" else ""
        add("--max_new_tokens", type=int, default=64, help=f"of each row{most}")
    add("--json", type=Path, help="write the rows here")
    add("--plot", type=Path, metavar="FILE", help="draw the rows: a .png, .pdf or .svg file")
    args = parser.parse_args(argv)
    others = ("seed", "groupsize", "threads")
    numbers = [v for name, v in vars(args).items() if type(v) is int and name not in others]
    if min([*numbers, *getattr(args, "batch_sizes", [])]) < 1:
        raise UserError("sizes and counts must be at least 1")
    check_seed(args.seed)
    if kind == "latency" and args.max_new_tokens < 2:
        raise UserError("--max_new_tokens must be at least 2: the steps between tokens are timed")
    if unknown := set(getattr(args, "policies", ())) - set(POLICIES):
        raise UserError(f"unknown policy {min(unknown)!r}: there is {', '.join(POLICIES)}")
    if kind == "position" and args.points >= args.positions:
        raise UserError(f"--points {args.points}: fewer than the {args.positions} positions")
    if kind == "throughput" and args.max_new_tokens < WARM_STEPS + 2:
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: at least {WARM_STEPS + 2}")
    return args


def main(kind: str, argv: list[str]) -> None:
    """`kind` is throughput, latency or position."""
    args = parse_args(kind, argv)
    check_plot(args.plot)
    own = set() if args.random_weights else open_checkpoint(args.checkpoint_path).own_files()
    check_outputs(args.json, args.plot, inputs=own)
    model, mode, _ = load(**model_flags(args))
    if getattr(args, "compile", True):
        configure_compiler(args.device)
    rows = {"throughput": throughput, "latency": latency, "position": position}[kind](model, args)
    progress("")
    name = args.random_weights or args.checkpoint_path or "smollm2-135m-instruct"
    machine = {
        "device": device_name(args.device), "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip
    title = f"{name}, {mode}, {machine['device']}, {machine['threads']} threads"
    print(title + "\n")
    columns = COLUMNS[kind]
    print(markdown([[c for c, _ in columns], *([show(r) for _, show in columns] for r in rows)]))
    figures = {"kind": kind, "model": str(name), "mode": mode, "machine": machine,
               "command": sys.argv, "rows": rows}  # fmt: skip
    write_json(args.json, figures)
    if args.plot:
        draw_plot(kind, rows, args.plot, title)
