"""Talking to a model: streaming its tokens, and a conversation through its own template."""

import sys

from engine import Engine
from errors import UserError
from tokenizer import StreamDecoder, Tokenizer
from tp import from_rank_0


class Streamer:
    """Prints a row's tokens as they come, whole characters only."""

    def __init__(self, tokenizer: Tokenizer):
        self.decoder = StreamDecoder(tokenizer)

    def __call__(self, newest: list[int | None]) -> None:
        if newest[0] is not None:
            print(self.decoder.push(newest[0]), end="", flush=True)

    def close(self) -> None:
        print(self.decoder.finish(), flush=True)


def render_chat(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """The conversation's token ids, a template's complaint as a UserError."""
    try:
        return tokenizer.chat(messages)
    except ValueError as error:
        raise UserError(str(error)) from None


def read_line() -> str:
    """What the user says; empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def chat(engine: Engine, tokenizer: Tokenizer, max_new_tokens: int) -> None:
    """Talk through the model's own template until an empty line or end of input.

    The whole conversation is rendered each turn; the engine runs only what its cache lacks.
    """
    messages = []
    while True:
        text = from_rank_0(read_line)
        if not text:
            return
        messages.append({"role": "user", "content": text})
        prompt = render_chat(tokenizer, messages)
        while len(prompt) + max_new_tokens > engine.length:
            if len(messages) == 1:
                raise UserError(
                    f"this message and {max_new_tokens} new tokens do not fit the context of "
                    f"{engine.length} tokens: raise --cache_size or lower --max_new_tokens"
                )
            print("(the context is full: the oldest turn is forgotten)", file=sys.stderr)
            messages = messages[2:]
            prompt = render_chat(tokenizer, messages)
        streamer = Streamer(tokenizer)
        result = engine.generate([prompt], max_new_tokens, tokenizer.eos_ids, streamer)
        streamer.close()
        if result.note:
            print(result.note, file=sys.stderr)
        reply = tokenizer.decode(result.token_ids[0])
        messages.append({"role": "assistant", "content": reply})
