"""Judge a model: perplexity, divergence from a reference, lm_eval tasks.

python eval.py --checkpoint_path FILE --text wiki.test.raw --reference checkpoints/...
python eval.py --checkpoint_path FILE --tasks wikitext hellaswag

Token perplexity, exp of the mean negative log-likelihood, is over non-overlapping windows: the
whole text is encoded once without BOS and cut; each window starts at position 0, all but its first
token are scored, and the last partial window is dropped. It depends on the tokenizer. lm_eval's
word perplexity is another figure, and the two are never mixed.

Against a reference: KL(reference || model) = sum_v p_ref(v) (log p_ref(v) - log p(v)), averaged
over the same tokens, and how often both put the same token first.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from calibration import BUNDLED
from checkpoint import load_model, open_checkpoint
from errors import Parser, UserError, check_outputs, cli, progress, write_json
from graphs import configure_compiler
from loading import add_cache_argument, add_model_arguments, load, model_flags
from measure import device_name, numerics
from model import Transformer
from modes import FLOAT_MODES
from prompts import open_tokenizer
from scorer import ROWS, Scorer
from tokenizer import Tokenizer

WINDOW = 2048  # tokens


@dataclass
class Score:
    """What `perplexity` found. The last three compare with a reference, None without one."""

    protocol: str
    perplexity: float
    tokens: int  # scored
    seq_length: int
    seconds: float
    rows: int  # tokens of a forward pass
    window_losses: list[float]  # nats per token, of each window
    kl_mean: float | None = None
    top1_agreement: float | None = None
    perplexity_ratio: float | None = None


def windows(ids: list[int], seq_length: int, limit: int | None = None) -> Tensor:
    """The first `limit` non-overlapping windows of a text's tokens: [n, seq_length] int64."""
    if seq_length < 2:
        raise UserError(f"windows of {seq_length} tokens: take at least 2")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} windows: take at least 1")
    count = min(len(ids) // seq_length, limit or len(ids))
    if count == 0:
        raise UserError(
            f"the text has {len(ids)} tokens, less than one window of {seq_length}: "
            "give a longer text or a smaller --seq_length"
        )
    return torch.tensor(ids[: count * seq_length]).view(count, seq_length)


def perplexity(
    model: Transformer,
    ids: list[int],
    *,
    seq_length: int = WINDOW,
    limit: int | None = None,
    reference: Transformer | None = None,
    kv_cache: str = "bf16",
    compiled: bool = False,
    rows: int = ROWS,
    report: Callable[[str], None] = lambda text: None,
) -> Score:
    """Token perplexity of `model` on a text's tokens by the protocol above.

    Args:
        ids: the whole text, encoded without BOS.
        limit: of the number of windows; None takes all.
        reference: an unquantized model of the same vocabulary to measure the divergence from; it
            runs over the same windows in the same pass.
        rows: tokens of a forward pass; up to 16 go through the kernels of decoding.
    """
    if rows < 1:
        raise UserError(f"forward passes of {rows} tokens: take at least 1")
    cut = windows(ids, seq_length, limit)
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        sizes = f"{model.config.vocab_size} and {reference.config.vocab_size} tokens"
        raise UserError(f"the model and the reference have vocabularies of {sizes}: not comparable")
    scorer = Scorer(model, 1, seq_length, kv_cache, compiled, rows)
    other = Scorer(reference, 1, seq_length, "bf16", compiled, rows) if reference else None
    begin, sums, losses = time.perf_counter(), torch.zeros(4, dtype=torch.float64), []
    for i, window in enumerate(cut):
        own = score_window(scorer, window, other)
        losses.append(own[0].item() / (seq_length - 1))
        sums += own
        so_far = exp(sums[0].item() / ((i + 1) * (seq_length - 1)))
        report(f"window {i + 1} of {len(cut)}: perplexity {so_far:.4f}")
    tokens = len(cut) * (seq_length - 1)
    loss, reference_loss, kl, agreed = (sums / tokens).tolist()
    if not math.isfinite(loss):
        raise UserError("logits that are no numbers: a weight is NaN or inf, or fp16 overflows")
    score = Score(
        f"token perplexity over non-overlapping {seq_length}-token windows, each from position 0, "
        "no BOS, all but a window's first token scored, the last partial window dropped",
        exp(loss),
        tokens, seq_length, time.perf_counter() - begin, rows, losses,
    )  # fmt: skip
    if reference is not None:
        score.kl_mean, score.top1_agreement = kl, agreed
        score.perplexity_ratio = exp(loss - reference_loss)
    return score


def exp(x: float) -> float:
    """e^x, infinite where math.exp raises."""
    return torch.tensor(x, dtype=torch.float64).exp().item()


def score_window(scorer: Scorer, window: Tensor, reference: Scorer | None = None) -> Tensor:
    """Sums over a window's tokens 1 to n - 1, float64 [4].

    They are the loss, the reference's loss, KL(reference || model), and how often both agree.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    chunks = scorer.logits(window[None])
    others = reference.logits(window[None]) if reference else repeat((None, None))
    for (part, logits), (_, other) in zip(chunks, others, strict=False):
        targets = window[part.start + 1 : part.stop + 1].to(logits.device)[:, None]  # [t, 1]
        own = logits[0, : len(targets)]  # [t, V]; the last token has no target
        z = log_sum_exp(own)
        sums[0] += (z - own.gather(1, targets)).sum().item()
        if other is not None:
            ref = other[0, : len(targets)].to(own.device)
            ref_z = log_sum_exp(ref)
            sums[1] += (ref_z - ref.gather(1, targets)).sum().item()
            further = (ref - ref_z.float()).exp_() * (ref - own)
            sums[2] += (further.sum(-1, True, dtype=torch.float64) - ref_z + z).sum().item()
            sums[3] += (ref.argmax(-1) == own.argmax(-1)).sum().item()
    return sums


def log_sum_exp(x: Tensor) -> Tensor:
    """log sum exp of the rows of x [t, V] fp32: [t, 1] float64.

    torch's log_softmax of fp32 is off by some millionths over vocabularies of 50,000 and more.
    """
    top = x.amax(-1, keepdim=True)
    return (x - top).exp_().sum(-1, keepdim=True, dtype=torch.float64).log() + top


def bundled_text() -> str:
    """The last fifth of the text that ships with the project, from an article's beginning."""
    text = BUNDLED.read_text(encoding="utf-8")
    return text[text.index("\n\n", len(text) * 4 // 5) :].strip()


def read_text(path: Path | None) -> str:
    """The text to score; the project's own, with a word of warning, when there is no path."""
    if path is None:
        print(
            "no --text: scoring the last fifth of data/calibration.txt, the project's own text; "
            "calibrated modes may have seen it, and WikiText figures do not compare",
            file=sys.stderr,
        )
        return bundled_text()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the text {path}: {error}") from None


def run_tasks(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace) -> dict:
    """lm_eval's figures {task: {metric: value}}; the table goes to stdout."""
    try:
        from lm_eval_adapter import evaluate
    except ImportError as error:
        raise UserError(f"--tasks needs lm_eval ({error}): pip install 'lm_eval>=0.4.9'") from None
    results, table = evaluate(
        model, tokenizer, args.tasks, batch=8 if args.batch_size is None else args.batch_size,
        max_length=args.max_length, limit=args.limit, fewshot=args.num_fewshot,
        include_path=args.include_path, kv_cache=args.kv_cache, compiled=args.compile,
    )  # fmt: skip
    print(table)
    return results


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Perplexity, divergence from a reference, lm_eval tasks.")
    add = parser.add_argument
    add_model_arguments(parser)
    add("--text", type=Path, help="plain text to score; default: the project's own")
    add("--seq_length", type=int, help=f"tokens of a window of the text; default: {WINDOW}")
    add("--rows", type=int,
        help="tokens of a forward pass over a window; up to 16 run decoding's kernels; "
        f"default: {ROWS}")  # fmt: skip
    add("--limit", type=int, help="windows of the text, or examples of each task; default: all")
    add("--reference", type=Path, metavar="CHECKPOINT",
        help="report the divergence from this model, usually the unquantized one")  # fmt: skip
    add("--tasks", nargs="+", metavar="TASK", help="of lm_eval, such as wikitext hellaswag")
    add("--include_path", type=Path, help="a folder of further lm_eval tasks")
    add("--num_fewshot", type=int, help="examples in the context of a task; default: the task's")
    add("--batch_size", type=int, help="sequences that run together in tasks; default: 8")
    add("--max_length", type=int, help="context in tasks, in tokens; default: the model's")
    add_cache_argument(parser)
    add("--compile", action="store_true", help="compile the forward pass")
    add("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def run_perplexity(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace) -> Score:
    """Score the text that the command line names, and print the figures."""
    ids = tokenizer.encode(read_text(args.text), bos=False)
    reference = None
    if args.reference:
        source = open_checkpoint(args.reference)
        reference = load_model(source, args.device, FLOAT_MODES.get(args.precision))
    asked = {"seq_length": args.seq_length, "rows": args.rows}
    score = perplexity(
        model, ids, limit=args.limit, reference=reference, kv_cache=args.kv_cache,
        compiled=args.compile, report=progress, **{k: v for k, v in asked.items() if v is not None},
    )  # fmt: skip
    progress("")
    print(f"{score.protocol}:\n{score.perplexity:.4f} over {score.tokens} tokens")
    if reference is not None:
        print(
            f"against {args.reference}: KL {score.kl_mean:.6f} nats a token, same first choice "
            f"{100 * score.top1_agreement:.2f}%, perplexity x {score.perplexity_ratio:.5f}"
        )
    print(f"{score.seconds:.1f} s")
    return score


def stated(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Which of these options the command line gives."""
    return [name for name in names if getattr(args, name) is not None]


def main() -> None:
    """Load the model, score the text, run the tasks, write the JSON."""
    args = parse_args()
    of_text = ("reference", "seq_length", "rows")
    of_tasks = ("include_path", "num_fewshot", "batch_size", "max_length")
    if args.tasks and not args.text and (given := stated(args, of_text)):
        raise UserError(f"--{given[0]} is of a text: give --text beside --tasks, or leave it out")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num_fewshot {args.num_fewshot}: must be at least 0")
    if not args.tasks and (given := stated(args, of_tasks)):
        raise UserError(f"--{given[0]} is of --tasks: give tasks, or leave it out")
    if args.json:
        inputs = {args.text} | open_checkpoint(args.checkpoint_path).own_files()
        if args.reference:
            inputs |= open_checkpoint(args.reference).own_files()
        check_outputs(args.json, inputs=inputs)
    model, mode, directory = load(**model_flags(args))
    tokenizer = open_tokenizer(directory, model, required=True)
    if args.compile:
        configure_compiler(args.device)
    figures = {"model": str(args.checkpoint_path or directory), "mode": mode}
    figures |= {
        "device": device_name(args.device), "threads": torch.get_num_threads(),
        "kernels": args.kernels, "compile": args.compile, **numerics(model),
        "kv_cache": args.kv_cache, "text": str(args.text) if args.text else None,
        "reference": str(args.reference) if args.reference else None, "limit": args.limit,
    }  # fmt: skip
    if args.text or not args.tasks:
        figures |= asdict(run_perplexity(model, tokenizer, args))
    if args.tasks:
        figures["tasks"] = run_tasks(model, tokenizer, args)
    write_json(args.json, figures)


if __name__ == "__main__":
    cli(main)
