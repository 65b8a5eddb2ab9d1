"""Memory that a long context needs, and what tensor parallelism should reach: both computed.

python predict.py                                        # both tables, as in the README
python predict.py --model llama-3.1-8b --mode int4 --kv_cache int8 --positions 131072

Bytes are those of the tensors that the loader makes. Speeds are predictions from bandwidths: a
step reads its rank's weights at EFFICIENCY of the memory's peak, and waits LATENCY_S for every
collective besides the time of its bytes on the links. Neither constant has been measured here.
"""

import functools
from dataclasses import dataclass

import torch

from checkpoint import build_model
from checkpoint_quantizer import linear_names
from config import CONFIGS, ModelConfig
from engine import BUCKETS
from errors import Parser, UserError, cli
from kernels.formats import FORMATS
from model import KV_CACHES
from modes import FLOAT_MODES, head_mode, parse_mode

EFFICIENCY = 0.7  # of the memory's peak bandwidth, in bf16; published records are 0.64 to 0.78
LATENCY_S = 10e-6  # of a small all-reduce over NVLink: an assumption


@dataclass(frozen=True)
class Device:
    """Peak bytes per second of memory and of the links (each way), and bytes of memory."""

    bandwidth: float
    link: float
    memory: float


DEVICES = {"H100": Device(3.35e12, 450e9, 80e9), "H200": Device(4.8e12, 450e9, 141e9)}


@functools.cache
def weight_bytes(config: ModelConfig, mode: str, groupsize: int | None = None) -> tuple[int, int]:
    """Bytes of (all weights, the weights that a step reads: all but an untied embedding table)."""
    parsed = parse_mode(mode, groupsize)
    layers, dtype = {}, FLOAT_MODES.get(parsed.format, torch.bfloat16)
    if parsed.format in FORMATS:
        layers = {name: parsed.settings for name in linear_names(config)}
        layers["output"] = head_mode(parsed, None).settings
    elif parsed.format not in FLOAT_MODES:
        raise UserError(f"{mode} chooses formats by measuring: name one format")
    model = build_model(config, layers, dtype)
    sizes = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    table = model.tok_embeddings.weight
    tied = getattr(model.output, "weight", None) is table
    total = sum(sizes.values())
    return total, total - (0 if tied else sizes[id(table)])


def cache_bytes(
    config: ModelConfig, positions: int, kind: str = "bf16", batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> int:  # fmt: skip
    """Bytes of the cache of all layers, scales included, of a model in `dtype`."""
    shape = (batch, config.n_kv_heads, positions, config.head_dim)
    cache = KV_CACHES[kind](*shape, dtype, "meta")
    return config.n_layers * sum(b.numel() * b.element_size() for b in cache.buffers())


def activation_bytes(config: ModelConfig) -> int:
    """An upper bound on what the largest prefill chunk of a block holds at once, in bf16.

    The residual stream and its fp32 norm, qkv with its rotated copies, gate, up and their product,
    and the logits of one row.
    """
    width = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    row = 2 * config.dim + 8 * config.dim + 4 * 2 * width + 4 * 2 * config.ffn_dim
    return BUCKETS[-1] * row + 8 * config.vocab_size


def memory_bytes(
    config: ModelConfig, mode: str, groupsize: int | None, positions: int, kv_cache: str
) -> dict[str, int]:
    """Bytes of weights, cache, rotary table, activations, and in total, at full context."""
    parts = {
        "weights": weight_bytes(config, mode, groupsize)[0],
        "cache": cache_bytes(config, positions, kv_cache),
        "rotary": 2 * positions * (config.head_dim // 2) * 4,
        "activations": activation_bytes(config),
    }
    return {**parts, "total": sum(parts.values())}


def communication(config: ModelConfig, ranks: int, gathered: bool = False) -> tuple[int, float]:
    """Collectives per token, and bytes that each rank sends for them (ring algorithms), in bf16.

    All-reduces of C numbers after the embedding, wo and w2; one all-gather of the logits. Formats
    that quantize activations have the inputs and the outputs of wo and w2 `gathered` instead.
    """
    share, itemsize = (ranks - 1) / ranks, 2
    reduced = 2 * share * config.dim * itemsize
    ends = reduced + share * config.vocab_size * itemsize  # of the embedding and of the head
    if not gathered:
        return 2 * config.n_layers + 2, ends + 2 * config.n_layers * reduced
    width = config.n_heads * config.head_dim + config.ffn_dim + 2 * config.dim
    return 4 * config.n_layers + 2, ends + config.n_layers * share * width * itemsize


def gathers(mode: str) -> bool:
    """Whether inputs are gathered, not results summed: the format quantizes activations."""
    name = parse_mode(mode).format
    return name in FORMATS and FORMATS[name].input_way != "none"


def predict(
    config: ModelConfig, mode: str, device: Device, ranks: int, groupsize: int | None = None
) -> float | None:
    """Tokens per second at batch 1 and a short context; None where the weights do not fit."""
    total, read = weight_bytes(config, mode, groupsize)
    if total / ranks > 0.9 * device.memory or config.n_kv_heads % ranks:
        return None
    step = read / ranks / (device.bandwidth * EFFICIENCY)
    if ranks > 1:
        collectives, sent = communication(config, ranks, gathers(mode))
        step += collectives * LATENCY_S + sent / device.link
    return 1 / step


def prediction_table(mode: str, groupsize: int | None = None) -> str:
    """Markdown: tokens/s of 8B, 70B and 405B on 1 to 8 devices."""
    names = ("llama-3.1-8b", "llama-3-70b", "llama-3.1-405b")
    lines = ["| model, " + mode + " | collectives a token | KB sent a token (8) | "
             + " | ".join(f"{n} {d}" for d in DEVICES for n in (1, 2, 4, 8)) + " |"]  # fmt: skip
    lines.append("|---|" + "---:|" * (2 + 4 * len(DEVICES)))
    for name in names:
        config = CONFIGS[name]
        collectives, sent = communication(config, 8, gathers(mode))
        cells = [str(collectives), f"{sent / 1e3:.0f}"]
        for device in DEVICES.values():
            for ranks in (1, 2, 4, 8):
                speed = predict(config, mode, device, ranks, groupsize)
                cells.append("-" if speed is None else f"{speed:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print what the command line asks to predict."""
    parser = Parser(description="Compute the memory of a context and the speed of many devices.")
    add = parser.add_argument
    add("--model", choices=list(CONFIGS), default="llama-3.1-8b", metavar="NAME",
        help=f"the shape: {', '.join(CONFIGS)}; default: llama-3.1-8b")  # fmt: skip
    add("--mode", default="int4", help="of the weights, see quantize.py --list")
    add("--groupsize", type=int, help="columns that share a scale; default: the format's")
    add("--kv_cache", choices=list(KV_CACHES), default="int8", help="type of keys and values")
    add("--positions", type=int, help="cache slots; default: 131072, or the model's context")
    args = parser.parse_args()
    config = CONFIGS[args.model]
    if args.positions is None:
        args.positions = min(131072, config.max_positions)
    if not 1 <= args.positions <= config.max_positions:
        raise UserError(f"--positions: 1 to {config.max_positions} for {args.model}")
    parts = memory_bytes(config, args.mode, args.groupsize, args.positions, args.kv_cache)
    print(f"computed: {args.model}, {args.mode}, {args.kv_cache} cache, {args.positions} slots")
    for name, size in parts.items():
        print(f"  {name:<12}{size / 1e9:8.3f} GB")
    print(f"\npredicted tokens/s, batch 1, assuming {EFFICIENCY:.0%} of the memory's peak bandwidth"
          f" and {LATENCY_S * 1e6:.0f} us a collective\n")  # fmt: skip
    tables = {"bf16": None, "int4": None, args.mode: args.groupsize}
    print("\n\n".join(prediction_table(mode, size) for mode, size in tables.items()))


if __name__ == "__main__":
    cli(main)
