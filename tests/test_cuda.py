"""The Triton kernels without a GPU: interpreted, and compiled ahead of time to machine code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends import choose_kernels
from errors import UserError
from kernels import choice
from kernels.cuda.layout import lane_planes, sparse_columns
from kernels.packing import pack

ROOT = Path(__file__).resolve().parent.parent
SHARED = 99 * 1024  # bytes of shared memory that a program may have on every card from sm_80 on
COMPILED = [  # what inspect_kernels.py's `cases` calls them, rows of x
    *((name, 1) for name in ("bf16", "int8", "int8dq", "float8", "fp6", "int4 g64", "uint3 g64",
                             "codebook4 g64", "int4-sparse24 g128", "w4a8 g128")),
    *((name, 16) for name in ("int8", "int4 g64", "w4a8 g128")),
    ("bf16", 128), ("int4-sparse24 g128", 128),
    ("int4 g64", 1024), ("attention, bf16 cache", 1),
    ("attention, int8 cache", 512), ("attention's splits joined", 1),
]  # fmt: skip


@pytest.fixture
def setting():
    before = choice.kernels()
    yield
    choice.kernels(before)


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
        launch for what, r, launch in inspect_kernels.cases() if (what, r) == (name, rows)
    )
    if not inspect_kernels.compiles(launch, capability):
        pytest.skip("this GPU does not convert float8: its codes are taken apart as fpx-4-3's are")
    found = inspect_kernels.inspect(launch, capability)
    assert found["spilled_bytes"] == 0 and found["shared_bytes"] <= SHARED
    if launch.kernel.__name__ in ("matmul", "attend"):
        assert any(op.endswith("128") for op in found["weight_loads"])  # bits a load
    assert bool(found["tensor"]) == (launch.kernel.__name__ in ("matmul", "attend"))


def test_choice(setting):
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    for name in ("triton", "aten"):
        with pytest.raises(UserError, match="needs a GPU"):
            choose_kernels(name, "cpu")
    choose_kernels("inductor", "cpu")
    assert choice.kernels() == "inductor" and not choice.triton_on(torch.device("cpu"))
    with pytest.raises(ValueError):
        choice.kernels("fast")


def test_lanes():
    """Column 32 s + j of a chunk is code s of lane j, its bits in planes of 4, 2 and 1."""
    codes = torch.randint(0, 128, (3, 300))
    planes = lane_planes(pack(codes, 7), 7, 300)
    assert [p.dtype for p in planes] == [torch.int32, torch.int16, torch.int8]
    for column in (0, 31, 32, 255, 256, 299):
        chunk, rest = divmod(column, 256)
        slot, lane = divmod(rest, 32)
        four, two, one = (p[:, chunk * 32 + lane].long() for p in planes)
        low, middle = (four >> 4 * slot) & 15, (two >> 2 * slot) & 3
        assert torch.equal(low | middle << 4 | ((one >> slot) & 1) << 6, codes[:, column])
    assert [p is None for p in lane_planes(pack(codes % 8, 3), 3, 300)] == [True, False, False]


def test_sparse_columns():
    order = sparse_columns(torch.arange(256.0)).long()
    h, j, c = 1, 5, 3
    assert order[32 * (4 * h + c) + j] == 128 * h + 4 * j + c
    assert torch.equal(order.sort().values, torch.arange(256))
