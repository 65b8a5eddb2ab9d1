"""The mode table: which formats and algorithms there are, and how a mode's name is read.

A mode is `<format>[-<algorithm>]`: the format says how a weight is stored and multiplied
(kernels/), the algorithm chooses its codes. Any algorithm works on any format's grid.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration import InputStatistics
from errors import UserError
from gptq import gptq
from kernels import FORMATS, Grid

FLOAT_MODES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def round_to_nearest(w: Tensor, grid: Grid, stats: InputStatistics | None = None):
    """Each weight to the nearest point of its group's grid."""
    params = grid.fit(w)
    return grid.round_to_nearest(w, params), params


@dataclass(frozen=True)
class Algorithm:
    """`run(w [N, K] fp32, grid, stats, **settings) -> (codes [N, K], params)`."""

    run: Callable
    calibrated: bool
    summary: str


ALGORITHMS = {
    "": Algorithm(round_to_nearest, False, "round to nearest"),
    "gptq": Algorithm(gptq, True, "GPTQ: errors fed forward through the inverse Hessian"),
}


@dataclass(frozen=True)
class Mode:
    """A parsed mode. `format` is "bf16", "fp16", "fp32" or a key of FORMATS."""

    format: str
    algorithm: str
    groupsize: int | None

    def __str__(self) -> str:
        return self.format + (f"-{self.algorithm}" if self.algorithm else "")

    @property
    def settings(self) -> dict:
        """A quantized layer's entry in the header."""
        rest = {} if self.groupsize is None else {"groupsize": self.groupsize}
        return {"format": self.format, **rest}


def mode_names() -> list[str]:
    """Every mode there is."""
    pairs = [f"{f}-{a}" if a else f for f in FORMATS for a in ALGORITHMS]
    return [*FLOAT_MODES, *pairs]


def parse_mode(text: str, groupsize: int | None = None) -> Mode:
    """A Mode from its name; `groupsize` None takes the format's default."""
    if text in FLOAT_MODES:
        return Mode(text, "", None)
    if text not in mode_names():
        close = difflib.get_close_matches(text, mode_names(), 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown mode {text!r}; {hint}known: {', '.join(mode_names())}")
    name = max((f for f in FORMATS if text == f or text.startswith(f + "-")), key=len)
    default = FORMATS[name].default_groupsize
    if default is None and groupsize is not None:
        raise UserError(f"mode {text!r} has one scale per row: leave --groupsize out")
    sizes = FORMATS[name].groupsizes
    if groupsize is not None and groupsize not in sizes:
        fitting = ", ".join(map(str, sizes)) + (" (0: one scale per row)" if 0 in sizes else "")
        raise UserError(f"group size {groupsize} does not fit {text!r}: take one of {fitting}")
    return Mode(name, text[len(name) + 1 :], default if groupsize is None else groupsize)


def head_mode(mode: Mode, lm_head: str | None) -> Mode:
    """The mode of the LM head. By default int8, whatever the blocks are; a float mode keeps it."""
    if mode.format in FLOAT_MODES or lm_head == "keep":
        return Mode("bf16", "", None)
    if lm_head == "same":  # round-to-nearest: the head sees no calibrated stream
        return Mode(mode.format, "", mode.groupsize)
    return Mode("int8", "", None)
