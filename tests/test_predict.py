"""predict.py: bytes agree with models that are really made, the long-context bound, predictions."""

import pytest
import torch

from checkpoint import build_model
from checkpoint_quantizer import linear_names
from config import CONFIGS
from engine import Engine
from errors import UserError
from measure import step_bytes
from measure import weight_bytes as measured_bytes
from modes import head_mode, parse_mode
from predict import (
    DEVICES,
    cache_bytes,
    communication,
    gathers,
    memory_bytes,
    predict,
    prediction_table,
    weight_bytes,
)
from random_weights import random_model
from sampling import Sampling

LLAMA = CONFIGS["llama-3.1-8b"]


def test_llama_at_full_context_fits_in_14_8_gb():
    """int4 g64 weights, int8 cache, 131072 tokens; the published peak is 18.9 GB."""
    parts = memory_bytes(LLAMA, "int4", 64, 131072, "int8")
    assert parts["cache"] == 32 * 2 * 8 * 131072 * (128 + 2)
    assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
    assert 13e9 < parts["total"] <= 14.8e9


def test_weight_bytes_are_those_of_a_model():
    config = CONFIGS["tiny"]
    model = random_model(config, None, "cpu", torch.bfloat16)
    engine = Engine(model, Sampling(0), length=64)
    total, read = weight_bytes(config, "bf16")
    assert total == measured_bytes(model) and read == step_bytes(engine, 0)
    assert cache_bytes(config, 64) == step_bytes(engine, 64) - read


@pytest.mark.parametrize("name", ["int8", "int4", "uint5", "fp6", "int4-sparse24", "w4a8"])
def test_weight_bytes_are_those_of_a_checkpoint(name):
    config, mode = CONFIGS["smollm2-135m"], parse_mode(name)
    modes = {**dict.fromkeys(linear_names(config), mode), "output": head_mode(mode, None)}
    model = build_model(config, {n: m.settings for n, m in modes.items()}, torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert weight_bytes(config, name)[0] == sum(t.numel() * t.element_size() for t in tensors)


def test_a_tied_head_that_gathers_its_logits_is_read():
    """tp.py wraps the head; the table that it shares with the embedding is read all the same."""
    model = random_model(CONFIGS["smollm2-135m"], None, "cpu", torch.bfloat16)
    engine = Engine(model, Sampling(0), length=64)
    read, wrapper = step_bytes(engine, 0), torch.nn.Module()
    wrapper.linear, model.output = model.output, wrapper
    assert step_bytes(engine, 0) == read > 2 * 134e6


def test_quantized_bytes_by_hand():
    layers = 32 * (4096 * 6144 + 4096 * 4096 + 4096 * 28672 + 14336 * 4096)
    head, norms = 128256 * 4096, (2 * 32 + 1) * 4096 * 2
    total, read = weight_bytes(LLAMA, "int4", 64)
    assert read == layers * 4.5 / 8 + head + 128256 * 2 + norms
    assert total == read + 2 * head


def test_formats_that_quantize_activations_gather():
    """The input of wo, of 4096, and of w2, of 14336, and two outputs of 4096, each of 32 layers."""
    gathered = 32 * (4096 + 14336 + 2 * 4096)
    assert communication(LLAMA, 2, gathers("w4a8")) == (130, 4096 * 2 + 128256 + gathered)
    assert gathers("int8dq") and not gathers("int4") and not gathers("bf16")
    read = weight_bytes(LLAMA, "w4a8", 128)[1]
    step = read / 2 / (3.35e12 * 0.7) + 130 * 10e-6 + communication(LLAMA, 2, True)[1] / 450e9
    assert predict(LLAMA, "w4a8", DEVICES["H100"], 2, 128) == pytest.approx(1 / step)


def test_predictions_are_consistent():
    """More devices are faster, but never by more than their number; 405B in bf16 fits nowhere."""
    for name in ("llama-3.1-8b", "llama-3-70b"):
        speeds = [predict(CONFIGS[name], "int4", DEVICES["H200"], n) for n in (1, 2, 4, 8)]
        assert speeds == sorted(speeds) and speeds[3] < 8 * speeds[0]
    assert predict(CONFIGS["llama-3.1-405b"], "bf16", DEVICES["H100"], 8) is None
    assert communication(LLAMA, 2) == (66, 65 * 4096 * 2 + 128256)
    rows = prediction_table("int4").splitlines()
    assert len(rows) == 5 and len({row.count("|") for row in rows}) == 1
    with pytest.raises(UserError, match="name one format"):
        weight_bytes(LLAMA, "autoquant")
    assert parse_mode("int4").groupsize == 64
