"""engine.py: compiled equals eager, no recompilation, batches, cache reuse."""

import pytest
import torch
from tiny import save_tiny

from checkpoint import load_model, open_checkpoint
from engine import Engine, cache_length
from errors import UserError
from graphs import compiled_graphs, configure_compiler
from kernels import native
from sampling import Sampling
from scorer import Scorer

GREEDY = Sampling(temperature=0)


def tiny_model(path, **changes):
    return load_model(open_checkpoint(save_tiny(path, **changes)[0]))


def random_prompt(length, seed=0):
    return torch.randint(0, 199, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_greedy_equals_transformers(tmp_path):
    directory, reference = save_tiny(tmp_path)
    prompt = random_prompt(70)
    engine = Engine(load_model(open_checkpoint(directory)), GREEDY, length=128)
    theirs = reference.generate(
        torch.tensor([prompt]),
        max_new_tokens=50,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert engine.generate([prompt], 50).token_ids[0] == theirs[0, 70:].tolist()


@pytest.mark.parametrize("length, lengths", [(1000, (1, 5, 63, 64, 65, 200, 700)), (300, (1, 279))])
def test_compiled_equals_eager_and_never_recompiles(tmp_path, length, lengths):
    """Greedy, fp32, token for token; after the warm-up no prompt that fits compiles anything."""
    model, new = tiny_model(tmp_path), min(200, length - max(lengths))
    eager = Engine(model, GREEDY, length=length)
    expected = [eager.generate([random_prompt(n)], new).token_ids for n in lengths]
    compiled = Engine(model, GREEDY, length=length, compile_mode="default", compile_prefill=True)
    assert compiled.compiled[-1] == "prefill"
    compiled.warm_up()
    graphs = compiled_graphs()
    for n, ids in zip(lengths, expected, strict=True):
        assert compiled.generate([random_prompt(n)], new).token_ids == ids, n
    assert compiled_graphs() == graphs


def test_recompilations_are_counted():
    """The counter that the test above trusts does move when something compiles."""
    torch._dynamo.reset()
    step = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    step(torch.ones(2))
    graphs = compiled_graphs()
    step(torch.ones(3))
    assert compiled_graphs() == graphs + 1


def test_rows_of_a_batch_equal_each_alone(tmp_path):
    """Prompts of different lengths in one batch, each stopping at its own EOS."""
    model = tiny_model(tmp_path)
    prompts = [random_prompt(n, n) for n in (3, 64, 130)]
    alone = [Engine(model, GREEDY, length=256).generate([p], 60).token_ids[0] for p in prompts]
    eos = {alone[1][20]}
    expected = [ids[: ids.index(min(eos))] if min(eos) in ids else ids for ids in alone]
    batch = Engine(model, GREEDY, batch=3, length=256).generate(prompts, 60, eos)
    assert batch.token_ids == expected


def test_long_prompt_runs_in_chunks(tmp_path):
    """A prompt beyond the largest bucket, in a cache with no room for padding."""
    directory, reference = save_tiny(tmp_path)
    engine = Engine(load_model(open_checkpoint(directory)), GREEDY, length=704)
    prompt = random_prompt(700)
    with torch.inference_mode():
        logits = engine.prefill([prompt])
        expected = reference(torch.tensor([prompt])).logits[:, -1]
    assert (logits - expected).abs().max() < 1e-3


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    model = tiny_model(tmp_path)
    model.layers[1].ffn_norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="no numbers"):
        Engine(model, GREEDY, length=64).generate([[1, 2, 3]], 5)


@pytest.mark.parametrize("kv_cache", ["bf16", "int8"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)], ids=["greedy", "sampled"])
def test_numbers_that_fail_later_are_seen(tmp_path, kv_cache, sampling):
    """The prompt's logits are finite; a token of the answer is not, and what it gives is an EOS."""
    model, prompt = tiny_model(tmp_path, tie_word_embeddings=False), [[1, 2, 3]]
    engine = Engine(model, sampling, length=64, kv_cache=kv_cache)
    first = engine.generate(prompt, 1).token_ids[0][0]
    engine.generator.manual_seed(0)
    model.tok_embeddings.weight.data[first] = float("nan")
    engine = Engine(model, sampling, length=64, kv_cache=kv_cache)
    for eos, count in ((set(), 5), (set(range(200)) - {first}, 9), (set(), 2)):
        engine.generator.manual_seed(0)
        with pytest.raises(UserError, match="no numbers"):
            engine.generate(prompt, count, eos)
    engine.generator.manual_seed(0)
    engine.generate(prompt, 1)  # which is not run


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    with pytest.raises(UserError, match="install g"):
        configure_compiler("cpu")


def test_cache_is_reused_between_turns(tmp_path):
    """A second turn runs only what is new, and gives what a fresh cache gives."""
    model = tiny_model(tmp_path)
    engine = Engine(model, GREEDY, length=512)
    first = random_prompt(100)
    reply = engine.generate([first], 30).token_ids[0]
    second = [*first, *reply, *random_prompt(20, 1)]
    assert engine.shared_prefix(second) >= 129
    chunks = []
    engine.prefill_step = lambda *a: chunks.append(a[0].shape[1]) or engine._prefill_step(*a)
    again = engine.generate([second], 30).token_ids
    assert chunks == [64]
    assert again == Engine(model, GREEDY, length=512).generate([second], 30).token_ids


def test_an_interruption_leaves_no_prefix_behind(tmp_path):
    """Half of another text lies in the slots: none of them is taken for the first text's again."""
    engine = Engine(tiny_model(tmp_path), Sampling(temperature=0), length=128)
    first, second = random_prompt(30), [*random_prompt(30)[:5], *random_prompt(25, seed=1)]
    expected = engine.generate([first], 20).token_ids

    def interrupt(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([second], 20, on_token=interrupt)
    assert engine.generate([first], 20).token_ids == expected


def test_a_cache_has_one_engine(tmp_path):
    model = tiny_model(tmp_path)
    first = Engine(model, Sampling(temperature=0), length=64)
    Engine(model, Sampling(temperature=0), length=1).warm_up()  # no room for a token: nothing to do
    with pytest.raises(ValueError, match="another Engine or Scorer"):
        first.generate([[1, 2]], 4)
    scorer = Scorer(model, length=32)
    Engine(model, GREEDY, length=64)
    with pytest.raises(ValueError, match="another Engine or Scorer"):
        next(scorer.logits(torch.tensor([[1, 2]])))


def test_stops_at_eos_and_streams_it_not(tmp_path):
    model = tiny_model(tmp_path)
    prompt = random_prompt(10)
    ids = Engine(model, GREEDY, length=128).generate([prompt], 40).token_ids[0]
    seen = []
    result = Engine(model, GREEDY, length=128).generate([prompt], 40, {ids[10]}, seen.append)
    assert result.token_ids[0] == ids[: ids.index(ids[10])]
    assert [row[0] for row in seen] == result.token_ids[0]


def test_seed_decides_the_sample(tmp_path):
    model = tiny_model(tmp_path)
    runs = [
        Engine(model, Sampling(1.0, 0), length=128, seed=s).generate([[1, 2]], 50).token_ids
        for s in (7, 7, 8)
    ]
    assert runs[0] == runs[1] != runs[2]
    warm = Engine(model, Sampling(1.0, 0), length=128, seed=7)
    warm.warm_up(9)
    assert warm.generate([[1, 2]], 50).token_ids == runs[0]


def test_cache_length_is_whole_buckets():
    assert [cache_length(n) for n in (0, 1, 64, 65, 1000)] == [64, 64, 64, 128, 1024]


def test_requests_that_do_not_fit_are_refused(tmp_path):
    model = tiny_model(tmp_path)
    engine = Engine(model, GREEDY, length=64)
    with pytest.raises(UserError, match="do not fit"):
        engine.generate([[1] * 60], 5)
    with pytest.raises(UserError, match="empty prompt"):
        engine.generate([[]], 5)
    for tokens in ([0, -1], [199, 3], [5] * 40 + [-7]):
        with pytest.raises(UserError, match="for a vocabulary of 199"):
            engine.generate([tokens], 5)
    with pytest.raises(UserError, match="context is 1024"):
        Engine(model, GREEDY, length=1025)
    with pytest.raises(ValueError, match="compile_mode"):
        Engine(model, GREEDY, length=64, compile_prefill=True)
    assert engine.generate([[1] * 60], 4).token_ids[0]
