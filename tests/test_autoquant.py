"""Autoquant: recorded calls, the choice by hand, plans in JSON, checkpoints of mixed formats."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import save_tiny
from torch import nn

from autoquant import (
    Plan,
    fastest,
    layer_sqnr,
    make_plan,
    read_or_make_plan,
    record,
    time_candidates,
)
from checkpoint import load_model, open_checkpoint
from errors import UserError
from kernels.linear import Linear, QuantizedLinear
from modes import AUTOQUANT, Mode, head_mode, mode_names, parse_mode
from quantize import quantize_

ROOT = Path(__file__).parent.parent


def test_calls_are_counted_by_rows():
    first, second = Linear(8, 6), Linear(6, 4)

    def run():
        for rows in (1, 1, 5):
            second(first(torch.randn(rows, 8)))
        first(torch.randn(2, 3, 8))

    calls = record({"first": first, "second": second}, run)
    assert calls["first"].rows == {1: 2, 5: 1, 6: 1} and calls["second"].rows == {1: 2, 5: 1}
    assert calls["first"].sample.shape == (13, 8)
    with pytest.raises(UserError, match="never reaches other"):
        record({"other": Linear(2, 2)}, run)


def test_the_fastest_by_hand():
    layer = {"calls": {1: 10, 64: 1}, "sqnr": {"int8": 40.0, "int4": 20.0}}
    seconds = {
        1: {"bf16": 4.0, "int8": 2.0, "int4": 1.0},  # 10 calls
        64: {"bf16": 10.0, "int8": 35.0, "int4": 60.0},  # 1 call
    }  # in all: 50, 55, 70
    names = ["bf16", "int8", "int4"]
    assert fastest(layer, seconds, names, None) == "bf16"
    layer["calls"] = {"1": 10}  # as read from JSON
    assert fastest(layer, seconds, names, None) == "int4"
    assert fastest(layer, seconds, names, 30.0) == "int8"
    assert fastest(layer, seconds, names, 50.0) == "bf16"
    assert fastest(layer, seconds, ["int4"], 50.0) == "bf16"


def test_sqnr_falls_with_the_bits():
    torch.manual_seed(0)
    linear, x = Linear(64, 48), torch.randn(20, 64)
    noise = layer_sqnr(linear, x, ["bf16", "int8", "int4:32", "uint2"])
    assert set(noise) == {"int8", "int4:32", "uint2"}
    assert noise["int8"] > 35 > noise["int4:32"] > 15 > noise["uint2"] > 0


def test_timings_cover_every_candidate_and_number_of_rows():
    timings = time_candidates(Linear(32, 16), [1, 20], ["bf16", "int8", "int4:32"], 3, 2**14)
    assert [t["rows"] for t in timings] == [1, 20]
    assert all(set(t["seconds"]) == {"bf16", "int8", "int4:32"} for t in timings)
    assert all(s > 0 for t in timings for s in t["seconds"].values())


def small_plan(model: nn.Module, x: torch.Tensor, **options) -> Plan:
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    run = lambda: model(x)  # noqa: E731
    return make_plan(linears, run, ["bf16", "int8"], turns=1, working_set=1, **options)


def test_a_plan_survives_its_file(tmp_path):
    model = nn.Sequential(Linear(16, 16), Linear(16, 8))
    plan = small_plan(model, torch.randn(3, 16), min_sqnr=10.0)
    plan.layers["0"]["mode"] = "int4-hqq:32"
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.modes() == plan.modes() and again.modes()["0"] == Mode("int4", "hqq", 32)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": {"0": {"mode": "int9"}}}, "unknown mode"),
        ({"layers": {"0": {}}}, "malformed"),
        ({"layers": {"0": {"mode": "int4-gptq:64"}}}, "gives 0 int4-gptq, which is calibrated"),
        ({"extra": 1}, "is no plan"),
    ],
)
def test_a_broken_plan_is_a_mistake_of_the_user(tmp_path, change, message):
    plan = {"device": "cpu", "candidates": [], "min_sqnr": None, "layers": {}, "timings": []}
    (tmp_path / "plan.json").write_text(json.dumps(plan | change))
    with pytest.raises(UserError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_of_other_candidates_is_refused(tmp_path):
    layers = {"output": {"mode": "int8"}}
    Plan("cpu", ["bf16", "int8"], 20.0, layers, []).save(tmp_path / "plan.json")

    def read(*asked):
        source = SimpleNamespace(path="source")
        return read_or_make_plan(tmp_path / "plan.json", source, ["output"], *asked, 0, print)

    assert read(["bf16", "int8"], "cpu", None).min_sqnr == 20
    for asked in ((["bf16", "int8dq"], "cpu", 20.0), (["bf16", "int8"], "cpu", 40.0)):
        with pytest.raises(UserError, match="ask for the same"):
            read(*asked)
    with pytest.raises(UserError, match="timed on cpu, not cuda"):
        read(["bf16", "int8"], "cuda:0", None)


def test_any_module_in_place():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)), torch.randn(4, 64)
    expected = model(x).detach()
    quantize_(model, "autoquant", inputs=[(x,)], turns=1, working_set=1)
    assert (model(x) - expected).norm() / expected.norm() < 0.05
    with pytest.raises(UserError, match="needs `inputs`"):
        quantize_(nn.Sequential(nn.Linear(4, 4)), "autoquant")


def test_modes_and_their_candidates():
    assert set(AUTOQUANT) <= set(mode_names())
    mode = parse_mode("autoquant-int4")
    assert str(mode) == "autoquant-int4" and head_mode(mode, None) == mode
    assert str(head_mode(mode, "int8")) == "int8" and str(head_mode(mode, "keep")) == "bf16"
    with pytest.raises(UserError, match="leave --groupsize out"):
        parse_mode("autoquant", 64)


def quantize(*args):
    command = [sys.executable, str(ROOT / "quantize.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_same_plan_gives_the_same_checkpoint(tmp_path):
    directory, _ = save_tiny(tmp_path / "m", torch.bfloat16)
    plan, outputs = tmp_path / "plan.json", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for i, output in enumerate(outputs):
        done = quantize("--mode", "autoquant-int4", "--checkpoint_path", directory, "--plan", plan,
                        "--output", output)  # fmt: skip
        assert done.returncode == 0, done.stderr
        if i == 0:  # edited by hand before its first use and second use alike
            loaded = Plan.load(plan)
            assert len(loaded.layers) == 9 and loaded.layers["output"]["shape"] == [199, 72]
            assert loaded.layers["output"]["calls"] == {"1": 128}
            assert loaded.layers["layers.1.attention.wqkv"]["calls"]["1"] == 127
            loaded.layers["layers.0.attention.wo"]["mode"] = "int4-hqq:32"
            loaded.layers["layers.1.attention.wo"]["mode"] = "bf16"
            loaded.layers["output"]["mode"] = "int8dq"
            loaded.save(plan)
            command = ["--mode", "autoquant-int4", "--checkpoint_path", directory, "--plan", plan]
            assert quantize(*command, "--output", output).returncode == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    stored = open_checkpoint(outputs[0])
    assert stored.header["layers"]["layers.0.attention.wo"] == {"format": "int4", "groupsize": 32}
    model = load_model(stored)
    assert model.output.name == "int8dq" and model.layers[0].attention.wo.name == "int4"
    assert not isinstance(model.layers[1].attention.wo, QuantizedLinear)


def test_a_plan_of_another_model_is_refused(tmp_path):
    directory, _ = save_tiny(tmp_path / "m", torch.bfloat16)
    Plan("cpu", [], None, {"elsewhere": {"mode": "int8"}}, []).save(tmp_path / "plan.json")
    done = quantize("--mode", "autoquant", "--checkpoint_path", directory, "--plan",
                    tmp_path / "plan.json")  # fmt: skip
    assert done.returncode == 2 and "other layers" in done.stderr
