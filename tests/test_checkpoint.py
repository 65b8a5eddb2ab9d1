"""checkpoint.py: reading, writing, and refusing what is damaged."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from checkpoint import build_model, load_model, open_checkpoint, tensor_names
from checkpoint_quantizer import CheckpointQuantizer
from checkpoint_writer import Writer
from errors import UserError
from huggingface import config_from_hf
from quantize import head_mode, parse_mode

LLAMA3 = {
    "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    return save_tiny(tmp_path / "tiny")[0]


def quantized(directory, mode="int4", groupsize=32):
    output = directory / "out.safetensors"
    mode = parse_mode(mode, groupsize)
    CheckpointQuantizer(open_checkpoint(directory), mode, head_mode(mode, None), output).run()
    return output


def test_sharded_directory_equals_single_file(tmp_path, tiny):
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(tiny / "config.json", shards)
    tensors = load_file(tiny / "model.safetensors")
    names, index = sorted(tensors), {}
    for i in range(3):
        part = {n: tensors[n] for n in names[i::3]}
        save_file(part, shards / f"model-{i}.safetensors")
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    text = json.dumps({"weight_map": index})
    (shards / "model.safetensors.index.json").write_text(text)
    one, many = load_model(open_checkpoint(tiny)), load_model(open_checkpoint(shards))
    for (name, a), b in zip(one.state_dict().items(), many.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_rows_of_a_fused_weight(tiny):
    source = open_checkpoint(tiny)
    whole = source.tensor("layers.1.attention.wqkv.weight")
    rows = [slice(12, 24), slice(72, 84), slice(99, 101)]
    part = source.tensor("layers.1.attention.wqkv.weight", rows)
    assert torch.equal(part, torch.cat([whole[12:24], whole[72:84], whole[99:101]]))


@pytest.mark.parametrize("mode", ["int8", "int4", "uint4", "w4a8", "float8"])
def test_a_quantized_model_at_another_precision(tmp_path, mode):
    """With biases, which take the activations' dtype; as one operator and as modules."""
    directory, _ = save_tiny(tmp_path, torch.bfloat16, attention_bias=True, mlp_bias=True)
    source, path = open_checkpoint(directory), tmp_path / "quantized.safetensors"
    mode = parse_mode(mode, 32 if mode in ("int4", "uint4", "w4a8") else None)
    CheckpointQuantizer(source, mode, head_mode(mode, None), path).run(lambda text: None)
    tokens, start = torch.tensor([[5, 3, 8]]), torch.tensor([0])
    results = []
    for dtype in (None, torch.float32, torch.float16):
        model = load_model(open_checkpoint(path), dtype=dtype)
        for fused in (False, True):
            model.setup_cache(1, 64)
            if fused:
                model.fuse()
            results.append(model(tokens, start))
            assert results[-1].dtype == (dtype or torch.bfloat16)
            assert (results[-1].float() - results[0].float()).norm() < 0.1 * results[0].norm()


def test_header_describes_the_file(tiny):
    path = quantized(tiny)
    renamed = path.with_name("int8-lies.safetensors")
    path.rename(renamed)
    source = open_checkpoint(renamed)
    assert source.header["mode"] == "int4" and source.header["groupsize"] == 32
    assert source.header["layers"]["output"] == {"format": "int8"}
    model = build_model(source.config, source.header["layers"], source.dtype)
    assert sorted(tensor_names(model)) == sorted(source.files)
    assert type(load_model(source).layers[0].attention.wo).__name__ == "Int4Linear"


def test_writer_leaves_nothing_half_written(tmp_path):
    target = tmp_path / "x.safetensors"
    with pytest.raises(RuntimeError, match="boom"), Writer(
        target, {"a": (torch.float32, [4, 2])}, {}
    ) as writer:  # fmt: skip
        writer.write("a", torch.ones(2, 2), row=2)
        raise RuntimeError("boom")
    with pytest.raises(ValueError, match="never written"), Writer(
        target, {"a": (torch.float32, [4, 2])}, {}
    ) as writer:  # fmt: skip
        writer.write("a", torch.ones(2, 2))
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finished_cannot_be_loaded(tiny):
    """Whole but for what a killed run has not come to: the temporary file's bytes are all there."""
    finished = quantized(tiny)
    source = open_checkpoint(finished)
    specs = {name: source.spec(name) for name in source.files}
    with Writer(finished, specs, source.header) as writer:
        for name in specs:
            writer.write(name, source.tensor(name))
        writer.file.flush()
        assert writer.temporary.stat().st_size == writer.end
        with pytest.raises(UserError, match="truncated or no safetensors file"):
            open_checkpoint(writer.temporary)
    load_model(open_checkpoint(finished))


def test_writer_follows_a_link(tmp_path):
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    real.touch()
    link.symlink_to(real)
    with Writer(link, {"a": (torch.float32, [1])}, {}) as writer:
        writer.write("a", torch.ones(1))
    assert link.is_symlink() and load_file(real)["a"] == 1


def test_exchanged_parts_of_a_fused_weight_are_refused(tiny):
    """Together they have the right number of rows."""
    tensors = load_file(tiny / "model.safetensors")
    q, k = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
    tensors[q], tensors[k] = tensors[k], tensors[q]
    save_file(tensors, tiny / "model.safetensors")
    with pytest.raises(UserError, match=r"have \[24, 72, 24\] rows, not \[72, 24, 24\]"):
        load_model(open_checkpoint(tiny))


def test_writer_is_safetensors(tmp_path):
    target = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.randn(5, 3).bfloat16(), "b": torch.arange(7, dtype=torch.uint8),
        "c": torch.randn(2, 2).to(torch.float8_e4m3fn), "d": torch.zeros(0, 3), "e": torch.ones(()),
    }  # fmt: skip
    with Writer(target, {n: (t.dtype, list(t.shape)) for n, t in tensors.items()}, {}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    with safe_open(target, "pt") as f:
        for name, tensor in tensors.items():
            got = f.get_tensor(name)
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert torch.equal(got.float(), tensor.float())


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_header_size(path):
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def damage_not_safetensors(path):
    path.write_bytes(b"PK\x03\x04" + bytes(1000))


def rewrite(path, change):
    """Rewrite a file with its header (parsed) and tensors changed by `change(header, tensors)`."""
    with safe_open(path, "pt") as f:
        header = json.loads(f.metadata()["flatllama"])
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    header = change(header, tensors) or header
    save_file(tensors, path, {"flatllama": json.dumps(header)})


def wrong_shape(header, tensors):
    tensors["norm.weight"] = torch.ones(3)


def wrong_dtype(header, tensors):
    tensors["layers.0.attention.wo.weight"] = tensors["layers.0.attention.wo.weight"].float()


def missing_tensor(header, tensors):
    del tensors["layers.1.ffn_norm.weight"]


def absurd_size(header, tensors):
    header["config"]["ffn_dim"] = 2**40


def absurd_depth(header, tensors):
    header["config"]["n_layers"] = 10**9


def unknown_format(header, tensors):
    header["layers"]["output"]["format"] = "int5000"


def unknown_layer(header, tensors):
    header["layers"]["layers.0.nothing"] = {"format": "int8"}


def unknown_config(header, tensors):
    header["config"]["mystery"] = 1


def newer_version(header, tensors):
    header["version"] = 99


def mode_with_escapes(header, tensors):
    header["mode"] = "int4\n\x1b[31m"


def mode_of_no_text(header, tensors):
    header["mode"] = 4


def no_groupsize(header, tensors):
    header["layers"]["layers.0.attention.wo"]["groupsize"] = 0


def negative_groupsize(header, tensors):
    header["layers"]["layers.0.attention.wo"]["groupsize"] = -64


def infinite_scaling(header, tensors):
    header["config"]["rope_scaling"] = [float("inf"), 1, 4, 8192]


def endless_theta(header, tensors):
    header["config"]["rope_theta"] = 10**400


def not_an_object(header, tensors):
    return [1, 2]


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_header_size, damage_not_safetensors, wrong_shape, wrong_dtype,
     missing_tensor, absurd_size, absurd_depth, unknown_format, unknown_layer, unknown_config,
     newer_version, mode_with_escapes, mode_of_no_text, no_groupsize, negative_groupsize,
     infinite_scaling, endless_theta, not_an_object],
)  # fmt: skip
def test_damaged_file_is_refused_in_one_line(tiny, damage):
    path = quantized(tiny)
    if damage.__name__.startswith("damage"):
        damage(path)
    else:
        rewrite(path, damage)
    with pytest.raises(UserError) as error:
        load_model(open_checkpoint(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "bert"}, "model_type"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling"),
        ({"rope_parameters": {"type": "yarn", "factor": 4}}, "rope scaling"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "differ between layers"),
        ({"model_type": "mistral"}, "sliding-window"),  # 4096, where nothing is said
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 1}, "sliding-w"),
        ({"hidden_size": None}, "malformed"),
        ({"hidden_size": 80}, "config.json says"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rms_norm_eps": None}, "epsilon is None"),
        ({"rms_norm_eps": "abc"}, "epsilon is 'abc'"),
        ({"max_position_embeddings": None}, "sizes must be"),
        ({"max_position_embeddings": "8192"}, "sizes must be"),
        ({"vocab_size": 2**61}, "sizes must be"),
        ({"rope_scaling": "x"}, "rope_scaling 'x'"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {**LLAMA3, "factor": "x"}}, "rope scaling by"),
        ({"rope_parameters": {**LLAMA3, "factor": 0}}, "rope scaling by"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4}}, "rope scaling by"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "malformed"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_hidden_layers": 1}, r"not account for \(9\): model\.layers\.1\.input_layernorm"),
    ],
)
def test_bad_config_is_refused_in_one_line(tiny, change, message):
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        load_model(open_checkpoint(tiny))


def test_windows_that_no_layer_has(tiny):
    hf = json.loads((tiny / "config.json").read_text())
    for family in ("qwen2", "qwen3"):
        windows = {"model_type": family, "use_sliding_window": True, "max_window_layers": 2}
        assert config_from_hf({**hf, **windows}).n_layers == 2
    assert config_from_hf({**hf, "model_type": "mistral", "sliding_window": None}).n_layers == 2


def test_tensors_that_nothing_takes_are_named(tiny):
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    tensors["lm_head.weight"] = torch.zeros(199, 72)  # tied: the embedding's table serves
    save_file(tensors, tiny / "model.safetensors")
    load_model(open_checkpoint(tiny))
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(72)
    save_file(tensors, tiny / "model.safetensors")
    with pytest.raises(UserError, match=r"\(1\): .*q_proj\.bias"):
        load_model(open_checkpoint(tiny))
    with pytest.raises(UserError, match=r"q_proj\.bias"):
        quantized(tiny)


def test_deeply_nested_json_is_refused(tiny):
    (tiny / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="recursion"):
        open_checkpoint(tiny)


def test_missing_pieces_are_named(tmp_path, tiny):
    with pytest.raises(UserError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "nowhere")
    (tiny / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        open_checkpoint(tiny)
    (tiny / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        open_checkpoint(tiny)
