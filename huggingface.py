"""What a Hugging Face directory says: its config.json as a ModelConfig, its tensors' names."""

from config import ModelConfig
from errors import UserError

# Our fused weights and the Hugging Face tensors whose rows they stack.
HF_BLOCK = {
    "attention_norm": ["input_layernorm"],
    "attention.wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "attention.wo": ["self_attn.o_proj"],
    "ffn_norm": ["post_attention_layernorm"],
    "feed_forward.w13": ["mlp.gate_proj", "mlp.up_proj"],
    "feed_forward.w2": ["mlp.down_proj"],
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # model_type
HF_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def hf_names(name: str) -> list[str]:
    """Hugging Face names of the tensors stacked in ours: layers.0.attention.wqkv.weight -> 3."""
    module, _, kind = name.rpartition(".")
    if module in HF_TOP:
        return [f"{HF_TOP[module]}.{kind}"]
    _, index, part = module.split(".", 2)
    return [f"model.layers.{index}.{hf}.{kind}" for hf in HF_BLOCK[part]]


def part_rows(config: ModelConfig, name: str) -> list[int]:
    """Rows of each of the tensors stacked in ours, wqkv or w13."""
    if "w13" in name:
        return [config.ffn_dim] * 2
    return [config.n_heads * config.head_dim] + [config.n_kv_heads * config.head_dim] * 2


def config_from_hf(hf: dict) -> ModelConfig:
    """ModelConfig from the contents of a Hugging Face config.json."""
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"model_type {family!r} in config.json: only {', '.join(FAMILIES)} work")
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    window = hf.get("sliding_window", 4096) and hf.get("use_sliding_window", family == "mistral")
    if window and not (family.startswith("qwen") and hf.get("max_window_layers", 28) >= layers):
        raise UserError("config.json asks for sliding-window attention, which is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {hf['hidden_act']!r} in config.json: only silu is supported")
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf.get(name), dict | None):
            raise UserError(f"{name} {hf[name]!r} in config.json: must be an object")
    rope = hf.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("rope_parameters differ between layers in config.json: not supported")
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(f"partial_rotary_factor {partial!r} in config.json: only 1 is supported")
    scaling = hf.get("rope_scaling") or (rope if {"rope_type", "type"} & rope.keys() else None)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"rope scaling {kind!r} in config.json: only llama3 is supported")
    width = 128 if family == "qwen3" else hf["hidden_size"] // heads
    return ModelConfig(
        dim=hf["hidden_size"],
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=hf.get("num_key_value_heads") or heads,
        ffn_dim=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        head_dim=hf.get("head_dim") or width,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta", 10000.0)),
        rope_scaling=None if kind == "default" else (
            scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"],
            scaling["original_max_position_embeddings"],
        ),
        max_positions=hf.get("max_position_embeddings", 2048),
        tied_head=hf.get("tie_word_embeddings", False),
        attention_bias=family == "qwen2" or hf.get("attention_bias", False),
        output_bias=family != "qwen2" and hf.get("attention_bias", False),
        ffn_bias=hf.get("mlp_bias", False),
        qk_norm=family == "qwen3",
    )  # fmt: skip
