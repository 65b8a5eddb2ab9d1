"""The Triton kernels under Triton's interpreter, on the CPU; test_cuda.py runs this file.

The interpreter is chosen before Triton is imported, hence a process of its own. It cuts bf16
results off where a GPU rounds, so bf16 has twice the tolerance.
"""

import copy
import gc
import weakref

import pytest
import torch

from calibration import CalibrationStream
from config import ModelConfig
from engine import Engine
from kernels import choice
from kernels.attention import attention, attention_reference, split_counters
from kernels.formats import FORMATS
from kernels.linear import Linear, QuantizedLinear
from model import KV_CACHES, RMSNorm, Transformer, rotate
from sampling import Sampling
from tests.test_formats import Codebook3, Uint8, quantized, random_weight, unlisted

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Columns: part of a chunk of 256; two chunks, so two splits. Rows of the weight: ragged.
SHAPES = [(100, 35), (300, 18)]  # K, N
MAIN = ("int8", "int8dq", "int4", "int8dq-int4", "float8dq-tensor", "float8dq-row", "fp6", "uint3",
        "uint7", "codebook4", "int4-sparse24", "w4a8")  # fmt: skip
REST = tuple(name for name in FORMATS if name not in MAIN)
TOLERANCE = {FP32: 2e-5, FP16: 1.5e-3, BF16: 1e-2}


@pytest.fixture(scope="module", autouse=True)
def triton():
    assert choice.interpreting()
    choice.choose("triton")
    choice.load_triton()


def replace_linears(model, name):
    """Every linear layer of a model in a format, packed for the kernels."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Linear):
            module, *_ = quantized(name, layer.weight.float(), layer.bias, layer.weight.dtype)
            module.repack()
            model.set_submodule(path, module)


def check(name, k, n, rows, dtype, **settings):
    """The module's product against fp64, from the canonical weight."""
    bias = torch.randn(n).to(dtype)
    module, *_ = quantized(name, random_weight(n, k), bias, dtype, **settings)
    weight = module.dequantize().double()
    module.repack()
    assert module.packed is not None and module.weight is None
    x = torch.randn(rows, k).to(dtype) * 2
    want = module.rounded_input(x) @ weight.t() + bias.double()
    y = module(x)
    assert not module.packed.arrived.any()  # or the next call would join too early
    assert y.dtype == dtype and y.shape == (rows, n)
    tolerance = TOLERANCE[dtype]
    if rows > 16 and name.startswith("int8dq-"):  # bf16 operands: scaled weights are rounded
        tolerance = TOLERANCE[BF16]
    error = (y.double() - want).norm() / want.norm()
    assert error < tolerance, (name, k, n, rows, dtype, settings, error.item())


@pytest.mark.parametrize("name", MAIN)
def test_one_row(name):
    for (k, n), dtype in zip(SHAPES, (FP32, BF16), strict=True):
        check(name, k, n, 1, dtype)
    check(name, 33, 5, 1, FP16)


@pytest.mark.parametrize("name", MAIN)
def test_more_rows(name):
    for rows, dtype in ((2, FP16), (7, BF16), (17, FP32)):
        k, n = SHAPES[rows % 2]
        check(name, k, n, rows, dtype)


@pytest.mark.parametrize("rows", [16, 100, 513])
def test_rows_of_every_block(rows):
    for name in ("int8", "int4", "int8dq", "int8dq-int4", "int4-sparse24", "w4a8"):
        check(name, 100, 10, rows, BF16 if rows == 16 else FP32)


@pytest.mark.parametrize("name", REST)
def test_other_formats(name):
    check(name, 100, 18, 1, FP32)
    check(name, 100, 18, 3, FP16)


@pytest.mark.parametrize("name", ["int8dq", "int8dq-int4", "float8dq-row", "w4a8"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_inputs_are_quantized_as_torch_does_it(name, dtype):
    module, *_ = quantized(name, random_weight(5, 203), None, dtype)
    x = torch.randn(6, 3, 203).to(dtype) * torch.tensor([1e-6, 1.0, 300.0])[:, None].to(dtype)
    x[0, 0] = 0
    want, want_scale = module.quantize_input(x)
    q, scale = module.triton_input(x)
    assert torch.equal(q.float(), want.float()) and torch.equal(scale, want_scale)
    assert q.dtype == (torch.int8 if name in ("int8dq", "w4a8") else BF16)
    for rows, few in ((16, True), (17, False)):  # see activations.py
        _, scale = module.triton_input(x.flatten(0, 1)[:rows])
        assert (scale is None) == (few and name != "w4a8")


def test_many_rows_of_float8_go_to_the_float8_units(monkeypatch):
    """Where there are any: their product is another's."""
    module, *_ = quantized("float8dq-row", random_weight(32, 128), torch.randn(32).bfloat16(), BF16)
    module.repack()
    monkeypatch.setattr(module, "has_scaled_mm", lambda: True)
    monkeypatch.setattr(module, "scaled_mm", lambda q, scale, dtype: (q, scale, dtype))
    assert module(torch.randn(16, 128).bfloat16()).shape == (16, 32)
    x = torch.randn(17, 128).bfloat16()
    q, scale, dtype = module(x)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (17, 1) and dtype == BF16
    assert ((q.float() * scale - x).norm() / x.norm()) < 0.05


@pytest.mark.parametrize("cls", [Codebook3, Uint8])
def test_formats_not_in_the_registry(cls):
    for rows, dtype in ((1, FP32), (3, BF16), (17, FP16)):
        module = unlisted(cls, 18, 300, dtype)
        weight, x = module.dequantize().double(), torch.randn(rows, 300).to(dtype)
        want = x.double() @ weight.t() + module.bias.double()
        module.repack()
        assert module.packed is not None
        assert (module(x).double() - want).norm() / want.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("name", "groupsize"),
    [("int4", 8), ("int4", 72), ("int4", 32), ("int4", 128), ("int4", 256), ("int8dq-int4", 256),
     ("int4-sparse24", 32), ("int4-sparse24", 0), ("w4a8", 0), ("w4a8", 32), ("uint3", 256),
     ("uint7", 128), ("codebook4", 32)],
)  # fmt: skip
def test_group_sizes(name, groupsize):
    k = 576 if groupsize > 64 else 203  # 576: SmolLM2's width, 4.5 groups of 128
    check(name, k, 6, 1, FP32, groupsize=groupsize)
    check(name, k, 6, 5, FP32, groupsize=groupsize)


@pytest.mark.parametrize("name", ["int4", "int8dq", "int8dq-int4", "float8dq-tensor", "w4a8",
                                  "int4-sparse24", "fpx-5-2"])  # fmt: skip
def test_products_that_time_cuda_times(name):
    """x made ready before: the module's result, to the bit."""
    from scripts.time_cuda import products

    for dtype in (BF16, FP16):
        module, *_ = quantized(name, random_weight(18, 100), None, dtype)
        module.repack()
        x = torch.randn(3, 100).to(dtype)
        assert torch.equal(products([module, module], x)[1](), module(x))


@pytest.mark.parametrize("rows", [1, 16])
def test_other_block_sizes(rows, monkeypatch):
    """scripts/tune_cuda.py's candidates: they reach the launch, and give the same results."""
    from kernels.cuda.launch import Launch
    from scripts.tune_cuda import blocks_of, candidates

    launched, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self), run(self))[1])
    assert (64, 2, 4) in candidates()
    for candidate in ((32, 1, 3), (128, 4, 5)):
        with blocks_of(candidate):
            for name in ("int4", "int8"):
                check(name, 300, 70, rows, BF16)
                sizes = launched[-1].constants["BLOCK_N"], launched[-1].options["num_warps"]
                assert sizes == candidate[:2]
                assert launched[-1].constants["STAGES"] == candidate[2]
    check("int4", 300, 70, rows, BF16)
    assert launched[-1].constants["BLOCK_N"] == 64


def test_float_weights():
    for dtype in (FP32, BF16, FP16):
        for rows, (k, n) in ((1, (576, 35)), (2, (33, 5)), (16, (100, 70)), (1, (1, 1))):
            linear = Linear(k, n, bias=rows == 2).to(dtype).requires_grad_(False)
            x = torch.randn(rows, k).to(dtype)
            want = x.double() @ linear.weight.double().t()
            want = want if linear.bias is None else want + linear.bias.double()
            error = (linear(x).double() - want).norm() / want.norm()
            assert error < TOLERANCE[dtype]


def test_large_values_of_fp16():
    """Codes of 5 exponent bits go past fp16's range."""
    w = torch.tensor([[114688.0, 1.0, -2.0, 0.5]]).repeat(3, 16)
    module, *_ = quantized("fpx-5-2", w, None, FP16)
    weight = module.dequantize().double()
    module.repack()
    x = torch.randn(2, 64).half() / 256
    want = x.double() @ weight.t()
    assert (module(x).double() - want).norm() < 2e-3 * want.norm()


def test_same_bits_again_and_leading_dimensions():
    module, *_ = quantized("int4", random_weight(18, 600), None, BF16)
    module.repack()
    x = torch.randn(2, 3, 600).to(BF16)
    y = module(x)
    assert y.shape == (2, 3, 18) and torch.equal(y, module(x))
    assert module(x[:, :0]).shape == (2, 0, 18)


def test_input_scale():
    module, *_ = quantized("int4", random_weight(8, 64), None, FP32)
    module.input_scale = torch.rand(64).bfloat16()
    want, x = module.dequantize().double(), torch.randn(3, 64)
    module.repack()
    assert (module(x).double() - x.double() @ want.t()).abs().max() < 1e-4


def test_one_graph():
    """torch.compile sees one graph, and the fakes give true shapes and types."""
    for name in ("int4", "int8dq", "int4-sparse24", "float8dq-row"):
        module, *_ = quantized(name, random_weight(8, 64), None, BF16)
        module.repack()
        x = torch.randn(2, 64).to(BF16)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.inference_mode():
            assert torch.equal(compiled(x), module(x))


def test_what_a_package_calls_takes_no_dtype():
    """torch 2.11 hands the number that export has for a dtype to the operator as another one."""
    for name in ("triton_linear", "triton_attention", "triton_quantize"):
        assert "ScalarType" not in str(getattr(torch.ops.flatllama, name).default._schema)


@pytest.mark.parametrize("cache", ["bf16", "int8"])
def test_a_whole_step_is_one_graph(cache):
    """Unquantized layers and attention reach the kernels without repacking anything first."""
    torch.manual_seed(0)
    config = ModelConfig(dim=48, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=50,
                         head_dim=12, max_positions=64)  # fmt: skip
    model = Transformer(config).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.2)
    engine = Engine(model, Sampling(top_k=5), length=16, kv_cache=cache)
    calls = []

    def backend(graph, _):
        calls.extend(n.args for n in graph.graph.nodes if "triton_decode" in str(n.target))
        return graph

    step = torch.compile(engine._decode_step, fullgraph=True, backend=backend)
    token, start, u = torch.tensor([[7]]), torch.tensor([3]), torch.rand(1)
    with torch.inference_mode():
        assert torch.equal(step(token, start, u), engine._decode_step(token, start, u))
    # what torch keeps compiled code under tells this model from another of the same number
    assert [args[1:3] for args in calls] == [(50, torch.float32)]


def random_model(dtype, n_layers=1, **settings):
    """Layers whose sizes fit no block; biases everywhere."""
    torch.manual_seed(0)
    config = ModelConfig(
        dim=72, n_layers=n_layers, n_heads=6, n_kv_heads=2, ffn_dim=100, vocab_size=150,
        head_dim=12, max_positions=64, attention_bias=True, output_bias=True, ffn_bias=True,
        qk_norm=dtype != FP16, **settings,
    )  # fmt: skip
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, centre, 0.3)
    return model.to(dtype).requires_grad_(False)


def steps(model, cache, fused):
    """Logits of 2 x 4 tokens and of 2 behind noise, then what the first layer's cache holds."""
    first = model.setup_cache(2, 24, cache)
    torch.manual_seed(2)
    for layer in model.layers:
        for buffer in layer.attention.kv_cache.buffers():
            if buffer.dtype == torch.int8:
                buffer.random_(-127, 128)
            elif buffer.is_floating_point():
                buffer.uniform_(0, 0.02)
    if fused:
        model.fuse()
        assert model.triton_step is not None
    torch.manual_seed(1)
    results = []
    for t, start, last in ((4, (9, 7), (3, 1)), (1, (13, 9), None)):
        tokens = torch.randint(0, 150, (2, t))
        last = None if last is None else torch.tensor(last)
        results.append(model(tokens, torch.tensor(start), last).double())
    return [*results, first.k[0, :, :14].double(), first.v[1, :, :10].double()]


@pytest.mark.parametrize(
    ("name", "cache"),
    [("float", "bf16"), ("int8", "int8"), ("int4", "bf16"), ("fp6", "int8"), ("codebook4", "bf16"),
     ("int8dq", "bf16"), ("int8dq-int4", "int8"), ("float8dq-row", "bf16"),
     ("float8dq-tensor", "bf16"), ("int4-sparse24", "bf16"), ("w4a8", "bf16")],
)  # fmt: skip
def test_whole_step(name, cache):
    """A step as one operator against the modules one by one."""
    model = random_model(FP32, 2 if name == "float" else 1, tied_head=name == "float")
    if name != "float":
        replace_linears(model, name)
    for y, want in zip(steps(model, cache, True), steps(model, cache, False), strict=True):
        assert y.shape == want.shape and (y - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize(("name", "cache"), [("float", "bf16"), ("int4", "int8")])
def test_whole_step_bf16(name, cache):
    """Against the same weights in fp32. The interpreter cuts off where the modules round."""
    model, exact = random_model(BF16), random_model(BF16).float()
    if name != "float":
        replace_linears(model, name)
        replace_linears(exact, name)
    truth = steps(exact, cache, False)
    fused, modules = steps(model, cache, True), steps(model, cache, False)
    for y, other, want in zip(fused, modules, truth, strict=True):
        assert (y - want).norm() < 2 * (other - want).norm() + 1e-3 * want.norm()


@pytest.mark.parametrize("name", ["int4", "float8dq-row"])
def test_how_a_gpu_is_judged(name, monkeypatch):
    """By scripts/check_cuda.py: what is right here passes there, and a wrong weight does not."""
    from scripts import check_cuda

    config = ModelConfig(64, 2, 4, 2, 96, 90, 16, max_positions=512)
    monkeypatch.setattr(check_cuda, "STEP_CONFIG", config)
    monkeypatch.setattr(check_cuda, "DEVICE", "cpu")
    fuse, step = Transformer.fuse, lambda: check_cuda.step_error(name, "int8", 2, 3)[0]

    def wrong(model):
        model.layers[1].ffn_norm.weight *= 3
        fuse(model)

    with torch.inference_mode():
        assert check_cuda.judged("step", 2, step)["ok"]
        monkeypatch.setattr(Transformer, "fuse", wrong)
        assert not check_cuda.judged("step", 2, step)["ok"]
        monkeypatch.setattr(Transformer, "fuse", lambda model: 1 // 0)
        found = check_cuda.judged("step", 2, step)
        assert not found["ok"] and "ZeroDivisionError" in found["what"]


@pytest.mark.parametrize("name", ["int4", "int8dq", "int4-sparse24"])
def test_whole_step_with_input_scales(name):
    """What AWQ and SmoothQuant leave in a layer."""
    model = random_model(FP32)
    replace_linears(model, name)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.input_scale = (torch.rand(layer.in_features) + 0.5).bfloat16()
    for y, want in zip(steps(model, "bf16", True), steps(model, "bf16", False), strict=True):
        assert (y - want).norm() < 1e-5 * want.norm()


def test_whole_step_fp16_holds_a_large_residual():
    """x times the norm's weight passes fp16's largest number here; the norm of x does not."""
    model = random_model(FP16)
    model.tok_embeddings.weight *= 5000
    for block in model.layers:
        block.attention_norm.weight *= 20
    for y, want in zip(steps(model, "bf16", True), steps(model, "bf16", False), strict=True):
        assert (y - want).norm() < 1e-2 * want.norm()


def test_positions_in_any_layout():
    model = random_model(FP32)
    model.setup_cache(2, 24)
    model.fuse()
    tokens, apart = torch.tensor([[3], [5]]), torch.tensor([[7, 0], [9, 0]])[:, 0]
    assert torch.equal(model(tokens, apart), model(tokens, apart.contiguous()))
    same = torch.tensor([6]).expand(2)
    assert torch.equal(model(tokens, same), model(tokens, same.contiguous()))


def test_a_new_cache_lets_the_old_one_go():
    model = random_model(FP32)
    old = weakref.ref(model.setup_cache(1, 8).k)
    model.fuse()
    copy.deepcopy(model)
    model.setup_cache(1, 8)
    gc.collect()
    assert old() is None and model.triton_step is None


def test_no_step_where_fp16_cannot_hold_the_codes():
    model = random_model(FP16)
    replace_linears(model, "fpx-5-2")
    model.setup_cache(1, 8)
    model.fuse()
    assert model.triton_step is None
    assert model(torch.tensor([[3]]), torch.tensor([0])).shape == (1, 1, 150)


ATTENTION = [  # B, H, Hkv, T, S, D, start
    (1, 9, 3, 1, 700, 64, [650]), (2, 4, 4, 1, 128, 80, [0, 127]), (1, 8, 1, 5, 200, 128, [33]),
    (3, 6, 2, 12, 90, 17, [0, 70, 1]), (2, 4, 2, 40, 140, 32, [0, 97]),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(case, dtype):
    b, h, hkv, t, s, d, start = case
    q = torch.randn(b, t, h, d).to(dtype).transpose(1, 2)
    k, v = (torch.randn(b, hkv, s, d).to(dtype) for _ in range(2))
    start = torch.tensor(start)
    for i, n in enumerate((start + t).tolist()):  # unfilled slots must never be touched
        k[i, :, n:] = v[i, :, n:] = torch.nan
    arrived = split_counters(q.device)
    y = attention(q, k, v, start, arrived=arrived)
    assert not arrived.any()  # or the next call would join too early
    clean = torch.nan_to_num(k).float(), torch.nan_to_num(v).float()
    want = attention_reference(q.float(), *clean, start)
    assert y.dtype == dtype and (y - want).norm() < TOLERANCE[dtype] * want.norm()


MANY_SPLITS = [  # as above, on a card of 132 multiprocessors, and splits that hold a block
    (1, 2, 1, 1, 1300, 16, [1290], 16), (2, 24, 1, 1, 1300, 24, [0, 1200], 16),
    (1, 36, 2, 3, 900, 80, [800], 8), (2, 8, 2, 20, 700, 16, [3, 600], 8),
]  # fmt: skip


@pytest.mark.parametrize("case", MANY_SPLITS, ids=str)
def test_attention_of_many_splits(case, monkeypatch, dtype=BF16):
    """Joined in several turns, of several tiles, some of which lack most of their splits."""
    from kernels.cuda import attention as module
    from kernels.cuda.launch import Card

    b, h, hkv, t, s, d, start, splits = case
    launched, launch = [], module.attention_launch
    monkeypatch.setattr(module, "card", lambda device: Card(132, 227 * 1024))
    monkeypatch.setattr(
        module, "attention_launch", lambda *a: launched.append(launch(*a)) or launched[-1]
    )
    q, start = 4 * torch.randn(b, h, t, d).to(dtype), torch.tensor(start)
    k, v = (torch.randn(b, hkv, s, d).to(dtype) for _ in range(2))
    want = attention_reference(q.float(), k.float(), v.float(), start)
    few = torch.zeros(b * hkv - 1, dtype=torch.int32)
    for arrived, expected in ((split_counters(q.device), splits), (few, 1)):
        y = attention(q, k, v, start, arrived=arrived)
        assert launched[-1].constants["SPLITS"] == expected and not arrived.any()
        assert (y - want).norm() < TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("kind", KV_CACHES)
def test_a_cache_has_its_attention_split(kind, monkeypatch):
    from kernels.cuda import attention as module

    launched, launch = [], module.attention_launch
    monkeypatch.setattr(
        module, "attention_launch", lambda *a: launched.append(launch(*a)) or launched[-1]
    )
    cache = KV_CACHES[kind](1, 2, 300, 16, FP32)
    cache.update(*torch.randn(2, 1, 290, 2, 16), torch.arange(290)[None])
    cache.attend(torch.randn(1, 4, 1, 16), torch.tensor([289]))
    assert launched[-1].constants["SPLITS"] > 1


@pytest.mark.parametrize("case", ATTENTION[::2], ids=str)
def test_attention_int8_cache(case):
    b, h, hkv, t, s, d, start = case
    q = torch.randn(b, h, t, d).bfloat16()
    k, v = (torch.randint(-127, 128, (b, hkv, s, d), dtype=torch.int8) for _ in range(2))
    k_scale, v_scale = (torch.rand(b, hkv, s, 1).bfloat16() / 100 for _ in range(2))
    want = attention_reference(q.float(), k, v, torch.tensor(start), k_scale, v_scale)
    for arrived in (split_counters(q.device), None):  # without it nothing is split
        y = attention(q, k, v, torch.tensor(start), k_scale, v_scale, arrived)
        assert (y - want).norm() < TOLERANCE[BF16] * want.norm()


def test_between_products(monkeypatch):
    """Each as one kernel, against torch's operators, as a GPU would be judged."""
    from kernels.cuda import between
    from kernels.cuda.inputs import ready_launch
    from scripts import check_cuda

    monkeypatch.setattr(check_cuda, "DEVICE", "cpu")
    ran = []
    for name in ("rotate_launch", "silu_mul_launch", "update_cache_launch"):
        own = getattr(between, name)
        monkeypatch.setattr(between, name, lambda *a, own=own: ran.append(own) or own(*a))
    for sizes in ((5, 24, 203), (2, 64, 1300)):
        found = list(check_cuda.check_between(*sizes))
        assert len(found) == 4 and all(check["ok"] for check in found), found
    assert len(ran) == 8 * (2 + 1 + 1)
    monkeypatch.setattr(between, "ready_launch", lambda *a: ready_launch(*a[:4], 0.1, *a[5:]))
    assert not any(check["ok"] for check in check_cuda.check_between(3, 16, 40))


def test_slots_outside_of_the_cache_are_not_written():
    cache, both = KV_CACHES["bf16"](2, 2, 4, 8, FP32), torch.randn(2, 2, 3, 2, 8)
    cache.update(*both, torch.tensor([[3, 4, 5], [0, -1, -2]]))
    assert torch.equal(cache.k[0, :, 3], both[0, 0, 0]) and not cache.k[0, :, :3].any()
    assert torch.equal(cache.v[1, :, 0], both[1, 1, 0]) and not cache.v[1, :, 1:].any()


@pytest.mark.parametrize("t", [1, 3])
def test_views_are_rotated_and_kept(t):
    """Of any strides; angles that are views, or the same for all of a batch."""
    ops = torch.ops.flatllama
    rotate, update_cache = ops.triton_rotate, ops.triton_update_cache
    angles = torch.randn(2, 4 * t, 4)[:, ::2, None][:, :t]
    cut = torch.randn(64, 3, 8)[:2].unsqueeze(0).transpose(0, 1)  # its second stride means nothing
    swapped = torch.randn(t, 2, 3, 8).transpose(0, 1), torch.randn(2, t, 8, 3).transpose(2, 3)
    for x in (*swapped, cut.expand(2, t, 3, 8)):
        for cos, sin in ((angles, -angles), (angles[:1], angles[1:])):
            a, b = x.chunk(2, -1)
            want = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
            torch.testing.assert_close(rotate(x, cos, sin), want)
        caches = torch.zeros(2, 2, 3, t, 8).unbind()
        update_cache(x, x, *caches, None, None, torch.arange(t).expand(2, t))
        assert all(torch.equal(cache, x.transpose(1, 2)) for cache in caches)
    with pytest.raises(RuntimeError, match="expand"):
        rotate(torch.randn(3, t, 3, 8), angles, angles)


def test_calibration_sees_what_torch_computes():
    tokens, results = torch.randint(0, 150, (6, 20)), []
    for setting in ("triton", "inductor"):
        choice.choose(setting)
        model = random_model(FP32)
        stream = CalibrationStream(tokens, model.tok_embeddings.weight, model.config)
        for name in ("attention.wqkv", "attention.wo"):
            hessian = stream.statistics(model.layers[0], name).hessian
        results.append(hessian)
    choice.choose("triton")
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_compiled_modules_keep_the_formulas():
    norm, seen = RMSNorm(8, 1e-5), []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(norm.requires_grad_(False), backend=backend, fullgraph=True)(torch.randn(2, 8))
    assert seen and not any("triton" in target for target in seen)


NEW_TOKENS = [  # as above; new slots that begin and end blocks of 32 and 64, and lie in two of them
    (2, 4, 2, 1, 200, 16, [64, 63]), (2, 4, 2, 5, 200, 24, [61, 128]),
    (3, 2, 2, 4, 130, 64, [0, 28, 126]), (1, 24, 1, 12, 160, 16, [90]),
]  # fmt: skip


@pytest.mark.parametrize("kind", KV_CACHES)
@pytest.mark.parametrize("case", NEW_TOKENS, ids=str)
def test_attention_of_new_tokens(case, kind, dtype=FP32):
    """Rotated, in the cache and attended to by one kernel, against the modules' three."""
    from kernels.cuda.attention import Fresh, attention_launch
    from kernels.cuda.launch import card

    b, h, hkv, t, s, d, start = case
    cache, other = (KV_CACHES[kind](b, hkv, s, d, dtype) for _ in range(2))
    old = [torch.randn(b, s, hkv, d).to(dtype) for _ in range(2)]
    for filled in (cache, other):
        filled.write(*old, torch.arange(s).expand(b, s))
    start, angles = torch.tensor(start), torch.rand(s, d // 2) * 6
    position, table = start[:, None] + torch.arange(t), (angles.cos(), angles.sin())
    qkv = torch.randn(b, t, h + 2 * hkv, d).to(dtype)

    unturned, weights = qkv[:, :, : h + hkv].float(), (None, None)
    if d != 64:  # norms of heads; all that the kernel rounds is what comes out
        norms = [RMSNorm(d, 1e-5).requires_grad_(False) for _ in range(2)]
        weights = [torch.rand(d).to(dtype) + 0.5 for _ in range(2)]
        for norm, weight in zip(norms, weights, strict=True):
            norm.weight.copy_(weight)
        unturned = torch.cat([norms[0](unturned[:, :, :h]), norms[1](unturned[:, :, h:])], 2)
    choice.choose("inductor")
    turned = rotate(unturned, *(x[position][:, :, None] for x in table)).to(dtype)
    choice.choose("triton")
    other.write(turned[:, :, h:], qkv[:, :, h + hkv :], position)
    names = ("k", "v", "k_scale", "v_scale")
    want_k, want_v, *want_scales = (getattr(other, name, None) for name in names)
    q = turned[:, :, :h].transpose(1, 2)
    want = attention_reference(q.float(), want_k, want_v, start, *want_scales)

    k, v, *scales = (getattr(cache, name, None) for name in names)
    q, *new = qkv.transpose(1, 2).split([h, hkv, hkv], dim=1)
    out, on = torch.empty(b, t, h, d, dtype=dtype).transpose(1, 2), card(k.device)
    fresh = Fresh(*new, *table, *weights, 1e-5)
    attention_launch(q, k, v, start, *scales, cache.arrived, out, on, fresh).run()

    assert (out - want).norm() < 2 * TOLERANCE[dtype] * want.norm()
    written = torch.zeros(b, s, dtype=torch.bool)
    written[torch.arange(b)[:, None], position] = True
    assert not cache.arrived.any()
    for name, theirs in other.named_buffers():
        if name == "arrived":
            continue
        # [B, S, H_kv, .]
        mine, theirs = (x.transpose(1, 2) for x in (cache.get_buffer(name), theirs))
        assert torch.equal(mine[~written], theirs[~written])
        difference = (mine[written].float() - theirs[written].float()).abs()
        if mine.dtype == torch.int8:  # x / s may fall to the other side of a half
            assert difference.max() <= 1 and difference.mean() < 0.02
        else:
            assert (difference <= TOLERANCE[dtype] * (0.1 + theirs[written].float().abs())).all()
