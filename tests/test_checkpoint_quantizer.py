"""checkpoint_quantizer.py: what is written block by block beside what is quantized in place."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from checkpoint import load_model, open_checkpoint
from checkpoint_quantizer import CheckpointQuantizer
from errors import UserError
from modes import FLOAT_MODES, head_mode, parse_mode
from quantize import quantize_


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lm_head", [None, "same", "keep"])
def test_streamed_equals_in_place(tmp_path, tied, lm_head):
    directory, _ = save_tiny(tmp_path, torch.bfloat16, tie_word_embeddings=tied)
    source, mode = open_checkpoint(directory), parse_mode("int4", 32)
    head = head_mode(mode, lm_head)
    job = CheckpointQuantizer(source, mode, head, tmp_path / "q.safetensors")
    report = job.run()
    model = load_model(source)
    quantize_(model, "int4", 32, skip=lambda n: n == "output", repack=False)
    if lm_head != "keep":
        quantize_(model, str(head), head.groupsize, repack=False)
    stored = open_checkpoint(tmp_path / "q.safetensors")
    for name in stored.files:
        assert torch.equal(stored.tensor(name), model.state_dict()[name]), name
    assert len(report) == 8 + (lm_head != "keep") and all(0 < r["error"] < 0.2 for r in report)


@pytest.mark.parametrize("mode", ["fp32", "fp16"])
def test_float_modes_convert(tmp_path, mode):
    directory, reference = save_tiny(tmp_path, torch.bfloat16)
    parsed = parse_mode(mode)
    CheckpointQuantizer(
        open_checkpoint(directory), parsed, head_mode(parsed, None), tmp_path / "f.safetensors"
    ).run()
    model = load_model(open_checkpoint(tmp_path / "f.safetensors"))
    assert model.norm.weight.dtype == {"fp32": torch.float32, "fp16": torch.float16}[mode]
    assert torch.equal(model.norm.weight.float(), reference.model.norm.weight.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_header_names_the_dtype_of_a_kept_head(tmp_path, dtype):
    source, mode = open_checkpoint(save_tiny(tmp_path, dtype)[0]), parse_mode("int8")
    path = tmp_path / "q.safetensors"
    CheckpointQuantizer(source, mode, head_mode(mode, "keep"), path).run()
    assert FLOAT_MODES[open_checkpoint(path).header["lm_head"]] == dtype


@pytest.mark.parametrize("mode", ["int8", "int4-sparse24", "codebook4", "int4-hqq", "fp16"])
@pytest.mark.parametrize("name", ["layers.1.self_attn.o_proj", "layers.0.input_layernorm",
                                  "embed_tokens"])  # fmt: skip
def test_weights_that_are_no_numbers_are_refused(tmp_path, mode, name):
    directory, _ = save_tiny(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors[f"model.{name}.weight"].view(-1)[5] = 1e30 if mode == "fp16" else float("nan")
    save_file(tensors, directory / "model.safetensors")
    source, parsed, output = open_checkpoint(directory), parse_mode(mode), tmp_path / "out"
    with pytest.raises(UserError, match="NaN or inf"):
        CheckpointQuantizer(source, parsed, head_mode(parsed, None), output).run()
    assert not output.exists()
