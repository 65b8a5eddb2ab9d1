"""Speculative decoding: guess k tokens cheaply, verify them in one run of the model.

Leviathan et al. 2023 (arXiv 2211.17192). Guesses come from a smaller or more coarsely quantized
draft model, or from the text itself (prompt lookup: what followed the last few tokens earlier on).
One verify step of static width k + 1 runs the newest token and the guesses x_1 .. x_k; row i gives
p_i, the model's distribution of the token after x_i. The first guess that is refused is replaced,
after k accepted ones comes one more token: a round yields 1 to k + 1 tokens.

Exact, whatever guesses:
    greedy           x_i is kept while it is the argmax of p_{i-1}: the text of plain decoding
    sampled, draft   x_i ~ q_i is kept with probability min(1, p(x_i) / q(x_i)); the replacement is
                     drawn from max(p - q, 0), normalized: the tokens are distributed as p
    sampled, lookup  y ~ p is drawn as plain decoding draws it, from the same random number, and
                     x_i is kept while it equals y: the rule above for a q of one certain token, and
                     a seed gives the text that it gives without speculation
p and q are the distributions after temperature, top-k, top-p and min-p.

The rows of the verify step must compute what single steps compute. In fp32 they agree to the order
of summation (attention splits its rows differently), so that greedy texts differ only where two
logits agree to 6 digits. In bf16 and fp16 the layers round to 8 or 11 bits in between, and formats
that round activations turn the last digit of an input into another code: a near tie may fall
differently than in a step of one row, as it may between any two batch sizes. (Most Triton products
round from 17 rows on, see kernels/activations.py: with 16 guesses the verify step, alone.)

Batches of one only: rows of a batch would accept different numbers of guesses.
"""

import time
from collections import deque
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import Clock, Engine, Rows, greedy_step
from errors import UserError
from model import Transformer
from proposers import Draft, PromptLookup, Proposer, distribution
from sampling import Sampling, draw, sample

CHECK = 8  # rounds between two looks at whether speculation pays


def accept_equal(guesses: Tensor, count: Tensor, tokens: Tensor) -> Tensor:
    """Keep guesses while they equal what the model says.

    Args:
        guesses: int64 [k], of which the first `count` (int64 []) are meant.
        tokens: int64 [k + 1], the model's own token after each verified row.

    Returns:
        int64 [k + 2]: how many guesses are kept, then the round's tokens (that many and one more).
    """
    k = guesses.shape[0]
    same = (guesses == tokens[:k]) & (torch.arange(k, device=guesses.device) < count)
    kept = same.long().cumprod(0).sum()
    return torch.cat([kept[None], tokens])


def accept_sampled(guesses: Tensor, count: Tensor, p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """Rejection sampling: the kept guesses and the token after them are distributed as p.

    Args:
        guesses, count: as above; guess i was drawn from q[i].
        p: [k + 1, V] the model's distributions; q: [k, V] the draft's.
        u: [k + 2] uniform in [0, 1): one for each guess, the last for the token after them.

    Returns:
        As `accept_equal`.
    """
    k = guesses.shape[0]
    meant = torch.arange(k, device=guesses.device) < count
    ratio = [r.gather(1, guesses[:, None])[:, 0] for r in (p[:k], q)]
    kept = ((u[:k] * ratio[1] < ratio[0]) & meant).long().cumprod(0).sum()
    q = F.pad(q * meant[:, None], (0, 0, 0, 1))  # nothing was guessed: the draw is from p itself
    rest = (p - q).clamp(min=0).index_select(0, kept[None])
    rest = torch.where(
        rest.sum() > 0, rest, p.index_select(0, kept[None])
    )  # p = q but for rounding
    token = draw(rest, u[k + 1 :])[0]
    tokens = torch.where(
        torch.arange(k + 1, device=p.device) == kept, token, F.pad(guesses, (0, 1))
    )
    return torch.cat([kept[None], tokens])


class Pace:
    """Whether speculation pays: the tokens of a round against the plain steps that its time buys.

    Times are medians of the last ones, so that one interruption decides nothing.
    """

    def __init__(self):
        self.plain_s, self.round_s = deque(maxlen=2 * CHECK), deque(maxlen=2 * CHECK)
        self.tokens = deque(maxlen=2 * CHECK)
        self.rounds = self.steps = 0  # of this text

    def begin(self) -> None:
        """A new text: the times stay, how well it can be guessed is found out anew."""
        self.tokens.clear()
        self.rounds = self.steps = 0

    def needs_step(self) -> bool:
        """A text's first two steps are plain: they say what a step costs at this length."""
        return self.steps < 2

    def add_step(self, seconds: float) -> None:
        self.plain_s.append(seconds)
        self.steps += 1

    def add_round(self, seconds: float, tokens: int) -> None:
        self.round_s.append(seconds)
        self.tokens.append(tokens)
        self.rounds += 1

    def due(self) -> bool:
        """Whether it is time for a verdict."""
        return self.rounds > 0 and self.rounds % CHECK == 0

    def verdict(self) -> str | None:
        """Why to stop; None: go on."""
        gain, cost = fmean(self.tokens), median(self.round_s) / median(self.plain_s)
        if gain >= cost:
            return None
        return (
            f"speculation switched off after {self.rounds} rounds: a round costs {cost:.2f} plain "
            f"steps and yields {gain:.2f} tokens"
        )


class SpeculativeEngine(Engine):
    """An engine of batch 1 that speculates; the rest, cache reuse and EOS included, is Engine's.

    Args:
        k: guesses that one verify step takes.
        draft: the draft model, of the same vocabulary; None: prompt lookup.
        agree: makes a decision that follows from measured times the same on all ranks.
    """

    def __init__(
        self, model: Transformer, sampling: Sampling, k: int, draft: Transformer | None = None, *,
        agree=lambda verdict: verdict, **engine,
    ):  # fmt: skip
        if engine.get("batch", 1) != 1:
            raise UserError("speculation runs batches of 1: leave --batch_size and --prompts out")
        if not 1 <= k <= 64:
            raise UserError(f"--speculate_k {k}: take 1 to 64")
        super().__init__(model, sampling, spare=k, **engine)
        self.k, self.agree, self.pace, self.note = k, agree, Pace(), None
        self.counts = [0] * (k + 1)
        self.prompt: list[int] = []
        self.verify_step = self.compile("verify step", self._verify_step, k + 1)
        self.proposer: Proposer = PromptLookup(k, self.device)
        if draft is not None:
            if draft.config.vocab_size != model.config.vocab_size:
                raise UserError(
                    f"the draft's vocabulary has {draft.config.vocab_size} tokens, the model's "
                    f"{model.config.vocab_size}: they cannot speculate together"
                )
            engine["seed"] = engine.get("seed", 0) + 1
            self.proposer = Draft(draft, k, sampling, **engine)
            if "step" in self.proposer.engine.compiled:
                self.compiled.append("draft's step")

    def _verify_step(
        self, tokens: Tensor, start: Tensor, count: Tensor, u: Tensor, q: Tensor | None
    ) -> Tensor:
        """tokens [1, k + 1] at positions start [1] -> as `accept_equal`; u [k + 2]."""
        if self.sampling.temperature == 0:
            own = greedy_step(self.model, tokens, start)[0]
            return accept_equal(tokens[0, 1:], count, own)
        logits = self.model(tokens, start)[0]  # [k + 1, V]
        if q is None:
            own = sample(logits, u[: self.k + 1], self.sampling)
            return accept_equal(tokens[0, 1:], count, own)
        return accept_sampled(tokens[0, 1:], count, distribution(logits, self.sampling), q, u)

    def prefill(self, prompts: list[list[int]], first: int = 0) -> Tensor:
        self.prompt = prompts[0]
        self.proposer.begin(prompts[0], first)
        return super().prefill(prompts, first)

    def generate(self, *args, **kwargs):
        self.counts, self.note = [0] * (self.k + 1), None
        self.pace.begin()
        result = super().generate(*args, **kwargs)
        result.accept_counts, result.note = self.counts, self.note
        return result

    def _decode(self, token: Tensor, start: Tensor, u: Tensor, rows: Rows, clock: Clock) -> None:
        """Rounds, and plain steps where nothing is guessed, until the text ends."""
        history, steps = [*self.prompt, int(token)], len(u)
        u = F.pad(u[:, 0], (0, self.k))  # past the end nothing is kept
        made = 0
        while made < steps:
            if self.pace.due():
                self.note = self.agree(self.pace.verdict())
            if self.note is not None:
                token = torch.tensor([history[-1:]], device=self.device)
                start = torch.tensor([len(history) - 1], device=self.device)
                return super()._decode(token, start, u[made:steps, None], rows, clock)
            if rows.take(history[-1:]):
                return None
            begin = time.perf_counter()
            new, guessed = self._advance(history, u[made : made + self.k + 1], steps - made)
            clock.mark(len(new))
            seconds = time.perf_counter() - begin
            if guessed:
                self.pace.add_round(seconds, len(new))
                self.counts[len(new) - 1] += 1
            else:
                self.pace.add_step(seconds)
            for done in new[:-1]:
                if rows.take([done]):
                    return None
            history += new
            made += len(new)
        rows.take(history[-1:])
        return None

    def _advance(self, history: list[int], u: Tensor, left: int) -> tuple[list[int], bool]:
        """The next tokens after `history`, at least one and at most `left`, and whether any of them
        was guessed; u [k + 1]."""
        count = 0
        if left > 1 and not self.pace.needs_step():
            guesses, q, count = self.proposer.propose(history, min(self.k, left - 1))
        newest = torch.tensor([history[-1:]], device=self.device)
        start = torch.tensor([len(history) - 1], device=self.device)
        if count == 0:
            return self.decode_step(newest, start, u[:1])[0].tolist(), False
        tokens = torch.cat([newest, guesses[None]], 1)
        kept, *new = self._verify(tokens, start, count, u, q).tolist()
        return new[: kept + 1], True

    def _verify(
        self, tokens: Tensor, start: Tensor, count: int, u: Tensor, q: Tensor | None
    ) -> Tensor:
        # The last is for a replacement alone: it decides no other token.
        u = F.pad(u, (0, 1)) if q is None else torch.cat([u, self.uniforms(1)[0]])
        return self.verify_step(tokens, start, torch.tensor(count, device=self.device), u, q)

    def warm_up(self, prompt_tokens: int = 1) -> float:
        """As Engine's, and the verify step and the draft's steps."""
        begin = time.perf_counter()
        self.proposer.warm_up(prompt_tokens)
        super().warm_up(prompt_tokens)
        q = None
        with torch.inference_mode():
            tokens = torch.zeros(1, self.k + 1, dtype=torch.int64, device=self.device)
            for _ in range(3):
                if isinstance(self.proposer, Draft):
                    q = self.proposer.propose([1, 1], self.k)[1]
                start = torch.zeros(1, dtype=torch.int64, device=self.device)
                self._verify(tokens, start, self.k, torch.zeros(self.k + 1, device=self.device), q)
        self.cached, self.pace = [], Pace()
        return time.perf_counter() - begin
