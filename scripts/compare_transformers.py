"""Ours beside transformers with a static cache, and torchao's formats on it: the same shape and
work, random weights, one process, in turns.

python scripts/compare_transformers.py --random_weights llama-3-8b --device cuda --json out.json

The peer's step is compiled too, takes the largest logit, and never waits for the device. Where a
mode is quantized the peer needs torchao; without it that mode is left out, and said so. Mode
`gemlite:64` is our int4 in groups of 64 beside torchao's 4 bits on gemlite's kernels. A figure is
new tokens over the time from the first to the last, the median of the turns.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends import choose_kernels
from config import CONFIGS, ModelConfig
from engine import Engine
from errors import Parser, UserError, check_device, check_outputs, cli, progress, write_json
from graphs import COMPILE_MODES, configure_compiler, skipped_graphs
from kernels.choice import KERNELS
from measure import device_name, read_bandwidth
from modes import parse_mode
from random_weights import random_model
from sampling import Sampling


def torchao_config(mode: str):
    """torchao's name for a mode; None where transformers runs it alone."""
    if mode == "bf16":
        return None
    name, _, group = mode.partition(":")
    if group and not group.isdecimal():
        raise UserError(f"{mode}: the group size is not a number")
    try:
        import torchao.quantization as ao
    except ImportError:
        raise UserError(f"{mode}: the peer needs torchao, which is not installed") from None
    if name == "gemlite":
        try:
            from torchao.prototype.quantization import UIntxWeightOnlyConfig
        except ImportError:
            raise UserError(f"{mode}: this torchao does not know gemlite's kernels") from None
        if importlib.util.find_spec("gemlite") is None:
            raise UserError(f"{mode}: the peer needs gemlite, which is not installed")
        return UIntxWeightOnlyConfig(group_size=int(group or 64), bit_width=4)
    configs = {
        "int8": ao.Int8WeightOnlyConfig, "int8dq": ao.Int8DynamicActivationInt8WeightConfig,
        "float8": ao.Float8WeightOnlyConfig,
    }  # fmt: skip
    if name not in ("int4", *configs):
        raise UserError(f"{mode}: the peer has {', '.join(['bf16', 'int4', *configs, 'gemlite'])}")
    if name == "int4":  # tinygemm's layout: the default one needs a package more
        return ao.Int4WeightOnlyConfig(
            group_size=int(group or 64), int4_packing_format="tile_packed_to_4d"
        )
    return configs[name]()


class Peer:
    """A Llama of transformers, its static cache and its compiled step."""

    def __init__(self, config: ModelConfig, mode: str, args: argparse.Namespace):
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

        ao = torchao_config(mode)
        shape = LlamaConfig(
            hidden_size=config.dim, num_hidden_layers=config.n_layers, head_dim=config.head_dim,
            num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.ffn_dim, vocab_size=config.vocab_size,
            max_position_embeddings=config.max_positions, rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied_head, dtype=torch.bfloat16,
        )  # fmt: skip
        with torch.device(args.device):
            self.model = LlamaForCausalLM(shape).to(torch.bfloat16).eval()
        if ao is not None:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            try:  # the head in int8, as ours
                quantize_(self.model.model, ao)
                quantize_(self.model, Int8WeightOnlyConfig(), lambda _, name: name == "lm_head")
            except Exception as error:  # whatever a kernel package that is missing raises
                raise UserError(f"{mode}: torchao: {error}") from None
        self.cache = StaticCache(config=shape, max_cache_len=args.prompt + args.max_new_tokens)
        self.args = args
        self.step = torch.compile(self.forward, mode=args.compile_mode, fullgraph=True)

    def forward(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """tokens [1, T] at `position` [T] -> the likeliest next one, [1, 1]."""
        out = self.model(
            tokens, position_ids=position[None], past_key_values=self.cache, use_cache=True
        )
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def tokens_per_s(self) -> float:
        """Of one run, the prompt's time left out."""
        prompt = torch.ones(1, self.args.prompt, dtype=torch.int64, device=self.args.device)
        position = torch.arange(self.args.prompt, device=self.args.device)
        with torch.inference_mode():
            self.cache.reset()
            token, position = self.forward(prompt, position), position[-1:] + 1
            token.item()
            begin = time.perf_counter()
            for _ in range(self.args.max_new_tokens - 1):
                token, position = self.step(token, position).clone(), position + 1
            token.item()
        return (self.args.max_new_tokens - 1) / (time.perf_counter() - begin)


class Ours:
    """The engine on random weights of the same shape."""

    def __init__(self, config: ModelConfig, mode: str, args: argparse.Namespace):
        name, _, group = mode.partition(":")
        if name == "gemlite":
            name, group = "int4", group or "64"
        own = None if mode == "bf16" else parse_mode(name, int(group) if group else None)
        model = random_model(config, own, args.device, torch.bfloat16)
        length = args.prompt + args.max_new_tokens
        self.prompt, self.new_tokens = [1] * args.prompt, args.max_new_tokens
        self.engine = Engine(
            model, Sampling(temperature=0), length=length, compile_mode=args.compile_mode
        )

    def tokens_per_s(self) -> float:
        """Of one run, the prompt's time left out."""
        self.engine.cached = []  # the prompt is run again, as the peer's is
        step_s = self.engine.generate([self.prompt], self.new_tokens).step_s
        return len(step_s) / sum(step_s)


def forget() -> None:
    """Free the last mode's models: each is in a cycle, and its graphs live until torch forgets."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(mode: str, args: argparse.Namespace) -> dict:
    """Both sides of one mode, in turns after a run each that compiles."""
    config = CONFIGS[args.random_weights]
    torchao_config(mode)  # refuses before anything large is made
    forget()
    progress(f"{mode}: compiling")
    sides, skipped = [Ours(config, mode, args), Peer(config, mode, args)], [skipped_graphs()]
    for side in sides:
        try:
            side.tokens_per_s()
        except Exception as error:
            if isinstance(side, Ours):
                raise
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{mode}: the peer fails: {reason}") from None
        skipped.append(skipped_graphs())
    turns = []
    for turn in range(args.turns):
        progress(f"{mode}: turn {turn + 1} of {args.turns}")
        turns.append([side.tokens_per_s() for side in sides])
    progress("")
    mine, other = (statistics.median(column) for column in zip(*turns, strict=True))
    return {"mode": mode, "tokens_per_s": mine, "peer_tokens_per_s": other,
            "ratio": mine / other, "turns": turns,
            "cuda_graphs_skipped": [b - a for a, b in pairwise(skipped)]}  # fmt: skip


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Ours beside transformers and torchao, in turns.")
    add = parser.add_argument
    llamas = [name for name, config in CONFIGS.items() if not config.qk_norm]
    add("--random_weights", choices=llamas, required=True, metavar="NAME",
        help=f"the shape: {', '.join(llamas)}")  # fmt: skip
    add("--modes", default="bf16,int8,int4:64", help="comma-separated, of bf16, int8, int8dq, "
        "int4:GROUPSIZE, gemlite:GROUPSIZE and float8")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--kernels", choices=KERNELS, default="auto", help="of ours, see generate.py")
    add("--compile_mode", choices=COMPILE_MODES, default="reduce-overhead", help="of both")
    add("--prompt", type=int, default=128, help="tokens")
    add("--max_new_tokens", type=int, default=256)
    add("--turns", type=int, default=5)
    add("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Compare mode by mode; what is known is written after each."""
    args = parse_args()
    if min(args.prompt, args.turns, args.max_new_tokens - 1) < 1:
        raise UserError("--prompt and --turns must be at least 1, --max_new_tokens at least 2")
    check_device(args.device)
    check_outputs(replaced=args.json)
    choose_kernels(args.kernels, args.device)
    configure_compiler(args.device)
    results, notes = [], []
    for mode in args.modes.split(","):
        try:
            results.append(r := compare(mode, args))
            print(f"{mode}: {r['tokens_per_s']:.1f} tokens/s, the peer "
                  f"{r['peer_tokens_per_s']:.1f}: x {r['ratio']:.2f}")  # fmt: skip
        except UserError as error:
            notes.append(str(error))
            print(f"left out, {error}", file=sys.stderr)
        if args.json and results:
            import transformers

            write_json(args.json, {
                "device": device_name(args.device), "torch": torch.__version__,
                "transformers": transformers.__version__, "shape": args.random_weights,
                "prompt": args.prompt, "max_new_tokens": args.max_new_tokens,
                "compile_mode": args.compile_mode, "kernels": args.kernels,
                "read_bandwidth_bytes_per_s": read_bandwidth(args.device),
                "results": results, "left_out": notes,
            })  # fmt: skip
    if not results:
        raise UserError("no mode could be compared")


if __name__ == "__main__":
    cli(main)
