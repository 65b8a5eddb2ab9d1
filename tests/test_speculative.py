"""speculative.py: exact greedy texts, unchanged distributions, EOS and limits, switching off."""

import pytest
import torch
from tiny import save_tiny

from checkpoint import load_model, open_checkpoint
from engine import Engine
from errors import UserError
from graphs import compiled_graphs
from quantize import quantize_
from sampling import Sampling, sample
from speculative import (
    CHECK,
    Pace,
    PromptLookup,
    SpeculativeEngine,
    accept_equal,
    accept_sampled,
    distribution,
)

GREEDY = Sampling(temperature=0)
REPEATING = [5, 9, 2, 7, 11, 3] * 6


def tiny_model(path, **changes):
    return load_model(open_checkpoint(save_tiny(path, **changes)[0]))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The model, and drafts: itself again, a coarse copy (often right), and an unrelated one."""
    directory = tmp_path_factory.mktemp("model")
    copy = quantize_(tiny_model(directory), "uint7", skip=lambda n: n == "output")
    other = tiny_model(tmp_path_factory.mktemp("other"), seed=7)
    model, same = (load_model(open_checkpoint(directory)) for _ in range(2))
    return {"model": model, "same": same, "copy": copy, "other": other}


def always(engine):
    """Never switch off: the tests' models are too small for speculation to pay."""
    engine.pace.verdict = lambda: None
    return engine


@pytest.mark.parametrize("draft", [None, "copy", "other", "same"])
@pytest.mark.parametrize("k", [1, 5])
def test_greedy_text_is_the_same(models, draft, k):
    model = models["model"]
    expected = Engine(model, GREEDY, length=256).generate([REPEATING], 150).token_ids
    engine = SpeculativeEngine(model, GREEDY, k, models.get(draft), length=256)
    steps = []
    if draft:
        step = engine.proposer.step
        engine.proposer.step = lambda *args: steps.append(1) or step(*args)
    result = always(engine).generate([REPEATING], 150)
    assert result.token_ids == expected
    assert len(result.step_s) == 149
    made = sum((n + 1) * count for n, count in enumerate(result.accept_counts))
    assert 100 < made <= 147 or draft is None  # but for the first token and two plain steps
    if draft in ("copy", "same"):
        assert sum(result.accept_counts[1:]) > result.accept_counts[0]
    if draft == "same":  # every guess is right; the last round may be cut short
        assert sum(result.accept_counts[:-1]) <= 1
        assert len(steps) <= k * sum(result.accept_counts) + 1  # none runs twice


def test_prompt_lookup_guesses_repetitions(tmp_path):
    lookup = PromptLookup(4, torch.device("cpu"))
    lookup.begin([], 0)
    history = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert lookup.propose(history, 4)[0].tolist() == [4, 5, 6, 1]
    assert lookup.propose(history, 2)[::2][1] == 2
    history += [9, 2, 3]  # (9, 2, 3) is new; (2, 3) was followed by 9 last
    guesses, _, count = lookup.propose(history, 4)
    assert guesses.tolist() == [9, 2, 3, 9] and count == 4  # on and on
    assert lookup.propose([*history, 77, 78], 4)[2] == 0
    # A model of small weights soon says the same thing again and again: that is guessed right.
    model = tiny_model(tmp_path, initializer_range=0.05)
    engine = SpeculativeEngine(model, GREEDY, 4, length=512)
    result = always(engine).generate([REPEATING], 400)
    assert sum(n * c for n, c in enumerate(result.accept_counts)) > 50
    plain = Engine(model, GREEDY, length=512)
    assert result.token_ids == plain.generate([REPEATING], 400).token_ids


@pytest.mark.parametrize("draft", [None, "copy"])
def test_compiled_is_the_same_and_never_recompiles(models, draft):
    model = models["model"]
    plain = Engine(model, GREEDY, length=300)
    expected = [plain.generate([REPEATING[:n]], 100).token_ids for n in (3, 30)]
    engine = SpeculativeEngine(
        model, GREEDY, 4, models.get(draft), length=300, compile_mode="default", fused=False
    )
    steps = ["decode step", "verify step", "draft's step"]
    assert engine.compiled == steps[: 3 if draft else 2]
    engine.warm_up()
    always(engine)
    graphs = compiled_graphs()
    assert [engine.generate([REPEATING[:n]], 100).token_ids for n in (3, 30)] == expected
    assert compiled_graphs() == graphs


@pytest.mark.parametrize("draft", [None, "copy"])
def test_eos_limits_and_streaming(models, draft):
    model = models["model"]
    ids = Engine(model, GREEDY, length=256).generate([REPEATING], 100).token_ids[0]
    full = len(REPEATING) + 100
    for at in (0, 1, 2, 3, 30, 57):
        seen = []
        engine = always(SpeculativeEngine(model, GREEDY, 5, models.get(draft), length=full))
        result = engine.generate([REPEATING], 100, {ids[at]}, seen.append)
        assert result.token_ids[0] == ids[: ids.index(ids[at])] == [row[0] for row in seen]
    for count in (1, 2, 3, 4, 9, 100):
        assert engine.generate([REPEATING], count).token_ids[0] == ids[:count]


@pytest.mark.parametrize("draft", [None, "copy"])
def test_cache_is_reused_between_turns(models, draft):
    model = models["model"]
    engine = always(SpeculativeEngine(model, GREEDY, 5, models.get(draft), length=512))
    reply = engine.generate([REPEATING], 50).token_ids[0]
    second = [*REPEATING, *reply, 4, 8, 15]
    assert engine.shared_prefix(second) >= len(REPEATING) + 49
    expected = Engine(models["same"], GREEDY, length=512).generate([second], 50).token_ids
    result = engine.generate([second], 50)
    assert result.token_ids == expected
    if draft:  # and so is the draft's: it still guesses well
        assert sum(result.accept_counts[1:]) > result.accept_counts[0]


def test_lookup_with_a_seed_gives_the_plain_text(models):
    sampling = Sampling(0.7, 20)
    plain = Engine(models["same"], sampling, length=256, seed=3)
    engine = always(SpeculativeEngine(models["model"], sampling, 4, length=256, seed=3))
    for _ in range(2):
        expected = plain.generate([REPEATING], 120).token_ids
        assert engine.generate([REPEATING], 120).token_ids == expected


def test_rejection_sampling_follows_p():
    """Chi-square of the first two tokens of 8000 rounds against p, for good and bad drafts."""
    generator = torch.Generator().manual_seed(5)
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0], [0.05, 0.05, 0.1, 0.1, 0.7], [0.2] * 5])
    for q in (torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1]), torch.tensor([0.0, 0.05, 0.05, 0.0, 0.9])):
        first, second = torch.zeros(5), torch.zeros(5)
        guesses = torch.multinomial(q.expand(2, 5), 4000, True, generator=generator).T
        for guess in guesses:
            u = torch.rand(4, generator=generator)
            kept, *tokens = accept_sampled(guess, torch.tensor(2), p, q.expand(2, 5), u).tolist()
            first[tokens[0]] += 1
            if kept >= 1:
                second[tokens[1]] += 1
        for counts, wanted in ((first, p[0]), (second, p[1])):
            expected = wanted * counts.sum()
            assert counts[wanted == 0].sum() == 0
            chi2 = ((counts - expected)[wanted > 0] ** 2 / expected[wanted > 0]).sum()
            assert chi2 < 18.5  # 0.1% point for 4 degrees of freedom


@pytest.mark.parametrize("draft", [None, "copy", "other"])
def test_sampled_texts_are_distributed_as_plain_ones(tmp_path, draft):
    """Chi-square of the tokens of short texts, vocabulary 4, against exact probabilities.

    Three tokens follow a prompt that repeats: the third comes out of rounds that guess the second
    and third, so 64 sequences of known probability are compared.
    """
    shape = dict(vocab_size=4, hidden_size=24, num_attention_heads=3, num_key_value_heads=1,
                 intermediate_size=16, num_hidden_layers=1)  # fmt: skip
    model = tiny_model(tmp_path / "a", **shape)
    drafts = {"copy": quantize_(tiny_model(tmp_path / "a", **shape), "uint3"),
              "other": tiny_model(tmp_path / "b", seed=3, **shape)}  # fmt: skip
    sampling, prompt, runs = Sampling(1.2, 3), [1, 2, 3, 1, 2, 3, 1, 2], 1000
    engine = SpeculativeEngine(model, sampling, 2, drafts.get(draft), length=64, seed=11)
    always(engine).pace.needs_step = lambda: False
    counts = torch.zeros(4, 4, 4)
    for _ in range(runs):
        a, b, c = engine.generate([prompt], 3).token_ids[0]
        counts[a, b, c] += 1
    pairs = [[*prompt, a, b] for a in range(4) for b in range(4)]
    model.setup_cache(16, 64)
    with torch.inference_mode():
        logits = model(torch.tensor(pairs), torch.zeros(16, dtype=torch.int64))
    p = distribution(logits.flatten(0, 1), sampling).view(16, -1, 4)
    start = len(prompt)
    p1, p2, p3 = p[0, start - 1], p[:, start].view(4, 4, 4)[:, 0], p[:, start + 1].view(4, 4, 4)
    expected = p1[:, None, None] * p2[:, :, None] * p3 * runs
    assert counts[expected == 0].sum() == 0
    often = expected >= 8
    rest = (counts[~often].sum(), expected[~often].sum())
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum() + (rest[0] - rest[1]) ** 2 / (
        rest[1] + 1e-9
    )
    freedom = int(often.sum())
    assert freedom > 15
    # Wilson and Hilferty's approximation of the 0.1% point
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi2 < limit
    if draft is not None:
        assert sum(engine.counts) > 0


def test_accept_equal_counts_only_what_was_meant():
    guesses, tokens = torch.tensor([4, 5, 6]), torch.tensor([4, 5, 6, 7])
    for count, kept in ((3, 3), (2, 2), (0, 0)):
        assert accept_equal(guesses, torch.tensor(count), tokens).tolist() == [kept, 4, 5, 6, 7]
    assert accept_equal(guesses, torch.tensor(3), torch.tensor([4, 9, 6, 7]))[0] == 1


def test_distribution_is_what_sample_draws_from():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(0.8, 7, 0.9, 0.05)
    p = distribution(logits, sampling)[0]
    u = torch.rand(20000, generator=torch.Generator().manual_seed(1))
    counts = sample(logits.expand(20000, -1), u, sampling).bincount(minlength=12)
    assert p.sum() == pytest.approx(1) and counts[p == 0].sum() == 0
    assert (counts / 20000 - p).abs().max() < 0.02


def test_it_switches_itself_off_and_says_so(models):
    """A draft as large as the model and always wrong cannot pay; the text stays the same."""
    model = models["model"]
    expected = Engine(model, GREEDY, length=256).generate([REPEATING], 150).token_ids
    engine = SpeculativeEngine(model, GREEDY, 5, models["other"], length=256)
    seconds = iter([1.0] * 1000)
    engine.pace.add_round = lambda s, n: Pace.add_round(engine.pace, 3 * next(seconds), n)
    engine.pace.add_step = lambda s: Pace.add_step(engine.pace, next(seconds))
    result = engine.generate([REPEATING], 150)
    assert result.token_ids == expected and len(result.step_s) == 149
    assert sum(result.accept_counts) == CHECK
    assert "switched off after 8 rounds: a round costs 3.00 plain steps" in result.note
    good = SpeculativeEngine(model, GREEDY, 5, models["same"], length=256)
    good.pace.add_round = lambda s, n: Pace.add_round(good.pace, 3.0, n)
    good.pace.add_step = lambda s: Pace.add_step(good.pace, 1.0)
    assert good.generate([REPEATING], 150).note is None


def test_what_it_does_not_do_is_refused(models, tmp_path):
    model = models["model"]
    with pytest.raises(UserError, match="batches of 1"):
        SpeculativeEngine(model, GREEDY, 4, batch=2, length=64)
    with pytest.raises(UserError, match="speculate_k 0"):
        SpeculativeEngine(model, GREEDY, 0, length=64)
    with pytest.raises(UserError, match="vocabulary has 100"):
        draft = tiny_model(tmp_path, vocab_size=100)
        SpeculativeEngine(model, GREEDY, 4, draft, length=64)
