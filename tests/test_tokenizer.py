"""Token ids against the reference tokenizers; streaming; chat templates; bad files."""

import json
import random
import shutil
import sys

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from scripts.gguf_tokenizer import LLAMA3_REGEX, sentencepiece_merges
from tokenizer import LLAMA3_RANKS, load_tokenizer

LLAMA_MODELS = "llama-models==0.3.0"
MISTRAL = "mistral-common==1.8.5"
SPECIAL = "<|im_start|>user\nHi<|im_end|> <|endoftext|><|im_end|>\n<repo_name>x<|im_end|"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is 2 + 2? "},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "¿Y en español?"},
]


@pytest.fixture(scope="module")
def smollm(default_model):
    return load_tokenizer(default_model)


@pytest.fixture(scope="module")
def smollm_reference(default_model):
    return transformers.AutoTokenizer.from_pretrained(default_model)


def first_difference(ours: list[int], theirs: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
    return f"token {at}: {ours[at - 3 : at + 3]} != {theirs[at - 3 : at + 3]}"


def reference_ids(reference, text: str) -> list[int]:
    """The ids of transformers or of `tokenizers`, without BOS."""
    if isinstance(reference, tokenizers.Tokenizer):
        return reference.encode(text, add_special_tokens=False).ids
    return reference.encode(text, add_special_tokens=False)


def assert_same_ids(tokenizer, reference, text: str) -> list[int]:
    ours, theirs = tokenizer.encode(text, bos=False), reference_ids(reference, text)
    assert ours == theirs, first_difference(ours, theirs)
    return ours


def test_smollm_ids_and_text_equal_the_reference(smollm, smollm_reference, mixed_text):
    ids = assert_same_ids(smollm, smollm_reference, mixed_text + SPECIAL)
    assert smollm.decode(ids) == smollm_reference.decode(ids)
    assert smollm.vocab_size == len(smollm_reference) == 49152


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "a", SPECIAL, "  <|im_end|>  ", "\x04\x1d\U000f1234"]
)
def test_smollm_edges(smollm, smollm_reference, text):
    ids = assert_same_ids(smollm, smollm_reference, text)
    assert smollm.decode(ids) == smollm_reference.decode(ids)


def test_plain_text_cannot_carry_special_tokens(smollm, smollm_reference):
    ids = smollm.encode(SPECIAL, allow_special=False)
    assert not set(ids) & set(smollm.special.values())
    assert smollm.decode(ids) == SPECIAL
    assert ids == smollm_reference.encode(SPECIAL, split_special_tokens=True)


def test_smollm_settings(smollm):
    assert smollm.bos_id == 1
    assert smollm.eos_ids == {0, 2}  # <|endoftext|>, <|im_end|>
    assert smollm.encode("a") == smollm.encode("a", bos=False)
    assert smollm.encode("a", bos=True) == [1, *smollm.encode("a")]


def test_smollm_chat_equals_the_reference(smollm, smollm_reference):
    for messages in (CHAT, CHAT[1:], CHAT[:2], [{"role": "user", "content": "a <|im_end|> b"}]):
        for prompt in (True, False):
            theirs = smollm_reference.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )
            assert smollm.apply_chat_template(messages, prompt) == theirs
            assert smollm.chat(messages, prompt) == reference_ids(smollm_reference, theirs)


def test_streaming_gives_whole_characters(smollm):
    text = "naïve 👩‍👩‍👧‍👦 漢字 \U0001f9be fin"
    stream = smollm.stream()
    pieces = [stream.push(i) for i in smollm.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text and stream.finish() == ""
    cut = smollm.encode("🦾")[:-1]
    assert [smollm.stream().push(i) for i in cut[:1]] == [""]
    assert smollm.decode(cut) == "\ufffd"


def test_random_ids_decode_like_the_reference(smollm, smollm_reference):
    generator = random.Random(1)
    for _ in range(200):
        ids = [generator.randrange(49152) for _ in range(generator.randrange(40))]
        stream = smollm.stream()
        streamed = "".join([stream.push(i) for i in ids]) + stream.finish()
        assert streamed == smollm.decode(ids) == smollm_reference.decode(ids)
    assert smollm.decode([1, 2, 60_000], skip_special=True) == ""
    with pytest.raises(ValueError, match="not a token id"):
        smollm.decode([-1])


def test_lone_surrogates_do_not_crash(smollm):
    assert smollm.decode(smollm.encode("a\ud800b\ud83e\uddbe")) == "a\ufffdb🦾"


def test_long_runs_take_no_quadratic_time(smollm):
    text = "ab" * 30_000 + " " * 30_000
    assert smollm.decode(smollm.encode(text)) == text


# ------------------------------------------------------------------------------ Llama 3


@pytest.fixture(scope="module")
def llama3(package_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama3")
    for name in ("llama3/tokenizer.model", "llama3/tokenizer.py", "tokenizer_utils.py"):
        path = package_file(LLAMA_MODELS, f"llama_models/{name}")
        if name.endswith(".model"):
            shutil.copy(path, directory)
    sys.path.insert(0, str(path.parent.parent))  # Meta's own code, straight out of its wheel
    try:
        from llama_models.llama3.tokenizer import Tokenizer
    finally:
        sys.path.pop(0)
    return load_tokenizer(directory), Tokenizer(directory / "tokenizer.model")


def meta_ids(reference, text: str, **options) -> list[int]:
    return reference.encode(text, bos=False, eos=False, **options)


def test_llama3_equals_metas_code(llama3, mixed_text):
    ours, reference = llama3
    for start in range(0, len(mixed_text), 350_000):  # Meta's code cuts at 400,000
        text = mixed_text[start : start + 350_000]
        ids = ours.encode(text, bos=False)
        assert ids == meta_ids(reference, text), first_difference(ids, meta_ids(reference, text))
    assert ours.decode(ids) == reference.decode(ids) == text
    assert ours.special == reference.special_tokens
    assert ours.vocab_size == reference.n_words == 128_256
    assert {*reference.stop_tokens} <= ours.eos_ids
    assert ours.encode("a") == reference.encode("a", bos=True, eos=False)


def test_llama3_special_tokens_and_long_runs(llama3):
    ours, reference = llama3
    text = "x<|eot_id|>y<|reserved_special_token_7|>"
    assert ours.encode(text, bos=False) == meta_ids(reference, text, allowed_special="all")
    assert ours.encode(text, bos=False, allow_special=False) == meta_ids(reference, text)
    long = "a" * 60_001 + " " * 26_000 + "b c"
    assert ours.encode(long, bos=False) == meta_ids(reference, long)


def test_llama3_chat_format(llama3):
    ours, _ = llama3
    assert ours.apply_chat_template(CHAT[:2]) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert ours.chat(CHAT)[:2] == [128000, 128006]
    assert ours.chat(CHAT)[-2] == 128007


def test_llama3_tokenizer_json_equals_tiktoken(llama3, tmp_path, mixed_text):
    """The same ranks as tokenizer.json: merges, Split by a regular expression, ignore_merges."""
    ours, _ = llama3
    vocab, merges = vocabulary_and_merges(ours)
    bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
    theirs = tokenizers.Tokenizer(bpe)
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # fmt: skip
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens(sorted(ours.special, key=ours.special.get))
    theirs.save(str(tmp_path / "tokenizer.json"))
    from_json = load_tokenizer(tmp_path)
    assert from_json.special == ours.special
    text = mixed_text[400_000:550_000] + mixed_text[-150_000:]
    ids = assert_same_ids(from_json, theirs, text)
    assert ids == ours.encode(text, bos=False)
    assert from_json.decode(ids) == text


def vocabulary_and_merges(tokenizer):
    """Ranks -> byte-level vocabulary, and the merge that makes each token, in the ranks' order."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks = {tokenizer.table[i]: i for i in range(LLAMA3_RANKS)}
    letters = bytes_to_unicode()
    text = {data: "".join(letters[b] for b in data) for data in ranks}
    merges = []
    for data, rank in ranks.items():
        cuts = [(ranks.get(data[:c]), ranks.get(data[c:]), c) for c in range(1, len(data))]
        pairs = sorted((a, b, c) for a, b, c in cuts if a is not None and b is not None)
        merges += [(rank, text[data[:c]], text[data[c:]]) for _, _, c in pairs]
    return {text[d]: i for d, i in ranks.items()}, [(a, b) for _, a, b in sorted(merges)]


# ------------------------------------------------------------------------------ Llama 2


def sentencepiece_json(model, path, added: list[str]) -> None:
    """Write the tokenizer.json that stands for a sentencepiece model, as Llama 2's does."""
    tokens = [model.id_to_piece(i) for i in range(model.vocab_size())]
    normal = [not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
              for i in range(len(tokens))]  # fmt: skip
    usable = [t if n else "" for t, n in zip(tokens, normal, strict=True)]
    merges = sentencepiece_merges(usable, [model.get_score(i) for i in range(len(tokens))])
    bpe = models.BPE(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    )  # fmt: skip
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in added])
    tokenizer.save(str(path))


@pytest.mark.parametrize("which", ["small", "mistral"])
def test_sentencepiece_three_ways(which, small_sentencepiece, package_file, tmp_path, mixed_text):
    """sentencepiece itself, our tokenizer.json and the reference's reading of it agree."""
    source = small_sentencepiece / "tokenizer.model"
    if which == "mistral":  # Llama 2's kind, 32,000 pieces, out of a package
        source = package_file(MISTRAL, "mistral_common/data/tokenizer.model.v1")
    shutil.copy(source, tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    text = mixed_text[400_000:500_000] + mixed_text[-100_000:]
    ids = ours.encode(text, bos=False)
    assert ids == model.encode(text)
    assert ours.decode(ids) == text
    assert ours.encode("a") == [1, *model.encode("a")]
    sentencepiece_json(model, tmp_path / "tokenizer.json", ["<s>", "</s>"])
    from_json = load_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    json_ids = assert_same_ids(from_json, theirs, text)
    assert json_ids == ids, first_difference(json_ids, ids)
    assert from_json.decode(ids) == text
    special = "<s>[INST] a [/INST] b </s><s> c"
    assert assert_same_ids(from_json, theirs, special) == ours.encode(special, bos=False)
    plain = ours.encode(special, bos=False, allow_special=False)
    assert plain == from_json.encode(special, bos=False, allow_special=False)
    assert not {1, 2} & set(plain)


def test_llama2_chat_format(small_sentencepiece):
    ours = load_tokenizer(small_sentencepiece)
    assert ours.apply_chat_template(CHAT) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n  What is 2 + 2? [/INST] 4 </s>"
        "<s>[INST] ¿Y en español? [/INST]"
    )
    ids = ours.chat(CHAT)
    assert ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1
    with pytest.raises(ValueError, match="take turns"):
        ours.chat([CHAT[1], CHAT[1]])
    assert ours.eos_ids == {2}


# -------------------------------------------------------- every step of tokenizer.json, and errors

PRE_TOKENIZERS = {
    "none": None,
    "byte-level": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "byte-level-prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(False)]
    ),
    "metaspace-always": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "metaspace-first": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    "metaspace-never": pre_tokenizers.Metaspace(prepend_scheme="never"),
    "split-string": pre_tokenizers.Split(" ", "isolated"),
    "split-removed": pre_tokenizers.Split(Regex(r"\s+"), "removed"),
    "split-removed-inverted": pre_tokenizers.Split(Regex(r"\w+|[^\w\s]+|\s"), "removed", True),
    "split-isolated-inverted": pre_tokenizers.Split(Regex(r"\w+"), "isolated", True),
    "two-splits": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
         pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"),
         pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
}  # fmt: skip
NORMALIZERS = {
    "none": None,
    "nfc": normalizers.NFC(),
    "nested": normalizers.Sequence(
        [normalizers.Sequence([normalizers.NFKC()]), normalizers.Replace(Regex("[oó]+"), "O")]
    ),
}


def train_small(pre_tokenizer, normalizer, text: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    lines = [line[i : i + 80] for line in text.splitlines() for i in range(0, len(line), 80)]
    tokenizer.train_from_iterator(lines, trainer)
    added = tokenizers.AddedToken
    both = added("<both>", lstrip=True, rstrip=True, normalized=False)
    tokenizer.add_tokens([added("<left>", lstrip=True), added("<right>", rstrip=True), both])
    tokenizer.add_tokens([added("word", single_word=True), added("<raw>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_every_step_equals_the_reference(tmp_path, pre_tokenizer, normalizer, mixed_text):
    text = mixed_text[:20_000] + mixed_text[-20_000:]
    theirs = train_small(PRE_TOKENIZERS[pre_tokenizer], NORMALIZERS[normalizer], text)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    texts = [text, " <left> a <right>  b <both> c<raw><raw> words word a word. <s>x<s>", "<s> a",
             "a  <left><right> ", "aóo é e\u0301 ﬁ"]  # fmt: skip
    for sample in texts:
        assert_same_ids(ours, theirs, sample)
    theirs.encode_special_tokens = True
    assert ours.encode(texts[1], bos=False, allow_special=False) == reference_ids(theirs, texts[1])


def small_json(**changes) -> dict:
    tokens = {c: i for i, c in enumerate("abc")}
    config = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": tokens | {"ab": 3}, "merges": ["a b"]},
    }
    return config | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "model 'Unigram'"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "model 'WordPiece'"),
        ({"model": {"type": "BPE"}}, "damaged.*vocab"),
        ({"model": {"vocab": {"a": 0}, "merges": ["a b"]}}, "damaged.*'ab'"),
        ({"model": small_json()["model"] | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"normalizer": {"type": "BertNormalizer"}}, "normalizer 'BertNormalizer'"),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "pre-tokenizer 'UnicodeScripts'"),
        (
            {
                "pre_tokenizer": {
                    "type": "Split", "pattern": {"String": "a"}, "behavior": "MergedWithNext"
                }
            },
            "Split behavior 'MergedWithNext'",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"
                }
            },
            "pattern",
        ),
        ({"post_processor": {"type": "BertProcessing"}}, "post-processor 'BertProcessing'"),
        ({"decoder": {"type": "WordPiece"}}, "decoder.*WordPiece"),
        ({"decoder": None}, "decoder"),
        ({"model": 3}, "damaged"),
    ],
)  # fmt: skip
def test_unsupported_files_are_named(tmp_path, changes, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_json(**changes)))
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("wrong", [None, 0.5, -1, "7"])
@pytest.mark.parametrize("where", ["vocab", "added"])
def test_ids_that_are_no_whole_numbers_are_refused(tmp_path, where, wrong):
    config = small_json(added_tokens=[{"id": 4, "content": "<4>", "special": True}])
    if where == "vocab":
        config["model"]["vocab"][next(iter(config["model"]["vocab"]))] = wrong
    else:
        config["added_tokens"][0]["id"] = wrong
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no whole number"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"model": {"type": "BPE", "vo', "not valid JSON"),
        ("tokenizer.json", b"", "not valid JSON"),
        ("tokenizer.json", b"\xff\xfe", "not valid JSON"),
        ("tokenizer.json", b"[]", "not a JSON object"),
        ("tokenizer.model", b"", "not a sentencepiece model"),
        ("tokenizer.model", b"\x00junk" * 50, "not a sentencepiece model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "2 ranks"),
        ("tokenizer.model", b"IQ== 0\nIg== x\n", "not a tiktoken file"),
        ("other", b"", "no tokenizer.json and no tokenizer.model"),
    ],
)
def test_broken_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def write_settings(directory, **files) -> None:
    added = [{"id": i, "content": f"<{i}>", "special": True} for i in (4, 5, 6)]
    (directory / "tokenizer.json").write_text(json.dumps(small_json(added_tokens=added)))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_bos_and_eos_come_from_every_file(tmp_path):
    write_settings(
        tmp_path,
        tokenizer_config={
            "bos_token": {"content": "<4>"},
            "eos_token": "<5>",
            "add_bos_token": True,
        },
        generation_config={"eos_token_id": [6, 5], "bos_token_id": 0},
        config={"eos_token_id": 0, "bos_token_id": 1},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (4, {0, 5, 6})
    assert tokenizer.encode("ab") == [4, 3]
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat(CHAT)
    write_settings(tmp_path, tokenizer_config={}, generation_config={}, config={})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.encode("ab")) == (None, set(), [3])
    with pytest.raises(ValueError, match="no BOS"):
        tokenizer.encode("a", bos=True)
    write_settings(tmp_path, generation_config={"eos_token_id": ["<5>"]})
    with pytest.raises(ValueError, match="malformed"):
        load_tokenizer(tmp_path)


TEMPLATES = [
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "{% for m in messages %}\n  {% if loop.index == 2 %}{% break %}{% endif %}\n{{ m.role }}\n"
    "{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "{{ bos_token }}{{ tools is none }}{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ strftime_now('%Y') | length }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(smollm_reference, default_model, tmp_path, template):
    for path in default_model.glob("*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    theirs = smollm_reference.apply_chat_template(CHAT, tokenize=False, chat_template=template)
    assert load_tokenizer(tmp_path).apply_chat_template(CHAT, False) == theirs


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for %}", "chat template failed"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "chat template failed"),
    ],
)
def test_templates_that_fail_or_misbehave(smollm, monkeypatch, template, message):
    monkeypatch.setattr(smollm, "chat_template", template)
    with pytest.raises(ValueError, match=message) as caught:
        smollm.chat(CHAT)
    assert "\n" not in str(caught.value)
