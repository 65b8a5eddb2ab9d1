"""tp.py and sharding.py: N processes compute what one computes, for every format; what is refused.

One torchrun per number of processes runs all formats (tp_worker.py), on tiny models.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny

import checkpoint as ckpt
import tp
from checkpoint_quantizer import CheckpointQuantizer
from config import CONFIGS
from engine import Engine
from errors import UserError
from kernels import native
from kernels.formats import FORMATS
from modes import parse_mode, quantize_linear
from random_weights import random_model
from sampling import Sampling
from sharding import Cut, Sharding, column_unit, cuts, local_layer, local_tensor, piece

ROOT = Path(__file__).parent.parent
SHAPE = dict(hidden_size=128, num_attention_heads=8, num_key_value_heads=4, head_dim=16,
             intermediate_size=256, vocab_size=203, num_hidden_layers=1)  # fmt: skip
# The default model's heads and widths, one block.
NINE_HEADS = dict(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
                  intermediate_size=1536, vocab_size=203, num_hidden_layers=1)  # fmt: skip
MODES = ["fp32", *(f for f in FORMATS if f not in ("fpx-2-1", "fpx-2-2", "fpx-2-3", "fpx-4-1"))]


def save_mode(source: Path, mode: str, output: Path, groupsize: int | None) -> Path:
    """A checkpoint of that mode, its LM head in the same format."""
    if mode == "fp32":
        return source
    parsed = parse_mode(mode, groupsize if FORMATS[mode].default_groupsize else None)
    opened = ckpt.open_checkpoint(source)
    CheckpointQuantizer(opened, parsed, replace(parsed, algorithm=""), output).run()
    return output


@pytest.fixture
def exact():
    native.load()
    before = native.exact_activations()
    native.set_exact_activations(True)
    yield
    native.set_exact_activations(before)


def torchrun(count: int, *command) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*start, f"--nproc_per_node={count}", *map(str, command)],
        capture_output=True, text=True, cwd=ROOT, timeout=3000,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_format_equals_one_process(tmp_path, exact, count):
    """fp32 activations: logits within 1e-4, greedy texts token for token; compiled, speculating."""
    three = count == 3
    changes = NINE_HEADS if three else {**SHAPE, "tie_word_embeddings": count == 2,
                                        "attention_bias": count == 4,
                                        "family": "Qwen3" if count == 2 else "Llama"}  # fmt: skip
    source = save_tiny(tmp_path / "source", initializer_range=0.1, **changes)[0]
    generator = torch.Generator().manual_seed(count)
    prompts = [torch.randint(0, 203, (n,), generator=generator).tolist() for n in (5, 23)]
    cases = []
    for mode in MODES:
        if three and mode not in ("fp32", "int8", "int4", "int8dq-int4", "uint3", "codebook4",
                                  "int4-sparse24", "w4a8", "float8dq-row", "fp6"):  # fmt: skip
            continue
        path = save_mode(source, mode, tmp_path / f"{mode}.safetensors", 64 if three else 32)
        model = ckpt.load_model(ckpt.open_checkpoint(path), "cpu", torch.float32)
        engine = Engine(model, Sampling(temperature=0), batch=2, length=96)
        with torch.inference_mode():
            logits = tmp_path / f"{mode}.logits"
            save_file({"logits": engine.prefill(prompts).clone()}, logits)
        greedy = engine.generate(prompts, 12).token_ids
        cases.append({"name": mode, "path": str(path), "tokens": prompts, "greedy": greedy,
                      "logits": str(logits)})  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = torchrun(count, ROOT / "tests" / "tp_worker.py", tmp_path / "cases.json")
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(ranks) == count
    for results in ranks:
        assert [r["name"] for r in results] == [c["name"] for c in cases]
        for result, case in zip(results, cases, strict=True):
            assert result["error"] <= 1e-4 and result["same"], result
            format = FORMATS.get(case["name"])
            if format and format.input_way != "none":
                assert result["cut"] == ["GatheredLinear"] * 2
            if case["name"] in ("fp32", "int4"):
                assert result["cut"] == ["ReducedLinear"] * 2 or count == 4
            if case["name"] in ("fp32", "int4") and count == 2:
                assert result["Engine"] == result["SpeculativeEngine"] == case["greedy"][0]
    whole = sum(t.numel() * 4 for t in ckpt.build_model(
        ckpt.open_checkpoint(source).config, {}, torch.float32).state_dict().values())  # fmt: skip
    shares = [results[0]["bytes"] for results in ranks]
    assert max(shares) < 1.1 * whole / count


def test_the_command_line_and_a_rank_that_dies(tmp_path):
    """Same tokens from generate.py, random weights quantized on load; a rank's death ends all."""
    flags = ["--random_weights", "tiny", "--precision", "fp32", "--quantization", "int4",
             "--groupsize", 32, "--prompt", 9, "--temperature", 0, "--max_new_tokens", 10,
             "--device", "cpu"]  # fmt: skip
    done = torchrun(2, "generate.py", *flags, "--json", tmp_path / "g.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("time to first token") == 1
    figures = json.loads((tmp_path / "g.json").read_text())
    assert figures["processes"] == 2
    mode = parse_mode("int4", 32)
    model = random_model(CONFIGS["tiny"], mode, "cpu", torch.float32)
    vocab, generator = CONFIGS["tiny"].vocab_size, torch.Generator().manual_seed(1234)
    prompt = torch.randint(0, vocab, (9,), generator=generator).tolist()
    ids = Engine(model, Sampling(temperature=0), length=19).generate([prompt], 10).token_ids
    assert figures["token_ids"] == ids
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, sys, time, torch, tp\nfrom errors import UserError, cli\n"
        "def main():\n"
        "    ranks = tp.start('cpu')\n"
        "    if ranks.rank == int(sys.argv[1]):\n"
        "        raise UserError('the disk of this rank is gone')\n"
        "    ranks.reduce(torch.ones(1))\n"
        "    time.sleep(3000)\n"
        "cli(main)\n"
    )
    for rank, prefix in ((1, "rank 1: "), (0, "")):
        done = torchrun(2, script, rank)  # and not only after the other is done
        assert done.returncode != 0
        assert f"{prefix}error: the disk of this rank is gone" in done.stderr
        assert "[rank" not in done.stderr  # how a process begins the lines of a traceback


def test_world_sizes_that_do_not_divide_the_heads():
    with torch.device("meta"):
        model = ckpt.build_model(CONFIGS["smollm2-135m"], {}, torch.bfloat16)
    with pytest.raises(UserError, match=r"2 processes cannot share 9 heads.*1 or 3"):
        Sharding(model, 0, 2)
    Sharding(model, 2, 3)


def test_cuts_cover_everything_once():
    for total, count, unit in ((203, 4, 1), (11008, 8, 64), (136, 3, 32), (7, 4, 8)):
        ranges = cuts(total, count, unit)
        assert len(ranges) == count
        assert [i for r in ranges for i in range(total)[r]] == list(range(total))
        assert all(r.start % unit == 0 or r.start == total for r in ranges)


@pytest.mark.parametrize("format", list(FORMATS))
def test_columns_are_cut_without_dequantizing(format):
    """Pieces of the canonical buffers, put side by side, stand for the whole weight."""
    groups = {"groupsize": 32} if FORMATS[format].default_groupsize else {}
    torch.manual_seed(0)
    mode = parse_mode(format, groups.get("groupsize"))
    whole = quantize_linear(torch.nn.Linear(250, 24, bias=False), mode)
    unit = column_unit(whole)
    if whole.input_way != "none":
        assert unit is None
        return

    class Memory:
        def tensor(self, name, rows=None, columns=None):
            return piece(whole.state_dict()[name.rpartition(".")[2]], rows, columns)

    pieces = []
    for columns in cuts(250, 3, unit):
        cut = Cut(None, columns)
        local = local_layer(whole, cut, torch.float32)
        for name, buffer in local.state_dict().items():
            part = local_tensor(Memory(), f"x.{name}", whole, cut)
            assert part.shape == buffer.shape and part.dtype == buffer.dtype, name
            setattr(local, name, part)
        pieces.append(local.dequantize())
    assert torch.equal(torch.cat(pieces, 1), whole.dequantize())


def test_slices_of_stacked_tensors(tmp_path):
    """Ranges of rows and columns of q, k, v stacked, across their borders, nothing else read."""
    source = ckpt.open_checkpoint(save_tiny(tmp_path)[0])
    whole = source.tensor("layers.0.attention.wqkv.weight")
    rows, columns = [slice(3, 9), slice(70, 80), slice(100, 120)], slice(5, 30)
    expected = torch.cat([whole[r] for r in rows])
    assert torch.equal(source.tensor("layers.0.attention.wqkv.weight", rows), expected)
    part = source.tensor("layers.0.attention.wqkv.weight", rows, columns)
    assert torch.equal(part, expected[:, columns])
    everything = source.tensor("layers.0.attention.wqkv.weight", None, columns)
    assert torch.equal(everything, whole[:, columns])


def test_without_ranks_nothing_changes():
    assert tp.start("cpu") is None
    assert tp.from_rank_0(lambda: 5) == 5
