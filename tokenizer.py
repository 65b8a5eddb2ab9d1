"""Text <-> token ids behind one interface, whichever files a model comes with.

    tokenizer = load_tokenizer("checkpoints/smollm2-135m-instruct")
    ids = tokenizer.encode("Hello")
    ids = tokenizer.chat([{"role": "user", "content": "Hello"}])
    text = tokenizer.decode(ids)

    tokenizer.json                    Hugging Face BPE (tokenizer_json.py)
    tokenizer.model, base64 lines     tiktoken, Llama 3
    tokenizer.model, otherwise        sentencepiece, Llama 2

What is wrong with a file or a message is a ValueError of one line.
"""

import base64
import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from chat_template import LLAMA2_CHAT, LLAMA3_CHAT, render
from tokenizer_json import JsonBPE

ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")
"""Special tokens that end a turn or a text wherever a vocabulary has them."""

LLAMA3_RANKS = 128_000
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = {  # place after the 128000 ranks; the other places up to 256 are reserved
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
    11: "<|image|>",
}
LONGEST_RUN = 25_000  # characters: tiktoken's regular expression overflows on longer runs


class Tokenizer:
    """The interface. Subclasses give `special`, `table` and `encode_text`.

    special: literal -> id of the special tokens. table: id -> its bytes. vocab_size: the largest
    id + 1. bos_id: None where the model has none. eos_ids: every id that ends a text or a turn.
    """

    special: dict[str, int]
    table: dict[int, bytes]
    strips_space = False  # whether decoding drops the space that encoding put first

    def __init__(self) -> None:
        self.bos_id: int | None = None
        self.add_bos = False
        self.eos_ids: set[int] = {self.special[name] for name in ENDS if name in self.special}
        self.chat_template: str | None = None
        self.chat_variables: dict[str, Any] = {}
        self.vocab_size = max(self.table) + 1

    def encode_text(self, text: str, allow_special: bool) -> list[int]:
        raise NotImplementedError

    def encode(self, text: str, bos: bool | None = None, allow_special: bool = True) -> list[int]:
        """Token ids of `text`, with BOS in front as `bos` says (None: as the model is used to).

        With allow_special, "<|im_end|>" in the text is that token; without, it is the plain
        characters, so that no text can pass itself off as the end of a turn. No EOS is added.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # halves of surrogate pairs: join them, or write U+FFFD
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self.encode_text(text, allow_special)
        if self.add_bos if bos is None else bos:
            if self.bos_id is None:
                raise ValueError("this model has no BOS token: encode without it")
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream(skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream(self, skip_special: bool = False) -> "StreamDecoder":
        return StreamDecoder(self, skip_special)

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The conversation as text: `messages` are {"role": ..., "content": ...}, rendered by the
        model's own template; `extra` are further variables of the template, such as tools."""
        if self.chat_template is None:
            raise ValueError("this model has no chat template: give it a plain prompt")
        variables = {"tools": None, "documents": None} | self.chat_variables | extra
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return render(self.chat_template, variables)

    def chat(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> list[int]:
        """Token ids of a conversation.

        As in Hugging Face, the rendered text is encoded whole, special tokens included: one that
        stands in a message's content counts too. A caller that shows this model text it does not
        trust must remove them from the content first.
        """
        text = self.apply_chat_template(messages, add_generation_prompt, **extra)
        return self.encode(text, bos=False)


class StreamDecoder:
    """Turns ids into text as they come; a character is given out once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self.table = tokenizer.table
        self.skipped = set(tokenizer.special.values()) if skip_special else set()
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.strip = tokenizer.strips_space

    def push(self, token: int) -> str:
        """The text that is complete now, often one token's, sometimes empty."""
        token = int(token)
        if token in self.skipped:
            return ""
        if token < 0:
            raise ValueError(f"{token} is not a token id")
        data = self.table.get(token, b"")  # rows of the embedding beyond the vocabulary: no text
        if self.strip and data:
            data, self.strip = data.removeprefix(b" "), False
        return self.utf8.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD if the ids stopped within a character."""
        return self.utf8.decode(b"", final=True)


class JsonTokenizer(Tokenizer):
    """Hugging Face tokenizer.json."""

    def __init__(self, path: Path):
        config = read_json(path)
        try:
            self.bpe = JsonBPE(config)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(f"{path} is damaged or not a BPE tokenizer ({what})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {one_line(error)}") from None
        self.special, self.table = self.bpe.special, self.bpe.token_bytes
        self.strips_space = self.bpe.strips_space
        super().__init__()
        if self.bpe.prepended is not None:
            self.bos_id, self.add_bos = self.special.get(self.bpe.prepended), True

    def encode_text(self, text: str, allow_special: bool) -> list[int]:
        return self.bpe.encode(text, allow_special)


class SentencePieceTokenizer(Tokenizer):
    """Llama 2's tokenizer.model, read by the sentencepiece package."""

    strips_space = True

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self.model = model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: {one_line(error)}") from None
        ids = range(model.vocab_size())
        pieces = [model.id_to_piece(i) for i in ids]
        self.special = {pieces[i]: i for i in ids if model.is_control(i)}
        self.table = {
            i: bytes([int(piece[1:-1], 16)])
            if model.is_byte(i)
            else piece.replace("▁", " ").encode()
            for i, piece in enumerate(pieces)
        }
        self.pattern = re.compile("|".join(map(re.escape, self.special)) or r"(?!)")
        super().__init__()
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self.add_bos = self.bos_id is not None
        self.eos_ids |= {model.eos_id()} - {-1}
        self.chat_template = LLAMA2_CHAT

    def encode_text(self, text: str, allow_special: bool) -> list[int]:
        if not allow_special:
            return self.model.encode(text)
        ids, end = [], 0
        for match in self.pattern.finditer(text):
            ids += self.model.encode(text[end : match.start()])
            ids.append(self.special[match.group()])
            end = match.end()
        return ids + self.model.encode(text[end:])


class TiktokenTokenizer(Tokenizer):
    """Llama 3's tokenizer.model: a line per token, base64 bytes and rank, merged by tiktoken."""

    def __init__(self, path: Path):
        from tiktoken import Encoding

        try:
            pairs = [line.split() for line in path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        except ValueError as error:
            raise ValueError(f"{path} is not a tiktoken file: {one_line(error)}") from None
        if len(ranks) != LLAMA3_RANKS or sorted(ranks.values()) != list(range(LLAMA3_RANKS)):
            raise ValueError(
                f"{path} holds {len(ranks)} ranks, not Llama 3's {LLAMA3_RANKS}: it is cut short, "
                "or another model's, which needs its tokenizer.json"
            )
        names = dict(LLAMA3_SPECIAL)
        for reserved, place in enumerate(i for i in range(256) if i not in LLAMA3_SPECIAL):
            names[place] = f"<|reserved_special_token_{reserved}|>"
        self.special = {name: LLAMA3_RANKS + place for place, name in names.items()}
        self.encoding = Encoding(
            name="llama3", pat_str=LLAMA3_REGEX, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.table = {rank: data for data, rank in ranks.items()}
        self.table |= {i: name.encode() for name, i in self.special.items()}
        super().__init__()
        self.bos_id, self.add_bos = self.special["<|begin_of_text|>"], True
        self.chat_template = LLAMA3_CHAT

    def encode_text(self, text: str, allow_special: bool) -> list[int]:
        allowed: Any = "all" if allow_special else set()
        ids: list[int] = []
        for part in cut_long_runs(text):
            ids += self.encoding.encode(part, allowed_special=allowed, disallowed_special=())
        return ids


def cut_long_runs(text: str) -> list[str]:
    """The text, cut within runs of more than LONGEST_RUN spaces or non-spaces (Meta does so)."""
    cuts = [0]
    for run in re.finditer(rf"\s{{{LONGEST_RUN},}}|\S{{{LONGEST_RUN},}}", text):
        cuts += range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a ValueError of one line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def read_settings(tokenizer: Tokenizer, directory: Path) -> None:
    """Take BOS, EOS and the chat template from the files beside the tokenizer."""

    def optional(name: str) -> dict[str, Any]:
        return read_json(directory / name) if (directory / name).exists() else {}

    config, generation = optional("tokenizer_config.json"), optional("generation_config.json")
    model = optional("config.json")
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokenizer.chat_variables[f"{name}_token"] = token
    bos = tokenizer.special.get(tokenizer.chat_variables.get("bos_token", ""))
    for source in (generation, model):
        bos = source.get("bos_token_id") if bos is None else bos
        ends = source.get("eos_token_id")
        ends = [ends] if isinstance(ends, int) else ends or []
        tokenizer.eos_ids |= {i for i in ends if 0 <= i < tokenizer.vocab_size}
    if bos is not None and 0 <= bos < tokenizer.vocab_size:
        tokenizer.bos_id = bos
    if tokenizer.chat_variables.get("eos_token") in tokenizer.special:
        tokenizer.eos_ids.add(tokenizer.special[tokenizer.chat_variables["eos_token"]])
    if isinstance(config.get("add_bos_token"), bool):
        tokenizer.add_bos = config["add_bos_token"] and tokenizer.bos_id is not None
    names = {i: name for name, i in tokenizer.special.items()}
    tokenizer.chat_variables.setdefault("bos_token", names.get(tokenizer.bos_id, ""))
    tokenizer.chat_variables.setdefault(
        "eos_token", names.get(min(tokenizer.eos_ids, default=-1), "")
    )
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {t["name"]: t["template"] for t in template}.get("default")
    if (directory / "chat_template.jinja").exists():
        template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template or tokenizer.chat_template


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model's directory (or of a file in it)."""
    directory = Path(directory)
    directory = directory.parent if directory.is_file() else directory
    model = directory / "tokenizer.model"
    tokenizer: Tokenizer
    if (directory / "tokenizer.json").exists():
        tokenizer = JsonTokenizer(directory / "tokenizer.json")
    elif not model.exists():
        raise ValueError(f"no tokenizer.json and no tokenizer.model in {directory}: copy the "
                         "source model's")  # fmt: skip
    elif re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model.read_bytes()[:200]):
        tokenizer = TiktokenTokenizer(model)
    else:
        tokenizer = SentencePieceTokenizer(model)
    try:
        read_settings(tokenizer, directory)
    except (TypeError, KeyError, AttributeError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"a settings file in {directory} is malformed ({what})") from None
    return tokenizer
