"""generate.py: the command line, its JSON, chat, and mistakes. In this process, for speed."""

import io
import json
import sys

import pytest
import torch
from tiny import save_tiny

import generate
from errors import cli

KEYS = {
    "model", "mode", "device", "threads", "compile", "compile_mode", "batch_size",
    "prompt_tokens", "new_tokens", "compile_s", "time_to_first_token_s", "decode_tokens_per_s",
    "step_s", "weight_bytes", "bytes_per_token", "bandwidth_bytes_per_s",
    "read_bandwidth_bytes_per_s", "peak_memory_bytes", "recompiles", "texts", "token_ids",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """run(args...) -> (exit code, stdout, stderr) of generate.py on the CPU."""
    monkeypatch.setattr("generate.read_bandwidth", lambda device: 1e10)

    def call(*args):
        argv = ["generate.py", "--device", "cpu", "--precision", "fp32", *map(str, args)]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            cli(generate.main)
        except SystemExit as done:
            code = done.code
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def tiny(tmp_path):
    return save_tiny(tmp_path / "tiny", torch.bfloat16)[0]


def test_json_of_a_real_run(run, default_model, tmp_path):
    code, out, err = run(
        "--checkpoint_path", default_model, "--prompt", "Once upon a time", "--temperature", 0,
        "--max_new_tokens", 12, "--num_samples", 2, "--json", tmp_path / "g.json",
    )  # fmt: skip
    assert code == 0, err
    figures = json.loads((tmp_path / "g.json").read_text())
    assert set(figures) == KEYS
    assert figures["token_ids"][0] == figures["token_ids"][1]
    assert len(figures["token_ids"][0]) == 12 and figures["prompt_tokens"] == 4
    assert out.count("Once upon a time" + figures["texts"][0]) == 2
    # fp32 here; the tied table is read as the head, and every other weight once.
    assert figures["weight_bytes"] == 134515008 * 4
    cache = 30 * 2 * 3 * 64 * 4 * (4 + 11 / 2)
    assert abs(figures["bytes_per_token"] - figures["weight_bytes"] - cache) < 2
    assert {"mean", "std", "p50", "p99"} == set(figures["step_s"])


def test_synthetic_prompt_needs_no_tokenizer(run, tiny, tmp_path):
    code, _, err = run("--checkpoint_path", tiny, "--prompt", 70, "--max_new_tokens", 5,
                         "--batch_size", 3, "--json", tmp_path / "g.json")  # fmt: skip
    assert code == 0, err
    figures = json.loads((tmp_path / "g.json").read_text())
    assert figures["prompt_tokens"] == 70 and figures["new_tokens"] == [5, 5, 5]


def test_random_weights_and_quantization_on_load(run, tiny, tmp_path):
    for model in (["--random_weights", "tiny"], ["--checkpoint_path", tiny]):
        code, _, err = run(*model, "--prompt", 4, "--quantization", "int4", "--groupsize", 32,
                           "--max_new_tokens", 5, "--json", tmp_path / "g.json")  # fmt: skip
        assert code == 0, err
        assert json.loads((tmp_path / "g.json").read_text())["mode"] == "int4"


def test_chat_keeps_the_conversation(run, default_model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Say hello.\nAnd again.\n"))
    prompts = []
    original = generate.Engine.generate

    def spy(self, batch, *args):
        if len(batch[0]) > 1:  # not the warm-up
            prompts.append((self._shared_prefix(batch[0]), list(batch[0])))
        return original(self, batch, *args)

    monkeypatch.setattr("generate.Engine.generate", spy)
    code, out, err = run("--checkpoint_path", default_model, "--interactive", "--temperature", 0,
                         "--max_new_tokens", 12)  # fmt: skip
    assert code == 0, err
    assert len(prompts) == 2 and out.strip()
    shared, second = prompts[1]
    assert second[: len(prompts[0][1])] == prompts[0][1]  # the first turn is part of the second
    assert shared >= len(prompts[0][1])  # and is not run again


@pytest.mark.parametrize(
    "args, message",
    [
        (["--checkpoint_path", "nowhere"], "no checkpoint at nowhere"),
        (["--prompt", "text"], "token"),  # the tiny model has no tokenizer files
        (["--prompt", "70", "--cache_size", "64"], "do not fit a context of 64"),
        (["--prompt", "2000"], "context is 1024"),
        (["--prompt", "0"], "empty prompt"),
        (["--prompt", "5", "--max_new_tokens", "0"], "must be at least 1"),
        (["--prompt", "5", "--temperature", "-1"], "temperature"),
        (["--prompt", "5", "--device", "cuda:77"], "no device"),
        (["--prompt", "5", "--quantization", "int7"], "unknown mode"),
        (["--prompt", "5", "--quantization", "int4-gptq"], "calibrat"),
        (["--prompt", "5", "--threads", "0"], "--threads 0"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(run, tiny, args, message):
    if "--checkpoint_path" not in args:
        args = [*args, "--checkpoint_path", str(tiny)]
    code, _, err = run(*args)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last, err
    assert "Traceback" not in err


def test_vocabulary_that_does_not_match(run, tiny, default_model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny / name).write_bytes((default_model / name).read_bytes())
    code, _, err = run("--checkpoint_path", tiny, "--prompt", "Hello")
    assert code == 2 and "do not belong together" in err


def test_empty_prompt(run, default_model):
    code, _, err = run("--checkpoint_path", default_model, "--prompt", "", "--max_new_tokens", 2)
    assert code == 0, err  # SmolLM2 has a BOS token to start from
