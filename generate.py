"""Generate text: python generate.py --compile --checkpoint_path FILE --prompt "Once upon a time"

Decode speed is measured after a warm-up that compiles, and leaves prefill out; the time to the
first token is printed beside it. Bandwidth is the bytes of weights and cache that a step reads,
over its time, beside what this machine reads at best in the same run.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

from backends import check_layers, choose_kernels
from checkpoint import load_model, open_checkpoint
from engine import Engine, Result, Sampling, compiled_graphs, configure_compiler
from errors import UserError, check_device, cli, progress
from kernels import native
from kernels.choice import KERNELS
from measure import device_name, peak_memory, read_bandwidth, spread
from model import CONFIGS
from modes import FLOAT_MODES, head_mode, parse_mode
from quantize import quantize_, random_model
from tokenizer import StreamDecoder, Tokenizer, load_tokenizer

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model runs and where; eval.py and bench.py share them."""
    add = parser.add_argument
    add("--checkpoint_path", type=Path, help="a file of quantize.py or a Hugging Face directory; "
        "default: the default model")  # fmt: skip
    add("--quantization", metavar="MODE", help="quantize on load (modes that need no calibration)")
    add("--groupsize", type=int, help="with --quantization; default: the format's")
    add("--precision", choices=PRECISIONS, help="of the activations; default: the checkpoint's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--threads", type=int, help="CPU threads; default: torch's, one per core")
    add("--kernels", choices=KERNELS, default="auto", help="auto: ours, C++ on the CPU and Triton "
        "on a GPU; triton; inductor: plain PyTorch forms; aten: ATen's own int4 and int8 products "
        "on a GPU")  # fmt: skip
    add("--exact_activations", action="store_true",
        help="CPU: weight-only kernels never round activations to int8 blocks")  # fmt: skip


def load(args: argparse.Namespace, random_name: str | None = None):
    """The model that the shared flags ask for -> (Transformer, mode name, directory or None)."""
    check_device(args.device)
    choose_kernels(args.kernels, args.device)
    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads {args.threads}: must be at least 1")
        torch.set_num_threads(args.threads)
    if args.device == "cpu" and args.kernels == "auto":
        native.load()
        native.exact_activations(args.exact_activations or None)
    dtype = PRECISIONS.get(args.precision)
    mode = parse_mode(args.quantization, args.groupsize) if args.quantization else None
    if random_name is not None:
        dtype = dtype or torch.bfloat16
        model = random_model(CONFIGS[random_name], mode, args.device, dtype)
        check_layers(model)
        return model, str(mode) if mode else "bf16", None
    checkpoint = open_checkpoint(args.checkpoint_path)
    if mode and checkpoint.header.get("layers"):
        raise UserError(f"{checkpoint.path} is quantized already: leave --quantization out")
    model = load_model(checkpoint, args.device, dtype)
    names = {dtype: name for name, dtype in FLOAT_MODES.items()}
    name = checkpoint.header.get("mode") or names[model.tok_embeddings.weight.dtype]
    if mode:
        head = head_mode(mode, None)
        quantize_(model, str(mode), mode.groupsize, skip=lambda n: n == "output")
        quantize_(model, str(head), head.groupsize)
        name = str(mode)
    check_layers(model)
    return model, name, checkpoint.directory


def step_bytes(engine: Engine, position: float) -> int:
    """Bytes that one decode step reads: the weights, and the cache filled up to `position`."""
    embedding = engine.model.tok_embeddings.weight
    tied = getattr(engine.model.output, "weight", None) is embedding
    table = 0 if tied else embedding.numel() * embedding.element_size()
    cache = sum(
        b.numel() * b.element_size()
        for layer in engine.model.layers
        for b in layer.attention.kv_cache.buffers()
    )
    return weight_bytes(engine.model) - table + int(cache * position / engine.slots)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights as they lie in memory, the cache and rotary table left out."""
    caches = {id(b) for layer in model.layers for b in layer.attention.kv_cache.buffers()}
    skip = caches | {id(model.rope_cos), id(model.rope_sin)}
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for i, t in tensors.items() if i not in skip)


def report(engine: Engine, results: list[Result], args, mode: str, compile_s: float) -> dict:
    """The JSON of DESIGN section 9, from the measured samples."""
    steps = [s for r in results for s in r.step_s]
    last = results[-1]
    position = last.prompt_tokens + len(last.step_s) / 2
    read, batch = step_bytes(engine, position), engine.batch
    step = spread(steps)
    bandwidth = read / step["p50"] if steps else float("nan")
    return {
        "model": str(args.random_weights or args.checkpoint_path or "smollm2-135m-instruct"),
        "mode": mode, "device": device_name(args.device), "threads": torch.get_num_threads(),
        "kernels": args.kernels, "compile": args.compile,
        "compile_mode": args.compile_mode if args.compile else None,
        "batch_size": batch, "prompt_tokens": last.prompt_tokens,
        "new_tokens": [len(ids) for r in results for ids in r.token_ids], "compile_s": compile_s,
        "time_to_first_token_s": statistics.median(r.time_to_first_token_s for r in results),
        "decode_tokens_per_s": spread(batch / s for s in steps), "step_s": step,
        "weight_bytes": weight_bytes(engine.model), "bytes_per_token": read // batch,
        "bandwidth_bytes_per_s": bandwidth,
        "read_bandwidth_bytes_per_s": read_bandwidth(args.device),
        "peak_memory_bytes": peak_memory(args.device),
        "token_ids": [ids for r in results for ids in r.token_ids],
    }  # fmt: skip


def print_report(figures: dict) -> None:
    """The report, for people, on stderr."""
    speed, step = figures["decode_tokens_per_s"], figures["step_s"]
    percent = 100 * figures["bandwidth_bytes_per_s"] / figures["read_bandwidth_bytes_per_s"]
    noisy = "  (noisy: spread over 5%)" if step["std"] > 0.05 * step["mean"] else ""
    print(
        f"{figures['mode']} on {figures['device']}, {figures['threads']} threads; prompt "
        f"{figures['prompt_tokens']} tokens, batch {figures['batch_size']}\n"
        f"time to first token {figures['time_to_first_token_s'] * 1e3:.1f} ms; compile and "
        f"warm-up {figures['compile_s']:.1f} s; recompiles {figures['recompiles']}\n"
        f"decode {speed['p50']:.1f} tokens/s (median; mean {speed['mean']:.1f}, "
        f"std {speed['std']:.1f}){noisy}\n"
        f"reads {figures['bytes_per_token'] / 1e6:.1f} MB a token: "
        f"{figures['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s, {percent:.0f}% of the "
        f"{figures['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s this machine reads; "
        f"peak memory {figures['peak_memory_bytes'] / 1e6:.0f} MB",
        file=sys.stderr,
    )


def encode_prompt(prompt: str, tokenizer: Tokenizer | None, vocab: int, seed: int) -> list[int]:
    """Token ids of a text, or, where it is an integer, a synthetic prompt of that length."""
    if prompt.isdecimal():
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocab, (int(prompt),), generator=generator).tolist()
    if tokenizer is None:
        raise UserError("random weights have no tokenizer: give --prompt a number of tokens")
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id]
    if not ids:
        raise UserError("empty prompt, and this tokenizer has no BOS token to start from")
    return ids


def open_tokenizer(directory: Path | None, model: nn.Module, required: bool) -> Tokenizer | None:
    """The tokenizer beside a checkpoint, checked against the model's vocabulary.

    None, where it is not `required`, for random weights and directories without tokenizer files.
    """
    files = ("tokenizer.json", "tokenizer.model")
    if directory is None or (not required and not any((directory / f).exists() for f in files)):
        return None
    try:
        tokenizer = load_tokenizer(directory)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, the model "
            f"{model.config.vocab_size}: they do not belong together"
        )
    return tokenizer


class Streamer:
    """Prints a row's tokens as they come, whole characters only."""

    def __init__(self, tokenizer: Tokenizer):
        self.decoder = StreamDecoder(tokenizer)

    def __call__(self, newest: list[int | None]) -> None:
        if newest[0] is not None:
            print(self.decoder.push(newest[0]), end="", flush=True)

    def close(self) -> None:
        print(self.decoder.finish(), flush=True)


def render_chat(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """The conversation's token ids, a template's complaint as a UserError."""
    try:
        return tokenizer.chat(messages)
    except ValueError as error:
        raise UserError(str(error)) from None


def chat(engine: Engine, tokenizer: Tokenizer, max_new_tokens: int) -> None:
    """Talk through the model's own template until an empty line or end of input.

    The whole conversation is rendered each turn; the engine runs only what its cache lacks.
    """
    messages = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        prompt = render_chat(tokenizer, messages)
        while len(prompt) + max_new_tokens > engine.length:
            if len(messages) == 1:
                raise UserError(
                    f"this message and {max_new_tokens} new tokens do not fit the context of "
                    f"{engine.length} tokens: raise --cache_size or lower --max_new_tokens"
                )
            print("(the context is full: the oldest turn is forgotten)", file=sys.stderr)
            messages = messages[2:]
            prompt = render_chat(tokenizer, messages)
        streamer = Streamer(tokenizer)
        result = engine.generate([prompt], max_new_tokens, tokenizer.eos_ids, streamer)
        streamer.close()
        reply = tokenizer.decode(result.token_ids[0])
        messages.append({"role": "assistant", "content": reply})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Generate text and measure it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt", default="Hello, my name is",
        help="text, or an integer for a synthetic prompt of that length")  # fmt: skip
    add("--interactive", action="store_true", help="chat through the model's own template")
    add("--num_samples", type=int, default=1)
    add("--max_new_tokens", type=int, default=200)
    add("--batch_size", type=int, default=1, help="copies of the prompt run together")
    add("--top_k", type=int, default=200, help="0: all tokens")
    add("--top_p", type=float, default=1.0)
    add("--min_p", type=float, default=0.0)
    add("--temperature", type=float, default=0.8, help="0: greedy")
    add("--seed", type=int, default=1234)
    add_model_arguments(parser)
    add("--compile", action="store_true", help="compile the decode step")
    add(
        "--compile_mode",
        default="reduce-overhead",
        choices=["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
    )
    add("--compile_prefill", action="store_true", help="compile the prefill of each bucket too")
    add("--profile", type=Path, help="write a Chrome trace of one sample's decoding here")
    add("--kv_cache", choices=["bf16", "int8"], default="bf16")
    add("--cache_size", type=int, help="cache slots; default: prompt + new tokens (chat: 2048)")
    add("--random_weights", choices=list(CONFIGS), metavar="NAME",
        help=f"true shapes, random weights, no files: {', '.join(CONFIGS)}")  # fmt: skip
    add("--ignore_eos", action="store_true", help="always generate max_new_tokens")
    add("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def run_samples(engine: Engine, prompt: list[int], args, tokenizer, eos: set[int]) -> list[Result]:
    """Generate `num_samples` times, streaming row 0, and trace the last where asked to."""
    results = []
    for i in range(args.num_samples):
        engine.cached = []  # each sample's time to first token includes its whole prefill
        streamer = Streamer(tokenizer) if tokenizer else None
        if streamer:
            print(args.prompt if not args.prompt.isdecimal() else "", end="", flush=True)
        call = ([prompt] * engine.batch, args.max_new_tokens, eos, streamer)
        if args.profile and i == args.num_samples - 1:
            with torch.profiler.profile() as trace:
                results.append(engine.generate(*call))
            trace.export_chrome_trace(str(args.profile))
        else:
            results.append(engine.generate(*call))
        if streamer:
            streamer.close()
    return results


def main() -> None:
    args = parse_args()
    if min(args.num_samples, args.batch_size, args.max_new_tokens) < 1:
        raise UserError("--num_samples, --batch_size and --max_new_tokens must be at least 1")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    model, mode, directory = load(args, args.random_weights)
    tokenizer = open_tokenizer(directory, model, required=not args.prompt.isdecimal())
    if args.compile:
        configure_compiler()
    if args.interactive:
        if tokenizer is None:
            raise UserError("--interactive needs a model with a tokenizer")
        render_chat(tokenizer, [{"role": "user", "content": "Hello"}])  # before a long compile
        prompt, length = [1], args.cache_size or min(2048, model.config.max_positions)
    else:
        prompt = encode_prompt(args.prompt, tokenizer, model.config.vocab_size, args.seed)
        length = args.cache_size or len(prompt) + args.max_new_tokens
    engine = Engine(
        model, sampling, batch=args.batch_size, length=length, kv_cache=args.kv_cache,
        compile_mode=args.compile_mode if args.compile else None,
        compile_prefill=args.compile and args.compile_prefill, seed=args.seed,
    )  # fmt: skip
    if args.compile:
        progress("compiling the decode step (half a minute the first time) ...")
    compile_s = engine.warm_up(len(prompt))
    progress("")
    graphs = compiled_graphs()
    eos = set() if args.ignore_eos or tokenizer is None else tokenizer.eos_ids
    if args.interactive:
        chat(engine, tokenizer, args.max_new_tokens)
        return
    results = run_samples(engine, prompt, args, tokenizer, eos)
    figures = report(engine, results, args, mode, compile_s)
    figures["recompiles"] = compiled_graphs() - graphs
    if tokenizer:
        figures["texts"] = [tokenizer.decode(ids) for ids in figures["token_ids"]]
    print_report(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    cli(main)
