"""The decode engine: bucketed prefill, one compiled step, stopping.

A step goes from the embedding to the sampled token in one compiled graph of static shapes, so
after warm-up nothing recompiles whatever the prompts' lengths: prompts run in chunks of a few
bucket sizes, and positions are tensors. On a GPU the host never waits inside the loop: it reads a
step's token while the next step runs.
"""

import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from graphs import GRAPH_MODES, Captured, one_graph
from kernels.decode import cpp_greedy
from kernels.linear import FEW_ROWS
from model import Transformer
from sampling import Sampling, greedy, sample

BUCKETS = (64, 128, 256, 512)  # a prompt runs in chunks of these sizes, padded on the right


def greedy_step(model: Transformer, tokens: Tensor, start: Tensor) -> Tensor:
    """The likeliest token after each of `tokens` [B, T] at positions from start [B]: [B, T]."""
    if model.runs_in_cpp(tokens.numel()):
        return cpp_greedy(model.cpp_plan, tokens, model.tok_embeddings.weight, start)
    return greedy(model(tokens, start).flatten(0, 1)).view(tokens.shape)


@dataclass
class Result:
    """What one call generated. Times in seconds; a step's time is that of one token per row.

    Of speculative decoding: `accept_counts[n]` is how many rounds accepted n proposed tokens;
    `note` says why speculation was switched off, if it was.
    """

    token_ids: list[list[int]]
    prompt_tokens: int
    time_to_first_token_s: float
    step_s: list[float] = field(default_factory=list)
    accept_counts: list[int] = field(default_factory=list)
    note: str | None = None


class Rows:
    """What the rows of a batch have said so far, and which of them have ended."""

    def __init__(self, count: int, eos_ids: Set[int], on_token: Callable | None):
        self.token_ids: list[list[int]] = [[] for _ in range(count)]
        self.done, self.eos_ids, self.on_token = [False] * count, eos_ids, on_token

    def take(self, newest: list[int]) -> bool:
        """Add one token to every row that goes on; True once all have ended."""
        for row, token in enumerate(newest):
            self.done[row] |= token in self.eos_ids
            if not self.done[row]:
                self.token_ids[row].append(token)
        if self.on_token and not all(self.done):
            pairs = zip(newest, self.done, strict=True)
            self.on_token([None if done else token for token, done in pairs])
        return all(self.done)


class Clock:
    """Marks moments without making the host wait: events on CUDA, the host's clock elsewhere."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks, self.tokens = device.type == "cuda", [], []

    def mark(self, tokens: int = 1) -> None:
        """Here ends a step that made so many tokens (the first mark ends none)."""
        self.tokens.append(tokens)
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds of each token: between neighbouring marks, shared by the tokens made there."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.cuda:
            torch.cuda.synchronize()
            seconds = [a.elapsed_time(b) / 1e3 for a, b in pairs]
        else:
            seconds = [b - a for a, b in pairs]
        return [s / n for s, n in zip(seconds, self.tokens[1:], strict=True) for _ in range(n)]


def cache_length(tokens: int) -> int:
    """Cache slots for a request of so many tokens in all: a whole number of smallest buckets."""
    return -(-max(tokens, 1) // BUCKETS[0]) * BUCKETS[0]


def aligned_rows(t: Tensor) -> Tensor:
    """[N, B], each row at a multiple of 16 bytes: others compiled code would first copy."""
    size, b = t.element_size(), t.shape[1]
    return F.pad(t, (0, -b % (16 // size)))[:, :b]


class Engine:
    """A model with a cache of `length` slots for `batch` sequences, ready to generate.

    Args:
        compile_mode: None runs eagerly; otherwise torch.compile's mode for the decode step. Where
            that captures CUDA graphs, the prefill of a bucket, too, is one from its second run on:
            hooks are not called then, and parts of the model that are replaced go unnoticed until
            its `unfuse`.
        compile_prefill: compile the prefill of each bucket too.
        kv_cache: "bf16" (the model's dtype) or "int8".
        buckets: sizes of prefill chunks, ascending. None: chunks of the largest bucket and the rest
            unpadded, compiled for a dynamic length.
        spare: slots beyond `length`, written to but never kept.
        fused: run steps as one operator where there is one; then hooks on layers are not called.
    """

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        *,
        batch: int = 1,
        length: int = 2048,
        kv_cache: str = "bf16",
        compile_mode: str | None = None,
        compile_prefill: bool = False,
        seed: int = 0,
        buckets: tuple[int, ...] | None = BUCKETS,
        spare: int = 0,
        fused: bool = True,
    ):
        if compile_prefill and compile_mode is None:
            raise ValueError("compile_prefill needs a compile_mode")
        if length > model.config.max_positions:
            limit = model.config.max_positions
            raise UserError(f"{length} tokens asked for, but the model's context is {limit}")
        self.model, self.sampling, self.batch, self.length = model, sampling, batch, length
        self.device = model.tok_embeddings.weight.device
        self.slots, self.buckets = cache_length(length + spare), buckets
        self.own_cache = model.setup_cache(batch, self.slots, kv_cache)
        if fused:
            model.fuse()
        self.generator = torch.Generator().manual_seed(seed)
        self.cached = []
        self.compile_mode = compile_mode
        self.compiled: list[str] = []  # the steps that are
        self.decode_step = self.compile("decode step", self._decode_step, batch)
        self.prefill_step = self._prefill_step
        self.warm_sizes: list[int] = []  # prompt lengths that between them use every bucket
        graphs = self.device.type == "cuda" and compile_mode in GRAPH_MODES and buckets is not None
        if compile_prefill:
            self.compiled.append("prefill")
            mode = compile_mode if graphs else None
            self.prefill_step = one_graph(self._prefill_step, mode, dynamic=buckets is None)
            # Few rows are one operator: dynamic needs these too, on CUDA of every block of rows.
            # The largest chunk is cut to the cache's size: the longest prompt runs it.
            sizes = {min(b, length - 1) for b in buckets or (2, 9, FEW_ROWS, *BUCKETS)}
            self.warm_sizes = sorted(sizes - {0})
        elif graphs:
            self.prefill_step = Captured(self._prefill_step, model)

    @property
    def cached(self) -> list[int]:
        """The tokens whose keys and values row 0 of the cache holds: none once weights change."""
        return self._cached if self._revision == self.model.revision else []

    @cached.setter
    def cached(self, tokens: list[int]) -> None:
        self._cached, self._revision = tokens, self.model.revision

    def compile(self, name: str, step: Callable, rows: int) -> Callable:
        """`step` through torch.compile, if that is asked for and pays.

        On so few rows that the model is one operator there is nothing to fuse, and Dynamo's guards
        and wrappers would add a quarter of a millisecond.
        """
        if self.compile_mode is None or self.model.runs_in_cpp(rows):
            return step
        self.compiled.append(name)
        return one_graph(step, self.compile_mode)

    def _decode_step(self, token: Tensor, start: Tensor, u: Tensor) -> Tensor:
        """token [B, 1] at positions start [B] -> the next token [B, 1]."""
        if self.sampling.temperature == 0:
            return greedy_step(self.model, token, start)
        logits = self.model(token, start)[:, -1]  # [B, V]
        return sample(logits, u, self.sampling)[:, None]

    def _prefill_step(self, tokens: Tensor, start: Tensor, last: Tensor) -> Tensor:
        """A chunk [B, T] at positions start [B] -> logits [B, V] after its rows last[b]."""
        return self.model(tokens, start, last)[:, -1]

    def chunk(self, tokens: int) -> int:
        """The size of the next chunk where `tokens` are left: a bucket that holds them, or the
        largest."""
        if self.buckets is None:
            return min(tokens, BUCKETS[-1])
        return min(next((b for b in self.buckets if b >= tokens), self.buckets[-1]), self.slots)

    def uniforms(self, steps: int) -> Tensor:
        """[steps, B] numbers in [0, 1) for as many draws."""
        return torch.rand(steps, self.batch, generator=self.generator).to(self.device)

    def upload(self, t: Tensor) -> Tensor:
        """A tensor of the host on the engine's device, without waiting for what that still does."""
        if self.device.type != "cuda":
            return t
        return t.pin_memory().to(self.device, non_blocking=True)

    def prefill(self, prompts: list[list[int]], first: int = 0) -> Tensor:
        """Run the prompts from token `first` on (the cache holds the earlier ones).

        Rows of different lengths are padded on the right; a padded row's slots are written again
        before they are ever seen. Returns the logits [B, V] after each prompt's last token.
        """
        lengths = [len(p) for p in prompts]
        end, logits, position = max(lengths), None, first
        while position < end:
            size = self.chunk(end - position)
            # A chunk that would run past the cache's end begins earlier and repeats some tokens.
            begin = min(position, self.slots - size)
            chunk = torch.zeros(len(prompts), size, dtype=torch.int64)
            for row, prompt in zip(chunk, prompts, strict=True):
                part = torch.tensor(prompt[begin : begin + size], dtype=torch.int64)
                row[: len(part)] = part
            last = torch.tensor([min(max(n - 1 - begin, 0), size - 1) for n in lengths])
            here = torch.tensor([begin <= n - 1 < begin + size for n in lengths])
            start = torch.full((len(prompts),), begin, dtype=torch.int64)
            with torch.inference_mode():
                chunk, start, last, here = map(self.upload, (chunk, start, last, here))
                new = self.prefill_step(chunk, start, last)
                if self.device.type == "cuda":  # a replayed CUDA graph writes over its last output
                    new = new.clone()
                logits = new if logits is None else torch.where(here[:, None], new, logits)
            position = begin + size
        if not logits.sum(dtype=torch.float32).isfinite():  # a fifth of isfinite().all()'s time
            raise UserError("logits that are no numbers: a weight is NaN or inf, or fp16 overflows")
        return logits

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        eos_ids: Set[int] = frozenset(),
        on_token: Callable[[list[int | None]], None] | None = None,
    ) -> Result:
        """Continue every prompt until its own end-of-sequence token or `max_new_tokens`.

        Args:
            prompts: as many as the engine's batch, each at least one token.
            on_token: called with the newest token of each row as they come, None for a row that
                has ended.

        Returns:
            Result; its token_ids hold the new tokens, the closing EOS left out.
        """
        self.check(prompts, max_new_tokens)
        first = self.shared_prefix(prompts[0]) if self.batch == 1 else 0
        self.cached = []  # until the end: an interruption leaves slots of two texts
        rows, clock = Rows(len(prompts), eos_ids, on_token), Clock(self.device)
        u = self.uniforms(max_new_tokens)
        begin = time.perf_counter()
        with torch.inference_mode():
            logits = self.prefill(prompts, first)
            token = sample(logits, u[0], self.sampling)[:, None]
            start = torch.tensor([len(p) for p in prompts], device=self.device)
            token.tolist()
            first_token_s = time.perf_counter() - begin
            clock.mark()
            self._decode(token, start, u[1:], rows, clock)
        lengths = [(len(p), len(n)) for p, n in zip(prompts, rows.token_ids, strict=True)]
        # A row that has ended has run its last token; one of `max_new_tokens` has not.
        self.check_keys([p + n - 1 - (n == max_new_tokens) for p, n in lengths])
        # The newest token was sampled but never run: its slot is not filled yet.
        self.cached = [*prompts[0], *rows.token_ids[0]][:-1] if self.batch == 1 else []
        return Result(rows.token_ids, max(map(len, prompts)), first_token_s, clock.intervals())

    def check_keys(self, slots: list[int]) -> None:
        """A UserError where a key in a row's slot, of the last token that it has run, is NaN.

        NaN goes on to the keys of all later layers and tokens. Not seen is what arises behind the
        keys of the last layer, and in an int8 cache on a GPU, whose scales drop NaN.
        """
        cache = self.model.layers[-1].attention.kv_cache
        keys = getattr(cache, "k_scale", cache.k)  # int8 has no NaN
        last = keys[torch.arange(len(slots)), :, torch.tensor(slots)]  # [B, H_kv, D or 1]
        if not last.sum(dtype=torch.float32).isfinite():
            raise UserError("keys that are no numbers: a weight is NaN or inf, or fp16 overflows")

    def _decode(self, token: Tensor, start: Tensor, u: Tensor, rows: Rows, clock: Clock) -> None:
        """Go on from `token` [B, 1], to be run at positions `start` [B]: a step per row of u."""
        positions = start + torch.arange(len(u), device=self.device)[:, None]  # [steps, B]
        positions, u = aligned_rows(positions), aligned_rows(u)
        for uniform, position in zip(u, positions, strict=True):
            # a replayed CUDA graph writes over its last output
            previous = token.clone() if self.device.type == "cuda" else token
            on_host = self._fetch(previous)
            token = self.decode_step(previous, position, uniform)
            clock.mark()
            if rows.take([row for (row,) in on_host()]):  # while the step runs
                return
        rows.take([row for (row,) in token.tolist()])

    def _fetch(self, token: Tensor) -> Callable[[], list]:
        """Start to copy a tensor to the host; the result waits for the copy, not for later work."""
        if self.device.type != "cuda":
            return token.tolist
        copy, copied = token.to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record()

        def wait() -> list:
            copied.synchronize()
            return copy.tolist()

        return wait

    def check(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """A UserError for a request that this engine cannot serve."""
        if len(prompts) != self.batch:
            raise ValueError(f"{len(prompts)} prompts for an engine of batch {self.batch}")
        self.model.check_cache(self.own_cache)
        if not all(prompts):
            raise UserError("empty prompt: give at least one token")
        lowest, highest = min(map(min, prompts)), max(map(max, prompts))
        vocab = self.model.config.vocab_size
        if lowest < 0 or highest >= vocab:
            raise UserError(f"tokens {lowest} to {highest} for a vocabulary of {vocab}")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: must be at least 1")
        total = max(map(len, prompts)) + max_new_tokens
        if total > self.length:
            raise UserError(
                f"a prompt of {total - max_new_tokens} tokens and {max_new_tokens} new ones do not "
                f"fit a context of {self.length}; shorten the prompt or raise --cache_size (of a "
                "package: when it is exported)"
            )

    def shared_prefix(self, prompt: list[int]) -> int:
        """How many leading tokens of `prompt` the cache holds; at least one is left to run."""
        shared = 0
        for a, b in zip(self.cached, prompt[:-1], strict=False):
            if a != b:
                break
            shared += 1
        return shared

    def warm_up(self, prompt_tokens: int = 1) -> float:
        """Run, and so compile, the decode step and the prefill of `prompt_tokens`. Seconds taken.

        With a compiled prefill every bucket up to the cache's size is compiled, so that no later
        prompt compiles anything. The draws of the tokens after it are as if it had not run.
        """
        begin, drawn = time.perf_counter(), self.generator.get_state()
        for size in sorted({min(prompt_tokens, self.length - 1), *self.warm_sizes} - {0}):
            for _ in range(1 + (self.device.type == "cuda")):  # a second run captures CUDA graphs
                self.generate([[1] * size] * self.batch, min(4, self.length - size))
                self.cached = []
        self.generator.set_state(drawn)
        return time.perf_counter() - begin
