"""How fast a multiprocessor could go through the loop of a product, from its machine code alone.

python scripts/simulate_loop.py --rows 1 16

A model, not a measurement. Warps issue in order, from four schedulers of one instruction a cycle
each. The machine code itself says how long an instruction keeps its warp from the next one and on
which of six scoreboards it waits; behind a scoreboard stand the latencies below. An integer
instruction keeps its scheduler's unit busy for two cycles, a product of the tensor cores 6.8, and
shared memory moves 128 bytes a cycle for all. Copies from the card's memory have always arrived:
what comes out is a bound, in percent of reading 4.3e12 bytes/s on 132 multiprocessors of 1.755 GHz.

The control bits are as maxas and turingas found them for Volta, and hold up to Hopper; latencies
after Luo et al., arXiv:2402.13499.
"""

import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import Parser
from kernels.choice import load_triton
from kernels.cuda.launch import Launch
from scripts import inspect_kernels
from scripts.inspect_kernels import BYTES_A_CYCLE, class_of, tool

SCHEDULERS = 4
LATENCY = {"LDS": 28, "LDSM": 33, "STS": 20, "STSM": 25, "LDGSTS": 20, "LDG": 500, "SHFL": 25,
           "LDC": 30, "S2R": 25, "MUFU": 20}  # cycles  # fmt: skip
OTHER_LATENCY, READ_LATENCY = 30, 12  # of what else has a scoreboard; until operands are read
BRANCH, BARRIER = 10, 15  # cycles
INTEGER, TENSOR = 2, 6.8  # cycles a warp's instruction keeps its scheduler's unit
TURNS = 6


@dataclass(frozen=True)
class Line:
    """An instruction: cycles to the next one, scoreboards it sets (7: none) and waits for."""

    opcode: str
    stall: int
    sets: int
    sets_when_read: int
    waits: int

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def wavefronts(self) -> int:
        """Cycles of shared memory, without bank conflicts."""
        if self.name not in ("LDS", "LDSM", "STS", "STSM", "LDGSTS"):
            return 0
        if ".128" in self.opcode or self.opcode.endswith("88.4"):
            return 4
        return 2 if ".64" in self.opcode or self.opcode.endswith("88.2") else 1


@dataclass
class Warp:
    program: int
    at: int = 0
    ready: float = 0
    turns: int = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)


def machine_code(cubin: bytes) -> tuple[list[Line], dict[str, int], list[tuple[int, str]]]:
    """Instructions, labels and branches (from, to)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = tool("nvdisasm", "-c", "-hex", file.name)
    first = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
    lines, labels, branches, opcode = [], {}, [], None
    for text_line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", text_line):
            labels[label[1]] = len(lines)
        elif match := first.match(text_line):
            opcode = match[1]
            if jump := re.search(r"`\((\.L\w+)\)", match[2]):
                branches.append((len(lines), jump[1]))
        elif opcode and (word := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", text_line)):
            bits = int(word[1], 16)  # the upper half of the instruction
            lines.append(
                Line(opcode, bits >> 41 & 15, bits >> 46 & 7, bits >> 49 & 7, bits >> 52 & 63)
            )
            opcode = None
    return lines, labels, branches


def longest_loop(cubin: bytes) -> list[Line]:
    lines, labels, branches = machine_code(cubin)
    loops = [lines[labels[to] : at + 1] for at, to in branches if labels.get(to, at + 1) <= at]
    return max(loops, key=len)


class Multiprocessor:
    """Some programs of a few warps each, all in the same loop."""

    def __init__(self, loop: list[Line], warps: int, programs: int):
        self.loop, self.warps_each = loop, warps
        self.warps = [Warp(i // warps) for i in range(warps * programs)]
        self.integer, self.tensor = [0.0] * SCHEDULERS, [0.0] * SCHEDULERS
        self.shared = 0.0
        self.waiting: dict[int, list[Warp]] = {}

    def cycles_a_turn(self) -> float:
        time = 0
        while any(w.turns < TURNS for w in self.warps):
            time += 1
            for scheduler in range(SCHEDULERS):
                for warp in sorted(self.warps[scheduler::SCHEDULERS], key=lambda w: w.ready):
                    if self.can_issue(warp, scheduler, time):
                        self.issue(warp, scheduler, time)
                        break
        return time / TURNS

    def can_issue(self, warp: Warp, scheduler: int, time: int) -> bool:
        if warp.turns == TURNS or warp.ready > time:
            return False
        line = self.loop[warp.at]
        if any(line.waits >> i & 1 and done > time for i, done in enumerate(warp.scoreboards)):
            return False
        unit = {"integer": self.integer, "tensor": self.tensor}.get(class_of(line.opcode))
        return unit is None or unit[scheduler] <= time

    def issue(self, warp: Warp, scheduler: int, time: int) -> None:
        """Units, scoreboards and the warp itself, from an instruction's cycle on."""
        line, done = self.loop[warp.at], 0.0
        if class_of(line.opcode) == "integer":
            self.integer[scheduler] = time + INTEGER
        elif class_of(line.opcode) == "tensor":
            self.tensor[scheduler] = max(self.tensor[scheduler], time) + TENSOR
        if line.wavefronts:
            self.shared = max(self.shared, time) + line.wavefronts
            done = self.shared
        done = max(done, time) + LATENCY.get(line.name, OTHER_LATENCY)
        for board, when in ((line.sets, done), (line.sets_when_read, time + READ_LATENCY)):
            if board < 6:
                warp.scoreboards[board] = max(warp.scoreboards[board], when)
        warp.ready = time + max(1, line.stall)
        warp.at += 1
        if line.name == "BAR":
            self.arrive(warp, time)
        if warp.at == len(self.loop):
            warp.at, warp.turns, warp.ready = 0, warp.turns + 1, max(warp.ready, time + BRANCH)

    def arrive(self, warp: Warp, time: int) -> None:
        """At a barrier of all the program's warps."""
        group = self.waiting.setdefault(warp.program, [])
        group.append(warp)
        warp.ready = float("inf")
        if len(group) == self.warps_each:
            for each in group:
                each.ready = time + BARRIER
            group.clear()


def bound(launch: Launch, capability: int, programs: int) -> float:
    """Bytes of weights that so many programs on a multiprocessor get through, over its share."""
    loop = longest_loop(launch.compile(capability).asm["cubin"])
    turn = Multiprocessor(loop, launch.options["num_warps"], programs).cycles_a_turn()
    planes = [launch.arguments[name] for name in ("fours", "twos", "ones")]
    row = sum(p.element_size() for p in planes if p is not None) * launch.constants["J"]
    return programs * row * launch.constants["BLOCK_N"] / turn / BYTES_A_CYCLE


def main() -> None:
    """Print a table of the formats."""
    parser = Parser(description="Bounds of the products' loops, simulated.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="of x, at most 16")
    parser.add_argument("--programs", type=int, nargs="+", default=[1, 2, 4],
                        help="on a multiprocessor")  # fmt: skip
    parser.add_argument("--only", default="", help="formats whose name has this in it")
    args = parser.parse_args()
    load_triton()
    print("| format | rows of x | " + " | ".join(f"{n} programs" for n in args.programs) + " |")
    print("|---" * (2 + len(args.programs)) + "|")
    for name in inspect_kernels.OF_FEW_ROWS:
        for rows in args.rows if args.only in name else ():
            launch = inspect_kernels.product_launch(name, rows, 90)
            cells = [f"{bound(launch, 90, n):.0%}" for n in args.programs]
            print(f"| {name} | {rows} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
