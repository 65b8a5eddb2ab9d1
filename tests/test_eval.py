"""eval.py against a float64 hand computation, and its lm_eval adapter against lm_eval's own."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_text import VOCABULARY, save_tiny_with_tokenizer

import eval as evaluation
from checkpoint import load_model, open_checkpoint
from engine import Engine
from errors import UserError
from eval import perplexity
from quantize import quantize_
from scorer import Scorer
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
LENGTH = 48


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_with_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCABULARY, (5 * LENGTH + 7,)).tolist()


def model_of(tiny, mode=None):
    model = load_model(open_checkpoint(tiny[0]))
    return quantize_(model, mode) if mode else model


def reference_logp(reference, windows):
    """Log-probabilities [n, L, V] in float64 by transformers."""
    with torch.no_grad():
        return reference.double()(windows).logits.log_softmax(-1)


def test_a_perplexity_of_no_numbers_is_refused(tiny, ids):
    model = model_of(tiny)
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="no numbers"):
        perplexity(model, ids, seq_length=LENGTH, limit=1)


def test_perplexity_against_hand_computation(tiny, ids):
    windows = torch.tensor(ids[: 5 * LENGTH]).view(5, LENGTH)
    logp = reference_logp(tiny[1], windows)
    loss = -logp[:, :-1].gather(2, windows[:, 1:, None]).mean()
    score = perplexity(model_of(tiny), ids, seq_length=LENGTH)
    assert score.tokens == 5 * (LENGTH - 1)
    assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert score.kl_mean is None


def test_log_sum_exp_of_a_large_vocabulary():
    x = torch.randn(5, 100_000) * 3
    want = x.double().logsumexp(-1, keepdim=True)
    assert (evaluation.log_sum_exp(x) - want).abs().max() < 1e-7  # in fp32: 1e-6


def test_divergence_against_formula(tiny, ids):
    model, base = model_of(tiny, "int4"), model_of(tiny)
    score = perplexity(model, ids, seq_length=LENGTH, limit=3, reference=base)
    windows = torch.tensor(ids[: 3 * LENGTH]).view(3, LENGTH)
    p, q = (whole(m, windows)[:, :-1].double().log_softmax(-1) for m in (base, model))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    targets = windows[:, 1:, None]
    ratio = (p.gather(2, targets).mean() - q.gather(2, targets).mean()).exp()
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert kl > 1e-4
    assert score.kl_mean == pytest.approx(kl.item(), rel=1e-3)
    assert score.perplexity_ratio == pytest.approx(ratio.item(), rel=1e-4)
    assert score.top1_agreement == pytest.approx(agreement.item(), abs=1e-9)
    same = perplexity(model_of(tiny), ids, seq_length=LENGTH, limit=1, reference=base)
    assert same.kl_mean == pytest.approx(0, abs=1e-6) and same.top1_agreement == 1
    assert same.perplexity_ratio == pytest.approx(1)


def whole(model, windows):
    """Logits [n, L, V] of one forward pass over whole windows."""
    model.setup_cache(len(windows), windows.shape[1])
    return model(windows, torch.zeros(len(windows), dtype=torch.int64))


SMALL = [(1, 33, 1), (1, 30, 7), (4, 30, 16)]  # few enough rows for the kernels of decoding


@pytest.mark.parametrize(
    "batch, length, rows", [(1, 300, 256), (2, 129, 256), (16, 40, 256), (3, 16, 256), *SMALL]
)
def test_chunks_equal_one_pass(tiny, batch, length, rows):
    model = model_of(tiny)
    windows = torch.randint(0, VOCABULARY, (max(batch - 1, 1), length))
    expected = whole(model, windows)
    scorer = Scorer(model, batch, 300, rows=rows)
    assert rows > 16 or scorer.chunk <= rows
    positions, chunks = zip(*scorer.logits(windows), strict=True)
    assert [p.start for p in positions[1:]] == [p.stop for p in positions[:-1]]
    assert all(chunk.shape[1] <= scorer.chunk for chunk in chunks)
    assert torch.allclose(torch.cat(chunks, 1), expected.float(), atol=1e-4)


def test_limit_and_last_partial_window(tiny, ids):
    model = model_of(tiny)
    two = perplexity(model, ids, seq_length=LENGTH, limit=2)
    assert two == replaced(perplexity(model, ids[: 2 * LENGTH + 5], seq_length=LENGTH), two)
    assert two.tokens == 2 * (LENGTH - 1)


def replaced(score, other):
    score.seconds = other.seconds
    return score


def test_int8_cache_is_near(tiny, ids):
    exact, rounded = (
        perplexity(model_of(tiny), ids, seq_length=LENGTH, kv_cache=kind).perplexity
        for kind in ("bf16", "int8")
    )
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(seq_length=5000), "context"),
        (dict(seq_length=1), "at least 2"),
        (dict(limit=0), "at least 1"),
        (dict(rows=0), "at least 1"),
        (dict(seq_length=1000), "less than one window"),
    ],
)
def test_mistakes(tiny, ids, change, message):
    ids = ids * 100 if "context" in message else ids
    with pytest.raises(UserError, match=message):
        perplexity(model_of(tiny), ids, **{"seq_length": LENGTH, **change})


def run(*arguments):
    command = [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line(tiny, tmp_path):
    text, figures = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(evaluation.bundled_text()[:2000], encoding="utf-8")
    done = run(
        "--checkpoint_path", tiny[0], "--text", text, "--seq_length", 64, "--limit", 3,
        "--quantization", "int8", "--reference", tiny[0], "--json", figures,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = json.loads(figures.read_text())
    keys = "protocol perplexity tokens seq_length kl_mean top1_agreement perplexity_ratio seconds"
    assert set(keys.split()) <= set(out)
    assert out["mode"] == "int8" and out["tokens"] == 3 * 63 and 0 < out["kl_mean"] < 0.1
    assert "non-overlapping 64-token windows" in out["protocol"] and "no BOS" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text", "absent.txt"], "absent.txt"),
        (["--seq_length", "100000"], "window"),
        (["--quantization", "int9"], "unknown mode"),
        (["--max_length", "64"], "--max_length is of --tasks"),
        (["--batch_size", "4"], "--batch_size is of --tasks"),
        (["--tasks", "wikitext", "--num_fewshot", "-1"], "--num_fewshot -1"),
        (["--tasks", "wikitext", "--seq_length", "64"], "--seq_length is of a text"),
        (["--tasks", "wikitext", "--rows", "16"], "--rows is of a text"),
        (["--tasks", "wikitext", "--reference", "absent"], "--reference is of a text"),
        (["--threads", "100000"], "--threads 100000: take 1 to"),
    ],
)
def test_bad_input_is_one_line(tiny, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint_path", str(tiny[0]), *arguments])
    with pytest.raises(SystemExit) as stopped:
        evaluation.cli(evaluation.main)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_missing_lm_eval_is_one_line(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval_adapter", None)
    with pytest.raises(UserError, match="pip install"):
        evaluation.run_tasks(None, None, None)


# lm_eval, offline: tasks made of the shipped text, ours against lm_eval's own adapter.

ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
should_decontaminate: false
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text[10:90] if choices[1] < 'k' else text[5:40]}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12}}
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    paragraphs = [p for p in evaluation.bundled_text().split("\n") if len(p) > 200][:14]
    rows = [
        {
            "text": p + "\n" + p[: 40 * i],
            "question": "" if i == 3 else p[: 20 + 9 * i],
            "choices": [p[60:90], p[10:25], " the"],
        }
        for i, p in enumerate(paragraphs)
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, task in (("rolling", ROLLING), ("choice", CHOICE), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(task.format(data=data))
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("lm_eval", reason="the optional package lm_eval")


@pytest.mark.parametrize("bos", [False, True])
def test_tasks_against_hflm(tiny, tasks, offline, bos):
    pytest.importorskip("accelerate", reason="lm_eval's own adapter needs it")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from lm_eval_adapter import FlatllamaLM

    tokenizer = load_tokenizer(tiny[0])
    tokenizer.add_bos = bos
    ours = FlatllamaLM(model_of(tiny), tokenizer, batch=4, max_length=100)
    theirs = HFLM(
        tiny[1].float(), tokenizer=str(tiny[0]), batch_size=4, max_length=100, add_bos_token=bos,
        device="cpu",
    )  # fmt: skip
    if bos:  # what a tokenizer that begins texts with BOS does by itself
        from tokenizers.processors import TemplateProcessing

        post = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        theirs.tokenizer.backend_tokenizer.post_processor = post
    names = ["tiny_rolling", "tiny_choice", "tiny_generate"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    runs = [
        offline.simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0)
        for lm in (ours, theirs)
    ]
    for name in names:
        mine, other = (sorted(r["samples"][name], key=lambda s: s["doc_id"]) for r in runs)
        assert len(mine) == len(other) == 14
        for a, b in zip(mine, other, strict=True):
            assert same_responses(a["resps"], b["resps"]), (name, a["resps"], b["resps"])
        for key, value in runs[0]["results"][name].items():
            if isinstance(value, float):
                assert value == pytest.approx(runs[1]["results"][name][key], rel=1e-3), key


def test_continuations_of_no_numbers_are_refused(tiny, tasks, monkeypatch):
    """NaN that comes after the prompt."""
    from lm_eval.api.instance import Instance

    from lm_eval_adapter import FlatllamaLM

    prefill = Engine.prefill

    def spoiled(engine, *args):
        logits = prefill(engine, *args)
        engine.model.layers[0].attention_norm.weight.data.fill_(float("nan"))
        return logits

    lm = FlatllamaLM(model_of(tiny), load_tokenizer(tiny[0]), batch=2, max_length=100)
    settings = {"until": ["never"], "max_gen_toks": 9}
    request = Instance("generate_until", {}, ("a text", settings), 0)
    lm.generate_until([request], disable_tqdm=True)
    monkeypatch.setattr(Engine, "prefill", spoiled)
    with pytest.raises(UserError, match="no numbers"):
        lm.generate_until([request], disable_tqdm=True)


def same_responses(a, b) -> bool:
    """Nested answers: numbers to 1e-3, everything else equal."""
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_responses, a, b))
    return math.isclose(a, b, abs_tol=1e-3) if isinstance(a, float) else a == b


def test_tasks_command_line(tiny, tasks, offline, tmp_path):
    figures = tmp_path / "out.json"
    done = run(
        "--checkpoint_path", tiny[0], "--tasks", "tiny_rolling", "--include_path", tasks,
        "--limit", 3, "--json", figures,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(figures.read_text())["tasks"]["tiny_rolling"]["word_perplexity"] > 1
    done = run("--checkpoint_path", tiny[0], "--tasks", "no_such_task")
    assert done.returncode == 2 and "no_such_task" in done.stderr.splitlines()[-1]
