"""The model as one operator against its modules: every format, caches, shapes, levels."""

import copy
import dataclasses

import pytest
import torch

from config import CONFIGS
from engine import Engine, greedy_step
from graphs import compiled_graphs
from kernels.decode import cpp_forward
from kernels.formats import FORMATS
from model import Transformer
from quantize import quantize_
from sampling import Sampling

ODD = dataclasses.replace(  # no size a multiple of 16, heads in groups of three
    CONFIGS["tiny"], dim=100, n_heads=6, n_kv_heads=2, ffn_dim=173, head_dim=10, max_positions=600,
    attention_bias=True, ffn_bias=True, qk_norm=True,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("library")


def make_model(config, mode: str | None, dtype: torch.dtype) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, float(p.dim() == 1), 0.2 if p.dim() == 1 else p.shape[-1] ** -0.5)
    model = model.to(dtype).eval()
    if mode:
        quantize_(model, mode, skip=lambda name: name == "output")
    return model


def steps(model: Transformer, kind, batch, tokens, filled, fused: bool) -> torch.Tensor:
    """Logits of a prompt of `filled` tokens, then two steps of `tokens` each: [2, B, tokens, V]."""
    generator = torch.Generator().manual_seed(2)
    model.setup_cache(batch, filled + 2 * tokens + 20, kind)
    if fused:
        model.fuse()
    assert (model.cpp_plan is not None) == fused
    ids = torch.randint(0, 500, (batch, filled + 2 * tokens), generator=generator)
    uneven = torch.arange(batch) * 7 % 11  # sequences of different lengths
    with torch.inference_mode():
        if filled:
            model(ids[:, :filled], torch.zeros(batch, dtype=torch.int64))
        out = [
            model(ids[:, filled + i * tokens : filled + (i + 1) * tokens],
                  torch.full((batch,), filled + i * tokens) - uneven * (filled > 11))
            for i in range(2)
        ]  # fmt: skip
    return torch.stack(out)


def compare(model: Transformer, tolerance: float, kind="bf16", batch=1, tokens=1, filled=30):
    want = steps(model, kind, batch, tokens, filled, fused=False)
    got = steps(model, kind, batch, tokens, filled, fused=True)
    error = (got - want).float().abs().max() / want.float().abs().max()
    assert error <= tolerance, error


@pytest.mark.parametrize("mode", [None, *FORMATS])
def test_every_format(mode):
    compare(make_model(CONFIGS["tiny"], mode, torch.float32), 2e-5 if mode is None else 2e-3)


@pytest.mark.parametrize("mode", [None, "int8", "int4", "int8dq", "uint3"])
def test_levels_and_odd_shapes(mode, level):
    model = make_model(ODD, mode, torch.float32)
    for tokens in (1, 50):
        compare(model, 2e-5 if mode is None else 5e-3, tokens=tokens)


@pytest.mark.parametrize("mode", [None, "int8"])
def test_bf16_instructions(mode, bf16_level):
    model = make_model(ODD, mode, torch.bfloat16)
    for tokens in (1, 50):
        compare(model, 0.03, tokens=tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_half_precision(mode, dtype):
    compare(make_model(ODD, mode, dtype), 0.03)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("batch,tokens,filled", [(1, 1, 0), (1, 5, 400), (3, 1, 300), (4, 4, 30)])
def test_rows_and_caches(kind, batch, tokens, filled):
    model = make_model(ODD, None, torch.float32)
    # A rounding of a key to the other neighbour in int8 moves the logits by about 1e-3.
    compare(model, 5e-3 if kind == "int8" else 2e-5, kind, batch, tokens, filled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [None, *FORMATS])
def test_many_rows(mode, dtype):
    """Rows in groups, whose sizes and way to the weight depend on format and number of rows."""
    tolerance = 0.03 if dtype == torch.bfloat16 else 2e-5
    if mode == "float8dq-row" and dtype == torch.bfloat16:
        tolerance = 0.08  # e4m3 has three bits: an input that falls to the other neighbour shows
    for config, batch, tokens in ((ODD, 19, 1), (CONFIGS["tiny"], 1, 36), (ODD, 3, 42)):
        model = make_model(config, mode, dtype)
        compare(model, tolerance, batch=batch, tokens=tokens, filled=12)
    if mode == "float8dq-tensor":  # whose rows share a scale
        assert model.cpp_rows == 16


@pytest.mark.parametrize("threads", [1, 3, 40])
@pytest.mark.parametrize("mode", [None, "int8", "uint3"])
def test_many_rows_on_threads(mode, threads):
    model = make_model(ODD, mode, torch.bfloat16)
    tokens, start = torch.randint(0, ODD.vocab_size, (2, 40)), torch.zeros(2).long()
    last = torch.tensor([39, 3])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(model, 0.03, tokens=100, filled=1)
        model.setup_cache(2, 40)
        model.fuse()
        with torch.inference_mode():
            logits, ids = model(tokens, start), greedy_step(model, tokens, start)
            some = model(tokens, start, last)[:, 0]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ids, (logits == logits.amax(-1, keepdim=True)).int().argmax(-1))
    difference = (some - logits[torch.arange(2), last]).float().abs().max()
    assert difference <= 0.03 * logits.abs().max()  # few rows of int8 are rounded, many are not


@pytest.mark.parametrize("threads", [1, 3, 5])
@pytest.mark.parametrize("batch,tokens,filled", [(1, 1, 20), (1, 3, 400), (2, 1, 500)])
def test_numbers_of_threads(threads, batch, tokens, filled):
    """Rows, heads and stretches of the cache shared out evenly and not."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(make_model(ODD, None, torch.float32), 2e-5, "bf16", batch, tokens, filled)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_the_first_of_the_largest(dtype, threads):
    """However the vocabulary is shared out, to more threads than it has units too."""
    model = make_model(ODD, None, dtype)
    tokens = torch.randint(0, ODD.vocab_size, (2, 3))
    start = torch.zeros(2, dtype=torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for equal in (1, 2, ODD.vocab_size):  # so many rows of the head are the same
            weight = model.output.weight.data
            weight[:] = weight[: ODD.vocab_size // equal].repeat(equal, 1)[: ODD.vocab_size]
            model.setup_cache(2, 16)
            model.fuse()
            with torch.inference_mode():
                logits, ids = model(tokens, start), greedy_step(model, tokens, start)
            assert torch.equal(ids, (logits == logits.amax(-1, keepdim=True)).int().argmax(-1))
            assert ids.max() < ODD.vocab_size // equal
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("algorithm", ["int4-awq", "int8dq-smooth"])
def test_input_scales(algorithm):
    model = make_model(CONFIGS["tiny"], None, torch.float32)
    model.setup_cache(2, 64)
    tokens = torch.randint(0, 500, (2, 64))
    quantize_(model, algorithm, inputs=[(tokens, torch.zeros(2, dtype=torch.int64))],
              skip=lambda name: name == "output")  # fmt: skip
    assert model.layers[0].attention.wqkv.input_scale is not None
    compare(model, 5e-3)


def test_a_layer_without_tiles_stays_plain():
    model = make_model(CONFIGS["tiny"], "int8", torch.float32)
    attention = model.layers[1].attention
    attention.wo = torch.nn.Linear(attention.wo.in_features, attention.wo.out_features, bias=False)
    model.setup_cache(1, 16)
    model.fuse()
    assert model.cpp_plan is None


def test_compiled_step_writes_the_cache():
    """The operator inside of a graph of torch.compile's, and the engine that does without."""
    model = make_model(CONFIGS["tiny"], "int8", torch.float32)
    prompt, graphs = [[3, 1, 4, 1, 5]], compiled_graphs()
    engine = Engine(model, Sampling(0.0, 0), length=64, compile_mode="default")
    want = engine.generate(prompt, 40).token_ids
    assert model.cpp_plan is not None and compiled_graphs() == graphs
    engine.decode_step, engine.cached = torch.compile(engine._decode_step, fullgraph=True), []
    assert engine.generate(prompt, 40).token_ids == want
    assert compiled_graphs() > graphs


def test_a_plan_outlives_the_memory_of_its_layers():
    """A layer whose storage is swapped afterwards goes unnoticed; nothing freed is read."""
    model = make_model(CONFIGS["tiny"], None, torch.float32)
    model.setup_cache(1, 16)
    model.fuse()
    token, start = torch.tensor([[3]]), torch.tensor([0])
    want = model(token, start)
    for layer in model.layers:
        layer.feed_forward.w2.weight.data = torch.full_like(layer.feed_forward.w2.weight, torch.nan)
    assert torch.equal(model(token, start), want)


def test_a_copy_is_not_fused():
    model = make_model(CONFIGS["tiny"], "int8", torch.float32)
    model.setup_cache(1, 16)
    model.fuse()
    other = copy.deepcopy(model)
    assert model.cpp_plan is not None and other.cpp_plan is None
    token, start = torch.tensor([[3]]), torch.tensor([0])
    want = model(token, start)
    other.norm.weight.data *= 2
    assert torch.equal(model(token, start), want) and not torch.equal(other(token, start), want)


def test_rows_last():
    model = make_model(ODD, "int8", torch.float32)
    tokens, start = torch.randint(0, 500, (3, 4)), torch.zeros(3).long()
    last = torch.tensor([3, 0, 2])
    model.setup_cache(3, 16)
    want = model(tokens, start)[torch.arange(3), last]
    model.fuse()
    torch.testing.assert_close(model(tokens, start, last)[:, 0], want, rtol=1e-3, atol=1e-3)


def test_refusals():
    model = make_model(CONFIGS["tiny"], None, torch.float32)
    model.setup_cache(1, 16)
    model.fuse()
    zero, one = torch.zeros(1).long(), torch.ones(1, 1).long()
    with pytest.raises(IndexError, match="do not fit a cache"):
        model(one, zero + 16)
    with pytest.raises(IndexError, match="outside the vocabulary"):
        model(one + 511, zero)
    with pytest.raises(IndexError, match="row 1 of 1"):
        model(one, zero, zero + 1)
    table = model.tok_embeddings.weight
    most = model.cpp_rows
    with pytest.raises(ValueError, match=f"1 to {most} tokens"):
        cpp_forward(model.cpp_plan, one.expand(1, most + 1), table, zero)
    with pytest.raises(ValueError, match="is gone"):
        cpp_forward(torch.tensor([12345, 16]), one, table, zero)
    copy = model.cpp_plan.clone()
    model.cpp_plan = None
    with pytest.raises(ValueError, match="is gone"):
        cpp_forward(copy, one, table, zero)
    model.layers[1].feed_forward.w2 = model.layers[1].attention.wo
    with pytest.raises(ValueError, match="but its place is"):
        model.fuse()
