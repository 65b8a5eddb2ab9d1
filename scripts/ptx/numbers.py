"""Registers' bits as numbers, and numbers as bits. An array has an entry for each thread."""

import numpy as np
import torch

Array = np.ndarray

RAW = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # by bits
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
WIDTH = {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32, "e4m3x2": 16} | {
    letter + str(bits): bits for letter in "subf" for bits in (8, 16, 32, 64)
}  # bits of a type
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()


class EmulationError(Exception):
    """The kernel did what a GPU would punish, or something that is not modelled."""


def integer(kind: str) -> type:
    """NumPy's type of as many bits, with a sign if the type has one."""
    return (SIGNED if kind[0] == "s" else RAW)[WIDTH[kind]]


def round_bf16(x: Array) -> Array:
    """fp64 -> the bits of bf16, rounded once to the nearest, ties to even."""
    single = x.astype(np.float32)
    bits, back = single.view(np.uint32), single.astype(np.float64)
    inexact = (back != x) & np.isfinite(x)
    # cut off and marked as inexact in the last place: the second rounding is then the only one
    bits = np.where(inexact, (bits - (np.abs(back) > np.abs(x))) | 1, bits).astype(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def decode(raw: Array, kind: str) -> Array:
    """Bits -> numbers, of packed types all; halves as fp64."""
    if kind in ("bf16", "bf16x2"):
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if kind in ("f16", "f16x2"):
        return raw.view(np.float16).astype(np.float64)
    if kind == "e4m3x2":
        return E4M3[raw.view(np.uint8)]
    if kind in ("f32", "f64"):
        return raw.view(np.float32 if kind == "f32" else np.float64)
    return raw.view(integer(kind))


def encode(value: Array, kind: str) -> Array:
    """Numbers -> bits, rounded once."""
    if kind in ("bf16", "bf16x2"):
        return round_bf16(value.astype(np.float64)).view(RAW[WIDTH[kind]])
    if kind in ("f16", "f16x2"):
        return value.astype(np.float16).view(RAW[WIDTH[kind]])
    if kind in ("f32", "f64"):
        return value.astype(np.float32 if kind == "f32" else np.float64).view(RAW[WIDTH[kind]])
    return value.astype(integer(kind))
