"""generate.py: the command line, its JSON, chat, and mistakes. In this process, for speed."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from tiny_text import save_tiny_with_tokenizer

import generate
import generate_report
from checkpoint import open_checkpoint
from checkpoint_quantizer import CheckpointQuantizer
from engine import Result
from errors import cli
from modes import FLOAT_MODES, parse_mode

KEYS = {
    "model", "mode", "package", "device", "threads", "compile", "compile_mode", "compiled",
    "batch_size", "cuda_graphs_skipped",
    "prompt_tokens", "new_tokens", "compile_s", "time_to_first_token_s", "decode_tokens_per_s",
    "kernels", "layers", "precision", "exact_activations", "step_s", "weight_bytes",
    "bytes_per_token", "bandwidth_bytes_per_s", "read_bandwidth_bytes_per_s",
    "peak_memory_bytes", "recompiles", "texts", "token_ids",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """run(args...) -> (exit code, stdout, stderr) of generate.py on the CPU."""
    monkeypatch.setattr("generate_report.read_bandwidth", lambda device: 1e10)

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


def test_a_single_token_has_no_decode_speed(run, tiny):
    code, _, err = run("--checkpoint_path", tiny, "--prompt", 5, "--max_new_tokens", 1)
    assert code == 0 and "time to first token" in err and "nan" not in err


def test_random_weights_and_quantization_on_load(run, tiny, tmp_path):
    for model in (["--random_weights", "tiny"], ["--checkpoint_path", tiny]):
        code, _, err = run(*model, "--prompt", 4, "--quantization", "int4", "--groupsize", 32,
                           "--max_new_tokens", 5, "--json", tmp_path / "g.json")  # fmt: skip
        assert code == 0, err
        figures = json.loads((tmp_path / "g.json").read_text())
        assert figures["mode"] == "int4" and figures["layers"] == {"int4.g32": 8, "int8": 1}


def test_chat_keeps_the_conversation(run, default_model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Say hello.\nAnd again.\n"))
    prompts = []
    original = generate.Engine.generate

    def spy(self, batch, *args):
        if len(batch[0]) > 1:  # not the warm-up
            prompts.append((self.shared_prefix(batch[0]), list(batch[0])))
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
        (["--prompt", "5", "--batch_size", "9999999"], "GB are free"),
        (["--prompt", "70", "--cache_size", "0"], "--cache_size 0: must be at least 1"),
        (["--prompt", "2000"], "context is 1024"),
        (["--prompt", "5", "--seed", str(2**64)], "takes 64 bits"),
        (["--prompt", "0"], "empty prompt"),
        (["--prompt", "5", "--max_new_tokens", "0"], "must be at least 1"),
        (["--prompt", "5", "--temperature", "-1"], "temperature"),
        (["--prompt", "5", "--temperature", "nan"], "temperature"),
        (["--prompt", "5", "--temperature", "1e-39"], "at least 1e-5"),
        (["--prompt", "9" * 30], "no cache holds so many"),
        (["--interactive", "--ignore_eos"], "leave --ignore_eos out"),
        (["--prompt", "5", "--temperature", "inf"], "temperature"),
        (["--prompt", "5", "--device", "cuda:77"], "no device"),
        (["--prompt", "5", "--quantization", "int7"], "unknown mode"),
        (["--prompt", "5", "--quantization", "int4-gptq"], "calibrat"),
        (["--prompt", "5", "--threads", "0"], "--threads 0"),
        (["--prompt", "5", "--threads", "100000"], "--threads 100000: take 1 to"),
        (["--prompt", "5", "--quantization", "fp16"], "take one"),  # and --precision fp32
        (["--prompt", "5", "--groupsize", "64"], "--groupsize"),
        (["--prompt", "5", "--compile_prefill"], "goes with --compile"),
        (["--prompt", "5", "--compile_mode", "default"], "goes with --compile"),
        (["--prompt", "5", "--prompts", "file"], "take one of them"),
        (["--interactive", "--prompt", "5"], "leave --prompt out"),
        (["--interactive", "--num_samples", "2"], "leave --num_samples out"),
        (["--prompt", "5", "--random_weights", "tiny"], "take one of them"),
        (["--prompt", "5", "--json", "absent/out.json"], "cannot write"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(run, tiny, args, message):
    if "--checkpoint_path" not in args:
        args = [*args, "--checkpoint_path", str(tiny)]
    code, _, err = run(*args)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last, err
    assert "Traceback" not in err


def test_outputs_never_replace_inputs(run, tiny, tmp_path, monkeypatch):
    flags = ["--checkpoint_path", tiny, "--prompt", 5, "--max_new_tokens", 3]
    weights = (tiny / "model.safetensors").read_bytes()
    os.mkfifo(tmp_path / "fifo")
    with monkeypatch.context() as patch:
        patch.setattr(os, "devnull", str(tmp_path / "fifo"))  # refused too: it would be replaced
        for outputs in (
            ["--json", tiny / "model.safetensors"],
            ["--profile", tiny / "config.json"],
            ["--profile", tmp_path / "fifo"],
            ["--json", tmp_path / "x", "--profile", tmp_path / "x"],
        ):
            code, _, err = run(*flags, *outputs)
            assert code == 2 and "cannot write" in err
    assert (tiny / "model.safetensors").read_bytes() == weights


def test_a_trace_is_there_or_an_error(run, tiny, tmp_path, monkeypatch):
    flags = ["--checkpoint_path", tiny, "--prompt", 5, "--max_new_tokens", 3]
    flags += ["--profile", tmp_path / "trace.json", "--json", "/dev/null"]
    with monkeypatch.context() as patch:  # as torch does it on a full disk
        half = lambda _, path: Path(f"{path}.tmp").write_text("{")  # noqa: E731
        patch.setattr(torch.profiler.profile, "export_chrome_trace", half)
        code, _, err = run(*flags)
    assert code == 2 and "is the disk full" in err and not list(tmp_path.glob(".*"))
    assert run(*flags)[0] == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert not list(tmp_path.glob(".*"))


def test_rows_that_have_ended_make_no_tokens():
    """Row 0 said three tokens and then EOS, row 1 one; the fourth step was made in vain."""
    result = Result([[5, 6, 7], [5]], 2, 0.1, [0.1] * 4)
    assert generate_report.live_rows(result) == [2, 1, 1, 0]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_float_mode_is_the_dtype(run, tiny, tmp_path, monkeypatch, name):
    out, load, dtypes = tmp_path / "out.json", generate.load, []

    def spied(**flags):
        model, *rest = load(**flags)
        dtypes.append(model.layers[0].attention.wo.weight.dtype)
        return model, *rest

    monkeypatch.setattr(generate, "load", spied)
    flags = ["--checkpoint_path", tiny, "--precision", name, "--quantization", name]
    assert run(*flags, "--prompt", "5", "--max_new_tokens", 3, "--json", out)[0] == 0
    assert json.loads(out.read_text())["mode"] == name
    assert dtypes == [FLOAT_MODES[name]]


def test_mode_of_a_file_run_in_another_precision(run, tiny, tmp_path):
    mode = parse_mode("fp16")
    CheckpointQuantizer(open_checkpoint(tiny), mode, mode, tmp_path / "fp16").run()
    for path in (tiny, tmp_path / "fp16"):
        args = ("--checkpoint_path", path, "--prompt", 5, "--max_new_tokens", 3)
        assert run(*args, "--json", tmp_path / "out.json")[0] == 0
        assert json.loads((tmp_path / "out.json").read_text())["mode"] == "fp32"


def test_fp64_is_refused(run, tmp_path):
    tiny = save_tiny(tmp_path / "tiny", torch.float64)[0]
    code, _, err = run("--checkpoint_path", tiny, "--prompt", 5)
    assert code == 2 and "only fp32, fp16 and bf16" in err.splitlines()[-1]


def test_vocabulary_that_does_not_match(run, tiny, default_model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny / name).write_bytes((default_model / name).read_bytes())
    code, _, err = run("--checkpoint_path", tiny, "--prompt", "Hello")
    assert code == 2 and "do not belong together" in err


def test_empty_prompt(run, default_model):
    code, _, err = run("--checkpoint_path", default_model, "--prompt", "", "--max_new_tokens", 2)
    assert code == 0, err  # SmolLM2 has a BOS token to start from


def test_speculation_gives_the_same_text(run, tmp_path):
    """Prompt lookup and a draft, through the command line; the acceptance is in the JSON."""
    tiny = save_tiny_with_tokenizer(tmp_path / "tiny")[0]
    flags = ["--checkpoint_path", tiny, "--prompt", "one two three one two three one two three",
             "--temperature", 0, "--max_new_tokens", 60, "--ignore_eos",
             "--json", tmp_path / "g.json"]  # fmt: skip
    texts = []
    for extra in ([], ["--prompt_lookup"], ["--draft_checkpoint_path", tiny, "--speculate_k", 3]):
        code, out, err = run(*flags, *extra)
        assert code == 0, err
        figures = json.loads((tmp_path / "g.json").read_text())
        texts.append(figures["texts"])
        assert texts[0][0] in out
        if extra:
            assert set(figures) == {*KEYS, "accept_counts", "notes"} and "speculation:" in err
            assert len(figures["accept_counts"]) == (4 if "--speculate_k" in extra else 8)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("jsonl", [False, True])
def test_prompts_of_a_file_run_in_one_batch(run, tmp_path, jsonl):
    """Different lengths, each row's greedy text and ids equal to its own run's."""
    tiny = save_tiny_with_tokenizer(tmp_path / "tiny")[0]
    prompts = ["Once", "a much longer prompt, with " + "very " * 30 + "many words", "two words"]
    lines = [json.dumps({"prompt": p}) for p in prompts] if jsonl else [*prompts]
    lines[0] = "\ufeff" + lines[0]  # some editors begin a file so
    (tmp_path / "p.txt").write_text("\n".join(lines) + "\n")
    flags = ["--checkpoint_path", tiny, "--temperature", 0, "--max_new_tokens", 40,
             "--cache_size", 256, "--json", tmp_path / "g.json"]  # fmt: skip
    alone = []
    for prompt in prompts:
        assert run(*flags, "--prompt", prompt)[0] == 0
        alone.append(json.loads((tmp_path / "g.json").read_text()))
    code, out, err = run(*flags, "--prompts", tmp_path / "p.txt")
    assert code == 0, err
    figures = json.loads((tmp_path / "g.json").read_text())
    assert figures["batch_size"] == 3
    assert figures["token_ids"] == [a["token_ids"][0] for a in alone]
    assert figures["texts"] == [a["texts"][0] for a in alone]
    for prompt, text in zip(prompts, figures["texts"], strict=True):
        assert prompt + text in out


def test_a_number_in_a_file_of_prompts_is_text(run, tmp_path):
    tiny = save_tiny_with_tokenizer(tmp_path / "tiny")[0]
    (tmp_path / "p.txt").write_text("42")
    code, _, err = run("--checkpoint_path", tiny, "--prompts", tmp_path / "p.txt",
                       "--max_new_tokens", 3, "--json", tmp_path / "g.json")  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "g.json").read_text())["prompt_tokens"] <= 2


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"one\n\ntwo\n", ":2: empty prompt"),
        (b'{"prompt": "a"}\n{"prompt"\n', ":2: not a JSON object"),
        (b'{"text": "a"}\n', ":1: not a JSON object"),
        (b'{"prompt": 5}\n', "is no text"),
        (b"\xff\xfe\n", "cannot read"),
        (None, "cannot read"),
    ],
)
def test_bad_prompt_files(run, tiny, tmp_path, content, message):
    if content is not None:
        (tmp_path / "p").write_bytes(content)
    code, _, err = run("--checkpoint_path", tiny, "--prompts", tmp_path / "p")
    assert code == 2 and message in err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--prompt_lookup", "--batch_size", 2], "batches of 1"),
        (["--speculate_k", 3], "needs --draft_checkpoint_path or --prompt_lookup"),
        (["--prompt_lookup", "--draft_checkpoint_path", "x"], "leave --draft_checkpoint_path out"),
        (["--draft_checkpoint_path", "nowhere"], "no checkpoint at nowhere"),
        (["--prompt_lookup", "--speculate_k", 0], "--speculate_k 0"),
        (["--prompts", "x", "--batch_size", 2], "a batch of its own"),
    ],
)
def test_speculation_and_batches_that_do_not_go_together(run, tiny, args, message):
    code, _, err = run("--checkpoint_path", tiny, "--prompt", 5, *args)
    assert code == 2 and message in err.strip().splitlines()[-1]


def test_a_draft_has_a_checkpoint_though_the_model_has_none(run, tiny):
    """It is loaded, and then has another vocabulary."""
    flags = ["--random_weights", "tiny", "--prompt", 5, "--draft_checkpoint_path", tiny]
    code, _, err = run(*flags)
    assert code == 2 and "cannot speculate together" in err
