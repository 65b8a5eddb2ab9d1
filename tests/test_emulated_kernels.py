"""The Triton kernels as compiled for GPUs, run by the emulator of scripts/ptx."""

import itertools
import random

import pytest
import torch

from kernels import choice
from tests import interpreted_kernels as cases
from tests.interpreted_kernels import BF16, FP16

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")


@pytest.fixture(params=[80, 90], ids=lambda capability: f"sm_{capability}")
def gpu(request, monkeypatch):
    """Whatever the kernels are asked to do on the CPU is run as that GPU would."""
    from scripts.ptx.run import emulate

    before = choice.chosen()
    choice.load_triton()
    from kernels.cuda import launch

    # `choice` then sends tensors on the CPU to Triton; the kernels are not told of an interpreter
    monkeypatch.setattr(choice, "interpreting", lambda: True)
    first = random.randrange(2**31)
    print("seed", first)  # pytest shows it where a test fails
    torch.manual_seed(first)
    seed = itertools.count(first)
    run = lambda self: emulate(self, request.param, next(seed))  # noqa: E731
    monkeypatch.setattr(launch.Launch, "run", run)
    choice.choose("triton")
    yield request.param
    choice.choose(before)


@pytest.mark.parametrize("name", cases.MAIN)
def test_products(name, gpu):
    cases.check(name, 300, 18, 1, BF16)
    if gpu == 80:
        cases.check(name, 300, 40, 20, BF16)
    else:
        cases.check(name, 100, 70, 5, FP16)


@pytest.mark.parametrize("name", ["int4", "int8", "int8dq", "fp6", "w4a8"])
def test_many_rows(name, gpu):
    cases.check(name, 300, 40, 100, BF16)


def test_float_weights(gpu):
    cases.test_float_weights()


@pytest.mark.parametrize("case", cases.ATTENTION[::2], ids=str)
def test_attention(case, gpu):
    cases.test_attention(case, BF16)
    cases.test_attention_int8_cache(case)


def test_attention_of_many_splits(gpu, monkeypatch):
    for case in (cases.MANY_SPLITS[1], cases.MANY_SPLITS[3]):
        cases.test_attention_of_many_splits(case, monkeypatch)


@pytest.mark.parametrize("name", ["int8dq", "w4a8"])
def test_whole_step(name, gpu):
    cases.test_whole_step(name, "int8" if gpu == 80 else "bf16")


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_attention_of_new_tokens(kind, gpu):
    cases.test_attention_of_new_tokens(cases.NEW_TOKENS[1], kind, BF16)


def test_between_products(gpu, monkeypatch):
    cases.test_between_products(monkeypatch)


def test_whole_step_bf16(gpu, monkeypatch):
    """On sm_90 with overlapping kernels: what they prefetch is there; here they end in turns."""
    from kernels.cuda import launch

    monkeypatch.setattr(launch, "dependent_launch", lambda: gpu >= 90)
    cases.test_whole_step_bf16(*(("fp6", "int8") if gpu == 80 else ("int4", "bf16")))
