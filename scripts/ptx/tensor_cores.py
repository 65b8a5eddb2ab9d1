"""What the threads of a warp do together: shuffles, matrices in shared memory, products.

A tile's entries lie in the registers of 32 lanes as the ISA's figures of `mma.m16n8k16` and
`mma.m16n8k32` say: lane 4 g + t has rows g and g + 8 of the left operand and of the sums, and
column g of the right one.
"""

import re

import numpy as np

from scripts.ptx.arithmetic import not_modelled
from scripts.ptx.memory import WARP
from scripts.ptx.movement import address
from scripts.ptx.numbers import RAW, WIDTH, Array, decode
from scripts.ptx.program import builds
from scripts.ptx.warps import Warps

LANE = np.arange(WARP)
GROUP, IN_GROUP = LANE // 4, LANE % 4
WARPGROUP = 4 * WARP


@builds("shfl")
def _shuffle(program, name, parts, args):
    """Among the 32 lanes; segments (a clamp operand other than 31) are not modelled."""
    mode, out = parts[1], program.numbers[args[0]]
    a, by, clamp = program.sources(args[1:4], "b32")
    if mode not in ("bfly", "idx") or program.constants.get(clamp) != 31:
        raise not_modelled(name, parts)

    def run(w: Warps) -> None:
        w.whole()
        lane, by_lane = np.tile(LANE, w.threads // WARP), w.r[by].astype(np.int64)
        source = (lane ^ by_lane if mode == "bfly" else by_lane) & 31
        w.write(out, "b32", w.r[a].reshape(-1, WARP)[np.arange(w.threads) // WARP, source])

    return run


@builds("ldmatrix", "stmatrix")
def _matrix(program, name, parts, args):
    """8 x 8 matrices of 16 bits; lanes 8 i to 8 i + 7 say where the rows of matrix i are."""
    load = name == "ldmatrix"
    if "m8n8" not in parts or parts[-1] != "b16":
        raise not_modelled(name, parts)
    registers = [program.numbers[a] for a in args[0 if load else 1]]
    where, many = address(program, args[1 if load else 0]), len(registers)
    row, column = GROUP[:, None], 2 * IN_GROUP[:, None] + np.arange(2)  # of a lane
    if "trans" in parts:
        row, column = column, row

    def run(w: Warps) -> None:
        w.whole()
        warps = w.threads // WARP
        w.mask = np.tile(np.arange(WARP) < 8 * many, warps)
        places = w.places(w.shared, where(w), 16)
        w.mask = None
        if load:
            data = w.shared.bytes[places].view(np.uint16).reshape(warps, many, 8, 8)
            for i, register in enumerate(registers):
                raw = np.ascontiguousarray(data[:, i][:, row, column])  # [warps, 32, 2]
                w.write(register, "b32", raw.view(np.uint32).reshape(-1))
        else:
            data = np.empty((warps, many, 8, 8), np.uint16)
            for i, register in enumerate(registers):
                data[:, i][:, row, column] = w.r[register].view(np.uint16).reshape(warps, WARP, 2)
            w.shared.bytes[places] = data.reshape(-1, 8).view(np.uint8)

    return run


def elements(w: Warps, register: int, kind: str) -> Array:
    """A register's numbers [warps, 32, how many it holds], fp64."""
    raw = w.r[register].view(RAW[WIDTH[kind]])
    return decode(raw, kind).astype(np.float64).reshape(w.threads // WARP, WARP, -1)


def left_operand(w: Warps, registers: list[int], kind: str) -> Array:
    """Fragments of A -> [warps, 16, K]."""
    n = 32 // WIDTH[kind]
    a = np.empty((w.threads // WARP, 16, 2 * n * len(registers)))
    for i, register in enumerate(registers):
        columns = n * IN_GROUP[:, None] + 4 * n * (i // 2) + np.arange(n)
        a[:, GROUP[:, None] + 8 * (i % 2), columns] = elements(w, register, kind)
    return a


def right_operand(w: Warps, registers: list[int], kind: str) -> Array:
    """Fragments of B -> [warps, K, 8]."""
    n = 32 // WIDTH[kind]
    b = np.empty((w.threads // WARP, 4 * n * len(registers), 8))
    for i, register in enumerate(registers):
        rows = n * IN_GROUP[:, None] + 4 * n * i + np.arange(n)
        b[:, rows, GROUP[:, None]] = elements(w, register, kind)
    return b


def place_of_sum(i: int) -> tuple[Array, Array]:
    """Rows and columns [32] of the sums in register i, four registers for 8 columns."""
    return GROUP + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * IN_GROUP + i % 2


def sums(w: Warps, registers: list[int], kind: str) -> Array:
    """Fragments of C -> [warps, 16, N]."""
    c = np.empty((w.threads // WARP, 16, 2 * len(registers)))
    for i, register in enumerate(registers):
        rows, columns = place_of_sum(i)
        c[:, rows, columns] = elements(w, register, kind)[..., 0]
    return c


def write_sums(w: Warps, registers: list[int], kind: str, c: Array) -> None:
    """[warps, 16, N] -> fragments of D; integers at their limits, as Triton asks for."""
    if kind == "s32":
        c = np.clip(c, -(2**31), 2**31 - 1)
    for i, register in enumerate(registers):
        rows, columns = place_of_sum(i)
        w.write(register, kind, c[:, rows, columns].reshape(-1))


@builds("mma")
def _mma(program, name, parts, args):
    """mma.sync: d = a b + c, a tile for each warp."""
    if parts[3:5] != ["row", "col"]:
        raise not_modelled(name, parts)
    to, kind, other, of = parts[-4:]
    saturates = "satfinite" in parts
    if kind != other or to != of or (to, saturates) not in (("f32", False), ("s32", True)):
        raise not_modelled(name, parts)
    d, a, b, c = ([program.source(x, to) for x in group] for group in args)

    def run(w: Warps) -> None:
        w.whole()
        y = left_operand(w, a, kind) @ right_operand(w, b, kind) + sums(w, c, of)
        write_sums(w, d, to, y)

    return run


def described(w: Warps, register: int, rows: int, k: int, kind: str, across: bool) -> Array:
    """A matrix [warpgroups, rows, k] in shared memory, by the descriptors in a register.

    It lies in tiles of 8 lines of 16, 32, 64 or 128 bytes, whose pieces of 16 bytes are swapped by
    the number of the line. `across`: the lines go along the rows, not along k.
    """
    descriptors, item = w.r[register][::WARPGROUP], WIDTH[kind] // 8
    first = int(descriptors[0])
    line = (16, 128, 64, 32)[first >> 62]
    leading, stride = ((first >> at & 0x3FFF) << 4 for at in (16, 32))
    row, column = np.arange(rows)[:, None], np.arange(k)[None, :]
    along, lines = (row, column) if across else (column, row)  # in a line, and which line
    if line == 16 and across:
        leading, stride = stride, leading
    along = along * item
    offset = along % line + along // line * leading + lines % 8 * line + lines // 8 * stride
    start = np.array([(int(x) & 0x3FFF) << 4 for x in descriptors])
    at = start[:, None, None] + offset
    at ^= (at >> 7 & (line // 16 - 1)) << 4
    raw = w.shared.bytes[w.shared.places(at.reshape(-1), item)].view(RAW[WIDTH[kind]])
    return decode(raw[:, 0], kind).astype(np.float64).reshape(len(start), rows, k)


@builds("wgmma")
def _wgmma(program, name, parts, args):
    """wgmma.mma_async: d = a b + d, 64 rows for four warps; b, perhaps a, in shared memory."""
    if parts[0] != "mma_async":
        return None  # fences and waits: it ends at once here
    m, n, k = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", parts[3]).groups())
    (to, kind), signs, across = parts[4:6], args[4:6], [x == "1" for x in args[6:]]
    if any(sign != "1" for sign in signs) or parts[6] != kind or to not in ("f32", "s32"):
        raise not_modelled(name, parts)
    d, in_registers = [program.numbers[x] for x in args[0]], isinstance(args[1], list)
    a = program.sources(args[1] if in_registers else [args[1]], "b32")
    b, keep = program.numbers[args[2]], program.source(args[3], "pred")

    def run(w: Warps) -> None:
        w.whole()
        if in_registers:
            left = left_operand(w, a, kind).reshape(-1, m, k)
        else:
            left = described(w, a[0], m, k, kind, len(across) == 2 and across[0])
        right = described(w, b, n, k, kind, bool(across) and across[-1])
        y = (left @ right.swapaxes(1, 2)).reshape(-1, 16, n)
        if w.r[keep].all():
            y = y + sums(w, d, to)
        write_sums(w, d, to, y)

    return run
