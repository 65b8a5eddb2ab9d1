"""Convert a Llama GGUF file into a Hugging Face style directory.

    python scripts/convert_gguf.py model.gguf checkpoints/model

writes config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json and
tokenizer_config.json. Quantized tensors are dequantized in float32 and rounded to bfloat16
(8 bits of mantissa, a relative error of at most 2^-9), one tensor at a time. llama.cpp stores
the rows of Q and K interleaved for its rotary embedding; they are put back into the
rotate-half order. The directory appears under its name only when it is complete.

Source of the field names: the GGUF specification (ggml/docs/gguf.md).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import Parser, cli, directory_whole
from scripts.gguf_tokenizer import GGUFError, tokenizer_files

CHUNK = 1 << 22  # values dequantized at a time, in float32
NAMES = {  # GGUF tensor name without ".weight" -> Hugging Face name without ".weight"
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
UNSUPPORTED = (  # header fields that change the arithmetic of a llama model
    "expert_count",
    "expert_used_count",
    "attention.sliding_window",
    "attention.scale",
    "attention.clamp_kqv",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
)


class Header:
    """The key-value fields of a GGUF file, and its tensors, read lazily from a memory map."""

    def __init__(self, path: Path):
        import gguf  # here, for whoever converts nothing runs without it

        try:
            reader = gguf.GGUFReader(path)
        except FileNotFoundError:
            raise GGUFError(f"no such file: {path}") from None
        except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise GGUFError(f"{path} is not a readable GGUF file: {first_line(error)}") from None
        self.path, self.fields, self.tensors = path, reader.fields, reader.tensors
        self.architecture = self.get("general.architecture")
        if self.architecture != "llama":
            raise GGUFError(
                f"{path} holds the architecture {self.architecture!r}: only 'llama' is supported"
            )

    def get(self, key: str, default: Any = None) -> Any:
        field = self.fields.get(key)
        try:
            return default if field is None else field.contents()
        except ValueError as error:
            what = f"header field {key} cannot be read: {first_line(error)}"
            raise GGUFError(f"{self.path}: {what}") from None

    def need(self, key: str, kind: type = int) -> Any:
        """The field `llama.<key>`, of the given type, or an error that names it."""
        value = self.get(f"llama.{key}")
        if type(value) is not kind or value <= 0:
            raise GGUFError(f"{self.path}: header field llama.{key} is {value!r}: cannot convert")
        return value


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def shortest(value: float) -> float:
    """A float32 from the header as the decimal its writer meant: 9.99999975e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def rope_scaling(header: Header, rope_dim: int, theta: float) -> dict[str, Any] | None:
    """The Hugging Face `rope_scaling` entry.

    GGUF keeps Llama 3.1's scaling as a table of one divisor per frequency, so its parameters are
    found again: the factor is the largest divisor, the rest are Llama 3's, and the table that
    follows from them must be the one in the file.
    """
    kind = header.get("llama.rope.scaling.type", "none")
    table = [t for t in header.tensors if t.name == "rope_freqs.weight"]
    if kind != "none":
        raise GGUFError(f"{header.path}: rope scaling {kind!r} is not supported")
    if not table:
        return None
    divisors = np.asarray(table[0].data, dtype=np.float64)
    scaling = {
        "rope_type": "llama3",
        "factor": shortest(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelengths = 2 * np.pi * theta ** (np.arange(0, rope_dim, 2) / rope_dim)
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise GGUFError(f"{header.path}: rope_freqs.weight is not Llama 3.1's frequency scaling")
    return scaling


def model_config(header: Header) -> dict[str, Any]:
    """config.json from the header, every field checked."""
    for key in UNSUPPORTED:
        if header.get(f"llama.{key}"):
            raise GGUFError(f"{header.path}: header field llama.{key} is not supported")
    width, heads = header.need("embedding_length"), header.need("attention.head_count")
    kv_heads = header.get("llama.attention.head_count_kv", heads)
    head_dim = header.get("llama.attention.key_length", width // heads)
    value_dim = header.get("llama.attention.value_length", head_dim)
    rope_dim = header.get("llama.rope.dimension_count", head_dim)
    if type(kv_heads) is not int or kv_heads <= 0 or heads % kv_heads:
        raise GGUFError(f"{header.path}: {heads} heads cannot share {kv_heads} key-value heads")
    if not head_dim == value_dim == rope_dim:
        raise GGUFError(
            f"{header.path}: key, value and rotary sizes differ ({head_dim}, {value_dim}, "
            f"{rope_dim}): partial rotary embedding is not supported"
        )
    theta = shortest(header.get("llama.rope.freq_base", 10000.0))
    shapes = {t.name: t.shape for t in header.tensors}
    if "token_embd.weight" not in shapes:
        raise GGUFError(f"{header.path}: tensor token_embd.weight is missing")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(shapes["token_embd.weight"][1]),
        "hidden_size": width,
        "intermediate_size": header.need("feed_forward_length"),
        "num_hidden_layers": header.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": header.need("context_length"),
        "rms_norm_eps": shortest(header.need("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(header, rope_dim, theta),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in shapes,
        "torch_dtype": "bfloat16",
    }


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """GGUF tensor name -> shape [out, in], for every tensor that this model must have."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"token_embd": (config["vocab_size"], width), "output_norm": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["output"] = (config["vocab_size"], width)
    block = {
        "attn_norm": (width,),
        "attn_q": (query, width),
        "attn_k": (key, width),
        "attn_v": (key, width),
        "attn_output": (width, query),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def check_tensors(header: Header, config: dict[str, Any]) -> list[Any]:
    """The tensors to convert; an error names one that is missing, unknown or misshapen."""
    if (layers := config["num_hidden_layers"]) > len(header.tensors):
        raise GGUFError(f"{header.path}: {layers} layers, but only {len(header.tensors)} tensors")
    expected = expected_shapes(config)
    tensors = [t for t in header.tensors if t.name != "rope_freqs.weight"]
    found = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in tensors}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise GGUFError(
                f"{header.path}: tensor {name} has shape {found.get(name)}, "
                f"expected {expected.get(name)} (None: no such tensor)"
            )
    return tensors


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    layer = parts[1] if parts[0] == "blk" else ""
    return NAMES[parts[-2]].format(layer) + ".weight"


def read_tensor(tensor: Any, config: dict[str, Any]) -> torch.Tensor:
    """One tensor [out, in] in bfloat16, the rows of Q and K in rotate-half order."""
    import gguf

    shape = [int(n) for n in reversed(tensor.shape)]
    weight = torch.empty(shape, dtype=torch.bfloat16)
    rows = max(1, CHUNK // int(np.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        try:
            values = gguf.dequantize(tensor.data[start : start + rows], tensor.tensor_type)
        except NotImplementedError:
            raise GGUFError(
                f"tensor {tensor.name} has the type {tensor.tensor_type.name}, "
                "which the gguf package cannot dequantize"
            ) from None
        weight[start : start + rows] = torch.from_numpy(np.array(values, dtype=np.float32))
    if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
        half, width = config["head_dim"] // 2, shape[1]
        pairs = weight.view(-1, half, 2, width)  # [H, D/2, 2, in]: the two of a pair are adjacent
        weight = pairs.transpose(1, 2).reshape(-1, width)
    return weight


def write_weights(header: Header, config: dict[str, Any], path: Path) -> None:
    """Stream all tensors into one safetensors file: header first, then one tensor at a time."""
    tensors = check_tensors(header, config)
    index: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        size = 2 * int(tensor.n_elements)
        shape = [int(n) for n in reversed(tensor.shape)]
        span = [offset, offset + size]
        index[hf_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": span}
        offset += size
    head = json.dumps(index).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors:
            file.write(read_tensor(tensor, config).view(torch.int16).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def convert(source: Path, destination: Path) -> None:
    """Convert the GGUF file `source` into the new directory `destination`."""
    if destination.exists():
        raise GGUFError(f"{destination} exists already: remove it, or name another directory")
    header = Header(source)
    config = model_config(header)
    files = tokenizer_files(header, config["vocab_size"])
    config |= files["generation_config.json"]  # bos, eos and pad ids stand in both
    files = {"config.json": config, **files}
    with directory_whole(destination) as work:
        write_weights(header, config, work / "model.safetensors")
        for name, content in files.items():
            text = json.dumps(content, ensure_ascii=False, indent=2)
            (work / name).write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = Parser(description="GGUF file -> Hugging Face style directory")
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("destination", type=Path, help="the directory to write; must not exist")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.destination)
    print(f"wrote {arguments.destination}")


if __name__ == "__main__":
    cli(main)
