"""bench.py throughput, latency and position: rows, files and mistakes; no figure is judged."""

import json
import sys

import pytest
from tiny import save_tiny

import bench
import bench_serving
from errors import UserError, cli


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)[0]


@pytest.fixture
def run(monkeypatch, capsys, tiny):
    """run(kind, args...) -> (exit code, stdout, stderr) of bench.py on the tiny model."""

    def call(kind, *args):
        argv = ["bench.py", kind, "--device", "cpu", "--checkpoint_path", tiny, *args]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        code = 0
        try:
            cli(bench.main)
        except SystemExit as done:
            code = done.code
        return (code, *capsys.readouterr())

    return call


def test_throughput(run, tmp_path):
    path = tmp_path / "t.json"
    code, out, err = run("throughput", "--no-compile", "--batch_sizes", "1,3", "--max_new_tokens",
                         8, "--json", path)  # fmt: skip
    assert code == 0, err
    rows = json.loads(path.read_text())["rows"]
    assert [row["batch_size"] for row in rows] == [1, 3]
    assert rows[1]["bytes_per_step"] > rows[0]["bytes_per_step"]
    for row in rows:
        speed = row["batch_size"] / row["step_s"]["p50"]
        assert row["decode_tokens_per_s"] == pytest.approx(speed)
    assert len(out.strip().splitlines()) == 6


def test_latency_counts_recompilations(run, tmp_path):
    """Nothing recompiles after the warm-up of every bucket."""
    path = tmp_path / "l.json"
    code, _, err = run("latency", "--requests", 4, "--max_prompt_tokens", 100, "--max_new_tokens",
                       6, "--policies", "buckets,eager", "--compile_mode", "default",
                       "--json", path)  # fmt: skip
    assert code == 0, err
    rows = json.loads(path.read_text())["rows"]
    assert [row["policy"] for row in rows] == ["buckets", "eager"]
    assert [row["recompiles"] for row in rows] == [0, 0]
    assert all({"p50", "p99"} <= set(row["time_to_first_token_s"]) for row in rows)


def test_policies_pad_differently(tiny):
    args = bench_serving.parse_args("latency", ["--max_prompt_tokens", "300"])
    model = bench_serving.load(tiny)[0]
    chunks = {}
    for policy in bench_serving.POLICIES:
        engine = bench_serving.policy_engine(policy, model, args)
        chunks[policy] = [engine.chunk(n) for n in (1, 65, 300)]
    assert chunks == {
        "padding": [320] * 3, "buckets": [64, 128, 384],  # no more than the cache

        "dynamic": [1, 65, 300], "eager": [1, 65, 300],
    }  # fmt: skip


def test_streams_are_seeded():
    args = bench_serving.parse_args("latency", ["--seed", "5"])
    other = bench_serving.parse_args("latency", ["--seed", "6"])
    stream = bench_serving.request_stream(30, args, 100)
    assert stream == bench_serving.request_stream(30, args, 100)
    assert stream != bench_serving.request_stream(30, other, 100)
    lengths = [len(prompt) for prompt, _ in stream]
    assert min(lengths) < 40 and max(lengths) > 128 and max(lengths) <= 512


def test_position_and_plot(run, tmp_path):
    pytest.importorskip("matplotlib", reason="the optional package matplotlib")
    path, plot = tmp_path / "p.json", tmp_path / "p.png"
    code, _, err = run("position", "--no-compile", "--positions", 200, "--points", 3, "--steps", 2,
                       "--kv_cache", "int8", "--json", path, "--plot", plot)  # fmt: skip
    assert code == 0, err
    rows = json.loads(path.read_text())["rows"]
    assert [row["position"] for row in rows] == [66, 132, 199]
    assert rows[2]["bytes_per_step"] > rows[0]["bytes_per_step"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    for kind in ("throughput", "latency"):
        row = {
            "batch_size": 1,
            "policy": "eager",
            "decode_tokens_per_s": 5.0,
            "step_s": {"p50": 1.0, "p99": 2.0},
            "time_to_first_token_s": {"p50": 1, "p99": 2},
        }
        if kind == "latency":
            row.pop("batch_size")
        bench_serving.draw_plot(kind, [row], plot, "title")
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_outputs_never_replace_inputs(run, tiny):
    before = (tiny / "config.json").read_bytes()
    code, _, err = run("throughput", "--json", tiny / "config.json")
    assert code == 2 and "is an input" in err
    assert (tiny / "config.json").read_bytes() == before


@pytest.mark.parametrize("arguments", [["throughput"], ["position"], ["--text", "absent.txt"]])
def test_a_plot_of_another_kind_is_refused_before_the_work(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments, "--plot", "x.xyz"])
    monkeypatch.setattr(bench_serving, "load", lambda *args: pytest.fail("the work began"))
    with pytest.raises(UserError, match=r"x\.xyz: a \.png, \.pdf or \.svg file"):
        bench.main()


@pytest.mark.parametrize(
    "kind, args, message",
    [
        ("throughput", ["--batch_sizes", "0"], "at least 1"),
        ("throughput", ["--max_new_tokens", "2"], "at least 5"),
        ("latency", ["--policies", "padding,bukets"], "unknown policy 'bukets'"),
        ("latency", ["--requests", "0"], "at least 1"),
        ("latency", ["--max_new_tokens", "1"], "at least 2"),
        ("throughput", ["--seed", str(2**63)], "takes 64 bits"),
    ],
)
def test_mistakes(kind, args, message):
    with pytest.raises(UserError, match=message):
        bench_serving.parse_args(kind, args)
