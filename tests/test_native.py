"""Every CPU kernel at every level against fp64 references, on regular and ragged shapes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from kernels import native
from kernels.formats import FORMATS
from kernels.linear import Linear

ops = torch.ops.flatllama
ROWS = [1, 2, 7, 16, 17, 100]
SHAPES = [(96, 576), (35, 100), (16, 64), (1, 1), (50, 77), (7, 8), (130, 257)]  # N, K
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("library")


def close(y, want, dtype, tolerance=None):
    """Within the rounding of the result's dtype (or `tolerance`), relative to the largest value."""
    eps = tolerance or {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert y.dtype == dtype
    error = (y.double() - want).abs().max() if want.numel() else 0
    assert error <= eps * max(want.abs().max().item() if want.numel() else 0, 1e-3)


def make(m, n, k, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + m + n + k)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    return x, bias, generator


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
def test_float_linear(level, m, dtype):
    for n, k in SHAPES:
        x, bias, generator = make(m, n, k, dtype)
        w = torch.randn(n, k, generator=generator).to(dtype)
        want = x.double() @ w.double().T
        close(ops.float_linear(x, w, None), want, dtype)
        close(ops.float_linear(x, w, bias), want + bias.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_linear_of_a_token_of_each_sequence(library, dtype):
    """[B, 1, K] with the strides of another layout, as compiled graphs leave it."""
    for m in (16, 33):
        x, bias, generator = make(m, 50, 77, dtype)
        w = torch.randn(50, 77, generator=generator).to(dtype)
        y = ops.float_linear(x[None].transpose(0, 1), w, bias)
        assert y.shape == (m, 1, 50)
        close(y[:, 0], x.double() @ w.double().T + bias.double(), dtype)


@pytest.mark.parametrize("m", [1, 2, 7, 9, 12, 16, 17])
def test_float_linear_with_bf16_instructions(bf16_level, m):
    for n, k in SHAPES:
        x, bias, generator = make(m, n, k, torch.bfloat16)
        w = torch.randn(n, k, generator=generator).bfloat16()
        close(ops.float_linear(x, w, bias), x.double() @ w.double().T + bias.double(), x.dtype)


@pytest.mark.parametrize("m", [1, 3, 11, 16, 270])
@pytest.mark.parametrize("name", ["float8", "float8dq-row", "fp6", "fpx-2-1", "fpx-2-5", "fpx-5-2"])
def test_small_floats_with_bf16_instructions(bf16_level, name, m):
    """Subnormal codes among them, whose loss would show in those of two exponent bits."""
    cls = FORMATS[name]
    for n, k in ((35, 203), (16, 64), (3, 1100)):
        x, bias, generator = make(m, n, k, torch.bfloat16)
        w = torch.randn(n, k, generator=generator) * torch.rand(n, k, generator=generator) ** 8
        grid = cls(k, n, dtype=x.dtype).grid()
        params = grid.fit(w)
        codes = grid.round_to_nearest(w, params)
        plain, layer = (cls.from_codes(codes, params, bias, x.dtype) for _ in range(2))
        layer.repack()
        want = plain.rounded_input(x) @ plain.dequantize().double().T + bias.double()
        close(layer(x), want, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
def test_int8_linear(level, m, dtype):
    for n, k in SHAPES:
        x, bias, generator = make(m, n, k, dtype)
        q = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        scales = torch.rand(n, generator=generator).to(dtype)
        want = x.double() @ (q.double() * scales.double()[:, None]).T + bias.double()
        tiles = ops.int8_repack(q)
        for exact in (False, True):
            close(ops.int8_linear(x, tiles, scales, bias, n, k, exact), want, dtype)
        close(ops.int8_linear(x, tiles, scales.float(), bias, n, k), want, dtype)


def test_int8_in_16_bits_is_as_good_as_exact(rounding_level):
    """One large column among small ones: still no more error than bf16's rounding of the result."""
    x, _, generator = make(16, 96, 576, torch.bfloat16)
    x[:, 5] *= 300
    q = torch.randint(-128, 128, (96, 576), generator=generator, dtype=torch.int8)
    want, tiles = x.double() @ q.double().T, ops.int8_repack(q)
    pairs, exact = (
        (ops.int8_linear(x, tiles, torch.ones(96), None, 96, 576, flag).double() - want).norm()
        for flag in (False, True)
    )
    assert pairs < 1.01 * exact


def test_no_kernel_file_runs_anything_when_loaded():
    """A global's constructor, compiled for AVX-512, would end the process on a CPU without it."""
    objects = [out for _, out in native._jobs(native.find_compiler(), native._folder())]
    kernels = [path for path in objects if not path.name.split(".")[0].endswith("_ops")]
    assert len(kernels) > 10
    assert not [path.name for path in kernels if b".init_array" in path.read_bytes()]


def test_more_rows_than_pass_at_a_time(level):
    m, n, k = 513, 40, 600  # rows go by 480, columns of a panel by 512
    x, bias, generator = make(m, n, k, torch.bfloat16)
    w = torch.randn(n, k, generator=generator).bfloat16()
    close(ops.float_linear(x, w, bias), x.double() @ w.double().T + bias.double(), x.dtype)
    q = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    for exact in (False, True):
        y = ops.int8_linear(x, ops.int8_repack(q), torch.ones(n), None, n, k, exact)
        close(y, x.double() @ q.double().T, x.dtype)


def rounded(x, block, fused):
    """x rounded to int8 in blocks of columns, as the kernels round it. fp64.

    fused: the product with the inverse scale is rounded to an integer at once, not to fp32 first.
    """
    parts = []
    for part in x.float().split(block, dim=-1):
        scale = part.abs().amax(-1, keepdim=True) / 127
        inverse = 1 / torch.where(scale > 0, scale, 1)
        product = part.double() * inverse.double()
        parts.append(torch.round(product if fused else product.float()).double() * scale)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
def test_int8dq_linear(level, m, dtype):
    for n, k in [*SHAPES, (20, 5000)]:
        x, bias, generator = make(m, n, k, dtype)
        q = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        scales = torch.rand(n, generator=generator).to(dtype)
        s = (x.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-5)
        want = torch.round(x.float() / s).double() @ q.double().T  # int32: exact
        want = want * s.double() * scales.double() + bias.double()
        close(ops.int8dq_linear(x, ops.int8_repack(q), scales, bias, n, k), want, dtype)


def int4_weight(n, k, groupsize, generator):
    """Tiles of random codes, scales and zeros; and the weight they stand for, fp64."""
    q = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    packed = torch.nn.functional.pad(q, (0, k % 2))
    packed = packed[:, ::2] | packed[:, 1::2] << 4
    groups = -(-k // groupsize)
    scales = torch.rand(n, groups, generator=generator).bfloat16()
    zeros = torch.randn(n, groups, generator=generator).bfloat16()
    s, z = (p.double().repeat_interleave(groupsize, 1)[:, :k] for p in (scales, zeros))
    return ops.int4_repack(packed, scales, zeros, k, groupsize), (q.double() - 8) * s + z


@pytest.mark.parametrize("groupsize", [8, 32, 64, 72, 256])
@pytest.mark.parametrize("m", ROWS)
def test_int4_linear(level, m, groupsize):
    dtype = DTYPES[m % 3]
    for n, k in SHAPES:
        x, bias, generator = make(m, n, k, dtype)
        tiles, w = int4_weight(n, k, groupsize, generator)
        want = x.double() @ w.T + bias.double()
        close(ops.int4_linear(x, tiles, bias, n, k, groupsize, True), want, dtype)
        block = next(b for b in range(min(groupsize, 64), 0, -8) if groupsize % b == 0)
        want = rounded(x, block, level != "portable") @ w.T + bias.double()
        close(ops.int4_linear(x, tiles, bias, n, k, groupsize, False), want, dtype)


AMX_SHAPES = [(96, 576), (35, 100), (1, 1), (50, 77), (130, 1100)]  # N, K


def test_weight_only_with_amx(amx_level):
    """int8 at any number of rows, int4 with the inputs as they are at many, asked for or not."""
    for m, (n, k) in itertools.product([17, 32, 100, 256, 530], AMX_SHAPES):
        x, bias, generator = make(m, n, k, torch.bfloat16)
        q = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        scales = torch.rand(n, generator=generator)
        want = x.double() @ (q.double() * scales.double()[:, None]).T + bias.double()
        close(ops.int8_linear(x, ops.int8_repack(q), scales, bias, n, k), want, x.dtype)
        for groupsize in (32, 72):
            tiles, w = int4_weight(n, k, groupsize, generator)
            want = x.double() @ w.T + bias.double()
            for exact in (True,) if m < 256 else (True, False):
                y = ops.int4_linear(x, tiles, bias, n, k, groupsize, exact)
                close(y, want, x.dtype)


@pytest.mark.parametrize("m", [4, 5, 11, 16, 45])
def test_few_rows_with_amx(amx_level, m):
    """bf16, int8 in pairs, and int4 in blocks of every size, which takes up to 255 rows so."""
    for n, k in [(96, 576), (50, 1152), (16, 64), (130, 72), (33, 100), (71, 32)]:
        x, bias, generator = make(m, n, k, torch.bfloat16)
        w = torch.randn(n, k, generator=generator).bfloat16()
        for b in (bias, None):
            want = x.double() @ w.double().T + (0 if b is None else b.double())
            close(ops.float_linear(x, w, b), want, x.dtype)
        q = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        scales = torch.rand(n, generator=generator)
        want = x.double() @ (q.double() * scales.double()[:, None]).T + bias.double()
        close(ops.int8_linear(x, ops.int8_repack(q), scales, bias, n, k), want, x.dtype)
        for groupsize in (8, 32, 64, 72, 128, 2048):
            tiles, w = int4_weight(n, k, groupsize, generator)
            block = next(b for b in range(min(groupsize, 64), 0, -8) if groupsize % b == 0)
            want = rounded(x, block, fused=True) @ w.T + bias.double()
            close(ops.int4_linear(x, tiles, bias, n, k, groupsize, False), want, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8dq_with_amx(amx_level, dtype):
    """The same integers as without it, so the same results to the bit; rows left over too."""
    for m, (n, k) in itertools.product([16, 31, 50], [*AMX_SHAPES, (40, 1024)]):
        x, bias, generator = make(m, n, k, dtype)
        q = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        arguments = x, ops.int8_repack(q), torch.rand(n, generator=generator), bias, n, k
        y = ops.int8dq_linear(*arguments)
        native.set_cpu_level("avx512")
        assert torch.equal(y, ops.int8dq_linear(*arguments))
        native.set_cpu_level("amx")


@pytest.mark.parametrize("m", [1, 40])
def test_extreme_inputs(level, m):
    """Zero rows, rows of one sign at the largest codes, and tiny and large magnitudes."""
    n, k = 32, 256
    q = torch.full((n, k), -128, dtype=torch.int8)
    q[::2] = 127
    tiles, ones = ops.int8_repack(q), torch.ones(n)
    for value in (0.0, 1.0, -1.0, 1e-30, 1e30):
        x = torch.full((m, k), value)
        want = x.double() @ q.double().T
        close(ops.int8_linear(x, tiles, ones, None, n, k), want, x.dtype)
        kept = abs(value) > 1e-5  # the smallest scale: far below it x is rounded to 0
        close(ops.int8dq_linear(x, tiles, ones, None, n, k), want * kept, x.dtype)


@pytest.mark.parametrize("m", [1, 3, 6, 17, 31, 530])
@pytest.mark.parametrize("name,groupsize", [("int8dq-int4", 32), ("int8dq-int4", 128),
                                            ("w4a8", 0), ("w4a8", 32), ("w4a8", 64)])  # fmt: skip
def test_4_bit_codes_times_bytes(level, name, groupsize, m):
    """Rows longer than what is rounded at a time, too; w4a8, all integers, to the last bit."""
    for n, k in ((35, 203), (16, 2080), (37, 1216), (7, 5)):
        x, bias, generator = make(m, n, k, torch.float32)
        w, cls = torch.randn(n, k, generator=generator), FORMATS[name]
        grid = cls(k, n, dtype=x.dtype, groupsize=groupsize).grid()
        params = grid.fit(w)
        codes = grid.round_to_nearest(w, params)
        plain, layer = (
            cls.from_codes(codes, params, bias, x.dtype, groupsize=groupsize) for _ in range(2)
        )
        layer.repack()
        x = x * 10 + 1
        want = plain.rounded_input(x) @ plain.dequantize().double().T + bias.double()
        close(layer(x), want, x.dtype)
        assert name != "w4a8" or torch.equal(layer(x), plain.reference(x))


def rounding_layers(n, k):
    """Every product that rounds its activations, as functions of x, with weights of ones."""
    int8 = ops.int8_repack(torch.ones(n, k, dtype=torch.int8))
    one, zero = (torch.full((n, k // 64), v, dtype=torch.bfloat16) for v in (1.0, 0.0))
    int4 = ops.int4_repack(torch.full((n, k // 2), 0x99, dtype=torch.uint8), one, zero, k, 64)
    yield lambda x: ops.int8dq_linear(x, int8, torch.ones(n), None, n, k)
    yield lambda x: ops.int4_linear(x, int4, None, n, k, 64, False)
    for name in ("w4a8", "int8dq-int4", "float8dq-row"):
        cls = FORMATS[name]
        grid = cls(k, n, dtype=torch.float32).grid()
        params = grid.fit(torch.ones(n, k))
        layer = cls.from_codes(grid.round_to_nearest(torch.ones(n, k), params), params, None,
                               torch.float32)  # fmt: skip
        layer.repack()
        yield layer


@pytest.mark.parametrize("m", [1, 5, 40])
def test_rounded_activations_of_any_size(level, m):
    """Zeros, one sign, tiny and large; and what is not a number stays none, in its row alone."""
    for layer in rounding_layers(32, 256):
        for value in (0.0, 1.0, -1.0, 1e30, -1e30):
            x = torch.full((m, 256), value)
            assert torch.allclose(layer(x), x.sum(-1, keepdim=True).expand(m, 32), rtol=0.1), value
        x = torch.ones(m, 256)
        x[-1, 77] = torch.nan
        y = layer(x)
        assert y[-1].isnan().all() and y[:-1].isfinite().all()


def test_leading_dimensions_strides_and_empties(level):
    w = torch.randn(40, 24)
    x = torch.randn(24, 3, 2).permute(2, 1, 0)  # [2, 3, 24], not contiguous
    close(ops.float_linear(x, w, None), x.double() @ w.double().T, torch.float32)
    close(ops.float_linear(x[:1, :1], w.T.contiguous().T, None), x[:1, :1].double() @ w.double().T,
          torch.float32)  # fmt: skip
    q = torch.randint(-128, 128, (40, 24), dtype=torch.int8)
    want = x.double() @ q.double().T
    tiles = ops.int8_repack(q)
    close(ops.int8_linear(x, tiles, torch.ones(40), None, 40, 24), want, torch.float32)
    assert ops.int8_linear(x[:, :0], tiles, torch.ones(40), None, 40, 24).shape == (2, 0, 40)
    assert ops.float_linear(x, w[:0], None).shape == (2, 3, 0)
    assert (ops.float_linear(torch.ones(2, 0), torch.ones(3, 0), torch.ones(3)) == 1).all()


def attention_reference(q, k, v, start, scale):
    heads = q.shape[1] // k.shape[1]
    k, v = (c.double().repeat_interleave(heads, 1) for c in (k, v))
    seen = start[:, None, None] + torch.arange(q.shape[2])[None, :, None]  # [B, T, 1]
    hidden = torch.arange(k.shape[2])[None, None, :] > seen
    scores = (q.double() @ k.mT * scale).masked_fill(hidden[:, None], -torch.inf)
    return scores.softmax(-1) @ torch.nan_to_num(v)


ATTENTION = [  # B, H, Hkv, T, S, D, start
    (1, 9, 3, 1, 700, 64, [650]), (2, 4, 4, 1, 64, 80, [0, 63]), (1, 8, 1, 5, 200, 128, [33]),
    (3, 6, 2, 16, 90, 17, [0, 70, 1]), (1, 2, 1, 100, 130, 32, [0]),
    (2, 4, 2, 70, 300, 64, [0, 200]),
    # 1, 2 and 4 heads on one of the cache, as in Llama 2 and 3; a few new tokens, and some more
    (2, 2, 2, 1, 200, 128, [0, 150]), (1, 4, 2, 1, 200, 64, [130]), (1, 8, 2, 1, 300, 64, [200]),
    (1, 2, 1, 3, 150, 64, [62]), (1, 4, 2, 4, 150, 64, [62]),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(level, case, dtype):
    b, h, hkv, t, s, d, start = case
    generator = torch.Generator().manual_seed(s)
    q = torch.randn(b, h, t, d, generator=generator).to(dtype)
    k, v = (torch.randn(b, hkv, s, d, generator=generator).to(dtype) for _ in range(2))
    start = torch.tensor(start)
    for i, n in enumerate((start + t).tolist()):  # unfilled slots must never be touched
        k[i, :, n:] = v[i, :, n:] = torch.nan
    y = ops.attention(q, k, v, start)
    clean = torch.nan_to_num(k), torch.nan_to_num(v)
    close(y, attention_reference(q, *clean, start, d**-0.5), dtype)


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_int8_cache(level, case):
    b, h, hkv, t, s, d, start = case
    generator = torch.Generator().manual_seed(s)
    q = torch.randn(b, h, t, d, generator=generator).bfloat16()
    k, v = (torch.randint(-127, 128, (b, hkv, s, d), generator=generator) for _ in range(2))
    ks, vs = (torch.rand(b, hkv, s, 1, generator=generator) / 100 for _ in range(2))
    y = ops.attention(q, k.to(torch.int8), v.to(torch.int8), torch.tensor(start), ks, vs)
    want = attention_reference(q, k * ks.double(), v * vs.double(), torch.tensor(start), d**-0.5)
    close(y, want, q.dtype)


def test_threads_do_not_change_results():
    x, bias, generator = make(3, 200, 640, torch.bfloat16)
    w = torch.randn(200, 640, generator=generator).bfloat16()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.float_linear(x, w, bias))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bad_arguments_are_refused():
    x, q = torch.randn(2, 16), torch.zeros(8, 16, dtype=torch.int8)
    tiles, scales = ops.int8_repack(q), torch.ones(8)
    for call in (
        lambda: ops.int8_linear(x, tiles, scales, None, 8, 17),
        lambda: ops.int8_linear(x, tiles, scales, None, 40, 16),
        lambda: ops.int8_linear(x, tiles[:, :-1], scales, None, 8, 16),
        lambda: ops.int8_linear(x, tiles, scales[:4], None, 8, 16),
        lambda: ops.int4_linear(x, tiles, None, 8, 16, 12, True),
        lambda: ops.int4dq_linear(x, tiles, None, None, 8, 16, 32),
        lambda: ops.int4dq_linear(x, tiles, None, None, 8, 16, 48),
        lambda: ops.int4dq_repack(tiles[:, :8], torch.ones(1, 1), 16, 32),
        lambda: ops.int4dq_repack(tiles[:, :8], torch.ones(1, 1).half(), 16, 512),
        lambda: ops.float_linear(x, torch.randn(4, 15), None),
        lambda: ops.float_linear(x, torch.randn(4, 16).bfloat16(), None),
        lambda: ops.attention(*[torch.randn(1, 1, 4, 8)] * 3, torch.tensor([1])),
        lambda: ops.attention(*[torch.randn(1, 1, 4, 8)] * 3, torch.tensor([-1])),
        lambda: native.set_cpu_level("sse9"),
        lambda: native.set_cpu_level("sse9", emulated=True),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            call()


def test_fakes_give_the_same_shapes():
    x, bias, _ = make(3, 24, 40, torch.bfloat16)
    codes, packed = torch.zeros(24, 40, dtype=torch.int8), torch.zeros(24, 20, dtype=torch.uint8)
    params = torch.ones(24, 2, dtype=torch.bfloat16)
    tiles8, tiles4 = ops.int8_repack(codes), ops.int4_repack(packed, params, params, 40, 32)
    cache, start = torch.zeros(1, 2, 8, 16), torch.tensor([3])
    for op, args in (
        (ops.float_linear, (x, torch.zeros(24, 40).bfloat16(), bias)),
        (ops.int8_repack, (codes,)),
        (ops.int8_linear, (x, tiles8, bias, None, 24, 40)),
        (ops.int8dq_linear, (x, tiles8, bias, None, 24, 40)),
        (ops.int4_repack, (packed, params, params, 40, 32)),
        (ops.int4_linear, (x, tiles4, bias, 24, 40, 32, False)),
        (ops.int4dq_repack, (packed, params, 40, 32)),
        (ops.int4dq_linear, (x, ops.int4dq_repack(packed, params, 40, 32), None, bias, 24, 40, 32)),
        (ops.attention, (torch.zeros(1, 4, 2, 16), cache, cache, start)),
    ):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.default, args, test_utils=checks)


def test_read_bandwidth():
    assert native.read_bandwidth(1 << 20, 1) > 1e6


def load_with(**environment) -> subprocess.CompletedProcess:
    """What a command line does about the kernels, in a process of its own."""
    code = (
        "from backends import choose_kernels; from errors import cli; from kernels import native;"
        "cli(lambda: (choose_kernels('auto', 'cpu'), print(native.load(), native.loaded())))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        cwd=Path(__file__).parent.parent, env={**os.environ, **environment},
    )  # fmt: skip


def test_without_a_compiler_one_line_and_false():
    done = load_with(CXX="no-such-compiler")
    assert done.stdout.split() == ["False", "False"], done.stderr
    assert done.stderr.count("\n") == 1 and "compiler" in done.stderr


def test_a_compiler_that_fails_is_one_line_and_false(tmp_path):
    old = tmp_path / "old-g++"  # that knows its version, but not the flags
    old.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "error: no -mamx" >&2; exit 1; }\n')
    old.chmod(0o755)
    for compiler, reason in (("/bin/false", "exit status 1"), (str(old), "error: no -mamx")):
        done = load_with(CXX=compiler, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
        assert done.returncode == 0 and done.stdout.split() == ["False", "False"], done.stderr
        last = done.stderr.splitlines()[-1]
        assert f"{compiler} cannot build" in last and reason in last
        assert "Traceback" not in done.stderr and not list(tmp_path.glob("cache/*/*.o*"))


def test_float_models_find_the_kernels(library, tmp_path):
    """From Python, without a command line that chooses kernels."""
    source = save_tiny(tmp_path)[0]
    code = (
        "import sys; from checkpoint import load_model, open_checkpoint;"
        " from kernels import native; load_model(open_checkpoint(sys.argv[1]));"
        " assert native.loaded()"
    )
    subprocess.run(
        [sys.executable, "-c", code, source], check=True, cwd=Path(__file__).parent.parent
    )


def test_an_unknown_level_is_one_line():
    done = load_with(FLATLLAMA_CPU="foo")
    assert done.returncode == 2 and done.stderr.startswith("error: FLATLLAMA_CPU=foo: take one of")
    assert done.stderr.count("\n") == 1


def test_settled_weights_lie_one_after_another():
    layers = [Linear(128, 64, bias=False) for _ in range(3)]
    before = [layer.weight.detach().clone() for layer in layers]
    for layer in layers:
        native.to_huge_pages(layer)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
    places = [layer.weight.data_ptr() for layer in layers]
    assert all(p % 64 == 0 for p in places)
    assert 128 * 64 * 4 in {b - a for a, b in itertools.pairwise(places)}
    kept = layers[2].weight
    del layers, layer
    assert torch.equal(kept, before[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_between_the_products(level, dtype):
    """Against float64 of the same formulas, on slices, of sizes that no vector divides."""
    x, weight, _ = make(3 * 37, 51, 51, dtype)
    x, wide = x.view(3, 37, 51), x.view(3, 37, 51).double()
    norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    close(ops.rms_norm(x, weight, 1e-5), norm, dtype)
    gate, up = wide[..., :25], wide[..., 25:50]
    close(ops.silu_mul(x[..., :50]), gate * gate.sigmoid() * up, dtype)
    heads, angles = x[..., 1:41].unflatten(-1, (4, 10)), torch.randn(3, 37, 1, 5)  # [B, T, H, D]
    (a, b), cos, sin = heads.double().chunk(2, -1), angles.cos(), angles.sin()
    want = torch.cat([a * cos.double() - b * sin.double(), b * cos.double() + a * sin.double()], -1)
    close(ops.rotate(heads, cos, sin), want, dtype)
    shared = ops.rotate(heads, cos[:1], sin[:1])  # the same positions in every sequence
    assert torch.equal(
        shared, ops.rotate(heads, *(t[:1].expand(3, -1, -1, -1) for t in (cos, sin)))
    )
    for op, empty in (
        (lambda t: ops.rms_norm(t, weight, 1e-5), x[:0]),
        (ops.silu_mul, x[:0, :, :50]),
    ):
        assert op(empty).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 49152])
def test_greedy(dtype, size):
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    logits[2] = -logits[2].abs() - 1  # all of them negative
    assert torch.equal(ops.greedy(logits), logits.argmax(-1))
    logits[:, size // 2 :] = logits.amax() + 1  # the first of many equal ones
    assert ops.greedy(logits).tolist() == [size // 2] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size,k", [(1, 1), (63, 63), (1000, 7), (1000, 300), (49152, 200)])
def test_top_k(dtype, size, k):
    """The largest first; of equals, of which the second row has many, the first."""
    generator = torch.Generator().manual_seed(size + k)
    logits = torch.randn(3, size, generator=generator).to(dtype)
    logits[1] = logits[1].round() + 0  # no -0: as bits it is less than 0
    want = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(ops.top_k(logits, k), want)
    with pytest.raises(ValueError, match="largest of the rows"):
        ops.top_k(logits, size + 1)
