"""Exported packages: the same tokens as the model itself, and one line for what does not fit."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_text import save_tiny_with_tokenizer

from config import CONFIGS
from engine import Engine
from errors import UserError
from kernels import choice
from modes import parse_mode
from package import Package, compiler_said, write_package
from random_weights import random_model
from sampling import Sampling

ROOT = Path(__file__).parent.parent
PROMPT = list(range(5, 45))
SAMPLED = Sampling(temperature=1.0, top_k=50)


def make_engine(sampling: Sampling, kv_cache: str = "int8", seed: int = 3, **settings) -> Engine:
    mode = parse_mode("int4", 32)
    model = random_model(CONFIGS["tiny"], mode, "cpu", torch.float32, seed=seed)
    return Engine(model, sampling, **{"length": 64, "kv_cache": kv_cache, **settings})


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package of the tiny model that needs no compiler to run: Inductor's kernels only."""
    choice.choose("inductor")
    path = tmp_path_factory.mktemp("package") / "tiny.pt2"
    write_package(make_engine(Sampling(temperature=0)), path, print)
    yield path
    choice.choose("auto")


def run(engine: Engine) -> list[int]:
    return engine.generate([PROMPT], 20).token_ids[0]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), SAMPLED])
def test_same_tokens_on_other_weights(package, sampling):
    """One package serves any weights of its shape, and any sampling."""
    opened = Package(package)
    opened.check(torch.device("cpu"), 1, "int8")
    for seed in (3, 4):
        expected = run(make_engine(sampling, seed=seed))
        engine = make_engine(sampling, seed=seed)
        opened.drive(engine)
        calls = []
        engine.model.register_forward_hook(lambda *args, calls=calls: calls.append(args))
        assert run(engine) == expected and not calls


def test_what_does_not_fit_is_refused(package, tmp_path, monkeypatch):
    opened = Package(package)
    for device, batch, kv_cache in (("cpu", 2, "int8"), ("cpu", 1, "bf16")):
        with pytest.raises(UserError, match=r"was exported for .*run scripts/export.py again"):
            opened.check(torch.device(device), batch, kv_cache)
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    with pytest.raises(UserError, match=r"exported for torch .* here it is 2\.0\.0"):
        opened.check(torch.device("cpu"), 1, "int8")
    with pytest.raises(UserError, match="another model, or another mode"):
        opened.drive(make_engine(SAMPLED, kv_cache="bf16"))
    engine = make_engine(SAMPLED)
    engine.model.config = dataclasses.replace(engine.model.config, norm_eps=1e-3)
    with pytest.raises(UserError, match="another model, or another mode"):
        opened.drive(engine)
    whole = package.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for name, content in (("absent.pt2", None), ("text.pt2", b"text"), ("half.pt2", whole[:5000]),
                          ("flipped.pt2", bytes(flipped))):  # fmt: skip
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            Package(tmp_path / name)


def test_what_the_compiler_says_is_one_line():
    text = """CppCompileError: C++ compile error

    Output:
    In file included from header.hpp:1:
    device_utils.h:15:10: fatal error: cuda.h: No such file or directory
    compilation terminated."""
    said = compiler_said(text)
    assert "\n" not in said and "cuda.h: No such file" in said and "CUDA_HOME" in said
    said = compiler_said(text.replace("cuda.h", "omp.h"))
    assert "omp.h: No such file" in said and "CUDA" not in said


def test_refuses_weights_that_changed(package):
    engine = make_engine(SAMPLED)
    Package(package).drive(engine)
    assert run(engine)
    engine.model.unfuse()
    with pytest.raises(ValueError, match="drive it again"):
        run(engine)


def call(script, *arguments):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_lines(tmp_path):
    """With the kernels that a user gets."""
    directory, out = save_tiny_with_tokenizer(tmp_path / "tiny")[0], tmp_path / "tiny.pt2"
    flags = ["--checkpoint_path", directory, "--device", "cpu"]
    done = call("scripts/export.py", *flags, "--cache_size", 64, "--output", out)
    assert done.returncode == 0, done.stderr
    texts = []
    for package in ([], ["--package", out]):
        done = call("generate.py", *flags, *package, "--prompt", "The", "--max_new_tokens", 12,
                    "--json", tmp_path / "figures.json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures["package"] == (str(out) if package else None)
        texts.append(figures["texts"])
    assert texts[0] == texts[1]
    for extra in (["--compile"], ["--prompt_lookup"], ["--cache_size", 64]):
        done = call("generate.py", *flags, "--package", out, *extra)
        assert done.returncode == 2 and f"leave {extra[0]} out" in done.stderr
    done = call("generate.py", *flags, "--package", out, "--kernels", "inductor")
    assert done.returncode == 2 and "--kernels inductor does not load" in done.stderr
    done = call("generate.py", *flags, "--package", out, "--max_new_tokens", 100)
    assert done.returncode == 2 and "context of 64" in done.stderr
