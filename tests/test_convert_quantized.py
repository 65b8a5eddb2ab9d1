"""scripts/convert_quantized.py: directories packed here code by code, as each method says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from checkpoint import load_model, open_checkpoint
from engine import Engine
from errors import UserError, cli
from huggingface import HF_BLOCK
from kernels.int4 import Int4Linear
from sampling import Sampling
from scripts.convert_quantized import main

ROOT = Path(__file__).parent.parent
SHAPE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
GROUP = 32
METHODS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP,
                "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    "compressed": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int",
                                                  "group_size": GROUP, "symmetric": False},
                                      "input_activations": None}},
    },
}  # fmt: skip


def words(codes: np.ndarray, axis: int, order=range(8)) -> torch.Tensor:
    """Eight neighbours along `axis` in each int32: neighbour order[i] in bits 4 i."""
    codes = np.moveaxis(codes, axis, 0).astype(np.uint32)
    out = np.zeros((len(codes) // 8, *codes.shape[1:]), np.uint32)
    for word in range(len(out)):
        for i, neighbour in enumerate(order):
            out[word] |= codes[8 * word + neighbour] << (4 * i)
    return torch.from_numpy(np.moveaxis(out, 0, axis).astype(np.int32).copy())


def stored(kind: str, codes: np.ndarray, zeros: np.ndarray, scales: torch.Tensor) -> dict:
    """The tensors of a module: codes [N, K], zeros [N, G], scales fp16 [N, G].

    GPTQModel takes 1 off every zero of a word at once, so that a zero of 0 borrows from the next.
    """
    if kind == "compressed":
        shape = torch.tensor(codes.shape)
        return {"weight_packed": words(codes, 1), "weight_scale": scales, "weight_shape": shape,
                "weight_zero_point": words(zeros, 0)}  # fmt: skip
    scales = scales.t().contiguous()
    if kind == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {"qweight": words(codes.T, 1, order), "qzeros": words(zeros.T, 1, order),
                "scales": scales}  # fmt: skip
    less = 0x11111111 if kind == "gptq" else 0
    order = torch.arange(codes.shape[1], dtype=torch.int32) // GROUP
    return {"qweight": words(codes.T, 0), "qzeros": words(zeros.T, 1) - less, "scales": scales,
            "g_idx": order, "bias": torch.zeros(len(codes), dtype=torch.float16)}  # fmt: skip


def save_packed(directory: Path, kind: str, **changes) -> torch.nn.Module:
    """A directory in that format; the model of transformers with the weights it stands for."""
    reference = save_tiny(directory, torch.float32, **{**SHAPE, **changes})[1]
    tensors, rng = load_file(directory / "model.safetensors"), np.random.default_rng(0)
    state = reference.state_dict()
    for name in list(tensors):
        module, _, last = name.rpartition(".")
        if last != "weight" or "_proj" not in module:
            continue
        n, k = tensors.pop(name).shape
        codes = rng.integers(0, 16, (n, k))
        zeros = rng.integers(0, 16, (n, -(-k // GROUP)))
        scales = torch.from_numpy(rng.uniform(0.01, 0.03, zeros.shape)).half()
        own = stored(kind, codes, zeros, scales)
        if f"{module}.bias" in tensors:  # the model's own
            own.pop("bias", None)
        tensors |= {f"{module}.{key}": tensor for key, tensor in own.items()}
        exact = torch.from_numpy(codes - zeros.repeat(GROUP, 1)[:, :k]).float()
        state[name].copy_(exact * scales.float().repeat_interleave(GROUP, 1)[:, :k])
    save_file(tensors, directory / "model.safetensors")
    edit(directory, quantization_config=METHODS[kind])
    return reference


def edit(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(directory: Path, monkeypatch, capsys) -> str:
    """What the command line says of a directory that it does not take."""
    monkeypatch.setattr(sys, "argv", ["convert_quantized.py", str(directory)])
    with pytest.raises(SystemExit) as stop:
        cli(main)
    assert stop.value.code == 2
    left = (".partial", "g32.safetensors")
    assert not [path for path in directory.iterdir() if path.name.endswith(left)]
    return capsys.readouterr().err


def run(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "convert_quantized.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": True}, {"family": "Qwen3", "head_dim": 16, "intermediate_size": 80}],
    ids=["llama", "biases", "qwen3, a shorter last group"],
)
def test_weights_are_those_that_were_packed(tmp_path, kind, changes):
    reference = save_packed(tmp_path, kind, **changes)
    done = run(tmp_path, "--lm_head", "keep", "--output", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    source = open_checkpoint(tmp_path / "out.safetensors")
    state = reference.state_dict()
    for layer in range(2):
        for ours, theirs in HF_BLOCK.items():
            names = [f"model.layers.{layer}.{name}" for name in theirs]
            if f"{names[0]}.weight" not in state:  # norms of heads
                continue
            want = torch.cat([state[f"{name}.weight"] for name in names])
            if "norm" in ours:
                assert torch.equal(source.tensor(f"layers.{layer}.{ours}.weight"), want)
                continue
            module = Int4Linear(want.shape[1], len(want), dtype=torch.float32, groupsize=GROUP)
            for key in ("weight", "scales", "zeros"):
                setattr(module, key, source.tensor(f"layers.{layer}.{ours}.{key}"))
            step = module.scales.float().repeat_interleave(GROUP, 1)[:, : want.shape[1]]
            assert ((module.dequantize() - want).abs() / step).max() < 1 / 16
            if f"{names[0]}.bias" in state:
                biases = torch.cat([state[f"{name}.bias"] for name in names])
                assert torch.equal(source.tensor(f"layers.{layer}.{ours}.bias"), biases)
    assert source.header["mode"] == {"gptq": "int4-gptq", "gptq_v2": "int4-gptq",
                                     "awq": "int4-awq", "compressed": "int4"}[kind]  # fmt: skip
    prompt = torch.randint(0, 199, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        engine = Engine(load_model(source), Sampling(temperature=0), length=64)
        y, want = engine.prefill(prompt.tolist()), reference(prompt).logits[:, -1]
    assert (y - want).norm() / want.norm() < 0.05  # int4's products round their inputs


def test_the_head_becomes_int8_beside_the_source(tmp_path):
    save_packed(tmp_path, "awq")
    done = run(tmp_path)
    path = tmp_path / "model_int4-awq.g32.safetensors"
    assert done.returncode == 0 and str(path) in done.stdout
    assert open_checkpoint(path).header["layers"]["output"] == {"format": "int8"}


def test_columns_in_another_order_are_refused(tmp_path, monkeypatch, capsys):
    save_packed(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"][[0, 40]] = torch.tensor([1, 0], dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert "desc_act" in refused(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("kind", ["gptq", "compressed"])
def test_an_order_that_is_not_stored_is_refused(tmp_path, monkeypatch, capsys, kind):
    save_packed(tmp_path, kind)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    save_file(kept, tmp_path / "model.safetensors")
    settings = {**METHODS["gptq"], "desc_act": True}
    if kind == "compressed":
        weights = METHODS[kind]["config_groups"]["group_0"]["weights"]
        groups = {"group_0": {"weights": {**weights, "actorder": "group"}}}
        settings = {**METHODS[kind], "config_groups": groups}
    edit(tmp_path, quantization_config=settings)
    assert "g_idx': it is incomplete" in refused(tmp_path, monkeypatch, capsys)


def test_another_shape_than_stored_is_refused(tmp_path, monkeypatch, capsys):
    save_packed(tmp_path, "compressed")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight_shape"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert "weight_shape says [65, 65], not [64, 64]" in refused(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gptq", None, "no quantization_config"),
        ("gptq", [], "malformed"),
        ("gptq", {"quant_method": "fp8"}, "only gptq, awq, compressed-tensors"),
        ("gptq", {**METHODS["gptq"], "bits": 8}, "only 4"),
        ("gptq", {**METHODS["gptq"], "group_size": -1}, "int4 has 32, 64"),
        ("gptq", {**METHODS["gptq"], "checkpoint_format": "marlin"}, "gptq_v2"),
        ("awq", {**METHODS["awq"], "version": "gemv"}, "only gemm"),
        ("gptq", {**METHODS["gptq"], "group_size": 32.0}, "int4 has 32, 64"),
        ("gptq", {**METHODS["gptq"], "rotation": "hadamard"}, "rotation 'hadamard'"),
        ("awq", {**METHODS["compressed"]}, "no layer of it is quantized"),
        (
            "compressed",
            {**METHODS["compressed"], "transform_config": {"config_groups": {"a": 1}}},
            "transform_config",
        ),
        ("awq", {**METHODS["awq"], "group_size": 64}, "is [2, 64], not [1, 64]"),
        ("compressed", {**METHODS["compressed"], "format": "float-quantized"}, "pack-quantized"),
        ("compressed", {**METHODS["compressed"], "config_groups": {}}, "only 1"),
    ],
)
def test_what_int4_cannot_hold_is_refused(tmp_path, monkeypatch, capsys, kind, settings, message):
    save_packed(tmp_path, kind)
    edit(tmp_path, quantization_config=settings)
    assert message in refused(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mlp.up_proj.qweight", None, "only some of"),
        ("mlp.up_proj.scales", None, "has no tensor"),
        ("self_attn.o_proj.qzeros", lambda t: t[:, 1:], r"is \[2, 7\], not \[2, 8\]"),
        ("mlp.down_proj.qweight", lambda t: t.float(), "float32"),
        ("self_attn.q_proj.scales", lambda t: t / 0, "NaN or inf"),
        ("self_attn.o_proj.bias", lambda t: t + 1, "config.json says not"),
        ("input_layernorm.weight", None, "incomplete or another model"),
        ("self_attn.o_proj.unknown", lambda t: torch.ones(1), "does not account for"),
        ("input_layernorm.weight", lambda t: t[1:], r"\[63\]"),
    ],
)
def test_damaged_directories_are_refused(tmp_path, monkeypatch, capsys, name, change, message):
    save_packed(tmp_path, "gptq")
    tensors, name = load_file(tmp_path / "model.safetensors"), f"model.layers.0.{name}"
    tensor = tensors.pop(name, None)
    if change:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    assert re.search(message, refused(tmp_path, monkeypatch, capsys))


def test_zero_points_of_compressed_tensors(tmp_path, monkeypatch, capsys):
    """As int8, as earlier versions wrote them; none only where weights are symmetric."""
    save_packed(tmp_path, "compressed")
    assert run(tmp_path, "--output", tmp_path / "packed.safetensors").returncode == 0
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("zero_point")]:
        words = tensors.pop(name)
        codes = torch.stack([(words >> 4 * i) & 15 for i in range(8)], 1).flatten(0, 1)
        tensors[name] = (codes - 8).to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert run(tmp_path, "--output", tmp_path / "int8.safetensors").returncode == 0
    packed = (tmp_path / "packed.safetensors").read_bytes()
    assert (tmp_path / "int8.safetensors").read_bytes() == packed

    name = next(name for name in tensors if name.endswith("down_proj.weight_zero_point"))
    wrong = tensors[name].clone()
    wrong[0, 0] = 8
    save_file({**tensors, name: wrong}, tmp_path / "model.safetensors")
    assert "more than 4 bits" in refused(tmp_path, monkeypatch, capsys)

    none = {name: tensor for name, tensor in tensors.items() if not name.endswith("zero_point")}
    save_file(none, tmp_path / "model.safetensors")
    assert "weight_zero_point" in refused(tmp_path, monkeypatch, capsys)
    settings = METHODS["compressed"]["config_groups"]["group_0"]["weights"]
    group = {"group_0": {"weights": {**settings, "symmetric": True}}}
    edit(tmp_path, quantization_config={**METHODS["compressed"], "config_groups": group})
    assert run(tmp_path, "--output", tmp_path / "symmetric.safetensors").returncode == 0
    zeros = open_checkpoint(tmp_path / "symmetric.safetensors").tensor(
        "layers.0.attention.wo.zeros"
    )
    assert not zeros.any()


def test_biases_that_are_no_numbers_are_refused(tmp_path, monkeypatch, capsys):
    save_packed(tmp_path, "awq", attention_bias=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.bias"] *= torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    assert "layers.1.attention.wqkv.bias holds NaN" in refused(tmp_path, monkeypatch, capsys)


def test_such_a_directory_says_what_to_do(tmp_path):
    save_packed(tmp_path, "awq")
    with pytest.raises(UserError, match=r"scripts/convert_quantized\.py"):
        load_model(open_checkpoint(tmp_path))
