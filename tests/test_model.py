"""model.py against transformers, in fp32."""

import pytest
import torch
import transformers
from tiny import save_tiny

from checkpoint import load_model, open_checkpoint
from config import CONFIGS, ModelConfig
from model import Int8KVCache, Transformer, rope_frequencies

ZERO = torch.zeros(1, dtype=torch.int64)
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 6},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"rope_parameters": LLAMA3_ROPE},
        {"family": "Mistral", "sliding_window": None, "head_dim": 12},
        {"family": "Qwen2"},
        {"family": "Qwen3", "head_dim": 16},
        {"family": "Qwen3", "head_dim": 12, "attention_bias": True},
    ],
    ids=[
        "tied-gqa",
        "untied-mha",
        "biases",
        "head-dim",
        "llama3-rope",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3-biases",
    ],
)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path, changes):
    directory, reference = save_tiny(tmp_path, **changes)
    model = load_model(open_checkpoint(directory))
    tokens = torch.randint(0, 199, (2, 100))
    model.setup_cache(2, 128)
    ours, theirs = model(tokens, ZERO.expand(2)), reference(tokens).logits
    assert (ours - theirs).abs().max() < 1e-4


@torch.inference_mode()
def test_default_model_equals_transformers(default_model):
    """512 tokens of real text, fp32: at most 1e-3 apart; decode by steps at most 1e-4."""
    model = load_model(open_checkpoint(default_model), dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        default_model, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(default_model)
    text = (default_model.parents[1] / "data" / "calibration.txt").read_text()[:6000]
    tokens = torch.tensor([tokenizer(text)["input_ids"][:512]])
    assert tokens.shape == (1, 512)
    model.setup_cache(1, 512)
    full = model(tokens, ZERO)
    assert (full - reference(tokens).logits).abs().max() <= 1e-3
    model.setup_cache(1, 512)
    steps = [model(tokens[:, :480], ZERO)]
    steps += [model(tokens[:, i : i + 1], torch.tensor([i])) for i in range(480, 512)]
    assert (torch.cat(steps, 1) - full).abs().max() <= 1e-4


@torch.inference_mode()
def test_chunks_and_rows_of_different_lengths(tmp_path):
    """Prefill in chunks, single steps, and two rows at different positions: all the same logits."""
    model = load_model(open_checkpoint(save_tiny(tmp_path)[0]))
    tokens = torch.randint(0, 199, (2, 90))
    model.setup_cache(2, 96)
    full = model(tokens, torch.zeros(2, dtype=torch.int64))
    model.setup_cache(2, 96)
    chunks = [model(tokens[:, a:b], torch.full((2,), a)) for a, b in ((0, 33), (33, 34), (34, 90))]
    assert (torch.cat(chunks, 1) - full).abs().max() < 1e-4
    start = torch.tensor([40, 70])  # row 0 goes back to 40, row 1 to 70
    again = model(torch.stack([tokens[0, 40:45], tokens[1, 70:75]]), start)
    assert (again - torch.stack([full[0, 40:45], full[1, 70:75]])).abs().max() < 1e-4
    last = model(tokens[:, :50], torch.zeros(2, dtype=torch.int64), torch.tensor([7, 49]))
    assert (last[:, 0] - torch.stack([full[0, 7], full[1, 49]])).abs().max() < 1e-4


def test_a_model_without_a_cache_says_so():
    with pytest.raises(ValueError, match="setup_cache"):
        Transformer(CONFIGS["tiny"])(torch.tensor([[1]]), torch.tensor([0]))


@torch.inference_mode()
def test_int8_cache(tmp_path):
    """Each stored key is within half a step of the true one, and the logits stay close."""
    model = load_model(open_checkpoint(save_tiny(tmp_path)[0]))
    tokens = torch.randint(0, 199, (1, 70))
    model.setup_cache(1, 128)
    full = model(tokens, ZERO)
    exact = model.layers[0].attention.kv_cache.k[:, :, :70].clone()
    model.setup_cache(1, 128, "int8")
    close = model(tokens, ZERO)
    cache = model.layers[0].attention.kv_cache
    assert isinstance(cache, Int8KVCache) and cache.k.dtype == torch.int8
    stored = cache.k[:, :, :70].float() * cache.k_scale[:, :, :70]
    assert ((stored - exact).abs() <= cache.k_scale[:, :, :70] * 0.501).all()
    assert 0 < (close - full).abs().max() < 0.1 * full.abs().max()


def test_rope_scaling_by_hand():
    """Long waves are stretched by the factor, short ones kept."""
    config = CONFIGS["llama-3.1-8b"]
    plain = rope_frequencies(ModelConfig(**{**config.to_dict(), "rope_scaling": None}))
    scaled = rope_frequencies(config)
    assert scaled[0] == plain[0] == 1.0
    assert torch.allclose(scaled[-1], plain[-1] / 8)
    assert torch.allclose(plain, 500000.0 ** (-torch.arange(0, 128, 2) / 128))


def test_config_survives_json():
    config = CONFIGS["llama-3.2-1b"]
    assert ModelConfig.from_dict({**config.to_dict(), "rope_scaling": [32.0, 1.0, 4.0, 8192]}) == (
        config
    )
