"""Run a kernel: its blocks one after another, their warps between barriers in any order."""

import numpy as np
import torch

from kernels.cuda.launch import Launch
from scripts.ptx import arithmetic, movement, tensor_cores  # noqa: F401 - they register instructions
from scripts.ptx.memory import SHARED_BASE, WARP, Memory, Tensors
from scripts.ptx.numbers import RAW, WIDTH, Array, EmulationError
from scripts.ptx.program import SPECIAL, Program, parse
from scripts.ptx.warps import Warps

UNSET = 0xDEADBEEFDEADBEEF  # what a register holds at first


def emulate(launch: Launch, capability: int, seed: int = 0) -> int:
    """Run a kernel on tensors in the CPU's memory, as compiled for that compute capability.

    Seed, result and errors as for `run`.
    """
    compiled, signature = launch.compile(capability), launch.source().signature
    given = [launch.arguments[name] for name, kind in signature.items() if kind != "constexpr"]
    return run(compiled.asm["ptx"], launch.grid, given, compiled.metadata.shared, seed)


@np.errstate(all="ignore")
def run(
    ptx: str, grid: tuple[int, ...], given: list[torch.Tensor | int | float], shared: int,
    seed: int = 0,
) -> int:  # fmt: skip
    """Run the kernel of a PTX text; the tensors hold its results.

    Args:
        grid: blocks in each dimension.
        given: the kernel's arguments; those behind the last are 0.
        shared: bytes of dynamic shared memory of a block.
        seed: of all that is left to luck.

    Returns:
        Cycles that shared memory takes for what all blocks ask of it.

    Raises:
        EmulationError: it did what a GPU would punish, or has instructions that are not modelled.
    """
    program, random, cycles = parse(ptx), np.random.default_rng(seed), 0
    tensors = Tensors([v for v in given if isinstance(v, torch.Tensor)])
    rest = [0] * (len(program.parameters) - len(given))
    parameters = {
        name: argument_bits(value, kind, tensors)
        for (name, kind), value in zip(program.parameters, [*given, *rest], strict=True)
    }
    fours = any(line.name.startswith("wgmma") for line in program.code)
    in_step = int(random.choice([4 * WARP if fours else WARP, program.threads]))
    for block in blocks_of(grid, random):
        memory = Memory(SHARED_BASE, shared)
        parts = []
        for registers in register_files(program, min(in_step, program.threads)):
            for name, value in zip(SPECIAL[1:], (*block, *grid), strict=False):
                registers[program.numbers[name]][:] = value
            late = bool(random.integers(2))
            parts.append(Warps(registers, tensors, memory, parameters, late))
        run_block(program, parts, random)
        cycles += memory.wavefronts
    tensors.give_back()
    return cycles


def argument_bits(value: torch.Tensor | int | float, kind: str, tensors: Tensors) -> int:
    """A kernel's argument as the bits of its parameter."""
    if isinstance(value, torch.Tensor):
        return tensors.address(value)
    if isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return value & ((1 << WIDTH[kind]) - 1)


def blocks_of(grid: tuple[int, ...], random: np.random.Generator) -> Array:
    """x, y and z of all blocks, in any order."""
    return random.permutation(list(np.ndindex(*(*grid, 1, 1)[:3])))


def register_files(program: Program, in_step: int) -> list[list[Array]]:
    """Registers by number, [in_step] each, for every so many threads of a block."""
    whole = []
    for number, width in enumerate(program.widths):
        value = program.constants.get(number, UNSET & ((1 << width) - 1))
        whole.append(np.full(program.threads, value, np.uint64).astype(RAW[width]))
    whole[program.numbers["%tid.x"]][:] = np.arange(program.threads)
    starts = range(0, program.threads, in_step)
    return [[register[s : s + in_step] for register in whole] for s in starts]


def run_block(program: Program, parts: list[Warps], random: np.random.Generator) -> None:
    """All warps of a block to their end. EmulationError if some wait for ever."""
    while True:
        for i in random.permutation(len(parts)):
            if parts[i].barrier is None:
                advance(parts[i], program)
        waiting: dict[str, list[Warps]] = {}
        for w in parts:
            if w.barrier is not None:
                waiting.setdefault(w.barrier[0], []).append(w)
        ready = [g for g in waiting.values() if sum(w.threads for w in g) >= g[0].barrier[1]]
        for w in (w for group in ready for w in group):
            w.barrier = None
        if not waiting:
            return
        if not ready:
            raise EmulationError("warps wait at a barrier for others that never come")


def advance(w: Warps, program: Program) -> None:
    """Run warps up to a barrier or the end. Of threads that parted, those furthest behind go on."""
    while w.fragments:
        at = min(w.fragments)
        mask = w.fragments.pop(at)
        line = program.code[at]
        w.mask = mask
        if line.guard is not None:
            chosen = w.r[line.guard] ^ line.negated
            w.mask = everyone_is_none(chosen if mask is None else chosen & mask)
        none = w.mask is not None and not w.mask.any()
        if line.name.startswith(("bar.sync", "barrier.sync")):
            if w.fragments or w.mask is not None:
                raise EmulationError("a barrier that only a part of a warp comes to")
            name, *count = line.text.split(None, 1)[1].split(",")
            w.barrier = name, int(count[0]) if count else program.threads
            arrive(w, at + 1, None)
            return
        if line.name == "ret" or line.target is not None:
            if line.target is not None and not none:
                arrive(w, line.target, w.mask)
            if w.mask is not None:  # those who stay
                arrive(w, at + 1, ~w.mask if mask is None else mask & ~w.mask)
            continue
        if line.run is not None and not none:
            try:
                line.run(w)
            except EmulationError as error:
                raise EmulationError(f"{error}: {line.text}") from None
        arrive(w, at + 1, mask)


def arrive(w: Warps, at: int, mask: Array | None) -> None:
    """Threads come to a line, where others may be already."""
    if mask is not None and at in w.fragments:
        mask = mask | w.fragments[at]
    if mask is None or mask.any():
        w.fragments[at] = everyone_is_none(mask)


def everyone_is_none(mask: Array | None) -> Array | None:
    return None if mask is None or mask.all() else mask
