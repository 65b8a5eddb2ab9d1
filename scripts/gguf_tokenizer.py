"""The tokenizer of a GGUF file as Hugging Face tokenizer.json, tokenizer_config.json and
generation_config.json, in the form that the `tokenizers` library reads too.

Two kinds: "gpt2" (byte-level BPE; the field tokenizer.ggml.pre names the pre-tokenizer) and
"llama" (sentencepiece BPE with byte fallback, whose merges follow from the pieces' scores).
"""

from typing import Any, Protocol

from errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class GGUFError(UserError):
    """This GGUF file cannot be converted. The message says why in one line."""


class Fields(Protocol):
    """What this file needs of an open GGUF file."""

    path: Any

    def get(self, key: str, default: Any = None) -> Any: ...


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def pre_tokenizer(name: str, path: Any) -> dict[str, Any]:
    """The tokenizer.json pre-tokenizer for a value of tokenizer.ggml.pre."""
    steps: list[dict[str, Any]]
    if name in ("smollm", "starcoder", "refact", "command-r"):
        steps = [{"type": "Digits", "individual_digits": True}, byte_level(True)]
    elif name in ("gpt-2", "gpt2"):
        return byte_level(True)
    elif name in ("llama-bpe", "llama3", "llama-v3"):
        pattern = {"Regex": LLAMA3_REGEX}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        steps = [split, byte_level(False)]
    else:
        raise GGUFError(
            f"{path}: pre-tokenizer {name!r} is not supported (smollm, gpt-2 and llama-bpe are)"
        )
    return {"type": "Sequence", "pretokenizers": steps}


def sentencepiece_merges(tokens: list[str], scores: list[float]) -> list[str]:
    """Every split of a piece into two pieces, best score first.

    A sentencepiece BPE model merges the neighbours whose union scores highest; listing all
    splits of each piece in the order of the scores, the longest left part first, says the same
    as ranked merges.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], -cut, left, right))
    return [f"{tokens[left]} {tokens[right]}" for _, _, left, right in sorted(ranked)]


def gpt2_model(header: Fields, tokens: list[str]) -> dict[str, Any]:
    """The parts of tokenizer.json that a byte-level BPE needs."""
    name = header.get("tokenizer.ggml.pre", "gpt-2")
    merges = header.get("tokenizer.ggml.merges")
    if not merges:
        raise GGUFError(f"{header.path}: tokenizer.ggml.merges is missing")
    return {
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(name, header.path),
        "decoder": byte_level(True) | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": name in ("llama-bpe", "llama3", "llama-v3"),
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def llama_model(header: Fields, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """The parts of tokenizer.json that stand for a sentencepiece BPE model."""
    scores = header.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise GGUFError(f"{header.path}: tokenizer.ggml.scores is missing or of a wrong length")
    prefix = header.get("tokenizer.ggml.add_space_prefix", True)
    mergeable = [t if kind == NORMAL else "" for t, kind in zip(tokens, types, strict=True)]
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": sentencepiece_merges(mergeable, scores),
        },
    }


def bos_processor(tokens: list[str], bos: int) -> dict[str, Any]:
    """The post-processor that puts the BOS token in front of a text."""
    token = tokens[bos]
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": token, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
    }


def special_ids(header: Fields, count: int) -> dict[str, Any]:
    """generation_config.json: the bos, eos and pad ids, each checked against the vocabulary."""
    ids: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = header.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and not 0 <= value < count:
            raise GGUFError(f"{header.path}: the {name} token id {value} is not in the vocabulary")
        if value is not None:
            ids[f"{name}_token_id"] = value
    end_of_turn = header.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and end_of_turn != ids.get("eos_token_id", end_of_turn):
        ids["eos_token_id"] = [ids["eos_token_id"], end_of_turn]
    return ids


def added_tokens(tokens: list[str], types: list[int], special: tuple[int, ...]) -> list[dict]:
    """tokenizer.json's entries of the tokens that stand for themselves in a text."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": token, **flags, "special": kind in special}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in special or kind == USER_DEFINED
    ]


def tokenizer_files(header: Fields, vocab_size: int) -> dict[str, dict[str, Any]]:
    """File name -> content of the tokenizer files; raises GGUFError for what is not supported."""
    kind = header.get("tokenizer.ggml.model")
    tokens = header.get("tokenizer.ggml.tokens") or []
    types = header.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not 0 < len(tokens) <= vocab_size or len(types) != len(tokens):
        raise GGUFError(f"{header.path}: {len(tokens)} tokens for {vocab_size} embedding rows")
    if len(set(tokens)) != len(tokens):
        raise GGUFError(f"{header.path}: the vocabulary holds a token twice")
    if kind == "gpt2":
        parts = gpt2_model(header, tokens)
    elif kind == "llama":
        parts = llama_model(header, tokens, types)
    else:
        raise GGUFError(f"{header.path}: tokenizer {kind!r} is not supported (gpt2 and llama are)")
    added = added_tokens(tokens, types, (CONTROL, UNKNOWN) if kind == "llama" else (CONTROL,))
    ids = special_ids(header, len(tokens))
    by_default = kind == "llama" or parts["model"]["ignore_merges"]  # as llama.cpp has it
    add_bos = bool(header.get("tokenizer.ggml.add_bos_token", by_default))
    processor = bos_processor(tokens, ids["bos_token_id"]) if add_bos else None
    eos = header.get("tokenizer.ggml.eos_token_id")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.get("llama.context_length"),
        "chat_template": header.get("tokenizer.chat_template"),
    } | {
        f"{n}_token": tokens[ids[f"{n}_token_id"]] for n in ("bos", "pad") if f"{n}_token_id" in ids
    }
    if eos is not None:
        config["eos_token"] = tokens[eos]
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return {
        "generation_config.json": ids,
        "tokenizer.json": head | parts | {"post_processor": processor},
        "tokenizer_config.json": {k: v for k, v in config.items() if v is not None},
    }
