"""Loads, stores, asynchronous copies, atomics."""

from collections.abc import Callable

import numpy as np

from scripts.ptx.arithmetic import not_modelled
from scripts.ptx.numbers import RAW, WIDTH, Array, decode, encode
from scripts.ptx.program import Program, builds
from scripts.ptx.warps import Warps


def address(program: Program, text: str) -> Callable[[Warps], Array]:
    """Of an operand [register + bytes]."""
    base, _, offset = text.replace(" ", "").partition("+")
    register, offset = program.source(base, "u32"), int(offset or "0", 0)
    return lambda w: w.r[register].astype(np.int64) + offset


def as_list(operand: str | list[str]) -> list[str]:
    return operand if isinstance(operand, list) else [operand]


@builds("ld")
def _load(program, name, parts, args):
    space, kind = parts[0], parts[-1]
    raw, outs = RAW[WIDTH[kind]], [program.numbers[a] for a in as_list(args[0])]
    if space == "param":
        return lambda w: w.write(
            outs[0], kind, decode(np.full(w.threads, w.parameters[args[1]]).astype(raw), kind)
        )
    where, size = address(program, args[1]), len(outs) * WIDTH[kind] // 8

    def run(w: Warps) -> None:
        data = w.load(w.space(space), where(w), size).view(raw)
        for i, out in enumerate(outs):
            w.write(out, kind, decode(np.ascontiguousarray(data[:, i]), kind))

    return run


@builds("st")
def _store(program, name, parts, args):
    space, kind = parts[0], parts[-1]
    where, inputs = address(program, args[0]), program.sources(as_list(args[1]), kind)

    def run(w: Warps) -> None:
        data = np.stack([encode(w.read(i, kind), kind) for i in inputs], 1)
        w.store(w.space(space), where(w), data.view(np.uint8))

    return run


@builds("prefetch")
def _prefetch(program, name, parts, args):
    """Nothing but the check of the address."""
    where = address(program, args[0])
    return lambda w: w.load(w.tensors, where(w), 1)


@builds("atom")
def _atomic_add(program, name, parts, args):
    kind, out, value = parts[-1], program.numbers[args[0]], program.source(args[2], parts[-1])
    if "add" not in parts or kind[0] != "u":
        raise not_modelled(name, parts)
    where = address(program, args[1])

    def run(w: Warps) -> None:
        every, add, old = where(w), w.read(value, kind), np.zeros(w.threads, RAW[WIDTH[kind]])
        for i in w.active(np.arange(w.threads)):
            place = w.tensors.places(every[i : i + 1], WIDTH[kind] // 8)[0]
            old[i] = w.tensors.bytes[place].view(old.dtype)[0]
            w.tensors.bytes[place] = (old[i : i + 1] + add[i : i + 1]).view(np.uint8)
        w.write(out, kind, old)

    return run


@builds("cp")
def _copy(program, name, parts, args):
    """cp.async: [shared], [global], bytes, how many of them are read, the rest zeros."""
    if parts[1] == "commit_group":
        return _commit
    if parts[1] == "wait_group":
        return lambda w: (w.whole(), w.wait(int(args[0])))
    if parts[1] != "ca" and parts[1] != "cg":
        raise not_modelled(name, parts)
    to, source, size = address(program, args[0]), address(program, args[1]), int(args[2], 0)
    used = program.source(args[3] if len(args) > 3 else args[2], "u32")
    if program.widths[used] != 32:  # a predicate or a cache policy
        raise not_modelled(name, parts)

    def run(w: Warps) -> None:
        count = w.active(w.r[used])
        data = np.zeros((count.size, size), np.uint8)
        for n in np.unique(count[count > 0]):
            rows = count == n
            places = w.tensors.places(w.active(source(w))[rows], size)  # aligned to all of it
            data[rows, :n] = w.tensors.bytes[places][:, :n]
        places = w.places(w.shared, to(w), size)
        if w.late:
            w.copies.append((places, data))
        else:
            w.shared.bytes[places] = data

    return run


def _commit(w: Warps) -> None:
    w.whole()
    w.groups.append(w.copies)
    w.copies = []
