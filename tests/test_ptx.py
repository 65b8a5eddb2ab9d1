"""The emulator of scripts/ptx, on kernels written by hand."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the emulator imports the Triton kernels' launches")

from scripts.ptx.memory import wavefronts
from scripts.ptx.numbers import EmulationError, round_bf16
from scripts.ptx.run import run

SHARED = 1024  # bytes


def kernel(body: str, threads: int = 32) -> str:
    """PTX that has thread number %r0 and, at %rd0 and %rd1, its words of `x` and `out`."""
    return f"""
.visible .entry by_hand(
    .param .u64 .ptr .global .align 1 x,
    .param .u64 .ptr .global .align 1 out
)
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<29>; .reg .b64 %rd<9>;
    mov.u32 %r0, %tid.x;  // comments go
    ld.param.b64 %rd2, [x];
    ld.param.b64 %rd3, [out];
    mad.wide.u32 %rd0, %r0, 4, %rd2;
    mad.wide.u32 %rd1, %r0, 4, %rd3;
    {body}
    ret;
}}
    // -- End function
"""


def results(body: str, x: torch.Tensor, threads: int = 32, seed: int = 0) -> torch.Tensor:
    """What the threads store at %rd1, int32."""
    out = torch.zeros(threads, dtype=torch.int32)
    run(kernel(body, threads), (1,), [x, out], SHARED, seed)
    return out


def unsigned(x: torch.Tensor) -> list[int]:
    return [value & 0xFFFFFFFF for value in x.tolist()]


def words() -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (32,), dtype=torch.int64).int()


@pytest.mark.parametrize(
    ("instruction", "truth"),
    [
        ("add.s32 %r2, %r1, %r0", lambda a, i: a + i),
        ("mul.hi.u32 %r2, %r1, 1431655766", lambda a, i: a * 1431655766 >> 32),
        ("mad.lo.s32 %r2, %r1, -3, %r0", lambda a, i: -3 * a + i),
        ("shr.u32 %r2, %r1, %r0", lambda a, i: a >> i),
        ("shl.b32 %r2, %r1, 33", lambda a, i: 0),
        ("shr.s32 %r2, %r1, 40", lambda a, i: -1 if a >> 31 else 0),
        ("bfe.u32 %r2, %r1, 5, %r0", lambda a, i: a >> 5 & (1 << i) - 1),
        ("bfe.s32 %r2, %r1, 28, 9", lambda a, i: (a >> 28) - 16 * (a >> 31)),
        ("prmt.b32 %r2, %r1, %r0, 0x5183",
         lambda a, i: a >> 24 | (0xFF00 if a & 0x80 else 0) | (a & 0xFF00) << 8),
        ("lop3.b32 %r2, %r1, %r0, 255, 0xEA", lambda a, i: a & i | 255),
        ("cvt.s64.s32 %rd4, %r1; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r2, %rd4",
         lambda a, i: -(a >> 31)),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1}",
         lambda a, i: a >> 16 | a << 16),
        ("mul.hi.s32 %r2, %r1, %r0", lambda a, i: (a - (a >> 31 << 32)) * i >> 32),
        ("shfl.sync.idx.b32 %r2, %r0, 7, 31, -1", lambda a, i: 7),
        ("ld.global.s8 %r2, [%rd0]", lambda a, i: (a & 255) - 2 * (a & 128)),
        ("mov.b32 %r2, 0; setp.lt.s32 %p1, %r0, 9; @!%p1 mov.b32 %r2, 1", lambda a, i: i >= 9),
        ("mov.b32 %r3, 0x7FC00000; setp.ne.f32 %p1, %r3, %r3; selp.b32 %r2, 1, 0, %p1",
         lambda a, i: 0),
        ("mov.b32 %r3, 0x7FC00000; max.NaN.f32 %r2, %r3, 0f00000000; and.b32 %r2, %r2, 0x7F800000",
         lambda a, i: 0x7F800000),
        ("mov.b32 %r3, 0x7FC00000; max.f32 %r2, %r3, 0f3F800000", lambda a, i: 0x3F800000),
        ("cvt.s32.s8 %r2, %r1", lambda a, i: (a & 255) - 2 * (a & 128)),
        ("setp.lt.s32 %p1, %r1, 0; selp.b32 %r2, 7, %r1, %p1", lambda a, i: 7 if a >> 31 else a),
        ("shfl.sync.bfly.b32 %r2, %r0, 5, 31, -1", lambda a, i: i ^ 5),
        ("{ .reg .b32 t<2>, %r9; mov.b32 t1, 3; add.s32 %r2, t1, %r0; }", lambda a, i: 3 + i),
    ],
)  # fmt: skip
def test_integers(instruction, truth):
    x = words()
    got = results(f"ld.global.b32 %r1, [%rd0]; {instruction}; st.global.b32 [%rd1], %r2;", x)
    assert unsigned(got) == [truth(a, i) & 0xFFFFFFFF for i, a in enumerate(unsigned(x))]


def test_rounding():
    x = torch.randn(1000)
    assert np.array_equal(round_bf16(x.double().numpy()), x.bfloat16().view(torch.uint16).numpy())
    ties = np.array([1 + 2**-8, 1 + 2**-8 + 2**-40, 1 + 3 * 2**-8 - 2**-40, -1 - 2**-8 - 2**-40])
    assert round_bf16(ties).tolist() == [0x3F80, 0x3F81, 0x3F81, 0xBF81]
    body = """
        mov.b32 %r1, 0x3F803F81; mov.b32 %r2, 0x33800000;
        fma.rn.bf16x2 %r3, %r1, %r1, %r2;
        st.global.b32 [%rd1], %r3;
    """
    got = results(body, words())
    assert got[0] == 0x3F803F82  # 1 + 2^-6 + 2^-14, and 1 + 2^-24: rounded once


def test_threads_that_part():
    """Thread i goes through the loop i times; then all meet again."""
    body = """
        mov.b32 %r2, 0; mov.b32 %r3, 0;
    $again:
        setp.ge.s32 %p1, %r3, %r0;
        @%p1 bra $done;
        add.s32 %r2, %r2, %r0; add.s32 %r3, %r3, 1;
        bra $again;
    $done:
        bar.sync 0;
        st.global.b32 [%rd1], %r2;
    """
    assert results(body, words()).tolist() == [i * i for i in range(32)]


def exchange(barrier: str) -> str:
    """A word of the other warp, through shared memory."""
    return f"""
        ld.global.b32 %r1, [%rd0];
        shl.b32 %r2, %r0, 2; mov.b32 %r3, global_smem; add.s32 %r4, %r3, %r2;
        st.shared.b32 [%r4], %r1;
        {barrier}
        xor.b32 %r5, %r2, 128; add.s32 %r5, %r3, %r5;
        ld.shared.b32 %r6, [%r5];
        st.global.b32 [%rd1], %r6;
    """


def test_a_missing_barrier_shows():
    x = torch.arange(64, dtype=torch.int32)
    want = x.view(2, 32).flip(0).flatten()
    for seed in range(8):
        assert torch.equal(results(exchange("bar.sync 0;"), x, 64, seed), want)
    assert any(not torch.equal(results(exchange(""), x, 64, seed), want) for seed in range(8))


def test_a_missing_wait_shows():
    copy = """
        shl.b32 %r2, %r0, 2; mov.b32 %r3, global_smem; add.s32 %r4, %r3, %r2;
        cp.async.ca.shared.global [ %r4 + 0 ], [ %rd0 + 0 ], 0x4, 0x4;
        cp.async.commit_group;
        {}
        ld.shared.b32 %r6, [%r4];
        st.global.b32 [%rd1], %r6;
    """
    x = words()
    for seed in range(8):
        assert torch.equal(results(copy.format("cp.async.wait_group 0;"), x, seed=seed), x)
    late = [results(copy.format("cp.async.wait_group 1;"), x, seed=seed) for seed in range(8)]
    assert any((y == -1).all() for y in late)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r1, [%rd0+4];", "outside of every tensor"),
        ("ld.global.b32 %r1, [%rd0+-4];", "outside of every tensor"),
        ("ld.global.b64 %rd4, [%rd0];", "no multiple of 8"),
        ("st.shared.b32 [1024], %r0; st.shared.b32 [2048], %r0;", "outside of every tensor"),
        ("setp.lt.s32 %p1, %r0, 3; @%p1 bra $on; bar.sync 0;\n$on:", "only a part of a warp"),
        ("setp.lt.s32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", "barrier"),
        ("popc.b32 %r1, %r0;", "not modelled: popc.b32"),
        ("add.sat.s32 %r1, %r0, %r0;", "not modelled: add.sat.s32"),
        ("mul.rz.f32 %r1, %r0, %r0;", "not modelled: mul.rz.f32"),
        ("bar.red.popc.u32 %r1, 0, %p1;", "not modelled"),
        ("prmt.b32.f4e %r1, %r0, %r0, %r0;", "not modelled"),
        ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.u8.s32 "
         "{%r1,%r1,%r1,%r1}, {%r1,%r1,%r1,%r1}, {%r1,%r1}, {%r1,%r1,%r1,%r1};", "not modelled"),
        ("setp.lt.s32 %p1, %r0, 3; @%p1 cp.async.wait_group 0;", "a part of a warp"),
    ],
)  # fmt: skip
def test_what_a_gpu_would_punish(body, message):
    with pytest.raises(EmulationError, match=message):
        results(body, torch.zeros(64, dtype=torch.int32), threads=64)


def test_atomics_and_partial_copies():
    """Each thread adds 3 to the first word; then copies of 2 bytes out of 4."""
    x = torch.zeros(32, dtype=torch.int32)
    old = results("atom.global.gpu.acq_rel.add.u32 %r1, [%rd2], 3; st.global.b32 [%rd1], %r1;", x)
    assert x[0] == 96 and old.sort().values.tolist() == list(range(0, 96, 3))
    body = """
        shl.b32 %r2, %r0, 2; mov.b32 %r3, global_smem; add.s32 %r4, %r3, %r2;
        cp.async.ca.shared.global [ %r4 + 0 ], [ %rd0 + 0 ], 0x4, 0x2;
        cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.b32 %r6, [%r4];
        st.global.b32 [%rd1], %r6;
    """
    x = words()
    assert unsigned(results(body, x)) == [value & 0xFFFF for value in unsigned(x)]


@pytest.mark.parametrize(
    ("shape", "kind", "k"),
    [("m16n8k16", "bf16", 16), ("m16n8k16", "f16", 16), ("m16n8k32", "s8", 32)],
)
def test_a_product_of_tiles(shape, kind, k):
    """Lane 4 g + t: rows g and g + 8 of a and of the sums, column g of b, by the ISA's figures."""
    if kind == "s8":
        a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((16, k), (k, 8)))
        c, to, end = torch.randint(-99, 99, (16, 8), dtype=torch.int32), "s32", ".satfinite"
    else:
        dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
        a, b, c = torch.randn(16, k).to(dtype), torch.randn(k, 8).to(dtype), torch.randn(16, 8)
        to, end = "f32", ""
    n = 4 // a.element_size()  # in a register
    lines = []
    for lane in range(32):
        g, t = divmod(lane, 4)
        left = [a[g + 8 * h, n * t + j :][:n] for j in (0, k // 2) for h in (0, 1)]
        right = [b[n * t + j :, g][:n] for j in (0, k // 2)]
        sums = [c[g + 8 * h, 2 * t + i].view(1) for h in (0, 1) for i in (0, 1)]
        parts = [p.contiguous().view(torch.int32) for p in (*left, *right, *sums)]
        lines.append(torch.cat([*parts, torch.zeros(6, dtype=torch.int32)]))  # 16 words
    body = f"""
        shl.b32 %r20, %r0, 6; cvt.u64.u32 %rd4, %r20; add.s64 %rd5, %rd2, %rd4;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd5];
        ld.global.v2.b32 {{%r5, %r6}}, [%rd5+16];
        ld.global.v2.b32 {{%r7, %r8}}, [%rd5+24]; ld.global.v2.b32 {{%r9, %r10}}, [%rd5+32];
        mma.sync.aligned.{shape}.row.col{end}.{to}.{kind}.{kind}.{to}
            {{%r11, %r12, %r13, %r14}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}},
            {{%r7, %r8, %r9, %r10}};
        shl.b32 %r20, %r0, 4; cvt.u64.u32 %rd4, %r20; add.s64 %rd5, %rd3, %rd4;
        st.global.v4.b32 [%rd5], {{%r11, %r12, %r13, %r14}};
    """
    out = torch.zeros(32, 4, dtype=torch.int32)
    run(kernel(body), (1,), [torch.stack(lines), out], 0)
    want = a.double() @ b.double() + c.double()
    y = torch.empty(16, 8, dtype=torch.float64)
    for lane in range(32):
        g, t = divmod(lane, 4)
        y[g, 2 * t : 2 * t + 2], y[g + 8, 2 * t : 2 * t + 2] = out[lane].view(c.dtype).view(2, 2)
    assert (y - want).abs().max() <= (0 if kind == "s8" else 1e-5)


def test_wavefronts():
    lane, everyone = np.arange(32), np.ones(32, bool)
    assert wavefronts(4 * lane, everyone, 4) == 1
    assert wavefronts(0 * lane, everyone, 4) == 1  # one word for all
    assert wavefronts(8 * lane, everyone, 4) == 2
    assert wavefronts(128 * lane, everyone, 4) == 32
    assert wavefronts(128 * lane, lane < 3, 4) == 3
    assert wavefronts(16 * lane, everyone, 16) == 4
    assert wavefronts(128 * lane, everyone, 16) == 32
