"""Generate text: python generate.py --compile --checkpoint_path FILE --prompt "Once upon a time"

Decode speed is measured after a warm-up that compiles, and leaves prefill out; the time to the
first token is printed beside it. Bandwidth is the bytes of weights and cache that a step reads,
over its time, beside what a plain stream of reads reaches in the same run.
"""

import argparse
import os
from pathlib import Path

import torch

import predict
import tp
from chat import Streamer, chat, render_chat
from checkpoint import open_checkpoint
from config import CONFIGS
from engine import Engine, Result, cache_length
from errors import (
    Parser,
    UserError,
    check_outputs,
    check_seed,
    cli,
    first_rank,
    processes,
    progress,
    write_json,
    written_whole,
)  # fmt: skip
from generate_report import print_report, report
from graphs import COMPILE_MODE, COMPILE_MODES, compiled_graphs, configure_compiler
from loading import add_cache_argument, add_model_arguments, load, model_flags
from measure import (
    check_memory,
    reset_peak_memory,
)
from model import Transformer
from package import Package
from prompts import encode_prompt, is_length, open_tokenizer, read_prompts
from sampling import Sampling
from speculative import SpeculativeEngine

DRAFT_K, LOOKUP_K = 5, 7
PROMPT = "Hello, my name is"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Generate text and measure it.")
    add = parser.add_argument
    add("--prompt", help="text, or an integer for a synthetic prompt of that length; "
        f"default: {PROMPT!r}")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE",
        help='one prompt a line, or JSONL of {"prompt": "..."}: all in one batch')  # fmt: skip
    add("--interactive", action="store_true",
        help="chat through the model's own template; an empty line or Ctrl-D ends it")  # fmt: skip
    add("--num_samples", type=int, default=1, help="texts, one after another")
    add("--max_new_tokens", type=int, default=200, help="of each text, or reply")
    add("--batch_size", type=int, default=1,
        help="copies of the prompt run together; the first one's text is printed")  # fmt: skip
    add("--top_k", type=int, default=200, help="sample from the k likeliest tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest, together this likely")
    add(
        "--min_p", type=float, default=0.0, help="leave out tokens below this part of the likeliest"
    )
    add("--temperature", type=float, default=0.8, help="0: greedy")
    add("--seed", type=int, default=1234, help="of the sampling")
    add_model_arguments(parser)
    add("--compile", action="store_true",
        help="compile the decode step, unless it is one operator already")  # fmt: skip
    add("--compile_mode", choices=COMPILE_MODES,
        help=f"torch.compile's mode of the decode step; default: {COMPILE_MODE}")  # fmt: skip
    add("--package", type=Path, metavar="FILE.pt2",
        help="run the steps that scripts/export.py compiled, and compile nothing")  # fmt: skip
    add("--compile_prefill", action="store_true", help="compile the prefill of each bucket too")
    add("--draft_checkpoint_path", type=Path,
        help="speculate: a smaller or quantized model guesses")  # fmt: skip
    add("--prompt_lookup", action="store_true",
        help="speculate: the text so far guesses, no draft model needed")  # fmt: skip
    add("--speculate_k", type=int, metavar="K",
        help=f"guesses a round; default: {DRAFT_K} of a draft, {LOOKUP_K} looked up")  # fmt: skip
    add("--profile", type=Path, help="write a Chrome trace of one sample's decoding here")
    add_cache_argument(parser)
    add("--cache_size", type=int, help="cache slots; default: prompt + new tokens (chat: 2048)")
    add("--random_weights", choices=list(CONFIGS), metavar="NAME",
        help=f"true shapes, random weights, no files: {', '.join(CONFIGS)}")  # fmt: skip
    add("--ignore_eos", action="store_true", help="always generate max_new_tokens")
    add("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def sampling_of(args: argparse.Namespace) -> Sampling:
    """How tokens are drawn; a UserError for numbers that make no sense."""
    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p)


def make_engine(model: Transformer, length: int, batch: int, args: argparse.Namespace) -> Engine:
    """The engine that the command line asks for: plain, or speculating."""
    sampling = sampling_of(args)
    settings = {
        "batch": batch, "length": length, "kv_cache": args.kv_cache, "seed": args.seed,
        "compile_mode": args.compile_mode if args.compile else None,
        "compile_prefill": args.compile and args.compile_prefill,
    }  # fmt: skip
    draft_path, lookup, k = args.draft_checkpoint_path, args.prompt_lookup, args.speculate_k
    if draft_path is None and not lookup:
        return Engine(model, sampling, **settings)
    draft = None
    if draft_path is not None:
        flags = {"checkpoint_path": draft_path, "random_weights": None, "quantization": None,
                 "groupsize": None}  # fmt: skip
        draft = load(**{**model_flags(args), **flags})[0]
    k = (LOOKUP_K if lookup else DRAFT_K) if k is None else k
    # All ranks must agree when to stop speculating: each measures times of its own.
    settings["agree"] = lambda verdict: tp.from_rank_0(lambda: verdict)
    return SpeculativeEngine(model, sampling, k, draft, **settings)


def is_synthetic(args: argparse.Namespace) -> bool:
    """Whether --prompt is a length: random tokens, there to be timed."""
    return not args.prompts and is_length(args.prompt)


def run_samples(
    engine: Engine, prompts: list[list[int]], texts: list[str], args, tokenizer, eos: set[int]
) -> list[Result]:
    """Generate `num_samples` times, and trace the last where asked to.

    Row 0 streams as it comes. Several prompts are printed when all rows have ended; so is what
    follows a synthetic one, which is there to be timed.
    """
    results, synthetic = [], is_synthetic(args)
    for i in range(args.num_samples):
        engine.cached = []  # each sample's time to first token includes its whole prefill
        streams = tokenizer and not args.prompts and not synthetic
        streamer = Streamer(tokenizer) if streams else None
        if streamer:
            print(texts[0], end="", flush=True)
        call = (prompts, args.max_new_tokens, eos, streamer)
        if args.profile and first_rank() and i == args.num_samples - 1:
            with torch.profiler.profile() as trace:
                results.append(engine.generate(*call))
            with written_whole(args.profile) as partial:  # missing where torch could not write it
                trace.export_chrome_trace(str(partial))
        else:
            results.append(engine.generate(*call))
        if streamer:
            streamer.close()
        elif synthetic and tokenizer:
            print(tokenizer.decode(results[-1].token_ids[0]), flush=True)
        elif tokenizer:
            for text, ids in zip(texts, results[-1].token_ids, strict=True):
                print(f"{text}{tokenizer.decode(ids)}\n", flush=True)
    return results


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    if min(args.num_samples, args.batch_size, args.max_new_tokens) < 1:
        raise UserError("--num_samples, --batch_size and --max_new_tokens must be at least 1")
    if args.cache_size is not None and args.cache_size < 1:
        raise UserError(f"--cache_size {args.cache_size}: must be at least 1")
    check_seed(args.seed)
    sampling_of(args)
    if args.speculate_k is not None and not (args.prompt_lookup or args.draft_checkpoint_path):
        raise UserError("--speculate_k needs --draft_checkpoint_path or --prompt_lookup")
    if args.prompt_lookup and args.draft_checkpoint_path:
        raise UserError("--prompt_lookup needs no draft: leave --draft_checkpoint_path out")
    if args.prompts and args.batch_size > 1:
        raise UserError("--prompts is a batch of its own: leave --batch_size out")
    if not args.compile and (args.compile_prefill or args.compile_mode):
        name = "compile_prefill" if args.compile_prefill else "compile_mode"
        raise UserError(f"--{name} goes with --compile")
    if args.prompts and args.prompt is not None:
        raise UserError("--prompt and --prompts: take one of them")
    if args.interactive:
        others = ("json", "profile", "prompt", "prompts", "num_samples", "batch_size")
        if given := [name for name in others if getattr(args, name) not in (None, 1)]:
            raise UserError(f"--interactive is one conversation: leave --{given[0]} out")
        if args.ignore_eos:
            raise UserError("--interactive needs the end of a reply: leave --ignore_eos out")
    if args.json or args.profile:
        inputs = {args.prompts, args.package}
        if not args.random_weights:
            inputs |= open_checkpoint(args.checkpoint_path).own_files()
        if args.draft_checkpoint_path:
            inputs |= open_checkpoint(args.draft_checkpoint_path).own_files()
        check_outputs(args.json, replaced=args.profile, inputs=inputs)
    if args.package:
        others = ("compile", "compile_prefill", "draft_checkpoint_path", "prompt_lookup")
        if given := [name for name in others if getattr(args, name)]:
            raise UserError(f"--package is compiled and does not guess: leave --{given[0]} out")
        if args.cache_size:
            raise UserError("the cache of --package is that of its export: leave --cache_size out")
        if processes() > 1:
            raise UserError("--package runs in one process: leave torchrun out")


def prompts_and_length(
    args: argparse.Namespace, texts: list[str], model: Transformer, tokenizer
) -> tuple[list[list[int]], int]:
    """The token ids of the texts (of a chat a first one), and how many tokens a cache must hold."""
    if args.interactive:
        if tokenizer is None:
            raise UserError("--interactive needs a model with a tokenizer")
        render_chat(tokenizer, [{"role": "user", "content": "Hello"}])  # before a long compile
        return [[1]], args.cache_size or min(2048, model.config.max_positions)
    vocab, synthetic = model.config.vocab_size, is_synthetic(args)
    ids = {t: encode_prompt(t, tokenizer, vocab, args.seed, synthetic) for t in set(texts)}
    prompts = [ids[text] for text in texts]
    return prompts, args.cache_size or max(map(len, prompts)) + args.max_new_tokens


def check_cache_memory(model: Transformer, batch: int, length: int, args) -> None:
    """A UserError where there is no room for the cache; tensor parallelism is not checked."""
    if processes() == 1:
        dtype, slots = model.tok_embeddings.weight.dtype, cache_length(length)
        wanted = predict.cache_bytes(model.config, slots, args.kv_cache, batch, dtype)
        what = f"a cache of {batch} x {slots} slots, for as many sequences and tokens"
        check_memory(wanted, what, args.device)


def main() -> None:
    """Load the model, warm up, generate, report."""
    args = parse_args()
    check(args)
    args.prompt = PROMPT if args.prompt is None else args.prompt
    args.compile_mode = args.compile_mode or COMPILE_MODE
    texts = read_prompts(args.prompts) if args.prompts else [args.prompt] * args.batch_size
    model, mode, directory = load(**model_flags(args))
    package = Package(args.package) if args.package else None
    tokenizer = open_tokenizer(directory, model, required=not is_synthetic(args))
    prompts, length = prompts_and_length(args, texts, model, tokenizer)
    if package:
        package.check(model.tok_embeddings.weight.device, len(prompts), args.kv_cache)
        length = min(package.about["slots"], model.config.max_positions)
    check_cache_memory(model, len(prompts), length, args)
    engine = make_engine(model, length, len(prompts), args)
    engine.check(prompts, 1 if args.interactive else args.max_new_tokens)
    if package:
        package.drive(engine)
    if engine.compiled:
        configure_compiler(args.device)
        parts = " and the ".join(engine.compiled)
        progress(f"compiling the {parts} (half a minute each the first time) ...")
    if args.random_weights:
        reset_peak_memory(args.device)  # making weights takes more than loading them would
    compile_s = engine.warm_up(max(map(len, prompts)))
    progress("")
    graphs = compiled_graphs()
    eos = set() if args.ignore_eos or tokenizer is None else tokenizer.eos_ids
    if args.interactive:
        chat(engine, tokenizer, args.max_new_tokens)
        return
    results = run_samples(engine, prompts, texts, args, tokenizer, eos)
    if not first_rank():
        return
    figures = report(engine, results, args, mode, compile_s)
    figures["recompiles"] = compiled_graphs() - graphs
    if "WORLD_SIZE" in os.environ:
        figures["processes"] = processes()
    if tokenizer:
        figures["texts"] = [tokenizer.decode(ids) for ids in figures["token_ids"]]
    print_report(figures)
    write_json(args.json, figures)


if __name__ == "__main__":
    cli(main)
