"""Every mode there is: quantize.py, generate.py and eval.py on a piece of the default model.

The piece is its first block with a narrower feed-forward, and the tokens that BPE learnt first.
"""

import json
import sys

import pytest
from safetensors.torch import load_file, save_file

import autoquant
import eval as evaluation
import generate
import generate_report
import quantize
from calibration import BUNDLED
from kernels import choice
from modes import FLOAT_MODES, mode_names, parse_mode

WIDTH = 512  # columns that are kept of the feed-forward's 1536
VOCAB = 4096  # tokens that are kept of 49152
# The formats fpx-E-M share their code with fp6: there the algorithms are tried on fp6 alone.
MODES = [name for name in mode_names() if not name.startswith("fpx-") or name.count("-") == 2]
FEW = {"calibration_samples": 2, "calibration_seq_length": 128, "clip_steps": 4, "refinements": 1}


@pytest.fixture(scope="module")
def source(default_model, tmp_path_factory):
    """The default model's first block, narrowed, as a Hugging Face directory; and a text."""
    directory = tmp_path_factory.mktemp("block")
    config = json.loads((default_model / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "intermediate_size": WIDTH, "vocab_size": VOCAB}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_bytes(
        (default_model / "tokenizer_config.json").read_bytes()
    )
    tokens = json.loads((default_model / "tokenizer.json").read_text(encoding="utf-8"))
    bpe = tokens["model"]
    bpe["vocab"] = {token: i for token, i in bpe["vocab"].items() if i < VOCAB}
    bpe["merges"] = [
        m for m in bpe["merges"]
        if (m.replace(" ", "", 1) if isinstance(m, str) else "".join(m)) in bpe["vocab"]
    ]  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    kept = {}
    for name, tensor in load_file(default_model / "model.safetensors").items():
        if name.startswith("model.layers.") and not name.startswith("model.layers.0."):
            continue
        if ".mlp." in name:
            tensor = tensor[:, :WIDTH] if "down" in name else tensor[:WIDTH]
        if "embed_tokens" in name:
            tensor = tensor[:VOCAB]
        kept[name] = tensor.contiguous()
    save_file(kept, directory / "model.safetensors")
    (directory / "text").write_text(BUNDLED.read_text(encoding="utf-8")[-3000:], encoding="utf-8")
    return directory


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(module, **flags): a command line in this process -> what its --json wrote."""
    monkeypatch.setattr(generate_report, "read_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(autoquant, "WORKING_SET", 2**18)
    monkeypatch.setattr(choice, "_setting", "auto")  # restored, whatever --kernels sets

    def call(module, *switches, **flags):
        out = tmp_path / "figures.json"
        words = [w for name, value in flags.items() for w in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", [module.__name__, *switches, *words, "--json", str(out)])
        module.main()
        return json.loads(out.read_text())

    return call


@pytest.mark.parametrize("name", MODES)
def test_quantize_generate_eval(name, source, run, tmp_path):
    file, mode = tmp_path / "model.safetensors", parse_mode(name)
    # The head takes most of the time here, and no algorithm but rounding to nearest reaches it.
    head = "keep" if mode.algorithm or mode.format in FLOAT_MODES else "int8"
    few = {"calibration": source / "text", **FEW}
    few = {flag: value for flag, value in few.items() if flag in quantize.flags_of(mode)}
    written = run(
        quantize, mode=name, checkpoint_path=source, output=file, lm_head=head, **few
    )  # fmt: skip
    assert written["mode"] == name and written["weight_bytes"] <= file.stat().st_size
    for tokenizer in source.glob("tokenizer*"):
        (tmp_path / tokenizer.name).write_bytes(tokenizer.read_bytes())

    flags = {"checkpoint_path": file, "device": "cpu"}
    made = run(
        generate, "--ignore_eos", **flags, prompt="Once upon a time", max_new_tokens=8,
        temperature=0,
    )  # fmt: skip
    assert made["mode"] == name and len(made["token_ids"][0]) == 8

    flags |= {"text": source / "text", "seq_length": 256, "limit": 1}
    score = run(evaluation, **flags, reference=source)
    # The divergence follows the error of the weights ...
    error = max((layer["error"] for layer in written["layers"]), default=0)
    assert score["kl_mean"] < 0.02 + 30 * error**2
    # ... and with PyTorch's operators in place of the kernels it is the same model.
    plain = run(evaluation, **flags, kernels="inductor")
    assert score["perplexity"] == pytest.approx(plain["perplexity"], rel=0.03)
