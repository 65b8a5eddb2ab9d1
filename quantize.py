"""Quantize a model: any module in place, or a checkpoint block by block (the command line).

python quantize.py --mode int4-gptq --groupsize 64 --checkpoint_path checkpoints/...
python quantize.py --list
"""

import argparse
import inspect
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint as ckpt
from autoquant import make_plan, read_or_make_plan
from backends import choose_kernels, use_device
from calibration import CalibrationStream, InputStatistics, calibration_tokens
from checkpoint_quantizer import CheckpointQuantizer, linear_names
from engine import Engine
from errors import (
    Parser,
    UserError,
    check_outputs,
    check_seed,
    cli,
    processes,
    progress,
    write_json,
)
from kernels.formats import FORMATS
from measure import peak_memory
from model import Transformer
from modes import (
    ALGORITHMS,
    AUTOQUANT,
    FLOAT_MODES,
    Mode,
    head_mode,
    list_modes,
    parse_mode,
    quantize_linear,
)
from sampling import Sampling
from tokenizer import load_tokenizer


def check_options(mode: Mode, options: dict) -> None:
    """A UserError for an option that the mode's algorithm, or autoquant, does not take."""
    run = make_plan if mode.format in AUTOQUANT else ALGORITHMS[mode.algorithm].run
    known = inspect.signature(run).parameters.values() if mode.format not in FLOAT_MODES else ()
    known = [p.name for p in known if p.kind is p.KEYWORD_ONLY and p.name != "progress"]
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"{mode} takes no {unknown[0]}; options: {', '.join(known) or 'none'}")


def quantize_(
    model: nn.Module,
    mode: str,
    groupsize: int | None = None,
    *,
    inputs: Iterable[tuple] = (),
    skip: Callable[[str], bool] = lambda name: False,
    repack: bool = True,
    **options,
) -> nn.Module:
    """Quantize, in place, every nn.Linear of any model, except those whose name `skip` picks.

    The model has to call its layers: one that reads their `weight` itself cannot be quantized. A
    layer registered under several names is quantized once. The modes bf16, fp16 and fp32 convert
    the whole model. An Engine goes on with the new layers if its Transformer, or a module that
    holds it, is given. The command line gives the LM head int8 whatever the mode is; here it is a
    layer like the others: skip it, and quantize it by itself, for the same.

    Args:
        mode: as on the command line, "int4-gptq" for example.
        inputs: argument tuples for model(*args), run once through the unquantized model to
            collect the statistics that calibrated algorithms need, or the calls that autoquant
            chooses for.
        repack: lay the weights out for this device's kernels (such a model no longer saves).
        options: passed to the algorithm, percdamp=0.05 for example; min_sqnr to autoquant. A
            UserError for one that it does not take.

    Returns:
        The model; where it is an nn.Linear itself, what takes its place.
    """
    if isinstance(model, nn.Linear):
        given = {"inputs": inputs, "skip": lambda _: skip(""), "repack": repack, **options}
        return quantize_(nn.Sequential(model), mode, groupsize, **given)[0]
    parsed = parse_mode(mode, groupsize)
    check_options(parsed, options)
    if parsed.format in FLOAT_MODES:  # `skip` is of layers that are replaced
        return model.to(FLOAT_MODES[parsed.format])
    places, inputs = places_of_linears(model, skip), argument_tuples(inputs)
    linears = {name: model.get_submodule(name) for name in places}
    modes, stats = dict.fromkeys(linears, parsed), {}
    if parsed.format in AUTOQUANT:
        candidates, inputs = list(AUTOQUANT[parsed.format]), list(inputs)
        if not inputs:
            raise UserError(f"{mode} needs `inputs`: the calls to choose for")
        with torch.no_grad():
            run = lambda: [model(*args) for args in inputs]  # noqa: E731
            modes, options = make_plan(linears, run, candidates, **options).modes(), {}
    elif ALGORITHMS[parsed.algorithm].calibrated:
        stats = _collect(model, linears, inputs)
    for name, layer_mode in modes.items():
        quantized = quantize_linear(linears.pop(name), layer_mode, stats.get(name), **options)
        for place in places[name]:
            model.set_submodule(place, quantized)
    for module in model.modules():
        if isinstance(module, Transformer):
            module.unfuse()  # the operator knows the old layers
    if repack:
        ckpt.repack(model)
    return model


def argument_tuples(inputs: Iterable[tuple]) -> Iterable[tuple]:
    """`inputs`, each of which has to be a tuple: a tensor would be spread over the arguments."""
    if isinstance(inputs, Tensor):
        raise UserError("inputs is a tensor: give a list of argument tuples, [(x,)]")
    for args in inputs:
        if not isinstance(args, (tuple, list)):
            raise UserError(f"inputs holds a {type(args).__name__}: give argument tuples, [(x,)]")
        yield args


def places_of_linears(model: nn.Module, skip: Callable[[str], bool]) -> dict[str, list[str]]:
    """All names of each nn.Linear, but those that `skip` picks, by the first of them."""
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise UserError("the model has no nn.Linear: it may be quantized already")
    places = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and not skip(name):
            places.setdefault(module, []).append(name)
            if reason := unfit(module):
                raise UserError(f"layer {name!r} {reason}")
    return {names[0]: names for names in places.values()}


def unfit(linear: nn.Linear) -> str | None:
    """Why a layer cannot be quantized; None if it can."""
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "is of nn.MultiheadAttention, which like its owners reads weights itself: skip them"
    if isinstance(linear.weight, nn.parameter.UninitializedParameter) or linear.weight.is_meta:
        return "has no weights yet"
    if linear.weight.dtype not in FLOAT_MODES.values():
        return f"is {linear.weight.dtype}: convert it to fp32, bf16 or fp16 first"
    return None if linear.weight.numel() else f"is {list(linear.weight.shape)}: it is empty"


def _collect(
    model: nn.Module, linears: dict[str, nn.Linear], inputs: Iterable[tuple]
) -> dict[str, InputStatistics]:
    """Input statistics of every linear layer over `inputs`."""
    stats = {n: InputStatistics.empty(m.in_features, m.weight.device) for n, m in linears.items()}
    hooks = [
        m.register_forward_pre_hook(
            lambda _, args, named, s=stats[n]: s.add([*args, *named.values()][0]),
            with_kwargs=True,
        )
        for n, m in linears.items()
    ]
    try:
        with torch.no_grad():
            for args in inputs:
                model(*args)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(s.tokens for s in stats.values()):
        raise UserError("a calibrated mode needs `inputs` that reach every linear layer")
    return stats


def default_output(source: ckpt.Checkpoint, mode: Mode) -> Path:
    """model_int4-gptq.g64.safetensors beside the source: for people; the loader reads headers."""
    group = f".g{mode.groupsize}" if mode.groupsize else ""
    return source.directory / f"model_{mode}{group}.safetensors"


SEQ_LENGTH = 1024
CALIBRATION = {  # flags and their defaults; None: SEQ_LENGTH, or the model's context
    "calibration": "bundled", "calibration_samples": 24, "calibration_seq_length": None, "seed": 0,
}  # fmt: skip
GPTQ = {
    name: inspect.signature(ALGORITHMS["gptq"].run).parameters[name].default
    for name in ALGORITHMS["gptq"].flags
}
CHOICE = {"min_sqnr": None, "plan": None, "seed": 0}  # autoquant's


def parse_args() -> argparse.Namespace:
    """The command line; None where a flag of CALIBRATION, GPTQ or CHOICE is not given."""
    parser = Parser(description="Write a quantized checkpoint.")
    defaults = {**CALIBRATION, **GPTQ}

    def add(flag: str, help: str, **rest) -> None:
        parser.add_argument(flag, help=help.format_map(defaults), **rest)

    add("--mode", default="int8", help="<format>[-<algorithm>]; --list shows them; default: int8")
    add("--groupsize", type=int, help="columns that share a scale; default: the format's")
    add("--lm_head", choices=["same", "int8", "keep"],
        help="format of the LM head; default: int8, or what autoquant chooses")  # fmt: skip
    add("--checkpoint_path", type=Path, help="a Hugging Face directory; default: the default model")
    add("--output", type=Path, help="file to write; default: model_<mode>... beside the source")
    add("--device", help="default: cpu; of autoquant a GPU, if there is one")
    add("--calibration", help="bundled, self, or a text file; default: {calibration}")
    add("--calibration_samples", type=int, help="default: {calibration_samples}")
    add("--calibration_seq_length", type=int,
        help=f"tokens of a sample; default: {SEQ_LENGTH}, or the model's context")  # fmt: skip
    add("--percdamp", type=float, help="GPTQ damping, of each diagonal entry; default: {percdamp}")
    add("--clip_steps", type=int,
        help="GPTQ: ranges its clip search tries; 1: none; default: {clip_steps}")  # fmt: skip
    add("--act_order", action=argparse.BooleanOptionalAction,
        help="GPTQ: columns of large inputs first; default: {act_order}")  # fmt: skip
    add("--refinements", type=int,
        help="GPTQ: rounds of refined codes and scales; default: {refinements}")  # fmt: skip
    add("--alpha", type=float, help="SmoothQuant's, 0 to 1; default: searched for each layer")
    add("--min_sqnr", type=float, help="autoquant: signal-to-noise ratio that a layer keeps, in dB")
    add("--plan", type=Path, help="autoquant: JSON of timings and choices, reused if it exists")
    add("--seed", type=int, help="of calibration samples, --calibration self and "
        "autoquant's prompt; default: 0")  # fmt: skip
    add("--json", type=Path, help="write a report here")
    add("--list", action="store_true", help="print formats, algorithms and modes, and stop")
    return parser.parse_args()


def flags_of(mode: Mode) -> set[str]:
    """The flags among CALIBRATION, GPTQ, CHOICE and alpha that the mode takes."""
    if mode.format in AUTOQUANT:
        return set(CHOICE)
    algorithm = ALGORITHMS[mode.algorithm]
    return {*algorithm.flags, *(CALIBRATION if algorithm.calibrated else ())}


def fill_in(args: argparse.Namespace, mode: Mode) -> None:
    """Defaults for the flags that are not given; a UserError for one that `mode` does not take."""
    takes = flags_of(mode)
    for name, default in {**CALIBRATION, **GPTQ, **CHOICE, "alpha": None}.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif name not in takes:
            raise UserError(f"mode {mode} does not use --{name}: leave it out")


def own_samples(
    source: ckpt.Checkpoint, samples: int, length: int, seed: int, device: str
) -> Tensor:
    """Text that the model itself writes at temperature 1, int64 [samples, length].

    Every row starts from a random token, so that the rows differ; no text is needed at all.
    """
    choose_kernels("auto", device)
    model = ckpt.load_model(source, device)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, source.config.vocab_size, (samples,), generator=generator).tolist()
    rows = []
    for i in range(0, samples, 16):
        prompts = [[token] for token in first[i : i + 16]]
        progress(f"the model writes sample {i + 1} of {samples}")
        engine = Engine(model, Sampling(1.0, 0), batch=len(prompts), length=length, seed=i)
        result = engine.generate(prompts, length - 1)
        rows += [p + ids for p, ids in zip(prompts, result.token_ids, strict=True)]
    return torch.tensor(rows)


def calibrate(source: ckpt.Checkpoint, args: argparse.Namespace) -> tuple[CalibrationStream, dict]:
    """The stream of calibration samples, and how it was made, for the header."""
    samples, length = args.calibration_samples, args.calibration_seq_length
    limit = source.config.max_positions
    length = min(SEQ_LENGTH, limit) if length is None else length
    if samples < 1 or length < 2:
        raise UserError("calibration needs at least 1 sample of at least 2 tokens")
    if length > limit:
        raise UserError(f"--calibration_seq_length {length}: the model's context is {limit}")
    if args.calibration == "self":
        tokens = own_samples(source, samples, length, args.seed, args.device)
    else:
        try:
            tokenizer = load_tokenizer(source.directory)
            tokens = calibration_tokens(tokenizer, args.calibration, samples, length, args.seed)
        except (ValueError, OSError) as error:
            raise UserError(f"calibration: {error}") from None
    embeddings = source.tensor("tok_embeddings.weight").to(args.device)
    how = {
        "calibration": Path(args.calibration).name, "samples": samples, "seq_length": length,
        "seed": args.seed,
    }  # fmt: skip
    return CalibrationStream(tokens.to(args.device), embeddings, source.config), how


def check(args: argparse.Namespace) -> tuple[ckpt.Checkpoint, Mode, Path]:
    """The source, the mode and the file to write; a UserError for what cannot work."""
    if processes() > 1:
        raise UserError("quantize.py runs in one process: leave torchrun out")
    mode = parse_mode(args.mode, args.groupsize)
    fill_in(args, mode)
    check_seed(args.seed)
    if args.min_sqnr is not None and not math.isfinite(args.min_sqnr):
        raise UserError(f"--min_sqnr {args.min_sqnr}: give a finite number of dB")
    source = ckpt.open_checkpoint(args.checkpoint_path)
    if source.header:
        raise UserError(f"{source.path} is quantized already: give the source model's directory")
    if args.device is None:
        gpu = mode.format in AUTOQUANT and torch.cuda.is_available()
        args.device = "cuda" if gpu else "cpu"
    use_device(args.device)
    if args.device != "cpu":  # there the C++ kernels are built when they are first wanted
        choose_kernels("auto", args.device)
    output = args.output or default_output(source, mode)
    text = None if args.calibration in ("bundled", "self") else Path(args.calibration)
    check_outputs(args.json, args.plan, replaced=output, inputs=[*source.own_files(), text])
    return source, mode, output


def make_job(
    args: argparse.Namespace, source: ckpt.Checkpoint, mode: Mode, output: Path,
    tell: Callable[[str], None],
) -> CheckpointQuantizer:  # fmt: skip
    """What is to be done, once calibration samples are there or autoquant has chosen."""
    stream, how, modes, head = None, {}, None, head_mode(mode, args.lm_head)
    algorithm = ALGORITHMS[mode.algorithm]
    given = {name: getattr(args, name, None) for name in algorithm.flags}
    options = {name: value for name, value in given.items() if value is not None}
    if mode.format in AUTOQUANT:
        names = linear_names(source.config)[: None if head == mode else -1]
        plan = read_or_make_plan(
            args.plan, source, names, list(AUTOQUANT[mode.format]), args.device, args.min_sqnr,
            args.seed, tell,
        )  # fmt: skip
        modes = plan.modes()
        if head.format in FORMATS:
            modes["output"] = head
        how = {"name": "autoquant", "min_sqnr": plan.min_sqnr}
    elif algorithm.calibrated:
        algorithm.check(**options)  # before the long part begins
        stream, how = calibrate(source, args)
    return CheckpointQuantizer(source, mode, head, output, args.device, stream, options, how, modes)


def main() -> None:
    """Quantize the checkpoint, report."""
    args = parse_args()
    if args.list:
        print(list_modes())
        return
    begin = time.perf_counter()
    source, mode, output = check(args)
    tell = lambda text: progress(f"{text}, {time.perf_counter() - begin:.0f} s")  # noqa: E731
    job = make_job(args, source, mode, output, tell)
    layers = job.run(tell)
    seconds = time.perf_counter() - begin
    size = sum(d.itemsize * torch.Size(s).numel() for d, s in job.specs.values())
    progress("")
    print(f"{output}: {size / 1e6:.1f} MB, {seconds:.1f} s")
    if args.json:
        source_size = sum(p.stat().st_size for p in set(source.files.values()))
        report = {
            "mode": str(mode), "groupsize": mode.groupsize, "algorithm": job.header["algorithm"],
            "weight_bytes": size, "source_weight_bytes": source_size, "seconds": seconds,
            "peak_memory_bytes": peak_memory(args.device),
            "output": str(output), "layers": layers,
        }  # fmt: skip
        write_json(args.json, report)


if __name__ == "__main__":
    cli(main)
