"""Every format of the registry: kernel against fp64, size, round trips, grid, checkpoint."""

import copy

import pytest
import torch

import checkpoint as ckpt
from calibration import InputStatistics
from checkpoint_writer import VERSION, Writer
from config import ModelConfig
from errors import UserError
from gptq import gptq
from kernels import aten, codebook4, native, uint
from kernels.activations import int8_asymmetric
from kernels.coded import CodedLinear
from kernels.formats import FORMATS
from kernels.fpx import FLOAT_FORMATS, float_values
from kernels.packing import packed_size
from modes import make_grid, parse_mode, quantize_linear

SHAPES = [(203, 50), (96, 33), (5, 3)]  # K, N
ROWS = (1, 2, 7, 16, 17, 100, 513)
SOME = ("uint3", "fp6", "codebook4", "int8dq-int4", "float8dq-row", "int4-sparse24", "w4a8")
every_format = pytest.mark.parametrize("name", FORMATS)


def quantized(name, w, bias=None, dtype=torch.bfloat16, **settings):
    """w [N, K] rounded to nearest in a format, and its grid, codes and params."""
    cls = FORMATS[name]
    grid = cls(w.shape[1], w.shape[0], dtype=dtype, **settings).grid()
    params = grid.fit(w)
    codes = grid.round_to_nearest(w, params)
    module = cls.from_codes(codes, {**params, **grid.shared()}, bias, dtype, **settings)
    return module, grid, codes, params


def random_weight(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.fixture
def exact():
    before = native.exact_activations()
    native.set_exact_activations(True)
    yield
    native.set_exact_activations(before)


def settings_of(name):
    """The default, and one group per row where there is that choice."""
    return [{}, {"groupsize": 0}] if 0 in FORMATS[name].groupsizes else [{}]


@every_format
def test_product_equals_fp64(name, exact):
    for k, n in SHAPES:
        for settings in settings_of(name):
            bias = torch.randn(n)
            module, *_ = quantized(name, random_weight(n, k), bias, torch.float32, **settings)
            weight = module.dequantize().double()
            packed = copy.deepcopy(module)
            packed.repack()
            for rows in ROWS:
                x = torch.randn(rows, k) * 2
                want = module.rounded_input(x) @ weight.t() + bias.double()
                for m in (module, packed):
                    error = (m(x) - want).norm() / want.norm()
                    assert error < 1e-5, (k, n, rows, settings, m is packed)


@pytest.mark.parametrize("name", ["int8dq", "w4a8"])
def test_integer_sums_are_exact(name):
    """To the bit: only what is rounded after the sum of integers could differ."""
    if not native.load():
        pytest.skip("no compiler")
    for settings in settings_of(name):
        module, *_ = quantized(name, random_weight(100, 600), None, torch.float32, **settings)
        packed = copy.deepcopy(module)
        packed.repack()
        for rows in ROWS:
            x = torch.randn(rows, 600)
            assert torch.equal(packed(x), module(x))


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_leading_dimensions(name, dtype, exact):
    module, *_ = quantized(name, random_weight(18, 70), None, dtype)
    x = torch.randn(2, 3, 70).to(dtype)
    want = module.rounded_input(x) @ module.dequantize().double().t()
    module.repack()
    y = module(x)
    assert y.dtype == dtype and y.shape == (2, 3, 18)
    assert (y - want).norm() / want.norm() < 5e-3


@every_format
def test_many_rows_of_bf16(name, exact):
    """On AMX a product of its own, elsewhere fp32 panels: only the result's rounding shows."""
    for k, n in ((203, 50), (64, 32), (1100, 33)):
        module, *_ = quantized(name, random_weight(n, k), torch.randn(n))
        weight, bias = module.dequantize().double(), module.bias.double()
        module.repack()
        for rows in (17, 48, 530):
            x = torch.randn(rows, k).bfloat16()
            want = module.rounded_input(x) @ weight.t() + bias
            assert (module(x) - want).norm() / want.norm() < 2**-8, (k, n, rows)


IN_16_BITS = [*(f"uint{n}" for n in range(1, 8)), "int8dq-int3", "codebook4", "int4-sparse24"]


@pytest.mark.parametrize("groupsize", [0, 32, 64, 96, 256])
@pytest.mark.parametrize("name", IN_16_BITS)
def test_activations_in_16_bits(name, groupsize, rounding_level):
    """As near to fp64 as the result's rounding allows."""
    for k, n in ((203, 50), (640, 33), (96, 16), (672, 17)):
        for dtype, error in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
            module, *_ = quantized(name, random_weight(n, k), dtype=dtype, groupsize=groupsize)
            weight = module.dequantize().double()
            module.repack()
            for rows in (1, 2, 5, 16):
                x = torch.randn(rows, k).to(dtype)
                want = module.rounded_input(x) @ weight.t()
                assert (module(x) - want).norm() / want.norm() < error, (k, n, rows, dtype)


LOOKED_UP = [f.name for f in FLOAT_FORMATS if f.exponent_bits <= 3 and f.bits <= 6]


@pytest.mark.parametrize("name", ["codebook4", "int4-sparse24", *LOOKED_UP])
def test_each_byte_of_values_and_activations_counts(name, rounding_level):
    """Codes in every column times 3, a low byte beside a large number, which meets a 0."""
    k, cls = 96, FORMATS[name]
    module = cls(k, 64, dtype=torch.float16)
    count = 2**module.bits
    codebook = torch.tensor([0, 1, -1, 200, -200, *range(3000, 33000, 3000), 32767]) / 32767
    zero = 8 if name == "int4-sparse24" else 0
    codes = (torch.arange(64)[:, None] + torch.arange(k)) % count
    codes[:, -1] = zero
    if name == "int4-sparse24":  # columns n and n + 1 of each four, n + 2 ... are pruned
        codes[(torch.arange(64)[:, None] + torch.arange(k)) % 4 > 1] = zero
    params = {"scales": torch.ones_like(module.scales, dtype=torch.float32), "codebook": codebook}
    module.pack(codes.to(torch.uint8), params)
    want = 3 * module.dequantize().double().t()
    module.repack()
    x = 3 * torch.eye(k)
    x[:, -1] = 32512
    for rows in (1, 2, 3, 16):
        y = torch.cat([module(part.half()) for part in x[:-1].split(rows)])
        torch.testing.assert_close(y.double(), want[:-1], rtol=2**-11, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", *IN_16_BITS, *LOOKED_UP])
def test_extreme_activations_in_16_bits(name, rounding_level):
    """What is not a number stays none, in its row alone; large numbers overflow no earlier."""
    module, *_ = quantized(name, random_weight(16, 96))
    weight = module.dequantize().double()
    module.repack()
    for rows in (1, 2, 5):
        x = torch.randn(rows, 96).bfloat16() * 1e34
        want = module.rounded_input(x) @ weight.t()
        assert (module(x) - want).norm() / want.norm() < 2**-8
        x[-1] = torch.nan  # all of it: pruned columns may not count
        y = module(x)
        assert y[-1].isnan().all() and y[:-1].isfinite().all()


@pytest.mark.parametrize("kind", ["common", "all", "subnormal"])
@pytest.mark.parametrize("name", ["float8", "float8dq-row", *(f.name for f in FLOAT_FORMATS)])
def test_small_floats_meet_few_rows(name, kind, exact):
    """On AMX a product of its own. Codes as weights have them; any code; or none but subnormals."""
    generator = torch.Generator().manual_seed(1)
    for k, n in ((203, 50), (64, 16), (30, 33), (576, 96)):
        module, grid, codes, params = quantized(name, random_weight(n, k), torch.randn(n))
        if kind != "common":
            end = grid.max_code + 1 if kind == "all" else 2**grid.mantissa_bits
            codes = torch.randint(end, (n, k), generator=generator).to(torch.uint8)
            codes |= torch.randint(2, (n, k), generator=generator).to(torch.uint8) * grid.sign_code
            module = FORMATS[name].from_codes(codes, params, torch.randn(n), torch.bfloat16)
        weight, bias = module.dequantize().double(), module.bias.double()
        module.repack()
        for rows in (1, 2, 5, 16):
            x = torch.randn(rows, k, generator=generator).bfloat16()
            want = module.rounded_input(x) @ weight.t() + bias
            assert (module(x) - want).norm() / want.norm() < 2**-8, (k, n, rows)


@every_format
def test_every_level_of_the_cpu(name, level, exact):
    module, *_ = quantized(name, random_weight(18, 203), None, torch.float32)
    weight, packed = module.dequantize().double(), copy.deepcopy(module)
    packed.repack()
    for rows in (1, 5, 17):
        x = torch.randn(rows, 203)
        want = module.rounded_input(x) @ weight.t()
        assert (packed(x) - want).norm() / want.norm() < 1e-5, rows


def expected_bytes(name, n, k):
    """Bytes of a weight, from the table of formats, scales in bf16 where they follow the model."""

    def groups(size):
        return -(-k // size)

    if name in ("int8", "int8dq", "float8"):
        return n * k + 2 * n
    if name == "float8dq-row":
        return n * k + 4 * n
    if name == "float8dq-tensor":
        return n * k + 4
    if name == "int4":
        return n * (packed_size(k, 4) + 4 * groups(64))
    if name.startswith("int8dq-int"):
        return n * (packed_size(k, int(name[-1])) + 2 * groups(128))
    if name.startswith("fp"):
        bits = 6 if name == "fp6" else 1 + sum(map(int, name.split("-")[1:]))
        return n * (packed_size(k, bits) + 2)
    if name.startswith("uint"):
        bits = int(name[4])
        return n * (packed_size(k, bits) + 2 * groups(64) + packed_size(groups(64), bits))
    if name == "codebook4":
        return n * (packed_size(k, 4) + 2 * groups(64)) + 64
    if name == "w4a8":
        return n * (packed_size(k, 4) + 2 * groups(128) + 4)
    assert name == "int4-sparse24", f"no size of {name} is known here"
    return n * (groups(4) + packed_size(groups(4), 4) + 2 * groups(128))


@every_format
def test_size_is_the_formula(name):
    for k, n in SHAPES:
        module, *_ = quantized(name, random_weight(n, k))
        assert module.weight_bytes() == expected_bytes(name, n, k)


@every_format
def test_module_holds_exactly_the_codes(name):
    for k, n in SHAPES:
        module, grid, codes, params = quantized(name, random_weight(n, k))
        columns = grid.columns(params, torch.arange(k))
        assert torch.equal(module.dequantize(), grid.decode(codes, columns))


@every_format
def test_grid_is_idempotent(name):
    k, n = SHAPES[0]
    _, grid, codes, params = quantized(name, random_weight(n, k))
    columns = grid.columns(params, torch.arange(k))
    assert torch.equal(grid.round(grid.decode(codes, columns), columns), codes)
    one = torch.tensor([k - 1])  # a column by itself, as GPTQ takes them
    value = grid.decode(codes[:, one], grid.columns(params, one))
    assert torch.equal(value, grid.decode(codes, columns)[:, one])


@every_format
def test_grid_rounds_to_the_nearest_point(name):
    w = random_weight(4, 64)
    module, grid, codes, params = quantized(name, w)
    if grid.prune_block > 1:
        w = w * grid.keep(w.abs())
    columns = grid.columns(params, torch.arange(64))
    error = (module.dequantize() - w).abs()
    count = int(codes.max()) + 1
    for other in range(int(codes.min()), count, max(1, count // 40)):
        value = grid.decode(torch.full_like(codes, other), columns)
        value = torch.where(value.isnan(), torch.inf, value)
        # w4a8 rounds its points to integers after the choice: half a step more
        slack = columns["scales"] * (0.5 if name == "w4a8" else 1e-3)
        assert (error <= (value - w).abs() + slack).all()


@every_format
def test_gptq_beats_round_to_nearest(name):
    generator = torch.Generator().manual_seed(1)
    w = random_weight(24, 64)
    mix = torch.randn(64, 64, generator=generator) / 8 + torch.eye(64)
    stats = InputStatistics.empty(64)
    stats.add(torch.randn(512, 64, generator=generator) @ mix)
    module, grid, *_ = quantized(name, w)
    codes, params = gptq(w, grid, stats)
    better = FORMATS[name].from_codes(codes, {**params, **grid.shared()}, None, torch.bfloat16)

    def output_error(m):
        e = m.dequantize() - w
        return ((e @ stats.hessian) * e).sum().item()

    assert output_error(better) < output_error(module) * 0.999


@every_format
def test_checkpoint_round_trip_bit_for_bit(name, tmp_path):
    config = ModelConfig(32, 1, 2, 1, 48, 40, 16)
    linears = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")
    layers = {f"layers.0.{n}": parse_mode(name).settings for n in linears}
    layers["output"] = parse_mode(name).settings
    model = ckpt.build_model(config, layers, torch.bfloat16).to_empty(device="cpu")
    for key, value in model.state_dict().items():
        value.copy_(torch.randn(value.shape).to(value.dtype)) if key not in layers else None
    for i, key in enumerate(layers):
        shape = (model.get_submodule(key).out_features, model.get_submodule(key).in_features)
        model.set_submodule(key, quantized(name, random_weight(*shape, seed=i))[0])
    state = model.state_dict()
    specs = {key: (t.dtype, list(t.shape)) for key, t in state.items()}
    header = {"version": VERSION, "mode": name, "layers": layers, "config": config.to_dict()}
    with Writer(tmp_path / "m.safetensors", specs, header) as writer:
        for key, tensor in state.items():
            writer.write(key, tensor)
    opened = ckpt.open_checkpoint(tmp_path / "m.safetensors")
    for key, tensor in state.items():
        same = opened.tensor(key).view(torch.uint8), tensor.contiguous().view(torch.uint8)
        assert opened.tensor(key).dtype == tensor.dtype and torch.equal(*same), key
    loaded, tokens = ckpt.load_model(opened), torch.arange(5)[None]
    ckpt.repack(model)
    for m in (model, loaded):
        m.setup_cache(1, 8)
    start = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(model(tokens, start), loaded(tokens, start))


@pytest.mark.parametrize("name", SOME)
def test_compiles_to_one_graph(name):
    module, *_ = quantized(name, random_weight(18, 70), torch.randn(18))
    for packed in (False, True):
        if packed:
            module.repack()
        torch.compiler.reset()
        x = torch.randn(2, 70, dtype=torch.bfloat16)
        y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        assert (y - module(x)).abs().max() <= 0.02 * y.abs().max()


def test_bad_group_sizes():
    for mode, size in (("uint3", 48), ("int4", 0), ("codebook4", -64)):
        with pytest.raises(UserError, match="take one of"):
            parse_mode(mode, size)
    with pytest.raises(UserError, match="one scale per row"):
        parse_mode("fp6", 64)
    assert parse_mode("w4a8", 0).groupsize == 0 and parse_mode("w4a8").groupsize == 128
    with pytest.raises(ValueError, match="positive"):
        FORMATS["uint3"](64, 16, groupsize=-1)


def test_group_of_no_whole_words_uses_the_reference():
    module, *_ = quantized("uint3", random_weight(16, 60), groupsize=20)
    module.repack()
    assert module.tiles is None and module(torch.randn(1, 60)).shape == (1, 16)


@pytest.mark.parametrize("rows", [1, 20, 100])
def test_a_table_of_halves_is_none_of_integers(rows):
    module = unlisted(Halves, 18, 320, torch.bfloat16)
    x, weight = torch.randn(rows, 320).bfloat16(), module.dequantize().double()
    want = x.double() @ weight.t() + module.bias.double()
    module.repack()
    assert native.load() is (module.tiles is not None)
    assert (module(x) - want).norm() / want.norm() < 0.01


# Hand-worked cases of the schemes.


class Codebook3(CodedLinear):
    """A table of 8 values, for which there is no C++ product."""

    name, bits, default_groupsize = "codebook3", 3, 64

    def table(self):
        return torch.tensor([-1.0, -0.6, -0.3, -0.1, 0.1, 0.3, 0.7, 1.0])


class Halves(CodedLinear):
    """A table of neighbours, one apart, that are no integers."""

    name, bits, default_groupsize = "halves", 4, 64

    def table(self):
        return torch.arange(16.0) - 7.5


class Uint8(uint.UintLinear):
    """Integers of 8 bits, for which there is no C++ product."""

    name, bits = "uint8", 8


def unlisted(cls, n, k, dtype=torch.float32):
    """A module of a format that is not in the registry, random codes."""
    params = {"scales": torch.rand(n, -(-k // 64)) / 10}
    if cls.has_zeros:
        params["zeros"] = torch.randint(0, 2**cls.bits, params["scales"].shape).to(torch.uint8)
    codes = torch.randint(0, 2**cls.bits, (n, k)).to(torch.uint8)
    return cls.from_codes(codes, params, torch.randn(n), dtype, groupsize=64)


@pytest.mark.parametrize("cls", [Codebook3, Uint8])
def test_format_without_a_product_runs(cls, capsys):
    """A new table or width needs no C++: plain PyTorch, said on stderr."""
    module = unlisted(cls, 18, 300)
    weight = module.dequantize().double()
    ckpt.repack(torch.nn.Sequential(module))
    if native.load():
        assert f"no kernel for {cls.name}" in capsys.readouterr().err
    for rows in (1, 20):
        x = torch.randn(rows, 300)
        want = x.double() @ weight.t() + module.bias.double()
        assert (module(x) - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize("name", ["fpx-5-1", "fpx-5-2", "fp6", "float8"])
@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0, 1e4])
def test_small_floats_of_fp16_models(name, size):
    """Scales of such weights that fp16 would hold only roughly cost no more than rounding does."""
    w = torch.rand(16, 512, generator=torch.Generator().manual_seed(0)) * 2 * size - size
    errors = []
    for dtype in (torch.float32, torch.float16):
        grid = make_grid(parse_mode(name), 512, dtype)
        params = grid.fit(w)
        assert (params["scales"] > 0).all()
        errors.append((grid.decode_all(grid.round_to_nearest(w, params), params) - w).norm())
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].bits == 8])
def test_a_single_row_of_columns_first(name):
    """As GPTQ leaves codes: of one row strides of 1 count as contiguous."""
    linear, x = torch.nn.Linear(64, 1, bias=False), torch.randn(3, 64)
    layer = quantize_linear(linear, parse_mode(name))
    expected = x @ layer.dequantize().t()
    weight = layer.weight.as_strided((1, 64), (1, 1))
    assert weight.is_contiguous() and torch.equal(weight.float(), layer.weight.float())
    layer.weight = weight
    layer.repack()
    assert (layer(x) - expected).norm() < 0.1 * expected.norm()


def test_fp6_values():
    values = float_values(3, 2)
    assert values[:8].tolist() == [0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375]
    assert values[31] == 28 and values[63] == -28 and len(values.unique()) == 63
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = ~e4m3.isnan()
    assert torch.equal(float_values(4, 3)[finite], e4m3[finite])


@pytest.mark.parametrize("name", [n for n, cls in FORMATS.items() if hasattr(cls, "mantissa_bits")])
def test_every_small_float_through_the_product(name):
    """One column at a time, so that each code, subnormals too, comes out alone."""
    cls = FORMATS[name]
    codes = torch.arange(2**cls.bits, dtype=torch.uint8)
    values = float_values(cls.exponent_bits, cls.mantissa_bits)
    if name.startswith("float8"):
        codes[[127, 255]] = 0  # NaN
    columns = max(1, len(codes) // 8)
    codes = codes.view(-1, columns)
    params = {"scales": torch.ones(1 if name == "float8dq-tensor" else len(codes), 1)}
    module = cls.from_codes(codes, params, None, torch.float32)
    module.repack()
    for column in range(columns):
        x = torch.zeros(1, columns)
        x[0, column] = 1
        want = values[codes[:, column].long()]
        torch.testing.assert_close(module(x)[0], want, rtol=1e-6, atol=0)


def test_fp6_rounds_to_even_through_subnormals():
    w = torch.tensor([[28.0, 0.03125, 0.09375, 1.125, 1.375, -27.0, -0.01, 0.0]])  # s = 1
    module, _, codes, _ = quantized("fp6", w)
    assert module.dequantize().tolist() == [[28, 0, 0.125, 1, 1.5, -28, 0, 0]]
    assert codes[0, -2] == 0  # no negative zero


@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("name", ["float8dq-row", "float8dq-tensor"])
def test_float8_inputs_round_as_torch_does(name, rows, level):
    """A weight of ones on the diagonal gives the rounded inputs back, ties and subnormals too."""
    values = float_values(4, 3)[:127]
    ties = (values[1:] + values[:-1]) / 2
    every = torch.cat([values, ties, -ties, ties * (1 + 1e-6), ties * (1 - 1e-6)])
    cls, k = FORMATS[name], len(every) + 1
    codes = torch.eye(k, dtype=torch.uint8) * 0x38  # 1.0
    params = {"scales": torch.ones(1 if name == "float8dq-tensor" else k, 1)}
    module = cls.from_codes(codes, params, None, torch.float32)
    module.repack()
    x = torch.randn(rows, k) * torch.logspace(-4, 2, rows)[:, None]
    x[0, :-1] = every
    x[:, -1] = 448  # so that the scales are 1
    q, scale = module.quantize_input(x)
    assert torch.equal(module(x), q.float() * scale)


def test_float8_matches_torch_rounding():
    w = random_weight(8, 64)
    module, *_ = quantized("float8", w)
    scale = (w.abs().amax(1, keepdim=True) / 448).bfloat16().float()
    want = (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(module.weight.view(torch.uint8), want.view(torch.uint8))


def test_uint2():
    w = torch.tensor([[-1.0, 0.0, 2.0, 0.6] * 8])
    module, _, codes, params = quantized("uint2", w, groupsize=32)
    assert params["scales"].tolist() == [[1.0]] and params["zeros"].tolist() == [[1.0]]
    assert codes[0, :4].tolist() == [0, 1, 3, 2]
    assert module.weight[0, 0] == 0b10_11_01_00
    assert module.dequantize()[0, :4].tolist() == [-1, 0, 2, 1]


def test_symmetric_groups():
    w = torch.tensor([[7.5, -7.5, 2.2, 0.0]])
    module, *_ = quantized("int8dq-int4", w)
    assert module.dequantize().tolist() == [[7, -8, 2, 0]]
    module, *_ = quantized("int8dq-int3", w)
    assert module.dequantize()[0, :2].tolist() == pytest.approx([6.4286, -8.571], rel=4e-3)


def test_asymmetric_activations():
    q, scale = int8_asymmetric(torch.tensor([[-1.0, 0.0, 1.55], [2.0, 1.2, 0.0]]))
    assert scale.flatten().tolist() == pytest.approx([0.01, 2 / 255])
    assert q.tolist() == [[-100, 0, 155], [255, 153, 0]]  # q - z: 0 stays 0


def test_codebook_learns_few_values_exactly():
    points = torch.linspace(-1, 1, 16)
    w = points[torch.randint(0, 16, (8, 128), generator=torch.Generator().manual_seed(0))] * 0.25
    w[:, ::64] = -0.25  # the scale is the magnitude, whatever the sign
    module, *_ = quantized("codebook4", w)
    assert torch.allclose(module.dequantize(), w, atol=1e-6)


def test_codebook_learns_from_a_bounded_sample(monkeypatch):
    """However many pieces there are; each has its share in it, told by its scale."""
    monkeypatch.setattr(codebook4, "SAMPLE", 1000)
    sizes, cat, learned = [], torch.cat, []

    def spied(tensors, *dim):
        sizes.append(sum(t.numel() for t in tensors))
        return cat(tensors, *dim)

    monkeypatch.setattr(torch, "cat", spied)
    monkeypatch.setattr(codebook4, "kmeans_1d", lambda values, weights, n: learned.append(weights))
    codebook4.CodebookGrid(64).learn(
        torch.full((2 if i == 19 else 20, 64), 2.0**i) for i in range(20)
    )
    (weights,) = learned
    shares = [(weights == 4.0**i).sum().item() / 1000 for i in range(20)]
    assert len(weights) == 1000 and max(sizes) <= 2000
    assert shares == pytest.approx([20 / 382] * 19 + [2 / 382], abs=0.02)


def test_sparse_keeps_the_two_largest_of_four():
    w = torch.tensor([[1.0, -7.5, 0.5, 3.0, 2.0, 0.0]])
    module, grid, codes, _ = quantized("int4-sparse24", w)
    assert codes.tolist() == [[8, 0, 8, 11, 10, 8]]
    assert module.dequantize().tolist() == [[0, -8, 0, 3, 2, 0]]
    assert module.weight.tolist() == [[0xB0, 0x8A]]  # codes 0, 11; 10, 8
    assert module.positions.tolist() == [[0x4D]]  # columns 1, 3; then 0, 1
    assert grid.keep(torch.zeros(1, 6)).sum() == 4
    with pytest.raises(ValueError, match="2 of 4"):
        module.pack(
            torch.tensor([[1, 2, 3, 8, 8, 8]], dtype=torch.uint8), {"scales": torch.ones(1, 1)}
        )


def test_w4a8_groups_are_integers_of_int8():
    w = random_weight(4, 256)
    w[:, 128:] *= 0.01  # a group far below its row: no finer than int8
    module, _, _, params = quantized("w4a8", w)
    assert (params["group_scales"][:, 1] == 1).all()
    integers = module.dequantize() / module.scales
    assert torch.allclose(integers, integers.round(), atol=1e-3)
    assert integers.abs().max() <= 127
    module, *_ = quantized("w4a8", torch.tensor([[7.0, -14.0, 3.0]]), groupsize=0)
    assert module.dequantize().tolist() == [[8, -14, 4]]  # s = 2: 3.5 and 1.5, to even


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_atens_int8_product(dtype):
    """As --kernels aten takes it, though on the CPU; and that torch.compile knows its result."""
    module, *_ = quantized("int8", random_weight(48, 64), dtype=dtype)
    x, bias = torch.randn(2, 3, 64).to(dtype), torch.randn(48)  # the product has x's type
    y = aten.int8_product(x, module.weight, module.scales, bias)
    want = x.double() @ module.dequantize().double().t() + bias.double()
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2)
    arguments = x.flatten(0, 1), module.weight, module.scales
    torch.library.opcheck(torch.ops.flatllama.aten_int8, arguments, test_utils="test_faketensor")
