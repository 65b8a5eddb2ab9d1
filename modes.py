"""The mode table: which formats and algorithms there are, and how a mode's name is read.

A mode is `<format>[-<algorithm>]`: the format says how a weight is stored and multiplied
(kernels/), the algorithm chooses its codes. Any algorithm works on any format's grid that it makes
sense for. `quantize_linear` applies a mode to one layer.
"""

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import awq
import gptq
import hqq
import smoothquant
from calibration import InputStatistics
from errors import UserError
from kernels.formats import FORMATS
from kernels.linear import Grid, QuantizedLinear
from kernels.packing import row_chunks

FLOAT_MODES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOAT_NAMES = {dtype: name for name, dtype in FLOAT_MODES.items()}


def round_to_nearest(w: Tensor, grid: Grid, stats: InputStatistics | None = None):
    """Each weight to the nearest point of its group's grid."""
    params = grid.fit(w)
    return grid.round_to_nearest(w, params), params


@dataclass(frozen=True)
class Algorithm:
    """`run(w [N, K] fp32, grid, stats, *, options) -> (codes [N, K], params)`.

    Attributes:
        calibrated: needs `stats`, the InputStatistics of the layer.
        flags: options that the command line may pass on, by flags of these names in quantize.py.
        check: a UserError for options that make no sense.
        scales_input: the params carry "input_scale" [K], see QuantizedLinear.
        refuse: why the algorithm makes no sense for a format, given a layer of it; or None.
    """

    run: Callable
    calibrated: bool
    summary: str
    flags: tuple[str, ...] = ()
    check: Callable[..., None] = lambda **options: None
    scales_input: bool = False
    refuse: Callable[[QuantizedLinear], str | None] = lambda layer: None


ALGORITHMS = {
    "": Algorithm(round_to_nearest, False, "round to nearest"),
    "hqq": Algorithm(hqq.hqq, False, "HQQ: zero points refitted, large errors forgiven",
                     check=hqq.check, refuse=hqq.refuse),
    "gptq": Algorithm(gptq.gptq, True, "GPTQ: errors fed forward through the inverse Hessian",
                      ("percdamp", "clip_steps", "act_order", "refinements"), gptq.check),
    "awq": Algorithm(awq.awq, True, "AWQ: columns of large inputs scaled up, ranges clipped",
                     check=awq.check, scales_input=True, refuse=awq.refuse),
    "smooth": Algorithm(smoothquant.smoothquant, True,
                        "SmoothQuant: outliers of the inputs moved into the weight",
                        ("alpha",), smoothquant.check, scales_input=True,
                        refuse=smoothquant.refuse),
}  # fmt: skip

# Modes that time their candidates on the device and pick one for each layer (autoquant.py).
AUTOQUANT = {
    "autoquant": ("bf16", "int8", "int8dq"),
    "autoquant-int4": ("bf16", "int8dq", "int4:64"),
    "autoquant-int4hqq": ("bf16", "int8dq", "int4-hqq:64"),
    "autoquant-float8": ("bf16", "float8", "float8dq-tensor", "float8dq-row"),
    "autoquant-all": (
        "bf16", "int8", "int8dq", "int4:64", "int4-hqq:64", "float8", "float8dq-tensor",
        "float8dq-row",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """A parsed mode. `format` is "bf16", "fp16", "fp32", or a key of FORMATS or AUTOQUANT."""

    format: str
    algorithm: str
    groupsize: int | None

    def __str__(self) -> str:
        return self.format + (f"-{self.algorithm}" if self.algorithm else "")

    @property
    def needs_checkpoint(self) -> bool:
        """Whether only quantize.py makes it: from text, or by timing."""
        return self.format in AUTOQUANT or ALGORITHMS[self.algorithm].calibrated

    @property
    def arguments(self) -> dict:
        """Of the format's constructor."""
        return {} if self.groupsize is None else {"groupsize": self.groupsize}

    @property
    def settings(self) -> dict:
        """A quantized layer's entry in the header."""
        scaled = {"input_scale": True} if ALGORITHMS[self.algorithm].scales_input else {}
        return {"format": self.format, **self.arguments, **scaled}


@functools.cache
def refusal(format: str, algorithm: str) -> str | None:
    """Why a pair makes no sense, or None if it does."""
    return ALGORITHMS[algorithm].refuse(FORMATS[format](256, 16))


def mode_names() -> list[str]:
    """Every mode there is."""
    pairs = [(f, a) for f in FORMATS for a in ALGORITHMS if refusal(f, a) is None]
    return [*FLOAT_MODES, *(f"{f}-{a}" if a else f for f, a in pairs), *AUTOQUANT]


def parse_mode(text: str, groupsize: int | None = None) -> Mode:
    """A Mode from its name; `groupsize` None takes the format's default."""
    if text in FLOAT_MODES:
        if groupsize is not None:
            raise UserError(f"mode {text!r} has no groups: leave --groupsize out")
        return Mode(text, "", None)
    if text in AUTOQUANT:
        if groupsize is not None:
            raise UserError(f"mode {text!r} fixes its candidates: leave --groupsize out")
        return Mode(text, "", None)
    pairs = {f"{f}-{a}" if a else f: (f, a) for f in FORMATS for a in ALGORITHMS}
    if text not in pairs:
        close = difflib.get_close_matches(text.lower(), mode_names(), 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown mode {text!r}; {hint}quantize.py --list shows all")
    name, algorithm = pairs[text]
    if reason := refusal(name, algorithm):
        raise UserError(f"mode {text!r} makes no sense: {reason}")
    default = FORMATS[name].default_groupsize
    if default is None and groupsize is not None:
        raise UserError(f"mode {text!r} has one scale per row: leave --groupsize out")
    sizes = FORMATS[name].groupsizes
    if groupsize is not None and groupsize not in sizes:
        fitting = ", ".join(map(str, sizes)) + (" (0: one scale per row)" if 0 in sizes else "")
        raise UserError(f"group size {groupsize} does not fit {text!r}: take one of {fitting}")
    return Mode(name, algorithm, default if groupsize is None else groupsize)


def parse_grouped(text: str) -> Mode:
    """A Mode from `mode` or `mode:groupsize`, as int4:64."""
    name, colon, size = text.partition(":")
    if colon and not size.isdecimal():
        raise UserError(f"mode {text!r}: after the colon comes a group size, as in int4:64")
    return parse_mode(name, int(size) if colon else None)


def head_mode(mode: Mode, lm_head: str | None) -> Mode:
    """The mode of the LM head. By default int8, whatever the blocks are; a float mode keeps it.

    Autoquant picks the head's mode too.
    """
    if mode.format in FLOAT_MODES and lm_head == "int8":
        raise UserError(f"mode {mode} quantizes nothing: leave --lm_head out")
    if mode.format in FLOAT_MODES or lm_head == "keep":
        return Mode("bf16", "", None)
    if mode.format in AUTOQUANT and lm_head != "int8":
        return mode
    if lm_head == "same":  # round-to-nearest: the head sees no calibrated stream
        return Mode(mode.format, "", mode.groupsize)
    return Mode("int8", "", None)


def list_modes() -> str:
    """The table of formats and algorithms, for --list."""
    columns = [name or "nearest" for name in ALGORITHMS]
    head = f"{'format':<16}bits  group  inputs  " + "".join(f"{c:<9}" for c in columns)
    lines, reasons = [head.rstrip()], {}
    for name, cls in FORMATS.items():
        with torch.device("meta"):
            layer = cls(4096, 4096)
        bits = layer.weight_bytes() * 8 / 4096**2
        group = cls.default_groupsize or ("tensor" if "scales" in cls.shared else "row")
        inputs = "-" if layer.input_way == "none" else "8-bit"
        pairs = [refusal(name, a) for a in ALGORITHMS]
        cells = "".join(f"{'-' if reason else 'yes':<9}" for reason in pairs)
        lines.append(f"{name:<16}{bits:<6.3f}{group:<7}{inputs:<8}{cells}".rstrip())
        for algorithm, reason in zip(ALGORITHMS, pairs, strict=True):
            reasons[algorithm] = reasons.get(algorithm) or reason
    lines += ["", "bits: per weight, 4096 columns; group: columns that share a scale (--groupsize)"]
    lines += ["", f"{'algorithm':<11}{'needs':<18}what it does"]
    for name, algorithm in ALGORITHMS.items():
        needs = "calibration text" if algorithm.calibrated else "-"
        why = f"; '-' because {reasons[name]}" if reasons[name] else ""
        lines.append(f"{name or 'nearest':<11}{needs:<18}{algorithm.summary}{why}")
    lines += ["", f"{'autoquant':<21}candidates, timed on --device; the fastest for each layer"]
    lines += [f"{name:<21}{' '.join(candidates)}" for name, candidates in AUTOQUANT.items()]
    lines += ["", "modes: " + " ".join(mode_names())]
    return "\n".join(lines)


def quantize_linear(
    linear: nn.Linear,
    mode: Mode,
    stats: InputStatistics | None = None,
    dtype: torch.dtype | None = None,
    grid: Grid | None = None,
    **options,
) -> nn.Module:
    """The quantized module that stands in for `linear`: same device and bias.

    `dtype` is the model's, in which scales may be stored; by default the weight's own. `grid` is
    one that has learned already, for a part of the rows. `options` go to the algorithm.
    """
    weight, cls = linear.weight, FORMATS[mode.format]
    dtype = dtype or weight.dtype
    check_finite(weight, f"a weight {list(weight.shape)}")
    chunks = row_chunks(*weight.shape)
    if grid is None:
        grid = make_grid(mode, linear.in_features, dtype)
        grid.learn(weight[rows].detach().float() for rows in chunks)
    algorithm = ALGORITHMS[mode.algorithm]
    if algorithm.calibrated:
        check_finite(stats.mean_abs, "what a layer is given in the calibration")
        codes, params = algorithm.run(weight.detach().float(), grid, stats, **options)
    else:  # rows are independent: a few at a time bounds the memory
        parts = [
            algorithm.run(weight[rows].detach().float(), grid, None, **options) for rows in chunks
        ]
        codes = torch.cat([c for c, _ in parts])
        params = {k: torch.cat([p[k] for _, p in parts]) for k in parts[0][1]}
    bias = None if linear.bias is None else linear.bias.detach()
    input_scale = params.pop("input_scale", None)
    params |= grid.shared()
    return cls.from_codes(codes, params, bias, dtype, input_scale, **mode.arguments)


def check_finite(tensor: Tensor, what: str) -> None:
    """A UserError for NaN or inf, which no code stands for."""
    if not tensor.sum(dtype=torch.float32).isfinite():  # a fifth of isfinite().all()'s time
        raise UserError(f"{what} holds NaN or inf: damaged, or too large for this type")


def make_grid(mode: Mode, in_features: int, dtype: torch.dtype) -> Grid:
    """The grid of the mode's format for weights [N, in_features]."""
    with torch.device("meta"):
        layer = FORMATS[mode.format](in_features, 1, dtype=dtype, **mode.arguments)
    grid = layer.grid()
    grid.input_way = layer.input_way
    return grid


def relative_error(weight: Tensor, quantized: nn.Module) -> float:
    """|W - W_hat| / |W|, Frobenius norms; W [N, K] is worked on a few rows at a time."""
    error = total = 0.0
    w_hat = quantized.dequantize()
    for rows in row_chunks(*weight.shape):
        w = weight[rows].double()
        error += (w - w_hat[rows]).square().sum().item()
        total += w.square().sum().item()
    return (error / total) ** 0.5 if total else 0.0
