"""quantize.py: modes, in-place quantization of any module, the command line."""

import copy
import io
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save, save_file
from tiny import save_tiny
from torch import nn

import quantize
from checkpoint import open_checkpoint, repack
from config import CONFIGS
from engine import Engine
from errors import UserError
from huggingface import config_from_hf, hf_names
from kernels.formats import FORMATS
from model import Transformer
from modes import head_mode, mode_names, parse_mode
from quantize import quantize_, quantize_linear
from random_weights import random_model
from sampling import Sampling

ROOT = Path(__file__).parent.parent


def test_mode_names_parse_to_themselves():
    for name in mode_names():
        assert str(parse_mode(name)) == name


def test_unknown_mode_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'int4-gptq'"):
        parse_mode("int4-gtpq")
    with pytest.raises(UserError, match="did you mean 'int8'"):
        parse_mode("INT8")
    with pytest.raises(UserError, match="--list shows all"):
        parse_mode("zzz")
    with pytest.raises(UserError, match="group size 48"):
        parse_mode("int4", 48)
    with pytest.raises(UserError, match="leave --groupsize out"):
        parse_mode("int8", 64)
    with pytest.raises(UserError, match="leave --groupsize out"):
        parse_mode("bf16", 64)


def test_head_policy():
    assert str(head_mode(parse_mode("int4-gptq", 128), None)) == "int8"
    assert head_mode(parse_mode("int4", 128), "same").groupsize == 128
    assert str(head_mode(parse_mode("int4"), "keep")) == "bf16"
    assert str(head_mode(parse_mode("fp32"), None)) == "bf16"


@pytest.mark.usefixtures("library")
def test_a_format_without_a_kernel_is_named(monkeypatch, capsys):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    quantize_(copy.deepcopy(model), "uint3")
    assert "no kernel" not in capsys.readouterr().err
    monkeypatch.setattr(FORMATS["uint3"], "repack", lambda self: None)
    quantize_(model, "uint3")
    assert capsys.readouterr().err == "flatllama: no kernel for uint3: plain PyTorch, far slower\n"


class Foreign(nn.Module):
    """A model that is not ours."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(96, 50), nn.ReLU(), nn.Linear(50, 33, bias=False))
        self.head = nn.Linear(33, 7)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("mode", ["int8", "int4", "int4-gptq"])
@torch.inference_mode()
def test_any_module_in_place(mode):
    torch.manual_seed(0)
    model, x = Foreign(), torch.randn(200, 96)
    expected = model(x)
    inputs = [(x,)] if mode.endswith("gptq") else ()
    quantize_(model, mode, inputs=inputs, skip=lambda name: name == "head")
    assert isinstance(model.head, nn.Linear)
    name = parse_mode(mode).format
    assert isinstance(model.body[0], FORMATS[name]) and isinstance(model.body[2], FORMATS[name])
    error = (model(x) - expected).norm() / expected.norm()
    assert 0 < error < (0.02 if mode == "int8" else 0.2)


@pytest.mark.parametrize("mode", ["int4", "int4-gptq"])
@torch.inference_mode()
def test_a_layer_in_several_places_is_quantized_once(mode):
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer), layer)
    quantize_(model, mode, inputs=[(torch.randn(30, 64),)])
    assert isinstance(model[0], FORMATS["int4"])
    assert model[1][1] is model[0] and model[2] is model[0]


@pytest.mark.parametrize("mode", ["int4-gptq", "autoquant", *FORMATS])
@pytest.mark.parametrize("repack", [False, True])
@torch.inference_mode()
def test_a_single_layer_and_a_single_row(mode, repack):
    layer, x = nn.Linear(96, 40), torch.randn(96)
    quantized = quantize_(layer, mode, inputs=[(x,)], repack=repack)
    assert quantized is not layer or mode == "autoquant"
    assert quantized(x).shape == (40,)


def test_what_no_format_takes_is_refused():
    with pytest.raises(UserError, match=r"torch\.float64: convert it"):
        quantize_(nn.Sequential(nn.Linear(8, 8).double()), "int8")
    for layer, why in (
        (nn.MultiheadAttention(8, 2), "layer 'out_proj' is of nn.Multi"),
        (nn.Sequential(nn.LazyLinear(8)), "layer '0' has no weights"),
        (nn.Linear(8, 8, device="meta"), "has no weights"),
        (nn.Linear(8, 0), "empty"),
    ):
        with pytest.raises(UserError, match=why):
            quantize_(layer, "int8")


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@torch.no_grad()
def test_experts_that_a_call_gives_nothing(algorithm):
    """Each sees its share of the tokens, and its input by name."""

    class Experts(nn.ModuleList):
        def forward(self, x, choice):
            y = x.clone()
            for i, expert in enumerate(self):
                y[choice == i] = expert(input=x[choice == i])
            return y

    model, x = Experts(nn.Linear(32, 32) for _ in range(2)), torch.randn(60, 32)
    expected = model(x, torch.arange(60) % 2)
    inputs = [(x[i : i + 1], torch.tensor([i % 2])) for i in range(60)]
    y = quantize_(model, f"int4-{algorithm}", 32, inputs=inputs)(x, torch.arange(60) % 2)
    assert 0 < (y - expected).norm() < 0.2 * expected.norm()
    with pytest.raises(UserError, match="reach every linear layer"):
        quantize_(nn.Linear(8, 8), f"int4-{algorithm}", 32, inputs=[(torch.zeros(0, 8),)])
    with pytest.raises(UserError, match="NaN or inf"):
        quantize_(nn.Linear(8, 8), f"int4-{algorithm}", 32, inputs=[(torch.ones(9, 8) / 0,)])


@pytest.mark.parametrize("name", [*FORMATS])
def test_modules_can_be_pickled(name):
    layer, x = quantize_(nn.Linear(64, 8), name, repack=False), torch.randn(2, 64)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


@pytest.mark.parametrize("name", [*FORMATS])
@torch.inference_mode()
def test_conversion_after_quantizing(name):
    """Only the activations change their dtype: scales and tables stay what the kernels read."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48)), torch.randn(3, 64)
    expected = quantize_(model, name)(x)
    for dtype, tolerance in ((torch.bfloat16, 0.06), (torch.float32, 0.01)):
        y = model.to(dtype)(x.to(dtype))
        assert y.dtype == dtype and (y - expected).norm() < tolerance * expected.norm()


def load_others(model):
    """By way of a module that holds the model."""
    other = random_model(CONFIGS["tiny"], None, "cpu", torch.float32, seed=5).state_dict()
    state = {f"0.{name}": tensor for name, tensor in other.items()}
    nn.ModuleList([model]).load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        load_others,
        lambda model: model.to(torch.float16),
        lambda model: quantize_(model, "uint2", 32),
    ],
    ids=["loaded", "converted", "quantized"],
)
@torch.inference_mode()
def test_an_engine_sees_new_weights(change):
    """Neither its operator nor what it has cached is of the old ones."""
    prompt, greedy = [list(range(3, 103))], Sampling(temperature=0)
    model = random_model(CONFIGS["tiny"], None, "cpu", torch.float32)
    engine = Engine(model, greedy, length=256)
    before = engine.generate(prompt, 20).token_ids
    change(model)
    assert engine.cached == [] and not model.runs_in_cpp(1)
    fresh = Engine(copy.deepcopy(model), greedy, length=256).generate(prompt, 20).token_ids
    assert engine.generate(prompt, 20).token_ids == fresh
    assert fresh != before or model.tok_embeddings.weight.dtype == torch.float16


def test_calibrated_mode_without_inputs_is_refused():
    with pytest.raises(UserError, match="needs `inputs`"):
        quantize_(Foreign(), "int4-gptq")


def test_a_failing_input_leaves_no_hooks():
    model = Foreign()
    with pytest.raises(RuntimeError):
        quantize_(model, "int4-gptq", inputs=[(torch.zeros(2, 7),)])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_rows_in_chunks_equal_one_piece(monkeypatch):
    linear = nn.Linear(100, 57, dtype=torch.bfloat16)
    whole = quantize_linear(linear, parse_mode("int4", 32))
    monkeypatch.setattr("kernels.packing.AT_ONCE", 700)
    for a, b in zip(whole.buffers(), quantize_linear(linear, parse_mode("int4", 32)).buffers(),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_random_model_runs():
    config = replace(CONFIGS["tiny"], qk_norm=True)
    for mode in (None, parse_mode("int4")):
        model = random_model(config, mode, "cpu", torch.bfloat16)
        model.setup_cache(1, 64)
        logits = model(torch.tensor([[1, 2, 3]]), torch.zeros(1, dtype=torch.int64))
        assert logits.isfinite().all() and logits.std() > 0


def run(*args, **kwargs):
    command = [sys.executable, str(ROOT / "quantize.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_command_line(tmp_path):
    directory, _ = save_tiny(tmp_path, torch.bfloat16)
    done = run("--mode", "int4", "--groupsize", 32, "--checkpoint_path", directory,
               "--json", tmp_path / "q.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "q.json").read_text())
    assert {"mode", "groupsize", "algorithm", "weight_bytes", "source_weight_bytes", "seconds",
            "peak_memory_bytes", "output", "layers"} == set(figures)  # fmt: skip
    output = directory / "model_int4.g32.safetensors"
    assert Path(figures["output"]) == output
    # Codes, scales and zeros of every layer, int8 head, embedding and norms: no byte more.
    shapes = [(120, 72), (72, 72), (272, 72), (72, 136)] * 2
    expected = sum(n * (-(-k // 2) + 4 * -(-k // 32)) for n, k in shapes)
    expected += 199 * 72 * 2 + 199 * 72 + 199 * 2 + 5 * 72 * 2
    assert figures["weight_bytes"] == expected
    stored = open_checkpoint(output)
    total = sum(stored.tensor(name).nbytes for name in stored.files)
    assert total == expected


@pytest.mark.parametrize(
    "flags, refused",
    [
        (["--mode", "int4", "--percdamp", "0.1"], "percdamp"),
        (["--mode", "int4-awq", "--no-act_order"], "act_order"),
        (["--mode", "int4-gptq", "--alpha", "0.5"], "alpha"),
        (["--mode", "int8", "--calibration", "self"], "calibration"),
        (["--mode", "int4-gptq", "--plan", "x"], "plan"),
        (["--mode", "autoquant", "--calibration_samples", "8"], "calibration_samples"),
        (["--mode", "int4-gptq", "--seed", "1", "--percdamp", "0"], None),
        (["--mode", "int8dq-smooth", "--alpha", "0", "--calibration_samples", "8"], None),
        (["--mode", "autoquant", "--seed", "1", "--min_sqnr", "30", "--plan", "x"], None),
    ],
)
def test_flags_that_a_mode_does_not_take(monkeypatch, flags, refused):
    monkeypatch.setattr(sys, "argv", ["quantize.py", *flags])
    args = quantize.parse_args()
    if refused:
        with pytest.raises(UserError, match=f"does not use --{refused}:"):
            quantize.fill_in(args, parse_mode(args.mode))
        return
    quantize.fill_in(args, parse_mode(args.mode))
    assert args.clip_steps == 20 and args.act_order and args.calibration == "bundled"


@pytest.mark.parametrize(
    "args, message",
    [
        (["--mode", "int9"], "unknown mode"),
        (["--mode", "int4", "--groupsize", "7"], "group size 7"),
        (["--checkpoint_path", "nowhere"], "no checkpoint at nowhere"),
        (["--device", "cuda:99"], "no device"),
        (["--mode", "int4-gptq", "--percdamp", "-1"], "GPTQ needs percdamp >= 0"),
        (["--mode", "int8dq-smooth", "--alpha", "3"], "SmoothQuant takes 0 to 1"),
        (["--mode", "int4-awq", "--calibration_seq_length", "9999"], "--calibration_seq_length 9"),
        (["--output", "missing-folder/x.safetensors"], "cannot write"),
        (["--mode", "fp16", "--lm_head", "int8"], "leave --lm_head out"),
        (["--mode", "int4-gptq", "--seed", str(2**64)], "takes 64 bits"),
        (["--mode", "autoquant", "--min_sqnr", "nan"], "--min_sqnr nan"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(tmp_path, args, message):
    directory, _ = save_tiny(tmp_path / "m", torch.bfloat16)
    if "--checkpoint_path" not in args:
        args = [*args, "--checkpoint_path", str(directory)]
    before = sorted(tmp_path.rglob("*"))
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_outputs_never_replace_inputs_or_each_other(tmp_path, monkeypatch):
    directory, _ = save_tiny(tmp_path / "m", torch.bfloat16)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(directory / "model.safetensors")
    monkeypatch.setattr(os, "devnull", str(tmp_path / "fifo"))  # refused too, as it is replaced
    before = {p: p.read_bytes() for p in directory.iterdir()}
    for outputs in (
        ["--output", directory / "model.safetensors"],
        ["--output", directory / "config.json"],
        ["--output", tmp_path / "link"],
        ["--output", tmp_path / "new", "--json", directory / "config.json"],
        ["--output", tmp_path / "new", "--json", tmp_path / "m" / ".." / "new"],
        ["--output", tmp_path / "fifo"],
    ):
        argv = ["quantize.py", "--mode", "int8", "--checkpoint_path", directory, *outputs]
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        with pytest.raises(UserError, match="cannot write"):
            quantize.main()
    assert before == {p: p.read_bytes() for p in directory.iterdir()}
    assert not (tmp_path / "new").exists() and (tmp_path / "fifo").is_fifo()


def test_samples_are_no_longer_than_the_context(tmp_path, monkeypatch):
    directory, _ = save_tiny(tmp_path, torch.bfloat16, max_position_embeddings=96)
    asked = ["quantize.py", "--mode", "int8dq-smooth", "--checkpoint_path", str(directory)]
    asked += ["--calibration", "self", "--calibration_samples", "2"]
    monkeypatch.setattr(sys, "argv", asked)
    quantize.main()
    header = open_checkpoint(tmp_path / "model_int8dq-smooth.safetensors").header
    assert header["algorithm"]["seq_length"] == 96


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    directory, _ = save_tiny(tmp_path, torch.bfloat16)
    before = sorted(tmp_path.iterdir())
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    done = run("--mode", "int8", "--checkpoint_path", directory, preexec_fn=limit)
    assert done.returncode == 2
    assert "cannot write" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def bare_peak() -> int:
    """Peak memory of a process that only imports what quantizing needs."""
    code = "import quantize, measure; print(measure.peak_memory('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout)


def test_memory_is_that_of_one_block(tmp_path):
    """A 0.5 GB checkpoint (FLATLLAMA_TEST_GB sets the size) needs far less memory than its size."""
    size = float(os.environ.get("FLATLLAMA_TEST_GB", "0.5"))
    layers = round((size * 1e9 - 66e6) / 33.6e6)
    shape = {
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 16000,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with torch.device("meta"):
        names = Transformer(config_from_hf(shape)).state_dict()
    tensors = {}
    for name, t in names.items():
        parts = hf_names(name)
        rows = t.shape[0] // len(parts)
        tensors |= {p: torch.randn(rows, *t.shape[1:]).bfloat16() for p in parts}
    save_file(tensors, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size > 0.95 * size * 1e9
    del tensors
    done = run("--mode", "int4", "--checkpoint_path", tmp_path, "--json", tmp_path / "q.json")
    assert done.returncode == 0, done.stderr
    over = json.loads((tmp_path / "q.json").read_text())["peak_memory_bytes"] - bare_peak()
    print(f"{size} GB checkpoint to int4: peak {over / 1e6:.0f} MB over the bare process")
    assert over < 650e6


def test_killed_run_leaves_no_file_under_the_final_name(tmp_path):
    directory, _ = save_tiny(tmp_path, torch.bfloat16)
    code = (
        "import os, signal, quantize; "
        "quantize.CheckpointQuantizer.write_block = lambda *a: os.kill(os.getpid(), 9); "
        "quantize.main()"
    )
    command = [sys.executable, "-c", code, "--mode", "int8", "--checkpoint_path", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -9
    assert not (directory / "model_int8.safetensors").exists()
    assert run("--mode", "int8", "--checkpoint_path", directory).returncode == 0
    assert (directory / "model_int8.safetensors").exists()


@pytest.mark.parametrize("mode", ["int4", "int8", "w4a8", "int8dq-smooth", "codebook4-awq"])
def test_state_dicts_of_ones_own_modules(mode):
    """Saved and loaded without repacking; a repacked module refuses both, and loses nothing."""
    net, x = nn.Sequential(nn.Linear(192, 64), nn.Linear(64, 16)), torch.randn(5, 192)
    other = copy.deepcopy(net)
    quantize_(net, mode, inputs=[(x,)], repack=False)
    state = load(save(net.state_dict()))
    quantize_(other, mode.partition("-smooth")[0].partition("-awq")[0], repack=False)
    with torch.no_grad():
        other[0].bias.add_(1)
    other.load_state_dict(state)
    want = net(x)
    assert torch.equal(other(x), want)
    repack(other)
    if other[0].repacked:
        with pytest.raises(RuntimeError, match="repack=False"):
            other.state_dict()
        with pytest.raises(RuntimeError, match="repack=False"):
            other.load_state_dict(state)
        with pytest.raises(RuntimeError, match="repack=False"):
            other[0].dequantize()
    assert (other(x) - want).norm() / want.norm() < 0.02


def test_a_state_dict_of_another_format_is_refused():
    """The same shapes and other meanings: nothing else would show it."""

    def net(mode: str, groupsize: int | None = None) -> nn.Module:
        return quantize_(nn.Sequential(nn.Linear(128, 32)), mode, groupsize, repack=False)

    for saved, own in (("int4", "uint4"), ("fp6", "fpx-2-3"), ("uint3", "int8dq-int3")):
        with pytest.raises(RuntimeError, match=f"0 is .*'{own}'.*weights are .*'{saved}'"):
            net(own).load_state_dict(net(saved).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"'groupsize': 64.*'groupsize': 32"):
        net("int4", 64).load_state_dict(net("int4", 32).state_dict())


def test_a_layer_of_no_numbers_is_refused():
    linear = nn.Linear(64, 8)
    linear.weight.data[2, 3] = float("inf")
    with pytest.raises(UserError, match="NaN or inf"):
        quantize_(linear, "int4")


def test_nothing_to_quantize_and_inputs_that_are_no_tuples():
    net, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(2, 64)
    for inputs in (x, [x]):
        with pytest.raises(UserError, match="argument tuples"):
            quantize_(net, "int4-gptq", inputs=inputs)
    for mode, known in (("int4", "none"), ("fp32", "none"), ("int8dq-smooth", "alpha"),
                        ("autoquant", "min_sqnr")):  # fmt: skip
        with pytest.raises(UserError, match=f"{mode} takes no percdamp; options: {known}"):
            quantize_(net, mode, inputs=[(x,)], percdamp=0.1)
    quantize_(net, "int4")
    for model in (net, nn.ReLU()):
        with pytest.raises(UserError, match="has no"):
            quantize_(model, "int8")
