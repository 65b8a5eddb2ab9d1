"""What the command lines that run a model share: the flags that say which, and loading it."""

import argparse
import inspect
from pathlib import Path

import torch

import predict
import tp
from backends import check_layers, choose_kernels, use_device
from checkpoint import Checkpoint, load_model, open_checkpoint
from config import CONFIGS
from errors import UserError, check_threads
from kernels import native
from kernels.choice import KERNELS
from measure import check_memory
from model import KV_CACHES, Transformer
from modes import FLOAT_MODES, FLOAT_NAMES, Mode, head_mode, parse_mode
from quantize import quantize_
from random_weights import random_model


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model runs and where."""
    add = parser.add_argument
    add("--checkpoint_path", type=Path, help="a file of quantize.py or a Hugging Face directory; "
        "default: the default model")  # fmt: skip
    add("--quantization", metavar="MODE", help="quantize on load (modes that need no calibration)")
    add("--groupsize", type=int, help="with --quantization; default: the format's")
    add("--precision", choices=FLOAT_MODES,
        help="type of activations and unquantized weights; default: the checkpoint's")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--threads", type=int, help="CPU threads; default: torch's, one per core")
    add("--kernels", choices=KERNELS, default="auto", help="auto: ours, C++ on the CPU and Triton "
        "on a GPU; triton; triton-pdl: Triton with programmatic dependent launch (sm_90); "
        "inductor: plain PyTorch forms; aten: ATen's int4 and int8 products on a GPU")  # fmt: skip
    add("--exact_activations", action="store_true",
        help="CPU: weight-only kernels do not round activations")  # fmt: skip


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """The flag of the cache's type."""
    parser.add_argument("--kv_cache", choices=KV_CACHES, default="bf16",
        help="bf16 is the model's own type; int8 with a scale per token and head")  # fmt: skip


def model_flags(args: argparse.Namespace) -> dict:
    """What the command line says of the model: the arguments of `load`."""
    flags = vars(args)
    return {name: flags[name] for name in inspect.signature(load).parameters if name in flags}


def asked_for(
    quantization: str | None, groupsize: int | None, precision: str | None
) -> tuple[torch.dtype | None, Mode | None]:
    """The dtype and the quantization on load; None: as the checkpoint is."""
    dtype = FLOAT_MODES.get(precision)
    if not quantization:
        if groupsize is not None:
            raise UserError("--groupsize is of --quantization: a checkpoint has its own")
        return dtype, None
    mode = parse_mode(quantization, groupsize)
    if mode.needs_checkpoint:
        raise UserError(f"{mode} is calibrated or timed: write a checkpoint with quantize.py first")
    if mode.format not in FLOAT_MODES:
        return dtype, mode
    if dtype not in (None, FLOAT_MODES[mode.format]):
        raise UserError(f"--quantization {mode} and --precision {precision}: take one")
    return FLOAT_MODES[mode.format], None


def load(
    checkpoint_path: Path | None = None, random_weights: str | None = None,
    quantization: str | None = None, groupsize: int | None = None, precision: str | None = None,
    device: str = "cpu", threads: int | None = None, kernels: str = "auto",
    exact_activations: bool = False,
) -> tuple[Transformer, str, Path | None]:  # fmt: skip
    """The model that these flags ask for -> (Transformer, mode name, directory or None).

    Of the processes of torchrun each gets its share (tp.py). Threads, kernels and exact activations
    are settings of the whole process. random_weights: a name of config.CONFIGS.
    """
    use_device(device)
    check_threads(threads)
    dtype, mode = asked_for(quantization, groupsize, precision)
    if random_weights is not None and checkpoint_path:
        raise UserError("--random_weights needs no --checkpoint_path: take one of them")
    choose_kernels(kernels, device)
    ranks = tp.start(device)
    if threads is not None:  # after the ranks have started, each with a share of the cores
        torch.set_num_threads(threads)
    if device == "cpu" and kernels == "auto":
        native.set_exact_activations(exact_activations or native.exact_activations())
    if random_weights is not None:
        model, name = load_random(random_weights, mode, dtype or torch.bfloat16, ranks, device)
        directory = None
    else:
        checkpoint = open_checkpoint(checkpoint_path)
        model, name = load_stored(checkpoint, mode, dtype, ranks, device)
        directory = checkpoint.directory
    check_layers(model)
    return model, name, directory


def load_random(
    shape: str, mode: Mode | None, dtype: torch.dtype, ranks: tp.Ranks | None, device: str
) -> tuple[Transformer, str]:
    """Random weights of the true shape, and the mode's name."""
    config, name = CONFIGS[shape], str(mode or FLOAT_NAMES[dtype])
    if ranks:
        return tp.load_ranked(ranks, None, config, mode, device, dtype), name
    wanted = predict.weight_bytes(config, name, mode and mode.groupsize)[0]
    check_memory(wanted, f"the weights of {shape} in {name}", device)
    return random_model(config, mode, device, dtype), name


def load_stored(
    checkpoint: Checkpoint, mode: Mode | None, dtype: torch.dtype | None, ranks: tp.Ranks | None,
    device: str,
) -> tuple[Transformer, str]:  # fmt: skip
    """The checkpoint's model, quantized to `mode` if there is one, and its mode's name."""
    if mode and checkpoint.header.get("layers"):
        raise UserError(f"{checkpoint.path} is quantized already: leave --quantization out")
    if ranks:
        model = tp.load_ranked(ranks, checkpoint, checkpoint.config, mode, device, dtype)
    else:
        model = load_model(checkpoint, device, dtype)
        if mode:
            head = head_mode(mode, None)
            quantize_(model, str(mode), mode.groupsize, skip=lambda n: n == "output", repack=False)
            quantize_(model, str(head), head.groupsize)
    name = str(mode or checkpoint.header.get("mode", "fp32"))
    if name in FLOAT_MODES:  # --precision may have changed it
        name = FLOAT_NAMES[model.tok_embeddings.weight.dtype]
    return model, name
