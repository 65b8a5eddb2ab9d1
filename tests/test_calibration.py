"""Calibration: which tokens, and whether the stream carries exactly what the model computes."""

from dataclasses import replace

import pytest
import torch

from calibration import LAYERS, CalibrationStream, InputStatistics, calibration_tokens
from config import CONFIGS
from model import Transformer
from tokenizer import load_tokenizer


class Letters:
    """A tokenizer: one token per character."""

    def encode(self, text, **_):
        return [ord(c) % 512 for c in text]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Transformer(replace(CONFIGS["tiny"], qk_norm=True))
    for p in model.parameters():
        p.copy_(torch.randn_like(p) * 0.1 + (p.dim() == 1))
    return model


def linear_inputs(model, tokens):
    """Inputs of every block's linear layer in one ordinary forward pass."""
    seen, hooks = {}, []
    for i, block in enumerate(model.layers):
        for name in LAYERS:
            keep = lambda _, args, key=(i, name): seen.__setitem__(key, args[0])  # noqa: E731
            hooks.append(block.get_submodule(name).register_forward_pre_hook(keep))
    model.setup_cache(*tokens.shape)
    model(tokens, torch.zeros(len(tokens), dtype=torch.int64))
    for hook in hooks:
        hook.remove()
    return seen


def test_statistics_by_definition():
    x = torch.randn(3, 50, 8)
    stats = InputStatistics.empty(8)
    for piece in (x[0, :0], x[0], x[:, :0]):
        stats.add(piece)
    stats.add(x[1:])  # [..., K], in unequal pieces
    flat = x.flatten(0, 1)
    assert stats.tokens == 150
    torch.testing.assert_close(stats.hessian, flat.t() @ flat / 150)
    torch.testing.assert_close(stats.mean_abs, flat.abs().mean(0))
    torch.testing.assert_close(stats.max_abs, flat.abs().amax(0))


def test_the_stream_sees_what_the_model_computes(model):
    tokens = torch.randint(512, (5, 12))
    expected = linear_inputs(model, tokens)
    stream = CalibrationStream(tokens, model.tok_embeddings.weight, model.config, batch=2)
    for i, block in enumerate(model.layers):
        for name in LAYERS:
            stats = stream.statistics(block, name)
            flat = expected[i, name].flatten(0, 1)
            torch.testing.assert_close(stats.hessian, flat.t() @ flat / 60, rtol=1e-4, atol=1e-5)
            assert stats.tokens == 60
        stream.advance(block)


def test_a_layer_sees_the_error_of_those_before_it(model):
    tokens = torch.randint(512, (2, 12))
    stream = CalibrationStream(tokens, model.tok_embeddings.weight, model.config)
    block = model.layers[0]
    stream.statistics(block, "attention.wqkv")
    weight = block.attention.wqkv.weight
    kept = weight.clone()
    weight.mul_(0.5)  # stands for quantization
    try:
        stats = stream.statistics(block, "attention.wo")
        flat = linear_inputs(model, tokens)[0, "attention.wo"].flatten(0, 1)
        torch.testing.assert_close(stats.hessian, flat.t() @ flat / 24, rtol=1e-4, atol=1e-5)
    finally:
        weight.copy_(kept)


def test_the_order_of_the_stream_is_enforced(model):
    tokens = torch.randint(512, (2, 8))
    stream = CalibrationStream(tokens, model.tok_embeddings.weight, model.config)
    with pytest.raises(ValueError, match=r"attention\.wqkv is next"):
        stream.statistics(model.layers[0], "attention.wo")
    with pytest.raises(ValueError, match="advance before"):
        stream.advance(model.layers[0])


def test_windows_of_a_text_are_disjoint_and_repeatable(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(33 + i) for i in range(100)))
    tokens = calibration_tokens(Letters(), str(path), 7, 12, seed=1)
    assert tokens.shape == (7, 12) and tokens.dtype == torch.int64
    assert tokens.unique().numel() == 7 * 12
    assert (tokens.diff() == 1).all()
    assert torch.equal(tokens, calibration_tokens(Letters(), str(path), 7, 12, seed=1))
    assert not torch.equal(tokens, calibration_tokens(Letters(), str(path), 7, 12, seed=2))


def test_a_short_text_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("x" * 100)
    with pytest.raises(ValueError, match=r"short\.txt has 100 tokens, too few for 4 samples of 30"):
        calibration_tokens(Letters(), str(path), 4, 30)


def test_the_bundled_text_is_long_enough_for_the_defaults(default_model):
    tokenizer = load_tokenizer(default_model)
    assert calibration_tokens(tokenizer, "bundled", 24, 1024).shape == (24, 1024)
