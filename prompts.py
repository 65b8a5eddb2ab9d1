"""What generation starts from: the tokenizer beside a checkpoint, one prompt, or a file of them."""

import json
from pathlib import Path

import torch
from torch import nn

from errors import UserError
from tokenizer import Tokenizer, load_tokenizer


def is_length(prompt: str) -> bool:
    """Whether a prompt asks for a synthetic one, of so many tokens."""
    return prompt.isascii() and prompt.isdecimal()


def encode_prompt(
    prompt: str, tokenizer: Tokenizer | None, vocab: int, seed: int, synthetic: bool = True
) -> list[int]:
    """Token ids of a text, or, where it is an integer, a `synthetic` prompt of that length."""
    if synthetic and is_length(prompt):
        if len(prompt) > 7:  # before memory is asked for
            raise UserError(f"a prompt of {prompt} tokens: no cache holds so many")
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocab, (int(prompt),), generator=generator).tolist()
    if tokenizer is None:
        raise UserError("random weights have no tokenizer: give --prompt a number of tokens")
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id]
    if not ids:
        raise UserError("empty prompt, and this tokenizer has no BOS token to start from")
    return ids


def open_tokenizer(directory: Path | None, model: nn.Module, required: bool) -> Tokenizer | None:
    """The tokenizer beside a checkpoint, checked against the model's vocabulary.

    None, where it is not `required`, for random weights and directories without tokenizer files.
    """
    files = ("tokenizer.json", "tokenizer.model")
    if directory is None or (not required and not any((directory / f).exists() for f in files)):
        return None
    try:
        tokenizer = load_tokenizer(directory)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, the model "
            f"{model.config.vocab_size}: they do not belong together"
        )
    return tokenizer


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: JSONL of {"prompt": text} if its first line begins so, else lines.

    A UserError, with the line's number, for an empty line or file, bad JSON, an unreadable file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()  # what follows the last line's end
    if not lines:
        raise UserError(f"{path} is empty: give one prompt a line, or JSONL with a 'prompt' each")
    as_json = lines[0].lstrip().startswith("{")
    prompts = []
    for number, line in enumerate(lines, 1):
        prompt = line.rstrip("\r")
        if as_json:
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f'{path}:{number}: not a JSON object with a "prompt"') from None
        if not isinstance(prompt, str):
            raise UserError(f'{path}:{number}: "prompt" is no text')
        if not prompt.strip():
            raise UserError(f"{path}:{number}: empty prompt: give at least one word")
        prompts.append(prompt)
    return prompts
