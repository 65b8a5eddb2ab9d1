"""Byte pair encoding from a Hugging Face tokenizer.json, with the ids that `tokenizers` gives.

A text passes through these steps (each optional, as the file says):

    added tokens   literal strings such as <|im_end|>, cut out first, longest match first
    normalizer     rewrites the text: Unicode forms, " " -> "▁"
    pre-tokenizer  cuts the text into words that no token crosses
    BPE            in each word, merge the neighbours whose merge ranks first, until none is left

Read: the steps that Llama-family files use, in both styles: byte-level (GPT-2, Llama 3, SmolLM2:
each UTF-8 byte written as a printable character) and sentencepiece-like (Llama 2, Mistral: "▁"
for a space, <0xE2> for a byte outside the vocabulary). Anything else is refused by its name.

Known difference: \\p{L} and the like follow the Unicode version of the `regex` package, so a
letter assigned after the reference's version may be cut differently.
"""

import heapq
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import regex

GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MARK_TO_SPACE = ({"String": "▁"}, " ")
CACHED_WORD = 64  # characters: the merges of longer words are not remembered

Step = Callable[[str, bool], Iterable[str]]  # (piece, does it begin the text?) -> pieces


def byte_characters() -> dict[int, str]:
    """Byte -> character of GPT-2's byte-level alphabet: printable Latin-1, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_TO_CHARACTER = byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}
NO_BYTE = "\U0010ffff"  # in the place of a character that stands for none


def unsupported(what: str, config: Any) -> ValueError:
    kind = config.get("type", config) if isinstance(config, dict) else config
    return ValueError(f"the {what} {kind!r} of tokenizer.json is not supported")


class BPE:
    """tokenizer.json's model: symbols -> ids by ranked merges."""

    def __init__(self, model: dict[str, Any], banned: set[int]):
        """`banned` are the special tokens' ids: no merge may build one out of plain text."""
        kind = model.get("type", "BPE")
        if kind != "BPE":
            raise unsupported("model", kind)
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise ValueError(f"the BPE option {option} of tokenizer.json is not supported")
        self.vocab: dict[str, int] = model["vocab"]
        self.unknown: int | None = self.vocab.get(model.get("unk_token") or "")
        self.fuse_unknown = bool(model.get("fuse_unk"))
        self.whole: dict[str, int] = {}  # words that are a token as they stand
        if model.get("ignore_merges"):
            self.whole = {t: i for t, i in self.vocab.items() if i not in banned}
        self.bytes: list[int] | None = None
        if model.get("byte_fallback"):
            self.bytes = [self.vocab.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
        self.merges: dict[tuple[int, int], tuple[int, int]] = {}  # (left, right) -> (rank, id)
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            merged = self.vocab[left + right]
            if merged not in banned:
                self.merges[self.vocab[left], self.vocab[right]] = (rank, merged)
        self.cached = lru_cache(maxsize=1 << 16)(self.merge)

    def encode(self, word: str) -> tuple[int, ...]:
        return self.cached(word) if len(word) <= CACHED_WORD else self.merge(word)

    def symbols(self, word: str) -> list[int]:
        """One id for each character; bytes, the unknown token or nothing where there is none."""
        ids: list[int] = []
        for character in word:
            known = self.vocab.get(character)
            if known is not None:
                ids.append(known)
                continue
            spelled = [self.bytes[b] for b in character.encode()] if self.bytes else [-1]
            if min(spelled) >= 0:
                ids.extend(spelled)
            elif self.unknown is not None and not (
                self.fuse_unknown and ids[-1:] == [self.unknown]
            ):
                ids.append(self.unknown)
        return ids

    def merge(self, word: str) -> tuple[int, ...]:
        """The best-ranked merge first, the leftmost of equals: O(n log n) with a heap."""
        if word in self.whole:
            return (self.whole[word],)
        ids, merges = self.symbols(word), self.merges
        count = len(ids)
        following, previous = list(range(1, count + 1)), list(range(-1, count - 1))
        heap = []
        for i in range(count - 1):
            found = merges.get((ids[i], ids[i + 1]))
            if found:
                heap.append((found[0], i, found[1]))
        heapq.heapify(heap)
        while heap:
            rank, i, merged = heapq.heappop(heap)
            j = following[i]
            if j >= count or merges.get((ids[i], ids[j])) != (rank, merged):
                continue  # one of the two was merged away since
            ids[i], ids[j] = merged, -1
            following[i] = k = following[j]
            if k < count:
                previous[k] = i
                found = merges.get((merged, ids[k]))
                if found:
                    heapq.heappush(heap, (found[0], i, found[1]))
            h = previous[i]
            if h >= 0:
                found = merges.get((ids[h], merged))
                if found:
                    heapq.heappush(heap, (found[0], h, found[1]))
        return tuple(i for i in ids if i >= 0)


def children(config: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of an optional entry that may be a (nested) Sequence of steps."""
    if config is None:
        return []
    if config["type"] != "Sequence":
        return [config]
    return [step for child in config[key] for step in children(child, key)]


def compile_pattern(pattern: dict[str, str]) -> "regex.Pattern[str]":
    try:
        return regex.compile(pattern.get("Regex") or regex.escape(pattern["String"]))
    except regex.error as error:
        raise ValueError(f"a pattern of tokenizer.json cannot be compiled: {error}") from None


def normalizer_step(config: dict[str, Any]) -> Callable[[str], str]:
    kind = config["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return lambda text: unicodedata.normalize(kind, text)
    if kind == "Prepend":
        return lambda text: config["prepend"] + text if text else text
    if kind == "Replace":
        pattern, content = compile_pattern(config["pattern"]), config["content"]
        return lambda text: pattern.sub(lambda _: content, text)
    raise unsupported("normalizer", config)


def byte_level_step(config: dict[str, Any]) -> Step:
    words = regex.compile(GPT2_REGEX) if config.get("use_regex", True) else None

    def step(piece: str, first: bool) -> Iterator[str]:
        if config.get("add_prefix_space") and not piece.startswith(" "):
            piece = " " + piece
        for word in words.findall(piece) if words else (piece,):
            yield word.encode().decode("latin-1").translate(BYTE_TO_CHARACTER)

    return step


def split_step(config: dict[str, Any]) -> Step:
    """The pieces of a text by the pattern of a Split pre-tokenizer."""
    pattern, inverted = compile_pattern(config["pattern"]), config.get("invert", False)
    behavior = config["behavior"]
    if behavior not in ("Isolated", "Removed"):
        raise unsupported("Split behavior", behavior)
    keep = behavior == "Isolated"

    def step(piece: str, first: bool) -> Iterator[str]:
        end = 0
        for match in pattern.finditer(piece):
            if match.start() > end and (keep or not inverted):
                yield piece[end : match.start()]
            if match.end() > match.start() and (keep or inverted):
                yield match.group()
            end = match.end()
        if end < len(piece) and (keep or not inverted):
            yield piece[end:]

    return step


def digits_step(config: dict[str, Any]) -> Step:
    one = r"\p{N}" if config.get("individual_digits") else r"\p{N}+"
    pattern = regex.compile(one + r"|[^\p{N}]+")
    return lambda piece, first: pattern.findall(piece)


def metaspace_step(config: dict[str, Any]) -> Step:
    """Spaces become marks, and a piece begins at each mark (sentencepiece's words)."""
    mark, split = config.get("replacement", "▁"), config.get("split", True)
    scheme = config.get("prepend_scheme", "always")
    if config.get("add_prefix_space") is False:
        scheme = "never"
    pattern = regex.compile(f"{regex.escape(mark)}[^{mark}]*|[^{mark}]+")

    def step(piece: str, first: bool) -> list[str]:
        piece = piece.replace(" ", mark)
        if (scheme == "always" or (scheme == "first" and first)) and not piece.startswith(mark):
            piece = mark + piece
        return pattern.findall(piece) if split else [piece]

    return step


STEPS: dict[str, Callable[[dict[str, Any]], Step]] = {
    "ByteLevel": byte_level_step,
    "Split": split_step,
    "Digits": digits_step,
    "Metaspace": metaspace_step,
}


class AddedTokens:
    """Finds the literal tokens of one kind in a text."""

    def __init__(self, tokens: list[dict[str, Any]], normalize: Callable[[str], str]):
        self.ids = []
        pattern = []
        for token in sorted(tokens, key=lambda token: -len(token["content"])):
            literal = regex.escape(normalize(token["content"]), special_only=True)
            literal = rf"(?<!\w)({literal})(?!\w)" if token.get("single_word") else f"({literal})"
            literal = r"\s*" + literal if token.get("lstrip") else literal
            pattern.append(literal + r"\s*" if token.get("rstrip") else literal)
            self.ids.append(token["id"])
        self.pattern = regex.compile("|".join(pattern)) if pattern else None

    def split(self, text: str) -> Iterator[str | int]:
        """The text between the tokens, never empty, and the tokens as ids, in order."""
        end = 0
        for match in self.pattern.finditer(text) if self.pattern else ():
            if match.start() > end:
                yield text[end : match.start()]
            yield self.ids[match.lastindex - 1]
            end = match.end()
        if end < len(text):
            yield text[end:]


class JsonBPE:
    """The whole of tokenizer.json: text -> ids, id -> bytes."""

    def __init__(self, config: dict[str, Any]):
        added = config.get("added_tokens") or []
        self.special = {t["content"]: t["id"] for t in added if t.get("special")}
        self.model = BPE(config["model"], set(self.special.values()))
        ids = [*self.model.vocab.values(), *(token["id"] for token in added)]
        if any(type(i) is not int or i < 0 for i in ids):
            raise ValueError("tokenizer.json has a token id that is no whole number")
        steps = [normalizer_step(c) for c in children(config.get("normalizer"), "normalizers")]
        self.normalizers = steps
        self.steps: list[Step] = []
        for step in children(config.get("pre_tokenizer"), "pretokenizers"):
            if step["type"] not in STEPS:
                raise unsupported("pre-tokenizer", step)
            self.steps.append(STEPS[step["type"]](step))
        if not self.steps and self.spaces_start_words():
            self.steps = [lambda piece, first: regex.findall("▁*[^▁]+|▁+", piece)]
        self.raw: dict[bool, AddedTokens] = {}  # allow_special -> matched before normalizing
        self.normalized: dict[bool, AddedTokens] = {}  # and after it
        for allow in (True, False):
            usable = [t for t in added if allow or not t.get("special")]
            raw = [t for t in usable if not t.get("normalized")]
            self.raw[allow] = AddedTokens(raw, lambda text: text)
            rest = [t for t in usable if t.get("normalized")]
            self.normalized[allow] = AddedTokens(rest, self.normalize)
        self.prepended = self.begins_with_bos(config.get("post_processor"))
        self.strips_space = False  # set by decoder_bytes
        self.token_bytes = self.decoder_bytes(config.get("decoder"), added)

    def normalize(self, text: str) -> str:
        for step in self.normalizers:
            text = step(text)
        return text

    def spaces_start_words(self) -> bool:
        """Whether no merge makes a token with "▁" after another character: then a text without
        pre-tokenizer may be cut before each run of "▁", with the same ids and no huge word."""
        model = self.model
        made = {merged for _, merged in model.merges.values()}
        across = any("▁" in t.lstrip("▁") for t, i in model.vocab.items() if i in made)
        return "▁" in model.vocab and not model.whole and not across

    def encode(self, text: str, allow_special: bool) -> list[int]:
        """Token ids of a text; special tokens in it count as such where allowed."""
        ids: list[int] = []
        first = True
        for raw in self.raw[allow_special].split(text):
            if isinstance(raw, int):
                ids.append(raw)
            else:
                for piece in self.normalized[allow_special].split(self.normalize(raw)):
                    if isinstance(piece, int):
                        ids.append(piece)
                    else:
                        self.encode_piece(piece, first, ids)
                    first = False
            first = False
        return ids

    def encode_piece(self, piece: str, first: bool, ids: list[int]) -> None:
        pieces: Iterable[str] = (piece,)
        for step in self.steps:
            pieces = [
                word for i, part in enumerate(pieces) for word in step(part, first and i == 0)
            ]
        for word in pieces:
            ids.extend(self.model.encode(word))

    def begins_with_bos(self, config: dict[str, Any] | None) -> str | None:
        """The special token that the post-processor puts in front of a text."""
        first = None
        for step in children(config, "processors"):
            if step["type"] == "TemplateProcessing":
                head = step["single"][0]
                first = head["SpecialToken"]["id"] if "SpecialToken" in head else first
            elif step["type"] != "ByteLevel":  # ByteLevel changes offsets only
                raise unsupported("post-processor", step)
        return first

    def decoder_bytes(
        self, config: dict[str, Any] | None, added: list[dict[str, Any]]
    ) -> dict[int, bytes]:
        """Id -> the bytes it stands for; added tokens stand for themselves."""
        steps = children(config, "decoders")
        kinds = [step["type"] for step in steps]
        known = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        if not kinds or not known.issuperset(kinds):
            raise unsupported("decoder", kinds or None)
        for step in steps:
            if step["type"] == "Replace" and (step["pattern"], step["content"]) != MARK_TO_SPACE:
                raise unsupported("decoder Replace", str(step["pattern"]))
        self.strips_space = "Strip" in kinds or any(
            s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never" for s in steps
        )
        table = {}
        to_bytes = defaultdict(lambda: NO_BYTE, {ord(c): b for c, b in CHARACTER_TO_BYTE.items()})
        for token, i in self.model.vocab.items():
            spelled = token.translate(to_bytes) if "ByteLevel" in kinds else NO_BYTE
            if NO_BYTE not in spelled:
                table[i] = spelled.encode("latin-1")
            elif "ByteFallback" in kinds and regex.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                table[i] = bytes([int(token[3:5], 16)])
            else:
                table[i] = (token if "ByteLevel" in kinds else token.replace("▁", " ")).encode()
        return table | {token["id"]: token["content"].encode() for token in added}
