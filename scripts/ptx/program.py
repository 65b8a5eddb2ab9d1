"""The text of PTX as a list of instructions, each with the function that does it."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from scripts.ptx.memory import SHARED_BASE
from scripts.ptx.numbers import WIDTH, EmulationError

SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
BUILDERS: dict[str, Callable] = {}  # by the first part of an instruction's name


@dataclass
class Instruction:
    """One line. `run` does it for some warps; None where nothing is to do here."""

    text: str
    name: str
    guard: int | None = None  # the register of its predicate
    negated: bool = False
    run: Callable | None = None
    target: int | None = None  # of a branch


@dataclass
class Program:
    """A kernel: parameters (name, type), registers by number, instructions."""

    threads: int
    parameters: list[tuple[str, str]]
    numbers: dict[str, int] = field(default_factory=dict)  # of a register or constant
    widths: list[int] = field(default_factory=list)  # bits, by number
    constants: dict[int, int] = field(default_factory=dict)  # bits, by number
    code: list[Instruction] = field(default_factory=list)

    def declare(self, name: str, width: int) -> int:
        """A register's number, a new one if need be."""
        if name not in self.numbers:
            self.numbers[name] = len(self.widths)
            self.widths.append(width)
        return self.numbers[name]

    def source(self, text: str, kind: str) -> int:
        """The register that an operand is read from; constants have registers of their own."""
        if text in self.numbers:
            return self.numbers[text]
        if text == "global_smem":
            value = SHARED_BASE
        elif re.match(r"0[fd][0-9A-Fa-f]+$", text):
            value = int(text[2:], 16)
        elif re.match(r"-?\d", text):
            value = int(text.rstrip("U"), 0)
        else:
            raise EmulationError(f"unknown operand {text}")
        width = WIDTH[kind]
        number = self.declare(f"{text}:{width}", width)
        self.constants[number] = value & ((1 << width) - 1)
        return number

    def sources(self, texts: list[str], kind: str) -> list[int]:
        return [self.source(text, kind) for text in texts]


def builds(*names: str) -> Callable:
    """Register a function (program, name, parts, operands) -> what the instruction does."""

    def register(function: Callable) -> Callable:
        BUILDERS.update(dict.fromkeys(names, function))
        return function

    return register


@functools.lru_cache(64)
def parse(ptx: str) -> Program:
    """The one kernel of a PTX text. EmulationError for instructions that are not modelled."""
    head = re.search(r"\.entry\s+\w+\((.*?)\)(.*?)\{", ptx, re.S)
    parameters = re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", head[1].strip())
    threads = int(re.search(r"\.reqntid\s+(\d+)", head[2])[1])
    program = Program(threads, [(name, kind) for kind, name in parameters])
    for name in SPECIAL:
        program.declare(name, 32)
    body = re.sub(r"//.*|^\s*\.(loc|file|section|pragma)\b.*$", "", ptx[head.end() :], flags=re.M)
    labels, jumps = {}, []
    for text in statements(program, body):
        if text.endswith(":"):
            labels[text[:-1]] = len(program.code)
            continue
        negated, guard, name, rest = re.fullmatch(
            r"(?:@(!?)(\S+) )?([a-z][\w.:]*) ?(.*)", text
        ).groups()
        if guard and guard not in program.numbers:
            raise EmulationError(f"unknown predicate: {text}")
        line = Instruction(text, name, program.numbers.get(guard), bool(negated))
        first, *parts = name.split(".")
        if first == "bra":
            jumps.append((line, rest))
        elif name != "ret" and not name.startswith(("bar.sync", "barrier.sync", "bar.warp.sync")):
            if first not in BUILDERS:
                raise EmulationError(f"not modelled: {text}")
            try:
                line.run = BUILDERS[first](program, first, parts, operands(rest))
            except (KeyError, ValueError) as error:  # an operand of a kind that is not known
                raise EmulationError(f"not modelled: {text}") from error
        program.code.append(line)
    for line, label in jumps:
        line.target = labels[label]
    return program


def statements(program: Program, body: str) -> list[str]:
    """Instructions and labels, in order. Registers of inner blocks get names of their own."""
    found, scopes, at, number = [], [{}], 0, 0
    pattern = re.compile(r"\s*([{}]|\$?\w+:(?!:)|[^;]*;)")
    while True:
        match = pattern.match(body, at)
        at, text = match.end(), " ".join(match[1].rstrip(";").split())
        names = scopes[-1]
        if text == "{":
            scopes.append(dict(names))
            number += 1
        elif text == "}":
            scopes.pop()
            if not scopes:
                return found
        elif text.startswith(".reg"):
            _, kind, declared = text.split(None, 2)
            for name in declared.replace(" ", "").split(","):
                stem, _, count = name.rstrip(">").partition("<")
                for each in [stem + str(i) for i in range(int(count))] if count else [stem]:
                    names[each] = each if len(scopes) == 1 else f"{each}@{number}"
                    program.declare(names[each], WIDTH[kind[1:]])
        elif text:
            words = re.split(r"((?<![.\w])[%\w]+)", text)
            found.append("".join(names.get(word, word) for word in words))


def operands(text: str) -> list[str | list[str]]:
    """Split at the commas; {a, b} is a list, brackets are taken off addresses."""
    found = re.findall(r"\{[^}]*\}|[^,{}]*[^,{}\s][^,{}]*", text)
    return [
        [part.strip() for part in o.strip("{}").split(",")] if o[0] == "{" else o.strip("[] ")
        for o in found
    ]
