"""flatllama as a model of lm_eval 0.4.x, so that its tasks, and published figures, run here.

Tokens, windows, truncation and BOS are those of lm_eval's own Hugging Face adapter (HFLM), so both
give the same figures: text is encoded as the tokenizer is used to (with BOS if the model has it
so), an empty context is one BOS token (EOS where there is none), what does not fit the context
loses its beginning. Batches are padded on the right to a few fixed shapes: nothing recompiles.
Needs the package lm_eval; eval.py imports this file only for --tasks.
"""

import json
from collections import defaultdict
from pathlib import Path

import torch
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from torch import Tensor

from engine import Engine
from errors import UserError, progress
from graphs import COMPILE_MODE
from model import Transformer
from sampling import Sampling, sample
from scorer import Scorer
from tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # where a task does not say; HFLM's number
TOP_K = 50  # where a task samples without saying from how many; that of transformers


class FlatllamaLM(TemplateLM):
    """A model and its tokenizer behind lm_eval's interface.

    Args:
        batch: sequences that run together.
        max_length: the context, in tokens; None takes the model's.
        kv_cache: "bf16" (the model's dtype) or "int8".
        compiled: run forward passes and decode steps through torch.compile.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        batch: int = 8,
        max_length: int | None = None,
        kv_cache: str = "bf16",
        compiled: bool = False,
    ):
        super().__init__()
        limit = model.config.max_positions
        if batch < 1 or not 2 <= (max_length or limit) <= limit:
            raise UserError(f"tasks need a batch of 1 or more and a context of 2 to {limit} tokens")
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.max_length, self.kv_cache, self.compiled = max_length or limit, kv_cache, compiled
        self.scorer: Scorer | None = None

    @property
    def eot_token_id(self) -> int:
        named = self.tokenizer.special.get(self.tokenizer.chat_variables.get("eos_token"))
        return min(self.tokenizer.eos_ids) if named is None else named

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return "flatllama"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Token ids; a text that begins with the BOS literal gets no second one."""
        if add_special_tokens is None and self.tokenizer.add_bos:
            prefix = self.tokenizer.decode([self.prefix_token_id])
            return self.tokenizer.encode(string, bos=not string.startswith(prefix))
        return self.tokenizer.encode(string, bos=self.tokenizer.add_bos and add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(chat_history, add_generation_prompt)

    def _scorer(self, length: int) -> Scorer:
        """A scorer for windows of `length`, its size one of a few, kept as long as it is enough."""
        if self.scorer is None or self.scorer.slots < length:
            size = 64
            while size < length:
                size *= 2
            size = min(size, self.max_length)
            self.scorer = Scorer(self.model, self.batch, size, self.kv_cache, self.compiled)
        return self.scorer

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        """[(_, context ids, continuation ids)] -> [(log-probability, whether it is the greedy one)]

        Of the continuation given the context; the last max_length + 1 tokens of both count.
        """
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        for done in range(0, len(order), self.batch):
            members = order[done : done + self.batch]
            sequences = [requests[i][1] + requests[i][2] for i in members]
            sequences = [ids[-(self.max_length + 1) :] for ids in sequences]
            counts = [len(requests[i][2]) for i in members]
            for i, result in zip(members, self._score(sequences, counts), strict=True):
                results[i] = result
            if not disable_tqdm:
                progress(f"scored {done + len(members)} of {len(order)} requests")
        return results

    def _score(self, sequences: list[list[int]], counts: list[int]) -> list[tuple[float, bool]]:
        """Log-probability of the last counts[b] tokens of each sequence, and if all are greedy."""
        inputs = torch.zeros(len(sequences), max(map(len, sequences)) - 1, dtype=torch.int64)
        for row, ids in zip(inputs, sequences, strict=True):
            row[: len(ids) - 1] = torch.tensor(ids[:-1])
        sums, greedy = [0.0] * len(sequences), [True] * len(sequences)
        for part, logits in self._scorer(inputs.shape[1]).logits(inputs):
            for b, (ids, count) in enumerate(zip(sequences, counts, strict=True)):
                # The logits at position t predict token t + 1.
                first = max(len(ids) - 1 - count, part.start)
                last = min(len(ids) - 1, part.stop)
                if first >= last:
                    continue
                logp = logits[b, first - part.start : last - part.start].log_softmax(-1)
                targets = torch.tensor(ids[first + 1 : last + 1], device=logp.device)
                sums[b] += logp.gather(1, targets[:, None]).sum().item()
                greedy[b] &= bool((logp.argmax(-1) == targets).all())
        return list(zip(sums, greedy, strict=True))

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts in disjoint windows of max_length, the first after BOS."""
        jobs, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            jobs += [(None, *make_disjoint_window(window)) for window in windows]
            owners += [i] * (len(jobs) - len(owners))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(jobs, disable_tqdm)
        for i, (logp, _) in zip(owners, scores, strict=True):
            totals[i] += logp
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to EOS, a stop string, or so many tokens."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        results = [""] * len(requests)
        for key, members in groups.items():
            contexts = [requests[i].args[0] for i in members]
            texts = self._generate(contexts, json.loads(key), disable_tqdm)
            for i, text in zip(members, texts, strict=True):
                results[i] = text
        return results

    def _generate(self, contexts: list[str], settings: dict, quiet: bool) -> list[str]:
        """Continuations of contexts that share their settings."""
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        new_tokens = int(next((settings[n] for n in names if settings.get(n)), MAX_NEW_TOKENS))
        until = settings.get("until") or []
        until = [s for s in ([until] if isinstance(until, str) else until) if s]
        until.append(self.tokenizer.decode([self.eot_token_id]))
        if (room := self.max_length - new_tokens) < 1:
            raise UserError(f"{new_tokens} new tokens do not fit a context of {self.max_length}")
        prompts = [self.tok_encode(text)[-room:] or [self.prefix_token_id] for text in contexts]
        longest = max(map(len, prompts))
        self.scorer = None  # the engine gives the model a cache of its own
        engine = Engine(
            self.model, sampling(settings), batch=self.batch, length=longest + new_tokens,
            kv_cache=self.kv_cache, compile_mode=COMPILE_MODE if self.compiled else None,
        )  # fmt: skip
        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for done in range(0, len(order), self.batch):
            members = order[done : done + self.batch]
            rows = [prompts[i] for i in members]
            rows += rows[-1:] * (self.batch - len(rows))
            new = self._decode(engine, rows, new_tokens, until)
            for i, text in zip(members, new, strict=False):
                texts[i] = text
            if not quiet:
                progress(f"generated {done + len(members)} of {len(order)} continuations")
        return texts

    def _decode(
        self, engine: Engine, prompts: list[list[int]], new_tokens: int, until: list[str]
    ) -> list[str]:
        """One batch: each row runs to EOS or to the first of the stop strings, which is cut off."""
        streams = [self.tokenizer.stream(skip_special=True) for _ in prompts]
        texts, done = [""] * len(prompts), [False] * len(prompts)

        def take(token: Tensor) -> bool:
            for b, newest in enumerate(token[:, 0].tolist()):
                if not done[b]:
                    done[b] = newest in self.tokenizer.eos_ids
                    texts[b] += "" if done[b] else streams[b].push(newest)
                    done[b] |= any(stop in texts[b] for stop in until)
            return all(done)

        u = engine.uniforms(new_tokens)
        with torch.inference_mode():
            token = sample(engine.prefill(prompts), u[0], engine.sampling)[:, None]
            start = torch.tensor([len(p) for p in prompts], device=engine.device)
            for i in range(1, new_tokens):
                if take(token):
                    break
                token = engine.decode_step(token.clone(), start, u[i])
                start += 1
            else:
                take(token)
            engine.check_keys([position - 1 for position in start.tolist()])
        texts = [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]
        return [min((t.split(stop)[0] for stop in until), key=len) for t in texts]


def sampling(settings: dict) -> Sampling:
    """How a task wants tokens drawn: greedy, unless it names a temperature or do_sample."""
    temperature = float(settings.get("temperature") or 0)
    if settings.get("do_sample") and not temperature:
        temperature = 1.0
    if settings.get("do_sample") is False or not temperature:
        return Sampling(0.0)
    top_k, top_p = settings.get("top_k"), settings.get("top_p")
    return Sampling(temperature, TOP_K if top_k is None else top_k, top_p or 1.0)


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: list[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    include_path: Path | None = None,
    **options,
) -> tuple[dict[str, dict[str, float]], str]:
    """Run lm_eval's tasks; `options` go to FlatllamaLM. -> ({task: {metric: value}}, a table)."""
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise UserError(f"lm_eval has no task {', '.join(unknown)}: `lm_eval ls tasks` lists them")
    lm = FlatllamaLM(model, tokenizer, **options)
    try:
        results = simple_evaluate(
            model=lm, tasks=tasks, task_manager=manager, limit=limit, num_fewshot=fewshot,
            log_samples=False, bootstrap_iters=1000,
        )  # fmt: skip
    except (OSError, DatasetsError) as error:  # not here, cannot be fetched, or damaged
        line = " ".join(str(error).split())
        raise UserError(f"cannot load the data of {', '.join(tasks)}: {line}") from None
    except (TemplateError, ValueError) as error:  # of the task's own making
        line = " ".join(str(error).split())
        raise UserError(f"lm_eval cannot run {', '.join(tasks)}: {line}") from None
    progress("")
    figures = {
        task: {k.removesuffix(",none"): v for k, v in row.items() if isinstance(v, int | float)}
        for task, row in results["results"].items()
    }
    return figures, make_table(results)
