"""Where the guesses of speculative decoding come from: a draft model, or the text itself."""

from typing import Protocol

import torch
from torch import Tensor

from engine import Engine, greedy_step
from model import Transformer
from sampling import Sampling, draw, probabilities

NGRAMS = (3, 2)  # lengths of the endings that prompt lookup looks for, the longest first


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that `sample` draws from: logits [R, V] -> [R, V] fp32, rows sum to 1."""
    p, ids = probabilities(logits, sampling)
    p = p / p.sum(-1, keepdim=True)
    return p if ids is None else torch.zeros_like(logits, dtype=p.dtype).scatter(-1, ids, p)


class Proposer(Protocol):
    """Where guesses come from."""

    def begin(self, prompt: list[int], first: int) -> None:
        """A new text begins; if `first` is 0, from an empty cache."""

    def propose(self, history: list[int], count: int) -> tuple[Tensor, Tensor | None, int]:
        """At most `count` guesses at what follows: (int64 [k], q [k, V] or None, how many)."""

    def warm_up(self, prompt_tokens: int) -> None:
        """Compile whatever will run."""


class PromptLookup:
    """Guesses what followed the last occurrence of the text's last 3 or 2 tokens.

    The idea is Saxena 2023, prompt lookup decoding. Endings are indexed as the text grows, so
    that a guess costs the same however long it is.
    """

    def __init__(self, k: int, device: torch.device):
        self.k, self.device = k, device
        self.indexed, self.after = 0, {}

    def begin(self, prompt: list[int], first: int) -> None:
        """Forget the text before."""
        self.indexed, self.after = 0, {}

    def propose(self, history: list[int], count: int) -> tuple[Tensor, None, int]:
        """What followed the longest known ending, up to `count` tokens of it.

        Where that runs into the end of the text, the text repeats itself, and so do the guesses.
        """
        for end in range(self.indexed, len(history) - 1):  # not the ending of the text itself
            for n in NGRAMS:
                if end + 1 >= n:
                    self.after[tuple(history[end + 1 - n : end + 1])] = end + 1
        self.indexed = max(self.indexed, len(history) - 1)
        at = next((self.after[e] for n in NGRAMS if (e := tuple(history[-n:])) in self.after), None)
        guesses = []
        if at is not None:
            period = len(history) - at
            guesses = [history[at + i % period] for i in range(min(count, self.k))]
        padded = [*guesses, *[0] * (self.k - len(guesses))]
        return torch.tensor(padded, device=self.device), None, len(guesses)

    def warm_up(self, prompt_tokens: int) -> None:
        """There is nothing to compile."""


class Draft:
    """Guesses of a draft model, with a cache of its own, through two compiled steps.

    A round's first step runs the newest two tokens: after a round whose guesses were all kept the
    cache lacks the last of them, because a guess is run only to get the next one.
    """

    def __init__(self, model: Transformer, k: int, sampling: Sampling, **engine):
        self.k, self.sampling = k, sampling
        self.history, self.filled = [], 0  # the cache holds the first `filled` tokens of it
        self.ran = torch.empty(0)  # and behind them these guesses of the last round
        self.engine = Engine(model, sampling, spare=k, **engine)
        self.step = self.engine.compile("step", self._step, 2)

    def _step(self, tokens: Tensor, start: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens [1, T] at positions start [1] -> the next token [1, 1] and what it was drawn from:
        [V], or None of a greedy draft."""
        if self.sampling.temperature == 0:
            return greedy_step(self.engine.model, tokens, start)[:, -1:], None
        q = distribution(self.engine.model(tokens, start)[:, -1], self.sampling)
        return draw(q, u), q[0]

    def begin(self, prompt: list[int], first: int) -> None:
        """Run the prompt, but for what the cache holds of it."""
        self.engine.cached = self.history[: self.filled]
        self.engine.prefill([prompt], min(first, self.engine.shared_prefix(prompt)))
        self.history, self.filled, self.ran = prompt, len(prompt), torch.empty(0)

    def propose(self, history: list[int], count: int) -> tuple[Tensor, Tensor | None, int]:
        """The draft's own next tokens, and, where it samples, what they were drawn from."""
        device, u = self.engine.device, self.engine.uniforms(self.k)
        for guess in self.ran.tolist():
            if self.filled >= len(history) - 2 or history[self.filled] != guess:
                break
            self.filled += 1
        while self.filled < len(history) - 2:  # after plain steps
            pair = torch.tensor([history[self.filled : self.filled + 2]], device=device)
            self.step(pair, torch.tensor([self.filled], device=device), u[0])
            self.filled += 2
        token = torch.tensor([history[-2:]], device=device)
        start = torch.tensor([len(history) - 2], device=device)
        guesses, q = [], []
        for i in range(count):
            token, p = self.step(token, start, u[i])
            token = token.clone()  # a replayed CUDA graph writes over its last output
            guesses.append(token[0])
            if p is not None:
                q.append(p.clone())
            start = start + (2 if i == 0 else 1)
        self.history, self.filled, self.ran = history, len(history), torch.cat(guesses)[:-1]
        missing = [torch.zeros_like(guesses[0])] * (self.k - count)
        q = torch.stack([*q, *[q[0]] * (self.k - count)]) if q else None
        return torch.cat([*guesses, *missing]), q, count

    def warm_up(self, prompt_tokens: int) -> None:
        """The draft's prefill, and both of its steps."""
        with torch.inference_mode():
            for size in {min(prompt_tokens, self.engine.length), *self.engine.warm_sizes}:
                self.engine.prefill([[1] * size])
            for _ in range(3):
                self.propose([1, 1], self.k)
        self.history, self.filled, self.ran = [], 0, torch.empty(0)
