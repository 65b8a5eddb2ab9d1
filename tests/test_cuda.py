"""The Triton kernels without a GPU: interpreted, and compiled ahead of time to machine code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends import choose_kernels
from errors import UserError
from kernels import choice
from kernels.cuda.layout import PIECES, lane_planes
from kernels.fpx import float_values
from kernels.packing import pack

ROOT = Path(__file__).resolve().parent.parent
FLOATS = [(e, m) for e in range(2, 6) for m in range(1, 8 - e)]  # exponent and mantissa bits
COMPILED = [  # what inspect_kernels.py's `cases` calls them, rows of x
    *((name, 1) for name in ("bf16", "int8", "float8", "fp6", "int4 g64", "uint3 g64",
                             "codebook4 g64", "int8dq-int4 g128", "w4a8 g128")),
    *((name, 16) for name in ("int8", "int4 g64", "w4a8 g128")),
    ("bf16", 128), ("int8dq", 128), ("uint3 g64", 128),
    ("int4 g64", 1024), ("embedding", 1), ("attention of a step, int8 cache", 1),
    ("norm, inputs quantized, symmetric", 1), ("inputs quantized, float8", 128),
    ("bf16, normed and gated", 1), ("int4 g64, normed and gated", 1), ("int4 g64, residual", 16),
    ("attention, bf16 cache", 1), ("attention, int8 cache", 512),
    *((name, 128) for name in ("norm", "rotary embedding", "into the cache, bf16",
                               "into the cache, int8", "silu times up")),
]  # fmt: skip


@pytest.fixture
def setting():
    before = choice.chosen()
    yield
    choice.choose(before)


def test_against_the_references_under_the_interpreter():
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/interpreted_kernels.py"], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "rows"), COMPILED)
def test_machine_code(name, rows, capability):
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    from scripts import inspect_kernels

    choice.load_triton()
    launch = next(
        launch for what, r, launch in inspect_kernels.cases(capability) if (what, r) == (name, rows)
    )
    if not inspect_kernels.compiles(launch, capability):
        pytest.skip("this GPU does not convert float8: its codes are taken apart as fpx-4-3's are")
    found = inspect_kernels.inspect(launch, capability)
    assert found["shared_bytes"] <= inspect_kernels.SHARED[capability]
    assert found["spilled_bytes"] <= (64 if launch.constants.get("BLOCK_N") == 256 else 0)
    if launch.kernel.__name__ in ("matmul", "attend"):
        assert any(op.endswith("128") for op in found["weight_loads"])  # bits a load
    if launch.kernel.__name__ == "matmul" and rows <= 16 and launch.constants["KIND"] != "table":
        assert not any(op.startswith("LDG.") for op in found["loop"])  # everything is loaded ahead
    assert bool(found["tensor"]) == (launch.kernel.__name__ in ("matmul", "attend"))


@pytest.mark.parametrize("capability", [89, 100, 120])
def test_other_gpus_take_the_kernels(capability):
    """Compiled, and with no more shared memory than these have."""
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    from scripts import inspect_kernels

    choice.load_triton()
    wanted = {("int4 g64", 1), ("int8", 16), ("float8", 1), ("uint7 g64", 128), ("int4 g64", 128),
              ("w4a8 g128", 128), ("bf16", 128), ("attention of a step, bf16 cache", 16),
              ("attention, bf16 cache", 512), ("norm", 128)}  # fmt: skip
    for what, rows, launch in inspect_kernels.cases(capability):
        if (what, rows) in wanted:
            wanted.remove((what, rows))
            compiled = launch.compile(capability)
            assert compiled.metadata.shared <= inspect_kernels.SHARED[capability], what
    assert not wanted


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        *((rows, torch.float16) for rows in (1, 16, 64, 511)),
        (1, torch.float32),
        (64, torch.float32),
    ],
)
def test_machine_code_of_other_types(rows, dtype):
    """On a card with the least shared memory, where fp32 takes twice as much of it."""
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    from scripts import inspect_kernels

    choice.load_triton()
    names = ("int4 g64", "uint7 g64", "fp6", "codebook4 g64")
    for name in names if dtype == torch.float16 else names[:2]:
        launch = inspect_kernels.product_launch(name, rows, 86, dtype)
        found = inspect_kernels.inspect(launch, 86)
        assert launch.options["num_stages"] > 0
        assert found["shared_bytes"] <= inspect_kernels.SHARED[86]
        if dtype == torch.float16 and name != "codebook4 g64":  # its largest tile spills
            assert found["spilled_bytes"] == 0


@pytest.mark.parametrize(
    "name", ["int4 g64", "uint3 g64", "embedding", "attention of a step, bf16 cache",
             "attention, bf16 cache", "norm", "rotary embedding", "silu times up"],
)  # fmt: skip
def test_dependent_launch(name, setting):
    """Before the kernel in front has ended, only weights are asked for; others see no waiting."""
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    from scripts import inspect_kernels

    choice.load_triton()
    for kernels in ("triton", "triton-pdl"):
        choice.choose(kernels)
        launch = next(launch for what, _, launch in inspect_kernels.cases(90) if what == name)
        _, lines = inspect_kernels.disassemble(launch.compile(90).asm["cubin"])
        opcodes = inspect_kernels.opcodes(lines)
        early = kernels == "triton-pdl"
        assert launch.options["launch_pdl"] == early == ("ACQBULK" in opcodes)
        if early:
            before = [op for op in opcodes[: opcodes.index("ACQBULK")] if op.startswith("LD")]
            assert all(op.startswith(("LDC", "LDS")) for op in before)
            assert opcodes.index("PREEXIT") > opcodes.index("ACQBULK")
            fetched = any(op.startswith("CCTL.E.PF2") for op in opcodes)
            assert fetched == (launch.kernel.__name__ == "matmul")


def test_splits_are_counted_once_they_are_stored():
    """By all threads: a barrier stands between the last store and the count, and one behind it."""
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    from scripts import inspect_kernels

    choice.load_triton()
    launches = [inspect_kernels.attention_launch(1, torch.bfloat16, fresh=True)]
    launches += [inspect_kernels.product_launch("int4 g64", rows, 90) for rows in (1, 64)]
    for launch in launches:
        assert launch.constants["SPLITS"] > 1
        ptx = launch.compile(90).asm["ptx"]
        found = re.findall(r"\b(st\.global|ld\.global|bar\.sync|atom\.[\w.]+)", ptx)
        (count,) = (i for i, op in enumerate(found) if op.startswith("atom."))
        assert found[count].startswith("atom.global.gpu.acq_rel.add")
        assert found[count - 1] == found[count + 1] == "bar.sync"


def test_old_gpus_are_refused(setting, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for name in ("auto", "triton"):
        with pytest.raises(UserError, match=r"capability 8\.0: take --kernels inductor"):
            choose_kernels(name, "cuda")
    choose_kernels("inductor", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    choose_kernels("triton", "cuda")


def test_choice(setting):
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    for name in ("triton", "triton-pdl", "aten"):
        with pytest.raises(UserError, match="needs a GPU"):
            choose_kernels(name, "cpu")
    choose_kernels("inductor", "cpu")
    assert choice.chosen() == "inductor" and not choice.triton_on(torch.device("cpu"))
    with pytest.raises(ValueError):
        choice.choose("fast")


def test_lanes():
    """Column 32 s + j of a chunk is code s of lane j; whole codes in each word, then the rest."""
    for bits, worked in (
        (3, lambda a, b, c, d, e, f, g, h: (
            None,
            a | b << 3 | c << 6 | d << 9 | e << 12 | (h & 1) << 15,
            f | g << 3 | (h >> 1) << 6,
        )),
        (7, lambda a, b, c, d, e, f, g, h: (
            a | b << 7 | (h & 3) << 14 | c << 16 | d << 23 | (h >> 2 & 3) << 30,
            e | f << 7 | (h >> 4 & 3) << 14,
            g | (h >> 6) << 7,
        )),
    ):  # fmt: skip
        codes = torch.randint(0, 2**bits, (3, 300))
        planes = lane_planes(pack(codes, bits), bits, 300)
        padded = torch.cat([codes, torch.zeros(3, 212, dtype=torch.int64)], 1)
        lanes = padded.unflatten(1, (2, 8, 32)).unbind(2)  # 8 of [3, 2, 32]
        dtypes = (torch.int32, torch.int16, torch.int8)
        for plane, want, dtype in zip(planes, worked(*lanes), dtypes, strict=True):
            if want is None:
                assert plane is None
            else:
                assert plane.dtype == dtype and torch.equal(plane, want.flatten(1).to(dtype))


@pytest.mark.parametrize("bits", range(1, 8))
def test_pieces(bits):
    """Every bit of a lane belongs to one code; no piece crosses from one word into another."""
    used = [bit for code in PIECES[bits] for plane, first, width in code
            for bit in ((plane, first + i) for i in range(width))]  # fmt: skip
    sizes = [size if bits & digit else 0 for digit, size in ((4, 32), (2, 16), (1, 8))]
    assert sorted(used) == [(plane, i) for plane, size in enumerate(sizes) for i in range(size)]
    for code in PIECES[bits]:
        assert sum(width for _, _, width in code) == bits
        assert all(first // 16 == (first + width - 1) // 16 for _, first, width in code)


def floats(register: int, dtype: torch.dtype) -> torch.Tensor:
    """The two halves of a 32-bit register, the low one first, fp64."""
    halves = torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.int32)
    return halves.to(torch.uint16).view(dtype).double()


def run_asm(asm: str, registers: dict[str, int]) -> int:
    """What the asm of tiles.py leaves in $0."""
    from tests.test_ptx import results

    moves = "".join(f"mov.b32 {name}, {value};" for name, value in registers.items())
    body = re.sub(r"\$(\d)", r"%r1\1", moves + asm) + "st.global.b32 [%rd1], %r10;"
    return results(body, torch.zeros(32, dtype=torch.int32))[0].item() & 0xFFFFFFFF


def pair_registers(codes: torch.Tensor, bits: int) -> dict[str, int]:
    """What two neighbouring lanes' codes [16] (a lane's 8, then the next's) make of $1 to $4."""
    if bits == 8:
        planes = [codes[::8].to(torch.int8)[None], None, None]
    else:
        columns = torch.zeros(1, 256, dtype=torch.uint8)
        columns[0, ::32], columns[0, 1::32] = codes[:8], codes[8:]
        planes = lane_planes(pack(columns, bits), bits, 256)
    fours, twos, ones = ([0, 0] if p is None else [n.item() for n in p[0, :2]] for p in planes)
    words = [fours, [lane >> 16 for lane in fours], twos, ones]
    halves = [(a & 0xFFFF) | (b & 0xFFFF) << 16 for a, b in words]
    return dict(zip(("$1", "$2", "$3", "$4"), halves, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_asm_of_pairs(dtype):
    """The PTX that decodes codes in pairs, which the interpreter does not run, step by step."""
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    import triton.language as tl

    from kernels.cuda.pairs import pair_asm, pair_base

    name = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    base = pair_base.fn("integer", name)
    floats_below_8 = [(e, m) for e, m in FLOATS if e < 5 or dtype == torch.bfloat16]
    kinds = [("integer", bits, 0, None) for bits in range(1, 8)]
    kinds += [("float", 1 + e + m, e, float_values(e, m)) for e, m in floats_below_8]
    for kind, bits, exponent, values in kinds:
        for slot in range(8 if bits < 8 else 1):
            codes = torch.randint(0, 2**bits, (16,), dtype=torch.uint8)
            registers = pair_registers(codes, bits)
            pair = codes[[slot, slot + 8]].long()
            want = pair.double() + base if kind == "integer" else values[pair].double()
            asm = pair_asm.fn(kind, bits, exponent, slot, name)
            y = floats(run_asm(asm, registers), dtype)
            assert torch.equal(y, want), (kind, bits, slot)


def register(value: torch.Tensor) -> int:
    """A 16-bit number in both halves."""
    return value.view(torch.uint16).item() * 0x10001


def test_asm_of_quads():
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    from kernels.cuda.pairs import quad_asm

    for slot in range(8):
        codes = torch.randint(0, 16, (2, 16), dtype=torch.uint8)
        codes[0, slot] = 0  # -8 times the largest scale, -127
        first, second = (pair_registers(c, 4)["$2" if slot >= 4 else "$1"] for c in codes)
        quad = codes[:, [slot, slot + 8]].flatten().double() - 8
        for scale in (None, 1.0, 15.875, 2.5, torch.rand(()).item() * 15):
            registers = {"$1": first, "$2": second}
            want = quad
            if scale is not None:
                half = torch.tensor(scale).half()
                registers |= {"$3": register(half), "$4": register(half)}
                want = (quad * half.double()).round()
            y = run_asm(quad_asm.fn(slot, scale is not None), registers)
            y = torch.tensor(list(y.to_bytes(4, "little")), dtype=torch.uint8).view(torch.int8)
            assert torch.equal(y.double(), want), (slot, scale)


def test_asm_of_scaled_pairs():
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    import triton.language as tl

    from kernels.cuda.pairs import pair_asm

    for bits in range(1, 8):
        for slot, mid in ((0, 2 ** (bits - 1)), (7, 2 ** (bits - 1))):
            codes = torch.randint(0, 2**bits, (16,), dtype=torch.uint8)
            pair = codes[[slot, slot + 8]].double()
            scale, zero = torch.rand(2).bfloat16() / 10
            integer = torch.randint(0, 2**bits, ()).bfloat16()
            for kind, stored, want in (
                ("none", zero, (pair - mid) * scale.double()),
                ("float", zero, (pair - mid) * scale.double() + zero.double()),
                ("int", integer + 128, (pair - integer.double()) * scale.double()),
            ):
                registers = pair_registers(codes, bits)
                registers |= {"$5": register(scale), "$6": register(stored)}
                asm = pair_asm.fn("integer", bits, 0, slot, tl.bfloat16, mid, kind)
                y = floats(run_asm(asm, registers), torch.bfloat16)
                assert torch.equal(y, want.bfloat16().double()), (kind, bits, slot)


def test_busy(monkeypatch):
    """Of a tile of 64 rows of 32 lanes of 4 bytes, 8192 bytes, by two warps."""
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    from scripts import inspect_kernels

    choice.load_triton()
    launch = inspect_kernels.product_launch("int4 g64", 1, 90)
    assert launch.options["num_warps"] == 2 and launch.constants["BLOCK_N"] == 64
    monkeypatch.setattr(inspect_kernels, "loop_wavefronts", lambda launch, capability: 100)
    loop = ["HMMA.16816.F32.BF16"] * 10 + ["LOP3.LUT"] * 30 + ["IMAD.WIDE"] * 20 + ["LDSM.16"] * 40
    shares = inspect_kernels.busy(launch, 90, loop)
    time = 8192 / inspect_kernels.BYTES_A_CYCLE  # cycles
    want = {"issue": 2 * 100 / 4, "integer": 2 * 30 / 2, "shared": 100, "tensor": 2 * 10 * 1.7}
    assert shares == pytest.approx({name: cycles / time for name, cycles in want.items()})


def test_simulated_loop():
    """One warp alone: stalls and a scoreboard; four warps: the integer unit of each scheduler."""
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    from scripts.simulate_loop import BRANCH, LATENCY, Line, Multiprocessor

    load = Line("LDS.64", 2, sets=0, sets_when_read=7, waits=0)
    use = Line("FFMA", 4, sets=7, sets_when_read=7, waits=1)
    alone = Multiprocessor([load, use], 1, 1).cycles_a_turn()
    assert abs(alone - (2 + LATENCY["LDS"] + BRANCH)) <= 3
    logic = Line("LOP3.LUT", 1, sets=7, sets_when_read=7, waits=0)
    for warps, cycles in ((1, 200 + BRANCH), (4, 200 + BRANCH), (8, 400), (16, 800)):
        turn = Multiprocessor([logic] * 100, warps, 1).cycles_a_turn()
        assert turn == pytest.approx(cycles, rel=0.1)


def test_splits():
    """All chunks once; more programs where multiprocessors would wait, else not."""
    pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
    from kernels.cuda.linear import MAX_SPLITS, splits

    for programs in (1, 7, 64, 448, 2004):
        for chunks in (1, 2, 16, 56, 1000):
            count, each = splits(programs, chunks, 2, 0.1, 132)
            assert 1 <= count <= MAX_SPLITS and (count - 1) * each < chunks <= count * each
    assert splits(64, 16, 2, 0.1, 132)[0] > 1  # half of them would have nothing to do
    assert splits(448, 16, 2, 0.1, 132)[0] > 1  # 3.4 each: some would have 4
    assert splits(2004, 16, 2, 0.1, 132)[0] == 1
    assert splits(64, 16, 2, 100, 132)[0] == 1
