"""Tiny random models, made by transformers, for the tests: no downloads, milliseconds a step."""

from pathlib import Path

import torch
import transformers

TINY = dict(
    vocab_size=199, hidden_size=72, intermediate_size=136, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=1024,
    rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip


def reference_model(
    seed: int = 0, family: str = "Llama", **changes
) -> transformers.PreTrainedModel:
    """A random model of transformers, fp32; `family` as in the names of its classes."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():  # norms and biases away from 1 and 0
        if p.dim() == 1:
            torch.nn.init.normal_(p, float("norm" in name), 0.2)
    return model


def save_tiny(directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """Save such a model as a Hugging Face directory; returns (directory, reference model)."""
    reference = reference_model(seed, **changes)
    reference.to(dtype).save_pretrained(directory)
    return directory, reference
